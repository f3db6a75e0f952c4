"""LEACE: the affine map that removes all linear information about a concept with the least damage.

Belrose et al. 2023 (arXiv:2306.03819), closed form of their theorem 4.3; ``method="orth"`` is the orthogonal
projection off the column space of the cross-covariance (Shao et al. 2023, arXiv:2203.07893, with a bias).
Reference implementation: EleutherAI/concept-erasure 0.2.

Deviations: one Cholesky solve instead of matrix square roots (the same map); the rank is decided on
canonical correlations, so the scale of z does not matter (the reference cuts singular values at an absolute
0.01); shrinkage is clipped to [0, 1] and on by default only for n <= 20 d; no trace constraint (the trace
cannot grow on the fit data, and mixing in another projection would break the guarantee); integer labels are
classes, not one number; statistics are float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import read_data, read_labels, read_rows
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError, SpaceError
from concept_erasure.labels import Classes, LabelKind, as_tensor
from concept_erasure.leakage import FOLDS, Folds, held_out_gap, remaining_gap
from concept_erasure.linalg import (
    LowRankAffine,
    MetricSolver,
    Moments,
    all_reduce_moments,
    optimal_linear_shrinkage,
)
from concept_erasure.sites import Space

__all__ = [
    "ErasureMethod",
    "LeaceConfig",
    "LeaceEraser",
    "LeaceFitter",
    "concept_whitening",
    "erasing_factors",
]

ErasureMethod = Literal["leace", "orth"]
ROWS_PER_DIMENSION = 20  # below this many rows a dimension, "auto" shrinks the covariance
GUARDED = 1e-6  # share of the cross-covariance below which we call the fit data guarded


@dataclass(frozen=True, kw_only=True)
class LeaceConfig(EraserConfig):
    """Options of a LEACE fit; see `LeaceFitter`."""

    method: str = "leace"
    affine: bool = True
    shrinkage: bool | str = "auto"
    rank: int | None = None
    svd_tol: float | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("leace", "orth"):
            raise ValueError(f"method must be 'leace' or 'orth'; got {self.method!r}")
        if self.shrinkage not in (True, False, "auto"):
            raise ValueError(f"shrinkage must be True, False or 'auto'; got {self.shrinkage!r}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank must be a whole number from 1, or None; got {self.rank!r}")
        if self.svd_tol is not None and not 0 < self.svd_tol < 1:
            raise ValueError(
                f"svd_tol cuts canonical correlations, so it must lie in (0, 1); got {self.svd_tol!r}"
            )
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite; got {self.strength!r}")


def concept_whitening(sigma_zz: Tensor) -> Tensor:
    """Return ``w`` of shape ``(c, q)`` with ``w^T sigma_zz w = I`` on the range of ``sigma_zz``.

    ``sigma_xz w`` does not depend on the scale of the concept's columns, nor on collinear ones.
    """
    deviation = sigma_zz.diagonal().clamp_min(0).sqrt()
    live = deviation > 0
    if not bool(live.any()):
        return sigma_zz[:, :0]
    scale = torch.where(live, 1 / deviation, torch.zeros_like(deviation))
    values, vectors = torch.linalg.eigh(sigma_zz * scale[:, None] * scale)
    # a correlation matrix, so a fixed cut is scale-free; it lies above the rounding of long sums
    keep = values > values[-1] * torch.finfo(values.dtype).eps ** (2 / 3)
    whitening: Tensor = scale[:, None] * vectors[:, keep] / values[keep].sqrt()
    return whitening


def erasing_factors(
    concept: Tensor,
    whitened: Tensor,
    solved: Tensor,
    *,
    rtol: float,
    rank: int | None = None,
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(left, right, strengths)`` of the guarding projection ``P = I - left right^T``.

    ``left`` is an orthonormal basis of the concept's column space and ``right = S^+ left (left^T S^+ left)^{-1}``,
    which equals ``A (A^T S^+ A)^+ A^T S^+`` (Belrose et al. 2023, theorem 4.3) and guards to rounding for any
    positive definite S.

    Args:
        concept: The whitened cross-covariance, shape ``(d, q)``.
        whitened: ``S^{-1/2} concept`` up to a rotation from the left; its singular values are the strengths.
        solved: ``S^+ concept``, shape ``(d, q)``. With S the identity all three are the same tensor, and the
            projection is orthogonal.
        rtol: Directions are kept whose strength exceeds this.
        rank: Keep at most this many, strongest first.
        relative: Divide the strengths by the largest first (they are not correlations without a metric).

    Returns:
        Factors of shape ``(d, r)`` and all q strengths, strongest first.
    """
    strengths, vectors = torch.linalg.svd(whitened, full_matrices=False)[1:]
    if relative and len(strengths):
        strengths = strengths / strengths[0].clamp_min(torch.finfo(strengths.dtype).tiny)
    kept = strengths > rtol
    if rank is not None:
        kept = kept & (torch.arange(len(kept), device=kept.device) < rank)
    size = (concept @ vectors[kept].T).norm(dim=0)
    coordinates = vectors[kept].T / size
    left, triangle = torch.linalg.qr(concept @ coordinates)
    if solved is concept:
        return left, left, strengths
    right = torch.linalg.solve_triangular(triangle, solved @ coordinates, upper=True, left=False)
    for _ in range(2):  # the second pass removes the rounding of the first
        right = torch.linalg.solve(left.T @ right, right, left=False)
    return left, right, strengths


