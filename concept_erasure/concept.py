"""A concept: what is to be erased, said with names, prompts, texts and questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from concept_erasure.errors import FormatError

__all__ = ["Concept", "Question"]

_BUILT_IN = Path(__file__).parent / "concepts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A multiple-choice question about the concept.

    Attributes:
        question: the question.
        choices: at least two answers.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", _texts("choices", self.choices))
        if not isinstance(self.question, str) or not self.question.strip():
            raise FormatError(f"question must be a text; got {self.question!r}")
        if len(self.choices) < 2:
            raise FormatError(f"a question needs at least two choices; got {self.choices!r}")
        whole = isinstance(self.answer, int) and not isinstance(self.answer, bool)
        if not whole or not 0 <= self.answer < len(self.choices):
            raise FormatError(
                f"answer must be an index below {len(self.choices)}; got {self.answer!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """What is to be erased.

    Attributes:
        name: of the concept, `Harry Potter`.
        synonyms: other words for it.
        anchors: what a model should think of instead, `a young wizard`.
        neighbours: names of concepts nearby that must stay as they are, `The Hobbit`.
        prompts: short inputs that call the concept up.
        forget_texts: texts that express it.
        retain_texts: texts that do not, near enough to show damage.
        questions: multiple-choice questions that need it.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    forget_texts: tuple[str, ...] = ()
    retain_texts: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise FormatError(f"a concept needs a name; got {self.name!r}")
        for key in ("synonyms", "anchors", "neighbours", "prompts", "forget_texts", "retain_texts"):
            object.__setattr__(self, key, _texts(key, getattr(self, key)))
        if not isinstance(self.questions, list | tuple):
            raise FormatError(f"questions must be a list; got {type(self.questions).__name__}")
        made = tuple(q if isinstance(q, Question) else _question(q) for q in self.questions)
        object.__setattr__(self, "questions", made)

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for yaml or json; empty fields are left out."""
        out: dict[str, Any] = {"name": self.name}
        for field in fields(self)[1:]:
            values = getattr(self, field.name)
            if values and field.name == "questions":
                out["questions"] = [
                    {"question": q.question, "choices": list(q.choices), "answer": q.answer}
                    for q in values
                ]
            elif values:
                out[field.name] = list(values)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Concept:
        """Return the concept written by `to_dict`.

        Raises:
            FormatError: a key is unknown, the name is missing, or a value has the wrong type.
        """
        return cls(**_checked(cls, values, "a concept"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Concept:
        """Read a concept from a yaml file, or one that comes with the library by its name.

        Args:
            name_or_path: path of a yaml file, or a name such as `gender` or `harry_potter`; capital
                letters, spaces and hyphens make no difference.

        Raises:
            FileNotFoundError: there is no such file or name; the message lists the names.
            FormatError: the file is not a concept.
        """
        path = Path(name_or_path)
        if not path.is_file() and path.name == str(name_or_path):
            path = _BUILT_IN / f"{re.sub(r'[ -]+', '_', str(name_or_path).strip().lower())}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in _BUILT_IN.glob("*.yaml"))) or "none"
            raise FileNotFoundError(
                f"no concept {str(name_or_path)!r}: give the path of a yaml file or one of the "
                f"names that come with the library ({known})"
            )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is not yaml: {error}") from error
        if not isinstance(values, Mapping):
            raise FormatError(f"{path} must hold keys and values; got {type(values).__name__}")
        return cls.from_dict(values)

    def save(self, path: str | Path) -> None:
        """Write the concept as yaml."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)
        Path(path).write_text(text, encoding="utf-8")


def _texts(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise FormatError(f"{key} must be a list of texts; got {value!r}")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise FormatError(f"{key} must hold non-empty texts; got {item!r}")
    return tuple(value)


def _question(value: object) -> Question:
    if not isinstance(value, Mapping):
        raise FormatError(f"a question has question, choices and answer; got {value!r}")
    return Question(**_checked(Question, value, "a question"))


def _checked(cls: type[Any], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = [field.name for field in fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise FormatError(f"{what} has no {unknown[0]!r}; its keys are {', '.join(known)}")
    needed = ["name"] if cls is Concept else known
    missing = [key for key in needed if key not in values]
    if missing:
        raise FormatError(f"{what} needs {missing[0]!r}; got {', '.join(map(str, values))}")
    return dict(values)
