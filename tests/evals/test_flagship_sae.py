"""The study of sparse features on a tiny model: every part runs, and finished parts are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.errors import FormatError
from concept_erasure.evals import _sae_study
from concept_erasure.evals._sae_study import SaeStudy, Settings
from concept_erasure.evals._sae_study_arms import Arm, NeutralScore, clamp_arm, match
from concept_erasure.evals._sae_study_data import (
    load_study_concept,
    read_texts,
    study_concept,
    training_texts,
)
from concept_erasure.evals._sae_study_report import against_controls
from concept_erasure.report import Interval
from tests.language.test_registered import FACTS, FORGET, RETAIN, WRONG, taught
from tests.models import TinyTokenizer

SETTINGS = Settings(
    sites=("mlp.1",), routes=("semi-NMF",), rank=8, nmf_tokens=60, features=2, taus=(0.4,), kls=(0.02,),
    controls=1, samples=1, baselines=("leace",), baseline_site="residual.1", steps_baseline=2, texts=4, relearn_steps=1,
)  # fmt: skip


def concept_file(folder: Path) -> Path:
    """Return a concept in the benchmark's format."""
    rows = [
        {"q": f"{question}?", "correct_answer": answer, "options": [answer, *WRONG[:3]]}
        for question, _, answer in FACTS
    ]
    near = [{**row, "q": f"near the table {row['q']}", "correct_answer": WRONG[0]} for row in rows]
    splits = {
        **dict.fromkeys(("QA_train", "QA_test"), rows), **dict.fromkeys(("SimdomQA_train", "SimdomQA_test"), near)
    }  # fmt: skip
    path = folder / "harry.json"
    path.write_text(
        json.dumps({"concept": "harry", "multiple_choice": splits, "sentences": list(FORGET)})
    )
    return path


def study(folder: Path, settings: Settings = SETTINGS) -> SaeStudy:
    one = load_study_concept(concept_file(folder), synonyms=("hedwig",))
    more = [f"the {word} is on the table near the door today" for word in WRONG]
    return SaeStudy(
        taught(), TinyTokenizer(), [one], [*RETAIN, *more], [], folder=folder / "cache", settings=settings,
        reported=RETAIN,
    )  # fmt: skip


def test_the_whole_study_runs_and_a_second_run_reads_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(tmp_path)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    report = made.run(tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    methods = [row["method"] for row in report.rows]
    assert methods == ["no edit", "semi-NMF", "leace"]
    assert {row["status"] for row in report.rows} <= {"measured", "KL not reached"}
    assert len(report.sections[0].rows) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"sae_flagship.{e}" for e in ("json", "md", "png")
    }

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    for name in ("item_scores", "match", "relearn"):
        monkeypatch.setattr(_sae_study, name, never)
    again = study(tmp_path).run(tmp_path / "out")
    assert again.rows == report.rows


def test_the_codes_of_a_dictionary_are_taken_out_of_activations() -> None:
    from concept_erasure.sae.disentangler import Disentangler
    from concept_erasure.sae.search import Feature, FeatureTable

    model, rows = taught(), torch.eye(32)[:6]
    dis = Disentangler(
        rows.T.clone(), torch.zeros(6), rows, torch.zeros(32), torch.zeros(6), site="mlp.1"
    )
    table = FeatureTable((Feature("mlp.1", 0), Feature("mlp.1", 3, -1)))
    arm = clamp_arm(model, {"mlp.1": dis}, table, name="codes")
    seen: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        handle = model.get_submodule("model.layers.1").register_forward_hook(
            lambda _, __, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3, 4]]))
        handle.remove()
        return seen[name]

    before = read("before")
    with arm.applied(0.0):
        assert torch.equal(read("none"), before)
    with arm.applied(1.0):
        moved = before - read("edited")
    assert bool((moved[..., 0] >= 0).all()) and bool((moved[..., 3] <= 0).all())
    assert float(moved[..., [0, 3]].abs().max()) > 0
    torch.testing.assert_close(moved[..., 4:], torch.zeros_like(moved[..., 4:]), atol=1e-6, rtol=0)


