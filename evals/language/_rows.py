"""Questions in local files: which files a task has, and rows that are checked."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from concept_erasure.errors import FormatError

__all__ = ["SUFFIXES", "Rows", "check_choices", "find_splits", "hash_of", "read_many", "read_rows"]

SUFFIXES = (".jsonl", ".json", ".parquet")
Rows = list[dict[str, Any]]


def find_splits(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """Return split to files; a file named after the task itself is the split ``""``.

    Looked for are ``NAME.jsonl``, ``NAME/SPLIT.jsonl`` and ``NAME/SPLIT-00000-of-00001.parquet`` with any of the
    endings; the folder itself may have the task's name.
    """
    found: dict[str, list[Path]] = {}
    for name in names:
        for spelling in dict.fromkeys((name, name.replace("_", "-"), name.replace("-", "_"))):
            for suffix in SUFFIXES:
                if (path := folder / f"{spelling}{suffix}").is_file():
                    found.setdefault("", [path])
            roots = [folder / spelling, *([folder] if folder.name == spelling else [])]
            for root in roots:
                for path in sorted(root.glob("*.*")) if root.is_dir() else ():
                    if path.suffix in SUFFIXES:
                        split = path.stem.split("-0")[0]
                        files = found.setdefault(split, [])
                        if path not in files and (not files or files[0].parent == path.parent):
                            files.append(path)
        if found:
            break
    return found


def read_many(paths: Sequence[Path], files: dict[str, str]) -> Rows:
    """Return the rows of several files and note their hashes."""
    rows: Rows = []
    for path in paths:
        rows += read_rows(path)
        files[path.name] = hash_of(path)
    return rows


def read_rows(path: Path) -> Rows:
    """Return the rows of a file.

    Raises:
        FormatError: If it is not what its ending says, or holds no rows.
    """
    if path.suffix == ".parquet":
        try:
            rows: object = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
        except Exception as error:
            raise FormatError(f"{path.name} is not a parquet file: {error}") from None
    else:
        text = path.read_text(encoding="utf-8")
        try:
            rows = (
                json.loads(text)
                if path.suffix == ".json" and text.lstrip().startswith("[")
                else [
                    json.loads(line) for line in text.split("\n") if line.strip()
                ]  # texts hold other line ends
            )
        except json.JSONDecodeError as error:
            raise FormatError(f"{path.name} is not {path.suffix[1:]}: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise FormatError(f"{path.name} must hold one object a row, and at least one")
    return rows


def check_choices(rows: Rows, what: str, *, subject: bool = False) -> None:
    """Check rows of four-way questions.

    Raises:
        FormatError: If one is none; the message says which.
    """
    for number, row in enumerate(rows, start=1):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            wrong = "no text 'question'"
        elif not isinstance(choices, list) or len(choices) != 4:
            wrong = "not four 'choices'"
        elif isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < 4:
            wrong = f"the 'answer' {answer!r}, not 0 to 3"
        elif subject and not isinstance(row.get("subject"), str):
            wrong = "no 'subject'"
        else:
            continue
        raise FormatError(f"{what}: row {number} has {wrong}")


def hash_of(path: Path) -> str:
    """Return the start of a file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
