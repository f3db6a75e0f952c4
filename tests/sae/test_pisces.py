"""PISCES in whole models: what changes and what does not, tuning, exports, and other architectures."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.edit import ColumnPatch
from concept_erasure.errors import EditError, ErasureWarning, ShapeError, SiteNotFoundError
from concept_erasure.sae._concept_tokens import concept_tokens
from concept_erasure.sae._pisces_edit import value_weight
from concept_erasure.sae._pisces_fit import mean_rms_ratio, value_signs
from concept_erasure.sae._pisces_tune import (
    PARTS,
    Limits,
    TextScore,
    _verdict,
    harmonic,
    search,
)
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.pisces import PiscesEraser
from concept_erasure.sites import find_sites, hook
from tests.language.test_registered import FORGET, RETAIN, concept, logits, taught
from tests.models import TinyTokenizer, tiny
from tests.sae.value_vectors import Chosen, orthonormal

WIDTH = 32
FEATURES = (Chosen("mlp.1", 2), Chosen("mlp.1", 5, -1))


@cache
def dictionary(site: str = "mlp.1", *, behind: bool = False) -> Disentangler:
    made = orthonormal(width=WIDTH, site=site).to(dtype=torch.float32)
    return replace(made, threshold=torch.full((12,), 0.05), after_post_norm=behind)


def fit(model: nn.Module, **options: object) -> PiscesEraser:
    given: dict[str, Any] = {
        "disentanglers": dictionary(), "features": FEATURES, "forget_texts": FORGET, "retain_texts": RETAIN, "tau": 0.5,
        "mu": 2.0, **options,
    }  # fmt: skip
    return PiscesEraser.fit(model, TinyTokenizer(), concept(), **given)


def coefficients(model: nn.Module, dis: Disentangler, path: str) -> Tensor:
    """Return c of every vector and latent."""
    gain = torch.ones(WIDTH) if dis.post_norm_gain is None else dis.post_norm_gain
    return (value_weight(model.get_submodule(path)) * gain) @ dis.W_enc


@pytest.mark.parametrize(
    ("kind", "behind"), [("llama", False), ("gemma2", True), ("gemma3", True), ("gpt2", False)]
)
def test_selected_coefficients_become_their_targets_in_every_architecture(
    kind: str, behind: bool
) -> None:
    model = taught(kind)
    dis = dictionary(behind=behind).for_model(model)
    eraser = fit(model, disentanglers=dis, ridge=0.0)
    assert (dis.post_norm_gain is not None) == behind
    path = eraser.report["down_projections"]["mlp.1"]  # type: ignore[index]
    before = coefficients(model, dis, path)
    columns, targets = eraser.weights["mlp.1.columns"], eraser.weights["mlp.1.targets"]
    picked = targets != 0
    held = {name: value.clone() for name, value in model.state_dict().items()}
    with eraser.apply(model):
        after = coefficients(model, dis, path)
        state = model.state_dict()
        changed = [name for name, value in state.items() if not torch.equal(value, held[name])]
    assert changed == [f"{path}.weight"]
    found = after[columns][:, [2, 5]]
    torch.testing.assert_close(found[picked], targets[picked], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        before[columns][:, [2, 5]][picked], eraser.weights["mlp.1.before"][picked]
    )
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[columns] = False
    assert torch.equal(after[untouched], before[untouched])
    ratio = eraser.report.get("rms_ratio")
    assert (ratio is not None) == behind


def test_signs_are_counted_where_the_text_says_the_concept() -> None:
    model, tokenizer = taught(), TinyTokenizer()
    tokens = concept_tokens(tokenizer, concept())
    signs, seen = value_signs(model, tokenizer, FORGET, ["mlp.1"], tokens, batch_size=2)
    held: list[Tensor] = []
    handle = hook(model, find_sites(model)["value.1"], held.append)
    said: list[Tensor] = []
    for text in FORGET:
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            model(**batch)
        mask = torch.isin(batch["input_ids"], torch.tensor(tokens))
        mask[:, 0] = False
        said.append(held.pop()[mask])
    handle.remove()
    activations = torch.cat(said)
    assert seen == len(activations) > 0
    torch.testing.assert_close(signs["mlp.1"], activations.sign().sum(0).sign())
    assert bool((signs["mlp.1"] < 0).any())  # gated activations are negative, too
    with pytest.warns(ErasureWarning, match="no text says the concept"):
        _, every = value_signs(model, tokenizer, FORGET, ["mlp.1"], [127])
    assert every == sum(len(text.split()) - 1 for text in FORGET)


def test_a_published_edit_follows_no_sign_and_the_default_does() -> None:
    model = taught()
    paper, ours = fit(model, preset="paper"), fit(model)
    assert paper.config.coefficient == "code" and not paper.config.exact  # type: ignore[attr-defined]
    assert paper.config.depth_schedule == "none"  # type: ignore[attr-defined]
    assert len(paper.weights["mlp.1.targets"][:, 0].sign().unique()) <= 2
    assert set(ours.weights["mlp.1.targets"].sign().unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (
        fit(
            taught("gemma3"), preset="paper", disentanglers=dictionary(behind=True)
        ).config.depth_schedule
        == "early"
    )  # type: ignore[attr-defined]
    off = fit(model, preset="paper", exact=True, signs="auto")
    assert off.config.exact and off.config.signs == "auto"  # type: ignore[attr-defined]


def test_given_signs_are_used() -> None:
    model, tokenizer = taught(), TinyTokenizer()
    signs, _ = value_signs(
        model, tokenizer, FORGET, ["mlp.1"], concept_tokens(tokenizer, concept())
    )
    given, counted = fit(model, signs=signs), fit(model)
    assert torch.equal(given.change("mlp.1"), counted.change("mlp.1"))
    with pytest.raises(ValueError, match="no signs"):
        fit(model, signs={"mlp.0": signs["mlp.1"]})


def test_several_layers_each_with_its_own_depth() -> None:
    model = taught()
    dictionaries = {layer: replace(dictionary(), site="") for layer in (0, 2)}
    features = (Chosen("mlp.0", 1), Chosen("mlp.2", 3))
    eraser = fit(
        model, disentanglers=dictionaries, features=features, tau=0.9, signs="off", scale="latent"
    )
    assert eraser.sites == ("mlp.0", "mlp.2")
    for layer, factor in ((0, 0.1), (2, 1.0)):
        weight = value_weight(model.model.layers[layer].mlp.down_proj)
        latent = {0: 1, 2: 3}[layer]
        largest = float((weight @ dictionary().W_enc[:, latent]).abs().max())
        target = eraser.weights[f"mlp.{layer}.targets"]
        assert float(target.min()) == pytest.approx(-2 * factor * largest, rel=1e-4)


def test_protected_latents_stay() -> None:
    model, dis = taught(), dictionary()
    eraser = fit(model, protect={"mlp.1": [0, 7]})
    path = eraser.report["down_projections"]["mlp.1"]  # type: ignore[index]
    before = coefficients(model, dis, path)
    with eraser.apply(model):
        after = coefficients(model, dis, path)
    torch.testing.assert_close(after[:, [0, 7]], before[:, [0, 7]], atol=1e-5, rtol=0)
    assert eraser.config.protected == [["mlp.1", 0], ["mlp.1", 7]]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="edited and protected"):
        fit(model, protect={"mlp.1": [2]})
    by_layer = fit(model, protect={1: [0, 7, 0]})
    assert torch.equal(by_layer.change("mlp.1"), eraser.change("mlp.1"))
    for unknown, word in (({"mlp.0": [0]}, "no dictionary there"), ({1: [12]}, "not in the 12")):
        with pytest.raises(ValueError, match=word):
            fit(model, protect=unknown)


def test_a_half_precision_model_is_edited_in_single_and_cast_once() -> None:
    model = taught().to(torch.bfloat16)
    eraser = fit(model)
    more = eraser.change("mlp.1")
    assert more.dtype == torch.float32
    with eraser.apply(model) as edit:
        patch = edit.patches[0]
        assert isinstance(patch, ColumnPatch)
        want = (eraser.weights["mlp.1.original"].float() + more).to(torch.bfloat16)
        path = eraser.report["down_projections"]["mlp.1"]  # type: ignore[index]
        held = model.get_submodule(path).weight[:, patch.columns]
        assert torch.equal(held, want)


def test_the_edit_of_a_float_model_fits_its_half_precision_copy() -> None:
    eraser = fit(taught()).with_space(None)
    model = taught().to(torch.bfloat16)
    with eraser.apply(model):
        pass


def test_a_weight_that_something_else_changed_is_refused() -> None:
    model = taught()
    eraser = fit(model).with_space(None)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(EditError, match="something else changed it"):
        eraser.apply(model)


def test_an_adapter_gives_the_logits_of_the_edit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for tau in (0.3, 0.95):  # more vectors than latents, and fewer
        model = taught()
        eraser = fit(model, tau=tau, features=(*FEATURES, Chosen("mlp.1", 8)))
        with eraser.apply(model):
            edited = logits(model)
        folder = eraser.to_peft(tmp_path / str(tau))
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        assert rank == min(3, len(eraser.weights["mlp.1.columns"]))
        adapted = peft.PeftModel.from_pretrained(taught(), str(folder))
        torch.testing.assert_close(logits(adapted), edited, atol=1e-4, rtol=1e-4)
    with pytest.raises(EditError, match="no adapter"):
        fit(taught(), embeddings=True).to_peft(tmp_path / "rows")


def test_embeddings_in_the_same_call() -> None:
    model = taught()
    eraser = fit(model, embeddings=True)
    with eraser.apply(model) as edit:
        assert edit.targets == {"model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"}
    assert "harry" in eraser.report["embeddings"]["tokens"]  # type: ignore[index]


def test_tuning_on_texts_finds_a_pair_and_says_what_it_tried() -> None:
    model = taught()
    before = logits(model)
    eraser = fit(model, tau=None, mu=None, trials=6, max_kl=5.0, limits=Limits(0.05, 0.01, 0.1))
    trials = eraser.report["trials"]
    assert isinstance(trials, list) and 1 <= len(trials) <= 6
    best = max((one for one in trials if one["verdict"] == "ok"), key=lambda one: one["value"])
    assert (eraser.config.tau, eraser.config.mu) == (best["tau"], best["mu"])  # type: ignore[attr-defined]
    assert torch.equal(logits(model), before)
    one = fit(model, mu=None, trials=3, max_kl=5.0, limits=Limits(0.0, 0.0, 0.0))
    assert {trial["tau"] for trial in one.report["trials"]} == {0.5}  # type: ignore[attr-defined]


def test_an_edit_too_large_for_the_weights_is_too_strong_and_ends_no_search() -> None:
    model = taught().half()
    eraser = fit(
        model, mu=None, trials=100, score=lambda _: dict.fromkeys(PARTS, 0.8), signs="off", exact=False,
        disentanglers=replace(dictionary(), W_enc=1e4 * dictionary().W_enc), depth_schedule="none",
    )  # fmt: skip
    trials = eraser.report["trials"]
    assert isinstance(trials, list)
    assert {one["verdict"] for one in trials} == {"ok", "strong"}
    assert all(one["value"] == 0 for one in trials if one["verdict"] == "strong")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16}


def test_latents_that_are_not_edited_are_named() -> None:
    """In layer 0 no neuron has a sign; in layer 1 the vectors that carry latent 7 have none."""
    model = taught()
    known = {f"mlp.{i}": dictionary(f"mlp.{i}") for i in (0, 1)}
    carried = (value_weight(model.model.layers[1].mlp.down_proj) @ dictionary().W_enc[:, 7]).abs()
    signs = {"mlp.0": torch.zeros(len(carried)), "mlp.1": (carried <= 0.5 * carried.max()).float()}
    rows = (Chosen("mlp.0", 3), Chosen("mlp.1", 2), Chosen("mlp.1", 7))
    eraser = fit(model, disentanglers=known, features=rows, signs=signs)
    assert eraser.report["not_edited"] == [["mlp.0", 3], ["mlp.1", 7]]
    assert fit(model).report["not_edited"] == []


def test_a_text_score_is_what_it_says() -> None:
    model, tokenizer = taught(), TinyTokenizer()
    tokens = concept_tokens(tokenizer, concept())
    score = TextScore(model, tokenizer, FORGET, RETAIN, tokens, max_kl=0.05, batch_size=2)
    assert score.says
    same = score(model)
    assert same["efficacy"] == pytest.approx(0, abs=1e-5) and same["specificity"] == pytest.approx(
        1, abs=1e-5
    )
    assert same["coherence"] == pytest.approx(1, abs=1e-3)
    with fit(model).apply(model):
        worse = score(model)
    assert worse["efficacy"] > 0 and worse["coherence"] < 1
    with pytest.raises(ValueError, match="retain_texts"):
        TextScore(model, tokenizer, FORGET, (), tokens)


def test_a_broken_model_is_no_model_without_change() -> None:
    """A comparison with NaN takes the other side: such a trial would be too weak, and strike those that are."""
    model, tokenizer = taught(), TinyTokenizer()
    score = TextScore(model, tokenizer, FORGET, RETAIN, concept_tokens(tokenizer, concept()))
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")  # type: ignore[operator]
    found = score(model)
    assert found == dict.fromkeys(PARTS, 0.0) and _verdict(found, Limits()) == "strong"


class Applied:
    """A model that says which pair was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def __call__(self, tau: float, mu: float) -> Any:
        from contextlib import nullcontext

        self.asked.append((tau, mu))
        return nullcontext(self)


