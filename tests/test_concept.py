"""Concepts: round trips and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from concept_erasure.concept import Concept, Question
from concept_erasure.errors import FormatError


def example() -> Concept:
    return Concept(
        name="Saturn",
        synonyms=("the ringed planet", "Saturn"),
        anchors=("a planet",),
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
