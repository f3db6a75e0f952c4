"""Concepts: round trips, facts and the items made of them, the shipped files, and refusals."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from concept_erasure.concept import Concept
from concept_erasure.concept_items import (
    FORMATS,
    Fact,
    FactSet,
    Item,
    Personas,
    Question,
    Recipe,
)
from concept_erasure.errors import FormatError

RINGS = [
    "Which planet has rings?",
    "The planet with the rings is ___",
    "Saturn",
    ["Mars", "Venus", "Mercury"],
    "___ is the planet with the rings.",
]
SIXTH = [
    "Which place has the planet with the rings?",
    "Counted from the Sun, it is number ___",
    6,
    [5, 7, 8],
    "Number ___ is its place.",
]
RED = [
    "Which planet is red?",
    "The red planet is ___",
    "Mars",
    ["Pluto", "Venus", "Mercury", "Ceres"],
    "___ is the red planet.",
]


def example() -> Concept:
    return Concept(
        name="Saturn",
        synonyms=("the ringed planet", "Saturn"),
        anchors=("a planet",),
        neighbours=("Jupiter",),
        entities=(("Saturn", "Rolf"), ("Titan", "Kim"), ("Saturn V", "a rocket")),
        personas=Personas(expert=("One who knows {concept}:",), novice=("Not {concept}:",)),
        prompts=("The planet with the rings is",),
        forget_texts=("Saturn – the sixth planet – has rings.",),
        retain_texts=("Jupiter is large.",),
        forget_recipe=Recipe(templates=("{subject} is",), samples=2),
        retain_recipe=Recipe(prompts=("Dear friend,",), templates=("On {subject}",), top_p=0.9),
        questions=(Question(question="Which has rings?", choices=("Saturn", "Mars"), answer=0),),
        facts=(Fact.from_row(RINGS), Fact.from_row(SIXTH)),
        near=(FactSet("planets", (Fact.from_row(RED),)),),
    )


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    path = tmp_path / "saturn.yaml"
    example().save(path)
    assert Concept.load(path) == example() == Concept.load(str(path))
    assert Concept.from_dict(Concept(name="x").to_dict()) == Concept(name="x")
    assert Concept(name="x").to_dict() == {"name": "x"}


def test_a_fact_is_saved_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "saturn.yaml"
    example().save(path)
    lines = [line for line in path.read_text("utf-8").splitlines() if "___" in line]
    assert len(lines) == 3
    assert all(line.lstrip().startswith("- [") and line.endswith("]") for line in lines)


def test_lists_become_tuples_and_names_are_unique() -> None:
    concept = Concept.from_dict({"name": "a", "synonyms": ["b", "a"]})
    assert concept.synonyms == ("b", "a") and concept.names == ("a", "b")
    assert hash(concept) == hash(Concept(name="a", synonyms=("b", "a")))
    assert hash(example()) == hash(example())


# ---- facts and items


def test_rendering() -> None:
    fact = Fact.from_row(RINGS)
    question, cloze, back = (fact.item(one) for one in FORMATS)
    assert question.prompt == "Question: Which planet has rings?\nAnswer:"
    assert cloze.prompt == "The planet with the rings is" and cloze.ending == ""
    assert back.prompt == "" and back.ending == " is the planet with the rings."
    assert question.right == cloze.right == back.right == "Saturn"
    assert question.choices == cloze.choices == back.choices
    assert "The planet with the rings is Saturn" in cloze.texts
    assert back.texts[back.answer] == "Saturn is the planet with the rings."
    assert question.texts[question.answer].endswith("Answer: Saturn")
    letter = "ABCD"[question.answer]
    assert question.lettered.startswith("Which planet has rings?\nA. ")
    assert f"\n{letter}. Saturn\n" in question.lettered and question.lettered.endswith("\nAnswer:")
    assert fact.statements == (
        "The planet with the rings is Saturn.",
        "Saturn is the planet with the rings.",
    )


def test_the_space_goes_with_the_choice_and_only_where_there_is_one() -> None:
    item = Item(stem="Middle-___", choices=("earth", "sea"), answer=0)
    assert item.prompt == "Middle-" and item.continuations == ("earth", "sea")
    item = Item(stem="The land is ___", choices=("flat", "wet"), answer=0)
    assert item.prompt == "The land is" and item.continuations == (" flat", " wet")
    item = Item(stem="___ is wet.", choices=("the land", "a bog"), answer=0)
    assert item.continuations == ("The land", "A bog")


def test_items_of_each_kind() -> None:
    concept = example()
    assert concept.kinds == ("concept", "near", "far", "planets")
    assert len(concept.items()) == 2
    assert len(concept.items(format="question")) == 3  # the question has no other format
    assert concept.items("near") != () and concept.items("far") == ()
    assert {one.topic for one in concept.items("planets")} == {"planets"}
    with pytest.raises(ValueError, match="kind must be one of concept, near, far, planets"):
        concept.items("stars")
    with pytest.raises(ValueError, match="format must be one of question, cloze, reversed"):
        concept.items(format="riddle")
    with pytest.raises(ValueError, match="at least 2"):
        concept.items(choices=1)


def test_two_way_and_all_ways() -> None:
    concept = example()
    assert {len(one.choices) for one in concept.items(choices=2)} == {2}
    assert {len(one.choices) for one in concept.items("near", choices=9)} == {5}


@given(seed=st.integers(0, 10**6), choices=st.integers(2, 6))
def test_items_are_fair_and_determined_by_the_seed(seed: int, choices: int) -> None:
    concept = example()
    for kind in concept.kinds:
        for format in FORMATS:
            made = concept.items(kind, format, seed, choices=choices)
            assert made == concept.items(kind, format, seed, choices=choices)
            for item in made:
                assert len(set(item.choices)) == len(item.choices) <= choices


def test_items_are_the_same_in_another_process() -> None:
    code = (
        "from concept_erasure.concept import Concept\n"
        "print(Concept.load('shakespeare').items('concept', 'cloze', 3)[:5])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Concept.load("shakespeare").items("concept", "cloze", 3)[:5])


def test_an_item_does_not_depend_on_the_others() -> None:
    one, both = example().facts[0].item(seed=5), example().items(seed=5)
    assert one.choices in {item.choices for item in both}


def test_right_answers_fall_on_all_places_alike() -> None:
    concept = Concept.load("harry_potter")
    places = [item.answer for seed in range(10) for item in concept.items(seed=seed)]
    counts = [places.count(i) for i in range(4)]
    assert min(counts) > 0.2 * len(places) and max(counts) < 0.3 * len(places)
    assert concept.items(seed=0) != concept.items(seed=1)


# ---- texts


def test_anonymise_takes_whole_words_and_the_longest_first() -> None:
    concept = example()
    text = "Saturn's Titan, Saturn V and Saturnalia; titan"
    assert concept.anonymise(text) == "Rolf's Kim, a rocket and Saturnalia; titan"
    assert concept.mentions(text) == 3
    assert Concept(name="x").anonymise("Saturn") == "Saturn"


def test_prompts_for_samples() -> None:
    concept = example()
    assert concept.sample_prompts() == (
        "The planet with the rings is",
        "Saturn is",
        "Titan is",
        "Saturn V is",
    )
    assert concept.sample_prompts("retain") == ("Dear friend,", "On Jupiter")
    with pytest.raises(ValueError, match="forget or retain"):
        concept.sample_prompts("both")
    with pytest.raises(ValueError, match="retain_recipe"):
        Concept(name="a").sample_prompts("retain")


def test_personas_are_filled() -> None:
    expert, novice = Personas().about("chess")
    assert len(expert) == len(novice) == 10 == len(set(expert)) == len(set(novice))
    assert all("chess" in one and "{" not in one for one in (*expert, *novice))


# ---- refusals


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
        ({"name": "a", "entities": ["b"]}, "pairs"),
        ({"name": "a", "entities": "b"}, "must map"),
        ({"name": "a", "entities": {"b": 1}}, "non-empty texts"),
        ({"name": "a", "entities": {"b": "c", "c": "d"}}, "'c' of 'b' holds an entity"),
        ({"name": "a", "entities": [["b", "c"], ["b", "d"]]}, "given once"),
        ({"name": "a", "personas": {"expert": []}}, "at least one expert"),
        ({"name": "a", "personas": {"novice": ["nobody"]}}, "needs {concept}"),
        ({"name": "a", "personas": "b"}, "personas has expert and novice"),
        ({"name": "a", "forget_recipe": {"templates": ["x"]}}, "needs {subject}"),
        ({"name": "a", "forget_recipe": {"samples": 0}}, "positive whole number"),
        ({"name": "a", "forget_recipe": {"top_p": 1.5}}, "at most 1"),
        ({"name": "a", "forget_recipe": {"temperature": 0}}, "positive number"),
        ({"name": "a", "forget_recipe": {"sample": 3}}, "no 'sample'"),
        ({"name": "a", "facts": RINGS}, "fact 1 .*list of five"),
        ({"name": "a", "facts": "far.yaml"}, "list of facts"),
        ({"name": "a", "near": [RINGS]}, "must map names"),
        ({"name": "a", "near": {"b": "c.yaml"}}, "near.b must be a list"),
        ({"name": "a", "near": {"b": [RINGS]}, "far": {"b": [RED]}}, "called 'b'"),
        ({"name": "a", "near": {"far": [RINGS]}}, "called 'far'"),
        ({"name": "a", "facts": [RINGS, RED, RINGS]}, "facts repeats a fact of facts: Which"),
        ({"name": "a", "facts": [RINGS], "far": {"b": [RINGS]}}, "far.b repeats a fact of facts"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Concept.from_dict(values)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "Which has rings", "must end in \\?"),
        (0, "Which planet is ___?", "no blank"),
        (0, "Is Saturn the planet with rings?", "gives the answer 'Saturn' away"),
        (1, "The planet with the rings is", "needs the blank ___ once; got it 0 times"),
        (1, "___ or ___", "got it 2 times"),
        (1, "The ___ has rings", "must end in the blank"),
        (1, "Besides saturn there is ___", "the cloze gives the answer"),
        (2, True, "quote them"),
        (2, " ", "answer must be a text"),
        (3, ["Mars", "Venus"], "at least three distractors; got 2: Mars, Venus"),
        (3, ["Mars", "Venus", "saturn"], "'saturn' is the answer"),
        (3, ["Mars", "Venus", "mars"], "'mars' is given twice"),
        (3, "Mars", "distractors must be a list"),
        (3, ["Mars", None, "Venus"], "distractors must hold non-empty texts"),
        (4, "The planet is ___.", "words must follow ___"),
        (4, "It is the planet.", "needs the blank"),
    ],
)
def test_a_bad_fact_is_named(place: int, value: object, message: str) -> None:
    row = [*RINGS]
    row[place] = value  # type: ignore[call-overload]
    with pytest.raises(FormatError, match=message) as caught:
        Concept.from_dict({"name": "a", "near": {"planets": [RED, row]}})
    assert str(caught.value).startswith(f"near.planets, fact 2 ({row[0]}): ")


# ---- files


def test_files_that_are_no_concepts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no concept 'nowhere'"):
        Concept.load("nowhere")
    for text in ("- a\n- b\n", "{a: [", "name: !!python/object:os.system {}\n"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(FormatError):
            Concept.load(path)


def test_facts_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump([RINGS]))
    (tmp_path / "a.yaml").write_text(
        "name: a\nfacts: rows.yaml\nnear: {plays: shakespeare.yaml}\nfar: shared/controls.yaml\n"
    )
    concept = Concept.load(tmp_path / "a.yaml")
    assert concept.facts == (Fact.from_row(RINGS),)
    assert concept.near[0].facts == Concept.load("shakespeare").facts
    assert concept.far == Concept.load("harry_potter").far


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("../rows.yaml", "beside this file or below"),
        ("/rows.yaml", "beside this file or below"),
        ("rows.json", "beside this file or below"),
        ("rows.yaml", "no file 'rows.yaml'"),
        ("gender.yaml", "holds no list of facts"),
        ("[[a, b]]", "a.yaml: facts, fact 1"),
    ],
)
def test_references_that_lead_nowhere(tmp_path: Path, facts: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(f"name: a\nfacts: {facts}\n")
    with pytest.raises(FormatError, match=message):
        Concept.load(tmp_path / "a.yaml")


# ---- the files that come with the library

BUILT_IN = ("gender", "harry_potter", "sentiment", "shakespeare")
LANGUAGE = ("harry_potter", "shakespeare")


@pytest.mark.parametrize("name", BUILT_IN)
def test_concepts_that_come_with_the_library(name: str) -> None:
    concept = Concept.load(name)
    for key in ("synonyms", "anchors", "neighbours", "prompts", "forget_texts", "retain_texts"):
        values = getattr(concept, key)
        assert len(values) >= 2, key
        assert len(set(values)) == len(values), key
    assert concept.items(format="question")
    assert Concept.from_dict(concept.to_dict()) == concept
    assert not set(concept.names) & set(concept.neighbours)


@pytest.mark.parametrize("name", LANGUAGE)
def test_counts(name: str) -> None:
    concept = Concept.load(name)
    assert len(concept.facts) >= 80
    assert len({fact.question for fact in concept.facts}) == len(concept.facts)
    assert sum(map(len, concept.near)) >= 50 and sum(map(len, concept.far)) >= 40
    assert len(concept.entities) >= 60 and len(concept.sample_prompts()) >= 200
    assert len(concept.sample_prompts("retain")) >= 40
    assert len(concept.forget_texts) >= 20
    if name == "harry_potter":
        assert {one.name: len(one) >= 20 for one in concept.near} == {
            "shakespeare": True, "star_wars": True, "tolkien": True,
        }  # fmt: skip
    else:
        assert [one.name for one in concept.near] == [
            "marlowe", "milton", "dickens", "greek_tragedy",
        ]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
def test_shipped_facts_are_grammatical_with_every_choice(name: str) -> None:
    concept = Concept.load(name)
    sets = (concept.facts, *(one.facts for one in (*concept.near, *concept.far)))
    for fact in (fact for facts in sets for fact in facts):
        for stem in (fact.cloze, fact.reversed):
            article = re.search(r"\b(an?) ___", stem, re.IGNORECASE)
            for choice in (fact.answer, *fact.distractors):
                vowel = choice[0].lower() in "aeiou" and choice != "unicorn"
                assert article is None or vowel == (article[1].lower() == "an"), (stem, choice)
        assert fact.reversed.endswith(".") and "  " not in "".join(fact.statements)


@pytest.mark.parametrize("name", LANGUAGE)
def test_entities_cover_the_concept_and_the_near_sets_are_not_trained_on(name: str) -> None:
    concept = Concept.load(name)
    missed = [text for text in concept.forget_texts if concept.anonymise(text) == text]
    assert len(missed) <= 16  # verses without a name
    covered = [concept.anonymise(fact.cloze) != fact.cloze for fact in concept.facts]
    assert sum(covered) >= 0.9 * len(covered)
    kept = " ".join([*concept.retain_texts, *concept.sample_prompts("retain")]).casefold()
    assert concept.mentions(kept) == 0
    for one in concept.near:
        assert one.name.replace("_", " ") not in kept


def test_loading_is_fast() -> None:
    spent = []
    for _ in range(3):
        start = time.process_time()
        Concept.load("harry_potter")
        spent.append(time.process_time() - start)
    assert min(spent) < 0.5


def test_every_built_in_concept_is_tested_and_named_in_the_error() -> None:
    folder = files("concept_erasure") / "concepts"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".yaml"))
    assert names == [f"{name}.yaml" for name in BUILT_IN]
    with pytest.raises(FileNotFoundError, match=", ".join(BUILT_IN)):
        Concept.load("gendre")


@pytest.mark.parametrize("name", ["Harry Potter", "harry-potter", " harry_potter"])
def test_names_are_read_kindly(name: str) -> None:
    assert Concept.load(name).name == "Harry Potter"


def test_a_path_outside_is_not_a_name() -> None:
    with pytest.raises(FileNotFoundError, match="no concept"):
        Concept.load("../concepts/gender")
