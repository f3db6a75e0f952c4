"""The same facts asked in other words: paraphrases, solved examples before the question, forms that follow from a fact.

An erasure that holds for one wording only has taught the model a wording. The wordings here are English; other
languages, and facts entailed by a fact, cannot be made by rule and are taken from the caller.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import BLANK, FORMATS, Fact, Item, plain
from concept_erasure.evals.language._attack import how_of
from concept_erasure.evals.language._wordings import WORDINGS
from concept_erasure.evals.language.items import How, ItemScores, item_scores
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.statistics import Paired, paired, share
from concept_erasure.report import Cell, Interval

__all__ = [
    "WORDINGS",
    "Ripple",
    "few_shot",
    "paraphrase",
    "rewording",
    "ripple",
    "ripple_forms",
    "translated",
]


def paraphrase(
    items: Sequence[Item], *, count: int = 4, wordings: Sequence[str] | None = None, seed: int = 0
) -> list[list[Item]]:
    """Return several wordings of items; what is asked, the choices and their order stay.

    Args:
        items: Items of one or several formats.
        count: Wordings of each, drawn from those of its format, each once.
        wordings: Own wordings with ``{stem}``. A wording of a question may hold the blank, for its own cue to the
            answer.
        seed: Of the drawing.

    Returns:
        ``count`` lists, each with one wording of every item, in the order of the items.

    Raises:
        ValueError: There are not that many wordings, or one has no ``{stem}``.
    """
    pools = dict.fromkeys(FORMATS, tuple(wordings)) if wordings is not None else WORDINGS
    for one in [one for pool in pools.values() for one in pool]:
        if "{stem}" not in one:
            raise ValueError(f"a wording needs {{stem}}; got {one!r}")
    made: list[list[Item]] = [[] for _ in range(count)]
    for item in items:
        pool = pools[item.format]
        if not 1 <= count <= len(pool):
            raise ValueError(
                f"there are {len(pool)} wordings of a {item.format}; got count={count}"
            )
        drawn = random.Random(f"{seed}\0{item.stem}").sample(pool, count)  # noqa: S311 - not for secrets
        for k, wording in enumerate(drawn):
            if item.format != "question" and BLANK in wording:
                raise ValueError(
                    f"a wording of a {item.format} must hold no second blank; got {wording!r}"
                )
            made[k].append(replace(item, stem=wording.replace("{stem}", item.stem)))
    return made


def few_shot(
    items: Sequence[Item],
    pool: Sequence[Item],
    *,
    shots: int = 5,
    letters: bool = False,
    seed: int = 0,
) -> list[Item]:
    """Put solved examples before every item.

    Args:
        items: What is asked.
        pool: Items of the same format to take the examples from, as of other concepts; one with the stem of the item,
            or in which its right answer occurs, is not taken, so that nothing is given away.
        shots: Examples before each item.
        letters: Print the choices and solve with a letter, for items that are scored by letters.
        seed: Of the examples, drawn for each item on its own.

    Returns:
        The items in their order, with the examples in their stems.

    Raises:
        ValueError: There are not enough examples, or their format is another.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1; got {shots}")
    said = [f" {plain(' '.join([one.stem, *one.choices]))} " for one in pool]
    made = []
    for item in items:
        answer = f" {plain(item.right)} "
        able = [
            one
            for one, text in zip(pool, said, strict=True)
            if one.format == item.format and one.stem != item.stem and answer not in text
        ]
        if len(able) < shots:
            raise ValueError(
                f"{shots} examples of the format {item.format!r} are needed that do not give {item.stem[:50]!r} "
                f"away; got {len(able)}"
            )
        drawn = random.Random(f"{seed}\0{item.stem}").sample(able, shots)  # noqa: S311 - not for secrets
        before = [_solved(one, letters) for one in drawn]
        made.append(replace(item, stem="\n\n".join([*before, _open(item, letters)])))
    return made


def _solved(item: Item, letters: bool) -> str:
    if letters:
        return f"{item.lettered} {chr(65 + item.answer)}"
    if BLANK in item.stem:
        return f"Statement: {item.stem.replace(BLANK, item.right)}"
    return f"{item.prompt} {item.right}"


def _open(item: Item, letters: bool) -> str:
    if letters:
        return item.stem
    if BLANK in item.stem:
        return f"Statement: {item.stem}"
    return f"{item.prompt} {BLANK}"


