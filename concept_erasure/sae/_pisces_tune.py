"""Choose tau and mu on the training split: a random walk over a grid that skips what must be too weak or too strong."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language.batches import Batch, Encoded, collate, encode, logits_at, pad_id

__all__ = [
    "MUS", "TAUS", "Limits", "Point", "Score", "TextScore", "TooLargeError", "harmonic", "search",
]  # fmt: skip

MUS = (4.0, 7.0, 10.0, 13.0, 18.0, 24.0, 30.0, 36.0, 42.0, 50.0)
TAUS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.5, 0.4, 0.3, 0.2)
PARTS = ("efficacy", "specificity", "coherence")
Score = Callable[[nn.Module], Mapping[str, float]]
"""What a model under an edit is worth: numbers named `PARTS`, 1 is best; those left out do not count."""
_HELD = 1 << 26  # log-probabilities of the original that are kept


class TooLargeError(EditError):
    """An edit does not fit into the dtype of the weights."""


@dataclass(frozen=True)
class Limits:
    """When a trial counts as too weak or too strong.

    Attributes:
        efficacy: Below it the edit is too weak; 0.4 of the knowledge has to go.
        specificity: Below it the edit is too strong.
        coherence: Likewise.
    """

    efficacy: float = 0.4
    specificity: float = 0.7
    coherence: float = 0.5


@dataclass(frozen=True)
class Point:
    """A trial: the two numbers, what they gave, and whether that was ``ok``, ``weak`` or ``strong``."""

    tau: float
    mu: float
    parts: Mapping[str, float]
    value: float
    verdict: str

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


def harmonic(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if one value is 0 or less, or not a number."""
    if not values or not all(value > 0 for value in values):
        return 0.0
    return len(values) / sum(1 / value for value in values)


def _verdict(parts: Mapping[str, float], limits: Limits) -> str:
    high = {"specificity": limits.specificity, "coherence": limits.coherence}
    if any(not parts.get(name, 1.0) >= bound for name, bound in high.items()):
        return "strong"
    return "ok" if parts.get("efficacy", 1.0) >= limits.efficacy else "weak"


def search(
    applied: Callable[[float, float], AbstractContextManager[nn.Module]],
    score: Score,
    *,
    taus: Sequence[float] = TAUS,
    mus: Sequence[float] = MUS,
    trials: int = 30,
    limits: Limits | None = None,
    seed: int = 0,
) -> tuple[Point, list[Point]]:
    """Return the best point of a grid and all that were tried.

    A weak point strikes all that are no stronger (mu no larger, tau no lower), a strong one all that are no weaker.

    Args:
        applied: From tau and mu to a context in which the model is edited; a `TooLargeError` of it is a strong point.
        score: See `Score`.
        taus: Of the grid.
        mus: Of the grid.
        trials: Points to try at most.
        limits: See `Limits`.
        seed: Of the order.

    Raises:
        ValueError: If a score is named otherwise.
        EditError: If no point has a value above 0: the message says what the best efficacy was.
    """
    limits = limits or Limits()
    grid = [(tau, mu) for tau in taus for mu in mus]
    random.Random(seed).shuffle(grid)  # noqa: S311 - not for secrets
    tried: list[Point] = []

    def struck(tau: float, mu: float) -> bool:
        return any(
            (one.verdict == "weak" and mu <= one.mu and tau >= one.tau)
            or (one.verdict == "strong" and mu >= one.mu and tau <= one.tau)
            for one in tried
        )

    for tau, mu in grid:
        if len(tried) >= trials:
            break
        if struck(tau, mu):
            continue
        try:
            with applied(tau, mu) as model:
                parts = {name: float(value) for name, value in score(model).items()}
        except TooLargeError:
            parts = dict.fromkeys(PARTS, 0.0)
        if unknown := sorted(set(parts) - set(PARTS)):
            raise ValueError(f"a score has the parts {', '.join(PARTS)}; got {unknown[0]!r}")
        tried.append(Point(tau, mu, parts, harmonic(list(parts.values())), _verdict(parts, limits)))
    order = {"ok": 2, "weak": 1, "strong": 0}
    best = max(tried, key=lambda one: (order[one.verdict], one.value))
    if best.value <= 0:
        top = max(one.parts.get("efficacy", 0.0) for one in tried)
        raise EditError(
            f"none of {len(tried)} pairs of tau and mu lowers the concept and leaves the rest (highest efficacy "
            f"{top:.3g}); look at the features, give more of them, or give tau and mu yourself"
        )
    if best.verdict != "ok":
        found = ", ".join(f"{name} {value:.3g}" for name, value in best.parts.items())
        warnings.warn(
            f"none of {len(tried)} pairs of tau and mu was neither too weak nor too strong; the best one is "
            f"{best.verdict} (tau {best.tau}, mu {best.mu}: {found})",
            ErasureWarning,
            stacklevel=3,
        )
    return best, tried


