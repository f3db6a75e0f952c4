"""Which items a method may be tuned on, and which are kept for the report.

The half of an item depends on its fact alone, not on the other items, their order, their format or a limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from concept_erasure.concept_items import Item

__all__ = ["HALVES", "Half", "half_mask", "half_of"]

Half = Literal["development", "test"]
HALVES: tuple[Half, ...] = ("development", "test")


def half_of(item: Item) -> Half:
    """Return the half of an item, by a hash of its topic, its choices and the right one.

    Args:
        item: In any format: those of one fact have the same choices, so they are in the same half.
    """
    fact = repr((item.topic, sorted(item.choices), item.right))
    return HALVES[hashlib.sha256(fact.encode()).digest()[7] % 2]


def half_mask(items: Sequence[Item], half: Half) -> Tensor:
    """Return which items are in a half, shape ``(n,)`` bool.

    Args:
        items: Any n.
        half: Which.

    Raises:
        ValueError: If there is no such half.
    """
    if half not in HALVES:
        raise ValueError(f"half must be one of {', '.join(HALVES)}; got {half!r}")
    return torch.tensor([half_of(item) == half for item in items], dtype=torch.bool)
