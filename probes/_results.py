"""What a probe found: results, their intervals, and how test sets are scored and joined."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from concept_erasure.probes._fitted import FittedProbe

__all__ = [
    "ControlResult",
    "ProbeResult",
    "Score",
    "SelectivityResult",
    "area_under_curve",
    "mean_interval",
    "pool",
    "score_probe",
    "wilson_interval",
]

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
        folds: Parts of the cross-validation; 1 for a separate test set. The intervals take the
            predictions of different folds for independent, which they nearly are.
        log_loss_low: Lower end of the 95 % normal interval of ``log_loss``, from the spread of the loss
            over vectors; None without probabilities.
        log_loss_high: Upper end.
        groups: Groups tested; None when vectors were taken for independent. With groups both intervals
            use the spread over groups, so many tokens of few texts do not feign certainty.
        balanced_low: Lower end of the 95 % interval of ``balanced_accuracy``, from the Wilson intervals of
            the classes.
        balanced_high: Upper end.
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
    log_loss_low: float | None = None
    log_loss_high: float | None = None
    groups: int | None = None
    balanced_low: float | None = None
    balanced_high: float | None = None

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
        if self.log_loss_low is not None:
            loss += f" [{self.log_loss_low:.4f}, {self.log_loss_high:.4f}]"
        count = f"n = {self.n}" + ("" if self.groups is None else f" in {self.groups} groups")
        return (
            f"accuracy {self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}] against "
            f"{self.majority:.1%} for the majority class{loss} ({count})"
        )


@dataclass(frozen=True, slots=True)
class ControlResult:
    """What a probe finds in permuted labels, one result a permutation.

    Attributes:
        runs: The results.
    """

    runs: tuple[ProbeResult, ...]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the permutations."""
        return sum(run.accuracy for run in self.runs) / len(self.runs)

    @property
    def accuracy_range(self) -> tuple[float, float]:
        """Lowest and highest accuracy over the permutations."""
        values = [run.accuracy for run in self.runs]
        return min(values), max(values)

    @property
    def log_loss(self) -> float | None:
        """Mean log-loss over the permutations in nats; None for a probe without probabilities."""
        values = self._log_losses()
        return sum(values) / len(values) if values else None

    @property
    def log_loss_range(self) -> tuple[float, float] | None:
        """Lowest and highest log-loss over the permutations."""
        values = self._log_losses()
        return (min(values), max(values)) if values else None

    @property
    def constant_log_loss(self) -> float:
        """Mean over the permutations, see `ProbeResult`."""
        return sum(run.constant_log_loss for run in self.runs) / len(self.runs)

    @property
    def majority(self) -> float:
        """Mean share of the most frequent class over the permutations."""
        return sum(run.majority for run in self.runs) / len(self.runs)

    @property
    def beats_majority(self) -> bool:
        """Whether any permutation does; then the probe or the folds are not to be trusted."""
        return any(run.beats_majority for run in self.runs)

    def p_value(self, result: ProbeResult) -> float:
        """Return the permutation test's chance of an accuracy as high as ``result`` when nothing is there.

        At least ``1 / (permutations + 1)``.
        """
        as_high = sum(run.accuracy >= result.accuracy for run in self.runs)
        return (as_high + 1) / (len(self.runs) + 1)

    def to_dict(self) -> dict[str, object]:
        """Return means, ranges and runs as JSON-ready values."""
        loss = self.log_loss_range
        return {
            "accuracy": self.accuracy,
            "accuracy_range": list(self.accuracy_range),
            "log_loss": self.log_loss,
            "log_loss_range": None if loss is None else list(loss),
            "runs": [run.to_dict() for run in self.runs],
        }

    def __str__(self) -> str:
        """Return one line for people."""
        low, high = self.accuracy_range
        return (
            f"accuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%} over {len(self.runs)} permutations) "
            f"against {self.majority:.1%} for the majority class"
        )

    def _log_losses(self) -> list[float]:
        return [run.log_loss for run in self.runs if run.log_loss is not None]


