"""The plug-in of the how-to: found through its entry point, and it passes the battery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

LINES = 120


@pytest.fixture
def plugin(root: Path) -> Path:
    return root / "docs" / "examples" / "ridge_plugin"


@pytest.fixture
def installed(root: Path, plugin: Path, tmp_path: Path) -> dict[str, str]:
    """The environment in which the plug-in is installed: what pip writes, on the path."""
    project = tomllib.loads((plugin / "pyproject.toml").read_text("utf-8"))["project"]
    info = tmp_path / "site" / "ridge_plugin-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    text = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in one.items()) for group, one in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(text))
    path = os.pathsep.join([str(info.parent), str(plugin), str(root)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_short(plugin: Path) -> None:
    files = [path for path in plugin.iterdir() if path.suffix in (".py", ".toml")]
    assert len(files) == 3
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) <= LINES


def test_it_passes_the_battery(installed: dict[str, str], plugin: Path) -> None:
    path = str(plugin / "test_ridge_eraser.py")
    out = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, path)
    assert " passed" in out
    assert "failed" not in out


def test_it_is_a_method_like_any_other(installed: dict[str, str], tmp_path: Path) -> None:
    code = f"""
import json, torch
from concept_erasure import Eraser, registry
from concept_erasure.evals.compare import compare
g = torch.Generator().manual_seed(0)
x = torch.randn(400, 6, generator=g, dtype=torch.float64)
z = (x[:, 0] + x[:, 1] > 0).long()
eraser = registry.load("ridge").fit(x, z, ridge=0.5)
eraser.save_pretrained({str(tmp_path / "eraser")!r})
again = Eraser.from_pretrained({str(tmp_path / "eraser")!r})
rows = compare(x, z, ["leace", "ridge", "orth"], probes=["centroid"]).rows
print(json.dumps([type(again).__name__, again.config.ridge, torch.equal(again(x), eraser(x)),
    "ridge" in registry.names(), [row.ok for row in rows]]))
"""
    found = json.loads(run(installed, "-c", code).splitlines()[-1])
    assert found == ["RidgeEraser", 0.5, True, True, [True] * 4]


def test_the_command_line_knows_it(installed: dict[str, str]) -> None:
    pytest.importorskip("tyro")
    assert "ridge" in run(installed, "-m", "concept_erasure.cli", "list")


def test_without_installation_there_is_no_such_method(root: Path) -> None:
    code = "from concept_erasure import registry; print('ridge' in registry.names())"
    assert run({**os.environ, "PYTHONPATH": str(root)}, "-c", code).strip() == "False"
