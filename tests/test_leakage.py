"""The held-out gap: unbiased where a plain norm is mostly noise."""

from __future__ import annotations

import pytest
import torch

from concept_erasure import LeaceEraser, LeaceFitter, Moments, Representations
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
    gap = LeaceEraser.fit(x, z).report.get("held_out_gap")
    assert gap is None or gap > 0.2  # noise in the denominator: never called clean


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
    for i, part in enumerate(folds.parts):
        want = Moments(6, 2, covariance=False).update(x[groups % 5 == i], z[groups % 5 == i])
        torch.testing.assert_close(part.sigma_xz, want.sigma_xz)
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
