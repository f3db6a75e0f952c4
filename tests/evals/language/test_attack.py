"""The loss of a target, its gradient, what may stand in a suffix, and that the model is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from concept_erasure.concept_items import Item
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.evals.language._attack import (
    allowed_tokens,
    attack_case,
    check_budget,
    contains,
    frozen,
    how_of,
    logits_at,
)
from concept_erasure.evals.language._objective import Objective
from concept_erasure.sites import find_sites
from tests.evals.language.planted import FIXED, Pairs
from tests.models import tiny

DECODERS = ("llama", "gemma2", "gemma3", "qwen2", "mistral", "gpt2", "gpt_neox")
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, 128))]
PROMPTS, AFTERS, TARGETS = ["w5 w6 w7", "w9"], [" w20", " w21 w22"], [" w30", " w31 w32 w33"]


def objective(model: nn.Module, *, chunk: int = 3) -> Objective:
    return Objective(model, Pairs(words=WORDS), PROMPTS, TARGETS, AFTERS, chunk=chunk)


def by_hand(model: nn.Module, suffix: Tensor, rows: Tensor | None = None) -> Tensor:
    """The loss without cache, batches or gathering; `rows` are one-hot rows of the suffix."""
    tokenizer, total = Pairs(words=WORDS), torch.zeros(())
    embedding = model.get_input_embeddings()
    table = embedding(torch.arange(128)[None])[0]
    for prompt, after, target in zip(PROMPTS, AFTERS, TARGETS, strict=True):
        before, behind, wanted = (tokenizer.encode(t) for t in (prompt, after, target))
        ids = torch.tensor([1, *before, *suffix.tolist(), *behind, *wanted])
        embeds = one_hot(ids, 128).float() @ table
        if rows is not None:
            start = 1 + len(before)
            embeds = torch.cat([embeds[:start], rows @ table, embeds[start + len(suffix) :]])
        logs = model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        place = torch.arange(len(ids) - len(wanted), len(ids))
        total = total - logs[place - 1, ids[place]].mean()
    return total / len(PROMPTS)


@pytest.mark.parametrize("kind", DECODERS)
def test_loss_and_gradient_are_those_by_hand(kind: str) -> None:
    model = tiny(kind)
    suffixes = torch.randint(4, 128, (5, 4), generator=torch.Generator().manual_seed(0))
    with frozen(model):
        found = objective(model)
        assert found.cached
        losses = found.losses(suffixes)
        for one, loss in zip(suffixes, losses, strict=True):
            torch.testing.assert_close(loss, by_hand(model, one), atol=1e-4, rtol=1e-4)
        gradient = found.gradient(suffixes[0])
        with torch.enable_grad():
            rows = one_hot(suffixes[0], 128).float().requires_grad_(True)
            (expected,) = torch.autograd.grad(by_hand(model, suffixes[0], rows), rows)
    assert gradient.shape == (4, 128)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_logits_at_places_are_those_of_the_whole(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(4, 128, (3, 7), generator=torch.Generator().manual_seed(1))
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 2] = chosen[2, 5:] = True
    with torch.no_grad():
        torch.testing.assert_close(
            logits_at(model, chosen, {"input_ids": ids}), model(input_ids=ids).logits[chosen]
        )
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks


def test_the_live_edit_is_attacked() -> None:
    model = tiny("llama")
    suffix = torch.tensor([[4, 5, 6]])
    with frozen(model):
        before = objective(model).losses(suffix)
        for site in (
            "embedding",
            "residual.1",
        ):  # before and behind the point where the suffix enters
            patch = HookPatch(find_sites(model)[site], lambda x: 0.5 * x)
            with Edit(model, [patch], label="half"):
                edited = objective(model)
                assert float((edited.losses(suffix) - before).abs().max()) > 1e-3
                expected = by_hand(model, suffix[0])
                torch.testing.assert_close(edited.losses(suffix)[0], expected, atol=1e-4, rtol=1e-4)
                with torch.enable_grad():
                    rows = one_hot(suffix[0], 128).float().requires_grad_(True)
                    (slope,) = torch.autograd.grad(by_hand(model, suffix[0], rows), rows)
                torch.testing.assert_close(edited.gradient(suffix[0]), slope, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(objective(model).losses(suffix), before)


def test_without_a_cache_the_same_losses() -> None:
    model = tiny("llama")
    suffixes = torch.randint(4, 128, (5, 4), generator=torch.Generator().manual_seed(0))
    with frozen(model):
        cached, bare = objective(model), objective(model)
        for case in bare.cases:
            object.__setattr__(case, "cache", None)
        assert cached.cached
        assert not bare.cached
        torch.testing.assert_close(
            cached.losses(suffixes), bare.losses(suffixes), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            cached.gradient(suffixes[0]), bare.gradient(suffixes[0]), atol=1e-5, rtol=1e-4
        )
        one = cached.next_probabilities(suffixes)
        torch.testing.assert_close(one, bare.next_probabilities(suffixes), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.sum(1), torch.ones(5))
        assert cached.next_probabilities(suffixes[:, :0]).shape == one.shape


def test_frozen_puts_every_flag_back() -> None:
    model = tiny("llama").train()
    model.model.layers[1].eval()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def inside() -> None:
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]


def test_what_survives_as_text() -> None:
    merged = [("t1", "t2"), ("me", "t4"), ("t7", "answer:")]
    tokenizer = Pairs(merged)
    model = tiny("llama")
    with frozen(model):
        found = Objective(model, tokenizer, ["tell me"], [" secret"], " answer:")
    ids = tokenizer.ids
    rows = [["t1", "t2"], ["t2", "t1"], ["t4", "t1"], ["t1", "t4"], ["t1", "t7"], ["t7", "t1"]]
    suffixes = torch.tensor([[ids[word] for word in row] for row in rows])
    # inside the suffix, where it begins, where it ends
    assert found.stable(suffixes).tolist() == [False, True, False, True, False, True]
    assert found.text(suffixes[1]).split() == rows[1]


def test_special_and_unprintable_tokens_are_left_out() -> None:
    tokenizer = Pairs(words=["<pad>", "<bos>", "<eos>", "<unk>", "a", "é", " ", "b\n", "c"])
    keep = allowed_tokens(tokenizer, 12)
    assert keep.nonzero()[:, 0].tolist() == [4, 8]
    assert allowed_tokens(tokenizer, 12, ascii_only=False).nonzero()[:, 0].tolist() == [4, 5, 8]
    with pytest.raises(ValueError, match="no token may stand"):
        allowed_tokens(Pairs(words=["<pad>", "<bos>", "<eos>", "<unk>", "é"]), 5)


def test_cases_of_items() -> None:
    asked = Item(stem="Who owns the owl?", choices=("Ann", "Bob"), answer=1)
    assert attack_case(asked) == ("Question: Who owns the owl?", "\nAnswer:", " Bob")
    cloze = Item(stem="The owl belongs to ___", choices=("Ann", "Bob"), answer=0)
    assert attack_case(cloze) == ("", " The owl belongs to", " Ann")
    assert how_of([asked]) == "answer"
    with pytest.raises(ValueError, match="of one kind"):
        how_of([asked, replace(cloze, format="cloze")])


def test_the_answer_key_wants_whole_words() -> None:
    assert contains("It was the Owl, of course.", "owl")
    assert not contains("He scowls.", "owl")
    assert not contains("Sure, here is the answer:", "owl")


def test_a_budget_below_the_minimum_is_refused() -> None:
    minimum = {"steps": 500, "batch": 512}
    assert not check_budget("gcg", {"steps": 500, "batch": 512}, minimum, smoke=False)
    assert check_budget("gcg", {"steps": 2, "batch": 512}, minimum, smoke=True)
    with pytest.raises(ValueError, match=r"steps at least 500 \(got 2\).*smoke=True"):
        check_budget("gcg", {"steps": 2, "batch": 512}, minimum, smoke=False)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="positive whole number"):
            check_budget("gcg", {"steps": bad}, minimum, smoke=True)  # type: ignore[dict-item]


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), Pairs(words=WORDS)
    with pytest.raises(ValueError, match="2 prompts and 1 targets"):
        Objective(model, tokenizer, ["w4", "w5"], ["w6"])
    with pytest.raises(ValueError, match="has no tokens"):
        Objective(model, tokenizer, ["w4"], [""])
    with pytest.raises(ValueError, match="as many afters"):
        Objective(model, tokenizer, ["w4"], ["w6"], ["", ""])
    assert len(FIXED) == 7