@dataclass(frozen=True, slots=True)
class SelectivityResult:
    """How much of a probe's accuracy is the concept, and how much its own capacity to memorise.

    Attributes:
        result: The probe on the concept.
        control: The same probe on the control task.
    """

    result: ProbeResult
    control: ControlResult

    @property
    def selectivity(self) -> float:
        """Accuracy minus mean control accuracy; near zero, the probe memorises as well as it reads."""
        return self.result.accuracy - self.control.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference (Newcombe 1998, hybrid score).

        The control's own interval is averaged over its runs, so more runs do not narrow it.
        """
        count = len(self.control.runs)
        below = sum(run.high - run.accuracy for run in self.control.runs) / count
        above = sum(run.accuracy - run.low for run in self.control.runs) / count
        low = math.hypot(self.result.accuracy - self.result.low, below)
        high = math.hypot(self.result.high - self.result.accuracy, above)
        return max(-1.0, self.selectivity - low), min(1.0, self.selectivity + high)

    def to_dict(self) -> dict[str, object]:
        """Return selectivity, interval and both results as JSON-ready values."""
        return {
            "selectivity": self.selectivity,
            "interval": list(self.interval),
            "result": self.result.to_dict(),
            "control": self.control.to_dict(),
        }

    def __str__(self) -> str:
        """Return one line for people."""
        low, high = self.interval
        return (
            f"selectivity {self.selectivity:.1%} [{low:.1%}, {high:.1%}]: accuracy "
            f"{self.result.accuracy:.1%}, {self.control.accuracy:.1%} on the control task"
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
    return _wilson(correct / n, n, normal)


def _wilson(rate: float, n: float, normal: float = _NORMAL_975) -> tuple[float, float]:
    square = normal**2 / n
    centre = (rate + square / 2) / (1 + square)
    half = normal / (1 + square) * math.sqrt(rate * (1 - rate) / n + square / (4 * n))
    low = 0.0 if rate == 0 else max(0.0, centre - half)
    return low, 1.0 if rate == 1 else min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Score:
    """What one test set contributes: counts per class, and hits and losses per vector."""

    found: Tensor
    total: Tensor
    correct: Tensor
    loss: Tensor | None
    constant_loss: float
    auc: float | None


def score_probe(fitted: FittedProbe, x: Tensor, index: Tensor, train_index: Tensor) -> Score:
    k = len(fitted.classes)
    correct = fitted.predict_index(x) == index
    rates = torch.bincount(train_index, minlength=k).double() / len(train_index)
    loss = None
    if fitted.has_probabilities:
        loss = -fitted.predict_log_proba(x).gather(1, index[:, None])[:, 0].cpu().double()
    auc = None
    if k == 2:
        scores = fitted.decision(x)
        auc = area_under_curve(scores[:, 1] - scores[:, 0], index == 1)
    return Score(
        found=torch.bincount(index[correct], minlength=k).cpu(),
        total=torch.bincount(index, minlength=k).cpu(),
        correct=correct.cpu().double(),
        loss=loss,
        constant_loss=-float(rates.log()[index].sum()),
        auc=auc,
    )


def area_under_curve(scores: Tensor, positive: Tensor) -> float | None:
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


def _variance_of_mean(values: Tensor, groups: Tensor | None) -> float:
    """Return the variance of the mean of ``[n]`` values that are independent between groups."""
    n = len(values)
    deviation = values - values.mean()
    if groups is not None:
        size = int(groups.max()) + 1
        deviation = deviation.new_zeros(size).index_add_(0, groups.cpu(), deviation)
        deviation = deviation[torch.bincount(groups.cpu(), minlength=size) > 0]
    count = len(deviation)
    return float(deviation.square().sum()) / n**2 * count / (count - 1) if count > 1 else math.inf


def mean_interval(values: Tensor, groups: Tensor | None) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % normal interval of the mean of ``[n]`` values; None when there is one group."""
    mean = float(values.mean())
    half = _NORMAL_975 * math.sqrt(_variance_of_mean(values, groups))
    return (mean - half, mean + half) if math.isfinite(half) else (None, None)


def _effective_count(correct: Tensor, groups: Tensor | None) -> float:
    """Return the number of independent vectors that would spread as much as these groups."""
    n, rate = len(correct), float(correct.mean())
    if groups is None:
        return float(n)
    variance = _variance_of_mean(correct, groups)
    if 0 < rate < 1 and variance > 0:
        return max(1.0, min(float(n), rate * (1 - rate) / variance))
    return float(len(torch.unique(groups)))


def _balanced_interval(found: Tensor, total: Tensor, share: float) -> tuple[float, float]:
    """Return the interval of a mean of rates, from the Wilson interval of each (Zou and Donner 2008).

    ``share`` is that of the vectors that count as independent.
    """
    rates = (found / total).tolist()
    ends = [
        _wilson(rate, max(1.0, share * n)) for rate, n in zip(rates, total.tolist(), strict=True)
    ]
    mean = sum(rates) / len(rates)
    below = math.hypot(*(rate - low for rate, (low, _) in zip(rates, ends, strict=True)))
    above = math.hypot(*(high - rate for rate, (_, high) in zip(rates, ends, strict=True)))
    return mean - below / len(rates), mean + above / len(rates)


def pool(scores: list[Score], groups: Tensor | None = None) -> ProbeResult:
    """Join the test sets; ``groups`` are those of their vectors in order."""
    found = torch.stack([score.found for score in scores]).sum(dim=0)
    total = torch.stack([score.total for score in scores]).sum(dim=0)
    n, hits = int(total.sum()), int(found.sum())
    present = total > 0
    areas = [score.auc for score in scores if score.auc is not None]
    count = _effective_count(torch.cat([score.correct for score in scores]), groups)
    low, high = _wilson(hits / n, count)
    balanced_low, balanced_high = _balanced_interval(found[present], total[present], count / n)
    losses = [score.loss for score in scores if score.loss is not None]
    loss: float | None = None
    loss_ends: tuple[float, float] | tuple[None, None] = (None, None)
    if len(losses) == len(scores):
        rows = torch.cat(losses)
        loss = float(rows.mean())
        low_loss, high_loss = mean_interval(rows, groups)
        if low_loss is not None and high_loss is not None:
            loss_ends = (max(0.0, low_loss), high_loss)
    return ProbeResult(
        accuracy=hits / n,
        balanced_accuracy=float((found[present] / total[present]).mean()),
        log_loss=loss,
        auc=sum(areas) / len(areas) if areas else None,
        majority=int(total.max()) / n,
        constant_log_loss=sum(score.constant_loss for score in scores) / n,
        low=low,
        high=high,
        n=n,
        folds=len(scores),
        log_loss_low=loss_ends[0],
        log_loss_high=loss_ends[1],
        groups=None if groups is None else len(torch.unique(groups)),
        balanced_low=balanced_low,
        balanced_high=balanced_high,
    )
