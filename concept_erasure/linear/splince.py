"""SPLINCE: guard a concept and keep the covariance with a task.

The smallest edit, on the covariance of the data, among the affine maps that make the concept ``z``
linearly unreadable (``P S_xz = 0``) and leave what a linear model uses for the task ``y`` where it
was (``P S_xy = S_xy``). A re-fitted unregularised head sees no difference from LEACE; the gain is
for frozen or regularised heads.

Idea: Holstege, Ravfogel and Wouters 2025. The closed form here is our own derivation. With
``W = S^-1/2``, ``Q`` an orthonormal basis of ``W S_xz``, ``T`` one of ``W S_xy`` and
``F = (I - T T^T) Q``::

    P = I - S^1/2 Q (F^T F)^-1 F^T S^-1/2

The singular values of ``F`` are the sines of the angles between concept and task. The edit grows
like their inverse, and at zero no such map exists; below ``min_angle`` the fit is refused.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.labels import LabelKind, Labels, as_tensor, encode_concepts
from concept_erasure.linalg import LowRankAffine, Moments, optimal_linear_shrinkage
from concept_erasure.sites import Space

__all__ = ["SplinceConfig", "SplinceEraser", "splince_factors"]

RANK_TOLERANCE = 1e-10
ROWS_PER_DIMENSION = 20  # below this many rows a dimension, "auto" shrinks the covariance


@dataclass(frozen=True, kw_only=True)
class SplinceConfig(EraserConfig):
    """Options of the fit, see `SplinceEraser.fit`."""

    affine: bool = True
    shrinkage: bool | str = "auto"
    min_angle: float = 5.0
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.shrinkage not in (True, False, "auto"):
            raise ValueError(f"shrinkage must be True, False or 'auto'; got {self.shrinkage!r}")
        if not 0 < self.min_angle <= 90:  # also refuses NaN
            raise ValueError(f"min_angle must be in (0, 90] degrees; got {self.min_angle}")
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"rtol must be between 0 and 1; got {self.rtol}")


@dataclass(frozen=True, repr=False, eq=False)
class SplinceEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``.

    Attributes:
        proj_left: Thin factor, shape ``(d, k)``; its columns span the cross-covariance with z.
        proj_right: Thin factor, shape ``(k, d)``.
        bias: Mean of the fit data, shape ``(d,)``; None without ``affine``.
    """

    method: ClassVar[str] = "splince"
    config_type: ClassVar[type[EraserConfig]] = SplinceConfig

    proj_left: Tensor
    proj_right: Tensor
    bias: Tensor | None

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        y: object = None,
        *,
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        min_angle: float = 5.0,
        rtol: float | None = None,
        z_kind: LabelKind = "auto",
        y_kind: LabelKind = "auto",
        mask: Tensor | None = None,
    ) -> SplinceEraser:
        """Fit on representations, concept labels and task labels.

        Args:
            x: Representations ``(n, d)`` or ``(..., d)``, or `Representations` (then z may be left
                out and the eraser carries their space).
            z: Concept labels, one for each row: classes, real numbers, or columns.
            y: Task labels, likewise.
            affine: Keep the mean of the data.
            shrinkage: Pull the covariance towards a multiple of the identity; ``"auto"``: when
                ``n <= 20 d``. Both constraints hold either way; only the size of the edit changes.
            min_angle: Smallest angle between concept and task, in degrees, that is accepted.
            rtol: Directions of the concept (and of the task) below ``rtol`` times the strongest
                count as none. Default: 1e-10.
            z_kind: How to read one-dimensional z: ``"auto"``, ``"classes"`` or ``"continuous"``.
            y_kind: Likewise for y.
            mask: Rows to use, shape ``(n,)`` or ``(...)``.

        Raises:
            ShapeError: If the numbers of rows disagree.
            ValueError: If labels are missing, values are not finite, there are fewer than two
                rows, or concept and task lie closer than ``min_angle``.

        Warns:
            ErasureWarning: If z is not correlated with x; the eraser is then the identity.
        """
        config = SplinceConfig(affine=affine, shrinkage=shrinkage, min_angle=min_angle, rtol=rtol)
        data, z, space = _read(x, z)
        _check_finite(data, mask)
        if y is None:
            raise ValueError("task labels are missing: give y, or use LeaceEraser to keep nothing")
        concept = _columns(z, data, z_kind)
        task = _columns(y, data, y_kind)
        columns = torch.cat([concept, task], -1)
        moments = Moments(data.shape[-1], columns.shape[-1], device=data.device)
        moments.update(
            data,
            columns.to(moments.count.dtype).reshape(*data.shape[:-1], -1),
            mask=mask,
        )
        return cls._solve(moments, concept.shape[-1], config, space)

    @classmethod
    def _solve(
        cls, moments: Moments, concepts: int, config: SplinceConfig, space: Space | None
    ) -> SplinceEraser:
        if moments.rows < 2:
            raise ValueError(f"at least 2 rows are needed to fit, got {moments.rows}")
        sigma, deviation = moments.sigma_xx, moments.sigma_zz.diagonal().clamp_min(0).sqrt()
        cross = moments.sigma_xz / torch.where(deviation > 0, deviation, 1.0)
        shrink = config.shrinkage
        if shrink == "auto":
            shrink = moments.n <= ROWS_PER_DIMENSION * moments.width
        metric = optimal_linear_shrinkage(sigma, moments.n) if shrink else sigma
        concept, task = cross[:, :concepts], cross[:, concepts:]
        left, right, angle = splince_factors(metric, concept, task, rtol=config.rtol)
        if angle < config.min_angle:
            raise ValueError(
                f"concept and task share a direction: the smallest angle between them is "
                f"{angle:.3g} degrees, and min_angle is {config.min_angle:g}. Erasing one would "
                "erase the other; use LeaceEraser, or choose another task"
            )
        center = moments.mean_x.clone() if config.affine else None
        edit = LowRankAffine(left, right, center)
        report: dict[str, object] = {
            "n": moments.rows,
            "rank": edit.rank,
            "angle": angle,
            "residual": _ratio(concept - left @ (right.T @ concept), concept),
            "task_change": _ratio(left @ (right.T @ task), task),
            "edit_size": _size(edit, sigma),
            "shrinkage": bool(shrink),
        }
        if edit.rank == 0:
            warnings.warn(
                "no direction is correlated with z (is the label constant?): the eraser is the "
                "identity",
                ErasureWarning,
                stacklevel=3,
            )
        return cls(left, right.T.contiguous(), center, config=config, space=space, report=report)

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        return {"bias"}

    def _check(self) -> None:
        if self.proj_left.ndim != 2 or self.proj_left.shape != self.proj_right.T.shape:
            raise ShapeError(
                f"proj_left must be (d, k) and proj_right (k, d); got "
                f"{tuple(self.proj_left.shape)} and {tuple(self.proj_right.shape)}"
            )
        _ = self.map

    @property
    def map(self) -> LowRankAffine:
        """The low-rank affine map that is applied."""
        return LowRankAffine(self.proj_left, self.proj_right.T, self.bias)

    @property
    def P(self) -> Tensor:  # noqa: N802 the paper's symbol
        """The dense projection, shape ``(d, d)``."""
        return self.map.matrix