def test_search_prunes_what_must_be_too_weak_or_too_strong() -> None:
    applied = Applied()

    def score(_: Any) -> dict[str, float]:
        tau, mu = applied.asked[-1]
        strength = mu * (1 - tau)
        return {
            "efficacy": min(1.0, strength / 10),
            "coherence": 1 / (1 + strength / 20),
            "specificity": 1.0,
        }

    best, tried = search(applied, score, trials=200)
    assert best.verdict == "ok" and len(tried) == len(set(applied.asked)) < 75  # of 100
    whole = [(tau, mu) for tau, mu in applied.asked]
    for one in tried:
        later = whole[whole.index((one.tau, one.mu)) + 1 :]
        if one.verdict == "weak":
            assert not any(mu <= one.mu and tau >= one.tau for tau, mu in later)
        if one.verdict == "strong":
            assert not any(mu >= one.mu and tau <= one.tau for tau, mu in later)
    assert best.value == max(one.value for one in tried if one.verdict == "ok")


def test_search_refuses_when_nothing_works_and_warns_when_nothing_is_good() -> None:
    with pytest.raises(EditError, match="highest efficacy 0"):
        search(Applied(), lambda _: {"efficacy": 0.0}, trials=3)
    with pytest.warns(ErasureWarning, match="is weak"):
        search(Applied(), lambda _: {"efficacy": 0.1}, trials=3)
    with pytest.raises(ValueError, match="efficiency"):
        search(Applied(), lambda _: {"efficiency": 0.1}, trials=3)


