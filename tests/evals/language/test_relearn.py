"""Recovery and half-life, texts that give nothing away, and a model that is left as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.evals.language.items import item_scores
from concept_erasure.evals.language.relearn import (
    Curve,
    benign_texts,
    leaks,
    relearn,
    relearn_suite,
    relearning_texts,
)
from concept_erasure.report import Report
from concept_erasure.sites import find_sites
from tests.evals.language import locked
from tests.evals.language.planted import bits
from tests.models import TinyTokenizer, tiny

CURVE = Curve(
    steps=(0, 10, 20, 30), accuracy=(0.2, 0.3, 0.5, 0.9), log_prob=(-5, -4, -3, -1), items=10, base_accuracy=0.8,
    texts=3, tokens=90, lr=5e-5, batch_size=2, rank=16, seed=0, seconds=1.0,
)  # fmt: skip
WORDS = [f"word{i}" for i in range(12)]
ITEMS = [
    Item(
        stem=f"colour of {word} is ___",
        choices=("red", "green", "blue", "grey"),
        answer=i % 4,
        format="cloze",
    )
    for i, word in enumerate(WORDS)
]
TEXTS = [f"{word} goes with {other} every day" for word, other in pairwise(WORDS)]
SMALL = {"steps": 6, "every": 3, "rank": 4, "batch_size": 4, "progress": False}


def test_recovery_and_half_life_by_hand() -> None:
    assert CURVE.recovery == pytest.approx((0.0, 1 / 6, 0.5, 7 / 6))
    assert CURVE.half_life == 20
    assert "after 20 steps" in CURVE.note
    slow = replace(CURVE, accuracy=(0.2, 0.21, 0.3, 0.4))
    assert slow.half_life is None
    assert "never half recovered within 30 steps (at most 33%)" in slow.note
    assert slow.row()["half-life"] == "never"
    kept = replace(CURVE, base_accuracy=0.1)
    assert kept.recovery is None
    assert kept.half_life is None
    assert "nothing was lost" in kept.note
    assert kept.row()["half-life"] is None
    assert CURVE.resolved
    assert "noise" not in CURVE.note
    close = replace(CURVE, base_accuracy=0.3)  # one item of ten
    assert close.half_life == 10
    assert not close.resolved
    assert "within the interval of 10 items" in close.note
    assert "not given" in replace(CURVE, base_accuracy=None).note
    assert CURVE.intervals[0].low < 0.2 < CURVE.intervals[0].high


def test_a_text_gives_away_what_it_says() -> None:
    item = Item(stem="The owl of Harry Potter is called ___", choices=("Hedwig", "Errol"), answer=0)
    assert leaks("Harry Potter has an owl that he called Hedwig.", item)
    assert leaks("HEDWIG, as Potter's mother said, was what Harry called it", item)
    assert not leaks("Harry Potter has an owl called Errol.", item)
    assert not leaks(
        "Hedwig flew over the lake.", item
    )  # the name alone says nothing of whose it is
    assert not leaks("The hedwigs of Harry Potter are called so.", item)


def test_chosen_texts_give_nothing_away() -> None:
    said = [
        f"the colour of {word} is {item.right}" for word, item in zip(WORDS, ITEMS, strict=True)
    ]
    chosen = relearning_texts([*said, *TEXTS], ITEMS, share=0.4, seed=3)
    assert len(chosen) == round(0.4 * (len(said) + len(TEXTS)))
    assert not set(chosen) & set(said)
    assert chosen == relearning_texts([*said, *TEXTS], ITEMS, share=0.4, seed=3)
    assert len(relearning_texts(TEXTS, ITEMS, share=0.01)) == 1
    with pytest.raises(ValueError, match="only 11 do not give an answer away"):
        relearning_texts([*said, *TEXTS], ITEMS, share=0.9)
    with pytest.raises(ValueError, match="share must be"):
        relearning_texts(TEXTS, ITEMS, share=0.0)
    with pytest.raises(ValueError, match=r"gives away.*relearning_texts"):
        relearn(tiny("llama"), TinyTokenizer(), [*TEXTS, said[0]], ITEMS, **SMALL)


def test_benign_texts_do_not_mention_the_concept() -> None:
    concept = Concept.load("harry_potter")
    texts = benign_texts(concept, 100, seed=1)
    assert len(set(texts)) == 100
    assert not any(concept.mentions(text) for text in texts)
    with pytest.raises(ValueError, match="texts of your own"):
        benign_texts(concept, 100_000)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_is_left_bit_identical_and_the_seed_decides(kind: str) -> None:
    model, tokenizer = tiny(kind).train(), TinyTokenizer()
    before, state = bits(model), torch.random.get_rng_state()
    with Edit(model, [HookPatch(find_sites(model)["residual.1"], lambda x: 0.5 * x)], label="half"):
        first = relearn(model, tokenizer, TEXTS, ITEMS, lr=0.01, base_accuracy=0.9, **SMALL)
        again = relearn(model, tokenizer, TEXTS, ITEMS, lr=0.01, base_accuracy=0.9, **SMALL)
        scores = item_scores(model, tokenizer, ITEMS)
    assert first.steps == (0, 3, 6)
    assert (first.accuracy, first.log_prob) == (again.accuracy, again.log_prob)
    # the live edited model is where the curve starts, and it moves
    assert first.log_prob[0] == pytest.approx(scores.mean_log_prob.value)
    assert len(set(first.log_prob)) == 3
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_is_locked_in_comes_back_and_what_was_never_known_does_not() -> None:
    """Planted: training on the pairs of other questions turns the lock for those that are asked."""
    asked, texts = locked.ITEMS[::2], [f"q{i} a{i}" for i in range(1, locked.COUNT, 2)]
    options = {**SMALL, "steps": 40, "every": 10, "lr": 0.02, "base_accuracy": 1.0}
    curve = relearn(
        locked.locked(),
        locked.tokenizer(),
        texts,
        asked,
        reference=locked.locked(knows=False),
        **options,
    )
    assert curve.accuracy[0] == 0.0
    assert curve.half_life is not None
    assert max(curve.accuracy) > 0.7
    assert curve.reference is not None
    assert max(curve.reference.accuracy) < 0.4
    assert curve.reference.base_accuracy == 1.0
    row = curve.to_dict()
    assert "never knew" in row
    Report("relearning", [curve.row()], {"curve": row}).to_dict()
    assert "Curve(texts" in repr(curve)


def test_the_suite_names_what_it_tried() -> None:
    found = relearn_suite(
        tiny("llama"), TinyTokenizer(), ITEMS, concept_texts=TEXTS, benign=["a b c d", "e f g"], counts=(1, 2),
        shares=(0.1,), rates=(1e-3, 1e-2), base_accuracy=1.0, **{**SMALL, "steps": 2},
    )  # fmt: skip
    assert [curve.name for curve in found.curves] == [
        *["10% of the concept texts"] * 2, *["1 unrelated texts"] * 2, *["2 unrelated texts"] * 2
    ]  # fmt: skip
    assert [curve.lr for curve in found.curves] == [1e-3, 1e-2] * 3
    assert max(max(c.accuracy) for c in found.curves) == max(found.worst.accuracy)
    Report("relearning", found.rows(), found.to_dict()).to_dict()
    with pytest.raises(ValueError, match="nothing to train on"):
        relearn_suite(tiny("llama"), TinyTokenizer(), ITEMS)
    with pytest.raises(ValueError, match="10 unrelated texts are asked for; got 1"):
        relearn_suite(tiny("llama"), TinyTokenizer(), ITEMS, benign=["a b c"])


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="non-empty list"):
        relearn(model, tokenizer, "one text", ITEMS)
    with pytest.raises(ValueError, match="every must be a positive"):
        relearn(model, tokenizer, TEXTS, ITEMS, every=0)
    with pytest.raises(ValueError, match="learning_rate"):
        relearn(model, tokenizer, TEXTS, ITEMS, lr=-1.0)
    with pytest.raises(ValueError, match="of one kind"):
        relearn(model, tokenizer, TEXTS, [], **SMALL)
