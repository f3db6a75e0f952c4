"""Tests for scores of items: intervals of shares, paired differences, and equivalence to chance.

"Not significantly above chance" says nothing when items are few, so equivalence is tested as such; a share *below*
chance is evidence of knowledge too, and fails it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from concept_erasure.probes import wilson_interval
from concept_erasure.report import Interval

__all__ = ["Equivalence", "Paired", "equivalence_to", "paired", "share"]


def share(hits: Sequence[bool]) -> Interval:
    """Return a share with its 95 % Wilson interval.

    Args:
        hits: What happened in each of n >= 1 cases.

    Raises:
        ValueError: If there are none.
    """
    if len(hits) == 0:
        raise ValueError("a share needs at least one case, got none")
    count = sum(bool(hit) for hit in hits)
    return Interval(count / len(hits), *wilson_interval(count, len(hits)))


def _at_most(k: int, n: int, p: float) -> float:
    """Return ``P(X <= k)`` for X binomial, exactly up to rounding."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    constant, up, down = math.lgamma(n + 1), math.log(p), math.log1p(-p)
    terms = (
        constant - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * up + (n - i) * down
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


@dataclass(frozen=True)
class Paired:
    """The same items before and after.

    Attributes:
        n: Items.
        lost: Right before and wrong after.
        gained: Wrong before and right after.
        difference: Share right after minus before, with its 95 % interval (Bonett and Price 2012).
        p: Two-sided exact McNemar test of no difference.
    """

    n: int
    lost: int
    gained: int
    difference: Interval
    p: float


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two readings of the same items (exact McNemar test).

    Args:
        before: Whether each of n items was right.
        after: Likewise, in the same order.

    Raises:
        ValueError: If the lengths differ or are zero.

    Example:
        >>> paired([True] * 10, [False] * 10).p
        0.001953125
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(
            f"pairs are needed, got {len(before)} and {len(after)} readings; score the same items"
        )
    n = len(before)
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    gained = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    p = min(1.0, 2 * _at_most(min(lost, gained), lost + gained, 0.5))
    difference = (gained - lost) / n
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NormalDist().inv_cdf(0.975) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return Paired(n, lost, gained, Interval(difference, low, high), p)


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided exact binomial tests of a share against chance.

    Attributes:
        share: With its Wilson interval.
        chance: What guessing gives.
        margin: How far from chance still counts as chance.
        p: The larger of the two one-sided values.
        equivalent: Whether both tests reject: the share lies within the margin.
        shown: The smallest margin within which the data show the share to be, at the same level.
    """

    share: Interval
    chance: float
    margin: float
    p: float
    equivalent: bool
    shown: float


def _tost(k: int, n: int, chance: float, margin: float) -> float:
    above = _at_most(k, n, chance + margin) if chance + margin < 1 else 0.0
    below = 1.0 - _at_most(k - 1, n, chance - margin) if chance - margin > 0 else 0.0
    return max(above, below)


def equivalence_to(
    chance: float, hits: Sequence[bool], *, margin: float = 0.02, alpha: float = 0.05
) -> Equivalence:
    """Test whether a share is equivalent to chance (TOST).

    Args:
        chance: Share that guessing gives, in (0, 1).
        hits: What happened in each case.
        margin: Largest difference that counts as none. Two points need more than a thousand four-way items.
        alpha: Level of each one-sided test.

    Raises:
        ValueError: If a number is out of range or there are no cases.

    Example:
        >>> equivalence_to(0.25, [True] * 25 + [False] * 75, margin=0.1).equivalent
        True
    """
    if not 0 < chance < 1 or not 0 < margin < 1 or not 0 < alpha < 0.5:
        raise ValueError(
            f"need chance and margin in (0, 1) and alpha in (0, 0.5), got {chance}, {margin}, {alpha}"
        )
    k, n = sum(bool(hit) for hit in hits), len(hits)
    interval = share(hits)
    p = _tost(k, n, chance, margin)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _tost(k, n, chance, middle) < alpha else (middle, high)
    return Equivalence(interval, chance, margin, p, p < alpha, high)
