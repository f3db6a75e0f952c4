"""Read what the command line is given: vectors with labels, or labelled texts.

Vectors come from ``.npy``, ``.safetensors`` or ``.csv`` files, texts from ``.jsonl`` or ``.csv``
files or from a data set of the ``datasets`` library. Nothing is ever unpickled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from concept_erasure.errors import FormatError, ShapeError, missing_extra

__all__ = ["Vectors", "read_labels", "read_texts", "read_vectors", "write_vectors"]

VECTOR_SUFFIXES = (".npy", ".safetensors", ".csv")
TEXT_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Vectors:
    """Vectors ``x`` of shape ``(n, d)`` and, where the file has them, ``n`` labels."""

    x: Tensor
    z: Tensor | list[str] | None


def read_vectors(
    source: str, *, labels: str | None = None, label_column: str = "label", need_labels: bool = True
) -> Vectors:
    """Read vectors and their labels.

    Args:
        source: A ``.npy`` array of shape ``(n, d)``; a ``.safetensors`` file with a tensor ``x``
            and a label tensor; or a ``.csv`` file with a header, one column of labels, and numbers
            in every other column.
        labels: File with the labels when ``source`` has none: ``.npy``, or a text or csv file.
        label_column: Name of the label column or label tensor.
        need_labels: Whether to fail when there are no labels.

    Returns:
        The vectors, in the file's own floating type (csv: float64).

    Raises:
        FormatError: If the file is not what its name says.
        ShapeError: If there are not as many labels as vectors.
    """
    path = _existing(source)
    required = need_labels and labels is None
    match path.suffix.lower():
        case ".npy":
            found = Vectors(_vectors(_load_npy(path), path), None)
        case ".safetensors":
            found = _read_safetensors(path, label_column, required=required)
        case ".csv":
            found = _read_csv_vectors(path, label_column, required=required)
        case suffix:
            raise FormatError(
                f"{path}: vectors cannot be read from a {suffix or 'suffixless'} file; "
                f"allowed: {', '.join(VECTOR_SUFFIXES)}. For texts, name a model with --model."
            )
    if labels is not None:
        found = Vectors(found.x, read_labels(labels, label_column=label_column))
    if found.z is None and need_labels:
        raise ValueError(f"{path} holds no labels; name a file that does with --labels")
    if found.z is not None and len(found.z) != len(found.x):
        raise ShapeError(
            f"{len(found.x)} vectors in {path} but {len(found.z)} labels"
            f"{' in ' + labels if labels else ''}; there must be one label a vector"
        )
    return found


def read_labels(source: str, *, label_column: str = "label") -> Tensor | list[str]:
    """Read labels from ``.npy``, a ``.csv`` column, or a text file with one label a line.

    Raises:
        FormatError: If the file cannot be read as labels.
        ValueError: If a csv file lacks the column.
    """
    path = _existing(source)
    if path.suffix.lower() == ".npy":
        array = _load_npy(path)
        if array.dtype.kind in "US":
            return [str(value) for value in array.tolist()]
        return torch.from_numpy(np.ascontiguousarray(array))
    if path.suffix.lower() == ".csv":
        header, rows = _csv_rows(path)
        column = _column(header, label_column, path)
        return [row[column] for row in rows]
    text = path.read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_texts(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    split: str = "train",
    limit: int | None = None,
) -> tuple[list[str], list[str]]:
    """Read labelled texts from ``.jsonl``, ``.csv``, or a data set named as ``datasets`` does.

    Args:
        source: File, or the name of a data set.
        text_column: Column or key of the text.
        label_column: Column or key of the label.
        split: Split of a named data set; ignored for files.
        limit: Read at most so many rows.

    Returns:
        Texts and labels, equally long.

    Raises:
        ValueError: If a column is missing (the message lists those there are) or nothing is found.
        FileNotFoundError: If a file does not exist.
    """
    path = Path(source)
    rows: Iterator[dict[str, object]]
    if path.suffix.lower() == ".jsonl":
        rows = _jsonl_rows(_existing(source))
    elif path.suffix.lower() == ".csv":
        header, values = _csv_rows(_existing(source))
        rows = (dict(zip(header, row, strict=True)) for row in values)
    elif path.suffix and path.is_file():
        raise FormatError(f"{path}: texts are read from {', '.join(TEXT_SUFFIXES)} files")
    else:
        rows = _dataset_rows(source, split)
    texts: list[str] = []
    labels: list[str] = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and number > limit:
            break
        for column in (text_column, label_column):
            if column not in row:
                raise ValueError(
                    f"{source}, row {number} has no column {column!r}; it has: "
                    f"{', '.join(map(repr, row))}. Name the columns with --text-column and "
                    "--label-column."
                )
        texts.append(str(row[text_column]))
        labels.append(str(row[label_column]))
    if not texts:
        raise ValueError(f"{source} holds no texts")
    return texts, labels


def write_vectors(x: Tensor, out: str) -> None:
    """Write vectors as ``.npy`` (float32 where numpy lacks the type) or ``.safetensors``.

    Raises:
        ValueError: If the suffix is neither.
    """
    path = Path(out)
    x = x.detach().cpu().contiguous()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"x": x}, path)
    elif path.suffix == ".npy":
        np.save(path, (x.float() if x.dtype == torch.bfloat16 else x).numpy())
    else:
        raise ValueError(f"--out {out}: vectors are written to a .npy or .safetensors file")


def _existing(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        raise FormatError(f"{source} is a folder; name a file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    return path


def _load_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise FormatError(f"{path} is not a plain .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{path} holds several arrays; save the vectors alone with numpy.save")
    return array


def _vectors(array: np.ndarray, path: Path) -> Tensor:
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ShapeError(
            f"{path} holds an array of shape {array.shape} and type {array.dtype}; vectors need "
            "shape (n, d) and numbers"
        )
    if array.dtype.kind in "iu":
        array = array.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(array))


def _read_safetensors(path: Path, label_column: str, *, required: bool) -> Vectors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} is not a safetensors file: {error}") from None
    names = ", ".join(map(repr, tensors)) or "none"
    if "x" not in tensors or tensors["x"].ndim != 2:
        raise FormatError(f"{path} has no tensor 'x' of shape (n, d); its tensors: {names}")
    name = "z" if label_column not in tensors and "z" in tensors else label_column
    if name not in tensors and required:
        raise ValueError(
            f"{path} has no label tensor {label_column!r}; its tensors: {names}. Name one with "
            "--label-column, or a file with --labels."
        )
    return Vectors(tensors["x"], tensors.get(name))


def _read_csv_vectors(path: Path, label_column: str, *, required: bool) -> Vectors:
    header, rows = _csv_rows(path)
    column = _column(header, label_column, path) if required or label_column in header else None
    features = [index for index in range(len(header)) if index != column]
    values = []
    for number, row in enumerate(rows, start=2):
        try:
            values.append([float(row[index]) for index in features])
        except ValueError:
            bad = next(index for index in features if not _is_number(row[index]))
            raise FormatError(
                f"{path}, line {number}: column {header[bad]!r} holds {row[bad]!r}, not a number; "
                "every column but the label's must be numeric"
            ) from None
    if not values or not features:
        raise FormatError(f"{path} holds no vectors")
    labels = None if column is None else [row[column] for row in rows]
    return Vectors(torch.tensor(values, dtype=torch.float64), labels)


def _csv_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [row for row in csv.reader(file) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise FormatError(f"{path} is not a csv file: {error}") from None
    if len(rows) < 2:
        raise FormatError(f"{path} needs a header and at least one row")
    header, *rest = rows
    for number, row in enumerate(rest, start=2):
        if len(row) != len(header):
            raise FormatError(
                f"{path}, row {number} has {len(row)} fields; the header has {len(header)}"
            )
    return header, rest


def _column(header: Sequence[str], name: str, path: Path) -> int:
    if name not in header:
        shown = ", ".join(map(repr, header[:12])) + (", …" if len(header) > 12 else "")
        raise ValueError(
            f"{path} has no label column {name!r}; its columns: {shown}. "
            "Name one with --label-column."
        )
    return header.index(name)


def _jsonl_rows(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FormatError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise FormatError(f"{path}, line {number} is not a JSON object")
            yield row


def _dataset_rows(name: str, split: str) -> Iterator[dict[str, object]]:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "llm") from None
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a {' or '.join(TEXT_SUFFIXES)} file nor a data set that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from None
    for row in data:
        yield dict(row)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
