"""Sharing what prompts have in common changes no number, on any architecture and for any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.evals.language._continuations import (
    Query,
    _maximal,
    common_prefix,
    logits_at_places,
    score,
)
from tests.models import KINDS, tiny

CAUSAL = [kind for kind in KINDS if kind != "bert"]


def queries(count: int = 9, *, shared: int = 4, seed: int = 0) -> list[Query]:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(4, 128, (length,), generator=g).tolist())

    head = tuple(range(5, 5 + shared))
    made = [Query(head + draw(3, 30), tuple(draw(1, 5) for _ in range(4))) for _ in range(count)]
    # one choice that is the beginning of another, and a context that is the beginning of another
    first = made[0]
    made.append(Query(first.context, (first.continuations[0], (*first.continuations[0], 9, 11))))
    made.append(Query((*first.context, 7), ((8,),)))
    return made


def naive(model: nn.Module, query: Query) -> tuple[list[float], list[int]]:
    sums, ranks = [], []
    for one in query.continuations:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([query.context + one])).logits[0]
        log_p, start = logits.log_softmax(-1), len(query.context) - 1
        sums.append(sum(float(log_p[start + j, token]) for j, token in enumerate(one)))
        ranks.append(1 + int((logits[start] > logits[start, one[0]]).sum()))
    return sums, ranks


@pytest.mark.parametrize("kind", CAUSAL)
def test_equals_one_text_after_another(kind: str) -> None:
    model, asked = tiny(kind), queries()
    expected = [naive(model, query) for query in asked]
    for batch_size in (1, 4, 16):
        for (sums, ranks), found in zip(
            expected, score(model, asked, batch_size=batch_size), strict=True
        ):
            assert found.log_probs == pytest.approx(sums, abs=2e-5)
            assert list(found.ranks) == ranks


class NoCache(nn.Module):
    """A model that takes ids and a mask, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")
        self.tokens = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        self.tokens += input_ids.numel()
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_a_model_without_a_cache_or_a_named_head() -> None:
    model, asked = NoCache(), queries()
    for query, found in zip(asked, score(model, asked, batch_size=4), strict=True):
        assert found.log_probs == pytest.approx(naive(model, query)[0], abs=2e-5)


def test_shared_tokens_are_read_once() -> None:
    model, plain = tiny("llama"), NoCache()
    read: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0].numel())
    )
    asked = queries(8, shared=40)
    score(model, asked, batch_size=16)
    score(plain, asked, batch_size=16)
    assert sum(read) < 0.5 * plain.tokens


def test_the_head_sees_only_what_is_scored() -> None:
    model = tiny("gemma2")  # caps its logits
    ids = torch.randint(4, 128, (3, 7), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: seen.append(args[0].shape[:-1].numel())
    )
    rows, places = torch.tensor([0, 2]), torch.tensor([3, 6])
    with torch.no_grad():
        found, _ = logits_at_places(model, rows, places, input_ids=ids)
        handle.remove()
        whole = model(input_ids=ids).logits
    assert seen == [2]
    torch.testing.assert_close(found, whole[rows, places])


def test_left_as_it_was() -> None:
    model = tiny("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, queries(3))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_numbers_that_are_none_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        score(model, queries(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        score(model, queries(2), batch_size=0)


def test_prefixes() -> None:
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_prefix([(1,), (2,)]) == 0
    assert _maximal({(1,), (1, 2), (1, 3), (1, 2, 3), (2,)}) == [(1, 2, 3), (1, 3), (2,)]