class TextScore:
    """Score an edited model on the concept's own texts and on texts to keep, against the model as it is now.

    Efficacy is ``1 - p/p0``, p the geometric mean probability of the tokens that say the concept where its texts say
    them; specificity the same ratio on texts to keep, at most 1; coherence ``1 / (1 + KL/max_kl)`` with the mean
    divergence there, so that one half is the limit.

    Args:
        model: The model without edits; it needs a head.
        tokenizer: Its tokenizer.
        forget_texts: Texts of the concept.
        retain_texts: Texts to keep.
        tokens: Ids that say the concept; if none occurs, all tokens of its texts count.
        max_kl: The divergence in nats that is just allowed.
        max_length: Tokens of a text.
        batch_size: Texts a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        forget_texts: Sequence[str],
        retain_texts: Sequence[str],
        tokens: Sequence[int],
        *,
        max_kl: float = 0.05,
        max_length: int = 64,
        batch_size: int = 16,
    ) -> None:
        if not retain_texts:
            raise ValueError(
                "tau and mu are tuned against texts to keep; give retain_texts, or tau and mu, or a score"
            )
        self.max_kl = max_kl
        device = next(model.parameters()).device
        fill = pad_id(tokenizer)
        rows = encode(tokenizer, list(forget_texts), max_length=max_length)
        said = [one for row in rows if (one := _where(row, tokens)) is not None]
        self.says = bool(said)
        self._forget = _batches(said or rows, batch_size, fill, device)
        kept = encode(tokenizer, list(retain_texts), max_length=max_length)
        width = _vocabulary(model)
        held = _batches(kept, batch_size, fill, device)
        self._retain: list[tuple[Batch, Tensor]] = []
        with evaluating(model):
            self._said = _mean(model, self._forget)
            total = 0
            for batch in held:
                if self._retain and total + batch.count * width > _HELD:
                    break
                total += batch.count * width
                self._retain.append((batch, logits_at(model, batch).float().log_softmax(-1)))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the three parts; 0 if the model's outputs are not finite, which counts as too strong."""
        with evaluating(model):
            said = _mean(model, self._forget)
            divergence, fall, count = 0.0, 0.0, 0
            for batch, before in self._retain:
                after = logits_at(model, batch).float().log_softmax(-1)
                divergence += float((before.exp() * (before - after)).sum())
                fall += float((after - before).gather(1, batch.tokens[:, None]).sum())
                count += batch.count
        # max() and min() below would take NaN for no change at all
        if not math.isfinite(said + divergence + fall):
            return dict.fromkeys(PARTS, 0.0)
        kl = max(0.0, divergence / count)
        return {
            "efficacy": 1 - min(1.0, _exp(said - self._said)),
            "specificity": min(1.0, _exp(fall / count)),
            "coherence": 1 / (1 + kl / self.max_kl),
        }


def _exp(value: float) -> float:
    return float(torch.tensor(value).double().clamp(max=50).exp())


def _vocabulary(model: nn.Module) -> int:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return len(head.weight)


def _where(row: Encoded, tokens: Sequence[int]) -> Encoded | None:
    """Return the text with only the tokens that say the concept supervised; None if there are none."""
    mask = row.supervised & torch.isin(row.ids, torch.tensor(list(tokens)))
    return Encoded(row.ids, mask) if bool(mask.any()) else None


def _batches(rows: Sequence[Encoded], size: int, fill: int, device: torch.device) -> list[Batch]:
    parts = torch.arange(len(rows)).split(size)
    return [collate(rows, part.tolist(), pad_id=fill).to(device) for part in parts]


def _mean(model: nn.Module, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        found = logits_at(model, batch).float().log_softmax(-1)
        total += float(found.gather(1, batch.tokens[:, None]).sum())
        count += batch.count
    return total / count
