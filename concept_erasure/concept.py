"""A concept: what is to be erased, said with names, texts and facts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml

from concept_erasure.concept_items import (
    Fact,
    FactSet,
    Item,
    Personas,
    Question,
    Recipe,
    check_once,
    texts,
)
from concept_erasure.errors import FormatError

__all__ = ["Concept"]

_BUILT_IN = Path(__file__).parent / "concepts"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # written in C where there is one
_TEXTS = ("synonyms", "anchors", "neighbours", "prompts", "forget_texts", "retain_texts")
_RECIPES = ("forget_recipe", "retain_recipe")
_Part = TypeVar("_Part", Personas, Question, Recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """What is to be erased, and what has to stay.

    Attributes:
        name: of the concept, `Harry Potter`.
        synonyms: other words for it.
        anchors: what a model should think of instead, `a young wizard`.
        neighbours: names of concepts nearby that must stay as they are, `The Hobbit`.
        entities: names of the concept with a neutral stand-in for each, as pairs; a mapping is
            accepted. `anonymise` puts the stand-ins into a text.
        personas: prefixes for a writer who knows the concept and for one who does not.
        prompts: short inputs that call the concept up.
        forget_texts: texts that express it.
        retain_texts: texts that do not, near enough to show damage.
        forget_recipe: how a model writes texts that express it; without subjects of its own, its
            templates are filled with the entities.
        retain_recipe: how a model writes texts that do not; without subjects of its own, its
            templates are filled with the neighbours.
        questions: multiple-choice questions that need it, in this one format.
        facts: facts of the concept, each in three formats.
        near: sets of facts about its neighbours, which a careless edit would take along; a mapping
            from name to facts is accepted.
        far: sets of facts that have nothing to do with it; likewise.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    entities: tuple[tuple[str, str], ...] = ()
    personas: Personas = field(default_factory=Personas)
    prompts: tuple[str, ...] = ()
    forget_texts: tuple[str, ...] = ()
    retain_texts: tuple[str, ...] = ()
    forget_recipe: Recipe | None = None
    retain_recipe: Recipe | None = None
    questions: tuple[Question, ...] = ()
    facts: tuple[Fact, ...] = ()
    near: tuple[FactSet, ...] = ()
    far: tuple[FactSet, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise FormatError(f"a concept needs a name; got {self.name!r}")
        made: dict[str, Any] = {key: texts(key, getattr(self, key)) for key in _TEXTS}
        made["entities"] = _entities(self.entities)
        made["personas"] = _part(Personas, self.personas, "personas")
        for key in _RECIPES:
            value = getattr(self, key)
            made[key] = None if value is None else _part(Recipe, value, key)
        if not isinstance(self.questions, list | tuple):
            raise FormatError(f"questions must be a list; got {type(self.questions).__name__}")
        made["questions"] = tuple(_part(Question, one, "a question") for one in self.questions)
        made["facts"] = FactSet.from_rows("facts", self.facts, "facts").facts
        made["near"], made["far"] = _sets("near", self.near), _sets("far", self.far)
        for key, value in made.items():
            object.__setattr__(self, key, value)
        both = [one.name for one in (*self.near, *self.far)]
        for one in both:
            if both.count(one) > 1 or one in {"concept", "near", "far"}:
                raise FormatError(f"two sets of facts are called {one!r}; give each its own name")
        sets = {f"{key}.{one.name}": one.facts for key in ("near", "far") for one in made[key]}
        check_once({"facts": self.facts, **sets})

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `items` can be asked for, `concept`, `near`, `far` and the name of each set."""
        return ("concept", "near", "far", *(one.name for one in (*self.near, *self.far)))

    def items(
        self,
        kind: str = "concept",
        format: str = "cloze",
        seed: int = 0,
        *,
        choices: int = 4,
    ) -> tuple[Item, ...]:
        """Return multiple-choice items in a shuffled order, each with its choices shuffled.

        The same seed gives the same items in every process. The choices of an item do not depend
        on the other items, and are the same in all formats.

        Args:
            kind: `concept`, `near`, `far`, or the name of one set such as `star_wars`.
            format: `question`, `cloze` or `reversed`; `questions` appear in the first only.
            seed: of the shuffling, and of which distractors are used.
            choices: of each item, at least two; fewer where there are not enough distractors.

        Raises:
            ValueError: there is no such kind or format, or too few choices are asked for.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind must be one of {', '.join(self.kinds)}; got {kind!r}")
        made: list[Item] = []
        if kind == "concept":
            topic = self.name
            made += [one.item(format, topic, seed=seed, choices=choices) for one in self.facts]
            if format == "question":
                made += [one.item(topic, seed=seed, choices=choices) for one in self.questions]
        for one in (*(() if kind == "far" else self.near), *(() if kind == "near" else self.far)):
            if kind in {"near", "far", one.name}:
                made += [
                    fact.item(format, one.name, seed=seed, choices=choices) for fact in one.facts
                ]
        random.Random(f"{seed}\0{kind}").shuffle(made)  # noqa: S311 - not for secrets
        return tuple(made)

    def anonymise(self, text: str) -> str:
        """Return the text with every entity replaced by its stand-in.

        Whole words are replaced, longer entities first, and capitals matter.
        """
        if not self.entities:
            return text
        stand_ins = dict(self.entities)
        return _words(tuple(stand_ins)).sub(lambda found: stand_ins[found[0]], text)

    def mentions(self, text: str) -> int:
        """Return how often a name, a synonym or an entity of the concept is in the text."""
        words = (*self.names, *(entity for entity, _ in self.entities))
        return len(_words(tuple(dict.fromkeys(words))).findall(text))

    def sample_prompts(self, which: str = "forget") -> tuple[str, ...]:
        """Return the prompts for which a model is to write texts, each once.

        Args:
            which: `forget`, texts that express the concept, or `retain`, texts that do not.

        Raises:
            ValueError: it is neither, or the concept has no such recipe and, to forget, no prompts.
        """
        if which not in {"forget", "retain"}:
            raise ValueError(f"which must be forget or retain; got {which!r}")
        recipe = self.forget_recipe if which == "forget" else self.retain_recipe
        subjects = [entity for entity, _ in self.entities] if which == "forget" else self.neighbours
        made = recipe.inputs(subjects) if recipe else ()
        if which == "forget":
            made = tuple(dict.fromkeys((*self.prompts, *made)))
        if not made:
            raise ValueError(f"the concept {self.name!r} has no prompts; give it a {which}_recipe")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for yaml or json; empty fields are left out."""
        out: dict[str, Any] = {"name": self.name}
        for key in (one.name for one in fields(self)[1:]):
            value = getattr(self, key)
            if not value or (key == "personas" and value == Personas()):
                continue
            if key == "entities":
                out[key] = dict(value)
            elif key in {"personas", *_RECIPES}:
                out[key] = value.to_dict()
            elif key == "questions":
                out[key] = [
                    {"question": one.question, "choices": list(one.choices), "answer": one.answer}
                    for one in value
                ]
            elif key == "facts":
                out[key] = [fact.to_row() for fact in value]
            elif key in {"near", "far"}:
                out[key] = {one.name: [fact.to_row() for fact in one.facts] for one in value}
            else:
                out[key] = list(value)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Concept:
        """Return the concept written by `to_dict`.

        Raises:
            FormatError: a key is unknown, the name is missing, or a value has the wrong type.
        """
        return cls(**_checked(cls, values, "a concept", needed=("name",)))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Concept:
        """Read a concept from a yaml file, or one that comes with the library by its name.

        In a file, the path of another file may stand for a list of facts, or for all sets of
        `near` or `far`. It is looked for beside the file, then among those of the library.

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
        values = _read(path)
        if not isinstance(values, Mapping):
            raise FormatError(f"{path} must hold keys and values; got {type(values).__name__}")
        try:
            return cls.from_dict(_with_references(values, path.parent))
        except FormatError as error:
            raise FormatError(f"{path.name}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the concept as yaml, with one line for each fact."""
        text = yaml.dump(
            self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000
        )
        Path(path).write_text(text, encoding="utf-8")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # untyped
    """Writes a list that holds a list, which is a fact, in one line."""

    def represent_sequence(
        self, tag: str, sequence: Sequence[object], flow_style: bool | None = None
    ) -> object:
        fact = any(isinstance(one, list) for one in sequence) and isinstance(sequence[0], str)
        return super().represent_sequence(tag, sequence, True if fact else flow_style)


def _read(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 - a safe one
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not yaml: {error}") from error


def _with_references(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with the facts of other files in place of their paths."""
    out = dict(values)
    if isinstance(out.get("facts"), str):
        out["facts"] = _facts_of(out["facts"], folder)
    for key in ("near", "far"):
        sets = out.get(key)
        if isinstance(sets, str):
            sets = _read(_find(sets, folder))
        if isinstance(sets, Mapping):
            sets = {
                name: _facts_of(rows, folder) if isinstance(rows, str) else rows
                for name, rows in sets.items()
            }
        if sets is not None:
            out[key] = sets
    return out


def _facts_of(reference: str, folder: Path) -> object:
    """Return the facts in a file: its list, or what a concept file has under `facts`."""
    held = _read(_find(reference, folder))
    facts = held.get("facts") if isinstance(held, Mapping) else held
    if not isinstance(facts, list):
        raise FormatError(f"{reference} holds no list of facts; got {type(held).__name__}")
    return facts


def _find(reference: str, folder: Path) -> Path:
    inside = PurePosixPath(reference)
    if inside.is_absolute() or ".." in inside.parts or inside.suffix != ".yaml":
        raise FormatError(
            f"{reference!r} must be the path of a .yaml file beside this file or below it"
        )
    for place in (folder, _BUILT_IN):
        if (place / inside).is_file():
            return place / inside
    raise FormatError(f"there is no file {reference!r} beside this file or in the library")


@lru_cache(maxsize=64)
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")


def _entities(value: object) -> tuple[tuple[str, str], ...]:
    """Return entities and stand-ins as pairs; no stand-in may be, or hold, an entity."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        raise FormatError(f"entities must map each name to its stand-in; got {value!r}")
    made = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FormatError(f"entities must be pairs of a name and its stand-in; got {pair!r}")
        made.append((texts("entities", list(pair))[0], pair[1]))
    if len({entity for entity, _ in made}) != len(made):
        raise FormatError("entities must each be given once")
    if made:
        known = _words(tuple(entity for entity, _ in made))
        for entity, stand_in in made:
            if known.search(stand_in):
                raise FormatError(f"the stand-in {stand_in!r} of {entity!r} holds an entity")
    return tuple(made)


def _sets(key: str, value: object) -> tuple[FactSet, ...]:
    if isinstance(value, Mapping):
        return tuple(FactSet.from_rows(name, rows, f"{key}.{name}") for name, rows in value.items())
    if not isinstance(value, list | tuple) or not all(isinstance(one, FactSet) for one in value):
        raise FormatError(f"{key} must map names to lists of facts; got {value!r}")
    return tuple(value)


def _part(cls: type[_Part], value: object, what: str) -> _Part:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        keys = [one.name for one in fields(cls)]
        raise FormatError(f"{what} has {', '.join(keys[:-1])} and {keys[-1]}; got {value!r}")
    needed = [one.name for one in fields(Question)] if cls is Question else ()
    return cls(**_checked(cls, value, what, needed=needed))


def _checked(
    cls: type[Any], values: Mapping[str, Any], what: str, *, needed: tuple[str, ...] | list[str]
) -> dict[str, Any]:
    known = [one.name for one in fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise FormatError(f"{what} has no {unknown[0]!r}; its keys are {', '.join(known)}")
    missing = [key for key in needed if key not in values]
    if missing:
        raise FormatError(f"{what} needs {missing[0]!r}; got {', '.join(map(str, values))}")
    return dict(values)
