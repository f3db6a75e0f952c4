"""A small trained pipeline for the slow tests, if there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def emoji(root: Path) -> Path:
    """The folder of a small real Stable Diffusion pipeline: CONCEPT_ERASURE_PIPELINE, or beside the checkout."""
    named = os.environ.get("CONCEPT_ERASURE_PIPELINE")
    folder = Path(named) if named else root.parent / "shared" / "emoji-sd"
    if not (folder / "model_index.json").is_file():
        pytest.skip(
            "set CONCEPT_ERASURE_PIPELINE to the folder of a small Stable Diffusion pipeline"
        )
    return folder