def test_a_zero_makes_the_harmonic_mean_zero() -> None:
    assert (
        harmonic([1.0, 0.0])
        == harmonic([1.0, -2.0])
        == harmonic([])
        == harmonic([float("nan"), 1])
        == 0
    )
    assert harmonic([1.0, 0.5]) == pytest.approx(2 / 3)


def test_the_ratio_of_the_roots_is_measured() -> None:
    model = taught("gemma3")
    nothing = {"mlp.1": (torch.tensor([0, 1]), torch.zeros(2, WIDTH))}
    assert mean_rms_ratio(model, TinyTokenizer(), FORGET, nothing)["mlp.1"] == pytest.approx(1)
    large = {"mlp.1": (torch.arange(48), 100 * torch.ones(48, WIDTH))}
    assert mean_rms_ratio(model, TinyTokenizer(), FORGET, large)["mlp.1"] < 0.1


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"features": ()}, ValueError, "nothing to edit"),
        ({"features": (Chosen("mlp.0", 1),)}, ValueError, "no dictionary"),
        ({"features": (Chosen("mlp.1", 99),)}, ValueError, "not in the 12"),
        ({"features": (Chosen("mlp.1", 1), Chosen("mlp.1", 1, -1))}, ValueError, "both directions"),
        ({"features": (Chosen("mlp.1", 1, 0),)}, ValueError, "direction"),
        ({"disentanglers": {}}, ValueError, "no dictionaries"),
        ({"disentanglers": dictionary("residual.1")}, ValueError, "MLP"),
        ({"disentanglers": {2: dictionary()}}, ValueError, "given for 2"),
        ({"disentanglers": {"mlp.0": dictionary()}}, ValueError, "given for 'mlp.0'"),
        ({"signs": {"mlp.1": torch.ones(3)}}, ShapeError, "signs"),
        ({"disentanglers": dictionary("mlp.9")}, SiteNotFoundError, "mlp"),
        ({"disentanglers": orthonormal(width=64)}, ShapeError, "width"),
        ({"tau": 1.0}, ValueError, "tau"),
        ({"mu": -1.0}, ValueError, "mu"),
        ({"scale": "all"}, ValueError, "scale"),
        ({"preset": "papers"}, ValueError, "preset"),
        ({"retain_texts": [], "tau": None}, ValueError, "retain_texts"),
    ],
)
def test_bad_inputs_are_refused(
    options: dict[str, object], error: type[Exception], word: str
) -> None:
    model = taught()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=word):
        fit(model, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_a_head_takes_the_edit() -> None:
    model = taught()
    eraser = fit(model)
    with eraser.apply(model.model) as edit:
        assert edit.targets == {"layers.1.mlp.down_proj.weight"}


def test_concept_tokens() -> None:
    tokenizer = TinyTokenizer()
    ids = concept_tokens(tokenizer, concept())
    words = {tokenizer.decode([i]) for i in ids}
    assert {"harry", "hedwig", "snape", "broom", "castle"} == words
    with pytest.raises(ValueError, match="three|3 letters"):
        concept_tokens(TinyTokenizer(), replace(concept(), name="xy", synonyms=(), entities=()))


def test_a_tiny_model_of_another_seed_is_not_needed_for_signs() -> None:
    """Without the sign of a neuron on the concept its vector is left alone, and without any the fit says so."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(EditError, match="none has a sign"):
        fit(model)
