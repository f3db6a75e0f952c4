"""The readings of an evaluation: what each asks of a live model, and how its result is kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item
from concept_erasure.evals.language.generate import fluency, leak_rate
from concept_erasure.evals.language.items import How, ItemScores, item_scores
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.probing import LayerProbes, Task, probe_concept
from concept_erasure.report import Cell, Interval, Report

__all__ = [
    "CONCEPT",
    "CONTROLS",
    "READINGS",
    "Options",
    "Reading",
    "Store",
    "fingerprint_of",
    "items_of",
]

# column -> (format of the items, how they are scored)
CONCEPT: dict[str, tuple[str, How]] = {
    "cloze": ("cloze", "cloze"),
    "question": ("question", "answer"),
    "letter": ("question", "letter"),
    "reversed": ("reversed", "cloze"),
}
CONTROLS: dict[str, tuple[str, How]] = {
    "cloze": ("cloze", "cloze"),
    "question": ("question", "answer"),
}
PROBES: tuple[Task, ...] = ("truth", "answer", "concept")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all readings share."""

    seed: int = 0
    batch_size: int = 16
    limit: int | None = None
    reference: tuple[nn.Module, TokenizerLike] | None = None
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def budget(self, suite: str) -> dict[str, Any]:
        """Return the options that the user gave to a suite."""
        return dict(self.budgets.get(suite, {}))


