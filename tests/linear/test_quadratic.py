from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.linear.groupby import groupby, invert_indices
from concept_erasure.linear.optimal_transport import (
    is_positive_definite,
    ot_barycenter,
    ot_distance,
    ot_map,
    ot_midpoint,
    psd_sqrt,
    psd_sqrt_rsqrt,
)
from concept_erasure.linear.quadratic import (
    QuadraticEditor,
    QuadraticEraser,
    QuadraticFitter,
    Shrinkage,
)
from concept_erasure.sites import Space


def covariances(n: int, d: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, d + 2, generator=g, dtype=torch.float64)
    return a @ a.mT / d


def classes(k: int, n: int = 900, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, k, (n,), generator=g)
    z[z == 1] *= torch.randint(0, 2, (int((z == 1).sum()),), generator=g)  # uneven classes
    noise = torch.randn(n, d, 1, generator=g, dtype=torch.float64)
    x = (psd_sqrt(covariances(k, d, seed))[z] @ noise).squeeze(-1)
    return x + torch.randn(k, d, generator=g, dtype=torch.float64)[z] + 3, z


@pytest.mark.parametrize("d", [1, 3, 8])
def test_map_moves_one_covariance_onto_the_other(d: int) -> None:
    first, second = covariances(2, d)
    t = ot_map(first, second)
    torch.testing.assert_close(t @ first @ t, second)
    assert is_positive_definite(t)
    torch.testing.assert_close(t, t.mT)


