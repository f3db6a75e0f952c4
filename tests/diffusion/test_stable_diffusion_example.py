"""The documentation's example on a tiny pipeline and on a small real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from tests.diffusion.tiny import tiny_sd


@pytest.fixture
def example(root: Path) -> ModuleType:
    path = root / "docs" / "examples" / "stable_diffusion.py"
    spec = importlib.util.spec_from_file_location("stable_diffusion_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changes(text: str) -> dict[str, list[float]]:
    """Return the changes of the pictures by the first word of each line."""
    lines = [line for line in text.splitlines() if line.count("  ") > 1 and " by " in line]
    return {line.split()[0]: [float(w) for w in line.split() if "." in w] for line in lines}


def test_tiny_pipeline(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_sd().save_pretrained(tmp_path / "pipe")
    out = tmp_path / "out"
    words = ["--preserve", "dog", "sea", "--prompt", "a photo of {}", "--steps", "2"]
    example.main([str(tmp_path / "pipe"), *words, "--out", str(out)])
    said = capsys.readouterr().out
    assert "Certificate" in said
    assert changes(said)["after"] == [0.0, 0.0]
    assert (out / "uce.safetensors").is_file() and (out / "uce" / "eraser_config.json").is_file()
    assert len(list(out.glob("*.png"))) == 12


def test_no_pipeline_prints_help(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        example.main([])
    assert done.value.code == 0 and "PIPELINE" in capsys.readouterr().out.upper()


@pytest.mark.slow
def test_small_real_pipeline(
    example: ModuleType, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--erase", "cat", "--anchor", "banana"]
    words += ["--preserve", "dog", "apple", "lion", "rose", "fish", "pizza"]
    words += ["--prompt", "a picture of a {}", "--steps", "20", "--out", str(tmp_path)]
    example.main([str(emoji), *words])
    found = changes(capsys.readouterr().out)
    assert found["after"] == [0.0, 0.0]
    assert found["anchored"][0] > 5 * found["anchored"][1]
