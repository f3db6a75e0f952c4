"""Linear scores under a ridge penalty: in which units it acts, and how strong it is.

A penalty in the units of the largest direction hides whatever lies along the others, and one in the units
of each direction reads noise when there are many. Neither is right for all data, so the choice is made
by cross-validation on the training rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from concept_erasure.probes._solve import (
    Objective,
    Solution,
    check_penalty,
    minimise,
    units,
    warn_unless_converged,
)

__all__ = [
    "Axes",
    "InputUnits",
    "Loss",
    "Penalty",
    "RidgeFit",
    "Scaling",
    "check_ridge",
    "check_scaling",
    "fit_ridge",
    "input_unit",
    "input_units",
    "principal",
]

Penalty = float | Literal["auto"]
Scaling = Literal["auto", "median", "cap", "clip", "whiten", "global", "feature"] | None

GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""What ``C="auto"`` chooses among."""

WHITEN_FLOOR = 1e-6
"""Directions below this part of the median variance count as this large: float32 rounding is below."""

CAP = 20.0
"""``"cap"`` leaves no direction larger than this many times the median deviation; a kernel has its own."""

_FOLDS = 5
_LEAST_ROWS = 20
_LEAST_SLOPE = 0.01
_SCALINGS: tuple[Scaling, ...] = (
    "auto",
    "median",
    "cap",
    "clip",
    "whiten",
    "global",
    "feature",
    None,
)
_INPUTS: tuple[Scaling, ...] = ("cap", "feature")


