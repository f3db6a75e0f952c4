"""The expander of concept lists: files, functions, conflicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from concept_erasure.diffusion.crce import ConceptSpec, expand, load_specs
from concept_erasure.errors import FormatError

VALUES = [
    {
        "target": "tabby cat",
        "anchor": "an animal",
        "corefs": ["house cat", "kitty"],
        "retains": ["lion", "dog"],
        "weights": [0.8, 0.25],
    },
    {"target": "violin", "corefs": ["fiddle"], "retains": ["cello", "dog"]},
]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_files(tmp_path: Path, suffix: str, as_mapping: bool) -> None:
    values: object = VALUES
    if as_mapping:
        values = {v["target"]: {k: x for k, x in v.items() if k != "target"} for v in VALUES}
    path = tmp_path / f"list{suffix}"
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values))
    found = expand(["tabby cat", "Violin"], path, anchor="a thing", coref_weight=0.5)
    assert found.erase == ("tabby cat", "violin", "house cat", "kitty", "fiddle")
    assert found.anchor == ("an animal", "a thing", "an animal", "an animal", "a thing")
    assert found.erase_weight == (1.0, 1.0, 0.8, 0.25, 0.5)
    assert found.preserve == ("lion", "dog", "cello")
    assert expand(["tabby cat", "violin"], load_specs(path), anchor="a thing") == found


def test_function_and_single_target() -> None:
    asked: list[str] = []

    def source(name: str) -> tuple[list[str], list[str]]:
        asked.append(name)
        return [f"little {name}"], [f"not {name}"]

    found = expand("cat", source, coref_weight=1.0)
    assert asked == ["cat"]
    assert (found.erase, found.anchor) == (("cat", "little cat"), ("", ""))
    assert (found.erase_weight, found.preserve) == ((1.0, 1.0), ("not cat",))


def test_a_coref_that_is_a_target_keeps_full_weight() -> None:
    specs = {
        "cat": ConceptSpec(target="cat", corefs=("Kitty",), weights=(0.1,)),
        "kitty": ConceptSpec(target="kitty", anchor="a pet"),
    }
    found = expand(["cat", "kitty"], specs)
    assert found.erase == ("cat", "kitty")
    assert found.erase_weight == (1.0, 1.0)
    assert found.anchor == ("", "a pet")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target": " "}, "must be a name"),
        ({"target": "a", "corefs": "b"}, "list of names"),
        ({"target": "a", "corefs": ["b", "B"]}, "twice"),
        ({"target": "a", "corefs": ["A"]}, "target itself"),
        ({"target": "a", "corefs": ["b"], "retains": ["B "]}, "erased and to be retained"),
        ({"target": "a", "corefs": ["b"], "weights": [0.5, 0.5]}, "1 corefs and 2 weights"),
        ({"target": "a", "corefs": ["b"], "weights": [0.0]}, r"\(0, 1\]"),
        ({"target": "a", "corefs": ["b"], "weights": [True]}, r"\(0, 1\]"),
        ({"target": "a", "retain": ["b"]}, "has no 'retain'"),
        ({"corefs": ["b"]}, "needs 'target'"),
        ({"target": "a", "anchor": 3}, "anchor"),
    ],
)
def test_bad_specs(values: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        ConceptSpec.from_dict(values)


def test_bad_calls(tmp_path: Path) -> None:
    specs = {
        "a": ConceptSpec(target="a", retains=("b",)),
        "b": ConceptSpec(target="b"),
    }
    with pytest.raises(FormatError, match="'b' is to be erased for one concept and retained"):
        expand(["a", "b"], specs)
    with pytest.raises(KeyError, match="no concept 'c'; there are a, b"):
        expand("c", specs)
    with pytest.raises(ValueError, match="at least one"):
        expand([], specs)
    with pytest.raises(ValueError, match="coref_weight"):
        expand("a", specs, coref_weight=2.0)
    with pytest.raises(FormatError, match="is the anchor"):
        expand("a", specs, anchor="A")
    with pytest.raises(FormatError, match="must return"):
        expand("a", lambda name: [name])  # type: ignore[arg-type,return-value]
    (tmp_path / "bad.yaml").write_text("just words")
    with pytest.raises(FormatError, match="must hold concepts"):
        load_specs(tmp_path / "bad.yaml")
    (tmp_path / "twice.json").write_text(json.dumps([{"target": "a"}, {"target": "A"}]))
    with pytest.raises(FormatError, match="twice"):
        load_specs(tmp_path / "twice.json")
    with pytest.raises(FileNotFoundError):
        load_specs(tmp_path / "none.yaml")


def test_an_eraser_takes_the_lists() -> None:
    pytest.importorskip("diffusers")
    from concept_erasure.diffusion.uce import UceEraser  # noqa: PLC0415 needs diffusers
    from tests.diffusion.tiny import tiny_sd  # noqa: PLC0415

    spec = ConceptSpec(target="cat", anchor="dog", corefs=("van gogh",), retains=("horse",))
    e = expand("cat", {"cat": spec}, coref_weight=0.25)
    eraser = UceEraser.fit(
        tiny_sd(),
        erase=e.erase,
        anchor=e.anchor,
        erase_weight=e.erase_weight,
        preserve=e.preserve,
    )
    assert eraser.concepts == ("cat", "van gogh") and eraser.options.anchors == ("dog", "dog")
    assert eraser.slack is not None and eraser.slack.tolist() == [1.0, 4.0]
