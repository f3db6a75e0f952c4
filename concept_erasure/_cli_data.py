"""Read what the command line is given: vectors with labels, or labelled texts.

Vectors come from ``.npy``, ``.safetensors`` or ``.csv`` files, texts from ``.jsonl`` or ``.csv``
files or from a data set of the ``datasets`` library. Nothing is ever unpickled. Texts stay where
they are and are read again when needed; of each text only the label is kept, in eight bytes.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast, overload

import numpy as np
import torch
from torch import Tensor

from concept_erasure.errors import FormatError, ShapeError, missing_extra

__all__ = [
    "Column",
    "Texts",
    "Vectors",
    "open_texts",
    "read_labels",
    "read_vectors",
    "write_vectors",
]

VECTOR_SUFFIXES = (".npy", ".safetensors", ".csv")
TEXT_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Vectors:
    """Vectors ``x`` of shape ``(n, d)`` and, where the file has them, ``n`` labels.

    ``y`` are the labels of a task that is to be kept.
    """

    x: Tensor
    z: Tensor | list[str] | None
    y: Tensor | list[str] | None = None


@dataclass(frozen=True)
class Column:
    """The labels of ``n`` texts: class numbers ``(n,)`` int64 with names, or numbers float64."""

    values: Tensor
    names: tuple[str, ...] = ()

    def plain(self) -> Tensor | list[str]:
        """Return the labels as they were read: a list of names, or numbers."""
        return [self.names[i] for i in self.values.tolist()] if self.names else self.values


def read_vectors(
    source: str,
    *,
    labels: str | None = None,
    label_column: str = "label",
    task_labels: str | None = None,
    task_column: str | None = None,
    need_labels: bool = True,
) -> Vectors:
    """Read vectors and their labels.

    Args:
        source: A ``.npy`` array of shape ``(n, d)``; a ``.safetensors`` file with a tensor ``x``
            and a label tensor; or a ``.csv`` file with a header, one column of labels, and numbers
            in every other column.
        labels: File with the labels when ``source`` has none: ``.npy``, or a text or csv file.
        label_column: Name of the label column or label tensor.
        task_labels: File with the task labels, read like ``labels``.
        task_column: Column or tensor with the task labels (in ``task_labels``, when that is
            given); in a csv file it is never taken for a feature.
        need_labels: Whether to fail when there are no labels.

    Returns:
        The vectors, in the file's own floating type (csv: float64).

    Raises:
        FormatError: If the file is not what its name says.
        ShapeError: If there are not as many labels as vectors.
    """
    path = _existing(source)
    required = need_labels and labels is None
    task = task_column if need_labels and task_labels is None else None
    match path.suffix.lower():
        case ".npy":
            found = Vectors(_vectors(_load_npy(path), path), None)
            if task is not None:
                raise ValueError(
                    f"{path} has no columns; name a file of task labels with --task-labels"
                )
        case ".safetensors":
            found = _read_safetensors(path, label_column, task, required=required)
        case ".csv":
            found = _read_csv_vectors(path, label_column, task, task_column, required=required)
        case suffix:
            raise FormatError(
                f"{path}: vectors cannot be read from a {suffix or 'suffixless'} file; "
                f"allowed: {', '.join(VECTOR_SUFFIXES)}. For texts, name a model with --model."
            )
    z, y = found.z, found.y
    if labels is not None:
        z = read_labels(labels, label_column=label_column)
    if task_labels is not None:
        y = read_labels(task_labels, label_column=task_column or "label")
    if z is None and need_labels:
        raise ValueError(f"{path} holds no labels; name a file that does with --labels")
    for values, what, file in ((z, "labels", labels), (y, "task labels", task_labels)):
        if values is not None and len(values) != len(found.x):
            raise ShapeError(
                f"{len(found.x)} vectors in {path} but {len(values)} {what}"
                f"{' in ' + file if file else ''}; there must be one a vector"
            )
    return Vectors(found.x, z, y)


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


class Texts(Sequence[str]):
    """Texts that are read from their source whenever they are asked for.

    Making one reads the source once, to count the texts and to keep their labels. Slices are
    cheapest in order, which is how a model is fed.

    Attributes:
        source: What the texts were named as.
        z: Their labels.
        y: The labels of a task, or None.
    """

    def __init__(
        self,
        source: str,
        rows: Callable[[], Iterator[Mapping[str, object]]],
        *,
        text_column: str,
        label_column: str,
        task_column: str | None = None,
        continuous: bool = False,
        continuous_task: bool = False,
        limit: int | None = None,
    ) -> None:
        self.source, self._rows, self._text, self._limit = source, rows, text_column, limit
        if limit is not None and limit < 1:
            raise ValueError(f"--limit must be at least 1; got {limit}")
        columns = [label_column] if task_column is None else [label_column, task_column]
        kinds = (continuous, continuous_task)[: len(columns)]
        builders = [
            _ColumnBuilder(column, continuous=kind)
            for column, kind in zip(columns, kinds, strict=True)
        ]
        self._length = 0
        for number, row in enumerate(islice(rows(), limit), start=1):
            for column in (text_column, *columns):
                if row.get(column) is None:
                    raise ValueError(
                        f"{source}, row {number} has nothing in column {column!r}; it has: "
                        f"{', '.join(map(repr, row))}. Name the columns with --text-column, "
                        "--label-column and --task-column."
                    )
            for column, builder in zip(columns, builders, strict=True):
                builder.add(str(row[column]))
            self._length = number
        if not self._length:
            raise ValueError(f"{source} holds no texts")
        self.z, self.y = builders[0].build(), builders[1].build() if len(builders) > 1 else None
        self._reader, self._position = self._open(), 0

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, int):
            if not -self._length <= index < self._length:
                raise IndexError(f"text {index} of {self._length}")
            return self._read(index % self._length, 1)[0]
        start, stop, step = index.indices(self._length)
        if step != 1:
            return [self[i] for i in range(start, stop, step)]
        return self._read(start, max(0, stop - start))

    def _read(self, start: int, count: int) -> list[str]:
        if start < self._position:
            self._reader, self._position = self._open(), 0
        found = list(islice(self._reader, start - self._position, start - self._position + count))
        self._position = start + len(found)
        if len(found) != count:
            raise ValueError(f"{self.source} became shorter while it was read")
        return found

    def _open(self) -> Iterator[str]:
        return (str(row[self._text]) for row in islice(self._rows(), self._limit))


class _ColumnBuilder:
    """Collects labels, eight bytes each."""

    def __init__(self, name: str, *, continuous: bool) -> None:
        self._name, self._continuous = name, continuous
        self._numbers: array[float] = array("d")
        self._codes: array[int] = array("q")
        self._index: dict[str, int] = {}

    def add(self, label: str) -> None:
        """Take one label.

        Raises:
            ValueError: If it has to be a number and is not.
        """
        if not self._continuous:
            self._codes.append(self._index.setdefault(label, len(self._index)))
            return
        try:
            self._numbers.append(float(label))
        except ValueError:
            raise ValueError(
                f"column {self._name!r} holds {label!r}; continuous labels must be numbers"
            ) from None

    def build(self) -> Column:
        """Return the labels; classes are in the order of their names."""
        if self._continuous:
            return Column(torch.from_numpy(np.array(self._numbers, dtype=np.float64)))
        names = tuple(sorted(self._index))
        order = np.empty(len(names), dtype=np.int64)
        for place, name in enumerate(names):
            order[self._index[name]] = place
        return Column(torch.from_numpy(order[np.array(self._codes, dtype=np.int64)]), names)


def open_texts(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    task_column: str | None = None,
    continuous: bool = False,
    continuous_task: bool = False,
    split: str = "train",
    limit: int | None = None,
) -> Texts:
    """Open labelled texts: ``.jsonl``, ``.csv``, or a data set of the ``datasets`` library.

    Args:
        source: File, folder written by ``save_to_disk``, or a name that ``load_dataset`` takes.
        text_column: Column or key of the text.
        label_column: Column or key of the label.
        task_column: Column or key of the task's label.
        continuous: Read labels as numbers rather than classes.
        continuous_task: Likewise for the task's.
        split: Split of a data set; ignored for files.
        limit: Read at most so many rows.

    Raises:
        ValueError: If a column is missing (the message lists those there are), a number is none,
            or nothing is found.
        FileNotFoundError: If a file does not exist.
    """
    path = Path(source)
    rows: Callable[[], Iterator[Mapping[str, object]]]
    if path.suffix.lower() in TEXT_SUFFIXES and not path.is_dir():
        file = _existing(source)
        read = _jsonl_rows if path.suffix.lower() == ".jsonl" else _csv_mappings

        def rows() -> Iterator[Mapping[str, object]]:
            return read(file)

    elif path.suffix and path.is_file():
        raise FormatError(f"{path}: texts are read from {', '.join(TEXT_SUFFIXES)} files")
    else:
        rows = _dataset_rows(source, split)
    return Texts(
        source,
        rows,
        text_column=text_column,
        label_column=label_column,
        task_column=task_column,
        continuous=continuous,
        continuous_task=continuous_task,
        limit=limit,
    )


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


def _read_safetensors(
    path: Path, label_column: str, task: str | None, *, required: bool
) -> Vectors:
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
    if task is not None and task not in tensors:
        raise ValueError(f"{path} has no tensor {task!r} for --task-column; its tensors: {names}")
    return Vectors(tensors["x"], tensors.get(name), None if task is None else tensors[task])


def _read_csv_vectors(
    path: Path, label_column: str, task: str | None, excluded: str | None, *, required: bool
) -> Vectors:
    """Read vectors; the column ``excluded`` is not a feature, and ``task`` holds task labels."""
    header, rows = _csv_rows(path)
    column = _column(header, label_column, path) if required or label_column in header else None
    task_at = None if task is None else _column(header, task, path, "task")
    features = [i for i, name in enumerate(header) if i != column and name != excluded]
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
    y = None if task_at is None else [row[task_at] for row in rows]
    return Vectors(torch.tensor(values, dtype=torch.float64), labels, y)


def _csv_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    header, *rows = _csv_lines(path)
    return header, rows


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """Yield the header, then rows of as many fields, one at a time."""
    header: list[str] = []
    number = 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for number, row in enumerate(filter(None, csv.reader(file)), start=1):
                header = header or row
                if len(row) != len(header):
                    raise FormatError(
                        f"{path}, row {number} has {len(row)} fields; the header has {len(header)}"
                    )
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise FormatError(f"{path} is not a csv file: {error}") from None
    if number < 2:
        raise FormatError(f"{path} needs a header and at least one row")


def _csv_mappings(path: Path) -> Iterator[Mapping[str, object]]:
    lines = _csv_lines(path)
    header = next(lines)
    return (dict(zip(header, row, strict=True)) for row in lines)


def _column(header: Sequence[str], name: str, path: Path, what: str = "label") -> int:
    if name not in header:
        shown = ", ".join(map(repr, header[:12])) + (", …" if len(header) > 12 else "")
        raise ValueError(
            f"{path} has no {what} column {name!r}; its columns: {shown}. "
            f"Name one with --{what}-column."
        )
    return header.index(name)


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, object]]:
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


def _dataset_rows(name: str, split: str) -> Callable[[], Iterator[Mapping[str, object]]]:
    """Open a data set once; its rows stay on disk and can be read many times."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "llm") from None
    folder = Path(name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a {' or '.join(TEXT_SUFFIXES)} file nor a data set whose split "
            f"{split!r} can be loaded ({type(error).__name__}: {error})"
        ) from None
    return lambda: cast("Iterator[Mapping[str, object]]", iter(data))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
