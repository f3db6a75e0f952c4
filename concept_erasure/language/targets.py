"""What the edited model should say instead: target distributions, and the losses towards them.

ELM (Gandikota et al. 2024, arXiv:2410.02760) re-weights the original distribution by how much more a novice than an
expert would say a token, position by position:

    t_i = lp0_i + eta (lp_novice_i - lp_expert_i)        (E1)
    P*_i = softmax(t_i)                                  (E2)

`elm_target` is that. At the published strength its maximum is a token the model finds impossible, promoted because a
ratio of two tiny probabilities is large. `plausible_target` therefore chooses among the tokens the model finds
plausible in the first place (the constraint of contrastive decoding, Li et al. 2022, arXiv:2210.15097) and replaces the
constant eta by a budget in nats at each position. It says what is said instead. `lowered_tokens` says how unlikely
what is no longer said should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = [
    "Lowered",
    "PlausibleTarget",
    "TopK",
    "contrast",
    "elm_target",
    "kl",
    "lowered_tokens",
    "paper_target",
    "plausible_target",
    "ramp",
    "whp_target",
]

_BISECTIONS = 40  # halves [0, eta_max] to below float32's resolution
_LEAST_TAIL = 1e-6  # of a distribution in float32; what is nearer to nothing is rounding


@dataclass(frozen=True, eq=False)
class TopK:
    """Distributions kept as their most probable tokens and the mass of all others.

    Attributes:
        indices: Tokens, different ones in each row, shape ``(N, k)``, int32.
        log_probs: Their log-probabilities in the *full* distribution, shape ``(N, k)``, float32; minus infinity fills
            up a row that has fewer.
        tail: Log of the mass left out, shape ``(N,)``; minus infinity if nothing was.
    """

    indices: Tensor
    log_probs: Tensor
    tail: Tensor

    def __post_init__(self) -> None:
        if self.indices.shape != self.log_probs.shape or self.tail.shape != self.indices.shape[:1]:
            raise ValueError(
                f"indices and log_probs must be (N, k) and tail (N,); got {tuple(self.indices.shape)}, "
                f"{tuple(self.log_probs.shape)} and {tuple(self.tail.shape)}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(cls, log_probs: Tensor, k: int) -> Self:
        """Keep the k most probable tokens of distributions ``(N, V)``; all of them if k is V or more."""
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        if k >= log_probs.shape[-1]:
            return cls.dense(log_probs)
        values, indices = log_probs.topk(k, dim=-1)
        # summed directly over what is left: one minus the rest would be rounding where the rest is nearly all
        tail = log_probs.scatter(-1, indices, -math.inf).logsumexp(-1)
        return cls(indices.int(), values.float(), tail.float())

    @classmethod
    def dense(cls, log_probs: Tensor) -> Self:
        """Keep every token of distributions ``(N, V)``."""
        n, v = log_probs.shape
        indices = torch.arange(v, dtype=torch.int32, device=log_probs.device).expand(n, v)
        return cls(indices, log_probs.float(), log_probs.new_full((n,), -math.inf).float())

    def rows(self, index: Tensor) -> Self:
        """Return some of the distributions."""
        return type(self)(self.indices[index], self.log_probs[index], self.tail[index])

    def to(self, device: torch.device | str) -> Self:
        """Return the same on a device."""
        return type(self)(*(t.to(device) for t in (self.indices, self.log_probs, self.tail)))

    @property
    def entropy(self) -> Tensor:
        """Entropy with the tail as one outcome, shape ``(N,)``."""
        return -(_x_log_y(self.log_probs, self.log_probs).sum(-1) + _x_log_y(self.tail, self.tail))

    def cross_entropy(self, log_q: Tensor) -> Tensor:
        """Return ``- sum_v p_v log q_v``, shape ``(N,)``, the tail counting as one outcome (E3, E4).

        Args:
            log_q: Log-probabilities of the model, shape ``(N, V)``.
        """
        picked = log_q.gather(-1, self.indices.long())
        rest = _rest(picked)
        return -(_x_log_y(self.log_probs, picked).sum(-1) + _x_log_y(self.tail, rest))

    def kl(self, log_q: Tensor) -> Tensor:
        """Return ``KL(p || q)``, shape ``(N,)``: never more than the true one, and exact without a tail.

        Its gradient is that of the cross-entropy; it is zero where nothing has changed.
        """
        return self.cross_entropy(log_q) - self.entropy

    def drift(self, log_q: Tensor) -> Tensor:
        """Return the mean squared change of the kept log-probabilities, shape ``(N,)``.

        What a divergence does not see: the order of unlikely tokens among themselves, which is what a question about a
        rare thing reads.
        """
        there = self.log_probs.isfinite()
        change = log_q.gather(-1, self.indices.long()) - self.log_probs.masked_fill(~there, 0.0)
        return change.square().masked_fill(~there, 0.0).sum(-1) / there.sum(-1).clamp_min(1)


def _x_log_y(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Return ``x log y`` with ``0 log y = 0``, and no gradient from there."""
    nothing = log_x == -math.inf
    return log_x.exp() * log_y.masked_fill(nothing, 0.0)


