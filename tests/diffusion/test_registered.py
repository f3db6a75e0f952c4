"""What every registered method for text-to-image models keeps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.eraser import Eraser
from concept_erasure.registry import METHODS
from tests.diffusion.tiny import tiny_sd

NAMES = sorted(name for name, entry in METHODS.items() if entry.family == "diffusion")


@pytest.mark.parametrize("name", NAMES)
def test_blank_prompt_stays_undo_is_exact_and_a_file_is_the_eraser(name, tmp_path):
    pipe = tiny_sd()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    eraser = METHODS[name].load().fit(pipe, erase=["van gogh"], anchor="art", preserve=["dog"])
    encoder = TextEncoder(pipe)
    blank = encoder.blank()
    assert "blank_prompt" in METHODS[name].guarantees
    if eraser.left.shape[1]:
        assert float((eraser(blank) - blank).norm() / blank.norm()) <= 1e-6
    with eraser.apply(pipe):
        after = pipe.unet.state_dict()
        assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / name))
    assert type(loaded) is type(eraser) and loaded.digest == eraser.digest