class Loss(Protocol):
    """A convex loss of scores."""

    @property
    def curvature(self) -> float:
        """Bound of the second derivative."""

    def start(self, target: Tensor) -> Tensor:
        """Return the best intercepts ``[k]`` without weights, for targets ``[n, k]``."""

    def __call__(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses ``[n, m]`` and derivatives ``[n, m, k]`` of scores ``[n, m, k]``."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Data along their principal directions.

    Attributes:
        rows: The data there, ``(x - mean) @ basis``, shape ``[n, r]``.
        mean: Mean of the data, shape ``[d]``.
        basis: Orthogonal directions over one number, so that no square leaves the range; shape ``[d, r]``.
        size: That number.
        variance: Variance of each column of ``rows``, shape ``[r]``.
        typical: Median variance of the directions that vary beyond the rounding of the data.
    """

    rows: Tensor
    mean: Tensor
    basis: Tensor
    size: Tensor
    variance: Tensor
    typical: Tensor

    def scale(self, scaling: Scaling, cap: float = CAP) -> Tensor:
        """Return the square of the unit of each direction, shape ``[r]``; ``cap`` is for ``"cap"`` alone."""
        if scaling == "global":
            return (self.variance.sum() / len(self.mean)).expand_as(self.variance)
        if scaling == "median":
            return self.typical.expand_as(self.variance)
        if scaling == "cap":
            return (self.variance / cap**2).clamp(min=self.typical)
        if scaling == "clip":
            return self.variance.clamp(min=self.typical)
        if scaling == "whiten":
            return self.variance.clamp(min=WHITEN_FLOOR * self.typical)
        return self.size.pow(-2).expand_as(self.variance)


def principal(x: Tensor) -> Axes:
    """Return data ``[n, d]`` along its principal directions; O(n d min(n, d)) time.

    Directions within the rounding of float64 are left out. Half of an erased matrix may be rounding of
    float32, so the median is that of the directions above the rounding of the type that holds ``x``.
    """
    n, d = x.shape
    size = x.abs().max()
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = x / size
    mean = scaled.mean(dim=0)
    centred = scaled - mean
    if n >= d:
        vectors = torch.linalg.eigh(centred.T @ centred / n)[1]
    else:
        vectors = torch.linalg.svd(centred, full_matrices=False)[2].T
    rows = centred @ vectors
    deviation = rows.square().mean(dim=0).sqrt()
    kept = deviation > 8 * torch.finfo(x.dtype).eps
    rows, vectors, deviation = rows[:, kept], vectors[:, kept], deviation[kept]
    held = torch.float32 if torch.equal(x.float().to(x.dtype), x) else x.dtype
    varied = deviation[deviation > 8 * torch.finfo(held).eps]
    varied = varied if len(varied) else deviation
    typical = varied.median().square() if len(varied) else torch.ones_like(size)
    return Axes(rows, mean * size, vectors / size, size, deviation.square(), typical)


@dataclass(frozen=True, slots=True)
class InputUnits:
    """How vectors enter a probe that is not linear: ``(x - mean) @ basis``.

    Attributes:
        scaling: What it was made by.
        mean: Shape ``[d]``.
        basis: Shape ``[d, r]``.
    """

    scaling: Scaling
    mean: Tensor
    basis: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return vectors ``[n, d]`` in these units, ``[n, r]``."""
        return (x - self.mean) @ self.basis


def input_units(x: Tensor, scaling: Scaling, *, cap: float = CAP) -> list[InputUnits]:
    """Return the units to try for data ``[n, d]``; one unless ``scaling`` is ``"auto"``. ``cap`` is for ``"cap"``.

    No unit is right for all data, so a probe takes the one with the lowest loss on rows held out. Whitening is tried
    only with twice as many rows as directions: with fewer it tells noise from concept no better than chance.
    """
    kinds: tuple[Scaling, ...] = _INPUTS if scaling == "auto" else (scaling,)
    axes: Axes | None = None
    if scaling not in ("global", "feature", None):
        axes = principal(x)
        if scaling == "auto" and len(x) >= 2 * axes.rows.shape[1]:
            kinds = (*kinds, "whiten")
    return [input_unit(x, axes, kind, cap) for kind in kinds]


def input_unit(x: Tensor, axes: Axes | None, kind: Scaling, cap: float = CAP) -> InputUnits:
    """Return one kind of unit for data ``[n, d]``; ``axes`` may be None where no direction is scaled."""
    if axes is None or kind == "feature":
        unit = units(x, kind if kind in ("global", "feature") else None)
        return InputUnits(kind, unit.mean, torch.diag(1 / unit.scale))
    square = axes.scale(kind, cap)
    size = (axes.variance / square).sum() / max(len(square), 1)  # an input has a mean square of one
    size = torch.where(size > 0, size, torch.ones_like(size))
    return InputUnits(kind, axes.mean, axes.basis / (square * size).sqrt())


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """A fit and the choice behind it.

    Attributes:
        coef: Weights in the coordinates of the data, ``[k, d]``.
        intercept: ``[k]``.
        C: Inverse strength of the penalty.
        scaling: Units in which it acts.
        solution: Where the solver stopped.
    """

    coef: Tensor
    intercept: Tensor
    C: float
    scaling: Scaling
    solution: Solution


def check_ridge(penalty: object, scaling: object, tol: float, max_iter: int) -> None:
    """Refuse a configuration that cannot be fitted.

    Raises:
        ValueError: If a value is out of range.
    """
    if isinstance(penalty, str) and penalty != "auto":
        raise ValueError(f"C must be a positive number or 'auto', got {penalty!r}")
    check_penalty(float(penalty) if isinstance(penalty, (int, float)) else 1.0, tol, max_iter)
    check_scaling(scaling)


def check_scaling(scaling: object) -> None:
    """Refuse unknown units.

    Raises:
        ValueError: If ``scaling`` is none of `Scaling`.
    """
    if scaling not in _SCALINGS:
        raise ValueError(f"standardize must be one of {list(_SCALINGS)}, got {scaling!r}")


def fit_ridge(
    x: Tensor,
    target: Tensor,
    loss: Loss,
    *,
    penalty: Penalty,
    scaling: Scaling,
    tol: float,
    max_iter: int,
    groups: Tensor | None,
    probe: str,
) -> RidgeFit:
    """Minimise ``mean(loss) + |w|^2 / (2 C n)`` with a free intercept.

    Args:
        x: Data, shape ``[n, d]``.
        target: Targets of the loss, shape ``[n, k]``.
        loss: The loss.
        penalty: C; ``"auto"`` chooses it, and then scales the scores to fit the rows held out.
        scaling: Units of the penalty; ``"auto"`` chooses them when C is chosen, else is ``"median"``.
        tol: Stop when no entry of the gradient exceeds this.
        max_iter: Most steps.
        groups: Group of each row, ``[n]``, kept together when choosing.
        probe: What to call the probe in a warning.

    Returns:
        The fit.
    """
    unit = units(x, "feature" if scaling == "feature" else None)
    axes = principal(unit.apply(x) if scaling == "feature" else x)
    slope, shift = 1.0, target.new_zeros(target.shape[1])
    C, scaling = _given(penalty, scaling)
    if penalty == "auto" and scaling is not None:
        part = _parts(target, groups)
        if int((part >= 0).sum()) >= _LEAST_ROWS:
            C, scaling, slope, shift = _choose(axes, target, loss, scaling, part)
    scaling = "median" if scaling == "auto" else scaling
    tol = tol if x.dtype == torch.float64 else max(tol, 1e-5)
    frame = _frame(axes, scaling, C, loss, x.dtype)
    weight, solution = _solve(
        frame,
        target,
        loss,
        fold_weight=torch.full_like(target[:, :1], 1 / len(x)),
        start=None,
        tol=tol,
        max_iter=max_iter,
    )
    warn_unless_converged(solution, probe=probe, tol=tol)
    weight = slope * weight[0] / frame.root
    coef = weight[:, :-1] @ axes.basis.T
    intercept = weight[:, -1] + shift - coef @ axes.mean
    if scaling == "feature":
        coef, intercept = unit.original(coef, intercept)
    return RidgeFit(coef, intercept, C, scaling, solution)


def _given(penalty: Penalty, scaling: Scaling) -> tuple[float, Scaling]:
    return (1.0 if isinstance(penalty, str) else float(penalty)), scaling


@dataclass(frozen=True, slots=True)
class _Frame:
    """Axes divided by the root of their largest curvature, so that the Hessian is at most one.

    L-BFGS then needs few steps, and float32 can hold the data; the minimum is the same one.

    Attributes:
        u: The data, shape ``[n, r]``.
        root: What divides them, and one for the intercept, shape ``[r + 1]``.
        penalty: The ridge, shape ``[r]``.
    """

    u: Tensor
    root: Tensor
    penalty: Tensor


def _frame(axes: Axes, scaling: Scaling, penalty: float, loss: Loss, dtype: torch.dtype) -> _Frame:
    ridge = axes.scale(scaling) / (penalty * len(axes.rows))
    curvature = loss.curvature * axes.variance + ridge
    root = curvature.sqrt()
    return _Frame(
        (axes.rows / root).to(dtype),
        torch.cat([root, root.new_ones(1)]),
        (ridge / curvature).to(dtype),
    )


def _solve(
    frame: _Frame,
    target: Tensor,
    loss: Loss,
    *,
    fold_weight: Tensor,
    start: Tensor | None,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Solution]:
    """Fit one set of weights per column of ``fold_weight``, all at once.

    Args:
        frame: Data and penalty.
        target: ``[n, k]``.
        loss: The loss.
        fold_weight: Weight of each row in each of the m fits, ``[n, m]``.
        start: Weights to start at, in the frame, ``[m, k, r + 1]``.
        tol: As in `minimise`.
        max_iter: As in `minimise`.

    Returns:
        Weights and intercepts in the frame, ``[m, k, r + 1]``, and where the solver stopped.
    """
    m, k = fold_weight.shape[1], target.shape[1]
    if start is None:
        start = frame.u.new_zeros(m, k, len(frame.root))
        start[:, :, -1] = loss.start(target)
    objective = _objective(frame.u, target, loss, frame.penalty, fold_weight)
    solution = minimise(objective, start.flatten(), tol=tol, max_iter=max_iter)
    return solution.point.reshape(m, k, -1), solution


def _objective(
    u: Tensor, target: Tensor, loss: Loss, penalty: Tensor, fold_weight: Tensor
) -> Objective:
    """Return weighted loss plus penalty, and its gradient, as a function of ``[v, bias]``."""
    m, k = fold_weight.shape[1], target.shape[1]
    target = target[:, None]

    def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.reshape(m * k, -1)
        v, bias = point[:, :-1], point[:, -1]
        values, slopes = loss((u @ v.T + bias).reshape(-1, m, k), target)
        error = (slopes * fold_weight[:, :, None]).flatten(1)
        shrink = penalty * v
        gradient = torch.cat([error.T @ u + shrink, error.sum(dim=0)[:, None]], dim=1)
        return (values * fold_weight).sum() + (shrink * v).sum() / 2, gradient.flatten()

    return value_and_gradient


def _parts(target: Tensor, groups: Tensor | None) -> Tensor:
    """Return the part each row is held out in, ``[n]``; -1: never, as nothing would be left of its class.

    Classes are spread evenly; the rows of one group stay together.
    """
    index = _classes(target)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).to(index.device)
    part = torch.empty_like(index)
    if groups is None:
        order = order[index[order].argsort(stable=True)]
        part[order] = torch.arange(len(index), device=index.device) % _FOLDS
    else:
        first = (
            torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0))
            % _FOLDS
        )
        part = first.to(index.device)[groups.to(index.device)]
    for label in range(int(index.max()) + 1):
        own = index == label
        if len(part[own].unique()) < 2:
            part[own] = -1
    return part


