from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.linear._rlace_fit import Fit, rayleigh_factors
from concept_erasure.linear.alternating import PRESETS, GameSettings
from concept_erasure.linear.games import (
    Game,
    Solution,
    _uphill,
    best_response,
    solve_factored,
    top_directions,
)
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.linear.rlace import RlaceConfig, RlaceEraser
from concept_erasure.probes import LinearProbe
from tests.linear.samples import cross_covariance, one_hot, sample


def six_classes(n: int = 900, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return six classes whose means and noise are of unequal size in each direction."""
    g = torch.Generator().manual_seed(seed)
    z = torch.arange(n) % 6
    means = 0.6 * torch.randn(6, d, generator=g, dtype=torch.float64)
    spread = torch.logspace(0.2, -0.2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * spread + means[z] + 2, z


@cache
def game(penalty: float = 1e-3) -> Game:
    x, z = six_classes()
    x = x - x.mean(0)
    return Game.of(x / x.square().mean().sqrt(), one_hot(z, 6), "cross_entropy", penalty)


@cache
def solved(k: int) -> Solution:
    return solve_factored(game(), sal(k))


def sal(k: int) -> Tensor:
    return top_directions(game().pull(game().z)[:-1], k)


def number(eraser: RlaceEraser, name: str) -> float:
    return cast("float", eraser.report[name])


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the smallest cosine of the angles between two subspaces of one dimension."""
    return float(torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0]).min())


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (2, 3), (4, 3), (4, 5)])
def test_closed_form_from_the_full_rank_on(classes: int, k: int) -> None:
    x, z = sample(600, 12, classes)
    eraser = RlaceEraser.fit(x, z, k=k)
    cross = cross_covariance(x, one_hot(z, classes))
    assert eraser.report["solver"] == "closed form"
    assert eraser.report["rank"] == eraser.report["full_rank"] == classes - 1
    assert (eraser.P @ cross).norm() < 1e-12 * cross.norm()
    entropy = -sum(p * math.log(p) for p in (one_hot(z, classes).mean(0)).tolist())
    assert number(eraser, "value") == pytest.approx(entropy, abs=1e-12)
    clean = eraser(x)
    assert LinearProbe().fit(clean, z).log_loss(clean, z) == pytest.approx(entropy, abs=1e-6)
    torch.testing.assert_close(clean.mean(0), x.mean(0))
    torch.testing.assert_close(eraser.P, LeaceEraser.fit(x, z, method="orth").P)


def test_the_value_at_the_closed_form_is_the_games() -> None:
    assert float(best_response(game(), sal(5)).value) == pytest.approx(math.log(6), abs=1e-9)
    v = top_directions(best_response(game(), sal(5)).cross, 5)
    assert cosine(v, sal(5)) > 1 - 1e-9  # a fixed point of the convex-concave step


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_six_classes_better_than_spectral_and_never_falling(k: int) -> None:
    found = solved(k)
    assert found.response.value >= best_response(game(), sal(k)).value
    assert all(b >= a for a, b in zip(found.history, found.history[1:], strict=False))
    assert found.history[-1] == found.response.value
    assert found.response.value < math.log(6)
    torch.testing.assert_close(found.v.T @ found.v, torch.eye(k, dtype=torch.float64))


def test_value_grows_with_the_rank() -> None:
    values = [float(solved(k).response.value) for k in (1, 2, 3, 4)]
    assert values == sorted(values)
    assert values[3] - values[0] > 0.3


@pytest.mark.parametrize("k", [1, 3])
def test_two_starts_agree(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    start = torch.linalg.qr(torch.randn(24, k, generator=g, dtype=torch.float64))[0]
    other = float(solve_factored(game(), start).response.value)
    assert other == pytest.approx(float(solved(k).response.value), rel=0.01)


def test_a_solution_is_stationary() -> None:
    found = solved(2)
    base = found.response.value
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        tilt = torch.randn(24, 2, generator=g, dtype=torch.float64)
        v = torch.linalg.qr(found.v + 0.01 * tilt)[0]
        assert best_response(game(), v).value < base + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_brute_force_over_angles(seed: int) -> None:
    x, z = sample(300, 2, 3, seed=seed)
    eraser = RlaceEraser.fit(x, z, k=1, penalty=1e-3)
    centred = x - x.mean(0)
    plain = Game.of(centred / centred.square().mean().sqrt(), one_hot(z, 3), "cross_entropy")
    angles = torch.linspace(0, math.pi, 181, dtype=torch.float64)[:-1]
    v = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None]  # all angles side by side
    many = Game(plain.rows.expand(180, -1, -1), plain.z.expand(180, -1, -1), plain.loss)
    tried = best_response(many, v).value.tolist()
    assert eraser.report["solver"] == "factored"
    assert number(eraser, "value") >= max(tried) - 1e-6
    assert number(eraser, "value") <= max(tried) + 1e-3


