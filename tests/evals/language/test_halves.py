"""Development and test facts: the split belongs to the fact, and reports keep the halves apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from concept_erasure.concept import Concept
from concept_erasure.evals.language._halves import HALVES, half_mask, half_of
from concept_erasure.evals.language.evaluate import evaluate
from concept_erasure.evals.language.items import item_scores
from tests.models import tiny
from tests.small_concept import small_concept, word_tokenizer


def test_all_formats_of_a_fact_are_in_one_half() -> None:
    concept = Concept.load("harry_potter")
    for kind in ("concept", "near", "far"):
        halves: dict[str, set[str]] = {}
        for format in ("cloze", "question", "reversed"):
            for item in concept.items(kind, format):
                key = f"{item.topic} {item.right} {sorted(item.choices)}"
                halves.setdefault(key, set()).add(half_of(item))
        assert all(len(found) == 1 for found in halves.values())
        share = sum(found == {"test"} for found in halves.values()) / len(halves)
        assert 0.4 < share < 0.6


def test_the_half_does_not_depend_on_the_order_of_choices_or_items() -> None:
    items = Concept.load("harry_potter").items("concept", "cloze")
    turned = [
        replace(one, choices=one.choices[::-1], answer=len(one.choices) - 1 - one.answer)
        for one in items
    ]
    assert [half_of(one) for one in items] == [half_of(one) for one in turned]
    test, development = half_mask(items, "test"), half_mask(items, "development")
    assert bool((test ^ development).all())
    assert bool((half_mask(items[::-1], "test") == test.flip(0)).all())
    with pytest.raises(ValueError, match="development, test"):
        half_mask(items, "train")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")
def test_the_report_has_the_figures_of_each_half() -> None:
    model, tokenizer, concept = tiny("llama"), word_tokenizer(), small_concept()
    report = evaluate(model, tokenizer, concept, suite=("concept", "specificity"))
    (section,) = [one for one in report.sections if one.title == "Development and test facts"]
    for kind in ("concept", "near", "far"):
        items = concept.items(kind, "cloze", 0)
        rows = [r for r in section.rows if r["set"] == kind and r["model"] == "no edit"]
        assert sum(int(r["items"]) for r in rows) == len(items)  # type: ignore[arg-type]
        for row in rows:
            own = [one for one in items if half_of(one) == row["half"]]
            assert row["half"] in HALVES
            found = item_scores(model, tokenizer, own, how="cloze")
            assert row["accuracy"] == found.accuracy
            assert row["log-probability"].value == pytest.approx(
                found.mean_log_prob.value, abs=1e-5
            )  # type: ignore[union-attr]
