"""R-LACE: the orthogonal projection of a given rank that leaves an adversarial linear predictor the most in the dark.

Ravfogel, Twiton, Goldberg and Cotterell 2022 (arXiv:2201.12091). Closed form first: from the rank of the
cross-covariance on (one direction for two classes), removing its column space is the exact solution, because no
loss can exceed the constant predictor's. Below that rank a factored solver plays the game, see `games`.

Deviations from the published algorithm (``solver="fantope"`` plays it): exact projection onto the Fantope on the
device of the data; data centred and at unit mean variance, so that learning rates do not depend on the scale of the
features; selection and stopping on a converged probe's log-loss, on rows given for it, with score and matrix of
one iterate; seeded; regression and multi-label games. Rayleigh quotients are solved in closed form. All rows are used
in every step of the factored solver: memory O(n d).

Below full rank the concept stays readable in part; from full rank on (the default) no affine predictor of z is left on
the data of the fit. Nothing is promised about non-linear probes, or about a second classifier stacked on a softmax
trained on the output.

Report: ``solver``, ``rank`` (what is removed; at most that of the cross-covariance, unless ``fill`` is set),
``full_rank`` (what guarding takes), ``value`` (best response's loss and penalty), ``log_loss`` or ``error`` (the loss
alone), ``entropy`` (the constant predictor's loss), ``penalty`` (of the game, if one was played), ``history``,
``residual``, ``edit_size``, ``held_out_gap`` with its interval (closed forms, cross-fitted as for LEACE, or with
``held_out``). Below full rank ``held_out_loss``: the loss of a fresh probe on rows that neither it nor the eraser has
seen, with its interval, beside ``held_out_entropy``, that of the constant; without ``held_out`` the game is played
once more, from one start, on three fifths of the rows for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

from torch import Tensor

from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning
from concept_erasure.labels import LabelKind
from concept_erasure.linalg import LowRankAffine
from concept_erasure.linear._rlace_data import QUOTIENTS
from concept_erasure.linear._rlace_fit import (
    Fit,
    HeldOut,
    Report,
    certified,
    rayleigh_factors,
    solve,
)
from concept_erasure.linear.alternating import PRESETS, GameSettings
from concept_erasure.spectral import check_k

__all__ = ["RlaceConfig", "RlaceEraser", "RlaceLoss", "rayleigh_factors"]

RlaceLoss = Literal[
    "auto", "cross_entropy", "logistic", "multilabel", "squared", "pls", "pca", "cca"
]
Solver = Literal["auto", "factored", "fantope"]
Preset = Literal["paper", "words", "biographies", "demo"]
Fill = Literal["none", "variance"]


@dataclass(frozen=True, kw_only=True)
class RlaceConfig(EraserConfig):
    """Options of the fit, see `RlaceEraser.fit`."""

    k: int | None = None
    solver: str = "auto"
    loss: str = "auto"
    preset: str | None = None
    penalty: float | str = "auto"
    starts: int = 8
    seed: int = 0
    fill: str = "none"

    def __post_init__(self) -> None:
        check_k(self.k)
        if type(self.starts) is not int or self.starts < 1:
            raise ValueError(f"starts must be a whole number from 1; got {self.starts!r}")
        _one_of("solver", self.solver, get_args(Solver))
        _one_of("loss", self.loss, get_args(RlaceLoss))
        _one_of("preset", self.preset, (None, "custom", *PRESETS))
        _one_of("fill", self.fill, get_args(Fill))
        given = self.penalty
        if given != "auto" and not (isinstance(given, float | int) and 0 < given < math.inf):
            raise ValueError(f"penalty must be positive and finite, or 'auto'; got {given!r}")
        if self.preset is not None and self.solver != "fantope":
            raise ValueError(
                f"preset={self.preset!r} holds constants of solver='fantope'; got solver={self.solver!r}"
            )
        if self.loss in QUOTIENTS and self.solver != "auto":
            raise ValueError(
                f"loss={self.loss!r} has a closed form, so solver must be 'auto'; got {self.solver!r}"
            )


@dataclass(frozen=True, repr=False, eq=False)
class RlaceEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``.

    Attributes:
        proj_left: Orthonormal columns, shape ``(d, rank)`` (oblique only for ``loss="cca"``).
        proj_right: Their transpose, shape ``(rank, d)``.
        bias: Mean of the fit data, shape ``(d,)``.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> z = x[:, 0] > 0
        >>> eraser = RlaceEraser.fit(x, z)
        >>> eraser.report["solver"], eraser.report["rank"]
        ('closed form', 1)
    """

    method: ClassVar[str] = "rlace"
    config_type: ClassVar[type[EraserConfig]] = RlaceConfig

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        k: int | None = None,
        solver: Solver = "auto",
        loss: RlaceLoss = "auto",
        preset: Preset | GameSettings | None = None,
        penalty: float | Literal["auto"] = "auto",
        starts: int = 8,
        seed: int = 0,
        fill: Fill = "none",
        certify: bool = False,
        z_kind: LabelKind = "auto",
        mask: Tensor | None = None,
        held_out: HeldOut | None = None,
    ) -> RlaceEraser:
        """Fit on representations ``x`` ``(..., d)`` and labels ``z``.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Labels as for `LeaceEraser.fit`.
            k: Directions to remove; default the rank of the cross-covariance, which guards. From that rank on the
                closed form is the solution, and no more than the rank is removed.
            solver: ``"auto"`` and ``"factored"``: the closed form where there is one, else the factored solver.
                ``"fantope"``: always the published alternating game.
            loss: The predictor's loss. ``"auto"``: ``"logistic"`` for two classes or one 0/1 column,
                ``"cross_entropy"`` for more classes and rows that are shares, ``"multilabel"`` (a sigmoid a column)
                for 0/1 columns, else ``"squared"``. Rayleigh quotients, always in closed form: ``"pls"`` (covariance
                with z), ``"pca"`` (variance; needs k), ``"cca"`` (correlation with z; an oblique map, at full rank
                that of LEACE).
            preset: Constants of the alternating game: published ones by name (``"paper"``: the released solver's
                defaults; ``"words"``, ``"biographies"``, ``"demo"``: its experiments'), or your own; default 3000
                steps at ten times the published learning rate.
            penalty: Weight of the predictor's squared norm, with x at unit mean variance. The concept is hidden from
                predictors with this penalty; a smaller one fits the rows closer and, where these are few, has noise
                hidden instead. ``"auto"``: the one of 0.0001, 0.001, 0.01, 0.1 with which a predictor reads most of
                two held-out fifths of the rows once the k strongest directions are gone; 0.001 for
                ``solver="fantope"`` and below 20 rows.
            starts: Starts of the factored solver, the best is kept: the first from the cross-covariance, the others
                random directions of its span, tried on a sample of rows.
            seed: Seed of random starts and minibatches.
            fill: What to remove beyond the rank when k is larger: ``"none"``, or the directions of largest
                ``"variance"``.
            certify: Also solve by cvxpy (extra ``certify``), for small problems; the differences are reported.
            z_kind: ``"classes"`` or ``"continuous"`` overrides the reading of one-dimensional z.
            mask: Rows of x to use, shape ``x.shape[:-1]``.
            held_out: ``(x, z)`` never fitted on, for the report. ``solver="fantope"`` selects on every other row of
                them, and the report uses the rest.

        Raises:
            ImportError: If ``certify`` is set and cvxpy is not installed.
            ShapeError: If x and z disagree.
            ValueError: If options are out of range, the labels do not suit the loss, values are not finite, or
                there are fewer than two rows.

        Warns:
            ErasureWarning: If z is not correlated with x; the eraser is then the identity. If cvxpy disagrees.
        """
        config = RlaceConfig(
            k=k,
            solver=solver,
            loss=loss,
            preset="custom" if isinstance(preset, GameSettings) else preset,
            penalty=penalty,
            starts=starts,
            seed=seed,
            fill=fill,
        )
        fit = Fit.of(config, x, z, z_kind=z_kind, mask=mask, held_out=held_out)
        if isinstance(preset, GameSettings):
            fit = replace(fit, settings=preset)
        map_, report = solve([fit])[0]
        if certify:
            report |= certified(fit, map_)
        return cls._of(fit, map_, report)

    @classmethod
    def fit_layers(
        cls,
        layers: Mapping[str, object],
        z: object = None,
        *,
        k: int | None = None,
        loss: RlaceLoss = "auto",
        penalty: float | Literal["auto"] = "auto",
        starts: int = 8,
        seed: int = 0,
        z_kind: LabelKind = "auto",
    ) -> dict[str, RlaceEraser]:
        """Fit one eraser a layer, playing the games of layers of one shape side by side.

        What comes out is what `fit` gives for each layer, but for rounding. Memory is that of all layers together.

        Args:
            layers: For each name what `fit` takes as ``x``.
            z: Labels of the rows of every layer.
            k: See `fit`, as for all other options.
            loss: See `fit`.
            penalty: See `fit`.
            starts: See `fit`.
            seed: See `fit`.
            z_kind: See `fit`.

        Raises:
            ShapeError: If x and z disagree.
            ValueError: As for `fit`.

        Warns:
            ErasureWarning: If z is not correlated with a layer.
        """
        config = RlaceConfig(k=k, loss=loss, penalty=penalty, starts=starts, seed=seed)
        fits = [Fit.of(config, x, z, z_kind=z_kind) for x in layers.values()]
        solved = zip(layers, fits, solve(fits), strict=True)
        return {name: cls._of(fit, map_, report) for name, fit, (map_, report) in solved}

    @classmethod
    def _of(cls, fit: Fit, map_: LowRankAffine, report: Report) -> RlaceEraser:
        if map_.rank == 0:
            warnings.warn(
                "no direction is correlated with z (is the label constant?): the eraser is the identity",
                ErasureWarning,
                stacklevel=3,
            )
        return cls(
            map_.left,
            map_.right.T.contiguous(),
            map_.center,
            config=fit.config,
            space=fit.space,
            report=cast("dict[str, float | int | str | list[object]]", report),
        )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
