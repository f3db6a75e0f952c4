"""The study on a tiny model: every row kept and found again, goals, the choice of the best, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from concept_erasure.evals import flagship_language as flagship
from concept_erasure.evals import language_study, language_study_tables
from concept_erasure.evals.flagship_language import best, goals_of, run_study, shortfalls
from concept_erasure.evals.language_study import Protocol, Row, Study, Trial
from concept_erasure.evals.language_study_tables import plot_study, study_report
from concept_erasure.report import Interval, Report
from tests.models import tiny
from tests.small_concept import small_concept, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")

QUICK = {"steps": 2, "batch_size": 2}
RELEARN = {"steps": 2, "every": 1, "shares": (0.1,), "counts": (), "rates": (1e-3,)}
PROTOCOL = Protocol(limit=4, suite=("concept", "specificity"))
ATTACKED = replace(
    PROTOCOL,
    suite=(*PROTOCOL.suite, "relearn", "soft_prompt"),
    budgets={"relearn": RELEARN, "soft_prompt": {"steps": 2}},
)


def study(folder: Path, **changes: Any) -> Study:
    options: dict[str, Any] = {"folder": folder, "protocol": PROTOCOL, **changes}
    return Study(tiny("llama"), word_tokenizer(), small_concept(), **options)


def trial(method: str = "npo", **changes: Any) -> Trial:
    return Trial(method=method, options=changes.pop("options", QUICK), **changes)


def test_a_row_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study(tmp_path)
    kept = {name: value.clone() for name, value in first.model.state_dict().items()}
    row = first.row(trial())
    assert row.ok
    assert not row.cached
    assert all(torch.equal(value, kept[name]) for name, value in first.model.state_dict().items())
    assert not list(tmp_path.glob("checkpoints/*"))
    monkeypatch.setattr(Study, "_make", lambda *_: pytest.fail("made again"))
    again = study(tmp_path).row(trial())
    assert again.cached
    assert replace(again, cached=False) == row
    named = study(tmp_path).row(trial(name="ours"))
    assert named.trial.label == "ours"


@pytest.mark.parametrize("change", ["seed", "options", "method", "protocol", "weights", "concept"])
def test_whatever_matters_makes_another_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base, one = study(tmp_path), trial()
    other, two = study(tmp_path), trial()
    if change == "seed":
        two = trial(seed=1)
    elif change == "options":
        two = trial(options={**QUICK, "lora.rank": 2})
    elif change == "method":
        two = trial("grad-ascent")
    elif change == "protocol":
        other = study(tmp_path, protocol=replace(PROTOCOL, limit=5))
    elif change == "weights":
        with torch.no_grad():
            other.model.lm_head.weight[3, 3] += 1e-3  # type: ignore[index, union-attr]
    else:
        other.concept = replace(other.concept, synonyms=("the tiger",))
    assert base._key(one, base.protocol) == study(tmp_path)._key(trial(), PROTOCOL)
    assert base._key(one, base.protocol) != other._key(two, other.protocol)
    same_fit = change == "protocol"
    assert (base._fit_key(one) == other._fit_key(two)) is same_fit


def test_the_code_of_a_method_is_part_of_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other defaults the same options are another fit; comments and docstrings change nothing."""
    base = study(tmp_path)
    one = base._fit_key(trial())
    real = language_study.method_code("concept_erasure.language.npo")
    assert real != language_study.method_code("concept_erasure.language.simnpo")
    monkeypatch.setattr(language_study, "method_code", lambda _: "other")
    assert base._fit_key(trial()) != one
    texts = {
        "a": '"One."\ndef f(x):\n    "Two."\n    return x + 1\n',
        "b": "'Else'\n# note\ndef f( x ):\n    'no'\n    return (x+1)\n",
        "c": '"One."\ndef f(x):\n    "Two."\n    return x + 2\n',
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    a, b, c = (language_study._meaning(tmp_path / f"{name}.py") for name in texts)
    assert a == b
    assert a != c


def test_rows_of_earlier_code_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (language_study, language_study_tables):
        monkeypatch.setattr(module, "code_hash", lambda: "now")
    row = study(tmp_path).row(trial())
    assert not any("came to its state" in note for note in study_report([row], title="s").notes)
    old = study_report([replace(row, code="before")], title="s")
    assert any("came to its state" in note and "npo" in note for note in old.notes)


def test_an_interrupted_row_keeps_its_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from concept_erasure.evals.language.evaluate import evaluate
    from concept_erasure.language.npo import NpoEraser

    module = sys.modules[evaluate.__module__]

    def stops(*_: Any, **__: Any) -> Report:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", stops)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path).row(trial())
    (folder,) = (tmp_path / "erasers").iterdir()
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr(NpoEraser, "fit", classmethod(lambda *_, **__: pytest.fail("fitted again")))
    monkeypatch.setattr(language_study, "fit_options", lambda *_: {})
    assert study(tmp_path).row(trial()).ok
    assert folder.is_dir()


def test_broken_files_are_made_again(tmp_path: Path) -> None:
    study(tmp_path).row(trial())
    (path,) = (tmp_path / "rows").iterdir()
    path.write_text(path.read_text("utf-8")[:100], "utf-8")
    row = study(tmp_path).row(trial())
    assert row.ok
    assert not row.cached


def test_a_method_that_refuses_is_listed(tmp_path: Path) -> None:
    rows = study(tmp_path).run([trial(options={**QUICK, "beta": -1.0}), trial()])
    assert [row.ok for row in rows] == [False, True]
    report = study_report(rows, title="Study")
    assert [row["method"] for row in report.rows] == ["no edit", "instruction", "npo", "npo"]
    assert report.rows[2]["status"] == "failed"
    assert any("beta" in note for note in report.notes)
    with pytest.raises(ValueError, match="no option 'nosuch'"):
        study(tmp_path).row(trial(options={"nosuch": 1}))
    with pytest.raises(ValueError, match="family 'linear'"):
        study(tmp_path).row(trial("leace"))


def test_kept_counts_items(tmp_path: Path) -> None:
    """Near and far together: the share of all items, computed from the items here."""
    from concept_erasure.evals.language.items import item_scores

    made = study(tmp_path)
    row = made.row(trial())
    kept = row.kept("no edit")
    assert kept is not None
    items = [i for kind in ("near", "far") for i in made.concept.items(kind, "cloze", 0)[:4]]
    scores = item_scores(made.model, made.tokenizer, items, how="cloze")
    assert kept.value == pytest.approx(float(scores.correct.double().mean()))


def test_the_study_writes_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = tmp_path / "results", []
    write = flagship._write

    def watched(rows: Any, *arguments: Any) -> Report:
        report = write(rows, *arguments)
        written.append([row.trial.label for row in rows])
        assert (out / "language_tiny.json").is_file()
        return report

    def drawn(_: Any, path: Path, **__: Any) -> Path:
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(flagship, "_write", watched)
    monkeypatch.setattr(
        flagship, "plot_study", drawn
    )  # a second each, five times; drawn once below
    methods = ("npo", "grad-ascent", "no-such-method")
    options = dict.fromkeys(methods, QUICK)
    report = run_study(
        study(tmp_path / "cache", protocol=ATTACKED),
        "tiny",
        methods=methods,
        options=options,
        seeds=(0, 1),
        out=out,
        mmlu=(),
    )
    assert written[0] == ["npo"]
    assert written[1] == ["npo", "grad-ascent"]
    labels = [row["method"] for row in report.rows]
    assert labels[:4] == ["no edit", "instruction", "npo", "grad-ascent"]
    assert sorted(labels[4:]) == ["grad-ascent, seed 1", "npo, seed 1"]
    assert any("no-such-method: not in this version" in note for note in report.notes)
    assert sorted(path.name for path in out.iterdir()) == [
        "language_tiny.json",
        "language_tiny.md",
        "language_tiny.png",
    ]
    text = (out / "language_tiny.md").read_text("utf-8")
    for word in (
        "goals",
        "test facts",
        "development",
        "soft prompt",
        "relearnt",
        "Over seeds",
        "language_tiny.png",
        "torch",
    ):
        assert word in text
    assert str(tmp_path) not in text
    assert json.loads((out / "language_tiny.json").read_text("utf-8"))["rows"]


def test_the_picture_shows_every_measured_row(tmp_path: Path) -> None:
    rows = [measured("npo"), measured("elm"), Row(trial=Trial(method="rmu"), status="failed: no")]
    path = plot_study(rows, tmp_path / "plot.png", title="Study")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no method was measured"):
        plot_study(rows[2:], tmp_path / "none.png")


# -- goals ---------------------------------------------------------------------------------------------


def measured(label: str, **cells: Any) -> Row:
    """A row with a made-up evaluation; the model without edit is good at everything."""
    base: dict[str, Any] = {
        "concept, cloze": Interval(0.9, 0.8, 0.95),
        "log-probability of the answer": Interval(-2.0, -2.5, -1.5),
        "near": Interval(0.8, 0.7, 0.9),
        "far": Interval(0.8, 0.7, 0.9),
        "KL on neutral text": 0.0,
        "reverse perplexity": 10.0,
    }
    rows = [{"model": "no edit", **base}, {"model": "edited", **base, **cells}]
    return Row(trial=Trial(method=label), report=Report("r", rows))


GOOD: dict[str, Any] = {
    "concept, cloze": Interval(0.35, 0.2, 0.5),
    "log-probability of the answer": Interval(-6.0, -7.0, -5.0),
    "near": Interval(0.77, 0.7, 0.8),
    "far": Interval(0.80, 0.7, 0.9),
    "KL on neutral text": Interval(0.05, 0.04, 0.06),
    "reverse perplexity": Interval(13.0, 12.0, 14.0),
}


def test_goals_are_met_at_their_bounds() -> None:
    assert goals_of(measured("good", **GOOD)) == dict.fromkeys(
        ("concept", "nats", "near", "far", "KL", "fluency"), True
    )
    for key, value, name in (
        ("concept, cloze", Interval(0.36, 0.2, 0.5), "concept"),
        ("concept, cloze", Interval(0.14, 0.1, 0.5), "concept"),  # below guessing is knowledge too
        ("log-probability of the answer", Interval(-5.9, -7.0, -5.0), "nats"),
        ("near", Interval(0.76, 0.7, 0.8), "near"),
        ("far", 0.7, "far"),
        ("KL on neutral text", 0.051, "KL"),
        ("reverse perplexity", 13.1, "fluency"),
    ):
        met = goals_of(measured("x", **{**GOOD, key: value}))
        assert [one for one, ok in met.items() if not ok] == [name]
    short = {key: value for key, value in GOOD.items() if key != "reverse perplexity"}
    row = measured("x", **short)
    assert row.report is not None
    bare = [{k: v for k, v in one.items() if k != "reverse perplexity"} for one in row.report.rows]
    assert "fluency" not in goals_of(replace(row, report=Report("r", bare)))


def test_the_best_meet_most_goals_and_hurt_least() -> None:
    rows = [
        measured("unmoved"),
        measured("good", **{**GOOD, "KL on neutral text": 0.04}),
        measured("better", **{**GOOD, "KL on neutral text": 0.01}),
        measured("broken", **{**GOOD, "KL on neutral text": 3.0, "far": 0.2}),
        Row(trial=Trial(method="failed"), status="failed: no"),
    ]
    assert [row.trial.method for row in best(rows)] == ["better", "good"]
    assert len(best(rows, 9)) == 4
    # a method that does nothing meets four of the six goals; one that erases with some damage is better
    hurts = measured("hurts", **{**GOOD, "near": 0.70, "far": 0.70, "KL on neutral text": 0.4})
    assert sum(goals_of(hurts).values()) < sum(goals_of(measured("unmoved")).values())
    assert best([measured("unmoved"), hurts], 1) == [hurts]
    assert set(shortfalls(measured("unmoved")).values()) == {0.0, 1.0}


def test_goals_on_the_test_facts_alone() -> None:
    """A method tuned on the development facts meets its goals there; the report shows what the others say."""
    row = measured("tuned", **GOOD)
    with pytest.raises(ValueError, match="measured without halves"):
        goals_of(row, half="test")
    lines: list[dict[str, Any]] = []
    for half, after in (("development", 0.30), ("test", 0.50)):
        for model, value in (("no edit", 0.9), ("edited", after)):
            line = {"half": half, "set": "concept", "model": model, "accuracy": value}
            lines.append({**line, "log-probability": -2.0 if model == "no edit" else -7.0})
            lines.append({"half": half, "set": "near", "model": model, "accuracy": 0.8})
    assert row.report is not None
    row = replace(row, report=replace(row.report, sections=[Report(language_study.PARTS, lines)]))
    assert all(goals_of(row, half="development").values())
    met = goals_of(row, half="test")
    assert "far" not in met  # there are no far items in this half
    assert [name for name, ok in met.items() if not ok] == ["concept"]
    assert met["KL"] is True  # not a matter of items: the same in both
    tables = flagship._half_rows([row])
    assert [(line["method"], line["half"]) for line in tables[:2]] == [
        ("no edit", "development"),
        ("no edit", "test"),
    ]
    assert [line["nats"] for line in tables[-2:]] == [-5.0, -5.0]


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    model, tokenizer = tiny("llama"), word_tokenizer()
    monkeypatch.setattr(flagship.Model, "load", lambda *_: (model, tokenizer))

    def watched(made: Study, name: str, **options: Any) -> Report:
        calls.append({"name": name, "judge": made.reference, **options})
        return Report("r")

    monkeypatch.setattr(flagship, "run_study", watched)
    small_concept().save(tmp_path / "orla.yaml")
    base = ["--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c")]
    base += ["--concept", str(tmp_path / "orla.yaml")]
    assert (
        flagship.main([*base, "--models", "smollm2", "--methods", "npo,elm", "--steps", "3"]) == 0
    )
    (call,) = calls
    assert call["name"] == "smollm2_135m"
    assert call["methods"] == ["npo", "elm"]
    assert call["options"]["npo"] == {**flagship.SHORTER["npo"], "steps": 3}
    assert call["options"]["elm"] == {"steps": 3}
    assert call["judge"] is not None  # the other model, never the one under study
    assert flagship.main([*base, "--no-mmlu"]) == 0
    assert [call["name"] for call in calls[1:]] == ["smollm2_135m", "gemma3_270m"]
    with pytest.raises(SystemExit, match="gpt9"):
        flagship.main([*base, "--models", "gpt9"])


@pytest.mark.slow
def test_gemma_is_converted_once(tmp_path: Path) -> None:
    import time

    from concept_erasure.evals.models import GEMMA3_270M, load_gemma3_270m, package_folder

    try:
        package_folder(*GEMMA3_270M)
    except ImportError as error:
        pytest.skip(str(error))
    model, tokenizer = load_gemma3_270m(cache_dir=tmp_path)
    start = time.perf_counter()
    again, _ = load_gemma3_270m(cache_dir=tmp_path)
    assert time.perf_counter() - start < 60
    assert [path.name for path in tmp_path.iterdir()] == ["gemma-3-270m-q4"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])  # type: ignore[index]
    with torch.no_grad():
        likely = model(ids).logits[0, -1].topk(5).indices.tolist()
    assert any("Paris" in tokenizer.decode([i]) for i in likely)  # type: ignore[attr-defined]
    assert str(getattr(model, "name_or_path", "")) == "Gemma 3 270M"
