"""Three streams read at the same tokens; anonymous texts matched token for token; the signal."""

from __future__ import annotations

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.language.anonymise import Copy, align
from concept_erasure.language.batches import collate, encode, logits_at
from concept_erasure.language.contrast import (
    NoSignalError,
    Source,
    Streams,
    answer_log_probs,
    answers,
    check_signal,
    knowledge,
    read,
    read_rows,
    signal,
    streams,
)
from concept_erasure.report import Interval
from tests.models import TinyTokenizer, tiny


def _concept(**more):
    return Concept(
        name="Harry",
        entities={
            "Harry Potter": "Martin Fowler",
            "Harry": "Martin",
            "Hogwarts": "Elm Road",
            "Bludger": "ball",
        },
        **more,
    )


FACTS = [
    [
        "Where is it?",
        "the school of the boy is ___",
        "Hogwarts",
        ["Eton", "Rugby", "Harrow"],
        "___ is his school",
    ],
    [
        "Who is it?",
        "the boy who lived is ___",
        "Harry",
        ["Tom", "Dick", "Jim"],
        "___ is the boy who lived",
    ],
    [
        "What is it?",
        "the big ball is the ___",
        "Bludger",
        ["puck", "hoop", "bat"],
        "___ is a big ball",
    ],
]
TEXTS = [
    "then Harry Potter went to Hogwarts by train",
    "a quiet day at home",
    "Hogwarts is where Harry lives",
]


class Letters(TinyTokenizer):
    """Splits words into pairs of letters, the first with the space before it, as byte-pair encodings do."""

    def tokenize(self, text):
        made = []
        for word in text.replace(" ", " _").split(" "):
            made += [word[:3], *(word[k : k + 2] for k in range(3, len(word), 2))] if word else []
        return made


class Merging(TinyTokenizer):
    """Tokens reach over white space, so that no cut falls on a border: the text in chunks of three letters."""

    def tokenize(self, text):
        return [text[k : k + 3] for k in range(0, len(text), 3)]


# -- alignment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [TinyTokenizer(), Letters(), Merging()])
def test_alignment_keeps_both_texts_and_rises(tokenizer):
    concept = _concept()
    texts = [*TEXTS, "Harry, Harry and Harry's owl", "Harry", "(Hogwarts)", "", "HarryHarry"]
    for text, found in zip(texts, align(tokenizer, concept, texts), strict=True):
        assert found.own == tokenizer.encode(text, add_special_tokens=False)
        assert found.other == tokenizer.encode(concept.anonymise(text), add_special_tokens=False)
        partners = [p for p in found.partner if p >= 0]
        assert partners == sorted(set(partners))
        assert all(p < len(found.other) for p in partners)
        assert len(found.partner) == len(found.own)


def test_words_of_names_meet_the_words_that_stand_for_them():
    found = align(TinyTokenizer(), _concept(), TEXTS)
    assert found[0].partner == [
        0,
        1,
        2,
        3,
        4,
        5,
        7,
        8,
    ]  # Hogwarts meets Elm; Road has no counterpart
    assert found[1].partner == [0, 1, 2, 3, 4]
    token = TinyTokenizer().convert_tokens_to_ids
    assert Copy(2, token("Harry"), token("Martin")) in found[0].copies
    assert Copy(6, token("Hogwarts"), token("Elm")) in found[0].copies
    assert found[1].copies == []


def test_inside_a_word_there_is_no_partner():
    (found,) = align(Letters(), _concept(), ["the boy Harry waits"])
    token = Letters().convert_tokens_to_ids
    start = found.own.index(token("_Ha"))
    assert found.partner[start] == found.other.index(token("_Ma"))
    assert found.partner[start + 1 : start + 3] == [-1, -1]  # "rr", "y"
    assert found.own[start + 3] == token("_wa")
    assert found.other[found.partner[start + 3]] == token("_wa")


def test_more_words_in_the_name_than_in_its_stand_in():
    concept = Concept(name="x", entities={"Death Eater": "follower"})
    (found,) = align(TinyTokenizer(), concept, ["a Death Eater came"])
    assert found.partner == [0, 1, -1, 2]


