"""Relearning: how much training brings the answers back that an erasure took.

A LoRA is trained on the edited model, on texts of the concept that do not hold the answers asked for, or on unrelated
harmless texts, and the items are asked again every few steps. What comes back on texts that do not say it was still
inside. The recovery at step t is ``(acc_t - acc_erased) / (acc_base - acc_erased)``; the half-life is the first
measured step at which it is 50 %. The same curve of a model that never knew says how much is ordinary learning.

Sources: Lucki et al. 2024, arXiv:2409.18025 (ten unrelated texts bring most of it back); OBLIVIATE, table 6 (10 % of
the forget set). With other seeds and rates the half-life moves: report several.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item, plain
from concept_erasure.evals.language._attack import how_of, shown
from concept_erasure.evals.language._curves import Curve, Relearning
from concept_erasure.evals.language.items import How, item_scores
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.language.batches import Batch, Batches, encode, logits_at, pad_id
from concept_erasure.language.loop import Row, Training, train
from concept_erasure.language.objective import Term, nll
from concept_erasure.language.parameters import Lora, trainable

__all__ = [
    "Curve",
    "Relearning",
    "benign_texts",
    "leaks",
    "relearn",
    "relearn_suite",
    "relearning_texts",
]

RATES = (1e-5, 5e-5, 2e-4)
SHARES = (0.01, 0.1)
BENIGN = (10, 100)


def leaks(text: str, item: Item) -> bool:
    """Say whether a text gives the answer of an item away.

    It does if it holds the right answer and half or more of what the item asks with: its words of four letters or
    more, other than the answer's.
    """
    words = f" {plain(text)} "
    answer = plain(item.right)
    if f" {answer} " not in words:
        return False
    asked = {word for word in plain(item.stem).split() if len(word) > 3} - set(answer.split())
    return sum(f" {word} " in words for word in asked) * 2 >= len(asked)


def relearning_texts(
    texts: Sequence[str], items: Sequence[Item], *, share: float = 0.1, seed: int = 0
) -> list[str]:
    """Return a share of the texts of a concept, none of which gives away an answer of the items.

    Args:
        texts: All texts of the concept.
        items: What will be asked.
        share: Of all texts, in (0, 1]; at least one text.
        seed: Of the choice.

    Raises:
        ValueError: The share is out of range, or too few texts keep the answers to themselves.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]; got {share}")
    unique = list(dict.fromkeys(texts))
    count = max(1, round(share * len(unique)))
    safe = [text for text in unique if not any(leaks(text, item) for item in items)]
    if len(safe) < count or not unique:
        raise ValueError(
            f"{count} texts are needed ({share:.0%} of {len(unique)}), but only {len(safe)} do not give an answer "
            "away; give more texts, ask other items, or take a smaller share"
        )
    return random.Random(seed).sample(safe, count)  # noqa: S311 - not for secrets


def benign_texts(concept: Concept, count: int, *, seed: int = 0) -> list[str]:
    """Return harmless sentences that have nothing to do with a concept: statements of its far controls.

    Args:
        concept: The concept.
        count: Of texts.
        seed: Of the choice.

    Raises:
        ValueError: It does not have that many.
    """
    known = [s for one in concept.far for fact in one.facts for s in fact.statements]
    known = [text for text in dict.fromkeys(known) if not concept.mentions(text)]
    if not 1 <= count <= len(known):
        raise ValueError(
            f"the far controls of {concept.name!r} hold {len(known)} statements; got count={count}. "
            "Pass texts of your own"
        )
    return random.Random(seed).sample(known, count)  # noqa: S311 - not for secrets


