"""INLP: fit a linear classifier, project its directions out, and again: a baseline.

Ravfogel et al. 2020, "Null It Out" (arXiv:2004.07667). Guarding is approached, not promised, and far more is
removed than one closed-form direction a contrast (LEACE, SAL) removes; non-linear probes are not addressed.

Every round fits a (multinomial) logistic regression by L-BFGS, full batch, on the device of the data; its weights
are orthogonalised against all earlier directions by QR. The published code multiplies projections, whose
classifiers are orthogonal only to rounding. A warm start from the last weights, projected, is zero, because the
last round removed just them; every round therefore starts at the class shares.

Deviations: logistic regression to a tolerance instead of SGD or a linear SVM; the stop rule is the log-loss, not
the accuracy (under class imbalance the majority rate is reached by a barely changed matrix); the map is affine;
``dropout`` draws one mask a round. ``preset="paper"``: 20 rounds, no stop, the L2 weight 1e-5 of the word-vector
runs on the data as they are, and no mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import read_data, read_labels
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.labels import Labels
from concept_erasure.leakage import FOLDS, Folds, held_out_gap, remaining_gap
from concept_erasure.linalg import LowRankAffine, Moments, statistics_dtype
from concept_erasure.logistic import class_entropy, fit_logistic
from concept_erasure.spectral import check_k, concept_scale, relative_edit

__all__ = ["InlpConfig", "InlpEraser"]

NEW_DIRECTION = 1e-6  # relative norm below which a direction lies in what was removed before
FITTED_SHARE = 3  # of FOLDS: rows on which the fit is repeated to measure on the others


@dataclass(frozen=True, kw_only=True)
class InlpConfig(EraserConfig):
    """Options of the fit, see `InlpEraser.fit`."""

    n_classifiers: int = 20
    k: int | None = None
    tolerance: float | None = 1e-4
    min_accuracy: float | str = 0.0
    dropout: float = 0.0
    penalty: float = 1e-3
    affine: bool = True
    seed: int = 0
    preset: str | None = None

    def __post_init__(self) -> None:
        check_k(self.k)
        if type(self.n_classifiers) is not int or self.n_classifiers < 1:
            raise ValueError(
                f"n_classifiers must be a whole number from 1; got {self.n_classifiers!r}"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0, or None; got {self.tolerance!r}")
        rate = 0.0 if self.min_accuracy == "majority" else self.min_accuracy
        if isinstance(rate, str) or not 0 <= rate <= 1:
            raise ValueError(f"min_accuracy must be in [0, 1] or 'majority'; got {rate!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout!r}")
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"penalty must be positive and finite; got {self.penalty!r}")
        if self.preset not in (None, "paper"):
            raise ValueError(f"preset must be 'paper' or None; got {self.preset!r}")


@dataclass(frozen=True, repr=False, eq=False)
class InlpEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``, an orthogonal projection.

    Attributes:
        proj_left: Orthonormal directions in the order of the rounds, shape ``(d, k)``.
        proj_right: The same, shape ``(k, d)``.
        bias: Mean of the fit data, shape ``(d,)``; None without ``affine``.
    """

    method: ClassVar[str] = "inlp"
    config_type: ClassVar[type[EraserConfig]] = InlpConfig

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        n_classifiers: int = 20,
        k: int | None = None,
        tolerance: float | None = 1e-4,
        min_accuracy: float | Literal["majority"] = 0.0,
        by_class: object = None,
        dropout: float = 0.0,
        penalty: float = 1e-3,
        affine: bool = True,
        seed: int = 0,
        preset: Literal["paper"] | None = None,
        mask: Tensor | None = None,
        held_out: tuple[object, object] | Representations | None = None,
    ) -> InlpEraser:
        """Fit on representations ``x`` ``(..., d)`` and class labels ``z``.

        The report lists, for each round, the log-loss and accuracy of its classifier before its directions are
        removed, and of one more fresh classifier after the last (``log_loss_after``, ``accuracy_after``); with
        ``entropy`` H(Z), ``majority``, ``rank``, ``edit_size``, ``residual`` and what is left on rows not fitted on.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Class labels, one a row, or one-hot columns.
            n_classifiers: Most rounds. Each removes one direction for two classes, up to C - 1 for C.
            k: Remove at most this many directions; the last round gives its strongest.
            tolerance: Stop when a classifier's log-loss is at least H(Z) less this, in nats; None: never.
            min_accuracy: Stop when a classifier's accuracy is below this, or not above the largest class
                (``"majority"``). Both rules look at ``held_out`` rows if there are any.
            by_class: Task labels, one a row: each round fits within one task class, drawn by ``seed``, and a
                round in which a stop rule holds is skipped instead.
            dropout: Share of entries set to zero while fitting; one mask a round.
            penalty: L2 weight of the classifiers, for data scaled to unit mean variance.
            affine: Keep the mean of the data.
            seed: Of the draws.
            preset: ``"paper"``: the published settings; overrides n_classifiers, tolerance, min_accuracy, penalty
                (then in the units of the data) and affine.
            mask: Rows of x to use, shape ``x.shape[:-1]``.
            held_out: ``(x, z)`` never fitted on. Default: the report repeats the fit on three fifths of the rows and
                measures on the others.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, labels that are no classes, or options
                out of range.
            ShapeError: If x and z disagree.

        Warns:
            ErasureWarning: If there is one class only; the eraser is then the identity.
        """
        config = InlpConfig(
            n_classifiers=n_classifiers,
            k=k,
            tolerance=tolerance,
            min_accuracy=min_accuracy,
            dropout=dropout,
            penalty=penalty,
            affine=affine,
            seed=seed,
        )
        if preset is not None:
            config = _preset(preset, config)
        data, labels, space = read_data(x, z)
        tasks = (
            None if by_class is None else read_labels(by_class, data, "classes", name="by_class")
        )
        rows = data.reshape(-1, data.shape[-1])
        groups = x.rows if isinstance(x, Representations) else None
        sample = _Sample.of(rows, labels, tasks, groups, mask)
        other = None
        if held_out is not None:
            pair = (held_out.x, held_out.z) if isinstance(held_out, Representations) else held_out
            other = _held_out(pair, labels, rows.shape[1])
        basis, center, report = _fit(sample, config, other)
        if report["rank"] == 0:
            warnings.warn(
                f"no direction was removed (stopped: {report['stopped']}; is the label constant?): the eraser is "
                "the identity",
                ErasureWarning,
                stacklevel=2,
            )
        return cls(basis, basis.T.contiguous(), center, config=config, space=space, report=report)


