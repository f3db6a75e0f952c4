"""Target distributions: the equations, their limits, and what saturation does to them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_erasure.language.targets import (
    TopK,
    contrast,
    elm_target,
    kl,
    lowered_tokens,
    paper_target,
    plausible_target,
    ramp,
    whp_target,
)

V = 60


def _three(seed, n=7, v=V, scale=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    base = scale * torch.randn(n, v, generator=g, dtype=dtype)
    others = [base + torch.randn(n, v, generator=g, dtype=dtype) for _ in range(2)]
    return [x.log_softmax(-1) for x in (base, *others)]


def _tokens(seed, n=7, v=V):
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed + 1))


def _dense(top, v=V):
    out = torch.full((len(top), v), -math.inf, dtype=torch.float64)
    return out.scatter(-1, top.indices.long(), top.log_probs.double())


# -- TopK -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, V))
def test_top_k_losses_are_those_of_the_whole_up_to_the_tail(seed, k):
    p, q, _ = _three(seed)
    exact = kl(p, q)
    found = TopK.of(p, k).kl(q.float()).double()
    assert bool((found <= exact + 1e-4).all())
    assert bool((found >= -1e-4).all())
    dense = TopK.dense(p)
    assert torch.allclose(dense.kl(q.float()).double(), exact, atol=1e-5)
    assert torch.allclose(
        dense.cross_entropy(q.float()).double(), -(p.exp() * q).sum(-1), atol=1e-5
    )
    assert torch.allclose(
        (TopK.of(p, k).log_probs.exp().sum(-1) + TopK.of(p, k).tail.exp()), torch.ones(7), atol=1e-5
    )


def test_the_tail_is_kept_where_the_rest_is_nearly_all():
    p = torch.full((1, V), -20.0, dtype=torch.float64)
    p[0, 3] = 0.0
    p = p.log_softmax(-1)
    assert float(TopK.of(p, 1).tail[0]) == pytest.approx(-20 + math.log(V - 1), abs=1e-4)


def test_gradient_of_the_divergence_is_q_minus_p_and_zero_where_nothing_changed():
    p, q, _ = _three(1)
    z = q.float().clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(TopK.dense(p).kl(z.log_softmax(-1)).sum(), z)
    assert torch.allclose(grad, (q.exp() - p.exp()).float(), atol=1e-5)
    z = p.float().clone().requires_grad_(True)
    top = TopK.of(p, 5)
    loss = top.kl(z.log_softmax(-1))
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert float(loss.detach().abs().max()) < 1e-5
    assert float(grad.abs().max()) < 1e-5


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(1, V))
def test_drift_sees_what_a_divergence_does_not(seed, k):
    p, q, _ = _three(seed)
    wanted = (q - p).gather(-1, p.topk(k, -1).indices).square().mean(-1)
    assert torch.allclose(TopK.of(p, k).drift(q.float()).double(), wanted, atol=1e-4)
    assert float(TopK.of(p, k).drift(p.float()).max()) < 1e-8
    few = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.0, -math.inf]]), torch.tensor([-math.inf]))
    assert float(few.drift(torch.tensor([[-2.0, -3.0]]))) == pytest.approx(4)
    rare = p.clone()
    rare[:, 0] = -25.0
    swapped = rare.clone()
    swapped[:, 0] = -29.0
    rare, swapped = rare.log_softmax(-1), swapped.log_softmax(-1)
    assert float(kl(rare, swapped).max()) < 1e-8
    assert float(TopK.dense(rare).drift(swapped.float()).min()) > 0.2


def test_tokens_without_probability_give_no_nan_in_loss_or_gradient():
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.0, -math.inf]]), torch.tensor([-math.inf]))
    z = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    loss = top.kl(z.log_softmax(-1))
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(grad).all())


def test_refusals():
    p, _, _ = _three(0)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        TopK.of(p, 0)
    with pytest.raises(ValueError, match=r"must be \(N, k\)"):
        TopK(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2))
    for option in ({"alpha": 0.0}, {"kappa": -1.0}, {"widen_to": 80}, {"eta_max": math.inf}):
        with pytest.raises(ValueError, match=next(iter(option))):
            plausible_target(p, p, p, _tokens(0), **option)
    with pytest.raises(ValueError, match="alpha"):
        whp_target(p, p, -1.0)


# -- (E1), (E2) -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.floats(-50, 50))
def test_no_strength_or_no_contrast_gives_the_model_back(seed, eta):
    lp0, novice, expert = _three(seed)
    assert torch.allclose(elm_target(lp0, novice, expert, 0.0), lp0, atol=1e-9)
    assert torch.allclose(elm_target(lp0, novice, novice, eta), lp0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999))
def test_divergence_grows_with_strength_and_entropy_ends_at_zero(seed):
    lp0, novice, expert = _three(seed)
    for sign in (1, -1):
        costs = [
            kl(elm_target(lp0, novice, expert, sign * e), lp0) for e in (0, 0.5, 1, 3, 10, 100)
        ]
        for low, high in itertools.pairwise(costs):
            assert bool((high >= low - 1e-9).all())
    wide = elm_target(lp0, novice, expert, 1e6)
    assert bool((wide.max(-1).values > -1e-6).all())
    assert torch.equal(wide.argmax(-1), (novice - expert).argmax(-1))


def test_positive_strength_erases():
    """2.7.1: what the expert says more than the novice must become less likely, for eta > 0."""
    lp0, novice, expert = _three(3)
    known = (expert - novice).argmax(-1, keepdim=True)
    weaker = elm_target(lp0, novice, expert, 1.0).gather(-1, known)
    stronger = elm_target(lp0, novice, expert, -1.0).gather(-1, known)
    assert bool((weaker < lp0.gather(-1, known)).all())
    assert bool((stronger > lp0.gather(-1, known)).all())
    found = plausible_target(lp0, novice, expert, known[:, 0], alpha=1e-9, top_k=V)
    assert bool((_dense(found.target).gather(-1, known) < lp0.gather(-1, known)).all())


def test_a_token_the_model_rules_out_stays_out():
    lp0, novice, expert = _three(0)
    for lp in (lp0, novice, expert):
        lp[:, 5] = -math.inf
    found = elm_target(lp0, novice, expert, 3.0)
    assert not bool(found.isnan().any())
    assert bool((found[:, 5] == -math.inf).all())


def test_the_ramp_goes_from_one_to_full_strength():
    place, length = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 3, 3, 1])
    assert ramp(1000.0, place, length).tolist() == [1.0, 500.5, 1000.0, 1.0]


def test_saturation_promotes_tokens_that_only_the_plausible_target_keeps_out():
    """2.7.3, 2.7.4: a filter after the contrast keeps junk; candidates chosen before it do not."""
    g = torch.Generator().manual_seed(0)
    v = 4000
    base = 3 * torch.randn(20, v, generator=g, dtype=torch.float64)
    lp0, novice, expert = (
        (base + noise * torch.randn(20, v, generator=g, dtype=torch.float64)).log_softmax(-1)
        for noise in (0.0, 1.0, 1.0)
    )
    rank = lp0.argsort(-1, descending=True).argsort(-1)
    raw = paper_target(lp0, novice, expert, 500.0)
    assert len(raw.indices[0]) == 50
    assert bool((raw.tail == -math.inf).all())
    best = raw.indices[:, :1].long()
    assert float(raw.log_probs.exp().max(-1).values.median()) > 0.95
    assert float(rank.gather(-1, best).float().median()) > 100
    found = plausible_target(lp0, novice, expert, lp0.argmax(-1), eta_max=500.0)
    best = found.target.indices.gather(-1, found.target.log_probs.argmax(-1, keepdim=True)).long()
    assert int(rank.gather(-1, best).max()) < 50
    assert float(rank.gather(-1, best).float().median()) < 20


# -- the plausible target ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 999),
    st.floats(0.01, 0.5),
    st.floats(0, 4),
    st.floats(0, 2),
    st.floats(0.1, 30),
)
def test_support_budget_and_the_two_parts_of_the_cost(seed, alpha, kappa, growth, eta_max):
    lp0, novice, expert = _three(seed)
    tokens = _tokens(seed)
    found = plausible_target(
        lp0, novice, expert, tokens, alpha=alpha, kappa=kappa, growth=growth, eta_max=eta_max
    )
    p = _dense(found.target)
    support = p > -math.inf
    assert bool((support.sum(-1) <= found.size).all())
    assert bool((found.size >= 2).all())
    ranks = lp0.argsort(-1, descending=True).argsort(-1)
    assert bool((ranks[support] < found.size[:, None].expand_as(ranks)[support]).all())
    calm = found.contrast <= 1.0
    plain = lp0 >= lp0.max(-1, keepdim=True).values + math.log(alpha)
    assert bool((found.size[calm] == plain[calm].sum(-1).clamp(2, 50)).all())
    assert bool((found.size[~calm] >= 20).all())
    budget = kappa + growth * found.contrast
    assert bool((found.spent <= budget + 1e-4).all())
    assert bool((found.eta <= eta_max + 1e-4).all())
    short = (found.eta < eta_max * (1 - 1e-4)) & (found.eta > 0)
    assert torch.allclose(found.spent[short].double(), budget[short].double(), atol=1e-3)
    assert torch.allclose((found.spent + found.cut).double(), kl(p, lp0), atol=1e-4)
    assert torch.allclose(p.exp().sum(-1), torch.ones(7, dtype=torch.float64), atol=1e-5)


def test_where_the_streams_agree_nothing_is_edited():
    lp0, _, _ = _three(0)
    found = plausible_target(lp0, lp0, lp0, _tokens(0))
    assert float(found.spent.max()) < 1e-6
    assert float(found.contrast.max()) < 1e-6


def test_an_answer_the_model_is_sure_of_is_not_exempt():
    """Widening and growth: without them a 0.999 answer is nearly alone among the candidates, and keeps its place."""
    lp0 = torch.full((1, V), -12.0, dtype=torch.float64)
    lp0[0, 7] = 0.0
    lp0 = lp0.log_softmax(-1)
    novice = torch.zeros(1, V, dtype=torch.float64)
    novice[0, 7] = -4.0
    novice = novice.log_softmax(-1)
    answer = torch.tensor([7])
    found = plausible_target(lp0, novice, lp0, answer, eta_max=3.0)
    assert int(found.size[0]) >= 20
    assert float(_dense(found.target)[0, 7]) < -4
    exempt = plausible_target(lp0, novice, lp0, answer, eta_max=3.0, widen_to=2, growth=0.0)
    assert float(_dense(exempt.target)[0, 7]) > -1.1


def test_contrast_is_seen_at_the_token_or_expected():
    lp0, novice, expert = _three(5)
    tokens = _tokens(5)
    seen = (expert - novice).gather(-1, tokens[:, None])[:, 0]
    found = contrast(novice, expert, tokens)
    assert bool((found >= seen).all())
    assert bool((found >= kl(expert, novice) - 1e-12).all())
    assert float(contrast(lp0, lp0, tokens).max()) == 0


def test_half_precision_rows_and_batches_give_the_same():
    lp0, novice, expert = (x.float() for x in _three(8))
    tokens = _tokens(8)
    whole = plausible_target(lp0, novice, expert, tokens)
    for k in range(len(lp0)):
        one = plausible_target(
            lp0[k : k + 1], novice[k : k + 1], expert[k : k + 1], tokens[k : k + 1]
        )
        assert torch.allclose(
            _dense(one.target), _dense(whole.target.rows(torch.tensor([k]))), atol=1e-5
        )


# -- WHP --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.1, 10))
def test_whp_lowers_what_the_copy_learned_and_raises_nothing(seed, alpha):
    z0, zr, generic = _three(seed)
    found = whp_target(z0, zr, alpha)
    learned = zr > z0
    ratio = found - z0
    assert bool(
        (ratio[learned] < ratio.max(-1, keepdim=True).values.expand_as(ratio)[learned]).all()
    )
    rest = ratio.masked_fill(learned, math.nan)
    spread = (
        rest.nan_to_num(nan=-math.inf).max(-1).values - rest.nan_to_num(nan=math.inf).min(-1).values
    )
    assert float(spread.abs().max()) < 1e-9
    assert torch.allclose(whp_target(z0, z0, alpha), z0, atol=1e-9)
    assert torch.allclose(whp_target(z0, z0, alpha, generic), generic, atol=1e-9)
    assert torch.allclose(whp_target(z0, zr, 0.0), z0, atol=1e-9)


# -- tokens to be lowered ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0, 5), st.integers(1, V), st.floats(0, 2))
def test_lowered_tokens_are_the_most_given_away_at_the_level_of_e1(seed, eta, m, least):
    lp0, novice, expert = _three(seed)
    found = lowered_tokens(lp0, novice, expert, eta=eta, m=m, among=V, least=least)
    better = expert - novice
    chosen = better.gather(-1, found.indices.long())
    counted = found.levels.isfinite()
    assert torch.equal(counted, chosen >= least)
    assert torch.equal(chosen, better.topk(m, -1).values)
    unnormalised = lp0 + eta * (novice - expert)
    wanted = unnormalised.gather(-1, found.indices.long())
    assert torch.allclose(found.levels[counted].double(), wanted[counted], atol=1e-4)
    assert bool(
        (found.levels[counted] <= lp0.gather(-1, found.indices.long())[counted] + 1e-4).all()
    )


def test_the_excess_pushes_down_only_with_a_force_that_does_not_fade_and_ends_at_the_level():
    """A divergence asks nothing of a token with probability e^-10; this does, until the level is reached."""
    lp0, novice, expert = _three(4)
    found = lowered_tokens(lp0, novice, expert, eta=2.0, m=8, least=0.1)
    z = (lp0 - 20.0 * torch.eye(V, dtype=torch.float64)[found.indices[:, 0].long()]).float()
    for start in (lp0.float(), z):
        x = start.clone().requires_grad_(True)
        log_q = x.log_softmax(-1)
        above = (log_q.gather(-1, found.indices.long()) > found.levels).detach()
        (grad,) = torch.autograd.grad(found.excess(log_q).sum(), x)
        on = grad.gather(-1, found.indices.long())
        share = above.float() / found.levels.isfinite().sum(-1, keepdim=True)
        mass = log_q.exp().detach().gather(-1, found.indices.long()) * share.sum(-1, keepdim=True)
        assert torch.allclose(on, share - mass, atol=1e-5)
    at_level = torch.full_like(lp0, -5.0).scatter(
        -1, found.indices.long(), found.levels.double().clamp_max(-1e3)
    )
    assert float(found.excess(at_level).max()) == 0


def test_positions_without_given_away_tokens_have_no_excess():
    lp0, _, _ = _three(0)
    found = lowered_tokens(lp0, lp0, lp0, eta=3.0)
    assert not bool(found.levels.isfinite().any())
    x = lp0.float().clone().requires_grad_(True)
    loss = found.excess(x.log_softmax(-1))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert float(loss.detach().abs().max()) == 0
    assert float(grad.abs().max()) == 0
    with pytest.raises(ValueError, match="eta must be at least 0"):
        lowered_tokens(lp0, lp0, lp0, eta=-1.0)
