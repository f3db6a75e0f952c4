"""LEACE in a metric with a ridge: between LEACE (a small ridge) and the orthogonal projection (a large one).

The smallest guarding edit in the norm of ``S + ridge * tr(S) / d * I``. An example, not a published method.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from concept_erasure.data import read_data
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning
from concept_erasure.linalg import Moments
from concept_erasure.registry import Method
from concept_erasure.spectral import concept_basis

ENTRY = Method(
    name="ridge",
    family="linear",
    target="ridge_eraser:RidgeEraser",
    guarantees=frozenset({"guarded", "idempotent", "mean_preserving"}),
    summary="Guard the concept with the smallest edit in a metric with a ridge.",
    paper="none; an example",
)


@dataclass(frozen=True, kw_only=True)
class RidgeConfig(EraserConfig):
    """Options of the fit; they are saved with the eraser."""

    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ValueError(f"ridge must be positive and finite; got {self.ridge!r}")


@dataclass(frozen=True, repr=False, eq=False)
class RidgeEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``; calls, saving and edits are inherited."""

    method: ClassVar[str] = "ridge"
    config_type: ClassVar[type[EraserConfig]] = RidgeConfig

    @classmethod
    def fit(cls, x: object, z: object = None, *, ridge: float = 0.1) -> RidgeEraser:
        """Fit on representations ``x`` ``(..., d)`` and labels ``z``, one a row.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Labels: classes, or real targets.
            ridge: Weight of the identity, relative to the mean variance.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, or a ridge that is not positive.
            ShapeError: If x and z disagree.
        """
        config = RidgeConfig(ridge=ridge)
        data, labels, space = read_data(x, z)  # checks both, and encodes the labels
        moments = Moments(data.shape[-1], labels.width, device=data.device)
        moments.update(data, labels.values.reshape(*data.shape[:-1], *labels.values.shape[1:]))
        left, right = ridge_factors(moments.sigma_xx, moments.sigma_xz, config.ridge)
        if left.shape[1] == 0:
            warnings.warn("z is not correlated with x", ErasureWarning, stacklevel=2)
        report = {"n": moments.rows, "rank": left.shape[1]}
        # strides are not saved, and the last bits of a product depend on them
        factors = left.contiguous(), right.T.contiguous()
        return cls(*factors, moments.mean_x, config=config, space=space, report=report)


def ridge_factors(sigma_xx: Tensor, sigma_xz: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return ``left`` and ``right``, both ``(d, k)``, of ``P = I - left right^T`` with ``P sigma_xz = 0``."""
    left, _, _ = concept_basis(sigma_xz, rtol=1e-10)
    metric = sigma_xx.clone()
    metric.diagonal().add_(ridge * sigma_xx.diagonal().mean())
    solved = torch.linalg.solve(metric, left)
    return left, torch.linalg.solve(left.T @ solved, solved, left=False)
