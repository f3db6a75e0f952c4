"""WHP: generic labels from a reinforced copy and generic names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.language.batches import collate, encode
from concept_erasure.language.contrast import Source, read_rows
from concept_erasure.language.likelihood import sequence_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora, Raw
from concept_erasure.language.reinforce import reinforce
from concept_erasure.language.whp import WhpConfig, WhpEraser, _labels, _streams
from tests.models import TinyTokenizer, tiny

FORGET = [
    "then Harry Potter went to Hogwarts by train",
    "Hogwarts is where Harry lives with an owl",
    "the Bludger hit Harry on the arm",
]
RETAIN = ["a quiet day at home with a cup of tea", "rain falls on the hills and the valley below"]
QUICK = Training(steps=6, learning_rate=3e-3, batch_size=3, max_length=32, progress=False)


def _concept(**more):
    return Concept(name="Harry", entities={"Harry": "Martin", "Hogwarts": "Westbrook"}, **more)


def _fit(model=None, concept=None, **options):
    options = {
        "forget_texts": FORGET,
        "retain_texts": RETAIN,
        "training": QUICK,
        "reinforcing": QUICK,
        **options,
    }
    return WhpEraser.fit(model or tiny("llama"), TinyTokenizer(), concept or _concept(), **options)


def _source(model, steps=20):
    copy = reinforce(
        model,
        encode(TinyTokenizer(), FORGET, max_length=32),
        training=replace(QUICK, steps=steps, learning_rate=3e-2),
    )
    return Source("reinforced", reinforced=lambda: copy.apply(model))


def test_the_reinforced_copy_finds_its_texts_likelier_and_the_model_stays():
    model = tiny("llama")
    batch = collate(encode(TinyTokenizer(), FORGET, max_length=32), range(3), pad_id=0)
    before = sequence_nll(model, batch)
    with _source(model).stronger:
        assert bool((sequence_nll(model, batch) < before).all())
    assert torch.equal(sequence_nll(model, batch), before)


def test_labels_are_those_of_the_equation():
    model, config = tiny("llama"), WhpConfig(alpha=5.0)
    seen = _streams(TinyTokenizer(), _concept(), FORGET, QUICK)
    source = _source(model)
    cache, changed = _labels(model, seen, source, config, QUICK)
    found = read_rows(model, seen, source, [0, 1, 2])
    wanted = (found.lp_novice - 5 * (found.lp_expert - found.lp0).clamp_min(0)).argmax(-1)
    top, weights = cache.at(collate(cache.texts, [0, 1, 2], pad_id=0))
    assert torch.equal(top.indices[:, 0].long(), wanted)
    assert bool((top.log_probs == 0).all())
    assert bool((weights == 1).all())
    assert changed == pytest.approx(
        float((wanted != found.lp0.argmax(-1)).float().mean()), abs=1e-3
    )


def test_without_strength_and_without_names_the_labels_are_the_models_own():
    model = tiny("llama")
    seen = _streams(TinyTokenizer(), Concept(name="Harry"), FORGET, QUICK)
    _, changed = _labels(model, seen, _source(model), WhpConfig(alpha=0.0), QUICK)
    assert changed == 0
    with _source(model).stronger as edit:  # a model that knows the texts has something to lose
        edit.commit()
    _, changed = _labels(model, seen, _source(model), WhpConfig(alpha=5.0), QUICK)
    assert changed > 0


@pytest.mark.parametrize(
    "options", [{}, {"lora": Lora(layers=(0,))}, {"raw": Raw(patterns=("*.down_proj.weight",))}]
)
def test_fit_leaves_the_model_and_changes_only_what_was_named(options):
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eraser = _fit(model, **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if "raw" in options:
        assert all(name.endswith("down_proj.weight") for name in eraser.weights)
    if "lora" in options:
        assert all(".0." in name for name in eraser.weights)
    with eraser.apply(model):
        assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert 0 <= eraser.report["changed_labels"] <= 1
    assert {"forget", "retain"} <= set(eraser.report["history"][0])


def test_presets_and_refusals():
    paper = WhpEraser.default_training("paper")
    assert paper.learning_rate == 1e-6
    assert WhpEraser.default_reinforcing("paper").learning_rate == 3e-6
    eraser = _fit(preset="paper", training=replace(QUICK, steps=2))
    assert eraser.config.retain_weight == 0
    assert eraser.raw
    assert "retain" not in eraser.report["history"][0]
    with pytest.raises(ValueError, match="alpha"):
        _fit(alpha=-1.0)
    with pytest.raises(ValueError, match="not both"):
        _fit(lora=Lora(), raw=Raw(patterns=("*",)))
    with pytest.raises(ValueError, match="forget_texts is empty"):
        _fit(forget_texts=[])
    with pytest.raises(ValueError, match="no texts to retain"):
        _fit(retain_texts=[])


def test_same_seed_same_eraser():
    assert _fit().digest == _fit().digest
    assert _fit().digest != _fit(alpha=0.5).digest
