"""A planted direction is found and taken out; what was never there is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.concept_items import Item
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.errors import ShapeError
from concept_erasure.evals.language.ablation import (
    ablated,
    directional_ablation,
    directions,
    mean_activations,
)
from concept_erasure.report import Report
from concept_erasure.sites import find_sites, hook
from tests.evals.language.planted import bits
from tests.models import TinyTokenizer, tiny

TEXTS = ["the cat sat on the mat", "a dog", "one two three four five six seven"]
ITEMS = [
    Item(
        stem=f"thing {i} is ___",
        choices=("red", "green", "blue", "grey"),
        answer=i % 4,
        format="cloze",
    )
    for i in range(24)
]


def push(model: nn.Module, size: float = 6.0) -> tuple[Edit, Tensor]:
    """An edit that adds one direction at one layer, as RMU does, and nothing else."""
    unit = torch.randn(32, generator=torch.Generator().manual_seed(5))
    unit = unit / unit.norm()
    return Edit(
        model, [HookPatch(find_sites(model)["residual.1"], lambda x: x + size * unit)]
    ), unit


def activations(model: nn.Module, tokenizer: TinyTokenizer, names: list[str]) -> dict[str, Tensor]:
    """What stands at some sites for the first text."""
    seen: dict[str, Tensor] = {}
    handles = [
        hook(model, find_sites(model)[name], lambda x, name=name: seen.update({name: x}))
        for name in names
    ]
    with torch.no_grad():
        model(**tokenizer(TEXTS[:1], return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return seen


def divergence(one: Tensor, other: Tensor) -> float:
    """Mean KL(one || other)."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("kind", "size"), [("llama", 6.0), ("gemma2", 60.0), ("gpt2", 6.0)])
def test_the_planted_direction_is_found_and_undone(kind: str, size: float) -> None:
    model, tokenizer = tiny(kind), TinyTokenizer()
    original = mean_activations(model, tokenizer, TEXTS)
    batch = tokenizer(TEXTS[2:], return_tensors="pt")
    with torch.no_grad():
        base = model(**batch).logits
        edit, unit = push(model, size)
        with edit:
            found = directions(mean_activations(model, tokenizer, TEXTS), original)
            assert set(found) == {"residual.1", "residual.2"}  # nothing changes before the edit
            torch.testing.assert_close(found["residual.1"].float(), unit, atol=1e-5, rtol=1e-4)
            edited = model(**batch).logits
            with ablated(model, {"residual.1": found["residual.1"]}, originals=original):
                restored = model(**batch).logits
    assert divergence(base, restored) < 0.25 * divergence(base, edited)


def test_a_projection_leaves_nothing_along_the_direction() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    original = mean_activations(model, tokenizer, TEXTS)
    edit, _ = push(model)
    with edit:
        found = directions(mean_activations(model, tokenizer, TEXTS), original)
        for centre in (None, original):
            with ablated(model, found, originals=centre):
                seen = activations(model, tokenizer, list(found))
            for name, unit in found.items():
                wanted = 0.0 if centre is None else float(original[name] @ unit)
                along = seen[name].double() @ unit
                torch.testing.assert_close(
                    along, torch.full_like(along, wanted), atol=1e-4, rtol=1e-4
                )


def test_means_are_those_of_single_texts_without_their_first_tokens() -> None:
    model = tiny("llama")
    rows = []
    handle = hook(model, find_sites(model)["residual.0"], lambda x: rows.append(x[0, 1:].double()))
    with torch.no_grad():
        for text in TEXTS:
            model(**TinyTokenizer()([text], return_tensors="pt"))
    handle.remove()
    expected = torch.cat(rows).mean(0)
    for side in ("right", "left"):
        found = mean_activations(
            model, TinyTokenizer(side), TEXTS, sites="residual.0", batch_size=2
        )
        torch.testing.assert_close(found["residual.0"], expected, atol=1e-6, rtol=1e-5)


def test_the_attack_brings_the_answers_back() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    before = bits(model)
    base = mean_activations(model, tokenizer, TEXTS)
    other = tiny("llama")
    edit, _ = push(model, 30.0)
    with edit:
        found = directional_ablation(
            model, tokenizer, ITEMS, TEXTS, original=other, about="original", progress=False
        )
        same = directional_ablation(
            model, tokenizer, ITEMS, TEXTS, original=base, about="original", progress=False
        )
    assert found.items == found.choosing_items == 12
    assert found.tried == 2
    assert found.site in {"residual.1", "residual.2"}
    assert found.original is not None
    assert found.log_prob[1] > found.log_prob[0]  # this edit makes every answer improbable
    assert found.worst.value >= found.before.value
    assert (same.each, same.one, same.site) == (found.each, found.one, found.site)
    assert same.original is None
    Report("ablation", [found.to_dict()]).to_dict()
    assert "one direction" in repr(found)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="no direction to take out"):
        directional_ablation(model, tokenizer, ITEMS, TEXTS, original=tiny("llama"), progress=False)
    with pytest.raises(ValueError, match="non-empty list"):
        mean_activations(model, tokenizer, "one text")
    with pytest.raises(ValueError, match="one token only"):
        mean_activations(model, tokenizer, ["one", "two"])
    means = mean_activations(model, tokenizer, TEXTS)
    with pytest.raises(ShapeError, match="other sites"):
        directions(means, {"residual.0": means["residual.0"]})
    with pytest.raises(ValueError, match="two items at least"):
        directional_ablation(model, tokenizer, ITEMS[:1], TEXTS, original=means)
    with pytest.raises(ValueError, match="about must be"):
        directional_ablation(model, tokenizer, ITEMS, TEXTS, original=means, about="mean")  # type: ignore[arg-type]
