"""What can be read out of a classifier about what it should have lost: argmax, logit, penultimate features.

A small loss to the uniform distribution is no evidence of forgetting: the order of the logits can survive it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concept_erasure.errors import SiteNotFoundError
from concept_erasure.language._famr_classifier import class_logits
from concept_erasure.linalg import statistics_dtype
from concept_erasure.logistic import fit_logistic

__all__ = ["Readout", "area_under_curve", "probe_score", "read_out"]

PROBE_PENALTY = 1e-3


def area_under_curve(scores: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a positive scores above a negative, ties counting half; None without both.

    Args:
        scores: Shape ``(n,)``.
        positive: Shape ``(n,)``, bool.
    """
    above, below = scores[positive], scores[~positive]
    if not len(above) or not len(below):
        return None
    ordered = below.sort().values
    wins = torch.searchsorted(ordered, above) + torch.searchsorted(ordered, above, right=True)
    return float(wins.double().mean() / (2 * len(below)))


def probe_score(features: Tensor, positive: Tensor, *, seed: int) -> float | None:
    """Return the AUROC of a logistic probe trained on one half of the rows and tested on the other.

    Args:
        features: Shape ``(n, d)``.
        positive: What it is to tell, shape ``(n,)``, bool.
        seed: Of the halves, which are drawn within each kind of row.

    Returns:
        None if there are fewer than four rows of a kind.
    """
    draw = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(features), dtype=torch.bool)
    for kind in (positive.cpu(), ~positive.cpu()):
        rows = kind.nonzero()[:, 0]
        if len(rows) < 4:
            return None
        train[rows[torch.randperm(len(rows), generator=draw)[: len(rows) // 2]]] = True
    train = train.to(features.device)
    x = features.flatten(1).to(statistics_dtype(features.device))
    mean, scale = x[train].mean(0), x[train].std(0)
    x = (x - mean) / torch.where(scale > 0, scale, torch.ones_like(scale))
    fitted = fit_logistic(x[train], positive[train].long(), 2, penalty=PROBE_PENALTY, tol=1e-5)
    logits = fitted.logits(x[~train])
    return area_under_curve(logits[:, 1] - logits[:, 0], positive[~train])


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What the rows still show.

    Attributes:
        forget_accuracy: Share of the forget rows whose argmax is their label.
        retain_accuracy: The same of the retain rows; None without any.
        logit_auc: AUROC of the log-odds of the forgotten classes, forget rows against retain rows; without classes
            that of the log-probability of the own label, which tells members from others.
        probe_auc: AUROC of a logistic probe on the input of the last linear module; None if the rows are too few.
    """

    forget_accuracy: float
    retain_accuracy: float | None
    logit_auc: float | None
    probe_auc: float | None

    def named(self, when: str) -> dict[str, float | None]:
        """Return the numbers under names such as ``forget_accuracy_before``."""
        return {f"{name}_{when}": value for name, value in vars(self).items()}


@torch.no_grad()
def read_out(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    forget: tuple[Tensor, Tensor],
    retain: tuple[Tensor, Tensor],
    classes: Tensor | None,
    *,
    batch_size: int,
    seed: int,
) -> tuple[Readout, Tensor]:
    """Return what can be read out, and the logits of the retain rows.

    Args:
        model: In evaluation mode.
        parameters: The ones to use in place of its own.
        forget: Inputs and labels.
        retain: Inputs and labels that the fit has not seen.
        classes: Forgotten classes; None if single rows are.
        batch_size: Rows at once.
        seed: Of the halves of the probe.
    """
    x, y = torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])
    positive = torch.arange(len(y), device=y.device) < len(forget[1])
    logits, features = _forward(model, parameters, x, batch_size)
    hits = (logits.argmax(1) == y).double()
    log_p = logits.log_softmax(1)
    if classes is None:
        score = log_p.gather(1, y[:, None])[:, 0]
    else:
        inside = torch.zeros(log_p.shape[1], dtype=torch.bool, device=log_p.device)
        inside[classes.to(log_p.device)] = True
        score = log_p[:, inside].logsumexp(1) - log_p[:, ~inside].logsumexp(1)
    made = Readout(
        forget_accuracy=float(hits[positive].mean()),
        retain_accuracy=float(hits[~positive].mean()) if bool((~positive).any()) else None,
        logit_auc=area_under_curve(score, positive),
        probe_auc=None if features is None else probe_score(features, positive, seed=seed),
    )
    return made, logits[~positive]


def _forward(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """Return the logits and the input of the linear module that ran last."""
    last: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args[0]]

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(remember) for module in linear]
    logits: list[Tensor] = []
    features: list[Tensor] = []
    try:
        for i in range(0, len(x), batch_size):
            rows = x[i : i + batch_size]
            logits.append(class_logits(model, parameters, rows))
            features += [one for one in last if len(one) == len(rows)]
    finally:
        for handle in handles:
            handle.remove()
    if not logits:
        raise SiteNotFoundError("there are no rows to read out")
    whole = torch.cat(features) if len(features) == len(logits) else None
    return torch.cat(logits), whole
