"""The command line for dictionaries: train, find, and mistakes that cost one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from concept_erasure import _cli_data, cli
from concept_erasure.concept import Concept
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.search import FeatureTable, find_features
from tests.small_concept import small_concept, write_model

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("concept") / "orla.yaml"
    small_concept().save(path)
    return path


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = torch.nn.functional.normalize(
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1
    )
    made = Disentangler(
        rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(32), torch.full((64,), 0.01), "mlp.1"
    )  # fmt: skip
    return made.save_pretrained(tmp_path_factory.mktemp("dictionary") / "mlp.1")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fails(capsys: Capture, *arguments: object, word: str) -> None:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], lines


def test_train_writes_what_python_reads(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    pytest.importorskip("sae_lens")
    texts = tmp_path / "texts.txt"
    lines = [*small_concept().forget_texts, *small_concept().retain_texts]
    texts.write_text("\n".join(lines * 8), encoding="utf-8")
    base = ("sae", "train", "--model", folder, "--texts", texts, "--sites", "mlp.1")
    more = ("--widths", "16,32", "--k", 4, "--tokens", 640, "--batch-size", 64)
    assert run(*base, *more, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "trained Disentangler(mlp.1, d=32, n=32, widths=(16, 32)" in said and "fvu: " in said
    made = Disentangler.from_pretrained(tmp_path / "out" / "mlp.1")
    assert made.site == "mlp.1" and made.widths == (16, 32)


def test_find_gives_what_python_gives(
    tmp_path: Path, folder: Path, concept: Path, dictionary: Path, capsys: Capture
) -> None:
    base = ("sae", "find", "--model", folder, "--concept", concept, "--disentanglers", dictionary)
    more = ("--scorers", "lens,attribution", "--vote", 1, "--no-filters", "--top", 3)
    assert run(*base, *more, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    table = FeatureTable.load(tmp_path / "out")
    assert f"{len(table)} features of Orla" in said and table[0].name in said
    model, tokenizer = _cli_data.load_model(str(folder))
    want = find_features(
        model, tokenizer, Disentangler.from_pretrained(dictionary), Concept.load(concept),
        scorers=["lens", "attribution"], vote=1, filters=None, top=3,
    )  # fmt: skip
    assert [f.name for f in table] == [f.name for f in want]
    assert table.features[0].scores == pytest.approx(dict(want[0].scores))
    assert "report.md" in said and (tmp_path / "out" / "report.md").exists()


def test_mistakes_cost_one_line(
    tmp_path: Path, folder: Path, concept: Path, dictionary: Path, capsys: Capture
) -> None:
    out = ("--out", tmp_path / "never")
    find = ("sae", "find", "--model", folder, "--concept", concept, *out)
    fails(capsys, *find, "--disentanglers", tmp_path / "none", word="none")
    twice = ("--disentanglers", dictionary, dictionary)
    fails(capsys, *find, *twice, word="there is another one at mlp.1")
    one = ("--disentanglers", dictionary)
    fails(capsys, *find, *one, "--scorers", "guess", word="guess")
    fails(
        capsys,
        *find,
        *one,
        "--forget-texts",
        tmp_path / "no.txt",
        word="--forget-texts: no such file",
    )
    train = ("sae", "train", "--model", folder, "--sites", "mlp.1", *out)
    fails(capsys, *train, "--texts", tmp_path / "no.txt", word="--texts: no such file")
    texts = tmp_path / "texts.txt"
    texts.write_text("orla0 eat bread\n", encoding="utf-8")
    fails(
        capsys, *train, "--texts", texts, "--widths", "a,b", word="--widths must be whole numbers"
    )
    assert not (tmp_path / "never").exists()
