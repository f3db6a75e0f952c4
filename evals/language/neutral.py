"""What an edit does to text that has nothing to do with the concept: divergence and perplexity, token by token.

``KL(P0 || P_th)`` compares whole next-token distributions, so it sees damage long before an accuracy does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.edit import Edit
from concept_erasure.evals.language._continuations import logits_at_places
from concept_erasure.evals.language._lifted import lifted
from concept_erasure.evals.language._neutral_texts import PARAGRAPHS, neutral_texts
from concept_erasure.evals.language.items import opening_ids, token_ids
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.report import Interval

__all__ = ["PARAGRAPHS", "Divergence", "kl_to_original", "neutral_texts"]

_HELD = 1 << 27  # numbers of the original's distributions that are held at once
_ROWS = 256  # distributions compared at once
_Contexts = Callable[[], AbstractContextManager[object]]


class Applicable(Protocol):
    """An eraser: something that changes a model and gives the way back."""

    def apply(self, model: nn.Module) -> Edit:
        """Change the model."""
        ...


Change = Applicable | Edit | Sequence[Edit] | _Contexts


@dataclass(frozen=True)
class Divergence:
    """How far a changed model is from the original on texts.

    Attributes:
        kl: Mean ``KL(P0 || P_th)`` of a token in nats, with its 95 % interval over texts.
        perplexity_before: Of the original, on the same tokens.
        perplexity_after: Of the changed model.
        agreement: Share of tokens at which both find the same one most probable.
        tokens: Predicted tokens.
        texts: Texts.
        per_text: Mean of each text, ``[texts]``.
    """

    kl: Interval
    perplexity_before: float
    perplexity_after: float
    agreement: float
    tokens: int
    texts: int
    per_text: tuple[float, ...]


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # [b, t], padded on the right
    mask: Tensor  # [b, t]
    rows: Tensor  # [n] row of each predicted token
    places: Tensor  # [n] the place that predicts it
    texts: Tensor  # [n] number of its text

    @property
    def targets(self) -> Tensor:
        return self.ids[self.rows, self.places + 1]

    def log_probs(self, model: nn.Module) -> Tensor:
        """Return the next-token distributions, ``[n, v]`` float32."""
        device = _device(model)
        inputs = {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device)}
        return logits_at_places(model, self.rows, self.places, **inputs)[0].log_softmax(1)


def _device(model: nn.Module) -> torch.device:
    getter = getattr(model, "get_input_embeddings", None)
    module = getter() if getter is not None else None
    return next((module if isinstance(module, nn.Module) else model).parameters()).device


def _vocabulary(model: nn.Module) -> int:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    weight = getattr(head, "weight", None)
    found = len(weight) if isinstance(weight, Tensor) else None
    return found or int(getattr(getattr(model, "config", None), "vocab_size", 1 << 16))


def _encode(
    model: nn.Module, tokenizer: TokenizerLike, texts: Sequence[str], max_length: int
) -> list[list[int]]:
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"texts must be a non-empty list of texts, got {texts!r}")
    opening = opening_ids(tokenizer, model)
    rows = [[*opening, *row][:max_length] for row in token_ids(tokenizer, texts)]
    short = next((i for i, row in enumerate(rows) if len(row) < 2), None)
    if short is not None:
        raise ValueError(
            f"text {short} has {len(rows[short])} tokens, so nothing is predicted: {texts[short]!r}; "
            "leave it out"
        )
    return rows


def _batches(rows: list[list[int]], batch_size: int, most: int) -> Iterator[_Batch]:
    """Yield texts of like length together, with at most ``most`` predicted tokens unless one text has more."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    part: list[int] = []
    for i in order:
        if part and (len(part) == batch_size or len(rows[i]) * (len(part) + 1) > most):
            yield _collate(rows, part)
            part = []
        part.append(i)
    yield _collate(rows, part)


def _collate(rows: list[list[int]], part: list[int]) -> _Batch:
    width = max(len(rows[i]) for i in part)
    ids = torch.tensor([[*rows[i], *[rows[i][0]] * (width - len(rows[i]))] for i in part])
    lengths = torch.tensor([len(rows[i]) for i in part])
    mask = torch.arange(width) < lengths[:, None]
    at, places = mask[:, 1:].nonzero(as_tuple=True)
    return _Batch(ids, mask.long(), at, places, torch.tensor(part)[at])


