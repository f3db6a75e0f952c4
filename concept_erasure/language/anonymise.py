"""A text beside the same text with the concept's names replaced, token for token.

The two have different lengths, so positions are matched by what they predict, not by number:

- a token outside the names is matched with itself in the other text;
- the first token of the k-th word of a name is matched with the first token of the k-th word of its stand-in: there the
  whole distributions are compared, what comes after these words against what comes after their anonymous form. The
  name itself is a token among all; it is lowered if it is less probable in the anonymous context;
- what is inside a word ("warts" after "Hog"), and words of a name that have no counterpart, have no partner: the
  anonymous text has nothing to say about them.

A stand-in that stood in the text before is probable again because it is copied. Copying is not knowledge, so from there
on its probability belongs to the name it stands for (`Copy`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from concept_erasure.concept import Concept, _words

__all__ = ["Aligned", "Copy", "align"]

_WORD = re.compile(r"\s?\S+")


class Copy(NamedTuple):
    """From some place on, the probability of a stand-in's first token belongs to that of the name.

    Attributes:
        start: Index in the original text from which it holds.
        name: First token of a word of the name.
        stand_in: First token of the word that stands for it.
    """

    start: int
    name: int
    stand_in: int


@dataclass(frozen=True, eq=False)
class Aligned:
    """A text and its anonymous form as tokens.

    Attributes:
        own: Tokens of the text.
        other: Tokens of the anonymous text.
        partner: For each of `own`, the index in `other` it is matched with, or -1; rising where it is not -1.
        copies: See `Copy`.
    """

    own: list[int]
    other: list[int]
    partner: list[int]
    copies: list[Copy]


def align(
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    texts: Sequence[str],
) -> list[Aligned]:
    """Match every text with its anonymous form.

    Tokens come from the whole text, as the model will see it. Where cutting it at names gives the same tokens, as it
    does with tokenizers that split at white space first, the cuts say what belongs to a name; elsewhere the longest
    common runs of tokens do.

    Args:
        tokenizer: Called like one of transformers.
        concept: Has entities with stand-ins.
        texts: The texts.
    """
    whole = _tokens(tokenizer, texts)
    others = _tokens(tokenizer, [concept.anonymise(text) for text in texts])
    pieces = [_pieces(text, dict(concept.entities)) for text in texts]
    said = {part for one in pieces for pair in one for part in pair if part}
    said |= {_turned(part) for part in said}
    known = dict(zip(said, _tokens(tokenizer, list(said)), strict=True)) if said else {}
    known[""] = []
    made: list[Aligned] = []
    for own, other, one in zip(whole, others, pieces, strict=True):
        found = _by_pieces(one, known)
        exact = found.own == own and found.other == other
        made.append(found if exact else _by_runs(own, other))
    return made


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:  # noqa: ANN401 see align
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return rows


def _turned(piece: str) -> str:
    """Return a word without its space if it has one, else with one."""
    return piece[1:] if piece[0].isspace() else f" {piece}"


def _pieces(text: str, stand_ins: dict[str, str]) -> list[tuple[str, str | None]]:
    """Return the text in pieces: runs without names with None, words of names with the words that stand for them.

    A space goes with the word after it. Either word of a pair is empty where the other side has more words.
    """
    if not stand_ins:
        return [(text, None)]
    made: list[tuple[str, str | None]] = []
    last = 0
    for found in _words(tuple(stand_ins)).finditer(text):
        start = found.start() - (text[found.start() - 1 : found.start()] == " ")
        start = max(start, last)  # two names in a row share no space
        if start > last:
            made.append((text[last:start], None))
        space = text[start : found.start()]
        mine = _WORD.findall(space + found[0])
        theirs = _WORD.findall(space + stand_ins[found[0]])
        for k in range(max(len(mine), len(theirs))):
            made.append((mine[k] if k < len(mine) else "", theirs[k] if k < len(theirs) else ""))
        last = found.end()
    if last < len(text):
        made.append((text[last:], None))
    return made


def _by_pieces(pieces: list[tuple[str, str | None]], known: dict[str, list[int]]) -> Aligned:
    own: list[int] = []
    other: list[int] = []
    partner: list[int] = []
    copies: dict[Copy, None] = {}
    for mine, theirs in pieces:
        tokens = known[mine]
        if theirs is None:
            partner += range(len(other), len(other) + len(tokens))
            other += tokens
        else:
            matched = bool(tokens) and bool(known[theirs])
            partner += [len(other) if matched else -1, *([-1] * len(tokens))][: len(tokens)]
            other += known[theirs]
            if matched:
                # with a space and without: the same word is two tokens
                for a, b in ((mine, theirs), (_turned(mine), _turned(theirs))):
                    pair = Copy(len(own) + len(tokens), known[a][0], known[b][0])
                    if pair.name != pair.stand_in:
                        copies[pair] = None
        own += tokens
    return Aligned(own, other, partner, list(copies))


def _by_runs(own: list[int], other: list[int]) -> Aligned:
    partner = [-1] * len(own)
    copies: dict[Copy, None] = {}
    runs = difflib.SequenceMatcher(None, own, other, autojunk=False).get_opcodes()
    for kind, i, i_end, j, j_end in runs:
        if kind == "equal":
            partner[i:i_end] = range(j, j_end)
        elif kind == "replace":
            partner[i] = j
            copies[Copy(i_end, own[i], other[j])] = None
    return Aligned(own, other, partner, list(copies))
