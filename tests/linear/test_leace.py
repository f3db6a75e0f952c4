"""LEACE: the theorems of its paper, extreme inputs, streaming, and parity with other derivations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from concept_erasure.errors import NotFittedError
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from tests.linear.samples import (
    class_gap,
    cross_covariance,
    edit_size,
    one_hot,
    residual,
    sample,
    square_root_projection,
)

METHODS = ("leace", "orth")


# ------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_projection(method: str, classes: int) -> None:
    x, z = sample(1500, 24, classes)
    eraser = LeaceEraser.fit(x, z, method=method)
    matrix, eye = eraser.P, torch.eye(24, dtype=torch.float64)
    rank = classes - 1
    assert torch.allclose(matrix @ matrix, matrix, rtol=0, atol=1e-10)
    assert int(torch.linalg.matrix_rank(eye - matrix, rtol=1e-9)) == rank
    assert matrix.trace().item() == pytest.approx(24 - rank, abs=1e-10)
    assert eraser.proj_left.shape == (24, rank)
    assert eraser.proj_right.shape == (rank, 24)
    assert residual(matrix, x, one_hot(z, classes)) <= 1e-12
    assert class_gap(eraser(x), z) <= 1e-12 * class_gap(x, z)
    assert torch.allclose(eraser(x).mean(0), x.mean(0), rtol=0, atol=1e-10)
    if method == "orth":
        assert torch.allclose(matrix, matrix.T, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_without_affine_still_guards(method: str) -> None:
    x, z = sample(1500, 16, 3)
    eraser = LeaceEraser.fit(x, z, method=method, affine=False)
    assert eraser.bias is None
    assert class_gap(eraser(x), z) <= 1e-11 * class_gap(x, z)
    assert torch.allclose(eraser(x), x @ eraser.P.T, rtol=0, atol=1e-10)
    assert edit_size(x, eraser(x)) > edit_size(x, LeaceEraser.fit(x, z, method=method)(x))


def test_low_rank_apply_is_dense_apply() -> None:
    x, z = sample(700, 16, 4)
    eraser = LeaceEraser.fit(x, z)
    center = x.mean(0)
    assert torch.allclose(eraser(x), center + (x - center) @ eraser.P.T, rtol=0, atol=1e-10)
    assert torch.allclose(eraser.map(x), eraser(x), rtol=0, atol=1e-12)
    assert torch.allclose(eraser.map.matrix, eraser.P, rtol=0, atol=1e-12)


def test_folding_into_a_linear_layer() -> None:
    x, z = sample(700, 16, 3)
    eraser = LeaceEraser.fit(x, z)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, generator=generator, dtype=torch.float64)
    for given_bias in (bias, None):
        folded, offset = eraser.map.fold_reading(weight, given_bias)
        want = torch.nn.functional.linear(eraser(x), weight, given_bias)
        assert torch.allclose(torch.nn.functional.linear(x, folded, offset), want, atol=1e-10)
    writer = torch.randn(16, 7, generator=generator, dtype=torch.float64)
    shift = torch.randn(16, generator=generator, dtype=torch.float64)
    inputs = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    for given_shift in (shift, None):
        folded, offset = eraser.map.fold_writing(writer, given_shift)
        want = eraser(torch.nn.functional.linear(inputs, writer, given_shift))
        assert torch.allclose(torch.nn.functional.linear(inputs, folded, offset), want, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_scale_of_z_does_not_matter(method: str, scale: float) -> None:
    x, z = sample(900, 12, 3)
    target = one_hot(z, 3) + 0.3
    want = LeaceEraser.fit(x, target, method=method, z_kind="continuous").P
    got = LeaceEraser.fit(x, target * scale, method=method, z_kind="continuous").P
    assert torch.allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_names_of_the_classes_do_not_matter(method: str) -> None:
    x, z = sample(900, 12, 4)
    want = LeaceEraser.fit(x, z, method=method).P
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(LeaceEraser.fit(x, order[z], method=method).P, want, atol=1e-10)
    binary = (z < 2).long()
    first = LeaceEraser.fit(x, binary, method=method).P
    assert torch.allclose(LeaceEraser.fit(x, 1 - binary, method=method).P, first, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_equivariance(method: str) -> None:
    x, z = sample(900, 12, 3)
    generator = torch.Generator().manual_seed(6)
    square = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(square).Q
    matrix = LeaceEraser.fit(x, z, method=method).P
    turned = LeaceEraser.fit(x @ turn.T, z, method=method).P
    assert torch.allclose(turned, turn @ matrix @ turn.T, rtol=0, atol=1e-9)
    if method == "leace":
        plain = LeaceEraser.fit(x, z, shrinkage=False).P
        mapped = LeaceEraser.fit(x @ square.T, z, shrinkage=False).P
        want = square @ plain @ torch.linalg.inv(square)
        assert torch.allclose(mapped, want, rtol=0, atol=1e-7 * want.abs().max().item())


def test_duplicated_rows_are_weights() -> None:
    x, z = sample(300, 10, 2)
    weight = torch.arange(300) % 3 + 1
    target = one_hot(z, 2)
    twice = LeaceFitter(10, 2, shrinkage=False).update(
        x.repeat_interleave(weight, 0), target.repeat_interleave(weight, 0)
    )
    weighted = LeaceFitter(10, 2, shrinkage=False)
    weighted.update(x, target, weight=weight.double())
    assert torch.allclose(twice.eraser(x), weighted.eraser(x), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- optimality


def test_least_edit_in_every_norm() -> None:
    """First-order optimality: the gradient over the free part (range of P) is 0 for any M."""
    x, z = sample(2000, 10, 3)
    target = one_hot(z, 3)
    matrix = LeaceEraser.fit(x, z, shrinkage=False).P
    centered = x - x.mean(0)
    sigma = centered.T @ centered / len(x)
    cross = cross_covariance(x, target)
    basis = torch.linalg.svd(cross).U[:, :2]
    free = torch.eye(10, dtype=torch.float64) - basis @ basis.T
    generator = torch.Generator().manual_seed(7)
    eye = torch.eye(10, dtype=torch.float64)
    for _ in range(3):
        root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
        metric = root @ root.T
        gradient = 2 * metric @ (matrix - eye) @ sigma @ free
        scale = (metric @ sigma).abs().max()
        assert gradient.abs().max() <= 1e-10 * scale
        least = torch.trace(metric @ (matrix - eye) @ sigma @ (matrix - eye).T)
        for _ in range(20):
            step = 0.1 * torch.randn(10, 10, generator=generator, dtype=torch.float64) @ free
            other = matrix + step - eye
            assert torch.trace(metric @ other @ sigma @ other.T) >= least - 1e-9


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_edit_is_smaller_than_that_of_orth(classes: int) -> None:
    x, z = sample(1500, 16, classes)
    least = edit_size(x, LeaceEraser.fit(x, z, shrinkage=False)(x))
    assert least <= edit_size(x, LeaceEraser.fit(x, z, method="orth")(x)) + 1e-12


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_solve_form_is_the_square_root_form(classes: int) -> None:
    x, z = sample(1500, 16, classes)
    want = square_root_projection(x, one_hot(z, classes))
    got = LeaceEraser.fit(x, z, shrinkage=False).P
    assert torch.allclose(got, want, rtol=0, atol=1e-10)


def test_solve_form_is_the_constrained_least_squares() -> None:
    """d = 6: minimise ||(P - I) S^(1/2)||_F subject to P A = 0, by its linear system (KKT)."""
    x, z = sample(600, 6, 3)
    centered = x - x.mean(0)
    sigma = centered.T @ centered / len(x)
    cross = torch.linalg.svd(cross_covariance(x, one_hot(z, 3)), full_matrices=False).U[:, :2]
    zero = torch.zeros(2, 2, dtype=torch.float64)
    system = torch.cat([torch.cat([sigma, cross], 1), torch.cat([cross.T, zero], 1)])
    right = torch.cat([sigma, torch.zeros(2, 6, dtype=torch.float64)])
    want = torch.linalg.solve(system, right)[:6].T
    assert torch.allclose(LeaceEraser.fit(x, z, shrinkage=False).P, want, rtol=0, atol=1e-10)


def test_trace_of_the_covariance_never_grows() -> None:
    x, z = sample(1500, 16, 4)
    out = LeaceEraser.fit(x, z, shrinkage=False)(x)
    assert out.var(0).sum() <= x.var(0).sum() * (1 + 1e-12)


# --------------------------------------------------------------------- guardedness


@pytest.mark.parametrize("method", METHODS)
def test_logistic_regression_learns_nothing(method: str) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, z = sample(1200, 10, 3)
    out = LeaceEraser.fit(x, z, method=method)(x)
    prior = torch.bincount(z).double() / len(z)
    entropy = -(prior * prior.log()).sum().item()

    def fit_probe(features: Tensor) -> tuple[float, float]:
        rows = (features - features.mean(0)).numpy()
        probe = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=2000).fit(rows, z.numpy())
        likely = probe.predict_proba(rows)[np.arange(len(rows)), z.numpy()]
        return float(np.abs(probe.coef_).max()), float(-np.log(likely).mean())

    size, loss = fit_probe(out)
    assert size < 1e-6
    assert loss == pytest.approx(entropy, abs=1e-8)
    size, loss = fit_probe(x)
    assert size > 0.1
    assert loss < 0.7 * entropy


def test_linear_svm_learns_nothing() -> None:
    svm = pytest.importorskip("sklearn.svm")
    x, z = sample(800, 8, 2)
    out = LeaceEraser.fit(x, z)(x)

    def spread(features: Tensor) -> float:
        rows = (features - features.mean(0)).numpy()
        probe = svm.LinearSVC(C=0.01, dual=False, tol=1e-9, intercept_scaling=10.0)
        return float(np.ptp(probe.fit(rows, z.numpy()).decision_function(rows)))

    assert spread(out) < 1e-3
    assert spread(x) > 0.5


def test_held_out_gap_shrinks_like_root_n() -> None:
    x, z = sample(80_000, 8, 2, seed=3)
    held_x, held_z = x[:40_000], z[:40_000]
    gaps = []
    for rows in (300, 4_800):
        found = []
        for start in range(40_000, 40_000 + 8 * rows, rows):
            part = slice(start, start + rows)
            found.append(class_gap(LeaceEraser.fit(x[part], z[part])(held_x), held_z) ** 2)
        gaps.append(math.sqrt(sum(found) / len(found)))
    assert 2.0 < gaps[0] / gaps[1] < 8.0


def test_guards_whatever_the_shrinkage() -> None:
    x, z = sample(900, 12, 3)
    for shrinkage in (True, False, "auto"):
        eraser = LeaceEraser.fit(x, z, shrinkage=shrinkage)
        assert residual(eraser.P, x, one_hot(z, 3)) <= 1e-12


# -------------------------------------------------------------------------- extremes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(20, 200),
    width=st.integers(1, 40),
    classes=st.integers(2, 5),
    rank=st.integers(1, 40),
    log_scale=st.floats(-6, 6),
    offset=st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 1000),
)
def test_exact_float64(
    rows: int,
    width: int,
    classes: int,
    rank: int,
    log_scale: float,
    offset: float,
    method: str,
    seed: int,
) -> None:
    x, z = sample(rows, width, classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    thin = torch.randn(width, min(rank, width), generator=generator, dtype=torch.float64)
    x = ((x - x.mean(0)) @ thin @ thin.T + offset) * 10.0**log_scale
    eraser = LeaceEraser.fit(x, z, method=method)
    assert torch.isfinite(eraser(x)).all()
    assert eraser.map.rank <= min(width, classes - 1)
    # x itself is rounded to eps * offset, so A is known to that only
    noise = 1e-13 * offset * 10.0**log_scale * math.sqrt(width)
    cross = cross_covariance(x, one_hot(z, classes))
    left = torch.linalg.matrix_norm(eraser.P @ cross)
    assert left <= 1e-12 * torch.linalg.matrix_norm(cross) + noise


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    log_scale=st.floats(-6, 6),
    log_prevalence=st.floats(-3, -0.31),
    strength=st.floats(0.05, 3.0),
    seed=st.integers(0, 1000),
)
def test_prevalence_and_label_scale(
    log_scale: float, log_prevalence: float, strength: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 4000
    z = torch.zeros(rows, dtype=torch.float64)
    z[: max(4, round(rows * 10**log_prevalence))] = 10.0**log_scale
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    x += (z > 0)[:, None] * strength
    eraser = LeaceEraser.fit(x, z, z_kind="continuous")
    assert eraser.map.rank == 1
    assert residual(eraser.P, x, z[:, None]) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_exactness_at_offsets(method: str, dtype: torch.dtype, bound: float, offset: float) -> None:
    x, z = sample(2000, 32, 3)
    if dtype == torch.bfloat16:  # near 1e4 it resolves 64, so the spread must be larger than that
        x = x * 200
    x = (x + offset).to(dtype)
    eraser = LeaceEraser.fit(x, z, method=method)
    assert residual(eraser.P.double(), x.double(), one_hot(z, 3)) <= bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_more_features_than_rows(method: str, dtype: torch.dtype) -> None:
    x, z = sample(40, 160, 3)
    x = x.to(dtype)
    eraser = LeaceEraser.fit(x, z, method=method)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert residual(eraser.P.double(), x.double(), one_hot(z, 3)) <= bound
    assert eraser(x).dtype == dtype
    assert torch.isfinite(eraser(x)).all()


@pytest.mark.parametrize("method", METHODS)
def test_rare_class(method: str) -> None:
    """A class in 0.1 % of the rows: 20 of 20,000; concept-erasure 0.2.4 erases nothing here."""
    x, _ = sample(20_000, 16, 2)
    z = torch.zeros(20_000, dtype=torch.long)
    z[:20] = 1
    x[:20] += 0.4
    eraser = LeaceEraser.fit(x, z, method=method)
    assert eraser.map.rank == 1
    assert residual(eraser.P, x, one_hot(z, 2)) <= 1e-12
    assert class_gap(eraser(x), z) <= 1e-10 * class_gap(x, z)


def test_three_integer_classes_are_classes() -> None:
    x, z = sample(900, 12, 3)
    eraser = LeaceEraser.fit(x, z)
    assert eraser.map.rank == 2
    assert class_gap(eraser(x), z) <= 1e-12 * class_gap(x, z)
    assert LeaceEraser.fit(x, z, z_kind="continuous").map.rank == 1


def test_constant_and_duplicated_features() -> None:
    x, z = sample(900, 8, 3)
    x = torch.cat([x, x[:, :3], torch.full((900, 2), 4.0, dtype=torch.float64)], 1)
    for shrinkage in (True, False):
        eraser = LeaceEraser.fit(x, z, shrinkage=shrinkage)
        out = eraser(x)
        assert residual(eraser.P, x, one_hot(z, 3)) <= 1e-12
        assert torch.allclose(out[:, :3], out[:, 8:11], rtol=0, atol=1e-8)
        assert torch.allclose(out[:, 11:], x[:, 11:], rtol=0, atol=1e-8)


def test_concepts_jointly() -> None:
    """Columns side by side are erased together; one eraser after the other is not the same."""
    x, z = sample(1500, 16, 3)
    other = (x[:, 0] + 0.3 * x[:, 1] > x[:, 0].median()).long()
    target = torch.cat([one_hot(z, 3), other[:, None].double()], 1)
    eraser = LeaceEraser.fit(x, target)
    assert eraser.map.rank == 3
    assert class_gap(eraser(x), z) <= 1e-11 * class_gap(x, z)
    assert class_gap(eraser(x), other) <= 1e-11 * class_gap(x, other)


def test_rank_budget_takes_the_strongest() -> None:
    x, z = sample(1500, 16, 5)
    target = one_hot(z, 5)
    left = []
    for rank in (1, 2, 3, 4):
        eraser = LeaceEraser.fit(x, z, rank=rank)
        assert eraser.report["residual"] == pytest.approx(residual(eraser.P, x, target), abs=1e-12)
        assert eraser.map.rank == rank
        left.append(residual(eraser.P, x, target))
    assert left[0] > left[1] > left[2] > left[3]
    assert left[3] <= 1e-12


@pytest.mark.filterwarnings("ignore")
def test_strength() -> None:
    x, z = sample(900, 12, 2)
    full = LeaceEraser.fit(x, z)(x) - x
    for strength in (0.0, 0.5, 2.0):
        out = LeaceEraser.fit(x, z, strength=strength)(x)
        assert torch.allclose(out - x, strength * full, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_one_pass_are_shards(method: str) -> None:
    x, z = sample(1000, 12, 3)
    x = x + 100
    target = one_hot(z, 3)
    want = LeaceEraser.fit(x, target, method=method, shrinkage=False)(x)
    cuts = [1, 2, 297, 0, 400, 300]
    parts = list(zip(x.split(cuts), target.split(cuts), strict=True))
    for order in (parts, parts[::-1]):
        fitter = LeaceFitter(12, 3, method, shrinkage=False)
        for rows, labels in order:
            fitter.update(rows, labels)
        assert torch.allclose(fitter.eraser(x), want, rtol=0, atol=1e-10)
    shards = [LeaceFitter(12, 3, method, shrinkage=False).update(*part) for part in parts]
    merged = LeaceFitter(12, 3, method, shrinkage=False)
    for shard in shards[::-1]:
        merged.merge(shard)
    assert torch.allclose(merged.eraser(x), want, rtol=0, atol=1e-10)


def test_eraser_follows_the_statistics() -> None:
    x, z = sample(600, 8, 2)
    target = one_hot(z, 2)
    fitter = LeaceFitter(8, 2).update(x[:300], target[:300])
    first = fitter.eraser.P
    assert fitter.eraser is fitter.eraser
    assert not torch.allclose(fitter.update(x[300:], target[300:]).eraser.P, first)


def test_leading_shape_and_mask() -> None:
    x, z = sample(600, 8, 2)
    target = one_hot(z, 2)
    mask = torch.arange(600).reshape(20, 30) % 30 < 25
    kept = mask.flatten()
    spoiled = x.clone()
    spoiled[~kept] = float("nan")
    want = LeaceEraser.fit(x[kept], z[kept])(x[kept])
    got = LeaceEraser.fit(spoiled.reshape(20, 30, 8), z.reshape(20, 30), mask=mask)(x[kept])
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
    fitter = LeaceFitter(8, 2)
    fitter.update(spoiled.reshape(20, 30, 8), target.reshape(20, 30, 2), mask=mask)
    assert torch.allclose(fitter.eraser(x[kept]), want, rtol=0, atol=1e-10)


def test_nothing_seen_yet() -> None:
    with pytest.raises(NotFittedError):
        LeaceFitter(4, 2).eraser  # noqa: B018


def test_report_has_the_residual() -> None:
    x, z = sample(900, 12, 3)
    held = sample(500, 12, 3, seed=9)
    report = LeaceEraser.fit(x, z).report
    assert any("residual" in key for key in report)
    longer = LeaceEraser.fit(x, z, held_out=held).report
    assert longer["held_out_gap"] != report["held_out_gap"]
    assert set(longer) == set(report)


# ------------------------------------------------------------------------------ parity

CHILD = """
import sys
from safetensors.torch import load_file, save_file
from concept_erasure import LeaceEraser
data = load_file(sys.argv[1])
x, out = data["x"], {}
for kind in ("binary", "onehot", "real"):
    for method in ("leace", "orth"):
        for affine in (True, False):
            eraser = LeaceEraser.fit(
                x, data[kind], method=method, affine=affine, shrinkage=False, svd_tol=1e-9)
            out[f"{kind}-{method}-{affine}"] = eraser(x).contiguous()