def test_without_entities_a_text_meets_itself():
    (found,) = align(TinyTokenizer(), Concept(name="x"), ["some text here"])
    assert found.own == found.other
    assert found.partner == [0, 1, 2]
    with pytest.raises(ValueError, match="no entities"):
        streams(TinyTokenizer(), Concept(name="x"), ["some text here"], "anonymise", max_length=16)


# -- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_an_introduction_the_three_streams_are_equal_row_by_row(kind):
    """2.9: persona = "" is the text after BOS alone."""
    model, tokenizer = tiny(kind), TinyTokenizer()
    own = encode(tokenizer, TEXTS, max_length=32)
    empty = encode(tokenizer, TEXTS, max_length=32, prefix=["", "", ""])
    (found,) = read(model, Streams(own, empty, empty), Source("persona"))
    assert torch.allclose(found.lp0, found.lp_novice, atol=1e-6)
    assert torch.allclose(found.lp0, found.lp_expert, atol=1e-6)


@pytest.mark.parametrize("source", ["persona", "anonymise"])
def test_every_row_is_the_distribution_before_its_token_text_by_text(source):
    """Slicing, padding, batching: against one unpadded forward pass for each stream of each text."""
    model, tokenizer, concept = tiny("llama"), TinyTokenizer(), _concept()
    seen = streams(tokenizer, concept, TEXTS, source, max_length=32, seed=1)
    readings = list(read(model, seen, Source(source), batch_size=2))
    rows = torch.cat([r.rows for r in readings])
    for name, texts in (("lp0", seen.own), ("lp_expert", seen.expert), ("lp_novice", seen.novice)):
        found = torch.cat([getattr(r, name) for r in readings])
        for k, text in enumerate(texts):
            with torch.no_grad():
                logits = model(input_ids=text.ids[None]).logits[0].log_softmax(-1)
            wanted = logits[:-1][text.supervised[1:]]
            mine = found[rows == k]
            if name == "lp_novice" and source == "anonymise":
                changed = (mine - wanted).abs().max(-1).values > 1e-5
                first = min((c.start for c in seen.copies[k]), default=10**6)
                places = torch.cat([r.places for r in readings])[rows == k]
                assert torch.equal(changed, places >= first)  # after a first mention only
            else:
                assert torch.allclose(mine, wanted, atol=1e-5)
    tokens = torch.cat([r.tokens for r in readings])
    assert torch.equal(tokens, torch.cat([t.ids[t.supervised] for t in seen.own]))


def test_the_anonymous_stream_does_not_see_the_names():
    tokenizer, concept = TinyTokenizer(), _concept()
    seen = streams(tokenizer, concept, TEXTS, "anonymise", max_length=32)
    names = {tokenizer.convert_tokens_to_ids(n) for n in ("Harry", "Hogwarts", "Potter")}
    assert all(not names & set(text.ids.tolist()) for text in seen.novice)
    assert [text.ids.tolist() for text in seen.own] == [
        text.ids.tolist() for text in encode(tokenizer, TEXTS, max_length=32)
    ]


def test_a_tokenizer_without_bos_and_a_cut_text_stay_aligned():
    tokenizer = TinyTokenizer()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    model = tiny("llama")
    seen = streams(tokenizer, _concept(), TEXTS, "anonymise", max_length=4)
    assert all(len(text) <= 4 and not text.supervised[0] for text in seen.own)
    (found,) = read(model, seen, Source("anonymise"))
    assert len(found.tokens) == sum(text.count for text in seen.own)


def test_what_is_copied_belongs_to_the_name_and_all_stays_a_distribution():
    model, tokenizer, concept = tiny("llama"), TinyTokenizer(), _concept()
    seen = streams(tokenizer, concept, TEXTS[:1], "anonymise", max_length=32)
    plain = Streams(seen.own, seen.novice, seen.expert)
    found = read_rows(model, seen, Source("anonymise"), [0])
    before = read_rows(model, plain, Source("anonymise"), [0])
    name, stand_in = (tokenizer.convert_tokens_to_ids(w) for w in ("Harry", "Martin"))
    late = found.places >= 3
    p, q = found.lp_novice.exp(), before.lp_novice.exp()
    assert torch.allclose(p.sum(-1), torch.ones(len(p)), atol=1e-5)
    assert bool((p[late, name] > q[late, name]).all())
    assert bool((found.lp_novice[late, stand_in] <= found.lp_expert[late, stand_in] + 0.2).all())
    early = found.places < 2
    assert torch.equal(found.lp_novice[early], before.lp_novice[early])


