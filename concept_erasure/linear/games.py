"""The predictor-eraser game of R-LACE: losses, exact best responses, and the factored solver.

The predictor chooses ``theta`` ``(d, c)`` and a bias, the eraser an orthogonal projection ``P = I - V V^T``::

    min over theta, b   mean loss(z, P x theta + b) + penalty |theta|^2        max over V (d, k)

The value of a V is that minimum. It is convex in the matrix P (a maximum of linear functions, by duality), so the
eraser's side is a convex maximisation: local solutions only, and monotone steps that need no step size.

Everything takes leading axes ``(...)`` for games of one shape (the layers of a model) that are played side by side. A
game that has ended stands still, so its result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

__all__ = [
    "Game",
    "GameLoss",
    "Response",
    "Solution",
    "best_response",
    "row_losses",
    "slopes",
    "solve_factored",
    "top_directions",
]

GameLoss = Literal["cross_entropy", "logistic", "multilabel", "squared"]

CONVEX_ROUNDS = 10
GRASSMANN_ROUNDS = 120
TOLERANCE = 1e-6  # relative gain below which a round counts as no progress
ROUGH_TOLERANCE = 1e-4  # likewise until the best of several solutions is known
PATIENCE = 3
SOLVED = 1e-6  # distance to the constant predictor's loss at which nothing is left to win
DECREMENT = 1e-8  # best responses are exact to this share of the constant predictor's loss
ROUGH = 1e-4  # likewise on the way to a start
SCOUTED = (10.0, 3.0)  # multiples of the penalty after scouting; scouts play the first
SCOUTED_ROWS = 4096
PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)
NEWTON_STEPS = 40
CG_STEPS = 200
PRINCIPAL_AXES = 256  # of the preconditioner
CG_CHECK = 4  # how often conjugate gradients read their residual back from the device
BACKTRACKS = 12


def row_losses(loss: GameLoss, scores: Tensor, z: Tensor) -> Tensor:
    """Return the loss of each row, shape ``(..., n)``, of scores and targets ``(..., c, n)``."""
    if loss == "cross_entropy":
        return scores.logsumexp(-2) - (z * scores).sum(-2)
    if loss == "squared":
        return (scores - z).square().sum(-2)
    return (softplus(scores) - z * scores).sum(-2)


def slopes(loss: GameLoss, scores: Tensor, z: Tensor) -> Tensor:
    """Return the derivative of each row's loss in its scores, shape ``(..., c, n)``."""
    if loss == "cross_entropy":
        return scores.softmax(-2) - z
    if loss == "squared":
        return 2 * (scores - z)
    return scores.sigmoid() - z