def _classes(target: Tensor) -> Tensor:
    return (target[:, 0] > 0).long() if target.shape[1] == 1 else target.argmax(dim=1)


def _choose(
    axes: Axes, target: Tensor, loss: Loss, scaling: Scaling, part: Tensor
) -> tuple[float, Scaling, float, Tensor]:
    """Return the C and units whose scores of the rows held out are best once scaled, and that scaling.

    Scores are compared at their best scale because a direction that reads the concept and is too sure of
    itself would otherwise lose to one that reads nothing. Directions are those of all rows; if these
    are few, that alone tells a whitened probe about the rows held out, and it is not considered.
    """
    n, r = axes.rows.shape
    fold = torch.arange(_FOLDS, device=part.device)
    fold_weight = (part[:, None] != fold).float()
    fold_weight = fold_weight / fold_weight.sum(dim=0)
    candidates: Sequence[Scaling] = (scaling,)
    if scaling == "auto":
        candidates = ("median", "clip", "whiten") if n >= 2 * r else ("median",)
    best, chosen = math.inf, (1.0, candidates[0], 1.0, torch.zeros_like(target[0]))
    for candidate in candidates:
        weight: Tensor | None = None
        for penalty in GRID:
            frame = _frame(axes, candidate, penalty, loss, torch.float32)
            start: Tensor | None = None if weight is None else (weight * frame.root).float()
            point, _ = _solve(
                frame,
                target.float(),
                loss,
                fold_weight=fold_weight,
                start=start,
                tol=1e-3,
                max_iter=30,
            )
            weight = point / frame.root
            scores = (frame.u @ point[:, :, :-1].flatten(0, 1).T).reshape(n, *point.shape[:2])
            scores = scores + point[:, :, -1]
            out = part >= 0
            held_out = scores[out, part[out]].to(target)
            value, slope, shift = _calibrate(held_out, target[out], loss)
            if value < best - 1e-4:
                best, chosen = value, (penalty, candidate, slope, shift)
    return chosen


