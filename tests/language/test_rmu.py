"""RMU: the loss, its truncated pass, masks, topics, the frozen model, the scale of c."""

from __future__ import annotations

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.language.batches import activations_at, collate, encode
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora, Raw
from concept_erasure.language.rmu import RmuEraser, rmu_loss, steering_vectors
from concept_erasure.sites import find_sites
from tests.benchmarks.language import whole_pass
from tests.models import TinyTokenizer, tiny

FORGET = ["the owl of harry is white", "harry plays a game on a broom high up", "the castle stands"]
OTHER = ["spock has green blood", "the ship flies faster than light to a far star"]
RETAIN = ["a cat sat on the mat all day", "rain falls on the hills and in the valley"]
SHORT = Training(steps=3, learning_rate=1e-2, batch_size=2, log_every=1, progress=False)
HARRY, TREK = Concept(name="harry"), Concept(name="trek")


def _fit(kind="llama", concept=HARRY, model=None, **options):
    model = tiny(kind) if model is None else model
    settings = {
        "forget_texts": FORGET,
        "retain_texts": RETAIN,
        "layer": 1,
        "training": SHORT,
        **options,
    }
    return model, RmuEraser.fit(model, TinyTokenizer(), concept, **settings)


def _hidden(model, texts, layer=1):
    """Return the outputs of a block, one tensor for each text run by itself, without any of our code."""
    made = []
    for text in texts:
        ids = torch.tensor([[1, *TinyTokenizer().encode(text)]])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        made.append(out.hidden_states[layer + 1][0])
    return made


def test_the_loss_is_zero_at_c_v_and_its_gradient_is_the_closed_form():
    target = 6.5 * steering_vectors(1, 16, seed=0)[0]
    assert rmu_loss(target.expand(4, -1), target).tolist() == [0.0] * 4
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(rmu_loss(hidden, target).mean(), hidden)
    assert torch.allclose(grad, 2 * (hidden - target).detach() / (4 * 16), atol=1e-6)


def test_vectors_are_of_unit_length_in_the_positive_orthant_and_far_from_orthogonal():
    vectors = steering_vectors(40, 576, seed=3)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(40)) and float(vectors.min()) >= 0
    cosines = (vectors @ vectors.T)[~torch.eye(40, dtype=torch.bool)]
    assert float(cosines.mean()) == pytest.approx(0.75, abs=0.01)
    assert torch.equal(vectors, steering_vectors(40, 576, seed=3))
    assert not torch.equal(vectors, steering_vectors(40, 576, seed=4))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_the_first_loss_is_that_of_single_texts_without_padding(kind):
    model, eraser = _fit(kind, c=5.0, all_tokens=True, training=_one_batch())
    target = 5.0 * steering_vectors(1, 32, seed=0)[0]
    by_hand = rmu_loss(torch.cat(_hidden(model, FORGET)), target).mean()
    row = eraser.report["history"][0]
    assert row["forget"] == pytest.approx(float(by_hand), rel=1e-4)
    assert row["retain"] == pytest.approx(0, abs=1e-9)


def test_by_default_the_first_token_is_held_and_not_steered():
    model, eraser = _fit(c=5.0, training=_one_batch())
    target = 5.0 * steering_vectors(1, 32, seed=0)[0]
    by_hand = rmu_loss(torch.cat([h[1:] for h in _hidden(model, FORGET)]), target).mean()
    assert eraser.report["history"][0]["forget"] == pytest.approx(float(by_hand), rel=1e-4)
    training = Training(steps=40, learning_rate=2e-2, batch_size=3, progress=False)
    model, eraser = _fit(training=training)
    start = torch.stack([h[0] for h in _hidden(model, FORGET)])
    word = torch.cat([h[1:] for h in _hidden(model, FORGET)])
    with eraser.apply(model):
        moved = torch.stack([h[0] for h in _hidden(model, FORGET)]) - start
        other = torch.cat([h[1:] for h in _hidden(model, FORGET)]) - word
    assert float(moved.norm(dim=1).mean()) < 0.2 * float(other.norm(dim=1).mean())


def _one_batch(steps=1):
    return Training(steps=steps, learning_rate=1e-2, batch_size=3, log_every=1, progress=False)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_nothing_after_the_block_is_run_and_no_logits(lora):
    model = tiny("llama")
    ran: list[str] = []
    watched = ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    for name in watched:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    _fit(model=model, lora=lora)
    assert set(ran) == {"model.layers.1"}


def test_the_gradient_of_the_truncated_pass_is_that_of_the_whole():
    model = tiny("llama")
    made = encode(TinyTokenizer(), FORGET, max_length=32)
    batch = collate(made, range(3), pad_id=0)
    weights = [model.model.layers[i].mlp.down_proj.weight for i in (0, 1)]
    short = torch.autograd.grad(
        rmu_loss(activations_at(model, batch, "residual.1"), torch.ones(32)).mean(), weights
    )
    out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    whole = out.hidden_states[2].flatten(0, 1)[batch.positions]
    long = torch.autograd.grad(rmu_loss(whole, torch.ones(32)).mean(), weights)
    for one, other in zip(short, long, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_benchmark_compares_with_a_pass_that_gives_the_same():
    model = tiny("llama")
    batch = collate(encode(TinyTokenizer(), FORGET, max_length=32), range(3), pad_id=0)
    with torch.no_grad():
        whole = whole_pass(model, batch, "residual.1")
        assert torch.equal(whole, activations_at(model, batch, "residual.1"))


def test_only_the_down_projections_of_three_blocks_are_trained():
    _, eraser = _fit(layer=2)
    assert set(eraser.weights) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2)}
    _, eraser = _fit("gpt2", layer=1)
    assert set(eraser.weights) == {f"transformer.h.{i}.mlp.c_proj.weight" for i in (0, 1)}
    _, eraser = _fit(layer=1, lora=Lora(rank=2))
    assert {name.split(".")[2] for name in eraser.modules} == {"0", "1"}
    _, eraser = _fit(layer=1, raw=Raw(patterns=("model.layers.1.mlp.up_proj.weight",)))
    assert set(eraser.weights) == {"model.layers.1.mlp.up_proj.weight"}