def _curvature(loss: GameLoss, scores: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product of each row's second derivative with a direction ``(..., c, n)``."""
    if loss == "squared":
        return lambda moved: 2 * moved
    if loss == "cross_entropy":
        shares = scores.softmax(-2)
        return lambda moved: shares * (moved - (shares * moved).sum(-2, keepdim=True))
    share = scores.sigmoid()
    return lambda moved: share * (1 - share) * moved


@dataclass(frozen=True, eq=False)
class Game:
    """Data and loss of one game, or of several side by side. Make it with `of`.

    Targets and scores lie class by class: a softmax over a short last axis is many times slower.

    Attributes:
        rows: Centred representations with a last column of ones, shape ``(..., n, d + 1)``.
        z: Targets, shape ``(..., c, n)``: class shares (rows sum to one), 0/1 columns, or centred reals.
        loss: ``"cross_entropy"`` (softmax), ``"logistic"`` or ``"multilabel"`` (one sigmoid a column), or
            ``"squared"`` (sum of squared errors).
        penalty: Weight of ``|theta|^2``, positive.
    """

    rows: Tensor
    z: Tensor
    loss: GameLoss
    penalty: float = 1e-3

    @classmethod
    def of(cls, x: Tensor, z: Tensor, loss: GameLoss, penalty: float = 1e-3) -> Game:
        """Return the game on centred ``x`` ``(..., n, d)`` with targets ``z`` ``(..., n, c)``."""
        return cls(pad(x, (0, 1), value=1.0), z.mT.contiguous(), loss, penalty)

    @property
    def x(self) -> Tensor:
        """The representations, shape ``(..., n, d)``."""
        return self.rows[..., :-1]

    def scores(self, weights: Tensor) -> Tensor:
        """Return the scores ``(..., c, n)`` of weights ``(..., d + 1, c)``."""
        return weights.mT @ self.rows.mT

    def value(self, scores: Tensor) -> Tensor:
        """Return the mean loss of scores ``(..., c, n)``, shape ``(...)``, on the device."""
        return row_losses(self.loss, scores, self.z).mean(-1)

    def pull(self, slope: Tensor) -> Tensor:
        """Return ``rows^T slope / n``, shape ``(..., d + 1, c)``."""
        return (slope @ self.rows).mT / self.rows.shape[-2]

    @cached_property
    def decay(self) -> Tensor:
        """Twice the penalty of each weight, shape ``(d + 1, 1)``; the bias has none."""
        width = self.rows.shape[-1]
        return pad(self.rows.new_full((width - 1, 1), 2 * self.penalty), (0, 0, 0, 1))

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Strongest principal axes ``(..., d, m)``, their variances ``(..., m)`` and the mean of the others'.

        By subspace iteration from a fixed start, O(n d m).
        """
        x, (n, d) = self.x, self.x.shape[-2:]
        m = min(d, PRINCIPAL_AXES)
        draw = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(d, m, generator=draw, dtype=torch.float64).to(x))[0]
        for _ in range(3 if m < d else 1):
            axes = torch.linalg.qr(x.mT @ (x @ axes))[0]
        values, turn = torch.linalg.eigh((moved := x @ axes).mT @ moved / n)
        left_over = (x.square().sum((-2, -1)) / n - values.sum(-1)).clamp_min(0) / max(d - m, 1)
        return axes @ turn, values.clamp_min(0), left_over

    @cached_property
    def preconditioner(self) -> Preconditioner:
        """Thin approximation of the inverse of the mean second derivative."""
        return Preconditioner.of(
            self.spectrum, 2.0 if self.loss == "squared" else 0.2, 2 * self.penalty
        )

    @cached_property
    def constant(self) -> Tensor:
        """Scores ``(..., c)`` of the best constant predictor."""
        mean = self.z.mean(-1)
        if self.loss == "squared":
            return mean
        tiny = torch.finfo(mean.dtype).eps
        inside = mean.clamp(tiny, 1 - tiny)
        return inside.log() if self.loss == "cross_entropy" else inside.logit()

    @cached_property
    def ceiling(self) -> Tensor:
        """Loss ``(...)`` of the best constant predictor (the entropy of z): no V has a higher value."""
        return self.value(self.constant[..., None].expand_as(self.z))

    def with_penalty(self, penalty: float) -> Game:
        """Return the game with another penalty."""
        game = replace(self, penalty=penalty)
        vars(game)["spectrum"] = self.spectrum  # the same rows: not to be found again
        return game

    def scouts(self, rows: Tensor, count: int) -> Game:
        """Return the game on some rows ``(m,)`` in single precision, side by side along a new last leading axis."""
        few = replace(
            self, rows=self.rows[..., None, rows, :].float(), z=self.z[..., None, :, rows].float()
        )
        lead = (*few.rows.shape[:-3], count)
        many = replace(
            few,
            rows=few.rows.expand(*lead, *few.rows.shape[-2:]).contiguous(),
            z=few.z.expand(*lead, *few.z.shape[-2:]),
        )
        vars(many)["spectrum"] = few.spectrum
        return many


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """``(curvature x^T x / n + ridge I)^{-1}`` from the strongest principal axes of x; the others count as alike.

    Attributes:
        axes: Orthonormal columns, shape ``(..., d + 1, m)``, zero for the bias.
        weights: What to add along each axis, shape ``(..., m, 1)``.
        rest: The factor everywhere else, shape ``(..., d + 1, 1)``.
    """

    axes: Tensor
    weights: Tensor
    rest: Tensor

    @classmethod
    def of(
        cls, spectrum: tuple[Tensor, Tensor, Tensor], curvature: float, ridge: float
    ) -> Preconditioner:
        """Build it from principal axes, their variances, and the mean of the others'."""
        axes, values, left_over = spectrum
        rest = 1 / (curvature * left_over + ridge)[..., None, None]
        weights = 1 / (curvature * values + ridge)[..., None] - rest
        bias = torch.full_like(rest, 1 / curvature)
        full = torch.cat([rest.expand(*rest.shape[:-2], axes.shape[-2], 1), bias], -2)
        return cls(pad(axes, (0, 0, 0, 1)), weights, full)

    def __call__(self, columns: Tensor) -> Tensor:
        """Return the product with ``columns`` ``(..., d + 1, c)``."""
        return self.rest * columns + self.axes @ (self.weights * (self.axes.mT @ columns))

    def off(self, v: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the inverse within the orthogonal complement of orthonormal ``v`` ``(..., d + 1, k)``."""
        half = self(v)
        core = v.mT @ half
        return lambda columns: (
            (full := self(columns)) - half @ torch.linalg.solve(core, v.mT @ full)
        )


@dataclass(frozen=True, eq=False)
class Response:
    """The predictor's best response to one V.

    Attributes:
        weights: Orthogonal to V, with the biases as last row, shape ``(..., d + 1, c)``.
        cross: ``x^T slope / n``, shape ``(..., d, c)``: where the residuals still point.
        value: Loss and penalty together, shape ``(...)``.
        loss: The loss alone, shape ``(...)``.
    """

    weights: Tensor
    cross: Tensor
    value: Tensor
    loss: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """What the factored solver found: V ``(..., d, k)``, the response to it, and the values ``(...)`` on the way."""

    v: Tensor
    response: Response
    history: list[Tensor] = field(default_factory=list)


def _choose(where: Tensor, new: Solution, old: Solution) -> Solution:
    """Return the new solution of some games and the old one of the others, with the old history."""
    wide = where[..., None, None]
    one, two = new.response, old.response
    response = Response(
        torch.where(wide, one.weights, two.weights),
        torch.where(wide, one.cross, two.cross),
        torch.where(where, one.value, two.value),
        torch.where(where, one.loss, two.loss),
    )
    return Solution(torch.where(wide, new.v, old.v), response, old.history)


def _noted(solution: Solution) -> Solution:
    """Return the solution with its value added to its history."""
    return replace(solution, history=[*solution.history, solution.response.value])


def _off(v: Tensor, columns: Tensor) -> Tensor:
    """Return the part of ``columns`` orthogonal to the span of ``v``."""
    return columns - v @ (v.mT @ columns)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def top_directions(columns: Tensor, k: int) -> Tensor:
    """Return the k strongest left singular vectors of ``columns`` ``(..., d, c)``, shape ``(..., d, min(k, c, d))``."""
    left: Tensor = torch.linalg.svd(columns, full_matrices=False)[0]
    return left[..., :k]


def best_response(
    game: Game,
    v: Tensor,
    start: Response | None = None,
    *,
    decrement: float = DECREMENT,
    active: Tensor | None = None,
) -> Response:
    """Solve the predictor's side by Newton steps, each by preconditioned conjugate gradients.

    O(n d c) a product; the penalty makes the solution unique and orthogonal to V.

    Args:
        game: Data and loss.
        v: Orthonormal columns that are erased, shape ``(..., d, k)``.
        start: A response to a similar V.
        decrement: Stop when the quadratic model promises less than this share of the constant's loss.
        active: Which games to solve, shape ``(...)``; the others keep their start.
    """
    v = pad(v, (0, 0, 0, 1))  # the bias is never erased
    if start is None:
        zeros = torch.zeros_like(game.constant)[..., None, :]
        weights = torch.cat(
            [zeros.expand(*zeros.shape[:-2], v.shape[-2] - 1, -1), game.constant[..., None, :]], -2
        )
    else:
        weights = _off(v, start.weights)
    scores = game.scores(weights)
    value = game.value(scores) + _dot(game.decay * weights, weights) / 2
    goal = decrement * game.ceiling.clamp_min(torch.finfo(value.dtype).tiny)
    active = torch.ones_like(value, dtype=torch.bool) if active is None else active
    for _ in range(NEWTON_STEPS):
        gradient = _off(v, game.pull(slopes(game.loss, scores, game.z))) + game.decay * weights
        step = _newton_direction(game, v, scores, gradient, active)
        expected = -_dot(gradient, step) / 2
        moved = game.scores(step)
        size = _newton_size(game, (weights, scores, value), (step, moved), expected, active)
        wide = size[..., None, None]
        weights = torch.where(wide > 0, weights + wide * step, weights)
        scores = torch.where(wide > 0, scores + wide * moved, scores)
        value = game.value(scores) + _dot(game.decay * weights, weights) / 2
        active = active & (size > 0) & (expected > goal)
        if not bool(active.any()):
            break
    cross = game.pull(slopes(game.loss, scores, game.z))[..., :-1, :]
    return Response(weights, cross, value, game.value(scores))


def _newton_size(
    game: Game,
    here: tuple[Tensor, Tensor, Tensor],
    step: tuple[Tensor, Tensor],
    expected: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the largest of 1, 1/2, ... that lowers the value enough, or 0, shape ``(...)``."""
    weights, scores, value = here
    size, open_ = torch.ones_like(value), active & (expected > 0)
    out = torch.zeros_like(value)
    for _ in range(BACKTRACKS):
        wide = size[..., None, None]
        moved = weights + wide * step[0]
        found = game.value(scores + wide * step[1]) + _dot(game.decay * moved, moved) / 2
        good = open_ & (found <= value - 1e-4 * size * expected)
        out = torch.where(good, size, out)
        open_ = open_ & ~good
        if not bool(open_.any()):
            break
        size = size / 2
    return out


def _newton_direction(
    game: Game, v: Tensor, scores: Tensor, gradient: Tensor, active: Tensor
) -> Tensor:
    """Return the Newton step ``(..., d + 1, c)`` to a relative residual of a tenth."""
    curve, solve = _curvature(game.loss, scores), game.preconditioner.off(v)
    tiny = torch.finfo(scores.dtype).tiny
    step, rest = torch.zeros_like(gradient), -gradient
    way = ready = solve(rest)
    size = _dot(rest, ready)
    goal = 1e-2 * size
    for i in range(CG_STEPS):
        bent = _off(v, game.pull(curve(game.scores(way)))) + game.decay * way
        curved = _dot(way, bent)
        active = active & (curved > 0)  # else rounding is all that is left
        length = torch.where(active, size / curved, 0)[..., None, None]
        step, rest = step + length * way, rest - length * bent
        ready = solve(rest)
        new = _dot(rest, ready)
        if i % CG_CHECK == CG_CHECK - 1:
            active = active & (new > goal)
            if not bool(active.any()):
                break
        way = ready + (new / size.clamp_min(tiny))[..., None, None] * way
        size = new
    return step


def solve_factored(
    game: Game,
    start: Tensor,
    *,
    ladder: tuple[float, ...] = PENALTIES,
    scouts: int = 0,
    seed: int = 0,
    rounds: int = GRASSMANN_ROUNDS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Play the game on the thin factor; the value never falls.

    The game has several local solutions, fewer the larger the penalty. So it is played with large penalties first,
    each solution the start of the next game. Scouts start from random directions the concept spans, on a sample of
    the rows; the better of the two that come highest is played too, and the best of both is played out.

    Args:
        game: Data and loss.
        start: Orthonormal columns, shape ``(..., d, k)``.
        ladder: Multiples of the penalty to play first, largest first.
        scouts: How many, none or at least 2.
        seed: Of the scouts.
        rounds: Most ascent steps.
        tolerance: Stop after three rounds whose relative gain is below this.

    Returns:
        The solution; its history starts with the value of the given start.
    """
    given = Solution(start, best_response(game, start))
    here = _better(_lead(game, start, ladder), given) if ladder else given
    here = replace(here, history=[given.response.value, here.response.value])
    rough = max(tolerance, ROUGH_TOLERANCE)
    here = _climb(game, here, CONVEX_ROUNDS, rounds, rough, DECREMENT)
    if scouts:
        one, two = (_lead(game, v, SCOUTED) for v in _scout(game, start.shape[-1], scouts, seed))
        away = _climb(game, _better(one, two), CONVEX_ROUNDS, rounds, rough, DECREMENT)
        here = _noted(_better(away, here))
    return _ascend(game, here, rounds, tolerance, DECREMENT) if tolerance < rough else here


def _better(new: Solution, old: Solution) -> Solution:
    """Return the better of two solutions of each game, with the history of the old one."""
    return _choose(new.response.value > old.response.value, new, old)


def _lead(game: Game, v: Tensor, ladder: tuple[float, ...]) -> Solution:
    """Return where easier games lead to, with the response of the game itself."""
    warm = None
    for multiple in ladder:
        easier = game.with_penalty(game.penalty * multiple)
        stage = Solution(v, best_response(easier, v, warm, decrement=ROUGH))
        stage = _climb(easier, stage, CONVEX_ROUNDS, 10, 1e-3, ROUGH)
        v, warm = stage.v, stage.response
    return Solution(v, best_response(game, v, warm))


def _scout(game: Game, k: int, count: int, seed: int) -> list[Tensor]:
    """Return two good starts ``(..., d, k)``, the best of several on a sample of the rows."""
    draw = torch.Generator().manual_seed(seed)
    n = game.rows.shape[-2]
    rows = torch.randperm(n, generator=draw)[:SCOUTED_ROWS].to(game.rows.device)
    span, strength, _ = torch.linalg.svd(game.pull(game.z)[..., :-1, :], full_matrices=False)
    rank = max(k, int((strength > 1e-6 * strength[..., :1]).sum(-1).max()))
    mix = torch.randn(count, rank, k, generator=draw, dtype=torch.float64).to(span)
    v = torch.linalg.qr(span[..., None, :, :rank] @ mix)[0].float()
    many = game.scouts(rows, count).with_penalty(game.penalty * SCOUTED[0])
    here = _climb(
        many, Solution(v, best_response(many, v, decrement=ROUGH)), CONVEX_ROUNDS, 10, 1e-3, ROUGH
    )
    best = here.response.value.topk(2, -1).indices
    index = best[..., None, None].expand(*best.shape, *v.shape[-2:])
    chosen = here.v.gather(-3, index).to(span)
    return list(torch.linalg.qr(chosen)[0].unbind(-3))


def _unsolved(game: Game, here: Solution) -> Tensor:
    return here.response.value < game.ceiling * (1 - SOLVED)


def _climb(
    game: Game,
    here: Solution,
    convex_rounds: int,
    rounds: int,
    tolerance: float,
    decrement: float,
) -> Solution:
    """Take convex-concave steps, then steps on the Grassmann manifold.

    The value is convex in P, and its tangent is highest at the top k left singular vectors of ``x^T slope``. Such
    steps are short when the penalty is small, so ascent (Barzilai-Borwein steps, halved until the value rises)
    goes on from there.
    """
    busy = _unsolved(game, here)
    for _ in range(convex_rounds):
        if not bool(busy.any()):
            break
        v = top_directions(here.response.cross, here.v.shape[-1])
        v = torch.where(busy[..., None, None], v, here.v)
        answer = best_response(game, v, here.response, decrement=decrement, active=busy)
        gain = answer.value - here.response.value
        better = busy & (gain > 0)
        here = _noted(_choose(better, Solution(v, answer), here))
        busy = better & (gain >= 1e-3 * answer.value.abs()) & _unsolved(game, here)
    return _ascend(game, here, rounds, tolerance, decrement)


def _ascend(
    game: Game, here: Solution, rounds: int, tolerance: float, decrement: float
) -> Solution:
    """Go uphill on the Grassmann manifold from a solution."""
    slope, busy = _uphill(here), _unsolved(game, here)
    size = 0.1 / _dot(slope, slope).sqrt().clamp_min(torch.finfo(slope.dtype).tiny)
    idle = torch.zeros_like(busy, dtype=torch.int64)
    for _ in range(rounds):
        if not bool(busy.any()):
            break
        there, size = _uphill_step(game, here, slope, size, decrement, busy)
        gain = there.response.value - here.response.value
        slow = gain < tolerance * there.response.value.abs()
        idle = torch.where(slow, idle + 1, 0)
        new_slope = _uphill(there)
        busy = busy & (gain > 0) & (idle < PATIENCE) & _unsolved(game, there)
        size = torch.where(busy, _next_size(here.v, there.v, slope, new_slope, size), size)
        here, slope = _noted(there), new_slope
    return here


def _uphill(solution: Solution) -> Tensor:
    """Return the Riemannian gradient of the value, shape ``(..., d, k)``, orthogonal to V."""
    answer = solution.response
    return -(answer.weights[..., :-1, :] @ (answer.cross.mT @ solution.v))


def _next_size(old: Tensor, new: Tensor, slope: Tensor, new_slope: Tensor, size: Tensor) -> Tensor:
    """Return the Barzilai-Borwein step; the new basis is turned to lie next to the old one first."""
    left, _, right = torch.linalg.svd(new.mT @ old)
    turn = left @ right
    moved, bent = new @ turn - old, new_slope @ turn - _off(new, slope)
    straight, curved = _dot(moved, moved), _dot(moved, bent).abs()
    return torch.where(straight < 10 * size * curved, straight / curved, 10 * size)


def _uphill_step(
    game: Game, here: Solution, slope: Tensor, size: Tensor, decrement: float, busy: Tensor
) -> tuple[Solution, Tensor]:
    """Return better points and the sizes of the steps to them; games without one nearby stay where they are."""
    steep = _dot(slope, slope)
    size = torch.minimum(size, 1 / steep.sqrt().clamp_min(torch.finfo(slope.dtype).tiny))
    best, open_ = here, busy
    for _ in range(BACKTRACKS):
        wide = open_[..., None, None]
        v = torch.linalg.qr(here.v + size[..., None, None] * slope)[0]
        v = torch.where(wide, v, best.v)
        answer = best_response(game, v, best.response, decrement=decrement, active=open_)
        good = open_ & (answer.value > here.response.value + 1e-4 * size * steep)
        best = _choose(good, Solution(v, answer), best)
        size = torch.where(open_ & ~good, size / 2, size)
        open_ = open_ & ~good & (size * steep >= 1e-12 * here.response.value.abs())
        if not bool(open_.any()):
            break
    return best, size