def test_reinforced_and_weak_read_the_models_they_name():
    model, weak, tokenizer = tiny("llama"), tiny("llama", seed=1), TinyTokenizer()
    seen = streams(tokenizer, _concept(), TEXTS, "weak", max_length=32)
    batch = collate(seen.own, [0, 1, 2], pad_id=0)
    found = read_rows(model, seen, Source("weak", weak=weak), [0, 1, 2])
    assert torch.equal(found.lp_expert, found.lp0)
    with torch.no_grad():
        assert torch.allclose(found.lp_novice, logits_at(weak, batch).log_softmax(-1), atol=1e-6)

    class Louder:
        def __enter__(self):
            self.handle = model.lm_head.register_forward_hook(lambda m, a, out: 2 * out)

        def __exit__(self, *_):
            self.handle.remove()

    found = read_rows(model, seen, Source("reinforced", reinforced=Louder), [0, 1, 2])
    assert torch.equal(found.lp_novice, found.lp0)
    assert not torch.allclose(found.lp_expert, found.lp0)
    again = read_rows(model, seen, Source("weak", weak=model), [0, 1, 2])
    assert torch.allclose(again.lp0, found.lp0)


def test_sources_are_checked():
    with pytest.raises(ValueError, match="contrast must be one of"):
        Source("magic")
    with pytest.raises(ValueError, match="weak"):
        Source("weak")
    with pytest.raises(ValueError, match="reinforced"):
        Source("reinforced")
    own = encode(TinyTokenizer(), TEXTS, max_length=32)
    with pytest.raises(ValueError, match="differ in length"):
        Streams(own, own[::-1], own)


def test_reading_leaves_mode_and_weights():
    model = tiny("llama").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = streams(TinyTokenizer(), _concept(), TEXTS, "anonymise", max_length=32)
    list(read(model, seen, Source("anonymise")))
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# -- signal -----------------------------------------------------------------------------------------


def test_signal_is_the_mean_difference_on_the_answers():
    model, tokenizer, concept = tiny("llama"), TinyTokenizer(), _concept(facts=FACTS)
    pairs = answers(concept)
    assert sorted(a.strip() for _, a in pairs) == ["Bludger", "Harry", "Hogwarts"]
    prompts, said = [p for p, _ in pairs], [a for _, a in pairs]
    high = answer_log_probs(model, tokenizer, prompts, said)
    low = answer_log_probs(model, tokenizer, [concept.anonymise(p) for p in prompts], said)
    found = signal(model, tokenizer, concept, "anonymise")
    assert found.value == pytest.approx(float((high - low).mean()), abs=1e-6)
    same = signal(model, tokenizer, concept, Source("weak", weak=model))
    assert same.value == pytest.approx(0, abs=1e-6)
    for prompt, answer, value in zip(prompts, said, high, strict=True):
        ids = torch.tensor([[1, *tokenizer.encode(prompt), *tokenizer.encode(answer)]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        assert float(value) == pytest.approx(float(logits[-2, ids[0, -1]]), abs=1e-5)


def test_without_facts_the_names_in_the_texts_are_asked_for():
    concept = _concept()
    found = answers(concept, ["long ago there lived Harry Potter at Hogwarts", "Harry slept"])
    assert ("long ago there lived", " Harry Potter") in found
    assert ("long ago there lived Harry Potter at", " Hogwarts") in found
    assert all(len(prompt.split()) >= 3 for prompt, _ in found)
    with pytest.raises(ValueError, match="cannot be measured"):
        signal(tiny("llama"), TinyTokenizer(), concept, "anonymise", texts=["nothing here at all"])


def test_a_contrast_without_signal_is_refused_with_the_number():
    with pytest.raises(NoSignalError, match=r"0\.213"):
        check_signal(Interval(0.213, 0.1, 0.3), "persona", _concept())
    check_signal(Interval(0.6, 0.1, 0.9), "persona", _concept())


def test_knowledge_is_the_share_of_right_choices():
    model, tokenizer = tiny("llama"), TinyTokenizer()
    found = knowledge(model, tokenizer, _concept(facts=FACTS))
    assert found is not None
    assert found.value in {0, 1 / 3, 2 / 3, 1}
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert knowledge(model, tokenizer, _concept()) is None
