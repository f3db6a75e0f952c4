"""The terms of a loss: ``w_forget L_forget + w_retain L_retain + w_fluency L_fluency + (rho / 2) ||D||^2``.

A term says what it sums; the loop divides by how much there was over all micro-batches and processes, so
that accumulating and sharding change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from concept_erasure.language.batches import Batch, Batches

__all__ = ["Anchor", "Term", "TermName", "Unit", "log_prob", "nll"]

TermName = Literal["forget", "retain", "fluency", "anchor"]
Unit = Literal["positions", "sequences"]


def log_prob(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities, shape ``(N,)``, of tokens ``(N,)`` under distributions ``(N, V)``."""
    return log_probs.gather(-1, tokens[:, None].to(log_probs.device))[:, 0]


def nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return ``- log p(token)``, shape ``(N,)``; see `log_prob`."""
    return -log_prob(log_probs, tokens)


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the loss.

    Attributes:
        name: What it is for.
        weight: Its factor; may be zero or negative.
        batches: Its texts.
        loss: Returns, for a model and a batch, the *sum* over the supervised positions, or over the sequences.
        unit: What the sum is divided by.
    """

    name: TermName
    weight: float
    batches: Batches
    loss: Callable[[nn.Module, Batch], Tensor]
    unit: Unit = "positions"

    def __post_init__(self) -> None:
        if self.name not in get_args(TermName):
            raise ValueError(
                f"name must be one of {', '.join(get_args(TermName))}; got {self.name!r}"
            )
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be 'positions' or 'sequences'; got {self.unit!r}")

    def count_at(self, step: int) -> int:
        """Return by how much the loss of a batch counts."""
        if self.unit == "sequences":
            return len(self.batches.rows_at(step))
        return self.batches.count_at(step)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """The pull towards the start, ``(rho / 2) ||theta - theta_0||^2`` (unlearning notes, F1).

    Attributes:
        weight: rho.
        inside: Whether it is part of the loss. With Adam it belongs outside, as
            ``theta <- theta - lr rho (theta - theta_0)`` after the step: inside it is rescaled with every coordinate.
    """

    weight: float
    inside: bool = False

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be at least 0; got {self.weight}")
