"""Guided text: all streams read the prompt; only deflection and continuation are supervised."""

from __future__ import annotations

import re

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.language._texts import own_samples
from concept_erasure.language.batches import collate
from concept_erasure.language.fluency import DEFLECTIONS, fluency_texts, guided_samples
from concept_erasure.language.likelihood import token_nll
from tests.models import TinyTokenizer, tiny

PROMPTS = ["the owl of harry", "a castle in the north with seven towers", "rain"]
EXPERTS = [f"an expert says {p}" for p in PROMPTS]
NOVICES = [f"one who has no idea at all says {p}" for p in PROMPTS]


def _guided(gamma, model=None, *, experts=EXPERTS, novices=NOVICES, seed=0, batch_size=8, new=6):
    return guided_samples(
        model or tiny("llama"),
        TinyTokenizer(),
        PROMPTS,
        experts,
        novices,
        gamma=gamma,
        max_new_tokens=new,
        seed=seed,
        temperature=1e-4,
        batch_size=batch_size,
    )


def _greedy(model, prompt, expert, novice, gamma, new):
    """One token at a time, three whole forward passes each, no cache and no padding."""
    streams = [[1, *TinyTokenizer().encode(t)] for t in (prompt, novice, expert)]
    made = []
    for _ in range(new):
        with torch.no_grad():
            own, nov, exp = (
                model(input_ids=torch.tensor([s + made])).logits[0, -1].log_softmax(-1)
                for s in streams
            )
        made.append(int((own + gamma * (nov - exp)).argmax()))
        if made[-1] == 2:
            return made[:-1]
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("gamma", [3.0, -3.0])
def test_padding_and_cache_change_nothing_and_every_stream_sees_its_prompt(kind, gamma):
    """2.7.5: the personas must read the prompt, not the new tokens alone."""
    model = tiny(kind)
    found = _guided(gamma, model)
    wanted = [
        _greedy(model, p, e, n, gamma, 6) for p, e, n in zip(PROMPTS, EXPERTS, NOVICES, strict=True)
    ]
    assert found == wanted
    assert _guided(gamma, model, batch_size=2) == wanted


def test_the_prompt_inside_the_personas_matters():
    blind = ["an expert says", *EXPERTS[1:]], ["one who has no idea at all says", *NOVICES[1:]]
    seen, unseen = _guided(3.0), _guided(3.0, experts=blind[0], novices=blind[1])
    assert seen[0] != unseen[0]
    assert seen[1:] == unseen[1:]


def test_without_guidance_or_contrast_it_is_the_model_itself():
    model = tiny("llama")
    same = _guided(5.0, model, experts=NOVICES)
    assert same == _guided(0.0, model)
    plain = own_samples(
        model, TinyTokenizer(), PROMPTS, n=3, max_new_tokens=6, seed=0, temperature=0
    )
    tokenizer = TinyTokenizer()
    assert [len(text.split()) for text in plain] == [
        len(tokenizer.tokenize(p)) + len(new) for p, new in zip(PROMPTS, same, strict=True)
    ]


def test_the_seed_decides():
    def draw(seed):
        return guided_samples(
            tiny("llama"), TinyTokenizer(), PROMPTS, EXPERTS, NOVICES, max_new_tokens=6, seed=seed
        )

    state = torch.random.get_rng_state()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="as many"):
        guided_samples(tiny("llama"), TinyTokenizer(), PROMPTS, EXPERTS[:2], NOVICES)


def test_deflections_are_twenty_and_say_nothing_of_any_concept():
    assert len(set(DEFLECTIONS)) == 20
    concept = Concept.load("harry_potter")
    for one in DEFLECTIONS:
        assert re.match(r"^[A-Z].*[.?]$", one)
        assert concept.mentions(one) == 0


TEXTS = ["harry lives in a cupboard under the stairs and has an owl", "the castle has four houses"]


@pytest.mark.parametrize("source", ["persona", "anonymise"])
def test_only_deflection_and_continuation_count(source):
    """2.9: the loss is the hand-computed NLL, and prompt labels change nothing."""
    model, tokenizer = tiny("llama"), TinyTokenizer()
    concept = Concept(name="harry", entities={"harry": "tom"})
    made = fluency_texts(
        model,
        tokenizer,
        concept,
        TEXTS,
        source,
        n=4,
        max_length=60,
        characters=(12, 30),
        max_new_tokens=8,
    )
    assert len(made) == 4
    openings = [tokenizer.encode(d)[:3] for d in DEFLECTIONS]
    for text in made:
        start = int(text.supervised.nonzero()[0])
        assert text.supervised.tolist() == [k >= start for k in range(len(text))]
        assert text.ids[start : start + 3].tolist() in openings
        words = text.ids[1 : start - 1].tolist()  # the last has a full stop
        assert any(tokenizer.encode(t)[: len(words)] == words for t in TEXTS)
    batch = collate(made, range(4), pad_id=0)
    found = batch.per_sequence(token_nll(model, batch))
    for k, text in enumerate(made):
        with torch.no_grad():
            lp = model(input_ids=text.ids[None]).logits[0].log_softmax(-1)
        wanted = -sum(float(lp[i - 1, text.ids[i]]) for i in range(len(text)) if text.supervised[i])
        assert float(found[k].detach()) == pytest.approx(wanted, abs=1e-3)


def test_prompts_that_leave_no_room_are_refused():
    concept = Concept(name="harry", entities={"harry": "tom"})
    with pytest.raises(ValueError, match="max_length=3"):
        fluency_texts(
            tiny("llama"),
            TinyTokenizer(),
            concept,
            TEXTS,
            "anonymise",
            n=2,
            max_length=3,
            max_new_tokens=2,
        )