@dataclass(frozen=True, repr=False, eq=False)
class LeaceEraser(RepresentationEraser):
    """A fitted LEACE map ``x - (x - bias) proj_right^T proj_left^T``.

    Attributes:
        proj_left: Shape ``(d, r)``.
        proj_right: Shape ``(r, d)``.
        bias: Mean of the fit data, shape ``(d,)``; None without ``affine``.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> z = x[:, 0] > 0
        >>> eraser = LeaceEraser.fit(x, z)
        >>> clean = eraser(x)
        >>> gap = clean[z].mean(0) - clean[~z].mean(0)
        >>> bool(gap.abs().max() < 1e-5)
        True
    """

    method: ClassVar[str] = "leace"
    config_type: ClassVar[type[EraserConfig]] = LeaceConfig

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        method: ErasureMethod = "leace",
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        rank: int | None = None,
        svd_tol: float | None = None,
        strength: float = 1.0,
        z_kind: LabelKind = "auto",
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        background: object = None,
        held_out: tuple[object, object] | Representations | None = None,
        dtype: torch.dtype | None = None,
    ) -> LeaceEraser:
        """Fit on representations ``x`` ``(..., d)`` and labels ``z``; see `LeaceFitter` for the options.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Labels, one a row: bool, int, str are classes; floats are real targets; a 2-D array is columns;
                a mapping or table of several columns erases several concepts jointly.
            method: ``"leace"`` or ``"orth"``.
            affine: Keep the mean of the data.
            shrinkage: Shrink the covariance: True, False, or ``"auto"`` (when n <= 20 d).
            rank: Remove at most this many directions, strongest first; default all.
            svd_tol: Smallest canonical correlation that counts; default ``max(n, d) eps``.
            strength: 1 erases, less is partial, 2 reflects the class means.
            z_kind: ``"classes"`` or ``"continuous"`` overrides the reading of one-dimensional z.
            mask: Rows of x to use, shape ``x.shape[:-1]``.
            weight: Row weights, same shape.
            background: Unlabelled representations ``(..., d)`` on which the edit should be small too; see
                `LeaceFitter.update_background`.
            held_out: ``(x, z)`` never fitted on, for the report; default five-fold cross-fitting.
            dtype: Dtype of the factors; default float64.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, or options out of range.
            ShapeError: If x and z disagree.
        """
        return LeaceFitter.fit(
            x,
            z,
            method=method,
            affine=affine,
            shrinkage=shrinkage,
            rank=rank,
            svd_tol=svd_tol,
            strength=strength,
            z_kind=z_kind,
            mask=mask,
            weight=weight,
            background=background,
            held_out=held_out,
            dtype=dtype,
        ).eraser


