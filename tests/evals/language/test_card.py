"""The card of an eraser for language models: what was tried, with budgets, and what was not, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from concept_erasure import registry
from concept_erasure.eraser import Eraser
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.report import (
    LANGUAGE_TESTS,
    Interval,
    Report,
    erasure_card,
    with_evaluation,
)

EVALUATION = Report(
    "Erasing x: evaluation",
    [{"model": "edited", "concept, cloze": Interval(0.3, 0.2, 0.4), "a": 1}],
    {
        "tried": {"concept": "105 facts", "relearn": "6 runs of at most 100 steps"},
        "curves": {"10 texts": {"steps": [0]}},
    },
    ["The concept is suppressed under the tests listed: figures.", "Not tried: much."],
)


@pytest.fixture
def eraser(monkeypatch: pytest.MonkeyPatch) -> LeaceEraser:
    """Any eraser, said to be one for language models."""
    entry = replace(registry.METHODS["leace"], family="language")
    monkeypatch.setitem(registry.METHODS, "leace", entry)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    made = LeaceEraser.fit(x, x[:, 0] > 0)
    return replace(made, report={**made.report, "history": [{"step": 1, "loss": 0.5}] * 200})


def test_without_an_evaluation_nothing_was_tried(eraser: LeaceEraser) -> None:
    card = erasure_card(eraser)
    assert "Nothing was evaluated after the fit." in card
    for words in LANGUAGE_TESTS.values():
        assert f"- {words}" in card
    assert "Tried, with budgets" not in card
    assert card.count("loss") == 0  # the history is no list for people
    for word in ("removed", "forgotten", "safe "):
        assert word not in card.partition("## Evaluated")[2]


def test_with_one_the_rest_is_listed_by_name(eraser: LeaceEraser) -> None:
    card = erasure_card(eraser, EVALUATION)
    tried, _, missing = card.partition("## Not tried")
    assert f"- {LANGUAGE_TESTS['relearn']}: 6 runs of at most 100 steps" in tried
    assert "0.300 [0.200, 0.400]" in tried and "suppressed under the tests listed" in tried
    assert "10 texts" in tried
    assert LANGUAGE_TESTS["relearn"] not in missing
    for name in LANGUAGE_TESTS.keys() - {"concept", "relearn"}:
        assert f"- {LANGUAGE_TESTS[name]}" in missing
    assert "Not tried: much" not in card
    assert "access control" in card and "retrieval" in card


def test_the_evaluation_is_saved_with_the_eraser(eraser: LeaceEraser, tmp_path: Path) -> None:
    kept = with_evaluation(eraser, EVALUATION)
    assert kept.digest == eraser.digest
    kept.save_pretrained(tmp_path)
    assert "6 runs of at most 100 steps" in (tmp_path / "README.md").read_text("utf-8")
    loaded = Eraser.from_pretrained(tmp_path).card()
    assert sorted(loaded.splitlines()) == sorted(kept.card().splitlines())  # files sort their keys


def test_other_families_keep_their_card() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    card = erasure_card(LeaceEraser.fit(x, x[:, 0] > 0))
    assert "probes that are not linear" in card
    assert LANGUAGE_TESTS["gcg"] not in card
