"""Read vectors and class labels, whatever they come as, into checked tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor

from concept_erasure.errors import ShapeError

__all__ = [
    "Label",
    "SupportsArray",
    "Vectors",
    "index_labels",
    "read_groups",
    "read_labels",
    "read_vectors",
]

Label: TypeAlias = str | int | bool


@runtime_checkable
class SupportsArray(Protocol):
    """Anything numpy can read: arrays, data frames, series."""

    def __array__(self) -> NDArray[Any]:
        """Return a numpy array."""


Vectors: TypeAlias = Tensor | SupportsArray | Sequence[Sequence[float]]


def read_vectors(x: Vectors, *, width: int | None = None, name: str = "x") -> Tensor:
    """Return ``x`` as a finite matrix in float64 (float32 where the device has no float64).

    Args:
        x: Vectors, shape ``[n, d]``, any real dtype.
        width: The ``d`` that is required, if any.
        name: What to call ``x`` in messages.

    Returns:
        Detached matrix of shape ``[n, d]`` on the device of ``x``.

    Raises:
        TypeError: If the entries are not real numbers.
        ShapeError: If ``x`` is no matrix, is empty or has the wrong width.
        ValueError: If an entry is NaN or infinite.
    """
    matrix = _as_tensor(x, name).detach()
    if matrix.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {matrix.dtype}; pass its real part")
    if matrix.ndim != 2:
        raise ShapeError(
            f"{name} must be a matrix [n, d] with one vector per row, got shape "
            f"{list(matrix.shape)}; select or average the tokens, or use x.reshape(-1, x.shape[-1])"
        )
    if 0 in matrix.shape:
        raise ShapeError(f"{name} must have at least one row and column, got {list(matrix.shape)}")
    if width is not None and matrix.shape[1] != width:
        raise ShapeError(
            f"the probe was fitted on vectors of width {width}, got {name} of shape "
            f"{list(matrix.shape)}; use vectors from the same site"
        )
    matrix = matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    bad = ~torch.isfinite(matrix).all(dim=1)
    if bool(bad.any()):
        rows = bad.nonzero().flatten()
        raise ValueError(
            f"{name} has NaN or infinite entries in {len(rows)} of {len(matrix)} rows, "
            f"the first is row {int(rows[0])}; drop these rows"
        )
    return matrix


def _as_tensor(x: Vectors, name: str) -> Tensor:
    if isinstance(x, Tensor):
        return x
    try:
        if isinstance(x, SupportsArray):
            return torch.as_tensor(x.__array__().copy())
        return torch.tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a real matrix (tensor, numpy array, data frame or rows of numbers), "
            f"got {type(x).__name__}: {error}"
        ) from error


def read_labels(z: object, *, n: int, name: str = "z") -> list[Label]:
    """Return one class label per vector as plain Python values.

    Args:
        z: Labels, shape ``[n]`` or ``[n, 1]``: strings, bools, integers or floats with integer
            values, as list, tuple, tensor, numpy array or series.
        n: Number of vectors.
        name: What to call ``z`` in messages.

    Returns:
        ``n`` labels, all strings, all bools or all ints.

    Raises:
        TypeError: If a label is no string, bool or number, or the kinds are mixed.
        ShapeError: If ``z`` is not one label per vector.
        ValueError: If a label is NaN or a fraction.
    """
    items = [_scalar(item, name) for item in _items(z, name)]
    if len(items) != n:
        raise ShapeError(
            f"{name} must have one label per vector, got {len(items)} labels for {n} vectors"
        )
    kinds = {"number" if type(i) in (int, float) else type(i).__name__ for i in items}
    if len(kinds) > 1:
        raise TypeError(f"{name} mixes {', '.join(sorted(kinds))} labels; use one kind")
    return [_whole(item, row, name) for row, item in enumerate(items)]


def _items(z: object, name: str) -> list[object]:
    tolist = getattr(z, "tolist", None)
    values = tolist() if callable(tolist) else z
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of class labels, got {type(z).__name__}")
    return list(values)


def _scalar(item: object, name: str) -> str | int | bool | float:
    shape: object = [len(item)] if isinstance(item, (list, tuple)) else None
    if isinstance(item, (list, tuple)) and len(item) == 1:
        item = item[0]
    getter = getattr(item, "item", None)
    if isinstance(item, Tensor) and item.numel() != 1:
        shape = list(item.shape)
    elif callable(getter):
        item = getter()
    if isinstance(item, (list, tuple, Tensor)):
        raise ShapeError(
            f"{name} must have one class label per vector, got entries of shape {shape}; "
            f"for one-hot labels pass {name}.argmax(-1)"
        )
    if isinstance(item, (str, bool, int, float)):
        # str subclasses such as numpy.str_ become plain
        return str(item) if isinstance(item, str) else item
    raise TypeError(f"{name} must hold strings, bools or integers, got {type(item).__name__}")


def _whole(item: str | int | bool | float, row: int, name: str) -> Label:
    if not isinstance(item, float):
        return item
    if not math.isfinite(item) or item != int(item):
        raise ValueError(
            f"{name} must hold classes, got {item} in row {row}; probes do not fit continuous "
            "concepts: cut the values into bins first"
        )
    return int(item)


def index_labels(
    labels: Sequence[Label], classes: Sequence[Label] | None, *, device: torch.device
) -> tuple[Tensor, tuple[Label, ...]]:
    """Replace labels by their position among the sorted classes.

    Args:
        labels: Labels from `read_labels`, length n.
        classes: Known classes, or None to take the sorted distinct labels.
        device: Where the result goes.

    Returns:
        Indices, shape ``[n]`` int64, and the classes.

    Raises:
        ValueError: If there is only one class to learn, or a label is not among ``classes``.
    """
    if classes is None:
        classes = tuple(sorted(set(labels)))
        if len(classes) < 2:
            raise ValueError(
                f"a probe needs at least two classes, got only {classes[0]!r} in {len(labels)} "
                "labels; add examples of another class"
            )
    position = {label: i for i, label in enumerate(classes)}
    unknown = sorted({str(label) for label in labels if label not in position})
    if unknown:
        raise ValueError(
            f"labels {unknown[:5]} were not seen when the probe was fitted; "
            f"the known classes are {list(classes)[:20]}"
        )
    return torch.tensor([position[i] for i in labels], device=device), tuple(classes)


def read_groups(groups: object, *, n: int) -> Tensor:
    """Return the number of the group of each vector, shape ``[n]`` int64, from 0 without gaps.

    Args:
        groups: One group per vector, such as the text it comes from: strings or integers.
        n: Number of vectors.

    Raises:
        TypeError: If a group is no string or integer, or the kinds are mixed.
        ShapeError: If there is not one group per vector.
    """
    names = read_labels(groups, n=n, name="groups")
    position = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([position[name] for name in names], dtype=torch.int64)
