"""Kernel probe with a Gaussian (RBF) kernel: reads what no linear probe can.

The predictor is ``k(x, landmarks) @ dual + intercept`` with ``k(a, b) = exp(-gamma |a - b|^2)`` and
the ridge of kernel regression. Up to ``exact_rows`` vectors every one is a landmark and the solution
is the exact one; above, ``features`` landmarks drawn at random (Williams and Seeger 2001) or random
Fourier features (Rahimi and Recht 2007) stand for the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from concept_erasure.probes._data import Vectors, read_groups
from concept_erasure.probes._fitted import FittedProbe, training_data
from concept_erasure.probes._ridge import InputUnits, Scaling, check_scaling, input_units
from concept_erasure.probes._solve import check_penalty
from concept_erasure.probes.linear import FittedLinear, LinearProbe
from concept_erasure.probes.mlp import split_classes

__all__ = ["FittedKernel", "KernelProbe", "median_gamma"]

Loss = Literal["logistic", "ridge"]
Approximation = Literal["nystroem", "fourier"]
Kind = Literal["exact", "nystroem", "fourier"]

_MEDIAN_ROWS = 1000
_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
_WIDTHS = (1.0, 4.0)
CAP = 5.0
"""``standardize="cap"`` leaves no direction larger than this many times the median deviation: a distance adds up all
directions, so a large one hides more from a kernel than from a network, whose weights can go against it."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A kernel turned into features of the training vectors, ``[n, r]``."""

    unit: InputUnits
    gamma: float
    landmarks: Tensor
    whitening: Tensor | None
    features: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedKernel(FittedProbe):
    """A fitted kernel probe.

    Attributes:
        mean: Subtracted from the vectors, shape ``[d]``.
        basis: Then multiplies them, shape ``[d, r]``: directions over their units.
        standardize: Units of the vectors, as given or chosen.
        C: Inverse strength of the penalty, as given or chosen.
        gamma: Of the kernel between scaled vectors.
        landmarks: Scaled vectors the kernel is taken with, shape ``[m, r]``; with Fourier features the
            frequencies, shape ``[m, r]``.
        dual: Weight of each landmark (of the cosine and sine of each frequency), shape ``[m, k]``
            or ``[2 m, k]``.
        intercept: Shape ``[k]``.
        kind: ``"exact"``, ``"nystroem"`` or ``"fourier"``.
        loss: ``"logistic"`` or ``"ridge"``.
        batch_rows: Vectors scored at once.
    """

    mean: Tensor
    basis: Tensor
    standardize: Scaling
    C: float
    gamma: float
    landmarks: Tensor
    dual: Tensor
    intercept: Tensor
    kind: Kind
    loss: Loss
    batch_rows: int

    @property
    def has_probabilities(self) -> bool:
        """Whether the loss is the logistic one."""
        return self.loss == "logistic"

    def _scores(self, x: Tensor) -> Tensor:
        landmarks, dual = self.landmarks.to(x), self.dual.to(x)
        mean, basis, intercept = self.mean.to(x), self.basis.to(x), self.intercept.to(x)
        read = _features(self.kind, landmarks, self.gamma)
        return torch.cat(
            [
                read((rows - mean) @ basis) @ dual + intercept
                for rows in torch.split(x, self.batch_rows)
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelProbe:
    """Kernel logistic or kernel ridge regression with a Gaussian kernel.

    With m landmarks (all n of them when exact): O(n m d + n m^2 + m^3) time, O(n m) memory.

    Attributes:
        C: Inverse strength of the penalty; ``"auto"``: the one of 1, 10, 100, 1000 with the lowest loss on the
            held-out share, then fitted again on everything. The objective is ``|f|^2 / 2 + C * sum(log-loss)``,
            and for the ridge ``|f|^2 + C * sum((target - f)^2)``, so that scikit-learn's ``alpha`` is ``1 / C``.
        gamma: Inverse width of the kernel, between vectors in the units of ``standardize``; ``"median"``:
            ``1 / (2 m^2)`` with m the median distance between vectors; ``"auto"``: that or four times that,
            whichever has the lower loss on the held-out share.
        loss: ``"logistic"``, or ``"ridge"``: squared error of one-hot targets, no probabilities. The intercept
            is free, for the ridge it is the class frequency.
        exact_rows: Most training vectors for which the full kernel matrix is used.
        approximation: What stands for the kernel above: ``"nystroem"`` or ``"fourier"``.
        features: Landmarks or Fourier features above. Higher is closer to the exact kernel.
        standardize: Units of the vectors, as in `MlpProbe`, but ``"cap"`` caps at five times the median deviation;
            ``"auto"`` chooses with C and gamma.
        held_out: Share of each class on which ``"auto"`` chooses, in (0, 1).
        batch_rows: Vectors whose kernel is computed at once.
        seed: Determines the landmarks or frequencies, the pairs for the median, and the held-out share.

    Example:
        >>> import torch
        >>> from concept_erasure.probes import KernelProbe
        >>> x = torch.linspace(-1, 1, 60)[:, None]
        >>> KernelProbe(C=100).fit(x, x[:, 0].abs() > 0.5).predict([[0.0], [0.9], [-0.9]])
        [False, True, True]
    """

    C: float | Literal["auto"] = "auto"
    gamma: float | Literal["auto", "median"] = "auto"
    loss: Loss = "logistic"
    exact_rows: int = 500
    approximation: Approximation = "nystroem"
    features: int = 500
    standardize: Scaling = "auto"
    held_out: float = 0.2
    batch_rows: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.C != "auto":
            check_penalty(self.C, 1.0, 1)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        check_scaling(self.standardize)
        if self.gamma not in ("auto", "median") and not (
            isinstance(self.gamma, (int, float)) and 0 < self.gamma < math.inf
        ):
            raise ValueError(f"gamma must be positive, 'auto' or 'median', got {self.gamma!r}")
        if self.loss not in ("logistic", "ridge"):
            raise ValueError(f"loss must be 'logistic' or 'ridge', got {self.loss!r}")
        if self.approximation not in ("nystroem", "fourier"):
            raise ValueError(
                f"approximation must be 'nystroem' or 'fourier', got {self.approximation!r}"
            )
        for name, least in (("exact_rows", 0), ("features", 2), ("batch_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @torch.no_grad()
    def fit(self, x: Vectors, z: object, *, groups: object = None) -> FittedKernel:
        """Fit the probe.

        Args:
            x: Vectors, shape ``[n, d]``, any real dtype.
            z: Class labels, length ``n``: strings, bools or integers.
            groups: Group of each vector (such as its text), length ``n``: one group is never on both sides of
                the split by which ``"auto"`` chooses.

        Returns:
            The fitted probe, on the device of ``x``.

        Raises:
            ShapeError: If the shapes are wrong or disagree.
            TypeError: If vectors or labels are of the wrong kind.
            ValueError: If a vector is not finite or there is only one class.
        """
        matrix, index, classes = training_data(x, z)
        parts = None if groups is None else read_groups(groups, n=len(matrix))
        frame, penalty = self._choose(matrix, index, len(classes), parts)
        weight, intercept = self._weights(frame.features, index, len(classes), penalty)
        return FittedKernel(
            classes=classes,
            width=matrix.shape[1],
            mean=frame.unit.mean,
            basis=frame.unit.basis,
            standardize=frame.unit.scaling,
            C=penalty,
            gamma=frame.gamma,
            landmarks=frame.landmarks,
            dual=weight if frame.whitening is None else frame.whitening @ weight,
            intercept=intercept,
            kind=self._kind(len(matrix)),
            loss=self.loss,
            batch_rows=self.batch_rows,
        )

    def _kind(self, n: int) -> Kind:
        return "exact" if n <= self.exact_rows else self.approximation

    def _landmarks(self, inputs: Tensor) -> Tensor:
        """Return landmarks, or frequencies for gamma = 1/2; the same ones on every device."""
        n, width = inputs.shape
        generator = torch.Generator().manual_seed(self.seed)
        kind = self._kind(n)
        if kind == "exact":
            return inputs
        if kind == "nystroem":
            rows = torch.randperm(n, generator=generator)[: self.features]
            return inputs[rows.to(inputs.device)]
        drawn = torch.randn(self.features // 2, width, generator=generator, dtype=torch.float64)
        return drawn.to(inputs)

    def _frames(self, matrix: Tensor, unit: InputUnits) -> Iterator[_Frame]:
        """Yield one kernel for each width, as features whose inner products are it or stand for it."""
        inputs = unit.apply(matrix)
        drawn, kind = self._landmarks(inputs), self._kind(len(inputs))
        for gamma in self._gammas(inputs):
            landmarks = drawn * math.sqrt(2 * gamma) if kind == "fourier" else drawn
            read = _features(kind, landmarks, gamma)
            features = torch.cat([read(rows) for rows in torch.split(inputs, self.batch_rows)])
            whitening = None
            if kind != "fourier":
                whitening = _inverse_root(features if kind == "exact" else read(landmarks))
                features = features @ whitening
            yield _Frame(unit, gamma, landmarks, whitening, features)

    def _gammas(self, inputs: Tensor) -> list[float]:
        if not isinstance(self.gamma, str):
            return [float(self.gamma)]
        middle = median_gamma(inputs, generator=torch.Generator().manual_seed(self.seed))
        return [middle * f for f in (_WIDTHS if self.gamma == "auto" else (1.0,))]

    def _choose(
        self, matrix: Tensor, index: Tensor, k: int, groups: Tensor | None
    ) -> tuple[_Frame, float]:
        """Return kernel and penalty with the lowest loss on a held-out share, unless given."""
        penalties = list(_STRENGTHS) if isinstance(self.C, str) else [float(self.C)]
        options = (self.standardize == "auto", self.gamma == "auto", self.C == "auto")
        found = input_units(matrix, self.standardize, cap=CAP)
        if not any(options) or int(torch.bincount(index).max()) < 2:  # nothing to choose by
            return next(self._frames(matrix, found[0])), penalties[0]
        generator = torch.Generator().manual_seed(self.seed)
        train, held_out = split_classes(index, self.held_out, generator, groups)

        def tried() -> Iterator[tuple[float, _Frame, float]]:
            for unit in found:
                for frame in self._frames(matrix, unit):
                    for penalty in penalties:
                        fitted = self._weights(frame.features[train], index[train], k, penalty)
                        loss = self._loss(frame.features[held_out], index[held_out], *fitted)
                        yield loss, frame, penalty

        _, frame, penalty = min(tried(), key=lambda row: row[0])
        return frame, penalty

    def _loss(self, features: Tensor, index: Tensor, weight: Tensor, intercept: Tensor) -> float:
        scores = features @ weight + intercept
        if self.loss == "logistic":
            return float(cross_entropy(scores, index))
        return float((one_hot(index, weight.shape[1]) - scores).square().mean())

    def _weights(
        self, features: Tensor, index: Tensor, k: int, penalty: float
    ) -> tuple[Tensor, Tensor]:
        """Return weights ``[m, k]`` and intercepts ``[k]`` for features ``[n, m]``."""
        if self.loss == "ridge":
            target = one_hot(index, k).to(features)
            mean = target.mean(dim=0)
            gram = features.T @ features
            gram.diagonal().add_(1 / penalty)
            factor = torch.linalg.cholesky(gram)
            return torch.cholesky_solve(features.T @ (target - mean), factor), mean
        fitted = LinearProbe(C=penalty, standardize=None, tol=1e-7).fit(features, index)
        return _per_class(fitted)


def _per_class(fitted: FittedLinear) -> tuple[Tensor, Tensor]:
    """Return weights ``[m, k]`` and intercepts ``[k]``, zeros for the first of two classes."""
    weight, intercept = fitted.coef.T, fitted.intercept
    if weight.shape[1] == 1:
        weight = torch.cat([torch.zeros_like(weight), weight], dim=1)
        intercept = torch.cat([torch.zeros_like(intercept), intercept])
    return weight, intercept


def median_gamma(x: Tensor, *, generator: torch.Generator | None = None) -> float:
    """Return ``1 / (2 m^2)`` with m the median distance between two vectors.

    Args:
        x: Vectors, shape ``[n, d]``; of more than 1000, so many drawn at random are used.
        generator: For the draw, on the CPU; default: one with seed 0.

    Returns:
        The inverse width; the mean distance takes the place of a median of zero, and 1 is returned when
        all vectors are equal.
    """
    if len(x) > _MEDIAN_ROWS:
        chosen = generator if generator is not None else torch.Generator().manual_seed(0)
        x = x[torch.randperm(len(x), generator=chosen)[:_MEDIAN_ROWS].to(x.device)]
    distances = torch.pdist(x) if len(x) > 1 else x.new_zeros(1)
    middle = float(distances.quantile(0.5)) or float(distances.mean())
    return 1 / (2 * middle**2) if middle > 0 else 1.0


def _features(kind: str, landmarks: Tensor, gamma: float) -> Callable[[Tensor], Tensor]:
    """Return the map from scaled vectors ``[n, d]`` to kernel values or Fourier features."""
    norm = landmarks.square().sum(dim=1)

    def kernel(x: Tensor) -> Tensor:
        squared = x.square().sum(dim=1)[:, None] + norm - 2 * x @ landmarks.T
        return squared.clamp_min_(0).mul_(-gamma).exp_()

    def fourier(x: Tensor) -> Tensor:
        angle = x @ landmarks.T
        return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(len(landmarks))

    return fourier if kind == "fourier" else kernel


def _inverse_root(gram: Tensor) -> Tensor:
    """Return W ``[m, r]`` with ``W W^T`` the pseudo-inverse of a kernel matrix ``[m, m]``."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    keep = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    whitening: Tensor = vectors[:, keep] / values[keep].sqrt()
    return whitening
