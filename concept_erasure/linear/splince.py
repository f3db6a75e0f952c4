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

Report: ``residual`` and ``task_change`` are the shares of the cross-covariance with z that is left and of the
one with y that is lost (both 0 on the data of the fit), ``angle`` the smallest angle in degrees, ``edit_size``
the mean squared edit relative to the variance, and ``held_out_gap`` the residual for rows the map has not seen,
cross-fitted over five folds as for LEACE, with its 95 % interval; ``held_out_task_change`` likewise is the task's
cross-covariance that is lost.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from concept_erasure.data import read_data, read_labels
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning
from concept_erasure.labels import LabelKind, Labels
from concept_erasure.leakage import Folds, held_out_gap, remaining_gap
from concept_erasure.linalg import LowRankAffine, Moments, optimal_linear_shrinkage
from concept_erasure.sites import Space

__all__ = ["SplinceConfig", "SplinceEraser", "splince_factors"]

RANK_TOLERANCE = 1e-10
SMALLEST_ANGLE = 0.1  # degrees; below it the map of a fold is rounding
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
        data, labels, space = read_data(x, z, z_kind)
        if y is None:
            raise ValueError("task labels are missing: give y, or use LeaceEraser to keep nothing")
        concept, task = _columns(labels), _columns(read_labels(y, data, y_kind, name="y"))
        columns = torch.cat([concept, task], -1)
        moments = Moments(data.shape[-1], columns.shape[-1], device=data.device)
        columns = columns.to(moments.count.dtype)
        moments.update(data, columns.reshape(*data.shape[:-1], -1), mask=mask)
        rows = data.reshape(-1, data.shape[-1])
        if mask is not None:
            keep = mask.reshape(-1).to(rows.device, torch.bool)
            rows, columns = rows[keep], columns[keep]
        folds = Folds(moments.width, moments.concepts, device=data.device).update(rows, columns)
        return cls._solve(moments, folds, concept.shape[-1], config, space)

    @classmethod
    def _solve(
        cls,
        moments: Moments,
        folds: Folds,
        concepts: int,
        config: SplinceConfig,
        space: Space | None,
    ) -> SplinceEraser:
        if moments.rows < 2:
            raise ValueError(f"at least 2 rows are needed to fit; got {moments.rows}")
        sigma = moments.sigma_xx
        shrink = config.shrinkage
        if shrink == "auto":
            shrink = moments.n <= ROWS_PER_DIMENSION * moments.width
        metric = _Metric.of(optimal_linear_shrinkage(sigma, moments.n) if shrink else sigma)
        concept, task = _standardised(moments, concepts)
        left, right, angle = metric.factors(concept, task, config.rtol)
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
            "residual": remaining_gap(edit, concept),
            "task_change": _ratio(left @ (right.T @ task), task),
            "edit_size": _size(edit, sigma),
            "shrinkage": bool(shrink),
        }
        if edit.rank and folds.ready:
            report.update(_held_out(metric, folds, moments, concepts, config.rtol))
        if edit.rank == 0:
            warnings.warn(
                "no direction is correlated with z (is the label constant?): the eraser is the "
                "identity",
                ErasureWarning,
                stacklevel=3,
            )
        return cls(left, right.T.contiguous(), center, config=config, space=space, report=report)


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
    return _Metric.of(sigma_xx).factors(sigma_xz, sigma_xy, rtol)


@dataclass(frozen=True)
class _Metric:
    """Square roots of a covariance in its own basis.

    Attributes:
        whiten: ``S^-1/2``, shape ``(rank, d)``.
        colour: Its inverse ``S^1/2``, shape ``(d, rank)``.
    """

    whiten: Tensor
    colour: Tensor

    @classmethod
    def of(cls, sigma_xx: Tensor) -> _Metric:
        """Return the roots in ``O(d^3)`` time."""
        deviation = sigma_xx.diagonal().clamp_min(0).sqrt()
        scale = torch.where(deviation > 0, deviation.reciprocal(), torch.zeros_like(deviation))
        values, vectors = torch.linalg.eigh(scale[:, None] * sigma_xx * scale)
        cut = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
        vectors, root = vectors[:, values > cut], values[values > cut].sqrt()
        return cls((vectors / root).T * scale, deviation[:, None] * vectors * root)

    def factors(
        self, sigma_xz: Tensor, sigma_xy: Tensor, rtol: float | None
    ) -> tuple[Tensor, Tensor, float]:
        """Return what `splince_factors` returns."""
        rtol = RANK_TOLERANCE if rtol is None else rtol
        concept = _basis(self.whiten @ sigma_xz, rtol)
        task = _basis(self.whiten @ sigma_xy, rtol)
        free = concept - task @ (task.T @ concept)
        free = free - task @ (task.T @ free)  # twice is enough for orthogonality to rounding
        angle = 90.0
        if free.shape[1] and task.shape[1]:
            sine = float(torch.linalg.svdvals(free).min().clamp(0, 1))
            angle = math.degrees(math.asin(sine))
        left = self.colour @ concept
        if angle == 0:
            return left, torch.zeros_like(left), angle
        gram = free.T @ free
        right = torch.linalg.solve(gram, (self.whiten.T @ free).T).T
        for _ in range(2):  # make right^T left = I to rounding
            core = right.T @ left
            right = torch.linalg.solve(core, right.T).T
        return left, right, angle


def _standardised(moments: Moments, concepts: int) -> tuple[Tensor, Tensor]:
    """Return the cross-covariances with concept and task, each column of labels at unit variance."""
    deviation = moments.sigma_zz.diagonal().clamp_min(0).sqrt()
    cross = moments.sigma_xz / torch.where(deviation > 0, deviation, 1.0)
    return cross[:, :concepts], cross[:, concepts:]


def _held_out(
    metric: _Metric, folds: Folds, moments: Moments, concepts: int, rtol: float | None
) -> dict[str, object]:
    """Return how much of the concept is left, and of the task lost, on rows not used for the map."""
    maps = []
    for rest in folds.rests:
        left, right, angle = metric.factors(*_standardised(rest, concepts), rtol)
        if angle < SMALLEST_ANGLE:
            return {}
        maps.append(LowRankAffine(left, right))
    deviation = moments.sigma_zz.diagonal().clamp_min(0).sqrt()
    scale = torch.where(deviation > 0, deviation.reciprocal(), torch.zeros_like(deviation))
    report = held_out_gap(
        maps,
        [(one[:, :concepts], two[:, :concepts]) for one, two in folds.pairs],
        metric.whiten.matmul,
        torch.diag(scale[:concepts]),
    )
    lost = []
    for map_, (one, two) in zip(maps, folds.pairs, strict=True):
        parts = [(fold[:, concepts:] * scale[concepts:]) for fold in (one, two)]
        moved = [metric.whiten @ (map_.left @ (map_.right.T @ part)) for part in parts]
        whole = [metric.whiten @ part for part in parts]
        lost.append([float((a * b).sum()) for a, b in (moved, whole)])
    change, size = (sum(column) for column in zip(*lost, strict=True))
    if size > 0:
        report["held_out_task_change"] = math.sqrt(max(0.0, change / size))
    return report


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


def _columns(labels: Labels) -> Tensor:
    """Return labels as real columns ``(n, c)``."""
    if labels.values.ndim == 2:
        return labels.values
    columns: Tensor = torch.nn.functional.one_hot(labels.values, labels.width)
    return columns
