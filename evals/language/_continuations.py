"""Log-probabilities of continuations: what is shared is computed once, and nothing is padded before it is read.

Three forward passes at most serve a batch of contexts: one over the tokens that all contexts of the call share
(an instruction), one over what a batch has in equal length, and one over the rest with the continuations. Rows
are padded on the right only, after everything that counts, so no architecture needs a mask or positions for it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating

__all__ = ["Query", "Run", "Scored", "common_prefix", "logits_at_places", "score"]

_RANK_ROWS = 64  # of the vocabulary compared at once


@dataclass(frozen=True)
class Query:
    """A context and the continuations to be scored, as token ids; neither may be empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scored:
    """What the model gives the continuations of one query.

    Attributes:
        log_probs: of each continuation, the sum over its tokens in nats.
        ranks: of each continuation's first token in the vocabulary, 1 for the most probable.
    """

    log_probs: tuple[float, ...]
    ranks: tuple[int, ...]


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all rows begin with."""
    low, high = min(rows), max(rows)  # in lexical order, so all others lie between
    length = min(len(low), len(high))
    return next((i for i in range(length) if low[i] != high[i]), length)


def _takes_cache(model: nn.Module) -> bool:
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)  # of peft
    forward = (unwrap() if unwrap is not None else model).forward
    return "past_key_values" in inspect.signature(forward).parameters


@contextmanager
def _gathering(model: nn.Module, rows: Tensor, places: Tensor) -> Iterator[list[bool]]:
    """Let only some hidden states reach the head, so that the product with the vocabulary is small."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    done: list[bool] = []
    if not isinstance(head, nn.Module):
        yield done
        return

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        done.append(True)
        kept = hidden[rows.to(hidden.device), places.to(hidden.device)]
        return (kept[None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield done
    finally:
        handle.remove()


def logits_at_places(
    model: nn.Module, rows: Tensor, places: Tensor, **inputs: object
) -> tuple[Tensor, object]:
    """Run the model and return the logits at some places only, shape ``[n, v]``, and its cache.

    Whatever a model does to its logits (a soft cap, a scale) is done to them: only the input of the head is cut.
    """
    with _gathering(model, rows, places) as done:
        out = model(**inputs)
    logits: Tensor = out.logits
    found = logits[0] if done else logits[rows.to(logits.device), places.to(logits.device)]
    return found.float(), getattr(out, "past_key_values", None)


@dataclass
class Run:
    """A prefix that a model has read: its cache, once for every row, and its length."""

    model: nn.Module
    device: torch.device
    cached: bool
    cache: Any = None
    length: int = 0
    _nothing: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))

    @classmethod
    def start(cls, model: nn.Module) -> Run:
        """Return a run that has read nothing."""
        getter = getattr(model, "get_input_embeddings", None)
        module = getter() if getter is not None else None
        first = next((module if isinstance(module, nn.Module) else model).parameters())
        return cls(model, first.device, _takes_cache(model))

    def spread(self, rows: Sequence[int]) -> Run:
        """Return a run whose rows are these rows of this one; this one stays as it is."""
        cache = self.cache
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_select_indices(torch.tensor(rows, device=self.device))
        return Run(self.model, self.device, self.cached, cache, self.length)

    def _inputs(self, ids: Tensor, keep: bool) -> dict[str, object]:
        inputs: dict[str, object] = {"input_ids": ids.to(self.device)}
        if self.cached:
            inputs["use_cache"] = keep or self.cache is not None
            if self.cache is not None:
                inputs["past_key_values"] = self.cache
        return inputs

    def read(self, ids: Tensor) -> bool:
        """Read the same number of further tokens in every row; False if the model keeps no cache."""
        if not self.cached:
            return False
        if ids.shape[1] == 0:
            return True
        found = logits_at_places(
            self.model, self._nothing, self._nothing, **self._inputs(ids, True)
        )[1]
        if not hasattr(found, "batch_select_indices"):
            self.cached, self.cache = False, None
            return False
        self.cache, self.length = found, self.length + ids.shape[1]
        return True

    def step(self, ids: Tensor, whole: Tensor) -> Tensor:
        """Read further tokens, the same number in every row, and return the logits after the last, ``[b, v]``.

        Args:
            ids: The tokens not read yet, ``[b, t]``.
            whole: All tokens from the beginning, for a model that keeps no cache.
        """
        count = len(whole)
        fresh = ids if self.cached else whole
        at = torch.arange(count)
        last = torch.full_like(at, fresh.shape[1] - 1)
        logits, cache = logits_at_places(self.model, at, last, **self._inputs(fresh, True))
        if self.cached:
            self.cache, self.length = cache, self.length + ids.shape[1]
        return logits

    def finish(self, rows: Sequence[Sequence[int]], at: Tensor, places: Tensor) -> Tensor:
        """Read ragged rows, padded on the right, and return the logits at places ``(at, places)``."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows])
        return logits_at_places(self.model, at, places, **self._inputs(ids, False))[0]


def _maximal(rows: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows that are not the beginning of another: reading these reads all."""
    ordered = sorted(rows)
    return [
        row
        for row, after in zip(ordered, [*ordered[1:], ()], strict=True)
        if after[: len(row)] != row
    ]


