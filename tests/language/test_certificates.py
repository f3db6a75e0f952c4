"""Certificates: no violation in a thousand random problems, and what each bound has to do at its edges."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_law
from torch import Tensor

from concept_erasure.errors import FormatError, ShapeError
from concept_erasure.language.certificates import (
    Certificate,
    InfluenceLink,
    a_priori_radius,
    certify_outputs,
    clopper_pearson,
    forget_bound,
    lanczos_smallest,
    level_set_radius,
    low_rank_norm,
    low_rank_spectral_norm,
    output_bounds,
    spectral_norm,
    stationarity_radius,
)

PROBLEMS, POINTS, WIDTH, HIDDEN, CLASSES = 1000, 12, 4, 6, 5


def forward(flat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One-hidden-layer nets, a thousand at once: logits and hidden units."""
    first = flat[:, : WIDTH * HIDDEN].view(-1, WIDTH, HIDDEN)
    second = flat[:, WIDTH * HIDDEN :].view(-1, HIDDEN, CLASSES)
    hidden = (x @ first).tanh()
    return hidden @ second, hidden


def objective(flat: Tensor, x: Tensor, target: Tensor) -> Tensor:
    log_q = forward(flat, x)[0].log_softmax(-1)
    return (torch.special.xlogy(target, target) - target * log_q).sum(-1).mean(-1)


