"""The report and the picture say what the search measured, and can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from concept_erasure.report import Report
from concept_erasure.sae.feature_report import describe, plot_table, table_report, write_report
from concept_erasure.sae.search import Feature, FeatureTable

SCORES = {
    "lens": 0.5, "contrast": 0.02, "ratio": 9.0, "attribution": 0.11, "attribution_near": 0.0, "rate_concept": 0.021,
    "rate_near": 0.001, "effect": -0.25, "effect_near": 0.01, "kl": 0.002, "total": 0.8,
}  # fmt: skip
EVIDENCE = {
    "votes": 3,
    "voters": ["lens", "contrast", "attribution"],
    "top_tokens": [" Potter", " wand", "`", "\n", "a|b"],
    "bottom_tokens": [" the"],
    "examples": {
        "concept": {"code": 3.25, "text": "the wizard[[ Harry]] Potter"},
        "near": {"code": 0.5, "text": "the king[[ Arthur]] slept"},
    },
}
ONE = Feature("mlp.9", 1203, 1, SCORES, EVIDENCE, 0)
LOST = Feature("mlp.9", 7, -1, SCORES, {**EVIDENCE, "dropped": "refused by the judge"}, 1)
TABLE = FeatureTable(
    (ONE, replace(ONE, index=5, direction=-1)), "Harry Potter", (LOST,), meta={"seed": 3}
)


def test_a_feature_is_described_in_full() -> None:
    text = describe(ONE)
    for part in (
        "- Writes most: ` Potter` ` wand` `'` `\\n` `a\\|b`",
        "- Writes least: ` the`",
        "- Votes: lens, contrast, attribution",
        "- Fires on 2.10% of the concept, 0.10% of its neighbours",
        "the concept's tokens -0.25, the neighbours' tokens +0.01, divergence on neutral text +0.002",
        "- Fires most on the concept (3.25): `the wizard[[ Harry]] Potter`",
        "- Fires most on its neighbours (0.5): `the king[[ Arthur]] slept`",
    ):
        assert part in text
    assert "Dropped" not in text and "- Dropped: refused by the judge" in describe(LOST)
    assert describe(Feature("mlp.1", 2)) == ""


def test_the_report_has_a_row_and_a_section_a_feature() -> None:
    report = TABLE.to_report()
    assert [row["feature"] for row in report.rows] == ["mlp.9/1203+", "mlp.9/5-"]
    first = report.rows[0]
    assert (first["writes"], first["level"], first["votes"], first["lens"]) == (1, 0, 3, 0.5)
    assert (first["alone: concept"], first["alone: KL"]) == (-0.25, 0.002)
    assert first["fires on the concept"] == 0.021
    titles = [section.title for section in report.sections]
    assert titles == ["mlp.9/1203+", "mlp.9/5-", "Candidates that were dropped"]
    assert report.sections[-1].rows[0]["dropped"] == "refused by the judge"
    assert "they are no test" in report.to_markdown() and report.meta["seed"] == 3


def test_an_empty_table_says_so() -> None:
    empty = FeatureTable((), "Harry Potter", (LOST,))
    assert "No feature passed" in table_report(empty).to_markdown()
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.plot("never.png")


def test_files_are_written(tmp_path: Path) -> None:
    folder = write_report(TABLE, tmp_path / "out")
    assert {one.name for one in folder.iterdir()} == {
        "features.json", "features.png", "rates.safetensors", "report.json", "report.md",
    }  # fmt: skip
    assert "](features.png)" in (folder / "report.md").read_text()
    assert Report.load(folder).rows[0]["feature"] == "mlp.9/1203+"
    assert FeatureTable.load(folder)[0].evidence["examples"] == EVIDENCE["examples"]
    empty = write_report(FeatureTable((), "x"), tmp_path / "empty")
    assert not (empty / "features.png").exists()


def test_the_picture_is_drawn_with_and_without_effects(tmp_path: Path) -> None:
    bare = {k: v for k, v in SCORES.items() if k.startswith("rate_")}
    many = FeatureTable(tuple(replace(ONE, index=i, scores=bare) for i in range(60)))
    for name, table in (("few.png", TABLE), ("many.svg", many)):
        path = plot_table(table, tmp_path / "sub" / name)
        assert path.stat().st_size > 2000
