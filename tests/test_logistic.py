"""The logistic best response: the same minimum as scikit-learn's, with few looks at the device."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from concept_erasure.errors import ShapeError
from concept_erasure.logistic import CHECK, fit_logistic
from tests.fake_cuda import fake_cuda, to_cuda
from tests.linear.samples import sample


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [1e-4, 1e-1])
def test_agrees_with_sklearn(classes: int, penalty: float) -> None:
    x, z = sample(400, 9, classes)
    x = x * torch.logspace(1, -1, 9, dtype=x.dtype) + 3
    fit = fit_logistic(x, z, classes, penalty=penalty, tol=1e-12)
    one = LogisticRegression(
        C=1 / (penalty * len(x)), solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(x.numpy(), z.numpy())
    want = torch.from_numpy(one.coef_)
    assert float((fit.coef - want).abs().max()) <= 1e-8 * float(want.abs().max())
    chance = fit.logits(x).softmax(1)
    torch.testing.assert_close(
        chance, torch.from_numpy(one.predict_proba(x.numpy())), rtol=0, atol=1e-8
    )


def test_is_at_its_minimum() -> None:
    x, z = sample(300, 6, 3)
    fit = fit_logistic(x, z, 3, penalty=1e-2, tol=1e-10)
    chance = fit.logits(x).softmax(1) - torch.nn.functional.one_hot(z)
    gradient = chance.T @ x / 300 + 1e-2 * fit.coef
    assert float(gradient.abs().max()) < 1e-8
    again = fit_logistic(x, z, 3, penalty=1e-2, start=fit, tol=1e-7)
    assert again.evaluations < fit.evaluations / 5
    assert fit.measure(x, z)[0] == pytest.approx(fit.log_loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separable_rows_of_any_scale(dtype: torch.dtype) -> None:
    """Almost no penalty, outliers, and directions a million times smaller than others."""
    x, z = sample(200, 8, 2)
    x[:, 0] += 4 * z
    x[::17] *= 100
    x = (x * torch.logspace(3, -3, 8, dtype=x.dtype)).to(dtype)
    fit = fit_logistic(x - x.mean(0), z, 2, penalty=1e-7, max_iter=2000)
    assert fit.gradient <= max(1e-8, 20 * torch.finfo(dtype).eps)
    assert fit.coef.isfinite().all()


def test_the_host_waits_once_every_few_steps() -> None:
    x, z = sample(120, 6, 3)
    with fake_cuda() as mode:
        fit = fit_logistic(to_cuda(x), to_cuda(z), 3, penalty=1e-2)
    steps = fit.evaluations - 1
    assert steps > 2 * CHECK
    assert mode.trips.total() <= steps / CHECK + 8


def test_bad_inputs() -> None:
    x, z = sample(300, 6, 3)
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        fit_logistic(x, z[:-1], 3)
    with pytest.raises(ValueError, match="needs rows"):
        fit_logistic(x, torch.zeros_like(z), 2)
    with pytest.raises(ValueError, match="penalty"):
        fit_logistic(x, z, 3, penalty=0)
