"""Compare methods on one set of vectors: what fresh probes still read, against the size of the edit.

Every method is fitted on one part of the rows; fresh probes are trained on a second part after
erasure and tested on a third. No row of a probe was seen by the eraser.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from concept_erasure import registry
from concept_erasure.collect import take
from concept_erasure.errors import ConceptErasureError, ShapeError
from concept_erasure.evals.plots import plot_tradeoff
from concept_erasure.probes import PROBES, Probe, ProbeResult, Vectors, evaluate
from concept_erasure.probes._data import index_labels, read_groups, read_labels, read_vectors
from concept_erasure.probes.evaluate import required_inputs
from concept_erasure.probes.mlp import split_classes
from concept_erasure.report import Cell, Interval, Report

__all__ = ["BASELINE", "Comparison", "Measured", "compare"]

BASELINE = "none"
"""The row of the vectors as they are."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What became of one method.

    Attributes:
        method: Its name in the registry, or `BASELINE`.
        status: ``"measured"``, or why it was not.
        edit: ``E|x' - x|^2 / tr Sigma`` on the rows held out from the fit; None when not measured.
        seconds: CPU seconds of the fit.
        probes: Probe to result on the test part.
        eraser: The fitted eraser; None for `BASELINE` and when not measured.
    """

    method: str
    status: str = "measured"
    edit: float | None = None
    seconds: float | None = None
    probes: Mapping[str, ProbeResult]
    eraser: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the method was measured."""
        return self.status == "measured"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The sweep over methods.

    Attributes:
        rows: One a method in the order asked for, the vectors as they are first.
        classes: Number of classes.
        sizes: Rows of the fit, of the probes' training, and of their test.
        seed: Of the split and of whatever a method or probe draws.
    """

    rows: tuple[Measured, ...]
    classes: int
    sizes: tuple[int, int, int]
    seed: int

    def to_report(self, *, title: str = "Methods compared", meta: Mapping[str, object]) -> Report:
        """Return the table.

        Args:
            title: Heading.
            meta: What else is to be known of the numbers: the data, the versions.
        """
        fit, train, test = self.sizes
        notes = [
            "The eraser is fitted on one part; fresh probes are trained on a second part, erased, and tested on "
            "a third. Brackets are 95 % intervals on the test part.",
            "Edit is E|x' - x|^2 / tr Sigma on the rows held out from the fit. Seconds are CPU seconds of the fit.",
            "Balanced accuracy is the mean over the classes of the share found; a probe that reads nothing has "
            f"{1 / self.classes:.3f}. Bits are the test log-loss of the training class frequencies minus that of "
            "the probe: negative for a probe that overfits, which may still read something.",
        ]
        notes += [f"{row.method}: {row.status}." for row in self.rows if not row.ok]
        record = {"rows": {"fit": fit, "probe": train, "test": test}, "seed": self.seed, **meta}
        return Report(title, [_cells(row) for row in self.rows], record, notes)

    def leaks(self) -> dict[str, dict[str, Interval]]:
        """Return probe to method to balanced accuracy."""
        found: dict[str, dict[str, Interval]] = {}
        for row in self.rows:
            for probe, result in row.probes.items():
                found.setdefault(probe, {})[row.method] = _balanced(result)
        return found

    def plot(self, path: str | Path, *, title: str = "") -> Path:
        """Draw leak against size of edit.

        Args:
            path: Where the picture goes; the ending says the format.
            title: Heading.

        Raises:
            ImportError: If matplotlib is absent.
        """
        edits = {row.method: row.edit for row in self.rows if row.edit is not None}
        return plot_tradeoff(
            self.leaks(),
            edits,
            path,
            chance=1 / self.classes,
            title=title,
            leak_label="balanced accuracy of a fresh probe",
        )

    def save(
        self, folder: str | Path, *, title: str = "Methods compared", meta: Mapping[str, object]
    ) -> Report:
        """Write ``compare.json``, ``compare.md`` and ``compare.png`` into a folder; return the report.

        Raises:
            ImportError: If matplotlib is absent.
        """
        picture = self.plot(Path(folder) / "compare.png", title=title)
        report = replace(
            self.to_report(title=title, meta=meta),
            images={"Leak against size of edit": picture.name},
        )
        report.save(folder, name="compare")
        return report


def compare(
    x: Vectors,
    z: object,
    methods: Sequence[str],
    *,
    y: object = None,
    probes: Sequence[str] | Mapping[str, Probe] = ("linear", "kernel", "mlp"),
    options: Mapping[str, Mapping[str, object]] | None = None,
    fit_share: float = 0.5,
    test_share: float = 0.2,
    groups: object = None,
    seed: int = 0,
) -> Comparison:
    """Fit methods on one part of the vectors and probe what they leave in the rest.

    A method that needs labels when it erases, or a task when none is given, is listed as not applicable; one
    that refuses the data is listed with its reason. The sweep goes on.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``.
        methods: Names in the registry.
        y: Labels of a task to keep, length ``n``, for methods that keep one.
        probes: Names in `PROBES`, or name to configured probe.
        options: Method to keyword arguments of its ``fit``.
        fit_share: Share of each class on which erasers are fitted.
        test_share: Share on which probes are tested; they are trained on what is left.
        groups: Group (such as the text) of each vector, length ``n``; a group is in one part only.
        seed: Determines the parts and whatever a method or probe draws.

    Returns:
        One row a method.

    Raises:
        KeyError: If a method is unknown.
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If the data are not finite, there is one class, a share is out of range, methods or
            probes are unknown, repeated or absent, or no method could be measured.

    Example:
        >>> import torch
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> sweep = compare(x, x[:, 0] > 0, ["leace", "oracle"], probes=["linear"])
        >>> [(row.method, row.ok) for row in sweep.rows]
        [('none', True), ('leace', True), ('oracle', False)]
    """
    entries = [registry.get(name) for name in _unique(methods, "methods")]
    found = _probes(probes)
    chosen = {name: dict(values) for name, values in (options or {}).items()}
    if unknown := sorted(set(chosen) - set(methods)):
        raise ValueError(f"options for {unknown}, which are not among the methods {list(methods)}")
    matrix = read_vectors(x)
    n = len(matrix)
    labels = read_labels(z, n=n)
    if y is not None and len(cast("Any", y)) != n:
        raise ShapeError(
            f"got {n} vectors and {len(cast('Any', y))} task labels; give one a vector"
        )
    parts = _parts(labels, fit_share, test_share, groups, seed, matrix.device)
    sizes = (len(parts[0]), len(parts[1]), len(parts[2]))
    data = _Data(matrix, labels, None if y is None else take(cast("Any", y), parts[0]), parts)
    rows = [data.measure(BASELINE, lambda x: x, 0.0, found, seed)]
    for entry in entries:
        rows.append(_sweep(entry, data, chosen.get(entry.name, {}), found, seed))
    failed = [row for row in rows[1:] if not row.ok]
    if len(failed) == len(entries):
        reasons = "; ".join(f"{row.method}: {row.status}" for row in failed)
        raise ValueError(f"no method could be measured: {reasons}")
    return Comparison(rows=tuple(rows), classes=len(set(labels)), sizes=sizes, seed=seed)


@dataclass(frozen=True)
class _Data:
    """Vectors, labels, the task's labels of the fit, and the rows of the three parts."""

    x: Tensor
    z: Sequence[Any]
    y: object
    parts: tuple[Tensor, Tensor, Tensor]

    def labels(self, part: int) -> list[Any]:
        return [self.z[i] for i in self.parts[part].tolist()]

    def measure(
        self,
        method: str,
        eraser: Callable[[Tensor], Tensor],
        seconds: float,
        probes: Mapping[str, str | Probe],
        seed: int,
    ) -> Measured:
        """Erase the held-out rows and probe them afresh."""
        train, test = (self.x[self.parts[i]] for i in (1, 2))
        with torch.no_grad():
            erased_train, erased_test = eraser(train), eraser(test)
        before, after = torch.cat([train, test]), torch.cat([erased_train, erased_test]).to(train)
        variance = (before - before.mean(dim=0)).square().sum()
        edit = float((after - before).square().sum() / variance) if variance > 0 else 0.0
        results = {
            name: evaluate(
                erased_train, self.labels(1), erased_test, self.labels(2), probe=probe, seed=seed
            )
            for name, probe in probes.items()
        }
        return Measured(method=method, edit=edit, seconds=seconds, probes=results)


