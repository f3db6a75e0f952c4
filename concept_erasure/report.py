"""Report: what was measured, with intervals, what it was measured on, and what was not tried.

A report is a table (rows of named cells), a small record of how the numbers came about, and notes;
it may hold further reports as sections. It is saved as JSON for programs and as Markdown for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from concept_erasure.errors import FormatError

if TYPE_CHECKING:
    from concept_erasure.eraser import Eraser
    from concept_erasure.registry import Method

__all__ = [
    "LANGUAGE_TESTS",
    "Cell",
    "Interval",
    "Report",
    "erasure_card",
    "format_cell",
    "with_evaluation",
]

E = TypeVar("E", bound="Eraser")

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Interval:
    """A number with the bounds of its confidence interval.

    Args:
        value: The estimate.
        low: Lower bound, at most ``value``.
        high: Upper bound, at least ``value``.
        level: Coverage of the interval, between 0 and 1.

    Raises:
        ValueError: If the bounds do not enclose the value or the level is outside (0, 1).

    Example:
        >>> str(Interval(0.5, 0.45, 0.55))
        '0.500 [0.450, 0.550]'
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __post_init__(self) -> None:
        """Check that the interval is one."""
        slack = 1e-9 * max(1.0, abs(self.value))
        if not (self.low - slack <= self.value <= self.high + slack):
            raise ValueError(
                f"an interval needs low <= value <= high, got {self.low} <= {self.value} <= "
                f"{self.high}; pass the bounds in this order"
            )
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}; try 0.95")

    @classmethod
    def of_mean(cls, values: Sequence[float], *, level: float = 0.95) -> Interval:
        """Return the mean of independent values with its normal interval.

        Args:
            values: At least two finite numbers.
            level: Coverage; raising it widens the interval.

        Returns:
            The interval ``mean +/- q * standard error``.

        Raises:
            ValueError: If there are fewer than two values.
        """
        from statistics import NormalDist, fmean, stdev

        if len(values) < 2:
            raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
        mean = fmean(values)
        half = NormalDist().inv_cdf(0.5 + level / 2) * stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, level)

    def __str__(self) -> str:
        """Return ``value [low, high]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        """Return the four numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}


Cell = str | int | float | bool | Interval | None


def format_cell(cell: Cell) -> str:
    """Return a cell as it is shown in a table.

    Args:
        cell: A text, number, truth value, interval or ``None``.

    Returns:
        The text; ``-`` for ``None``, three significant decimals for floats, bars escaped.
    """
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        small = cell != 0 and math.isfinite(cell) and not 1e-3 <= abs(cell) < 1e5
        return f"{cell:.2e}" if small else f"{cell:.3f}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _plain(value: object) -> object:
    """Return ``value`` in types JSON knows; numbers that are not finite become texts."""
    if isinstance(value, Interval):
        return _plain(value.to_dict())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(
        f"a report holds texts, numbers, intervals, lists and mappings, got "
        f"{type(value).__name__}; convert tensors with .item() or .tolist()"
    )


