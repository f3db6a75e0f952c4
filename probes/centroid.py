"""Nearest class mean, in the metric of no, a diagonal or a shared covariance.

The scores are log-posteriors of normal classes with one covariance: a multiple of the identity
(nearest class mean), a diagonal one, or the pooled one within the classes, shrunk (linear
discriminant analysis). Fitted in closed form: no solver, so nothing can fail to converge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from concept_erasure.linalg import optimal_linear_shrinkage
from concept_erasure.probes._data import Vectors
from concept_erasure.probes._fitted import FittedProbe, training_data

__all__ = ["CentroidProbe", "FittedCentroid"]

Covariance = Literal["spherical", "diagonal", "shared"]
Prior = Literal["equal", "empirical"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCentroid(FittedProbe):
    """Fitted class means.

    Attributes:
        means: Class means, shape ``[k, d]``.
        center: Mean of the data, shape ``[d]``.
        coef: Weights of the centred vectors, shape ``[k, d]``.
        intercept: Shape ``[k]``.
    """

    means: Tensor
    center: Tensor
    coef: Tensor
    intercept: Tensor

    def _scores(self, x: Tensor) -> Tensor:
        return (x - self.center.to(x)) @ self.coef.to(x).T + self.intercept.to(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class CentroidProbe:
    """Predict the class whose mean is nearest.

    O(n d) time, with a shared covariance O(n d^2 + d^3); O(n d) memory. Does not depend on the
    units of the vectors. The probabilities of a spherical probe are too sure where features are
    correlated; those of a shared covariance are calibrated where the classes are normal.

    Attributes:
        covariance: Metric of the distance: ``"spherical"``, ``"diagonal"`` (variances within the
            classes) or ``"shared"`` (their covariance: linear discriminant analysis).
        prior: ``"equal"``, or ``"empirical"`` to favour frequent classes.
        shrinkage: Weight in [0, 1] of the mean variance against the diagonal or shared covariance,
            as in scikit-learn; ``"auto"``: that of Bodnar, Gupta and Parolya 2014 for a shared
            covariance, 0 for a diagonal one.

    Example:
        >>> import torch
        >>> from concept_erasure.probes import CentroidProbe
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> CentroidProbe().fit(x, ["no", "no", "yes", "yes"]).predict(torch.tensor([[0.5]]))
        ['yes']
    """

    covariance: Covariance = "spherical"
    prior: Prior = "equal"
    shrinkage: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.covariance not in ("spherical", "diagonal", "shared"):
            raise ValueError(
                f"covariance must be 'spherical', 'diagonal' or 'shared', got {self.covariance!r}"
            )
        if self.prior not in ("equal", "empirical"):
            raise ValueError(f"prior must be 'equal' or 'empirical', got {self.prior!r}")
        if self.shrinkage != "auto" and not (
            isinstance(self.shrinkage, (int, float)) and 0 <= self.shrinkage <= 1
        ):
            raise ValueError(f"shrinkage must be 'auto' or in [0, 1], got {self.shrinkage!r}")

    @torch.no_grad()
    def fit(self, x: Vectors, z: object) -> FittedCentroid:
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
        k, width = len(classes), matrix.shape[1]
        size = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
        scaled = matrix / size  # no square leaves the range
        center = scaled.mean(dim=0)
        scaled = scaled - center
        counts = torch.bincount(index, minlength=k).to(matrix)
        means = matrix.new_zeros(k, width).index_add_(0, index, scaled) / counts[:, None]
        coef = self._solve(scaled - means[index], means)
        prior = counts / len(index) if self.prior == "empirical" else torch.full_like(counts, 1 / k)
        return FittedCentroid(
            classes=classes,
            width=width,
            means=(means + center) * size,
            center=center * size,
            coef=coef / size,
            intercept=prior.log() - (coef * means).sum(dim=1) / 2,
        )

    def _solve(self, within: Tensor, means: Tensor) -> Tensor:
        """Return the class means ``[k, d]`` times the inverse covariance of ``within [n, d]``."""
        n, width = within.shape
        rounding = max(n, width) * torch.finfo(within.dtype).eps
        if self.covariance != "shared":
            variance = within.square().mean(dim=0)
            if self.covariance == "spherical":
                variance = variance.mean().expand(width)
            elif self.shrinkage != "auto":
                variance = (1 - self.shrinkage) * variance + self.shrinkage * variance.mean()
            return means / _floor(variance, rounding)
        sigma = within.T @ within / n
        if self.shrinkage == "auto":
            sigma = optimal_linear_shrinkage(sigma, n)
        else:
            mean = sigma.diagonal().mean()
            sigma = (1 - self.shrinkage) * sigma
            sigma.diagonal().add_(self.shrinkage * mean)
        values, vectors = torch.linalg.eigh(sigma)
        inverse: Tensor = vectors / _floor(values, rounding) @ vectors.T
        return means @ inverse


def _floor(variance: Tensor, rounding: float) -> Tensor:
    """Raise variances that are only rounding, so that what separates perfectly stays finite."""
    largest = float(variance.max())
    smallest = rounding * largest if largest > 0 else math.sqrt(torch.finfo(variance.dtype).tiny)
    return variance.clamp_min(smallest)
