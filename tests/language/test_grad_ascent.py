"""Gradient ascent and GradDiff: sign, token mean, stopping, and what a retain term holds."""

from __future__ import annotations

import math

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.language.batches import collate, encode
from concept_erasure.language.grad_ascent import GradAscentEraser, ascent_loss, stop_above
from concept_erasure.language.likelihood import divergence, sequence_nll, token_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora, Raw, trainable
from concept_erasure.language.targets import kl
from tests.models import TinyTokenizer, tiny

FORGET = ["the owl of harry is white", "harry plays a game on a broom high up", "the castle stands"]
RETAIN = ["a cat sat on the mat all day", "rain falls on the hills and in the valley"]


def _batch(texts, extra=0):
    made = encode(TinyTokenizer(), texts, max_length=32)
    return collate(made, range(len(made)), pad_id=extra)


def _fit(steps=6, **options):
    model = tiny("llama")
    training = Training(steps=steps, learning_rate=1e-2, batch_size=3, log_every=1, progress=False)
    settings = {"forget_texts": FORGET, "training": training, **options}
    return model, GradAscentEraser.fit(model, TinyTokenizer(), Concept(name="harry"), **settings)


def test_it_climbs_the_gradient_of_the_mean_nll():
    model, batch = tiny("llama"), _batch(FORGET)
    parameters = list(model.parameters())
    up = torch.autograd.grad(ascent_loss(token_nll(model, batch)).sum() / batch.count, parameters)
    hf = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    down = torch.autograd.grad(hf, parameters)
    for one, other in zip(up, down, strict=True):
        assert torch.allclose(one, -other, rtol=1e-4, atol=1e-6)


def test_the_history_is_minus_the_mean_over_tokens():
    model, eraser = _fit()
    with torch.no_grad():
        mean = float(token_nll(model, _batch(FORGET)).mean())
    assert eraser.report["history"][0]["forget"] == pytest.approx(-mean, rel=1e-5)


def test_it_stops_at_a_uniform_guess_unless_told_otherwise():
    _, stopped = _fit(steps=40, max_nll=6.0)
    _, free = _fit(steps=40, max_nll="never")
    assert stopped.report["steps"] < 40 == free.report["steps"]
    assert stopped.config.max_nll == 6.0 and free.config.max_nll is None
    _, auto = _fit(steps=1)
    assert auto.config.max_nll == pytest.approx(math.log(128))
    rule = stop_above(2.0)
    assert rule(0, {"forget": -2.5}) and not rule(0, {"forget": -1.5})


def test_graddiff_holds_what_ascent_destroys():
    def drift(eraser, model):
        batch = _batch(RETAIN)
        with torch.no_grad():
            before = token_nll(model, batch)
            with eraser.apply(model):
                return float((token_nll(model, batch) - before).abs().mean())

    options = {"steps": 20, "max_nll": "never"}
    alone = drift(*reversed(_fit(**options)))
    held = drift(*reversed(_fit(retain_texts=RETAIN, variant="graddiff", **options)))
    assert held < 0.6 * alone


def test_variant_and_retain_weight_say_the_same_thing():
    _, by_weight = _fit(steps=1, retain_texts=RETAIN, retain_weight=0.5)
    assert by_weight.config.variant == "graddiff" and by_weight.config.retain_weight == 0.5
    _, by_name = _fit(steps=1, retain_texts=RETAIN, variant="graddiff")
    assert by_name.config.retain_weight == 1
    for contradiction in (
        {"variant": "ascent", "retain_weight": 1.0},
        {"variant": "graddiff", "retain_weight": 0.0},
    ):
        with pytest.raises(ValueError, match="retain_weight"):
            _fit(steps=1, retain_texts=RETAIN, **contradiction)


def test_retain_texts_are_not_read_without_a_weight():
    _, one = _fit(steps=2)
    _, other = _fit(steps=2, retain_texts=["x"])  # one token: refused if it were read
    assert one.digest == other.digest


@pytest.mark.parametrize("spec", [Lora(rank=4), Raw(patterns=("*.mlp.*",))])
def test_the_divergence_is_that_of_whole_distributions_and_zero_at_the_start(spec):
    model, batch = tiny("llama"), _batch(RETAIN)
    with torch.no_grad():
        before = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    with trainable(model, spec, seed=0) as parameterisation:
        assert float(divergence(model, batch, parameterisation).detach().abs().max()) < 1e-6
        with torch.no_grad():
            for parameter in parameterisation.parameters():
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        value = divergence(model, batch, parameterisation)
        after = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
        rows, columns = (batch.labels != -100).nonzero().T
        by_hand = kl(before[rows, columns - 1], after[rows, columns - 1])
        assert (
            torch.allclose(value, by_hand, rtol=1e-3, atol=1e-5) and float(value.min().detach()) > 0
        )
        grads = torch.autograd.grad(value.sum(), parameterisation.parameters(), allow_unused=True)
        assert any(g is not None and float(g.abs().max()) > 0 for g in grads)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    model, batch = tiny("gemma2"), _batch(FORGET)
    with torch.no_grad():
        whole = sequence_nll(model, batch)
    monkeypatch.setattr("concept_erasure.language.batches.CHUNK_VALUES", 3 * 128)
    parameters = list(model.parameters())
    value = sequence_nll(model, batch)
    assert torch.allclose(value.detach(), whole, rtol=1e-5)
    assert torch.autograd.grad(value.sum(), parameters[-1:])[0].abs().max() > 0
