"""Vocabulary projection: moments, the shortlist against exact lists, blocks, and what a norm does to directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.errors import ShapeError
from concept_erasure.sae import lens
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.lens import Unembedding, exact_lists, screen, token_lists, written
from tests.models import tiny


def dictionary(n: int = 40, d: int = 32, site: str = "mlp.1") -> Disentangler:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(3))
    rows = rows / rows.norm(dim=1, keepdim=True)
    return Disentangler(
        rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(d), torch.full((n,), 0.1), site
    )


def logits(model: Any, dis: Disentangler) -> Tensor:
    """Return the logit lens in full, shape (n, V)."""
    y = written(model, dis, gain=lens.lens_gain(model, dis))
    return y @ model.get_output_embeddings().weight.float().T


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_standardised_scores_are_those_of_the_whole_vocabulary(kind: str) -> None:
    model, dis = tiny(kind), dictionary()
    whole = logits(model, dis)
    wanted = (whole - whole.mean(1, keepdim=True)) / whole.std(1, keepdim=True, correction=0)
    y = written(model, dis, gain=lens.lens_gain(model, dis))
    got = Unembedding.of(model).standardised(y, torch.tensor([5, 17, 100]))
    torch.testing.assert_close(got, wanted[:, [5, 17, 100]], rtol=1e-3, atol=1e-3)


def test_the_final_norm_is_the_models_own() -> None:
    model: Any = tiny("gpt2")
    dis = dictionary()
    norm = model.transformer.ln_f
    want = norm(dis.W_dec * 32**0.5) - norm(torch.zeros(1, 32))
    torch.testing.assert_close(written(model, dis), want)
    assert float(norm.bias.detach().abs().max()) > 0  # which says nothing about a latent


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_vectors_before_a_post_norm_pass_through_its_gain(kind: str) -> None:
    model = tiny(kind)
    before = dictionary()
    gain = lens.lens_gain(model, before)
    assert gain is not None
    after = replace(before, after_post_norm=True)
    assert lens.lens_gain(model, after) is None
    scaled = before.W_dec * gain
    moved = replace(before, W_dec=scaled / scaled.norm(dim=1, keepdim=True))
    torch.testing.assert_close(
        written(model, before, gain=gain), written(model, moved), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("values", [2**24, 40, 7 * 40])
def test_lists_do_not_depend_on_blocks(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dis = tiny("llama"), dictionary()
    whole = logits(model, dis)
    monkeypatch.setattr(lens, "VALUES", values)
    monkeypatch.setattr(lens, "LATENTS", 16)
    top, bottom = exact_lists(
        model.get_output_embeddings().weight,  # type: ignore[operator]
        written(model, dis),
        6,
    )
    assert torch.equal(top, whole.topk(6).indices)
    assert torch.equal(bottom, (-whole).topk(6).indices)


def test_the_screen_finds_what_lists_of_all_latents_would_find() -> None:
    model, dis = tiny("llama"), dictionary(400)
    plus, unembedding = (9, 21, 33), Unembedding.of(model)
    lists = token_lists(unembedding, model, dis, torch.arange(dis.n), 8)
    first = screen(unembedding, model, dis, plus, matches=2)
    for bottom, score in ((False, first.up), (True, first.down)):
        count, share = lists.shares(plus, bottom=bottom)
        torch.testing.assert_close(share, count.float() / 3)
        matched = (count >= 2).nonzero()[:, 0]
        assert len(matched) > 2
        short = score.topk(dis.n // 20).indices
        assert bool(torch.isin(matched, short).all())


def test_neighbours_lower_the_score_and_blocks_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, dis = tiny("llama"), dictionary()
    unembedding = Unembedding.of(model)
    alone = screen(unembedding, model, dis, (9, 21))
    both = screen(unembedding, model, dis, (9, 21), (50, 51, 52))
    assert bool((both.up <= alone.up).all()) and bool((both.up < alone.up).any())
    monkeypatch.setattr(lens, "LATENTS", 7)
    again = screen(unembedding, model, dis, (9, 21), (50, 51, 52))
    torch.testing.assert_close(again.up, both.up)
    torch.testing.assert_close(again.down, both.down)


def test_half_precision_models_and_dictionaries() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    dis = dictionary().to(dtype=torch.bfloat16)
    single, wide = tiny("llama"), dictionary()
    got = Unembedding.of(model).standardised(written(model, dis), torch.arange(128))
    want = Unembedding.of(single).standardised(written(single, wide), torch.arange(128))
    assert got.dtype == torch.float32
    assert float((got - want).abs().mean()) < 0.02


def test_what_cannot_be_read_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ShapeError, match="width 16"):
        written(model, dictionary(d=16, site=""))
    with pytest.raises(ValueError, match="no head"):
        Unembedding.of(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="between 1 and the 10 tokens"):
        exact_lists(torch.zeros(10, 4), torch.zeros(2, 4), 11)
