"""Measure how well a concept can be read: accuracy with its interval, log-loss, and baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.probes._data import Label, Vectors, index_labels, read_labels, read_vectors
from concept_erasure.probes._fitted import FittedProbe, Probe, training_data
from concept_erasure.probes.linear import LinearProbe
from concept_erasure.probes.mlp import MlpProbe
from concept_erasure.probes.svm import SvmProbe

__all__ = ["PROBES", "ProbeResult", "control", "cross_validate", "evaluate", "wilson_interval"]

PROBES: Mapping[str, Callable[[int], Probe]] = MappingProxyType(
    {
        "linear": lambda seed: LinearProbe(),
        "svm": lambda seed: SvmProbe(),
        "mlp": lambda seed: MlpProbe(seed=seed),
    }
)
"""Probes by name, each made from a seed."""

_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """How well a probe reads a concept on data it was not fitted on.

    Attributes:
        accuracy: Share of correct predictions, in [0, 1].
        balanced_accuracy: Mean over classes of the share of the class that is found.
        log_loss: Mean negative log-likelihood in nats; None for a probe without probabilities.
        auc: Area under the ROC curve for two classes; None otherwise. With several folds, the mean
            over the folds that hold both classes.
        majority: Accuracy of always naming the most frequent class of the test data.
        constant_log_loss: Log-loss in nats of always answering the class frequencies of the
            training data. A guarded concept has ``log_loss`` no lower than this.
        low: Lower end of the 95 % Wilson interval of ``accuracy``.
        high: Upper end.
        n: Vectors tested.
        folds: Parts of the cross-validation; 1 for a separate test set. The interval takes the
            predictions of different folds for independent, which they nearly are.
    """

    accuracy: float
    balanced_accuracy: float
    log_loss: float | None
    auc: float | None
    majority: float
    constant_log_loss: float
    low: float
    high: float
    n: int
    folds: int = 1

    @property
    def beats_majority(self) -> bool:
        """Whether the whole interval lies above the majority rate."""
        return self.low > self.majority

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line for people."""
        loss = "" if self.log_loss is None else f", log-loss {self.log_loss:.4f}"
        return (
            f"accuracy {self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}] against "
            f"{self.majority:.1%} for the majority class{loss} (n = {self.n})"
        )


