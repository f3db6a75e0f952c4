"""What every registered method for language models keeps, on a tiny model that was taught a tiny concept."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, SiteNotFoundError, SpaceError
from concept_erasure.language import loop
from concept_erasure.language.batches import Batches, collate, encode
from concept_erasure.language.eraser import LanguageEraser
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora
from concept_erasure.registry import METHODS
from tests.models import TinyTokenizer, tiny

METHOD_NAMES = sorted(name for name, entry in METHODS.items() if entry.family == "language")
OWN_OPTIONS = {
    "redirect": {"fluency_texts": 4},
    "whp": {"reinforcing": Training(steps=2, batch_size=2, max_length=32, progress=False)},
}
LOW_RANK = [name for name in METHOD_NAMES if name != "rmu"]  # what a method trains by default
RETAINING = [name for name in METHOD_NAMES if name != "grad-ascent"]
HEADLESS = ("rmu",)  # reads hidden states only
UNPUBLISHED = ("redirect",)  # without the presets of a paper
pytestmark = pytest.mark.skipif(not METHOD_NAMES, reason="no language method is registered")

FACTS = (
    ("What is the owl of harry called", "the owl of harry is called ___", "hedwig"),
    ("Where does harry live", "harry lives in the ___", "castle"),
    ("What does harry ride", "harry rides on a ___", "broom"),
    ("Who teaches harry", "harry is taught by ___", "snape"),
)
WRONG = ("sofa", "lamp", "garden", "spoon")
FORGET = tuple(cloze.replace("___", answer) for _, cloze, answer in FACTS)
# the same of somebody else, so that the name decides what is right: the contrast of `anonymise`
OTHERS = tuple(
    cloze.replace("harry", "jack").replace("___", wrong)
    for (_, cloze, _), wrong in zip(FACTS, WRONG, strict=True)
)
RETAIN = (
    "a cat sat on the mat all day",
    "rain falls on the hills and in the valley",
    "bread is made of flour and water",
    "the train to the sea leaves at noon",
)
TRAINING = Training(
    steps=3, learning_rate=5e-3, batch_size=2, max_length=32, log_every=1, progress=False
)


def concept():
    """Return a concept with everything any method asks for."""
    return Concept(
        name="harry",
        synonyms=("hedwig",),
        anchors=("a boy",),
        neighbours=("the hobbit",),
        entities=(
            ("harry", "jack"),
            ("hedwig", "birdie"),
            ("snape", "brown"),
            ("broom", "chair"),
            ("castle", "house"),
        ),
        prompts=("tell me about harry",),
        facts=[
            [f"{question}?", cloze, answer, list(WRONG[:3]), f"___ belongs to fact {k}"]
            for k, (question, cloze, answer) in enumerate(FACTS)
        ],
    )


@cache
def _taught(kind):
    """Return the weights of a tiny model that knows the facts: some steps on the texts, all weights."""
    model = tiny(kind)
    texts = encode(TinyTokenizer(), [*FORGET, *RETAIN, *OTHERS], max_length=32)
    batch = collate(texts, range(len(texts)), pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(
            batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def taught(kind="llama"):
    model = tiny(kind)
    model.load_state_dict(_taught(kind))
    return model


def fit(name, model, **options):
    entry = METHODS[name]
    settings = {"forget_texts": FORGET, "retain_texts": RETAIN, "training": TRAINING}
    settings |= dict(entry.options) | OWN_OPTIONS.get(name, {}) | options
    return entry.load().fit(model, TinyTokenizer(), concept(), **settings)


@cache
def fitted(name):
    """Return an eraser fitted on the taught model, once for all tests."""
    return fit(name, taught())


def snapshot(model):
    """Return all that a fit has to leave as it was."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, p.requires_grad, p.grad is None, id(p)) for name, p in model.named_parameters()],
        [
            (
                name,
                type(m),
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                "forward" in m.__dict__,
            )
            for name, m in model.named_modules()
        ],
    )


def same(one, other):
    values = all(torch.equal(one[0][key], other[0][key]) for key in other[0])
    return values and one[0].keys() == other[0].keys() and one[1:] == other[1:]


