"""Distances and means against closed forms, double loops and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch

from concept_erasure.errors import ShapeError
from concept_erasure.evals.diffusion.scores import (
    bootstrap,
    clip_score,
    cmmd,
    frechet_distance,
    harmonic_mean,
    kernel_distance,
    mace_celebrity_score,
    mace_object_score,
)


def features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # Exact moments: whitened samples, so that the only error is rounding.
    x = features(64, 4, 0)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    expected = 4 * 0.7**2 + float((scale - 1).square().sum())
    assert frechet_distance(x, x * scale + 0.7) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_has_no_bias_and_paired_sets_have_none_either() -> None:
    same = [kernel_distance(features(30, 6, 2 * i), features(30, 6, 2 * i + 1)) for i in range(40)]
    mean, error = sum(same) / 40, torch.tensor(same).std().item() / math.sqrt(40)
    assert abs(mean) < 3 * error
    x = features(30, 6, 0)
    assert kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(x, x) < -0.1  # a set is nearer to itself than to another of its kind
    assert kernel_distance(x, features(30, 6, 1, 1.0)) > 1


def test_kernel_distance_is_the_double_loop() -> None:
    a, b = features(7, 3, 0), features(5, 3, 1)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    own = [
        sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]  # fmt: skip
    cross = sum(kernel(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(sum(own) - 2 * cross, rel=1e-12)


def test_cmmd_is_the_double_loop_and_zero_on_equal_sets() -> None:
    a, b = (torch.nn.functional.normalize(features(50, 8, seed), dim=1) for seed in (0, 1))

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return math.exp(-float((x - y).square().sum()) / 200)

    means = [
        sum(kernel(x, y) for x in one for y in other) / 2500
        for one, other in ((a, a), (b, b), (a, b))
    ]
    assert cmmd(a, b) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), abs=1e-6)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert cmmd(3 * a, b) == pytest.approx(cmmd(a, b))


def test_fid_and_kid_agree_with_torchmetrics() -> None:
    # from their modules: the package lists them only where the Inception weights' package is there as well
    of_fid = pytest.importorskip("torchmetrics.image.fid")
    of_kid = pytest.importorskip("torchmetrics.image.kid")

    class Same(torch.nn.Module):
        num_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    a, b = features(40, 6, 0), features(40, 6, 1, 0.5)
    fid = of_fid.FrechetInceptionDistance(feature=Same())
    fid.set_dtype(torch.float64)
    kid = of_kid.KernelInceptionDistance(feature=Same(), subsets=1, subset_size=40)
    for metric in (fid, kid):
        metric.update(a, real=True)
        metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kernel_distance(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-6)


def test_harmonic_means_by_hand() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 1.0) == 0
    assert mace_object_score(0.1, 0.9, 0.3) == pytest.approx(3 / (1 / 0.9 + 1 / 0.9 + 1 / 0.7))
    assert mace_object_score(1.0, 0.9, 0.3) == 0
    assert mace_celebrity_score(0.2, 0.8) == pytest.approx(0.8)
    # EraseBench's original model: efficacy 86.5, generality 90.2 erased, sensitivity 85.0 kept.
    assert 100 * mace_object_score(0.865, 0.850, 0.902) == pytest.approx(15.97, abs=0.03)
    with pytest.raises(ValueError, match="at least one value"):
        harmonic_mean()


@pytest.mark.parametrize("distance", ["kernel", "cmmd"])
def test_intervals_enclose_the_distance_and_narrow_with_n(distance: str) -> None:
    few = bootstrap(features(20, 4, 0), features(20, 4, 1, 1.0), distance=distance, rounds=50)  # type: ignore[arg-type]
    many = bootstrap(features(200, 4, 0), features(200, 4, 1, 1.0), distance=distance, rounds=50)  # type: ignore[arg-type]
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low
    again = bootstrap(features(20, 4, 0), features(20, 4, 1, 1.0), distance=distance, rounds=50)  # type: ignore[arg-type]
    assert again == few


def test_bad_sets_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 2 features"):
        frechet_distance(features(1, 4, 0), features(5, 4, 0))
    with pytest.raises(ShapeError, match="paired sets must be of one size"):
        kernel_distance(features(3, 4, 0), features(5, 4, 0), paired=True)
    with pytest.raises(ShapeError, match="a text for each picture"):
        clip_score(features(3, 4, 0), features(5, 4, 0))
    with pytest.raises(ValueError, match="distance must be one of"):
        bootstrap(features(3, 4, 0), features(5, 4, 0), distance="energy")  # type: ignore[arg-type]
