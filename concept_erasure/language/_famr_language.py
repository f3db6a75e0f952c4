"""FAMR on a language model: targets at token positions, the objective over them, and its certificate.

Forget set: the positions of the forget texts that have a target q_i. ``F = mean w_i KL(q_i || p_th)`` over them,
``R = mean KL(p_0 || p_th)`` over retain positions, ``G = F + w_r R``. The anchor acts on the weights in effect: for a
LoRA ``|D|^2 = sum_l s^2 |B_l A_l|_F^2``, never on A and B by themselves, of which A starts at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from concept_erasure.concept import Concept
from concept_erasure.language._famr_classifier import in_evaluation_mode
from concept_erasure.language.batches import (
    Batch,
    Encoded,
    Head,
    chunked,
    collate,
    encode,
    hidden_at,
    logits_at,
    pad_id,
)
from concept_erasure.language.cache import TargetCache, Targets, cache_key
from concept_erasure.language.contrast import (
    ContrastSource,
    Reading,
    Source,
    Streams,
    read_rows,
    streams,
)
from concept_erasure.language.targets import TopK, contrast, plausible_target

__all__ = [
    "Given",
    "LanguageObjective",
    "Positions",
    "TokenTarget",
    "divergence_sum",
    "forget_targets",
    "retain_targets",
    "token_target",
]

TokenTarget = Literal["elm", "uniform", "renormalised", "given"]
Positions = Literal["all", "contrast"]
Given = Callable[[Tensor, Tensor], Tensor]
LEAST_CONTRAST = 0.5  # nats: below, expert and novice agree, and there is nothing to forget
MOST_CONTRAST = 5.0  # nats up to which a position counts for more
KEPT = 64  # most probable tokens of a retain target; the rest is one bucket


def token_target(kind: TokenTarget, reading: Reading, *, top_k: int, given: Given | None) -> TopK:
    """Return q at the positions of a reading.

    Args:
        kind: ``elm``: the plausible target of ELM. ``uniform``: over the `top_k` most probable tokens of ``p_0``, since
            over the whole vocabulary it would ask for noise. ``renormalised``: ``p_0`` without the token of the
            text. ``given``: yours.
        reading: Distributions of the frozen model.
        top_k: Tokens kept.
        given: From ``log p_0`` ``(N, V)`` and the tokens ``(N,)`` to ``log q`` ``(N, V)``.

    Raises:
        ValueError: If ``given`` returns no distributions.
    """
    lp0 = reading.lp0
    if kind == "elm":
        return plausible_target(
            lp0, reading.lp_novice, reading.lp_expert, reading.tokens, top_k=max(top_k, 20)
        ).target
    if kind == "uniform":
        best = lp0.topk(min(top_k, lp0.shape[1]), dim=1)
        even = torch.full_like(best.values, -math.log(best.values.shape[1])).float()
        return TopK(best.indices.int(), even, torch.full_like(even[:, 0], -math.inf))
    if kind == "renormalised":
        rest = lp0.scatter(1, reading.tokens[:, None], -math.inf).log_softmax(1)
        return TopK.of(rest, top_k)
    if given is None:
        raise ValueError(
            "target='given' needs given=, a function of log p_0 (N, V) and tokens (N,)"
        )
    log_q = given(lp0, reading.tokens)
    if log_q.shape != lp0.shape or bool((log_q.exp().sum(1) - 1).abs().max() > 1e-3):
        raise ValueError(
            f"given must return log-probabilities {tuple(lp0.shape)}, each row with sum 1; got {tuple(log_q.shape)}"
        )
    return TopK.of(log_q, top_k)


def forget_targets(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    texts: Sequence[str],
    *,
    target: TokenTarget,
    positions: Positions,
    source: ContrastSource | None,
    given: Given | None,
    top_k: int,
    max_length: int,
    batch_size: int,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> TargetCache:
    """Return the targets of the forget texts at the positions that count.

    With ``positions="contrast"`` these are the ones where expert and novice differ by 0.5 nats or more, weighted by
    ``min(5, contrast)``: where the knowledge is, and not the grammar around it.

    Raises:
        ValueError: If no position is left.
    """
    if source is None:
        own = encode(tokenizer, texts, max_length=max_length)
        seen = Streams(own, own, own)
    else:
        seen = streams(tokenizer, concept, texts, source, max_length=max_length, seed=seed)
    by = Source(
        source or "persona"
    )  # without a source all streams are the text, and nothing is asked of it
    fill = pad_id(tokenizer)

    def make(rows: list[int]) -> Targets:
        reading = read_rows(model, seen, by, rows, pad=fill)
        top = token_target(target, reading, top_k=top_k, given=given)
        weights = torch.ones_like(reading.tokens, dtype=torch.float32)
        made = Targets(top, weights, reading.rows, reading.places)
        if positions == "all":
            return made
        known = contrast(reading.lp_novice, reading.lp_expert, reading.tokens)
        weighted = Targets(top, known.clamp_max(MOST_CONTRAST), made.rows, made.places)
        return weighted.where(known >= LEAST_CONTRAST)

    options = {
        "method": "famr",
        "target": target,
        "positions": positions,
        "source": source,
        "top_k": top_k,
        "streams": [[text.ids.tolist() for text in part] for part in (seen.novice, seen.expert)],
    }
    # a function cannot be told from another one, so its targets are not kept on disk
    place = None if folder is None or given is not None else folder
    cache = TargetCache.build(
        seen.own,
        make,
        key=cache_key(model, seen.own, options),
        folder=place,
        batch_size=batch_size,
        progress=progress,
    )
    if not len(cache):
        raise ValueError(
            f"no position of the {len(texts)} forget texts moves by {LEAST_CONTRAST} nats between expert and novice: "
            "there is nothing to forget; use another contrast, or positions='all'"
        )
    return cache


def retain_targets(
    model: nn.Module,
    texts: Sequence[Encoded],
    *,
    batch_size: int,
    pad: int,
    folder: Path | None,
    progress: bool,
) -> TargetCache:
    """Return ``p_0`` at every position of the retain texts, its 64 most probable tokens and the rest as one."""
    own = list(texts)
    seen, by = Streams(own, own, own), Source("persona")

    def make(rows: list[int]) -> Targets:
        reading = read_rows(model, seen, by, rows, pad=pad)
        top = TopK.of(reading.lp0, KEPT)
        return Targets(top, torch.ones_like(top.tail), reading.rows, reading.places)

    return TargetCache.build(
        seen.own,
        make,
        key=cache_key(model, seen.own, {"method": "famr", "retain": KEPT}),
        folder=folder,
        batch_size=batch_size,
        progress=progress,
    )


def divergence_sum(model: nn.Module, batch: Batch, cache: TargetCache) -> Tensor:
    """Return ``sum_i w_i KL(q_i || p_th)`` over a batch of the cache's texts."""
    top, weights = cache.at(batch)

    def loss(logits: Tensor, where: Tensor) -> Tensor:
        return weights[where] * top.rows(where).kl(logits.float().log_softmax(-1))

    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    hidden = hidden_at(model, batch)
    return chunked(loss, hidden, Head(model), vocabulary=size, twice=True).sum()  # for Hessians


