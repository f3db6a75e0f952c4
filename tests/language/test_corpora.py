"""Readers of benchmark corpora: right files whole, wrong files refused by name and line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concept_erasure.errors import FormatError
from concept_erasure.language.corpora import (
    WMDP,
    TofuItem,
    load_texts,
    load_tofu,
    load_wmdp,
    tofu_authors,
)


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def made_up(name: str, each: int = 20) -> list[dict[str, str]]:
    return [
        {"question": f"What is fact {i} about {name}?", "answer": f"{name} likes the number {i}."}
        for i in range(each)
    ]


def test_texts_come_in_order_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one  "}, "two", {"text": "é three", "doi": 1}])
    path.write_text(path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    assert load_texts(path) == ["one", "two", "é three"]
    assert load_texts(path, limit=2, max_characters=2) == ["on", "tw"]
    assert load_texts(path, min_characters=4) == ["é three"]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nnot json\n', encoding="utf-8")
    assert load_texts(path, limit=1) == ["good"]
    with pytest.raises(FormatError, match=r"a\.jsonl, line 2: .*'not json'"):
        load_texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}', "no 'text'; there are 'body'"),
        ('{"text": 3}', "must be a text; got a int"),
        ("[1, 2]", "got a list"),
        ('[{"text": "x"},\n', "one JSON list"),
        ("plain words", "one JSON object a line"),
    ],
)
def test_wrong_files_are_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        load_texts(path)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="ships no corpora"):
        load_texts(tmp_path / "absent.jsonl")
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(FormatError, match="compressed"):
        load_texts(packed)
    with pytest.raises(ValueError, match="no text of 1 characters"):
        load_texts(write(tmp_path / "empty.jsonl", []))


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ValueError, match="limit"):
        load_texts(path, limit=0)
    with pytest.raises(ValueError, match="max_characters"):
        load_texts(path, min_characters=5, max_characters=4)
    with pytest.raises(ValueError, match="limit"):
        load_tofu(path, limit=0)


@pytest.mark.parametrize("corpus", list(WMDP))
def test_wmdp_corpora_are_found_in_a_folder_or_by_file(tmp_path: Path, corpus: str) -> None:
    row = {"title": "t", "abstract": "a", "text": "harmless " * 10, "doi": "d"}
    path = write(tmp_path / WMDP[corpus].file, [row, {**row, "text": "short"}])
    expected = [("harmless " * 10).strip()]
    assert load_wmdp(tmp_path, corpus) == expected
    assert load_wmdp(path, corpus) == expected
    renamed = path.rename(tmp_path / "mine.jsonl")
    assert load_wmdp(renamed, corpus, min_characters=1) == [*expected, "short"]


def test_wmdp_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gated: ask its authors"):
        load_wmdp(tmp_path, "bio-forget")
    with pytest.raises(FileNotFoundError) as absent:
        load_wmdp(tmp_path, "cyber-forget")
    assert "gated" not in str(absent.value)
    with pytest.raises(ValueError, match="must be one of bio-forget"):
        load_wmdp(tmp_path, "chem-forget")
    path = write(tmp_path / WMDP["bio-retain"].file, ["x" * 60])
    with pytest.raises(FormatError, match="is the corpus 'bio-retain'"):
        load_wmdp(path, "cyber-retain")


def test_tofu_authors_are_found_by_their_names(tmp_path: Path) -> None:
    names = ["Ada Example", "Jo Ann Made-Up", "Li-Na Ben-Test"]
    rows = [row for name in names for row in made_up(name)]
    items = load_tofu(write(tmp_path / "forget10.json", rows))
    authors = tofu_authors(items)
    assert [one.name for one in authors] == names
    assert [item for one in authors for item in one.items] == items
    first = items[0]
    assert first.text == f"{first.prompt} {first.answer}"
    assert len(load_tofu(tmp_path / "forget10.json", limit=3)) == 3


def test_a_possessive_is_not_part_of_a_name() -> None:
    items = [TofuItem(f"What is Ada Example's fact {i}?", f"It is {i}.") for i in range(20)]
    assert tofu_authors(items)[0].name == "Ada Example"


def test_tofu_options_hold_the_answer(tmp_path: Path) -> None:
    row = {"question": "q", "option1": "a", "option2": "b", "answer": "b"}
    assert load_tofu(write(tmp_path / "world_facts.json", [row]))[0].options == ("a", "b")
    with pytest.raises(FormatError, match="'c' is not an option"):
        load_tofu(write(tmp_path / "world_facts.json", [{**row, "answer": "c"}]))


def test_tofu_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no 'answer'"):
        load_tofu(write(tmp_path / "a.json", [{"question": "q"}]))
    with pytest.raises(FormatError, match="empty"):
        load_tofu(write(tmp_path / "b.json", []))
    with pytest.raises(FormatError, match="got a str"):
        load_tofu(write(tmp_path / "c.json", ["text"]))
    with pytest.raises(FormatError, match="not 20 about each"):
        tofu_authors([TofuItem("q", "a")] * 19)
    with pytest.raises(FormatError, match="no name in common"):
        tofu_authors([TofuItem(f"q{i}", "a") for i in range(20)])


@given(st.binary(max_size=200))
def test_no_bytes_make_a_reader_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(data)
    for reader in (load_texts, load_tofu):
        try:
            reader(path)
        except (FormatError, ValueError) as error:
            assert "a.jsonl" in str(error)
