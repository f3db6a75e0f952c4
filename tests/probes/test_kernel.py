"""Kernel probe: scikit-learn's KernelRidge, LogisticRegression on the kernel, and SVC are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import one_hot

from concept_erasure import LeaceEraser
from concept_erasure.probes import KernelProbe, evaluate
from concept_erasure.probes.kernel import Approximation, median_gamma
from tests.probes.test_linear import data, one_large_direction


def ring(n: int, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes that differ in the length of two coordinates, with one mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, (x[:, :2].norm(dim=1) > 1.18).long()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_exact_ridge_agrees_with_sklearn(k: int, penalty: float) -> None:
    x, z = data(120, 5, k)
    fitted = KernelProbe(C=penalty, gamma=0.2, loss="ridge", standardize=None).fit(x[:80], z[:80])
    target = one_hot(z[:80], k).double()
    mean = target.mean(0)
    oracle = KernelRidge(alpha=1 / penalty, kernel="rbf", gamma=0.2)
    oracle.fit(x[:80].numpy(), (target - mean).numpy())
    expected = oracle.predict(x.numpy()) + mean.numpy()
    np.testing.assert_allclose(fitted.decision(x).numpy(), expected, atol=1e-7)
    with pytest.raises(TypeError, match="not probabilities"):
        fitted.predict_proba(x)


@pytest.mark.parametrize("k", [2, 3])
def test_exact_logistic_agrees_with_sklearn_on_the_kernel(k: int) -> None:
    x, z = data(90, 4, k)
    fitted = KernelProbe(C=2.0, gamma=0.3, standardize=None).fit(x[:60], z[:60])
    values, vectors = np.linalg.eigh(rbf_kernel(x[:60].numpy(), gamma=0.3))
    root = vectors * np.sqrt(values.clip(0))
    oracle = LogisticRegression(C=2.0, tol=1e-10, max_iter=20000).fit(root, z[:60].numpy())
    proba = oracle.predict_proba(root)
    np.testing.assert_allclose(fitted.predict_proba(x[:60]).numpy(), proba, atol=1e-4)
    assert fitted.kind == "exact"


def test_reads_what_a_linear_probe_cannot_and_as_well_as_a_support_vector_machine() -> None:
    x, z = ring(700)
    train, test = slice(0, 400), slice(400, 700)
    linear = evaluate(x[train], z[train], x[test], z[test])
    kernel = evaluate(x[train], z[train], x[test], z[test], probe="kernel")
    oracle = SVC(gamma="scale", C=10.0).fit(x[train].numpy(), z[train].numpy())
    assert linear.low < linear.majority + 0.05
    assert kernel.accuracy > oracle.score(x[test].numpy(), z[test].numpy()) - 0.03
    assert kernel.low > 0.85
    assert kernel.log_loss is not None
    assert kernel.log_loss < 0.35


@pytest.mark.parametrize("approximation", ["nystroem", "fourier"])
@pytest.mark.parametrize("loss", ["logistic", "ridge"])
def test_approximations_approach_the_exact_kernel(approximation: Approximation, loss: str) -> None:
    x, z = ring(400)
    options = {"C": 10.0, "gamma": 0.3, "loss": loss}
    exact = KernelProbe(**options).fit(x, z).decision(x)  # type: ignore[arg-type]
    gaps = []
    for features in (20, 390 if approximation == "nystroem" else 1500):
        probe = KernelProbe(
            **options,  # type: ignore[arg-type]
            exact_rows=100,
            approximation=approximation,
            features=features,
        )
        fitted = probe.fit(x, z)
        assert fitted.kind == approximation
        gaps.append(float((fitted.decision(x) - exact).abs().mean()))
    assert gaps[1] < gaps[0] / 3


def test_nystroem_features_agree_with_sklearn() -> None:
    x, z = ring(200)
    fitted = KernelProbe(C=1.0, gamma=0.3, exact_rows=0, features=200, standardize=None).fit(x, z)
    root = Nystroem(gamma=0.3, n_components=200, random_state=0).fit_transform(x.numpy())
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=20000).fit(root, z.numpy())
    np.testing.assert_allclose(
        fitted.predict_proba(x).numpy(), oracle.predict_proba(root), atol=1e-4
    )


def test_median_heuristic() -> None:
    x, _ = data(60, 3, 2)
    distances = np.linalg.norm(x.numpy()[:, None] - x.numpy()[None], axis=2)
    median = np.median(distances[np.triu_indices(60, 1)])
    assert median_gamma(x) == pytest.approx(1 / (2 * median**2))
    assert KernelProbe(C=1.0, gamma="median", standardize=None).fit(
        x, x[:, 0] > 0
    ).gamma == pytest.approx(median_gamma(x))
    assert median_gamma(torch.ones(5, 2)) == 1.0
    assert median_gamma(torch.tensor([[0.0], [0.0], [0.0], [2.0]])) > 0
    assert median_gamma(torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))) > 0


def test_seeded_batched_and_free_of_units() -> None:
    x, z = ring(300)
    probe = KernelProbe(exact_rows=100, features=50, seed=3)
    fitted = probe.fit(x, z)
    again = KernelProbe(exact_rows=100, features=50, seed=3, batch_rows=7).fit(x, z)
    torch.testing.assert_close(fitted.decision(x), again.decision(x), atol=1e-5, rtol=1e-5)
    other = KernelProbe(exact_rows=100, features=50, seed=4).fit(x, z)
    assert not torch.equal(other.landmarks, fitted.landmarks)
    large = probe.fit(1e6 * x, z)
    torch.testing.assert_close(large.decision(1e6 * x), fitted.decision(x), atol=1e-4, rtol=1e-4)
    state = torch.random.get_rng_state()
    probe.fit(x, z)
    assert torch.equal(state, torch.random.get_rng_state())


def test_groups_decide_the_penalty_together() -> None:
    x, z = ring(200)
    groups = [i // 10 for i in range(200)]
    fitted = KernelProbe().fit(x, z, groups=groups)
    assert fitted.C in (1.0, 10.0, 100.0, 1000.0)
    split = (groups[:100], groups[100:])
    result = evaluate(x[:100], z[:100], x[100:], z[100:], probe="kernel", groups=split)
    assert result.groups == 10


def test_what_leace_leaves_to_a_kernel() -> None:
    x, z = ring(600)
    erased = LeaceEraser.fit(x, z)(x)
    result = evaluate(erased[:400], z[:400], erased[400:], z[400:], probe="kernel")
    assert result.low > result.majority
    constant = KernelProbe().fit(torch.ones(20, 3), [0, 1] * 10)
    torch.testing.assert_close(
        constant.predict_proba(torch.ones(1, 3)), torch.full((1, 2), 0.5).double()
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_a_large_direction_does_not_hide_the_others(rotated: bool) -> None:
    x, z = one_large_direction(1e4, rotated=rotated)
    fitted = KernelProbe(features=200, exact_rows=100).fit(x[:400], z[:400])
    assert fitted.accuracy(x[600:], z[600:]) > 0.76
    old = KernelProbe(features=200, exact_rows=100, standardize="global").fit(x[:400], z[:400])
    assert old.accuracy(x[600:], z[600:]) < 0.6


def test_a_small_direction_is_read() -> None:
    x, z = one_large_direction(1e3, rotated=True, concept=1e-2)
    fitted = KernelProbe(features=200, exact_rows=100).fit(x[:400], z[:400])
    assert fitted.standardize == "whiten"
    assert fitted.accuracy(x[600:], z[600:]) > 0.76


def test_too_few_vectors_to_hold_out() -> None:
    fitted = KernelProbe().fit([[0.0], [1.0]], ["a", "b"])
    assert fitted.predict([[-0.1], [1.1]]) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"C": -1.0}, "C must be positive"),
        ({"gamma": 0.0}, "gamma must be"),
        ({"gamma": "mean"}, "gamma must be"),
        ({"loss": "hinge"}, "loss must be"),
        ({"approximation": "none"}, "approximation must be"),
        ({"features": 1}, "features must be"),
        ({"held_out": 1.0}, "held_out must"),
        ({"standardize": "row"}, "standardize must"),
    ],
)
def test_bad_options(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        KernelProbe(**options)  # type: ignore[arg-type]


def test_a_large_direction_enters_a_distance_at_five_times_the_median() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 7, generator=draw, dtype=torch.float64) * torch.logspace(0, 4, 7)
    x = x @ torch.linalg.qr(torch.randn(7, 7, generator=draw, dtype=torch.float64))[0]
    plain = torch.linalg.svdvals(x - x.mean(0)).flip(0)
    fitted = KernelProbe(C=1.0, gamma=1.0, standardize="cap").fit(x, x[:, 0] > 0)
    seen = torch.linalg.svdvals((x - fitted.mean) @ fitted.basis).flip(0)
    torch.testing.assert_close(seen / seen[3], (plain / plain[3]).clamp(max=5))
