"""The mathematics the methods share: streaming moments, one low-rank affine map, metric solves.

Row convention: representations are rows, ``x`` of shape ``(..., d)``; a map with matrix ``P`` sends
``x`` to ``x P^T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from concept_erasure.errors import NotFittedError, ShapeError

__all__ = [
    "LowRankAffine",
    "MetricSolver",
    "Moments",
    "all_reduce_moments",
    "optimal_linear_shrinkage",
    "statistics_dtype",
]

ROWS_PER_CHUNK = 2048  # bounds the float64 copy of a batch, and keeps it in cache
ROWS_PER_CHUNK_DEVICE = 65536  # an accelerator wants larger products
COLUMN_BLOCK = 192  # the Gram matrix is built from the blocks on and above its diagonal
ONE_HOT_LIMIT = 64  # up to here class sums are one small product, above a scatter-add


def statistics_dtype(device: torch.device | str | None) -> torch.dtype:
    """Return float64, or float32 on devices that have no float64 (MPS)."""
    kind = torch.device(device).type if device is not None else "cpu"
    return torch.float32 if kind == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class LowRankAffine:
    """The map ``x - (x - center) right left^T``, i.e. ``P = I - left right^T`` about a centre.

    Attributes:
        left: Thin factor, shape ``(d, k)``.
        right: Thin factor, shape ``(d, k)``.
        center: Fixed point of the map, shape ``(d,)``; None is the origin.
    """

    left: Tensor
    right: Tensor
    center: Tensor | None = None

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.left.shape != self.right.shape:
            raise ShapeError(
                f"left and right must both be (d, k); got {tuple(self.left.shape)} and {tuple(self.right.shape)}"
            )
        if self.center is not None and self.center.shape != (self.width,):
            raise ShapeError(f"center must be ({self.width},); got {tuple(self.center.shape)}")

    @property
    def width(self) -> int:
        """Width d of the space."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns k of the thin factors."""
        return self.left.shape[1]

    @property
    def matrix(self) -> Tensor:
        """The dense ``P``, shape ``(d, d)``; for looking, never for applying."""
        eye = torch.eye(self.width, dtype=self.left.dtype, device=self.left.device)
        return eye - self.left @ self.right.T

    @property
    def offset(self) -> Tensor:
        """The constant ``left right^T center`` of the affine map, shape ``(d,)``."""
        if self.center is None:
            return self.left.new_zeros(self.width)
        return self.left @ (self.right.T @ self.center)

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows ``x`` of shape ``(..., d)`` in O(n d k); computed in at least float32, dtype kept.

        Raises:
            ShapeError: If the last dimension is not d.
            TypeError: If x is not floating point.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] != self.width:
            raise ShapeError(f"the map has width {self.width}; x has shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point; got {x.dtype}")
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        wide = x.to(dtype)
        left, right = self.left.to(x.device, dtype), self.right.to(x.device, dtype)
        delta = wide if self.center is None else wide - self.center.to(x.device, dtype)
        return (wide - (delta @ right) @ left.T).to(x.dtype)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRankAffine:
        """Return a copy on another device or in another dtype."""
        center = None if self.center is None else self.center.to(device=device, dtype=dtype)
        return LowRankAffine(
            self.left.to(device=device, dtype=dtype),
            self.right.to(device=device, dtype=dtype),
            center,
        )

    def scale(self, strength: float) -> LowRankAffine:
        """Return ``x - strength (x - center) right left^T``."""
        return LowRankAffine(self.left * strength, self.right, self.center)

    def compose(self, first: LowRankAffine) -> LowRankAffine:
        """Return the map that applies ``first`` and then this one, of rank at most the sum.

        Raises:
            ShapeError: If the widths differ.
            ValueError: If the two affine maps have no common form about one centre.
        """
        if first.width != self.width:
            raise ShapeError(f"widths differ: {first.width} and {self.width}")
        left = torch.cat([first.left - self.left @ (self.right.T @ first.left), self.left], 1)
        right = torch.cat([first.right, self.right], 1)
        if first.center is None and self.center is None:
            return LowRankAffine(left, right)
        target = self.offset + first.offset - self.left @ (self.right.T @ first.offset)
        center = torch.linalg.pinv(left @ right.T) @ target
        missed = (left @ (right.T @ center) - target).norm()
        scale = target.norm() + torch.finfo(target.dtype).tiny
        if float(missed / scale) > torch.finfo(target.dtype).eps ** 0.5:
            raise ValueError(
                "the composition has no fixed point; apply the two maps one after another"
            )
        return LowRankAffine(left, right, center)

    def inverse(self) -> LowRankAffine:
        """Return the inverse map (Woodbury: only a k x k solve).

        Raises:
            ValueError: If the map is singular, as every full erasure is.
        """
        core = torch.eye(self.rank, dtype=self.left.dtype, device=self.left.device)
        core = core - self.right.T @ self.left
        smallest = torch.linalg.svdvals(core).min() if self.rank else torch.ones(())
        if float(smallest) < self.rank * torch.finfo(core.dtype).eps * 10:
            raise ValueError("the map is singular: what it removed cannot be brought back")
        return LowRankAffine(
            -torch.linalg.solve(core, self.left, left=False), self.right, self.center
        )

    def is_projection(self, tol: float = 1e-8) -> bool:
        """Say whether ``P P = P``, i.e. ``left (right^T left - I) right^T = 0``."""
        core = self.right.T @ self.left
        core = core - torch.eye(self.rank, dtype=core.dtype, device=core.device)
        size = (self.left @ self.right.T).norm() + torch.finfo(core.dtype).tiny
        return bool((self.left @ core @ self.right.T).norm() <= tol * size)

    def fold_reading(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fold into a linear layer that reads the space: ``W <- W P``, ``b <- b + W offset``.

        Args:
            weight: Shape ``(out, d)``.
            bias: Shape ``(out,)`` or None; with a centre a bias is always returned.
        """
        if weight.shape[1] != self.width:
            raise ShapeError(f"the map has width {self.width}; the layer reads {weight.shape[1]}")
        folded = weight - (weight @ self.left) @ self.right.T
        if self.center is None:
            return folded, bias
        shift = weight @ self.offset
        return folded, shift if bias is None else bias + shift

    def fold_writing(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fold into a linear layer that writes the space: ``W <- P W``, ``b <- P b + offset``.

        Args:
            weight: Shape ``(d, in)``.
            bias: Shape ``(d,)`` or None; with a centre a bias is always returned.
        """
        if weight.shape[0] != self.width:
            raise ShapeError(f"the map has width {self.width}; the layer writes {weight.shape[0]}")
        folded = weight - self.left @ (self.right.T @ weight)
        moved = None if bias is None else bias - self.left @ (self.right.T @ bias)
        if self.center is None:
            return folded, moved
        return folded, self.offset if moved is None else moved + self.offset

    def lora(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(B, A)`` with ``W P = W + B A`` exactly (linear part), shapes ``(out, k)``, ``(k, d)``."""
        return -(weight @ self.left), self.right.T.contiguous()

    def __repr__(self) -> str:
        about = "origin" if self.center is None else "centre"
        return f"LowRankAffine(width={self.width}, rank={self.rank}, about={about})"


def _add_gram(out: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the blocks of ``out`` on and above its diagonal; `_mirror` fills the rest."""
    for start in range(0, x.shape[1], COLUMN_BLOCK):
        stop = start + COLUMN_BLOCK
        out[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _mirror(out: Tensor) -> None:
    """Copy the blocks above the diagonal below it."""
    for start in range(0, len(out), COLUMN_BLOCK):
        stop = start + COLUMN_BLOCK
        out[stop:, start:stop] = out[start:stop, stop:].T


class Moments:
    """Streaming mean and covariance of ``(x, z)``, centred batch by batch and merged pairwise.

    The state is float64 (float32 where a device has no float64), so a feature offset of 1e4 costs nothing.
    The merge is associative: batches, shards and ranks give the same result in any order.

    Args:
        width: Width d of x.
        concepts: Number of concept columns c, or of classes when z comes as class indices.
        covariance: Keep the d x d covariance of x; O(n d^2) time, O(d^2) memory.
        device: Where the state lives; None is the device of the first batch.
        dtype: Dtype of the state.
    """

    def __init__(
        self,
        width: int,
        concepts: int,
        *,
        covariance: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if width < 1 or concepts < 1:
            raise ValueError(f"width and concepts must be at least 1; got {width} and {concepts}")
        self.width, self.concepts, self.covariance = width, concepts, covariance
        self.rows = 0
        self._follows_input = device is None and dtype is None
        dtype = dtype or statistics_dtype(device)
        self.count = torch.zeros((), dtype=dtype, device=device)
        self._squares = torch.zeros((), dtype=dtype, device=device)
        self._mean_x = torch.zeros(width, dtype=dtype, device=device)
        self._mean_z = torch.zeros(concepts, dtype=dtype, device=device)
        self._s_xx = torch.zeros(width, width, dtype=dtype, device=device) if covariance else None
        self._s_xz = torch.zeros(width, concepts, dtype=dtype, device=device)
        self._s_zz = torch.zeros(concepts, concepts, dtype=dtype, device=device)

    def update(
        self, x: Tensor, z: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Self:
        """Add a batch; nothing of it is kept if any of it is refused.

        Args:
            x: Representations ``(..., d)``, any floating dtype.
            z: Class indices ``(...)`` int64, or columns ``(..., c)``.
            mask: Rows to use, shape ``(...)``, e.g. an attention mask.
            weight: Non-negative row weights, shape ``(...)``.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If x, z or weight hold values that are not finite, or a class index is out of range.
        """
        x, z, weight = self._flatten(x, z, mask, weight)
        step = ROWS_PER_CHUNK if x.device.type == "cpu" else ROWS_PER_CHUNK_DEVICE
        batch = self._empty(self.covariance)
        for i in range(0, len(x), step):
            rows = None if weight is None else weight[i : i + step]
            batch._absorb(self._chunk(x[i : i + step], z[i : i + step], rows, batch._s_xx))
        if not bool(torch.isfinite(batch._mean_x).all()):
            self._refuse_values(x)
        if batch._s_xx is not None:
            _mirror(batch._s_xx)
        return self.merge(batch)

    @staticmethod
    def _refuse_values(x: Tensor) -> None:
        bad = (~torch.isfinite(x)).any(1).nonzero()[:, 0]
        if len(bad) == 0:
            raise ValueError("the mean of x overflows; rescale x")
        raise ValueError(
            f"x has {len(bad)} rows that are not finite; the first is row {int(bad[0])}"
        )

    def _empty(self, covariance: bool) -> Moments:
        return Moments(
            self.width,
            self.concepts,
            covariance=covariance,
            device=self.count.device,
            dtype=self.count.dtype,
        )

    def _flatten(
        self, x: Tensor, z: Tensor, mask: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        lead = x.shape[:-1]
        classes = not z.is_floating_point() and z.shape == lead
        self._refuse(x, z, mask, weight, classes)
        device = self._device_for(x)
        x = x.detach().reshape(-1, self.width).to(device)
        z = z.detach().reshape(len(x), *([] if classes else [self.concepts])).to(device)
        weight = (
            None if weight is None else weight.detach().reshape(-1).to(device, self.count.dtype)
        )
        if mask is not None:
            keep = mask.reshape(-1).to(device, torch.bool)
            x, z = x[keep], z[keep]
            weight = None if weight is None else weight[keep]
        if weight is not None and not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError("weights must be finite and not negative")
        if classes and len(z) and not bool(((z >= 0) & (z < self.concepts)).all()):
            raise ValueError(
                f"class indices must be 0..{self.concepts - 1}; got {int(z.min())}..{int(z.max())}"
            )
        return x, z, weight

    def _refuse(
        self, x: Tensor, z: Tensor, mask: Tensor | None, weight: Tensor | None, classes: bool
    ) -> None:
        """Raise for shapes that disagree and labels that are not finite."""
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ShapeError(f"x must have width {self.width}; got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point; got {x.dtype}")
        lead = x.shape[:-1]
        if not classes and z.shape != (*lead, self.concepts):
            raise ShapeError(
                f"for x of shape {tuple(x.shape)} z must be class indices {tuple(lead)} or columns "
                f"{(*lead, self.concepts)}; got {tuple(z.shape)} {z.dtype}"
            )
        for name, value in (("mask", mask), ("weight", weight)):
            if value is not None and value.shape != lead:
                raise ShapeError(f"{name} must have shape {tuple(lead)}; got {tuple(value.shape)}")
        if x.is_meta or z.is_meta:
            raise ValueError("x and z must hold values; got a tensor on the meta device")
        if z.is_floating_point() and not bool(torch.isfinite(z).all()):
            bad = (~torch.isfinite(z)).reshape(-1, self.concepts).any(1).nonzero()[:, 0]
            raise ValueError(
                f"z has {len(bad)} rows that are not finite; the first is row {int(bad[0])}"
            )

    def _device_for(self, x: Tensor) -> torch.device:
        """Return where the state lives; the first batch decides when nobody said."""
        if self._follows_input and self.rows == 0:
            dtype = statistics_dtype(x.device)
            for name in ("count", "_squares", "_mean_x", "_mean_z", "_s_xx", "_s_xz", "_s_zz"):
                value = getattr(self, name)
                if value is not None:
                    setattr(self, name, value.to(x.device, dtype))
        return self.count.device

    def _chunk(self, x: Tensor, z: Tensor, weight: Tensor | None, gram: Tensor | None) -> Moments:
        """Return the moments of one chunk, centred on its own mean; its Gram matrix is added to ``gram``."""
        out = self._empty(covariance=False)
        wide = x.to(self.count.dtype, copy=True)
        total = wide.new_tensor(float(len(x))) if weight is None else weight.sum()
        safe = total.clamp_min(torch.finfo(total.dtype).tiny)  # all weights may be zero
        mean = wide.mean(0) if weight is None else weight @ wide / safe
        wide -= mean
        out.rows, out.count, out._mean_x = len(x), total, mean
        out._squares = total if weight is None else weight.square().sum()
        out._mean_z, out._s_xz, out._s_zz = self._cross(wide, z, weight, safe)
        if gram is not None:
            _add_gram(gram, wide if weight is None else wide * weight.sqrt()[:, None])
        return out

    def _cross(
        self, centred: Tensor, z: Tensor, weight: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean of z, the sum of x z^T and of z z^T, all centred."""
        weighted = centred if weight is None else centred * weight[:, None]
        if z.ndim == 1 and self.concepts > ONE_HOT_LIMIT:
            ones = torch.ones_like(centred[:, 0]) if weight is None else weight
            counts = centred.new_zeros(self.concepts).index_add_(0, z, ones)
            sums = centred.new_zeros(self.concepts, self.width).index_add_(0, z, weighted)
            mean = counts / total
            return mean, sums.T, torch.diag(counts) - torch.outer(counts, mean)
        if z.ndim == 1:
            z = torch.nn.functional.one_hot(z, self.concepts)
        wide = z.to(centred.dtype)
        mean = wide.mean(0) if weight is None else weight @ wide / total
        wide = wide - mean
        scaled = wide if weight is None else wide * weight[:, None]
        # (z^T x)^T: a thin left factor is several times faster than a thin right one
        return mean, (wide.T @ weighted).T, scaled.T @ wide

    def merge(self, other: Moments) -> Self:
        """Add the moments of other rows (Chan et al.'s pairwise update).

        Raises:
            ShapeError: If widths, concepts or what is tracked disagree.
        """
        same = (self.width, self.concepts, self.covariance)
        if (other.width, other.concepts, other.covariance) != same:
            raise ShapeError(f"cannot merge {other!r} into {self!r}")
        if other._s_xx is not None and self._s_xx is not None:
            self._s_xx.add_(other._s_xx)
        self._absorb(other)
        return self

    def _absorb(self, other: Moments) -> None:
        """Merge all but the other's own scatter of x."""
        total = self.count + other.count
        share = other.count / total.clamp_min(torch.finfo(total.dtype).tiny)
        scale = self.count * share
        delta_x, delta_z = other._mean_x - self._mean_x, other._mean_z - self._mean_z
        if self._s_xx is not None and self.rows:
            self._s_xx.addr_(delta_x * scale, delta_x)
        self._s_xz = self._s_xz + other._s_xz + torch.outer(delta_x * scale, delta_z)
        self._s_zz = self._s_zz + other._s_zz + torch.outer(delta_z * scale, delta_z)
        self._mean_x = self._mean_x + delta_x * share
        self._mean_z = self._mean_z + delta_z * share
        self.count, self.rows = total, self.rows + other.rows
        self._squares = self._squares + other._squares

    def marginal(self) -> Moments:
        """Return the moments of x alone (one constant concept column), as a copy.

        Its total weight is the effective number of rows, so that it can be pooled with unweighted rows whatever
        the scale of the weights.
        """
        out = Moments(
            self.width,
            1,
            covariance=self.covariance,
            device=self.count.device,
            dtype=self.count.dtype,
        )
        factor = self.count / self._squares.clamp_min(torch.finfo(self.count.dtype).tiny)
        out.rows, out.count, out._mean_x = self.rows, self.count * factor, self._mean_x.clone()
        out._squares = self._squares * factor**2
        out._s_xx = None if self._s_xx is None else self._s_xx * factor
        return out

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Replace the state by that of all ranks together; see `all_reduce_moments`."""
        all_reduce_moments([self], group)
        return self

    def _about(self, mean: Tensor) -> list[Tensor]:
        """Return sums about another mean ``(d + c,)``, then rows and squared weights, as flat tensors."""
        delta_x, delta_z = self._mean_x - mean[: self.width], self._mean_z - mean[self.width :]
        sums = [
            self._s_xz + torch.outer(delta_x * self.count, delta_z),
            self._s_zz + torch.outer(delta_z * self.count, delta_z),
        ]
        if self._s_xx is not None:
            sums.append(self._s_xx + torch.outer(delta_x * self.count, delta_x))
        rows = self.count.new_tensor(float(self.rows))
        return [*(block.reshape(-1) for block in sums), torch.stack([rows, self._squares])]

    def _set(self, count: Tensor, mean: Tensor, parts: Sequence[Tensor]) -> None:
        """Take over what `_about` gave, summed over ranks."""
        self._mean_x, self._mean_z, self.count = mean[: self.width], mean[self.width :], count
        self._s_xz, self._s_zz = parts[0].view_as(self._s_xz), parts[1].view_as(self._s_zz)
        if self._s_xx is not None:
            self._s_xx = parts[2].view_as(self._s_xx)
        self.rows, self._squares = round(float(parts[-1][0])), parts[-1][1]

    def _divided(self, value: Tensor | None, what: str) -> Tensor:
        if value is None:
            raise NotFittedError(f"{what} is not tracked (covariance=False)")
        if float(self.count) <= 0:
            raise NotFittedError(f"{what} needs data; call update(x, z) first")
        return value / self.count

    @property
    def n(self) -> float:
        """Total weight seen (the number of rows when no weights were given)."""
        return float(self.count)

    @property
    def n_effective(self) -> float:
        """Kish's effective number of rows, ``(sum w)^2 / sum w^2``; the scale of the weights does not matter."""
        return float(self.count**2 / self._squares) if float(self._squares) > 0 else 0.0

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, shape ``(d,)``."""
        return self._mean_x

    @property
    def mean_z(self) -> Tensor:
        """Mean of z, shape ``(c,)``; class shares when z came as class indices."""
        return self._mean_z

    @property
    def sigma_xx(self) -> Tensor:
        """Covariance of x, shape ``(d, d)``, divided by n."""
        return self._divided(self._s_xx, "sigma_xx")

    @property
    def sigma_xz(self) -> Tensor:
        """Cross-covariance, shape ``(d, c)``, divided by n."""
        return self._divided(self._s_xz, "sigma_xz")

    @property
    def sigma_zz(self) -> Tensor:
        """Covariance of z, shape ``(c, c)``, divided by n."""
        return self._divided(self._s_zz, "sigma_zz")

    def __repr__(self) -> str:
        return (
            f"Moments(width={self.width}, concepts={self.concepts}, rows={self.rows}, "
            f"covariance={self.covariance})"
        )


def all_reduce_moments(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> None:
    """Replace the state of each by that of all ranks together, in one small gather and one all-reduce.

    The gather tells every rank the common means first, so that no precision is lost to offsets.
    """
    small = torch.cat([torch.cat([m.count[None], m._mean_x, m._mean_z]) for m in moments])
    gathered = [torch.empty_like(small) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, small, group=group)
    sizes = [1 + m.width + m.concepts for m in moments]
    totals, blocks = [], []
    for one, table in zip(moments, torch.stack(gathered).split(sizes, 1), strict=True):
        count = table[:, 0].sum()
        safe = count.clamp_min(torch.finfo(count.dtype).tiny)
        totals.append((count, (table[:, :1] * table[:, 1:]).sum(0) / safe))
        blocks.append(one._about(totals[-1][1]))
    flat = torch.cat([block for part in blocks for block in part])
    dist.all_reduce(flat, group=group)
    pieces = iter(flat.split([block.numel() for part in blocks for block in part]))
    for one, (count, mean), part in zip(moments, totals, blocks, strict=True):
        one._set(count, mean, [next(pieces) for _ in part])


def optimal_linear_shrinkage(
    S_n: Tensor,
    n: int | float | Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """Shrink sample covariances towards a multiple of the identity, ``alpha S + beta tr(S)/d I``.

    Bodnar, Gupta and Parolya 2014 (arXiv:1308.2608), with ``alpha`` clipped to [0, 1]: for nearly isotropic
    data with n about d the formula is often negative, which would leave an indefinite matrix.

    Args:
        S_n: Covariances, shape ``(..., d, d)``.
        n: Sample size, a number or a tensor that broadcasts against ``(..., 1, 1)``.
        inplace: Overwrite ``S_n``.

    Raises:
        ShapeError: If the matrices are not square.
    """
    d = S_n.shape[-1]
    if S_n.ndim < 2 or S_n.shape[-2] != d:
        raise ShapeError(f"covariances must be (..., d, d); got {tuple(S_n.shape)}")
    trace = S_n.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    target = trace**2 / d  # squared Frobenius norm of tr(S)/d I, and tr(S Sigma0)
    spread = S_n.square().sum((-2, -1), keepdim=True) * target - target**2
    tiny = torch.finfo(S_n.dtype).tiny
    alpha = (1 - (trace**2 * target / n) / spread.clamp_min(tiny)).clamp(0, 1)
    out = S_n.mul_(alpha) if inplace else S_n * alpha
    out.diagonal(dim1=-2, dim2=-1).add_(((1 - alpha) * trace / d)[..., 0])
    return out


class MetricSolver:
    """Solve ``sigma^+ b`` for one symmetric PSD matrix, many right-hand sides.

    Coordinates are first scaled to unit variance. Cholesky when the matrix is well conditioned, otherwise
    ``eigh`` with the cut of a pseudo-inverse, so constant or duplicated features and d > n need no care.

    Args:
        sigma: Shape ``(d, d)``.
        overwrite: Let ``sigma`` be used as scratch.
    """

    def __init__(self, sigma: Tensor, *, overwrite: bool = False) -> None:
        variance = sigma.diagonal().clamp_min(0)
        self._scale: Tensor = torch.where(
            variance > 0, variance.rsqrt(), torch.zeros_like(variance)
        )
        scaled = sigma if overwrite else sigma.clone()
        scaled.mul_(self._scale[:, None]).mul_(self._scale)
        scaled.diagonal().add_(
            (variance <= 0).to(sigma.dtype)
        )  # constant features: scale is 0 anyway
        eps = torch.finfo(sigma.dtype).eps
        factor, failed = torch.linalg.cholesky_ex(scaled)
        pivots = factor.diagonal().square()
        self.condition = float(pivots.max() / pivots.min().clamp_min(torch.finfo(sigma.dtype).tiny))
        self.well_conditioned = not bool(failed) and self.condition < eps**-0.75
        if self.well_conditioned:
            self._factor = factor
            return
        values, vectors = torch.linalg.eigh(scaled)
        keep = values > values[-1] * len(values) * eps
        self.condition = float(values[-1] / values[keep].min()) if bool(keep.any()) else 1.0
        self._values, self._vectors = values[keep], vectors[:, keep]

    def whiten(self, b: Tensor) -> Tensor:
        """Return ``w`` with ``w^T w = b^T sigma^+ b``, of shape ``(at most d, m)``."""
        scaled = b * self._scale[:, None]
        if self.well_conditioned:
            out: Tensor = torch.linalg.solve_triangular(self._factor, scaled, upper=False)
        else:
            out = (self._vectors.T @ scaled) / self._values.sqrt()[:, None]
        return out

    def __call__(self, b: Tensor) -> Tensor:
        """Return ``sigma^+ b`` for ``b`` of shape ``(d, m)``."""
        scaled = b * self._scale[:, None]
        if self.well_conditioned:
            # two triangular solves: several times faster than cholesky_solve for few columns
            half = torch.linalg.solve_triangular(self._factor, scaled, upper=False)
            solved: Tensor = torch.linalg.solve_triangular(self._factor.T, half, upper=True)
        else:
            solved = self._vectors @ ((self._vectors.T @ scaled) / self._values[:, None])
        return solved * self._scale[:, None]
