"""The methods of the study on the emoji world, each with the options it is compared under.

Everyone gets the same lists: names and sentences of what goes, the sentence each becomes, names and sentences of what
stays. Sentences of the fit are short; the suites draw full ones, which no fit has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import concept_erasure as ce
from concept_erasure.collect import Representations
from concept_erasure.diffusion import text_representations
from concept_erasure.evals.diffusion.evaluate import Editing, NegativePrompt
from concept_erasure.evals.worlds.emoji.render import STYLES
from concept_erasure.evals.worlds.emoji.sprites import EmojiObject

__all__ = ["METHODS", "Fitted", "Lists", "object_lists", "style_lists"]

SENTENCES = (
    "a picture of a {}", "an emoji of a {}", "a flat picture of a {}", "a {}, glossy style", "sketch drawing of a {}",
    "a sketch {}", "a {} in flat style", "a glossy picture of a {}", "a {} on red",
    "a picture of a {} on a blue background",
    "a {} with a green background", "a {} on black", "an image of a {} on a white background",
)  # fmt: skip
"""Of the fit: they say a style or a ground, never both; those drawn in the suites say both."""
_NOTHING = "thing"  # the anchor where the kind is itself a name (a sailboat is a boat) or too near
_STYLE_SENTENCES = ("a {s} picture of a {n}", "a {n}, {s} style", "a {s} {n} with a red background")


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What to erase and what to keep.

    Attributes:
        names: Of what goes, all of them.
        name_anchors: What each becomes.
        concept: Number of the concept of each name, from 0.
        prompts: Sentences with the names, ``len(templates)`` a name.
        anchors: The same sentences with the anchors.
        neutral: One anchor for all names, as a rule farther from them than a kind is.
        neutral_anchors: The same sentences with that.
        kept: Names of what stays.
        kept_prompts: Sentences with them.
        kept_words: The name in each of those.
        templates: Sentences with a place for a name.
    """

    names: tuple[str, ...]
    name_anchors: tuple[str, ...]
    concept: tuple[int, ...]
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]
    neutral: str
    neutral_anchors: tuple[str, ...]
    kept: tuple[str, ...]
    kept_prompts: tuple[str, ...]
    kept_words: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def each(self) -> int:
        """Sentences a name."""
        return len(self.prompts) // len(self.names)

    def prompt_concepts(self) -> list[int]:
        """Return the number of the concept of each sentence of what goes."""
        return [number for number in self.concept for _ in range(self.each)]

    def prompt_words(self) -> list[str]:
        """Return the name in each sentence of what goes."""
        return [name for name in self.names for _ in range(self.each)]


@dataclass(frozen=True)
class Fitted:
    """An eraser and how it goes in.

    Attributes:
        eraser: The eraser, or a negative prompt.
        apply: Keyword arguments of its ``apply``.
    """

    eraser: Editing | NegativePrompt
    apply: Mapping[str, object] = field(default_factory=dict)


