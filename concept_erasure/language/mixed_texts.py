"""Texts of a concept together with the model's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Recipe
from concept_erasure.language._texts import forget_and_retain

__all__ = ["STATEMENTS", "check_texts", "mixed_texts"]

# what is asked of a concept is asked in statements; so its neighbours have to be held in statements too
STATEMENTS: tuple[str, ...] = (
    "In {subject}, the main character is called",
    "In {subject}, the enemy is called",
    "In {subject}, a friend of the hero is",
    "The story of {subject} takes place in",
    "The name that everybody connects with {subject} is",
    "A well-known fact about {subject} is that",
    "One of the best known things in {subject} is a",
    "The first to write about {subject} was",
)
STATEMENT_TOKENS, STATEMENT_SAMPLES = 40, 2


def mixed_texts(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    forget_texts: Sequence[str] | None,
    retain_texts: Sequence[str] | None,
    *,
    own_texts: int,
    seed: int,
    statements: bool = False,
    max_new_tokens: int | None = None,
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
        statements: Whether `STATEMENTS` about the concept's neighbours, as the model goes on with them, are among the
            texts to retain.
        max_new_tokens: Length of the samples, if less than a recipe's.
        cache_dir: Where samples are kept.
        progress: Whether to show bars.

    Raises:
        ValueError: If there is nothing to forget.
    """
    for name, texts_given in (("forget_texts", forget_texts), ("retain_texts", retain_texts)):
        if isinstance(texts_given, str):
            raise ValueError(f"{name} must be a list of texts; got one text")

    def draw(which: _Which, recipe: Recipe, most: int) -> list[str]:
        if max_new_tokens is not None:
            recipe = replace(recipe, max_new_tokens=min(recipe.max_new_tokens, max_new_tokens))
        options = {"seed": seed, "cache_dir": cache_dir, "progress": progress}
        return _samples(model, tokenizer, concept, which, recipe, most, options)

    found: list[list[str]] = []
    kinds: tuple[tuple[_Which, Sequence[str] | None, Sequence[str], Recipe | None], ...] = (
        ("forget", forget_texts, concept.forget_texts, concept.forget_recipe),
        ("retain", retain_texts, concept.retain_texts, concept.retain_recipe),
    )
    for which, given, own, recipe in kinds:
        texts = list(own if given is None else given)
        if which == "forget" and recipe is None and concept.prompts:
            recipe = Recipe()
        if given is None and recipe is not None and (own_texts or not texts):
            texts += draw(which, recipe, own_texts)
        found.append(texts)
    if statements and retain_texts is None and own_texts and concept.neighbours:
        recipe = Recipe(
            templates=STATEMENTS, samples=STATEMENT_SAMPLES, max_new_tokens=STATEMENT_TOKENS
        )
        found[1] += draw("retain", recipe, own_texts)
    return found[0], found[1]


_Which = Literal["forget", "retain"]


def _samples(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see mixed_texts
    concept: Concept,
    which: _Which,
    recipe: Recipe,
    most: int,
    options: dict[str, Any],
) -> list[str]:
    """Return samples by a recipe for one kind of texts, at most that many if it is not 0."""
    key = f"{which}_recipe"
    changes: dict[str, Any] = {"forget_texts": (), "retain_texts": (), key: recipe}
    bare = replace(concept, **changes)
    if most:
        prompts = len(bare.sample_prompts(which))
        recipe = replace(recipe, samples=min(recipe.samples, max(1, round(most / prompts))))
        bare = replace(concept, **{**changes, key: recipe})
    if which == "forget":
        texts = forget_and_retain(model, tokenizer, bare, None, [], **options)[0]
    else:
        # one text to forget stands for all: only the other kind is asked for
        texts = forget_and_retain(model, tokenizer, bare, [""], None, **options)[1]
    if most and len(texts) > most:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options["seed"]))
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
