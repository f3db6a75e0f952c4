"""The command line on text-to-image pipelines: what it writes is what Python gives; every mistake costs one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("diffusers")

from concept_erasure import cli
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.rece import ReceEraser
from concept_erasure.diffusion.speed import SpeedEraser
from concept_erasure.diffusion.uce import UceEraser
from concept_erasure.eraser import Eraser
from concept_erasure.evals.compare_pipe import compare_pipe
from tests.diffusion.tiny import latents, tiny_sd, tiny_sdxl

Capture = pytest.CaptureFixture[str]
LISTS = ("--erase", "van gogh", "monet", "--anchor", "art")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe")
    tiny_sd().save_pretrained(path)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fails(capsys: Capture, *arguments: object, word: str) -> None:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert word in lines[0]


def same(one: Any, two: Any) -> None:
    torch.testing.assert_close(one.map.matrix, two.map.matrix, rtol=1e-5, atol=1e-6)


def test_fit_gives_what_python_gives(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    (tmp_path / "keep.txt").write_text("dog\n\ncat\n", "utf-8")
    base = ("fit", "--pipe", folder, *LISTS)
    assert run(*base, "--preserve", tmp_path / "keep.txt", "--out", tmp_path / "uce") == 0
    assert f"saved uce eraser to {tmp_path / 'uce'}" in capsys.readouterr().out
    lists: dict[str, Any] = {"erase": ["van gogh", "monet"], "anchor": ["art"]}
    expected = UceEraser.fit(tiny_sd(), **lists, preserve=["dog", "cat"])
    loaded = Eraser.from_pretrained(tmp_path / "uce")
    assert loaded.config == expected.config
    same(loaded, expected)
    options = ("--option", "lam=0.25", "rule=all", "--preset", "paper", "--option")
    assert (
        run(*base, "--option", "lam=0.25", "rounds=1", "--method", "rece", "--out", tmp_path / "r")
        == 0
    )
    same(
        Eraser.from_pretrained(tmp_path / "r"),
        ReceEraser.fit(tiny_sd(), **lists, lam=0.25, rounds=1),
    )
    assert options  # several after one --option
    speed = ("--method", "speed", "--seed", "3", "--preserve", "dog", "cat", "tree", "--rank", "3")
    assert run(*base, *speed, "--out", tmp_path / "s") == 0
    kept = ["dog", "cat", "tree"]
    same(
        Eraser.from_pretrained(tmp_path / "s"),
        SpeedEraser.fit(tiny_sd(), **lists, preserve=kept, seed=3, rank=3),
    )


@pytest.mark.parametrize("ending", [".txt", ".csv", ".json"])
def test_names_come_from_files(tmp_path: Path, folder: Path, ending: str) -> None:
    texts = {
        ".txt": "dog\ncat\n",
        ".csv": 'id,concept\n1,dog\n2,"cat"\n',
        ".json": '["dog", "cat"]',
    }
    (tmp_path / f"keep{ending}").write_text(texts[ending], "utf-8")
    keep = ("--preserve", tmp_path / f"keep{ending}", "--out", tmp_path / "e")
    assert run("fit", "--pipe", folder, *LISTS, *keep) == 0
    lists: dict[str, Any] = {"erase": ["van gogh", "monet"], "anchor": "art"}
    same(
        Eraser.from_pretrained(tmp_path / "e"),
        UceEraser.fit(tiny_sd(), **lists, preserve=["dog", "cat"]),
    )


def test_apply_writes_a_lora_that_loads(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    pytest.importorskip("peft")
    assert run("fit", "--pipe", folder, *LISTS, "--out", tmp_path / "uce") == 0
    to_lora = ("apply", "--pipe", folder, "--eraser", tmp_path / "uce", "--out")
    assert run(*to_lora, tmp_path / "uce.safetensors") == 0
    assert "load_lora_weights" in capsys.readouterr().out
    pipe, other = tiny_sd(), tiny_sd()
    prompt = "a painting by van gogh"
    with Eraser.from_pretrained(tmp_path / "uce").apply(pipe):  # type: ignore[attr-defined]
        expected = latents(pipe, prompt)
    other.load_lora_weights(tmp_path / "uce.safetensors")
    torch.testing.assert_close(latents(other, prompt), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(latents(pipe, prompt), expected, atol=1e-3)


def test_apply_writes_an_edited_pipeline(tmp_path: Path, folder: Path) -> None:
    import diffusers

    assert run("fit", "--pipe", folder, *LISTS, "--out", tmp_path / "uce") == 0
    base = ("apply", "--pipe", folder, "--eraser", tmp_path / "uce")
    assert run(*base, "--out", tmp_path / "edited") == 0
    edited = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "edited")
    pipe = tiny_sd()
    with Eraser.from_pretrained(tmp_path / "uce").apply(pipe):  # type: ignore[attr-defined]
        for text_map in text_maps(pipe):
            torch.testing.assert_close(
                module_at(edited, text_map).weight, module_at(pipe, text_map).weight
            )


def test_compare_writes_a_table_and_a_plot(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    out = ("--preserve", "dog", "cat", "--out", tmp_path / "sweep")
    methods = ("--methods", "uce, rece,speed", "--option", "speed.rank=3")
    assert run("compare", "--pipe", folder, *LISTS, *out, *methods) == 0
    shown = capsys.readouterr().out
    assert str(folder) not in shown
    names = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert names == ["compare.json", "compare.md", "compare.png"]
    rows = json.loads((tmp_path / "sweep" / "compare.json").read_text("utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["uce", "rece", "speed"]
    for row in rows:
        assert row["status"] == "measured"
        assert row["edit"] > 0
        assert 0 <= row["left (value)"] < 1.2
    assert rows[2]["left (key)"] == pytest.approx(1)  # SPEED edits values only
    assert (
        run("compare", "--pipe", folder, *LISTS, "--methods", "uce", "--out", tmp_path / "b") == 0
    )


PROJECTIONS = ("leace", "rlace", "mean-projection")


def test_projections_stand_beside_edits(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    out = ("--preserve", "dog", "cat", "tree", "--out", tmp_path / "sweep")
    methods = ",".join(("uce", "rece", "speed", "mace", "trce", *PROJECTIONS))
    own = ("--option", "speed.rank=3", "leace.affine=false")
    assert run("compare", "--pipe", folder, *LISTS, *out, "--methods", methods, *own) == 0
    rows = json.loads((tmp_path / "sweep" / "compare.json").read_text("utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["measured"] * 8
    for row in rows[-3:]:
        assert 0 < row["edit"] < 1
        assert row["certificate"] > 0  # a projection cannot be inverted


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_projection_is_measured_as_what_it_does_to_the_maps(make: Any) -> None:
    """The hook on what attention reads and the table's numbers agree, offset included."""
    from concept_erasure.diffusion.encode import TextEncoder
    from concept_erasure.diffusion.labelled import named_representations
    from concept_erasure.evals.compare_pipe import TEMPLATES
    from concept_erasure.linear.leace import LeaceEraser

    pipe = make()
    lists: dict[str, Any] = {"erase": "monet", "anchor": "art", "preserve": ["dog", "cat"]}
    (row,) = compare_pipe(pipe, ["leace"], **lists).rows
    eraser = LeaceEraser.fit(named_representations(pipe, **lists))
    assert eraser.bias is not None and isinstance(row.eraser, LeaceEraser)
    assert row.eraser.digest == eraser.digest
    encoder, maps = TextEncoder(pipe), [m for m in text_maps(pipe) if m.kind == "value"]

    def last(name: str) -> torch.Tensor:
        return torch.cat([encoder.rows(t.format(name), "last_subject")[0] for t in TEMPLATES])

    weights = [module_at(pipe, m).weight.detach().double() for m in maps]
    left = torch.cat([(eraser(last("monet")) - last("art")) @ w.T for w in weights], 1)
    away = torch.cat([(last("monet") - last("art")) @ w.T for w in weights], 1)
    assert row.erased["value"] == pytest.approx(float(left.norm() / away.norm()), rel=1e-4)