def _interval(value: object) -> Cell:
    """Return the cell that :func:`_plain` wrote."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    found = _mapping(value, "a cell")
    try:
        numbers = [float(str(found[key])) for key in ("value", "low", "high", "level")]
        return Interval(*numbers)
    except (KeyError, ValueError) as error:
        raise FormatError(f"a cell of a report holds {value!r}, not an interval") from error


def _list(data: Mapping[str, object], key: str) -> list[object]:
    value = data.get(key)
    if not isinstance(value, list):
        raise FormatError(f"{key} of a report must be a list, got {type(value).__name__}")
    return value


def _mapping(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise FormatError(f"{name} of a report must be a mapping, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Report:
    """A titled table with a record of how it came about.

    Args:
        title: Heading.
        rows: Cells by column name; rows may have different columns.
        meta: How the numbers came about: model, data, seed, hardware, versions, seconds.
        notes: Sentences below the table, among them what was *not* tried.
        sections: Further reports shown below this one.
        images: Caption to path of a picture, relative to the folder of the report.

    Example:
        >>> rows = [{"probe": "linear", "before": 0.9, "after": 0.5}]
        >>> print(Report("Probes", rows).to_markdown())
        # Probes
        <BLANKLINE>
        | probe | before | after |
        |---|---|---|
        | linear | 0.900 | 0.500 |
        <BLANKLINE>
    """

    title: str
    rows: Sequence[Mapping[str, Cell]] = ()
    meta: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sections: Sequence[Report] = ()
    images: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep copies, so that reports with the same content are equal."""
        object.__setattr__(self, "rows", tuple(dict(row) for row in self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "sections", tuple(self.sections))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column name, in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def to_table(self) -> str:
        """Return the rows as a Markdown table, without heading; empty if there are no rows."""
        if not self.rows:
            return ""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        body = [
            f"| {' | '.join(format_cell(row.get(name)) for name in self.columns)} |"
            for row in self.rows
        ]
        return "\n".join(head + body)

    def to_markdown(self, *, level: int = 1) -> str:
        """Return the whole report as Markdown.

        Args:
            level: Depth of the heading, 1 is the largest.

        Returns:
            Heading, table, notes, pictures, record and sections, ending in a newline.
        """
        parts = [f"{'#' * level} {self.title}", self.to_table()]
        parts.append("\n".join(f"- {note}" for note in self.notes))
        parts.extend(f"![{caption}]({path})" for caption, path in self.images.items())
        parts.extend(section.to_markdown(level=level + 1).rstrip() for section in self.sections)
        record = _lines(self.meta)
        if record:
            parts.append(f"{'#' * (level + 1)} How these numbers came about\n\n{record}")
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_dict(self) -> dict[str, object]:
        """Return the report in types JSON knows.

        Raises:
            TypeError: If a cell or a record holds something else.
        """
        return {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "rows": _plain(list(self.rows)),
            "meta": _plain(self.meta),
            "notes": _plain(list(self.notes)),
            "images": _plain(self.images),
            "sections": [section.to_dict() for section in self.sections],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Report:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            FormatError: If the mapping is not a report or its format is newer than this library.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"this library reads reports of format {FORMAT_VERSION}, got {version!r}; "
                "upgrade the library or write the report again"
            )
        rows, sections, notes = (_list(data, key) for key in ("rows", "sections", "notes"))
        meta, images = (_mapping(data.get(key), key) for key in ("meta", "images"))
        return cls(
            title=str(data.get("title", "")),
            rows=[
                {key: _interval(cell) for key, cell in _mapping(row, "a row").items()}
                for row in rows
            ],
            meta=meta,
            notes=[str(note) for note in notes],
            sections=[cls.from_dict(_mapping(section, "a section")) for section in sections],
            images={key: str(value) for key, value in images.items()},
        )

    def save(self, folder: str | Path, *, name: str = "report") -> tuple[Path, Path]:
        """Write ``{name}.json`` and ``{name}.md`` into a folder, made if needed.

        Args:
            folder: Where to write.
            name: File name without its ending.

        Returns:
            The paths of the JSON and of the Markdown file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            folder / f"{name}.json": json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            + "\n",
            folder / f"{name}.md": self.to_markdown(),
        }
        for path, text in texts.items():
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        json_path, markdown_path = texts
        return json_path, markdown_path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report written by :meth:`save`, from its folder or its JSON file.

        Raises:
            FormatError: If the file is not a report.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FormatError(
                f"{path.name} is not JSON ({error}); write it with Report.save"
            ) from error
        if not isinstance(data, dict):
            raise FormatError(f"{path.name} holds a {type(data).__name__}, not a report")
        return cls.from_dict(data)


def _meta_text(value: object) -> str:
    """Return a value of a record as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_meta_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_meta_text(item) for item in value)
    if value is None or isinstance(value, (str, int, float, bool, Interval)):
        return format_cell(value)
    return str(value)


NOT_TRIED = (
    "Only what stands under *Measured* was measured. Not tried, unless listed there: probes that "
    "are not linear, relearning, rewording, other tokens and other layers, attacks with access to "
    "the weights. A concept that no linear probe reads may still be known to the model."
)

LANGUAGE_TESTS: dict[str, str] = {
    "concept": "questions about the concept (cloze, whole answer, letter, backwards)",
    "specificity": "near neighbours, far controls, and the divergence on neutral text",
    "leak": "sampling answers (leak rate)",
    "fluency": "fluency of what the model writes about the concept (reverse perplexity)",
    "probes": "probes of every layer",
    "relearn": "relearning by fine-tuning, on texts of the concept and on unrelated ones",
    "soft_prompt": "a trained soft prompt (white box)",
    "gcg": "GCG suffixes (white box)",
    "beast": "BEAST suffixes",
    "ablation": "directional ablation (white box)",
    "quantise": "quantisation to 8 and 4 bits",
    "rewording": "few-shot prompts and rewordings",
    "harness": "public benchmarks (lm-eval)",
    "languages": "other languages",
    "tools": "long contexts, retrieval and tools that bring the concept back in",
    "full": "full fine-tuning and training from a merged checkpoint",
}
"""What an erasure from a language model may be tested with, in words; `concept_erasure.evals.language` runs most."""

_LANGUAGE_USE = (
    "- Intended: to study what a model does without a concept, and to lower how readily it is expressed.\n"
    "- Not intended: to correct facts (nothing new is written; use retrieval with attribution for that), to meet a "
    "legal duty to delete, or to keep a hazard from people who have the weights (use access control).\n"
    "- The edit is a file beside the model and can be undone; merged weights no longer tell what was changed, so keep "
    "this card with them."
)


def with_evaluation(eraser: E, evaluation: Report) -> E:
    """Return the eraser with an evaluation in its record, so that its card shows it and saving keeps it.

    Args:
        eraser: Any fitted eraser.
        evaluation: What `concept_erasure.evals.language.evaluate` returned; its sections are left out.
    """
    meta = {**evaluation.meta, "columns": list(evaluation.columns)}  # files sort the keys of a row
    kept = Report(evaluation.title, evaluation.rows, meta, evaluation.notes)
    return eraser._same_as(replace(eraser, report={**eraser.report, "evaluation": kept.to_dict()}))


