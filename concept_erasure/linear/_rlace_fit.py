"""How `RlaceEraser` is solved: which closed form or game, played for one fit or many, and what is reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_erasure.certify import certificate
from concept_erasure.collect import Representations
from concept_erasure.data import read_data
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.labels import LabelKind
from concept_erasure.leakage import FOLDS, Folds, held_out_gap, remaining_gap
from concept_erasure.linalg import LowRankAffine, MetricSolver, Moments
from concept_erasure.linear._rlace_data import (
    QUOTIENTS,
    Frame,
    Rows,
    constant_loss,
    suited_penalty,
)
from concept_erasure.linear.alternating import PRESETS, GameSettings, solve_relaxed
from concept_erasure.linear.games import (
    ROUGH_TOLERANCE,
    TOLERANCE,
    Game,
    Solution,
    best_response,
    row_losses,
    solve_factored,
    top_directions,
)
from concept_erasure.linear.leace import concept_whitening, erasing_factors
from concept_erasure.sites import Space
from concept_erasure.spectral import relative_edit

if TYPE_CHECKING:
    from concept_erasure.linear.rlace import RlaceConfig

__all__ = ["Fit", "HeldOut", "Report", "certified", "rayleigh_factors", "solve"]

HeldOut = tuple[object, object] | Representations
Report = dict[str, object]
Z_975 = 1.96
USUAL_PENALTY = 1e-3  # where there is nothing to choose by
CERTIFIED = 1e-5  # differences from cvxpy beyond which there is a warning


def rayleigh_factors(M: Tensor, k: int, B: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Solve the game of a Rayleigh quotient ``theta^T M theta / theta^T B theta`` in closed form.

    Args:
        M: Symmetric PSD, shape ``(d, d)``.
        k: Directions to remove, 0 to d.
        B: Symmetric PSD, shape ``(d, d)``; default the identity. Directions B does not see are left alone.

    Returns:
        ``(left, right, value)``: factors ``(d, at most k)`` of ``P = I - left right^T``, orthogonal without B,
        and the largest quotient that is left.

    Raises:
        ShapeError: If the matrices are not square or differ in shape.
        ValueError: If k is out of range.
    """
    if M.ndim != 2 or M.shape[0] != M.shape[1] or (B is not None and B.shape != M.shape):
        shapes = tuple(M.shape), None if B is None else tuple(B.shape)
        raise ShapeError(f"M and B must be (d, d); got {shapes[0]} and {shapes[1]}")
    if type(k) is not int or not 0 <= k <= len(M):
        raise ValueError(f"k must be a whole number from 0 to {len(M)}; got {k!r}")
    if B is None:
        values, vectors = torch.linalg.eigh((M + M.T) / 2)
        left = right = vectors[:, len(M) - k :].flip(-1)
    else:
        scale, axes = torch.linalg.eigh((B + B.T) / 2)
        keep = scale > scale[-1] * len(B) * torch.finfo(B.dtype).eps
        root, axes = scale[keep].sqrt(), axes[:, keep]
        whiten = axes / root
        inner = whiten.T @ M @ whiten
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        top = vectors[:, max(len(values) - k, 0) :].flip(-1)
        left, right = axes @ (root[:, None] * top), whiten @ top
    remaining = float(values[len(values) - k - 1].clamp_min(0)) if k < len(values) else 0.0
    return left, right, remaining


