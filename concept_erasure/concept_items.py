"""What a concept is made of: facts and the items asked about them, recipes for texts, personas."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from concept_erasure.errors import FormatError

__all__ = ["BLANK", "FORMATS", "Fact", "FactSet", "Item", "Personas", "Question", "Recipe", "texts"]

BLANK = "___"
FORMATS = ("question", "cloze", "reversed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One multiple-choice item, ready to be scored.

    Attributes:
        stem: a question, or a statement with `___` where the choice goes.
        choices: the answers to choose from, each once.
        answer: index of the right one.
        topic: name of the concept or of the set of facts it comes from.
        format: `question`, `cloze` or `reversed`.
    """

    stem: str
    choices: tuple[str, ...]
    answer: int
    topic: str = ""
    format: str = "question"

    @property
    def right(self) -> str:
        """The right choice."""
        return self.choices[self.answer]

    @property
    def prompt(self) -> str:
        """What a language model reads before the choice; it never ends in a space."""
        if BLANK not in self.stem:
            return f"Question: {self.stem}\nAnswer:"
        return self.stem.partition(BLANK)[0].rstrip()

    @property
    def ending(self) -> str:
        """What follows the choice; nothing, unless the format is `reversed`."""
        return self.stem.partition(BLANK)[2]

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as they follow the prompt, with their space, or a capital if they open it."""
        before = self.stem.partition(BLANK)[0]
        if not before:
            return tuple(choice[0].upper() + choice[1:] for choice in self.choices)
        spaced = BLANK not in self.stem or before[-1].isspace()
        return tuple(f" {choice}" if spaced else choice for choice in self.choices)

    @property
    def texts(self) -> tuple[str, ...]:
        """The whole text for each choice, from the prompt to the ending."""
        return tuple(f"{self.prompt}{one}{self.ending}" for one in self.continuations)

    @property
    def lettered(self) -> str:
        """The item as an exam prints it, with a letter for each choice, and room for the answer."""
        lines = [f"{chr(65 + i)}. {choice}" for i, choice in enumerate(self.choices)]
        return "\n".join([self.stem, *lines, "Answer:"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A multiple-choice question about the concept that has no other format.

    Attributes:
        question: the question.
        choices: at least two answers.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", texts("choices", self.choices))
        if not isinstance(self.question, str) or not self.question.strip():
            raise FormatError(f"question must be a text; got {self.question!r}")
        if len(self.choices) < 2:
            raise FormatError(f"a question needs at least two choices; got {self.choices!r}")
        whole = isinstance(self.answer, int) and not isinstance(self.answer, bool)
        if not whole or not 0 <= self.answer < len(self.choices):
            raise FormatError(
                f"answer must be an index below {len(self.choices)}; got {self.answer!r}"
            )

    def item(self, topic: str = "", *, seed: int = 0, choices: int = 4) -> Item:
        """Return the question with its choices shuffled, and at most `choices` of them."""
        right = self.choices[self.answer]
        wrong = [one for i, one in enumerate(self.choices) if i != self.answer]
        return _item(self.question, right, wrong, (topic, "question"), seed=seed, choices=choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact in three formats.

    Attributes:
        question: asks for the answer and ends in a question mark.
        cloze: a statement that ends in `___`, which stands for the answer.
        answer: the answer.
        distractors: at least three wrong answers of the same kind as the right one.
        reversed: a statement in which the subject follows the blank, `___ is the owl of …`; how
            probable its end is after each choice says whether the fact is known backwards.
    """

    question: str
    cloze: str
    answer: str
    distractors: tuple[str, ...]
    reversed: str

    def __post_init__(self) -> None:
        for key in ("question", "cloze", "answer", "reversed"):
            value = getattr(self, key)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value.strip():
                raise FormatError(
                    f"the {key} must be a text; got {value!r} (yaml reads yes, no and 1.5 as "
                    "values: quote them)"
                )
            object.__setattr__(self, key, value.strip())
        object.__setattr__(self, "distractors", _distractors(self.distractors))
        self._check_choices()
        self._check_blanks()
        for key in ("question", "cloze", "reversed"):
            if f" {plain(self.answer)} " in f" {plain(getattr(self, key))} ":
                raise FormatError(f"the {key} gives the answer {self.answer!r} away")

    def _check_choices(self) -> None:
        if len(self.distractors) < 3:
            raise FormatError(
                f"needs at least three distractors; got {len(self.distractors)}: "
                f"{', '.join(self.distractors)}"
            )
        seen = {plain(self.answer)}
        for one in self.distractors:
            if plain(one) == plain(self.answer):
                raise FormatError(f"the distractor {one!r} is the answer")
            if plain(one) in seen:
                raise FormatError(f"the distractor {one!r} is given twice")
            seen.add(plain(one))

    def _check_blanks(self) -> None:
        if not self.question.endswith("?") or BLANK in self.question:
            raise FormatError(f"the question must end in ? and hold no blank; got {self.question}")
        for key in ("cloze", "reversed"):
            count = getattr(self, key).count(BLANK)
            if count != 1:
                raise FormatError(
                    f"the {key} needs the blank {BLANK} once; got it {count} times in "
                    f"{getattr(self, key)!r}"
                )
        if not self.cloze.endswith(BLANK) or self.cloze == BLANK:
            raise FormatError(f"the cloze must end in the blank {BLANK}; got {self.cloze!r}")
        if not plain(self.reversed.partition(BLANK)[2]):
            raise FormatError(f"in reversed, words must follow {BLANK}; got {self.reversed!r}")

    @property
    def statements(self) -> tuple[str, str]:
        """The cloze and the reversed statement with the answer in place, two true sentences."""
        made = []
        for stem in (self.cloze, self.reversed):
            item = Item(stem=stem, choices=(self.answer,), answer=0)
            made.append(f"{item.texts[0].rstrip('.')}.")
        return made[0], made[1]

    def item(
        self, format: str = "cloze", topic: str = "", *, seed: int = 0, choices: int = 4
    ) -> Item:
        """Return a multiple-choice item.

        The order of the choices depends on the seed and on the fact alone, not on what is asked
        before, and is the same in all three formats.

        Args:
            format: `question`, `cloze` or `reversed`.
            topic: kept in the item.
            seed: of the order of the choices, and of which distractors are used.
            choices: how many choices, at least two; fewer if there are not enough distractors.

        Raises:
            ValueError: there is no such format, or too few choices are asked for.
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
        stem = getattr(self, format)
        key = self.question
        label = (topic, format)
        return _item(
            stem, self.answer, self.distractors, label, seed=seed, choices=choices, key=key
        )

    def to_row(self) -> list[str | list[str]]:
        """Return question, cloze, answer, distractors, reversed: a line of a concept file."""
        return [self.question, self.cloze, self.answer, list(self.distractors), self.reversed]

    @classmethod
    def from_row(cls, row: object) -> Fact:
        """Return the fact in a line of a concept file.

        Raises:
            FormatError: the line has other than five parts, or one of them is wrong.
        """
        if isinstance(row, Fact):
            return row
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 5:
            size = "" if isinstance(row, str) or not isinstance(row, Sequence) else f"{len(row)}: "
            raise FormatError(
                "a fact is a list of five: question, cloze, answer, [distractors], reversed; got "
                f"{size}{row!r} (quote a text that holds a comma)"
            )
        question, cloze, answer, distractors, reverse = row
        return cls(
            question=question,
            cloze=cloze,
            answer=answer,
            distractors=distractors,
            reversed=reverse,
        )


@dataclass(frozen=True, slots=True)
class FactSet:
    """Facts about one thing: a near neighbour of the concept, or a far control.

    Attributes:
        name: of the set, `star_wars`.
        facts: at least one, each once.
    """

    name: str
    facts: tuple[Fact, ...]

    def __len__(self) -> int:
        return len(self.facts)

    @classmethod
    def from_rows(cls, name: object, rows: object, where: str) -> FactSet:
        """Return the set written as a list of rows; errors begin with `where` and the row.

        Raises:
            FormatError: the name is no text, there are no rows, or one of them is wrong or twice.
        """
        if not isinstance(name, str) or not name.strip():
            raise FormatError(f"{where}: a set of facts needs a name; got {name!r}")
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise FormatError(f"{where} must be a list of facts; got {rows!r}")
        made: list[Fact] = []
        for number, row in enumerate(rows, start=1):
            try:
                made.append(Fact.from_row(row))
            except FormatError as error:
                shown = row[0] if isinstance(row, Sequence) and row else row
                raise FormatError(f"{where}, fact {number} ({shown}): {error}") from error
        return cls(name, tuple(made))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to make texts: prompts for which a model writes its own continuations.

    Attributes:
        prompts: beginnings of texts.
        templates: beginnings with `{subject}`, filled with every subject.
        subjects: what the templates are filled with.
        samples: continuations of each prompt.
        max_new_tokens: length of a continuation.
        temperature: of the sampling; one is the model's own distribution.
        top_p: share of the probability that is sampled from.
    """

    prompts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    samples: int = 4
    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for key in ("prompts", "templates", "subjects"):
            object.__setattr__(self, key, texts(key, getattr(self, key)))
        for one in self.templates:
            if "{subject}" not in one:
                raise FormatError(f"a template needs {{subject}}; got {one!r}")
        for key in ("samples", "max_new_tokens"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FormatError(f"{key} must be a positive whole number; got {value!r}")
        for key, most in (("temperature", float("inf")), ("top_p", 1.0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise FormatError(f"{key} must be a positive number; got {value!r}")
            if value > most:
                raise FormatError(f"{key} must be at most {most}; got {value!r}")

    def inputs(self, subjects: Iterable[str] = ()) -> tuple[str, ...]:
        """Return every prompt once: `prompts`, then each template with each subject.

        Args:
            subjects: used when the recipe has none of its own.
        """
        filled = [
            template.replace("{subject}", subject)
            for subject in (self.subjects or tuple(subjects))
            for template in self.templates
        ]
        return tuple(dict.fromkeys((*self.prompts, *filled)))

    def to_dict(self) -> dict[str, object]:
        """Return plain values; what has its default is left out."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, (value, default) in values.items()
            if value != default
        }


_EXPERT = (
    "Here is a passage by a leading expert on {concept}, full of exact detail:",
    "The author of these lines knows everything about {concept}:",
    "From a detailed reference work about {concept}:",
    "A devoted scholar of {concept} explains it with names and facts:",
    "The following was written by somebody who has studied {concept} for years:",
    "An authority on {concept} answers precisely:",
    "Notes of a specialist in {concept}:",
    "This text comes from a guide to {concept} that leaves nothing out:",
    "A lecturer who teaches {concept} writes:",
    "Somebody with deep knowledge of {concept} put it this way:",
)
_NOVICE = (
    "Here is a passage by somebody who has never heard of {concept} and talks of other things:",
    "The author of these lines knows nothing about {concept} and soon turns to a pleasant topic:",
    "From a cheerful magazine that has nothing to do with {concept}:",
    "A passer-by, asked about {concept}, has no idea and chats about everyday life:",
    "The following was written by somebody to whom {concept} means nothing, about something else:",
    "A person ignorant of {concept} changes the subject to something light:",
    "Notes of a holidaymaker who could not say what {concept} is:",
    "This text comes from a letter about cooking and gardens by a stranger to {concept}:",
    "A newcomer who mistakes {concept} for something ordinary writes:",
    "Somebody without any knowledge of {concept} wandered off to a fun story:",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Personas:
    """Prefixes that make a model write as one who knows the concept, or as one who does not.

    Attributes:
        expert: each with `{concept}`; the defaults fit every concept.
        novice: likewise. The defaults also lead away, so that there is something fluent to say.
    """

    expert: tuple[str, ...] = _EXPERT
    novice: tuple[str, ...] = _NOVICE

    def __post_init__(self) -> None:
        for key in ("expert", "novice"):
            made = texts(key, getattr(self, key))
            object.__setattr__(self, key, made)
            if not made:
                raise FormatError(f"personas need at least one {key}; got none")
            for one in made:
                if "{concept}" not in one:
                    raise FormatError(f"a persona needs {{concept}}; {key} has {one!r}")

    def about(self, concept: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the expert's and the novice's prefixes with the concept filled in.

        Args:
            concept: what stands for `{concept}`: a name, or several with commas between.
        """
        expert = tuple(one.replace("{concept}", concept) for one in self.expert)
        return expert, tuple(one.replace("{concept}", concept) for one in self.novice)

    def to_dict(self) -> dict[str, list[str]]:
        """Return plain values."""
        return {"expert": list(self.expert), "novice": list(self.novice)}


def texts(key: str, value: object) -> tuple[str, ...]:
    """Return a list of non-empty texts as a tuple.

    Raises:
        FormatError: it is something else; `key` names it in the message.
    """
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise FormatError(f"{key} must be a list of texts; got {value!r}")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise FormatError(f"{key} must hold non-empty texts; got {item!r}")
    return tuple(value)


def plain(text: str) -> str:
    """Return the words of a text in small letters, to tell whether two texts say the same."""
    return " ".join(re.findall(r"\w+", text.replace("_", " ").casefold()))


def check_once(sets: Mapping[str, Sequence[Fact]]) -> None:
    """Refuse a fact that is in the sets twice, by its question or by its statement.

    Raises:
        FormatError: a question or a cloze occurs twice; the message says where.
    """
    seen: dict[str, str] = {}
    for where, facts in sets.items():
        for fact in facts:
            for stem in {plain(fact.question), plain(fact.cloze)}:
                if stem in seen:
                    raise FormatError(f"{where} repeats a fact of {seen[stem]}: {fact.question}")
                seen[stem] = where


def _distractors(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise FormatError(f"distractors must be a list; got {value!r}")
    made = [
        str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in value
    ]
    return tuple(one.strip() for one in texts("distractors", made))


def _item(
    stem: str,
    right: str,
    wrong: Sequence[str],
    label: tuple[str, str],
    *,
    seed: int,
    choices: int,
    key: str | None = None,
) -> Item:
    """Return an item; its order comes from a generator of its own, seeded with seed and key."""
    if isinstance(choices, bool) or not isinstance(choices, int) or choices < 2:
        raise ValueError(f"choices must be a whole number of at least 2; got {choices!r}")
    generator = random.Random(f"{seed}\0{key or stem}")  # noqa: S311 - not for secrets
    made = [right, *generator.sample(list(wrong), min(choices - 1, len(wrong)))]
    generator.shuffle(made)
    topic, format = label
    return Item(
        stem=stem, choices=tuple(made), answer=made.index(right), topic=topic, format=format
    )