@pytest.fixture(scope="module")
def runs() -> dict[str, Tensor]:
    """A thousand random nets, targets and anchors, each at the best J of sixty Adam steps."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    size = (WIDTH + CLASSES) * HIDDEN
    start = normal(PROBLEMS, size) * torch.linspace(0.3, 3, PROBLEMS, dtype=torch.float64)[:, None]
    x, fresh = normal(PROBLEMS, POINTS, WIDTH), normal(PROBLEMS, POINTS, WIDTH)
    target = (2 * normal(PROBLEMS, POINTS, CLASSES)).softmax(-1)
    target[: PROBLEMS // 2] = 1 / CLASSES
    rho = 10 ** (4 * torch.rand(PROBLEMS, generator=draw, dtype=torch.float64) - 2)
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    best, best_value = start, objective(start, x, target)
    for _ in range(60):
        optimizer.zero_grad()
        anchored = objective(theta, x, target) + rho / 2 * (theta - start).square().sum(-1)
        anchored.sum().backward()
        better = anchored.detach() < best_value
        best = torch.where(better[:, None], theta.detach(), best)
        best_value = torch.where(better, anchored.detach(), best_value)
        optimizer.step()
    end = best.clone().requires_grad_()
    loss = objective(end, x, target)
    (gradient,) = torch.autograd.grad(loss.sum(), end)
    return {
        "start": start,
        "end": best,
        "rho": rho,
        "before": objective(start, x, target),
        "after": loss.detach(),
        "gradient": gradient.norm(dim=-1),
        "residual": (gradient + rho[:, None] * (best - start)).norm(dim=-1),
        "fresh": fresh,
    }


def test_c1_to_c3_hold_in_a_thousand_problems(runs: dict[str, Tensor]) -> None:
    distance = (runs["end"] - runs["start"]).norm(dim=-1)
    assert int((distance > 0.01).sum()) > PROBLEMS // 2  # the runs did move
    level = level_set_radius(runs["before"], runs["after"], runs["rho"])
    still = stationarity_radius(runs["gradient"], runs["residual"], runs["rho"])
    assert bool((distance <= level + 1e-9).all())
    assert bool((level <= a_priori_radius(runs["before"], runs["rho"]) + 1e-12).all())
    assert bool((distance <= still + 1e-9).all())
    bound = forget_bound(runs["before"], distance, runs["rho"])
    assert bool((runs["after"] <= bound + 1e-9).all())


def test_c4_and_c5_hold_in_a_thousand_problems(runs: dict[str, Tensor]) -> None:
    before, hidden = forward(runs["start"], runs["fresh"])
    after, _ = forward(runs["end"], runs["fresh"])
    found = certify_outputs(before.reshape(-1, CLASSES), after.reshape(-1, CLASSES))
    assert found.violations == 0
    assert found.n == PROBLEMS * POINTS
    assert 0 < found.certified.value <= found.unchanged.value < 1
    assert found.kl <= found.kl_bound
    change = (runs["end"] - runs["start"])[:, WIDTH * HIDDEN :].view(-1, HIDDEN, CLASSES)
    factor = torch.linalg.matrix_norm(change, ord=2)
    moved = (hidden @ change).norm(dim=-1)
    assert bool((moved <= factor[:, None] * hidden.norm(dim=-1) + 1e-9).all())
    torch.testing.assert_close(spectral_norm(change[0].T), factor[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 30), classes=st.integers(2, 9))
def test_output_bounds_bound_divergences(seed: int, scale: float, classes: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = 3 * torch.randn(20, classes, generator=draw, dtype=torch.float64)
    after = before + scale * torch.randn(20, classes, generator=draw, dtype=torch.float64)
    assert certify_outputs(before, after).violations == 0
    shifted = output_bounds(before, after + 7.0)  # a shift of all logits is no change
    torch.testing.assert_close(shifted.range, output_bounds(before, after).range)


def test_output_bound_is_nearly_reached_by_two_fair_classes() -> None:
    before = torch.zeros(1, 2, dtype=torch.float64)
    found = certify_outputs(before, torch.tensor([[0.01, 0.0]], dtype=torch.float64))
    assert found.kl == pytest.approx(found.kl_bound, rel=1e-3)
    assert found.certified.value == 0  # a tie can break either way


def test_output_certificate_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        output_bounds(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="K >= 2"):
        output_bounds(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least one held-out point"):
        certify_outputs(torch.zeros(0, 3), torch.zeros(0, 3))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.95, 0.999]))
def test_clopper_pearson_is_that_of_the_beta_law(n: int, share: float, level: float) -> None:
    hits, tail = round(share * n), (1 - level) / 2
    found = clopper_pearson(hits, n, level=level)
    low = beta_law.ppf(tail, hits, n - hits + 1) if hits else 0.0
    high = beta_law.ppf(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-7)


@pytest.mark.parametrize(
    ("hits", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (0, 0, 0.95), (1, 2, 1.0)]
)
def test_clopper_pearson_refuses_impossible_counts(hits: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="got"):
        clopper_pearson(hits, n, level=level)


@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 5), (4, 4, 6)])
def test_low_rank_norms_are_those_of_the_product(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    draw = torch.Generator().manual_seed(m)
    left = torch.randn(2, m, k, generator=draw, dtype=torch.float64)
    right = torch.randn(2, n, k, generator=draw, dtype=torch.float64)
    dense = left @ right.mT
    torch.testing.assert_close(
        low_rank_norm(left, right), dense.flatten(1).norm(dim=1), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(
        low_rank_spectral_norm(left, right),
        torch.linalg.matrix_norm(dense, ord=2),
        atol=1e-8,
        rtol=0,
    )


def test_spectral_norm_of_a_convolution_bounds_a_position() -> None:
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, 2, 2, generator=draw, dtype=torch.float64)
    patch = torch.randn(50, 12, generator=draw, dtype=torch.float64)
    moved = patch @ kernel.reshape(5, -1).T
    assert bool((moved.norm(dim=1) <= spectral_norm(kernel) * patch.norm(dim=1) + 1e-9).all())
    bias = torch.tensor([3.0, 4.0])
    assert float(spectral_norm(bias)) == pytest.approx(5.0)


def test_lanczos_finds_the_lower_end() -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(60, 60, generator=draw, dtype=torch.float64)
    matrix = matrix + matrix.T
    true = float(torch.linalg.eigvalsh(matrix)[0])
    short, residual = lanczos_smallest(lambda v: matrix @ v, matrix[0], steps=8)
    assert short >= true - 1e-9
    assert float((torch.linalg.eigvalsh(matrix) - short).abs().min()) <= residual + 1e-9
    full, residual = lanczos_smallest(lambda v: matrix @ v, matrix[0], steps=100)
    assert full == pytest.approx(true, abs=1e-8)
    assert residual < 1e-6
    alike, _ = lanczos_smallest(lambda v: -2 * v, matrix[0], steps=5)  # one step spans all
    assert alike == pytest.approx(-2)
    with pytest.raises(ValueError, match="at least 1"):
        lanczos_smallest(lambda v: v, matrix[0], steps=0)


def certificate(**changes: object) -> Certificate:
    values: dict[str, object] = {
        "rho": 2.0,
        "points": 10,
        "start": 4.0,
        "end": 1.0,
        "forget_start": 4.0,
        "forget_end": 1.0,
        "distance": 1.0,
        "gradient": 2.0,
        "residual": 0.0,
    }
    return Certificate(**{**values, **changes})  # type: ignore[arg-type]


def test_certificate_reads_its_bounds_from_what_was_measured() -> None:
    one = certificate()
    assert one.lowered
    assert one.level_set == pytest.approx(math.sqrt(3))
    assert one.a_priori == pytest.approx(2)
    assert one.stationarity == pytest.approx(1)
    assert one.forget_bound == pytest.approx(3)
    assert one.violations() == ()


def test_certificate_says_where_it_does_not_apply() -> None:
    risen = certificate(end=3.5)  # J = 3.5 + 1 > 4
    assert not risen.lowered
    assert risen.level_set is None
    assert risen.a_priori is None
    assert risen.forget_bound is None
    assert "does not apply" in str(risen)
    free = certificate(rho=0.0)
    assert free.stationarity is None
    assert free.violations() == ()


def test_certificate_names_what_is_violated() -> None:
    assert "C2" in certificate(gradient=0.5).violations()
    assert "C3" in certificate(forget_end=3.5, end=0.9).violations()


def test_certificate_survives_json_and_prints_its_assumptions() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=draw)
    one = certificate(
        outputs=certify_outputs(logits, logits + 0.01),
        spectral={"a.weight": 0.5, "b.weight": 1.5},
        influence=InfluenceLink(rho=2.0, beta=13.5, residual=0.1, steps=20),
    )
    again = Certificate.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again == one
    text = str(one)
    for name in ("C1", "C2", "C3", "C4", "C5", "NOT valid", "assumes", "b.weight"):
        assert name in text
    assert "None of these says that the information is gone" in text
    with pytest.raises(FormatError, match="fields"):
        Certificate.from_dict({"rho": 1.0})
    with pytest.raises(FormatError, match="no certificate"):
        Certificate.from_dict({**one.to_dict(), "outputs": {"n": 3}})


def test_influence_link_needs_rho_above_beta() -> None:
    assert InfluenceLink(rho=14.0, beta=13.5, residual=0.1, steps=20).valid
    assert not InfluenceLink(rho=13.55, beta=13.5, residual=0.1, steps=20).valid