@pytest.mark.parametrize("loss", ["cross_entropy", "multilabel", "logistic", "squared"])
def test_best_response_has_no_gradient(loss: str) -> None:
    x, z = sample(200, 6, 3)
    target = one_hot(z, 3)[:, :1] if loss == "logistic" else one_hot(z, 3)
    plain = Game.of((x - x.mean(0)) / x.std(), target, loss, 1e-2)  # type: ignore[arg-type]
    v = torch.linalg.qr(x[:6, :2])[0]
    answer = best_response(plain, v, decrement=1e-14)
    theta = answer.weights[:-1].clone().requires_grad_()
    bias = answer.weights[-1].clone().requires_grad_()
    erased = plain.x - plain.x @ v @ v.T
    (plain.value((erased @ theta + bias).T) + 1e-2 * theta.square().sum()).backward()
    assert theta.grad is not None and bias.grad is not None
    assert theta.grad.abs().max() < 1e-6
    assert bias.grad.abs().max() < 1e-6
    assert (v.T @ answer.weights[:-1]).abs().max() < 1e-10


def test_gradient_of_the_value() -> None:
    v, g = sal(2), torch.Generator().manual_seed(1)
    here = Solution(v, best_response(game(), v, decrement=1e-14))
    tilt = torch.randn(24, 2, generator=g, dtype=torch.float64)
    tilt = tilt - v @ (v.T @ tilt)
    up, down = (
        float(best_response(game(), torch.linalg.qr(v + h * tilt)[0], decrement=1e-14).value)
        for h in (1e-4, -1e-4)
    )
    assert float((_uphill(here) * tilt).sum()) == pytest.approx((up - down) / 2e-4, rel=1e-3)


