"""EMBER: which factors and tokens, tied embeddings, and files of untied models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.errors import EditError, ErasureWarning, SiteNotFoundError
from concept_erasure.sae._embedding_edit import EmbeddingOptions, UntiePatch, concept_factors
from concept_erasure.sae.embedding import EmbeddingEditEraser
from tests.models import TinyTokenizer, tiny

WORDS = ("harry", "hedwig", "snape", "broom")
CONCEPT = Concept(name="harry", synonyms=WORDS[1:], neighbours=("bread",))
ADDED = 4.0


def ids(*words: str) -> list[int]:
    return [TinyTokenizer().encode(word, add_special_tokens=False)[0] for word in words]


def planted(kind: str = "llama") -> tuple[nn.Module, torch.Tensor]:
    """Return a tiny model whose concept tokens share one direction, and that direction."""
    model = tiny(kind)
    weight = model.get_input_embeddings().weight
    unit = torch.nn.functional.normalize(
        torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(5)), dim=0
    )
    with torch.no_grad():
        weight -= (weight @ unit)[:, None] * unit
        weight[ids(*WORDS)] += ADDED * unit
    return model, unit


def fit(model: nn.Module, **options: Any) -> EmbeddingEditEraser:
    return EmbeddingEditEraser.fit(model, TinyTokenizer(), CONCEPT, **options)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_the_shared_direction_is_taken_from_the_concepts_tokens_only(kind: str) -> None:
    """Also where the model multiplies its embeddings (Gemma), and where the head shares them."""
    model, unit = planted(kind)
    eraser = fit(model, rank=8)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    assert set(eraser.report["tokens"]) == set(WORDS)  # type: ignore[call-overload]
    with eraser.apply(model):
        after = model.get_input_embeddings().weight.detach()
        rows = ids(*WORDS)
        assert float((after[rows] @ unit).abs().max()) < 0.35 * ADDED
        other = torch.ones(len(before), dtype=torch.bool)
        other[rows] = False
        assert torch.equal(after[other], before[other])
    assert torch.equal(model.get_input_embeddings().weight, before)
    scale = eraser.report["scale"]
    assert scale == pytest.approx(32**0.5 if kind == "gemma3" else 1, rel=1e-3)


def test_delta_is_the_share_that_goes() -> None:
    model, _ = planted()
    one, half = fit(model), fit(model, delta=0.5)
    torch.testing.assert_close(
        half.weights["embedding.change"] * 2, one.weights["embedding.change"]
    )
    shares = [float(made.report["share_removed"]) for made in (half, one)]  # type: ignore[arg-type]
    assert 2 * shares[0] == pytest.approx(shares[1]) and shares[0] > 0


def tied() -> nn.Module:
    model, _ = planted("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def test_a_tied_head_keeps_its_logits_and_is_tied_again() -> None:
    model = tied()
    eraser = fit(model)
    head = model.lm_head.weight.detach().clone()
    with eraser.apply(model) as edit:
        assert isinstance(edit.patches[0], UntiePatch)
        assert model.lm_head.weight is not model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, head) and not model.config.tie_word_embeddings
        assert not torch.equal(model.transformer.wte.weight, head)
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, head)


def test_both_changes_reading_and_writing_and_refuse_refuses() -> None:
    model = tied()
    eraser = fit(model, tied="both")
    before = model.lm_head.weight.detach().clone()
    with eraser.apply(model) as edit:
        assert model.lm_head.weight is model.transformer.wte.weight and len(edit.patches) == 1
        assert not torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.lm_head.weight, before)
    with pytest.raises(EditError, match="one tensor"):
        fit(model, tied="refuse")


def test_an_untied_model_is_saved_whole(tmp_path: Path) -> None:
    model = tied()
    fit(model).apply(model).commit()
    batch = TinyTokenizer()(["harry rides a broom"], return_tensors="pt")
    with torch.no_grad():
        want = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, want)


def test_the_head_of_the_base_model_is_not_needed() -> None:
    model = tied()
    eraser = fit(model)
    with eraser.apply(model.transformer) as edit:
        assert edit.targets == {"wte.weight"}


def test_factors_must_stand_out_and_be_used_by_two_tokens() -> None:
    about = torch.tensor([True, True, True, False, False])
    codes = torch.tensor(
        [[1.0, 3.0, 1, 0], [1.0, 0, 1, 0], [1.0, 0, 0, 0], [0.0, 0, 1, 1], [0.2, 0, 1, 1]]
    )
    assert concept_factors(codes, about, 2.0).tolist() == [True, False, False, False]
    alone = torch.tensor([True, False, False, False, False])
    assert concept_factors(codes, alone, 2.0).tolist() == [False, True, False, False]


def test_nothing_in_common_is_an_error() -> None:
    model, _ = planted()
    with pytest.raises(ValueError, match="lower the ratio"):
        fit(model, tokens=ids("harry"), ratio=1e9, near=2)
    with pytest.raises(SiteNotFoundError, match="no input embeddings"):
        fit(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"ratio": 1.0}, {"delta": 0.0}, {"tied": "maybe"}, {"k": 0}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EmbeddingOptions(**options)


def test_training_after_the_edit_is_noticed() -> None:
    model, _ = planted()
    edit = fit(model).apply(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids("harry")] += 1
    with pytest.warns(ErasureWarning, match="changed after"):
        edit.undo()


def test_tokens_can_be_given() -> None:
    model, _ = planted()
    eraser = fit(model, tokens=ids("harry", "snape"))
    assert set(eraser.weights["embedding.rows"].tolist()) <= set(ids("harry", "snape"))
    assert replace(eraser).digest == eraser.digest
