"""One fit of FAMR on a classifier: which rows are used for what, the run, the readouts, the certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from concept_erasure.errors import ShapeError
from concept_erasure.language._famr_classifier import (
    ClassifierOptimizer,
    Objective,
    Parameters,
    chosen_parameters,
    class_logits,
    dual_norm,
    fisher_diagonal,
    in_evaluation_mode,
    label_log_target,
    minimise,
    norm,
)
from concept_erasure.language._famr_readout import read_out
from concept_erasure.language.certificates import (
    Certificate,
    InfluenceLink,
    certify_outputs,
    lanczos_smallest,
    spectral_norm,
)

__all__ = [
    "AnchorMetric",
    "ClassTarget",
    "ClassifierFit",
    "Fitted",
    "Labelled",
    "Rows",
    "auto_rho",
    "thinned",
]

ClassTarget = Literal["uniform", "renormalised", "others", "given"]
AnchorMetric = Literal["euclidean", "fisher"]
Labelled = tuple[Tensor, Tensor]
RADIUS = 0.01  # of |th0|: how far `rho="auto"` lets the weights go, to first order
TRACE = 50
AT_TARGET = 1e-7  # nats; less is rounding in float32
FISHER_ROWS = 64  # gradients of single rows held at once


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs and labels by their use.

    Attributes:
        forget: What is forgotten.
        retain: What the retain term and the Fisher information see.
        held: Retain rows that the fit does not see.
        read: Forget rows for the readouts: those of the fit, unless others were given.
        classes: Forgotten classes, int64; None if single rows are.
    """

    forget: Labelled
    retain: Labelled
    held: Labelled
    read: Labelled
    classes: Tensor | None

    @classmethod
    def split(
        cls,
        x: Tensor,
        y: Tensor,
        forget_classes: int | Sequence[int] | None,
        mask: Tensor | None,
        held_out: float | Labelled,
        seed: int,
    ) -> Rows:
        """Return the rows by their use; arguments as of `FamrEraser.fit_classifier`.

        Raises:
            ShapeError: If lengths disagree.
            ValueError: If there is nothing to forget or nothing held out.
        """
        _check_rows(x, y)
        classes, forget = _forgotten(y, forget_classes, mask)
        if isinstance(held_out, tuple):
            _check_rows(*held_out)
            named = torch.zeros_like(held_out[1], dtype=torch.bool)
            if classes is not None:
                named = torch.isin(held_out[1], classes)
            kept, read = _pick(held_out, ~named), _pick(held_out, named)
            retain = _pick((x, y), ~forget)
        else:
            if not 0 < held_out < 1:
                raise ValueError(f"held_out must lie in (0, 1), or be other rows; got {held_out}")
            draw = torch.Generator().manual_seed(seed)
            others = (~forget).nonzero()[:, 0]
            order = others[torch.randperm(len(others), generator=draw).to(others.device)]
            count = math.ceil(held_out * len(order)) if len(order) else 0
            kept, retain = _pick((x, y), order[:count]), _pick((x, y), order[count:])
            read = kept[0][:0], kept[1][:0]
        if not len(kept[1]):
            raise ValueError(
                "no retain row is held out, so damage cannot be certified; give rows of what is to stay, or "
                "held_out=(x, y)"
            )
        own = _pick((x, y), forget)
        return cls(own, retain, kept, read if len(read[1]) else own, classes)

    @property
    def counts(self) -> dict[str, int | str]:
        """Numbers of rows, and which rows the readouts of what is forgotten are of."""
        return {
            "forget": len(self.forget[1]),
            "retain": len(self.retain[1]),
            "held_out": len(self.held[1]),
            "read_out_on": "fit rows" if self.read is self.forget else "held-out rows",
        }

    @property
    def concept(self) -> str:
        """What is forgotten, in words."""
        if self.classes is None:
            return f"{len(self.forget[1])} rows"
        return "class " + ", ".join(str(one) for one in self.classes.tolist())


def _check_rows(x: Tensor, y: Tensor) -> None:
    if y.ndim != 1 or len(x) != len(y):
        raise ShapeError(
            f"x (n, ...) and y (n,) disagree; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must hold class indices, int64; got {y.dtype}")


