"""Drawing and evaluating with the pipeline that ships: few pictures, few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import concept_erasure as ce
from concept_erasure.errors import EditError
from concept_erasure.evals.diffusion import (
    NegativePrompt,
    Row,
    Suite,
    draw_rows,
    evaluate,
    pipeline_hash,
    read_rows,
)
from concept_erasure.evals.diffusion.judges import Judge, Matcher, ZeroShotClip
from concept_erasure.evals.diffusion.suite import Reading
from concept_erasure.evals.worlds.emoji.suite import EmojiJudge, EmojiMatcher, object_suite
from concept_erasure.evals.worlds.emoji.world import EmojiWorld
from concept_erasure.report import Report

SMALL = {"guidance": 3.0, "steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def world() -> EmojiWorld:
    return EmojiWorld()


@pytest.fixture(scope="module")
def suite(world: EmojiWorld) -> Suite:
    whole = object_suite(world, ["corn"], pictures=4, each=2, steps=3)
    return replace(
        whole,
        rows=tuple(row for i, row in enumerate(whole.rows) if i in (0, 1, 4, 5, 8, 9, 12, 13)),
    )


def rows(n: int) -> list[Row]:
    names = ["corn", "cat", "pizza", "bee"]
    return [Row(prompt=f"a flat {names[i % 4]}", seed=i, **SMALL) for i in range(n)]  # type: ignore[arg-type]


def test_neither_batch_nor_order_changes_a_picture(world: EmojiWorld) -> None:
    wanted = rows(3)
    together, apart = (
        draw_rows(world.pipe, wanted),
        draw_rows(world.pipe, wanted[::-1], batch_size=1),
    )
    assert together.dtype == torch.uint8
    assert (together.int() - apart.flip(0).int()).abs().max() <= 1  # one step of rounding to bytes


def test_cached_pictures_are_found_by_what_made_them(world: EmojiWorld, tmp_path: Path) -> None:
    wanted = rows(2)
    first = draw_rows(world.pipe, wanted, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    relabelled = [replace(row, kind="kept", concept="cat", case="7") for row in wanted]
    assert torch.equal(draw_rows(world.pipe, relabelled, cache_dir=tmp_path), first)
    assert file.stat().st_mtime_ns == stamp
    eraser = ce.UceEraser.fit(world.pipe, erase=["corn"], anchor="", preserve=["cat"])
    with eraser.apply(world.pipe):
        edited = draw_rows(world.pipe, wanted[:1], cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(edited, first[:1])
    assert torch.equal(draw_rows(world.pipe, wanted, cache_dir=tmp_path), first)


def test_a_pipeline_with_hooks_has_no_hash(world: EmojiWorld) -> None:
    before = pipeline_hash(world.pipe)
    assert before is not None
    eraser = ce.UceEraser.fit(world.pipe, erase=["corn"], anchor="", preserve=["cat"])
    with eraser.apply(world.pipe, form="hook"):
        assert pipeline_hash(world.pipe) is None
    with eraser.apply(world.pipe):
        assert pipeline_hash(world.pipe) not in (None, before)
    assert pipeline_hash(world.pipe) == before


def test_evaluate_writes_a_report_and_leaves_the_pipeline_alone(
    world: EmojiWorld, suite: Suite, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    before = pipeline_hash(world.pipe)
    eraser = ce.UceEraser.fit(world.pipe, erase=["corn"], anchor="", preserve=["cat"])
    report = evaluate(world.pipe, eraser, suite, cache_dir=tmp_path / "cache", out=tmp_path)
    assert pipeline_hash(world.pipe) == before
    assert [row["pipeline"] for row in report.rows] == ["original", "edited"]
    assert {section.title for section in report.sections} == {
        "Against the original, picture by picture", "How far pictures are", "EraseEval",
    }  # fmt: skip
    assert any("No attack was run" in note for note in report.notes)
    assert Report.load(tmp_path).meta["hash"] == before
    assert (tmp_path / "pictures.png").stat().st_size > 1000
    paired = report.sections[0].rows
    assert {row["kind"] for row in paired} == set(suite.kinds)


def test_an_edit_that_changes_nothing_is_the_original(world: EmojiWorld, suite: Suite) -> None:
    class Nothing:
        def apply(self, pipe: object) -> Nothing:
            return self

        def undo(self) -> None:
            pass

    report = evaluate(world.pipe, Nothing(), suite)
    original, edited = report.rows
    assert {k: v for k, v in original.items() if k != "pipeline"} == {
        k: v for k, v in edited.items() if k != "pipeline"
    }
    assert all(row["p"] == 1 for row in report.sections[0].rows)
    assert all(row["change"] == 0 for row in report.sections[1].rows)
    precision = next(row for row in report.sections[2].rows if row["pipeline"] == "edited")
    assert precision["M3 prompts"] == precision["M4 pictures"] == 1
    with pytest.raises(EditError, match="another pipeline"):
        evaluate(world.pipe, Nothing(), suite, reference=world.pipe)


def test_a_negative_prompt_is_drawn_with_the_row(world: EmojiWorld, suite: Suite) -> None:
    plain, steered = (
        read_rows(world.pipe, suite, eraser=e) for e in (None, NegativePrompt("corn"))
    )
    assert not torch.equal(plain.images, steered.images)


def test_readings_mix_row_by_row(suite: Suite) -> None:
    noise = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    one, other = suite.read(noise), suite.read(noise.flip(0))
    half = torch.arange(8) < 4
    mixed = one.take(other, half)
    assert torch.equal(mixed.images[:4], other.images[:4])
    assert torch.equal(mixed.features[4:], one.features[4:])
    views = one.views(suite, "erased")
    assert views is not None
    assert views.shows.shape == (1, 2)
    bare = replace(one, fit=None)
    assert isinstance(bare, Reading)
    assert bare.views(suite, "erased") is None
    with pytest.raises(ValueError, match="as many pictures"):
        suite.read(noise[:2])


def test_a_suite_checks_its_rows(world: EmojiWorld, suite: Suite) -> None:
    with pytest.raises(ValueError, match="at least one 'erased'"):
        replace(suite, rows=tuple(row for row in suite.rows if row.kind == "kept"))
    with pytest.raises(ValueError, match="has no label unicorn"):
        replace(suite, targets=("unicorn",))
    with pytest.raises(ValueError, match="all of one size"):
        draw_rows(world.pipe, [suite.rows[0], replace(suite.rows[1], height=64)])


def test_a_zero_shot_judge_of_any_matcher(world: EmojiWorld) -> None:
    matcher = EmojiMatcher(world.clip)
    assert isinstance(matcher, Matcher)
    assert isinstance(EmojiJudge(world.classifier), Judge)
    judge = ZeroShotClip(matcher, ["banana", "pizza", "cat"], template="a picture of a {}")
    assert isinstance(judge, Judge)
    names = [one.name for one in world.objects]
    from concept_erasure.evals.worlds.emoji.render import render

    obj = torch.tensor([names.index(label) for label in judge.labels])
    flat = torch.zeros(3, dtype=torch.long)
    pictures = render(world.sprites, obj, flat, flat, generator=torch.Generator().manual_seed(0))
    seen = judge.probabilities(((pictures + 1) * 127.5).round().to(torch.uint8))
    assert seen.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(seen.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match="at least 2 labels"):
        ZeroShotClip(matcher, ["banana"])