@dataclass(frozen=True)
class _Sample:
    """Rows ``(n, d)`` in the dtype of statistics, class indices ``(n,)``, and their classes."""

    x: Tensor
    z: Tensor
    names: tuple[str, ...]
    tasks: Tensor | None = None
    groups: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        labels: Labels,
        tasks: Labels | None = None,
        groups: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> _Sample:
        wide = x.detach().to(statistics_dtype(x.device))
        z, names = _class_ids(labels)
        if mask is not None and mask.numel() != len(x):
            raise ShapeError(f"mask must have {len(x)} entries; got shape {tuple(mask.shape)}")
        out = cls(
            wide,
            z.to(x.device),
            names,
            None if tasks is None else tasks.values.to(x.device),
            None if groups is None else groups.reshape(-1).to(x.device),
        )
        out = out if mask is None else out.rows(mask.reshape(-1).to(x.device, torch.bool))
        if len(out.x) < 2:
            raise ValueError(f"at least 2 rows are needed to fit; the mask leaves {len(out.x)}")
        return out

    def rows(self, keep: Tensor) -> _Sample:
        extra = (None if v is None else v[keep] for v in (self.tasks, self.groups))
        return _Sample(self.x[keep], self.z[keep], self.names, *extra)

    @property
    def classes(self) -> int:
        return len(self.names)


