"""Linear support vector machine: squared hinge loss, one against the rest.

The objective is ``|w|^2 / 2 + C * sum(max(0, 1 - y * score)^2)`` for each class, as in LIBLINEAR.

Deviation: LIBLINEAR penalises the intercept, which makes its result depend on where the origin is;
here the intercept is free. The penalty acts in the units of ``standardize``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from concept_erasure.probes._data import Vectors, read_groups
from concept_erasure.probes._fitted import FittedProbe, training_data
from concept_erasure.probes._ridge import Penalty, Scaling, check_ridge, fit_ridge

__all__ = ["FittedSvm", "SvmProbe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedSvm(FittedProbe):
    """A fitted linear support vector machine.

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

    O(n d min(n, d)) time once, then O(n d k) per step, five times that while choosing; O(n d) memory.

    Attributes:
        C: Inverse strength of the L2 penalty, as in scikit-learn. Higher fits closer. ``"auto"``: chosen, as in
            `LinearProbe`.
        standardize: Units in which the penalty acts, as in `LinearProbe`.
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

    C: Penalty = "auto"
    tol: float = 1e-8
    max_iter: int = 2000
    standardize: Scaling = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        check_ridge(self.C, self.standardize, self.tol, self.max_iter)

    @torch.no_grad()
    def fit(self, x: Vectors, z: object, *, groups: object = None) -> FittedSvm:
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
            2 * one_hot(index, len(classes)).to(matrix)[:, -rows:] - 1,
            _SquaredHinge(),
            penalty=self.C,
            scaling=self.standardize,
            tol=self.tol,
            max_iter=self.max_iter,
            groups=None if groups is None else read_groups(groups, n=len(matrix)),
            probe="svm",
        )
        return FittedSvm(
            classes=classes,
            width=matrix.shape[1],
            coef=found.coef,
            intercept=found.intercept,
            C=found.C,
            standardize=found.scaling,
            iterations=found.solution.iterations,
            gradient=found.solution.gradient,
        )


@dataclass(frozen=True, slots=True)
class _SquaredHinge:
    """Squared hinge loss, summed over one-against-the-rest scores."""

    @property
    def curvature(self) -> float:
        return 2.0

    def start(self, target: Tensor) -> Tensor:
        return target.mean(dim=0)

    def __call__(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        short = (1 - target * scores).clamp(min=0)
        return short.square().sum(dim=-1), -2 * target * short
