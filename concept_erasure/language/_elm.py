"""Options of ELM and the targets they make of a reading; the method itself is in `elm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from concept_erasure.language.cache import TargetCache, Targets
from concept_erasure.language.contrast import Reading
from concept_erasure.language.eraser import LanguageConfig
from concept_erasure.language.targets import (
    TopK,
    lowered_tokens,
    paper_target,
    plausible_target,
    ramp,
)
from concept_erasure.sites import find_sites

__all__ = [
    "TARGET_OPTIONS",
    "Contrast",
    "ElmConfig",
    "early_layers",
    "elm_targets",
    "forgotten",
    "retain_targets",
]

Contrast = Literal["auto", "persona", "anonymise", "reinforced", "weak"]


@dataclass(frozen=True, kw_only=True)
class ElmConfig(LanguageConfig):
    """Options of the fit, see `ElmEraser.fit`.

    Attributes:
        target: ``plausible``, or ``raw`` for (E1) and (E2) as they stand.
        ramped: Whether eta grows from 1 along each text (``raw``).
        temperature: Divides the logits of all three streams.
        top_k: Most tokens of a target to forget.
        alpha: See `plausible_target`; so are the next four.
        kappa: See `plausible_target`.
        growth: See `plausible_target`.
        widen_from: See `plausible_target`.
        widen_to: See `plausible_target`.
        least: Contrast in nats from which a position is to be forgotten; others are held (``plausible``).
        most: Contrast up to which a position counts for more.
        hold: Factor of positions that are held, in the same units.
        lower_weight: Factor of what makes unlikely answers more unlikely, see `lowered_tokens` (``plausible``).
        lower_eta: Strength of it.
        retain_top_k: Tokens kept of a target to retain.
        drift_weight: Factor of the change of log-probabilities on texts to retain, see `TopK.drift`.
        statements: Whether statements about the neighbours are among the texts to retain, see `mixed_texts`.
        hard_retain: Whether the target to retain is the most probable token alone.
        retain_anonymous: Whether the texts to forget with names replaced are among those to retain, up to half as
            many as there are others: what should change must depend on the names (`anonymise`).
        own_texts: Texts of the model's own in addition to those of the concept, at most.
        fluency_texts: Fluent texts, if they have a weight.
        gamma: Strength of the guidance under which they are written.
        fluency_tokens: Length of their continuations, at most.
    """

    contrast: str = "auto"
    target: Literal["plausible", "raw"] = "plausible"
    eta: float = 3.0
    ramped: bool = False
    temperature: float = 1.0
    top_k: int = 50
    alpha: float = 0.05
    kappa: float = 2.0
    growth: float = 1.0
    widen_from: float = 1.0
    widen_to: int = 20
    least: float = 0.5
    most: float = 5.0
    hold: float = 0.1
    lower_weight: float = 0.5
    lower_eta: float = 2.5
    retain_top_k: int = 100
    drift_weight: float = 0.05
    statements: bool = True
    hard_retain: bool = False
    retain_anonymous: bool = True
    own_texts: int = 400
    forget_weight: float = 1.0
    retain_weight: float = 4.0
    fluency_weight: float = 0.0
    fluency_texts: int = 64
    gamma: float = 3.0
    fluency_tokens: int = 128

    def __post_init__(self) -> None:
        if self.contrast not in get_args(Contrast):
            raise ValueError(
                f"contrast must be one of {', '.join(get_args(Contrast))}; got {self.contrast!r}"
            )
        if self.target not in {"plausible", "raw"}:
            raise ValueError(f"target must be 'plausible' or 'raw'; got {self.target!r}")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive to erase; got {self.eta}")
        if not self.forget_weight > 0:
            raise ValueError(f"forget_weight must be positive; got {self.forget_weight}")
        for name in (
            "retain_weight",
            "fluency_weight",
            "hold",
            "least",
            "lower_weight",
            "lower_eta",
            "drift_weight",
            "own_texts",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")


TARGET_OPTIONS = (
    "contrast",
    "target",
    "eta",
    "ramped",
    "temperature",
    "top_k",
    "alpha",
    "kappa",
    "growth",
    "widen_from",
    "widen_to",
    "least",
    "most",
    "hold",
    "lower_weight",
    "lower_eta",
)


# -- targets ----------------------------------------------------------------------------------------


def elm_targets(reading: Reading, config: ElmConfig) -> Targets:
    """Return the targets of positions in texts to forget, with their weights.

    Args:
        reading: What the three streams say there.
        config: Options.
    """
    r = reading
    if config.target == "raw":
        eta: float | Tensor = config.eta
        if config.ramped:
            eta = ramp(config.eta, *_place_in_text(r.rows))
        top = paper_target(r.lp0, r.lp_novice, r.lp_expert, eta, top_k=config.top_k)
        return Targets(top, torch.ones_like(r.rows, dtype=torch.float32), r.rows, r.places)
    found = plausible_target(
        r.lp0,
        r.lp_novice,
        r.lp_expert,
        r.tokens,
        alpha=config.alpha,
        kappa=config.kappa,
        growth=config.growth,
        widen_from=config.widen_from,
        widen_to=config.widen_to,
        eta_max=config.eta,
        top_k=config.top_k,
    )
    forget = found.contrast >= config.least
    held = TopK.of(r.lp0, config.top_k)
    top = TopK(
        torch.where(forget[:, None], found.target.indices, held.indices),
        torch.where(forget[:, None], found.target.log_probs, held.log_probs),
        torch.where(forget, found.target.tail, held.tail),
    )
    weights = torch.where(forget, found.contrast.clamp_max(config.most), config.hold)
    lowered = None
    if config.lower_weight:
        lowered = lowered_tokens(r.lp0, r.lp_novice, r.lp_expert, eta=config.lower_eta)
        lowered.levels[~forget] = torch.inf
    made = Targets(top, weights, r.rows, r.places, lowered)
    return made if config.hold else made.where(forget)


def forgotten(targets: TargetCache) -> int:
    """Return how many positions are to be forgotten; those that are held have a tail."""
    return int((targets.column("tail") == -torch.inf).sum())


def _place_in_text(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each position within its text and the number of positions of its text."""
    _, inverse, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - first[inverse], counts[inverse]


def retain_targets(reading: Reading, config: ElmConfig) -> Targets:
    """Return the targets of positions in texts to retain: P0, or its most probable token alone (E4)."""
    lp0 = reading.lp0
    if config.hard_retain:
        best = lp0.argmax(-1, keepdim=True).int()
        zeros = torch.zeros(best.shape, device=lp0.device)
        top = TopK(best, zeros, torch.full_like(zeros[:, 0], -torch.inf))
    else:
        top = TopK.of(lp0, config.retain_top_k)
    weights = torch.ones_like(reading.rows, dtype=torch.float32)
    return Targets(top, weights, reading.rows, reading.places)


def early_layers(model: nn.Module, *, first: float = 1 / 8, end: float = 1 / 4) -> tuple[int, ...]:
    """Return a range of layers by their share of all: the paper's 4 to 7 of 32, where facts are looked up.

    Args:
        model: The model.
        first: Where the range begins.
        end: Where it ends; one layer at least is in it.
    """
    n = sum(name.startswith("residual.") for name in find_sites(model))
    start = round(n * first)
    return tuple(range(start, max(start + 1, round(n * end))))
