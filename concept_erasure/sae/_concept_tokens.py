"""The tokens that stand for a concept, and where they are in its texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from concept_erasure.concept import Concept

__all__ = ["concept_tokens"]

_LETTERS = 3  # a shorter token says nothing by itself


def concept_tokens(
    tokenizer: Callable[..., Any], concept: Concept, *, words: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the ids of the tokens of a concept's names and entities, with a space before them and without.

    Tokens of three letters or more that begin with a capital are taken; if there are none, all of three letters or
    more: in ``the boy who lived`` no token says what it is about, in a list of common nouns all do.

    Args:
        tokenizer: Any tokenizer.
        concept: Its names, synonyms and entities are used.
        words: More words.

    Raises:
        ValueError: If nothing is left.
    """
    named = [*concept.names, *(entity for entity, _ in concept.entities), *words]
    variants = [form for word in dict.fromkeys(named) for form in (f" {word}", word)]
    rows = tokenizer(variants, add_special_tokens=False)["input_ids"]
    ids = list(dict.fromkeys(int(i) for row in rows for i in row))
    decode: Callable[..., str] = tokenizer.decode  # type: ignore[attr-defined]
    texts = {i: str(decode([i])).strip() for i in ids}
    long = [i for i in ids if sum(c.isalpha() for c in texts[i]) >= _LETTERS]
    capital = [i for i in long if texts[i][0].isupper()]
    if not long:
        raise ValueError(
            f"no token of {concept.name!r} has {_LETTERS} letters; give the concept synonyms or entities"
        )
    return tuple(capital or long)
