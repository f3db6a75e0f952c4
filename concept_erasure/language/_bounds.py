"""The formulas behind `certificates`: bounds C1 to C5, an exact binomial interval, the end of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.report import Interval

__all__ = [
    "OutputBounds",
    "a_priori_radius",
    "clopper_pearson",
    "forget_bound",
    "lanczos_smallest",
    "level_set_radius",
    "low_rank_norm",
    "low_rank_spectral_norm",
    "output_bounds",
    "spectral_norm",
    "stationarity_radius",
]


def level_set_radius(start: Tensor, end: Tensor, rho: Tensor | float) -> Tensor:
    """Return C1, the largest ``|D|`` that ``J(th) <= J(th0)`` allows.

    Args:
        start: ``G(th0)``, any shape.
        end: ``G(th)``, the same shape.
        rho: Strength of the anchor, positive; raising it shrinks the bound.
    """
    return (2 * (start - end).clamp_min(0) / rho).sqrt()


def a_priori_radius(start: Tensor, rho: Tensor | float) -> Tensor:
    """Return C1 as it is known before the run, from ``G(th) >= 0``; arguments as in `level_set_radius`."""
    return level_set_radius(start, torch.zeros_like(start), rho)


def stationarity_radius(gradient: Tensor, residual: Tensor, rho: Tensor | float) -> Tensor:
    """Return C2 from the norms ``|grad G(th)|`` and ``|grad J(th)|``; an equality where the second is 0."""
    return (gradient + residual) / rho


def forget_bound(start: Tensor, distance: Tensor, rho: Tensor | float) -> Tensor:
    """Return C3, the largest ``F(th)`` that ``J(th) <= J(th0)`` allows at distance ``|D|``."""
    return start - rho / 2 * distance.square()


@dataclass(frozen=True, eq=False)
class OutputBounds:
    """C4 for every row, each of shape ``(...)``.

    Attributes:
        range: ``r``, largest less smallest change of a logit.
        kl: Bound ``r^2 / 8`` of ``KL(p0 | p)``, nats.
        tv: Bound ``r / 4`` of the total variation distance.
        certified: Whether ``r`` is below the lead of the first class, so that the argmax cannot have changed.
    """

    range: Tensor
    kl: Tensor
    tv: Tensor
    certified: Tensor


def output_bounds(before: Tensor, after: Tensor) -> OutputBounds:
    """Return what the logits of a point, before and after, bound (C4).

    Args:
        before: Logits or log-probabilities, shape ``(..., K)``, K at least 2.
        after: The same shape; a shift of a whole row changes nothing.

    Raises:
        ShapeError: If the shapes differ or there are fewer than two classes.
    """
    if before.shape != after.shape or before.ndim < 1 or before.shape[-1] < 2:
        raise ShapeError(
            f"logits before and after must have one shape (..., K) with K >= 2; got {tuple(before.shape)} "
            f"and {tuple(after.shape)}"
        )
    change = after - before
    spread = change.amax(-1) - change.amin(-1)
    first, second = before.topk(2, dim=-1).values.unbind(-1)
    return OutputBounds(spread, spread.square() / 8, spread / 4, spread < first - second)


def low_rank_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``|left right^T|_F`` in ``O((m + n) k^2)``, from ``|B A|_F^2 = tr((B^T B)(A A^T))``.

    Args:
        left: Shape ``(..., m, k)``.
        right: Shape ``(..., n, k)``.
    """
    left, right = left.double(), right.double()
    squared = ((left.mT @ left) * (right.mT @ right)).sum((-2, -1))
    return squared.clamp_min(0).sqrt()


def low_rank_spectral_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``|left right^T|_2`` from two thin QRs, ``|R_left R_right^T|_2``; shapes as in `low_rank_norm`."""
    first = torch.linalg.qr(left.double(), mode="r").R
    second = torch.linalg.qr(right.double(), mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(first @ second.mT, ord=2)
    return norm


def spectral_norm(change: Tensor) -> Tensor:
    """Return the factor of C5 for the change of one parameter.

    Matrices: the largest singular value. More dimensions (kernels of convolutions): that of the matrix
    ``(out, rest)``, which bounds the change at one position by the norm of its patch. Vectors: the Euclidean norm.
    """
    if change.ndim < 2:
        size: Tensor = change.double().norm()
        return size
    norm: Tensor = torch.linalg.matrix_norm(change.reshape(len(change), -1).double(), ord=2)
    return norm


def clopper_pearson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return a share with its exact binomial interval (Clopper and Pearson 1934).

    The ends are found by bisection on the binomial tails, so it needs nothing but torch; O(n).

    Args:
        successes: 0 to ``n``.
        n: Independent trials, at least 1.
        level: Coverage, at least reached for every true share; raising it widens the interval.

    Raises:
        ValueError: If the counts or the level are impossible.

    Example:
        >>> print(clopper_pearson(50, 50))
        1.000 [0.929, 1.000]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1; got successes={successes}, n={n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}; try 0.95")
    tail = (1 - level) / 2
    counts = torch.arange(n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)

    def at_most(k: int, share: float) -> float:
        """Return the chance of k successes or fewer."""
        terms = ways + counts * math.log(share) + (n - counts) * math.log1p(-share)
        return float(terms[: k + 1].logsumexp(0).exp())

    def solve(wanted: Callable[[float], bool]) -> float:
        """Return where a condition that holds for small shares stops to hold."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if wanted(middle) else (low, middle)
        return (low + high) / 2

    lower = 0.0 if not successes else solve(lambda p: 1 - at_most(successes - 1, p) < tail)
    upper = 1.0 if successes == n else solve(lambda p: at_most(successes, p) > tail)
    return Interval(successes / n, min(lower, successes / n), max(upper, successes / n), level)


def lanczos_smallest(
    product: Callable[[Tensor], Tensor], like: Tensor, *, steps: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Return the smallest Ritz value of a symmetric matrix and its residual, by Lanczos iterations.

    Every new vector is orthogonalised against all before (O(n steps) memory). The Ritz value is never below the
    smallest eigenvalue, and some eigenvalue lies within the residual of it; that no other lies further down is
    likely after enough steps, not certain.

    Args:
        product: The matrix times a vector ``(n,)``.
        like: A vector ``(n,)`` that gives device and dtype.
        steps: Iterations; more find the end of the spectrum more closely.
        seed: Of the first vector.

    Raises:
        ValueError: If there are no steps.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    steps = min(steps, len(like))
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like), generator=draw, dtype=torch.float64).to(like)
    basis = like.new_zeros(steps + 1, len(like))
    basis[0] = vector / vector.norm()
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    scale = like.new_zeros(())
    for i in range(steps):
        image = product(basis[i])
        scale = torch.maximum(scale, image.norm())
        diagonal.append(basis[i] @ image)
        for _ in range(2):  # the second pass removes the rounding of the first
            image = image - basis[: i + 1].T @ (basis[: i + 1] @ image)
        beside.append(image.norm())
        if float(beside[-1]) <= len(like) * torch.finfo(like.dtype).eps * float(scale):
            break  # an invariant subspace: its Ritz values are eigenvalues
        basis[i + 1] = image / beside[-1]
    tridiagonal = torch.diag(torch.stack(diagonal).double())
    if len(diagonal) > 1:
        off = torch.stack(beside[: len(diagonal) - 1]).double()
        tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return float(values[0]), float(beside[-1].double() * vectors[-1, 0].abs())