def _rest(picked: Tensor) -> Tensor:
    """Return the log of the mass outside the picked tokens, shape ``(N,)``."""
    mass = picked.exp().sum(-1)
    return (1 - mass).clamp_min(_LEAST_TAIL).log()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of distributions ``(N, V)``, shape ``(N,)``."""
    return _x_log_y(log_p, log_p - log_q.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def elm_target(lp0: Tensor, lp_novice: Tensor, lp_expert: Tensor, eta: float | Tensor) -> Tensor:
    """Return ``log P*`` of (E1) and (E2), shape ``(N, V)``, in the precision of its input.

    Args:
        lp0: Log-probabilities of the frozen model, shape ``(N, V)``.
        lp_novice: The same as one who does not know the concept, shape ``(N, V)``.
        lp_expert: The same as one who does.
        eta: Strength, a number or one for each position ``(N,)``. Positive erases, negative amplifies, 0 gives lp0.
    """
    strength = torch.as_tensor(eta, dtype=lp0.dtype, device=lp0.device)
    if strength.ndim == 1:
        strength = strength[:, None]
    # a token that has no probability has no ratio either
    ratio = (lp_novice - lp_expert).masked_fill(lp0 == -math.inf, 0.0)
    return (lp0 + strength * ratio).log_softmax(-1)


def ramp(eta: float, place: Tensor, length: Tensor) -> Tensor:
    """Return the strength at each position in the authors' code: linear from 1 at the first to eta at the last.

    Args:
        eta: Full strength.
        place: Number of each position within its text, from 0, shape ``(N,)``.
        length: Number of positions of its text, shape ``(N,)``.
    """
    return 1 + (eta - 1) * place / (length - 1).clamp_min(1)


def paper_target(
    lp0: Tensor, lp_novice: Tensor, lp_expert: Tensor, eta: float | Tensor, *, top_k: int = 50
) -> TopK:
    """Return the target of the authors' code: the top k of (E1), *after* the contrast, renormalised, in float64."""
    wide = elm_target(lp0.double(), lp_novice.double(), lp_expert.double(), eta)
    values, indices = wide.topk(min(top_k, wide.shape[-1]), dim=-1)
    kept = values.log_softmax(-1).float()
    return TopK(indices.int(), kept, torch.full_like(kept[:, 0], -math.inf))


def contrast(lp_novice: Tensor, lp_expert: Tensor, tokens: Tensor) -> Tensor:
    """Return by how many nats the expert knows better, shape ``(N,)``, at least 0.

    The larger of what is seen and what is expected: ``lp_expert(x) - lp_novice(x)`` at the token of the text, and the
    mean of that over what the expert would have said, ``KL(P_expert || P_novice)``. A text that says "the" where the
    expert expected a name is as much an occasion as one that says the name.
    """
    difference = lp_expert - lp_novice
    seen = difference.gather(-1, tokens[:, None].to(difference.device))[:, 0]
    return torch.maximum(seen, kl(lp_expert, lp_novice)).clamp_min(0.0)


