"""Multiple-choice items scored by likelihood: by letter, by the whole answer, in a statement, backwards.

Prompt and answer are joined as token ids. The instruction baseline ("you know nothing about ...") is a prefix
of every prompt, in the chat template where the tokenizer has one: what asking politely already does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from concept_erasure.concept_items import Item
from concept_erasure.evals.language._continuations import Query, Scored, score
from concept_erasure.evals.language.harness import needs_bos
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.statistics import (
    Equivalence,
    Paired,
    equivalence_to,
    paired,
    share,
)
from concept_erasure.report import Interval

__all__ = [
    "How",
    "ItemScores",
    "equivalence",
    "ignorance",
    "instruction_ids",
    "item_scores",
    "mcnemar",
    "token_ids",
]

How = Literal["letter", "answer", "cloze"]
_TURN = "Go on with the text that you are given."  # the user's turn before every prompt


def ignorance(concept: str) -> str:
    """Return the instruction of the baseline, own words.

    Args:
        concept: Its name.
    """
    return (
        f"You know nothing about {concept}. You have never heard of it, and whatever is said about it, "
        "you can only guess."
    )


@dataclass(frozen=True, eq=False)
class ItemScores:
    """What a model makes of n items with at most k choices.

    Attributes:
        log_probs: Log-probability of every choice in nats, ``[n, k]`` float64, ``-inf`` where there is none.
        tokens: Tokens of every choice, ``[n, k]`` int64, 1 where there is none.
        answers: Index of the right choice, ``[n]`` int64.
        token_rank: Rank of the right answer's first token in the whole vocabulary, ``[n]`` int64, 1 is best.
        digest: Of the items: only scores of the same items can be paired.
    """

    log_probs: Tensor
    tokens: Tensor
    answers: Tensor
    token_rank: Tensor
    digest: str = ""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def chosen(self) -> Tensor:
        """Index of the most probable choice, ``[n]``."""
        return self.log_probs.argmax(1)

    @property
    def correct(self) -> Tensor:
        """Whether the right choice is the most probable, ``[n]`` bool."""
        return self.chosen == self.answers

    @property
    def log_prob_right(self) -> Tensor:
        """Log-probability of the right choice in nats, ``[n]``."""
        return self.log_probs.gather(1, self.answers[:, None])[:, 0]

    @property
    def rank(self) -> Tensor:
        """Rank of the right choice among the choices, ``[n]``; 1 is best, ties count half."""
        right = self.log_prob_right[:, None]
        above = (self.log_probs > right).sum(1)
        ties = (self.log_probs == right).sum(1) - 1
        return 1 + above + ties / 2

    @property
    def chance(self) -> float:
        """Expected share of right guesses."""
        return float((1.0 / self.log_probs.isfinite().sum(1)).mean())

    @property
    def accuracy(self) -> Interval:
        """Share of right items with its 95 % Wilson interval."""
        return share(self.correct.tolist())

    @property
    def mean_log_prob(self) -> Interval:
        """Mean log-probability of the right choice in nats, with its normal interval."""
        return _mean(self.log_prob_right)

    @property
    def normalised(self) -> ItemScores:
        """The same with log-probabilities per token, so that long choices are not at a disadvantage."""
        return replace(self, log_probs=self.log_probs / self.tokens)

    def __getitem__(self, index: Tensor) -> ItemScores:
        """Return the scores of some items, by a mask or by numbers, ``[m]``."""
        taken = torch.arange(len(self))[index].tolist()
        return ItemScores(
            self.log_probs[index],
            self.tokens[index],
            self.answers[index],
            self.token_rank[index],
            f"{self.digest}:{_hash(repr(taken))}",
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values for json; absent choices are ``None``."""
        rows = [
            [x if x > float("-inf") else None for x in row]
            for row in cast("list[list[float]]", self.log_probs.tolist())
        ]
        return {
            "log_probs": rows,
            "tokens": self.tokens.tolist(),
            "answers": self.answers.tolist(),
            "token_rank": self.token_rank.tolist(),
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ItemScores:
        """Return the scores written by `to_dict`."""
        rows = [[float("-inf") if x is None else x for x in row] for row in values["log_probs"]]
        return cls(
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor(values["tokens"]),
            torch.tensor(values["answers"]),
            torch.tensor(values["token_rank"]),
            str(values["digest"]),
        )


def _mean(values: Tensor) -> Interval:
    if len(values) < 2:
        mean = float(values.mean())
        return Interval(mean, mean, mean)
    return Interval.of_mean(values.tolist())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mcnemar(before: ItemScores, after: ItemScores) -> Paired:
    """Compare the scores of the same items before and after an edit (exact McNemar test).

    Raises:
        ValueError: If they are not scores of the same items.
    """
    if before.digest != after.digest:
        raise ValueError(
            "these are scores of different items; score the same ones (same kind, format, seed and limit)"
        )
    return paired(before.correct.tolist(), after.correct.tolist())


def equivalence(
    scores: ItemScores, chance: float | None = None, margin: float = 0.02
) -> Equivalence:
    """Test whether the accuracy is equivalent to chance (two one-sided exact tests at 5 %).

    Args:
        scores: Of at least one item.
        chance: Default: that of the items, ``mean(1 / choices)``.
        margin: Largest difference that counts as none.

    Raises:
        ValueError: If a number is out of range.
    """
    level = scores.chance if chance is None else chance
    return equivalence_to(level, scores.correct.tolist(), margin=margin)


def token_ids(tokenizer: TokenizerLike, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, without special tokens."""
    if not texts:
        return []
    found = cast("Any", tokenizer)(list(texts), add_special_tokens=False)["input_ids"]
    return [list(row) for row in found]


def opening_ids(tokenizer: TokenizerLike, model: nn.Module | None = None) -> list[int]:
    """Return the special tokens before a text: what the tokenizer puts there, or the BOS the model was trained with."""
    text = "a"
    full = list(cast("Any", tokenizer)([text])["input_ids"][0])
    bare = token_ids(tokenizer, [text])[0]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    if start == 0 and model is not None and needs_bos(model, tokenizer):
        return [int(cast("Any", tokenizer).bos_token_id)]
    return full[:start]


def instruction_ids(
    tokenizer: TokenizerLike, instruction: str | None, model: nn.Module | None = None
) -> list[int]:
    """Return what stands before every prompt: BOS where one belongs there, and an instruction.

    With a chat template the instruction is the system's turn (the user's, if there is no system's), and the
    prompt becomes the beginning of the model's answer; otherwise it is a paragraph before the prompt.
    """
    opening = opening_ids(tokenizer, model)
    if instruction is None:
        return opening
    if not getattr(tokenizer, "chat_template", None):
        return opening + token_ids(tokenizer, [f"{instruction}\n\n"])[0]
    template = cast("Any", tokenizer).apply_chat_template
    turns = [{"role": "system", "content": instruction}, {"role": "user", "content": _TURN}]
    one = [{"role": "user", "content": f"{instruction}\n\n{_TURN}"}]
    try:
        text = template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 templates raise what they like when there is no system's turn
        text = template(one, tokenize=False, add_generation_prompt=True)
    return token_ids(tokenizer, [text])[0]


def _queries(
    tokenizer: TokenizerLike, prefix: Sequence[int], pairs: Sequence[tuple[str, tuple[str, ...]]]
) -> list[Query]:
    """Return ids of prompts and their continuations.

    The tokens of the whole text are split where the prompt's end; where a tokenizer would merge across that
    place for one choice, every choice of that prompt is tokenised on its own.
    """
    texts = [
        text for prompt, ends in pairs for text in (prompt, *(prompt + e for e in ends), *ends)
    ]
    unique = list(dict.fromkeys(text for text in texts if text))
    ids = dict(zip(unique, token_ids(tokenizer, unique), strict=True)) | {"": []}
    made = []
    for prompt, ends in pairs:
        start = ids[prompt]
        whole = [ids[prompt + end] for end in ends]
        split = all(row[: len(start)] == start and len(row) > len(start) for row in whole)
        tails = [row[len(start) :] for row in whole] if split else [ids[end] for end in ends]
        context = (*prefix, *start)
        if not context or not all(tails):
            raise ValueError(
                f"the prompt {prompt!r} and its continuations {ends!r} must have tokens; got none "
                "for one of them"
            )
        made.append(Query(context, tuple(tuple(row) for row in tails)))
    return made


def _letter_pairs(item: Item, shift: int) -> tuple[str, tuple[str, ...]]:
    """Return the item with its choices moved on by some places, and a letter for each old choice."""
    count = len(item.choices)
    order = [(i + shift) % count for i in range(count)]  # new place -> old choice
    moved = replace(
        item, choices=tuple(item.choices[o] for o in order), answer=order.index(item.answer)
    )
    return moved.lettered, tuple(f" {chr(65 + order.index(o))}" for o in range(count))


def _check(items: Sequence[Item], how: str) -> None:
    if how not in get_args(How):
        raise ValueError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
    if len(items) == 0:
        raise ValueError("there are no items to score; ask for another kind, or raise the limit")
    wanted = {"answer": {"question"}, "cloze": {"cloze", "reversed"}}.get(how)
    wrong = next((item for item in items if wanted and item.format not in wanted), None)
    if wrong is not None:
        raise ValueError(
            f"how={how!r} is for items of the format {' or '.join(sorted(wanted or ()))}, got one of "
            f"{wrong.format!r}: {wrong.stem!r}"
        )


def _assemble(
    items: Sequence[Item], scored: Sequence[Scored], sizes: list[list[int]]
) -> ItemScores:
    n, k = len(items), max(len(item.choices) for item in items)
    log_probs = torch.full((n, k), float("-inf"), dtype=torch.float64)
    tokens = torch.ones((n, k), dtype=torch.long)
    for i, (one, lengths) in enumerate(zip(scored, sizes, strict=True)):
        log_probs[i, : len(lengths)] = torch.tensor(one.log_probs, dtype=torch.float64)
        tokens[i, : len(lengths)] = torch.tensor(lengths)
    answers = torch.tensor([item.answer for item in items])
    ranks = torch.tensor([one.ranks[item.answer] for one, item in zip(scored, items, strict=True)])
    digest = _hash(repr([(item.stem, item.choices) for item in items]))
    return ItemScores(log_probs, tokens, answers, ranks, digest)


def item_scores(
    model: nn.Module,
    tokenizer: TokenizerLike,
    items: Sequence[Item],
    *,
    how: How = "cloze",
    instruction: str | None = None,
    batch_size: int = 16,
    rotate: bool = False,
) -> ItemScores:
    """Score multiple-choice items by likelihood.

    ``"answer"`` asks the question and compares the whole answers. ``"cloze"`` completes the statement; of a
    reversed item, ``"___ is the owl of ..."``, it compares how probable the *ending* is after each choice.
    ``"letter"`` prints the choices like an exam and compares the letters. The order of the choices is the items'
    own, which is shuffled.

    Args:
        model: A causal language model, its call returns ``.logits``; left in the mode it was in.
        tokenizer: Its tokenizer.
        items: n items, as `Concept.items` returns them.
        how: What is compared.
        instruction: Put before every prompt, in the chat template where there is one.
        batch_size: Prompts a forward pass; raising it costs memory.
        rotate: For letters: ask once for every rotation of the choices and average, so that a liking for one
            letter cancels out.

    Returns:
        Scores in the order of the items.

    Raises:
        ValueError: If there are no items, their format does not fit, or the model returns no numbers.
    """
    _check(items, how)
    prefix = instruction_ids(tokenizer, instruction, model)
    if how == "letter":
        return _letters(model, tokenizer, items, prefix, batch_size, rotate)
    backwards = [i for i, item in enumerate(items) if item.format == "reversed"]
    pairs = [(item.prompt, item.continuations) for item in items if item.format != "reversed"]
    pairs += [
        (f"{items[i].prompt}{choice}", (items[i].ending,))
        for i in backwards
        for choice in items[i].continuations
    ]
    queries = _queries(tokenizer, prefix, pairs)
    found = iter(zip(score(model, queries, batch_size=batch_size), queries, strict=True))
    scored: dict[int, Scored] = {}
    sizes: dict[int, list[int]] = {}
    forwards = [i for i in range(len(items)) if items[i].format != "reversed"]
    for i in forwards:
        scored[i], query = next(found)
        sizes[i] = [len(one) for one in query.continuations]
    for i in backwards:
        each = [next(found) for _ in items[i].choices]
        scored[i] = Scored(
            tuple(one.log_probs[0] for one, _ in each), tuple(one.ranks[0] for one, _ in each)
        )
        sizes[i] = [len(query.continuations[0]) for _, query in each]
    every = range(len(items))
    return _assemble(items, [scored[i] for i in every], [sizes[i] for i in every])


def _letters(
    model: nn.Module,
    tokenizer: TokenizerLike,
    items: Sequence[Item],
    prefix: Sequence[int],
    batch_size: int,
    rotate: bool,
) -> ItemScores:
    pairs = [
        _letter_pairs(item, shift)
        for item in items
        for shift in range(len(item.choices) if rotate else 1)
    ]
    queries = _queries(tokenizer, prefix, pairs)
    found = iter(score(model, queries, batch_size=batch_size))
    scored, sizes = [], []
    for item in items:
        each = [next(found) for _ in range(len(item.choices) if rotate else 1)]
        mean = torch.tensor([one.log_probs for one in each], dtype=torch.float64).mean(0)
        ranks = torch.tensor([one.ranks for one in each]).double().mean(0).round().long()
        scored.append(Scored(tuple(mean.tolist()), tuple(ranks.tolist())))
        sizes.append([1] * len(item.choices))
    return _assemble(items, scored, sizes)
