"""The command line on a concept in a language model: what it writes is what Python gives; mistakes cost one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("transformers")

from concept_erasure import _cli_data, cli, registry
from concept_erasure.concept import Concept
from concept_erasure.eraser import Eraser
from concept_erasure.language.loop import Training
from concept_erasure.language.npo import NpoEraser
from concept_erasure.language.parameters import Lora
from tests.small_concept import small_concept, write_model

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists all installed packages in a process of its own, after every run."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("concept") / "orla.yaml"
    small_concept().save(path)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fails(capsys: Capture, *arguments: object, word: str) -> None:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), lines
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert len(lines) == 1, lines
    assert word in lines[-1]


def same(one: Any, other: Any) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(value, other.weights[name])


def fitted(folder: Path, concept: Path, training: Training, **options: Any) -> NpoEraser:
    model, tokenizer = _cli_data.load_model(str(folder))
    return NpoEraser.fit(model, tokenizer, Concept.load(concept), training=training, **options)


def test_fit_gives_what_python_gives(
    tmp_path: Path, folder: Path, concept: Path, capsys: Capture
) -> None:
    base = ("fit", "--model", folder, "--concept", concept, "--method", "npo", "--steps", 2)
    assert run(*base, "--seed", 3, "--out", tmp_path / "one") == 0
    assert "saved npo eraser" in capsys.readouterr().out
    default = NpoEraser.default_training()
    from dataclasses import replace

    training = replace(default, steps=2, seed=3, progress=False)
    same(Eraser.from_pretrained(tmp_path / "one"), fitted(folder, concept, training))
    options = ("--option", "beta=0.5", "lora.rank=2", "weight_decay=0.1", "--batch-size", 3)
    more = (*options, "--learning-rate", "1e-3", "--max-length", 9, "--out", tmp_path / "two")
    assert run(*base, *more) == 0
    training = replace(
        default,
        steps=2,
        batch_size=3,
        learning_rate=1e-3,
        max_length=9,
        weight_decay=0.1,
        progress=False,
    )
    expected = fitted(folder, concept, training, beta=0.5, lora=Lora(rank=2))
    same(Eraser.from_pretrained(tmp_path / "two"), expected)


def test_a_preset_keeps_its_own_constants(tmp_path: Path, folder: Path, concept: Path) -> None:
    """--steps replaces the steps of the preset and nothing else."""
    base = ("fit", "--model", folder, "--concept", concept, "--method", "npo", "--preset", "paper")
    assert run(*base, "--steps", 1, "--out", tmp_path / "e") == 0
    held = Eraser.from_pretrained(tmp_path / "e").config.training  # type: ignore[attr-defined]
    paper = NpoEraser.default_training("paper")
    assert (held["steps"], held["learning_rate"]) == (1, paper.learning_rate)
    assert held["batch_size"] == paper.batch_size


def test_texts_come_from_files(tmp_path: Path, folder: Path, concept: Path) -> None:
    forget, retain = ["orla0 eat bread", "orla1 eat milk soup"], ["the barn is red every day"]
    (tmp_path / "f.txt").write_text("\n".join(forget), "utf-8")
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": retain[0]}), "utf-8")
    base = ("fit", "--model", folder, "--concept", concept, "--method", "npo", "--steps", 1)
    files = ("--forget-texts", tmp_path / "f.txt", "--retain-texts", tmp_path / "r.jsonl")
    assert run(*base, *files, "--out", tmp_path / "e") == 0
    from dataclasses import replace

    training = replace(NpoEraser.default_training(), steps=1, progress=False)
    expected = fitted(folder, concept, training, forget_texts=forget, retain_texts=retain)
    same(Eraser.from_pretrained(tmp_path / "e"), expected)


@pytest.fixture(scope="module")
def eraser(tmp_path_factory: pytest.TempPathFactory, folder: Path, concept: Path) -> Path:
    path = tmp_path_factory.mktemp("eraser") / "e"
    training = Training(steps=2, learning_rate=3e-3, progress=False)
    fitted(folder, concept, training).save_pretrained(path)
    return path


def test_apply_and_card(tmp_path: Path, folder: Path, eraser: Path, capsys: Capture) -> None:
    out = tmp_path / "edited"
    assert run("apply", "--model", folder, "--eraser", eraser, "--out", out) == 0
    model, tokenizer = _cli_data.load_model(str(folder))
    edited, _ = _cli_data.load_model(str(out))
    ids = tokenizer("Every day orla0 likes to eat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        with Eraser.from_pretrained(eraser).apply(model):  # type: ignore[attr-defined]
            expected = model(ids).logits
        torch.testing.assert_close(edited(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-4)
    capsys.readouterr()
    assert run("card", eraser) == 0
    assert "npo" in capsys.readouterr().out


def test_eval_reports_every_suite(
    tmp_path: Path, folder: Path, concept: Path, eraser: Path, capsys: Capture
) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {
            "question": "What does orla0 eat?",
            "choices": ["bread", "milk", "soup", "rice"],
            "answer": i % 4,
        }
        for i in range(6)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "wmdp_bio.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    base = ("eval", "--model", folder, "--eraser", eraser, "--concept", concept, "--limit", 4)
    suite = ("--suite", "concept, specificity,wmdp_bio", "--data-dir", data)
    assert run(*base, *suite, "--out", tmp_path / "report", "--cache-dir", tmp_path / "cache") == 0
    shown = capsys.readouterr().out
    for word in ("no edit", "instruction", "edited", "KL", "wmdp_bio", "Not tried"):
        assert word in shown
    assert (tmp_path / "report" / "report.json").is_file()
    assert any((tmp_path / "cache").iterdir())


def test_compare_writes_a_table_and_a_plot_and_goes_on(
    tmp_path: Path, folder: Path, concept: Path, capsys: Capture
) -> None:
    base = ("compare", "--model", folder, "--concept", concept, "--methods", "npo,grad-ascent")
    options = ("--steps", 2, "--relearn-steps", 2, "--limit", 4, "--option", "npo.beta=0.3")
    out = tmp_path / "sweep"
    assert run(*base, *options, "--out", out) == 0
    capsys.readouterr()
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    assert names == ["compare.json", "compare.md", "compare.png"]
    made = json.loads((out / "compare.json").read_text("utf-8"))
    rows = made["rows"]
    assert [row["method"] for row in rows] == ["no edit", "instruction", "npo", "grad-ascent"]
    assert {row.get("status") for row in rows[2:]} == {"measured"}
    for row in rows:
        assert 0 <= row["concept"]["value"] <= 1
        assert 0 <= row["kept"]["value"] <= 1
    assert any(key.startswith("relearnt") for key in rows[2])
    assert str(folder) not in (out / "compare.md").read_text("utf-8")
    fits = sorted((out / "cache" / "erasers").iterdir())
    times = [path.stat().st_mtime_ns for path in fits]
    assert run(*base, *options, "--out", out) == 0
    assert [path.stat().st_mtime_ns for path in fits] == times
    assert json.loads((out / "compare.json").read_text("utf-8"))["rows"] == rows


# -- mistakes -----------------------------------------------------------------------------------------


def test_mistakes_name_the_flag(
    tmp_path: Path, folder: Path, concept: Path, capsys: Capture
) -> None:
    out = ("--out", tmp_path / "e")
    base = ("fit", "--model", folder, "--concept", concept, *out)
    fails(capsys, "fit", "--concept", concept, *out, word="--concept needs --model")
    fails(capsys, *base, "--method", "leace", word="--method leace is not for a concept")
    fails(capsys, *base, "--method", "uce", word="--method uce is not for a concept")
    fails(
        capsys,
        *base,
        "--method",
        "npo",
        "--option",
        "nosuch=1",
        word="no option 'nosuch'; it has: preset",
    )
    fails(
        capsys, *base, "--method", "npo", "--option", "steps=1", "--steps", "2", word="given twice"
    )
    fails(capsys, *base, "--method", "npo", "--steps", "-1", word="--steps")
    fails(
        capsys,
        *base,
        "--method",
        "npo",
        "--forget-texts",
        tmp_path / "no.txt",
        word="--forget-texts: no such",
    )
    (tmp_path / "t.jsonl").write_text('{"words": "a"}\n', "utf-8")
    fails(capsys, *base, "--method", "npo", "--retain-texts", tmp_path / "t.jsonl", word="row 1")
    wrong = ("fit", "--model", folder, "--concept", "nosuch", "--method", "npo", *out)
    fails(capsys, *wrong, word="--concept: no concept 'nosuch'")
    (tmp_path / "m").mkdir()
    fails(
        capsys,
        "fit",
        "--model",
        tmp_path / "m",
        "--concept",
        concept,
        "--method",
        "npo",
        *out,
        word="error",
    )
    fails(capsys, "fit", tmp_path / "v.npy", "--method", "npo", *out, word="--model and --concept")
    assert not (tmp_path / "e").exists()


IDLE = {
    "--labels": "y.npy",
    "--sites": "mlp.1",
    "--tokens": "mean",
    "--erase": "x",
    "--rank": 3,
    "--z-kind": "classes",
    "--held-out": "x.csv",
    "--background": "True",
    "--text-column": "t",
}


@pytest.mark.parametrize("option", IDLE)
def test_options_of_others_are_refused(
    tmp_path: Path, folder: Path, concept: Path, capsys: Capture, option: str
) -> None:
    base = (
        "fit",
        "--model",
        folder,
        "--concept",
        concept,
        "--method",
        "npo",
        "--out",
        tmp_path / "e",
    )
    fails(capsys, *base, option, IDLE[option], word=f"error: {option} is for ")


def test_eval_and_compare_mistakes(
    tmp_path: Path,
    folder: Path,
    concept: Path,
    eraser: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    from concept_erasure.evals.language import _tasks

    known = _tasks._task_manager("wmdp")
    monkeypatch.setattr(_tasks, "_task_manager", lambda _: known)  # reading all tasks takes seconds
    base = ("eval", "--model", folder, "--eraser", eraser, "--concept", concept)
    fails(capsys, *base, "--suite", "", word="--suite")
    fails(capsys, *base, "--suite", "wmdp_boi", word="--suite wmdp_boi")
    fails(capsys, *base, "--probes", "svm", word="--probes is for")
    fails(capsys, *base, "--suite", "wmdp_bio", "--data-dir", tmp_path / "no", word="data_dir")
    fails(capsys, "eval", "--eraser", eraser, "--pipe", "p", word="compare --pipe")
    compare = ("compare", "--concept", concept, "--out", tmp_path / "c", "--methods", "npo")
    fails(capsys, *compare, word="--model and --concept")
    compare = (*compare, "--model", folder)
    fails(capsys, *compare, "--option", "npo.nosuch=1", word="no option 'nosuch'")
    fails(capsys, *compare, "--option", "elmo.eta=1", word="'elmo' is not among the methods")
    fails(capsys, *compare, "--vectors", "v.npy", word="--vectors is for vectors")
    fails(capsys, *compare[:-4], "--methods", "npo,npo", "--model", folder, word="names one twice")
    fails(capsys, *compare[:-4], "--methods", "leace", "--model", folder, word="--method leace")


def test_every_language_method_can_be_asked_for() -> None:
    """What the command line passes by name exists in every method's fit."""
    import inspect

    from concept_erasure._fit_options import fit_options

    entries = [registry.get(name) for name in registry.names()]
    own = [entry for entry in entries if entry.family == "language"]
    assert own
    for entry in own:
        kind: Any = entry.load()
        made = fit_options(
            entry.name, kind, {"steps": 3, "learning_rate": 1e-3, "training.seed": 1}
        )
        training = made["training"]
        assert (training.steps, training.learning_rate, training.seed) == (3, 1e-3, 1)
        known = inspect.signature(kind.fit).parameters
        assert {"forget_texts", "retain_texts", "preset"} <= set(known)