def translated(
    items: Sequence[Item],
    stems: Mapping[str, str],
    choices: Mapping[str, str] | None = None,
) -> list[Item]:
    """Return items in the caller's words, such as those of another language.

    Args:
        items: Items.
        stems: The new stem of each old one. Of a statement it must hold the blank once, at its end in a cloze.
        choices: The new word for old choices; those not named stay.

    Returns:
        The items that have a new stem, in their order.

    Raises:
        ValueError: No item has one, a blank is missing, or two choices become one.
    """
    made = []
    for item in items:
        if item.stem not in stems:
            continue
        stem = stems[item.stem]
        if stem.count(BLANK) != item.stem.count(BLANK) or (
            item.format == "cloze" and not stem.endswith(BLANK)
        ):
            raise ValueError(
                f"the blank {BLANK} must stand in {stem!r} as it does in {item.stem!r}"
            )
        words = tuple((choices or {}).get(one, one) for one in item.choices)
        if len(set(words)) < len(words):
            raise ValueError(f"two choices of {item.stem!r} have become one: {words}")
        made.append(replace(item, stem=stem, choices=words))
    if not made:
        raise ValueError("none of the items has a new stem; the keys of stems must be their stems")
    return made


def ripple_forms(
    concept: Concept,
    *,
    wordings: int = 2,
    shots: int = 3,
    choices: int = 4,
    entailed: Sequence[Item] = (),
    others: Mapping[str, Sequence[Item]] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, list[Item]]:
    """Return every fact of a concept in all the forms that can be made of it.

    Args:
        concept: A concept with facts.
        wordings: Paraphrases of each format; 0 leaves them out.
        shots: Solved examples, from the facts of the near and far sets; 0 leaves these forms out.
        choices: Of each item.
        entailed: Items on what follows from the facts, from the caller.
        others: Further forms by name, such as ``{"German": translated(...)}``.
        limit: Facts at most, drawn at random; None takes all.
        seed: Of everything drawn.

    Returns:
        Items by the name of the form. Forms made here have one item for each fact, in the order of the facts.

    Raises:
        ValueError: The concept has no facts, or a name is taken.
    """
    facts = _drawn(concept, limit, seed)
    made: dict[str, list[Item]] = {}
    known = [fact for one in (*concept.near, *concept.far) for fact in one.facts]
    for kind in FORMATS:
        items = [fact.item(kind, concept.name, seed=seed, choices=choices) for fact in facts]
        made[kind] = items
        for k in range(wordings):
            made[f"{kind}, reworded {k + 1}"] = paraphrase(items, count=wordings, seed=seed)[k]
        if shots:
            pool = [fact.item(kind, seed=seed, choices=choices) for fact in known]
            if len(pool) >= shots:
                made[f"{kind}, {shots} examples"] = few_shot(items, pool, shots=shots, seed=seed)
    if entailed:
        made["entailed"] = list(entailed)
    for name, more in (others or {}).items():
        if name in made:
            raise ValueError(f"the form {name!r} is there already; give it another name")
        made[name] = list(more)
    return made


def _drawn(concept: Concept, limit: int | None, seed: int) -> list[Fact]:
    """Return the facts of a concept, or as many of them as the limit allows."""
    if not concept.facts:
        raise ValueError(f"the concept {concept.name!r} has no facts to reword")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    facts = list(concept.facts)
    if limit is None or limit >= len(facts):
        return facts
    return random.Random(seed).sample(facts, limit)  # noqa: S311 - not for secrets