def wilson_interval(correct: int, n: int, *, normal: float = _NORMAL_975) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927).

    Args:
        correct: Successes, 0 to ``n``.
        n: Trials, at least 1.
        normal: Quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: If the counts are impossible.

    Example:
        >>> low, high = wilson_interval(50, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.404 0.596'
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    rate = correct / n
    square = normal**2 / n
    centre = (rate + square / 2) / (1 + square)
    half = normal / (1 + square) * math.sqrt(rate * (1 - rate) / n + square / (4 * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == n else min(1.0, centre + half)


def evaluate(
    x_train: Vectors,
    z_train: object,
    x_test: Vectors,
    z_test: object,
    *,
    probe: str | Probe = "linear",
    seed: int = 0,
) -> ProbeResult:
    """Fit a probe on one set and test it on another.

    Args:
        x_train: Vectors to fit on, shape ``[n, d]``.
        z_train: Their class labels, length ``n``.
        x_test: Vectors to test on, shape ``[m, d]``.
        z_test: Their labels, length ``m``; each must occur in ``z_train``.
        probe: ``"linear"``, ``"svm"``, ``"mlp"``, or a configured probe.
        seed: For probes given by name; a configured probe has its own.

    Returns:
        The result on the test set.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If the data are not finite, a class is unknown or there is only one to learn.
    """
    matrix, index, classes = training_data(x_train, z_train)
    test = read_vectors(x_test, name="x_test")
    if test.shape[1] != matrix.shape[1]:
        raise ShapeError(
            f"x_train and x_test must have one width, got {list(matrix.shape)} and "
            f"{list(test.shape)}"
        )
    labels = read_labels(z_test, n=len(test), name="z_test")
    test_index, _ = index_labels(labels, classes, device=test.device)
    fitted = _make(probe, seed).fit(matrix, _labels(index, classes))
    return _pool([_score(fitted, test, test_index, index)])


def cross_validate(
    x: Vectors,
    z: object,
    *,
    probe: str | Probe = "linear",
    folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Test a probe by stratified cross-validation: every vector is predicted once.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``; at least two examples per class.
        probe: ``"linear"``, ``"svm"``, ``"mlp"``, or a configured probe.
        folds: Parts, 2 to ``n``. Higher trains on more data and takes longer.
        seed: Determines the parts, and a probe given by name.

    Returns:
        The result over all ``n`` predictions.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If the data are not finite, a class has fewer than two examples, there is only
            one class, or ``folds`` is out of range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> cross_validate(x, x[:, 0] > 0, folds=4).n
        40
    """
    matrix, index, classes = training_data(x, z)
    part = _folds(index, classes, folds, seed)
    model = _make(probe, seed)
    scores = []
    for fold in range(folds):
        test = part == fold
        fitted = model.fit(matrix[~test], _labels(index[~test], classes))
        scores.append(_score(fitted, matrix[test], index[test], index[~test]))
    return _pool(scores)


def control(
    x: Vectors,
    z: object,
    *,
    probe: str | Probe = "linear",
    folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Cross-validate on shuffled labels: what the same probe finds where there is nothing.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``; they are permuted.
        probe: ``"linear"``, ``"svm"``, ``"mlp"``, or a configured probe.
        folds: Parts of the cross-validation.
        seed: Determines the permutation and the parts.

    Returns:
        The result for the permuted labels; expect the majority rate.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: As `cross_validate`.
    """
    matrix, index, classes = training_data(x, z)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(index), generator=generator).to(index.device)
    shuffled = _labels(index[order], classes)
    return cross_validate(matrix, shuffled, probe=probe, folds=folds, seed=seed)


def _make(probe: str | Probe, seed: int) -> Probe:
    if not isinstance(probe, str):
        if not callable(getattr(probe, "fit", None)):
            raise TypeError(
                f"probe must be one of {sorted(PROBES)} or have a method fit(x, z), "
                f"got {type(probe).__name__}"
            )
        return probe
    if probe not in PROBES:
        raise ValueError(f"unknown probe {probe!r}; the probes are {sorted(PROBES)}")
    return PROBES[probe](seed)


def _labels(index: Tensor, classes: tuple[Label, ...]) -> list[Label]:
    return [classes[i] for i in index.tolist()]


def _folds(index: Tensor, classes: tuple[Label, ...], folds: int, seed: int) -> Tensor:
    """Return the part each row belongs to, ``[n]``; classes and sizes are spread evenly."""
    if not 2 <= folds <= len(index):
        raise ValueError(f"folds must lie between 2 and n = {len(index)}, got {folds}")
    counts = torch.bincount(index, minlength=len(classes))
    if int(counts.min()) < 2:
        rare = classes[int(counts.argmin())]
        raise ValueError(
            f"cross-validation needs two examples of each class, got {int(counts.min())} of "
            f"{rare!r}; add examples or drop the class"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(index), generator=generator).to(index.device)
    order = shuffled[index[shuffled].argsort(stable=True)]
    part = torch.empty_like(index)
    part[order] = torch.arange(len(index), device=index.device) % folds
    return part


@dataclass(frozen=True, slots=True)
class _Score:
    """What one test set contributes: per-class counts and sums of losses."""

    found: Tensor
    total: Tensor
    loss: float | None
    constant_loss: float
    auc: float | None


def _score(fitted: FittedProbe, x: Tensor, index: Tensor, train_index: Tensor) -> _Score:
    k = len(fitted.classes)
    correct = fitted.predict_index(x) == index
    rates = torch.bincount(train_index, minlength=k).double() / len(train_index)
    loss = None
    if fitted.has_probabilities:
        rows = fitted.predict_log_proba(x).gather(1, index[:, None])
        loss = -float(rows.sum())
    auc = None
    if k == 2:
        scores = fitted.decision(x)
        auc = _auc(scores[:, 1] - scores[:, 0], index == 1)
    return _Score(
        found=torch.bincount(index[correct], minlength=k).cpu(),
        total=torch.bincount(index, minlength=k).cpu(),
        loss=loss,
        constant_loss=-float(rates.log()[index].sum()),
        auc=auc,
    )


def _auc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a positive scores above a negative, ties counting half."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    scores = scores.contiguous()
    ordered = scores.sort().values
    first = torch.searchsorted(ordered, scores)
    rank = (first + torch.searchsorted(ordered, scores, right=True) + 1).double() / 2
    wins = float(rank[positive].sum()) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * n_negative)


def _pool(scores: list[_Score]) -> ProbeResult:
    found = torch.stack([score.found for score in scores]).sum(dim=0)
    total = torch.stack([score.total for score in scores]).sum(dim=0)
    n, correct = int(total.sum()), int(found.sum())
    present = total > 0
    losses = [score.loss for score in scores if score.loss is not None]
    areas = [score.auc for score in scores if score.auc is not None]
    low, high = wilson_interval(correct, n)
    return ProbeResult(
        accuracy=correct / n,
        balanced_accuracy=float((found[present] / total[present]).mean()),
        log_loss=sum(losses) / n if len(losses) == len(scores) else None,
        auc=sum(areas) / len(areas) if areas else None,
        majority=int(total.max()) / n,
        constant_log_loss=sum(score.constant_loss for score in scores) / n,
        low=low,
        high=high,
        n=n,
        folds=len(scores),
    )
