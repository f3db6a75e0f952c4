"""Support vector probe: scikit-learn's LinearSVC is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.probes import SvmProbe
from tests.probes.test_linear import data, one_large_direction


@pytest.mark.parametrize("penalty", [0.05, 1.0])
@pytest.mark.parametrize(("n", "d", "k"), [(300, 6, 2), (200, 6, 4), (40, 60, 2)])
def test_close_to_sklearn(n: int, d: int, k: int, penalty: float) -> None:
    x, z = data(n, d, k)
    ours = SvmProbe(C=penalty, standardize=None).fit(x, z)
    # A large scaling makes LIBLINEAR's penalty of the intercept negligible.
    theirs = LinearSVC(
        C=penalty,
        dual=False,
        loss="squared_hinge",
        tol=1e-10,
        max_iter=50000,
        intercept_scaling=100.0,
    ).fit(x.numpy(), z.numpy())
    np.testing.assert_allclose(ours.coef.numpy(), theirs.coef_, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(ours.intercept.numpy(), theirs.intercept_, atol=1e-3, rtol=1e-3)
    assert ours.predict(x) == theirs.predict(x.numpy()).tolist()
    assert ours.gradient <= 1e-8


def test_shifting_the_data_changes_only_the_intercept() -> None:
    x, z = data(200, 5, 2)
    here, there = SvmProbe().fit(x, z), SvmProbe().fit(x + 1e3, z)
    torch.testing.assert_close(here.coef, there.coef, atol=1e-6, rtol=1e-6)


def test_gives_no_probabilities() -> None:
    x, z = data(50, 3, 2)
    fitted = SvmProbe().fit(x, z)
    assert fitted.decision(x).shape == (50, 2)
    with pytest.raises(TypeError, match="not probabilities"):
        fitted.log_loss(x, z)


def test_bad_input_and_too_few_steps() -> None:
    x, z = data(50, 3, 2)
    with pytest.raises(ShapeError, match="matrix"):
        SvmProbe().fit(x[None], z)
    with pytest.raises(ValueError, match="C must be positive"):
        SvmProbe(C=-1)
    with pytest.warns(ErasureWarning, match="svm"):
        SvmProbe(C=1.0, max_iter=1).fit(x, z)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_units_of_x_do_not_matter(scale: float) -> None:
    x, z = data(200, 5, 3)
    here, there = SvmProbe().fit(x, z), SvmProbe().fit(x * scale, z)
    torch.testing.assert_close(there.decision(x * scale), here.decision(x), atol=1e-6, rtol=1e-6)
    assert SvmProbe(standardize=None).fit(x * 1e-3, z).decision(x * 1e-3).std() < 0.5


@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_large_direction_does_not_hide_the_others(size: float, rotated: bool) -> None:
    x, z = one_large_direction(size, rotated=rotated)
    assert SvmProbe().fit(x[:600], z[:600]).accuracy(x[600:], z[600:]) > 0.8