@dataclass(frozen=True, eq=False)
class Fit:
    """One fit: its rows, their statistics, and what they ask for."""

    config: RlaceConfig
    settings: GameSettings
    rows: Rows
    held_out: Rows | None
    space: Space | None

    @classmethod
    def of(
        cls,
        config: RlaceConfig,
        x: object,
        z: object,
        *,
        z_kind: LabelKind,
        mask: Tensor | None = None,
        held_out: HeldOut | None = None,
    ) -> Fit:
        data, labels, space = read_data(x, z, z_kind)
        if config.k is not None and config.k > data.shape[-1]:
            raise ValueError(f"k is {config.k}, but x has only {data.shape[-1]} dimensions")
        groups = x.rows if isinstance(x, Representations) else None
        rows = Rows.of(data, labels, config.loss, mask, groups)
        other = None
        if held_out is not None:
            pair = (held_out.x, held_out.z) if isinstance(held_out, Representations) else held_out
            other_x, other_z, _ = read_data(*pair, z_kind, classes=labels.names or None)
            if other_x.shape[-1] != data.shape[-1] or other_z.width != labels.width:
                raise ShapeError(
                    f"held-out x has width {other_x.shape[-1]} and z {other_z.width} columns; "
                    f"the fit has {data.shape[-1]} and {labels.width}"
                )
            other = Rows.of(other_x, other_z, rows.loss, None, None)
        settings = PRESETS.get(config.preset or "", GameSettings())
        return cls(config, settings, rows, other, space)

    @cached_property
    def folds(self) -> Folds:
        return self.rows.folds()

    @cached_property
    def moments(self) -> Moments:
        """Moments of all rows, without the covariance of x."""
        first = self.folds.parts[0]
        whole = Moments(
            first.width,
            first.concepts,
            covariance=False,
            device=first.count.device,
            dtype=first.count.dtype,
        )
        for part in self.folds.parts:
            whole.merge(part)
        return whole

    @cached_property
    def guarding(self) -> Tensor:
        """Orthonormal basis of the cross-covariance's column space, shape ``(d, rank)``."""
        return self.guarding_of(self.moments)

    def guarding_of(self, moments: Moments) -> Tensor:
        concept = moments.sigma_xz @ concept_whitening(moments.sigma_zz)
        return erasing_factors(concept, concept, concept, rtol=self._rtol, relative=True)[0]

    @property
    def _rtol(self) -> float:
        dtype = self.moments.mean_x.dtype
        return max(len(self.rows.x), self.rows.x.shape[1]) * torch.finfo(dtype).eps

    @property
    def k(self) -> int:
        """Directions to remove."""
        return self.guarding.shape[1] if self.config.k is None else self.config.k

    @cached_property
    def solver(self) -> str:
        """How the fit is solved."""
        if self.rows.loss in QUOTIENTS:
            return "closed form"
        if self.guarding.shape[1] == 0:
            return "none"
        if self.config.solver == "fantope":
            return "fantope"
        return "closed form" if self.k >= self.guarding.shape[1] else "factored"

    @cached_property
    def penalty(self) -> float:
        """Weight of the predictor's squared norm, given or chosen."""
        if not isinstance(self.config.penalty, str):
            return self.config.penalty
        if self.solver != "factored" or not self.folds.ready:
            return USUAL_PENALTY
        return suited_penalty(self.rows, self.k)

    def covariance(self) -> Tensor:
        moments = Moments(self.rows.x.shape[1], self.rows.width, device=self.rows.x.device)
        return moments.update(self.rows.x, self.rows.encoded).sigma_xx

    def filled(self) -> Tensor:
        """Return the guarding directions and, if wanted, those of largest variance beside them."""
        guarding = self.guarding
        if self.config.fill == "none" or self.k <= guarding.shape[1]:
            return guarding
        kept = torch.eye(len(guarding)).to(guarding) - guarding @ guarding.T
        extra = torch.linalg.eigh(kept @ self.covariance() @ kept)[1].flip(-1)
        both = torch.cat([guarding, extra[:, : self.k - guarding.shape[1]]], 1)
        filled: Tensor = torch.linalg.qr(both)[0]
        return filled

    def closed_form(self) -> tuple[Tensor, Tensor, Report]:
        """Return the factors of the map and a report."""
        if self.rows.loss in QUOTIENTS:
            return self._rayleigh()
        left, report = self.filled(), Report(solver=self.solver, history=[])
        if self.solver == "closed form":
            loss = self.rows.loss
            ceiling = constant_loss(loss, self.moments.mean_z, self.moments.sigma_zz)
            report |= {"value": ceiling, "entropy": ceiling, "history": [ceiling]}
            report[_loss_name(loss)] = ceiling
        return left, left, report

    def _rayleigh(self) -> tuple[Tensor, Tensor, Report]:
        cross, k, loss = self.moments.sigma_xz, self.k, self.rows.loss
        if loss == "pca":
            if self.config.k is None:
                raise ValueError("loss='pca' needs k, the number of directions to remove")
            left, right, value = rayleigh_factors(self.covariance(), k)
        else:
            if loss == "pls":
                left, _, strengths = erasing_factors(
                    cross, cross, cross, rtol=self._rtol, rank=k, relative=True
                )
                right, strengths = left, strengths * torch.linalg.matrix_norm(cross, 2)
            else:
                concept = cross @ concept_whitening(self.moments.sigma_zz)
                metric = MetricSolver(self.covariance())
                left, right, strengths = erasing_factors(
                    concept, metric.whiten(concept), metric(concept), rtol=self._rtol, rank=k
                )
            value = float(strengths[k].square()) if k < len(strengths) else 0.0
        report = Report(solver="closed form", value=value, history=[])
        return left, right, report

    def refit(self) -> Fit | None:
        """Return the fit of three fifths of the rows whose game tells what the others still give away."""
        if self.solver != "factored" or self.held_out is not None or not self.folds.ready:
            return None
        rows = self.rows.take(self.rows.fold_numbers() >= 2)
        return replace(self, rows=rows, config=replace(self.config, starts=1, penalty=self.penalty))