def _sweep(
    entry: registry.Method,
    data: _Data,
    options: Mapping[str, object],
    probes: Mapping[str, str | Probe],
    seed: int,
) -> Measured:
    """Fit and measure one method, or say why not."""
    reason, fit = _applicable(entry, data.y is not None)
    if fit is None:
        return Measured(method=entry.name, status=f"not applicable: {reason}", probes={})
    given: dict[str, object] = {**entry.options, **options}
    known = inspect.signature(fit).parameters
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"method {entry.name!r} has no option {', '.join(unknown)}")
    if "y" in known and data.y is not None:
        given["y"] = data.y
    if "seed" in known:
        given.setdefault("seed", seed)
    try:
        start = time.process_time()
        eraser = fit(data.x[data.parts[0]], data.labels(0), **given)
        seconds = time.process_time() - start
        return replace(data.measure(entry.name, eraser, seconds, probes, seed), eraser=eraser)
    except (ConceptErasureError, ValueError) as error:
        text = " ".join(str(error).split())
        return Measured(method=entry.name, status=f"failed: {text}", probes={})


def _applicable(entry: registry.Method, has_task: bool) -> tuple[str, Callable[..., Any] | None]:
    """Return the method's ``fit``, or why it cannot take part."""
    if "needs_labels" in entry.guarantees:
        return "it needs the labels when it erases, so its output tells them or not by design", None
    kind = entry.load()
    fit = getattr(kind, "fit", None)
    call = getattr(kind, "__call__", None)  # noqa: B004  # a class is callable; its instances are asked about
    if fit is None or call is None or len(required_inputs(call)) > 2:
        return "it has no fit on vectors and labels, or no map on vectors", None
    parameters = inspect.signature(fit).parameters
    if "y" in parameters and not has_task:
        return "it keeps a task, and no task labels were given", None
    lacking = [
        name
        for name in required_inputs(fit)
        if name not in ("x", "z", "y") and name not in entry.options
    ]
    if lacking or "x" not in parameters or "z" not in parameters:
        return "its fit takes more than vectors and labels", None
    return "", fit


