"""What is measured before and after a fit of FAMR on a language model, and the certificate made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concept_erasure.language._famr_classifier import in_evaluation_mode
from concept_erasure.language._famr_language import LanguageObjective
from concept_erasure.language.batches import Encoded, collate, logits_at
from concept_erasure.language.certificates import (
    Certificate,
    InfluenceLink,
    OutputCertificate,
    certify_outputs,
    lanczos_smallest,
    low_rank_norm,
    low_rank_spectral_norm,
    spectral_norm,
)
from concept_erasure.language.eraser import LanguageEraser
from concept_erasure.language.parameters import LEFT, RIGHT

__all__ = [
    "Start",
    "auto_rho",
    "backtracked",
    "certify",
    "changes",
    "measure_influence",
    "point_logits",
]


def sizes(values: Mapping[str, Tensor]) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(float(v.detach().double().square().sum()) for v in values.values()))


def changes(
    eraser: LanguageEraser, original: Mapping[str, Tensor]
) -> tuple[float, dict[str, float]]:
    """Return ``|D|`` of the weights in effect, and the spectral norm of each change.

    Args:
        eraser: The fit.
        original: The old values of parameters that it gives new ones.
    """
    squared, factors = 0.0, {}
    for path in eraser.modules:
        left, right = eraser.weights[path + LEFT], eraser.weights[path + RIGHT]
        squared += float(low_rank_norm(left, right)) ** 2
        factors[f"{path}.weight"] = float(low_rank_spectral_norm(left, right))
    for name in eraser.raw:
        moved = eraser.weights[name].double() - original[name].double()
        squared += float(moved.square().sum())
        factors[name] = float(spectral_norm(moved))
    return math.sqrt(squared), factors


@dataclass(frozen=True, eq=False)
class Start:
    """What is measured before the run.

    Attributes:
        values: G and F.
        rho: Strength of the anchor.
        logits: Of the held-out retain points, shape ``(n, V)``; None without any.
        readout: See `LanguageObjective.token_readout`.
    """

    values: tuple[float, float]
    rho: float
    logits: Tensor | None
    readout: tuple[float, float]


def auto_rho(goal: LanguageObjective, names: Sequence[str], radius: float) -> float:
    """Return the rho whose first-order step ``|grad G(th0)| / rho`` is that share of ``|th0|``.

    Raises:
        ValueError: If the gradient is zero.
    """
    own = dict(goal.model.named_parameters(remove_duplicate=False))
    size, scale = sizes(goal.gradient(names)), sizes({name: own[name] for name in names})
    if not size > 0 or not scale > 0:
        raise ValueError(
            "the gradient at the start is zero: the model gives the target already, and there is nothing to do"
        )
    return size / (radius * scale)


@torch.no_grad()
def point_logits(
    model: nn.Module, texts: Sequence[Encoded], *, batch_size: int, pad: int, seed: int
) -> Tensor:
    """Return the logits at one position of each text, drawn at random, shape ``(n, V)``.

    One, because the tokens of a text are not independent draws, which the interval of C4 needs.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = []
    for text in texts:
        places = text.supervised.nonzero()[:, 0]
        one = torch.zeros_like(text.supervised)
        one[places[int(torch.randint(len(places), (1,), generator=draw))]] = True
        chosen.append(Encoded(text.ids, one))
    device = next(model.parameters()).device
    made = []
    with in_evaluation_mode(model):
        for start in range(0, len(chosen), batch_size):
            rows = range(start, min(start + batch_size, len(chosen)))
            made.append(
                logits_at(model, collate(chosen, list(rows), pad_id=pad).to(device)).float()
            )
    return torch.cat(made)


def certify(
    goal: LanguageObjective,
    eraser: LanguageEraser,
    names: Sequence[str],
    start: Start,
    after: Callable[[], Tensor],
    *,
    influence: InfluenceLink | None,
) -> tuple[Certificate, tuple[float, float]]:
    """Return the certificate of a fit, and the readout of the tokens under it.

    Args:
        goal: G on its samples.
        eraser: The fit; it is applied while this measures.
        names: Parameters that it changes.
        start: What was measured before.
        after: Returns the logits of the held-out retain points under the fit.
        influence: Measured before.
    """
    own = dict(goal.model.named_parameters(remove_duplicate=False))
    original = {name: own[name].detach().clone() for name in names}
    distance, factors = changes(eraser, original)
    with eraser.apply(goal.model):
        values, readout = goal.values(), goal.token_readout()
        gradient = goal.gradient(names)
        outputs: OutputCertificate | None = None
        if start.logits is not None:
            outputs = certify_outputs(start.logits, after())
        moved = {name: own[name].detach().float() - original[name].float() for name in names}
    residual = {name: gradient[name] + start.rho * moved[name] for name in names}
    made = Certificate(
        rho=start.rho,
        points=goal.points,
        start=start.values[0],
        end=values[0],
        forget_start=start.values[1],
        forget_end=values[1],
        distance=distance,
        gradient=sizes(gradient),
        residual=sizes(residual),
        outputs=outputs,
        spectral=factors,
        influence=influence,
    )
    return made, readout


def measure_influence(
    goal: LanguageObjective, names: Sequence[str], rho: float, *, steps: int, seed: int
) -> InfluenceLink | None:
    """Return whether rho exceeds beta, on the weights in effect; memory is `steps` copies of them."""
    if not steps:
        return None
    own = dict(goal.model.named_parameters(remove_duplicate=False))
    flat = torch.cat([own[name].detach().reshape(-1).float() for name in names])
    value, rest = lanczos_smallest(goal.hessian_product(names), flat, steps=steps, seed=seed)
    return InfluenceLink(rho=rho, beta=max(0.0, -value), residual=rest, steps=steps)


def backtracked(
    goal: LanguageObjective, eraser: LanguageEraser, start: Start, *, halvings: int = 12
) -> tuple[LanguageEraser, float]:
    """Return the halving of a fit with the smallest J, none if it is the fit itself, and the factor.

    Adam with the anchor outside does not minimise J itself: it can end where half the way is better, or above its
    start, where C1 and C3 say nothing. On the way back to the start J falls below its value there, unless the very
    first step rose. Only low-rank updates can be scaled.
    """
    best, best_factor, best_value = eraser, 1.0, _anchored(goal, eraser, start)
    factor, value = 1.0, best_value
    for _ in range(0 if eraser.raw else halvings):
        if value <= start.values[0] and value > best_value:
            break  # past the minimum on this line
        factor /= 2
        tried = eraser.scaled(factor)
        value = _anchored(goal, tried, start)
        if value < best_value:
            best, best_factor, best_value = tried, factor, value
    return (best, best_factor) if best_value <= start.values[0] else (eraser, 1.0)


def _anchored(goal: LanguageObjective, eraser: LanguageEraser, start: Start) -> float:
    """Return J of a fit."""
    distance, _ = changes(eraser, _originals(goal.model, eraser))
    with eraser.apply(goal.model):
        return goal.values()[0] + start.rho / 2 * distance**2


def _originals(model: nn.Module, eraser: LanguageEraser) -> dict[str, Tensor]:
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name: own[name].detach() for name in eraser.raw}
