"""What linear probes still read from the hidden states, layer by layer, of an edited model and of its original.

Three readings. ``truth``: whether a completed statement is true, from its last token; the two completions of one
fact stay on one side of every split. ``answer``: the letter of the right choice, from the last token of an exam
prompt. ``concept``: whether a question is about the concept or a neighbour; a model that reads its input at all can
tell, so this says where the concept is represented and not that it is known. What is reported is the maximum over
layers, next to the maximum of the same probe on shuffled labels, which pays for having chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from concept_erasure.collect import collect
from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.probes import ControlResult, Probe, ProbeResult, control, cross_validate
from concept_erasure.report import Interval
from concept_erasure.sites import find_sites

__all__ = ["LayerProbes", "Task", "probe_concept"]

Task = Literal["truth", "answer", "concept"]


@dataclass(frozen=True)
class LayerProbes:
    """One reading at every layer.

    Attributes:
        task: Which.
        results: Site to the cross-validated probe.
        controls: Site to the same probe on shuffled labels.
        items: Items that the texts were made of.
    """

    task: str
    results: Mapping[str, ProbeResult]
    controls: Mapping[str, ControlResult]
    items: int

    @property
    def best(self) -> str:
        """The site where the most is read."""
        return max(self.results, key=lambda site: self.results[site].accuracy)

    @property
    def maximum(self) -> Interval:
        """Accuracy there, with the interval of one layer (choosing the best one is not in it)."""
        result = self.results[self.best]
        return Interval(result.accuracy, result.low, result.high)

    @property
    def control_maximum(self) -> float:
        """The largest accuracy over layers on shuffled labels."""
        return max(one.accuracy for one in self.controls.values())

    @property
    def selectivity(self) -> float:
        """Maximum over layers minus the maximum on shuffled labels."""
        return self.maximum.value - self.control_maximum

    @property
    def chance(self) -> float:
        """Accuracy of the constant probe."""
        return self.results[self.best].majority

    def to_dict(self) -> dict[str, object]:
        """Return plain values for json."""
        return {
            "task": self.task,
            "items": self.items,
            "best": self.best,
            "maximum": self.maximum.to_dict(),
            "control": self.control_maximum,
            "chance": self.chance,
            "layers": {
                site: Interval(one.accuracy, one.low, one.high).to_dict()
                for site, one in self.results.items()
            },
        }


def _data(
    concept: Concept, task: str, seed: int, limit: int | None
) -> tuple[list[str], list[str], list[int], int]:
    """Return texts, labels and groups of a reading, and how many items it has."""
    if task == "truth":
        items = concept.items("concept", "cloze", seed)[:limit]
        texts, labels = [], []
        for item in items:
            wrong = item.continuations[(item.answer + 1) % len(item.choices)]
            texts += [item.prompt + item.continuations[item.answer], item.prompt + wrong]
            labels += ["true", "false"]
        return texts, labels, [i // 2 for i in range(len(texts))], len(items)
    items = concept.items("concept", "question", seed)[:limit]
    if task == "answer":
        turned = [_turned(item, number) for number, item in enumerate(items)]
        letters = [chr(65 + item.answer) for item in turned]
        return [item.lettered for item in turned], letters, list(range(len(items))), len(items)
    others: Sequence[Item] = concept.items("near", "question", seed)[: len(items)]
    texts = [item.prompt for item in (*items, *others)]
    labels = ["concept"] * len(items) + ["near"] * len(others)
    return texts, labels, list(range(len(texts))), len(texts)


def _turned(item: Item, number: int) -> Item:
    """Return the item with its choices rotated, so that every letter is right equally often over the items."""
    count = len(item.choices)
    shift = item.answer - number % count
    order = [(i + shift) % count for i in range(count)]
    return replace(item, choices=tuple(item.choices[o] for o in order), answer=number % count)


def probe_concept(
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    task: Task = "truth",
    *,
    layers: Sequence[int] | None = None,
    probe: str | Probe = "linear",
    folds: int = 5,
    n_controls: int = 1,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
) -> LayerProbes:
    """Probe the outputs of all blocks of a live model, edits in force included.

    Args:
        model: A causal language model; left as it was.
        tokenizer: Its tokenizer.
        concept: With facts; for the reading ``concept`` also with neighbours' facts.
        task: ``truth``, ``answer`` or ``concept``.
        layers: Numbers of blocks, negative ones from the end; default all.
        probe: A name in `concept_erasure.probes.PROBES`, or a configured probe.
        folds: Parts of the cross-validation.
        n_controls: Shufflings of the labels at each layer.
        seed: Of items, parts and shufflings.
        limit: Items at most.
        batch_size: Texts a forward pass.

    Raises:
        ValueError: If there is no such reading or layer, or there are too few items.
    """
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
    texts, labels, groups, items = _data(concept, task, seed, limit)
    if items < 2 * folds:
        raise ValueError(
            f"{folds} parts need at least {2 * folds} items, the concept {concept.name!r} gives {items}; "
            "give it more facts, raise the limit, or take fewer folds"
        )
    sites = [name for name in find_sites(model) if name.startswith("residual.")]
    if layers is not None:
        if any(not -len(sites) <= layer < len(sites) for layer in layers):
            raise ValueError(f"layers must lie in 0 ... {len(sites) - 1}, got {list(layers)}")
        wanted = {sites[layer] for layer in layers}
        sites = [name for name in sites if name in wanted]
    found = collect(
        model, tokenizer, texts, labels, sites=sites, batch_size=batch_size, dtype=torch.float32, progress=False,
    )  # fmt: skip
    results, controls = {}, {}
    for site, held in found.items():
        results[site] = cross_validate(
            held.x, labels, probe=probe, folds=folds, seed=seed, groups=groups
        )
        controls[site] = control(
            held.x, labels, probe=probe, folds=folds, seed=seed, n_permutations=n_controls, groups=groups,
        )  # fmt: skip
    return LayerProbes(task, results, controls, items)
