"""Evaluation: metrics against scikit-learn, folds, controls, intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from concept_erasure.errors import ShapeError
from concept_erasure.probes import (
    PROBES,
    LinearProbe,
    MlpProbe,
    control,
    cross_validate,
    evaluate,
    wilson_interval,
)
from concept_erasure.probes.evaluate import _auc, _folds
from tests.probes.test_linear import data


@pytest.mark.parametrize("k", [2, 3])
def test_metrics_agree_with_sklearn(k: int) -> None:
    x, z = data(200, 5, k)
    result = evaluate(x[:120], z[:120], x[120:], z[120:], probe="linear")
    oracle = LogisticRegression(tol=1e-10, max_iter=5000).fit(x[:120].numpy(), z[:120].numpy())
    truth, test = z[120:].numpy(), x[120:].numpy()
    proba = oracle.predict_proba(test)
    assert result.accuracy == pytest.approx(oracle.score(test, truth))
    assert result.balanced_accuracy == pytest.approx(
        balanced_accuracy_score(truth, oracle.predict(test))
    )
    assert result.log_loss == pytest.approx(log_loss(truth, proba), abs=1e-4)
    assert result.auc == (pytest.approx(roc_auc_score(truth, proba[:, 1])) if k == 2 else None)
    assert result.majority == np.bincount(truth).max() / len(truth)
    rates = np.bincount(z[:120].numpy()) / 120
    assert result.constant_log_loss == pytest.approx(-np.log(rates[truth]).mean())
    assert (result.n, result.folds) == (80, 1)
    assert result.low < result.accuracy < result.high


@pytest.mark.parametrize("probe", sorted(PROBES))
def test_every_probe_by_name(probe: str) -> None:
    x, z = data(90, 4, 2)
    config = MlpProbe(max_epochs=10, patience=3) if probe == "mlp" else probe
    result = cross_validate(x, z, probe=config, folds=3)
    assert result.n == 90
    assert result.folds == 3
    assert (result.log_loss is None) == (probe == "svm")
    assert result == cross_validate(x, z, probe=config, folds=3)
    assert json.loads(json.dumps(result.to_dict()))["n"] == 90
    assert str(result).startswith("accuracy ")


def test_control_finds_nothing_where_the_probe_finds_much() -> None:
    x, z = data(300, 5, 2)
    labels = ["no" if i == 0 else "yes" for i in z.tolist()]
    real, shuffled = cross_validate(x, labels), control(x, labels)
    assert real.beats_majority
    assert not shuffled.beats_majority
    assert real.log_loss is not None
    assert shuffled.log_loss is not None
    assert real.log_loss < real.constant_log_loss - 0.1
    assert shuffled.log_loss > shuffled.constant_log_loss - 0.02
    assert control(x, labels, seed=1) != shuffled


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    folds=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_folds_are_stratified(counts: list[int], folds: int, seed: int) -> None:
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    part = _folds(index, tuple(range(len(counts))), folds, seed)
    for rows in [torch.ones_like(index).bool(), *(index == c for c in range(len(counts)))]:
        sizes = torch.bincount(part[rows], minlength=folds)
        assert int(sizes.max() - sizes.min()) <= 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_area_with_ties_agrees_with_sklearn(rows: list[tuple[int, bool]]) -> None:
    scores, truth = zip(*rows, strict=True)
    ours = _auc(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth))
    if len(set(truth)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(roc_auc_score(truth, scores))


def test_wilson_interval() -> None:
    # Published example (Newcombe 1998, table I): 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="correct"):
        wilson_interval(3, 2)


def test_a_test_set_may_lack_a_class_but_not_add_one() -> None:
    x, z = data(60, 4, 3)
    kept = z[40:] < 2
    result = evaluate(x[:40], z[:40], x[40:][kept], z[40:][kept])
    assert 0 <= result.balanced_accuracy <= 1
    with pytest.raises(ValueError, match=r"\['3'\] were not seen"):
        evaluate(x[:40], z[:40], x[40:], [3] * 20)


def test_bad_input() -> None:
    x, z = data(20, 4, 2)
    with pytest.raises(ValueError, match="folds must lie between 2 and n = 20, got 1"):
        cross_validate(x, z, folds=1)
    with pytest.raises(ValueError, match="two examples of each class, got 1 of 'b'"):
        cross_validate(x, ["a"] * 19 + ["b"])
    with pytest.raises(ValueError, match="unknown probe 'forest'"):
        cross_validate(x, z, probe="forest")
    with pytest.raises(TypeError, match="fit"):
        cross_validate(x, z, probe=3)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one width"):
        evaluate(x, z, x[:, :2], z)
    with pytest.raises(ShapeError, match="19 labels for 20 vectors"):
        evaluate(x, z, x, z[:19], probe=LinearProbe())
    with pytest.raises(ValueError, match="NaN"):
        control(x * float("nan"), z)