def _class_ids(labels: Labels) -> tuple[Tensor, tuple[str, ...]]:
    """Return class indices ``(n,)`` and class names."""
    values = labels.values
    if values.ndim == 1:
        return values, labels.names
    binary = bool(((values == 0) | (values == 1)).all())
    if binary and values.shape[1] == 1:
        return values[:, 0].long(), ("0", "1")
    if binary and bool((values.sum(1) == 1).all()):
        return values.argmax(1), tuple(str(i) for i in range(values.shape[1]))
    raise ValueError(
        "INLP needs one class a row (labels, or one-hot columns); for real targets or several concepts at once use "
        "SalEraser or LeaceEraser"
    )


def _preset(preset: str, config: InlpConfig) -> InlpConfig:
    return InlpConfig(
        n_classifiers=20,
        k=config.k,
        tolerance=None,
        min_accuracy=0.0,
        dropout=config.dropout,
        penalty=1e-5,
        affine=False,
        seed=config.seed,
        preset=preset,
    )


def _held_out(pair: tuple[object, object], labels: Labels, width: int) -> _Sample:
    data, own, _ = read_data(*pair, classes=labels.names or None)
    if data.shape[-1] != width or own.width != labels.width:
        raise ShapeError(
            f"held-out x has width {data.shape[-1]} and z {own.width} columns; the fit has {width} and {labels.width}"
        )
    return _Sample.of(data.reshape(-1, width), own)


def _fit(
    sample: _Sample, config: InlpConfig, held_out: _Sample | None
) -> tuple[Tensor, Tensor | None, dict[str, object]]:
    """Return the basis ``(d, k)``, the centre and the report.

    Raises:
        ValueError: If x is not finite.
    """
    moments = Moments(sample.x.shape[1], sample.classes, covariance=False, device=sample.x.device)
    moments.update(sample.x, sample.z)
    mean = moments.mean_x
    rounds = _Rounds.run(sample, mean, config, held_out)
    map_ = LowRankAffine(rounds.basis, rounds.basis, mean.clone() if config.affine else None)
    counts = torch.bincount(sample.z, minlength=sample.classes).tolist()
    report: dict[str, object] = {
        "n": len(sample.x),
        "rank": map_.rank,
        "rounds": len(rounds.log_loss),
        "stopped": rounds.stopped,
        "log_loss": rounds.log_loss,
        "accuracy": rounds.accuracy,
        "log_loss_after": rounds.after[0],
        "accuracy_after": rounds.after[1],
        "entropy": class_entropy(sample.z, sample.classes),
        "majority": max(counts) / len(sample.x),
        "residual": remaining_gap(map_, moments.sigma_xz),
        "edit_size": relative_edit(map_, sample.x, mean),
        "n_per_class": dict(zip(sample.names, counts, strict=True)),
    }
    if map_.rank:
        report.update(_leakage(sample, config, held_out, rounds, moments))
    return rounds.basis, map_.center, report


def _leakage(
    sample: _Sample,
    config: InlpConfig,
    held_out: _Sample | None,
    rounds: _Rounds,
    moments: Moments,
) -> dict[str, object]:
    """Measure on rows the map has not seen: those held out, or two fifths on which the fit is repeated without."""
    basis = rounds.basis
    if held_out is None:
        turn = torch.arange(len(sample.x), device=sample.x.device)
        turn = (turn if sample.groups is None else sample.groups) % FOLDS
        part, held_out = sample.rows(turn < FITTED_SHARE), sample.rows(turn >= FITTED_SHARE)
        if len(held_out.x) < 4 * FOLDS or len(part.z.unique()) < 2:
            return {}
        rounds = _Rounds.run(part, part.x.mean(0), config, held_out)
        basis = rounds.basis
    folds = Folds(moments.width, moments.concepts, device=sample.x.device)
    folds.update(held_out.x.to(sample.x.device), held_out.z.to(sample.x.device))
    if not folds.ready:
        return {}
    maps = [LowRankAffine(basis, basis)] * FOLDS
    scale = torch.diag(concept_scale(moments))
    return {
        "held_out_log_loss_after": rounds.held_out_after[0],
        "held_out_accuracy_after": rounds.held_out_after[1],
        **held_out_gap(maps, folds.pairs, torch.Tensor.clone, scale),
    }


