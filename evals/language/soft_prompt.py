"""Soft prompt: free embeddings before every prompt, trained on half of the questions and tested on the other half.

The strongest cheap test of what is still inside: nothing in the model changes, the attacker chooses its input freely.
A few vectors cannot hold the answers to questions they were not trained on; what the test half gains was in the model,
or is a habit that all answers share. So run it on the original and on a model that never knew, too.

Sources: soft prompts, Lester et al. 2021, arXiv:2104.08691; as an attack on unlearned models, Schwinn et al. 2024,
arXiv:2402.09063. Deviation: one prompt for all questions instead of one each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.concept_items import Item
from concept_erasure.errors import ShapeError
from concept_erasure.evals.language._attack import frozen, how_of, shown
from concept_erasure.evals.language.items import (
    How,
    ItemScores,
    item_scores,
    mcnemar,
    opening_ids,
    token_ids,
)
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.language.batches import Encoded, collate, logits_at
from concept_erasure.report import Cell, Interval

__all__ = ["SoftPrompt", "halves", "prompted", "prompted_tokenizer", "soft_prompt"]

Loss = Literal["choices", "answer"]


def halves(items: Sequence[Item], *, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Split items into two halves, to train on and to test on; the same stem is never in both.

    Args:
        items: At least two.
        seed: Of the split.

    Raises:
        ValueError: There are fewer than two different stems.
    """
    stems = list(dict.fromkeys(item.stem for item in items))
    if len(stems) < 2:
        raise ValueError(
            f"two different items at least are needed for two halves; got {len(stems)}"
        )
    random.Random(seed).shuffle(stems)  # noqa: S311 - not for secrets
    first = set(stems[: len(stems) // 2])
    return [i for i in items if i.stem in first], [i for i in items if i.stem not in first]


@contextmanager
def prompted(model: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """Give a model virtual tokens ``V, V + 1, ...`` behind its vocabulary of V, with these embeddings.

    The embedding's output is what the virtual tokens stand for: scales and edits at the embedding do not reach them.

    Args:
        model: A live model; left as it was.
        embeddings: Shape ``(k, d)``.

    Raises:
        ShapeError: The width is not the model's.
    """
    embedding = cast("Any", model).get_input_embeddings()
    size, width = embedding.weight.shape
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise ShapeError(f"embeddings must be (k, {width}); got {tuple(embeddings.shape)}")
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0].clamp(max=size - 1), *args[1:])

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
        ids = seen.pop()
        chosen = embeddings.to(output)[(ids - size).clamp(min=0)]
        return torch.where((ids >= size)[..., None], chosen, output)

    handles = [embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompted_tokenizer(model: nn.Module, tokenizer: TokenizerLike, count: int) -> TokenizerLike:
    """Return a tokenizer that opens every text with virtual tokens, behind BOS where there is one.

    Inside `prompted`, every evaluation that goes by this tokenizer is then one under the soft prompt.

    Args:
        model: The model, for the size of its vocabulary.
        tokenizer: Its tokenizer.
        count: Virtual tokens.
    """
    size = len(cast("Any", model).get_input_embeddings().weight)
    return _Prompted(tokenizer, [*opening_ids(tokenizer, model), *range(size, size + count)])


class _Prompted:
    def __init__(self, tokenizer: TokenizerLike, opening: list[int]) -> None:
        self._tokenizer, self._opening = tokenizer, opening

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Any:  # noqa: ANN401
        start = self._opening if add_special_tokens else []
        return {"input_ids": [[*start, *row] for row in token_ids(self._tokenizer, list(texts))]}


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """What the items give without and with the soft prompt.

    Attributes:
        train_before: Accuracy on the half that is trained on, without it.
        train_after: With it.
        test_before: Accuracy on the other half, without it.
        test_after: With it: the result.
        log_prob: Mean log-probability of the right answer of the test half in nats, before and after.
        p: Exact McNemar test of no difference on the test half, two-sided.
        shared_answers: Test items whose right answer is that of a train item too: a liking for it is no knowledge.
        losses: Every few steps, and at the last.
        embeddings: Shape ``(k, d)``, float32, to be used with `prompted`.
        budget: Everything that was allowed, by name.
        seed: Of start and batches.
        seconds: Time taken.
    """

    train_before: Interval
    train_after: Interval
    test_before: Interval
    test_after: Interval
    log_prob: tuple[float, float]
    p: float
    shared_answers: int
    losses: tuple[float, ...]
    embeddings: Tensor
    budget: dict[str, int | float | str]
    seed: int
    seconds: float

    @property
    def accuracy(self) -> tuple[Interval, Interval]:
        """Accuracy on the test half, before and after."""
        return self.test_before, self.test_after

    def to_dict(self) -> dict[str, Cell]:
        """Return plain values and intervals, ready for a row of a `Report`."""
        return {
            "attack": "soft prompt",
            "test accuracy before": self.test_before,
            "test accuracy": self.test_after,
            "train accuracy before": self.train_before,
            "train accuracy": self.train_after,
            "test log-probability before": self.log_prob[0],
            "test log-probability": self.log_prob[1],
            "McNemar p": self.p,
            "test items with a train item's answer": self.shared_answers,
            **self.budget,
            "last loss": self.losses[-1],
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        return (
            f"SoftPrompt({self.budget['tokens']} tokens, {self.budget['steps']} steps: accuracy on "
            f"{self.budget['test items']} test items {self.test_before} -> {self.test_after}, on the train items "
            f"{self.train_before} -> {self.train_after})"
        )


def soft_prompt(
    model: nn.Module,
    tokenizer: TokenizerLike,
    train_items: Sequence[Item],
    test_items: Sequence[Item],
    *,
    tokens: int = 16,
    steps: int = 200,
    lr: float = 0.1,
    batch_size: int = 8,
    loss: Loss = "answer",
    how: How | None = None,
    log_every: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> SoftPrompt:
    """Attack a live model; it is left bit-identical.

    Args:
        model: A causal language model, edits and hooks in force included.
        tokenizer: Its tokenizer.
        train_items: Items to train on.
        test_items: Other items, of the same kind; `halves` makes the two.
        tokens: Embeddings; 10 to 20 are usual.
        steps: Steps of Adam.
        lr: Learning rate, in units of the root mean square of the embeddings' entries.
        batch_size: Items a step.
        loss: ``"answer"`` is the negative log-probability of the right answer. ``"choices"`` is the cross-entropy
            over the choices of an item, what the accuracy is measured by; it is soon met on the train items
            without bringing much to the others.
        how: How items are scored; None is by their format. Letters are trained on as whole answers.
        log_every: Steps between two losses kept.
        seed: Of start and batches.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The accuracies, see `SoftPrompt`.

    Raises:
        ValueError: An item is in both halves, one is empty, or a number is out of range.
        FloatingPointError: The loss is no number.
    """
    _check(train_items, test_items, tokens=tokens, steps=steps, batch_size=batch_size, lr=lr)
    if loss not in {"choices", "answer"}:
        raise ValueError(f"loss must be 'choices' or 'answer'; got {loss!r}")
    begun = time.perf_counter()
    how = how or how_of([*train_items, *test_items])
    with frozen(model):
        start = _start(model, tokens, seed)
        opened = prompted_tokenizer(model, tokenizer, tokens)
        numbers = (steps, lr, batch_size, log_every)
        trained, losses = _train(model, opened, train_items, start, numbers, loss, seed, progress)
        before = [
            item_scores(model, tokenizer, some, how=how) for some in (train_items, test_items)
        ]
        after = _scores_under(model, tokenizer, trained, (train_items, test_items), how)
    budget: dict[str, int | float | str] = {"tokens": tokens, "steps": steps, "lr": lr}
    budget |= {"batch size": batch_size, "loss": loss}
    budget |= {"train items": len(train_items), "test items": len(test_items)}
    answers = {item.right for item in train_items}
    return SoftPrompt(
        train_before=before[0].accuracy,
        train_after=after[0].accuracy,
        test_before=before[1].accuracy,
        test_after=after[1].accuracy,
        log_prob=(before[1].mean_log_prob.value, after[1].mean_log_prob.value),
        p=mcnemar(before[1], after[1]).p,
        shared_answers=sum(item.right in answers for item in test_items),
        losses=losses,
        embeddings=trained,
        budget=budget,
        seed=seed,
        seconds=time.perf_counter() - begun,
    )


def _check(
    train_items: Sequence[Item], test_items: Sequence[Item], *, lr: float, **counts: int
) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number; got {value!r}")
    if not lr > 0:
        raise ValueError(f"lr must be positive; got {lr}")
    if not train_items or not test_items:
        raise ValueError(
            f"items are needed to train on and to test on; got {len(train_items)} and {len(test_items)}"
        )
    both = {item.stem for item in train_items} & {item.stem for item in test_items}
    if both:
        raise ValueError(
            f"{len(both)} items are in both halves, so that the test would test nothing; first: {min(both)!r}. "
            "Split them with halves(items)"
        )


def _scores_under(
    model: nn.Module,
    tokenizer: TokenizerLike,
    embeddings: Tensor,
    sets: Sequence[Sequence[Item]],
    how: How,
) -> list[ItemScores]:
    opened = prompted_tokenizer(model, tokenizer, len(embeddings))
    with prompted(model, embeddings):
        return [item_scores(model, opened, some, how=how) for some in sets]


def _start(model: nn.Module, count: int, seed: int) -> Tensor:
    """Return the embeddings of random tokens, ``(count, d)``, float32: a start among what the model knows."""
    embedding = cast("Any", model).get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(embedding.weight), (1, count), generator=generator)
    rows: Tensor = embedding(ids.to(embedding.weight.device))[0].float()
    return rows.clone()


def _train(
    model: nn.Module,
    opened: TokenizerLike,
    items: Sequence[Item],
    start: Tensor,
    numbers: tuple[int, float, int, int],
    loss: Loss,
    seed: int,
    progress: bool | None,
) -> tuple[Tensor, tuple[float, ...]]:
    steps, lr, batch_size, log_every = numbers
    scale = start.square().mean().sqrt().clamp_min(torch.finfo(start.dtype).tiny)
    free = (start / scale).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=lr)
    texts, owners = _choices(opened, items)
    order = random.Random(seed)  # noqa: S311 - not for secrets
    queue: list[int] = []
    kept: list[Tensor] = []
    for step in tqdm(range(steps), desc="soft prompt", leave=False, disable=not shown(progress)):
        while len(queue) < batch_size:
            queue += order.sample(range(len(items)), len(items))
        chosen, queue = queue[:batch_size], queue[batch_size:]
        with torch.enable_grad(), prompted(model, free * scale):
            value = _loss(
                model, [items[i] for i in chosen], [(texts, owners[i]) for i in chosen], loss
            )
            optimizer.zero_grad()
            (free.grad,) = torch.autograd.grad(value, free)
        optimizer.step()
        if step % log_every == 0 or step == steps - 1:
            kept.append(value.detach())
    losses = torch.stack(kept).tolist()
    bad = next((one for one in losses if not one < float("inf")), None)
    if bad is not None:
        raise FloatingPointError(f"the loss is {bad}; lower lr ({lr})")
    return (free.detach() * scale).clone(), tuple(losses)


def _choices(opened: TokenizerLike, items: Sequence[Item]) -> tuple[list[Encoded], list[range]]:
    """Return every choice of every item as tokens, those that are compared supervised, and whose they are."""
    opening = opening_ids(opened)
    pairs: list[tuple[str, str]] = []
    owners: list[range] = []
    for item in items:
        first = len(pairs)
        backwards = item.format == "reversed"
        pairs += [
            (f"{item.prompt}{one}", item.ending) if backwards else (item.prompt, one)
            for one in item.continuations
        ]
        owners.append(range(first, len(pairs)))
    contexts, ends = (token_ids(opened, [pair[k] for pair in pairs]) for k in (0, 1))
    texts = []
    for context, end in zip(contexts, ends, strict=True):
        ids = torch.tensor([*opening, *context, *end])
        texts.append(Encoded(ids, torch.arange(len(ids)) >= len(ids) - len(end)))
    return texts, owners


def _loss(
    model: nn.Module,
    items: Sequence[Item],
    rows: Sequence[tuple[list[Encoded], range]],
    loss: Loss,
) -> Tensor:
    texts = rows[0][0]
    wanted = [
        [owners[item.answer]] if loss == "answer" else list(owners)
        for item, (_, owners) in zip(items, rows, strict=True)
    ]
    device = next(model.parameters()).device
    batch = collate(texts, [i for one in wanted for i in one], pad_id=0).to(device)
    logs = logits_at(model, batch).float().log_softmax(-1)
    totals = batch.per_sequence(logs.gather(1, batch.tokens[:, None])[:, 0])
    if loss == "answer":
        return -totals.mean()
    parts = totals.split([len(one) for one in wanted])
    picked = [part.log_softmax(0)[item.answer] for item, part in zip(items, parts, strict=True)]
    return -torch.stack(picked).mean()
