"""Read what the command line is given: vectors with labels, or labelled texts.

Vectors come from ``.npy``, ``.safetensors`` or ``.csv`` files, texts from ``.jsonl`` or ``.csv``
files or from a data set of the ``datasets`` library. Nothing is ever unpickled. Texts stay where
they are and are read again when needed; of each text only the label is kept, in eight bytes.
"""

from __future__ import annotations

import csv
import json
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from concept_erasure.collect import Fitter, Representations, Tokens, collect, fit_streaming, take
from concept_erasure.errors import FormatError, ShapeError, missing_extra
from concept_erasure.labels import LabelKind
from concept_erasure.sites import find_sites, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Column",
    "Data",
    "ModelSource",
    "Texts",
    "VectorSource",
    "load_model",
    "open_texts",
    "read_labels",
    "write_vectors",
]

F = TypeVar("F", bound=Fitter)
Values = Tensor | list[str]

VECTOR_SUFFIXES = (".npy", ".safetensors", ".csv")
TEXT_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Data:
    """Representations with their labels and, where a task is to be kept, its ``n`` labels ``y``."""

    x: Representations
    y: Values | None = None


@dataclass(frozen=True)
class Column:
    """``n`` labels: class numbers ``(n,)`` int64 with names, or numbers ``(n,)`` or ``(n, c)``."""

    values: Tensor
    names: tuple[str, ...] = ()

    def plain(self) -> Values:
        """Return the labels as they were read: a list of names, or numbers."""
        return [self.names[i] for i in self.values.tolist()] if self.names else self.values


