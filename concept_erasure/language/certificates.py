"""What an anchored fit can promise: bounds C1 to C5 on damage and on the forget loss, and their record.

With G the objective without its anchor, ``J(th) = G(th) + rho/2 |D|^2`` and ``D = th - th0``:

- C1, level set: ``|D| <= sqrt(2 (G(th0) - G(th)) / rho)`` wherever ``J(th) <= J(th0)``; before any run
  ``sqrt(2 G(th0) / rho)``
- C2, stationarity: ``|D| <= (|grad G(th)| + |grad J(th)|) / rho``
- C3, forget value: ``F(th) <= G(th0) - rho/2 |D|^2`` under the condition of C1 (G is F plus terms that are not
  negative)
- C4, outputs: with ``r`` the range of the change of the logits at x, ``KL(p0 | p) <= r^2 / 8``, ``TV <= r / 4``, and
  the first class stays first if ``r`` is below its lead
- C5, linear maps: ``|DW x| <= |DW|_2 |x|``

None needs convexity; all are derived here, for the objective of FAMR (arXiv 2506.14515) as reconstructed in `famr`.
C4's first line is Hoeffding's lemma for ``log E_p0 exp(d)``, its second Pinsker's inequality. The anchor may have
positive weights w: ``|D|`` is then ``sqrt(sum w D^2)`` and gradients are measured in the dual norm
``sqrt(sum g^2 / w)``.

They bound damage and the forget *loss*. None says that the information is gone: see ``docs/explanation/famr.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from concept_erasure.errors import FormatError
from concept_erasure.language._bounds import (
    OutputBounds,
    a_priori_radius,
    clopper_pearson,
    forget_bound,
    lanczos_smallest,
    level_set_radius,
    low_rank_norm,
    low_rank_spectral_norm,
    output_bounds,
    spectral_norm,
    stationarity_radius,
)
from concept_erasure.report import Interval

__all__ = [
    "Certificate",
    "InfluenceLink",
    "OutputBounds",
    "OutputCertificate",
    "a_priori_radius",
    "certify_outputs",
    "clopper_pearson",
    "forget_bound",
    "lanczos_smallest",
    "level_set_radius",
    "low_rank_norm",
    "low_rank_spectral_norm",
    "output_bounds",
    "spectral_norm",
    "stationarity_radius",
]

SLACK = 1e-5  # rounding of sums of float32 losses, relative to their scale


@dataclass(frozen=True, kw_only=True)
class InfluenceLink:
    """Whether ``D ~ -(H + rho I)^-1 g``, the likeness to influence functions, can be meant (F2).

    It needs ``rho > beta``, with ``-beta`` the smallest eigenvalue of the Hessian H of G at the start.

    Attributes:
        rho: Strength of the anchor.
        beta: ``max(0, -smallest Ritz value)``: at most the true one, and after enough steps close to it.
        residual: Of the Ritz value.
        steps: Of Lanczos.
    """

    rho: float
    beta: float
    residual: float
    steps: int

    @property
    def valid(self) -> bool:
        """Whether rho exceeds beta by more than the residual."""
        return self.rho > self.beta + self.residual

    def __str__(self) -> str:
        """Return one line for people."""
        verdict = "valid" if self.valid else "NOT valid: this is not an influence-function step"
        return (
            f"influence link: rho {self.rho:.3g} against beta {self.beta:.3g} (Lanczos, {self.steps} steps, "
            f"residual {self.residual:.1g}): {verdict}"
        )


@dataclass(frozen=True, kw_only=True)
class OutputCertificate:
    """C4 on a sample that the fit has not seen.

    Attributes:
        n: Points of the sample.
        certified: Share of points whose argmax C4 certifies unchanged, with its Clopper-Pearson interval.
        unchanged: Share whose argmax is unchanged, likewise.
        kl: Mean ``KL(p0 | p)`` measured, nats.
        kl_bound: Mean of the bounds ``r^2 / 8``.
        tv_bound: Mean of the bounds ``min(1, r / 4)``.
        worst_range: Largest ``r``.
        violations: Points that break C4; rounding aside there are none.
        independent: Whether the points are (tokens of one text are not: the intervals are then too narrow).
    """

    n: int
    certified: Interval
    unchanged: Interval
    kl: float
    kl_bound: float
    tv_bound: float
    worst_range: float
    violations: int
    independent: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `Certificate.to_dict` holds."""
        shares = {k: Interval(**values[k]) for k in ("certified", "unchanged")}
        return cls(**{**values, **shares})


