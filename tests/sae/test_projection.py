"""Projecting latents off what is read: what the readers no longer see, what stays, adapters, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.errors import EditError, ShapeError
from concept_erasure.language.batches import logits_at
from concept_erasure.language.contrast import answer_log_probs
from concept_erasure.sae._search_scores import answering, attributions, batches_of, places_of
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.projection import LatentProjectionEraser
from concept_erasure.sae.search import Search, find_features
from concept_erasure.sae.seminmf import semi_nmf
from concept_erasure.sites import find_sites, hook
from tests.language.test_registered import FACTS, FORGET, RETAIN, WRONG, concept, logits, taught
from tests.models import TinyTokenizer, tiny
from tests.sae.value_vectors import Chosen

SITE, WIDTH = "value.1", 48
PAIRS = [(question, f" {answer}") for question, _, answer in FACTS]


def dictionary(site: str = SITE, width: int = WIDTH, n: int = 6) -> Disentangler:
    """Return one with rows that are not orthogonal."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(3))
    rows = nn.functional.normalize(rows + rows[:1], dim=1)
    return Disentangler(
        rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(width), torch.zeros(n), site=site
    )


def fit(model: nn.Module, **options: Any) -> LatentProjectionEraser:
    given: dict[str, Any] = {
        "disentanglers": dictionary(), "features": [Chosen(SITE, 0), Chosen(SITE, 4, -1)], **options,
    }  # fmt: skip
    return LatentProjectionEraser.fit(model, TinyTokenizer(), concept(), **given)


def down(model: nn.Module) -> Tensor:
    module: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    return module.weight.detach().double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_along_the_latents_nothing_is_read_and_beside_them_everything(strength: float) -> None:
    model, rows = taught(), dictionary().W_dec[[0, 4]].double()
    before = down(model)
    with fit(model, strength=strength).apply(model) as edit:
        after = down(model)
        assert edit.targets == {"model.layers.1.mlp.down_proj.weight"}
    torch.testing.assert_close(
        after @ rows.T, (1 - strength) * before @ rows.T, atol=1e-6, rtol=1e-5
    )
    beside = torch.linalg.svd(rows).Vh[2:]
    torch.testing.assert_close(after @ beside.T, before @ beside.T, atol=1e-6, rtol=1e-5)
    assert torch.linalg.matrix_rank(after - before, atol=1e-5) == 2
    assert torch.equal(down(model), before)


def test_every_reader_of_a_site_changes_and_gpt2_stores_weights_the_other_way() -> None:
    for kind, site in (("llama", "norm2.0"), ("gpt2", "value.0")):
        model = tiny(kind)
        place = find_sites(model)[site]
        width = model.get_submodule(place.readers[0]).weight.shape  # type: ignore[union-attr]
        d = {"llama": int(width[1]), "gpt2": int(width[0])}[kind]
        dis = dictionary(site, d)
        eraser = fit(model, disentanglers=dis, features=[Chosen(site, 1)])
        row = dis.W_dec[1]
        with eraser.apply(model) as edit:
            assert edit.targets == {f"{path}.weight" for path in place.readers}
            for path in place.readers:
                module: Any = model.get_submodule(path)
                seen = module(row) - module(torch.zeros_like(row))
                assert float(seen.detach().norm()) < 1e-5


def test_a_multiple_is_another_edit_and_an_adapter_is_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    eraser, model = fit(taught()), taught()
    double = eraser.scaled(2.0)
    assert double.strength == 2 and double.digest != eraser.digest
    with double.apply(model):
        edited = logits(model)
    with fit(model, strength=2.0).apply(model):
        assert torch.equal(logits(model), edited)
    adapted = peft.PeftModel.from_pretrained(taught(), str(double.to_peft(tmp_path)))
    torch.testing.assert_close(logits(adapted), edited, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="strength must be"):
        eraser.scaled(0)
    assert "2 at value.1; strength 1" in repr(eraser)