def test_report_of_a_game() -> None:
    x, z = six_classes()
    eraser = RlaceEraser.fit(x, z, k=2, starts=4)
    again = RlaceEraser.fit(x, z, k=2, starts=4)
    assert torch.equal(eraser.proj_left, again.proj_left)
    assert eraser.report["full_rank"] == 5
    assert eraser.report["rank"] == 2
    low, high = cast("list[float]", eraser.report["held_out_loss_interval"])
    assert low < number(eraser, "held_out_loss") < high
    assert 0 < number(eraser, "residual") < 1
    moved = (eraser(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert number(eraser, "edit_size") == pytest.approx(float(moved))
    assert number(eraser, "log_loss") < number(eraser, "value") < number(eraser, "entropy")


def test_more_starts_are_not_worse() -> None:
    x, z = sample(200, 6, 4)
    one, more = (RlaceEraser.fit(x, z, k=2, starts=s) for s in (1, 3))
    assert number(more, "value") >= number(one, "value")


def test_scouts_find_what_the_ladder_misses() -> None:
    found = []
    x, z = six_classes(400, 12, seed=1)
    x = (x - x.mean(0)) / x.std()
    plain = Game.of(x, one_hot(z, 6), "cross_entropy", 1e-3)
    start = top_directions(plain.pull(plain.z)[:-1], 2)
    for scouts in (0, 8):
        solution = solve_factored(plain, start, scouts=scouts)
        found.append(float(solution.response.value))
        values = [float(value) for value in solution.history]
        assert values == sorted(values)
    assert found[1] > found[0] + 5e-3


def test_scale_rotation_and_offset_do_not_matter() -> None:
    x, z = sample(300, 8, 4)
    turn = torch.linalg.qr(sample(8, 8, 2)[0])[0]
    plain = RlaceEraser.fit(x, z, k=2, starts=1)
    assert (RlaceEraser.fit(x * 1e3 - 7, z, k=2, starts=1).P - plain.P).abs().max() < 1e-3
    assert (
        RlaceEraser.fit(x @ turn.T, z, k=2, starts=1).P - turn @ plain.P @ turn.T
    ).abs().max() < 1e-2


def test_fewer_rows_than_dimensions() -> None:
    x, z = sample(40, 60, 4)
    eraser = RlaceEraser.fit(x, z, k=1, starts=1)
    assert eraser.proj_left.shape == (60, 1)
    assert eraser.map.is_projection()
    centred = x - x.mean(0)
    assert (
        eraser.proj_left - torch.linalg.pinv(centred) @ centred @ eraser.proj_left
    ).abs().max() < 1e-9


def test_regression() -> None:
    x, _ = sample(200, 6, 2)
    g = torch.Generator().manual_seed(5)
    y = x[:, :4] @ torch.randn(4, 3, generator=g, dtype=torch.float64)
    y = y + torch.randn(200, 3, generator=g, dtype=torch.float64)
    full = RlaceEraser.fit(x, y, k=3)
    assert full.report["solver"] == "closed form"
    assert number(full, "error") == pytest.approx(float(y.var(0, unbiased=False).sum()))
    some = RlaceEraser.fit(x, y, k=1, starts=1)
    assert some.report["loss"] == "squared"
    scaled = RlaceEraser.fit(x, y * 1e4, k=1, starts=1)
    assert number(scaled, "value") == pytest.approx(1e8 * number(some, "value"), rel=1e-4)
    single = RlaceEraser.fit(x, y[:, 0])
    assert cosine(single.proj_left, cross_covariance(x, y[:, :1])) > 1 - 1e-12
    # one of several: better than the spectral choice
    spectral = top_directions(cross_covariance(x, y), 1)
    clean = x - x.mean(0) - (x - x.mean(0)) @ spectral @ spectral.T
    fit = clean @ torch.linalg.lstsq(clean, y - y.mean(0), driver="gelsd").solution
    assert number(some, "value") >= float((y - y.mean(0) - fit).square().sum(1).mean()) - 1e-2


def test_several_labels() -> None:
    x, z = sample(500, 8, 4)
    columns = torch.stack([z % 2, z // 2, (z == 0) | (z == 3)], 1).double()
    full = RlaceEraser.fit(x, columns, k=3)
    assert full.report["solver"] == "closed form"
    assert full.report["loss"] == "multilabel"
    clean = full(x)
    for j in range(3):
        share = float(columns[:, j].mean())
        entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
        probe = LinearProbe().fit(clean, columns[:, j].long())
        assert probe.log_loss(clean, columns[:, j].long()) == pytest.approx(entropy, abs=1e-6)
    one, two = (number(RlaceEraser.fit(x, columns, k=k), "value") for k in (1, 2))
    assert one < two < number(full, "value")


def test_rayleigh_quotients() -> None:
    x, z = sample(500, 8, 4)
    hot = one_hot(z, 4)
    cross = cross_covariance(x, hot)
    pls = RlaceEraser.fit(x, z, k=2, loss="pls")
    assert cosine(pls.proj_left, top_directions(cross, 2)) > 1 - 1e-9
    assert number(pls, "value") == pytest.approx(float(torch.linalg.svdvals(cross)[2] ** 2))
    assert RlaceEraser.fit(x, z, k=5, loss="pls").report["rank"] == 3
    sigma = torch.cov(x.T, correction=0)
    pca = RlaceEraser.fit(x, z, k=2, loss="pca")
    assert number(pca, "value") == pytest.approx(float(torch.linalg.eigvalsh(sigma)[-3]))
    cca = RlaceEraser.fit(x, z, k=3, loss="cca")
    torch.testing.assert_close(cca.P, LeaceEraser.fit(x, z, shrinkage=False).P)


def test_generalised_quotient() -> None:
    x, z = sample(500, 8, 4)
    cross, sigma = cross_covariance(x, one_hot(z, 4)), torch.cov(x.T, correction=0)
    left, right, value = rayleigh_factors(cross @ cross.T, 2, sigma)
    p = torch.eye(8, dtype=torch.float64) - left @ right.T
    torch.testing.assert_close(p @ p, p)
    # nothing the erased predictor can choose has a larger quotient
    g = torch.Generator().manual_seed(0)
    theta = p.T @ torch.randn(8, 200, generator=g, dtype=torch.float64)
    top = (cross.T @ theta).square().sum(0) / (theta * (sigma @ theta)).sum(0)
    assert float(top.max()) <= value * (1 + 1e-9)
    full = rayleigh_factors(cross @ cross.T, 3, sigma)
    torch.testing.assert_close(
        torch.eye(8, dtype=torch.float64) - full[0] @ full[1].T,
        LeaceEraser.fit(x, z, shrinkage=False).P,
    )
    with pytest.raises(ShapeError, match="M and B"):
        rayleigh_factors(sigma, 1, sigma[:4, :4])
    with pytest.raises(ValueError, match="from 0 to 8"):
        rayleigh_factors(sigma, 9)


def test_published_game_finds_the_mean_difference() -> None:
    x, z = sample(800, 16, 2)
    dev_x, dev_z = sample(400, 16, 2)
    eraser = RlaceEraser.fit(x, z, solver="fantope", held_out=(dev_x, dev_z))
    difference = (x[z == 1].mean(0) - x[z == 0].mean(0))[:, None]
    assert cosine(eraser.proj_left, difference) > 0.99
    assert number(eraser, "closed_form_cosine") > 0.99
    assert number(eraser, "value") <= number(eraser, "entropy") + 1e-9
    assert 0 <= number(eraser, "eigenvalue_gap") <= 1
    rounding = number(eraser, "value_before_rounding") - number(eraser, "value")
    assert number(eraser, "rounding_loss") == pytest.approx(rounding)


def test_published_game_is_seeded_and_scale_free() -> None:
    x, z = sample(200, 6, 4)
    short = GameSettings(steps=60, evaluate_every=20)
    fits = [
        RlaceEraser.fit(data, z, k=2, solver="fantope", preset=short, seed=s)
        for data, s in ((x, 0), (x, 0), (x, 1), (x * 8, 0))
    ]
    assert torch.equal(fits[0].proj_left, fits[1].proj_left)
    assert not torch.equal(fits[0].proj_left, fits[2].proj_left)
    torch.testing.assert_close(fits[0].P, fits[3].P)
    assert max(cast("list[float]", fits[0].report["history"])) == pytest.approx(
        number(fits[0], "log_loss"), abs=1e-4
    )


def test_published_constants() -> None:
    assert PRESETS["paper"].steps == 75_000
    assert PRESETS["words"].predictor_decay == 1e-5
    assert PRESETS["biographies"].predictor_momentum == 0.9
    assert PRESETS["demo"].eraser_rate == 0.003
    with pytest.raises(ValueError, match="momentum"):
        replace(PRESETS["demo"], eraser_momentum=1.0)
    with pytest.raises(ValueError, match="steps"):
        GameSettings(steps=0)


def test_held_out_rows_are_what_is_measured_on() -> None:
    x, z = sample(400, 8, 4)
    more = RlaceEraser.fit(x[:200], z[:200], k=2, held_out=(x[200:], z[200:]))
    assert "held_out_gap_interval" in more.report
    assert number(more, "held_out_loss") < number(more, "held_out_entropy")
    with pytest.raises(ShapeError, match="width 4"):
        RlaceEraser.fit(x, z, held_out=(x[:, :4], z))


def test_save_load_space_and_masks(tmp_path: Path) -> None:
    x, z = sample(300, 6, 2)
    eraser = RlaceEraser.fit(Representations(x, z, None))
    mask = torch.arange(300) < 200
    masked = RlaceEraser.fit(x.view(10, 30, 6), z.view(10, 30), mask=mask.view(10, 30))
    torch.testing.assert_close(masked.P, RlaceEraser.fit(x[:200], z[:200]).P)
    folder = eraser.save_pretrained(tmp_path / "e")
    from concept_erasure import registry

    if "rlace" in registry.names():
        assert torch.equal(Eraser.from_pretrained(folder)(x), eraser(x))  # type: ignore[operator]


def test_the_penalty_suits_the_rows() -> None:
    """With few rows the game is played against a predictor that does not fit their noise."""
    x, z = six_classes(900, 12)
    many, few, tiny = (Fit.of(RlaceConfig(k=2), x[:n], z[:n], z_kind="auto") for n in (900, 90, 15))
    assert many.penalty < few.penalty <= 0.1
    assert tiny.penalty == 1e-3
    layers = {"a": x[:90], "b": 3 * x[:90, :6]}
    erasers = RlaceEraser.fit_layers(layers, z[:90], k=2, starts=1)
    assert erasers["a"].report["penalty"] == few.penalty
    alone = RlaceEraser.fit(layers["b"], z[:90], k=2, starts=1)
    assert torch.equal(erasers["b"].proj_left, alone.proj_left)


def test_bad_input_raises() -> None:
    x, z = sample(100, 4, 3)
    for options, words in (
        ({"k": 0}, "whole number"),
        ({"k": 5}, "only 4 dimensions"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"preset": "paper"}, "constants of solver='fantope'"),
        ({"loss": "logistic"}, "two classes"),
        ({"penalty": 0.0}, "positive"),
        ({"penalty": "much"}, "positive and finite, or 'auto'"),
        ({"loss": "pls", "solver": "fantope"}, "closed form"),
        ({"loss": "pca"}, "needs k"),
    ):
        with pytest.raises(ValueError, match=words):
            RlaceEraser.fit(x, z, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sum to one"):
        RlaceEraser.fit(x, x[:, :2], loss="cross_entropy")
    with pytest.raises(ValueError, match="between 0 and 1"):
        RlaceEraser.fit(x, x[:, :2], loss="multilabel")
    with pytest.raises(ShapeError, match="mask"):
        RlaceEraser.fit(x, z, mask=torch.ones(3))
    with pytest.warns(ErasureWarning, match="identity"):
        assert RlaceEraser.fit(x, torch.zeros(100, dtype=torch.int64)).report["rank"] == 0


def test_certificate() -> None:
    pytest.importorskip("cvxpy")
    x, z = sample(150, 6, 4)
    for k in (2, 3):
        eraser = RlaceEraser.fit(x, z, k=k, certify=True)
        for problem in ("fantope", "leace", "value"):
            assert number(eraser, f"certificate_{problem}") < 1e-6
        assert number(eraser, "oracle_value") == pytest.approx(number(eraser, "value"), abs=1e-6)


@pytest.mark.parametrize("loss", ["squared", "multilabel", "pls"])
def test_certificate_of_the_other_losses(loss: str) -> None:
    pytest.importorskip("cvxpy")
    x, z = sample(150, 6, 4)
    eraser = RlaceEraser.fit(x, one_hot(z, 4)[:, :3], k=1, certify=True, loss=loss)  # type: ignore[arg-type]
    assert number(eraser, "certificate_leace") < 1e-6
    assert eraser.report.get("certificate_value", 0.0) < 1e-6  # type: ignore[operator]


def test_certificate_of_something_large_is_refused() -> None:
    pytest.importorskip("cvxpy")
    x, z = sample(100, 70, 2)
    with pytest.raises(ValueError, match="at most 64 dimensions"):
        RlaceEraser.fit(x, z, certify=True)


def test_the_default_guards() -> None:
    x, z = sample(300, 8, 4)
    eraser = RlaceEraser.fit(x, z)
    assert eraser.report["rank"] == 3
    assert number(eraser, "residual") < 1e-12
    assert eraser.config.k is None  # type: ignore[attr-defined]


def test_filling_up_to_k() -> None:
    x, z = sample(300, 8, 2)
    x = x * torch.logspace(1, 0, 8, dtype=torch.float64)
    eraser = RlaceEraser.fit(x, z, k=3, fill="variance")
    assert (eraser.report["rank"], eraser.report["full_rank"]) == (3, 1)
    assert number(eraser, "residual") < 1e-12
    left = eraser(x) - eraser(x).mean(0)
    plain = RlaceEraser.fit(x, z)(x)
    spectrum = torch.linalg.svdvals(plain - plain.mean(0))
    # the two strongest axes are gone, the others are as they were
    torch.testing.assert_close(torch.linalg.svdvals(left)[:5], spectrum[2:7])


def test_games_side_by_side_are_games_alone() -> None:
    games = []
    for seed in range(3):
        x, z = six_classes(300, 10, seed)
        x = (x - x.mean(0)) / x.std()
        games.append(Game.of(x, one_hot(z, 6), "cross_entropy", 1e-2))
    many = replace(
        games[0], rows=torch.stack([g.rows for g in games]), z=torch.stack([g.z for g in games])
    )
    found = solve_factored(many, top_directions(many.pull(many.z)[:, :-1], 2), scouts=3)
    for i, one in enumerate(games):
        alone = solve_factored(one, top_directions(one.pull(one.z)[:-1], 2), scouts=3)
        value = float(alone.response.value)
        # scouts play in single precision, and its rounding depends on how many games there are
        assert float(found.response.value[i]) == pytest.approx(value, rel=1e-7)
        assert cosine(found.v[i], alone.v) > 1 - 1e-6


def test_layers_at_once() -> None:
    x, z = sample(200, 6, 4)
    narrow = x[:, :5]
    layers: dict[str, object] = {
        "a": x,
        "b": x * 3 + 1,
        "c": narrow,
        "d": Representations(x, z, None),
    }
    found = RlaceEraser.fit_layers(layers, z, k=2, starts=1)
    assert list(found) == list(layers)
    for name, data in layers.items():
        alone = RlaceEraser.fit(data, z, k=2, starts=1)
        torch.testing.assert_close(found[name].P, alone.P, atol=1e-5, rtol=0)
        assert found[name].report.keys() == alone.report.keys()
        assert number(found[name], "held_out_loss") == pytest.approx(
            number(alone, "held_out_loss"), abs=1e-5
        )
    assert RlaceEraser.fit_layers({"a": x}, z)["a"].report["solver"] == "closed form"
    assert RlaceEraser.fit_layers({}, z) == {}