@pytest.mark.parametrize("method", PROJECTIONS)
def test_a_projection_is_fitted_saved_and_applied(
    tmp_path: Path, folder: Path, method: str
) -> None:
    import diffusers

    pytest.importorskip("peft")
    fit = ("fit", "--pipe", folder, *LISTS, "--preserve", "dog", "cat", "--method", method)
    assert run(*fit, "--out", tmp_path / "p") == 0
    pipe, prompt = tiny_sd(), "a painting by van gogh"
    plain = latents(pipe, prompt)
    with Eraser.from_pretrained(tmp_path / "p").attach(pipe):  # type: ignore[attr-defined]
        expected = latents(pipe, prompt)
    assert not torch.allclose(plain, expected, atol=1e-3)
    to = ("apply", "--pipe", folder, "--eraser", tmp_path / "p", "--out")
    assert run(*to, tmp_path / "p.safetensors") == 0
    pipe.load_lora_weights(tmp_path / "p.safetensors")
    torch.testing.assert_close(latents(pipe, prompt), expected, rtol=1e-3, atol=1e-3)
    assert run(*to, tmp_path / "edited") == 0
    edited = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "edited")
    torch.testing.assert_close(latents(edited, prompt), expected, rtol=1e-3, atol=1e-3)


# -- what is measured ---------------------------------------------------------------------------------


