"""Nearest class mean: scikit-learn's NearestCentroid and LDA are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid

from concept_erasure import LeaceEraser
from concept_erasure.probes import CentroidProbe, cross_validate
from concept_erasure.probes.centroid import Covariance
from tests.probes.test_linear import data


@pytest.mark.parametrize("k", [2, 4])
def test_nearest_mean_agrees_with_sklearn(k: int) -> None:
    x, z = data(300, 6, k)
    ours = CentroidProbe().fit(x, z)
    theirs = NearestCentroid().fit(x.numpy(), z.numpy())
    np.testing.assert_allclose(ours.means.numpy(), theirs.centroids_, atol=1e-12)
    assert ours.predict(x) == theirs.predict(x.numpy()).tolist()
    distances = torch.cdist(x, ours.means)
    assert torch.equal(ours.predict_index(x), distances.argmin(dim=1))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [2, 3])
def test_shared_covariance_is_linear_discriminant_analysis(k: int, shrinkage: float) -> None:
    x, z = data(200, 5, k)
    x = x @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=x.dtype) + 10
    probe = CentroidProbe(covariance="shared", prior="empirical", shrinkage=shrinkage)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    theirs.fit(x.numpy(), z.numpy())
    np.testing.assert_allclose(
        probe.fit(x, z).predict_proba(x).numpy(), theirs.predict_proba(x.numpy()), atol=1e-8
    )


def test_diagonal_covariance() -> None:
    x, z = data(200, 4, 2)
    x = x * torch.tensor([1.0, 5.0, 0.1, 2.0])
    fitted = CentroidProbe(covariance="diagonal", prior="empirical").fit(x, z)
    oracle = GaussianNB(var_smoothing=0).fit(x.numpy(), z.numpy())
    oracle.var_[:] = (oracle.var_ * oracle.class_count_[:, None]).sum(0) / len(x)
    np.testing.assert_allclose(
        fitted.predict_proba(x).numpy(), oracle.predict_proba(x.numpy()), atol=1e-9
    )
    one = CentroidProbe(covariance="diagonal", shrinkage=1.0).fit(x, z)
    torch.testing.assert_close(one.decision(x), CentroidProbe().fit(x, z).decision(x))


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "shared"])
def test_units_and_offset_do_not_matter(covariance: Covariance) -> None:
    x, z = data(150, 5, 3)
    probe = CentroidProbe(covariance=covariance)
    for scale, offset in ((1e-200, 0.0), (1e200, 0.0), (1.0, 1e5)):
        there = probe.fit(x * scale + offset, z).decision(x * scale + offset)
        difference = there - there.mean(1, keepdim=True)
        here = probe.fit(x, z).decision(x)
        torch.testing.assert_close(
            difference, here - here.mean(1, keepdim=True), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "shared"])
def test_erased_vectors_tell_nothing_even_when_constant(covariance: Covariance) -> None:
    x, z = data(200, 4, 2)
    x = torch.cat([x, torch.ones(200, 1).double(), x[:, :1]], dim=1)
    erased = LeaceEraser.fit(x, z)(x)
    fitted = CentroidProbe(covariance=covariance, prior="empirical", shrinkage=0.0).fit(erased, z)
    rates = torch.bincount(z).double() / 200
    torch.testing.assert_close(
        fitted.predict_proba(erased), rates.expand(200, 2), atol=1e-6, rtol=0
    )


def test_more_features_than_vectors_and_perfect_classes() -> None:
    x, z = data(40, 60, 2)
    result = cross_validate(x, z, probe=CentroidProbe(covariance="shared"))
    assert result.accuracy > 0.5
    fitted = CentroidProbe().fit(torch.tensor([[0.0], [0.0], [1.0]]), ["a", "a", "b"])
    assert fitted.predict([[0.1], [0.9]]) == ["a", "b"]
    assert fitted.log_loss([[0.0], [1.0]], ["a", "b"]) < 1e-9


def test_priors_favour_frequent_classes() -> None:
    x = torch.tensor([[-1.0], [1.0], [9.0], [11.0]]).repeat(10, 1)
    x, z = x[:30], ([0, 0, 1, 1] * 10)[:30]
    x, z = torch.cat([x, x[:2].repeat(20, 1)]), z + [0, 0] * 20
    equal, weighted = CentroidProbe(), CentroidProbe(prior="empirical")
    border = torch.tensor([[5.02]])
    assert equal.fit(x, z).predict(border) == [1]
    assert weighted.fit(x, z).predict(border) == [0]


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="covariance must be"):
        CentroidProbe(covariance="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior must be"):
        CentroidProbe(prior="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shrinkage must be"):
        CentroidProbe(shrinkage=1.5)
    with pytest.raises(ValueError, match="two classes"):
        CentroidProbe().fit([[1.0], [2.0]], [1, 1])