def _forgotten(
    y: Tensor, forget_classes: int | Sequence[int] | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    if (forget_classes is None) == (mask is None):
        raise ValueError("give forget_classes= or mask=, one of them: they say what is forgotten")
    if mask is not None:
        if mask.shape != y.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"mask must be bool {tuple(y.shape)}; got {mask.dtype} {tuple(mask.shape)}"
            )
        classes, forget = None, mask.to(y.device)
    else:
        wanted = [forget_classes] if isinstance(forget_classes, int) else list(forget_classes or ())
        classes = torch.tensor(sorted(set(wanted)), dtype=torch.int64, device=y.device)
        if absent := [c for c in classes.tolist() if not bool((y == c).any())]:
            raise ValueError(
                f"no row has the label {absent[0]}; labels are {y.unique().tolist()[:20]}"
            )
        forget = torch.isin(y, classes)
    if not bool(forget.any()):
        raise ValueError("there is nothing to forget: no row is marked")
    return classes, forget


def _pick(rows: Labelled, index: Tensor) -> Labelled:
    return rows[0][index.to(rows[0].device)], rows[1][index].long()


@dataclass(frozen=True, eq=False)
class Fitted:
    """What came out of a run.

    Attributes:
        weights: New values by the names of the parameters, in their own dtypes.
        rho: The strength that was used.
        classes: K.
        report: What was measured, the certificate among it.
    """

    weights: Parameters
    rho: float
    classes: int
    report: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class ClassifierFit:
    """Options of a run, see `FamrEraser.fit_classifier`."""

    target: ClassTarget
    rho: float | Literal["auto"]
    anchor: AnchorMetric
    retain_weight: float
    margin: float
    margin_weight: float
    parameters: tuple[str, ...]
    optimizer: ClassifierOptimizer
    steps: int
    learning_rate: float | None
    inside: bool
    tolerance: float
    lanczos_steps: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        allowed = {"target": ClassTarget, "anchor": AnchorMetric, "optimizer": ClassifierOptimizer}
        for name, kind in allowed.items():
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {names}; got {getattr(self, name)!r}")
        if self.rho != "auto" and not (
            isinstance(self.rho, int | float) and 0 < self.rho < math.inf
        ):
            raise ValueError(f"rho must be positive, or 'auto'; got {self.rho!r}")
        for name in ("retain_weight", "margin_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        for name, least in (("steps", 1), ("lanczos_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    def run(self, model: nn.Module, rows: Rows, given: Tensor | None) -> Fitted:
        """Minimise J on these rows; the model is never written to."""
        if self.retain_weight and not len(rows.retain[1]):
            raise ValueError(
                "retain_weight needs retain rows besides the held-out ones; give more rows"
            )
        with in_evaluation_mode(model):
            start = chosen_parameters(model, self.parameters)
            goal = self._objective(model, start, rows, given)
            weights = self._weights(model, start, rows)
            rho = auto_rho(goal, start, weights) if self.rho == "auto" else float(self.rho)
            best = minimise(
                goal,
                start,
                weights,
                rho,
                optimizer=self.optimizer,
                steps=self.steps,
                learning_rate=self.learning_rate,
                inside=self.inside,
                tolerance=self.tolerance,
            )
            own = dict(model.named_parameters())
            stored = {name: p.to(own[name].dtype) for name, p in best.parameters.items()}
            # what is certified is what will be applied, rounding to the model's dtype included
            end = {name: p.to(start[name].dtype) for name, p in stored.items()}
            record = self._certificate(goal, start, end, weights, rho)
            measured, before, after = self._measure(model, rows, start, end)
        record = replace(record, outputs=certify_outputs(before, after))
        report: dict[str, object] = {
            **measured,
            "forget_loss_before": record.forget_start,
            "forget_loss_after": record.forget_end,
            "rows": rows.counts,
            "history": thinned(best.trace),
            "certificate": record.to_dict(),
        }
        return Fitted(stored, rho, before.shape[1], report)

    def _objective(
        self, model: nn.Module, start: Parameters, rows: Rows, given: Tensor | None
    ) -> Objective:
        log_p0 = _log_probs(model, start, rows.forget[0], self.batch_size)
        count = log_p0.shape[1]
        if not 0 <= int(rows.forget[1].min()) <= int(rows.forget[1].max()) < count:
            raise ValueError(
                f"the model has {count} classes; labels of forget rows lie outside them"
            )
        kept = rows.retain[0] if self.retain_weight else rows.retain[0][:0]
        return Objective(
            model,
            rows.forget[0],
            label_log_target(self.target, log_p0, rows.forget[1], rows.classes, given),
            rows.forget[1],
            kept,
            _log_probs(model, start, kept, self.batch_size) if len(kept) else log_p0[:0],
            retain_weight=self.retain_weight,
            margin=self.margin,
            margin_weight=self.margin_weight,
            batch_size=self.batch_size,
        )

    def _weights(self, model: nn.Module, start: Parameters, rows: Rows) -> Parameters:
        if self.anchor == "euclidean":
            return {name: torch.ones_like(p) for name, p in start.items()}
        if not len(rows.retain[1]):
            raise ValueError(
                "anchor='fisher' needs retain rows besides the held-out ones; give more"
            )
        size = min(self.batch_size, FISHER_ROWS)
        return fisher_diagonal(model, start, rows.retain[0], seed=self.seed, batch_size=size)

    def _certificate(
        self, goal: Objective, start: Parameters, end: Parameters, weights: Parameters, rho: float
    ) -> Certificate:
        """Return C1 to C3, C5 and the influence link."""
        change = {name: end[name] - start[name] for name in start}
        first = goal.values(start).tolist()
        last, gradient = goal.gradient(end)
        residual = {n: gradient[n] + rho * weights[n] * change[n] for n in start}
        influence = None
        # with a weighted anchor H would have to be compared with rho A, not with rho
        if self.lanczos_steps and self.anchor == "euclidean":
            flat = torch.cat([p.reshape(-1) for p in start.values()])
            steps = min(self.lanczos_steps, len(flat))
            value, rest = lanczos_smallest(
                goal.hessian_product(start), flat, steps=steps, seed=self.seed
            )
            influence = InfluenceLink(rho=rho, beta=max(0.0, -value), residual=rest, steps=steps)
        return Certificate(
            rho=rho,
            points=len(goal.forget),
            start=first[0],
            end=float(last[0]),
            forget_start=first[1],
            forget_end=float(last[1]),
            distance=float(norm(change, weights)),
            gradient=float(dual_norm(gradient, weights)),
            residual=float(dual_norm(residual, weights)),
            metric=self.anchor,
            worst_weight=min(float(w.min()) for w in weights.values()),
            spectral={name: float(spectral_norm(value)) for name, value in change.items()},
            influence=influence,
        )

    def _measure(
        self, model: nn.Module, rows: Rows, start: Parameters, end: Parameters
    ) -> tuple[dict[str, object], Tensor, Tensor]:
        """Return the readouts before and after, and the logits of the held-out rows."""
        found: dict[str, object] = {}
        logits: list[Tensor] = []
        for when, parameters in (("before", start), ("after", end)):
            made, kept = read_out(
                model,
                parameters,
                rows.read,
                rows.held,
                rows.classes,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            found |= made.named(when)
            logits.append(kept)
        found["chance"] = 1 / logits[0].shape[1]
        return dict(sorted(found.items())), logits[0], logits[1]


def auto_rho(goal: Objective, start: Parameters, weights: Parameters) -> float:
    """Return the rho whose first-order step ``|grad G(th0)| / rho`` is 1 % of ``|th0|``.

    Raises:
        ValueError: If there is nothing to do: the objective or its gradient is zero.
    """
    values, gradient = goal.gradient(start)
    size, scale = float(dual_norm(gradient, weights)), float(norm(start, weights))
    if float(values[0]) <= AT_TARGET or not size > 0 or not scale > 0:
        raise ValueError(
            f"there is nothing to do: the objective is {float(values[0]):.3g} at the start, its gradient {size:.3g}; "
            "the forget rows are at their target already, or the parameters do not reach the logits"
        )
    return size / (RADIUS * scale)


def thinned(trace: Sequence[Tensor], limit: int = TRACE) -> list[float]:
    """Return at most that many values of J, evenly chosen, the first and the last among them."""
    values: list[float] = torch.stack(list(trace)).tolist()
    if len(values) <= limit:
        return values
    return [values[round(k * (len(values) - 1) / (limit - 1))] for k in range(limit)]


@torch.no_grad()
def _log_probs(model: nn.Module, start: Parameters, x: Tensor, batch_size: int) -> Tensor:
    parts = [class_logits(model, start, rows).log_softmax(1) for rows in x.split(batch_size)]
    return torch.cat(parts)
