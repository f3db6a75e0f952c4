"""Minimise smooth convex functions by L-BFGS, and the units of features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from concept_erasure.errors import ErasureWarning

__all__ = [
    "Objective",
    "Solution",
    "Standardize",
    "Units",
    "check_penalty",
    "minimise",
    "units",
    "warn_unless_converged",
]

Standardize = Literal["global", "feature"] | None

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]

_ARMIJO = 1e-4
_CURVATURE = 0.9


@dataclass(frozen=True, slots=True)
class Units:
    """The units in which a penalty acts.

    Attributes:
        mean: Mean of the data, shape ``[d]``.
        scale: Size of each feature, shape ``[d]``, positive.
    """

    mean: Tensor
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / scale``."""
        return (x - self.mean) / self.scale

    def original(self, coef: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """Return coefficients ``[k, d]`` and intercepts ``[k]`` for the data as it was given."""
        return coef / self.scale, intercept - coef @ (self.mean / self.scale)


def units(x: Tensor, standardize: Standardize) -> Units:
    """Return the units of data ``[n, d]``.

    Args:
        x: Data, shape ``[n, d]``.
        standardize: ``"global"``: one number, the root of the mean variance of the features. ``"feature"``:
            the standard deviation of each feature. None: one.

    Returns:
        Mean and scale. What does not vary beyond the rounding of the data has the size of the data, or one.
    """
    mean = x.mean(dim=0)
    largest = x.abs().max()
    one = torch.ones_like(largest)
    if standardize is None:
        return Units(mean, one.expand(x.shape[1]))
    size = torch.where(largest > 0, largest, one)
    deviation = (x / size - mean / size).square().mean(dim=0).sqrt()  # no square leaves the range
    rounding = 8 * torch.finfo(x.dtype).eps
    total = deviation.square().mean().sqrt()
    total = torch.where(total > rounding, total, one)
    if standardize == "global":
        return Units(mean, (size * total).expand(x.shape[1]))
    return Units(mean, size * torch.where(deviation > rounding, deviation, total))


def check_penalty(penalty: float, tol: float, max_iter: int) -> None:
    """Refuse a configuration no solver can run.

    Raises:
        ValueError: If a value is out of range.
    """
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(
            f"C must be positive and finite, got {penalty}; for almost no penalty use 1e6"
        )
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")


@dataclass(frozen=True, slots=True)
class Solution:
    """Where L-BFGS stopped.

    Attributes:
        point: The minimum, shape of the start.
        gradient: Largest absolute entry of the gradient there.
        iterations: Steps taken.
        converged: Whether ``gradient <= tol``.
    """

    point: Tensor
    gradient: float
    iterations: int
    converged: bool


def minimise(
    objective: Objective, start: Tensor, *, tol: float, max_iter: int, memory: int = 20
) -> Solution:
    """Minimise a smooth function by L-BFGS with a weak Wolfe line search.

    Args:
        objective: Maps a point, shape ``[p]``, to its value and gradient.
        start: First point, shape ``[p]``.
        tol: Stop when no entry of the gradient exceeds this. Values below what the dtype resolves
            are raised to 20 machine epsilons.
        max_iter: Most steps.
        memory: Pairs kept; O(memory p) memory.

    Returns:
        The last point and how good it is.
    """
    tol = max(tol, 20 * torch.finfo(start.dtype).eps)
    point = start
    value, gradient = objective(point)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    steps = 0
    while steps < max_iter and float(gradient.abs().max()) > tol:
        direction = -_inverse_hessian_times(gradient, pairs)
        found = _line_search(objective, point, value, gradient, direction)
        if found is None:
            if not pairs:
                break
            pairs = []  # start again from steepest descent
            continue
        new_point, value, new_gradient = found
        s, y = new_point - point, new_gradient - gradient
        if float(s @ y) > 0:
            pairs = [*pairs[-(memory - 1) :], (s, y, s @ y)]
        point, gradient = new_point, new_gradient
        steps += 1
    largest = float(gradient.abs().max())
    return Solution(point, largest, steps, largest <= tol)


def _inverse_hessian_times(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    result = gradient
    weights = []
    for s, y, product in reversed(pairs):
        weight = (s @ result) / product
        result = result - weight * y
        weights.append(weight)
    if pairs:
        _, y, product = pairs[-1]
        result = result * (product / (y @ y))
    for (s, y, product), weight in zip(pairs, reversed(weights), strict=True):
        result = result + (weight - (y @ result) / product) * s
    return result


def _line_search(
    objective: Objective, point: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find a weak Wolfe point by bisection; None if there is none within the precision."""
    slope = float(gradient @ direction)
    start = float(value)
    # Near the minimum the decrease drowns in rounding, the slope does not (Hager and Zhang 2005).
    slack = 10 * torch.finfo(point.dtype).eps * abs(start)
    low, high, step = 0.0, math.inf, 1.0
    for _ in range(50):
        new_point = point + step * direction
        new_value, new_gradient = objective(new_point)
        new_slope = float(new_gradient @ direction)
        decrease = float(new_value) <= start + _ARMIJO * step * slope
        flat = float(new_value) <= start + slack and new_slope <= (2 * _ARMIJO - 1) * slope
        if not (decrease or flat):
            high = step
        elif new_slope < _CURVATURE * slope:
            low = step
        else:
            return new_point, new_value, new_gradient
        step = 2 * low if math.isinf(high) else (low + high) / 2
    return None


def warn_unless_converged(solution: Solution, *, probe: str, tol: float) -> None:
    """Say so when the solver ran out of steps, because the probe then reads too little."""
    if not solution.converged:
        warnings.warn(
            f"the {probe} probe stopped after {solution.iterations} steps with a gradient of "
            f"{solution.gradient:.1e}, above the tolerance {tol:.1e}; "
            "raise max_iter or tol, or lower C",
            ErasureWarning,
            stacklevel=3,
        )
