from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.linear.splince import SplinceEraser, splince_factors


def problem(n: int = 800, d: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, concept classes (3) and task classes (2) that are correlated with each other."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, 3, (n,), generator=g)
    y = ((z == 0) ^ (torch.rand(n, generator=g) < 0.3)).long()
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
    x = x + 2 * torch.randn(3, d, generator=g, dtype=torch.float64)[z]
    x = x + 2 * torch.randn(2, d, generator=g, dtype=torch.float64)[y]
    return x + 7, z, y


def cross(x: Tensor, labels: Tensor) -> Tensor:
    hot = torch.nn.functional.one_hot(labels).double()
    return (x - x.mean(0)).T @ (hot - hot.mean(0)) / len(x)


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_both_constraints_hold(affine: bool, shrinkage: bool) -> None:
    x, z, y = problem()
    eraser = SplinceEraser.fit(x, z, y, affine=affine, shrinkage=shrinkage)
    out = eraser(x)
    assert cross(out, z).abs().max() < 1e-10
    assert (cross(out, y) - cross(x, y)).abs().max() < 1e-10
    torch.testing.assert_close(eraser.P @ eraser.P, eraser.P)
    assert cast("float", eraser.report["residual"]) < 1e-10
    assert cast("float", eraser.report["task_change"]) < 1e-10
    assert eraser.report["rank"] == 2
    if affine:
        torch.testing.assert_close(out.mean(0), x.mean(0))


def test_leace_does_not_keep_the_task_here() -> None:
    x, z, y = problem()
    out = LeaceEraser.fit(x, z)(x)
    assert (cross(out, y) - cross(x, y)).abs().max() > 1e-2


def test_edit_is_the_smallest_that_meets_both_constraints() -> None:
    x, z, y = problem()
    eraser = SplinceEraser.fit(x, z, y, shrinkage=False)
    centred = x - x.mean(0)
    bound = torch.cat([cross(x, z), cross(x, y)], 1)
    free = torch.eye(10, dtype=torch.float64) - bound @ torch.linalg.pinv(bound)
    best = (centred @ (eraser.P - torch.eye(10)).T).square().sum()
    g = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-1, 1.0):
        other = eraser.P + size * torch.randn(10, 10, generator=g, dtype=torch.float64) @ free
        assert (other @ cross(x, z)).abs().max() < 1e-8
        assert (centred @ (other - torch.eye(10)).T).square().sum() > best


def test_equals_leace_when_the_task_is_not_in_x() -> None:
    x, z, _ = problem()
    z = (z == 0).long()
    y = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], 1)
    y = y - centred @ torch.linalg.lstsq(centred, y[:, None]).solution[:, 0]
    ours = SplinceEraser.fit(x, z, y, shrinkage=False)
    torch.testing.assert_close(ours.P, LeaceEraser.fit(x, z, shrinkage=False).P)
    assert ours.report["angle"] == 90.0


def test_a_task_that_is_the_concept_is_refused() -> None:
    x, z, _ = problem()
    with pytest.raises(ValueError, match="share a direction"):
        SplinceEraser.fit(x, z, z)
    with pytest.raises(ValueError, match="share a direction"):
        SplinceEraser.fit(x, z, (z == 1).long())


def test_threshold_is_the_callers() -> None:
    x, z, y = problem()
    angle = cast("float", SplinceEraser.fit(x, z, y).report["angle"])
    SplinceEraser.fit(x, z, y, min_angle=angle - 1)
    with pytest.raises(ValueError, match="min_angle"):
        SplinceEraser.fit(x, z, y, min_angle=angle + 1)


def test_equivariant_under_linear_maps() -> None:
    x, z, y = problem()
    g = torch.diag(10.0 ** torch.linspace(-4, 4, 10, dtype=torch.float64))
    ours = SplinceEraser.fit(x, z, y, shrinkage=False)(x) @ g
    other = SplinceEraser.fit(x @ g, z, y, shrinkage=False)(x @ g)
    torch.testing.assert_close(other, ours, rtol=1e-6, atol=1e-9)


