"""Selectivity and fresh probes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from concept_erasure import LeaceEraser
from concept_erasure.errors import ShapeError
from concept_erasure.linear.oracle import OracleEraser
from concept_erasure.probes import (
    KernelProbe,
    LinearProbe,
    ProbeResult,
    cross_validate,
    evaluate,
    fresh_probe,
    selectivity,
)
from concept_erasure.probes.evaluate import _control_task
from tests.probes.test_linear import data


def words(types: int = 40, each: int = 12) -> tuple[Tensor, Tensor, list[str]]:
    """Vectors near one point a word, with a concept that is linear in the point."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(types, 8, generator=generator, dtype=torch.float64)
    kind = torch.arange(types).repeat_interleave(each)
    noise = torch.randn(len(kind), 8, generator=generator, dtype=torch.float64)
    return point[kind] + 0.1 * noise, (point[kind, 0] > 0).long(), [f"w{i}" for i in kind.tolist()]


def test_a_probe_that_memorises_is_less_selective() -> None:
    x, z, types = words()
    plain = LinearProbe(C=1.0, standardize="global")
    simple = selectivity(x, z, types=types, n_controls=3, folds=3, probe=plain)
    memory = selectivity(x, z, types=types, folds=3, probe=KernelProbe(C=1e4, gamma=1.0))
    assert simple.result == cross_validate(x, z, folds=3, probe=plain)
    assert simple.selectivity == simple.result.accuracy - simple.control.accuracy
    assert memory.control.accuracy > 0.95
    assert abs(memory.selectivity) < 0.05
    assert simple.selectivity > 0.15
    low, high = simple.interval
    assert -1 <= low < simple.selectivity < high <= 1
    assert json.loads(json.dumps(simple.to_dict()))["selectivity"] == simple.selectivity
    assert len(simple.control.runs) == 3
    assert "control task" in str(simple)


def test_without_types_equal_vectors_are_one_type() -> None:
    x, z = data(100, 3, 2)
    doubled = selectivity(x.repeat(3, 1), z.repeat(3), folds=3)
    assert doubled.result.n == 300
    alone = selectivity(x, z, folds=3)
    assert alone.control.accuracy < alone.result.accuracy


def test_control_labels_are_one_a_type() -> None:
    kind = torch.arange(30) // 3
    index = torch.arange(30) % 2
    generator = torch.Generator().manual_seed(0)
    labels = _control_task(index, kind, generator)
    assert all(len(set(labels[kind == k].tolist())) == 1 for k in range(10))
    with pytest.raises(ValueError, match="finer than the classes"):
        _control_task(index, torch.zeros(30, dtype=torch.int64), generator)


def test_bad_selectivity_input() -> None:
    x, z = data(40, 3, 2)
    with pytest.raises(ValueError, match="n_controls"):
        selectivity(x, z, n_controls=0)
    with pytest.raises(ShapeError, match="groups must have one"):
        selectivity(x, z, types=["a"])


def test_fresh_probe_is_a_probe_of_erased_vectors() -> None:
    x, z = data(600, 5, 2)
    eraser = LeaceEraser.fit(x[:300], z[:300])
    parts = (x[300:500], z[300:500], x[500:], z[500:])
    fresh = fresh_probe(eraser, *parts)
    erased = eraser(x)
    assert fresh == evaluate(erased[300:500], z[300:500], erased[500:], z[500:])
    assert isinstance(fresh, ProbeResult)
    assert fresh.low < fresh.accuracy < fresh.high
    before = fresh_probe(lambda v: v, *parts, probe=LinearProbe())
    assert before.low > fresh.high
    assert fresh_probe(torch.nn.Identity(), *parts).accuracy == before.accuracy
    assert fresh_probe(torch.sin, *parts).n == 100


def test_an_eraser_that_needs_labels_is_refused() -> None:
    x, z = data(60, 3, 2)
    eraser = OracleEraser.fit(x, z)
    with pytest.raises(TypeError, match="needs x, z when it erases"):
        fresh_probe(eraser, x, z, x, z)  # type: ignore[arg-type]


def test_balanced_accuracy_has_an_interval() -> None:
    x, z = data(400, 4, 2)
    keep = (z == 0) | (torch.arange(400) % 8 == 0)
    result = cross_validate(x[keep], z[keep])
    assert result.balanced_low is not None
    assert result.balanced_high is not None
    assert result.balanced_low < result.balanced_accuracy < result.balanced_high
    assert result.balanced_high - result.balanced_low > result.high - result.low
    grouped = cross_validate(x, z, groups=[i // 20 for i in range(400)])
    assert grouped.balanced_low is not None
