"""What the orthogonal methods share: a basis of the concept's directions, the size of an edit, a streaming fitter."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from concept_erasure.data import labels_per_row, read_data
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import LabelKind, as_tensor, encode_concepts
from concept_erasure.leakage import FOLDS, Folds, held_out_gap, remaining_gap
from concept_erasure.linalg import LowRankAffine, Moments, all_reduce_moments, statistics_dtype
from concept_erasure.sites import Space

__all__ = [
    "SpectralFitter",
    "check_k",
    "concept_basis",
    "concept_scale",
    "relative_edit",
    "row_shape",
]

ROWS_PER_CHUNK = 1024  # of a width of some thousands stays in the cache


def concept_scale(moments: Moments) -> Tensor:
    """Return one over the deviation of each concept column, shape ``(c,)``; 0 for a constant column."""
    deviation = moments.sigma_zz.diagonal().clamp_min(0).sqrt()
    floor = 8 * torch.finfo(deviation.dtype).eps * moments.mean_z.abs()
    return torch.where(deviation > floor, 1 / deviation, torch.zeros_like(deviation))


def concept_basis(
    columns: Tensor, *, rtol: float, k: int | None = None
) -> tuple[Tensor, int, Tensor]:
    """Return an orthonormal basis of a column space, strongest directions first.

    Args:
        columns: Shape ``(d, c)``; never made into a ``(d, d)`` matrix.
        rtol: The rank is that of the columns at unit length, cut at this share of the largest singular value, so
            that the units of a column do not decide.
        k: Keep at most this many.

    Returns:
        The basis ``(d, min(k, rank))``, the rank, and the singular values ``(min(d, c),)``.
    """
    size = columns.norm(dim=0)
    unit = columns[:, size > 0] / size[size > 0]
    directions, strength, _ = torch.linalg.svd(unit, full_matrices=False)
    kept = strength > rtol * strength[:1].sum()
    rank = int(kept.sum())
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    if k is not None and k < rank:
        return left[:, :k].contiguous(), rank, singular
    return directions[:, kept].contiguous(), rank, singular


def relative_edit(
    map_: LowRankAffine,
    x: Tensor,
    mean: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> float:
    """Return ``E|x' - x|^2`` over the total variance of x.

    Args:
        map_: The map, of width d.
        x: Representations ``(..., d)``.
        mean: Their mean, shape ``(d,)``.
        mask: Rows to use, shape ``(...)``.
        weight: Row weights, shape ``(...)``.
    """
    x, weight = _used_rows(x, mask, weight)
    dtype = statistics_dtype(x.device)
    wide = map_.to(x.device, dtype)
    moved = total = x.new_zeros((), dtype=dtype)
    gram = wide.left.T @ wide.left
    shift = (mean if wide.center is None else mean - wide.center) @ wide.right
    for i in range(0, len(x), ROWS_PER_CHUNK):
        centred = x[i : i + ROWS_PER_CHUNK].to(dtype) - mean
        delta = centred @ wide.right + shift
        sizes = torch.stack(
            [((delta @ gram) * delta).sum(1), torch.linalg.vecdot(centred, centred)]
        )
        share = None if weight is None else weight[i : i + ROWS_PER_CHUNK].to(sizes)
        sums = sizes.sum(1) if share is None else sizes @ share
        moved, total = moved + sums[0], total + sums[1]
    return float(moved / total) if float(total) > 0 else 0.0


class SpectralFitter(ABC):
    """Streams data and removes the directions that a cross-covariance gives: O(n d c) time, O(d c) memory.

    Args:
        x_dim: Width d.
        z_dim: Number of concept columns c. With c > 1, integer z of shape ``(n,)`` are class indices.
        k: Remove at most this many directions, strongest first; None is all.
        affine: Keep the mean of the data.
        classes: Class names, so that batches of labels of any type can be streamed.
        device: Where the statistics live.
        dtype: Dtype of the factors given out; statistics stay float64.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        k: int | None = None,
        affine: bool = True,
        classes: Sequence[object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating type; got {dtype}")
        if classes is not None and len(classes) != z_dim:
            raise ShapeError(f"z_dim is {z_dim} but there are {len(classes)} classes")
        self.x_dim, self.z_dim, self.k, self.affine = x_dim, z_dim, k, affine
        self.classes = tuple(str(c) for c in classes) if classes is not None else ()
        # below float32 the factors would lose the guarantee
        self.dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self.space: Space | None = None
        self._categorical = True
        self._binary = True
        self._moments = Moments(x_dim, z_dim, covariance=False, device=device)
        self._folds = Folds(x_dim, z_dim, device=device)
        self._held_out: Folds | None = None

    @abstractmethod
    def _directions(self, moments: Moments) -> Tensor:
        """Return the columns ``(d, c)`` whose space is removed."""

    @property
    def n(self) -> int:
        """Rows seen."""
        return self._moments.rows

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, shape ``(d,)``."""
        return self._moments.mean_x

    @property
    def sigma_xz(self) -> Tensor:
        """Cross-covariance divided by n, shape ``(d, c)``."""
        return self._moments.sigma_xz

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
            groups: Which text a row comes from, int64, shape ``(...)``: the held-out gap is measured on others.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If values are not finite or labels unknown.
        """
        data = as_tensor(x)
        if data.ndim < 1 or data.shape[-1] != self.x_dim:
            raise ShapeError(f"x must have width {self.x_dim}; got shape {tuple(data.shape)}")
        self._add(data, self._labels(z, data), mask, weight, groups)
        return self

    def hold_out(self, x: object, z: object, *, z_kind: LabelKind = "auto") -> Self:
        """Add rows that are only measured on; without any the held-out gap is cross-fitted over five folds."""
        data, labels, _ = read_data(x, z, z_kind, classes=self.classes or None)
        if data.shape[-1] != self.x_dim or labels.width != self.z_dim:
            raise ShapeError(
                f"held-out x has width {data.shape[-1]} and z {labels.width} columns; "
                f"the fit has {self.x_dim} and {self.z_dim}"
            )
        folds = self._held_out or Folds(self.x_dim, self.z_dim, device=data.device)
        folds.update(data.reshape(-1, self.x_dim), labels.values)
        if not folds.ready:
            raise ValueError(f"held-out data need at least 20 rows; got {folds.rows}")
        self._held_out = folds
        return self

    def merge(self, other: Self) -> Self:
        """Add what another fitter has seen.

        Raises:
            ValueError: If the other's options, classes or space differ.
        """
        if self._identity != other._identity:
            raise ValueError(f"the fitters differ: {self._identity} and {other._identity}")
        self._moments.merge(other._moments)
        self._folds.merge(other._folds)
        self._categorical &= other._categorical
        self._binary &= other._binary
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Add what the fitters of all ranks have seen; every rank ends with the same state.

        Raises:
            ValueError: If options, classes or space differ between ranks.
        """
        found: list[object] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, self._identity, group=group)
        if any(other != self._identity for other in found):
            raise ValueError(f"the ranks differ: {found}")
        all_reduce_moments([self._moments, *self._folds.parts], group)
        return self

    @property
    def _identity(self) -> tuple[object, ...]:
        return (type(self).__name__, self.k, self.affine, self.classes, self.space)

    def _labels(self, z: object, data: Tensor) -> Tensor:
        lead, rows = data.shape[:-1], data.shape[:-1].numel()
        if self.classes and not (isinstance(z, Tensor) and z.shape == (*lead, self.z_dim)):
            z = labels_per_row(z, lead)
            values = encode_concepts(z, n=rows, kind="classes", classes=self.classes).values
            values = values.long()  # no rows have no kind
        else:
            values = as_tensor(z, name="z")
        values = values.to(data.device)
        whole = not values.is_floating_point()
        if values.shape in (lead, (rows,)) and self.z_dim > 1 and whole:
            return values.reshape(lead).to(torch.int64)
        shapes = [(*lead, self.z_dim), (rows, self.z_dim)]
        shapes += [tuple(lead), (rows,)] if self.z_dim == 1 else []
        if tuple(values.shape) not in shapes:
            raise ShapeError(
                f"x has {rows} rows and z_dim is {self.z_dim}, so z must have shape {shapes[0]}"
                f"{f' (or class indices {tuple(lead)})' if self.z_dim > 1 else ''}; "
                f"got shape {tuple(values.shape)}"
            )
        if self.z_dim == 1 and whole and not bool(((values == 0) | (values == 1)).all()):
            raise ValueError(
                f"integer labels {int(values.min())}..{int(values.max())} in one column: "
                "pass z_dim = number of classes, or floats for a real target"
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
        self._moments.update(x, z, mask=mask, weight=weight)
        classes = z.ndim == x.ndim - 1
        self._categorical &= classes
        self._binary &= classes or bool(((z == 0) | (z == 1)).all())
        flat = [x.reshape(-1, self.x_dim), z.reshape(-1, *z.shape[x.ndim - 1 :]).to(x.device)]
        extra = [None if v is None else v.reshape(-1).to(x.device) for v in (weight, groups)]
        if mask is not None:
            keep = mask.reshape(-1).to(x.device, torch.bool)
            flat = [value[keep] for value in flat]
            extra = [None if value is None else value[keep] for value in extra]
        self._folds.update(*flat, weight=extra[0], groups=extra[1])

    def _solve(self) -> tuple[LowRankAffine, dict[str, object]]:
        """Return the map in the dtype asked for, and the report.

        Raises:
            NotFittedError: If fewer than two rows were seen.
        """
        moments = self._moments
        if moments.rows < 2:
            raise NotFittedError(
                f"at least 2 rows are needed; the fitter has seen {moments.rows}. Call update(x, z)"
            )
        rtol = max(moments.rows, self.x_dim) * torch.finfo(moments.count.dtype).eps
        basis, rank, singular = self._basis(moments, rtol)
        map_ = LowRankAffine(basis, basis, moments.mean_x.clone() if self.affine else None)
        report: dict[str, object] = {
            "n": moments.rows,
            "rank": map_.rank,
            "concept_rank": rank,
            "residual": remaining_gap(map_, moments.sigma_xz),
            "singular_values": singular[:rank].tolist(),
        }
        if self._categorical:
            names = self.classes or tuple(str(i) for i in range(self.z_dim))
            shares = moments.mean_z.tolist()
            report["n_per_class"] = {
                k: round(s * moments.rows) for k, s in zip(names, shares, strict=True)
            }
        report.update(self._leakage(map_, rtol))
        if rank == 0:
            warnings.warn(
                "no direction is correlated with z (is the label constant?): the eraser is the identity",
                ErasureWarning,
                stacklevel=4,
            )
        return (map_ if self.dtype is None else map_.to(dtype=self.dtype)), report

    def _basis(self, moments: Moments, rtol: float) -> tuple[Tensor, int, Tensor]:
        alive = concept_scale(moments) > 0
        columns = torch.where(alive, self._directions(moments), 0.0)
        return concept_basis(columns, rtol=rtol, k=self.k)

    def _leakage(self, map_: LowRankAffine, rtol: float) -> dict[str, object]:
        if map_.rank == 0:
            return {}
        scale = torch.diag(concept_scale(self._moments))
        if self._held_out is not None:
            return held_out_gap([map_] * FOLDS, self._held_out.pairs, torch.Tensor.clone, scale)
        if not self._folds.ready:
            return {}
        bases = [self._basis(rest, rtol)[0] for rest in self._folds.rests]
        maps = [LowRankAffine(basis, basis) for basis in bases]
        return held_out_gap(maps, self._folds.pairs, torch.Tensor.clone, scale)


def check_k(k: int | None) -> None:
    """Refuse a number of directions that is none.

    Raises:
        ValueError: If k is not a whole number from 1, or None.
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be a whole number from 1, or None for all; got {k!r}")


def _used_rows(
    x: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the rows ``(n, d)`` and weights ``(n,)`` that a mask leaves."""
    rows = x.reshape(-1, x.shape[-1])
    shares = None if weight is None else weight.reshape(-1).to(rows.device)
    if mask is None:
        return rows, shares
    keep = mask.reshape(-1).to(rows.device, torch.bool)
    return rows[keep], None if shares is None else shares[keep]


def row_shape(x: Tensor, values: Tensor) -> Tensor:
    """Return labels of flattened rows ``(n,)`` or ``(n, c)`` in the leading shape of ``x``."""
    lead = x.shape[:-1]
    if math.prod(lead) != len(values):
        raise ShapeError(f"x has {math.prod(lead)} rows and z {len(values)} labels")
    return values.reshape(*lead, *values.shape[1:])
