from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from concept_erasure import registry
from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.linear.sal import SalEraser, SalFitter
from concept_erasure.logistic import class_entropy, fit_logistic
from tests.linear.samples import class_gap, cross_covariance, edit_size, one_hot, residual, sample


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
def test_full_rank_guards_and_is_an_orthogonal_projection(classes: int, affine: bool) -> None:
    x, z = sample(600, 10, classes)
    eraser = SalEraser.fit(x, z, affine=affine)
    out, p = eraser(x), eraser.P
    assert class_gap(out, z) < 1e-12 * class_gap(x, z) * 100
    assert residual(p, x, one_hot(z, classes)) < 1e-12
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.T)
    assert float(torch.linalg.matrix_norm(p, 2)) == pytest.approx(1)
    assert float(p.trace()) == pytest.approx(10 - (classes - 1))
    if affine:
        torch.testing.assert_close(out.mean(0), x.mean(0))
    assert eraser.report["edit_size"] == pytest.approx(
        edit_size(x, out) / float((x - x.mean(0)).square().sum(1).mean())
    )


def test_guarded_iff_k_reaches_the_rank() -> None:
    x, z = sample(600, 10, 4)
    left = [cast("float", SalEraser.fit(x, z, k=k).report["residual"]) for k in (1, 2, 3, 5)]
    assert left[0] > left[1] > 1e-3
    assert max(left[2:]) < 1e-12
    assert SalEraser.fit(x, z, k=5).report["rank"] == 3
    loss = []
    for k in (1, 2, 3):
        out = SalEraser.fit(x, z, k=k)(x)
        loss.append(fit_logistic(out - out.mean(0), z, 4, tol=1e-6).log_loss)
    assert loss[0] < loss[1] < loss[2]
    assert loss[2] == pytest.approx(class_entropy(z, 4), abs=1e-8)


def test_full_rank_is_leace_with_method_orth() -> None:
    x, z = sample(600, 10, 4)
    torch.testing.assert_close(
        SalEraser.fit(x, z).P, LeaceEraser.fit(x, z, method="orth").P, rtol=0, atol=1e-10
    )


def test_directions_are_the_left_singular_vectors() -> None:
    x, z = sample(600, 10, 4)
    u = torch.linalg.svd(cross_covariance(x, one_hot(z, 4)), full_matrices=False).U[:, :2]
    eye = torch.eye(10, dtype=x.dtype)
    torch.testing.assert_close(SalEraser.fit(x, z, k=2).P, eye - u @ u.T)


def test_balance_takes_the_rare_class_first() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.cat([torch.zeros(980), torch.ones(980), torch.full((40,), 2.0)]).long()
    x = 0.1 * torch.randn(2000, 6, generator=g, dtype=torch.float64)
    x[z == 1, 0] += 1
    x[z == 2, 1] += 5
    plain, fair = (SalEraser.fit(x, z, k=1, balance=b) for b in (False, True))
    assert float(plain.proj_right[0, 0].abs()) > 0.9
    assert float(fair.proj_right[0, 1].abs()) > 0.9
    full = [SalEraser.fit(x, z, balance=b).P for b in (False, True)]
    torch.testing.assert_close(*full)


def test_balance_needs_classes() -> None:
    x, _ = sample(200, 5, 2)
    with pytest.raises(ValueError, match="real numbers"):
        SalEraser.fit(x, x[:, 0] ** 3, balance=True)
    assert SalEraser.fit(x, x[:, 0] ** 3).report["rank"] == 1


