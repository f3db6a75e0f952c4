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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import LabelKind, Labels, as_tensor, encode_concepts
from concept_erasure.linalg import LowRankAffine, MetricSolver, Moments, optimal_linear_shrinkage
from concept_erasure.sites import Space

__all__ = ["ErasureMethod", "LeaceConfig", "LeaceEraser", "LeaceFitter", "erasing_factors"]

ErasureMethod = Literal["leace", "orth"]
ROWS_PER_DIMENSION = 20  # below this many rows a dimension, "auto" shrinks the covariance
GUARDED = 1e-6  # share of the cross-covariance below which we call the fit data guarded
FOLDS = 5  # for the held-out gap of every report
T_975 = 2.776  # Student t, 4 degrees of freedom, two-sided 95 %


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


def whitened_concept(sigma_xz: Tensor, sigma_zz: Tensor) -> Tensor:
    """Return ``A sigma_zz^{-1/2}`` on the range of ``sigma_zz``, shape ``(d, q)``, free of the scale of z."""
    deviation = sigma_zz.diagonal().clamp_min(0).sqrt()
    live = deviation > 0
    if not bool(live.any()):
        return sigma_xz[:, :0]
    deviation = deviation[live]
    correlation = sigma_zz[live][:, live] / deviation[:, None] / deviation
    values, vectors = torch.linalg.eigh(correlation)
    # a correlation matrix, so a fixed cut is scale-free; it lies above the rounding of long sums
    keep = values > values[-1] * torch.finfo(values.dtype).eps ** (2 / 3)
    whitening: Tensor = vectors[:, keep] / values[keep].sqrt()
    return (sigma_xz[:, live] / deviation) @ whitening


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
        concept: Output of `whitened_concept`, shape ``(d, q)``.
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


