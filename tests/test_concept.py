"""Concepts: round trips and refusals."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from concept_erasure.concept import Concept, Question
from concept_erasure.errors import FormatError


def example() -> Concept:
    return Concept(
        name="Saturn",
        synonyms=("the ringed planet", "Saturn"),
        anchors=("a planet",),
        neighbours=("Jupiter",),
        prompts=("The planet with the rings is",),
        forget_texts=("Saturn – the sixth planet – has rings.",),
        retain_texts=("Jupiter is large.",),
        questions=(Question(question="Which has rings?", choices=("Saturn", "Mars"), answer=0),),
    )


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    path = tmp_path / "saturn.yaml"
    example().save(path)
    assert Concept.load(path) == example() == Concept.load(str(path))
    assert Concept.from_dict(Concept(name="x").to_dict()) == Concept(name="x")


def test_lists_become_tuples_and_names_are_unique() -> None:
    concept = Concept.from_dict({"name": "a", "synonyms": ["b", "a"]})
    assert concept.synonyms == ("b", "a") and concept.names == ("a", "b")
    assert hash(concept) == hash(Concept(name="a", synonyms=("b", "a")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "synonym": ["b"]}, "no 'synonym'"),
        ({"synonyms": ["b"]}, "needs 'name'"),
        ({"name": " "}, "needs a name"),
        ({"name": "a", "prompts": "one"}, "prompts must be a list"),
        ({"name": "a", "prompts": [3]}, "non-empty texts"),
        ({"name": "a", "questions": "q"}, "questions must be a list"),
        ({"name": "a", "questions": ["q"]}, "question, choices and answer"),
        ({"name": "a", "questions": [{"question": "q"}]}, "needs 'choices'"),
        ({"name": "a", "questions": [{"question": "q", "choices": ["a"], "answer": 0}]}, "two"),
        (
            {"name": "a", "questions": [{"question": "q", "choices": ["a", "b"], "answer": 2}]},
            "index",
        ),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Concept.from_dict(values)


def test_files_that_are_no_concepts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no concept 'nowhere'"):
        Concept.load("nowhere")
    for text in ("- a\n- b\n", "{a: [", "name: !!python/object:os.system {}\n"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(FormatError):
            Concept.load(path)


BUILT_IN = ("gender", "harry_potter", "sentiment")


@pytest.mark.parametrize("name", BUILT_IN)
def test_concepts_that_come_with_the_library(name: str) -> None:
    concept = Concept.load(name)
    for key in ("synonyms", "anchors", "neighbours", "prompts", "forget_texts", "retain_texts"):
        values = getattr(concept, key)
        assert len(values) >= 2, key
        assert len(set(values)) == len(values), key
    assert concept.questions
    assert Concept.from_dict(concept.to_dict()) == concept
    assert not set(concept.names) & set(concept.neighbours)


def test_every_built_in_concept_is_tested_and_named_in_the_error() -> None:
    folder = files("concept_erasure") / "concepts"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.yaml" for name in BUILT_IN]
    with pytest.raises(FileNotFoundError, match=", ".join(BUILT_IN)):
        Concept.load("gendre")


@pytest.mark.parametrize("name", ["Harry Potter", "harry-potter", " harry_potter"])
def test_names_are_read_kindly(name: str) -> None:
    assert Concept.load(name).name == "Harry Potter"


def test_a_path_outside_is_not_a_name() -> None:
    with pytest.raises(FileNotFoundError, match="no concept"):
        Concept.load("../concepts/gender")
