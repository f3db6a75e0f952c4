"""SAEBench's erasure metrics for any eraser: targeted probe perturbation (TPP) and spurious correlation removal (SCR).

TPP asks whether erasing one class of several leaves the others readable. With m classes, one-vs-rest probes trained on
vectors as they are, A_j the accuracy of probe j on held-out vectors and A_ij that after the eraser of class i::

    TPP = mean_i [ (A_i - A_ii) - mean_{j != i} (A_j - A_ij) ]

SCR asks whether erasing an unwanted attribute turns a probe that was trained where the two coincide back to the wanted
one::

    SCR = (acc_erased - acc_before) / (acc_oracle - acc_before)

on balanced vectors, with the accuracy of a probe trained on balanced ones as the oracle; 0 if the denominator is below
0.001. Both directions are computed; the reported one is that whose accuracy before is lower.

Source: Karvonen et al. 2024, arXiv:2411.18895 (SAEBench). Deviations: an eraser fitted on class i stands in place of
"the N latents of class i set to zero", so that linear methods, sparse features and edits of weights share one measure;
chance is 1/2 for every probe, since accuracies are balanced over both sides (the benchmark samples balanced texts); a
probe is the library's `LinearProbe`. An audit of the benchmark (arXiv:2605.18229) finds both measures unreliable at
their usual settings: run several seeds, look at the deviations, and prefer what is measured at the end task.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from concept_erasure import registry
from concept_erasure.collect import check_texts, select
from concept_erasure.errors import ShapeError
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.probes import FittedProbe, LinearProbe, Probe
from concept_erasure.report import Cell, Interval
from concept_erasure.sae._places import one_site
from concept_erasure.sae._reading import read
from concept_erasure.sae.activations import special_ids

__all__ = ["Erase", "Scr", "Tpp", "by_method", "in_model", "scr", "tpp"]

Change = Callable[[Tensor], Tensor]
"""From vectors of held-out rows to what an eraser makes of them."""
_SMALL = 1e-3


class Erase(Protocol):
    """Fit an eraser for one split: from training vectors ``(n, d)`` and labels ``(n,)`` bool to a `Change`."""

    def __call__(self, x: Tensor, z: Tensor, *, target: int, seed: int) -> Change:
        """Return what the eraser does to held-out vectors.

        Args:
            x: Training vectors.
            z: Whether each is of the class, or has the attribute, to be erased.
            target: Number of the class (0 and 1 for the attributes of `scr`).
            seed: Of the run.
        """
        ...


@dataclass(frozen=True)
class _OverSeeds:
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Tpp(_OverSeeds):
    """TPP over seeds.

    Attributes:
        scores: Of each seed.
        intended: Fall of the probe of the erased class, of each seed.
        unintended: Mean fall of the other probes, of each seed.
        before: Mean accuracy of the probes without erasure, of each seed.
        per_class: Score of each class, averaged over seeds.
    """

    intended: tuple[float, ...]
    unintended: tuple[float, ...]
    before: tuple[float, ...]
    per_class: tuple[float, ...]

    def to_dict(self) -> dict[str, Cell]:
        """Return a row for a `Report`."""
        return {
            "TPP": _interval(self.scores), "intended": _interval(self.intended),
            "unintended": _interval(self.unintended), "accuracy before": _interval(self.before),
            "seeds": len(self.scores), "deviation": self.deviation,
        }  # fmt: skip


@dataclass(frozen=True)
class Scr(_OverSeeds):
    """SCR over seeds.

    Attributes:
        scores: Of each seed, in the direction that is reported.
        before: Accuracy of the biased probe on the wanted attribute, of each seed.
        after: The same after erasure.
        oracle: Accuracy of the clean probe.
        other: Score of the other direction, of each seed.
        direction: Which attribute is the wanted one, of each seed: 0 for the first.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    oracle: tuple[float, ...]
    other: tuple[float, ...]
    direction: tuple[int, ...]

    def to_dict(self) -> dict[str, Cell]:
        """Return a row for a `Report`."""
        return {
            "SCR": _interval(self.scores), "before": _interval(self.before), "after": _interval(self.after),
            "oracle": _interval(self.oracle), "other direction": _interval(self.other),
            "seeds": len(self.scores), "deviation": self.deviation,
        }  # fmt: skip


def _interval(values: Sequence[float]) -> Cell:
    return Interval.of_mean(list(values)) if len(values) > 1 else values[0]


