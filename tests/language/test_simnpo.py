"""SimNPO: closed-form gradients, length normalisation, no reference, the paper's weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_erasure.concept import Concept
from concept_erasure.language.batches import collate, encode
from concept_erasure.language.likelihood import sequence_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.simnpo import SimNpoEraser, simnpo_loss, simnpo_weight
from tests.models import TinyTokenizer, tiny

FORGET = ["the owl of harry is white", "harry plays a game on a broom high up", "the castle stands"]
RETAIN = ["a cat sat on the mat all day", "rain falls on the hills and in the valley"]


@settings(deadline=None, max_examples=50)
@given(st.floats(1.0, 200.0), st.integers(1, 60), st.floats(1e-2, 5.0), st.floats(-2.0, 4.0))
def test_the_gradient_is_the_weight_times_that_of_the_mean(nll, length, beta, delta):
    x = torch.tensor([nll], dtype=torch.float64, requires_grad=True)
    n = torch.tensor([length])
    (grad,) = torch.autograd.grad(simnpo_loss(x, n, beta, delta).sum(), x)
    closed = 2 / (1 + math.exp(min(700, beta * (nll / length - delta))))
    assert float(grad) == pytest.approx(-closed / length, rel=1e-9, abs=1e-14)
    weight = simnpo_weight(x.detach(), n, beta, delta)
    assert float(weight) == pytest.approx(closed, rel=1e-9, abs=1e-14)


def test_only_the_mean_per_token_counts_and_delta_shifts_it():
    nll, length = torch.tensor([6.0, 60.0]), torch.tensor([3, 30])
    one, ten = simnpo_loss(nll, length, 2.5)
    assert float(one) == pytest.approx(float(ten))
    shifted = simnpo_loss(nll + 1.5 * length, length, 2.5, 1.5)
    assert torch.allclose(shifted, simnpo_loss(nll, length, 2.5))
    assert float(simnpo_weight(nll, length, 2.5, 2.0)[0]) == pytest.approx(1)


def test_as_beta_goes_to_zero_it_is_gradient_ascent_on_the_mean():
    nll, length = torch.tensor([6.0, 90.0], dtype=torch.float64), torch.tensor([3, 30])
    gap = simnpo_loss(nll, length, 1e-7) - 2e7 * math.log(2) + nll / length
    assert gap.abs().max() < 1e-5


def test_the_weights_that_the_presets_are_chosen_by():
    one = torch.tensor(1)
    weights = [
        float(simnpo_weight(torch.tensor(n), one, b))
        for n, b in ((2.5, 2.5), (2.5, 0.5), (6.0, 0.5))
    ]
    assert weights == pytest.approx([0.0039, 0.445, 0.095], rel=0.02)


def _batch(texts):
    made = encode(TinyTokenizer(), texts, max_length=32)
    return collate(made, range(len(made)), pad_id=0)


def test_the_gradient_through_a_model_is_the_sum_of_weighted_gradients_of_its_texts():
    model, batch = tiny("llama"), _batch(FORGET)
    parameters = list(model.parameters())
    nll = sequence_nll(model, batch)
    grads = torch.autograd.grad(simnpo_loss(nll, batch.lengths, 1.0).sum(), parameters)
    weights = simnpo_weight(nll.detach(), batch.lengths, 1.0) / batch.lengths
    again = sequence_nll(model, batch)
    closed = torch.autograd.grad(-(weights * again).sum(), parameters)
    for one, other in zip(grads, closed, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_fit_makes_texts_less_likely_and_the_paper_weighs_them_as_published():
    model = tiny("llama")
    training = Training(steps=10, learning_rate=1e-2, batch_size=3, progress=False)
    options = {"forget_texts": FORGET, "retain_texts": RETAIN, "training": training}
    eraser = SimNpoEraser.fit(model, TinyTokenizer(), Concept(name="harry"), beta=0.1, **options)
    with torch.no_grad():
        before = sequence_nll(model, _batch(FORGET))
        with eraser.apply(model):
            assert bool((sequence_nll(model, _batch(FORGET)) > before + 1).all())
    paper = SimNpoEraser.fit(
        model, TinyTokenizer(), Concept(name="harry"), preset="paper", **options
    )
    config = paper.config
    assert (config.beta, config.delta, config.forget_weight) == (2.5, 0.0, 0.1375)
    with pytest.raises(ValueError, match="beta"):
        SimNpoEraser.fit(model, TinyTokenizer(), Concept(name="harry"), beta=-1.0, **options)
