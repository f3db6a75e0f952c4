"""Perplexity and continuation gap against plain computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from concept_erasure.evals.language import continuation_gap, perplexity
from tests.models import TinyTokenizer, tiny

TEXTS = ["the cat sat on the mat", "a dog", "one two three four"]


def test_perplexity_is_that_of_one_text_after_another() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += float(cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    expected = math.exp(total / count)
    for side in ("right", "left"):
        found = perplexity(model, TinyTokenizer(side), TEXTS, batch_size=2)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gap_does_not_depend_on_padding_or_batches(kind: str) -> None:
    model = tiny(kind)
    one = continuation_gap(model, TinyTokenizer(), TEXTS, " he", " she", batch_size=1)
    for side in ("right", "left"):
        many = continuation_gap(model, TinyTokenizer(side), TEXTS, " he", " she", batch_size=3)
        torch.testing.assert_close(many.gaps, one.gaps, atol=1e-5, rtol=1e-4)
    other = continuation_gap(model, TinyTokenizer(), TEXTS, " she", " he")
    torch.testing.assert_close(other.gaps, -one.gaps, atol=1e-5, rtol=1e-4)
    assert one.mean_absolute >= abs(one.mean)
    assert one.spread >= 0
    assert bool((one.mass > 0).all() and (one.mass < 1).all())


def test_the_model_keeps_its_mode() -> None:
    model = tiny("llama").train()
    perplexity(model, TinyTokenizer(), TEXTS)
    assert model.training


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="non-empty list of texts"):
        perplexity(model, tokenizer, "one text")
    with pytest.raises(ValueError, match="nothing is predicted"):
        perplexity(model, tokenizer, ["one"])
    with pytest.raises(ValueError, match="must be one token"):
        continuation_gap(model, tokenizer, TEXTS, " he said", " she")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        perplexity(model, tokenizer, TEXTS, batch_size=0)
