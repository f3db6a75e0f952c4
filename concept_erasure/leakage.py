"""How much of a concept a map leaves: on the data of the fit, and on rows it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from concept_erasure.linalg import LowRankAffine, Moments

__all__ = ["FOLDS", "Folds", "held_out_gap", "remaining_gap"]

FOLDS = 5
T_975 = 2.776  # Student t, FOLDS - 1 degrees of freedom, two-sided 95 %


def remaining_gap(map_: LowRankAffine, sigma_xz: Tensor) -> float:
    """Return ``|P A| / |A|``: the share of the cross-covariance that the map leaves (0 is guarded)."""
    size = sigma_xz.norm()
    if float(size) == 0:
        return 0.0
    return float(_erased(map_, sigma_xz).norm() / size)


def _erased(map_: LowRankAffine, sigma_xz: Tensor) -> Tensor:
    left, right = map_.left.to(sigma_xz), map_.right.to(sigma_xz)
    return sigma_xz - left @ (right.T @ sigma_xz)


def _scatter(keys: Tensor) -> Tensor:
    """Return a fold for each whole number, the same on every machine and unrelated to any period."""
    mixed = (keys * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) % FOLDS


class Folds:
    """Cross-covariances of five folds, streamed beside a fit at O(n d c).

    Args:
        width: Width d.
        concepts: Number of concept columns or classes c.
        device: Where the statistics live; None is the device of the first batch.
    """

    def __init__(
        self, width: int, concepts: int, *, device: torch.device | str | None = None
    ) -> None:
        self.parts = [
            Moments(width, concepts, covariance=False, device=device) for _ in range(FOLDS)
        ]

    @property
    def rows(self) -> int:
        """Rows dealt out."""
        return sum(part.rows for part in self.parts)

    def update(
        self,
        x: Tensor,
        z: Tensor,
        *,
        weight: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Self:
        """Deal rows ``x`` ``(n, d)`` with encoded labels z out to the folds.

        By a fixed hash of the row number, or of ``groups`` ``(n,)`` int64: rows of one group (tokens of one
        text) are alike, so they must not stand on both sides.
        """
        keys = torch.arange(len(x), device=x.device) + self.rows if groups is None else groups
        fold = _scatter(keys)
        for i, part in enumerate(self.parts):
            rows = (fold == i).nonzero()[:, 0]
            part.update(x[rows], z[rows], weight=None if weight is None else weight[rows])
        return self

    def merge(self, other: Folds) -> Self:
        """Add the rows of other folds."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)
        return self

    @property
    def ready(self) -> bool:
        """Whether there are enough rows to measure on."""
        return self.rows >= 4 * FOLDS and all(float(part.count) > 0 for part in self.parts)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Cross-covariances of neighbouring folds, one pair a fold."""
        crosses = [part.sigma_xz for part in self.parts]
        return [(crosses[i], crosses[(i + 1) % FOLDS]) for i in range(FOLDS)]

    @property
    def rests(self) -> list[Moments]:
        """For each pair the moments of the other three folds."""
        out = []
        for held in range(FOLDS):
            rest = Moments(
                self.parts[0].width,
                self.parts[0].concepts,
                covariance=False,
                device=self.parts[0].count.device,
                dtype=self.parts[0].count.dtype,
            )
            for i in range(2, FOLDS):
                rest.merge(self.parts[(held + i) % FOLDS])
            out.append(rest)
        return out


def held_out_gap(
    maps: Sequence[LowRankAffine],
    pairs: Sequence[tuple[Tensor, Tensor]],
    whiten: Callable[[Tensor], Tensor],
    concept: Tensor,
) -> dict[str, object]:
    """Estimate ``|P A| / |A|`` of the population from folds the maps never saw.

    The squared norm of one fold's ``P A`` holds the fold's own sampling noise, which for wide vectors is most
    of it. The inner product of two independent folds does not: its expectation is the population's squared gap.

    Args:
        maps: One for each pair, fitted on neither of its folds.
        pairs: Cross-covariances ``(d, c)`` of two folds.
        whiten: Norm of x: ``w`` with ``w^T w = b^T S^+ b``.
        concept: Whitening of z, shape ``(c, q)``.

    Returns:
        ``held_out_gap`` (0 is guarded, 1 is untouched) and its 95 % interval; nothing when the folds hold no
        signal to compare with.
    """
    left_over, signal = [], []
    for map_, folds in zip(maps, pairs, strict=True):
        one, two = (fold @ concept for fold in folds)
        signal.append(float((whiten(one) * whiten(two)).sum()))
        left_over.append(float((whiten(_erased(map_, one)) * whiten(_erased(map_, two))).sum()))
    size = sum(signal) / FOLDS
    if not size > 0:
        return {}
    shares = torch.tensor(left_over, dtype=torch.float64) / size
    mean, half = float(shares.mean()), T_975 * float(shares.std()) / math.sqrt(FOLDS)
    low, middle, high = (math.sqrt(max(0.0, v)) for v in (mean - half, mean, mean + half))
    return {"held_out_gap": middle, "held_out_gap_interval": [low, high]}