@dataclass(frozen=True, eq=False)
class PlausibleTarget:
    """A target with how it came about.

    Attributes:
        target: The distributions, with support inside the candidate sets and no tail.
        eta: Strength at each position, shape ``(N,)``.
        contrast: See `contrast`, shape ``(N,)``.
        size: Candidates at each position, shape ``(N,)``.
        spent: ``KL(P* || Q)`` in nats, Q the model's distribution within the candidates, shape ``(N,)``.
        cut: ``- log P0(C)``: what the restriction alone costs; ``spent + cut`` is ``KL(P* || P0)``, shape ``(N,)``.
    """

    target: TopK
    eta: Tensor
    contrast: Tensor
    size: Tensor
    spent: Tensor
    cut: Tensor


def plausible_target(
    lp0: Tensor,
    lp_novice: Tensor,
    lp_expert: Tensor,
    tokens: Tensor,
    *,
    alpha: float = 0.05,
    kappa: float = 2.0,
    growth: float = 1.0,
    widen_from: float = 1.0,
    widen_to: int = 20,
    eta_max: float = 10.0,
    top_k: int = 50,
) -> PlausibleTarget:
    """Return (E2) among plausible tokens, with a budget at each position. O(N V + N top_k).

    The candidates are ``C = {v: lp0(v) >= max lp0 + log(alpha)}``, two at least and `top_k` at most; where the contrast
    exceeds `widen_from` they are the `widen_to` most probable tokens at least. Otherwise an answer the model is
    nearly sure of would be alone in C, and exempt. Among them eta is the largest up to `eta_max` with

        KL(P*_i || Q_i)  <=  kappa + growth * contrast_i,        Q_i = P0_i renormalised on C_i,

    found by bisection: the left side grows with eta, its derivative being eta times a variance. So where expert and
    novice agree nothing happens, and no constant has to fit all positions.

    Args:
        lp0: Log-probabilities of the frozen model, shape ``(N, V)``.
        lp_novice: As one who does not know the concept, shape ``(N, V)``.
        lp_expert: As one who does.
        tokens: The tokens of the text, shape ``(N,)``.
        alpha: How much less probable than the first a candidate may be. Smaller admits more.
        kappa: Budget in nats.
        growth: Budget for each nat of contrast.
        widen_from: Contrast in nats.
        widen_to: Candidates from there on.
        eta_max: Most strength. It binds where the budget is out of reach.
        top_k: Most candidates.

    Raises:
        ValueError: If an option is outside its range.
    """
    _check_plausible(alpha, kappa, growth, eta_max, widen_to, top_k)
    known = contrast(lp_novice, lp_expert, tokens)
    most = min(top_k, lp0.shape[-1])
    values, indices = lp0.topk(most, dim=-1)
    inside = values >= values[:, :1] + math.log(alpha)
    least = torch.where(known > widen_from, widen_to, 2).clamp_max(most)
    inside |= torch.arange(most, device=lp0.device) < least[:, None]
    log_q = values.double().masked_fill(~inside, -math.inf)
    kept = log_q.logsumexp(-1)
    log_q = log_q - kept[:, None]
    tilt = (lp_novice - lp_expert).gather(-1, indices).double().masked_fill(~inside, 0.0)
    budget = kappa + growth * known.double()
    eta = _largest_eta(log_q, tilt, budget, eta_max)
    log_p = (log_q + eta[:, None] * tilt).log_softmax(-1)
    target = TopK(indices.int(), log_p.float(), torch.full_like(kept, -math.inf).float())
    spent = kl(log_p, log_q)
    return PlausibleTarget(target, eta.float(), known, inside.sum(-1), spent.float(), -kept.float())