@dataclass
class _Rounds:
    """The directions removed, and what each round's classifier could read."""

    basis: Tensor
    log_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    stopped: str = "n_classifiers"
    after: tuple[float, float] = (math.nan, math.nan)
    held_out_after: tuple[float, float] = (math.nan, math.nan)

    @classmethod
    def run(
        cls, sample: _Sample, mean: Tensor, config: InlpConfig, held_out: _Sample | None
    ) -> _Rounds:
        """Fit on ``sample``; its x is centred at ``mean`` ``(d,)`` first."""
        space = _Space.of(sample.x, mean, config)
        other = None
        if held_out is not None:
            there = space.coordinates(held_out.x.to(mean.device, mean.dtype), mean)
            other = (there, held_out.z.to(mean.device))
        out = cls(space.u.new_zeros(space.u.shape[1], 0))
        limit = min(space.u.shape[1], config.k or space.u.shape[1])
        if len(sample.z.unique()) < 2:
            out.stopped = "one class"
            limit = 0
        for x, z in _draws(sample, space.u, config) if limit else ():
            new, why = out._step(space, x, z, other, config)
            if why is not None and sample.tasks is None:
                out.stopped = why
                break
            if why is None:
                out._add(new[:, : limit - out.basis.shape[1]])
            if out.basis.shape[1] >= limit:
                out.stopped = "k" if limit == config.k else "width"
                break
        out._finish(space, sample.z, other)
        out.basis = space.original(out.basis)
        return out

    def _step(
        self,
        space: _Space,
        x: Tensor,
        z: Tensor,
        other: tuple[Tensor, Tensor] | None,
        config: InlpConfig,
    ) -> tuple[Tensor, str | None]:
        """Fit one classifier; return its new directions ``(r, q)`` and the stop rule that holds, if any."""
        present, z = z.unique(return_inverse=True)
        fit = fit_logistic(
            self._erase(x),
            z,
            len(present),
            penalty=space.penalty,
            covariance=space.remaining(self.basis),
        )
        seen = fit.measure(self._erase(x), z)
        self.log_loss.append(seen[0])
        self.accuracy.append(seen[1])
        share = int(torch.bincount(z).max()) / len(z)
        entropy = class_entropy(z, len(present))
        if other is not None:
            keep = torch.isin(other[1], present)
            there = torch.searchsorted(present, other[1][keep])
            if len(there):
                seen = fit.measure(self._erase(other[0][keep]), there)
                entropy = _constant_loss(z, there, len(present))
        weights = self._erase(fit.coef).T
        why = None
        if config.tolerance is not None and seen[0] >= entropy - config.tolerance:
            why = "log-loss"
        elif _too_low(seen[1], config.min_accuracy, share):
            why = "accuracy"
        elif not bool(weights.any()):
            why = "nothing left"
        left, strength, _ = torch.linalg.svd(weights, full_matrices=False)
        return left[:, strength > NEW_DIRECTION * strength[:1].sum()], why

    def _erase(self, x: Tensor) -> Tensor:
        return x - (x @ self.basis) @ self.basis.T

    def _add(self, new: Tensor) -> None:
        """Orthogonalise against all earlier directions, twice for rounding."""
        for _ in range(2):
            new = torch.linalg.qr(new - self.basis @ (self.basis.T @ new)).Q
        self.basis = torch.cat([self.basis, new], 1)

    def _finish(self, space: _Space, z: Tensor, other: tuple[Tensor, Tensor] | None) -> None:
        """Fit a fresh classifier on what is left of all rows."""
        present, ids = z.unique(return_inverse=True)
        if len(present) < 2:
            self.after = (0.0, 1.0)
            return
        left = self._erase(space.u)
        fit = fit_logistic(
            left, ids, len(present), penalty=space.penalty, covariance=space.remaining(self.basis)
        )
        self.after = fit.measure(left, ids)
        if other is not None:
            keep = torch.isin(other[1], present)
            there = torch.searchsorted(present, other[1][keep])
            self.held_out_after = fit.measure(self._erase(other[0][keep]), there)


