"""Names in sentences as labelled text vectors, so that any eraser of vectors is fitted on a pipeline's own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.diffusion.encode import TextEncoder, text_representations
from concept_erasure.diffusion.templates import templates_for
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import names_of, one_each, refuse_overlap

__all__ = ["SENTENCES", "named_representations"]

SENTENCES = (
    "templates",
    "rule",
    "batch_size",
)  # options of the sentences, beside the lists of names


def named_representations(
    pipe: object,
    erase: Sequence[str] | str,
    *,
    anchor: Sequence[str] | str = "",
    preserve: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    rule: TokenRule | str = TokenRule.ALL_BUT_SOT,
    batch_size: int = 32,
) -> Representations:
    """Return text vectors of names in sentences, each with the number of its concept.

    Anchors and names to preserve are one class together: an eraser fitted on this takes away what tells a concept
    from them, and nothing else has to move.

    Args:
        pipe: The pipeline; left bit-identical.
        erase: Concepts.
        anchor: What each could become, or all; ``""``, the blank prompt, tells nothing and is left out.
        preserve: Names to keep.
        templates: Sentences with one ``{}``; default thirty, less those that are too long for the text encoder.
        rule: Which positions of a sentence; the start token is the same in all of them.
        batch_size: Prompts encoded at once.

    Returns:
        ``x`` of shape ``(rows, d)``; ``z`` is 0 for what stays and the number of the concept, from 1, for what goes.

    Raises:
        ShapeError: If there are other numbers of anchors and concepts.
        ValueError: If there is nothing that stays, a name is in both lists, or a template has no place for a name.
    """
    names = names_of(erase, "erase")
    kept = names_of(preserve, "preserve") if preserve else []
    refuse_overlap(names, kept)
    rest = list(dict.fromkeys([*filter(str.strip, one_each(anchor, names)), *kept]))
    if not rest:
        raise ValueError(
            "a projection needs to know what the concepts differ from; name an anchor that is not blank, or names to "
            "preserve"
        )
    sentences = templates_for(TextEncoder(pipe, cache=False), [*names, *rest], templates)
    found = text_representations(
        pipe,
        [sentence.format(name) for name in names for sentence in sentences],
        [sentence.format(name) for name in rest for sentence in sentences],
        rule=rule,
        batch_size=batch_size,
    )
    number = [*range(1, len(names) + 1), *[0] * len(rest)]
    labels = torch.tensor(number).repeat_interleave(len(sentences))
    return replace(found, z=labels[cast("Tensor", found.rows).cpu()].to(found.x.device))
