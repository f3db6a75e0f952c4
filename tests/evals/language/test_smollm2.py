"""A real model: what SmolLM2 knows before any edit, and what an instruction does to it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.evals.language import (
    equivalence,
    evaluate,
    ignorance,
    item_scores,
    leak_rate,
    mcnemar,
)
from concept_erasure.evals.models import SMOLLM2, load_smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(find_spec(name) for name in (SMOLLM2[0], "gguf")),
        reason=f"needs {SMOLLM2[1]} and gguf",
    ),
]


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Any, Concept]:
    model, tokenizer = load_smollm2()
    return model, tokenizer, Concept.load("harry_potter")


def test_what_is_known_before(known: tuple[nn.Module, Any, Concept]) -> None:
    model, tokenizer, concept = known
    cloze = item_scores(model, tokenizer, concept.items("concept", "cloze"))
    assert len(cloze) == 105
    assert cloze.accuracy.value == pytest.approx(0.73, abs=0.05)
    far = item_scores(model, tokenizer, concept.items("far", "cloze"))
    near = item_scores(model, tokenizer, concept.items("near", "cloze"))
    assert far.accuracy.value > 0.75
    assert near.accuracy.value > 0.75
    # letters are at chance for a model this small: that format cannot show an erasure
    letter = item_scores(model, tokenizer, concept.items("concept", "question")[:60], how="letter")
    assert letter.accuracy.low < 0.25
    assert not equivalence(letter).equivalent  # and sixty items cannot show that either


def test_asking_politely_is_not_enough(known: tuple[nn.Module, Any, Concept]) -> None:
    model, tokenizer, concept = known
    items = concept.items("concept", "cloze")[:60]
    before = item_scores(model, tokenizer, items)
    told = item_scores(model, tokenizer, items, instruction=ignorance(concept.name))
    assert mcnemar(before, told).difference.low > -0.25
    assert told.accuracy.low > told.chance


def test_the_report_of_the_baselines(known: tuple[nn.Module, Any, Concept]) -> None:
    model, tokenizer, concept = known
    report = evaluate(model, tokenizer, concept, limit=20)
    assert [row["model"] for row in report.rows] == ["no edit", "instruction"]
    found = leak_rate(model, tokenizer, concept.items("concept", "cloze")[:20], samples=5)
    assert found.leaked.value > found.wrong.value
