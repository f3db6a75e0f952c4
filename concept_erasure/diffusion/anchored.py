"""Anchored projection: the exact edit that joins UCE and SPEED with LEACE.

The core's edit with exact targets and *all anchors among the invariants* is an oblique projection of rank d - n,

    I + E = I - (C - C*) (C^T Q C)^-1 C^T Q        (C concepts, C* anchors, as columns; Q the metric, Q C* = 0).

It sends every concept exactly to its anchor, leaves anchors and blank prompt exactly where they are, leaves retained
embeddings exactly there too (``hard=True``, if no direction of theirs is dropped) or nearly (soft), and is the
least-change map that does so, measured in the metric. Being singular, it cannot be undone by a clever embedding: its
certificate is not zero, as that of every invertible edit (UCE, RECE, MACE, TRCE, RealEra, SPEED as published) is.

Derived for this library; not in a paper. Nearest of kin: LEACE (arXiv:2306.03819), UCE (arXiv:2308.14761) and SPEED
(arXiv:2503.07392).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.linalg import LowRankAffine

__all__ = ["anchored_projection", "independent_columns"]


def independent_columns(gram: Tensor, rtol: float = 1e-10) -> tuple[list[int], list[int]]:
    """Split columns into independent ones and the rest, by pivoted Cholesky of their Gram matrix.

    Args:
        gram: Shape ``(n, n)``, positive semi-definite.
        rtol: A column is dependent if no more than this share of its squared length is left.

    Returns:
        Kept and dropped indices, each ascending. Of equal columns the first is kept.
    """
    n = len(gram)
    size = gram.diagonal().clone()
    left = size.clone()
    rows = gram.new_zeros(n, n)
    kept: list[int] = []
    for step in range(n):
        share = torch.where(size > 0, left / size, torch.zeros_like(left))
        pivot = int((left * (share > rtol)).argmax())
        if float(share[pivot]) <= rtol:
            break
        row = (gram[pivot] - rows[:step, pivot] @ rows[:step]) / left[pivot].sqrt()
        rows[step] = row
        left = left - row**2
        left[pivot] = 0
        kept.append(pivot)
    return sorted(kept), sorted(set(range(n)) - set(kept))


def anchored_projection(
    source: Tensor, target: Tensor, metric: Callable[[Tensor], Tensor], *, rtol: float = 1e-10
) -> tuple[LowRankAffine, list[int], list[int]]:
    """Return the projection that sends ``source`` to ``target``, and which rows it rests on.

    Args:
        source: Concepts, rows ``(n, d)``.
        target: Anchors, rows ``(n, d)``; the metric must hold them (``metric(target) = 0``).
        metric: ``y -> y Q`` on rows.
        rtol: Below this share of its squared length a row depends on the others.

    Returns:
        The map, the kept rows and the dropped rows.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If the metric does not hold the anchors, or forbids a concept to move.
    """
    if source.ndim != 2 or source.shape != target.shape:
        raise ShapeError(
            f"source and target must both be (n, d); got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    free, fixed = metric(source), metric(target)
    gram = free @ source.T
    gram = (gram + gram.T) / 2
    limit = 1e-6 * float(free.norm(dim=1).max()) if len(source) else 0.0
    if len(source) and float(fixed.norm(dim=1).max()) > limit:
        raise ValueError("the metric lets an anchor move; put all anchors among its invariants")
    kept, dropped = independent_columns(gram, rtol)
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    right = torch.cholesky_solve(free[kept], factor)
    return (
        LowRankAffine((source - target)[kept].T.contiguous(), right.T.contiguous()),
        kept,
        dropped,
    )
