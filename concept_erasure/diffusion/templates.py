"""Concepts in prompt templates, and preserve sets as means: what the methods that edit contexts begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Pairs, Preserve
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.prepare import Texts
from concept_erasure.diffusion.tokens import TokenRule

__all__ = [
    "TEMPLATES",
    "check_templates",
    "mean_preserve",
    "merged",
    "template_pairs",
    "templates_for",
]

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a portrait of {}",
    "a painting of {}",
    "a drawing of {}",
    "a sketch of {}",
    "a poster of {}",
    "a close-up of {}",
    "a rendering of {}",
    "an illustration of {}",
    "a scene with {}",
    "a film still with {}",
    "a story about {}",
    "{} in the street",
    "{} in a garden",
    "{} at night",
    "{} in the snow",
    "{} on a white background",
    "{}, highly detailed",
    "{} in black and white",
    "a photo of {} at home",
    "a photo of {} by the sea",
    "a picture of {} and a friend",
    "a painting of {} in oil",
    "a portrait of {} in soft light",
    "a drawing of {} with a pencil",
    "an image of {} in the morning",
    "an illustration of {} for a book",
)  # written for this library; the authors' lists differ


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return templates, each with exactly one place for the concept.

    Raises:
        ValueError: If there are none, or one has no place or another field.
    """
    if isinstance(templates, str) or not len(templates):
        raise ValueError(f"templates must be a list of texts with {{}}; got {templates!r}")
    for text in templates:
        if text.count("{}") != 1 or text.count("{") != 1 or text.count("}") != 1:
            raise ValueError(f"a template has one {{}} for the concept; got {text!r}")
    return tuple(templates)


def templates_for(
    encoder: TextEncoder, names: Sequence[str], given: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the templates given, or else those of the library that an encoder's window holds with every name.

    Args:
        encoder: The text side of the pipeline.
        names: Names that are put in.
        given: The user's own; one that is too long is refused when it is encoded.

    Raises:
        ValueError: If a name alone is too long, or a given template has no place for one.
    """
    if given is not None:
        return check_templates(given)
    made = tuple(t for t in TEMPLATES if all(encoder.fits(t.format(name)) for name in names))
    if not made:
        raise ValueError(
            f"a name is too long for the text encoder: {max(names, key=len)!r}; shorten it"
        )
    return made


def template_pairs(
    encoder: TextEncoder,
    erase: Sequence[str],
    anchors: Sequence[str],
    templates: Sequence[str],
    rule: TokenRule | str,
    weight: float,
) -> Iterator[Pairs]:
    """Yield the pairs of each concept in all templates, numbered by concept.

    Args:
        encoder: The text side of the pipeline.
        erase: Concepts.
        anchors: One each, put in the same template.
        templates: Texts with one ``{}``.
        rule: Positions.
        weight: Of each pair.
    """
    for number, (name, instead) in enumerate(zip(erase, anchors, strict=True)):
        prompts = [template.format(name) for template in templates]
        targets = [template.format(instead) for template in templates]
        yield encoder.pairs(prompts, targets, rule, weight).numbered(number)


def mean_preserve(
    texts: Texts, rule: TokenRule | str, weight: float
) -> tuple[Preserve | None, Tensor | None]:
    """Return the mean Gram of what is kept, times a weight, and its rows where there are names.

    Args:
        texts: The lists of the fit.
        rule: Positions of names.
        weight: Factor of the mean; 0 keeps nothing.
    """
    rows = texts.rows(texts.preserve, rule)
    found = texts.collected
    if rows is not None:
        fingerprint = texts.encoder.fingerprint
        found = Preserve(texts.width, encoder=fingerprint, device=rows.device).update(rows)
    if found is None or weight == 0:
        return None, rows
    out = Preserve(texts.width, encoder=texts.encoder.fingerprint, device=found.gram.device)
    return out.merge(found.normalised(), weight), rows


def merged(parts: Sequence[Preserve | None]) -> Tensor | None:
    """Return the sum of the Grams there are, or None."""
    grams = [part.gram for part in parts if part is not None]
    return torch.stack(grams).sum(0) if grams else None
