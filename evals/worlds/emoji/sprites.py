"""Emoji pictures and their names: one sheet of sprites, drawn by two families of artists.

The sheet is packed from the npm packages ``emoji-datasource-twitter`` and ``emoji-datasource-google`` 16.0.0
(`pack_sprites`) and ships with the project. Graphics: Twemoji, CC-BY 4.0; Noto Emoji, Apache-2.0 / OFL.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from concept_erasure.errors import FormatError, missing_extra

__all__ = ["PACKAGES", "SIZE", "EmojiObject", "Sprites", "load_objects", "load_sprites", "pack_sprites"]  # fmt: skip

PACKAGES = ("emoji-datasource-twitter@16.0.0", "emoji-datasource-google@16.0.0")
SIZE = 64  # pixels of a sprite's side
FAMILIES = ("twitter", "google")
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class EmojiObject:
    """A thing that can be drawn.

    Attributes:
        names: The main name, then its synonyms.
        kind: What it is a kind of, e.g. ``"mammal"``.
        unified: Its code points, as the packages write them.
    """

    names: tuple[str, ...]
    kind: str
    unified: str

    @property
    def name(self) -> str:
        """The main name."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures of the objects.

    Attributes:
        images: Shape ``(n, 2, 64, 64, 4)``, uint8, red-green-blue-alpha; the second axis is the family of drawings
            (Twemoji, Noto).
        objects: What they show, n of them.
    """

    images: Tensor
    objects: tuple[EmojiObject, ...]

    def to(self, device: torch.device | str) -> Sprites:
        """Return a copy on a device."""
        return Sprites(self.images.to(device), self.objects)


@cache
def load_objects() -> tuple[EmojiObject, ...]:
    """Return the fifty objects in the order of the classifier's outputs."""
    record = json.loads((_DATA / "objects.json").read_text(encoding="utf-8"))
    return tuple(EmojiObject(tuple(o["names"]), o["kind"], o["unified"]) for o in record)


def load_sprites(path: str | Path | None = None) -> Sprites:
    """Read the sheet: a row of 64-pixel tiles a family, a column an object.

    Args:
        path: A sheet made by `pack_sprites`; default the one that ships.

    Raises:
        ImportError: If Pillow is absent.
        FormatError: If the picture has another size.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "diffusion") from None
    objects = load_objects()
    with Image.open(path or _DATA / "sprites.png") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    shape = (len(FAMILIES) * SIZE, len(objects) * SIZE, 4)
    if pixels.shape != shape:
        raise FormatError(
            f"the sheet must have shape {shape} for {len(objects)} objects, got {pixels.shape}; pack it again"
        )
    tiles = pixels.reshape(len(FAMILIES), SIZE, len(objects), SIZE, 4).transpose(2, 0, 1, 3, 4)
    return Sprites(torch.from_numpy(np.ascontiguousarray(tiles)), objects)


def pack_sprites(packages: str | Path, out: str | Path) -> Path:
    """Write the sheet from unpacked npm packages.

    Args:
        packages: Folder with ``emoji-datasource-twitter`` and ``emoji-datasource-google`` (as ``node_modules``).
        out: The picture to write, ``.png``.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If a package or a picture is absent; the message says which.
    """
    from PIL import Image

    objects = load_objects()
    sheet = Image.new("RGBA", (len(objects) * SIZE, len(FAMILIES) * SIZE))
    for row, family in enumerate(FAMILIES):
        folder = Path(packages) / f"emoji-datasource-{family}"
        listing = folder / "emoji.json"
        if not listing.is_file():
            raise FileNotFoundError(f"{listing} is absent; run: npm install {' '.join(PACKAGES)}")
        files = {e["unified"]: e["image"] for e in json.loads(listing.read_text(encoding="utf-8"))}
        for column, one in enumerate(objects):
            picture = folder / "img" / family / str(SIZE) / files[one.unified]
            with Image.open(picture) as tile:
                square = tile.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(square, (column * SIZE, row * SIZE))
    sheet.save(out, optimize=True)
    return Path(out)