def solve(fits: Sequence[Fit]) -> list[tuple[LowRankAffine, Report]]:
    """Return map and report of each fit; games of one shape are played together."""
    games = [fit for fit in fits if fit.solver == "factored"]
    refits = {id(fit): again for fit in games if (again := fit.refit()) is not None}
    played = dict(zip(map(id, games), _play(games), strict=True))
    replayed = dict(zip(refits, _play(list(refits.values()), ROUGH_TOLERANCE), strict=True))
    out = []
    for fit in fits:
        if id(fit) in played:
            left, report = played[id(fit)]
            right = left
        elif fit.solver == "fantope":
            left, report = _fantope(fit)
            right = left
        else:
            left, right, report = fit.closed_form()
        map_ = LowRankAffine(left, right, fit.moments.mean_x.clone())
        report |= {"n": len(fit.rows.x), "rank": map_.rank, "loss": fit.rows.loss}
        report["full_rank"] = fit.guarding.shape[1]
        report["residual"] = remaining_gap(map_, fit.moments.sigma_xz)
        report["edit_size"] = relative_edit(map_, fit.rows.x, fit.moments.mean_x)
        if fit.guarding.shape[1]:
            report |= _leakage(fit, map_, replayed.get(id(fit)))
        out.append((map_, report))
    return out


def _play(fits: Sequence[Fit], tolerance: float = TOLERANCE) -> list[tuple[Tensor, Report]]:
    """Return directions ``(d, k)`` and report of each fit by the factored solver; it stops at ``tolerance``."""
    frames = [Frame.of(fit.rows) for fit in fits]
    games = [frame.game(fit.rows, fit.penalty) for frame, fit in zip(frames, fits, strict=True)]
    shapes = [
        (game.rows.shape, game.z.shape, fit.k, fit.penalty)
        for game, fit in zip(games, fits, strict=True)
    ]
    out: dict[int, tuple[Tensor, Report]] = {}
    for shape in dict.fromkeys(shapes):
        places = [i for i, other in enumerate(shapes) if other == shape]
        rows, z = (
            torch.stack([getattr(games[i], name) for i in places]) if len(places) > 1
            else getattr(games[places[0]], name)[None]
            for name in ("rows", "z")
        )  # fmt: skip
        game = replace(games[places[0]], rows=rows, z=z)
        begin = top_directions(game.pull(game.z)[..., :-1, :], fits[places[0]].k)
        config = fits[places[0]].config
        scouts = max(2, config.starts - 1) if config.starts > 1 else 0
        solution = solve_factored(game, begin, scouts=scouts, seed=config.seed, tolerance=tolerance)
        for turn, i in enumerate(places):
            out[i] = _told(frames[i], game, solution, turn)
    return [out[i] for i in range(len(fits))]


def _told(frame: Frame, game: Game, solution: Solution, turn: int) -> tuple[Tensor, Report]:
    """Return directions of x and the report, in the units of z, of one game of several."""
    steps = [float(value[turn]) for value in solution.history]
    rises = [b for a, b in zip([-math.inf, *steps], steps, strict=False) if b > a]
    response = solution.response
    value, loss, ceiling = (
        float(one[turn]) * frame.unit for one in (response.value, response.loss, game.ceiling)
    )
    report = Report(solver="factored", history=[rise * frame.unit for rise in rises])
    report |= {"value": value, _loss_name(game.loss): loss, "entropy": ceiling}
    report["penalty"] = game.penalty
    return torch.linalg.qr(frame.lift(solution.v[turn]))[0], report


