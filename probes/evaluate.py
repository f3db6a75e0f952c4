"""Measure how well a concept can be read: accuracy with its interval, log-loss, and baselines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.probes._data import (
    Label,
    Vectors,
    index_labels,
    read_groups,
    read_labels,
    read_vectors,
)
from concept_erasure.probes._fitted import FittedProbe, Probe, training_data
from concept_erasure.probes.centroid import CentroidProbe
from concept_erasure.probes.kernel import KernelProbe
from concept_erasure.probes.linear import LinearProbe
from concept_erasure.probes.mlp import MlpProbe
from concept_erasure.probes.svm import SvmProbe

__all__ = [
    "PROBES",
    "ControlResult",
    "ProbeResult",
    "SelectivityResult",
    "control",
    "cross_validate",
    "evaluate",
    "fresh_probe",
    "selectivity",
    "wilson_interval",
]

PROBES: Mapping[str, Callable[[int], Probe]] = MappingProxyType(
    {
        "linear": lambda seed: LinearProbe(),
        "svm": lambda seed: SvmProbe(),
        "mlp": lambda seed: MlpProbe(seed=seed),
        "centroid": lambda seed: CentroidProbe(),
        "kernel": lambda seed: KernelProbe(seed=seed),
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


def evaluate(
    x_train: Vectors,
    z_train: object,
    x_test: Vectors,
    z_test: object,
    *,
    probe: str | Probe = "linear",
    seed: int = 0,
    groups: tuple[object, object] | None = None,
) -> ProbeResult:
    """Fit a probe on one set and test it on another.

    Args:
        x_train: Vectors to fit on, shape ``[n, d]``.
        z_train: Their class labels, length ``n``.
        x_test: Vectors to test on, shape ``[m, d]``.
        z_test: Their labels, length ``m``; each must occur in ``z_train``.
        probe: A name in `PROBES`, or a configured probe.
        seed: For probes given by name; a configured probe has its own.
        groups: Group (such as the text) of each vector of the two sets, lengths ``n`` and ``m``; a group in
            both is refused, and the intervals are those of independent groups.

    Returns:
        The result on the test set.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If the data are not finite, a class is unknown, there is only one to learn, or a
            group is in both sets.
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
    train_groups, test_groups = two_groups(groups, len(matrix), len(test))
    fitted = fit_probe(make_probe(probe, seed), matrix, _labels(index, classes), train_groups)
    return _pool([_score(fitted, test, test_index, index)], test_groups)


def cross_validate(
    x: Vectors,
    z: object,
    *,
    probe: str | Probe = "linear",
    folds: int = 5,
    seed: int = 0,
    groups: object = None,
) -> ProbeResult:
    """Test a probe by stratified cross-validation: every vector is predicted once.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``; at least two examples per class.
        probe: A name in `PROBES`, or a configured probe.
        folds: Parts, 2 to ``n``. Higher trains on more data and takes longer.
        seed: Determines the parts, and a probe given by name.
        groups: Group (such as the text) of each vector, length ``n``; the vectors of one group stay in one
            part, and the intervals are those of independent groups.

    Returns:
        The result over all ``n`` predictions.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If the data are not finite, a class has fewer than two examples, there is only
            one class, a class is in one group only, or ``folds`` is out of range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> cross_validate(x, x[:, 0] > 0, folds=4).n
        40
    """
    matrix, index, classes = training_data(x, z)
    group = None if groups is None else read_groups(groups, n=len(matrix)).to(index.device)
    part = _folds(index, classes, folds, seed, group)
    model = make_probe(probe, seed)
    scores, order = [], []
    for fold in range(folds):
        test = part == fold
        rest = None if group is None else group[~test]
        fitted = fit_probe(model, matrix[~test], _labels(index[~test], classes), rest)
        scores.append(_score(fitted, matrix[test], index[test], index[~test]))
        order.append(test.nonzero().flatten())
    return _pool(scores, None if group is None else group[torch.cat(order)])


