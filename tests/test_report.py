"""Reports: tables, intervals, the way to disk and back, and the card of an eraser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concept_erasure.errors import FormatError
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.report import Interval, Report, erasure_card, format_cell

REPORT = Report(
    "Probes | before and after",
    [{"probe": "linear", "before": Interval(0.9, 0.8, 0.95), "after": 0.5}, {"n": 3, "x": None}],
    meta={"model": "tiny", "layers": [1, 2], "seed": 0},
    notes=["Not tried: relearning."],
    sections=[Report("Inner", [{"a|b": "c|d", "ok": True}])],
    images={"a plane": "plane.png"},
)


def test_round_trip(tmp_path: Path) -> None:
    json_path, markdown_path = REPORT.save(tmp_path / "new" / "folder")
    assert markdown_path.read_text(encoding="utf-8") == REPORT.to_markdown()
    for path in (json_path, json_path.parent):
        assert Report.load(path) == REPORT
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["report.json", "report.md"]


def test_markdown() -> None:
    text = REPORT.to_markdown()
    assert "| linear | 0.900 [0.800, 0.950] | 0.500 | - | - |" in text
    assert "c\\|d" in text
    assert "## Inner" in text
    assert "![a plane](plane.png)" in text
    assert "- layers: 1, 2" in text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (3, "3"),
        (0.0, "0.000"),
        (1e-6, "1.00e-06"),
        (float("nan"), "nan"),
    ],
)
def test_cells(cell: float | None, text: str) -> None:
    assert format_cell(cell) == text


def test_intervals() -> None:
    found = Interval.of_mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - found.value == pytest.approx(1.96 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="low <= value <= high"):
        Interval(0.5, 0.6, 0.7)
    with pytest.raises(ValueError, match="at least 2 values"):
        Interval.of_mean([1.0])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 9}'])
def test_damaged_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError):
        Report.load(path)


def test_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\.item\(\)"):
        Report("t", meta={"x": torch.zeros(2)}).to_dict()


def test_card() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    card = erasure_card(LeaceEraser.fit(x, x[:, 0] > 0))
    assert card.startswith("---\n")
    for part in ("Belrose", "Not tried", "guarded", "## Measured", "proj_left [4, 1]"):
        assert part in card
