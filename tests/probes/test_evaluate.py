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
from concept_erasure.probes._results import area_under_curve
from concept_erasure.probes.evaluate import _folds, _permuted
from tests.probes.test_linear import data


@pytest.mark.parametrize("k", [2, 3])
def test_metrics_agree_with_sklearn(k: int) -> None:
    x, z = data(200, 5, k)
    result = evaluate(x[:120], z[:120], x[120:], z[120:], probe=LinearProbe(standardize=None))
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
    ours = area_under_curve(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth))
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


def tokens(
    texts: int = 30, each: int = 20, seed: int = 0
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Return tokens that name their text, and labels of the texts that nothing else tells."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(texts).repeat_interleave(each)
    x = 3 * torch.randn(texts, 40, generator=generator)[group]
    x = x + torch.randn(len(group), 40, generator=generator)
    labels = torch.randint(0, 2, (texts,), generator=generator)
    return (
        x,
        [["no", "yes"][i] for i in labels[group].tolist()],
        [f"t{i}" for i in group.tolist()],
    )


def test_tokens_of_a_text_stay_on_one_side() -> None:
    x, z, groups = tokens()
    leaky, honest = cross_validate(x, z), cross_validate(x, z, groups=groups)
    assert leaky.accuracy > 0.95
    assert honest.low <= honest.majority
    assert (honest.n, honest.groups, leaky.groups) == (600, 30, None)
    assert honest.high - honest.low > 2.5 * (leaky.high - leaky.low)
    assert "600 in 30 groups" in str(honest)
    mlp = cross_validate(x, z, groups=groups, probe=MlpProbe(max_epochs=10), folds=3)
    assert mlp.low <= mlp.majority


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=8, max_size=25),
    folds=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_group_folds(sizes: list[int], folds: int, seed: int) -> None:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = group % 2
    part = _folds(index.repeat(2), (0, 1), folds, seed, group.repeat(2))
    assert set(part.tolist()) == set(range(folds))
    for g in range(len(sizes)):
        assert len(set(part[group.repeat(2) == g].tolist())) == 1
    for c in (0, 1):
        assert len(set(part[index.repeat(2) == c].tolist())) > 1


def test_groups_that_cannot_be_split() -> None:
    x, z = data(20, 3, 2)
    with pytest.raises(ValueError, match="5 folds need as many groups, got 2"):
        cross_validate(x, z, groups=[i % 2 for i in range(20)])
    with pytest.raises(ValueError, match="'b' is in 1 groups"):
        cross_validate(x, ["a"] * 16 + ["b"] * 4, groups=[i // 4 for i in range(20)], folds=3)
    with pytest.raises(ShapeError, match="groups must have one"):
        cross_validate(x, z, groups=[1, 2])


def test_a_group_on_both_sides_is_refused() -> None:
    x, z, groups = tokens()
    with pytest.raises(ValueError, match="1 groups are in the training and in the test set.*'t15'"):
        evaluate(x[:310], z[:310], x[310:], z[310:], groups=(groups[:310], groups[310:]))
    split = (groups[:300], groups[300:])
    probe = LinearProbe(C=1.0)  # chooses nothing, so groups only touch the intervals
    grouped = evaluate(x[:300], z[:300], x[300:], z[300:], groups=split, probe=probe)
    alone = evaluate(x[:300], z[:300], x[300:], z[300:], probe=probe)
    assert grouped.accuracy == alone.accuracy
    assert grouped.groups == 15
    assert grouped.high - grouped.low > alone.high - alone.low


def test_interval_of_the_log_loss() -> None:
    x, z = data(400, 5, 2)
    probe = LinearProbe(standardize=None)
    result = evaluate(x[:200], z[:200], x[200:], z[200:], probe=probe)
    fitted = probe.fit(x[:200], z[:200])
    losses = [fitted.log_loss(x[i : i + 1], z[i : i + 1]) for i in range(200, 400)]
    half = 1.96 * np.std(losses, ddof=1) / np.sqrt(200)
    assert result.log_loss_low == pytest.approx(np.mean(losses) - half, abs=1e-5)
    assert result.log_loss_high == pytest.approx(np.mean(losses) + half, abs=1e-5)
    assert evaluate(x[:200], z[:200], x[200:], z[200:], probe="svm").log_loss_low is None
    assert evaluate(x[:200], z[:200], x[200:201], z[200:201]).log_loss_low is None


def test_a_group_of_its_own_for_each_vector_changes_little() -> None:
    x, z = data(200, 5, 2)
    probe = LinearProbe(C=1.0)
    alone = evaluate(x[:100], z[:100], x[100:], z[100:], probe=probe)
    groups = (list(range(100)), list(range(100, 200)))
    split = evaluate(x[:100], z[:100], x[100:], z[100:], groups=groups, probe=probe)
    assert split.low == pytest.approx(alone.low, abs=0.01)
    assert split.log_loss_low == pytest.approx(alone.log_loss_low)


def test_probes_compare_erasers_at_one_scale() -> None:
    x, z = data(300, 5, 2)
    small, large = (cross_validate(x * s, z) for s in (1e-3, 1e3))
    assert small.log_loss == pytest.approx(large.log_loss, abs=1e-8)
    assert small.accuracy == large.accuracy


def test_permutations_show_their_spread() -> None:
    x, z = data(120, 4, 2)
    shuffled = control(x, z, n_permutations=9)
    assert len(shuffled.runs) == 9
    low, high = shuffled.accuracy_range
    assert low < shuffled.accuracy < high
    assert shuffled.log_loss_range is not None
    assert shuffled.log_loss_range[0] < shuffled.log_loss_range[1]
    assert shuffled.runs[0] == control(x, z).runs[0]
    assert shuffled.p_value(cross_validate(x, z)) == pytest.approx(0.1)
    assert shuffled.p_value(shuffled.runs[0]) > 0.1
    assert json.loads(json.dumps(shuffled.to_dict()))["accuracy"] == shuffled.accuracy
    assert "9 permutations" in str(shuffled)
    assert control(x, z, probe="svm").log_loss_range is None
    with pytest.raises(ValueError, match="n_permutations"):
        control(x, z, n_permutations=0)


def test_labels_of_groups_are_permuted_between_groups() -> None:
    index, group = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        permuted = _permuted(index, group, generator)
        assert permuted[0] == permuted[1]
        assert permuted[2] == permuted[3]
        seen.add(tuple(permuted.tolist()))
    assert len(seen) > 2
    x, z, groups = tokens()
    assert not control(x, z, groups=groups, n_permutations=2).beats_majority