def erasure_card(eraser: Eraser, evaluation: Report | None = None) -> str:
    """Return the Markdown card of an eraser: what was fitted and measured, what was not tried.

    The card of an eraser for language models lists the tests by name: those that were run, with their budgets, and
    those that were not.

    Args:
        eraser: Any fitted eraser.
        evaluation: What `concept_erasure.evals.language.evaluate` returned; default: what `with_evaluation` put
            into the eraser's record.

    Returns:
        The text, beginning with the header that the Hugging Face hub reads.
    """
    entry = _entry(eraser)
    header = [
        "---",
        "library_name: deconcept",
        "tags:",
        "- concept-erasure",
        f"- {eraser.method}",
        "---",
    ]
    promised = [
        f"- {name.replace('_', ' ')}: {text}"
        for name, text in ({} if entry is None else _promises(entry)).items()
    ]
    language = entry is not None and entry.family in {"language", "sae"}
    held = {key: value for key, value in eraser.report.items() if key not in _LONG}
    sections = {
        "Fitted": _lines(_fitted(eraser, entry)),
        "Options": _lines(asdict(eraser.config)),
        "Guarantees on the data of the fit": "\n".join(promised),
        "Measured": _lines(held),
        **(_language_sections(eraser, evaluation) if language else {"Not tried": NOT_TRIED}),
        "Use": "```python\nfrom concept_erasure import Eraser\n\n"
        'eraser = Eraser.from_pretrained("path/to/this/folder")\n```',
    }
    body = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n".join(header) + f"\n\n# Eraser: {eraser.method}\n\n" + "\n\n".join(body) + "\n"


_LONG = ("history", "evaluation")  # of a record: not for a list


def _entry(eraser: Eraser) -> Method | None:
    from concept_erasure import registry

    try:
        return registry.get(eraser.method)
    except KeyError:
        return None


def _promises(entry: Method) -> dict[str, str]:
    from concept_erasure.registry import GUARANTEES

    return {name: GUARANTEES.get(name, "") for name in sorted(entry.guarantees)}


def _fitted(eraser: Eraser, entry: Method | None) -> dict[str, object]:
    """Return what was fitted, and on what."""
    space = eraser.space
    fitted: dict[str, object] = {"method": eraser.method}
    if entry is not None:
        fitted |= {"what it does": entry.summary, "paper": entry.paper}
    if space is None:
        fitted["fitted on"] = "bare vectors; say `sites=` when it is put into a model"
    else:
        fitted |= {
            "model": space.model,
            "weights": space.fingerprint[:12],
            "site": space.site,
            "tokens": space.tokens,
            "width": space.width,
        }
    tensors = eraser.tensors()
    fitted["tensors"] = [f"{name} {list(t.shape)}" for name, t in tensors.items()]
    if len(tensors) > _MANY:
        numbers = sum(tensor.numel() for tensor in tensors.values())
        fitted["tensors"] = f"{len(tensors)}, {numbers:,} numbers"
    return fitted


_MANY = 8  # tensors that are listed one by one


def _held_evaluation(eraser: Eraser) -> Report | None:
    """Return what `with_evaluation` put into the record."""
    held = eraser.report.get("evaluation")
    if not isinstance(held, Mapping):
        return None
    found = Report.from_dict(held)
    columns = [str(name) for name in _list(found.meta, "columns")]
    rows = [{name: row[name] for name in columns if name in row} for row in found.rows]
    return replace(found, rows=rows)


def _language_sections(eraser: Eraser, evaluation: Report | None) -> dict[str, str]:
    """Return what was tried and what was not, test by test."""
    evaluation = evaluation or _held_evaluation(eraser)
    found = {} if evaluation is None else evaluation.meta.get("tried", {})
    tried = {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}
    missing = [f"- {words}" for name, words in LANGUAGE_TESTS.items() if name not in tried]
    made = {"Evaluated": "Nothing was evaluated after the fit."}
    if evaluation is not None:
        notes = "\n".join(
            f"- {note}" for note in evaluation.notes if not note.startswith("Not tried")
        )
        made["Evaluated"] = "\n\n".join(part for part in (evaluation.to_table(), notes) if part)
        budgets = {LANGUAGE_TESTS.get(name, name): words for name, words in tried.items()}
        made["Tried, with budgets"] = _lines(budgets)
        curves = evaluation.meta.get("curves")
        if isinstance(curves, Mapping) and curves:
            made["Relearning curves"] = _lines(curves)
    made["Not tried"] = "\n".join(missing)
    made["Intended use"] = _LANGUAGE_USE
    return made


def _lines(record: Mapping[str, object]) -> str:
    """Return a record as a Markdown list."""
    return "\n".join(f"- {key}: {_meta_text(value)}" for key, value in record.items())