def _calibrate(scores: Tensor, target: Tensor, loss: Loss) -> tuple[float, float, Tensor]:
    """Return the lowest loss of ``slope * scores + shift``, and slope and shift.

    The slope is not negative and hardly zero, so the order of the scores stays; the targets are pulled inwards as
    by Platt (1999), so that it stays finite.
    """
    n, mean = len(scores), scores.mean(dim=0)
    scores = scores - mean
    size = scores.square().mean().sqrt().clamp(min=1e-30)
    soft = target + (target.mean(dim=0) - target) * 2 / (n + 2)
    weight = torch.full((n,), 1 / n, dtype=scores.dtype, device=scores.device)

    def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = loss((point[0] * scores / size + point[1:])[:, None], soft[:, None])
        error = slopes[:, 0] * weight[:, None]
        slope = (error * scores).sum() / size
        return weight @ values[:, 0], torch.cat([slope[None], error.sum(dim=0)])

    start = torch.cat([scores.new_zeros(1), loss.start(soft)])
    point = minimise(value_and_gradient, start, tol=1e-6, max_iter=50).point
    if not float(point[0] / size) > _LEAST_SLOPE:
        point = torch.cat([_LEAST_SLOPE * size[None], loss.start(soft)])
    slope = point[0] / size
    return float(value_and_gradient(point)[0]), float(slope), point[1:] - slope * mean
