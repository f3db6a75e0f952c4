"""Split a tensor into one piece per label, work on the pieces, and put the rows back in order.

One sort and one gather per split: ``O(n log n)`` time, and one copy of the data. The sizes of the
groups must reach the host, so each call costs one device synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError

__all__ = ["GroupedTensor", "groupby", "invert_indices"]


@dataclass(frozen=True)
class GroupedTensor:
    """Pieces of a tensor, one per label, and what is needed to undo the split.

    Attributes:
        dim: Dimension along which the tensor was split.
        groups: One tensor per entry of ``labels``; views of one sorted copy.
        indices: Sorting order, shape ``[n]``, int64: sorted row ``i`` was row ``indices[i]``.
        labels: The distinct labels in ascending order.
    """

    dim: int
    groups: Sequence[Tensor]
    indices: Tensor
    labels: list[int]

    def coalesce(self, groups: Sequence[Tensor] | None = None) -> Tensor:
        """Join the pieces and restore the original order.

        Args:
            groups: Pieces to join in place of ``self.groups``: same number, and the same sizes
                along ``dim``.

        Returns:
            A tensor whose size along ``dim`` is ``n``.

        Raises:
            ShapeError: If the pieces do not have ``n`` entries together.
        """
        joined = torch.cat(list(self.groups if groups is None else groups), dim=self.dim)
        if joined.shape[self.dim] != len(self.indices):
            raise ShapeError(
                f"the groups hold {joined.shape[self.dim]} entries along dimension {self.dim}, but "
                f"{len(self.indices)} were split; return one entry for each one received"
            )
        return joined.index_select(self.dim, invert_indices(self.indices))

    def map(self, fn: Callable[[int, Tensor], Tensor]) -> GroupedTensor:
        """Apply ``fn(label, piece)`` to every piece and return the results as a new split."""
        return GroupedTensor(
            self.dim,
            [fn(label, group) for label, group in self] if self.labels else self.groups,
            self.indices,
            self.labels,
        )

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(label, piece)`` in ascending order of the label."""
        return iter(zip(self.labels, self.groups, strict=bool(self.labels)))


def groupby(x: Tensor, key: Tensor, dim: int = 0, *, stable: bool = False) -> GroupedTensor:
    """Split ``x`` along ``dim`` into one piece per distinct value of ``key``.

    Args:
        x: Tensor of any shape and dtype.
        key: Labels, shape ``[n]`` with ``n = x.shape[dim]``, any integer type or bool.
        dim: Dimension to split.
        stable: Keep the order of the entries inside each piece; slower on some devices.

    Returns:
        The pieces with what is needed to undo the split.

    Raises:
        TypeError: If ``key`` is not integral.
        ShapeError: If ``key`` is not a vector of length ``n``.

    Example:
        >>> import torch
        >>> split = groupby(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]))
        >>> split.map(lambda label, piece: piece * label).coalesce()
        tensor([1., 0., 3.])
    """
    if key.is_floating_point() or key.is_complex():
        raise TypeError(f"`key` must hold integer labels, got {key.dtype}; convert with key.long()")
    if key.ndim != 1 or x.ndim == 0 or len(key) != x.shape[dim]:
        raise ShapeError(
            f"`key` must be a vector with one label for each entry of dimension {dim} of x, got "
            f"key {tuple(key.shape)} and x {tuple(x.shape)}"
        )
    ordered, indices = key.to(device=x.device, dtype=torch.int64).sort(stable=stable)
    labels, counts = ordered.unique_consecutive(return_counts=True)
    if len(key) == 0:  # one empty piece keeps the shape; it belongs to no label
        return GroupedTensor(dim, [x], indices, [])
    pieces = x.index_select(dim, indices).split(counts.tolist(), dim=dim)
    return GroupedTensor(dim, pieces, indices, labels.tolist())


def invert_indices(indices: Tensor) -> Tensor:
    """Return the inverse of a permutation.

    Args:
        indices: Permutation of ``0 .. n-1``, shape ``[n]``, int64.

    Returns:
        Tensor of the same shape with ``inverse[indices[i]] = i``.

    Example:
        >>> import torch
        >>> invert_indices(torch.tensor([2, 0, 1]))
        tensor([1, 2, 0])
    """
    inverse = torch.empty_like(indices)
    inverse[indices] = torch.arange(len(indices), device=indices.device, dtype=indices.dtype)
    return inverse
