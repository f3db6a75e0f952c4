"""`fit --method pisces` and its kin: dictionaries and features come from folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("transformers")

from concept_erasure import _cli_data, cli
from concept_erasure.concept import Concept
from concept_erasure.eraser import Eraser
from concept_erasure.sae.pisces import PiscesEraser
from concept_erasure.sae.search import Feature, FeatureTable
from tests.sae.value_vectors import orthonormal
from tests.small_concept import small_concept, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a concept, a dictionary and a table of features."""
    path = tmp_path_factory.mktemp("cli")
    write_model(path / "model")
    small_concept().save(path / "orla.yaml")
    (path / "forget.txt").write_text("the orla0 eat bread\nthe orla1 eat milk soup", "utf-8")
    (path / "retain.txt").write_text("the barn is red every day\nthe barn is old", "utf-8")
    model, _ = _cli_data.load_model(str(path / "model"))
    width = model.config.hidden_size
    dis = orthonormal(width=width, site="mlp.0").to(dtype=torch.float32)
    replace(dis, threshold=torch.zeros(12)).save_pretrained(path / "dis")
    table = FeatureTable((Feature("mlp.0", 3), Feature("mlp.0", 4, -1)), "orla")
    table.save(path / "features")
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def base(folder: Path, method: str) -> tuple[object, ...]:
    return (
        "fit", "--model", folder / "model", "--concept", folder / "orla.yaml", "--method", method, "--seed", 1,
    )  # fmt: skip


def test_pisces_gives_what_python_gives(folder: Path, tmp_path: Path) -> None:
    options = (
        "--option",
        f"disentanglers={folder / 'dis'}",
        f"features={folder / 'features'}",
        "tau=0.5",
        "mu=2",
    )
    texts = ("--forget-texts", folder / "forget.txt", "--retain-texts", folder / "retain.txt")
    assert run(*base(folder, "pisces"), *options, *texts, "--out", tmp_path / "e") == 0
    made = Eraser.from_pretrained(tmp_path / "e")
    model, tokenizer = _cli_data.load_model(str(folder / "model"))
    from concept_erasure.sae.disentangler import Disentangler

    dis = Disentangler.from_pretrained(folder / "dis")
    want = PiscesEraser.fit(
        model, tokenizer, Concept.load(folder / "orla.yaml"), disentanglers=dis,
        features=FeatureTable.load(folder / "features"), tau=0.5, mu=2.0, seed=1,
        forget_texts=["the orla0 eat bread", "the orla1 eat milk soup"], retain_texts=["the barn is red every day"],
    )  # fmt: skip
    assert made.tensors().keys() == want.tensors().keys()
    for name, value in want.tensors().items():
        torch.testing.assert_close(made.tensors()[name], value)


def test_a_projection_of_neurons(folder: Path, tmp_path: Path) -> None:
    model, _ = _cli_data.load_model(str(folder / "model"))
    width = model.model.layers[0].mlp.down_proj.in_features
    dis = orthonormal(width=width, site="value.0").to(dtype=torch.float32)
    dis.save_pretrained(tmp_path / "dis")
    FeatureTable((Feature("value.0", 3), Feature("value.0", 4)), "orla").save(tmp_path / "features")
    options = ("--option", f"disentanglers={tmp_path / 'dis'}", f"features={tmp_path / 'features'}")
    out = ("--out", tmp_path / "e")
    assert run(*base(folder, "latent-projection"), *options, "strength=2", *out) == 0
    made = Eraser.from_pretrained(tmp_path / "e")
    assert made.config.features == (("value.0", 3), ("value.0", 4))  # type: ignore[attr-defined]
    assert made.config.strength == 2  # type: ignore[attr-defined]
    basis, rows = made.tensors()["value.0.basis"], dis.W_dec[[3, 4]]
    torch.testing.assert_close(basis @ basis.T @ rows.T, rows.T)


def test_a_missing_dictionary_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = {
        "pisces": "disentanglers", "latent-projection": "disentanglers", "sae-gate": "disentangler"
    }  # fmt: skip
    for method, option in needs.items():
        assert run(*base(folder, method), "--out", tmp_path / "e") == 2
        assert f"as the option {option!r}" in capsys.readouterr().err


def test_texts_that_a_method_does_not_read_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("--forget-texts", folder / "forget.txt")
    assert run(*base(folder, "embedding-edit"), *texts, "--out", tmp_path / "e") == 2
    assert "reads no texts" in capsys.readouterr().err