def control(
    x: Vectors,
    z: object,
    *,
    probe: str | Probe = "linear",
    folds: int = 5,
    seed: int = 0,
    n_permutations: int = 1,
    groups: object = None,
) -> ControlResult:
    """Cross-validate on shuffled labels: what the same probe finds where there is nothing.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``; they are permuted.
        probe: A name in `PROBES`, or a configured probe.
        folds: Parts of the cross-validation.
        seed: Determines the permutations and the parts.
        n_permutations: How many shuffles. Higher shows the spread and takes longer in proportion.
        groups: As in `cross_validate`. Labels that are one a group are permuted between groups.

    Returns:
        The results for the permuted labels; expect the majority rate.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: As `cross_validate`, or if ``n_permutations`` is below 1.
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}")
    matrix, index, classes = training_data(x, z)
    group = None if groups is None else read_groups(groups, n=len(matrix)).to(index.device)
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for i in range(n_permutations):
        shuffled = _labels(_permuted(index, group, generator), classes)
        runs.append(
            cross_validate(matrix, shuffled, probe=probe, folds=folds, seed=seed + i, groups=groups)
        )
    return ControlResult(tuple(runs))


def selectivity(
    x: Vectors,
    z: object,
    *,
    types: object = None,
    probe: str | Probe = "linear",
    folds: int = 5,
    seed: int = 0,
    n_controls: int = 1,
    groups: object = None,
) -> SelectivityResult:
    """Compare a probe's accuracy with its accuracy on a control task (Hewitt and Liang 2019).

    The control task gives every type (such as a word) one label, drawn from the labels of the concept. Only a
    probe that memorises the types can solve it.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``.
        types: Type of each vector, length ``n``: strings or integers; default: equal vectors are of one type.
            Where no type occurs twice there is nothing to memorise and the control is the majority rate.
        probe: A name in `PROBES`, or a configured probe.
        folds: Parts of both cross-validations.
        seed: Determines the parts, the control labels, and a probe given by name.
        n_controls: Control tasks to average over.
        groups: As in `cross_validate`.

    Returns:
        Both accuracies and their difference.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors, labels or types are of the wrong kind.
        ValueError: As `cross_validate`, if ``n_controls`` is below 1, or there are too few types for a
            control task with two classes.

    Reference:
        Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", arXiv:1909.03368.
    """
    if n_controls < 1:
        raise ValueError(f"n_controls must be at least 1, got {n_controls}")
    matrix, index, classes = training_data(x, z)
    if types is None:
        kind = torch.unique(matrix, dim=0, return_inverse=True)[1]
    else:
        kind = read_groups(types, n=len(matrix)).to(index.device)
    result = cross_validate(matrix, z, probe=probe, folds=folds, seed=seed, groups=groups)
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for i in range(n_controls):
        labels = _labels(_control_task(index, kind, generator), classes)
        runs.append(
            cross_validate(matrix, labels, probe=probe, folds=folds, seed=seed + i, groups=groups)
        )
    return SelectivityResult(result, ControlResult(tuple(runs)))


def _control_task(index: Tensor, kind: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label for each type; every label that occurs does so at least twice."""
    count = int(kind.max()) + 1
    for _ in range(100):
        drawn = torch.randint(len(index), (count,), generator=generator).to(index.device)
        labels = index[drawn][kind]
        sizes = torch.bincount(labels)
        sizes = sizes[sizes > 0]
        if len(sizes) > 1 and int(sizes.min()) > 1:
            return labels
    raise ValueError(
        f"no control task has two classes with two vectors each, got {count} types of "
        f"{len(index)} vectors; types must be finer than the classes, such as words"
    )


def fresh_probe(
    eraser: Callable[[Tensor], Tensor],
    x_train: Vectors,
    z_train: object,
    x_test: Vectors,
    z_test: object,
    *,
    probe: str | Probe = "linear",
    seed: int = 0,
    groups: tuple[object, object] | None = None,
) -> ProbeResult:
    """Train a fresh probe on erased vectors the eraser never saw: the number to report.

    On the rows an eraser was fitted on, a guarded concept is gone by construction; what it leaves in others
    only shows to a probe that is itself trained on others. Neither set may hold rows of the eraser's fit.

    Args:
        eraser: A fitted eraser, or any map ``[n, d] -> [n, d]``.
        x_train: Vectors to train the probe on, before erasure, shape ``[n, d]``.
        z_train: Their class labels, length ``n``.
        x_test: Vectors to test the probe on, before erasure, shape ``[m, d]``.
        z_test: Their labels, length ``m``; each must occur in ``z_train``.
        probe: A name in `PROBES`, or a configured probe.
        seed: For probes given by name.
        groups: As in `evaluate`.

    Returns:
        The result on the test set, with the 95 % intervals of accuracy and log-loss.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind, or the eraser needs labels when it erases:
            what its output tells of them is not a leak of the vectors.
        ValueError: As `evaluate`.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> z = x[:, 0] > 0
        >>> result = fresh_probe(lambda x: 0 * x, x[::2], z[::2], x[1::2], z[1::2])
        >>> result.beats_majority
        False
    """
    required = required_inputs(eraser)
    if len(required) > 1:
        raise TypeError(
            f"the eraser needs {', '.join(required)} when it erases, so what a probe reads from its output may "
            "be the labels that went in; probe an eraser that takes vectors only"
        )
    with torch.no_grad():
        train, test = (
            eraser(read_vectors(x, name=name))
            for x, name in ((x_train, "x_train"), (x_test, "x_test"))
        )
    return evaluate(train, z_train, test, z_test, probe=probe, seed=seed, groups=groups)


