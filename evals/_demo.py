"""What the two halves of the demo share: texts, labels, reading and probing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from concept_erasure.evals.texts import CUES, SPLITS, GenderText, Split, gender_texts
from concept_erasure.probes import LinearProbe, Probe, SvmProbe, evaluate
from concept_erasure.report import Cell, Interval

__all__ = [
    "PROBES",
    "Bars",
    "Data",
    "Sizes",
    "familiar_data",
    "probe_interval",
    "probe_rows",
    "read_data",
]

PROBES = ("linear", "svm", "mlp")
# A gradient of 1e-6 decides every accuracy here; the default asks for more.
_CONVERGED: dict[str, Probe] = {"linear": LinearProbe(tol=1e-6), "svm": SvmProbe(tol=1e-6)}


class Sizes(Protocol):
    """The part of the demo's configuration that both halves read."""

    @property
    def n_fit(self) -> int: ...
    @property
    def n_probe(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Bars(Protocol):
    """Shows progress."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], object]]: ...


@dataclass(frozen=True)
class Data:
    """The texts of a split, short ones first so that batches need little padding.

    Attributes:
        items: The texts with what is known about them.
    """

    items: tuple[GenderText, ...]

    @property
    def texts(self) -> list[str]:
        """The words alone."""
        return [item.text for item in self.items]

    @property
    def gender(self) -> Tensor:
        """0 feminine, 1 masculine, shape ``[n]``, int64."""
        return torch.tensor([item.gender for item in self.items])

    @property
    def concept(self) -> Tensor:
        """Gender within each cue, shape ``[n, cues]``, float64.

        Column j is +1 or -1 where cue j says the gender and 0 elsewhere, so that the eraser removes
        gender however it was said, not only on average over the ways of saying it.
        """
        names = list(CUES)
        columns = torch.zeros(len(self.items), len(names), dtype=torch.float64)
        for row, item in enumerate(self.items):
            columns[row, names.index(item.cue)] = 2.0 * item.gender - 1.0
        return columns

    @property
    def detailed_concept(self) -> Tensor:
        """Gender within each template, shape ``[n, templates]``, float64; more columns, more removed."""
        names = sorted({item.template for item in self.items})
        columns = torch.zeros(len(self.items), len(names), dtype=torch.float64)
        for row, item in enumerate(self.items):
            columns[row, names.index(item.template)] = 2.0 * item.gender - 1.0
        return columns


def read_data(sizes: Sizes) -> dict[Split, Data]:
    """Return the three splits."""
    counts = dict(zip(SPLITS, (sizes.n_fit, sizes.n_probe, sizes.n_test), strict=True))
    found = {s: gender_texts(s, n, seed=sizes.seed) for s, n in counts.items()}
    return {s: Data(tuple(sorted(items, key=lambda t: len(t.text)))) for s, items in found.items()}


def familiar_data(sizes: Sizes) -> Data:
    """Return ``n_probe + n_test`` texts in random order from the templates of the fit, none of its texts.

    Professions of the fit too, and at its odds: the same distribution.
    """
    count = sizes.n_fit + sizes.n_probe + sizes.n_test
    known = {item.text for item in gender_texts("fit", sizes.n_fit, seed=sizes.seed)}
    drawn = gender_texts("fit", count, seed=sizes.seed + 1)
    fresh = [item for item in drawn if item.text not in known]
    return Data(tuple(fresh[: sizes.n_probe + sizes.n_test]))


def probe_interval(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], probe: str, seed: int
) -> Interval:
    """Return the accuracy of a freshly trained probe on other texts, with its 95 % interval."""
    chosen: str | Probe = _CONVERGED.get(probe, probe)
    result = evaluate(*train, *test, probe=chosen, seed=seed)
    return Interval(result.accuracy, result.low, result.high)


def probe_rows(
    versions: Mapping[str, tuple[Tensor, Tensor]],
    train: Tensor,
    test: Tensor,
    seed: int,
    *,
    probes: Sequence[str] = PROBES,
) -> list[dict[str, Cell]]:
    """Return one row a probe, with a column for each version of the vectors.

    Args:
        versions: Name, such as before and after, to the vectors to train and to test on.
        train: Labels of the first, shape ``[n]``.
        test: Labels of the second, shape ``[m]``.
        seed: Of the probes.
        probes: Names of probes.
    """
    return [
        {
            "probe": probe,
            **{
                name: probe_interval((x.float(), train), (y.float(), test), probe, seed)
                for name, (x, y) in versions.items()
            },
        }
        for probe in probes
    ]
