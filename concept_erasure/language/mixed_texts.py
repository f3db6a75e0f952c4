"""Texts of a concept together with the model's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Recipe
from concept_erasure.language._texts import forget_and_retain

__all__ = ["check_texts", "mixed_texts"]


def mixed_texts(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    forget_texts: Sequence[str] | None,
    retain_texts: Sequence[str] | None,
    *,
    own_texts: int,
    seed: int,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> tuple[list[str], list[str]]:
    """Return texts to forget and to retain: those given, else the concept's and the model's own beside them.

    A dozen texts name a concept, but do not show a model where it uses it; its own samples do.

    Args:
        model: Writes the samples.
        tokenizer: Its tokenizer.
        concept: Has texts, recipes, or both.
        forget_texts: None for those of the concept and samples.
        retain_texts: Likewise; an empty list is kept.
        own_texts: Samples of each kind at most; 0 samples only if there are no texts.
        seed: Of the sampling.
        cache_dir: Where samples are kept.
        progress: Whether to show bars.

    Raises:
        ValueError: If there is nothing to forget.
    """
    for name, texts_given in (("forget_texts", forget_texts), ("retain_texts", retain_texts)):
        if isinstance(texts_given, str):
            raise ValueError(f"{name} must be a list of texts; got one text")
    found: list[list[str]] = []
    for which, given, own in (
        ("forget", forget_texts, concept.forget_texts),
        ("retain", retain_texts, concept.retain_texts),
    ):
        texts = list(own if given is None else given)
        recipe = concept.forget_recipe if which == "forget" else concept.retain_recipe
        if given is None and (recipe is not None or not texts) and (own_texts or not texts):
            texts += _samples(
                model, tokenizer, concept, which, own_texts, seed, cache_dir, progress
            )
        found.append(texts)
    return found[0], found[1]


def _samples(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see mixed_texts
    concept: Concept,
    which: str,
    most: int,
    seed: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> list[str]:
    """Return at most that many samples by the recipe for one kind of texts."""
    bare = replace(concept, forget_texts=(), retain_texts=())
    recipe = (bare.forget_recipe if which == "forget" else bare.retain_recipe) or Recipe()
    if most and (which == "forget" or bare.retain_recipe is not None):
        prompts = len(bare.sample_prompts(which))
        recipe = replace(recipe, samples=min(recipe.samples, max(1, round(most / prompts))))
    if which == "forget":
        bare = replace(bare, forget_recipe=recipe)
        pair = forget_and_retain(
            model, tokenizer, bare, None, [], seed=seed, cache_dir=cache_dir, progress=progress
        )
        texts = pair[0]
    else:
        bare = replace(bare, retain_recipe=recipe if bare.retain_recipe else None)
        # one text to forget stands for all: only the other kind is asked for
        pair = forget_and_retain(
            model, tokenizer, bare, [""], None, seed=seed, cache_dir=cache_dir, progress=progress
        )
        texts = pair[1]
    if most and len(texts) > most:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        texts = [texts[k] for k in order[:most].tolist()]
    return texts


def check_texts(forget: Sequence[str], retain: Sequence[str], retain_weight: float) -> None:
    """Refuse to go on without texts.

    Raises:
        ValueError: If there is nothing to forget, or nothing to retain though it has a weight.
    """
    if not forget:
        raise ValueError("forget_texts is empty; give texts, or None for those of the concept")
    if retain_weight and not retain:
        raise ValueError(
            f"the retain term has weight {retain_weight:g} but there are no texts to retain: give retain_texts, a "
            "concept with retain_texts or a retain_recipe, or retain_weight=0"
        )
