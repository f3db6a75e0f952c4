"""NPO: closed-form gradients, its limits, sums instead of means, and what does not count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_erasure.concept import Concept
from concept_erasure.language.batches import collate, encode
from concept_erasure.language.likelihood import reference_nll, sequence_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.npo import NpoEraser, npo_loss, npo_weight
from concept_erasure.language.parameters import Lora
from tests.models import TinyTokenizer, tiny

FORGET = ["the owl of harry is white", "harry plays a game on a broom high up", "the castle stands"]
RETAIN = ["a cat sat on the mat all day", "rain falls on the hills and in the valley"]
SHORT = Training(steps=4, learning_rate=1e-2, batch_size=2, progress=False)
numbers = st.floats(1.0, 200.0)


@settings(deadline=None, max_examples=50)
@given(numbers, numbers, st.floats(1e-3, 5.0))
def test_the_gradient_is_the_weight_times_that_of_gradient_ascent(nll, reference, beta):
    x = torch.tensor([nll], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([reference], dtype=torch.float64)
    (grad,) = torch.autograd.grad(npo_loss(x, zero, beta).sum(), x)
    s = math.exp(-beta * (nll - reference)) if beta * (reference - nll) < 700 else math.inf
    closed = 2 * s / (1 + s) if s < math.inf else 2.0
    assert float(grad) == pytest.approx(-closed, rel=1e-9, abs=1e-12)
    assert float(npo_weight(x.detach(), zero, beta)) == pytest.approx(closed, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(numbers, st.floats(1e-3, 5.0))
def test_at_the_start_the_loss_is_two_over_beta_log_two(nll, beta):
    x = torch.tensor([nll], dtype=torch.float64)
    assert float(npo_loss(x, x, beta)) == pytest.approx(2 / beta * math.log(2), rel=1e-12)
    assert float(npo_weight(x, x, beta)) == pytest.approx(1)


def test_as_beta_goes_to_zero_it_is_gradient_ascent_up_to_a_constant():
    generator = torch.Generator().manual_seed(0)
    x, zero = 100 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    beta = 1e-7
    gap = npo_loss(x, zero, beta) - 2 / beta * math.log(2) + (x - zero)
    assert gap.abs().max() < 1e-3
    assert (npo_weight(x, zero, beta) - 1).abs().max() < 1e-5


def test_the_force_fades_and_never_overflows():
    nll = torch.tensor([0.0, 1e2, 1e4, 1e6], requires_grad=True)
    loss = npo_loss(nll, torch.tensor(50.0), 0.5)
    (grad,) = torch.autograd.grad(loss.sum(), nll)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert grad[0] < -1.99 and bool((grad.diff() >= 0).all()) and grad[-1] == 0


def test_at_the_published_beta_a_long_text_has_no_force_left_after_a_fifth_of_a_nat_per_token():
    assert float(npo_weight(torch.tensor(256 * 0.2), torch.tensor(0.0), 0.1)) < 0.013
    assert float(npo_weight(torch.tensor(40 * 0.2), torch.tensor(0.0), 0.1)) > 0.5


def _batch(texts, width=0):
    made = encode(TinyTokenizer(), texts, max_length=32)
    return collate(made, range(len(made)), pad_id=width)


def test_the_likelihood_of_a_text_is_the_sum_over_its_tokens_not_the_mean():
    model, batch = tiny("llama"), _batch(FORGET)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    by_hand = [
        -sum(
            float(logits[i, j - 1, batch.input_ids[i, j]])
            for j in range(batch.labels.shape[1])
            if batch.labels[i, j] != -100
        )
        for i in range(len(FORGET))
    ]
    with torch.no_grad():
        assert sequence_nll(model, batch).tolist() == pytest.approx(by_hand, rel=1e-5)
    twice = _batch([f"{FORGET[0]} {FORGET[1]}"])
    with torch.no_grad():
        assert float(sequence_nll(model, twice)) > by_hand[0]  # a mean would not grow


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_padding_pad_id_and_company_do_not_change_a_text(kind):
    model = tiny(kind)
    with torch.no_grad():
        together = sequence_nll(model, _batch(FORGET))
        alone = torch.cat([sequence_nll(model, _batch([text])) for text in FORGET])
        other = sequence_nll(model, _batch(FORGET, width=77))
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.allclose(together, other, rtol=1e-6)


def test_reference_is_that_of_each_text_in_the_order_given():
    model = tiny("llama")
    texts = encode(TinyTokenizer(), FORGET, max_length=32)
    values = reference_nll(model, texts, batch_size=2)
    with torch.no_grad():
        alone = torch.cat([sequence_nll(model, _batch([text])) for text in FORGET])
    assert torch.allclose(values, alone, rtol=1e-5)


def _fit(**options):
    model = tiny("llama")
    settings = {"forget_texts": FORGET, "retain_texts": RETAIN, "training": SHORT, **options}
    return model, NpoEraser.fit(model, TinyTokenizer(), Concept(name="harry"), **settings)


def test_training_starts_at_two_over_beta_log_two_and_ends_with_less_likely_texts():
    training = Training(steps=10, learning_rate=1e-2, batch_size=3, log_every=1, progress=False)
    model, eraser = _fit(beta=0.2, training=training)
    history = eraser.report["history"]
    assert history[0]["forget"] == pytest.approx(10 * math.log(2), rel=1e-5)
    assert history[0]["retain"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        before = sequence_nll(model, _batch(FORGET))
        with eraser.apply(model):
            after = sequence_nll(model, _batch(FORGET))
    assert bool((after > before + 1).all())


def test_beta_fits_the_length_of_the_texts_and_the_paper_says_a_tenth():
    _, eraser = _fit()
    tokens = sum(len(text.split()) for text in FORGET) / len(FORGET)
    assert eraser.config.beta * tokens == pytest.approx(4)
    _, paper = _fit(preset="paper")
    assert paper.config.beta == 0.1 and paper.config.retain == "nll"
    names = {name.split(".")[1] for name in paper.weights}
    assert names == {"layers"}  # all weights of the blocks, neither embeddings nor head
    training = NpoEraser.default_training("paper")
    assert (training.learning_rate, training.weight_decay) == (1e-5, 0.01)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beta": 0.0}, "beta"),
        ({"retain": "mse"}, "retain"),
        ({"preset": "papers"}, "preset"),
        ({"forget_weight": 0.0}, "forget_weight"),
        ({"retain_weight": -1.0}, "retain_weight"),
        ({"lora": Lora(), "raw": "x"}, "not both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        _fit(**options)