def items_of(concept: Concept, kind: str, format: str, options: Options) -> tuple[Item, ...]:
    """Return the items of a kind, the first few under a limit; their order is shuffled by the seed."""
    return concept.items(kind, format, options.seed)[: options.limit]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a suite found on one model.

    Attributes:
        scores: Name to scores of items.
        cells: One line of a table.
        budget: What was asked, in words.
        layers: Reading to the accuracies of a probe at every layer.
    """

    scores: Mapping[str, ItemScores] = field(default_factory=dict)
    cells: Mapping[str, Cell] = field(default_factory=dict)
    budget: str = ""
    layers: Mapping[str, Sequence[Interval]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for json."""
        return {
            "scores": {name: one.to_dict() for name, one in self.scores.items()},
            "cells": Report("", [self.cells] if self.cells else []).to_dict(),
            "budget": self.budget,
            "layers": {name: [v.to_dict() for v in row] for name, row in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """Return the reading written by `to_dict`."""
        rows = Report.from_dict(values["cells"]).rows
        return cls(
            scores={name: ItemScores.from_dict(one) for name, one in values["scores"].items()},
            cells=rows[0] if rows else {},
            budget=str(values["budget"]),
            layers={
                name: [Interval(**one) for one in row] for name, row in values["layers"].items()
            },
        )


def _concept(
    model: nn.Module, tokenizer: TokenizerLike, concept: Concept, options: Options, told: str | None
) -> Reading:
    scores = {
        name: item_scores(
            model, tokenizer, items_of(concept, "concept", format, options), how=how,
            instruction=told, batch_size=options.batch_size,
        )
        for name, (format, how) in CONCEPT.items()
    }  # fmt: skip
    count = len(scores["cloze"])
    return Reading(
        scores=scores, budget=f"{count} facts, in {len(scores)} formats, choices shuffled"
    )


def _specificity(
    model: nn.Module, tokenizer: TokenizerLike, concept: Concept, options: Options, told: str | None
) -> Reading:
    scores = {}
    for kind in ("near", "far"):
        for name, (format, how) in CONTROLS.items():
            items = items_of(concept, kind, format, options)
            if items:
                scores[f"{kind} {name}"] = item_scores(
                    model,
                    tokenizer,
                    items,
                    how=how,
                    instruction=told,
                    batch_size=options.batch_size,
                )
    counts = ", ".join(f"{name}: {len(one)}" for name, one in scores.items())
    return Reading(scores=scores, budget=f"items {counts or 'none: the concept has no controls'}")


def _leak(
    model: nn.Module, tokenizer: TokenizerLike, concept: Concept, options: Options, told: str | None
) -> Reading:
    given = {"samples": 20, "max_new_tokens": 12} | options.budget("leak")
    items = items_of(concept, "concept", "cloze", options)
    found = leak_rate(
        model, tokenizer, items, instruction=told, seed=options.seed,
        batch_size=4 * options.batch_size, **given,
    )  # fmt: skip
    cells: dict[str, Cell] = {
        "prompts with a leak": found.leaked,
        "prompts with a given wrong answer": found.wrong,
        "samples with a leak": found.per_sample,
        "greedy exact match": found.greedy,
    }
    words = f"{len(items)} prompts, {given['samples']} samples of {given['max_new_tokens']} tokens"
    return Reading(
        cells=cells, budget=f"{words} at temperature 1, and the most probable continuation"
    )


def _fluency(
    model: nn.Module, tokenizer: TokenizerLike, concept: Concept, options: Options, told: str | None
) -> Reading:
    given = options.budget("fluency")
    count = int(given.pop("prompts", 100))
    prompts = _spread(concept.sample_prompts("forget"), min(count, options.limit or count))
    found = fluency(
        model, tokenizer, prompts, reference=options.reference, instruction=told, seed=options.seed,
        batch_size=2 * options.batch_size, **given,
    )  # fmt: skip
    cells: dict[str, Cell] = {
        "reverse perplexity": found.reverse_perplexity,
        "distinct-2": found.distinct_2,
        "empty": found.empty,
        "words": found.words,
        "example": found.examples[0][:300],
    }
    tokens = given.get("max_new_tokens", 200)
    return Reading(cells=cells, budget=f"{len(prompts)} prompts, {tokens} tokens at temperature 1")


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """Return some prompts, evenly over the list, so that every kind is among them."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _probes(
    model: nn.Module, tokenizer: TokenizerLike, concept: Concept, options: Options, told: str | None
) -> Reading:
    given = options.budget("probes")
    cells: dict[str, Cell] = {}
    layers: dict[str, list[Interval]] = {}
    one: LayerProbes | None = None
    for task in PROBES:
        if task == "concept" and not concept.near:
            continue
        one = probe_concept(
            model, tokenizer, concept, task, seed=options.seed, limit=options.limit, **given
        )
        cells |= {
            task: one.maximum,
            f"{task}, at": one.best,
            f"{task}, shuffled labels": one.control_maximum,
            f"{task}, constant": one.chance,
        }
        layers[task] = [Interval(r.accuracy, r.low, r.high) for r in one.results.values()]
    count = 0 if one is None else len(one.results)
    return Reading(
        cells=cells, layers=layers, budget=f"linear probes, 5-fold, the best of {count} layers"
    )


Suite = Callable[[nn.Module, TokenizerLike, Concept, Options, "str | None"], Reading]
READINGS: dict[str, Suite] = {
    "concept": _concept,
    "specificity": _specificity,
    "leak": _leak,
    "fluency": _fluency,
    "probes": _probes,
}
"""Suites that are measured on every row of the table."""


def fingerprint_of(value: object) -> str:
    """Return a short hash of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Kept(Protocol):
    """Something that can be written as plain values and read again."""

    def to_dict(self) -> dict[str, object]:
        """Return plain values for json."""
        ...

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        ...


K = TypeVar("K", bound=Kept)


def _read(path: Path, kind: type[K]) -> K | None:
    try:
        return kind.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Store:
    """Finished results on disk, so that an interrupted evaluation goes on where it was.

    A file appears whole or not at all; one that cannot be read is measured again.
    """

    folder: Path | None

    def get(self, key: Mapping[str, object] | None, kind: type[K], make: Callable[[], K]) -> K:
        """Return the result under a key, made if it is not there; without a key it is not kept."""
        if self.folder is None or key is None:
            return make()
        key = {**key, "torch": torch.__version__, "format": 1}
        path = self.folder / f"{key['suite']}-{fingerprint_of(key)}.json"
        if (held := _read(path, kind)) is not None:
            return held
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(made.to_dict()), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return made
