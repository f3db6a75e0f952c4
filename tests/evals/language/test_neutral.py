"""Divergence from the original: exact, whichever way the change is given, and the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from concept_erasure.concept import Concept
from concept_erasure.edit import DensePatch, Edit, HookPatch
from concept_erasure.evals.language import neutral
from concept_erasure.evals.language._lifted import lifted
from concept_erasure.evals.language.neutral import kl_to_original, neutral_texts
from concept_erasure.sites import find_sites
from tests.evals.language.planted import bits
from tests.models import TinyTokenizer, tiny

TEXTS = ["the cat sat on the mat", "a dog barked", "one two three four five six seven", "red blue"]
NAME = "lm_head.weight"


class Scaled:
    """An eraser that changes weights and an activation."""

    def __init__(self, factor: float = 1.3) -> None:
        self.factor = factor

    def apply(self, model: nn.Module) -> Edit:
        weight = model.get_parameter(NAME).detach()
        site = find_sites(model)["residual.1"]
        return Edit(
            model,
            [DensePatch(NAME, self.factor * weight), HookPatch(site, lambda x: self.factor * x)],
        )


class Broken:
    """An eraser after which nothing is a number."""

    def apply(self, model: nn.Module) -> Edit:
        site = find_sites(model)["residual.1"]
        return Edit(model, [HookPatch(site, lambda x: x * float("nan"))])


def by_hand(model: nn.Module, change: Scaled) -> tuple[float, float]:
    tokenizer = TinyTokenizer()
    total, nll, count = 0.0, 0.0, 0
    for text in TEXTS:
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with change.apply(model):
                q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total += float(kl_div(q, p, log_target=True, reduction="sum"))
        nll -= float(q.gather(1, ids[0, 1:, None]).sum())
        count += len(p)
    return total / count, nll / count


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_kl_is_that_of_one_text_after_another(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, change = tiny("llama"), Scaled()
    before = bits(model)
    if batch_size == 3:  # hold few distributions at once: many groups
        monkeypatch.setattr(neutral, "_HELD", 128 * 8)
    found = kl_to_original(model, change, TinyTokenizer(), TEXTS, batch_size=batch_size)
    kl, nll = by_hand(model, change)
    assert found.kl.value == pytest.approx(kl, rel=1e-4)
    assert found.perplexity_after == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)
    assert found.tokens == sum(len(text.split()) - 1 for text in TEXTS) and found.texts == len(
        TEXTS
    )
    assert found.kl.low <= found.kl.value <= found.kl.high
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())


def test_every_way_to_give_the_change() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    expected = kl_to_original(model, Scaled(), tokenizer, TEXTS)

    @contextmanager
    def changed() -> Iterator[None]:
        with Scaled().apply(model):
            yield

    assert kl_to_original(model, changed, tokenizer, TEXTS) == expected
    edit = Scaled().apply(model)
    assert kl_to_original(model, edit, tokenizer, TEXTS) == expected
    assert kl_to_original(model, [edit], tokenizer, TEXTS) == expected
    edit.undo()
    with pytest.raises(TypeError, match="need an eraser"):
        kl_to_original(model, 3, tokenizer, TEXTS)  # type: ignore[arg-type]


def test_no_change_is_no_divergence() -> None:
    model = tiny("llama")
    found = kl_to_original(model, Scaled(1.0), TinyTokenizer(), TEXTS)
    assert found.kl.value == 0.0
    assert found.agreement == 1.0
    assert found.perplexity_before == found.perplexity_after


def test_lifting_shows_the_original_and_leaves_the_edit() -> None:
    model = tiny("llama")
    ids = torch.arange(5, 12)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=ids).logits
        return out

    clean = logits()
    first = Scaled(1.2).apply(model)
    once = logits()
    second = Edit(model, [HookPatch(find_sites(model)["residual.0"], lambda x: x + 1)])
    twice = logits()
    with lifted(model):
        assert torch.equal(logits(), clean)
    with lifted(model, [second]):
        assert torch.equal(logits(), once)
    assert torch.equal(logits(), twice)
    with pytest.raises(ValueError, match="only the last edits"), lifted(model, [first]):
        pass
    with pytest.raises(KeyError), lifted(model):
        raise KeyError
    assert torch.equal(logits(), twice)
    second.undo()
    first.undo()
    assert torch.equal(logits(), clean)


def test_broken_models_are_no_result() -> None:
    with pytest.raises(ValueError, match="no finite log-probabilities"):
        kl_to_original(tiny("llama"), Broken(), TinyTokenizer(), TEXTS)
    with pytest.raises(ValueError, match="text 1 has 1 tokens"):
        kl_to_original(tiny("llama"), Scaled(), TinyTokenizer(), ["one two", "one"])


def test_neutral_texts_are_neutral() -> None:
    texts = neutral_texts()
    assert len(set(texts)) == len(texts) == 84
    for name in ("harry_potter", "shakespeare"):
        concept = Concept.load(name)
        names = {entity for entity, _ in concept.entities} | set(concept.names)
        joined = " ".join(texts)
        assert not [one for one in names if len(one.split()) > 1 and one in joined]
        assert not any(concept.name in text for text in texts)