def _parts(
    labels: Sequence[Any],
    fit_share: float,
    test_share: float,
    groups: object,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows for the fit, the probes' training and their test; classes spread evenly."""
    if not (fit_share > 0 and test_share > 0 and fit_share + test_share < 1):
        raise ValueError(
            f"fit_share and test_share must be positive and leave rows to train probes on, got {fit_share} and "
            f"{test_share}; try 0.5 and 0.2"
        )
    index, classes = index_labels(labels, None, device=device)
    counts = torch.bincount(index)
    if int(counts.min()) < 3:
        raise ValueError(
            f"class {classes[int(counts.argmin())]!r} has {int(counts.min())} vectors and three parts are "
            "needed; add vectors or drop the class"
        )
    group = None if groups is None else read_groups(groups, n=len(index)).to(device)
    generator = torch.Generator().manual_seed(seed)
    rest, fit = split_classes(index, fit_share, generator, group)
    within = None if group is None else torch.unique(group[rest], return_inverse=True)[1]
    train, test = split_classes(index[rest], test_share / (1 - fit_share), generator, within)
    return fit, rest[train], rest[test]


def _unique(names: Sequence[str], what: str) -> list[str]:
    """Return the names; refuse none, or one twice."""
    if isinstance(names, str):
        raise ValueError(f"{what} must be a sequence of names, got the text {names!r}")
    if not names:
        raise ValueError(f"no {what}; name at least one")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{what} are named twice: {', '.join(twice)}")
    return list(names)


def _probes(probes: Sequence[str] | Mapping[str, Probe]) -> dict[str, str | Probe]:
    if isinstance(probes, Mapping):
        return dict(probes)
    for name in _unique(probes, "probes"):
        if name not in PROBES:
            raise ValueError(f"unknown probe {name!r}; the probes are {', '.join(sorted(PROBES))}")
    return {name: name for name in probes}


def _balanced(result: ProbeResult) -> Interval:
    value = result.balanced_accuracy
    low = value if result.balanced_low is None else result.balanced_low
    high = value if result.balanced_high is None else result.balanced_high
    return Interval(value, low, high)


def _cells(row: Measured) -> dict[str, Cell]:
    """Return a row of the table."""
    cells: dict[str, Cell] = {"method": row.method, "edit": row.edit, "CPU seconds": row.seconds}
    for name, result in row.probes.items():
        cells["majority"] = result.majority
        cells[f"{name} accuracy"] = Interval(result.accuracy, result.low, result.high)
        cells[f"{name} balanced"] = _balanced(result)
        if result.log_loss is not None:
            gain = result.constant_log_loss - result.log_loss
            cells[f"{name} bits"] = gain / math.log(2)
    cells["status"] = row.status.partition(":")[0]
    return cells
