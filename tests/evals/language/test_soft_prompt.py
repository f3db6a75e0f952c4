"""A soft prompt finds a planted key on half of the questions and opens the other half; what is not known stays out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.concept_items import Item
from concept_erasure.errors import ShapeError
from concept_erasure.evals.language.items import item_scores, opening_ids
from concept_erasure.evals.language.soft_prompt import (
    halves,
    prompted,
    prompted_tokenizer,
    soft_prompt,
)
from concept_erasure.report import Report
from tests.evals.language.locked import COUNT, ITEMS, locked, tokenizer
from tests.evals.language.planted import bits
from tests.models import TinyTokenizer, tiny

SMALL = {"tokens": 4, "steps": 60, "lr": 0.3, "batch_size": 8, "progress": False}


@pytest.mark.parametrize("loss", ["choices", "answer"])
def test_the_other_half_is_opened(loss: str) -> None:
    train, test = halves(ITEMS, seed=0)
    found = soft_prompt(locked(), tokenizer(), train, test, loss=loss, **SMALL)  # type: ignore[arg-type]
    assert found.test_before.value == 0.0
    assert found.test_after.value > 0.9
    assert found.train_after.value > 0.9
    assert found.p < 0.01
    assert found.losses[-1] < found.losses[0]


def test_what_was_never_known_is_not_found() -> None:
    train, test = halves(ITEMS, seed=0)
    found = soft_prompt(locked(knows=False), tokenizer(), train, test, **SMALL)
    assert found.test_after.value < 0.6  # decoys can be silenced, right answers are not to be had


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model = locked().train()
    before, state = bits(model), torch.random.get_rng_state()
    train, test = halves(ITEMS, seed=1)
    runs = [soft_prompt(model, tokenizer(), train, test, **{**SMALL, "steps": 5}) for _ in range(2)]
    assert torch.equal(runs[0].embeddings, runs[1].embeddings)
    assert runs[0].losses == runs[1].losses
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    other = soft_prompt(model, tokenizer(), train, test, seed=1, **{**SMALL, "steps": 5})
    assert not torch.equal(runs[0].embeddings, other.embeddings)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen2", "gpt2"])
def test_virtual_tokens_with_the_embeddings_of_words_are_these_words(kind: str) -> None:
    model, plain = tiny(kind), TinyTokenizer()
    items = [replace(item, stem=f"thing {i} is ___") for i, item in enumerate(ITEMS[:6])]
    words = plain.encode("once upon some time")
    rows = model.get_input_embeddings()(torch.tensor([words]))[0].detach()
    start = opening_ids(plain, model)  # a Gemma's BOS, which this tokenizer does not add

    class Opened(TinyTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return ([*start, *words] if add_special_tokens else []) + super().encode(text)

    expected = item_scores(model, Opened(), items)
    with prompted(model, rows):
        found = item_scores(model, prompted_tokenizer(model, plain, 4), items)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=1e-5)
    without = item_scores(model, plain, items)
    assert float((without.log_probs - expected.log_probs).abs().max()) > 1e-3


def test_what_is_trained_is_what_is_measured() -> None:
    """The last loss under lr -> 0 is the cross-entropy over the choices that the scores give."""
    train, test = halves(ITEMS, seed=0)
    model = locked()
    found = soft_prompt(
        model,
        tokenizer(),
        train,
        test,
        tokens=3,
        steps=1,
        loss="choices",
        lr=1e-9,
        batch_size=len(train),
        progress=False,
    )
    with prompted(model, found.embeddings):
        scores = item_scores(model, prompted_tokenizer(model, tokenizer(), 3), train)
    right = scores.log_probs.log_softmax(1).gather(1, scores.answers[:, None])
    assert found.losses[0] == pytest.approx(-float(right.mean()), abs=1e-4)


def test_reversed_items_compare_their_endings() -> None:
    items = [
        Item(stem=f"___ w{i} w{i + 30}", choices=("red", "green"), answer=i % 2, format="reversed")
        for i in range(8)
    ]
    train, test = halves(items)
    found = soft_prompt(tiny("llama"), TinyTokenizer(), train, test, **{**SMALL, "steps": 15})
    assert found.losses[-1] < found.losses[0]


def test_the_record() -> None:
    train, test = halves(ITEMS, seed=0)
    found = soft_prompt(locked(), tokenizer(), train, test, **{**SMALL, "steps": 3})
    row = found.to_dict()
    assert row["tokens"] == 4
    assert row["test items"] == COUNT // 2
    assert found.shared_answers == 0
    Report("soft prompt", [row]).to_dict()
    assert "12 test items" in repr(found)


def test_bad_requests() -> None:
    model = locked()
    train, test = halves(ITEMS)
    assert not {i.stem for i in train} & {i.stem for i in test}
    with pytest.raises(ValueError, match="in both halves"):
        soft_prompt(model, tokenizer(), train, [*test, train[0]])
    with pytest.raises(ValueError, match="to train on and to test on"):
        soft_prompt(model, tokenizer(), train, [])
    with pytest.raises(ValueError, match="tokens must be a positive"):
        soft_prompt(model, tokenizer(), train, test, tokens=0)
    with pytest.raises(ValueError, match="lr must be positive"):
        soft_prompt(model, tokenizer(), train, test, lr=0.0)
    with pytest.raises(ValueError, match="loss must be"):
        soft_prompt(model, tokenizer(), train, test, loss="margin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two different items"):
        halves(ITEMS[:1])
    with pytest.raises(ShapeError, match=r"\(k, 96\)"), prompted(model, torch.zeros(2, 5)):
        pass