@torch.no_grad()
def certify_outputs(
    before: Tensor, after: Tensor, *, level: float = 0.95, independent: bool = True
) -> OutputCertificate:
    """Return C4 for a sample of points.

    Args:
        before: Logits of the original, shape ``(n, K)``, at points the fit has not seen.
        after: Logits of the edited model.
        level: Coverage of the intervals.
        independent: Whether the points are independent draws.

    Raises:
        ShapeError: If the shapes are wrong.
        ValueError: If there are no points.
    """
    if before.ndim != 2 or not len(before):
        raise ValueError(
            f"C4 needs at least one held-out point, logits (n, K); got {tuple(before.shape)}: give more "
            "retain data"
        )
    before, after = before.double(), after.double()
    bounds = output_bounds(before, after)
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = before.argmax(-1) == after.argmax(-1)
    tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    broken = (kl > bounds.kl + SLACK) | (tv > bounds.tv + SLACK) | (bounds.certified & ~same)
    counts = torch.stack([bounds.certified.sum(), same.sum(), broken.sum()]).tolist()
    means = torch.stack(
        [kl.mean(), bounds.kl.mean(), bounds.tv.clamp_max(1).mean(), bounds.range.amax()]
    ).tolist()
    return OutputCertificate(
        n=len(before),
        certified=clopper_pearson(counts[0], len(before), level=level),
        unchanged=clopper_pearson(counts[1], len(before), level=level),
        kl=means[0],
        kl_bound=means[1],
        tv_bound=means[2],
        worst_range=means[3],
        violations=counts[2],
        independent=independent,
    )


