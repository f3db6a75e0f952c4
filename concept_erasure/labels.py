"""Turn what people call labels (strings, bools, class ids, one-hot, reals) into one of two forms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from concept_erasure.errors import ErasureWarning, ShapeError

__all__ = ["Classes", "LabelKind", "Labels", "as_tensor", "encode_concepts", "encode_labels"]

LabelKind = Literal["auto", "classes", "continuous"]
Classes = Sequence[object] | Mapping[str, Sequence[object]]
MAX_CLASS_LIKE = 20  # floats with at most this many distinct whole values look like class ids


@dataclass(frozen=True)
class Labels:
    """Concept labels: class indices ``(n,)`` int64, or real columns ``(n, c)`` float64.

    Attributes:
        values: The numbers.
        names: Class names in index order; empty for real columns and for several concepts.
        concepts: For several concepts, the class names of each (empty for real columns).
    """

    values: Tensor
    names: tuple[str, ...] = ()
    concepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...] | Mapping[str, tuple[str, ...]] | None:
        """What to pass as ``classes=`` so that other rows are encoded alike."""
        return self.names or self.concepts or None

    @property
    def width(self) -> int:
        """Number of concept columns c (classes count one each)."""
        return len(self.names) if self.values.ndim == 1 else self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)


def as_tensor(value: object, *, name: str = "x") -> Tensor:
    """Return a tensor from a tensor, numpy array, pandas object or nested list.

    Raises:
        TypeError: If the value holds something other than numbers.
    """
    if isinstance(value, Tensor):
        return value
    array: Any = cast("Any", value).to_numpy() if hasattr(value, "to_numpy") else value
    if hasattr(array, "flags") and not array.flags.writeable:
        array = array.copy()  # pandas hands out read-only views
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, array or table of numbers; got {type(value).__name__} ({error})"
        ) from None


def encode_labels(
    z: object,
    *,
    n: int | None = None,
    kind: LabelKind = "auto",
    classes: Sequence[object] | None = None,
    device: torch.device | str | None = None,
) -> Labels:
    """Encode concept labels.

    One-dimensional bool, integer and string labels are classes; floats are real targets; two-dimensional
    numbers are columns as they stand (one-hot, soft, multi-label, several targets).

    Args:
        z: Labels of shape ``(n,)`` or ``(n, c)``; tensor, array, pandas column or list.
        n: Number of rows expected.
        kind: ``"classes"`` or ``"continuous"`` overrides the rule above.
        classes: The class values in the order wanted; default the sorted distinct values.
        device: Where to put the result.

    Raises:
        ShapeError: If the number of labels is not ``n`` or z has more than two dimensions.
        ValueError: If a label is missing, not finite or not among ``classes``.
    """
    if kind not in ("auto", "classes", "continuous"):
        raise ValueError(f"got kind={kind!r}; it must be 'auto', 'classes' or 'continuous'")
    plain = cast("Any", z).to_numpy() if hasattr(z, "to_numpy") else z
    texts = _as_texts(plain)
    if texts is not None:
        if kind == "continuous":
            raise ValueError("labels are strings, so they cannot be kind='continuous'")
        labels = _encode_texts(texts, classes)
    else:
        labels = _encode_numbers(as_tensor(plain, name="z"), kind, classes)
    if n is not None and len(labels) != n:
        raise ShapeError(f"x has {n} rows and z has {len(labels)} labels; they must be the same")
    return Labels(labels.values.to(device), labels.names) if device is not None else labels


def encode_concepts(
    z: object,
    *,
    n: int | None = None,
    kind: LabelKind = "auto",
    classes: Classes | None = None,
) -> Labels:
    """Encode one concept, or several given as a mapping or a table with several columns.

    Several concepts become one block of columns (classes one-hot), to be erased jointly. Other arguments and
    errors are those of `encode_labels`.

    Args:
        z: Labels, a mapping of labels, or a table with one concept a column.
        n: Number of rows expected.
        kind: How to read one-dimensional labels.
        classes: Class values of the concept; a mapping of them for several.
    """
    columns = _columns(z)
    if columns is None or len(columns) == 1:
        if isinstance(classes, Mapping):
            raise ValueError(f"z must be a mapping or table with the concepts {sorted(classes)}")
        one = z if columns is None else next(iter(columns.values()))
        return encode_labels(one, n=n, kind=kind, classes=classes)
    known = classes or dict.fromkeys(columns, ())
    if not isinstance(known, Mapping) or set(known) != set(columns):
        wanted = sorted(known) if isinstance(known, Mapping) else "one concept"
        raise ValueError(f"z holds the concepts {sorted(columns)}; wanted {wanted}")
    parts = {
        name: encode_labels(columns[name], n=n, kind=kind, classes=known[name] or None)
        for name in known
    }
    blocks = [
        torch.nn.functional.one_hot(p.values, p.width).double() if p.values.ndim == 1 else p.values
        for p in parts.values()
    ]
    return Labels(torch.cat(blocks, 1), concepts={name: p.names for name, p in parts.items()})


def _columns(z: object) -> dict[str, object] | None:
    """Return the concepts of a mapping or table by name; None for plain labels."""
    if not isinstance(z, Mapping) and not (hasattr(z, "columns") and hasattr(z, "items")):
        return None
    columns = {str(name): value for name, value in cast("Any", z).items()}
    if not columns:
        raise ValueError("z holds no concept")
    return columns


def _as_texts(z: object) -> list[str] | None:
    """Return labels as strings if they are strings, else None."""
    if isinstance(z, Tensor):
        return None
    flat = cast("Any", z).tolist() if hasattr(z, "tolist") else z
    if not isinstance(flat, Sequence) or isinstance(flat, str) or not flat:
        return None
    if not any(isinstance(value, str) for value in flat):
        return None
    missing = [i for i, value in enumerate(flat) if not isinstance(value, str)]
    if missing:
        raise ValueError(
            f"labels mix strings and other values: row {missing[0]} holds {flat[missing[0]]!r}; "
            "drop or fill missing labels first"
        )
    return [str(value) for value in flat]


def _encode_texts(texts: list[str], classes: Sequence[object] | None) -> Labels:
    names = [str(c) for c in classes] if classes is not None else sorted(set(texts))
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({t for t in texts if t not in index})
    if unknown:
        raise ValueError(f"unknown labels {unknown[:5]}; the classes are {names}")
    return Labels(torch.tensor([index[t] for t in texts], dtype=torch.int64), tuple(names))


def _encode_numbers(z: Tensor, kind: LabelKind, classes: Sequence[object] | None) -> Labels:
    if z.is_complex():
        raise TypeError("complex labels are not supported; pass real columns")
    if z.is_meta:
        raise ValueError("z is on the meta device and holds no values")
    if z.ndim == 2 and z.shape[1] == 1:
        z = z[:, 0]
    if z.ndim not in (1, 2):
        raise ShapeError(f"z must have shape (n,) or (n, c); got {tuple(z.shape)}")
    if z.is_floating_point() and not bool(torch.isfinite(z).all()):
        bad = (~torch.isfinite(z)).reshape(len(z), -1).any(1).nonzero()[:, 0]
        raise ValueError(
            f"z has {len(bad)} rows that are not finite; the first is row {int(bad[0])}"
        )
    if z.ndim == 2:
        if kind == "classes":
            raise ShapeError(f"kind='classes' needs z of shape (n,); got {tuple(z.shape)}")
        return Labels(z.to(torch.float64))
    if kind == "continuous" or (kind == "auto" and z.is_floating_point()):
        if kind == "auto":
            _warn_if_class_like(z)
        return Labels(z.to(torch.float64)[:, None])
    return _encode_classes(z, classes)


def _encode_classes(z: Tensor, classes: Sequence[object] | None) -> Labels:
    found, index = torch.unique(z, return_inverse=True)
    present = [_class_name(v) for v in found.tolist()]
    if classes is None:
        return Labels(index, tuple(present))
    names = [_class_name(c) for c in classes]
    unknown = [v for v in present if v not in names]
    if unknown:
        raise ValueError(f"unknown labels {unknown[:5]}; the classes are {names}")
    position = torch.tensor([names.index(v) for v in present], device=z.device)
    return Labels(position[index], tuple(names))


def _class_name(value: object) -> str:
    """Return the name of a class; 1.0 and 1 are one class."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(cast("float", value))) if whole else str(value)


def _warn_if_class_like(z: Tensor) -> None:
    if len(z) == 0 or not bool((z == z.round()).all()):
        return
    distinct = len(torch.unique(z))
    if 2 < distinct <= min(MAX_CLASS_LIKE, len(z) // 2):
        warnings.warn(
            f"z is floating point with {distinct} distinct whole values and is fitted as one real target; "
            "if these are class ids pass z_kind='classes'",
            ErasureWarning,
            stacklevel=4,
        )
