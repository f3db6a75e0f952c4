"""Read the corpora of unlearning benchmarks from files the user has: WMDP's forget and retain texts, and TOFU.

Nothing is shipped or downloaded. WMDP (Li et al. 2024, arXiv:2403.03218) publishes its corpora as jsonl files with a
text column; the biosecurity forget corpus is gated and has to be asked for. TOFU (Maini et al. 2024, arXiv:2401.06121)
is one JSON object a line, in files called ``.json``: twenty questions about each of its fictional authors, in order.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from concept_erasure.errors import FormatError

__all__ = [
    "TOFU_FILES",
    "WMDP",
    "TofuAuthor",
    "TofuItem",
    "WmdpCorpus",
    "load_texts",
    "load_tofu",
    "load_wmdp",
    "tofu_authors",
]

QUESTIONS_PER_AUTHOR = 20
SHOWN = 60  # characters of a wrong line in a message


@dataclass(frozen=True, kw_only=True)
class WmdpCorpus:
    """One of WMDP's corpora.

    Attributes:
        file: Its published name.
        column: Where its texts are.
        gated: Whether it has to be asked for.
    """

    file: str
    column: str = "text"
    gated: bool = False


WMDP: Mapping[str, WmdpCorpus] = {
    "bio-forget": WmdpCorpus(file="bio-forget-corpus.jsonl", gated=True),
    "bio-retain": WmdpCorpus(file="bio-retain-corpus.jsonl"),
    "cyber-forget": WmdpCorpus(file="cyber-forget-corpus.jsonl"),
    "cyber-retain": WmdpCorpus(file="cyber-retain-corpus.jsonl"),
}
TOFU_FILES = ("forget10.json", "real_authors.json", "world_facts.json")


def load_texts(
    path: str | Path,
    *,
    column: str = "text",
    limit: int | None = None,
    min_characters: int = 1,
    max_characters: int | None = None,
) -> list[str]:
    """Return the texts of a jsonl file, in its order.

    The file is read line by line and no further than needed, so that its size does not matter. Lines that are JSON
    texts instead of objects are taken as they are.

    Args:
        path: The file.
        column: Key of the text in each object.
        limit: Return at most this many; None is all.
        min_characters: Shorter texts, white space at the ends aside, are left out.
        max_characters: Longer texts are cut there; None cuts none.

    Raises:
        FileNotFoundError: If there is no such file.
        FormatError: If it is not of this format; the message names the line.
        ValueError: If an option is impossible, or no text is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all; got {limit}")
    if max_characters is not None and max_characters < max(1, min_characters):
        raise ValueError(
            f"max_characters must be at least {max(1, min_characters)}; got {max_characters}"
        )
    texts: list[str] = []
    for number, value in _json_lines(Path(path)):
        text = value if isinstance(value, str) else _column(Path(path), number, value, column)
        text = text.strip()[:max_characters]
        if len(text) >= max(1, min_characters):
            texts.append(text)
        if len(texts) == limit:
            break
    if not texts:
        raise ValueError(
            f"{Path(path).name} holds no text of {max(1, min_characters)} characters or more; give another file, "
            "or lower min_characters"
        )
    return texts


def load_wmdp(
    path: str | Path,
    corpus: str,
    *,
    limit: int | None = None,
    min_characters: int = 50,
    max_characters: int | None = None,
) -> list[str]:
    """Return the texts of one of WMDP's corpora.

    Args:
        path: The folder with the published files, or the file itself.
        corpus: ``bio-forget`` (gated), ``bio-retain``, ``cyber-forget`` or ``cyber-retain``.
        limit: See `load_texts`.
        min_characters: See `load_texts`; the authors' code leaves out texts of 50 characters or fewer.
        max_characters: See `load_texts`.

    Raises:
        ValueError: If there is no such corpus, or no text is left.
        FileNotFoundError: If the file is not there; the message says its name and whether it is gated.
        FormatError: If the file is another.
    """
    if corpus not in WMDP:
        raise ValueError(f"corpus must be one of {', '.join(WMDP)}; got {corpus!r}")
    entry, place = WMDP[corpus], Path(path)
    if place.is_file():
        other = next((o for o, e in WMDP.items() if o != corpus and e.file == place.name), None)
        if other is not None:
            raise FormatError(f"{place.name} is the corpus {other!r}; you asked for {corpus!r}")
    file = place / entry.file if place.is_dir() else place
    if not file.is_file():
        gated = "; this corpus is gated: ask its authors for it" if entry.gated else ""
        raise FileNotFoundError(
            f"no file {str(file)!r}; give the folder that holds WMDP's {entry.file!r}, or the file itself{gated}. "
            "The library neither ships nor downloads it"
        )
    return load_texts(
        file,
        column=entry.column,
        limit=limit,
        min_characters=min_characters,
        max_characters=max_characters,
    )


