from __future__ import annotations

import json

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Recipe
from concept_erasure.errors import FormatError
from concept_erasure.language import _texts
from concept_erasure.language._texts import (
    ends,
    forget_and_retain,
    own_samples,
    sample_token,
    starts,
)
from tests.models import TinyTokenizer, tiny

PROMPTS = ["once upon a time", "tea", "the quick brown fox jumps over it"]


def samples(model=None, tokenizer=None, **options):
    options = {"n": 6, "max_new_tokens": 5, "seed": 0, "batch_size": 4, **options}
    return own_samples(model or tiny("llama"), tokenizer or TinyTokenizer(), PROMPTS, **options)


def test_texts_begin_with_their_prompts_in_turn():
    for k, text in enumerate(samples()):
        assert text.startswith(PROMPTS[k % 3])
        assert len(text.split()) <= len(PROMPTS[k % 3].split()) + 5


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    assert samples() == samples()
    assert samples() != samples(seed=1)
    assert len(set(samples(n=12))) == 12
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_most_probable_text_does_not_depend_on_the_batch(kind):
    model = tiny(kind)
    tokenizer = TinyTokenizer()
    tokenizer(PROMPTS)  # which knows the words from now on
    together = samples(model, tokenizer, temperature=0, n=3)
    assert together == samples(model, tokenizer, temperature=0, n=3, batch_size=1)
    (head,) = starts(tokenizer, PROMPTS[:1])
    ids = torch.tensor([head])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = ids[0, len(head) :].tolist()
    stop = new.index(2) if 2 in new else len(new)
    assert together[0] == tokenizer.decode([*head, *new[:stop]], skip_special_tokens=True)


def test_samples_have_the_models_own_frequencies(generator):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(20_000, 1)
    drawn = sample_token(logits, temperature=1.0, top_p=1.0, generator=generator)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, logits[0].softmax(0), rtol=0, atol=0.015)
    drawn = sample_token(logits, temperature=0.5, top_p=1.0, generator=generator)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, (2 * logits[0]).softmax(0), rtol=0, atol=0.015)
    drawn = sample_token(logits, temperature=1.0, top_p=0.7, generator=generator)
    assert set(drawn.tolist()) == {1, 2}
    drawn = sample_token(logits, temperature=1.0, top_p=0.1, generator=generator)
    assert set(drawn.tolist()) == {2}


def test_a_text_ends_at_its_end(monkeypatch):
    seen = iter(range(100))

    def first_ends(logits, **options):
        token = torch.full((len(logits),), 9)
        if next(seen) == 2:
            token[0] = 2
        return token

    monkeypatch.setattr(_texts, "sample_token", first_ends)
    texts = samples(n=3)
    lengths = sorted(
        len(text.split()) - len(prompt.split()) for text, prompt in zip(texts, PROMPTS, strict=True)
    )
    assert lengths == [2, 5, 5]


def test_the_model_is_left_as_it_was():
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    samples(model)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_ends_a_text_is_said_by_tokenizer_and_model():
    model = tiny("llama")
    model.generation_config.eos_token_id = [7, 2]
    assert ends(model, TinyTokenizer()) == (2, 7)
    model.generation_config.eos_token_id = None
    assert ends(model, TinyTokenizer()) == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        samples(**options)
    with pytest.raises(ValueError, match="non-empty list"):
        own_samples(tiny("llama"), TinyTokenizer(), [], n=1, max_new_tokens=1, seed=0)


def tea(**options):
    recipe = Recipe(prompts=("a pot of tea", "tea and milk"), samples=2, max_new_tokens=4)
    other = Recipe(prompts=("a cold river", "the moon"), samples=2, max_new_tokens=4)
    return Concept(name="tea", **{"forget_recipe": recipe, "retain_recipe": other, **options})


def test_texts_come_from_the_argument_then_the_concept_then_the_model():
    model, tokenizer = tiny("llama"), TinyTokenizer()
    concept = tea(forget_texts=("tea is hot",), retain_texts=("rain is wet",))
    got = forget_and_retain(model, tokenizer, concept, ["a"], ["b"])
    assert got == (["a"], ["b"])
    assert forget_and_retain(model, tokenizer, concept) == (["tea is hot"], ["rain is wet"])
    assert forget_and_retain(model, tokenizer, concept, retain_texts=[])[1] == []
    forget, retain = forget_and_retain(model, tokenizer, tea())
    assert all(concept.mentions(text) for text in forget) and len(forget) == 4
    assert not any(concept.mentions(text) for text in retain) and len(retain) == 4


def test_nothing_to_forget_is_an_error_and_nothing_to_retain_an_empty_list():
    model, tokenizer = tiny("llama"), TinyTokenizer()
    bare = tea(forget_recipe=None, retain_recipe=None)
    with pytest.raises(ValueError, match="no texts about 'tea' to forget"):
        forget_and_retain(model, tokenizer, bare)
    with pytest.raises(ValueError, match="no texts about 'tea' to forget"):
        forget_and_retain(model, tokenizer, tea(), [])
    assert forget_and_retain(model, tokenizer, bare, ["tea"]) == (["tea"], [])
    with pytest.raises(ValueError, match="must be a list of texts"):
        forget_and_retain(model, tokenizer, bare, "tea")


def test_a_sample_of_the_other_side_is_left_out():
    model, tokenizer = tiny("llama"), TinyTokenizer()
    mixed = Recipe(prompts=("a cold river", "no tea"), samples=2, max_new_tokens=4)
    _, retain = forget_and_retain(model, tokenizer, tea(retain_recipe=mixed))
    assert len(retain) == 2 and all(text.startswith("a cold river") for text in retain)
    silent = Recipe(prompts=("a cold river",), samples=2, max_new_tokens=4)
    with pytest.raises(
        ValueError, match="none of the 2 samples speaks of 'tea'; give forget_texts"
    ):
        forget_and_retain(model, tokenizer, tea(forget_recipe=silent))


def test_samples_are_kept_by_model_prompts_and_seed(tmp_path, monkeypatch):
    model, tokenizer = tiny("llama"), TinyTokenizer()
    first = forget_and_retain(model, tokenizer, tea(), cache_dir=tmp_path)
    assert first == forget_and_retain(model, TinyTokenizer(), tea())
    assert len(list(tmp_path.iterdir())) == 2
    calls = []
    real = _texts.own_samples
    monkeypatch.setattr(_texts, "own_samples", lambda *a, **k: calls.append(0) or real(*a, **k))
    assert forget_and_retain(model, tokenizer, tea(), cache_dir=tmp_path) == first
    assert not calls
    forget_and_retain(model, tokenizer, tea(), seed=1, cache_dir=tmp_path)
    forget_and_retain(tiny("llama", seed=1), tokenizer, tea(), cache_dir=tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("content", ["[", json.dumps({"a": 1}), json.dumps([1])])
def test_a_damaged_cache_is_an_error_that_says_what_to_do(tmp_path, content):
    model, tokenizer = tiny("llama"), TinyTokenizer()
    forget_and_retain(model, tokenizer, tea(), cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(content)
    with pytest.raises(FormatError, match="delete it to sample again"):
        forget_and_retain(model, tokenizer, tea(), cache_dir=tmp_path)
