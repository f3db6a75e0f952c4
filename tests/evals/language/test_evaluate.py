"""The whole evaluation: the rows, the words it may use, what it resumes, and a model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Fact, FactSet
from concept_erasure.edit import DensePatch, Edit
from concept_erasure.errors import ErasureWarning
from concept_erasure.evals.language import SUITES, _suites, evaluate
from concept_erasure.evals.language._robustness import Outcome
from concept_erasure.evals.language._suites import Reading, Store
from concept_erasure.evals.language._tables import verdict
from concept_erasure.evals.language.items import ItemScores
from concept_erasure.report import LANGUAGE_TESTS, Report
from tests.evals.language.planted import bits
from tests.models import TinyTokenizer, tiny

pytestmark = pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")

NAME = "model.layers.1.mlp.down_proj.weight"
SMALL: dict[str, Any] = {"limit": 10, "seed": 3}


def facts(topic: str, count: int = 12) -> tuple[Fact, ...]:
    made = []
    for i in range(count):
        answer, *wrong = (f"{topic}{(i + k) % count}" for k in range(4))
        made.append(
            Fact(
                question=f"Which {topic} thing has number n{i}?",
                cloze=f"The {topic} thing of number n{i} is ___",
                answer=answer,
                distractors=tuple(wrong),
                reversed=f"___ has the {topic} number n{i}.",
            )
        )
    return tuple(made)


CONCEPT = Concept(
    name="made up", facts=facts("what"), near=(FactSet("beside", facts("near")), FactSet("other", facts("side"))),
    far=(FactSet("away", facts("far")),), prompts=("one day", "then we"),
)  # fmt: skip


class Noise:
    """An eraser that puts noise into a weight."""

    method = "noise"
    digest = "0123"

    def apply(self, model: nn.Module) -> Edit:
        weight = model.get_parameter(NAME).detach()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return Edit(model, [DensePatch(NAME, weight + noise)], key="noise")


def names(report: Report) -> list[str]:
    return [section.title for section in report.sections]


def test_rows_sections_and_a_model_left_as_it_was(tmp_path: Path) -> None:
    model, before = tiny("llama"), bits(tiny("llama"))
    report = evaluate(model, TinyTokenizer(), CONCEPT, eraser=Noise(), out=tmp_path, **SMALL)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert not model.training
    assert [row["model"] for row in report.rows] == ["no edit", "instruction", "edited"]
    edited = report.rows[2]
    assert edited["KL on neutral text"].value > 0.01  # type: ignore[union-attr]
    assert report.rows[0]["KL on neutral text"] == 0.0
    assert "KL on neutral text" not in report.rows[1]
    assert any(title.startswith("Ripple") for title in names(report))
    ripple = next(s for s in report.sections if s.title.startswith("Ripple"))
    assert {row["format"] for row in ripple.rows} == {"question", "letter", "reversed"}
    kept = next(s for s in report.sections if s.title.startswith("What has to stay"))
    assert {"near: beside", "near: other", "near: beside, other", "far: away"} == {
        row["set"] for row in kept.rows
    }
    assert all("McNemar p" in row for row in kept.rows if row["model"] != "no edit")
    assert Report.load(tmp_path).to_dict() == report.to_dict()
    assert (tmp_path / "kept.png").exists() and "kept.png" in report.to_markdown()


def test_what_was_not_tried_is_listed_by_name() -> None:
    report = evaluate(tiny("llama"), TinyTokenizer(), CONCEPT, suite=("concept",), **SMALL)
    assert set(report.meta["tried"]) == {"concept"}  # type: ignore[call-overload]
    for name, words in LANGUAGE_TESTS.items():
        assert (words in report.meta["not tried"]) == (name != "concept")  # type: ignore[operator]
    text = report.to_markdown()
    assert "Not tried: " in text and LANGUAGE_TESTS["gcg"] in text
    assert set(SUITES) < set(LANGUAGE_TESTS)
    for word in ("removed", "forgotten", "safe"):
        assert word not in text


def test_an_edit_in_force_is_measured_like_an_eraser() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    expected = evaluate(model, tokenizer, CONCEPT, eraser=Noise(), **SMALL)
    with Noise().apply(model):
        found = evaluate(model, tokenizer, CONCEPT, **SMALL)
    assert found.rows == expected.rows
    assert found.sections == expected.sections
    assert found.meta["method"] == "edits in force"


def test_without_an_edit_there_are_the_baselines() -> None:
    report = evaluate(
        tiny("llama"), TinyTokenizer(), CONCEPT, suite=("concept",), instruction=False, **SMALL
    )
    assert [row["model"] for row in report.rows] == ["no edit"]
    assert "No edit was measured" in report.notes[0]


def test_a_concept_that_nobody_knows_is_said_to_be_unknown() -> None:
    with pytest.warns(ErasureWarning, match="not shown to know made up"):
        report = evaluate(
            tiny("llama", seed=1), TinyTokenizer(), CONCEPT, suite=("concept",), **SMALL
        )
    assert any(note.startswith("Warning") for note in report.notes)


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    options = {
        **SMALL, "limit": 4, "cache_dir": tmp_path, "eraser": Noise(), "suite": ("concept", "leak"),
        "budgets": {"leak": {"samples": 1, "max_new_tokens": 2}},
    }  # fmt: skip
    calls: list[str] = []
    real = dict(_suites.READINGS)

    def counted(name: str) -> Any:
        def measure(*args: Any) -> Reading:
            calls.append(name)
            if len(calls) == 4 and "go on" not in calls:
                raise KeyboardInterrupt
            return real[name](*args)

        return measure

    for name in ("concept", "leak"):
        monkeypatch.setitem(_suites.READINGS, name, counted(name))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, CONCEPT, **options)
    assert len(list(tmp_path.glob("*.json"))) == 3 and not list(tmp_path.glob("*.partial"))
    calls[:] = ["go on"]
    first = evaluate(model, tokenizer, CONCEPT, **options)
    assert len(calls) == 1 + 3  # six readings in all, three were kept
    damaged = next(tmp_path.glob("leak-*.json"))
    damaged.write_text(damaged.read_text("utf-8")[:-20], encoding="utf-8")
    again = evaluate(model, tokenizer, CONCEPT, **options)
    assert len(calls) == 1 + 3 + 1
    assert again.rows == first.rows and again.sections == first.sections
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] += (
            1e-3  # one bit of the model changes: nothing kept is its own
        )
    evaluate(model, tokenizer, CONCEPT, **options)
    assert len(calls) == 1 + 3 + 1 + 6


def test_attacks_run_by_name(tmp_path: Path) -> None:
    model, before = tiny("llama"), bits(tiny("llama"))
    budgets = {
        "relearn": {
            "steps": 2,
            "every": 1,
            "rank": 2,
            "rates": (1e-3,),
            "shares": (0.5,),
            "counts": (3,),
        },
        "soft_prompt": {"steps": 2, "tokens": 2},
    }
    report = evaluate(
        model, TinyTokenizer(), CONCEPT, eraser=Noise(), suite=("relearn", "soft_prompt", "quantise"),
        budgets=budgets, instruction=False, out=tmp_path, cache_dir=tmp_path / "kept", **SMALL,
    )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert [title for title in names(report) if title.startswith("Attack")] == [
        "Attack: relearn", "Attack: soft_prompt", "Attack: quantise",
    ]  # fmt: skip
    assert {"relearn", "soft_prompt", "quantise", "concept"} == set(report.meta["tried"])  # type: ignore[call-overload]
    assert "2 steps" in report.meta["tried"]["relearn"]  # type: ignore[index]
    assert len(report.meta["curves"]) == 2  # type: ignore[arg-type]
    assert (tmp_path / "relearning.png").exists()
    again = evaluate(
        model, TinyTokenizer(), CONCEPT, eraser=Noise(), suite=("relearn", "soft_prompt", "quantise"),
        budgets=budgets, instruction=False, cache_dir=tmp_path / "kept", **SMALL,
    )  # fmt: skip
    assert again.to_dict()["sections"] == report.to_dict()["sections"]


class Special(TinyTokenizer):
    """Says which of its tokens are special."""

    all_special_ids = (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["gcg", "beast", "ablation", "rewording"])
def test_every_attack_has_a_name_and_a_budget(name: str) -> None:
    model, before = tiny("llama"), bits(tiny("llama"))
    budgets = {
        "gcg": {"items": 1, "length": 3, "topk": 4, "batch": 4, "steps": 2, "smoke": True},
        "beast": {"items": 1, "beam": 2, "samples": 2, "length": 2, "smoke": True},
        "rewording": {"wordings": 1, "shots": 1},
    }
    report = evaluate(
        model,
        Special(),
        CONCEPT,
        eraser=Noise(),
        suite=(name,),
        budgets=budgets,
        instruction=False,
        **SMALL,
    )
    assert all(torch.equal(before[key], value) for key, value in bits(model).items())
    assert names(report)[-1] == f"Attack: {name}"
    assert report.sections[-1].rows
    assert report.meta["tried"][name].startswith("smoke run") == (name in {"gcg", "beast"})  # type: ignore[index]
    assert not report.sections[-1].notes[0].endswith(": .")


def scores(right: int, n: int = 100, *, nats: float = -1.0) -> ItemScores:
    log_probs = torch.full((n, 4), nats - 1, dtype=torch.float64)
    log_probs[:, 0] = nats
    log_probs[right:, 1] = nats + 1
    return ItemScores(
        log_probs, torch.ones(n, 4).long(), torch.zeros(n).long(), torch.ones(n).long()
    )


def outcome(broke: bool = False, smoke: bool = False) -> Outcome:
    return Outcome(rows=(), budget="", broke=broke, rule="", smoke=smoke)


@pytest.mark.parametrize(
    ("after", "ran", "words"),
    [
        (25, {}, "is suppressed under the tests listed:"),
        (25, {"relearn": outcome()}, "is suppressed under the tests listed:"),
        (25, {"gcg": outcome()}, "is suppressed under the tests listed:"),
        (25, {"relearn": outcome(), "beast": outcome()}, "is suppressed under the tests listed:"),
        (
            25,
            {"relearn": outcome(), "gcg": outcome(smoke=True)},
            "is suppressed under the tests listed:",
        ),
        (
            25,
            {"relearn": outcome(), "soft_prompt": outcome()},
            "is removed as far as the tests listed",
        ),
        (25, {"relearn": outcome(True), "gcg": outcome()}, "comes back under relearn"),
        (
            25,
            {"relearn": outcome(), "gcg": outcome(), "quantise": outcome(True)},
            "back under quantise",
        ),
        (50, {"relearn": outcome(), "gcg": outcome()}, "in part"),
        (5, {"relearn": outcome(), "gcg": outcome()}, "in part"),  # below guessing is knowledge too
        (79, {"relearn": outcome(), "gcg": outcome()}, "not shown to be suppressed"),
        (80, {}, "not shown to be suppressed"),
    ],
)
def test_the_words_that_may_be_used(after: int, ran: dict[str, Outcome], words: str) -> None:
    found = {
        row: Reading(scores={"cloze": scores(k), "question": scores(max(k - 2, 0))})
        for row, k in (("no edit", 80), ("edited", after))
    }
    text = verdict({"concept": found}, ran)
    assert words in text
    assert ("removed" in text) == (words.startswith("is removed"))
    assert "forgotten" not in text


def test_readings_survive_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep")
    made = Reading(scores={"cloze": scores(3, 5)}, cells={"a": 1.5, "b": None}, budget="five")
    for _ in range(2):
        found = store.get({"suite": "x"}, Reading, lambda: made)
        assert found.to_dict() == made.to_dict()
    other = Reading(budget="six")
    assert store.get({"suite": "x"}, Reading, lambda: other).budget == "five"
    assert store.get(None, Reading, lambda: other) is other
    assert Store(None).get({"suite": "x"}, Reading, lambda: other) is other


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="different names"):
        evaluate(model, tokenizer, CONCEPT, suite="concept")
    with pytest.raises(ValueError, match="relearn attack an edited model"):
        evaluate(model, tokenizer, CONCEPT, suite=("relearn",))
    with pytest.raises(ValueError, match="has no facts to ask about"):
        evaluate(model, tokenizer, Concept(name="empty"))
    with pytest.raises(ValueError, match="limit must be at least 2"):
        evaluate(model, tokenizer, CONCEPT, limit=1)
