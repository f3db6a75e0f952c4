from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from concept_erasure import Eraser, registry
from concept_erasure.edit import active_edits
from concept_erasure.errors import EditError, FormatError, ShapeError, SpaceError
from concept_erasure.language.batches import Batches, collate, encode, logits_at
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser, thin
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Anchor, Term, nll
from concept_erasure.language.parameters import Lora, Raw, trainable
from concept_erasure.registry import Method
from tests.models import TinyTokenizer, tiny

TEXTS = ["a b c d", "e f g h i j", "k l", "m n o p q"]
LORA = Lora(rank=2, alpha=6.0)
DOWN = Raw(patterns=("*.[12].mlp.down_proj.weight",))
QUICK = Training(steps=5, learning_rate=1e-2, batch_size=4, log_every=1, progress=False)


@dataclass(frozen=True, kw_only=True)
class TinyConfig(LanguageConfig):
    eta: float = 2.0


@dataclass(frozen=True, repr=False, eq=False)
class TinyEraser(LanguageEraser):
    method = "tiny-language"
    config_type = TinyConfig


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Make the class loadable by its name, as a plug-in would."""
    entry = replace(
        next(iter(registry.METHODS.values())), name="tiny-language", guarantees=frozenset()
    )
    monkeypatch.setattr(Method, "load", lambda self: TinyEraser)
    monkeypatch.setitem(registry.METHODS, "tiny-language", entry)


def loss(model, batch):
    return nll(logits_at(model, batch).float().log_softmax(-1), batch.tokens).sum()


def a_batch():
    return collate(encode(TinyTokenizer(), TEXTS, max_length=20), range(4), pad_id=0)


def terms():
    texts = encode(TinyTokenizer(), TEXTS, max_length=20)
    return [Term("retain", 1.0, Batches(texts, 4, seed=0, pad_id=0), loss)]


def fit(model, spec=LORA, **options):
    options = {"config": TinyConfig(concept="tea"), "terms": terms(), "training": QUICK, **options}
    return fit_eraser(TinyEraser, model, spec=spec, **options)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("spec", [LORA, DOWN])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_fit_leaves_the_model_bit_identical(spec, error):
    model = tiny("llama").train()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]

    def breaks(model, batch):
        if error is not None:
            raise error
        return loss(model, batch)

    made = [replace(terms()[0], loss=breaks)]
    try:
        fit(model, spec, terms=made)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert same(before, bits(model))
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_raw_parameters_are_the_trained_model_bit_by_bit(dtype):
    model, batch = tiny("llama", dtype=dtype), terms()[0].batches.at(5)
    kept = []

    def watched(parameterisation):
        kept.append(parameterisation)
        return terms()

    # the loss of the step after the last is that of the applied eraser
    longer = fit(model, DOWN, terms=watched, training=replace(QUICK, steps=6))
    with fit(model, DOWN).apply(model), torch.no_grad():
        value = float(loss(model, batch) / batch.count)
    assert longer.report["history"][-1]["retain"] == value
    assert kept[0].model is model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_hook_form_weights_form_and_the_trained_model_agree(kind):
    model, batch = tiny(kind), a_batch()
    eraser = fit(model)
    before, want = bits(model), logits_at(model, batch)
    longer = fit(model, training=replace(QUICK, steps=6)).report["history"][-1]["retain"]
    with eraser.apply(model, form="hook") as edit:
        hooked = logits_at(model, batch)
        assert same(before, bits(model))
        assert "lora" in edit.summary()
    with eraser.apply(model) as edit:
        weights = logits_at(model, batch)
        assert loss(model, batch).item() / batch.count == pytest.approx(longer, rel=1e-5)
        assert edit.active
    torch.testing.assert_close(hooked, weights, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(weights, want, atol=1e-2)
    assert same(before, bits(model))
    assert torch.equal(logits_at(model, batch), want)


def test_it_is_applied_once_and_undone_bit_by_bit():
    model = tiny("llama")
    eraser, before = fit(model), bits(model)
    edit = eraser.apply(model)
    with pytest.raises(EditError, match="in force on this model already"):
        eraser.apply(model, form="hook")
    edit.undo()
    assert same(before, bits(model)) and not active_edits(model)
    eraser.apply(model).commit()
    eraser.apply(model)  # the lineage still knows it


@pytest.mark.parametrize("spec", [LORA, DOWN])
def test_save_and_load_keep_the_digest_and_the_effect(spec, tmp_path):
    model = tiny("llama")
    eraser = fit(model, spec, report={"signal": 1.5})
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path))
    assert type(loaded) is TinyEraser
    assert loaded.digest == eraser.digest
    assert loaded.config == eraser.config and loaded.space == eraser.space
    assert same(dict(loaded.weights), dict(eraser.weights))
    assert loaded.report["signal"] == 1.5 and loaded.report["history"] == eraser.report["history"]
    assert "tea" in (tmp_path / "README.md").read_text()
    half = eraser.to(dtype=torch.bfloat16)
    assert {v.dtype for v in half.weights.values()} == {torch.bfloat16}
    with eraser.apply(model), pytest.raises(EditError, match="in force"):
        half.apply(model)


def test_an_empty_or_damaged_file_is_refused(tmp_path):
    model = tiny("llama")
    name, left = next(iter(fit(model).weights.items()))
    for weights, message in (
        ({}, "no weights"),
        ({name: left}, "has one factor"),
        (
            {name: left, name.replace("left", "right"): left[:, :1]},
            r"must be \(out, r\) and \(in, r\)",
        ),
    ):
        with pytest.raises(ShapeError, match=message):
            TinyEraser(weights)._check()
        TinyEraser(weights, config=TinyConfig()).save_pretrained(tmp_path)
        with pytest.raises(FormatError, match=message):
            Eraser.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_pefts_adapter_has_the_effect_of_the_edit(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = tiny(kind), a_batch()
    eraser = fit(model, Lora(rank=3, alpha=7.0, layers=(0, 2)))
    with eraser.apply(model):
        want = model(input_ids=batch.input_ids).logits
    folder = eraser.to_peft(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, folder)
    got = adapted(input_ids=batch.input_ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    state = peft.get_peft_model_state_dict(adapted)
    for path in eraser.modules:
        left = eraser.weights[f"{path}.lora_left"]
        assert torch.equal(state[f"base_model.model.{path}.lora_B.weight"], left)
        right = eraser.weights[f"{path}.lora_right"]
        assert torch.equal(state[f"base_model.model.{path}.lora_A.weight"], right.T)
    assert adapted.peft_config["default"].lora_alpha == adapted.peft_config["default"].r == 3


def test_updates_of_different_rank_are_one_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = tiny("llama"), a_batch()
    eraser = fit(model, Lora(rank=3))
    path = eraser.modules[0]
    pair = {
        f"{path}.lora_{side}": eraser.weights[f"{path}.lora_{side}"][:, :1]
        for side in ("left", "right")
    }
    mixed = replace(eraser, weights={**eraser.weights, **pair})
    with mixed.apply(model):
        want = model(input_ids=batch.input_ids).logits
    adapted = peft.PeftModel.from_pretrained(model, mixed.to_peft(tmp_path))
    torch.testing.assert_close(
        adapted(input_ids=batch.input_ids).logits, want, rtol=1e-5, atol=1e-5
    )


def test_strength_scales_the_change():
    model = tiny("llama")
    eraser, start = fit(model), bits(model)
    name = f"{eraser.modules[0]}.weight"

    def change(strength):
        with eraser.scaled(strength).apply(model):
            return model.state_dict()[name] - start[name]

    torch.testing.assert_close(change(0.5), change(1.0) / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(change(-1.0), -change(1.0), rtol=1e-3, atol=1e-6)
    assert not change(0.0).any()
    assert eraser.scaled(0.5).digest != eraser.digest


def test_new_values_have_no_hook_no_adapter_and_no_strength(tmp_path):
    model = tiny("llama")
    eraser = fit(model, DOWN)
    with pytest.raises(EditError, match="no form as a hook"):
        eraser.apply(model, form="hook")
    with pytest.raises(EditError, match="not an adapter"):
        eraser.to_peft(tmp_path / "adapter")
    with pytest.raises(EditError, match="cannot be scaled"):
        eraser.scaled(0.5)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="form must be"):
        eraser.apply(model, form="lora")
    assert eraser.raw == tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2))


def test_it_belongs_to_the_model_it_was_fitted_in():
    eraser, other = fit(tiny("llama")), tiny("llama", seed=1)
    with pytest.raises(SpaceError, match="fitted in LlamaForCausalLM"):
        eraser.apply(other)
    eraser.with_space(None).apply(other)
    with pytest.raises(EditError, match="no module 'model.layers.0"):
        eraser.with_space(None).apply(tiny("gpt2"))


@pytest.mark.parametrize("spec", [LORA, DOWN])
def test_it_applies_to_the_model_without_its_head_and_back(spec):
    model = tiny("llama")
    eraser, name = fit(model, spec), "layers.1.mlp.down_proj.weight"
    with eraser.apply(model):
        want = model.model.get_parameter(name).clone()
    with eraser.apply(model.model):
        assert torch.equal(model.model.get_parameter(name), want)
        with pytest.raises(EditError, match="in force"):
            eraser.apply(model)


def test_a_model_with_an_edit_in_force_is_refused():
    model = tiny("llama")
    with fit(model).apply(model), pytest.raises(EditError, match="is in force: what is trained"):
        fit(model)


def test_the_report_says_what_was_done():
    model = tiny("llama")
    eraser = fit(model, anchor=Anchor(weight=0.1), report={"signal": 2.0})
    report = eraser.report
    tokens = sum(len(text.split()) for text in TEXTS)
    assert report["steps"] == 5 and report["tokens"] == 5 * tokens and report["signal"] == 2.0
    assert report["distance"] > 0 and report["seconds"] >= 0
    assert [row["step"] for row in report["history"]] == [0, 1, 2, 3, 4]
    assert eraser.config.parameters == {
        "kind": "lora",
        "rank": 2,
        "alpha": 6.0,
        "dropout": 0.0,
        "layers": None,
        "modules": list(Lora().modules),
    }
    assert eraser.config.training["learning_rate"] == 1e-2
    json.dumps(dict(report), allow_nan=False)


def test_how_it_was_watched_does_not_change_the_digest(tmp_path):
    one = fit(tiny("llama"))
    other = fit(tiny("llama"), training=replace(QUICK, checkpoint=str(tmp_path), log_every=3))
    assert one.digest == other.digest
    assert str(tmp_path) not in json.dumps(other.config.training)


def test_a_fit_resumes_only_under_its_own_options(tmp_path):
    kept = replace(QUICK, checkpoint=str(tmp_path))
    one = fit(tiny("llama"), training=kept)
    assert fit(tiny("llama"), training=kept).digest == one.digest
    with pytest.raises(FormatError, match="its options is"):
        fit(tiny("llama"), training=kept, config=TinyConfig(concept="tea", eta=3.0))


def test_the_history_is_thinned_evenly():
    rows = [{"step": float(k)} for k in range(1001)]
    kept = thin(rows, 11)
    assert [row["step"] for row in kept] == [100.0 * k for k in range(11)]
    assert thin(rows[:7], 11) == rows[:7]


def test_repr_counts():
    model = tiny("llama")
    assert repr(fit(model)) == "TinyEraser(21 low-rank updates; fitted on LlamaForCausalLM)"
    assert "2 parameters" in repr(fit(model, DOWN).with_space(None))
    with trainable(model, LORA, seed=0) as p:
        assert set(p.weights()) == set(fit(tiny("llama")).weights)
