"""Redirection: the target, which places are compared, its truncated pass, what changes and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.language import fluency, redirect
from concept_erasure.language.batches import Encoded, encode
from concept_erasure.language.contrast import streams
from concept_erasure.language.fluency import anonymous_continuations
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora
from concept_erasure.language.redirect import RedirectEraser, _pair, redirect_target
from tests.language.test_registered import FORGET, RETAIN, taught
from tests.language.test_registered import concept as harry
from tests.models import TinyTokenizer, tiny

ONE = Training(steps=1, learning_rate=1e-2, batch_size=8, log_every=1, progress=False)
LONG = Training(steps=60, learning_rate=2e-2, batch_size=4, log_every=10, progress=False)


def _fit(model=None, concept=None, **options):
    model = taught() if model is None else model
    settings = {"forget_texts": FORGET, "retain_texts": RETAIN, "layer": 1, "training": ONE}
    settings |= {"fluency_weight": 0.0}
    return model, RedirectEraser.fit(
        model, TinyTokenizer(), concept or harry(), **{**settings, **options}
    )


def _hidden(model, text, layer=1):
    """Return the outputs of a block on one text run by itself, without any of our code, shape (T, d)."""
    ids = torch.tensor([[1, *TinyTokenizer().encode(text)]])
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[layer + 1][0]


def test_the_target_lies_on_the_way_to_the_anonymous_state():
    own, other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(redirect_target(own, other, 0.0), other)
    assert torch.allclose(redirect_target(own, other, 1.0) - other, other - own)
    assert torch.equal(redirect_target(own, own, 7.0), own)


def test_states_are_compared_after_whole_names():
    """After "harry potter" stands what comes after "jack"; what is inside the name has no partner."""
    concept = Concept(name="x", entities=(("harry potter", "jack"),))
    text = "the owl of harry potter is white"
    seen = streams(TinyTokenizer(), concept, [text], "anonymise", max_length=32)
    own, other = _pair(seen.own[0], seen.novice[0])
    words = ["<bos>", *text.split()]
    stand_ins = ["<bos>", "the", "owl", "of", "jack", "is", "white"]
    pairs = [
        (words[i], stand_ins[j])
        for i, j in zip(
            own.supervised.nonzero()[:, 0].tolist(),
            other.supervised.nonzero()[:, 0].tolist(),
            strict=True,
        )
    ]
    assert pairs == [("the", "the"), ("owl", "owl"), ("of", "of"), ("potter", "jack"), ("is", "is")]


def test_the_first_loss_is_that_of_single_texts():
    model, eraser = _fit(reach=0.5)
    anonymous = [harry().anonymise(text) for text in FORGET]
    assert all(len(a.split()) == len(b.split()) for a, b in zip(FORGET, anonymous, strict=True))
    # from the second token to the one before the last: the last predicts nothing here
    own = torch.cat([_hidden(model, text)[1:-1] for text in FORGET])
    other = torch.cat([_hidden(model, text)[1:-1] for text in anonymous])
    held = torch.cat([_hidden(model, text)[1:] for text in (*RETAIN, *anonymous)])
    scale = torch.cat([own, other, held]).var(0)
    by_hand = ((1.5 * (other - own)).square() / scale).mean()
    row = eraser.report["history"][0]
    assert row["forget"] == pytest.approx(float(by_hand), rel=1e-4)
    assert row["retain"] == pytest.approx(0, abs=1e-9)
    gap = ((other - own).square() / scale).mean()
    assert eraser.report["gap"][0] == pytest.approx(float(gap), rel=1e-4)


def test_a_coordinate_of_huge_variance_does_not_outweigh_the_rest():
    _, eraser = _fit()
    scaled = taught()
    with torch.no_grad():  # one coordinate of the residual stream, a hundred times as large
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for block in scaled.model.layers[:2]:
                block.get_submodule(name).weight[3] *= 100
    _, other = _fit(scaled)
    ratio = other.report["history"][0]["forget"] / eraser.report["history"][0]["forget"]
    assert 0.1 < ratio < 10


def test_nothing_after_the_block_is_run_and_no_logits():
    model = taught()
    ran: list[str] = []
    for name in ("model.layers.0", "model.layers.1", "model.norm", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    _fit(model, layer=0)
    assert set(ran) == {"model.layers.0"}


def test_names_are_redirected_and_the_rest_is_held():
    model, eraser = _fit(reach=0.0, training=LONG)
    before, after = eraser.report["gap"]
    assert after < 0.5 * before
    assert eraser.report["retain_change"] < 0.2 * before
    text, anonymous = "harry rides on a broom", "jack rides on a chair"
    start, aim = _hidden(model, text)[1:-1], _hidden(model, anonymous)[1:-1]
    other = "the train to the sea leaves"
    kept = _hidden(model, other)
    with eraser.apply(model):
        assert float((_hidden(model, text)[1:-1] - aim).norm()) < float((start - aim).norm())
        moved = float((_hidden(model, other)[1:] - kept[1:]).norm())
    assert moved < 0.5 * float((start - aim).norm())


def test_a_larger_reach_goes_further():
    model, near = _fit(reach=0.0, training=LONG)
    _, far = _fit(reach=2.0, training=LONG)
    text, anonymous = "harry rides on a broom", "jack rides on a chair"
    start, aim = _hidden(model, text)[1:-1], _hidden(model, anonymous)[1:-1]
    way = (aim - start).flatten()
    found = []
    for eraser in (near, far):
        with eraser.apply(model):
            found.append(float((_hidden(model, text)[1:-1] - start).flatten() @ way / (way @ way)))
    assert found[1] > found[0] > 0.3


def test_only_early_blocks_are_trained_by_default():
    _, eraser = _fit(layer=None)
    assert {name.split(".layers.")[1][0] for name in eraser.modules} <= {"0", "1", "2"}
    _, eraser = _fit(lora=Lora(rank=2, layers=(1,)))
    assert all(".layers.1." in name for name in eraser.modules)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"layer": 9}, SiteNotFoundError, "layer is 9"),
        ({"reach": -1.0}, ValueError, "reach"),
        ({"retain_weight": -1.0}, ValueError, "retain_weight"),
        ({"own_texts": -1}, ValueError, "own_texts"),
        ({"preset": "paper"}, ValueError, "preset"),
        ({"forget_texts": ["the cat sat on the mat"]}, ValueError, "stand-in"),
        ({"concept": Concept(name="harry")}, ValueError, "entities"),
    ],
)
def test_bad_input_is_refused(options, error, word):
    with pytest.raises(error, match=word):
        _fit(tiny("llama"), **options)


def test_without_a_retain_weight_nothing_is_held():
    _, eraser = _fit(retain_weight=0.0)
    assert "retain" not in eraser.report["history"][0]
    assert eraser.report["retain_texts"] == 0
    assert "retain_change" not in eraser.report


def test_a_pair_leaves_the_first_token_out():
    text = encode(TinyTokenizer(), ["harry sat"], max_length=8)[0]
    own, other = _pair(text, replace(text))
    assert isinstance(own, Encoded)
    assert own.supervised.tolist() == other.supervised.tolist() == [False, True, False]


def test_fluent_texts_have_the_names_in_front_and_strangers_behind():
    """The continuation is that of the anonymous prompt, word for word; only it is supervised."""
    model, tokenizer = taught(), TinyTokenizer()
    for text in (*FORGET, *RETAIN):
        tokenizer.encode(text)  # so that ids have words
    prompts = ["harry rides on", "the owl of harry is"]
    made = anonymous_continuations(
        model, tokenizer, harry(), prompts, n=2, temperature=0.0, max_new_tokens=4
    )
    assert len(made) == 2
    asked = {tuple(tokenizer.encode(one)): one for one in prompts}
    for text in made:
        head = text.ids[~text.supervised][1:]  # after the BOS
        prompt = asked[tuple(head.tolist())]
        ids = [1, *tokenizer.encode(harry().anonymise(prompt))]
        new: list[int] = []
        for _ in range(4):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        said = tokenizer.decode(new, skip_special_tokens=True)
        assert text.ids[text.supervised].tolist() == tokenizer.encode(said)[:4]


def test_the_fluency_term_is_the_likelihood_of_those_texts(monkeypatch):
    texts: list[Encoded] = []

    def watched(*arguments, **options):
        texts.extend(anonymous_continuations(*arguments, **options))
        return texts

    monkeypatch.setattr(redirect, "anonymous_continuations", watched)
    model, eraser = _fit(fluency_weight=0.3, fluency_texts=4)
    assert eraser.report["fluency_texts"] == len(texts) == 4
    total = count = 0.0
    for text in texts:
        with torch.no_grad():
            log_probs = model(text.ids[None]).logits[0].log_softmax(-1)
        for place in text.supervised.nonzero()[:, 0].tolist():
            total -= float(log_probs[place - 1, text.ids[place]])
            count += 1
    assert eraser.report["history"][0]["fluency"] == pytest.approx(total / count, rel=1e-4)


def test_without_prompts_texts_lend_their_beginnings():
    concept = replace(harry(), prompts=())
    _, eraser = _fit(concept=concept, fluency_weight=0.3, fluency_texts=3)
    assert eraser.report["fluency_texts"] == 3


def test_a_model_that_writes_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(fluency, "own_samples", lambda *_, **__: ["jack sat"])
    with pytest.raises(ValueError, match="wrote nothing"):
        anonymous_continuations(taught(), TinyTokenizer(), harry(), ["harry sat"], n=1)