save_file(out, sys.argv[2])
"""


@pytest.mark.reference
def test_parity_with_concept_erasure(tmp_path: Path) -> None:
    """Set CONCEPT_ERASURE_REFERENCE to a folder where concept-erasure 0.2.4 is installed."""
    folder = os.environ.get("CONCEPT_ERASURE_REFERENCE")
    if not folder:
        pytest.skip("CONCEPT_ERASURE_REFERENCE names no folder with concept-erasure 0.2.4")
    x, z = sample(1500, 16, 3)
    real = x[:, :2] @ torch.tensor([[1.0, 0.2], [0.5, -1.0]], dtype=torch.float64) + x[:, 3:5] ** 2
    data = {"x": x, "binary": (z == 0).double(), "onehot": one_hot(z, 3), "real": real}
    save_file(data, tmp_path / "in.safetensors")
    environment = {**os.environ, "PYTHONPATH": folder}
    files = [str(tmp_path / f"{name}.safetensors") for name in ("in", "out")]
    command = [sys.executable, "-c", CHILD, *files]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=120)
    want = load_file(tmp_path / "out.safetensors")
    for name, value in want.items():
        kind, method, affine = name.split("-")
        eraser = LeaceEraser.fit(
            x,
            data[kind],
            method=method,
            affine=affine == "True",
            shrinkage=False,
            z_kind="continuous",
        )
        assert (eraser(x) - value).abs().max() < 1e-10, name


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_report_has_the_size_of_the_edit(strength: float) -> None:
    x, z = sample(900, 12, 3)
    eraser = LeaceEraser.fit(x, z, shrinkage=False, strength=strength)
    moved = (eraser(x) - x).square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
    assert eraser.report["edit_size"] == pytest.approx(float(moved), rel=1e-9)