@dataclass(frozen=True)
class _Space:
    """Centred rows in coordinates of their own span, scaled to unit mean variance.

    Attributes:
        u: Shape ``(n, r)`` with ``r = min(n, d)``.
        span: Orthonormal ``(d, r)``; None is the identity.
        scale: What the centred rows were divided by.
        covariance: Of u, shape ``(r, r)``.
        penalty: L2 weight for u.
    """

    u: Tensor
    span: Tensor | None
    scale: float
    covariance: Tensor
    penalty: float

    @classmethod
    def of(cls, x: Tensor, mean: Tensor, config: InlpConfig) -> _Space:
        centred = x - mean
        scale = float(centred.square().mean().sqrt()) or 1.0
        span = None
        if len(x) < x.shape[1]:
            span = torch.linalg.svd(centred, full_matrices=False)[2].T
            centred = centred @ span
        u = centred / scale
        # coefficients on u are `scale` times those on x
        penalty = config.penalty / scale**2 if config.preset else config.penalty
        return cls(u, span, scale, u.T @ u / len(u), penalty)

    def coordinates(self, x: Tensor, mean: Tensor) -> Tensor:
        """Return other rows ``(m, d)`` as ``(m, r)``; what lies outside the span was never seen by a classifier."""
        centred = x - mean
        return (centred if self.span is None else centred @ self.span) / self.scale

    def original(self, basis: Tensor) -> Tensor:
        """Return directions ``(r, k)`` as ``(d, k)``."""
        return (basis if self.span is None else self.span @ basis).contiguous()

    def remaining(self, basis: Tensor) -> Tensor:
        """Return the covariance without some directions."""
        half = self.covariance - basis @ (basis.T @ self.covariance)
        both = half - (half @ basis) @ basis.T
        return (both + both.T) / 2


def _draws(sample: _Sample, u: Tensor, config: InlpConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each round's rows and class indices: all, or those of one task class; with dropout."""
    generator = torch.Generator().manual_seed(config.seed)
    usable: list[Tensor] = []
    if sample.tasks is not None:
        groups = [sample.tasks == task for task in sample.tasks.unique()]
        usable = [rows for rows in groups if len(sample.z[rows].unique()) > 1]
        if not usable:
            raise ValueError("by_class: no task class holds two classes of z")
    for _ in range(config.n_classifiers):
        x, z = u, sample.z
        if usable:
            chosen = usable[int(torch.randint(len(usable), (), generator=generator))]
            x, z = u[chosen], z[chosen]
        if config.dropout:
            kept = torch.rand(x.shape, generator=generator) >= config.dropout
            x = x * kept.to(x.device) / (1 - config.dropout)
        yield x, z


def _too_low(accuracy: float, lowest: float | str, majority: float) -> bool:
    return accuracy <= majority if isinstance(lowest, str) else accuracy < lowest


def _constant_loss(z: Tensor, there: Tensor, classes: int) -> float:
    """Return the log-loss on some labels of the shares of the classes in others."""
    share = torch.bincount(z, minlength=classes).to(torch.float32) / len(z)
    return float(-share.log()[there].mean())