def splince_factors(
    sigma_xx: Tensor, sigma_xz: Tensor, sigma_xy: Tensor, *, rtol: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return the thin factors of the map that guards z and keeps the covariance with y.

    ``O(d^3)`` time for one eigendecomposition of the correlations of x.

    Args:
        sigma_xx: Covariance of x, shape ``(d, d)``, PSD; may be singular.
        sigma_xz: Cross-covariance with z, shape ``(d, c)``.
        sigma_xy: Cross-covariance with y, shape ``(d, t)``.
        rtol: Relative cut-off for directions, see `SplinceEraser.fit`.

    Returns:
        ``(left, right, angle)``: factors of shape ``(d, k)`` with ``P = I - left right^T``, and
        the smallest angle between concept and task in degrees, in the metric of the covariance;
        90 if either has no direction. At an angle of zero the factors are not finite or not usable.
    """
    rtol = RANK_TOLERANCE if rtol is None else rtol
    deviation = sigma_xx.diagonal().clamp_min(0).sqrt()
    scale = torch.where(deviation > 0, deviation.reciprocal(), torch.zeros_like(deviation))
    values, vectors = torch.linalg.eigh(scale[:, None] * sigma_xx * scale)
    cut = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    vectors, root = vectors[:, values > cut], values[values > cut].sqrt()
    whiten = (vectors / root).T * scale  # (rank, d), S^-1/2 in its own basis
    colour = deviation[:, None] * vectors * root  # (d, rank), its inverse
    concept = _basis(whiten @ sigma_xz, rtol)
    task = _basis(whiten @ sigma_xy, rtol)
    free = concept - task @ (task.T @ concept)
    free = free - task @ (task.T @ free)  # twice is enough for orthogonality to rounding
    angle = 90.0
    if free.shape[1] and task.shape[1]:
        sine = float(torch.linalg.svdvals(free).min().clamp(0, 1))
        angle = math.degrees(math.asin(sine))
    if angle == 0:
        return colour @ concept, torch.zeros_like(colour @ concept), angle
    gram = free.T @ free
    right = torch.linalg.solve(gram, (whiten.T @ free).T).T
    left = colour @ concept
    for _ in range(2):  # make right^T left = I to rounding
        core = right.T @ left
        right = torch.linalg.solve(core, right.T).T
    return left, right, angle


def _basis(columns: Tensor, rtol: float) -> Tensor:
    """Return an orthonormal basis of the column space, shape ``(rows, rank)``."""
    left: Tensor
    left, strength, _ = torch.linalg.svd(columns, full_matrices=False)
    floor = rtol * strength[:1].sum()
    noise = torch.finfo(columns.dtype).eps * len(columns)  # columns are canonical correlations
    return left[:, strength > floor.clamp_min(noise)]


def _ratio(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else 0.0


def _size(edit: LowRankAffine, sigma: Tensor) -> float:
    """Return the mean squared edit relative to the variance of the data."""
    trace = float(sigma.diagonal().sum())
    moved = (edit.right.T @ sigma @ edit.right) * (edit.left.T @ edit.left)
    return float(moved.sum()) / trace if trace else 0.0


def _read(x: object, z: object) -> tuple[Tensor, object, Space | None]:
    space = None
    if isinstance(x, Representations):
        space, z, x = x.space, x.z if z is None else z, x.x
    if z is None:
        raise ValueError("labels are missing: give z, or representations collected with labels")
    data = as_tensor(x)
    if data.ndim < 2:
        raise ShapeError(f"x must have shape (n, d) or (..., d); got {tuple(data.shape)}")
    if (rows := data.shape[:-1].numel()) < 2:
        raise ValueError(f"at least 2 rows are needed to fit, got {rows}")
    return data if data.is_floating_point() else data.double(), z, space


def _check_finite(data: Tensor, mask: Tensor | None) -> None:
    """Blame x before labels that were computed from it."""
    bad = ~torch.isfinite(data).all(-1)
    if mask is not None and mask.shape == bad.shape:
        bad = bad & mask.to(bad)
    rows = bad.flatten().nonzero()[:, 0]
    if len(rows):
        raise ValueError(
            f"x has {len(rows)} rows that are not finite; the first is row {int(rows[0])}"
        )


def _columns(labels: object, data: Tensor, kind: LabelKind) -> Tensor:
    """Return labels as real columns ``(n, c)`` on the device of the data."""
    lead = data.shape[:-1]
    if lead.numel() < 2:
        raise ValueError(f"at least 2 rows are needed to fit; got {lead.numel()}")
    if isinstance(labels, Tensor) and len(lead) > 1 and labels.shape[: len(lead)] == lead:
        labels = labels.reshape(lead.numel(), *labels.shape[len(lead) :])
    encoded: Labels = encode_concepts(labels, n=lead.numel(), kind=kind)
    values = encoded.values.to(data.device)
    if values.ndim == 2:
        return values
    columns: Tensor = torch.nn.functional.one_hot(values, encoded.width)
    return columns
