"""The Fantope: the convex hull of the orthogonal projections of one rank, and the nearest point of it.

``F_k = {Q symmetric: 0 <= Q <= I, trace Q = k}`` (Overton and Womersley 1992). The Euclidean projection keeps the
eigenvectors and sends the eigenvalues to ``clip(lambda - tau, 0, 1)``, where ``tau`` makes them sum to k (Vu, Cho,
Lei and Rohe 2013). Everything is batched over leading axes and stays on the device: nothing is read back.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError

__all__ = ["capped_simplex", "fantope_projection", "round_to_projection"]

BISECTIONS = 60  # a bracket of width 1e3 shrinks below the rounding of float64


def fantope_projection(
    S: Tensor, k: int, *, method: Literal["exact", "bisection"] = "exact"
) -> Tensor:
    """Return the point of the Fantope nearest to ``S`` in the Frobenius norm.

    O(d^3) time for one eigendecomposition a matrix, O(d^2) memory.

    Args:
        S: Matrices, shape ``(..., d, d)``; the symmetric part is projected.
        k: Trace of the result, 0 to d.
        method: How the shift of the eigenvalues is found, see `capped_simplex`.

    Returns:
        Shape and dtype of ``S``; symmetric to the last bit.

    Raises:
        ShapeError: If the matrices are not square.
        ValueError: If k is not a whole number from 0 to d, or the method is unknown.
    """
    width = _check(S, k)
    if k in (0, width):
        eye = torch.eye(width, dtype=S.dtype, device=S.device)
        return (eye * (k // width if width else 0)).expand(S.shape).clone()
    values, vectors = torch.linalg.eigh(_symmetric(S))
    weights = capped_simplex(values, k, method=method)
    return _symmetric((vectors * weights[..., None, :]) @ vectors.mT).to(S.dtype)


def capped_simplex(
    values: Tensor, k: int, *, method: Literal["exact", "bisection"] = "exact"
) -> Tensor:
    """Return the nearest points to ``values`` with entries in [0, 1] that sum to k.

    Args:
        values: Shape ``(..., d)``, any order.
        k: Sum of the result, 0 to d.
        method: ``"exact"``: the sum is piecewise linear in the shift, with breakpoints ``values`` and
            ``values - 1``; sort them and interpolate, O(d log d). ``"bisection"``: 60 halvings.

    Raises:
        ValueError: If k is not a whole number from 0 to d, or the method is unknown.
    """
    width = values.shape[-1]
    _check_rank(k, width)
    if method not in ("exact", "bisection"):
        raise ValueError(f"method must be 'exact' or 'bisection'; got {method!r}")
    if k in (0, width):
        return torch.full_like(values, float(k == width and width > 0))
    # the result does not depend on a common shift; this one loses no digits to a large one
    values = values - values.mean(-1, keepdim=True)
    shift = _breakpoint_shift(values, k) if method == "exact" else _bisect_shift(values, k)
    return (values - shift).clamp(0, 1)


def round_to_projection(Q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of the k largest eigenvalues, and how clear the choice was.

    Args:
        Q: Symmetric matrices, shape ``(..., d, d)``, usually points of the Fantope.
        k: Number of directions, 0 to d.

    Returns:
        Orthonormal ``V`` of shape ``(..., d, k)``, strongest first, and the gap ``lambda_k - lambda_{k+1}`` of
        shape ``(...)`` (with 1 before the first eigenvalue and 0 after the last): 1 if ``Q`` is a projection of
        rank k already, 0 if the choice was arbitrary.

    Raises:
        ShapeError: If the matrices are not square.
        ValueError: If k is not a whole number from 0 to d.
    """
    width = _check(Q, k)
    values, vectors = torch.linalg.eigh(_symmetric(Q))
    ends = values.new_ones(*values.shape[:-1], 1)
    padded = torch.cat([0 * ends, values, ends], -1)  # ascending
    gap = padded[..., width - k + 1] - padded[..., width - k]
    return vectors[..., width - k :].flip(-1).to(Q.dtype), gap.to(Q.dtype)


def _symmetric(S: Tensor) -> Tensor:
    """Return the symmetric part, in a dtype that has an eigendecomposition."""
    wide = S if S.dtype == torch.float64 else S.to(torch.float32)
    return (wide + wide.mT) / 2


def _breakpoint_shift(values: Tensor, k: int) -> Tensor:
    """Return ``tau`` with ``sum(clip(values - tau, 0, 1)) = k`` for ``0 < k < d``, shape ``(..., 1)``."""
    points, order = torch.cat([values - 1, values], -1).sort(-1)
    # above v - 1 an entry falls at rate one; above v it is zero
    slopes = torch.where(order < values.shape[-1], -1.0, 1.0).to(values.dtype).cumsum(-1)
    falls = (slopes[..., :-1] * points.diff(dim=-1)).cumsum(-1)
    sums = values.shape[-1] + torch.cat([torch.zeros_like(falls[..., :1]), falls], -1)
    right = (sums > k).sum(-1, keepdim=True).clamp(1, points.shape[-1] - 1)
    left = right - 1
    high, low = sums.gather(-1, left), sums.gather(-1, right)
    share = ((high - k) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)).clamp(0, 1)
    start, stop = points.gather(-1, left), points.gather(-1, right)
    shift = start + share * (stop - start)
    weights = (values - shift).clamp(0, 1)  # one Newton step removes the rounding of the sums
    free = ((weights > 0) & (weights < 1)).sum(-1, keepdim=True).clamp_min(1)
    return shift + (weights.sum(-1, keepdim=True) - k) / free


def _bisect_shift(values: Tensor, k: int) -> Tensor:
    """Return the same by halving the bracket ``[min - 1, max]``."""
    low, high = values.amin(-1, keepdim=True) - 1, values.amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (values - middle).clamp(0, 1).sum(-1, keepdim=True) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _check(S: Tensor, k: int) -> int:
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ShapeError(f"matrices must be (..., d, d); got {tuple(S.shape)}")
    if not S.is_floating_point():
        raise TypeError(f"matrices must be floating point; got {S.dtype}")
    _check_rank(k, S.shape[-1])
    return S.shape[-1]


def _check_rank(k: int, width: int) -> None:
    if type(k) is not int or not 0 <= k <= width:
        raise ValueError(f"k must be a whole number from 0 to the width {width}; got {k!r}")
