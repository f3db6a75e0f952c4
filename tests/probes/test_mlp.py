"""Network probe: reads what is not linear, reproducibly."""

from __future__ import annotations

import pytest
import torch

from concept_erasure.probes import LinearProbe, MlpProbe
from concept_erasure.probes.mlp import split_classes
from tests.probes.test_linear import one_large_direction


def xor(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x * 50 + 1000, (x[:, 0] * x[:, 1]) > 0


def massive() -> tuple[torch.Tensor, torch.Tensor]:
    """Thirty-two directions of which one is heavy-tailed and one rarely very large, and a concept along a third."""
    x, z = one_large_direction(1.0, rotated=False)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(2, len(x), generator=generator, dtype=torch.float64)
    x[:, 10] = 50 * normal[0] / normal[1].abs().clamp(min=1e-3)
    x[:, 11] = 3000.0 * (torch.rand(len(x), generator=generator) < 0.01)
    mixed = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return x @ torch.linalg.qr(mixed)[0], z


def activations() -> tuple[torch.Tensor, torch.Tensor]:
    """Like those of a language model: as many directions as rows, decaying, the concept in large ones."""
    generator = torch.Generator().manual_seed(0)
    n, d = 1600, 500
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x * 30 / torch.arange(1, d + 1, dtype=torch.float64) ** 0.8
    z = torch.rand(n, generator=generator) < 0.5
    x[:, 5:25] += z[:, None] * x[:, 5:25].std(dim=0) * 0.9
    mixed = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return x @ torch.linalg.qr(mixed)[0], z


def test_reads_exclusive_or_where_a_linear_probe_cannot() -> None:
    (x, z), (x_test, z_test) = xor(600), xor(400, seed=1)
    fitted = MlpProbe(max_epochs=80).fit(x, z)
    assert fitted.accuracy(x_test, z_test) > 0.9
    assert fitted.log_loss(x_test, z_test) < 0.3
    assert LinearProbe().fit(x, z).accuracy(x_test, z_test) < 0.65


def test_reads_a_concept_on_one_axis_among_many() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 200, generator=generator)
    z = x[:, 70] + 0.5 * torch.randn(1500, generator=generator) > 0
    fitted = MlpProbe().fit(x[:1000], z[:1000])
    linear = LinearProbe().fit(x[:1000], z[:1000])
    assert fitted.accuracy(x[1000:], z[1000:]) > linear.accuracy(x[1000:], z[1000:]) - 0.05


def test_same_seed_same_weights_and_global_state_untouched() -> None:
    x, z = xor(100)
    state = torch.random.get_rng_state()
    first, again = (MlpProbe(seed=3, max_epochs=5).fit(x, z) for _ in range(2))
    other = MlpProbe(seed=4, max_epochs=5).fit(x, z)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.weights, again.weights, strict=True))
    assert not torch.equal(first.weights[0], other.weights[0])
    assert not any(weight.requires_grad for weight in first.weights)


def test_early_stopping_keeps_noise_near_the_class_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator)
    z = torch.rand(300, generator=generator) < 0.3
    fitted = MlpProbe().fit(x, z)
    assert fitted.epochs < 50
    test = torch.randn(500, 20, generator=generator)
    assert fitted.log_loss(test, torch.rand(500, generator=generator) < 0.3) < 0.8


def test_works_in_inference_mode_with_three_classes_and_constant_columns() -> None:
    x = torch.cat(
        [torch.randn(90, 3, generator=torch.Generator().manual_seed(0)), torch.ones(90, 1)], 1
    )
    z = ["abc"[i] for i in x[:, :3].argmax(dim=1).tolist()]
    with torch.inference_mode():
        fitted = MlpProbe(max_epochs=60).fit(x.clone(), z)
        assert fitted.predict_proba(x).shape == (90, 3)
        assert fitted.accuracy(x, z) > 0.8


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 0},
        {"held_out": 1.0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"patience": 0},
    ],
)
def test_bad_configuration(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MlpProbe(**options)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least two examples"):
        MlpProbe().fit(torch.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="NaN"):
        MlpProbe().fit(torch.full((4, 2), float("nan")), [0, 1, 0, 1])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_units_of_x_do_not_matter(scale: float) -> None:
    x, z = xor(200)
    x = x.double()
    fitted = MlpProbe(max_epochs=8).fit(x * scale, z)
    want = MlpProbe(max_epochs=8).fit(x, z)
    assert fitted.standardize == want.standardize
    torch.testing.assert_close(
        fitted.predict_proba(x * scale), want.predict_proba(x), atol=1e-3, rtol=1e-3
    )


def test_rounding_noise_is_not_blown_up() -> None:
    x, z = xor(200)
    noise = 1e-17 * torch.where(z, 1.0, -1.0).double()
    fitted = MlpProbe(max_epochs=20).fit(torch.stack([noise, x[:, 0].double()], 1), z)
    assert float((fitted.basis.norm(dim=1) * 1e-17).max()) < 1e-3


def test_early_stopping_keeps_groups_together() -> None:
    generator = torch.Generator().manual_seed(0)
    index, groups = torch.arange(60) % 2, torch.arange(60) // 4
    train, held_out = split_classes(index, 0.2, generator, groups)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(60))
    assert not set(groups[train].tolist()) & set(groups[held_out].tolist())
    assert 12 <= len(held_out) <= 16
    assert set(index[train].tolist()) == {0, 1}
    with pytest.raises(ValueError, match="group to hold out"):
        MlpProbe().fit(torch.eye(4), [0, 0, 1, 1], groups=["a", "a", "b", "b"])


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_large_direction_does_not_hide_the_others(rotated: bool, size: float) -> None:
    x, z = one_large_direction(size, rotated=rotated)
    assert MlpProbe().fit(x[:600], z[:600]).accuracy(x[600:], z[600:]) > 0.79


def test_a_small_direction_is_read() -> None:
    x, z = one_large_direction(1e3, rotated=True, concept=1e-2)
    fitted = MlpProbe().fit(x[:600], z[:600])
    assert fitted.standardize == "whiten"
    assert fitted.accuracy(x[600:], z[600:]) > 0.78


def test_massive_and_heavy_tailed_features_do_not_hide_the_others() -> None:
    x, z = massive()
    assert MlpProbe().fit(x[:600], z[:600]).accuracy(x[600:], z[600:]) > 0.78


def test_as_strong_as_a_linear_probe_when_variances_decay_and_rows_are_few() -> None:
    x, z = activations()
    train, test = slice(0, 600), slice(600, None)
    linear = LinearProbe().fit(x[train], z[train]).accuracy(x[test], z[test])
    ours = MlpProbe().fit(x[train], z[train]).accuracy(x[test], z[test])
    clipped = MlpProbe(standardize="clip").fit(x[train], z[train]).accuracy(x[test], z[test])
    assert ours > linear - 0.03
    assert ours > clipped + 0.05  # whitening the larger half buries the concept in noise


def test_given_units_are_used() -> None:
    x, z = xor(100)
    fitted = MlpProbe(max_epochs=2, standardize="feature").fit(x, z)
    assert fitted.standardize == "feature"
    with pytest.raises(ValueError, match="standardize must be one of"):
        MlpProbe(standardize="rows")  # type: ignore[arg-type]
