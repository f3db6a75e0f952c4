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

from concept_erasure import LeaceEraser, LeaceFitter, _cli_data, cli, registry
from concept_erasure.collect import collect
from concept_erasure.eraser import Eraser
from concept_erasure.linear.oracle import OracleEraser
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


def test_compare_writes_a_table_and_a_plot(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    np.save(tmp_path / "v.npy", labelled[0].numpy())
    (tmp_path / "z.txt").write_text("\n".join("ab"[i] for i in labelled[1].tolist()))
    source = ("--vectors", tmp_path / "v.npy", "--labels", tmp_path / "z.txt")
    out = ("--out", tmp_path / "sweep", "--probes", "linear,centroid")
    assert run("compare", "--methods", "leace, orth,oracle", *source, *out) == 0
    shown = capsys.readouterr().out
    assert "oracle: not applicable: it needs the labels" in shown
    assert str(tmp_path / "v.npy") not in shown
    names = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert names == ["compare.json", "compare.md", "compare.png"]
    rows = json.loads((tmp_path / "sweep" / "compare.json").read_text("utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["none", "leace", "orth", "oracle"]
    assert rows[1]["linear balanced"]["high"] < rows[0]["linear balanced"]["low"]
    assert 0 < rows[1]["edit"] < 1


def test_compare_keeps_a_task_and_explains_mistakes(
    tmp_path: Path, labelled: Data, vectors: Path, capsys: Capture
) -> None:
    x, z = labelled
    path = tmp_path / "task.safetensors"
    save_file({"x": x, "label": z, "job": (x[:, 3] > 0).long()}, path)
    out = ("--out", tmp_path / "sweep", "--probes", "centroid")
    options = ("--vectors", path, "--methods", "splince", *out)
    assert run("compare", *options, "--task-column", "job") == 0
    assert "| splince | 0." in capsys.readouterr().out
    base = ("compare", "--vectors", vectors, *out)
    fails(capsys, "compare", *options, word="no task labels were given")
    fails(capsys, *base, "--methods", "leec", word="leace")
    fails(capsys, *base, "--methods", "oracle", word="not applicable")
    fails(capsys, *base, "--methods", "leace", "--probes", "tree", word="centroid")
    fails(capsys, *base, "--methods", "leace", "--fit-share", "0.9", word="0.9")
    fails(capsys, *base, "--methods", "leace", "--label-column", "sex", word="'label'")
    fails(capsys, "compare", "--vectors", tmp_path / "no.npy", *out, word="no such file")


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
    return _cli_data.load_model(str(folder))


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
    if method == "leace":
        options += ("--background", "False")
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


def test_apply_keeps_an_offset_that_the_architecture_can_load(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    options = ("--model", saved_model, "--sites", "mlp.1", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    out = ("--eraser", tmp_path / "e", "--out", tmp_path / "m")
    fails(capsys, "apply", "--model", saved_model, *out, "--bias", "refuse", word="--affine False")
    assert not (tmp_path / "m").exists()
    assert run("apply", "--model", saved_model, *out) == 0
    (model, tokenizer), (edited, _) = loaded(saved_model), loaded(tmp_path / "m")
    assert edited.config.mlp_bias
    inputs = tokenizer(["he is judge 3"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with LeaceEraser.from_pretrained(tmp_path / "e").attach(model):
            hooked = model(inputs).logits
        torch.testing.assert_close(edited(inputs).logits, hooked, rtol=1e-4, atol=1e-4)
    assert run("fit", texts, *options[:2], *COLUMNS, "--out", tmp_path / "e") == 0
    fails(capsys, "apply", "--model", saved_model, *out, word="residual.1")


@pytest.mark.filterwarnings("default:::concept_erasure")
def test_apply_says_what_loading_will_drop(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    """Mistral has no setting for biases in its mlp."""
    from tests.models import tiny

    folder = tmp_path / "mistral"
    _, tokenizer = loaded(saved_model)
    tiny("mistral").save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    base = ("--model", folder)
    assert run("fit", texts, *base, "--sites", "mlp.1", *COLUMNS, "--out", tmp_path / "e") == 0
    out = (*base, "--eraser", tmp_path / "e", "--out", tmp_path / "m")
    for word in ("--affine False", "--bias add", "attach() from Python"):
        fails(capsys, "apply", *out, word=word)
    assert not (tmp_path / "m").exists()
    assert run("apply", *out, "--bias", "add") == 0
    warning = capsys.readouterr().err
    assert "warning: model.layers.1.mlp.down_proj.bias" in warning
    assert "drop" in warning


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


def other_model(folder: Path, saved_model: Path) -> Path:
    """The saved model with other weights."""
    model, tokenizer = loaded(saved_model)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.01)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["leace", "oracle"])
def test_eval_refuses_another_space(
    tmp_path: Path, texts: Path, saved_model: Path, capsys: Capture, method: str
) -> None:
    fit = ("--model", saved_model, "--sites", "mlp.1", "--tokens", "mean", *COLUMNS)
    assert run("fit", texts, *fit, "--method", method, "--out", tmp_path / "e") == 0
    base = ("eval", texts, *COLUMNS, "--eraser", tmp_path / "e", "--probes", "linear", "--folds", 2)
    assert run(*base, "--model", saved_model) == 0  # where the eraser was fitted
    fails(capsys, *base, "--model", saved_model, "--sites", "mlp.0", word="'mlp.0'")
    fails(capsys, *base, "--model", saved_model, "--tokens", "last", word="--tokens mean")
    fails(capsys, *base, "--model", other_model(tmp_path / "m", saved_model), word="weights")


def test_eval_keeps_the_tokens_of_a_text_together(
    tmp_path: Path, texts: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concept_erasure import probes

    groups: list[Any] = []
    cross_validate = probes.cross_validate

    def watched(*arguments: Any, **options: Any) -> Any:
        groups.append(options["groups"])
        return cross_validate(*arguments, **options)

    monkeypatch.setattr(probes, "cross_validate", watched)
    options = ("--model", saved_model, "--tokens", "all", *COLUMNS)
    assert run("fit", texts, *options, "--out", tmp_path / "e") == 0
    base = ("--eraser", tmp_path / "e", "--probes", "linear", "--folds", 2)
    assert run("eval", texts, *options, *base) == 0
    assert len(groups) == 2
    assert all(len(one.unique()) == 120 for one in groups)


def test_eval_needs_classes(tmp_path: Path, labelled: Data, capsys: Capture) -> None:
    np.save(tmp_path / "v.npy", labelled[0].numpy())
    (tmp_path / "z.txt").write_text("\n".join(f"{i / 7}" for i in range(len(labelled[0]))))
    source = (tmp_path / "v.npy", "--labels", tmp_path / "z.txt")
    assert run("fit", *source, "--out", tmp_path / "e") == 0
    fails(capsys, "eval", *source, "--eraser", tmp_path / "e", word="probes need classes")
    (tmp_path / "z.txt").write_text("\n".join(map(str, range(1900, 1900 + len(labelled[0])))))
    fails(capsys, "eval", *source, "--eraser", tmp_path / "e", word="probes need classes")


IDLE = {
    "--limit": 3,
    "--sites": "residual.1",
    "--tokens": "mean",
    "--batch-size": 4,
    "--max-length": 4,
    "--device": "cpu",
    "--text-column": "words",
    "--split": "test",
    "--gguf-file": "m.gguf",
    "--background": "True",
}


@pytest.mark.parametrize("option", IDLE)
def test_options_of_models_are_refused_for_vectors(
    tmp_path: Path, vectors: Path, capsys: Capture, option: str
) -> None:
    given = (option, IDLE[option], "--out", tmp_path / "e")
    fails(capsys, "fit", vectors, *given, word=f"error: {option} ")
    assert not (tmp_path / "e").exists()
    if option != "--background":
        fails(capsys, "eval", vectors, *given, "--eraser", tmp_path / "e", word=option)


def test_other_options_without_effect_are_refused(
    tmp_path: Path, vectors: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    out, x = tmp_path / "e", tmp_path / "x.npy"
    assert run("fit", vectors, "--out", out) == 0
    to_file = ("--eraser", out, "--out", x)
    fails(capsys, "apply", vectors, *to_file, "--bias", "add", word="--bias")
    fails(capsys, "apply", vectors, *to_file, "--labels", x, word="--labels")
    to_model = ("apply", "--model", saved_model, "--eraser", out, "--out", tmp_path / "m")
    fails(capsys, *to_model, vectors, word="SOURCE")
    for option in ("--labels", "--label-column", "--task-column"):
        fails(capsys, *to_model, option, "y", word=option)
    fit = ("fit", texts, "--model", saved_model, *COLUMNS, "--out", out)
    fails(capsys, *fit, "--labels", x, word="--labels")
    fails(capsys, *fit, "--split", "test", word="--split")
    fails(capsys, *fit, "--task-column", "job", word="--task-column")
    fails(capsys, *fit, "--background", "True", "--tokens", "all", word="--background")
    fails(capsys, *fit, "--background", "True", "--method", "orth", word="--background")
    orth = ("fit", vectors, "--method", "orth", "--out", out)
    fails(capsys, *orth, "--shrinkage", "True", word="--shrinkage")
    fails(capsys, "fit", vectors, "--task-kind", "classes", "--out", out, word="--task-kind")


@pytest.mark.parametrize("label", ["", "NaN"])
@pytest.mark.parametrize("kind", ["auto", "classes", "continuous"])
@pytest.mark.parametrize("form", ["csv", "txt", "labels", "npy", "jsonl", "texts"])
def test_missing_labels_are_refused_by_row(
    tmp_path: Path, label: str, kind: str, form: str, capsys: Capture
) -> None:
    labels, x = ["0", "1", label, "1"], np.eye(4)
    source: tuple[object, ...] = (tmp_path / "v.npy", "--labels")
    np.save(tmp_path / "v.npy", x)
    if form == "csv":
        lines = [f"{i},{label}" for i, label in enumerate(labels)]
        (tmp_path / "v.csv").write_text("\n".join(["a,label", *lines]))
        source = (tmp_path / "v.csv",)
    elif form == "txt":
        (tmp_path / "z.txt").write_text("\n".join(labels))
        source += (tmp_path / "z.txt",)
    elif form == "labels":
        (tmp_path / "z.csv").write_text("\n".join(["label", *labels]) + "\n")
        source += (tmp_path / "z.csv",)
    elif form == "npy":
        np.save(tmp_path / "z.npy", np.array([float(one.strip() or "nan") for one in labels]))
        source += (tmp_path / "z.npy",)
    elif form == "jsonl":
        rows = [{"text": "a", "label": one if one.strip() else None} for one in labels]
        rows[2]["label"] = float("nan") if label else rows[2]["label"]
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        source = (tmp_path / "t.jsonl", "--model", tmp_path / "m")
    else:
        (tmp_path / "t.csv").write_text("\n".join(["text,label", *(f"a,{one}" for one in labels)]))
        source = (tmp_path / "t.csv", "--model", tmp_path / "m")
    fails(capsys, "fit", *source, "--z-kind", kind, "--out", tmp_path / "e", word="row 3")


@pytest.mark.parametrize("form", ["npy", "csv"])
@pytest.mark.parametrize("kind", ["auto", "continuous", "classes"])
def test_oracle_reads_labels_alike_when_fitting_and_erasing(
    tmp_path: Path, labelled: Data, form: str, kind: str
) -> None:
    """An eraser fitted on numbers takes numbers, one fitted on classes takes their names."""
    x, z = labelled
    np.save(tmp_path / "v.npy", x.numpy())
    np.save(tmp_path / "z.npy", z.numpy())
    (tmp_path / "z.csv").write_text("\n".join(["label", *map(str, z.tolist())]))
    base = (tmp_path / "v.npy", "--labels")
    fit = ("fit", *base, tmp_path / f"z.{form}", "--method", "oracle", "--z-kind", kind)
    assert run(*fit, "--out", tmp_path / "e") == 0
    expected = OracleEraser.fit(x, z)(x, z).numpy()
    for other in ("npy", "csv"):
        erased = ("--eraser", tmp_path / "e", "--out", tmp_path / "x.npy")
        assert run("apply", *base, tmp_path / f"z.{other}", *erased) == 0
        np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-8)
        options = ("--eraser", tmp_path / "e", "--probes", "linear", "--folds", 2)
        assert run("eval", *base, tmp_path / f"z.{other}", *options) == 0


@pytest.mark.parametrize("kind", ["auto", "continuous"])
def test_numbers_in_text_are_numbers(tmp_path: Path, labelled: Data, kind: str) -> None:
    """Fractions are numbers by default, in text as in arrays; whole numbers are classes."""
    x = labelled[0]
    numbers = x[:, 0].double() + 0.25
    np.save(tmp_path / "v.npy", x.numpy())
    (tmp_path / "z.txt").write_text("\n".join(map(repr, numbers.tolist())))
    source = (tmp_path / "v.npy", "--labels", tmp_path / "z.txt")
    for method, expected in (
        ("leace", LeaceEraser.fit(x, numbers)(x)),
        ("oracle", OracleEraser.fit(x, numbers)(x, numbers)),
    ):
        fit = ("fit", *source, "--method", method, "--z-kind", kind)
        assert run(*fit, "--out", tmp_path / method) == 0
        labels = source[1:] if method == "oracle" else ()
        erased = ("--eraser", tmp_path / method, "--out", tmp_path / "x.npy")
        assert run("apply", source[0], *labels, *erased) == 0
        np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected.numpy(), atol=1e-6)


def test_quadratic_takes_classes_only(tmp_path: Path, vectors: Path, capsys: Capture) -> None:
    base = ("fit", vectors, "--method", "quadratic", "--out", tmp_path / "e", "--z-kind")
    assert run(*base, "classes") == 0
    fails(capsys, *base, "continuous", word="needs classes")


def test_background_is_the_default_in_a_model(
    tmp_path: Path, texts: Path, saved_model: Path
) -> None:
    from concept_erasure.collect import fit_streaming

    rows, (model, tokenizer) = sentences(), loaded(saved_model)
    fitted = fit_streaming(
        model,
        tokenizer,
        [str(row["sentence"]) for row in rows],
        [str(row["sex"]) for row in rows],
        sites="mlp.1",
        fitter=lambda width: LeaceFitter(width, 2, classes=("he", "she")),
        background=True,
    )
    base = ("fit", texts, "--model", saved_model, "--sites", "mlp.1", *COLUMNS, "--out")
    assert run(*base, tmp_path / "e") == 0
    eraser = LeaceEraser.from_pretrained(tmp_path / "e")
    torch.testing.assert_close(eraser.P, fitted["mlp.1"].eraser.P, rtol=1e-5, atol=1e-5)
    assert "background_rows" in eraser.report
    assert run(*base, tmp_path / "f", "--background", "False") == 0
    without = LeaceEraser.from_pretrained(tmp_path / "f")
    assert "background_rows" not in without.report
    assert not torch.allclose(without.P, eraser.P, atol=1e-3)


def test_more_fit_options_reach_the_method(tmp_path: Path, vectors: Path, capsys: Capture) -> None:
    given = ("--shrinkage", "False", "--svd-tol", "0.5", "--rank", "1")
    assert run("fit", vectors, "--out", tmp_path / "e", *given) == 0
    config = json.loads((tmp_path / "e" / "eraser_config.json").read_text("utf-8"))["config"]
    assert (config["shrinkage"], config["svd_tol"], config["rank"]) == (False, 0.5, 1)
    base = ("fit", vectors, "--out", tmp_path / "e", "--method", "quadratic")
    for option, value in (("--svd-tol", "0.5"), ("--rank", "1"), ("--held-out", vectors)):
        fails(capsys, *base, option, value, word=option)


def test_held_out_file(
    tmp_path: Path, labelled: Data, vectors: Path, texts: Path, saved_model: Path, capsys: Capture
) -> None:
    table = write_csv(tmp_path / "other.csv", (labelled[0] + 1, labelled[1]))
    source = (write_csv(tmp_path / "v.csv", labelled), "--held-out")
    assert run("fit", *source, table, "--out", tmp_path / "e") == 0
    x, z = labelled[0].double(), ["ab"[i] for i in labelled[1].tolist()]
    expected = LeaceEraser.fit(x, z, held_out=(x + 1, z)).report["held_out_gap"]
    report = LeaceEraser.from_pretrained(tmp_path / "e").report
    assert report["held_out_gap"] == pytest.approx(expected, abs=1e-6)
    np.save(tmp_path / "w.npy", labelled[0].numpy())
    out = ("--out", tmp_path / "e")
    fails(capsys, "fit", *source, tmp_path / "w.npy", *out, word="--held-out")
    other = tmp_path / "held.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in sentences(40)[120:]), "utf-8")
    fit = ("fit", texts, "--model", saved_model, *COLUMNS, *out)
    assert run(*fit) == 0
    inside = LeaceEraser.from_pretrained(tmp_path / "e")
    assert run(*fit, "--held-out", other) == 0
    outside = LeaceEraser.from_pretrained(tmp_path / "e")
    torch.testing.assert_close(outside.P, inside.P)
    assert outside.report["held_out_gap"] != inside.report["held_out_gap"]
    fails(capsys, *fit, "--held-out", tmp_path / "no.jsonl", word="no such file")


def test_list_prints_the_paper(capsys: Capture) -> None:
    assert run("list") == 0
    assert "arXiv:2306.03819" in capsys.readouterr().out


def test_messages_speak_to_a_shell() -> None:
    assert cli._for_shell("pass z_kind='classes', max_length=512") == (
        "pass --z-kind classes, --max-length 512"
    )
    assert cli._for_shell("use apply(bias='add')\nor attach()") == (
        "use --bias add or attach() from Python"
    )
    assert cli._for_shell("with kind=3 or f(x=1)") == "with kind=3 or f(x=1)"
