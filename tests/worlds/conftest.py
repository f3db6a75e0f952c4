"""The emoji world, loaded once a session: its weights ship with the project."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from concept_erasure.evals.worlds.emoji.world import EmojiWorld


@pytest.fixture(scope="session")
def world() -> EmojiWorld:
    """Pipeline, judge, CLIP and sprites."""
    return EmojiWorld()