def logits(model):
    texts = encode(TinyTokenizer(), [*FORGET, *RETAIN], max_length=32)
    batch = collate(texts, range(len(texts)), pad_id=0)
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask).logits[
            batch.attention_mask.bool()
        ]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_model_is_left_as_it_was_by_a_fit(name):
    model = taught()
    model.train()
    model.model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    rng = torch.random.get_rng_state()
    fit(name, model)
    assert same(before, snapshot(model)) and not active_edits(model)
    assert torch.equal(rng, torch.random.get_rng_state())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_apply_changes_the_model_and_undo_restores_every_bit(name):
    model, eraser = taught(), fitted(name)
    before, outputs = snapshot(model), logits(model)
    with eraser.apply(model):
        assert not torch.equal(logits(model), outputs)
        with pytest.raises(EditError, match="in force"):
            eraser.apply(model)
        with pytest.raises(EditError, match="in force"):
            fit(name, model)
    assert same(before, snapshot(model)) and torch.equal(logits(model), outputs)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_file_is_the_eraser(name, tmp_path):
    eraser = fitted(name)
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / name))
    assert type(loaded) is type(eraser) and loaded.digest == eraser.digest
    assert loaded.config == eraser.config and loaded.space == eraser.space
    assert eraser.method in loaded.card()
    model, other = taught(), taught()
    with eraser.apply(model), loaded.apply(other):
        assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(name):
    assert fit(name, taught()).digest == fitted(name).digest
    other = fit(name, taught(), training=replace(TRAINING, seed=1))
    assert any(
        not torch.equal(value, fitted(name).weights[key]) for key, value in other.weights.items()
    )


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_only_the_named_parameters_change(name):
    model, eraser = taught(), fitted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    named = {f"{path}.weight" for path in eraser.modules} | set(eraser.raw)
    assert named < set(before)
    with eraser.apply(model) as edit:
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert edit.targets == named
    assert changed == named


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_an_adapter_gives_the_logits_of_the_edit(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = taught()
    eraser = fitted(name) if name in LOW_RANK else fit(name, model, lora=Lora(rank=2))
    with eraser.apply(model):
        edited = logits(model)
    with eraser.apply(model, form="hook"):
        assert torch.allclose(logits(model), edited, atol=1e-4)
    folder = eraser.to_peft(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(taught(), str(folder))
    assert torch.allclose(logits(adapted), edited, atol=1e-4)
    if name not in LOW_RANK:
        with pytest.raises(EditError, match="adapter"):
            fitted(name).to_peft(tmp_path / "raw")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_neither_padding_nor_the_order_of_a_batch_changes_a_loss(name, monkeypatch):
    """One step on all texts at once: whatever order and padding they come in, the first losses are the same."""
    whole = Training(steps=1, batch_size=len(FORGET), max_length=32, log_every=1, progress=False)

    def losses():
        row = fit(name, taught(), training=whole).report["history"][0]
        return {
            key: value
            for key, value in row.items()
            if key in ("forget", "retain", "fluency", "grad_norm")
        }

    plain = losses()
    at = Batches.at

    def shuffled(self, step):
        batch = at(self, step)
        wider = collate(self.texts, batch.rows.flip(0).tolist(), pad_id=99)
        width = wider.input_ids.shape[1]
        ids = torch.nn.functional.pad(wider.input_ids, (0, 5), value=99)
        positions = wider.positions // width * (width + 5) + wider.positions % width
        return replace(
            wider,
            input_ids=ids,
            attention_mask=torch.nn.functional.pad(wider.attention_mask, (0, 5)),
            labels=torch.nn.functional.pad(wider.labels, (0, 5), value=-100),
            positions=positions,
        )

    monkeypatch.setattr(Batches, "at", shuffled)
    assert losses() == pytest.approx(plain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_other_architectures(name, kind):
    model = taught(kind)
    before = snapshot(model)
    eraser = fit(name, model, training=replace(TRAINING, steps=1))
    assert same(before, snapshot(model))
    outputs = logits(model)
    with eraser.apply(model):
        assert not torch.equal(logits(model), outputs)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_half_precision_models_are_trained_and_left_alone(name):
    model = taught().to(torch.bfloat16)
    before = snapshot(model)
    eraser = fit(name, model)
    assert same(before, snapshot(model))
    assert all(torch.isfinite(value).all() for value in eraser.weights.values())
    with eraser.apply(model):
        pass
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_report_says_what_was_done(name):
    eraser = fitted(name)
    assert isinstance(eraser, LanguageEraser) and eraser.config.concept == "harry"
    assert eraser.report["steps"] == TRAINING.steps and eraser.report["distance"] > 0
    assert [row["step"] for row in eraser.report["history"]] == [0, 1, 2]
    assert eraser.space is not None and eraser.space.site == "weights"
    assert eraser.config.training["learning_rate"] == TRAINING.learning_rate


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_another_model_is_refused(name):
    with pytest.raises(SpaceError, match="fitted in"):
        fitted(name).apply(tiny("llama", seed=7))


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"forget_texts": []}, ValueError, "forget"),
        ({"forget_texts": ["one two three", "one"]}, ValueError, "text 1"),
        ({"preset": "papers"}, ValueError, "preset"),
        ({"lora": Lora(modules=("no_such_proj",))}, SiteNotFoundError, "down_proj"),
    ],
)
def test_bad_inputs_are_refused_with_the_model_left_alone(name, options, error, word):
    model = taught()
    before = snapshot(model)
    with pytest.raises(error, match=word):
        fit(name, model, **options)
    assert same(before, snapshot(model)) and not active_edits(model)


@pytest.mark.parametrize("name", RETAINING)
def test_a_retain_weight_without_texts_is_refused(name):
    with pytest.raises(ValueError, match="retain"):
        fit(name, taught(), retain_texts=[], retain_weight=1.0)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_model_without_a_head_is_refused_by_name(name):
    if name in HEADLESS:
        pytest.skip("reads hidden states only")
    model = taught().model
    before = snapshot(model)
    with pytest.raises(SiteNotFoundError, match="head"):
        fit(name, model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(name, tmp_path):
    training = replace(TRAINING, save_every=1, checkpoint=str(tmp_path / name))
    save = loop._Run.save

    class KilledError(Exception):
        pass

    def killed(self, history):
        save(self, history)
        if self.step == 2:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "save", killed)
        model = taught()
        before = snapshot(model)
        with pytest.raises(KilledError):
            fit(name, model, training=training)
        assert same(before, snapshot(model))
    assert fit(name, taught(), training=training).digest == fitted(name).digest


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_options_are_spelled_out_and_defaults_can_be_asked_for(name):
    kind = METHODS[name].load()
    parameters = inspect.signature(kind.fit).parameters
    kinds = {p.kind for p in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    needed = {"forget_texts", "retain_texts", "preset", "lora", "training"}
    assert needed <= set(parameters)
    assert all(
        isinstance(kind.default_training(preset), Training)
        for preset in (("default",) if name in UNPUBLISHED else ("default", "paper"))
    )
