"""The command line, in this process: what it writes, and that every mistake costs one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tyro")

from concept_erasure import LeaceEraser, cli, registry
from concept_erasure.eraser import Eraser

Data = tuple[torch.Tensor, torch.Tensor]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def vectors(tmp_path: Path, labelled: Data) -> Path:
    """A safetensors file with vectors and labels."""
    path = tmp_path / "vectors.safetensors"
    save_file({"x": labelled[0], "label": labelled[1]}, path)
    return path


def write_csv(path: Path, labelled: Data, name: str = "label") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"f{i}" for i in range(labelled[0].shape[1])), name])
        for row, label in zip(labelled[0].tolist(), labelled[1].tolist(), strict=True):
            writer.writerow([*row, "ab"[label]])
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fails(capsys: Capture, *arguments: object, word: str) -> None:
    """The command must fail with code 2 and one line that holds the word."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert word in lines[0]


def test_list_names_every_method(capsys: Capture) -> None:
    assert run("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in registry.names())
    assert "guarded" in out


def test_list_unknown_family(capsys: Capture) -> None:
    fails(capsys, "list", "--family", "nonsense", word="linear")


def test_fit_apply_and_card(tmp_path: Path, vectors: Path, labelled: Data, capsys: Capture) -> None:
    out = tmp_path / "eraser"
    assert run("fit", vectors, "--out", out) == 0
    erased = tmp_path / "erased.safetensors"
    assert run("apply", vectors, "--eraser", out, "--out", erased) == 0
    x, z = labelled
    expected = LeaceEraser.fit(x, z)(x)
    torch.testing.assert_close(load_file(erased)["x"], expected)
    capsys.readouterr()
    assert run("card", out) == 0
    assert "leace" in capsys.readouterr().out.lower()


def test_csv_and_npy_give_the_same_eraser(tmp_path: Path, labelled: Data) -> None:
    table = write_csv(tmp_path / "v.csv", labelled, "group")
    np.save(tmp_path / "v.npy", labelled[0].numpy())
    (tmp_path / "labels.txt").write_text("\n".join("ab"[i] for i in labelled[1].tolist()))
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("fit", table, "--label-column", "group", "--out", one) == 0
    assert run("fit", tmp_path / "v.npy", "--labels", tmp_path / "labels.txt", "--out", two) == 0
    x = labelled[0]
    first, second = Eraser.from_pretrained(one), Eraser.from_pretrained(two)
    torch.testing.assert_close(first(x), second(x))
    assert run("apply", tmp_path / "v.npy", "--eraser", one, "--out", tmp_path / "e.npy") == 0
    assert np.allclose(np.load(tmp_path / "e.npy"), first(x).numpy())


def test_eval_prints_and_writes_a_report(tmp_path: Path, vectors: Path, capsys: Capture) -> None:
    out = tmp_path / "eraser"
    run("fit", vectors, "--out", out)
    capsys.readouterr()
    report = tmp_path / "report"
    arguments = ("--eraser", out, "--probes", "linear", "--folds", "3", "--out", report)
    assert run("eval", vectors, *arguments) == 0
    assert "before" in capsys.readouterr().out
    (written,) = report.glob("*.json")
    assert "after" in json.dumps(json.loads(written.read_text("utf-8")))


def test_fit_options_reach_the_method(tmp_path: Path, vectors: Path) -> None:
    assert run("fit", vectors, "--out", tmp_path / "e", "--strength", "0.5") == 0
    config = json.loads((tmp_path / "e" / "eraser_config.json").read_text("utf-8"))
    assert config["config"]["strength"] == 0.5


def test_continuous_labels(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    np.save(tmp_path / "v.npy", labelled[0].numpy())
    (tmp_path / "z.txt").write_text("\n".join(f"{i / 7}" for i in range(len(labelled[0]))))
    base = ("fit", tmp_path / "v.npy", "--out", tmp_path / "e", "--z-kind", "continuous")
    assert run(*base, "--labels", tmp_path / "z.txt") == 0
    (tmp_path / "words.txt").write_text("\n".join("word" for _ in labelled[0]))
    fails(capsys, *base, "--labels", tmp_path / "words.txt", word="numbers")


def test_missing_and_wrong_files(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    out = ("--out", tmp_path / "e")
    fails(capsys, "fit", tmp_path / "no.npy", *out, word="no such file")
    fails(capsys, "fit", tmp_path, *out, word="folder")
    (tmp_path / "v.pkl").write_bytes(b"x")
    fails(capsys, "fit", tmp_path / "v.pkl", *out, word=".safetensors")
    for name in ("bad.npy", "bad.safetensors", "bad.csv"):
        (tmp_path / name).write_bytes(b"\x93rubbish\xff")
        fails(capsys, "fit", tmp_path / name, *out, word=name)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    fails(capsys, "fit", tmp_path / "objects.npy", *out, word="plain .npy")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    fails(capsys, "fit", tmp_path / "flat.npy", *out, word="(n, d)")


def test_label_mistakes(tmp_path: Path, labelled: Data, vectors: Path, capsys: Capture) -> None:
    out = ("--out", tmp_path / "e")
    table = write_csv(tmp_path / "v.csv", labelled)
    fails(capsys, "fit", table, "--label-column", "sex", *out, word="'label'")
    fails(capsys, "fit", vectors, "--label-column", "sex", *out, word="'label'")
    np.save(tmp_path / "v.npy", labelled[0].numpy())
    fails(capsys, "fit", tmp_path / "v.npy", *out, word="--labels")
    (tmp_path / "short.txt").write_text("a\nb\n")
    source = (tmp_path / "v.npy", "--labels", tmp_path / "short.txt")
    fails(capsys, "fit", *source, *out, word="2 labels")
    (tmp_path / "words.csv").write_text("a,label\nhello,1\n")
    fails(capsys, "fit", tmp_path / "words.csv", *out, word="'hello'")
    (tmp_path / "ragged.csv").write_text("a,label\n1,1,1\n")
    fails(capsys, "fit", tmp_path / "ragged.csv", *out, word="fields")


def test_method_and_eraser_mistakes(tmp_path: Path, vectors: Path, capsys: Capture) -> None:
    out = ("--out", tmp_path / "e")
    fails(capsys, "fit", vectors, "--method", "leec", *out, word="leace")
    fails(capsys, "card", tmp_path / "nothing", word="nothing")
    (tmp_path / "empty").mkdir()
    fails(capsys, "card", tmp_path / "empty", word="empty")
    run("fit", vectors, *out)
    fails(capsys, "apply", "--eraser", tmp_path / "e", "--out", tmp_path / "x.npy", word="--model")
    arguments = ("apply", vectors, "--eraser", tmp_path / "e", "--out", tmp_path / "x.txt")
    fails(capsys, *arguments, word=".npy")


def test_usage_error_is_code_2() -> None:
    with pytest.raises(SystemExit) as caught:
        run("fit", "--nonsense")
    assert caught.value.code == 2


def test_text_mistakes(tmp_path: Path, capsys: Capture) -> None:
    options = ("--model", tmp_path / "m", "--out", tmp_path / "e")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    fails(capsys, "fit", tmp_path / "t.jsonl", *options, word="row 2")
    (tmp_path / "bad.jsonl").write_text("{")
    fails(capsys, "fit", tmp_path / "bad.jsonl", *options, word="line 1")
    (tmp_path / "empty.jsonl").write_text("\n")
    fails(capsys, "fit", tmp_path / "empty.jsonl", *options, word="no texts")
    fails(capsys, "fit", tmp_path / "no.jsonl", *options, word="no such file")


def test_unreadable_model(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    (tmp_path / "m").mkdir()
    options = ("--model", tmp_path / "m", "--out", tmp_path / "e")
    fails(capsys, "fit", tmp_path / "t.jsonl", *options, word="error")


def test_fit_on_a_model_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concept_erasure import _commands
    from tests.models import TinyTokenizer, tiny

    monkeypatch.setattr(
        _commands, "_load_model", lambda *_: (tiny("llama"), TinyTokenizer()), raising=True
    )
    rows = [
        {"sentence": f"{who} is here {i}", "sex": who} for i in range(30) for who in ("he", "she")
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    columns = ("--text-column", "sentence", "--label-column", "sex")
    options = ("--model", "tiny", "--site", "residual.1", "--tokens", "mean", *columns)
    assert run("fit", path, *options, "--out", tmp_path / "e") == 0
    space = Eraser.from_pretrained(tmp_path / "e").space
    assert space is not None
    assert (space.site, space.tokens, space.width) == ("residual.1", "mean", 32)