def test_constant_and_duplicated_features() -> None:
    x, z, y = problem()
    wide = torch.cat([x, x[:, :2], torch.full((len(x), 1), 3.0)], 1)
    out = SplinceEraser.fit(wide, z, y, shrinkage=False)(wide)
    assert cross(out, z).abs().max() < 1e-8
    assert (cross(out, y) - cross(wide, y)).abs().max() < 1e-8


def test_save_load_and_space(tmp_path: Path) -> None:
    x, z, y = problem()
    eraser = SplinceEraser.fit(Representations(x, z, None), y=y)
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, SplinceEraser)
    assert torch.equal(loaded(x), eraser(x))
    assert loaded.config == eraser.config


def test_constant_label_gives_the_identity() -> None:
    x, z, y = problem()
    with pytest.warns(ErasureWarning, match="identity"):
        eraser = SplinceEraser.fit(x, torch.zeros_like(z), y)
    torch.testing.assert_close(eraser(x), x)


def test_masked_sequences_match_rows() -> None:
    x, z, y = problem()
    mask = torch.rand(800, generator=torch.Generator().manual_seed(0)) < 0.7
    shaped = [t.view(20, 40, *t.shape[1:]) for t in (x, z, y, mask)]
    masked = SplinceEraser.fit(*shaped[:3], mask=shaped[3])
    torch.testing.assert_close(masked.P, SplinceEraser.fit(x[mask], z[mask], y[mask]).P)


def test_bad_input_raises() -> None:
    x, z, y = problem()
    with pytest.raises(ValueError, match="task labels are missing"):
        SplinceEraser.fit(x, z)
    with pytest.raises(ValueError, match="labels are missing"):
        SplinceEraser.fit(x, y=y)
    with pytest.raises(ShapeError, match="800"):
        SplinceEraser.fit(x, z, y[:-1])
    with pytest.raises(ValueError, match="min_angle"):
        SplinceEraser.fit(x, z, y, min_angle=0)
    with pytest.raises(ValueError, match="shrinkage"):
        SplinceEraser.fit(x, z, y, shrinkage="none")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        SplinceEraser.fit(x[0], z, y)


def test_factors_of_zero_angle_are_reported() -> None:
    sigma = torch.eye(3, dtype=torch.float64)
    assert splince_factors(sigma, sigma[:, :1], sigma[:, :1])[2] < 1e-6


def test_bad_task_labels_are_called_y() -> None:
    x, z, y = problem()
    spoiled = y.double()
    spoiled[41] = float("nan")
    with pytest.raises(ValueError, match="y has 1 rows that are not finite; the first is row 41"):
        SplinceEraser.fit(x, z, spoiled)
    with pytest.raises(ShapeError, match="x has 800 rows and y has 799 labels"):
        SplinceEraser.fit(x, z, ["a"] * 799)
    with pytest.raises(ValueError, match=r"y: labels mix strings and other values: row 1"):
        SplinceEraser.fit(x, z, ["a", None] * 400)
    with pytest.raises(ValueError, match="y has no columns"):
        SplinceEraser.fit(x, z, torch.zeros(800, 0))


def test_string_labels_of_concept_and_task() -> None:
    x, z, y = problem()
    names, tasks = [f"c{i}" for i in z.tolist()], ["no" if i else "yes" for i in y.tolist()]
    ours = SplinceEraser.fit(x, names, tasks)
    torch.testing.assert_close(ours.P, SplinceEraser.fit(x, z, y).P)
    shaped = SplinceEraser.fit(x.view(20, 40, 10), ["ab"[i % 2] for i in range(20)], y)
    assert shaped.report["rank"] == 1


def test_report_holds_what_is_left_on_unseen_rows() -> None:
    x, z, y = problem(4000)
    report = SplinceEraser.fit(x[:400], z[:400], y[:400]).report
    low, high = cast("list[float]", report["held_out_gap_interval"])
    assert 0 < cast("float", report["held_out_gap"]) < 0.5
    assert low <= cast("float", report["held_out_gap"]) <= high
    assert 0 <= cast("float", report["held_out_task_change"]) < 0.5
    more = SplinceEraser.fit(x, z, y).report
    assert cast("float", more["held_out_gap"]) < cast("float", report["held_out_gap"])
    assert "held_out_gap" not in SplinceEraser.fit(x[:15], z[:15], y[:15], min_angle=1e-3).report