def _contexts(model: nn.Module, change: Change) -> tuple[_Contexts, _Contexts]:
    """Return what to enter to see the original, and what to enter to see the changed model."""
    edits = [change] if isinstance(change, Edit) else change
    if isinstance(edits, Sequence):
        return (lambda: lifted(model, edits)), nullcontext
    apply = getattr(change, "apply", None)
    if apply is not None:
        return nullcontext, (lambda: apply(model))
    if callable(change):
        return nullcontext, change
    raise TypeError(
        f"need an eraser, an edit in force, or a function that returns a context manager; got {change!r}"
    )


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return ``KL(before || after)`` of log-distributions ``[n, v]``, shape ``[n]`` float64."""
    pairs = zip(before.split(_ROWS), after.split(_ROWS), strict=True)
    parts = [(p.exp() * (p - q)).nan_to_num(nan=0.0).sum(1) for p, q in pairs]  # 0 (-inf - q) = 0
    return torch.cat(parts).double().clamp_min(0.0)


def kl_to_original(
    model: nn.Module,
    change: Change,
    tokenizer: TokenizerLike,
    texts: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    max_length: int = 512,
) -> Divergence:
    """Measure the divergence of a changed model from the original, ``KL(P0 || P_th)`` a token.

    The original's distributions are held for as many tokens as fit into half a gigabyte; then the change is made,
    compared and taken back, and so on. Nothing is approximated.

    Args:
        model: A causal language model; as it was afterwards.
        change: An eraser, which is applied; an edit in force, or several, lifted for the original's part; or a function
            that returns a context manager under which the model is changed.
        tokenizer: Its tokenizer.
        texts: Default: `neutral_texts`.
        batch_size: Texts a forward pass.
        max_length: Cut texts to this many tokens.

    Raises:
        ValueError: If a text is too short, or a distribution is not one.
        TypeError: If the change is none of these.
    """
    texts = neutral_texts() if texts is None else texts
    rows = _encode(model, tokenizer, texts, max_length)
    original, changed = _contexts(model, change)
    budget = max(1, _HELD // _vocabulary(model))
    sums = torch.zeros(5, len(texts), dtype=torch.float64)  # kl, nll, nll, agreement, tokens
    group: list[_Batch] = []
    held = 0
    batches = [*_batches(rows, batch_size, max(1, budget // 2)), None]
    with evaluating(model):
        for batch in batches:
            size = 0 if batch is None else len(batch.rows)
            if group and (batch is None or held + size > budget):
                _compare(model, group, original, changed, sums)
                group, held = [], 0
            if batch is not None:
                group.append(batch)
                held += size
    return _summary(sums)


def _compare(
    model: nn.Module, group: list[_Batch], original: _Contexts, changed: _Contexts, sums: Tensor
) -> None:
    with original():
        before = [batch.log_probs(model) for batch in group]
    with changed():
        for batch, p in zip(group, before, strict=True):
            q = batch.log_probs(model)
            target = batch.targets.to(q.device)[:, None]
            parts = [
                _divergence(p, q),
                -p.gather(1, target)[:, 0].double(),
                -q.gather(1, target)[:, 0].double(),
                (p.argmax(1) == q.argmax(1)).double(),
            ]
            found = torch.stack([*parts, torch.ones_like(parts[0])]).cpu()
            sums.index_add_(1, batch.texts, found)


def _summary(sums: Tensor) -> Divergence:
    if not bool(sums.isfinite().all()):
        raise ValueError(
            "the changed model gives no finite log-probabilities; check the edit (its strength, its dtype)"
        )
    kl, before, after, same, count = sums
    total, texts = float(count.sum()), sums.shape[1]
    mean = float(kl.sum()) / total
    # variance of a ratio of sums over independent texts
    spread = float(((kl - mean * count) ** 2).sum()) * texts / max(1, texts - 1)
    half = 1.96 * math.sqrt(spread) / total
    return Divergence(
        Interval(mean, max(0.0, mean - half), mean + half),
        math.exp(float(before.sum()) / total),
        math.exp(float(after.sum()) / total),
        float(same.sum()) / total,
        int(total),
        texts,
        tuple((kl / count).tolist()),
    )
