"""Sprites, renderer, captions: what the emoji world is made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_erasure.errors import FormatError
from concept_erasure.evals.worlds.emoji.autoencoder import random_pictures
from concept_erasure.evals.worlds.emoji.grammar import draw
from concept_erasure.evals.worlds.emoji.render import COLOURS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import (
    SIZE,
    load_objects,
    load_sprites,
    pack_sprites,
)
from concept_erasure.evals.worlds.emoji.suite import NEIGHBOURS, paraphrases

Image = pytest.importorskip("PIL.Image")


def test_the_sheet_holds_two_different_drawings_of_each_object() -> None:
    sprites = load_sprites()
    assert sprites.images.shape == (50, 2, SIZE, SIZE, 4)
    assert sprites.images.dtype == torch.uint8
    solid = (sprites.images[..., 3] > 128).float().mean((2, 3))
    assert (solid > 0.1).all()
    gap = (sprites.images[:, 0].float() - sprites.images[:, 1].float()).abs().mean((1, 2, 3))
    assert (gap > 1).all()


def test_names_are_of_one_object_only() -> None:
    names = [name for one in load_objects() for name in one.names]
    assert len(set(names)) == len(names)


def test_packing_finds_every_picture_and_says_which_package_is_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm install emoji-datasource-twitter"):
        pack_sprites(tmp_path, tmp_path / "sheet.png")
    for shade, family in enumerate(("twitter", "google"), start=1):
        folder = tmp_path / f"emoji-datasource-{family}"
        (folder / "img" / family / "64").mkdir(parents=True)
        listing = []
        for number, one in enumerate(load_objects()):
            name = f"{number}.png"
            tile = Image.new("RGBA", (SIZE, SIZE), (number, shade, 0, 255))
            tile.save(folder / "img" / family / "64" / name)
            listing.append({"unified": one.unified, "image": name})
        (folder / "emoji.json").write_text(json.dumps(listing))
    sheet = pack_sprites(tmp_path, tmp_path / "sheet.png")
    images = load_sprites(sheet).images
    assert (images[..., 0] == torch.arange(50, dtype=torch.uint8)[:, None, None, None]).all()
    assert (images[:, 1, ..., 1] == 2).all()


def test_a_sheet_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(FormatError, match="pack it again"):
        load_sprites(tmp_path / "small.png")


def test_grounds_and_styles_show_and_the_seed_decides() -> None:
    sprites, n = load_sprites(), len(COLOURS)
    obj, colour = torch.zeros(n, dtype=torch.long), torch.arange(n)

    def drawn(style: str, seed: int) -> torch.Tensor:
        styles = torch.full((n,), STYLES.index(style))
        return render(sprites, obj, styles, colour, generator=torch.Generator().manual_seed(seed))

    flat, sketch = drawn("flat", 3), drawn("sketch", 3)
    assert flat.shape == (n, 3, 32, 32)
    assert flat.abs().max() <= 1
    corner = (flat[:, :, 0, 0] + 1) / 2
    torch.testing.assert_close(corner, torch.tensor(list(COLOURS.values())))
    # A sketch has two tones: the ground, and lines along the way to black or white.
    assert sketch[0].std(0).max() < 1e-6
    assert flat[0].std(0).max() > 0.1
    assert torch.equal(flat, drawn("flat", 3))
    assert not torch.equal(flat, drawn("flat", 4))


def test_captions_leave_out_what_a_twin_must_not_see() -> None:
    objects = load_objects()
    corn = [one.name for one in objects].index("corn")
    some = draw(objects, 600, seed=0, leave_out_object=corn)
    assert all(d.obj != corn for d in some)
    assert not any("corn" in d.caption.split() or "maize" in d.caption for d in some)
    plain = draw(objects, 600, seed=0, leave_out_style=STYLES.index("sketch"))
    assert not any("sketch" in d.caption or d.style == STYLES.index("sketch") for d in plain)


def test_a_caption_says_what_its_picture_shows() -> None:
    objects = load_objects()
    for drawing in draw(objects, 300, seed=1):
        words = drawing.caption.replace(",", " ").split()
        assert any(name in drawing.caption for name in objects[drawing.obj].names)
        said = [style for style in STYLES if style in words]
        assert said in ([], [STYLES[drawing.style]])
        if not said:
            assert STYLES[drawing.style] != "sketch"
        ground = list(COLOURS)[drawing.colour]
        # "red apple" is a name; a ground comes last or before "background".
        if not any(colour in words for colour in COLOURS):
            assert ground == "white"


def test_ten_objects_have_three_paraphrases_and_near_things() -> None:
    objects = {one.name: one for one in load_objects()}
    assert len(NEIGHBOURS) == 10
    for name, near in NEIGHBOURS.items():
        assert len(near) >= 3
        assert set(near) <= set(objects) - {name}
        words = paraphrases(objects[name])
        assert len(set(words)) == len(words) >= 3
        assert name not in words


def test_random_pictures_are_as_many_as_asked_for() -> None:
    sprites = load_sprites()
    found = random_pictures(sprites, 5, torch.Generator().manual_seed(0))
    assert found.shape == (5, 3, 32, 32)