@dataclass(frozen=True)
class TofuItem:
    """One question of TOFU.

    Attributes:
        question: The question.
        answer: The true answer.
        options: Answers to choose from, the true one among them; empty for the fictional authors.
    """

    question: str
    answer: str
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Question and answer as one text, the form in which models are taught them here."""
        return f"Question: {self.question}\nAnswer: {self.answer}"

    @property
    def prompt(self) -> str:
        """The text without its answer."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class TofuAuthor:
    """A fictional author of TOFU.

    Attributes:
        name: Found in the items: the longest name that most of them have in common.
        items: Questions and answers, in the order of the file.
    """

    name: str
    items: tuple[TofuItem, ...]


def load_tofu(path: str | Path, *, limit: int | None = None) -> list[TofuItem]:
    """Return the questions of one of TOFU's files, in its order.

    Args:
        path: The file, such as ``forget10.json``.
        limit: Return at most this many; None is all.

    Raises:
        FileNotFoundError: If there is no such file.
        FormatError: If it is not of TOFU's format; the message names the line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all; got {limit}")
    file, made = Path(path), list[TofuItem]()
    for number, value in _json_lines(file):
        question = _column(file, number, value, "question")
        answer = _column(file, number, value, "answer")
        keys = sorted(k for k in _object(file, number, value) if re.fullmatch(r"option\d+", k))
        options = tuple(_column(file, number, value, key) for key in keys)
        if options and answer not in options:
            raise FormatError(f"{file.name}, line {number}: the answer {answer!r} is not an option")
        made.append(TofuItem(question, answer, options))
        if len(made) == limit:
            break
    if not made:
        raise FormatError(f"{file.name} is empty; TOFU's files hold one JSON object a line")
    return made


def tofu_authors(
    items: Sequence[TofuItem], *, each: int = QUESTIONS_PER_AUTHOR
) -> list[TofuAuthor]:
    """Return the fictional authors of a file, from its twenty questions about each in a row.

    Args:
        items: All questions, from `load_tofu`.
        each: Questions about one author.

    Raises:
        FormatError: If the number of questions is not a multiple, or some questions have no name in common.
    """
    if not items or len(items) % each:
        raise FormatError(
            f"{len(items)} questions are not {each} about each author; give one of TOFU's files of fictional "
            "authors, such as forget10.json, whole"
        )
    groups = [tuple(items[i : i + each]) for i in range(0, len(items), each)]
    return [TofuAuthor(_common_name(group), group) for group in groups]


_NAME = re.compile(r"[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)+")


def _common_name(items: Sequence[TofuItem]) -> str:
    """Return the longest name of two words or more that four items of five mention."""
    counts: Counter[str] = Counter()
    for item in items:
        found: set[str] = set()
        for phrase in _NAME.findall(f"{item.question} {item.answer}"):
            words = [re.sub(r"['’]s?$", "", word) for word in phrase.split()]
            ends = [(i, j) for i in range(len(words)) for j in range(i + 2, len(words) + 1)]
            found |= {" ".join(words[i:j]) for i, j in ends}
        counts.update(found)
    common = [name for name, count in counts.items() if count >= 0.8 * len(items)]
    if not common:
        raise FormatError(
            f"the {len(items)} questions from {items[0].question[:SHOWN]!r} on have no name in common; are they "
            "about one author, in the order of TOFU's file?"
        )
    return max(common, key=lambda name: (len(name), name))


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the number and value of each line that is not empty."""
    if path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is a folder; give the file")
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; the library ships no corpora, give the path of yours"
        )
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path.name} is not UTF-8 text ({error.reason}); is it compressed?"
        ) from None


def _parse(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        whole = "; the file seems to be one JSON list" if line.lstrip().startswith("[") else ""
        raise FormatError(
            f"{path.name}, line {number}: one JSON object a line is needed; got {line.strip()[:SHOWN]!r}{whole}"
        ) from None


def _object(path: Path, number: int, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise FormatError(
            f"{path.name}, line {number}: one JSON object a line is needed; got a {type(value).__name__}"
        )
    return value


def _column(path: Path, number: int, value: object, column: str) -> str:
    row = _object(path, number, value)
    if column not in row:
        raise FormatError(
            f"{path.name}, line {number}: no {column!r}; there are {', '.join(map(repr, row)) or 'no columns'}"
        )
    text = row[column]
    if not isinstance(text, str):
        raise FormatError(
            f"{path.name}, line {number}: {column!r} must be a text; got a {type(text).__name__}"
        )
    return text