def test_numbers_are_those_of_the_weights(tmp_path: Path) -> None:
    """The distances, computed here from the weights before and after, for one concept without templates."""
    from concept_erasure.diffusion.encode import TextEncoder
    from concept_erasure.evals.compare_pipe import TEMPLATES

    pipe = tiny_sd()
    found = compare_pipe(pipe, ["uce"], erase="monet", anchor="art", preserve=["dog"])
    (row,) = found.rows
    eraser = UceEraser.fit(pipe, erase="monet", anchor="art", preserve=["dog"])
    encoder = TextEncoder(pipe)
    maps = text_maps(pipe)
    before = [module_at(pipe, m).weight.detach().clone() for m in maps]
    with eraser.apply(pipe):
        after = [module_at(pipe, m).weight.detach().clone() for m in maps]

    def last(name: str) -> torch.Tensor:
        return torch.cat(
            [encoder.rows(t.format(name), "last_subject")[0] for t in TEMPLATES]
        ).float()

    change = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    whole = torch.cat([b.flatten() for b in before])
    assert row.edit == pytest.approx(float(change.norm() / whole.norm()), rel=1e-4)
    values = [i for i, m in enumerate(maps) if m.kind == "value"]
    left = torch.cat([last("monet") @ after[i].T - last("art") @ before[i].T for i in values], 1)
    away = torch.cat([(last("monet") - last("art")) @ before[i].T for i in values], 1)
    assert row.erased["value"] == pytest.approx(float(left.norm() / away.norm()), rel=1e-4)
    moved = torch.cat([last("dog") @ (a - b).T for a, b in zip(after, before, strict=True)], 1)
    size = torch.cat([last("dog") @ b.T for b in before], 1)
    worst = (moved.norm(dim=1) / size.norm(dim=1)).max()
    assert row.preserved == pytest.approx(float(worst), rel=1e-4)
    assert row.certificate == pytest.approx(float(eraser.certificate.rho.min()), abs=1e-9)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_the_pipeline_is_left_alone_and_methods_are_ordered(make: Any) -> None:
    pipe = make()
    kept = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    rows = compare_pipe(
        pipe,
        ["uce", "anchored-projection"],
        erase="monet",
        anchor="art",
        preserve=["dog", "cat"],
        options={"uce": {"lam": 1e-3}},
    ).rows
    assert all(torch.equal(value, kept[name]) for name, value in pipe.unet.state_dict().items())
    uce, exact = rows
    assert uce.certificate == pytest.approx(
        0, abs=1e-6
    )  # invertible: some embedding brings it back
    assert exact.certificate is not None
    assert exact.certificate > 0
    strong = compare_pipe(pipe, ["uce"], erase="monet", anchor="art", options={"uce": {"lam": 1e3}})
    (weak,) = strong.rows
    assert weak.edit is not None
    assert uce.edit is not None
    assert weak.edit < uce.edit
    assert weak.erased["value"] > uce.erased["value"]


