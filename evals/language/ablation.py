"""Directional ablation: is an erasure one direction in the residual stream that can be taken out again?

At every layer the difference of the mean activations on forget text, edited minus original, is a direction; hooks
project it out. An edit that only adds or moves along it (as RMU does) is then largely undone, without training.

Source: the attack of Lucki et al. 2024, arXiv:2409.18025, after Arditi et al. 2024, arXiv:2406.11717. Deviations: next
to one direction for all layers, chosen among those of the layers, each layer's own is taken out at that layer; the
choice is made on other items than the result; the first token of a text, whose activation dwarfs all others, is left
out of the means.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.collect import accepted, encode_batch, evaluating
from concept_erasure.concept_items import Item
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.errors import ShapeError
from concept_erasure.evals.language._attack import how_of, shown
from concept_erasure.evals.language.items import How, ItemScores, item_scores
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.linalg import LowRankAffine, statistics_dtype
from concept_erasure.report import Cell, Interval
from concept_erasure.sites import hook, resolve

__all__ = ["Ablation", "ablated", "directional_ablation", "directions", "mean_activations"]

About = Literal["origin", "original"]
Means = Mapping[str, Tensor]


def mean_activations(
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    *,
    sites: str | Sequence[str] = "residual.*",
    max_length: int | None = 256,
    batch_size: int = 8,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Return the mean activation at sites over all tokens of texts but each first one.

    Collect those of the original *before* an edit is applied if there is no second copy of the model.

    Args:
        model: A live model; it is left bit-identical.
        tokenizer: Its tokenizer.
        texts: Texts of two tokens or more.
        sites: Names or patterns, see `resolve`.
        max_length: Cut texts to this many tokens; None cuts nothing.
        batch_size: Texts a forward pass.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        Shape ``(d,)`` for each site, float64 (float32 where there is none).

    Raises:
        ValueError: There are no texts, or no token besides first ones.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a non-empty list of texts; got {texts!r}")
    places = resolve(model, sites)
    sums: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            dtype = statistics_dtype(x.device)
            total = (x.to(dtype) * mask.to(x.device, dtype)[..., None]).sum((0, 1))
            sums[name] = sums[name] + total if name in sums else total

        return add

    count = 0
    handles = [hook(model, site, adder(site.name)) for site in places]
    try:
        with evaluating(model):
            starts = range(0, len(texts), batch_size)
            for start in tqdm(starts, desc="means", leave=False, disable=not shown(progress)):
                part = texts[start : start + batch_size]
                batch = encode_batch(model, tokenizer, part, start, max_length)
                mask = batch["attention_mask"].clone()
                mask[:, 0] = 0  # padded on the right: the first place holds the first token
                count += int(mask.sum())
                model(**accepted(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("every text has one token only: there is nothing to take a mean of")
    return {name: total / count for name, total in sums.items()}


def directions(edited: Means, original: Means, *, rtol: float = 1e-4) -> dict[str, Tensor]:
    """Return the unit vector from the original's mean to the edited model's, where they differ.

    Args:
        edited: Means by site, shape ``(d,)`` each.
        original: The same sites.
        rtol: A difference below this share of the original's norm counts as none: an edit changes nothing before
            the first layer it acts on.

    Raises:
        ShapeError: Sites or widths differ.
        ValueError: The means differ nowhere.
    """
    if set(edited) != set(original):
        raise ShapeError(f"the means are of other sites: {sorted(set(edited) ^ set(original))}")
    made: dict[str, Tensor] = {}
    for name, mean in edited.items():
        base = original[name].to(mean)
        if base.shape != mean.shape:
            raise ShapeError(f"{name}: widths differ, {tuple(mean.shape)} and {tuple(base.shape)}")
        gap = mean - base
        if float(gap.norm()) > rtol * float(base.norm()):
            made[name] = gap / gap.norm()
    if not made:
        raise ValueError(
            "edited and original model have the same mean activations on these texts: there is no direction to take "
            "out. Is the edit in force, and are the originals those of the model without it?"
        )
    return made


@contextmanager
def ablated(model: nn.Module, taken: Means, *, originals: Means | None = None) -> Iterator[Edit]:
    """Project directions out of a live model while the block runs.

    Args:
        model: The model, edits in force included.
        taken: A unit vector ``(d,)`` for each site.
        originals: Means of the original model at these sites: the component along the direction becomes theirs.
            None makes it zero.
    """
    patches = []
    for site in resolve(model, list(taken)):
        unit = taken[site.name][:, None]
        center = None if originals is None else originals[site.name].to(unit)
        patches.append(HookPatch(site, LowRankAffine(unit, unit, center)))
    with Edit(model, patches, label="directional ablation") as edit:
        yield edit


@dataclass(frozen=True)
class Ablation:
    """What the items give before and after the directions are taken out.

    Attributes:
        before: Accuracy of the edited model on the items kept for the result.
        each: With each layer's own direction taken out at that layer.
        one: With the direction of one layer taken out at all of them; None if that was not tried.
        log_prob: Mean log-probability of the right answer in nats: before, each, one.
        site: Where the direction of `one` comes from, chosen on other items.
        sites: Where there was a direction.
        original: Accuracy of the original model on the same items, if it was given.
        about: What the component becomes: zero, or the original's mean.
        items: For the result.
        choosing_items: For the choice.
        texts: Forget texts of the means.
        tried: Directions among which `one` was chosen.
        seed: Of the split.
        seconds: Time taken.
    """

    before: Interval
    each: Interval
    one: Interval | None
    log_prob: tuple[float, float, float | None]
    site: str | None
    sites: tuple[str, ...]
    original: Interval | None
    about: str
    items: int
    choosing_items: int
    texts: int
    tried: int
    seed: int
    seconds: float

    @property
    def worst(self) -> Interval:
        """The higher of the two accuracies under attack: what the erasure is worth here."""
        return max((one for one in (self.each, self.one) if one is not None), key=lambda i: i.value)

    def to_dict(self) -> dict[str, Cell]:
        """Return plain values and intervals, ready for a row of a `Report`."""
        return {
            "attack": "directional ablation",
            "accuracy before": self.before,
            "accuracy, each layer's direction": self.each,
            "accuracy, one direction": self.one,
            "accuracy of the original": self.original,
            "log-probability before": self.log_prob[0],
            "log-probability, each": self.log_prob[1],
            "log-probability, one": self.log_prob[2],
            "direction from": self.site,
            "component becomes": "zero" if self.about == "origin" else "the original's mean",
            "directions tried": self.tried,
            "items": self.items,
            "items for the choice": self.choosing_items,
            "texts": self.texts,
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        one = "" if self.one is None else f", one direction ({self.site}) {self.one}"
        return f"Ablation(accuracy {self.before} -> each layer's direction {self.each}{one}; n={self.items})"


def directional_ablation(
    model: nn.Module,
    tokenizer: TokenizerLike,
    items: Sequence[Item],
    texts: Sequence[str],
    *,
    original: nn.Module | Means,
    sites: str | Sequence[str] = "residual.*",
    about: About = "origin",
    one: bool = True,
    how: How | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Ablation:
    """Attack a live edited model; it is left bit-identical.

    Args:
        model: The model with its edit in force.
        tokenizer: Its tokenizer.
        items: Items on the concept. With `one`, a half chooses the direction and the other half gives all results.
        texts: Forget texts.
        original: The model without the edit, or its `mean_activations` on the same texts and sites.
        sites: Where directions are taken from and projected out; all of one width.
        about: Whether the component along a direction becomes zero or the original's mean.
        one: Try the direction of each layer at all layers too: as many evaluations as layers.
        how: How items are scored; None is by their format.
        batch_size: Items a forward pass.
        seed: Of the split.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The accuracies, see `Ablation`.

    Raises:
        ValueError: There are too few items, or edited and original model agree on the texts.
    """
    _check(items, about, one)
    begun = time.perf_counter()
    options: dict[str, Any] = {"sites": sites, "progress": progress}
    whole = isinstance(original, nn.Module)
    means: Means = (
        mean_activations(original, tokenizer, texts, **options)
        if isinstance(original, nn.Module)
        else original
    )
    found = directions(mean_activations(model, tokenizer, texts, **options), means)
    order = random.Random(seed).sample(range(len(items)), len(items))  # noqa: S311 - not for secrets
    cut = len(items) // 2 if one else 0
    choosing, kept = [items[i] for i in order[:cut]], [items[i] for i in sorted(order[cut:])]
    center = means if about == "original" else None
    ask = _Asked(model, tokenizer, how or how_of(items), batch_size, center)
    before, each = ask(kept, None), ask(kept, found)
    site = _best(found, means, lambda taken: ask(choosing, taken), progress) if one else None
    chosen = None if site is None else ask(kept, dict.fromkeys(means, found[site]))
    bare = replace(ask, model=original)(kept, None) if whole else None  # type: ignore[arg-type]
    three = (before, each, chosen)
    values = [None if scores is None else scores.mean_log_prob.value for scores in three]
    return Ablation(
        before=before.accuracy,
        each=each.accuracy,
        one=None if chosen is None else chosen.accuracy,
        log_prob=(values[0], values[1], values[2]),  # type: ignore[arg-type]
        site=site,
        sites=tuple(found),
        original=None if bare is None else bare.accuracy,
        about=about,
        items=len(kept),
        choosing_items=len(choosing),
        texts=len(texts),
        tried=len(found) if one else 0,
        seed=seed,
        seconds=time.perf_counter() - begun,
    )


def _check(items: Sequence[Item], about: str, one: bool) -> None:
    if about not in {"origin", "original"}:
        raise ValueError(f"about must be 'origin' or 'original'; got {about!r}")
    if len(items) < (2 if one else 1):
        raise ValueError(
            f"one half chooses and the other tests: two items at least; got {len(items)}"
        )


@dataclass(frozen=True)
class _Asked:
    """A model that is asked items with directions taken out, or with none."""

    model: nn.Module
    tokenizer: TokenizerLike
    how: How
    batch_size: int
    originals: Means | None

    def __call__(self, items: Sequence[Item], taken: Means | None) -> ItemScores:
        hidden: AbstractContextManager[object] = (
            nullcontext() if taken is None else ablated(self.model, taken, originals=self.originals)
        )
        with hidden:
            return item_scores(
                self.model, self.tokenizer, items, how=self.how, batch_size=self.batch_size
            )


def _best(
    found: Means,
    means: Means,
    scores: Callable[[Means], ItemScores],
    progress: bool | None,
) -> str:
    """Return the site whose direction, taken out everywhere, makes the right answers most probable."""
    widths = {tuple(mean.shape) for mean in means.values()}
    if len(widths) > 1:
        raise ShapeError(
            f"one direction for all sites needs one width; got {sorted(widths)}: pass one=False"
        )
    values: dict[str, float] = {
        name: scores(dict.fromkeys(means, unit)).mean_log_prob.value
        for name, unit in tqdm(
            found.items(), desc="directions", leave=False, disable=not shown(progress)
        )
    }
    return max(values, key=values.__getitem__)
