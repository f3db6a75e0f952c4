"""Measure how well a concept can be read: accuracy with its interval, log-loss, and baselines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
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
from concept_erasure.probes._results import (
    ControlResult,
    ProbeResult,
    SelectivityResult,
    pool,
    score_probe,
    wilson_interval,
)
from concept_erasure.probes._results import mean_interval as mean_interval
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
    return pool([score_probe(fitted, test, test_index, index)], test_groups)


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
        scores.append(score_probe(fitted, matrix[test], index[test], index[~test]))
        order.append(test.nonzero().flatten())
    return pool(scores, None if group is None else group[torch.cat(order)])


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
    drawn = (_labels(_permuted(index, group, generator), classes) for _ in range(n_permutations))
    return _control_runs(matrix, drawn, probe=probe, folds=folds, seed=seed, groups=groups)


def _control_runs(
    x: Tensor,
    labels: Iterable[list[Label]],
    *,
    probe: str | Probe,
    folds: int,
    seed: int,
    groups: object,
) -> ControlResult:
    """Cross-validate once for each labelling, each time in other parts."""
    return ControlResult(
        tuple(
            cross_validate(x, z, probe=probe, folds=folds, seed=seed + i, groups=groups)
            for i, z in enumerate(labels)
        )
    )


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
    drawn = (_labels(_control_task(index, kind, generator), classes) for _ in range(n_controls))
    runs = _control_runs(matrix, drawn, probe=probe, folds=folds, seed=seed, groups=groups)
    return SelectivityResult(result, runs)


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
