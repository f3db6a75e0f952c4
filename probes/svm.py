"""Linear support vector machine: squared hinge loss, one against the rest.

The objective is ``|w|^2 / 2 + C * sum(max(0, 1 - y * score)^2)`` for each class, as in LIBLINEAR.

Deviation: LIBLINEAR penalises the intercept, which makes its result depend on where the origin is;
here the intercept is free. The penalty acts in units of the data unless ``standardize=None``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from concept_erasure.probes._data import Vectors
from concept_erasure.probes._fitted import FittedProbe, training_data
from concept_erasure.probes._solve import (
    Coordinates,
    Objective,
    Standardize,
    check_penalty,
    check_standardize,
    coordinates,
    minimise,
    units,
    warn_unless_converged,
)

__all__ = ["FittedSvm", "SvmProbe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedSvm(FittedProbe):
    """A fitted linear support vector machine.

    Attributes:
        coef: Weights in the coordinates of the data, ``[1, d]`` for two classes, else ``[k, d]``.
        intercept: ``[1]`` or ``[k]``.
        iterations: Steps the solver took, the most over the classes.
        gradient: Largest entry of the gradients where it stopped.
    """

    coef: Tensor
    intercept: Tensor
    iterations: int
    gradient: float

    @property
    def has_probabilities(self) -> bool:
        """False: the scores are signed margins."""
        return False

    def _scores(self, x: Tensor) -> Tensor:
        scores = x @ self.coef.to(x).T + self.intercept.to(x)
        return torch.cat([-scores, scores], dim=1) if len(self.coef) == 1 else scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SvmProbe:
    """Linear support vector machine by full-batch L-BFGS.

    O(n d min(n, d)) time once, then O(n d) per step and class; O(n d) memory.

    Attributes:
        C: Inverse strength of the L2 penalty, as in scikit-learn. Higher fits closer.
        standardize: Units in which the penalty acts. ``"global"`` divides all features by the root of their mean
            variance, so a probe of ``x`` and of ``1000 x`` is the same one and erasers are compared at one
            scale; ``"feature"`` divides each by its own deviation; None takes ``x`` as it is, as scikit-learn.
        tol: Stop when no entry of the gradient of the mean loss exceeds this, in coordinates where
            the curvature is about one.
        max_iter: Most steps; an `ErasureWarning` tells when they were not enough.

    Example:
        >>> import torch
        >>> from concept_erasure.probes import SvmProbe
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> SvmProbe().fit(x, [0, 0, 1, 1]).predict(torch.tensor([[3.0]]))
        [1]
    """

    C: float = 1.0
    tol: float = 1e-8
    max_iter: int = 2000
    standardize: Standardize = "global"

    def __post_init__(self) -> None:
        """Check the values."""
        check_penalty(self.C, self.tol, self.max_iter)
        check_standardize(self.standardize)

    @torch.no_grad()
    def fit(self, x: Vectors, z: object) -> FittedSvm:
        """Fit the probe.

        Args:
            x: Vectors, shape ``[n, d]``, any real dtype.
            z: Class labels, length ``n``: strings, bools or integers.

        Returns:
            The fitted probe, on the device of ``x``.

        Raises:
            ShapeError: If the shapes are wrong or disagree.
            TypeError: If vectors or labels are of the wrong kind.
            ValueError: If a vector is not finite or there is only one class.
        """
        matrix, index, classes = training_data(x, z)
        n, width = matrix.shape
        rows = 1 if len(classes) == 2 else len(classes)
        signs = 2 * one_hot(index, len(classes)).to(matrix)[:, -rows:] - 1
        unit = units(matrix, self.standardize)
        frame = coordinates(unit.apply(matrix), ridge=1 / (self.C * n), curvature=2.0)
        start = matrix.new_zeros(frame.u.shape[1] + 1)
        tol = self.tol if matrix.dtype == torch.float64 else max(self.tol, 1e-5)
        solutions = [
            minimise(_objective(frame, sign), start, tol=tol, max_iter=self.max_iter)
            for sign in signs.T
        ]
        worst = max(solutions, key=lambda solution: solution.gradient)
        warn_unless_converged(worst, probe="svm", tol=tol)
        point = torch.stack([solution.point for solution in solutions])
        coef, intercept = unit.original(*frame.original(point[:, :-1], point[:, -1]))
        return FittedSvm(
            classes=classes,
            width=width,
            coef=coef,
            intercept=intercept,
            iterations=max(solution.iterations for solution in solutions),
            gradient=worst.gradient,
        )


def _objective(frame: Coordinates, sign: Tensor) -> Objective:
    """Return mean squared hinge plus penalty, and its gradient, as a function of ``[v, bias]``."""
    n = len(sign)

    def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor]:
        v, bias = point[:-1], point[-1]
        short = (1 - sign * (frame.u @ v + bias)).clamp(min=0)
        error = -2 * sign * short / n
        shrink = frame.penalty * v
        value = short.square().mean() + (shrink * v).sum() / 2
        return value, torch.cat([frame.u.T @ error + shrink, error.sum()[None]])

    return value_and_gradient