def test_the_slope_of_a_projection_is_the_linear_attribution() -> None:
    """Taking a share e of a latent away costs e times its linear attribution, to first order."""
    model, dis, size = taught(), dictionary(), 1e-3
    rows = answering(TinyTokenizer(), PAIRS, 32)
    places = places_of(model, {SITE: dis})
    got = attributions(model, TinyTokenizer(), {SITE: dis}, places, rows, linear=True)
    batches = batches_of(rows, TinyTokenizer(), 8, torch.device("cpu"))

    def mean() -> float:
        with torch.no_grad():
            parts = [
                logits_at(model, b).double().log_softmax(-1).gather(1, b.tokens[:, None]).sum()
                for b in batches
            ]
        return float(torch.stack(parts).sum()) / sum(b.count for b in batches)

    row, before = dis.W_dec[2], mean()

    def less(x: Tensor) -> Tensor:
        part = x - size * (x @ row)[..., None] * row
        part[:, 0] = x[:, 0]  # the first token of a text is not counted
        return part

    handle = hook(model, places[SITE], less)
    try:
        slope = (before - mean()) / size
    finally:
        handle.remove()
    assert float(got.mean[SITE][2]) == pytest.approx(slope, rel=0.05, abs=1e-4)
    codes = attributions(model, TinyTokenizer(), {SITE: dis}, places, rows)
    assert not torch.allclose(codes.mean[SITE], got.mean[SITE])


def test_a_factorisation_of_neurons_finds_what_answers_need() -> None:
    """No dictionary is given but that of the concept's own texts: answers fall, other texts hardly move."""
    model, tokenizer = taught(), TinyTokenizer()
    more = [f"the {word} is on the table near the door today" for word in WRONG]
    dis = semi_nmf(
        model, tokenizer, FORGET, [*RETAIN, *more], site=SITE, rank=8, tokens=60, progress=False
    )
    eraser = LatentProjectionEraser.fit(
        model, tokenizer, concept(), disentanglers=dis, answers=PAIRS, top=2, forget_texts=FORGET,
        retain_texts=RETAIN,
    )  # fmt: skip
    (kept,) = eraser.report["latents"].values()  # type: ignore[attr-defined]
    assert 1 <= len(kept) <= 2
    table = find_features(
        model, tokenizer, dis, concept(), scorers=("efficiency",), vote=1, answers=PAIRS, filters=None,
        forget_texts=FORGET, retain_texts=RETAIN, options=Search(linear=True), progress=False,
    )  # fmt: skip
    best = max(table, key=lambda one: one.scores["efficiency"])
    assert best.index in kept

    def said() -> float:
        prompts, answers = zip(*PAIRS, strict=True)
        return float(answer_log_probs(model, tokenizer, list(prompts), list(answers)).mean())

    before = said()
    with eraser.apply(model):
        assert said() < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_committed_it_changes_nothing_more_in_any_precision(dtype: torch.dtype) -> None:
    """What it takes is small beside the roundings of all the weights; it must not be taken twice for that."""
    eraser = fit(taught(), features=[Chosen(SITE, 1)], strength=0.5).with_space(None)
    model = taught().to(dtype)
    before = down(model)
    eraser.apply(model).commit()
    once = down(model)
    assert not torch.equal(once, before)
    with eraser.apply(model):
        assert torch.equal(down(model), once)


def test_by_default_what_speaks_against_the_concept_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from concept_erasure.sae import projection
    from concept_erasure.sae.search import Feature, FeatureTable

    rows = tuple(Feature(SITE, i, -1 if i == 1 else 1) for i in range(5))
    monkeypatch.setattr(projection, "find_features", lambda *_, **__: FeatureTable(rows))
    eraser = fit(taught(), features=None, top=3)
    assert eraser.report["latents"] == {SITE: [0, 2, 3]}


def test_refusals() -> None:
    model = taught()
    with pytest.raises(EditError, match=r"'mlp.1' is not read by linear modules alone.*value.9"):
        fit(model, disentanglers=dictionary("mlp.1", 32), features=[Chosen("mlp.1", 0)])
    with pytest.raises(ShapeError, match="48"):
        fit(model, disentanglers=dictionary(width=32))
    with pytest.raises(ValueError, match="no dictionaries"):
        fit(model, disentanglers={})
    with pytest.raises(ValueError, match="latent 9 is not in the 6"):
        fit(model, features=[Chosen(SITE, 9)])
    zero = replace(dictionary(), W_dec=torch.zeros(6, WIDTH))
    with pytest.raises(ValueError, match="decoder rows of the latents are zero"):
        fit(model, disentanglers=zero)
    for given in (
        {"answers": PAIRS},
        {"near_answers": PAIRS},
        {"features": None, "near_answers": PAIRS},
    ):
        with pytest.raises(ValueError, match="answers= are what latents are looked for with"):
            fit(model, **given)
    with pytest.raises(ValueError, match="strength must be a positive number"):
        fit(model, strength=-1.0)
    eraser = fit(model)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.5)  # type: ignore[operator, union-attr]
    with pytest.raises(EditError, match="neither what it held at the fit nor the edit"):
        eraser.with_space(None).apply(model)
    bare = replace(eraser, report={})
    with pytest.raises(ShapeError, match="does not say what reads"):
        bare._check()