class LeaceFitter:
    """Streams data and gives the LEACE eraser of all of it.

    O(n d^2) time, O(d^2) memory; batches, order and shards do not matter.

    Args:
        x_dim: Width d.
        z_dim: Number of concept columns c. With c > 1, integer z of shape ``(n,)`` are class indices.
        method: ``"leace"``, or ``"orth"`` (no covariance is kept).
        affine: Keep the mean of the data.
        shrinkage: Shrink the covariance: True, False, or ``"auto"`` (when n <= 20 d). Guardedness does not
            depend on it; a small edit does, when rows are few.
        rank: Remove at most this many directions, strongest first.
        svd_tol: Smallest canonical correlation that counts as one. Higher is more stable and leaves more.
        strength: 1 erases; less is partial; 2 reflects the class means.
        z_kind: ``"continuous"`` takes whole numbers in a single column as a real target.
        classes: Class names, so that batches of labels of any type can be streamed; for several concepts a
            mapping of them.
        device: Where the statistics live.
        dtype: Dtype of the factors given out; statistics stay float64.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        method: ErasureMethod = "leace",
        *,
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        rank: int | None = None,
        svd_tol: float | None = None,
        strength: float = 1.0,
        z_kind: LabelKind = "auto",
        classes: Classes | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = LeaceConfig(
            method=method,
            affine=affine,
            shrinkage=shrinkage,
            rank=rank,
            svd_tol=svd_tol,
            strength=strength,
        )
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating type; got {dtype}")
        if classes is not None and not isinstance(classes, Mapping) and len(classes) != z_dim:
            raise ShapeError(f"z_dim is {z_dim} but there are {len(classes)} classes")
        self.x_dim, self.z_dim, self.z_kind = x_dim, z_dim, z_kind
        self.classes = classes if isinstance(classes, Mapping) else tuple(map(str, classes or ()))
        # below float32 the factors would lose the guarantee
        self.dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self._categorical = True
        self._moments = Moments(x_dim, z_dim, covariance=method == "leace", device=device)
        self._folds = Folds(x_dim, z_dim, device=device)
        self._held_out: Folds | None = None
        self.space: Space | None = None
        self._background: Moments | None = None
        self._eraser: LeaceEraser | None = None

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        method: ErasureMethod = "leace",
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        rank: int | None = None,
        svd_tol: float | None = None,
        strength: float = 1.0,
        z_kind: LabelKind = "auto",
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        background: object = None,
        held_out: tuple[object, object] | Representations | None = None,
        dtype: torch.dtype | None = None,
    ) -> LeaceFitter:
        """Return a fitter that has seen ``(x, z)``; see `LeaceEraser.fit`."""
        data, labels, space = read_data(x, z, z_kind)
        fitter = cls(
            data.shape[-1],
            labels.width,
            method,
            affine=affine,
            shrinkage=shrinkage,
            rank=rank,
            svd_tol=svd_tol,
            strength=strength,
            z_kind=z_kind,
            classes=labels.classes,
            device=data.device,
            dtype=dtype,
        )
        fitter.space = space
        encoded = labels.values.reshape(*data.shape[:-1], *labels.values.shape[1:])
        groups = x.rows if isinstance(x, Representations) else None
        fitter._add(data, encoded, mask, weight, groups)
        if fitter.n < 2:
            raise ValueError(f"at least 2 rows are needed to fit; the mask leaves {fitter.n}")
        if background is not None:
            fitter.update_background(background)
        if held_out is not None:
            fitter.hold_out(*(held_out if isinstance(held_out, tuple) else (held_out,)))
        return fitter

    def update(
        self,
        x: object,
        z: object,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Self:
        """Add a batch; if any of it is refused, nothing of it is kept.

        Args:
            x: Representations ``(..., d)``.
            z: Labels: ``(...)`` class indices when z_dim > 1, or numbers of shape ``(..., z_dim)``.
            mask: Rows to use, shape ``(...)``.
            weight: Row weights, shape ``(...)``; their scale does not matter.
            groups: Which text a row comes from, int64, shape ``(...)``, so that the held-out gap is measured on
                other texts.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If values are not finite or labels unknown.
        """
        data = as_tensor(x)
        if data.ndim < 1 or data.shape[-1] != self.x_dim:
            raise ShapeError(f"x must have width {self.x_dim}; got shape {tuple(data.shape)}")
        self._add(data, self._labels(z, data), mask, weight, groups)
        return self

    def update_background(self, x: object, *, mask: Tensor | None = None) -> Self:
        """Add unlabelled rows on which the edit should be small as well.

        Any metric guards, so the concept stays that of the labelled rows; the edit becomes the smallest on
        labelled and background rows together, and keeps their common mean. In a language model give all
        tokens here when labels belong to one token a text: the eraser acts on all of them.

        Args:
            x: Representations ``(..., d)``.
            mask: Rows to use, shape ``(...)``.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If the method is ``"orth"``, which has no metric, or values are not finite.
        """
        if self.config.method == "orth":
            raise ValueError(
                "method='orth' uses no covariance, so background rows would do nothing"
            )
        self._refuse_other_space(x, "background", tokens=False)
        data = read_rows(x.x if isinstance(x, Representations) else x)
        device = None if self._moments.rows == 0 else self._moments.count.device
        rows = self._background or Moments(self.x_dim, 1, device=device)
        rows.update(data, data.new_zeros((*data.shape[:-1], 1)), mask=mask)
        self._background, self._eraser = rows, None
        return self

    def hold_out(self, x: object, z: object = None, *, groups: Tensor | None = None) -> Self:
        """Add rows that are only measured on: the held-out gap of the report is theirs.

        Without any, the gap is cross-fitted: the concept's directions are fitted on three fifths of the rows, five
        times, and measured on the others (the metric, which cannot break the guarantee, is that of all rows).

        Args:
            x: Representations ``(..., d)``, or `Representations` (then z and groups may be left out).
            z: Labels as in the fit.
            groups: Which text a row comes from, as in `update`.
        """
        self._refuse_other_space(x, "held-out", tokens=True)
        if isinstance(x, Representations):
            z, groups = x.z if z is None else z, x.rows if groups is None else groups
        if z is None:
            raise ValueError("labels are missing: give z, or representations collected with labels")
        data = read_rows(x.x if isinstance(x, Representations) else x)
        if data.shape[-1] != self.x_dim:
            raise ShapeError(f"held-out x has width {data.shape[-1]}; the fit has {self.x_dim}")
        values = self._labels(z, data)
        flat = data.reshape(-1, self.x_dim)
        folds = self._held_out or Folds(self.x_dim, self.z_dim, device=data.device)
        folds.update(
            flat,
            values.reshape(len(flat), *values.shape[data.ndim - 1 :]),
            groups=self._read_groups(groups, data),
        )
        self._held_out, self._eraser = folds, None
        return self

    def _refuse_other_space(self, x: object, what: str, *, tokens: bool) -> None:
        other = x.space if isinstance(x, Representations) else None
        if other is None or self.space is None:
            return
        same = replace(other, tokens=self.space.tokens) if not tokens else other
        if same != self.space:
            raise SpaceError(f"{what} rows come from {other}; the fit from {self.space}")

    @staticmethod
    def _read_groups(groups: Tensor | None, data: Tensor) -> Tensor | None:
        if groups is None:
            return None
        found = as_tensor(groups, name="groups")
        if found.is_floating_point() or found.numel() != data.shape[:-1].numel():
            raise ShapeError(
                f"groups must be one whole number a row, {tuple(data.shape[:-1])}; got {found.dtype} "
                f"{tuple(found.shape)}"
            )
        return found.reshape(-1).to(data.device, torch.int64)

    def _pooled(self) -> Moments:
        """Return the moments whose covariance is the metric and whose mean is kept."""
        if self._background is None:
            return self._moments
        return self._moments.marginal().merge(self._background)

    def _labels(self, z: object, data: Tensor) -> Tensor:
        lead = data.shape[:-1]
        if self.classes and not (isinstance(z, Tensor) and z.shape == (*lead, self.z_dim)):
            kind: LabelKind = "auto" if isinstance(self.classes, Mapping) else "classes"
            values = read_labels(z, data, kind, self.classes).values
            return values.reshape(*lead, *values.shape[1:])
        values = as_tensor(z, name="z")
        values = values.to(data.device)
        rows = math.prod(lead)
        if values.shape == lead and self.z_dim > 1 and not values.is_floating_point():
            return values.to(torch.int64)
        shapes = [(*lead, self.z_dim), (rows, self.z_dim)]
        shapes += [tuple(lead), (rows,)] if self.z_dim == 1 else []
        if tuple(values.shape) not in shapes:
            raise ShapeError(
                f"x has {rows} rows and z_dim is {self.z_dim}, so z must have shape {shapes[0]}"
                f"{' (or class indices ' + str(tuple(lead)) + ')' if self.z_dim > 1 else ''}; "
                f"got shape {tuple(values.shape)}"
            )
        if (
            self.z_dim == 1
            and self.z_kind != "continuous"
            and not values.is_floating_point()
            and values.numel()
            and not 0 <= int(values.min()) <= int(values.max()) <= 1
        ):
            raise ValueError(
                f"integer labels {int(values.min())}..{int(values.max())} in one column: "
                "pass z_dim = number of classes, or z_kind='continuous'"
            )
        return values.reshape(*lead, self.z_dim).to(self._moments.count.dtype)

    def _add(
        self,
        x: Tensor,
        z: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        groups: Tensor | None = None,
    ) -> None:
        group = self._read_groups(groups, x)
        self._moments.update(x, z, mask=mask, weight=weight)
        self._categorical = self._categorical and z.ndim == x.ndim - 1
        self._eraser = None
        flat = [x.reshape(-1, self.x_dim), z.reshape(-1, *z.shape[x.ndim - 1 :]).to(x.device)]
        extra = [None if v is None else v.reshape(-1).to(x.device) for v in (weight, group)]
        if mask is not None:
            keep = mask.reshape(-1).to(x.device, torch.bool)
            flat = [value[keep] for value in flat]
            extra = [None if value is None else value[keep] for value in extra]
        self._folds.update(*flat, weight=extra[0], groups=extra[1])

    def merge(self, other: LeaceFitter) -> Self:
        """Add what another fitter has seen.

        Raises:
            ValueError: If the other's options, classes or space differ.
        """
        if self._identity != other._identity:
            raise ValueError(f"the fitters differ: {self._identity} and {other._identity}")
        self._moments.merge(other._moments)
        self._folds.merge(other._folds)
        self._categorical = self._categorical and other._categorical
        if other._held_out is not None:
            held = self._held_out or Folds(self.x_dim, self.z_dim, device=self.mean_x.device)
            self._held_out = held.merge(other._held_out)
        if other._background is not None:
            background = self._background or Moments(self.x_dim, 1, device=self.mean_x.device)
            self._background = background.merge(other._background)
        self._eraser = None
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Add what the fitters of all ranks have seen; every rank ends with the same state.

        Raises:
            ValueError: If options, classes or space differ between ranks.
        """
        found: list[object] = [None] * dist.get_world_size(group)
        mine = (self._identity, self._background is None, self._held_out is None)
        dist.all_gather_object(found, (mine, self._categorical), group=group)
        theirs = cast("list[tuple[object, bool]]", found)
        if any(other != mine for other, _ in theirs):
            raise ValueError(f"the ranks differ: {[other for other, _ in theirs]}")
        self._categorical = all(categorical for _, categorical in theirs)
        background = [] if self._background is None else [self._background]
        held = [] if self._held_out is None else self._held_out.parts
        all_reduce_moments([self._moments, *self._folds.parts, *background, *held], group)
        self._eraser = None
        return self

    @property
    def _identity(self) -> tuple[object, ...]:
        return (self.config, self.z_kind, self.classes, self.space)

    @property
    def n(self) -> int:
        """Rows seen."""
        return self._moments.rows

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, shape ``(d,)``."""
        return self._moments.mean_x

    @property
    def mean_z(self) -> Tensor:
        """Mean of z, shape ``(c,)``."""
        return self._moments.mean_z

    @property
    def shrinks(self) -> bool:
        """Whether the covariance is shrunk, given the rows seen."""
        if self.config.shrinkage == "auto":
            extra = 0.0 if self._background is None else self._background.n_effective
            return self._moments.n_effective + extra <= ROWS_PER_DIMENSION * self.x_dim
        return bool(self.config.shrinkage)

    @property
    def sigma_xx(self) -> Tensor:
        """Covariance of x as used: pooled with the background, shrunk or with Bessel's correction."""
        self._need_rows()
        pooled = self._pooled()
        sigma, n = pooled.sigma_xx, pooled.n_effective
        return optimal_linear_shrinkage(sigma, n) if self.shrinks else sigma * (n / (n - 1))

    @property
    def sigma_xz(self) -> Tensor:
        """Cross-covariance with Bessel's correction, shape ``(d, c)``."""
        self._need_rows()
        n = self._moments.n_effective
        return self._moments.sigma_xz * (n / (n - 1))

    def _need_rows(self) -> None:
        if self._moments.rows < 2:
            raise NotFittedError(
                f"at least 2 rows are needed; the fitter has seen {self._moments.rows}. Call update(x, z)"
            )

    @property
    def eraser(self) -> LeaceEraser:
        """The eraser of all data seen; cached until the next update."""
        if self._eraser is None:
            self._eraser = self._solve()
        return self._eraser

    def _solve(self) -> LeaceEraser:
        self._need_rows()
        config, moments = self.config, self._moments
        rtol = (
            config.svd_tol or max(moments.rows, self.x_dim) * torch.finfo(moments.count.dtype).eps
        )
        pooled = self._pooled()
        sigma = None if config.method == "orth" else pooled.sigma_xx
        if sigma is not None and self.shrinks:
            sigma = optimal_linear_shrinkage(sigma, pooled.n_effective, inplace=True)
        trace = 0.0 if sigma is None else float(sigma.diagonal().sum())
        metric = None if sigma is None else MetricSolver(sigma, overwrite=True)
        whitening = concept_whitening(moments.sigma_zz)
        cross_fits = self._folds.rests if self._folds.ready and self._held_out is None else []
        concepts = [m.sigma_xz @ whitening for m in (moments, *cross_fits)]
        (left, right, strengths), *others = self._factors(metric, concepts, rtol)
        center = pooled.mean_x.clone() if config.affine else None
        map_ = LowRankAffine(left, right, center).scale(config.strength)
        report = self._report(map_)
        if metric is not None:
            if self._background is None and not self.shrinks:
                kept = strengths[: map_.rank].tolist()
                report["canonical_correlations"] = [round(value, 12) for value in kept]
            if self._background is not None:
                report["background_rows"] = self._background.rows
            # E|x' - x|^2 = tr(right^T S right) for orthonormal left, and right^T S right = (left^T S^+ left)^-1
            moved = torch.linalg.inv(left.T @ metric(left)).diagonal().sum()
            report["edit_size"] = config.strength**2 * float(moved) / trace if trace else 0.0
            report["condition"] = metric.condition
        norm = metric.whiten if metric is not None else torch.Tensor.clone
        if self._held_out is not None:
            if not self._held_out.ready:
                raise ValueError(
                    f"held-out data need at least {4 * FOLDS} rows; got {self._held_out.rows}"
                )
            maps = [map_] * FOLDS
            report.update(held_out_gap(maps, self._held_out.pairs, norm, whitening))
        elif cross_fits:
            maps = [LowRankAffine(lt, rt).scale(config.strength) for lt, rt, _ in others]
            report.update(held_out_gap(maps, self._folds.pairs, norm, whitening))
        if "held_out_gap" not in report:
            few = (
                f"{moments.rows} rows are too few" if not self._folds.ready else "no signal in them"
            )
            report["held_out_note"] = f"gap not measured: {few}"
        out = map_ if self.dtype is None else map_.to(dtype=self.dtype)
        self._warn(report)
        return LeaceEraser(
            out.left,
            out.right.T.contiguous(),
            out.center,
            config=config,
            space=self.space,
            report=report,
        )

    def _factors(
        self, metric: MetricSolver | None, concepts: list[Tensor], rtol: float
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Solve for all concepts (the whole data, and each cross-fit) with one pass over the metric."""
        rank = self.config.rank
        if metric is None:
            return [erasing_factors(c, c, c, rtol=rtol, rank=rank, relative=True) for c in concepts]
        widths = [c.shape[1] for c in concepts]
        stacked = torch.cat(concepts, 1)
        parts = zip(
            concepts,
            metric.whiten(stacked).split(widths, 1),
            metric(stacked).split(widths, 1),
            strict=True,
        )
        return [erasing_factors(c, w, s, rtol=rtol, rank=rank) for c, w, s in parts]

    def _report(self, map_: LowRankAffine) -> dict[str, object]:
        moments = self._moments
        report: dict[str, object] = {
            "n": moments.rows,
            "rank": map_.rank,
            "residual": remaining_gap(map_, moments.sigma_xz),
            "shrinkage": self.config.method == "leace" and self.shrinks,
        }
        if self._categorical:
            shares = moments.mean_z.tolist()
            names = tuple(self.classes) or tuple(str(i) for i in range(self.z_dim))
            report["n_per_class"] = {
                k: round(s * moments.rows) for k, s in zip(names, shares, strict=True)
            }
        return report

    def _warn(self, report: dict[str, object]) -> None:
        if report["rank"] == 0:
            _say(
                "no direction is correlated with z (is the label constant?): the eraser is the identity"
            )
            return
        counts = cast("dict[str, int]", report.get("n_per_class", {}))
        if few := [name for name, count in counts.items() if count < 2]:
            _say(
                f"classes {few[:5]} have fewer than two rows, so what is removed of them is chance"
            )
        if report["rank"] == self.x_dim and self.x_dim > 1:
            _say(f"all {self.x_dim} dimensions are removed: every row becomes the mean")
        asked = (
            self.config.rank is not None
            or self.config.svd_tol is not None
            or self.config.strength != 1
        )
        if not asked and float(str(report["residual"])) > GUARDED:
            _say(f"not guarded: {report['residual']:.2e} of the cross-covariance is left")


def _say(message: str) -> None:
    warnings.warn(message, ErasureWarning, stacklevel=6)
