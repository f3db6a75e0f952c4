"""Real models: every layer from one pass, edits that go without a trace."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.collect import fit_streaming
from concept_erasure.evals.language import perplexity
from concept_erasure.evals.models import SMOLLM2, load_smollm2
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, gender_texts
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.linear.scrubbing import ConceptScrubber

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(  # found, not imported: the package would pull in what it needs for itself
        not all(find_spec(name) for name in (SMOLLM2[0], "gguf")),
        reason=f"needs {SMOLLM2[1]} and gguf",
    ),
]

Fitted = tuple[nn.Module, Any, dict[str, LeaceEraser], dict[str, Tensor]]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """SmolLM2, its tokenizer, an eraser for each of its 30 layers, and its state before the fit."""
    model, tokenizer = load_smollm2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    items = gender_texts("fit", 100, seed=0)
    fitters = fit_streaming(
        model,
        tokenizer,
        [item.text for item in items],
        ["she" if item.gender else "he" for item in items],
        sites="residual.*",
        fitter=lambda width: LeaceFitter(width, 2),
        background=True,
        batch_size=16,
    )
    return model, tokenizer, {name: fitter.eraser for name, fitter in fitters.items()}, before


def logits(model: nn.Module, tokenizer: Any) -> Tensor:
    inputs = tokenizer("The nurse said that", return_tensors="pt")
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return same and not hooked and not model.training


def test_every_layer_is_guarded_from_one_pass(fitted: Fitted) -> None:
    model, _, erasers, before = fitted
    assert list(erasers) == [f"residual.{i}" for i in range(30)]
    for name, eraser in erasers.items():
        assert eraser.map.rank == 1
        assert float(str(eraser.report["residual"])) <= 1e-6, name
        assert eraser.space is not None and eraser.space.site == name
    assert untouched(model, before)


def test_attach_and_undo_leave_no_trace(fitted: Fitted) -> None:
    model, tokenizer, erasers, before = fitted
    clean = logits(model, tokenizer)
    edit = erasers["residual.26"].attach(model)
    assert not torch.equal(logits(model, tokenizer), clean)
    edit.undo()
    assert torch.equal(logits(model, tokenizer), clean)
    assert untouched(model, before)


def test_background_keeps_the_perplexity(fitted: Fitted) -> None:
    model, tokenizer, erasers, _ = fitted
    texts = list(NEUTRAL_SENTENCES)[:20]
    clean = perplexity(model, tokenizer, texts)
    with erasers["residual.26"].attach(model):
        edited = perplexity(model, tokenizer, texts)
    assert float(edited) < 1.05 * float(clean)


def test_scrubbing_two_layers(fitted: Fitted) -> None:
    model, tokenizer, _, before = fitted
    clean = logits(model, tokenizer)
    items = gender_texts("fit", 60, seed=1)
    scrubber = ConceptScrubber.fit(
        model,
        tokenizer,
        [item.text for item in items],
        [item.gender for item in items],
        sites=["norm1.10", "norm1.20"],
        batch_size=16,
    )
    assert untouched(model, before)
    for eraser in scrubber.erasers.values():
        assert float(str(eraser.report["residual"])) <= 1e-6
    with scrubber.scrub(model):
        assert not torch.equal(logits(model, tokenizer), clean)
    with scrubber.attach(model):
        assert not torch.equal(logits(model, tokenizer), clean)
    assert torch.equal(logits(model, tokenizer), clean)
    assert untouched(model, before)
