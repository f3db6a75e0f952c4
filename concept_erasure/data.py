"""Read representations and labels, whatever they come as, into checked tensors: one way for all erasers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.errors import ShapeError
from concept_erasure.labels import (
    Classes,
    LabelKind,
    Labels,
    as_tensor,
    encode_concepts,
    encode_labels,
)
from concept_erasure.linalg import statistics_dtype
from concept_erasure.sites import Space

__all__ = ["class_indices", "is_text", "labels_per_row", "read_data", "read_labels", "read_rows"]


def read_data(
    x: object,
    z: object,
    z_kind: LabelKind = "auto",
    classes: Classes | None = None,
) -> tuple[Tensor, Labels, Space | None]:
    """Return x, encoded labels (one a row of the flattened x) and the space.

    Args:
        x: Numbers ``(..., d)`` with at least two rows, or `Representations` (then z may be None).
        z: Labels: one a row, or for x ``(batch, seq, d)`` also one a text, repeated over the sequence.
        z_kind: ``"classes"`` or ``"continuous"`` overrides the reading of one-dimensional z.
        classes: The class values in the order wanted.

    Returns:
        x ``(..., d)`` in a floating dtype, labels of its rows on its device, and where x came from.

    Raises:
        TypeError: If x is sparse, complex or holds no numbers.
        ValueError: If there are fewer than two rows or no labels, or the squares of x would overflow or vanish.
        ShapeError: If x is one-dimensional, or x and z disagree.
    """
    space = None
    if isinstance(x, Representations):
        space, z, x = x.space, x.z if z is None else z, x.x
    data = read_rows(x)
    rows = data.shape[:-1].numel()
    if rows < 2:
        raise ValueError(f"at least 2 rows are needed to fit; got {rows}")
    if z is None:
        raise ValueError("labels are missing: give z, or representations collected with labels")
    try:
        labels = read_labels(z, data, z_kind, classes)
    except ValueError:
        _refuse_not_finite(data)  # blame x before labels that were computed from it
        raise
    return data, labels, space


def read_rows(x: object) -> Tensor:
    """Return x ``(..., d)``, at least two-dimensional, as a floating tensor fit for squaring.

    Raises:
        TypeError: If x is sparse, nested, complex or holds no numbers.
        ShapeError: If x is one-dimensional or has no columns.
        ValueError: If x holds no values (meta device), or its squares would overflow or vanish.
    """
    _refuse_sparse(x, "x")
    data = as_tensor(x)
    if data.is_complex():
        raise TypeError(
            f"x is complex ({data.dtype}), which is not supported; pass real and imaginary part as columns"
        )
    if data.ndim < 2:
        raise ShapeError(f"x must have shape (n, d) or (batch, seq, d); got {tuple(data.shape)}")
    if data.shape[-1] == 0:
        raise ShapeError(f"x has no columns; got shape {tuple(data.shape)}")
    if data.is_meta:
        raise ValueError("x must hold values; got a tensor on the meta device")
    if not data.is_floating_point():
        data = data.to(statistics_dtype(data.device))
    _check_scale(data)
    return data


def read_labels(
    z: object,
    data: Tensor,
    kind: LabelKind = "auto",
    classes: Classes | None = None,
    *,
    name: str = "z",
) -> Labels:
    """Return the encoded labels of the rows of ``data`` ``(..., d)``, on its device.

    Args:
        z: Labels as in `read_data`; a mapping or table of several columns is several concepts.
        data: The representations.
        kind: How to read one-dimensional labels.
        classes: The class values in the order wanted.
        name: What messages call the labels.

    Raises:
        TypeError: If the labels are sparse or neither strings nor numbers.
        ShapeError: If they are not one a row.
        ValueError: If a label is missing, not finite or unknown, or there are no columns.
    """
    lead = data.shape[:-1]
    _refuse_sparse(z, name)
    try:
        labels = encode_concepts(
            labels_per_row(z, lead), n=lead.numel(), kind=kind, classes=classes
        )
    except (TypeError, ValueError) as error:
        if name == "z":
            raise
        message = re.sub(r"\bz(?=\b|_kind)", name, str(error))
        raise type(error)(message if name in message.split() else f"{name}: {message}") from None
    if labels.width == 0:
        raise ValueError(
            f"{name} has no columns: its shape is {tuple(labels.values.shape)}; give at least one"
        )
    return replace(labels, values=labels.values.to(data.device))


def labels_per_row(z: object, lead: torch.Size) -> object:
    """Return labels as one a row of the flattened ``(*lead, d)``.

    Labels of shape ``lead`` (or ``(*lead, c)``) are flattened; labels of one text, ``lead[:1]``, are repeated
    over its tokens. Anything else is returned as it is.
    """
    if len(lead) < 2 or z is None:
        return z
    if isinstance(z, Mapping) or (hasattr(z, "columns") and hasattr(z, "items")):
        return {str(key): labels_per_row(value, lead) for key, value in cast("Any", z).items()}
    texts = _texts(z)
    if texts is not None:
        return _spread_texts(texts, lead)
    values = as_tensor(z, name="z")
    if values.shape[: len(lead)] == lead:
        return values.reshape(-1, *values.shape[len(lead) :])
    for k in range(1, len(lead)):
        if values.shape == lead[:k]:
            return values.reshape(*lead[:k], *[1] * (len(lead) - k)).expand(lead).reshape(-1)
    return values


def is_text(z: object) -> bool:
    """Say whether labels are strings."""
    return _texts(z) is not None


def class_indices(z: object, lead: torch.Size, names: Sequence[str]) -> Tensor:
    """Return the position among ``names`` of each label, shape ``(n,)`` for ``n = prod(lead)``.

    False and 0, True and 1 are the same label, whichever the names were made from.

    Raises:
        ShapeError: If there is not one label a row.
        ValueError: If a label is not among the names.
    """
    z = labels_per_row(z, lead)
    if not is_text(z):
        z = as_tensor(z, name="z")
        if z.dtype == torch.bool and not {"False", "True"} & set(names):
            z = z.long()
        elif set(names) <= {"False", "True"} and bool(((z == 0) | (z == 1)).all()):
            z = z.bool()
    return encode_labels(z, n=lead.numel(), kind="classes", classes=names).values.long()


def _texts(z: object) -> NDArray[Any] | None:
    """Return labels as an array of objects if any is a string, else None."""
    if isinstance(z, (Tensor, str, bytes)):
        return None
    values = cast("Any", z).to_numpy() if hasattr(z, "to_numpy") else z
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return None
    try:
        array = np.array(values, dtype=object)
    except (TypeError, ValueError, RuntimeError):
        return None
    ragged = [v for v in array.flat if isinstance(v, (list, tuple))]
    if any(isinstance(v, str) for v in array.flat):
        return array
    return array if any(isinstance(v, str) for row in ragged for v in row) else None


def _spread_texts(texts: NDArray[Any], lead: torch.Size) -> list[object]:
    if any(isinstance(v, (list, tuple)) for v in texts.flat):
        raise ShapeError(
            f"labels are lists of unequal length; for x of shape {(*lead, 'd')} give one label a text, "
            f"or {lead[1]} a text"
        )
    for k in range(1, len(lead)):
        if texts.shape == lead[:k]:
            shaped = texts.reshape(*lead[:k], *[1] * (len(lead) - k))
            texts = np.broadcast_to(shaped, tuple(lead))
    if texts.shape != lead and texts.shape != (lead.numel(),):
        raise ShapeError(
            f"x has {lead.numel()} rows in shape {tuple(lead)} and z has shape {texts.shape}; give one label "
            f"a text {tuple(lead[:1])} or one a token {tuple(lead)}"
        )
    return list(texts.flat)


def _refuse_sparse(value: object, name: str) -> None:
    torch_sparse = isinstance(value, Tensor) and (
        value.layout != torch.strided or bool(value.is_nested)
    )
    if torch_sparse:
        raise TypeError(f"{name} is sparse or nested; pass a dense tensor ({name}.to_dense())")
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} is sparse; pass a dense array ({name}.toarray())")


def _check_scale(data: Tensor) -> None:
    """Refuse data whose squares leave the range of the statistics' dtype."""
    if data.numel() == 0:
        return
    low, high = torch.aminmax(data)
    largest = max(abs(float(low)), abs(float(high)))
    if not np.isfinite(largest):  # Moments refuses these rows unless they are masked out
        finite = data[torch.isfinite(data)]
        largest = float(finite.abs().max()) if len(finite) else 0.0
    info = torch.finfo(statistics_dtype(data.device))
    ceiling = (info.max / data.numel()) ** 0.5
    floor = (info.tiny / info.eps) ** 0.5
    if largest > ceiling or 0 < largest < floor:
        verb = "overflow" if largest > ceiling else "vanish"
        raise ValueError(
            f"the largest entry of x is {largest:.1e}, so its squares {verb} in {info.dtype}; rescale x first "
            f"(x / {largest:.0e}), erase, and scale back"
        )


def _refuse_not_finite(data: Tensor) -> None:
    rows = (~torch.isfinite(data)).any(-1).flatten().nonzero()[:, 0]
    if len(rows):
        raise ValueError(
            f"x has {len(rows)} rows that are not finite; the first is row {int(rows[0])}"
        ) from None
