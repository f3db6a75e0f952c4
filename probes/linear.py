"""Logistic regression, the probe LEACE and its relatives promise to defeat.

Fitted on the device of the data, in float64 where it exists, to a gradient tolerance. The objective is
scikit-learn's, ``|w|^2 / 2 + C * sum(log-loss)`` with an unpenalised intercept, in the units of
``standardize``; one weight vector for two classes, one per class (softmax) for more.

A penalty can hide a concept, so by default its strength and units are chosen by cross-validation on
the training rows, see `LinearProbe`. A probe at chance shows that this probe found nothing in so many
rows, not that nothing is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from concept_erasure.probes._data import Vectors, read_groups
from concept_erasure.probes._fitted import FittedProbe, training_data
from concept_erasure.probes._ridge import Penalty, Scaling, check_ridge, fit_ridge

__all__ = ["FittedLinear", "LinearProbe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLinear(FittedProbe):
    """A fitted logistic regression.

    Attributes:
        coef: Weights in the coordinates of the data, ``[1, d]`` for two classes, else ``[k, d]``.
        intercept: ``[1]`` or ``[k]``.
        C: Inverse strength of the penalty that was used.
        standardize: Units in which it acted.
        iterations: Steps the solver took.
        gradient: Largest entry of the gradient where it stopped, before the scores are scaled.
    """

    coef: Tensor
    intercept: Tensor
    C: float
    standardize: Scaling
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

    O(n d min(n, d)) time once, then O(n d k) per step, five times that while choosing; O(n d) memory.

    Attributes:
        C: Inverse strength of the L2 penalty, as in scikit-learn. Higher fits closer. ``"auto"``: the one of 0.001,
            0.01, ... 100 whose scores of the training rows held out in five parts are best; the scores are
            then scaled to fit those rows, so that the probabilities are calibrated. Below 20 rows, and with
            ``standardize=None``, it is 1.
        standardize: Units in which the penalty acts. ``"median"``: the root of the median variance of the principal
            directions, so that no large direction hides the others. ``"clip"``: the deviation of each
            principal direction, or the median if that is larger. ``"whiten"``: the same with a
            thousandth of the median. ``"cap"``: as ``"median"``, but no direction is more than twenty times as
            large. ``"global"``: the root of the mean variance of the features.
            ``"feature"``: the deviation of each feature. None: one, as scikit-learn. ``"auto"``: the best of
            the first three at ``C="auto"`` (the first alone with fewer rows than twice the width), else the first.
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

    C: Penalty = "auto"
    tol: float = 1e-8
    max_iter: int = 2000
    standardize: Scaling = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        check_ridge(self.C, self.standardize, self.tol, self.max_iter)

    @torch.no_grad()
    def fit(self, x: Vectors, z: object, *, groups: object = None) -> FittedLinear:
        """Fit the probe.

        Args:
            x: Vectors, shape ``[n, d]``, any real dtype.
            z: Class labels, length ``n``: strings, bools or integers.
            groups: Group of each vector (such as its text), length ``n``: one group is never on both sides of
                the splits by which ``"auto"`` chooses.

        Returns:
            The fitted probe, on the device of ``x``.

        Raises:
            ShapeError: If the shapes are wrong or disagree.
            TypeError: If vectors or labels are of the wrong kind.
            ValueError: If a vector is not finite or there is only one class.
        """
        matrix, index, classes = training_data(x, z)
        rows = 1 if len(classes) == 2 else len(classes)
        found = fit_ridge(
            matrix,
            one_hot(index, len(classes)).to(matrix)[:, -rows:],
            _Logistic(rows),
            penalty=self.C,
            scaling=self.standardize,
            tol=self.tol,
            max_iter=self.max_iter,
            groups=None if groups is None else read_groups(groups, n=len(matrix)),
            probe="linear",
        )
        intercept = found.intercept
        if rows > 1:  # the softmax does not see a common shift; take the one with mean zero
            shift = found.coef @ matrix.mean(dim=0)
            intercept = intercept - (intercept + shift).mean()
        return FittedLinear(
            classes=classes,
            width=matrix.shape[1],
            coef=found.coef,
            intercept=intercept,
            C=found.C,
            standardize=found.scaling,
            iterations=found.solution.iterations,
            gradient=found.solution.gradient,
        )


@dataclass(frozen=True, slots=True)
class _Logistic:
    """Log-loss of one score per row, or of a softmax over several."""

    rows: int

    @property
    def curvature(self) -> float:
        return 0.25 if self.rows == 1 else 0.5

    def start(self, target: Tensor) -> Tensor:
        rate = target.mean(dim=0)
        return torch.logit(rate) if self.rows == 1 else rate.log()

    def __call__(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows == 1:
            values = softplus(scores) - target * scores
            return values[..., 0], torch.sigmoid(scores) - target
        values = scores.logsumexp(dim=-1) - (target * scores).sum(dim=-1)
        return values, torch.softmax(scores, dim=-1) - target