def test_maps_broadcast() -> None:
    ks = covariances(3, 4)
    maps = ot_map(ks[:, None], ks)
    assert maps.shape == (3, 3, 4, 4)
    torch.testing.assert_close(maps[1, 2], ot_map(ks[1], ks[2]))
    torch.testing.assert_close(maps[1, 1], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("w1", [0.0, 0.25, 0.5, 1.0])
def test_midpoint_is_the_barycentre_of_two(w1: float) -> None:
    ks = covariances(2, 5)
    weights = torch.tensor([w1, 1 - w1], dtype=torch.float64)
    mid = ot_midpoint(ks[0], ks[1], w1, 1 - w1)
    torch.testing.assert_close(mid, ot_barycenter(ks, weights))


def test_barycentre_is_first_order_optimal() -> None:
    ks = covariances(3, 6)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mu = ot_barycenter(ks, weights).requires_grad_(True)
    (weights * ot_distance(mu, ks).square()).sum().backward()
    assert mu.grad is not None
    assert mu.grad.abs().max() < 1e-8
    torch.testing.assert_close(ot_barycenter(ks, 7 * weights), mu.detach())


def test_barycentre_does_not_depend_on_units() -> None:
    ks = covariances(3, 4)
    torch.testing.assert_close(ot_barycenter(ks * 1e-12) * 1e12, ot_barycenter(ks))


def test_distance_is_a_distance() -> None:
    first, second = covariances(2, 4)
    assert ot_distance(first, first) < 1e-6
    torch.testing.assert_close(ot_distance(first, second), ot_distance(second, first))
    scalar = ot_distance(torch.tensor([[4.0]]), torch.tensor([[9.0]]))
    torch.testing.assert_close(scalar, torch.tensor(1.0))


def test_inverse_root_of_a_singular_matrix() -> None:
    matrix = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    root, inverse = psd_sqrt_rsqrt(matrix)
    torch.testing.assert_close(root.diagonal(), torch.tensor([2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(inverse.diagonal(), torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert not is_positive_definite(matrix)


def test_barycentre_refuses_bad_shapes() -> None:
    ks = covariances(2, 3)
    with pytest.raises(ShapeError, match="n >= 2"):
        ot_barycenter(ks[:1])
    with pytest.raises(ShapeError, match="one entry"):
        ot_barycenter(ks, torch.ones(3))


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_groupby_round_trip(dim: int, stable: bool) -> None:
    x = torch.arange(60.0).view(5, 4, 3)
    key = torch.arange(x.shape[dim]) % 2
    split = groupby(x, key.to(torch.int32), dim, stable=stable)
    assert split.labels == [0, 1]
    torch.testing.assert_close(split.coalesce(), x)
    torch.testing.assert_close(split.map(lambda _, g: g + 1).coalesce(), x + 1)
    if stable:
        torch.testing.assert_close(split.groups[1], x.index_select(dim, key.nonzero().flatten()))


def test_groupby_refuses_bad_keys() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(TypeError, match="integer labels"):
        groupby(x, torch.zeros(4))
    with pytest.raises(ShapeError, match="one label"):
        groupby(x, torch.zeros(3, dtype=torch.int64))
    split = groupby(x, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ShapeError, match="4 were split"):
        split.coalesce([x[:1], x[:1]])


def test_invert_indices() -> None:
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(order[invert_indices(order)], torch.arange(4))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_means_and_covariances_become_equal(k: int) -> None:
    x, z = classes(k)
    out = QuadraticEraser.fit(x, z)(x, z)
    for label in range(k):
        torch.testing.assert_close(out[z == label].mean(0), x.mean(0))
        torch.testing.assert_close(out[z == label].T.cov(), out[z == 0].T.cov())


def test_mean_of_the_data_stays_with_uneven_classes() -> None:
    x, z = classes(2)
    shares = z.bincount() / len(z)
    assert shares.min() < 0.4
    eraser = QuadraticEraser.fit(x, z)
    torch.testing.assert_close(eraser.global_mean, x.mean(0))
    torch.testing.assert_close(eraser(x, z).mean(0), x.mean(0))


def test_save_and_load(tmp_path: Path) -> None:
    x, z = classes(3)
    eraser = QuadraticEraser.fit(x, z)
    assert cast("float", eraser.report["residual"]) < 1e-10
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, QuadraticEraser)
    assert torch.equal(loaded(x, z), eraser(x, z))


def test_maps_are_positive_definite() -> None:
    eraser = QuadraticEraser.fit(*classes(3))
    assert bool(is_positive_definite(eraser.ot_maps).all())


def test_editor_gives_the_target_class() -> None:
    x, z = classes(3)
    editor: QuadraticEditor = QuadraticFitter.fit(x, z).editor()
    out = editor(x, z, 2)
    for label in range(3):
        torch.testing.assert_close(out[z == label].mean(0), x[z == 2].mean(0))
        torch.testing.assert_close(out[z == label].T.cov(), x[z == 2].T.cov())
    torch.testing.assert_close(out[z == 2], x[z == 2])
    assert editor.to(dtype=torch.float32).ot_maps.dtype == torch.float32


def test_batches_do_not_matter() -> None:
    x, z = classes(3)
    whole = QuadraticFitter.fit(x, z)
    parts = QuadraticFitter(5, 3)
    for piece, label in zip(x.split(100), z.split(100), strict=True):
        parts.update(piece, label)
    torch.testing.assert_close(parts.sigma_xx, whole.sigma_xx)
    torch.testing.assert_close(parts.eraser(x, z), whole.eraser(x, z))
    assert parts.eraser is parts.eraser


def test_large_offset_costs_nothing() -> None:
    x, z = classes(2)
    torch.testing.assert_close(
        QuadraticFitter.fit(x + 1e6, z).sigma_xx,
        QuadraticFitter.fit(x, z).sigma_xx,
        rtol=1e-6,
        atol=0,
    )


def test_shrinkage_warns_when_a_class_is_small() -> None:
    x, z = classes(2, n=16, d=12)
    with pytest.warns(ErasureWarning, match="covariances are shrunk"):
        QuadraticEraser.fit(x, z)
    shrunk = QuadraticFitter.fit(x, z, shrinkage=True).sigma_xx
    assert bool(is_positive_definite(shrunk).all())


def test_one_class_warns_and_changes_nothing() -> None:
    x, z = classes(2)
    with pytest.warns(ErasureWarning, match="identity"):
        eraser = QuadraticEraser.fit(x, torch.zeros_like(z))
    torch.testing.assert_close(eraser(x, torch.zeros_like(z)), x)
    assert eraser(x[:0], z[:0]).shape == (0, 5)


def test_dtype_and_shape_are_kept() -> None:
    x, z = classes(2)
    low = x.to(torch.bfloat16).view(30, 30, 5)
    eraser = QuadraticEraser.fit(low, z.view(30, 30))
    out = eraser(low, z.view(30, 30))
    assert out.dtype == torch.bfloat16
    assert out.shape == low.shape
    assert eraser.to("cpu", torch.float32).ot_maps.dtype == torch.float32


def test_bad_input_raises() -> None:
    x, z = classes(2)
    with pytest.raises(NotFittedError, match=r"classes \[0, 2\]"):
        _ = QuadraticFitter(5, 3).update(x, torch.ones_like(z)).eraser
    eraser = QuadraticEraser.fit(x, z)
    with pytest.raises(ValueError, match=r"unknown labels \['2'\]"):
        eraser(x, z + 1)
    with pytest.raises(ValueError, match="out of range"):
        QuadraticFitter(5, 2).update(x, z + 1)
    with pytest.raises(TypeError, match="fractions"):
        QuadraticEraser.fit(x, x[:, 0])
    with pytest.raises(ShapeError, match="900 rows"):
        eraser(x, z[:-1])
    with pytest.raises(ShapeError, match="width 5"):
        eraser(x[:, :2], z)
    with pytest.raises(ValueError, match="at least 2 rows"):
        QuadraticEraser.fit(x[:0], z[:0])
    x[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinite"):
        QuadraticEraser.fit(x, z)


def test_class_ids_with_gaps() -> None:
    x, z = classes(3)
    odd = torch.tensor([2, 5, 8])[z]
    eraser = QuadraticEraser.fit(x, odd)
    assert eraser.classes == ("2", "5", "8")
    want = QuadraticEraser.fit(x, z)
    torch.testing.assert_close(eraser(x, odd), want(x, z))
    torch.testing.assert_close(eraser.optimal_transport(5, x), want.optimal_transport(1, x))
    editor = QuadraticFitter.fit(x, odd).editor()
    torch.testing.assert_close(
        editor.to(dtype=torch.float64)(x, odd, 8), QuadraticFitter.fit(x, z).editor()(x, z, 2)
    )


def test_string_labels_survive_saving(tmp_path: Path) -> None:
    x, z = classes(3)
    names = ["abc"[i] for i in z.tolist()]
    eraser = QuadraticEraser.fit(x, names)
    torch.testing.assert_close(eraser(x, names), QuadraticEraser.fit(x, z)(x, z))
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, QuadraticEraser)
    assert loaded.config == eraser.config
    assert torch.equal(loaded(x, names), eraser(x, names))
    torch.testing.assert_close(loaded.optimal_transport("b", x), eraser.optimal_transport("b", x))
    with pytest.raises(ValueError, match=r"unknown labels \['d'\]"):
        loaded(x[:1], ["d"])
    assert loaded(x[:0], []).shape == (0, 5)


def test_flags_and_numbers_are_the_same_labels() -> None:
    x, z = classes(2)
    flags = QuadraticEraser.fit(x, z == 1)
    torch.testing.assert_close(flags(x, z), QuadraticEraser.fit(x, z)(x, z == 1))


def test_strings_are_streamed_with_named_classes() -> None:
    x, z = classes(3)
    names = ["abc"[i] for i in z.tolist()]
    fitter = QuadraticFitter(5, 3, classes="abc").update(x[:99], names[:99])
    fitter.update(x[99:], names[99:])
    torch.testing.assert_close(fitter.eraser(x, names), QuadraticEraser.fit(x, z)(x, z))


@pytest.mark.parametrize("shrinkage", [True, "auto"])
def test_few_rows_warn_with_the_residual(shrinkage: Shrinkage) -> None:
    x, z = classes(2, n=30, d=20)
    with pytest.warns(
        ErasureWarning, match=r"still differ by [\d.e+-]+ .*samples for 20 dim"
    ) as seen:
        eraser = QuadraticEraser.fit(x, z, shrinkage=shrinkage)
    assert len(seen) == 1
    assert f"{cast('float', eraser.report['residual']):.2g}" in str(seen[0].message)


def test_representations_give_labels_and_space() -> None:
    x, z = classes(2)
    space = Space("m", "f", "residual.1", "last", 5)
    eraser = QuadraticEraser.fit(Representations(x, z, space))
    assert eraser.space == space
    shaped = QuadraticEraser.fit(x.view(30, 30, 5), ["ab"[i % 2] for i in range(30)])
    assert shaped.classes == ("a", "b")
