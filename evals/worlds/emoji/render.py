"""Render a sprite in a style on a coloured background: the pictures everything in this world is trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from concept_erasure.evals.worlds.emoji.sprites import SIZE, Sprites

__all__ = ["COLOURS", "PIXELS", "STYLES", "render"]

PIXELS = 32  # side of a rendered picture
STYLES = ("flat", "glossy", "sketch")
"""Twemoji's drawing, Noto's, and the edges of either."""
COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "red": (0.85, 0.15, 0.15),
    "blue": (0.15, 0.3, 0.85),
    "green": (0.15, 0.65, 0.25),
    "black": (0.05, 0.05, 0.05),
}
"""Backgrounds, red-green-blue in [0, 1]."""
_SKETCH = STYLES.index("sketch")
_GREY = (0.3, 0.59, 0.11)
_EDGE = 1.2  # gradient drawn at full strength


def render(
    sprites: Sprites, obj: Tensor, style: Tensor, colour: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Draw pictures with random place, size (100 to 125 % smaller), mirror image and, for sketches, family.

    Args:
        sprites: The sheet.
        obj: Numbers of objects, shape ``(n,)``, int64.
        style: Numbers in `STYLES`, shape ``(n,)``.
        colour: Numbers in `COLOURS`, shape ``(n,)``.
        generator: Where chance comes from, on the CPU.

    Returns:
        Shape ``(n, 3, 32, 32)``, float32 in [-1, 1], on the device of the sprites.
    """
    device, n = sprites.images.device, len(obj)
    chance = torch.rand(n, 5, generator=generator).to(device)
    obj, style, colour = obj.to(device), style.to(device), colour.to(device)
    family = torch.where(style == _SKETCH, (chance[:, 0] < 0.5).long(), style)
    tile = sprites.images[obj, family].permute(0, 3, 1, 2).float() / 255
    tile = torch.cat([tile[:, :3] * tile[:, 3:], tile[:, 3:]], 1)  # premultiplied alpha
    tile = _place(functional.avg_pool2d(tile, SIZE // PIXELS), chance)
    ground = torch.tensor(list(COLOURS.values()), device=device)[colour, :, None, None]
    painted = tile[:, :3] + ground * (1 - tile[:, 3:])
    drawn = torch.where((style == _SKETCH)[:, None, None, None], _sketch(tile, ground), painted)
    return drawn.clamp(0, 1) * 2 - 1


def _place(tile: Tensor, chance: Tensor) -> Tensor:
    """Mirror, shrink and shift by columns 1 to 4 of uniform numbers, shape ``(n, 5)``."""
    theta = tile.new_zeros(len(tile), 2, 3)
    theta[:, 1, 1] = 1 + 0.25 * chance[:, 1]
    theta[:, 0, 0] = torch.where(chance[:, 2] < 0.5, -theta[:, 1, 1], theta[:, 1, 1])
    theta[:, :, 2] = 0.24 * chance[:, 3:] - 0.12
    grid = functional.affine_grid(theta, list(tile.shape), align_corners=False)
    return functional.grid_sample(tile, grid, align_corners=False)


def _sketch(tile: Tensor, ground: Tensor) -> Tensor:
    """Return Sobel edges, dark on light grounds and light on dark ones."""
    sobel = tile.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])[None, None]
    # A share of alpha, so that an outline shows where the drawing is as light as its ground.
    tone = tile[:, :3].mean(1, keepdim=True) + 0.35 * tile[:, 3:]
    across, down = (
        functional.conv2d(tone, sobel, padding=1),
        functional.conv2d(tone, sobel.mT, padding=1),
    )
    edge = (across.square() + down.square()).sqrt().clamp(0, _EDGE) / _EDGE
    light = (ground * ground.new_tensor(_GREY)[None, :, None, None]).sum(1, keepdim=True) > 0.35
    return torch.where(light, ground * (1 - edge), ground + (1 - ground) * edge)