def by_method(name: str, *, options: Mapping[str, Any] | None = None) -> Erase:
    """Return an `Erase` that fits a registered method on vectors.

    Args:
        name: Of a method whose ``fit`` takes vectors and labels.
        options: Of its fit; a method that draws takes the seed of the run unless they hold one.

    Raises:
        ValueError: If the method edits models; see `in_model`.
    """
    entry = registry.get(name)
    if entry.family != "linear" or "needs_labels" in entry.guarantees:
        raise ValueError(
            f"{name!r} has no map on vectors without labels; apply it to the model and use in_model()"
        )
    fit = cast("Callable[..., Change]", entry.load().fit)  # type: ignore[attr-defined]
    given = {**entry.options, **(options or {})}
    draws = "seed" in inspect.signature(fit).parameters

    def erase(x: Tensor, z: Tensor, *, target: int, seed: int) -> Change:
        return fit(x, z, **({"seed": seed} if draws else {}) | given)

    return erase


def _split(count: int, strata: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows for training and testing, with the same share of every stratum in both."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    train: list[Tensor] = []
    test: list[Tensor] = []
    for value in strata.unique():
        rows = order[strata[order] == value]
        cut = round(share * len(rows))
        if not 0 < cut < len(rows):
            raise ValueError(f"{len(rows)} rows of one kind are too few to train and to test on")
        train.append(rows[:cut])
        test.append(rows[cut:])
    return torch.cat(train), torch.cat(test)


def _balanced(probe: FittedProbe, x: Tensor, z: Tensor) -> float:
    """Return the mean of the accuracies on either side."""
    right = torch.tensor([bool(one) for one in probe.predict(x)]) == z
    return float((right[z].double().mean() + right[~z].double().mean()) / 2)


def _check(x: Tensor, labels: Sequence[Tensor]) -> None:
    if x.ndim != 2:
        raise ShapeError(f"x must have shape (n, d); got {tuple(x.shape)}")
    for one in labels:
        if tuple(one.shape) != (len(x),):
            raise ShapeError(f"labels must have shape ({len(x)},) like x; got {tuple(one.shape)}")


def _changed(
    x: Tensor, erase: Erase | None, erased: Mapping[int, Tensor] | None, targets: Iterable[int]
) -> Callable[[Tensor, Tensor, Tensor, int, int], Tensor]:
    """Return the function from training rows, test rows, labels, target and seed to the test rows after erasure."""
    if (erase is None) == (erased is None):
        raise ValueError(
            "give either erase, which is fitted on vectors, or erased, the vectors behind an edited model"
        )
    if erased is not None:
        known = erased
        for one in targets:
            if one not in known:
                raise ValueError(f"erased has no vectors for {one}; there are {sorted(known)}")
            if known[one].shape != x.shape:
                raise ShapeError(
                    f"erased[{one}] must have shape {tuple(x.shape)} like x; got {tuple(known[one].shape)}"
                )
        return lambda train, test, z, target, seed: known[target][test]
    fit = cast("Erase", erase)
    return lambda train, test, z, target, seed: fit(x[train], z[train], target=target, seed=seed)(
        x[test]
    )


def tpp(
    x: Tensor,
    z: Tensor,
    erase: Erase | None = None,
    *,
    erased: Mapping[int, Tensor] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    share: float = 0.7,
    probe: Probe | None = None,
) -> Tpp:
    """Measure TPP over seeds; a seed draws the split.

    Args:
        x: Vectors, shape ``(n, d)``.
        z: Classes, shape ``(n,)`` int64, three or more.
        erase: Fits the eraser of a class on training vectors, see `by_method`.
        erased: In its place, class to the vectors of the same rows after erasure, where an eraser changes the model
            (see `in_model`). Fit such an eraser on other texts: test rows it was fitted on are not held out.
        seeds: Of the splits.
        share: Of the rows, for training.
        probe: Default `LinearProbe`, L2 as chosen by itself.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If there are fewer than three classes, too few rows of one, none of it after erasure, or not one of
            `erase` and `erased`.
    """
    _check(x, [z])
    classes = [int(one) for one in z.unique()]
    if len(classes) < 3:
        raise ValueError(
            f"TPP needs three classes or more, to see what else changes; got {len(classes)}"
        )
    changed = _changed(x, erase, erased, classes)
    probe = probe or LinearProbe()
    falls: list[list[list[float]]] = []
    before: list[float] = []
    for seed in seeds:
        train, test = _split(len(x), z, share, seed)
        fitted = [probe.fit(x[train], (z[train] == one).tolist()) for one in classes]
        clean = [_balanced(p, x[test], z[test] == c) for p, c in zip(fitted, classes, strict=True)]
        before.append(statistics.fmean(clean))
        rows = []
        for one in classes:
            seen = changed(train, test, z == one, one, seed)
            after = [_balanced(p, seen, z[test] == c) for p, c in zip(fitted, classes, strict=True)]
            rows.append([a - b for a, b in zip(clean, after, strict=True)])
        falls.append(rows)
    return _tpp(torch.tensor(falls), before)


def _tpp(falls: Tensor, before: Sequence[float]) -> Tpp:
    """Return TPP of falls ``(seeds, erased class, probe)``."""
    own = falls.diagonal(dim1=1, dim2=2)
    others = (falls.sum(2) - own) / (falls.shape[2] - 1)
    each = own - others
    return Tpp(
        tuple(each.mean(1).tolist()), tuple(own.mean(1).tolist()), tuple(others.mean(1).tolist()), tuple(before),
        tuple(each.mean(0).tolist()),
    )  # fmt: skip


def scr(
    x: Tensor,
    wanted: Tensor,
    unwanted: Tensor,
    erase: Erase | None = None,
    *,
    erased: Mapping[int, Tensor] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    share: float = 0.7,
    probe: Probe | None = None,
) -> Scr:
    """Measure SCR over seeds; a seed draws the split.

    The biased probe is trained on training rows in which the two attributes coincide, the clean one and the eraser on
    as many of all four kinds.

    Args:
        x: Vectors, shape ``(n, d)``, of all four combinations.
        wanted: First attribute, shape ``(n,)`` bool.
        unwanted: Second attribute, shape ``(n,)`` bool.
        erase: Fits the eraser of an attribute (``target`` 0 for the first).
        erased: In its place, attribute (0 and 1) to the vectors of the same rows after it was erased, as in `tpp`.
        seeds: Of the splits.
        share: Of the rows, for training.
        probe: Default `LinearProbe`.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If a combination has too few rows, an attribute none after erasure, or not one of `erase` and
            `erased` is given.
    """
    a, b = wanted.bool(), unwanted.bool()
    _check(x, [a, b])
    kinds = 2 * a.long() + b.long()
    if len(kinds.unique()) < 4:
        raise ValueError("all four combinations of the attributes must occur")
    changed = _changed(x, erase, erased, (0, 1))
    probe = probe or LinearProbe()
    rows = []
    for seed in seeds:
        train, test = (_equal(part, kinds, seed) for part in _split(len(x), kinds, share, seed))
        coincide = train[a[train] == b[train]]
        biased = probe.fit(x[coincide], a[coincide].tolist())
        found = []
        for target, (keep, drop) in enumerate(((a, b), (b, a))):
            clean = probe.fit(x[train], keep[train].tolist())
            before, oracle = (_balanced(p, x[test], keep[test]) for p in (biased, clean))
            after = _balanced(biased, changed(train, test, drop, 1 - target, seed), keep[test])
            found.append((before, after, oracle, recovered(before, after, oracle)))
        first = 0 if found[0][0] <= found[1][0] else 1
        rows.append((*found[first], found[1 - first][3], first))
    columns = [tuple(column) for column in zip(*rows, strict=True)]
    return Scr(
        columns[3],
        columns[0],
        columns[1],
        columns[2],
        columns[4],
        tuple(int(one) for one in columns[5]),
    )


def recovered(before: float, after: float, oracle: float) -> float:
    """Return ``(after - before) / (oracle - before)``; 0 if there is less than 0.001 to recover."""
    room = oracle - before
    return (after - before) / room if room >= _SMALL else 0.0


def _equal(rows: Tensor, kinds: Tensor, seed: int) -> Tensor:
    """Return as many rows of each kind."""
    count = min(int((kinds[rows] == kind).sum()) for kind in kinds.unique())
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for kind in kinds.unique():
        own = rows[kinds[rows] == kind]
        picked.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.cat(picked)


def in_model(
    model: nn.Module,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    applied: Mapping[int, Callable[[], AbstractContextManager[object]]],
    *,
    site: str,
    max_length: int | None = 128,
    batch_size: int = 16,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the mean vectors of texts as they are, and under the edit of each class, for `tpp` and `scr`.

    The tokens that begin, end and pad texts are left out of the means, as in the benchmark: their norms are outliers.

    Args:
        model: A live model; left as it is.
        tokenizer: Its tokenizer.
        texts: The texts.
        applied: Class, or attribute, to a function that returns a context in which the model is edited, such as
            ``lambda: eraser.apply(model)`` or ``lambda: eraser.attach(model)``.
        site: Where vectors are read; behind what the edits change.
        max_length: Tokens of a text.
        batch_size: Texts a forward pass.

    Raises:
        SiteNotFoundError: If the model has no such site.
        ShapeError: If it holds no vector a token.
        ValueError: If a text has special tokens only.
    """
    check_texts(texts, batch_size, max_length)
    place, called = one_site(model, site), cast("Any", tokenizer)
    specials = sorted(special_ids(called))

    def means() -> Tensor:
        batches = read(
            model, called, texts, place, specials, max_length=max_length, batch_size=batch_size
        )
        return torch.cat([select(x, mask, "mean") for x, mask in batches])

    clean = means()
    changed = {}
    for one, apply in applied.items():
        with apply():
            changed[one] = means()
    return clean, changed
