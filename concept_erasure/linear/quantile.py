"""Make the distribution of every coordinate the same in all classes, one coordinate at a time.

Each value goes through the empirical distribution function of its own class and comes back
through the inverse of the target class; both are lookup tables. Marginals become equal, joints do
not: a probe that looks at two coordinates together can still tell the classes apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.linear.groupby import groupby

__all__ = ["QuantileNormalizer", "cdf", "icdf"]


def _check_quantiles(q: Tensor) -> int:
    n = q.shape[-1] if q.ndim else 0
    if n < 2:
        raise ShapeError(f"`q` needs at least two quantiles in its last dimension, got {n}")
    return n


def cdf(x: float | Tensor, q: Tensor) -> Tensor:
    """Return the share of the quantiles that are at most ``x``.

    Args:
        x: A number, or values of shape ``[..., m]``.
        q: Ascending quantiles, shape ``[..., num_quantiles]``; one row serves all of ``x``, and
            otherwise the leading dimensions must broadcast.

    Returns:
        Values in ``[0, 1]`` of the default floating type, shape of ``x``.

    Raises:
        ShapeError: If there are fewer than two quantiles.

    Example:
        >>> import torch
        >>> cdf(2.0, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.5000)
    """
    n = _check_quantiles(q)
    values = torch.as_tensor(x, dtype=q.dtype, device=q.device)
    if q.ndim > 1:
        lead = torch.broadcast_shapes(q.shape[:-1], values.shape[:-1])
        q = q.expand(*lead, n)
        values = values.expand(*lead, values.shape[-1])
    return torch.searchsorted(q.contiguous(), values.contiguous(), right=True) / n


def icdf(p: Tensor, q: Tensor) -> Tensor:
    """Return the smallest quantile whose distribution function reaches ``p``.

    ``p = 0`` gives the smallest quantile instead of minus infinity, so results are finite.

    Args:
        p: Probabilities in ``[0, 1]``, shape ``[..., m]``. Values within a few roundings above
            ``i / num_quantiles`` count as ``i / num_quantiles``, so that ``icdf(cdf(x))`` never
            exceeds ``x``.
        q: Ascending quantiles, shape ``[..., num_quantiles]``; leading dimensions broadcast.

    Returns:
        Elements of ``q``, shape of ``p``.

    Raises:
        ShapeError: If there are fewer than two quantiles.

    Example:
        >>> import torch
        >>> icdf(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([1., 2., 4.])
    """
    n = _check_quantiles(q)
    scaled = p * n
    slack = 4 * torch.finfo(scaled.dtype).eps * scaled
    rank = (scaled - slack).ceil().long().sub(1).clamp(0, n - 1)
    if q.ndim == 1:
        return q[rank]
    lead = torch.broadcast_shapes(q.shape[:-1], rank.shape[:-1])
    return q.expand(*lead, n).gather(-1, rank.expand(*lead, rank.shape[-1]))


class QuantileNormalizer:
    """Move each coordinate from its class's distribution to that of another class.

    Memory: ``classes * coordinates * num_bins`` numbers.

    Attributes:
        lut: Quantiles, shape ``[k, ..., num_bins]``: class, coordinates, bin.
        labels: The class label of each row of ``lut``.
        dim: Dimension of the data that counts samples.
    """

    lut: Tensor
    labels: list[int]
    dim: int

    def __init__(self, x: Tensor, z: Tensor, num_bins: int = 256, dim: int = 0) -> None:
        """Read the quantiles of every class.

        Args:
            x: Data, any shape, floating point, with ``n`` samples along ``dim``.
            z: Integer class labels, shape ``[n]``.
            num_bins: Number of quantiles kept for each coordinate; more is finer and larger.
            dim: Dimension that counts samples.

        Raises:
            ShapeError: If ``z`` does not fit ``x``.
            ValueError: If ``num_bins`` is below 2, or ``x`` holds NaN or infinities.
        """
        if num_bins < 2:
            raise ValueError(f"`num_bins` must be at least 2, got {num_bins}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("`x` holds NaN or infinite values; drop those rows")
        grouped = groupby(x, z, dim=dim)
        work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        tables = [_quantiles(piece.to(work).movedim(dim, -1), num_bins) for _, piece in grouped]
        self.lut = torch.stack(tables)
        self.labels = grouped.labels
        self.dim = dim

    @property
    def num_bins(self) -> int:
        """Number of quantiles kept for each coordinate."""
        return self.lut.shape[-1]

    def _table(self, z: int) -> Tensor:
        if z not in self.labels:
            raise ValueError(f"class {z} was not in the data; the classes are {self.labels}")
        return self.lut[self.labels.index(z)]

    def cdf(self, z: int, x: Tensor) -> Tensor:
        """Return the distribution function of class ``z`` at ``x``, shape of ``x``."""
        return cdf(x.movedim(self.dim, -1), self._table(z)).movedim(-1, self.dim)

    def sample(self, z: int, n: int, *, seed: int | torch.Generator = 0) -> Tensor:
        """Draw samples whose coordinates are independent and distributed as in class ``z``.

        Args:
            z: Class label.
            n: Number of samples.
            seed: Seed, or a generator on the device of the tables. The global generator is
                neither read nor set.

        Returns:
            Tensor with ``n`` entries along ``dim``.
        """
        table = self._table(z)
        if isinstance(seed, int):
            seed = torch.Generator(device=table.device).manual_seed(seed)
        shape = (*table.shape[:-1], n)
        p = torch.rand(shape, generator=seed, device=table.device, dtype=table.dtype)
        return icdf(p, table).movedim(-1, self.dim)

    def transport(self, x: Tensor, source_z: Tensor, target_z: int) -> Tensor:
        """Move every sample from its own class to ``target_z``; those already there stay.

        Args:
            x: Data of the shape used for fitting, with any number of samples along ``dim``.
            source_z: Class of each sample, shape ``[n]``.
            target_z: Class to move to.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ValueError: If a class was not in the data the tables were read from.
        """
        target = self._table(target_z)

        def move(label: int, piece: Tensor) -> Tensor:
            if label == target_z:
                return piece
            ranks = cdf(piece.movedim(self.dim, -1), self._table(label))
            return icdf(ranks, target).movedim(-1, self.dim).to(x.dtype)

        return groupby(x, source_z, dim=self.dim).map(move).coalesce()


def _quantiles(values: Tensor, num_bins: int) -> Tensor:
    """Return evenly spaced interpolated quantiles of the last dimension, ``[..., num_bins]``.

    Sorting by hand, since `torch.quantile` refuses more than 16 million elements.
    """
    ordered = values.sort(dim=-1).values
    last, steps = ordered.shape[-1] - 1, num_bins - 1
    place = torch.arange(num_bins, device=values.device) * last
    low = place // steps
    high = (low + 1).clamp_max(last)
    weight = (place % steps).to(values.dtype) / steps  # exact where a quantile is a sample
    return torch.lerp(ordered[..., low], ordered[..., high], weight)