class Quadratic:
    """An arm whose divergence is the square of its strength, times something."""

    def __init__(self, factor: float) -> None:
        self.factor, self.kl, self.tries = factor, 0.0, 0

    @contextmanager
    def applied(self, strength: float) -> Iterator[None]:
        self.kl = self.factor * strength**2
        self.tries += 1
        yield
        self.kl = 0.0


@pytest.mark.parametrize("factor", [1e-4, 1.0, 3.0])
def test_strengths_are_matched_in_a_few_tries(factor: float) -> None:
    one = Quadratic(factor)
    found = match(Arm("a", one.applied), 0.05, lambda: one.kl)
    assert found.reached and found.kl == pytest.approx(0.05, rel=0.1) and one.tries <= 3
    weak = match(Arm("a", one.applied, most=1e-3), 0.05, lambda: one.kl)
    assert not weak.reached and weak.strength == 1e-3


def test_a_step_is_matched_as_well_as_it_can_be() -> None:
    one = Quadratic(1.0)
    found = match(Arm("a", one.applied), 0.05, lambda: 1.0 if one.kl > 0.3 else 0.0)
    assert not found.reached and found.kl in (0.0, 1.0)


def test_the_divergence_of_the_model_itself_is_zero() -> None:
    model = taught()
    score = NeutralScore(model, TinyTokenizer(), RETAIN, batch_size=2)
    assert score() == pytest.approx(0, abs=1e-6) and score.tokens == sum(
        len(t.split()) for t in RETAIN
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert score() > 0.01


def test_the_comparison_is_paired_item_by_item() -> None:
    edit = {"log_prob": [-5.0, -6.0, -7.0], "correct": [0, 0, 1], "mean": -6.0}
    controls = [
        {"log_prob": [-3.0, -4.0, -5.0], "correct": [1, 1, 1], "mean": -4.0},
        {"log_prob": [-5.0, -6.0, -7.0], "correct": [1, 0, 1], "mean": -7.0},
    ]
    found = against_controls(edit, controls)
    assert found["nats"] == Interval.of_mean([1.0, 1.0, 1.0])
    assert found["controls ahead"] == "1 of 2"
    assert isinstance(found["accuracy"], Interval) and found["accuracy"].value == pytest.approx(0.5)


def test_a_failed_relearning_is_a_cell_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ValueError("no text is left")

    monkeypatch.setattr(_sae_study, "relearn", refuses)
    rows = study(tmp_path).run(tmp_path / "out").rows
    failed = [row["method"] for row in rows if "no text is left" in str(row["status"])]
    assert len(rows) == 3 and "no edit" in failed and "leace" in failed


def test_a_concept_that_ships_is_asked_half_of_its_statements() -> None:
    concept = Concept.load("shakespeare")
    one = study_concept(concept)
    facts = [{item.stem for item in part} for part in (one.train, one.test)]
    assert not facts[0] & facts[1]
    assert len(facts[0] | facts[1]) == len(concept.items("concept", "cloze"))
    assert {item.topic for item in one.near_test} <= {part.name for part in concept.near}
    assert len(study_concept(concept, limit=3).test) == 3
    with pytest.raises(ValueError, match="has no facts"):
        study_concept(Concept(name="nothing"))


def test_files_are_read_and_others_refused(tmp_path: Path) -> None:
    one = load_study_concept(concept_file(tmp_path), limit=2)
    assert len(one.train) == len(one.near_test) == 2 and one.train[0].right == FACTS[0][2]
    bad = tmp_path / "bad.json"
    bad.write_text('{"concept": "x"}')
    with pytest.raises(FormatError, match="bad.json"):
        load_study_concept(bad)
    text = "a line that is long enough to be a paragraph of its own\n" * 2 + "short\n"
    (tmp_path / "general.txt").write_text(text)
    lines = read_texts([tmp_path])
    assert len(lines) == 1
    with pytest.raises(FileNotFoundError, match="no text files"):
        read_texts([tmp_path / "nowhere"])
    many = [f"{line} {k}" for k, line in enumerate(lines * 5)]
    made = training_texts(TinyTokenizer(), [one], RETAIN, many, tokens=70)
    assert made[: len(FORGET)] == list(FORGET) and len(made) < len(FORGET) + len(RETAIN) + 5