@dataclass
class _Plan:
    """Which rows of a batch are read after the shared part, and where each token is predicted."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # number of the row's prefix
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # (row, place) -> number
    picks: list[tuple[int, int, int]] = field(default_factory=list)  # number, token, continuation
    firsts: list[int] = field(default_factory=list)  # of each continuation, in picks

    def add(self, query: Query, cut: int, owner: int, first: int) -> None:
        """Plan one query whose context is read up to ``cut``; ``first`` numbers its continuations."""
        tail = query.context[cut:]
        made = _maximal({(*tail, *one[:-1]) for one in query.continuations})
        start = len(self.rows)
        self.rows += made
        self.owners += [owner] * len(made)
        for number, one in enumerate(query.continuations, start=first):
            full = (*tail, *one[:-1])
            row = start + next(i for i, m in enumerate(made) if m[: len(full)] == full)
            self.firsts.append(len(self.picks))
            for j, token in enumerate(one):
                key = (row, len(tail) - 1 + j)
                at = self.places.setdefault(key, len(self.places))
                self.picks.append((at, token, number))


def _ranks(logits: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
    found = []
    for a, t in zip(at.split(_RANK_ROWS), tokens.split(_RANK_ROWS), strict=True):
        rows = logits[a]
        found.append(1 + (rows > rows.gather(1, t[:, None])).sum(1))
    return torch.cat(found)


def _score_batch(shared: Run, queries: Sequence[Query]) -> tuple[Tensor, Tensor]:
    """Return log-probability and rank of every continuation of a batch, in order."""
    cut = min(len(query.context) for query in queries) - 1
    prefixes = list(dict.fromkeys(query.context[shared.length : cut] for query in queries))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    run = shared.spread([0] * len(prefixes))
    plan, first = _Plan(), 0
    for query in queries:
        plan.add(query, cut, number[query.context[shared.length : cut]], first)
        first += len(query.continuations)
    rows = plan.rows
    if len(rows) > len(prefixes) and run.read(torch.tensor(prefixes)):
        run = run.spread(plan.owners)
    else:  # nothing to share, or no cache to share it with
        run = shared.spread([0] * len(rows))
        rows = [(*prefixes[o], *row) for o, row in zip(plan.owners, rows, strict=True)]
    offset = len(rows[0]) - len(plan.rows[0])
    places = torch.tensor(list(plan.places))
    logits = run.finish(rows, places[:, 0], places[:, 1] + offset)
    at, tokens, owner = torch.tensor(plan.picks).to(logits.device).T
    picked = logits[at, tokens] - logits.logsumexp(1)[at]
    totals = torch.zeros(first, dtype=torch.float64, device=logits.device)
    totals.index_add_(0, owner, picked.double())
    start = torch.tensor(plan.firsts, device=logits.device)
    return totals.cpu(), _ranks(logits, at[start], tokens[start]).cpu()


def score(model: nn.Module, queries: Sequence[Query], *, batch_size: int = 16) -> list[Scored]:
    """Return the log-probability of every continuation of every query, in the order of the queries.

    Args:
        model: A causal language model; left in the mode it was in.
        queries: Contexts with their continuations.
        batch_size: Contexts a forward pass; each may take as many rows as it has continuations.

    Returns:
        One `Scored` a query.

    Raises:
        ValueError: If ``batch_size`` is below 1, or a log-probability is not a number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].context))
    found: dict[int, Scored] = {}
    with evaluating(model):
        shared = Run.start(model)
        if len(queries) > 1:
            length = common_prefix([query.context for query in queries])
            length = min(length, len(queries[order[0]].context) - 1)
            shared.read(torch.tensor([queries[0].context[:length]]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            totals, ranks = _score_batch(shared, [queries[i] for i in part])
            if bool(totals.isnan().any()):
                raise ValueError(
                    "the model gives a log-probability that is not a number; check the edit in force "
                    "(its strength, its dtype) before measuring"
                )
            sizes = [len(queries[i].continuations) for i in part]
            pairs = zip(totals.split(sizes), ranks.split(sizes), strict=True)
            for i, (total, rank) in zip(part, pairs, strict=True):
                found[i] = Scored(tuple(total.tolist()), tuple(rank.tolist()))
    return [found[i] for i in range(len(queries))]
