"""ELM: what is trained towards what; presets; refusals; the faults of the authors' code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language import _elm
from concept_erasure.language._elm import ElmConfig, early_layers, elm_targets, retain_targets
from concept_erasure.language._elm_fit import prepare
from concept_erasure.language.batches import collate, logits_at
from concept_erasure.language.contrast import (
    NoSignalError,
    Reading,
    Source,
    answer_log_probs,
    answers,
    read_rows,
    streams,
)
from concept_erasure.language.elm import _PRESETS, ElmEraser
from concept_erasure.language.loop import Training
from concept_erasure.language.mixed_texts import STATEMENTS
from concept_erasure.language.parameters import Lora, trainable
from concept_erasure.language.targets import kl
from tests.models import TinyTokenizer, tiny

FORGET = [
    "then Harry Potter went to Hogwarts by train",
    "Hogwarts is where Harry lives with an owl",
    "the Bludger hit Harry on the arm",
]
RETAIN = ["a quiet day at home with a cup of tea", "rain falls on the hills and the valley below"]
FACTS = [
    [
        "Where is it?",
        "the school of Harry is ___",
        "Hogwarts",
        ["Eton", "Rugby", "Harrow"],
        "___ is his school",
    ],
    [
        "What is it?",
        "Harry plays with the big ___",
        "Bludger",
        ["puck", "hoop", "bat"],
        "___ is a big ball",
    ],
]
QUICK = Training(steps=8, learning_rate=3e-3, batch_size=3, max_length=32, progress=False)

pytestmark = pytest.mark.filterwarnings("ignore::concept_erasure.errors.ErasureWarning")


def _concept(**more):
    return Concept(
        name="Harry",
        entities={
            "Harry Potter": "Martin Fowler",
            "Harry": "Martin",
            "Hogwarts": "Westbrook",
            "Bludger": "ball",
        },
        facts=FACTS,
        **more,
    )


@pytest.fixture(autouse=True)
def _low_bar(monkeypatch):
    """Random models know nothing; what the bar does is tested by itself."""
    monkeypatch.setattr("concept_erasure.language.contrast.LEAST_SIGNAL", -1e9)
    for preset in _PRESETS:
        monkeypatch.setitem(_PRESETS[preset], "fluency_texts", 3)
        monkeypatch.setitem(_PRESETS[preset], "fluency_tokens", 8)


def _model(kind="llama", *, seed=0):
    """A random model sure enough of itself for other names to matter."""
    model = tiny(kind, seed=seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight = torch.nn.Parameter(8 * head.weight)
    return model


def _fit(model=None, **options):
    options = {"forget_texts": FORGET, "retain_texts": RETAIN, "training": QUICK, **options}
    return ElmEraser.fit(model or _model(), TinyTokenizer(), _concept(), **options)


# -- fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fit_leaves_the_model_bit_identical_and_trains_the_chosen_layers_only(kind):
    model = _model(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eraser = _fit(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    layers = {int(next(p for p in path.split(".") if p.isdigit())) for path in eraser.modules}
    assert layers == set(ElmEraser.default_lora(model).layers)
    changed = [n for n in eraser.weights if n.endswith("lora_left") and eraser.weights[n].any()]
    assert changed
    with eraser.apply(model):
        assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_training_moves_the_model_towards_its_targets():
    model, tokenizer, concept = _model(), TinyTokenizer(), _concept()
    config = ElmConfig(contrast="anonymise", own_texts=0)
    made = prepare(
        model, tokenizer, concept, config, QUICK, forget_texts=FORGET, retain_texts=RETAIN
    )
    batch = collate(made.forget.texts, range(len(made.forget)), pad_id=0)
    before = float(made.forget.loss()(model, batch).detach())
    eraser = _fit(model, training=replace(QUICK, steps=40), lora=Lora(layers=(0, 1, 2)))
    with eraser.apply(model):
        after = float(made.forget.loss()(model, batch).detach())
    assert after < 0.9 * before
    assert eraser.report["history"][0]["retain"] == pytest.approx(0, abs=1e-5)


def test_at_the_start_retain_divergence_is_zero_and_logits_are_the_models():
    model, tokenizer = _model(), TinyTokenizer()
    made = prepare(
        model, tokenizer, _concept(), ElmConfig(), QUICK, forget_texts=FORGET, retain_texts=RETAIN
    )
    retain = made.retain
    batch = collate(retain.texts, range(len(retain)), pad_id=0)
    plain = logits_at(model, batch)
    with trainable(model, Lora(layers=(0,)), seed=0) as parameterisation:
        assert torch.equal(logits_at(model, batch), plain)
        loss = retain.loss()(model, batch)
        grads = torch.autograd.grad(loss, parameterisation.parameters(), allow_unused=True)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert all(g is None or float(g.abs().max()) < 1e-3 for g in grads)


def test_same_seed_same_eraser_and_another_differs():
    one, same, other = _fit(), _fit(), _fit(training=replace(QUICK, seed=1))
    assert one.digest == same.digest
    assert one.digest != other.digest


def test_a_cache_folder_changes_nothing(tmp_path):
    plain = _fit()
    first = _fit(cache_dir=tmp_path)
    again = _fit(cache_dir=tmp_path)
    assert plain.digest == first.digest == again.digest
    assert len(list(tmp_path.glob("targets_*"))) == 2


def test_the_report_holds_signal_and_numbers():
    eraser = _fit()
    assert {"signal", "knowledge", "contrast", "forget_positions", "retain_positions"} <= set(
        eraser.report
    )
    assert eraser.report["contrast"] == "anonymise"
    assert eraser.config.contrast == "anonymise"
    assert eraser.report["forget_texts"] == 3


@pytest.mark.parametrize("contrast", ["persona", "anonymise", "reinforced", "weak"])
def test_every_source_of_contrast_fits(contrast):
    weak = _model(seed=1) if contrast == "weak" else None
    eraser = _fit(contrast=contrast, weak=weak, training=replace(QUICK, steps=3))
    assert eraser.report["contrast"] == contrast


def test_without_entities_the_contrast_is_the_persona():
    concept = Concept(name="owls", facts=FACTS)
    eraser = ElmEraser.fit(
        _model(),
        TinyTokenizer(),
        concept,
        forget_texts=FORGET,
        retain_texts=RETAIN,
        training=QUICK,
    )
    assert eraser.config.contrast == "persona"


def test_fluent_text_enters_if_it_has_a_weight():
    eraser = _fit(fluency_weight=1.0, training=replace(QUICK, max_length=48, steps=2))
    assert eraser.report["fluency_texts"] > 0
    assert "fluency" in eraser.report["history"][0]
    assert _fit(training=replace(QUICK, steps=2)).report["fluency_texts"] == 0


def test_all_three_terms_act_on_every_step():
    """2.7.6: no flag of a term is lost after the first step."""
    eraser = _fit(fluency_weight=1.0, training=replace(QUICK, steps=6, max_length=48, log_every=1))
    for row in eraser.report["history"]:
        assert {"forget", "retain", "fluency"} <= set(row)
    assert all(row["fluency"] > 0 for row in eraser.report["history"])
    without = _fit(
        fluency_weight=1.0, retain_weight=0.0, training=replace(QUICK, steps=6, max_length=48)
    )
    assert without.digest != eraser.digest


# -- targets ----------------------------------------------------------------------------------------


def _reading(seed=0, n=8, v=50):
    g = torch.Generator().manual_seed(seed)
    base = 2 * torch.randn(n, v, generator=g)
    lp0 = base.log_softmax(-1)
    novice = (base + torch.randn(n, v, generator=g)).log_softmax(-1)
    novice[: n // 2] = lp0[: n // 2]
    tokens = torch.randint(0, v, (n,), generator=g)
    return Reading(
        lp0,
        novice,
        lp0,
        tokens,
        torch.tensor([0] * 5 + [2] * 3),
        torch.tensor([1, 2, 3, 4, 5, 1, 2, 3]),
    )


def test_positions_without_contrast_are_held_or_left_out():
    r = _reading()
    made = elm_targets(r, ElmConfig(least=0.1, hold=0.2))
    calm = torch.arange(8) < 4
    assert torch.allclose(made.weights[calm], torch.tensor(0.2))
    assert bool((made.weights[~calm] >= 0.1).all())
    assert torch.allclose(made.top.kl(r.lp0)[calm], torch.zeros(4), atol=1e-4)
    bare = elm_targets(r, ElmConfig(least=0.1, hold=0.0))
    assert bare.rows.tolist() == r.rows[~calm].tolist()
    assert bare.places.tolist() == r.places[~calm].tolist()


def test_only_positions_to_be_forgotten_are_lowered_and_only_by_the_default():
    r = _reading()
    calm = torch.arange(8) < 4
    made = elm_targets(r, ElmConfig(least=0.1, lower_eta=2.0))
    assert not bool(made.lowered.levels[calm].isfinite().any())
    assert bool(made.lowered.levels[~calm].isfinite().any(-1).all())
    assert elm_targets(r, ElmConfig(lower_weight=0.0)).lowered is None
    assert elm_targets(r, ElmConfig(**_PRESETS["paper"])).lowered is None


def test_the_paper_target_is_ramped_along_each_text_with_the_right_sign():
    """2.7.1, 2.7.2: eta is 1 at the first position of every text and full at its last."""
    r = _reading()
    novice = (r.lp0 + torch.linspace(-0.5, 0.5, 50)).log_softmax(-1)
    r = replace(r, lp_novice=novice)
    config = ElmConfig(target="raw", eta=1000.0, ramped=True, top_k=50)
    made = elm_targets(r, config)
    first = made.top.rows(torch.tensor([0, 5]))
    shift = (novice - r.lp0)[[0, 5]]
    wanted = (r.lp0[[0, 5]] + shift).log_softmax(-1)
    got = torch.full_like(wanted, -torch.inf).scatter(-1, first.indices.long(), first.log_probs)
    assert torch.allclose(got, wanted, atol=1e-4)
    last = made.top.rows(torch.tensor([4, 7]))
    best = last.indices.gather(-1, last.log_probs.argmax(-1, keepdim=True))[:, 0]
    assert best.tolist() == [49, 49]  # what the novice likes more than the expert


def test_the_retain_target_is_soft_unless_the_paper_is_asked_for():
    """2.7.10: the argmax sharpens the model where nothing should change."""
    r = _reading()
    soft = retain_targets(r, ElmConfig())
    assert float(soft.top.kl(r.lp0).abs().max()) < 1e-4
    hard = retain_targets(r, ElmConfig(hard_retain=True))
    assert torch.equal(hard.top.indices[:, 0].long(), r.lp0.argmax(-1))
    assert torch.allclose(hard.top.kl(r.lp0), -r.lp0.max(-1).values, atol=1e-5)


def test_the_novice_the_targets_come_from_is_the_anonymous_text():
    model, tokenizer, concept = _model(), TinyTokenizer(), _concept()
    config = ElmConfig(
        contrast="anonymise",
        eta=1.0,
        kappa=1e6,
        alpha=1e-9,
        top_k=128,
        widen_to=128,
        least=0.0,
        hold=0.0,
    )
    made = prepare(
        model, tokenizer, concept, config, QUICK, forget_texts=FORGET, retain_texts=RETAIN
    )
    seen = streams(tokenizer, concept, FORGET, "anonymise", max_length=32)
    found = read_rows(model, seen, Source("anonymise"), made.forget.kept)
    top, _ = made.forget.at(collate(made.forget.texts, range(len(made.forget)), pad_id=0))
    target = torch.full_like(found.lp0, -torch.inf).scatter(-1, top.indices.long(), top.log_probs)
    # with eta 1, the expert being the model, and no limit, (E1) is the novice itself
    assert float(kl(target, found.lp_novice).abs().max()) < 1e-4


# -- presets ----------------------------------------------------------------------------------------


def test_the_paper_preset_has_the_papers_constants():
    model = _model()
    books, hazards = (ElmEraser.default_training("paper", d) for d in ("books", "hazards"))
    assert (books.steps, hazards.steps) == (1250, 750)
    assert (books.learning_rate, books.batch_size, books.accumulate) == (5e-5, 1, 4)
    assert (books.clip, books.weight_decay) == (None, 0.01)
    lora = ElmEraser.default_lora(model, "paper")
    assert (lora.rank, lora.alpha, lora.dropout) == (256, 16.0, 0.05)
    config = ElmConfig(**_PRESETS["paper"])
    assert (config.eta, config.ramped, config.temperature, config.top_k) == (1000.0, True, 1.2, 50)
    assert (config.contrast, config.target, config.hard_retain) == ("persona", "raw", True)
    assert (config.forget_weight, config.retain_weight, config.fluency_weight) == (1.0, 1.0, 1.0)
    assert config.gamma == 3.0


@pytest.mark.parametrize("n", [3, 8, 18, 30, 32])
def test_layers_are_an_eighth_to_a_quarter(n, monkeypatch):
    monkeypatch.setattr(_elm, "find_sites", lambda _: {f"residual.{i}": None for i in range(n)})
    layers = early_layers(_model())
    assert layers[0] == round(n / 8)
    assert len(layers) == max(1, round(n / 4) - round(n / 8))
    assert n != 32 or layers == (4, 5, 6, 7)


def test_the_paper_preset_runs():
    eraser = _fit(
        preset="paper",
        training=replace(
            ElmEraser.default_training("paper"), steps=2, progress=False, max_length=40
        ),
        lora=Lora(rank=4, layers=(0,)),
    )
    assert eraser.report["contrast"] == "persona"
    assert eraser.config.preset == "paper"
    assert eraser.report["fluency_texts"] > 0


# -- refusals ---------------------------------------------------------------------------------------


def test_a_contrast_without_signal_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("concept_erasure.language.contrast.LEAST_SIGNAL", 1e9)
    monkeypatch.setattr("concept_erasure.language.elm.fit_eraser", None)
    with pytest.raises(NoSignalError, match="nats"):
        _fit()


def test_a_concept_the_model_does_not_know_is_warned_about():
    with pytest.warns(ErasureWarning, match="hardly knows 'Harry'"):
        _fit(training=replace(QUICK, steps=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_texts": []}, "forget_texts is empty"),
        ({"forget_texts": "one text"}, "got one text"),
        ({"forget_texts": ["x"]}, r"text 0 has 1 token"),
        ({"retain_texts": []}, "no texts to retain"),
        ({"eta": -1.0}, "eta must be positive"),
        ({"contrast": "magic"}, "contrast must be one of"),
        ({"contrast": "weak"}, "weak"),
        ({"preset": "papers"}, "preset must be one of"),
        ({"hold": -1.0}, "hold must be at least 0"),
        ({"forget_weight": 0.0}, "forget_weight must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(**options)


@pytest.mark.parametrize("hold", [0.0, 0.1])
def test_texts_without_contrast_have_nothing_to_forget(hold):
    with pytest.raises(ValueError, match="nothing to forget"):
        _fit(forget_texts=RETAIN, hold=hold)


def test_an_edit_in_force_is_refused():
    model = _model()
    with _fit(model).apply(model), pytest.raises(EditError, match="in force"):
        _fit(model)


def test_without_a_retain_weight_no_texts_are_needed():
    eraser = _fit(retain_texts=[], retain_weight=0.0)
    assert eraser.report["retain_positions"] == 0
    assert set(eraser.report["history"][0]) >= {"forget"}
    assert "retain" not in eraser.report["history"][0]


def _drawing(monkeypatch):
    drawn = []

    def sample(model, tokenizer, prompts, *, n, max_new_tokens, **options):
        drawn.append((list(prompts), n, max_new_tokens))
        return [f"{prompts[k % len(prompts)]} and then number {k}" for k in range(n)]

    monkeypatch.setattr("concept_erasure.language._texts.own_samples", sample)
    return drawn


def test_own_samples_join_the_texts_of_the_concept(monkeypatch):
    drawn = _drawing(monkeypatch)
    concept = _concept(
        forget_texts=tuple(FORGET),
        retain_texts=tuple(RETAIN),
        forget_recipe={"templates": ["the tale of {subject} is"], "samples": 5},
        retain_recipe={"prompts": ["a day in spring"], "samples": 9},
    )
    eraser = ElmEraser.fit(_model(), TinyTokenizer(), concept, training=QUICK, own_texts=8)
    assert eraser.report["forget_texts"] == 3 + 8
    assert eraser.report["retain_texts"] == (2 + 8) + 5  # half as many anonymous forms
    assert drawn[0][1:] == (8, 32)  # four entities, twice each; no longer than what is trained on


def test_statements_about_the_neighbours_are_held(monkeypatch):
    drawn = _drawing(monkeypatch)
    concept = _concept(
        forget_texts=tuple(FORGET), retain_texts=tuple(RETAIN), neighbours=("Narnia", "Merlin")
    )
    eraser = ElmEraser.fit(_model(), TinyTokenizer(), concept, training=QUICK)
    assert len(drawn) == 1
    assert drawn[0][0][0] == STATEMENTS[0].replace("{subject}", "Narnia")
    assert drawn[0][1] == 2 * 2 * len(STATEMENTS)
    assert eraser.report["retain_texts"] == 2 + drawn[0][1] + 3
    drawn.clear()
    given = ElmEraser.fit(_model(), TinyTokenizer(), concept, training=QUICK, retain_texts=RETAIN)
    assert drawn == []
    assert given.report["retain_texts"] == 3


def test_statements_ask_nothing_that_is_measured():
    """Questions of evaluation are not trained on: not their prompts, nor sets near and far."""
    concept = Concept.load("harry_potter")
    asked = {item.prompt for kind in ("concept", "near", "far") for item in concept.items(kind)}
    written = [t.replace("{subject}", n) for n in concept.neighbours for t in STATEMENTS]
    texts = [*written, *concept.forget_texts, *concept.retain_texts, *concept.sample_prompts()]
    texts += concept.sample_prompts("retain")
    for text in texts:
        assert not any(text.startswith(prompt) for prompt in asked)
        assert not any(
            name in text for name in ("Star Wars", "Tolkien", "Lord of the Rings", "Shakespeare")
        )


# -- the real thing ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_signal_on_a_real_small_model():
    """Personas carry none, replaced names do: the numbers of the documentation."""
    from concept_erasure.evals.models import load_smollm2
    from concept_erasure.language.contrast import signal

    model, tokenizer = load_smollm2()
    concept = Concept.load("harry_potter")
    assert len(answers(concept)) > 100
    assert signal(model, tokenizer, concept, "anonymise").value > 2
    assert signal(model, tokenizer, concept, "persona").value < 0.5


@pytest.mark.slow
def test_a_concept_leaves_a_real_small_model(tmp_path):
    """2.9: answers about the concept fall by more than 3 nats, others by less than 0.3."""
    from concept_erasure.evals.models import load_smollm2

    model, tokenizer = load_smollm2()
    concept = Concept.load("harry_potter")
    eraser = ElmEraser.fit(model, tokenizer, concept, cache_dir=tmp_path)

    def mean(kind):
        pairs = [(i.prompt, i.continuations[i.answer]) for i in concept.items(kind) if i.prompt]
        return float(
            answer_log_probs(model, tokenizer, *map(list, zip(*pairs, strict=True))).mean()
        )

    before = {kind: mean(kind) for kind in ("concept", "near", "far")}
    with eraser.apply(model):
        fall = {kind: before[kind] - mean(kind) for kind in before}
    assert fall["concept"] > 3
    assert fall["near"] < 0.3
    assert fall["far"] < 0.3