def required_inputs(eraser: Callable[..., object]) -> list[str]:
    """Return the names of the arguments a call of an eraser cannot do without."""
    try:
        parameters = inspect.signature(eraser).parameters.values()
    except ValueError:  # built-in functions do not tell
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def _permuted(index: Tensor, group: Tensor | None, generator: torch.Generator) -> Tensor:
    """Permute labels between vectors, or between groups when each has one label."""
    if group is None:
        return index[torch.randperm(len(index), generator=generator).to(index.device)]
    labels = index.new_zeros(int(group.max()) + 1)
    labels[group] = index
    if not bool((labels[group] == index).all()):
        return _permuted(index, None, generator)
    return labels[torch.randperm(len(labels), generator=generator).to(index.device)][group]


def two_groups(
    groups: tuple[object, object] | None, n: int, m: int
) -> tuple[Tensor | None, Tensor | None]:
    """Number the groups of two sets, and refuse one that is in both."""
    if groups is None:
        return None, None
    names = [read_labels(g, n=size, name="groups") for g, size in zip(groups, (n, m), strict=True)]
    both = sorted(map(str, set(names[0]) & set(names[1])))
    if both:
        raise ValueError(
            f"{len(both)} groups are in the training and in the test set, such as {both[0]!r}; "
            "split by group"
        )
    train, test = (read_groups(g, n=len(g)) for g in names)
    return train, test


def fit_probe(model: Probe, x: Tensor, z: list[Label], groups: Tensor | None) -> FittedProbe:
    """Fit; a probe that splits its data is told the groups."""
    fit: Callable[..., FittedProbe] = model.fit
    if groups is not None and "groups" in inspect.signature(fit).parameters:
        return fit(x, z, groups=groups)
    return fit(x, z)


def make_probe(probe: str | Probe, seed: int) -> Probe:
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


def _folds(
    index: Tensor,
    classes: tuple[Label, ...],
    folds: int,
    seed: int,
    group: Tensor | None = None,
) -> Tensor:
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
    if group is not None:
        return _group_folds(index, classes, folds, group, generator)
    shuffled = torch.randperm(len(index), generator=generator).to(index.device)
    order = shuffled[index[shuffled].argsort(stable=True)]
    part = torch.empty_like(index)
    part[order] = torch.arange(len(index), device=index.device) % folds
    return part


def _group_folds(
    index: Tensor,
    classes: tuple[Label, ...],
    folds: int,
    group: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Deal whole groups out, the largest first, each to the part that holds least of its classes."""
    counts = torch.zeros(int(group.max()) + 1, len(classes), dtype=torch.float64)
    ones = torch.ones(len(index), dtype=torch.float64)
    counts.index_put_((group.cpu(), index.cpu()), ones, accumulate=True)
    if len(counts) < folds:
        raise ValueError(f"{folds} folds need as many groups, got {len(counts)}; lower folds")
    total = counts.sum(dim=0)
    order = torch.randperm(len(counts), generator=generator)
    order = order[counts[order].sum(dim=1).argsort(descending=True, stable=True)]
    held = torch.zeros(folds, len(classes), dtype=torch.float64)
    part = torch.zeros(len(counts), dtype=torch.int64)
    for g in order.tolist():
        crowding = (held / total) @ (counts[g] / total) + 1e-6 * held.sum(dim=1) / len(index)
        whole = ((held + counts[g]) >= total).any(dim=1)  # the others could not learn this class
        part[g] = int((crowding + 1e3 * whole).argmin())
        held[part[g]] += counts[g]
    for i, name in enumerate(classes):
        if bool((held[:, i] >= total[i]).any()):
            raise ValueError(
                f"class {name!r} is in {int((counts[:, i] > 0).sum())} groups and fills one part, so that "
                "nothing is left to learn it from; add groups, or drop the class"
            )
    if bool((held.sum(dim=1) == 0).any()):
        raise ValueError(f"{folds} folds leave one without vectors; lower folds")
    return part.to(group.device)[group]


@dataclass(frozen=True, slots=True)
class _Score:
    """What one test set contributes: counts per class, and hits and losses per vector."""

    found: Tensor
    total: Tensor
    correct: Tensor
    loss: Tensor | None
    constant_loss: float
    auc: float | None


def _score(fitted: FittedProbe, x: Tensor, index: Tensor, train_index: Tensor) -> _Score:
    k = len(fitted.classes)
    correct = fitted.predict_index(x) == index
    rates = torch.bincount(train_index, minlength=k).double() / len(train_index)
    loss = None
    if fitted.has_probabilities:
        loss = -fitted.predict_log_proba(x).gather(1, index[:, None])[:, 0].cpu().double()
    auc = None
    if k == 2:
        scores = fitted.decision(x)
        auc = _auc(scores[:, 1] - scores[:, 0], index == 1)
    return _Score(
        found=torch.bincount(index[correct], minlength=k).cpu(),
        total=torch.bincount(index, minlength=k).cpu(),
        correct=correct.cpu().double(),
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


def _pool(scores: list[_Score], groups: Tensor | None = None) -> ProbeResult:
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