@dataclass(frozen=True)
class Ripple:
    """Accuracy on the same facts in several forms.

    Attributes:
        accuracy: By the name of the form.
        log_prob: Mean log-probability of the right answer in nats, by form.
        chance: By form.
        any_form: Share of the facts that are right in at least one form; None without forms of the same facts.
        any_form_chance: What independent guesses in each of these forms would give.
        all_forms: Share of the facts that are right in every form.
        items: By form.
        gains: For each form other than a plain one: the same facts in it against the plain form of the same format.
        seed: Of the forms, if it was given.
        aligned: Forms of the same facts.
    """

    accuracy: Mapping[str, Interval]
    log_prob: Mapping[str, float]
    chance: Mapping[str, float]
    any_form: Interval | None
    any_form_chance: float | None
    all_forms: Interval | None
    items: Mapping[str, int]
    gains: Mapping[str, Paired] = field(default_factory=dict)
    seed: int | None = None
    aligned: tuple[str, ...] = ()

    @property
    def worst(self) -> str:
        """The form that gets most answers out."""
        return max(self.accuracy, key=lambda name: self.accuracy[name].value)

    @property
    def broke(self) -> bool:
        """Whether a form gets significantly more facts right than the plain one of its format.

        Exact McNemar tests at 5 % in all, by Bonferroni over the forms.
        """
        level = 0.05 / max(1, len(self.gains))
        return any(one.difference.value > 0 and one.p < level for one in self.gains.values())

    @property
    def budget(self) -> str:
        """What was asked, in words."""
        return f"{len(self.accuracy)} forms of {max(self.items.values())} items at most"

    def rows(self) -> list[dict[str, Cell]]:
        """Return a line for each form, ready for a `Report`."""
        made: list[dict[str, Cell]] = []
        for name, accuracy in self.accuracy.items():
            gain = self.gains.get(name)
            made.append(
                {
                    "form": name,
                    "accuracy": accuracy,
                    "chance": self.chance[name],
                    "log-probability": self.log_prob[name],
                    "against the plain form": None if gain is None else gain.difference,
                    "p": None if gain is None else gain.p,
                    "items": self.items[name],
                }
            )
        if self.any_form is not None:
            count, several = self.items[self.aligned[0]], len(self.aligned)
            some: dict[str, Cell] = {"form": f"any of {several}", "accuracy": self.any_form}
            made.append({**some, "chance": self.any_form_chance, "items": count})
            made.append({"form": f"all of {several}", "accuracy": self.all_forms, "items": count})
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the lines and the seed in plain values and intervals."""
        return {
            "forms": self.rows(),
            "broke": self.broke,
            "worst form": self.worst,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        forms = ", ".join(f"{name} {one.value:.3f}" for name, one in self.accuracy.items())
        some = "" if self.any_form is None else f"; in any form {self.any_form.value:.3f}"
        return f"Ripple({forms}{some})"


def ripple(
    model: nn.Module,
    tokenizer: TokenizerLike,
    forms: Mapping[str, Sequence[Item]],
    *,
    how: How | None = None,
    batch_size: int = 16,
    seed: int | None = None,
) -> Ripple:
    """Ask the same facts in several forms of a live model.

    Args:
        model: A causal language model, edits in force included; left as it was.
        tokenizer: Its tokenizer.
        forms: Items by the name of the form, as `ripple_forms` gives them. Forms that have as many items as the first
            are taken to be of the same facts in the same order, unless their right answers differ.
        how: How items are scored; None is by their format.
        batch_size: Items a forward pass.
        seed: Of the forms, for the record.

    Raises:
        ValueError: There are no forms, or one has no items.
    """
    if not forms:
        raise ValueError("there are no forms to ask; make them with ripple_forms(concept)")
    empty = next((name for name, items in forms.items() if not items), None)
    if empty is not None:
        raise ValueError(f"the form {empty!r} has no items")
    scores: dict[str, ItemScores] = {
        name: item_scores(
            model, tokenizer, list(items), how=how or how_of(list(items)), batch_size=batch_size
        )
        for name, items in forms.items()
    }
    first = [item.right for item in next(iter(forms.values()))]
    aligned = [name for name, items in forms.items() if [item.right for item in items] == first]
    some = every = None
    if len(aligned) > 1:
        right = torch.stack([scores[name].correct for name in aligned])
        some, every = share(right.any(0).tolist()), share(right.all(0).tolist())
    return Ripple(
        accuracy={name: one.accuracy for name, one in scores.items()},
        log_prob={name: one.mean_log_prob.value for name, one in scores.items()},
        chance={name: one.chance for name, one in scores.items()},
        any_form=some,
        any_form_chance=_by_guessing([forms[name] for name in aligned]) if some else None,
        all_forms=every,
        items={name: len(one) for name, one in scores.items()},
        gains=_gains(scores, forms, aligned),
        seed=seed,
        aligned=tuple(aligned) if some else (),
    )


def _by_guessing(forms: Sequence[Sequence[Item]]) -> float:
    """Return the expected share of facts that independent guesses get right in one form or more."""
    missed = [
        torch.tensor([1 - 1 / len(item.choices) for item in items]).double() for items in forms
    ]
    return float(1 - torch.stack(missed).prod(0).mean())


def _gains(
    scores: Mapping[str, ItemScores], forms: Mapping[str, Sequence[Item]], aligned: Sequence[str]
) -> dict[str, Paired]:
    """Compare every form with the first one of its format, on the same facts."""
    plain: dict[str, str] = {}
    made: dict[str, Paired] = {}
    for name in aligned:
        kind = forms[name][0].format
        before = plain.setdefault(kind, name)
        if before != name:
            made[name] = paired(scores[before].correct.tolist(), scores[name].correct.tolist())
    return made


def rewording(
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    *,
    wordings: int = 2,
    shots: int = 3,
    entailed: Sequence[Item] = (),
    others: Mapping[str, Sequence[Item]] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Ripple:
    """Ask every fact of a concept in all forms, of a live model: `ripple` of `ripple_forms`.

    Args:
        model: A causal language model, edits in force included; left as it was.
        tokenizer: Its tokenizer.
        concept: A concept with facts.
        wordings: Paraphrases of each format.
        shots: Solved examples of other concepts before the item.
        entailed: Items on what follows from the facts.
        others: Further forms by name, such as translations.
        limit: Facts at most.
        batch_size: Items a forward pass.
        seed: Of everything drawn.

    Raises:
        ValueError: The concept has no facts, or a number is out of range.
    """
    forms = ripple_forms(
        concept,
        wordings=wordings,
        shots=shots,
        entailed=entailed,
        others=others,
        limit=limit,
        seed=seed,
    )
    return ripple(model, tokenizer, forms, batch_size=batch_size, seed=seed)
