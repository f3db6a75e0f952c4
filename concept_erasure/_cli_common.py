"""What the commands share: speaking, flags, which option belongs to which kind of model, options of a fit."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from concept_erasure import registry
from concept_erasure.errors import FormatError

if TYPE_CHECKING:
    from concept_erasure.eraser import Eraser

__all__ = [
    "MODES",
    "announce",
    "check_options",
    "comma_names",
    "family_of",
    "flag",
    "load_eraser",
    "names_from",
    "refuse_idle",
    "say",
    "short",
]

MODES = {
    "vectors": "vectors",
    "texts": "texts in a model (--model)",
    "concept": "a concept in a language model (--concept)",
    "pipe": "a text-to-image pipeline (--pipe)",
}
CONCEPT_FAMILIES = ("language", "sae")


def say(text: str = "") -> None:
    """Write a line to standard output, the command line's only way to speak."""
    sys.stdout.write(f"{text}\n")


def flag(name: str) -> str:
    """Return an option as it is typed."""
    return name.upper() if name == "source" else f"--{name.replace('_', '-')}"


def short(value: object) -> str:
    """Show a report's value in few characters."""
    if isinstance(value, list | tuple | Mapping) and len(value) > 12:
        return f"{len(value)} entries"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def announce(eraser: Eraser, out: str | Path) -> None:
    """Say where an eraser was saved and what was measured at its fit."""
    say(f"saved {eraser.method} eraser to {out}")
    for name, value in eraser.report.items():
        say(f"  {name}: {short(value)}")


def comma_names(text: str) -> list[str]:
    """Return names that are written with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def load_eraser(name: str) -> Eraser:
    """Load an eraser from a folder or the hub."""
    from concept_erasure.eraser import Eraser

    return Eraser.from_pretrained(name)


def _given(command: object, option: Field[Any]) -> bool:
    return bool(getattr(command, option.name) != option.default)


def refuse_idle(command: object, names: Iterable[str], why: str) -> None:
    """Refuse those of the options that were given though they would do nothing.

    Raises:
        ValueError: If there is one; the message names it.
    """
    for option in fields(cast("Any", command)):
        if option.name in names and _given(command, option):
            raise ValueError(f"{flag(option.name)} {why}")


def check_options(command: object, mode: str, table: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that belong to other kinds of model.

    Args:
        command: The command.
        mode: A key of `MODES`.
        table: Option to the modes it is for; options that are not in it are for all.

    Raises:
        ValueError: If an option was given though it would do nothing.
    """
    for option in fields(cast("Any", command)):
        allowed = table.get(option.name)
        if allowed is not None and mode not in allowed and _given(command, option):
            kinds = " or ".join(MODES[one] for one in allowed)
            raise ValueError(
                f"{flag(option.name)} is for {kinds}; with {MODES[mode]} it does nothing"
            )


def family_of(method: str, mode: str) -> registry.Method:
    """Return the registry's entry of a method; refuse one that is for another kind of model.

    Raises:
        KeyError: If there is no such method.
        ValueError: If it is of another family; the message says what it needs.
    """
    entry = registry.get(method)
    needs = {
        "language": "it erases a concept from a language model: give --model and --concept",
        "sae": "it edits a model through a sparse dictionary: give --model, --concept and, for most, --option "
        "disentanglers=FOLDER",
        "diffusion": "it edits a text-to-image pipeline: give --pipe and --erase",
    }
    if mode in ("vectors", "texts"):
        if entry.family in needs:
            raise ValueError(f"--method {method} takes no SOURCE; {needs[entry.family]}")
        return entry
    if mode == "pipe":
        known = registry.for_pipelines()
    else:
        known = [n for n in registry.names() if registry.get(n).family in CONCEPT_FAMILIES]
    if entry.name not in known:
        raise ValueError(
            f"--method {method} is not for {MODES[mode]}; methods that are: {', '.join(known) or 'none'}"
        )
    return entry


def names_from(values: Sequence[str], option: str) -> list[str]:
    """Return names: those given, or the lines of the one file given.

    A ``.txt`` file has a name a line; a ``.csv`` file has them in the column ``concept`` or ``name``, or in its only
    one; a ``.json`` file is a list.

    Args:
        values: What was typed.
        option: After which option, for messages.

    Raises:
        FileNotFoundError: If what looks like a file is none.
        FormatError: If the file has no names.
    """
    kept = [value for value in values if value.strip()]
    path = Path(kept[0]) if len(kept) == 1 else None
    if path is None or path.suffix.lower() not in (".txt", ".csv", ".json"):
        return list(values)
    if not path.is_file():
        raise FileNotFoundError(f"{flag(option)}: no such file: {path}")
    text = path.read_text(encoding="utf-8-sig")
    try:
        names = _READERS[path.suffix.lower()](text)
    except (ValueError, csv.Error) as error:
        raise FormatError(f"{flag(option)} {path}: {error}") from None
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise FormatError(f"{flag(option)} {path}: needs a list of names, and found {names[:3]!r}")
    return [name.strip() for name in names]


def _csv_names(text: str) -> list[str]:
    header, *rows = [row for row in csv.reader(text.split("\n")) if row]
    wanted = next((name for name in ("concept", "name", "text") if name in header), None)
    if wanted is None and len(header) > 1:
        raise ValueError(f"has no column 'concept' or 'name'; its columns: {', '.join(header)}")
    column = 0 if wanted is None else header.index(wanted)
    return [row[column] for row in (rows if wanted else [header, *rows])]


_READERS: dict[str, Callable[[str], list[str]]] = {
    ".txt": lambda text: [line.strip() for line in text.split("\n") if line.strip()],
    ".json": lambda text: cast("list[str]", json.loads(text)),
    ".csv": _csv_names,
}