def test_a_method_that_refuses_is_listed(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    many = ["dog", "cat", "car", "tree", "river", "city", "garden", "horse"]
    found = compare_pipe(
        tiny_sd(),
        ["uce", "anchored-projection"],
        erase="monet",
        anchor="art",
        preserve=many,
        options={"anchored-projection": {"preserve_rule": "all"}},
    )
    assert [row.ok for row in found.rows] == [True, False]
    report = found.to_report()
    assert any(note.startswith("anchored-projection: failed: ") for note in report.notes)
    with pytest.raises(ValueError, match="no method could be measured"):
        compare_pipe(
            tiny_sd(), ["speed"], erase="monet", anchor="art", options={"speed": {"tau": -1.0}}
        )


# -- mistakes -----------------------------------------------------------------------------------------


def test_mistakes_name_the_flag(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    out = ("--out", tmp_path / "e")
    base = ("fit", "--pipe", folder, *out)
    fails(capsys, *base, word="--erase")
    fails(capsys, *base, "--erase", "a", "b", "--anchor", "c", "d", "e", word="--anchor names 3")
    fails(capsys, *base, *LISTS, "--method", "splince", word="uce")
    projection = (*base, "--erase", "monet", "--method", "leace")
    fails(capsys, *projection, word="name an anchor that is not blank")
    fails(capsys, *projection, "--preserve", "monet", "dog", word="monet")
    fails(capsys, *projection, "--anchor", "art", "--option", "rule=nosuch", word="token rule")
    fails(capsys, *projection, "--anchor", "art", "--option", "lam=1", word="no option 'lam'")
    twice = ("--batch-size", "3", "--option", "batch_size=2")
    fails(capsys, *projection, "--anchor", "art", *twice, word="'batch_size' of 'leace' is given")
    fails(capsys, *base, *LISTS, "--method", "nosuch", word="no method 'nosuch'")
    fails(capsys, *base, *LISTS, "--option", "eta=3", word="no option 'eta'; it has: ")
    fails(capsys, *base, *LISTS, "--option", "lam", word="NAME=VALUE")
    fails(capsys, *base, *LISTS, "--option", "lam=1", "lam=2", word="twice")
    fails(
        capsys,
        *base,
        *LISTS,
        "--option",
        "batch_size=2",
        "--batch-size",
        "3",
        word="'batch_size' of 'uce' is given twice",
    )
    fails(capsys, *base, *LISTS, "--seed", "1", word="no option 'seed'")
    fails(capsys, *base, *LISTS, "--preserve", tmp_path / "no.txt", word="--preserve: no such file")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n", "utf-8")
    fails(capsys, *base, *LISTS, "--preserve", tmp_path / "bad.csv", word="'concept'")
    fails(capsys, *base, *LISTS, "--preserve", "monet", word="monet")
    fails(capsys, *base, "--erase", "monet", "--anchor", "monet", word="anchor")
    fails(capsys, "fit", "--pipe", tmp_path, *LISTS, *out, word="--pipe")
    assert not (tmp_path / "e").exists()


IDLE = {
    "--labels": "y.npy",
    "--limit": 3,
    "--model": "m",
    "--sites": "mlp.1",
    "--concept": "harry_potter",
    "--steps": 3,
    "--text-column": "words",
    "--background": "True",
    "--z-kind": "classes",
    "--held-out": "x.csv",
}


@pytest.mark.parametrize("option", IDLE)
def test_options_of_others_are_refused(
    tmp_path: Path, folder: Path, capsys: Capture, option: str
) -> None:
    base = ("fit", "--pipe", folder, *LISTS, "--out", tmp_path / "e")
    fails(capsys, *base, option, IDLE[option], word=f"error: {option} is for ")


def test_options_of_pipelines_are_refused_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    for option in ("--erase", "--anchor", "--preserve", "--preset", "--concept"):
        arguments = ("fit", tmp_path / "v.npy", option, "x", "--out", tmp_path / "e")
        fails(capsys, *arguments, word=option if option != "--concept" else "SOURCE")
    fails(
        capsys, "fit", tmp_path / "v.npy", "--method", "uce", "--out", tmp_path / "e", word="--pipe"
    )
    fails(capsys, "fit", "--out", tmp_path / "e", word="nothing to work on")
    fails(capsys, "compare", "--out", tmp_path / "e", word="--pipe with --erase")
    compare = ("compare", "--vectors", tmp_path / "v.npy", "--out", tmp_path / "e")
    fails(capsys, *compare, "--erase", "x", word="--erase is for a text-to-image pipeline")


def test_apply_and_compare_mistakes(
    tmp_path: Path, folder: Path, capsys: Capture, labelled: Any
) -> None:
    from concept_erasure import LeaceEraser, OracleEraser

    LeaceEraser.fit(*labelled).save_pretrained(tmp_path / "leace")
    OracleEraser.fit(*labelled).save_pretrained(tmp_path / "oracle")
    base = ("apply", "--pipe", folder, "--eraser")
    fails(capsys, *base, tmp_path / "leace", "--out", tmp_path / "l", word="width")
    fails(
        capsys, *base, tmp_path / "oracle", "--out", tmp_path / "l", word="which no pipeline takes"
    )
    UceEraser.fit(tiny_sdxl(), erase="monet", anchor="art").save_pretrained(tmp_path / "xl")
    fails(capsys, *base, tmp_path / "xl", "--out", tmp_path / "l.safetensors", word="text encoder")
    fails(capsys, *base, tmp_path / "xl", "--out", tmp_path / "l.pt", word="--out")
    fails(capsys, *base, tmp_path / "xl", "--bias", "add", "--out", tmp_path / "l", word="--bias")
    compare = ("compare", "--pipe", folder, *LISTS, "--out", tmp_path / "c", "--methods")
    fails(capsys, *compare, "oracle", word="--method oracle is not for a text-to-image pipeline")
    fails(
        capsys, *compare, "uce", "--option", "speed.rank=1", word="'speed' is not among the methods"
    )
    fails(capsys, *compare, "uce", "--option", "rank=1", word="'uce' has no option rank")
    fails(capsys, *compare, "uce", "--fit-share", "0.1", word="--fit-share")