@dataclass(frozen=True)
class VectorSource:
    """A file of vectors.

    Attributes:
        source: A ``.npy`` array of shape ``(n, d)``; a ``.safetensors`` file with a tensor ``x``
            and a label tensor; or a ``.csv`` file with a header, one column of labels, and numbers
            in every other column.
        labels: File with the labels when ``source`` has none: ``.npy``, or a text or csv file.
        label_column: Name of the label column or label tensor.
        task_labels: File with the task labels, read like ``labels``.
        task_column: Column or tensor with the task labels (in ``task_labels``, when that is
            given); in a csv file it is never taken for a feature.
    """

    source: str
    labels: str | None = None
    label_column: str = "label"
    task_labels: str | None = None
    task_column: str | None = None

    def held_out(self, source: str) -> VectorSource:
        """Return the source of other vectors, which hold their labels themselves."""
        if Path(source).suffix.lower() == ".npy":
            raise ValueError(f"--held-out {source} has no labels; name a .safetensors or .csv file")
        return replace(self, source=source, labels=None, task_labels=None)

    def read(
        self, kind: LabelKind = "auto", task_kind: LabelKind = "auto", *, need_labels: bool = True
    ) -> dict[str, Data]:
        """Return the vectors, in the file's own floating type (csv: float64), under the name ``""``.

        Args:
            kind: How labels are read, see `read_labels`.
            task_kind: Likewise the task's.
            need_labels: Whether to read labels and to fail when there are none.

        Raises:
            FormatError: If the file is not what its name says.
            ShapeError: If there are not as many labels as vectors.
            ValueError: If a label is missing or is not of the kind.
        """
        path = _existing(self.source)
        x, z, y = self._contents(path, need_labels=need_labels)
        if not need_labels:
            return {"": Data(Representations(x))}
        if self.labels is not None:
            z = _raw_labels(self.labels, self.label_column)
        if self.task_labels is not None:
            y = _raw_labels(self.task_labels, self.task_column or "label")
        if z is None:
            raise ValueError(f"{path} holds no labels; name a file that does with --labels")
        for values, what, file in (
            (z, "labels", self.labels),
            (y, "task labels", self.task_labels),
        ):
            if values is not None and len(values) != len(x):
                raise ShapeError(
                    f"{len(x)} vectors in {path} but {len(values)} {what}"
                    f"{' in ' + file if file else ''}; there must be one a vector"
                )
        labels = _column_of(z, self.labels or self.source, kind).plain()
        task = None if y is None else _column_of(y, self.task_labels or self.source, task_kind)
        return {"": Data(Representations(x, labels), None if task is None else task.plain())}

    def _contents(
        self, path: Path, *, need_labels: bool
    ) -> tuple[Tensor, Values | None, Values | None]:
        """Return what the file itself holds: vectors, labels and task labels."""
        required = need_labels and self.labels is None
        task = self.task_column if need_labels and self.task_labels is None else None
        match path.suffix.lower():
            case ".npy":
                if task is not None:
                    raise ValueError(
                        f"{path} has no columns; name a file of task labels with --task-labels"
                    )
                return _vectors(_load_npy(path), path), None, None
            case ".safetensors":
                return _read_safetensors(path, self.label_column, task, required=required)
            case ".csv":
                return _read_csv_vectors(
                    path, self.label_column, task, self.task_column, required=required
                )
            case suffix:
                raise FormatError(
                    f"{path}: vectors cannot be read from a {suffix or 'suffixless'} file; "
                    f"allowed: {', '.join(VECTOR_SUFFIXES)}. For texts, name a model with --model."
                )


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The representations of labelled texts in a model, which is loaded when first needed.

    Attributes:
        source: The texts, see `open_texts`, which the columns, split and limit are for.
        model: Folder or hub id.
        gguf_file: File inside it.
        device: Device of the model.
        sites: Names and patterns; none is the middle residual.
        tokens: Which tokens' representations.
        batch_size: Texts in one forward pass.
        max_length: Cut texts after so many tokens.
    """

    source: str
    model: str
    gguf_file: str | None = None
    device: str | None = None
    sites: tuple[str, ...] = ()
    tokens: Tokens = "last"
    text_column: str = "text"
    label_column: str = "label"
    task_column: str | None = None
    split: str | None = None
    limit: int | None = None
    batch_size: int = 32
    max_length: int | None = None

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return load_model(self.model, self.gguf_file, self.device)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the sites."""
        model, _ = self.loaded
        if self.sites:
            return tuple(site.name for site in resolve(model, self.sites))
        residual = [name for name, site in find_sites(model).items() if site.kind == "residual"]
        if not residual:
            raise ValueError("the model has no residual stream that is known by name; give --sites")
        return (residual[len(residual) // 2],)

    def texts(self, kind: LabelKind = "auto", task_kind: LabelKind = "auto") -> Texts:
        """Open the texts; labels are read as `read_labels` does."""
        return open_texts(
            self.source,
            text_column=self.text_column,
            label_column=self.label_column,
            task_column=self.task_column,
            kind=kind,
            task_kind=task_kind,
            split=self.split,
            limit=self.limit,
        )

    def held_out(self, source: str) -> ModelSource:
        """Return the source of all other texts, at the same sites of the same loaded model."""
        other = replace(self, source=source, split=None, limit=None)
        other.__dict__["loaded"] = self.loaded
        return other

    def read(self, kind: LabelKind = "auto", task_kind: LabelKind = "auto") -> dict[str, Data]:
        """Return the representations of all texts by site; all are held in memory.

        Raises:
            ValueError: If texts or labels cannot be read.
            LookupError: If a site does not exist.
        """
        texts = self.texts(kind, task_kind)
        found = collect(
            *self.loaded,
            texts,
            texts.z.plain(),
            sites=self.names,
            tokens=self.tokens,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        y = None if texts.y is None else texts.y.plain()
        return {
            site: Data(x, y if y is None or x.rows is None else cast("Values", take(y, x.rows)))
            for site, x in found.items()
        }

    def stream(self, texts: Texts, fitter: Callable[[int], F], *, background: bool) -> dict[str, F]:
        """Feed a fitter a site in one pass; one batch of texts and vectors is in memory at a time."""
        return fit_streaming(
            *self.loaded,
            texts,
            texts.z.plain(),
            sites=self.names,
            fitter=fitter,
            tokens=self.tokens,
            background=background,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )


def load_model(
    name: str, gguf_file: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (causal where it can be) and its tokenizer."""
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "llm") from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or ())
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = loader.from_pretrained(name, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if device is None else model.to(device)), tokenizer


def read_labels(source: str, *, label_column: str = "label", kind: LabelKind = "auto") -> Values:
    """Read labels from ``.npy``, a ``.csv`` column, or a text file with one label a line.

    Args:
        source: The file.
        label_column: Column of a csv file.
        kind: Numbers in arrays stay what they are. Text is read as classes, or as numbers if
            ``"continuous"``, or by default if all of it is numbers and some are fractions.

    Raises:
        FormatError: If the file cannot be read as labels.
        ValueError: If a csv file lacks the column, a label is missing, or has to be a number and is
            not; the message names the row.
    """
    return _column_of(_raw_labels(source, label_column), source, kind).plain()


def _raw_labels(source: str, label_column: str) -> Values:
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
    return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]


def _column_of(values: Iterable[str] | Tensor, source: str, kind: LabelKind) -> Column:
    """Check labels and bring them into the form of their kind."""
    if not isinstance(values, Tensor):
        builder = _ColumnBuilder(source, "label", kind)
        for value in values:
            builder.add(value)
        return builder.build()
    if values.is_floating_point() and len(bad := (~torch.isfinite(values)).nonzero()):
        row = int(bad[0, 0]) + 1
        raise _missing(source, row, f"label {values[row - 1].tolist()}")
    return Column(values)


def _missing(source: str, row: int, what: str) -> ValueError:
    return ValueError(
        f"{source}, row {row} has the {what}; every row needs one, so drop or fill such rows "
        "(rows are counted from 1, without a header)"
    )


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
        kind: LabelKind = "auto",
        task_kind: LabelKind = "auto",
        limit: int | None = None,
    ) -> None:
        self.source, self._rows, self._text, self._limit = source, rows, text_column, limit
        if limit is not None and limit < 1:
            raise ValueError(f"--limit must be at least 1; got {limit}")
        columns = [label_column] if task_column is None else [label_column, task_column]
        builders = [
            _ColumnBuilder(source, f"{column!r}", of)
            for column, of in zip(columns, (kind, task_kind), strict=False)
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
    """Collects labels, eight bytes each (and the names of the classes)."""

    def __init__(self, source: str, name: str, kind: LabelKind) -> None:
        self._source, self._name, self._kind = source, name, kind
        self._numbers: array[float] = array("d")
        self._codes: array[int] = array("q")
        self._index: dict[str, int] = {}

    def add(self, label: str) -> None:
        """Take one label.

        Raises:
            ValueError: If it is missing, or has to be a number and is not.
        """
        row = len(self._codes) + len(self._numbers) + 1
        if label.strip().lower() in ("", "nan"):
            raise _missing(self._source, row, f"{self._name} {label!r}")
        if self._kind != "continuous":
            self._codes.append(self._index.setdefault(label, len(self._index)))
        elif _is_number(label):
            self._numbers.append(float(label))
        else:
            raise ValueError(
                f"{self._source}, row {row} has the {self._name} {label!r}; "
                "continuous labels must be numbers"
            )

    def build(self) -> Column:
        """Return the labels; classes are in the order of their names."""
        if self._kind == "continuous":
            return Column(torch.from_numpy(np.array(self._numbers, dtype=np.float64)))
        codes = np.array(self._codes, dtype=np.int64)
        if self._kind == "auto" and all(map(_is_number, self._index)):
            numbers = np.array([float(name) for name in self._index], dtype=np.float64)
            if (numbers != np.round(numbers)).any():
                return Column(torch.from_numpy(numbers[codes]))
        names = tuple(sorted(self._index))
        order = np.empty(len(names), dtype=np.int64)
        for place, name in enumerate(names):
            order[self._index[name]] = place
        return Column(torch.from_numpy(order[codes]), names)


def open_texts(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    task_column: str | None = None,
    kind: LabelKind = "auto",
    task_kind: LabelKind = "auto",
    split: str | None = None,
    limit: int | None = None,
) -> Texts:
    """Open labelled texts: ``.jsonl``, ``.csv``, or a data set of the ``datasets`` library.

    Args:
        source: File, folder written by ``save_to_disk``, or a name that ``load_dataset`` takes.
        text_column: Column or key of the text.
        label_column: Column or key of the label.
        task_column: Column or key of the task's label.
        kind: How labels are read, see `read_labels`.
        task_kind: Likewise for the task's.
        split: Split of a data set, by default ``train``.
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
        if split is not None:
            raise ValueError(f"--split {split} is for data sets; {source} is a file")
        read = _jsonl_rows if path.suffix.lower() == ".jsonl" else _csv_mappings

        def rows() -> Iterator[Mapping[str, object]]:
            return read(file)

    elif path.suffix and path.is_file():
        raise FormatError(f"{path}: texts are read from {', '.join(TEXT_SUFFIXES)} files")
    else:
        rows = _dataset_rows(source, "train" if split is None else split)
    return Texts(
        source,
        rows,
        text_column=text_column,
        label_column=label_column,
        task_column=task_column,
        kind=kind,
        task_kind=task_kind,
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
    return tensors["x"], tensors.get(name), None if task is None else tensors[task]


def _read_csv_vectors(
    path: Path, label_column: str, task: str | None, excluded: str | None, *, required: bool
) -> tuple[Tensor, list[str] | None, list[str] | None]:
    """Read vectors; the column ``excluded`` is not a feature, and ``task`` holds task labels."""
    header, rows = _csv_rows(path)
    column = _column(header, label_column, path) if required or label_column in header else None
    task_at = None if task is None else _column(header, task, path, "task")
    features = [i for i, name in enumerate(header) if i != column and name != excluded]
    values = []
    for number, row in enumerate(rows, start=1):
        try:
            values.append([float(row[index]) for index in features])
        except ValueError:
            bad = next(index for index in features if not _is_number(row[index]))
            raise FormatError(
                f"{path}, row {number}: column {header[bad]!r} holds {row[bad]!r}, not a number; "
                "every column but the label's must be numeric"
            ) from None
    if not values or not features:
        raise FormatError(f"{path} holds no vectors")
    labels = None if column is None else [row[column] for row in rows]
    y = None if task_at is None else [row[task_at] for row in rows]
    return torch.tensor(values, dtype=torch.float64), labels, y


def _csv_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    header, *rows = _csv_lines(path)
    return header, rows


def _csv_lines(path: Path) -> Iterator[list[str]]:
    """Yield the header, then rows of as many fields, one at a time."""
    header: list[str] = []
    number = -1  # of the row; the header is row 0
    blank = 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for row in csv.reader(file):
                if not row:
                    blank += 1
                    continue
                # in a file of one column an empty line is an empty field, unless it is the last
                for _ in range(blank if len(header) == 1 else 0):
                    number += 1
                    yield [""]
                blank, number = 0, number + 1
                header = header or row
                if len(row) != len(header):
                    raise FormatError(
                        f"{path}, row {number} has {len(row)} fields; the header has {len(header)}"
                    )
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise FormatError(f"{path} is not a csv file: {error}") from None
    if number < 1:
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
