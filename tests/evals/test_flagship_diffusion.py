"""The study of erased pictures, in very small: cells are kept, tables hold what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from concept_erasure.evals.demo_diffusion import run
from concept_erasure.evals.diffusion import generate
from concept_erasure.evals.diffusion._methods import (
    METHODS,
    Fitted,
    Lists,
    object_lists,
    style_lists,
)
from concept_erasure.evals.diffusion.evaluate import NegativePrompt
from concept_erasure.evals.flagship_diffusion import (
    Sizes,
    Study,
    mixtures,
    run_study,
    save,
    spearman,
)
from concept_erasure.evals.worlds.emoji.sprites import load_objects
from concept_erasure.report import Report


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, Sizes(pictures=2, steps=6))


def test_cells_are_measured_once(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = run_study(study, settings=["one object"], methods=["negative prompt"], seeds=[0])
    rows = report.sections[0].rows
    assert [row["method"] for row in rows if row["method"] != "never knew"] == [
        "original",
        "negative prompt",
    ]
    assert {"erased", "synonym", "neighbour", "kept"} <= set(rows[0])
    assert rows[0]["stays, of the original"] == 1
    save(report, tmp_path / "out")
    assert Report.load(tmp_path / "out" / "diffusion.json").sections[0].rows == rows
    assert (tmp_path / "out" / "diffusion.png").is_file()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    # pictures of the references are read from the cache; nothing may be drawn
    monkeypatch.setattr(generate, "_draw", never)
    again = Study(study.cache, study.sizes)
    cell = again.cell("one object", "negative prompt", 0)
    assert again.has("one object", "negative prompt", cell["seed"])
    kept = run_study(
        again,
        settings=["one object"],
        methods=["negative prompt", "uce"],
        seeds=[0, 1],
        finished=True,
    )
    assert [row["method"] for row in kept.sections[0].rows] == [row["method"] for row in rows]
    assert cell["status"] == "measured"


def test_a_method_that_refuses_is_listed_with_its_reason(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pipe: object, lists: Lists) -> Fitted:
        raise ValueError("too many concepts")

    monkeypatch.setitem(METHODS, "uce", refuse)
    report = run_study(study, settings=["one object"], methods=["uce"], seeds=[0])
    assert "uce: refused: too many concepts." in report.sections[0].notes


def test_lists_of_objects_and_styles() -> None:
    objects = load_objects()
    lists = object_lists(objects, ["corn", "bee"])
    assert set(lists.names) == {"bee", "honeybee", "corn", "ear of maize"}
    assert len(lists.prompts) == len(lists.anchors) == len(lists.prompt_concepts())
    assert not set(lists.names) & set(lists.kept)
    gone = [p for p, n in zip(lists.prompts, lists.prompt_concepts(), strict=True) if n == 0]
    assert all("bee" in prompt for prompt in gone)
    assert set(lists.neutral_anchors) == {one.format(lists.neutral) for one in lists.templates}
    assert len(lists.neutral_anchors) == len(lists.prompts)
    style = style_lists(objects, "sketch")
    assert style.neutral_anchors == style.anchors
    assert len(style.prompts) == len(style.anchors)
    assert all("sketch" in prompt for prompt in style.prompts)
    assert not any("sketch" in prompt for prompt in (*style.kept_prompts, *style.anchors))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rlace"])
def test_every_method_fits_one_object(study: Study, method: str) -> None:
    objects = object_lists(load_objects(), ["corn"])
    fitted = METHODS[method](study.world.pipe, objects)
    if isinstance(fitted.eraser, NegativePrompt):
        assert "ear of maize" in fitted.eraser.text
        return
    encoder = study.world.pipe.text_encoder
    before = [w.clone() for w in (*encoder.parameters(), *study.world.pipe.unet.parameters())]
    edit = fitted.eraser.apply(study.world.pipe, **fitted.apply)  # type: ignore[call-arg]
    edit.undo()
    after = (*encoder.parameters(), *study.world.pipe.unet.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("targets", [["corn"], ["corn", "bee", "sailboat", "cake", "whale"]])
def test_balanced_weights_do_not_depend_on_the_number_of_targets(
    study: Study, targets: list[str]
) -> None:
    lists = object_lists(load_objects(), targets)
    uce, mace = (
        METHODS[name](study.world.pipe, lists).eraser.parts[1].eraser.config  # type: ignore[union-attr]
        for name in ("leace and uce, balanced", "leace and mace, balanced")
    )
    kept = uce.preserve_weight * len(lists.kept_prompts)
    assert kept / (uce.erase_weight * len(uce.concepts)) == pytest.approx(2)
    assert uce.anchors == lists.neutral_anchors
    assert mace.preserve_weight / len(lists.prompts) == 15  # positions after the first
    assert set(mace.anchors) == {"thing"}


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 1, 2, 3]) == pytest.approx(0.9486832980505138)
    with pytest.raises(ValueError, match="at least three pairs"):
        spearman([1, 2], [1, 2])


def test_mixtures_without_a_twin_are_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="no twin"):
        mixtures(study, "five objects")


def test_the_demo_refuses_an_unknown_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        run(tmp_path, method="magic")


@pytest.mark.slow
def test_the_demo_writes_both_parts(tmp_path: Path) -> None:
    report = run(tmp_path, pictures=2, steps=2, progress=False)
    assert [len(section.rows) >= 2 for section in report.sections] == [True, True]
    assert (tmp_path / "diffusion" / "corn" / "pictures.png").is_file()
    assert (tmp_path / "diffusion" / "report.md").is_file()