def _check_plausible(
    alpha: float, kappa: float, growth: float, eta_max: float, widen_to: int, top_k: int
) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1]; got {alpha}")
    for name, value in (("kappa", kappa), ("growth", growth), ("eta_max", eta_max)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {value}")
    if top_k < 2 or not 2 <= widen_to <= top_k:
        raise ValueError(f"2 <= widen_to <= top_k must hold; got {widen_to} and {top_k}")


def _largest_eta(log_q: Tensor, tilt: Tensor, budget: Tensor, eta_max: float) -> Tensor:
    """Return for each row the largest eta with ``KL(softmax(log_q + eta tilt) || q) <= budget``, up to eta_max."""

    def cost(eta: Tensor) -> Tensor:
        return kl((log_q + eta[:, None] * tilt).log_softmax(-1), log_q)

    low = torch.zeros_like(budget)
    high = torch.full_like(budget, eta_max)
    free = cost(high) <= budget
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        within = cost(middle) <= budget
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return torch.where(free, torch.full_like(low, eta_max), low)


@dataclass(frozen=True, eq=False)
class Lowered:
    """Tokens that should be less likely than some level.

    Attributes:
        indices: Tokens, different ones in each row, shape ``(N, m)``, int32.
        levels: Log-probabilities, shape ``(N, m)``, float32; infinity fills up a row that has fewer tokens.
    """

    indices: Tensor
    levels: Tensor

    def rows(self, index: Tensor) -> Self:
        """Return some of the rows."""
        return type(self)(self.indices[index], self.levels[index])

    def excess(self, log_q: Tensor) -> Tensor:
        """Return the mean of ``relu(log q(v) - level(v))`` over the tokens of each row, shape ``(N,)``; 0 without any.

        Args:
            log_q: Log-probabilities of the model, shape ``(N, V)``.
        """
        above = (log_q.gather(-1, self.indices.long()) - self.levels).clamp_min(0.0)
        return above.sum(-1) / self.levels.isfinite().sum(-1).clamp_min(1)


def lowered_tokens(
    lp0: Tensor,
    lp_novice: Tensor,
    lp_expert: Tensor,
    *,
    eta: float,
    m: int = 32,
    among: int = 500,
    least: float = 0.5,
) -> Lowered:
    """Return the tokens an expert gives away at each position, each with its log-probability under (E1).

    A divergence is blind to them. Its gradient on a logit is ``P_th(v) - P*(v)``: of a token that is unlikely already
    nothing more is asked, though it may be a thousand times likelier than all other answers of its kind. So for these
    the level ``lp0 + eta (lp_novice - lp_expert)`` itself is the aim, from above only: no token is made likelier,
    which is what spoils (E1) as a target, and at the level there is no force left.

    Args:
        lp0: Log-probabilities of the frozen model, shape ``(N, V)``.
        lp_novice: As one who does not know the concept, shape ``(N, V)``.
        lp_expert: As one who does.
        eta: Strength, at least 0.
        m: Tokens at each position: those with the largest difference of expert and novice.
        among: How many of the model's most probable tokens are looked at; beyond them differences are noise.
        least: Difference in nats that counts.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be at least 0 and finite; got {eta}")
    values, indices = lp0.topk(min(among, lp0.shape[-1]), dim=-1)
    better = (lp_expert - lp_novice).gather(-1, indices)
    known, place = better.topk(min(m, better.shape[-1]), dim=-1)
    levels = (values.gather(-1, place) - eta * known).masked_fill(~(known >= least), math.inf)
    return Lowered(indices.gather(-1, place).int(), levels.float())


def whp_target(
    z0: Tensor, z_reinforced: Tensor, alpha: float, z_generic: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities of WHP's generic logits ``z0 - alpha relu(z_reinforced - z0)``, shape ``(N, V)``.

    Eldan and Russinovich 2023, arXiv:2310.02238. What more of the concept's text makes more likely is taken as
    knowledge of it, and lowered; nothing is raised.

    Args:
        z0: Logits of the frozen model, shape ``(N, V)``.
        z_reinforced: Logits of a copy trained on the concept's text.
        alpha: Strength, at least 0.
        z_generic: Logits of the frozen model before a generic form of the text, to start from in place of z0.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0; got {alpha}")
    start = z0 if z_generic is None else z_generic
    return (start - alpha * (z_reinforced - z0).clamp_min(0.0)).log_softmax(-1)
