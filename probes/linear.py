"""Logistic regression, the probe LEACE and its relatives promise to defeat.

Fitted on the device of the data, in float64 where it exists, to a gradient tolerance, so that what
it cannot read is not there to be read linearly. The objective is scikit-learn's,
``|w|^2 / 2 + C * sum(log-loss)`` with an unpenalised intercept, in units of the data unless
``standardize=None``; one weight vector for two classes, one per class (softmax) for more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

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

__all__ = ["FittedLinear", "LinearProbe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLinear(FittedProbe):
    """A fitted logistic regression.

    Attributes:
        coef: Weights in the coordinates of the data, ``[1, d]`` for two classes, else ``[k, d]``.
        intercept: ``[1]`` or ``[k]``.
        iterations: Steps the solver took.
        gradient: Largest entry of the gradient where it stopped.
    """

    coef: Tensor
    intercept: Tensor
    iterations: int
    gradient: float

    def _scores(self, x: Tensor) -> Tensor:
        scores = x @ self.coef.to(x).T + self.intercept.to(x)
        return (
            torch.cat([torch.zeros_like(scores), scores], dim=1) if len(self.coef) == 1 else scores
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """Logistic regression by full-batch L-BFGS.

    O(n d min(n, d)) time once, then O(n d k) per step; O(n d) memory.

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
        >>> from concept_erasure.probes import LinearProbe
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> LinearProbe().fit(x, ["no", "no", "yes", "yes"]).predict(torch.tensor([[3.0]]))
        ['yes']
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
    def fit(self, x: Vectors, z: object) -> FittedLinear:
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
        target = one_hot(index, len(classes)).to(matrix)[:, -rows:]
        unit = units(matrix, self.standardize)
        frame = coordinates(
            unit.apply(matrix), ridge=1 / (self.C * n), curvature=0.25 if rows == 1 else 0.5
        )
        start = matrix.new_zeros(rows, frame.u.shape[1] + 1)
        rate = target.mean(dim=0)
        start[:, -1] = torch.logit(rate) if rows == 1 else rate.log()
        tol = self.tol if matrix.dtype == torch.float64 else max(self.tol, 1e-5)
        solution = minimise(
            _objective(frame, target), start.flatten(), tol=tol, max_iter=self.max_iter
        )
        warn_unless_converged(solution, probe="linear", tol=tol)
        point = solution.point.reshape(rows, -1)
        bias = point[:, -1]
        if rows > 1:  # the softmax does not see a common shift; take the one with mean zero
            bias = bias - bias.mean()
        coef, intercept = unit.original(*frame.original(point[:, :-1], bias))
        return FittedLinear(
            classes=classes,
            width=width,
            coef=coef,
            intercept=intercept,
            iterations=solution.iterations,
            gradient=solution.gradient,
        )


def _objective(frame: Coordinates, target: Tensor) -> Objective:
    """Return mean log-loss plus penalty, and its gradient, as a function of ``[v, bias]``."""
    n, rows = target.shape

    def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.reshape(rows, -1)
        v, bias = point[:, :-1], point[:, -1]
        scores = frame.u @ v.T + bias
        if rows == 1:
            loss = (softplus(scores) - target * scores).mean()
            error = torch.sigmoid(scores) - target
        else:
            loss = (scores.logsumexp(dim=1) - (target * scores).sum(dim=1)).mean()
            error = torch.softmax(scores, dim=1) - target
        shrink = frame.penalty * v
        gradient = torch.cat([error.T @ frame.u / n + shrink, error.mean(dim=0)[:, None]], dim=1)
        return loss + (shrink * v).sum() / 2, gradient.flatten()

    return value_and_gradient
