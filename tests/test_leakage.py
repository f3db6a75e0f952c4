"""The held-out gap: unbiased where a plain norm is mostly noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure import LeaceEraser, LeaceFitter, Representations, Space, SpaceError
from concept_erasure.leakage import Folds
from tests.linear.samples import sample


def _population_gap(eraser: LeaceEraser, mean: torch.Tensor) -> float:
    """|P mu| / |mu| in the norm of isotropic noise."""
    return float((mean - eraser.proj_left @ (eraser.proj_right @ mean)).norm() / mean.norm())


def test_the_gap_is_that_of_the_population() -> None:
    generator = torch.Generator().manual_seed(0)
    d, n = 64, 4000
    mean = torch.zeros(d, dtype=torch.float64)
    mean[0] = 0.3  # a weak concept: one fold's noise is larger than the signal
    z = torch.randint(0, 2, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + (2 * z[:, None] - 1) * mean
    eraser = LeaceEraser.fit(x, z)
    low, high = eraser.report["held_out_gap_interval"]
    # the cross-fits see three fifths of the rows, so their gap is a little larger
    assert low <= 1.3 * _population_gap(eraser, mean)
    assert eraser.report["held_out_gap"] < 0.75
    assert high < 0.95
    noise_share = (d / (n / 5)) ** 0.5 / float(mean.norm())
    assert noise_share > 0.9  # what a plain norm of one fold would have called a gap


def test_no_signal_gives_no_gap() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.arange(400) % 2
    report = LeaceEraser.fit(x, z).report
    # noise in the denominator: never called clean
    assert report.get("held_out_gap", 1.0) > 0.2 or "held_out_note" in report


def test_held_out_rows_replace_the_cross_fit() -> None:
    x, z = sample(3000, 12, 3)
    report = LeaceEraser.fit(x[:2000], z[:2000], held_out=(x[2000:], z[2000:])).report
    assert 0 <= report["held_out_gap"] < 0.3
    elsewhere = sample(1000, 12, 3, seed=9)  # another population
    assert LeaceEraser.fit(x, z, held_out=elsewhere).report["held_out_gap"] > 0.8


def test_held_out_rows_that_do_not_fit_are_refused() -> None:
    x, z = sample(200, 12, 2)
    with pytest.raises(ValueError, match="at least 20 rows"):
        LeaceEraser.fit(x, z, held_out=(x[:8], z[:8]))
    with pytest.raises(ValueError, match="width 5"):
        LeaceEraser.fit(x, z, held_out=(x[:, :5], z))


def test_tokens_of_one_text_stay_in_one_fold() -> None:
    x, z = sample(300, 6, 2)
    groups = torch.arange(300) // 7
    folds = Folds(6, 2).update(x, z, groups=groups)
    whole = [sum(groups == g).item() for g in range(43)]
    assert sum(part.rows for part in folds.parts) == 300
    one = torch.zeros(300, dtype=torch.int64)  # a single text lies in a single fold
    assert sorted(part.rows for part in Folds(6, 2).update(x, z, groups=one).parts)[:4] == [0] * 4
    assert all(part.rows <= 300 - max(whole) for part in folds.parts)
    by_text = LeaceEraser.fit(Representations(x, z.tolist(), rows=groups)).report
    assert by_text["held_out_gap"] != LeaceEraser.fit(x, z).report["held_out_gap"]


def test_background_rows_set_the_metric_and_the_mean() -> None:
    x, z = sample(2000, 8, 2)
    generator = torch.Generator().manual_seed(3)
    far = 50 * torch.randn(4000, 8, generator=generator, dtype=torch.float64) + 3
    plain, aware = LeaceEraser.fit(x, z), LeaceEraser.fit(x, z, background=far)
    both = torch.cat([x, far])

    def moved(eraser: LeaceEraser, rows: torch.Tensor) -> float:
        return float((eraser(rows) - rows).square().sum(1).mean())

    assert aware.report["residual"] < 1e-12
    assert moved(aware, both) < moved(plain, both)
    torch.testing.assert_close(aware(both).mean(0), both.mean(0))
    size = moved(aware, both) / float((both - both.mean(0)).square().sum(1).mean())
    assert aware.report["edit_size"] == pytest.approx(size, rel=1e-9)


def test_background_in_batches_and_merged_is_the_same() -> None:
    x, z = sample(600, 8, 2)
    far = 5 * torch.randn(300, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    want = LeaceEraser.fit(x, z, background=far)
    one = LeaceFitter(8, 2, classes=["0", "1"]).update(x[:200], z[:200])
    two = LeaceFitter(8, 2, classes=["0", "1"]).update(x[200:], z[200:]).update_background(far)
    torch.testing.assert_close(one.merge(two).eraser.P, want.P, rtol=0, atol=1e-10)


def test_orth_has_no_use_for_background() -> None:
    x, z = sample(100, 4, 2)
    with pytest.raises(ValueError, match="no covariance"):
        LeaceEraser.fit(x, z, method="orth", background=x)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_weights_does_not_matter(scale: float) -> None:
    x, z = sample(400, 8, 2)
    weight = torch.rand(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    want = LeaceEraser.fit(x, z, weight=weight)
    got = LeaceEraser.fit(x, z, weight=weight * scale)
    torch.testing.assert_close(got.P, want.P, rtol=0, atol=1e-10)
    assert got.report["n_per_class"] == want.report["n_per_class"]


def test_fitters_that_differ_do_not_merge() -> None:
    x, z = sample(100, 4, 2)
    names = ["ab"[label] for label in z.tolist()]
    one = LeaceFitter(4, 2, classes=["a", "b"]).update(x, names)
    two = LeaceFitter(4, 2, classes=["b", "a"]).update(x, names)
    with pytest.raises(ValueError, match="differ"):
        one.merge(two)


def test_transposed_labels_are_refused() -> None:
    x, z = sample(300, 6, 3)
    columns = torch.nn.functional.one_hot(z, 3)
    with pytest.raises(ValueError, match="must have shape"):
        LeaceFitter(6, 3).update(x, columns.T)


def test_a_class_of_one_row_and_a_total_erasure_are_said() -> None:
    x, z = sample(300, 6, 2)
    with pytest.warns(match="fewer than two rows"):
        LeaceEraser.fit(x, torch.where(torch.arange(300) == 0, 2, z))
    with pytest.warns(match="all 6 dimensions"):
        LeaceEraser.fit(x, torch.arange(300) % 60)


@pytest.mark.parametrize("period", [5, 10])
def test_periodic_labels_have_a_gap_too(period: int) -> None:
    x, _ = sample(1000, 6, 2)
    z = torch.arange(1000) % period == 0
    x = x + 2.0 * z[:, None] * torch.eye(6, dtype=torch.float64)[0]
    assert LeaceEraser.fit(x, z).report["held_out_gap"] < 0.6


def test_few_rows_say_why_there_is_no_gap() -> None:
    x, z = sample(16, 4, 2)
    assert "too few" in LeaceEraser.fit(x, z).report["held_out_note"]


def test_a_table_of_one_column_keeps_its_classes_over_batches() -> None:
    pandas = pytest.importorskip("pandas")
    x, z = sample(300, 6, 3)
    names = ["abc"[label] for label in z.tolist()]
    fitter = LeaceFitter(6, 3, classes=("a", "b", "c"))
    for label in "abc":
        rows = torch.tensor([name == label for name in names])
        table = pandas.DataFrame({"letter": [name for name in names if name == label]})
        fitter.update(x[rows], table)
    torch.testing.assert_close(fitter.eraser.P, LeaceEraser.fit(x, names).P, rtol=0, atol=1e-10)


def test_several_concepts_are_read_alike_when_held_out() -> None:
    x, z = sample(600, 6, 3)
    both = {"class": z.tolist(), "parity": (z % 2).tolist()}
    rows = slice(0, 200)
    part = {name: values[rows] for name, values in both.items()}
    report = LeaceEraser.fit(x, both, held_out=(x[rows], part)).report
    assert report["held_out_gap"] < 0.3
    with pytest.raises(ValueError, match="unknown labels"):
        LeaceEraser.fit(x, both, held_out=(x[rows], {**part, "class": ["9"] * 200}))
    with pytest.raises(ValueError, match="concepts"):
        LeaceEraser.fit(x, both, held_out=(x[rows], {"class": part["class"]}))


def test_held_out_rows_are_merged() -> None:
    x, z = sample(600, 6, 2)
    names = [str(label) for label in z.tolist()]
    whole = LeaceFitter(6, 2, classes=("0", "1")).update(x[:300], names[:300])
    whole.hold_out(x[300:], names[300:])
    one = LeaceFitter(6, 2, classes=("0", "1")).update(x[:100], names[:100])
    two = LeaceFitter(6, 2, classes=("0", "1")).update(x[100:300], names[100:300])
    merged = one.merge(two.hold_out(x[300:], names[300:]))
    assert merged.eraser.report["held_out_gap"] == pytest.approx(
        whole.eraser.report["held_out_gap"]
    )


def test_nothing_of_a_refused_call_is_kept() -> None:
    x, z = sample(100, 4, 2)
    fitter = LeaceFitter(4, 2).update(x, z)
    with pytest.raises(ValueError, match="groups"):
        fitter.update(x, z, groups=torch.arange(7))
    with pytest.raises(ValueError, match="not finite"):
        fitter.update_background(x.clone().fill_(float("nan")))
    assert fitter.n == 100
    assert "background_rows" not in fitter.eraser.report


def test_weights_do_not_weigh_against_the_background() -> None:
    x, z = sample(400, 8, 2)
    far = 5 * torch.randn(300, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    weight = torch.rand(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    want = LeaceEraser.fit(x, z, weight=weight, background=far)
    got = LeaceEraser.fit(x, z, weight=1000 * weight, background=far)
    torch.testing.assert_close(got.P, want.P, rtol=0, atol=1e-10)


def test_rows_from_elsewhere_are_refused() -> None:
    x, z = sample(100, 4, 2)
    here, there = (Space("model", mark * 16, "residual.1", "last", 4) for mark in "ab")
    fitted = Representations(x, z.tolist(), here)
    for options in (
        {"held_out": replace(fitted, space=there)},
        {"background": replace(fitted, space=there)},
    ):
        with pytest.raises(SpaceError, match="come from"):
            LeaceEraser.fit(fitted, **options)


def test_held_out_labels_are_read_as_in_the_fit() -> None:
    x, z = sample(200, 4, 2)
    fitter = LeaceFitter(4, 1).update(x, z == 1).hold_out(x, z == 1)
    assert fitter.eraser.report["held_out_gap"] < 0.3
