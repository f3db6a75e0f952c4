"""Logistic probe: scikit-learn is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from concept_erasure.errors import ConceptErasureError, ErasureWarning, ShapeError
from concept_erasure.probes import LinearProbe
from concept_erasure.probes._ridge import Scaling


def data(n: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return x, (2 * x[:, :k] + 2 * noise).argmax(dim=1)


def one_large_direction(
    size: float, *, rotated: bool, concept: float = 1.0, d: int = 32
) -> tuple[Tensor, Tensor]:
    """A concept 2 deviations apart along one axis, and an unrelated axis of the given size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3600, d, generator=generator, dtype=torch.float64)
    z = torch.rand(3600, generator=generator) < 0.5
    x[:, 3] = (x[:, 3] + 2 * z.double()) * concept
    x[:, 9] *= size
    if rotated:
        x = x @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return x, z


def decaying(n: int, d: int, axis: int) -> tuple[Tensor, Tensor]:
    """Variances that fall like i^-2, and a concept 2 deviations apart along one of the directions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z = torch.rand(n, generator=generator) < 0.5
    x[:, axis] += 2 * z.double()
    x = x / torch.arange(1, d + 1, dtype=torch.float64)
    return x @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0], z


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("n", "d", "k"), [(300, 6, 2), (300, 6, 4), (40, 60, 2), (60, 90, 3)])
def test_agrees_with_sklearn(n: int, d: int, k: int, penalty: float) -> None:
    x, z = data(n, d, k)
    ours = LinearProbe(C=penalty, standardize=None).fit(x, z)
    theirs = LogisticRegression(C=penalty, tol=1e-10, max_iter=20000).fit(x.numpy(), z.numpy())
    np.testing.assert_allclose(ours.coef.numpy(), theirs.coef_, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours.intercept.numpy(), theirs.intercept_, atol=1e-4, rtol=1e-4)
    expected = log_loss(z.numpy(), theirs.predict_proba(x.numpy()))
    assert abs(ours.log_loss(x, z) - expected) < 1e-4
    assert ours.accuracy(x, z) == pytest.approx(theirs.score(x.numpy(), z.numpy()))
    assert ours.gradient <= 1e-8


def test_badly_scaled_and_shifted_columns() -> None:
    x, z = data(400, 5, 2)
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 30.0], dtype=torch.float64)
    ours = LinearProbe(C=10.0, standardize=None).fit(x * scale + 1e4, z)
    theirs = LogisticRegression(C=10.0, tol=1e-12, max_iter=20000, solver="newton-cholesky")
    theirs.fit((x * scale).numpy(), z.numpy())
    np.testing.assert_allclose(ours.coef.numpy(), theirs.coef_, atol=1e-4, rtol=1e-4)
    assert ours.iterations < 100


def test_the_gradient_is_zero_at_the_solution() -> None:
    x, z = data(200, 8, 3)
    fitted = LinearProbe(C=3.0, standardize=None).fit(x, z)
    coef = fitted.coef.clone().requires_grad_()
    intercept = fitted.intercept.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ coef.T + intercept, z)
    torch.autograd.backward(loss + coef.square().sum() / (2 * 3.0 * len(x)))
    assert coef.grad is not None
    assert intercept.grad is not None
    assert float(coef.grad.abs().max()) < 1e-7
    assert float(intercept.grad.abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("z", "classes"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ((True, False, True, False), (False, True)),
        ([3, -1, 3, -1], (-1, 3)),
        (np.array(["b", "a", "b", "a"]), ("a", "b")),
        (np.array([1.0, 0.0, 1.0, 0.0]), (0, 1)),
        (torch.tensor([True, False, True, False]), (False, True)),
        (torch.tensor([[1], [0], [1], [0]]), (0, 1)),
        (list(torch.tensor([1, 0, 1, 0])), (0, 1)),
        (list(np.array(["b", "a", "b", "a"])), ("a", "b")),
    ],
)
def test_any_kind_of_label(z: object, classes: tuple[object, ...]) -> None:
    fitted = LinearProbe().fit(torch.tensor([[1.0], [-1.0], [2.0], [-2.0]]), z)
    assert fitted.classes == classes
    assert [type(c) for c in fitted.classes] == [type(c) for c in classes]
    assert fitted.predict(torch.tensor([[5.0], [-5.0]])) == [classes[1], classes[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_dtype_of_vectors(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [2, 1], [-2, 1]]).to(dtype)
    before = x.clone()
    with torch.inference_mode():
        assert LinearProbe().fit(x, [1, 0, 1, 0]).accuracy(x, [1, 0, 1, 0]) == 1
    assert torch.equal(x, before)
    rows = x.float().tolist()
    assert LinearProbe().fit(rows, [1, 0, 1, 0]).accuracy(x.float().numpy(), [1, 0, 1, 0]) == 1


def test_numpy_views_are_accepted() -> None:
    x = np.arange(8.0).reshape(4, 2)[::-1]
    x.flags.writeable = False
    assert LinearProbe().fit(x, [1, 1, 0, 0]).width == 2


def test_data_frames_are_accepted() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, -1.0, 2.0, -2.0], "z": ["p", "q", "p", "q"]})
    fitted = LinearProbe().fit(frame[["a"]], frame["z"].astype("category"))
    assert fitted.predict(frame[["a"]]) == list(frame["z"])


def test_constant_vectors_leave_the_class_frequencies() -> None:
    z = [0] * 30 + [1] * 10
    fitted = LinearProbe().fit(torch.ones(40, 3), z)
    assert torch.allclose(fitted.predict_proba(torch.ones(1, 3))[0, 1], torch.tensor(0.25).double())


X = torch.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize(
    ("x", "z", "error", "message"),
    [
        (X, [1, 1, 1, 1], ValueError, "at least two classes"),
        (X, [1, 0, 1], ShapeError, "3 labels for 4 vectors"),
        (X[None], [0, 1, 0, 1], ShapeError, r"\[1, 4, 2\]"),
        (X[0], [0, 1], ShapeError, "must be a matrix"),
        (X[:0], [], ShapeError, "at least one row"),
        (X.log() * 0, [0, 1, 0, 1], ValueError, "in 1 of 4 rows, the first is row 0"),
        (X * 1j, [0, 1, 0, 1], TypeError, "real"),
        (X, [0.5, 1.0, 0.5, 1.0], ValueError, "continuous"),
        (X, [0.0, float("nan"), 0.0, 1.0], ValueError, "nan in row 1"),
        (X, [0, "a", 0, "a"], TypeError, "mixes"),
        (X, [True, 0, False, 1], TypeError, "mixes"),
        (X, [None, "a", "a", "b"], TypeError, "NoneType"),
        (X, torch.eye(4), ShapeError, "one-hot"),
        (X, "abab", TypeError, "sequence"),
        (X, 3, TypeError, "sequence"),
        ([[1.0], [1.0, 2.0]], [0, 1], TypeError, "rows of numbers"),
    ],
)
def test_bad_input(x: Tensor, z: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearProbe().fit(x, z)


def test_bad_input_to_a_fitted_probe() -> None:
    fitted = LinearProbe().fit(X, [0, 1, 0, 1])
    with pytest.raises(ConceptErasureError, match="width 2"):
        fitted.predict(X[:, :1])
    with pytest.raises(ValueError, match="not seen"):
        fitted.accuracy(X, [0, 1, 0, 2])
    with pytest.raises(ValueError, match="NaN"):
        fitted.decision(X * float("nan"))


@pytest.mark.parametrize(
    "options",
    [{"C": 0.0}, {"C": float("inf")}, {"tol": 0.0}, {"max_iter": 0}, {"standardize": "rows"}],
)
def test_bad_configuration(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LinearProbe(**options)  # type: ignore[arg-type]


def test_too_few_steps_are_reported() -> None:
    x, z = data(100, 5, 2)
    with pytest.warns(ErasureWarning, match="stopped after 1 steps"):
        LinearProbe(max_iter=1).fit(x, z)


def test_separable_data_with_a_weak_penalty_converges() -> None:
    x, _ = data(200, 20, 2)
    fitted = LinearProbe(C=1e5).fit(x, x[:, 0] > 0)
    assert fitted.gradient <= 1e-8
    assert fitted.accuracy(x, x[:, 0] > 0) == 1


@pytest.mark.parametrize("standardize", ["auto", "median", "clip", "whiten", "global", "feature"])
@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e-3, 1e3, 1e20, 1e200])
def test_units_of_x_do_not_matter(scale: float, standardize: Scaling) -> None:
    x, z = data(300, 5, 2)
    x = x + 2
    want = LinearProbe(standardize=standardize).fit(x, z)
    ours = LinearProbe(standardize=standardize).fit(x * scale, z)
    assert ours.log_loss(x * scale, z) == pytest.approx(want.log_loss(x, z), abs=1e-9)
    torch.testing.assert_close(ours.predict_proba(x * scale), want.predict_proba(x))


def test_tiny_vectors_are_read_as_well_as_large_ones() -> None:
    x, z = data(400, 4, 2)
    fitted = LinearProbe().fit(x * 1e-3, z)
    assert fitted.log_loss(x * 1e-3, z) < 0.5
    assert LinearProbe(standardize=None).fit(x * 1e-3, z).log_loss(x * 1e-3, z) > 0.65


def test_global_units_are_one_number() -> None:
    x, z = data(300, 4, 2)
    x = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
    size = float(x.var(dim=0, correction=0).mean().sqrt())
    want = LinearProbe(standardize=None).fit(x / size, z)
    torch.testing.assert_close(
        LinearProbe(C=1.0, standardize="global").fit(x, z).coef * size, want.coef
    )


@pytest.mark.parametrize("k", [2, 3])
def test_feature_units_agree_with_sklearn(k: int) -> None:
    x, z = data(300, 5, k)
    x = x * torch.tensor([1e-3, 1.0, 1e3, 1.0, 30.0]) + 1
    ours = LinearProbe(C=1.0, standardize="feature").fit(x, z)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=5000))
    theirs.fit(x.numpy(), z.numpy())
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x.numpy()), atol=1e-4)


def test_a_constant_feature_stays_harmless() -> None:
    x, z = data(100, 3, 2)
    wide = torch.cat([x, torch.full((100, 1), 1e4, dtype=x.dtype)], 1)
    fitted = LinearProbe(standardize="feature").fit(wide, z)
    want = LinearProbe(standardize="feature").fit(x, z)
    torch.testing.assert_close(fitted.predict_proba(wide), want.predict_proba(x))


@pytest.mark.parametrize("size", [1e3, 1e4, 1e8])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_large_direction_does_not_hide_the_others(size: float, rotated: bool) -> None:
    x, z = one_large_direction(size, rotated=rotated)
    fitted = LinearProbe().fit(x[:600], z[:600])
    assert fitted.accuracy(x[600:], z[600:]) > 0.8
    assert fitted.log_loss(x[600:], z[600:]) < 0.42
    old = LinearProbe(C=1.0, standardize="global").fit(x[:600], z[:600])
    assert old.log_loss(x[600:], z[600:]) > 0.65


@pytest.mark.parametrize("concept", [1e-1, 1e-2])
def test_a_small_direction_is_read(concept: float) -> None:
    x, z = one_large_direction(1e3, rotated=True, concept=concept)
    fitted = LinearProbe().fit(x[:600], z[:600])
    assert fitted.accuracy(x[600:], z[600:]) > 0.78
    if concept == 1e-2:
        assert fitted.standardize == "whiten"


def test_few_rows_and_many_directions_do_not_leave_chance() -> None:
    x, z = decaying(2400, 300, 40)
    fitted = LinearProbe().fit(x[:400], z[:400])
    assert fitted.standardize == "median"  # whitening would know the rows held out
    assert fitted.accuracy(x[400:], z[400:]) > 0.72
    assert fitted.log_loss(x[400:], z[400:]) < 0.6
    whole = LinearProbe(C=1.0, standardize="whiten").fit(x[:400], z[:400])
    assert whole.accuracy(x[400:], z[400:]) < fitted.accuracy(x[400:], z[400:]) - 0.04
    assert whole.log_loss(x[400:], z[400:]) > 0.7


@pytest.mark.parametrize("k", [2, 3])
def test_nothing_is_read_where_nothing_is(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 60, generator=generator)
    z = torch.randint(0, k, (1500,), generator=generator)
    fitted = LinearProbe().fit(x[:500], z[:500])
    assert fitted.log_loss(x[500:], z[500:]) < float(torch.tensor(k).log()) + 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_left_by_a_projection_is_not_read(dtype: torch.dtype) -> None:
    x, z = data(1500, 12, 2)
    gap = x[z == 1].mean(0) - x[z == 0].mean(0)
    gap = (gap / gap.norm()).to(dtype)
    x = x.to(dtype)
    erased = x - (x @ gap)[:, None] * gap
    fitted = LinearProbe().fit(erased, z)
    assert fitted.log_loss(erased, z) > 0.68


def test_groups_keep_together_what_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.arange(60).repeat_interleave(8)
    z = torch.rand(60, generator=generator) < 0.5
    x = 5 * torch.randn(60, 40, generator=generator)[text]
    x = x + torch.randn(480, 40, generator=generator)
    test = 5 * torch.randn(800, 40, generator=generator)
    truth = torch.rand(800, generator=generator) < 0.5
    losses = [
        LinearProbe().fit(x, z[text], groups=groups).log_loss(test, truth)
        for groups in (text, None)
    ]
    assert losses[0] < 0.75 < losses[1]


def test_a_given_c_is_used_as_it_is() -> None:
    x, z = data(300, 4, 2)
    fitted = LinearProbe(C=3.0).fit(x, z)
    assert (fitted.C, fitted.standardize) == (3.0, "median")
    assert LinearProbe(standardize=None).fit(x, z).C == 1
    with pytest.raises(ValueError, match="'auto'"):
        LinearProbe(C="best")  # type: ignore[arg-type]