def test_batches_merges_and_one_pass_agree() -> None:
    x, z = sample(500, 8, 3)
    whole = SalEraser.fit(x, z)
    parts = [SalFitter(8, 3, classes=[0, 1, 2]) for _ in range(2)]
    parts[0].update(x[:3], z[:3]).update(x[3:200], z[3:200])
    parts[1].update(x[200:], [str(v) for v in z[200:].tolist()]).update(x[:0], z[:0])
    merged = parts[1].merge(parts[0])
    torch.testing.assert_close(merged.eraser.P, whole.P)
    assert merged.n == 500
    with pytest.raises(ValueError, match="differ"):
        merged.merge(SalFitter(8, 3, balance=True, classes=[0, 1, 2]))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_z_and_of_x_do_not_matter(scale: float) -> None:
    x, z = sample(500, 8, 3)
    columns = one_hot(z, 3) * torch.tensor([scale, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(SalEraser.fit(x, columns).P, SalEraser.fit(x, z).P)
    torch.testing.assert_close(SalEraser.fit(x * scale, z).P, SalEraser.fit(x, z).P)


def test_weights_masks_and_dtypes() -> None:
    x, z = sample(400, 6, 3)
    weight = torch.arange(400) % 3
    twice = torch.arange(400).repeat_interleave(weight)
    ours = SalEraser.fit(x, z, weight=weight.double())
    theirs = SalEraser.fit(x[twice], z[twice])
    torch.testing.assert_close(ours.P, theirs.P)
    assert ours.report["edit_size"] == pytest.approx(theirs.report["edit_size"])
    masked = SalEraser.fit(x, z, mask=weight > 0)
    torch.testing.assert_close(masked.P, SalEraser.fit(x[weight > 0], z[weight > 0]).P)
    low = SalEraser.fit(x.bfloat16(), z, dtype=torch.bfloat16)
    assert low.proj_left.dtype == torch.float32
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_wide_data_and_large_offsets() -> None:
    x, z = sample(40, 300, 3)
    assert class_gap(SalEraser.fit(x, z)(x), z) < 1e-10
    far = x.float() + 1e3
    assert cast("float", SalEraser.fit(far, z).report["residual"]) < 1e-10


def test_never_forms_a_square_matrix() -> None:
    z = torch.arange(12) % 2
    x = torch.randn(12, 200_000, generator=torch.Generator().manual_seed(0)) + z[:, None]
    assert SalEraser.fit(x, z).report["rank"] == 1


def test_held_out_gap_shrinks_with_rows() -> None:
    x, z = sample(4000, 20, 3)
    gaps = [
        cast(
            "float",
            SalEraser.fit(x[:n], z[:n], held_out=(x[2000:], z[2000:])).report["held_out_gap"],
        )
        for n in (60, 1900)
    ]
    assert gaps[1] < gaps[0]
    assert "held_out_gap" in SalEraser.fit(x[:400], z[:400]).report


def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Method(
        name="sal",
        family="linear",
        target="concept_erasure.linear.sal:SalEraser",
        guarantees=frozenset(),
        summary="",
        paper="",
    )
    monkeypatch.setitem(registry.METHODS, "sal", entry)
    x, z = sample(200, 6, 3)
    eraser = SalEraser.fit(Representations(x, z, None), k=1, balance=True)
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, SalEraser)
    assert torch.equal(loaded(x), eraser(x))
    assert loaded.config == eraser.config


def test_bad_input() -> None:
    x, z = sample(200, 6, 3)
    for k in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            SalEraser.fit(x, z, k=k)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="200"):
        SalEraser.fit(x, z[:-1])
    with pytest.raises(NotFittedError, match="seen 0"):
        _ = SalFitter(6, 3).eraser
    with pytest.raises(ShapeError, match="z_dim"):
        SalFitter(6, 3).update(x, torch.zeros(200, 2))
    with pytest.raises(ValueError, match="in one column"):
        SalFitter(6, 1).update(x, z)
    with pytest.raises(ValueError, match="mask leaves 0"):
        SalEraser.fit(x, z, mask=torch.zeros(200, dtype=torch.bool))
    with pytest.warns(ErasureWarning, match="identity"):
        eraser = SalEraser.fit(x, torch.full((200,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(eraser(x), x)
