"""The alternating game of R-LACE on the Fantope, as published, with its faults mended.

Ravfogel et al. 2022, algorithm 1. The relaxed value is neither convex nor concave in the eraser's matrix, so the
players may cycle: the best iterate seen is what counts, and `linear.games` plays the same game better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concept_erasure.fantope import fantope_projection, round_to_projection
from concept_erasure.linear.games import Game, best_response, slopes

__all__ = ["PRESETS", "GameSettings", "RelaxedSolution", "solve_relaxed"]


@dataclass(frozen=True, kw_only=True)
class GameSettings:
    """Constants of the alternating game.

    Attributes:
        steps: Outer iterations, one eraser step and one predictor step each.
        batch: Rows a step.
        eraser_rate: Learning rate of the eraser.
        predictor_rate: Learning rate of the predictor.
        eraser_momentum: Momentum of the eraser's steps.
        predictor_momentum: Momentum of the predictor's steps.
        eraser_decay: Weight decay of the eraser.
        predictor_decay: Weight decay of the predictor.
        evaluate_every: Steps between measurements.
        stop: Excess accuracy at which to stop. An excess of e over one half is a log-loss of 2 e^2 below the
            constant predictor's, which is what is compared.
    """

    steps: int = 3000
    batch: int = 256
    eraser_rate: float = 0.05
    predictor_rate: float = 0.05
    eraser_momentum: float = 0.0
    predictor_momentum: float = 0.0
    eraser_decay: float = 1e-4
    predictor_decay: float = 1e-4
    evaluate_every: int = 500
    stop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}")
        for name in ("eraser_rate", "predictor_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)!r}")
        for name in ("eraser_momentum", "predictor_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)!r}")
        for name in ("eraser_decay", "predictor_decay", "stop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)!r}")


_PUBLISHED = GameSettings(
    steps=75_000,
    batch=128,
    eraser_rate=0.005,
    predictor_rate=0.005,
    evaluate_every=1000,
    stop=0.0015,
)

PRESETS: dict[str, GameSettings] = {
    "paper": _PUBLISHED,  # the released solver's defaults
    "words": replace(_PUBLISHED, steps=50_000, eraser_decay=1e-5, predictor_decay=1e-5, stop=0.002),
    "biographies": replace(
        _PUBLISHED,
        steps=60_000,
        batch=256,
        predictor_momentum=0.9,
        predictor_decay=1e-5,
        stop=0.002,
    ),
    "demo": replace(
        _PUBLISHED,
        steps=50_000,
        batch=256,
        eraser_rate=0.003,
        predictor_rate=0.003,
        stop=0.001,
    ),
}


@dataclass(frozen=True, eq=False)
class RelaxedSolution:
    """What the alternating game found; all numbers are of one and the same iterate.

    Attributes:
        v: The rounded solution, shape ``(d, k)``.
        q: The relaxed one it was rounded from, shape ``(d, d)``.
        gap: Eigenvalue gap of q, 1 if it was a projection already.
        step: At which step.
        selected: Log-loss of a converged probe after erasing v, on the rows of the selection.
        history: ``selected`` of every measurement.
    """

    v: Tensor
    q: Tensor
    gap: float
    step: int
    selected: float
    history: list[float]


def solve_relaxed(
    game: Game, k: int, settings: GameSettings, *, seed: int = 0, dev: Game | None = None
) -> RelaxedSolution:
    """Play the published alternating game on the Fantope.

    The step order is the published one: eraser step on one minibatch, symmetrise and project; predictor step on
    another. The iterate with the highest log-loss of a converged probe is returned.

    Args:
        game: Data and loss; x centred and at unit mean variance, as the learning rates depend on it.
        k: Directions to erase.
        settings: Constants.
        seed: Seed of the start and the minibatches; they are drawn on the CPU, so all devices see the same.
        dev: Rows to select on, in the same coordinates; default those of the game.
    """
    n, d = game.x.shape
    draw = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(d, d, generator=draw, dtype=torch.float64)
    players = _Players(game, fantope_projection(noise.to(game.x), k), settings)
    best: RelaxedSolution | None = None
    history: list[float] = []
    judge = dev or game
    limit, step, warm = float(judge.ceiling), 0, None
    while step < settings.steps:
        block = min(settings.evaluate_every, settings.steps - step)
        for pick in torch.randint(n, (block, 2, settings.batch), generator=draw).to(game.x.device):
            players.play(pick, k)
        step += block
        v, gap = round_to_projection(players.q, k)
        warm = best_response(game, v, warm, decrement=1e-6)
        history.append(float(judge.value(judge.scores(warm.weights))))
        if best is None or history[-1] > best.selected:
            best = RelaxedSolution(v, players.q.clone(), float(gap), step, history[-1], history)
        if limit - history[-1] <= 2 * settings.stop**2:
            break
    if best is None:
        raise ValueError("the game needs at least one step")
    return best


class _Players:
    """Eraser and predictor of the alternating game, with their momentum."""

    def __init__(self, game: Game, q: Tensor, settings: GameSettings) -> None:
        self.game, self.settings, self.q = game, settings, q
        self.weights = game.x.new_zeros(
            game.rows.shape[1], game.z.shape[0]
        )  # the bias is the last row
        self._memory = [torch.zeros_like(q), torch.zeros_like(self.weights)]

    def play(self, pick: Tensor, k: int) -> None:
        """Take one step of the eraser on rows ``pick[0]`` and one of the predictor on ``pick[1]``."""
        settings = self.settings
        rows, slope = self._batch(pick[0])
        uphill = (slope @ rows[:, :-1]).T @ self.weights[
            :-1
        ].T  # minus the derivative of the loss in q
        move = self._smooth(0, uphill + settings.eraser_decay * self.q, settings.eraser_momentum)
        self.q = fantope_projection(self.q - settings.eraser_rate * move, k)
        rows, slope = self._batch(pick[1])
        downhill = (slope @ rows).T
        downhill[:-1] -= self.q @ downhill[:-1]
        move = self._smooth(
            1, downhill + settings.predictor_decay * self.weights, settings.predictor_momentum
        )
        self.weights = self.weights - settings.predictor_rate * move

    def _batch(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows and the slopes of the mean loss in their scores."""
        rows, weights = self.game.rows[pick], self.weights.clone()
        weights[:-1] -= self.q @ weights[:-1]
        return rows, slopes(self.game.loss, weights.T @ rows.T, self.game.z[:, pick]) / len(pick)

    def _smooth(self, index: int, gradient: Tensor, momentum: float) -> Tensor:
        if momentum == 0:
            return gradient
        self._memory[index] = momentum * self._memory[index] + gradient
        return self._memory[index]