ASSUMPTIONS = {
    "C1": "rho > 0; J at the end is not above J at the start, both on the same forget sample",
    "C2": "rho > 0; gradients at the end on the same forget sample",
    "C3": "as C1; every other term of the objective is not negative",
    "C4": "none at the points measured; the interval: held-out retain points drawn independently",
    "C5": "the parameter is a linear map of its input",
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Bounds C1 to C5 of one run, with what they bound, all measured after it.

    Attributes:
        rho: Strength of the anchor.
        metric: ``euclidean``, or ``fisher`` for a weighted anchor: of ``distance`` and the gradient norms.
        points: Forget points (examples or token positions) on which G and F were measured.
        start: ``G(th0)``.
        end: ``G(th)``.
        forget_start: ``F(th0)``.
        forget_end: ``F(th)``.
        distance: ``|D|``.
        gradient: ``|grad G(th)|``.
        residual: ``|grad J(th)|``.
        outputs: C4, None without a held-out sample.
        spectral: C5, the factor of each changed parameter.
        influence: None where it was not measured.
        worst_weight: Smallest weight of the anchor: the Euclidean distance is at most
            ``distance / sqrt(worst_weight)``.
    """

    rho: float
    points: int
    start: float
    end: float
    forget_start: float
    forget_end: float
    distance: float
    gradient: float
    residual: float
    metric: str = "euclidean"
    worst_weight: float = 1.0
    outputs: OutputCertificate | None = None
    spectral: Mapping[str, float] = field(default_factory=dict)
    influence: InfluenceLink | None = None

    @property
    def objective_start(self) -> float:
        """``J(th0)``; the anchor is zero there."""
        return self.start

    @property
    def objective_end(self) -> float:
        """``J(th)``."""
        return self.end + self.rho / 2 * self.distance**2

    @property
    def lowered(self) -> bool:
        """Whether ``J(th) <= J(th0)``, the condition of C1 and C3."""
        return self.rho > 0 and self.objective_end <= self.start + SLACK * max(1.0, self.start)

    @property
    def level_set(self) -> float | None:
        """C1; None where its condition fails."""
        return math.sqrt(2 * max(0.0, self.start - self.end) / self.rho) if self.lowered else None

    @property
    def a_priori(self) -> float | None:
        """C1 as known before the run; None where its condition fails."""
        return math.sqrt(2 * self.start / self.rho) if self.lowered else None

    @property
    def stationarity(self) -> float | None:
        """C2; None without an anchor."""
        return (self.gradient + self.residual) / self.rho if self.rho > 0 else None

    @property
    def forget_bound(self) -> float | None:
        """C3; None where its condition fails."""
        return self.start - self.rho / 2 * self.distance**2 if self.lowered else None

    def violations(self) -> tuple[str, ...]:
        """Return the names of bounds that the measured values break; rounding aside there are none."""
        slack = SLACK * max(1.0, self.start)
        # C1 bounds the square, of which a rounding of the losses by `slack` is a fixed share
        reach = math.sqrt(2 * slack / self.rho) if self.rho > 0 else 0.0
        found = []
        if self.level_set is not None and self.distance > self.level_set + reach:
            found.append("C1")
        if self.stationarity is not None and self.distance > self.stationarity * (1 + 1e-3) + 1e-9:
            found.append("C2")
        if self.forget_bound is not None and self.forget_end > self.forget_bound + slack:
            found.append("C3")
        if self.outputs is not None and self.outputs.violations:
            found.append("C4")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the bounds among them; `from_dict` reads them back."""
        out = asdict(self)
        out["spectral"] = dict(self.spectral)
        out["bounds"] = {
            "level_set": self.level_set,
            "a_priori": self.a_priori,
            "stationarity": self.stationarity,
            "forget": self.forget_bound,
            "violations": list(self.violations()),
        }
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the certificate that `to_dict` wrote.

        Raises:
            FormatError: If a field is missing or unknown.
        """
        given = {key: value for key, value in values.items() if key != "bounds"}
        known = {one.name for one in fields(cls)}
        if set(given) != known:
            raise FormatError(f"a certificate has the fields {sorted(known)}; got {sorted(given)}")
        try:
            if given["outputs"] is not None:
                given["outputs"] = OutputCertificate.from_dict(given["outputs"])
            if given["influence"] is not None:
                given["influence"] = InfluenceLink(**given["influence"])
            return cls(**given)
        except (TypeError, KeyError, ValueError) as error:
            raise FormatError(f"this is no certificate: {error}") from None

    def __str__(self) -> str:
        """Return the bounds with their assumptions, one a line."""

        def bound(value: float | None) -> str:
            return "does not apply (J rose)" if value is None else f"{value:.4g}"

        lines = [
            f"certificate on {self.points} forget points, rho {self.rho:.4g}, {self.metric} metric",
            f"J {self.objective_start:.4g} -> {self.objective_end:.4g}, F {self.forget_start:.4g} -> "
            f"{self.forget_end:.4g}",
            f"C1 |D| = {self.distance:.4g} <= {bound(self.level_set)} (before the run {bound(self.a_priori)})",
            f"C2 |D| = {self.distance:.4g} <= "
            + ("no anchor" if self.stationarity is None else f"{self.stationarity:.4g}"),
            f"C3 F = {self.forget_end:.4g} <= {bound(self.forget_bound)}",
        ]
        if self.outputs is None:
            lines.append("C4 not measured: there was no held-out retain sample")
        else:
            one = self.outputs
            lines.append(
                f"C4 on {one.n} held-out retain points: argmax certified unchanged {one.certified}, unchanged "
                f"{one.unchanged}; mean KL {one.kl:.3g} <= {one.kl_bound:.3g}"
                + ("" if one.independent else " (points are tokens, not independent)")
            )
        if self.spectral:
            name, worst = max(self.spectral.items(), key=lambda item: item[1])
            lines.append(
                f"C5 |DW|_2 of {len(self.spectral)} parameters, at most {worst:.4g} ({name})"
            )
        lines.append(
            "influence link: not measured" if self.influence is None else str(self.influence)
        )
        lines += [f"{name} assumes: {text}" for name, text in ASSUMPTIONS.items()]
        lines.append("None of these says that the information is gone.")
        return "\n".join(lines)