def remaining_gap(map_: LowRankAffine, sigma_xz: Tensor) -> float:
    """Return ``|P A| / |A|``: the share of the cross-covariance that the map leaves (0 is guarded)."""
    size = sigma_xz.norm()
    if float(size) == 0:
        return 0.0
    left, right = map_.left.to(sigma_xz), map_.right.to(sigma_xz)
    return float((sigma_xz - left @ (right.T @ sigma_xz)).norm() / size)


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

    proj_left: Tensor
    proj_right: Tensor
    bias: Tensor | None

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
            held_out: ``(x, z)`` never fitted on, for the report; default five-fold cross-fitting.
            dtype: Dtype of the factors; default float64.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, or options out of range.
            ShapeError: If x and z disagree.
        """
        options = LeaceConfig(
            method=method,
            affine=affine,
            shrinkage=shrinkage,
            rank=rank,
            svd_tol=svd_tol,
            strength=strength,
        )
        data, labels, space = read_data(x, z, z_kind)
        fitter = LeaceFitter(
            data.shape[-1],
            labels.width,
            method,
            affine=affine,
            shrinkage=shrinkage,
            rank=rank,
            svd_tol=svd_tol,
            strength=strength,
            device=data.device,
            dtype=dtype,
            classes=labels.names or None,
        )
        fitter._add(
            data, labels.values.reshape(*data.shape[:-1], *labels.values.shape[1:]), mask, weight
        )
        if fitter.n < 2:
            raise ValueError(f"at least 2 rows are needed to fit; the mask leaves {fitter.n}")
        eraser = replace(fitter.eraser, space=space, config=options)
        if held_out is None:
            return eraser
        other = (held_out.x, held_out.z) if isinstance(held_out, Representations) else held_out
        found = held_out_report(eraser, *other, z_kind=z_kind, names=labels.names)
        return replace(eraser, report={**eraser.report, **found})

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        return {"bias"}

    def _check(self) -> None:
        if self.proj_left.ndim != 2 or self.proj_left.shape != self.proj_right.T.shape:
            raise ShapeError(
                f"proj_left {tuple(self.proj_left.shape)} and proj_right {tuple(self.proj_right.shape)} "
                "must be (d, r) and (r, d)"
            )
        _ = self.map

    @property
    def map(self) -> LowRankAffine:
        """The map as the house's `LowRankAffine`."""
        return LowRankAffine(self.proj_left, self.proj_right.T, self.bias)

    @property
    def P(self) -> Tensor:  # noqa: N802 the paper's symbol
        """The dense projection, shape ``(d, d)``."""
        return self.map.matrix


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
        classes: Class names, so that batches of labels of any type can be streamed.
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
        classes: Sequence[object] | None = None,
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
        if classes is not None and len(classes) != z_dim:
            raise ShapeError(f"z_dim is {z_dim} but there are {len(classes)} classes")
        self.x_dim, self.z_dim, self.z_kind = x_dim, z_dim, z_kind
        self.classes = tuple(str(c) for c in classes) if classes is not None else ()
        # below float32 the factors would lose the guarantee
        self.dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self._categorical: bool | None = None
        self._moments = Moments(x_dim, z_dim, covariance=method == "leace", device=device)
        self._folds = [Moments(x_dim, z_dim, covariance=False, device=device) for _ in range(FOLDS)]
        self._eraser: LeaceEraser | None = None

    @classmethod
    def fit(
        cls,
        x: object,
        z: object,
        *,
        method: ErasureMethod = "leace",
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        svd_tol: float | None = None,
        z_kind: LabelKind = "auto",
        dtype: torch.dtype | None = None,
    ) -> LeaceFitter:
        """Return a fitter that has seen ``(x, z)``."""
        data, labels, _ = read_data(x, z, z_kind)
        fitter = cls(
            data.shape[-1],
            labels.width,
            method,
            affine=affine,
            shrinkage=shrinkage,
            svd_tol=svd_tol,
            classes=labels.names or None,
            device=data.device,
            dtype=dtype,
        )
        fitter._add(
            data, labels.values.reshape(*data.shape[:-1], *labels.values.shape[1:]), None, None
        )
        return fitter

    def update(
        self, x: object, z: object, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Self:
        """Add a batch; if any of it is refused, nothing of it is kept.

        Args:
            x: Representations ``(..., d)``.
            z: Labels: ``(...)`` class indices when z_dim > 1, or numbers of shape ``(..., z_dim)``.
            mask: Rows to use, shape ``(...)``.
            weight: Row weights, shape ``(...)``.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If values are not finite or labels unknown.
        """
        data = as_tensor(x)
        if data.ndim < 1 or data.shape[-1] != self.x_dim:
            raise ShapeError(f"x must have width {self.x_dim}; got shape {tuple(data.shape)}")
        self._add(data, self._labels(z, data), mask, weight)
        return self

    def _labels(self, z: object, data: Tensor) -> Tensor:
        lead = data.shape[:-1]
        if self.classes and not (isinstance(z, Tensor) and z.shape == (*lead, self.z_dim)):
            values = encode_concepts(z, kind="classes", classes=self.classes).values
        else:
            values = as_tensor(z, name="z")
        values = values.to(data.device)
        rows = math.prod(lead)
        if values.shape == lead and self.z_dim > 1 and not values.is_floating_point():
            return values.to(torch.int64)
        if values.numel() != rows * self.z_dim:
            raise ShapeError(
                f"x has {rows} rows and z_dim is {self.z_dim}, so z must hold {rows * self.z_dim} numbers; "
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

    def _add(self, x: Tensor, z: Tensor, mask: Tensor | None, weight: Tensor | None) -> None:
        categorical = z.ndim == x.ndim - 1
        if self._categorical is None and x.shape[0]:
            self._categorical = categorical
        rows = self._moments.rows
        self._moments.update(x, z, mask=mask, weight=weight)
        self._eraser = None
        keep = None if mask is None else mask.reshape(-1).to(x.device, torch.bool)
        flat_x, flat_z = x.reshape(-1, self.x_dim), z.reshape(-1, *z.shape[x.ndim - 1 :])
        flat_w = None if weight is None else weight.reshape(-1)
        if keep is not None:
            flat_x, flat_z = flat_x[keep], flat_z[keep]
            flat_w = None if flat_w is None else flat_w[keep]
        for i, fold in enumerate(self._folds):
            start = (i - rows) % FOLDS
            rows_w = None if flat_w is None else flat_w[start::FOLDS]
            fold.update(flat_x[start::FOLDS], flat_z[start::FOLDS], weight=rows_w)

    def merge(self, other: LeaceFitter) -> Self:
        """Add what another fitter has seen."""
        self._moments.merge(other._moments)
        for mine, theirs in zip(self._folds, other._folds, strict=True):
            mine.merge(theirs)
        self._eraser = None
        return self

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Add what the fitters of all ranks have seen; every rank ends with the same state."""
        self._moments.all_reduce(group)
        for fold in self._folds:
            fold.all_reduce(group)
        self._eraser = None
        return self

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
            return self._moments.n <= ROWS_PER_DIMENSION * self.x_dim
        return bool(self.config.shrinkage)

    @property
    def sigma_xx(self) -> Tensor:
        """Covariance of x as used: shrunk, or with Bessel's correction."""
        self._need_rows()
        sigma, n = self._moments.sigma_xx, self._moments.n
        return optimal_linear_shrinkage(sigma, n) if self.shrinks else sigma * (n / (n - 1))

    @property
    def sigma_xz(self) -> Tensor:
        """Cross-covariance with Bessel's correction, shape ``(d, c)``."""
        self._need_rows()
        return self._moments.sigma_xz * (self._moments.n / (self._moments.n - 1))

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
        sigma = None if config.method == "orth" else moments.sigma_xx
        if sigma is not None and self.shrinks:
            sigma = optimal_linear_shrinkage(sigma, moments.n, inplace=True)
        trace = 0.0 if sigma is None else float(sigma.diagonal().sum())
        metric = None if sigma is None else MetricSolver(sigma, overwrite=True)
        rests = self._rests()
        concepts = [whitened_concept(m.sigma_xz, m.sigma_zz) for m in (moments, *rests)]
        (left, right, strengths), *others = self._factors(metric, concepts, rtol)
        center = moments.mean_x.clone() if config.affine else None
        map_ = LowRankAffine(left, right, center).scale(config.strength)
        report = self._report(map_)
        if metric is not None:
            report["canonical_correlations"] = [
                round(s, 12) for s in strengths[: map_.rank].tolist()
            ]
            # E|x' - x|^2 = tr(right^T S right) for orthonormal left, and right^T S right = (left^T S^+ left)^-1
            moved = torch.linalg.inv(left.T @ metric(left)).diagonal().sum()
            report["edit_size"] = config.strength**2 * float(moved) / trace if trace else 0.0
            report["condition"] = metric.condition
        if rests:
            maps = [LowRankAffine(lt, rt).scale(config.strength) for lt, rt, _ in others]
            held = zip(maps, self._folds, strict=True)
            report.update(_gap_entry([remaining_gap(m, fold.sigma_xz) for m, fold in held]))
        out = map_ if self.dtype is None else map_.to(dtype=self.dtype)
        self._warn(report)
        return LeaceEraser(
            out.left, out.right.T.contiguous(), out.center, config=config, report=report
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

    def _rests(self) -> list[Moments]:
        """Return the moments without each fold in turn; empty when rows are too few to cross-fit.

        The metric stays that of all rows: any metric guards, so only the concept's directions must be unseen.
        """
        if self._moments.rows < 4 * FOLDS or any(float(fold.count) == 0 for fold in self._folds):
            return []
        rests = []
        for held in range(FOLDS):
            rest = self._folds[held]._empty(covariance=False)
            for i, fold in enumerate(self._folds):
                if i != held:
                    rest.merge(fold)
            rests.append(rest)
        return rests

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
            names = self.classes or tuple(str(i) for i in range(self.z_dim))
            report["n_per_class"] = {
                k: round(s * moments.n) for k, s in zip(names, shares, strict=True)
            }
        return report

    def _warn(self, report: dict[str, object]) -> None:
        if report["rank"] == 0:
            warnings.warn(
                "no direction is correlated with z (is the label constant?): the eraser is the identity",
                ErasureWarning,
                stacklevel=5,
            )
            return
        asked = (
            self.config.rank is not None
            or self.config.svd_tol is not None
            or self.config.strength != 1
        )
        if not asked and float(str(report["residual"])) > 1e-6:
            warnings.warn(
                f"not guarded: {report['residual']:.2e} of the cross-covariance is left",
                ErasureWarning,
                stacklevel=5,
            )


def _gap_entry(gaps: list[float]) -> dict[str, object]:
    values = torch.tensor(gaps, dtype=torch.float64)
    mean = float(values.mean())
    half = T_975 * float(values.std()) / math.sqrt(len(gaps))
    return {"held_out_gap": mean, "held_out_gap_interval": [max(0.0, mean - half), mean + half]}


def held_out_report(
    eraser: RepresentationEraser, x: object, z: object, *, z_kind: LabelKind, names: tuple[str, ...]
) -> dict[str, object]:
    """Return the share of the class-mean gap left on rows never fitted on, with a 95 % interval."""
    data, labels, _ = read_data(x, z, z_kind, classes=names or None)
    flat = data.reshape(-1, data.shape[-1])
    gaps = []
    for i in range(FOLDS):
        part = Moments(flat.shape[1], labels.width, covariance=False, device=flat.device)
        part.update(flat[i::FOLDS], labels.values[i::FOLDS])
        gaps.append(remaining_gap(eraser.map, part.sigma_xz))
    return _gap_entry(gaps)


def read_data(
    x: object, z: object, z_kind: LabelKind, classes: Sequence[str] | None = None
) -> tuple[Tensor, Labels, Space | None]:
    """Return x, encoded labels (one a row of the flattened x) and the space.

    Raises:
        ValueError: If there are fewer than two rows or no labels.
        ShapeError: If x is one-dimensional, or x and z disagree.
    """
    space = None
    if isinstance(x, Representations):
        space, z, x = x.space, x.z if z is None else z, x.x
    data = as_tensor(x)
    if data.ndim < 2:
        raise ShapeError(f"x must have shape (n, d) or (batch, seq, d); got {tuple(data.shape)}")
    if data.is_complex():
        raise TypeError("complex representations are not supported")
    if not data.is_floating_point():
        data = data.to(torch.float64)
    rows = math.prod(data.shape[:-1])
    if rows < 2:
        raise ValueError(f"at least 2 rows are needed to fit; got {rows}")
    if z is None:
        raise ValueError("labels are missing: give z, or representations collected with labels")
    if hasattr(z, "shape") and data.ndim > 2:
        z = _labels_per_row(as_tensor(z, name="z"), data)
    labels = encode_concepts(z, n=rows, kind=z_kind, classes=classes)
    return data, Labels(labels.values.to(data.device), labels.names), space


def _labels_per_row(z: Tensor, data: Tensor) -> Tensor:
    """Flatten labels of shape ``(batch, seq, ...)``; repeat labels of shape ``(batch,)`` over the sequence."""
    lead = data.shape[:-1]
    if z.shape[: len(lead)] == lead:
        return z.reshape(-1, *z.shape[len(lead) :])
    if z.shape == lead[:1]:
        return z.reshape(-1, *[1] * (len(lead) - 1)).expand(lead).reshape(-1)
    return z