def _fantope(fit: Fit) -> tuple[Tensor, Report]:
    """Return directions ``(d, k)`` and report of the published game."""
    config, frame = fit.config, Frame.of(fit.rows)
    game = frame.game(fit.rows, fit.penalty)
    dev = None
    if fit.held_out is not None:
        dev = frame.game(fit.held_out.take(slice(0, None, 2)), fit.penalty)
    k = min(fit.k, game.x.shape[1])
    found = solve_relaxed(game, k, fit.settings, seed=config.seed, dev=dev)
    before = Game.of(game.x - game.x @ found.q, game.z.T, game.loss, game.penalty)
    relaxed = float(best_response(before, game.x.new_zeros(game.x.shape[1], 0)).value)
    answer, unit = best_response(game, found.v), frame.unit
    v = torch.linalg.qr(frame.lift(found.v))[0]
    return v, {
        "solver": "fantope",
        "history": [value * unit for value in found.history],
        "value_before_rounding": relaxed * unit,
        "rounding_loss": (relaxed - float(answer.value)) * unit,
        "eigenvalue_gap": found.gap,
        "step": found.step,
        "penalty": game.penalty,
        "value": float(answer.value) * unit,
        _loss_name(game.loss): float(answer.loss) * unit,
        "entropy": float(game.ceiling) * unit,
        "closed_form_cosine": float(torch.linalg.svdvals(fit.guarding.T @ v).min()),
    }


def _leakage(fit: Fit, map_: LowRankAffine, again: tuple[Tensor, Report] | None) -> Report:
    """Return what is left on rows the map has not seen.

    Args:
        fit: The fit.
        map_: Its map.
        again: The game of three fifths of its rows, if it was played.
    """
    whitening = concept_whitening(fit.moments.sigma_zz)
    if fit.held_out is not None:
        rows = fit.held_out.take(slice(1, None, 2)) if fit.solver == "fantope" else fit.held_out
        other = rows.folds()
        if not other.ready:
            raise ValueError(f"held-out data need at least 20 rows; got {other.rows}")
        out = held_out_gap([map_] * FOLDS, other.pairs, torch.Tensor.clone, whitening)
        if fit.solver != "closed form":
            even = rows.fold_numbers() % 2 == 0
            out |= _fresh_probe(rows, map_, (even, ~even), fit.penalty)
        return out
    if again is not None:
        fold = fit.rows.fold_numbers()
        refit = LowRankAffine(again[0], again[0], fit.folds.rests[0].mean_x)
        return _fresh_probe(fit.rows, refit, (fold == 0, fold == 1), fit.penalty)
    pls = fit.rows.loss not in ("pca", "cca")
    if fit.solver != "closed form" or not pls or not fit.folds.ready:
        return {}  # playing the alternating game again, or more covariances, is the caller's choice
    lefts = [fit.guarding_of(rest) for rest in fit.folds.rests]
    if fit.rows.loss == "pls":
        lefts = [top_directions(rest.sigma_xz, fit.k) for rest in fit.folds.rests]
    maps = [LowRankAffine(left, left) for left in lefts]
    return held_out_gap(maps, fit.folds.pairs, torch.Tensor.clone, whitening)


def _fresh_probe(
    rows: Rows, map_: LowRankAffine, parts: tuple[Tensor, Tensor], penalty: float
) -> Report:
    """Train a probe on one part of the erased rows, test on the other, and the reverse; return its mean loss."""
    losses: list[Tensor] = []
    constants: list[Tensor] = []
    if not all(bool(part.any()) for part in parts):
        return {}
    erased = replace(rows, x=map_(rows.x.to(map_.left.dtype)))
    for train, test in (parts, parts[::-1]):
        frame = Frame.of(erased.take(train))
        game, judge = (frame.game(erased.take(part), penalty) for part in (train, test))
        answer = best_response(game, game.x[:0].T)
        for scores, out in (
            (judge.scores(answer.weights), losses),
            (game.constant[:, None].expand_as(judge.z), constants),
        ):
            out.append(row_losses(judge.loss, scores, judge.z) * frame.unit)
    loss, constant = torch.cat(losses), torch.cat(constants)
    half = Z_975 * float(loss.std()) / math.sqrt(len(loss))
    mean = float(loss.mean())
    return {
        "held_out_loss": mean,
        "held_out_loss_interval": [mean - half, mean + half],
        "held_out_entropy": float(constant.mean()),
    }


def certified(fit: Fit, map_: LowRankAffine) -> Report:
    found = certificate(fit.rows, map_, fit.penalty)
    worst = max(value for name, value in found.items() if name != "oracle_value")
    if not worst <= CERTIFIED:
        warnings.warn(
            f"cvxpy's solutions differ from ours by {worst:.1e}, more than {CERTIFIED:g}; see the "
            "report's certificate_*: is the covariance singular?",
            ErasureWarning,
            stacklevel=3,
        )
    return dict(found)


def _loss_name(loss: str) -> str:
    return "error" if loss == "squared" else "log_loss"