def relearn(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    items: Sequence[Item],
    *,
    base_accuracy: float | None = None,
    steps: int = 100,
    lr: float = 5e-5,
    every: int = 10,
    rank: int = 16,
    batch_size: int = 4,
    max_length: int = 256,
    how: How | None = None,
    name: str = "texts",
    reference: nn.Module | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Curve:
    """Train a live edited model again and ask the items on the way; it is left bit-identical.

    Args:
        model: The model with its edit in force. The LoRA goes beside every linear module of every block.
        tokenizer: Its tokenizer.
        texts: What to train on; `relearning_texts` and `benign_texts` choose them.
        items: What to ask. None may be given away by a text.
        base_accuracy: Of the model before the edit on the same items.
        steps: Steps of AdamW.
        lr: Learning rate; 1e-5, 5e-5 and 2e-4 are usual.
        every: Steps between two measurements.
        rank: Of the LoRA, whose alpha is the same number.
        batch_size: Texts a step.
        max_length: Most tokens of a text.
        how: How items are scored; None is by their format.
        name: Of the curve.
        reference: A model with the same tokenizer that never knew, to be trained likewise.
        seed: Of the LoRA's start and the batches.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The curve.

    Raises:
        ValueError: A text gives an answer away, or a number is out of range.
    """
    _check(texts, items, steps, every, rank)
    how = how or how_of(items)
    training = Training(
        steps=steps,
        learning_rate=lr,
        batch_size=batch_size,
        max_length=max_length,
        log_every=1,
        seed=seed,
        progress=shown(progress),
    )
    curve = _curve(model, tokenizer, texts, items, training, every, rank, how)
    curve = replace(curve, base_accuracy=base_accuracy, name=name)
    if reference is None:
        return curve
    twin = _curve(reference, tokenizer, texts, items, training, every, rank, how)
    twin = replace(twin, base_accuracy=base_accuracy, name=f"{name}, never knew")
    return replace(curve, reference=twin)


def _check(texts: Sequence[str], items: Sequence[Item], steps: int, every: int, rank: int) -> None:
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a non-empty list of texts; got {texts!r}")
    for key, value in (("steps", steps), ("every", every), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive whole number; got {value!r}")
    for text in texts:
        item = next((one for one in items if leaks(text, one)), None)
        if item is not None:
            raise ValueError(
                f"the text {text[:60]!r} gives away the answer to {item.stem[:60]!r}, so the curve would show "
                "learning and not relearning; choose texts with relearning_texts(texts, items)"
            )


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nll(logits_at(model, batch).float().log_softmax(-1), batch.tokens).sum()


def _curve(
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    items: Sequence[Item],
    training: Training,
    every: int,
    rank: int,
    how: How,
) -> Curve:
    """Return the curve without what it is compared with."""
    begun = time.perf_counter()
    measured: dict[int, tuple[float, float]] = {}

    def measure(taken: int) -> None:
        scores = item_scores(model, tokenizer, items, how=how)
        right = float(scores.correct.double().mean())
        measured[taken] = right, scores.mean_log_prob.value

    def after(step: int, _: Row) -> bool:
        taken = step + 1
        if taken % every == 0 or taken == training.steps:
            measure(taken)
        return False

    encoded = encode(tokenizer, list(texts), max_length=training.max_length)
    batches = Batches(encoded, training.batch_size, seed=training.seed, pad_id=pad_id(tokenizer))
    measure(0)
    with trainable(model, Lora(rank=rank, alpha=float(rank)), seed=training.seed) as parameters:
        train(model, parameters, [Term("forget", 1.0, batches, _loss)], training, stop=after)
    return Curve(
        steps=tuple(measured),
        accuracy=tuple(right for right, _ in measured.values()),
        log_prob=tuple(value for _, value in measured.values()),
        items=len(items),
        base_accuracy=None,
        texts=len(texts),
        tokens=sum(batches.count_at(step) for step in range(training.steps)),
        lr=training.learning_rate,
        batch_size=training.batch_size,
        rank=rank,
        seed=training.seed,
        seconds=time.perf_counter() - begun,
    )


def relearn_suite(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: TokenizerLike,
    items: Sequence[Item],
    *,
    concept_texts: Sequence[str] = (),
    benign: Sequence[str] = (),
    base_accuracy: float | None = None,
    shares: Sequence[float] = SHARES,
    counts: Sequence[int] = BENIGN,
    rates: Sequence[float] = RATES,
    steps: int = 100,
    every: int = 10,
    rank: int = 16,
    batch_size: int = 4,
    reference: nn.Module | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Relearning:
    """Return the curves of every share of concept texts and every number of unrelated ones, at every rate.

    Args:
        model: The model with its edit in force; it is left bit-identical.
        tokenizer: Its tokenizer.
        items: What to ask.
        concept_texts: Texts of the concept; those that give an answer away are left out.
        benign: Unrelated texts, as many as the largest of `counts`.
        base_accuracy: Of the model before the edit.
        shares: Of the concept texts.
        counts: Of unrelated texts.
        rates: Learning rates.
        steps: Of each curve.
        every: Steps between two measurements.
        rank: Of the LoRA.
        batch_size: Texts a step.
        reference: A model that never knew, to be trained likewise.
        seed: Of texts, starts and batches.
        progress: Show bars; None shows them on a terminal.

    Raises:
        ValueError: There are no texts, or fewer than asked for.
    """
    sets = _sets(concept_texts, benign, items, shares, counts, seed)
    if not sets or not rates:
        raise ValueError(
            "there is nothing to train on: give concept_texts, benign, or both, and a rate"
        )
    curves = [
        relearn(
            model,
            tokenizer,
            chosen,
            items,
            base_accuracy=base_accuracy,
            steps=steps,
            lr=rate,
            every=every,
            rank=rank,
            batch_size=batch_size,
            name=name,
            reference=reference,
            seed=seed,
            progress=progress,
        )
        for name, chosen in sets.items()
        for rate in rates
    ]
    return Relearning(tuple(curves))


def _sets(
    concept_texts: Sequence[str],
    benign: Sequence[str],
    items: Sequence[Item],
    shares: Sequence[float],
    counts: Sequence[int],
    seed: int,
) -> dict[str, list[str]]:
    """Return what to train on, by name."""
    made: dict[str, list[str]] = {}
    for share in shares if concept_texts else ():
        chosen = relearning_texts(concept_texts, items, share=share, seed=seed)
        made[f"{share:.0%} of the concept texts"] = chosen
    for count in counts if benign else ():
        if len(benign) < count:
            raise ValueError(f"{count} unrelated texts are asked for; got {len(benign)}")
        made[f"{count} unrelated texts"] = list(benign[:count])
    return made