def object_lists(objects: Sequence[EmojiObject], targets: Sequence[str]) -> Lists:
    """Return the lists for erasing objects: all their names, each to the kind of thing it is.

    Args:
        objects: All objects.
        targets: Main names of those that go.
    """
    gone = [one for one in objects if one.name in targets]
    names = [
        (name, _NOTHING if one.kind in one.names else one.kind, i)
        for i, one in enumerate(gone)
        for name in one.names
    ]
    kept = [one.name for one in objects if one.name not in targets]

    def filled(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(sentence.format(word) for word in words for sentence in SENTENCES)

    return Lists(
        names=tuple(name for name, _, _ in names),
        name_anchors=tuple(kind for _, kind, _ in names),
        concept=tuple(i for _, _, i in names),
        prompts=filled([name for name, _, _ in names]),
        anchors=filled([kind for _, kind, _ in names]),
        neutral=_NOTHING,
        neutral_anchors=filled([_NOTHING for _ in names]),
        kept=tuple(kept),
        kept_prompts=filled(kept),
        kept_words=tuple(name for name in kept for _ in SENTENCES),
        templates=SENTENCES,
    )


def style_lists(objects: Sequence[EmojiObject], target: str, anchor: str = "flat") -> Lists:
    """Return the lists for erasing a style: sentences about every fifth object, the style replaced by another.

    Args:
        objects: All objects.
        target: The style that goes.
        anchor: The style it becomes.
    """

    def filled(styles: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            s.format(s=style, n=n) for style in styles for n in names for s in _STYLE_SENTENCES
        )

    names = [one.name for one in objects]
    others = [style for style in STYLES if style != target]
    templates = tuple(s.format(s="{}", n=n) for s in _STYLE_SENTENCES for n in names[::10])
    return Lists(
        names=(target,),
        name_anchors=(anchor,),
        concept=(0,),
        prompts=filled([target], names[::5]),
        anchors=filled([anchor], names[::5]),
        neutral=anchor,
        neutral_anchors=filled([anchor], names[::5]),
        kept=(*others, *names),
        kept_prompts=(*filled(others, names), *(f"a picture of a {n}" for n in names)),
        kept_words=(*(o for o in others for _ in names for _ in _STYLE_SENTENCES), *names),
        templates=templates,
    )


def _uce_names(pipe: object, lists: Lists) -> Fitted:
    """UCE as published for objects: the last token of each name to the blank prompt."""
    return Fitted(ce.UceEraser.fit(pipe, erase=lists.names, anchor="", preserve=lists.kept))


def _uce_eraser(
    pipe: object, lists: Lists, preserve_weight: float, anchors: Sequence[str] | None = None
) -> ce.UceEraser:
    return ce.UceEraser.fit(
        pipe, erase=lists.prompts, anchor=anchors or lists.anchors, preserve=lists.kept_prompts, rule="all_but_sot",
        preserve_rule="all_but_sot", preserve_weight=preserve_weight,
    )  # fmt: skip


def _uce(pipe: object, lists: Lists) -> Fitted:
    """UCE on whole sentences, erasing hard: kept sentences weigh a tenth."""
    return Fitted(_uce_eraser(pipe, lists, 0.1))


def _uce_keeping(pipe: object, lists: Lists) -> Fitted:
    """UCE on whole sentences, keeping hard: kept sentences weigh as much as erased ones."""
    return Fitted(_uce_eraser(pipe, lists, 1.0))


def _rece(pipe: object, lists: Lists) -> Fitted:
    eraser = ce.ReceEraser.fit(
        pipe, erase=lists.prompts, anchor=lists.anchors, preserve=lists.kept_prompts, rule="all_but_sot",
        preserve_weight=0.1,
    )  # fmt: skip
    return Fitted(eraser)


def _speed(pipe: object, lists: Lists) -> Fitted:
    # Names alone: sentences at all positions are more pairs than the null space of what is kept has dimensions.
    eraser = ce.SpeedEraser.fit(
        pipe, erase=lists.names, anchor=lists.name_anchors, preserve=lists.kept, maps=("key", "value")
    )  # fmt: skip
    return Fitted(eraser)


def _mace(pipe: object, lists: Lists) -> Fitted:
    eraser = ce.MaceEraser.fit(
        pipe, erase=lists.names, anchor=lists.name_anchors, preserve=lists.kept_prompts, templates=lists.templates
    )  # fmt: skip
    return Fitted(eraser)


def _trce(pipe: object, lists: Lists) -> Fitted:
    eraser = ce.TrceEraser.fit(
        pipe, erase=lists.names, anchor=lists.name_anchors, preserve=lists.kept_prompts, templates=lists.templates,
        preserve_weight=1.0,
    )  # fmt: skip
    return Fitted(eraser)


def _realera(pipe: object, lists: Lists) -> Fitted:
    # The method reads the last token of a name, so only sentences that end in it will do.
    ending = tuple(one for one in lists.templates if one.endswith("{}")) or ("a {}",)
    eraser = ce.RealEraEraser.fit(
        pipe, erase=lists.names, anchor=lists.name_anchors, preserve=lists.kept, paraphrases=ending,
        unrelated=lists.kept_prompts[:: lists.each],
    )  # fmt: skip
    return Fitted(eraser)


def _anchored(pipe: object, lists: Lists) -> Fitted:
    each = lists.each
    eraser = ce.AnchoredProjectionEraser.fit(
        pipe, erase=lists.prompts[::each], anchor=lists.anchors[::each], rule="first_eot",
        preserve=lists.kept_prompts, preserve_rule="all_but_sot", hard=False,
    )  # fmt: skip
    return Fitted(eraser)


def _labelled(pipe: object, lists: Lists) -> Representations:
    """Return text vectors of all sentences with the concept of each, one class for everything else."""
    found = text_representations(pipe, lists.prompts, lists.kept_prompts, rule="all_but_sot")
    return replace(found, z=_concepts(lists)[_owners(found)])


def _owners(found: Representations) -> Tensor:
    if found.rows is None:
        raise RuntimeError("text vectors came without the number of their prompt")
    return found.rows.cpu()


def _concepts(lists: Lists) -> Tensor:
    """Return the number of the concept of each sentence, from 1; 0 for what stays."""
    gone = [1 + number for number in lists.prompt_concepts()]
    return torch.tensor([*gone, *[0] * len(lists.kept_prompts)])


def _places(tokenizer: Any, prompt: str, word: str) -> list[int]:  # noqa: ANN401 - from an extra
    """Return the place of each position but the first: 0 before the word, name, its last token, words after, end, pads.

    A causal encoder writes the concept in another direction at each of these places.
    """
    start = 1 + len(tokenizer.tokenize(prompt.split(word)[0].strip()))
    stop = start + len(tokenizer.tokenize(word))
    end = len(tokenizer(prompt).input_ids) - 1
    found = []
    for i in range(1, tokenizer.model_max_length):
        if i >= end:
            found.append(6 if i == end else 7 + (i - end >= 2) + (i - end >= 5))
        elif i >= stop:
            found.append(3 + min(i - stop, 2))
        else:
            found.append(0 if i < start else 1 + (i == stop - 1))
    return found


def _by_place(pipe: object, lists: Lists) -> Representations:
    """Return text vectors from the name on, with a column a concept and place.

    A column is 1 at the concept and 0 at everything else, less its mean at that place, so that what differs between
    places is not taken for the concept.
    """
    parts: Any = pipe
    found = text_representations(pipe, lists.prompts, lists.kept_prompts, rule="all_but_sot")
    prompts = (*lists.prompts, *lists.kept_prompts)
    words = (*lists.prompt_words(), *lists.kept_words)
    place = torch.tensor(
        [
            p
            for prompt, word in zip(prompts, words, strict=True)
            for p in _places(parts.tokenizer, prompt, word)
        ]
    )
    concept = _concepts(lists)[_owners(found)]
    columns = []
    for number in range(1, int(concept.max()) + 1):
        for where in range(1, int(place.max()) + 1):
            here = place == where
            hit = (here & (concept == number)).double()
            if 0 < hit.sum() < here.sum():
                columns.append(hit - here * hit.sum() / here.sum())
    after = place > 0
    rows = None if found.rows is None else found.rows[after]
    return replace(found, x=found.x[after], z=torch.stack(columns, 1)[after], rows=rows)


_ENCODER: Mapping[str, object] = {"sites": "text_encoder"}


@dataclass(frozen=True)
class _Both:
    """Two erasers, one after the other.

    Attributes:
        parts: Each with how it goes in.
    """

    parts: tuple[Fitted, ...]

    def apply(self, pipe: object) -> _Both:
        """Put both in."""
        edits = [part.eraser.apply(pipe, **part.apply) for part in self.parts]  # type: ignore[union-attr]
        object.__setattr__(self, "_edits", edits)
        return self

    def undo(self) -> None:
        """Take both out, the last first."""
        for edit in reversed(getattr(self, "_edits", [])):
            edit.undo()


def _leace(pipe: object, lists: Lists) -> Fitted:
    """LEACE of the concept at all positions together: one direction a concept."""
    return Fitted(ce.LeaceEraser.fit(_labelled(pipe, lists)), _ENCODER)


def _leace_by_place(pipe: object, lists: Lists) -> Fitted:
    """LEACE of the concept at each place of a sentence apart."""
    return Fitted(ce.LeaceEraser.fit(_by_place(pipe, lists), z_kind="continuous"), _ENCODER)


def _leace_and_uce(pipe: object, lists: Lists) -> Fitted:
    return Fitted(_Both((_leace(pipe, lists), _uce_keeping(pipe, lists))))


def _leace_and_uce_balanced(pipe: object, lists: Lists) -> Fitted:
    """LEACE and UCE to a neutral anchor; what stays weighs twice as much as what goes, however many go.

    With a weight for each sentence, more to erase means more of it against the rest. A kind is near its things: a
    dessert is closer to a cake than a thing is.
    """
    weight = 2 * len(lists.prompts) / len(lists.kept_prompts)
    uce = Fitted(_uce_eraser(pipe, lists, weight, lists.neutral_anchors))
    return Fitted(_Both((_leace(pipe, lists), uce)))


def _leace_and_mace_balanced(pipe: object, lists: Lists) -> Fitted:
    """LEACE and MACE to a neutral anchor; what stays weighs as much as all positions of what goes."""
    parts: Any = pipe
    positions = parts.tokenizer.model_max_length - 1
    mace = ce.MaceEraser.fit(
        pipe, erase=lists.names, anchor=lists.neutral, preserve=lists.kept_prompts, templates=lists.templates,
        preserve_weight=positions * len(lists.names) * len(lists.templates),
    )  # fmt: skip
    return Fitted(_Both((_leace(pipe, lists), Fitted(mace))))


def _leace_by_place_and_uce(pipe: object, lists: Lists) -> Fitted:
    return Fitted(_Both((_leace_by_place(pipe, lists), _uce_keeping(pipe, lists))))


def _mean(pipe: object, lists: Lists) -> Fitted:
    return Fitted(ce.MeanProjectionEraser.fit(_labelled(pipe, lists)), _ENCODER)


def _rlace(pipe: object, lists: Lists) -> Fitted:
    return Fitted(ce.RlaceEraser.fit(_labelled(pipe, lists), starts=1), _ENCODER)


def _negative(pipe: object, lists: Lists) -> Fitted:
    return Fitted(NegativePrompt(", ".join(lists.names)))


METHODS: dict[str, Callable[[object, Lists], Fitted]] = {
    "negative prompt": _negative,
    "uce, names only": _uce_names,
    "uce": _uce,
    "uce, keeping": _uce_keeping,
    "rece": _rece,
    "speed": _speed,
    "mace": _mace,
    "trce": _trce,
    "realera": _realera,
    "anchored-projection": _anchored,
    "leace": _leace,
    "leace by place": _leace_by_place,
    "leace and uce": _leace_and_uce,
    "leace and uce, balanced": _leace_and_uce_balanced,
    "leace and mace, balanced": _leace_and_mace_balanced,
    "leace by place and uce": _leace_by_place_and_uce,
    "rlace": _rlace,
    "mean-projection": _mean,
}
"""Name in the tables to what fits it."""