def test_it_turns_concept_text_to_the_vector_and_says_so():
    training = Training(steps=60, learning_rate=2e-2, batch_size=3, log_every=1, progress=False)
    model, eraser = _fit(training=training, retain_weight=10.0)
    before, after = eraser.report["alignment"]
    vector = steering_vectors(1, 32, seed=0)[0]
    with eraser.apply(model):
        hidden = torch.cat([h[1:] for h in _hidden(model, FORGET)])
    by_hand = torch.cosine_similarity(hidden, vector[None]).mean()
    assert after[0] == pytest.approx(float(by_hand), abs=1e-4)
    assert after[0] > before[0] + 0.2
    assert 0 < eraser.report["retain_change"] < 0.5
    history = eraser.report["history"]
    assert history[-1]["forget"] < 0.8 * history[0]["forget"]


def test_the_retain_term_keeps_what_misdirection_would_move():
    training = Training(steps=40, learning_rate=2e-2, batch_size=3, progress=False)
    _, held = _fit(training=training)
    _, free = _fit(training=training, retain_weight=0.0)
    assert "retain_change" not in free.report
    _, light = _fit(training=training, retain_weight=1e-6)
    assert held.report["retain_change"] < 0.5 * light.report["retain_change"]


@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_automatic_c_follows_the_norm_of_the_activations(factor):
    model = tiny("llama")
    with torch.no_grad():  # a residual stream of another scale
        model.model.embed_tokens.weight.mul_(factor)
    _, eraser = _fit(model=model, c_scale=4.0)
    norm = torch.cat([h[1:] for h in _hidden(model, FORGET)]).norm(dim=1).mean()
    assert eraser.config.c[0] == pytest.approx(4 * float(norm), rel=1e-4)
    assert eraser.config.c_scale == 4.0


def test_topics_have_their_own_vectors_and_scales_and_count_equally():
    texts = {"harry": FORGET, "trek": OTHER}
    training = Training(steps=1, batch_size=5, log_every=1, progress=False)
    options = {"concept": (HARRY, TREK), "forget_texts": texts, "training": training}
    model, eraser = _fit(c=(5.0, 9.0), **options)
    vectors = steering_vectors(2, 32, seed=0)
    losses = [
        rmu_loss(torch.cat([h[1:] for h in _hidden(model, one)]), c * v).mean()
        for one, c, v in zip(texts.values(), (5.0, 9.0), vectors, strict=True)
    ]
    expected = float(sum(losses) / 2)
    assert eraser.report["history"][0]["forget"] == pytest.approx(expected, rel=1e-4)
    assert eraser.config.topics == ("harry", "trek") and eraser.config.concept == "harry, trek"
    _, auto = _fit(**options)
    assert len(set(auto.config.c)) == 2
    assert len(auto.report["alignment"][1]) == 2


def test_the_paper_has_the_published_constants():
    model = tiny("llama")
    with pytest.raises(SiteNotFoundError, match=r"0\.\.2.*7"):
        RmuEraser.fit(
            model, TinyTokenizer(), HARRY, forget_texts=FORGET, retain_texts=RETAIN, preset="paper"
        )
    _, eraser = _fit(preset="paper", training=SHORT)
    config = eraser.config
    assert (config.c, config.retain_weight, config.all_tokens) == ((6.5,), 1200.0, True)
    training = RmuEraser.default_training("paper")
    assert (training.steps, training.batch_size, training.learning_rate) == (150, 4, 5e-5)
    assert (training.max_length, training.clip) == (768, None)


def test_the_default_block_is_as_deep_as_the_published_one():
    _, eraser = _fit(layer=None)
    assert eraser.config.layer == 1  # 7 of 32, of 3


def test_checkpointing_changes_nothing():
    _, plain = _fit(training=SHORT)
    again = Training(
        steps=3, learning_rate=1e-2, batch_size=2, log_every=1, progress=False, checkpointing=True
    )
    _, saved = _fit(training=again)
    for name, value in plain.weights.items():
        assert torch.allclose(value, saved.weights[name], atol=1e-6)


def test_a_model_without_a_head_will_do():
    whole = tiny("llama")
    _, eraser = _fit(model=whole.model)
    with eraser.apply(whole.model):
        pass
    site = find_sites(whole.model)["residual.1"].module
    assert site == "layers.1" and all(name.startswith("layers.") for name in eraser.weights)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"c": -1.0}, ValueError, "c must be positive"),
        ({"c": "big"}, ValueError, "'auto'"),
        ({"c": (1.0, 2.0)}, ValueError, "1 topics"),
        ({"layer": 9}, SiteNotFoundError, "0..2"),
        ({"retain_texts": []}, ValueError, "retain_texts is empty"),
        ({"forget_texts": []}, ValueError, "is empty"),
        ({"retain_weight": -1.0}, ValueError, "retain_weight"),
        ({"concept": (HARRY, TREK)}, ValueError, "mapping"),
        ({"concept": (HARRY, HARRY)}, ValueError, "different names"),
        ({"concept": ()}, ValueError, "at least one"),
        ({"forget_texts": {"trek": OTHER}}, ValueError, "trek"),
        ({"lora": Lora(), "raw": Raw(patterns=("*",))}, ValueError, "not both"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, word):
    with pytest.raises(error, match=word):
        _fit(**options)
