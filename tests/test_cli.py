"""The command line, in this process: what it writes, and that every mistake costs one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tyro")

from concept_erasure import LeaceEraser, LeaceFitter, _cli_data, _commands, cli, registry
from concept_erasure.collect import collect
from concept_erasure.eraser import Eraser
from concept_erasure.linear.splince import SplinceEraser

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


def sentences(count: int = 30) -> list[dict[str, object]]:
    """Rows with a text, a class, a task's class and a number."""
    return [
        {"sentence": f"{who} is {job} {i}", "sex": who, "job": job, "year": i}
        for i in range(count)
        for who in ("he", "she")
        for job in ("cook", "judge")
    ]


COLUMNS = ("--text-column", "sentence", "--label-column", "sex")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in sentences()), "utf-8")
    return path


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama and a word-level tokenizer, saved as a user would."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from tests.models import tiny

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "he", "she", "is", "cook", "judge"]
    words += [str(i) for i in range(60)]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> tuple[Any, Any]:
    return _commands._load_model(str(folder), None, None)


def test_fit_on_a_model_and_texts(tmp_path: Path, texts: Path, saved_model: Path) -> None:
    options = ("--model", saved_model, "--site", "residual.1", "--tokens", "mean", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    eraser = Eraser.from_pretrained(tmp_path / "e")
    assert eraser.space is not None
    assert (eraser.space.site, eraser.space.tokens, eraser.space.width) == (
        "residual.1",
        "mean",
        32,
    )
    assert eraser.report["n_per_class"] == {"he": 60, "she": 60}


@pytest.mark.parametrize("method", ["leace", "orth"])
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_streaming_equals_fitting_on_everything(
    tmp_path: Path, texts: Path, saved_model: Path, method: str, tokens: str
) -> None:
    options = ("--method", method, "--tokens", tokens, "--batch-size", "7", *COLUMNS)
    sites = ("--sites", "residual.1", "mlp.*")
    out = tmp_path / "e"
    assert run("fit", texts, "--model", saved_model, *options, *sites, "--out", out) == 0
    rows, (model, tokenizer) = sentences(), loaded(saved_model)
    found = collect(
        model,
        tokenizer,
        [str(row["sentence"]) for row in rows],
        [str(row["sex"]) for row in rows],
        sites=["residual.1", "mlp.*"],
        tokens=tokens,  # type: ignore[arg-type]
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(found)
    for site, vectors in found.items():
        expected = LeaceEraser.fit(vectors, method=method)  # type: ignore[arg-type]
        eraser = LeaceEraser.from_pretrained(out / site)
        assert eraser.space == expected.space
        assert eraser.config == expected.config
        torch.testing.assert_close(eraser.P, expected.P, rtol=1e-5, atol=1e-5)
        assert eraser.report["n_per_class"] == expected.report["n_per_class"]


def test_streaming_holds_one_batch(
    tmp_path: Path, texts: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more vectors than a batch, and never more texts, however many there are."""
    slices: list[int] = []
    rows: list[int] = []
    read, update = _cli_data.Texts._read, LeaceFitter.update

    def reading(self: Any, start: int, count: int) -> list[str]:
        slices.append(count)
        return read(self, start, count)

    def updating(self: Any, x: Any, z: Any) -> LeaceFitter:
        rows.append(len(x))
        return update(self, x, z)

    monkeypatch.setattr(_cli_data.Texts, "_read", reading)
    monkeypatch.setattr(LeaceFitter, "update", updating)
    options = ("--model", saved_model, "--batch-size", "8", *COLUMNS, "--out", tmp_path / "e")
    assert run("fit", texts, *options) == 0
    assert slices == rows == [8] * 15


def test_continuous_labels_of_texts(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    options = ("--model", saved_model, "--z-kind", "continuous", "--out", tmp_path / "e")
    columns = ("--text-column", "sentence", "--label-column")
    assert run("fit", texts, *options, *columns, "year") == 0
    eraser = Eraser.from_pretrained(tmp_path / "e")
    assert eraser.report["rank"] == 1
    assert "n_per_class" not in eraser.report
    fails(capsys, "fit", texts, *options, *columns, "sex", word="'he'")


def test_other_methods_collect_and_say_so(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    base = ("fit", texts, "--model", saved_model, *COLUMNS, "--out", tmp_path / "e")
    task = ("--task-column", "job", "--tokens", "mean")
    assert run(*base, "--method", "splince", *task) == 0
    assert "held in memory" in capsys.readouterr().out
    eraser = Eraser.from_pretrained(tmp_path / "e")
    assert (eraser.method, eraser.space is not None) == ("splince", True)
    assert float(str(eraser.report["task_change"])) < 1e-6
    fails(capsys, *base, "--method", "splince", word="--task-column")
    fails(capsys, *base, "--task-labels", tmp_path / "y.txt", word="--task-labels")


def test_splince_on_vectors(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    x, z = labelled
    y = (x[:, 3] > 0).long()
    table = tmp_path / "v.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"f{i}" for i in range(8)), "job", "label"])
        for row, task, label in zip(x.tolist(), y.tolist(), z.tolist(), strict=True):
            writer.writerow([*row, ("cook", "judge")[task], "ab"[label]])
    save_file({"x": x, "label": z, "job": y}, tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", x.numpy())
    np.save(tmp_path / "z.npy", z.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    expected = SplinceEraser.fit(x, z, y)
    files = ("--labels", tmp_path / "z.npy", "--task-labels", tmp_path / "y.npy")
    for source, options in (
        (table, ("--task-column", "job")),
        (tmp_path / "v.safetensors", ("--task-column", "job")),
        (tmp_path / "v.npy", files),
    ):
        assert run("fit", source, "--method", "splince", *options, "--out", tmp_path / "e") == 0
        eraser = SplinceEraser.from_pretrained(tmp_path / "e")
        torch.testing.assert_close(eraser.P, expected.P)
    erased = tmp_path / "e.npy"
    base = ("apply", table, "--eraser", tmp_path / "e", "--out", erased)
    assert run(*base, "--task-column", "job") == 0
    np.testing.assert_allclose(np.load(erased), expected(x).numpy())
    out = ("--out", tmp_path / "f")
    fails(capsys, "fit", tmp_path / "v.npy", *files, *out, word="leace")
    splince = ("--method", "splince", *out)
    fails(capsys, "fit", tmp_path / "v.npy", *files[:2], *splince, word="--task-labels")
    fails(capsys, "fit", table, "--task-column", "work", *splince, word="'job'")
    fails(capsys, "fit", tmp_path / "v.safetensors", "--task-column", "w", *splince, word="'job'")
    np.save(tmp_path / "y.npy", y[:3].numpy())
    fails(capsys, "fit", tmp_path / "v.npy", *files, *splince, word="3 task labels")


def test_methods_that_need_labels_again(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    x, z = labelled
    np.save(tmp_path / "v.npy", x.numpy())
    (tmp_path / "z.txt").write_text("\n".join(map(str, z.tolist())))
    source, out = (tmp_path / "v.npy", "--labels", tmp_path / "z.txt"), tmp_path / "e"
    assert run("fit", *source, "--method", "oracle", "--out", out) == 0
    erased = ("--eraser", out, "--out", tmp_path / "x.npy")
    assert run("apply", *source, *erased) == 0
    clean = np.load(tmp_path / "x.npy")
    one, other = (clean[z.numpy() == label].mean(0) for label in (0, 1))
    np.testing.assert_allclose(one, other, atol=1e-8)
    fails(capsys, "apply", tmp_path / "v.npy", *erased, word="--labels")


@pytest.mark.parametrize("form", ["disk", "splits", "json"])
def test_texts_of_a_data_set(
    tmp_path: Path,
    saved_model: Path,
    form: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    if form == "json":
        folder.mkdir()
        lines = "\n".join(json.dumps(row) for row in sentences())
        (folder / "train.jsonl").write_text(lines, "utf-8")
    else:
        data = datasets.Dataset.from_list(sentences())
        data = datasets.DatasetDict({"train": data}) if form == "splits" else data
        data.save_to_disk(folder)
    options = ("--model", saved_model, *COLUMNS, "--limit", "40", "--out", tmp_path / "e")
    capsys.readouterr()
    assert run("fit", folder, *options) == 0
    eraser = Eraser.from_pretrained(tmp_path / "e")
    assert eraser.report["n_per_class"] == {"he": 20, "she": 20}
    if form != "disk":
        fails(capsys, "fit", folder, *options, "--split", "nosuch", word="'nosuch'")


def test_unknown_data_set_offline(tmp_path: Path, saved_model: Path, capsys: Capture) -> None:
    pytest.importorskip("datasets")
    options = ("--model", saved_model, "--out", tmp_path / "e")
    fails(capsys, "fit", "nobody/no-such-data", *options, word="nobody/no-such-data")


@pytest.mark.parametrize("site", ["mlp.1", "norm2.1"])
def test_apply_to_a_model(tmp_path: Path, texts: Path, saved_model: Path, site: str) -> None:
    """The written model, loaded again, does what the eraser does as a hook."""
    options = ("--model", saved_model, "--sites", site, "--affine", "False", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    out = tmp_path / "edited"
    assert run("apply", "--model", saved_model, "--eraser", tmp_path / "e", "--out", out) == 0
    model, tokenizer = loaded(saved_model)
    edited, same_tokenizer = loaded(out)
    batch = tokenizer(["he is judge 3", "she is cook"], padding=True, return_tensors="pt")
    again = same_tokenizer(["he is judge 3", "she is cook"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], again["input_ids"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**inputs).logits
        with LeaceEraser.from_pretrained(tmp_path / "e").attach(model):
            hooked = model(**inputs).logits
        after = edited(**inputs).logits
    torch.testing.assert_close(after, hooked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_apply_refuses_what_saving_would_lose(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    options = ("--model", saved_model, "--sites", "mlp.1", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    out = ("--eraser", tmp_path / "e", "--out", tmp_path / "m")
    fails(capsys, "apply", "--model", saved_model, *out, word="--affine False")
    assert not (tmp_path / "m").exists()
    assert run("fit", texts, *options[:2], *COLUMNS, "--out", tmp_path / "e") == 0
    fails(capsys, "apply", "--model", saved_model, *out, word="residual.1")


def test_eval_on_a_model(tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture) -> None:
    options = ("--model", saved_model, "--tokens", "mean", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    base = ("eval", texts, *options, "--eraser", tmp_path / "e", "--probes", "linear")
    assert run(*base, "--folds", "2") == 0
    assert "before" in capsys.readouterr().out
    fails(capsys, *base, "--sites", "mlp.*", word="one site")


def test_texts_are_a_sequence(texts: Path) -> None:
    opened = _cli_data.open_texts(
        str(texts), text_column="sentence", label_column="sex", task_column="job", limit=9
    )
    expected = [row["sentence"] for row in sentences()][:9]
    assert list(opened) == opened[:] == expected
    assert (opened[-1], opened[2:5], opened[::4]) == (expected[-1], expected[2:5], expected[::4])
    assert opened.z.plain() == [row["sex"] for row in sentences()][:9]
    assert opened.y is not None
    assert opened.y.names == ("cook", "judge")
    with pytest.raises(IndexError):
        opened[9]
    texts.write_text(json.dumps(sentences()[0]), "utf-8")
    with pytest.raises(ValueError, match="shorter"):
        opened[:4]
