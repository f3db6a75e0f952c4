"""What a causal language model says: perplexity, and which of two continuations it prefers.

Both are pure readings; the model is left in the mode it was in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["ContinuationGap", "TokenizerLike", "continuation_gap", "perplexity"]


class Encoded(Protocol):
    """What a tokenizer returns: tensors by name."""

    def __getitem__(self, key: str, /) -> Tensor: ...


# A protocol would have to repeat the many options of the transformers class, so any callable is taken.
TokenizerLike = Callable[..., Encoded]


@dataclass(frozen=True)
class ContinuationGap:
    """How much more probable one continuation is than another, prompt by prompt.

    Args:
        gaps: ``log p(first | prompt) - log p(second | prompt)`` in nats, shape ``[n]``, float64.
        mass: ``p(first) + p(second)`` of each prompt, shape ``[n]``; low values mean that the prompt
            does not ask for either.
    """

    gaps: Tensor
    mass: Tensor

    @property
    def mean(self) -> float:
        """Mean signed gap in nats: positive if the first continuation is preferred."""
        return float(self.gaps.mean())

    @property
    def mean_absolute(self) -> float:
        """Mean size of the gap in nats, whichever way it points."""
        return float(self.gaps.abs().mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the gap over prompts: what the prompt decides."""
        return float(self.gaps.std(unbiased=False))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"{what} must be a non-empty list of texts, got {texts!r}")


def _batches(
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None,
    progress: bool | None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield ``(rows, ids, mask)``, longest texts together, padded on whichever side."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, disable=None if progress is None else not progress, leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=max_length is not None,
            max_length=max_length,
            return_tensors="pt",
        )
        device = _device(model)
        yield rows, batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of every token at every place, shape ``[batch, length, v]``."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits


def perplexity(
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool | None = False,
) -> float:
    """Return the perplexity per token of a causal language model on texts.

    The first token of a text is given, every later one is predicted; padding is left out.

    Args:
        model: A causal language model; its call returns ``.logits``, ``[batch, length, v]``.
        tokenizer: Its tokenizer.
        texts: Texts of at least two tokens.
        batch_size: Texts a forward pass; raising it costs memory.
        max_length: Cut texts to this many tokens.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        ``exp`` of the mean negative log probability of a token, at least 1.

    Raises:
        ValueError: If there are no texts or no token to predict.
    """
    _check(texts, "texts")
    total, count = 0.0, 0
    with _evaluating(model):
        for _, ids, mask in _batches(model, tokenizer, texts, batch_size, max_length, progress):
            log_p = _logits(model, ids, mask)[:, :-1].float().log_softmax(-1)
            known = mask[:, 1:].bool() & mask[:, :-1].bool()
            picked = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
            total -= float(picked[known].double().sum())
            count += int(known.sum())
    if count == 0:
        raise ValueError("no text has two tokens, so nothing is predicted; pass longer texts")
    return math.exp(total / count)


def _token(tokenizer: TokenizerLike, continuation: str) -> int:
    """Return the id of a continuation that is one token."""
    encoded = tokenizer([continuation], add_special_tokens=False, return_tensors="pt")
    ids = encoded["input_ids"]
    if ids.shape[1] != 1:
        raise ValueError(
            f"a continuation must be one token, {continuation!r} is {ids.shape[1]}; add or remove "
            "the leading space, or take a shorter word"
        )
    return int(ids[0, 0])


def continuation_gap(
    model: nn.Module,
    tokenizer: TokenizerLike,
    prompts: Sequence[str],
    first: str = " he",
    second: str = " she",
    *,
    batch_size: int = 16,
    progress: bool | None = False,
) -> ContinuationGap:
    """Return how much more probable ``first`` is than ``second`` after each prompt.

    Args:
        model: A causal language model; its call returns ``.logits``, ``[batch, length, v]``.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        first: A word that is one token, with its leading space if the tokenizer wants one.
        second: The word to compare with, one token.
        batch_size: Prompts a forward pass; raising it costs memory.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        The gaps in the order of the prompts.

    Raises:
        ValueError: If there are no prompts, or a word is not exactly one token.
    """
    _check(prompts, "prompts")
    pair = torch.tensor([_token(tokenizer, first), _token(tokenizer, second)])
    found = torch.empty(len(prompts), 2, dtype=torch.float64)
    with _evaluating(model):
        for rows, ids, mask in _batches(model, tokenizer, prompts, batch_size, None, progress):
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            places = torch.arange(len(rows), device=ids.device)
            at_end = _logits(model, ids, mask)[places, last].float().log_softmax(-1)
            found[rows] = at_end[:, pair.to(ids.device)].double().cpu()
    return ContinuationGap(found[:, 0] - found[:, 1], found.exp().sum(1))