@dataclass(frozen=True, eq=False)
class LanguageObjective:
    """G and F on fixed samples, of the model as it is when asked.

    Attributes:
        model: The model.
        forget: Targets of the forget texts.
        retain: Of the retain texts; None without a retain term.
        retain_weight: ``w_r``.
        forget_rows: Which texts of `forget` are the sample.
        retain_rows: Which of `retain`.
        batch_size: Texts at once.
        pad: Any token.
    """

    model: nn.Module
    forget: TargetCache
    retain: TargetCache | None
    retain_weight: float
    forget_rows: Sequence[int]
    retain_rows: Sequence[int]
    batch_size: int
    pad: int

    @property
    def points(self) -> int:
        """Forget positions of the sample."""
        return sum(self.forget.texts[row].count for row in self.forget_rows)

    def batches(self, cache: TargetCache, rows: Sequence[int]) -> Iterator[Batch]:
        """Yield the sample of a cache, texts of like length together."""
        order = sorted(rows, key=lambda row: len(cache.texts[row]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            yield collate(cache.texts, order[start : start + self.batch_size], pad_id=self.pad).to(
                device
            )

    def pieces(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield the shares of G, and whether each is of F; a share of F is not weighted."""
        for batch in self.batches(self.forget, self.forget_rows):
            yield divergence_sum(self.model, batch, self.forget) / self.points, True
        if self.retain is None or not self.retain_weight or not self.retain_rows:
            return
        count = sum(self.retain.texts[row].count for row in self.retain_rows)
        for batch in self.batches(self.retain, self.retain_rows):
            share = divergence_sum(self.model, batch, self.retain) / count
            yield self.retain_weight * share, False

    @torch.no_grad()
    def values(self) -> tuple[float, float]:
        """Return G and F."""
        with in_evaluation_mode(self.model):
            found = [(value.double(), of_f) for value, of_f in self.pieces()]
        total = torch.stack([value for value, _ in found]).sum()
        own = torch.stack([value for value, of_f in found if of_f]).sum()
        return float(total), float(own)

    def gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of G by some of the model's own parameters; memory of one more copy of these."""
        with _leaves(self.model, names) as leaves, in_evaluation_mode(self.model):
            total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in leaves.items()}
            for piece, _ in self.pieces():
                parts = torch.autograd.grad(piece, list(leaves.values()), allow_unused=True)
                for name, part in zip(leaves, parts, strict=True):
                    if part is not None:
                        total[name] += part
        return total

    def hessian_product(self, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Return the Hessian of G by these parameters times a flat float32 vector."""

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            with (
                _leaves(self.model, names) as leaves,
                in_evaluation_mode(self.model),
                sdpa_kernel(SDPBackend.MATH),  # the fused ones have no second derivative
            ):
                own = list(leaves.values())
                along = [
                    v.view_as(p)
                    for v, p in zip(vector.split([p.numel() for p in own]), own, strict=True)
                ]
                for piece, _ in self.pieces():
                    first = torch.autograd.grad(piece, own, create_graph=True)
                    slope = torch.stack(
                        [(f * v).sum() for f, v in zip(first, along, strict=True)]
                    ).sum()
                    second = torch.autograd.grad(slope, own, allow_unused=True)
                    total += torch.cat(
                        [
                            torch.zeros_like(p).reshape(-1) if s is None else s.reshape(-1)
                            for s, p in zip(second, own, strict=True)
                        ]
                    )
            return total

        return product

    @torch.no_grad()
    def token_readout(self) -> tuple[float, float]:
        """Return the mean log-probability of the texts' own tokens at the forget positions, and their argmax share."""
        said, first, count = [], [], 0
        with in_evaluation_mode(self.model):
            for batch in self.batches(self.forget, self.forget_rows):
                log_p = logits_at(self.model, batch).float().log_softmax(-1)
                said.append(log_p.gather(1, batch.tokens[:, None]).double().sum())
                first.append((log_p.argmax(1) == batch.tokens).sum())
                count += batch.count
        return float(torch.stack(said).sum()) / count, float(torch.stack(first).sum()) / count


@contextmanager
def _leaves(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Let some parameters, and no others, have gradients."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    own = dict(model.named_parameters(remove_duplicate=False))
    try:
        model.requires_grad_(False)
        chosen: dict[str, Tensor] = {name: own[name].requires_grad_() for name in names}
        with torch.enable_grad():
            yield chosen
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
