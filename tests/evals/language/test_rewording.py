"""Other wordings ask the same, examples give nothing away, and all forms of a fact are compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.concept_items import BLANK, FORMATS, Item
from concept_erasure.evals.language.items import item_scores
from concept_erasure.evals.language.rewording import (
    WORDINGS,
    few_shot,
    paraphrase,
    rewording,
    ripple,
    ripple_forms,
    translated,
)
from concept_erasure.evals.language.statistics import paired
from concept_erasure.report import Report
from tests.models import TinyTokenizer, tiny


def fact(i: int) -> list[object]:
    wrong = [f"wrong{i}{letter}" for letter in "abc"]
    return [
        f"What colour is thing{i}?",
        f"thing{i} has the colour {BLANK}",
        f"right{i}",
        wrong,
        f"{BLANK} colours thing{i}.",
    ]


CONCEPT = Concept(
    name="things",
    facts=[fact(i) for i in range(20, 26)],  # type: ignore[arg-type]
    far={"others": [fact(i) for i in range(10, 18)]},  # type: ignore[arg-type]
)
ITEMS = {kind: [one.item(kind) for one in CONCEPT.facts] for kind in FORMATS}
POOL = {kind: [one.item(kind) for one in CONCEPT.far[0].facts] for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_wording_asks_the_same(kind: str) -> None:
    count = len(WORDINGS[kind])
    made = paraphrase(ITEMS[kind], count=count, seed=1)
    for k, old in enumerate(ITEMS[kind]):
        new = [row[k] for row in made]
        assert len({one.stem for one in new}) == count
        for one in new:
            assert one.stem != old.stem
            assert (one.choices, one.answer, one.format) == (old.choices, old.answer, old.format)
            core = old.stem.partition(BLANK)[0] if kind == "cloze" else old.stem
            assert core.strip() in one.texts[one.answer] or kind == "reversed"
            assert one.stem.count(BLANK) <= 1
            for text, choice in zip(one.texts, one.choices, strict=True):
                assert choice.lower() in text.lower()
            assert not one.prompt.endswith(" ")
            if kind == "reversed":
                assert one.ending == old.ending
            elif BLANK in one.stem:
                assert one.stem.endswith(BLANK)
    item_scores(
        tiny("llama"), TinyTokenizer(), made[0], how="answer" if kind == "question" else "cloze"
    )


def test_no_wording_helps_with_the_answer() -> None:
    for pool in WORDINGS.values():
        assert len(set(pool)) == len(pool) >= 8
        assert all("{stem}" in wording for wording in pool)


def test_own_wordings() -> None:
    (made,) = paraphrase(ITEMS["question"], count=1, wordings=["Wie? {stem}"])
    assert made[0].stem == f"Wie? {ITEMS['question'][0].stem}"
    with pytest.raises(ValueError, match="needs {stem}"):
        paraphrase(ITEMS["question"], wordings=["Wie?"])
    with pytest.raises(ValueError, match="there are 8 wordings"):
        paraphrase(ITEMS["question"], count=9)
    with pytest.raises(ValueError, match="no second blank"):
        paraphrase(ITEMS["cloze"], count=1, wordings=[f"{BLANK} says {{stem}}"])


@pytest.mark.parametrize("kind", FORMATS)
def test_examples_are_solved_and_give_nothing_away(kind: str) -> None:
    pool = [*POOL[kind], *ITEMS[kind]]
    made = few_shot(ITEMS[kind], pool, shots=4, seed=2)
    for one, old in zip(made, ITEMS[kind], strict=True):
        assert one.stem.count(BLANK) == 1
        assert old.right not in one.stem
        assert (one.choices, one.answer, one.format) == (old.choices, old.answer, old.format)
        solved = [p for p in pool if p.stem != old.stem and p.right in one.stem]
        assert len(solved) == 4
        for text, choice in zip(one.texts, one.choices, strict=True):
            assert choice in text
            assert text.count("\n\n") == 4
        # the item comes last, in the form of the examples
        last = one.texts[one.answer].split("\n\n")[-1]
        first = one.texts[one.answer].split("\n\n")[0]
        assert last.split()[0] == first.split()[0]
        assert last.split()[0] in {"Question:", "Statement:"}
    assert few_shot(ITEMS[kind], pool, shots=4, seed=2) == made
    assert few_shot(ITEMS[kind], pool, shots=4, seed=3) != made


def test_a_question_with_examples_reads_like_the_examples() -> None:
    one = few_shot(ITEMS["question"][:1], POOL["question"][:2], shots=1)[0]
    before, asked = one.texts[one.answer].split("\n\n")
    assert asked == f"Question: What colour is thing20?\nAnswer: {one.right}"
    assert before.startswith("Question: What colour is thing1")
    assert before.splitlines()[1].startswith("Answer: right1")


def test_examples_with_letters() -> None:
    one = few_shot(ITEMS["question"][:1], POOL["question"], shots=2, letters=True)[0]
    parts = one.lettered.split("\n\n")
    assert len(parts) == 3
    for part in parts[:2]:
        letter = part[-1]
        assert part.splitlines()[-1] == f"Answer: {letter}"
        chosen = next(line for line in part.splitlines() if line.startswith(f"{letter}. "))
        assert chosen.startswith(f"{letter}. right")
    assert parts[2].endswith("Answer:")


def test_too_few_examples() -> None:
    with pytest.raises(ValueError, match="3 examples of the format 'cloze'"):
        few_shot(ITEMS["cloze"], POOL["question"], shots=3)
    with pytest.raises(ValueError, match="shots must be"):
        few_shot(ITEMS["cloze"], POOL["cloze"], shots=0)


def test_translations_come_from_the_caller() -> None:
    stem = ITEMS["cloze"][0].stem
    made = translated(
        ITEMS["cloze"], {stem: f"die Farbe von Ding0 ist {BLANK}"}, {"right20": "richtig0"}
    )
    assert len(made) == 1
    assert made[0].right == "richtig0"
    with pytest.raises(ValueError, match="must stand in"):
        translated(ITEMS["cloze"], {stem: "die Farbe von Ding0"})
    with pytest.raises(ValueError, match="must stand in"):
        translated(ITEMS["cloze"], {stem: f"{BLANK} ist die Farbe"})
    with pytest.raises(ValueError, match="have become one"):
        translated(ITEMS["cloze"], {stem: stem}, {"right20": "wrong20a"})
    with pytest.raises(ValueError, match="none of the items"):
        translated(ITEMS["cloze"], {"another": f"x {BLANK}"})


def test_all_forms_of_a_fact_are_compared() -> None:
    entailed = [Item(stem="Is thing20 coloured?", choices=("yes", "no"), answer=0)]
    forms = ripple_forms(CONCEPT, wordings=2, shots=3, entailed=entailed)
    assert len(forms) == 3 * (1 + 2 + 1) + 1
    model, tokenizer = tiny("llama"), TinyTokenizer()
    model.config.max_position_embeddings = 512
    found = ripple(model, tokenizer, forms, seed=0)
    assert len(found.aligned) == 12
    assert found.any_form is not None
    assert found.all_forms is not None
    values = [found.accuracy[name].value for name in found.aligned]
    assert found.any_form.value >= max(values)
    assert found.all_forms.value <= min(values)
    assert found.any_form_chance == pytest.approx(1 - 0.75**12)
    right = torch.stack(
        [
            item_scores(
                model,
                tokenizer,
                forms[name],
                how="answer" if name.startswith("question") else "cloze",
            ).correct
            for name in found.aligned
        ]
    )
    assert found.any_form.value == pytest.approx(float(right.any(0).double().mean()))
    assert found.chance["entailed"] == 0.5
    report = Report("ripple", found.rows(), {"ripple": found.to_dict()})
    assert len(report.to_dict()["rows"]) == 15  # type: ignore[arg-type]
    assert "in any form" in repr(found)
    assert set(found.gains) == set(found.aligned) - set(FORMATS)
    gain = found.gains["cloze, reworded 1"]
    change = found.accuracy["cloze, reworded 1"].value - found.accuracy["cloze"].value
    assert gain.difference.value == pytest.approx(change)
    assert found.accuracy[found.worst].value == max(one.value for one in found.accuracy.values())


def test_a_form_that_gets_more_out_is_seen() -> None:
    """Planted: a model that knows the answers only behind one wording."""
    forms = {"plain": ITEMS["cloze"] * 3, "other": [*ITEMS["cloze"]] * 3}
    found = ripple(tiny("llama"), TinyTokenizer(), forms)
    assert not found.broke  # the same wording twice
    better = replace(found, gains={"other": paired([False] * 18, [True] * 9 + [False] * 9)})
    assert better.broke
    many = {f"form {i}": paired([False] * 18, [True] * 6 + [False] * 12) for i in range(40)}
    assert not replace(found, gains=many).broke  # one in forty at p = 0.03 is chance
    worse = replace(found, gains={"other": paired([True] * 18, [False] * 18)})
    assert not worse.broke


def test_a_limit_draws_facts_and_all_forms_keep_to_them() -> None:
    forms = ripple_forms(CONCEPT, limit=3, wordings=1, shots=1, seed=4)
    rights = {tuple(item.right for item in items) for items in forms.values()}
    assert len(rights) == 1
    assert len(rights.pop()) == 3
    with pytest.raises(ValueError, match="limit must be"):
        ripple_forms(CONCEPT, limit=0)
    found = rewording(tiny("llama"), TinyTokenizer(), CONCEPT, limit=2, wordings=1, shots=0)
    assert found.budget == "6 forms of 2 items at most"


def test_a_shipped_concept_has_all_forms() -> None:
    forms = ripple_forms(Concept.load("harry_potter"), wordings=1, shots=2)
    assert len({len(items) for items in forms.values()}) == 1
    assert len(forms) == 9


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="no forms"):
        ripple(model, tokenizer, {})
    with pytest.raises(ValueError, match="'empty' has no items"):
        ripple(model, tokenizer, {"empty": []})
    with pytest.raises(ValueError, match="no facts"):
        ripple_forms(Concept(name="nothing"))
    with pytest.raises(ValueError, match="there already"):
        ripple_forms(CONCEPT, others={"cloze": ITEMS["cloze"]})
