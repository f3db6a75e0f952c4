"""Semi-NMF: its steps, planted features, and the encoder fitted to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from concept_erasure.errors import ErasureWarning
from concept_erasure.sae.measure import quality
from concept_erasure.sae.seminmf import codes, factorise, semi_nmf, with_encoder
from tests.models import TinyTokenizer, tiny


def planted(count: int = 600, d: int = 24, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Return vectors, each a positive sum of two of some orthonormal directions, and the directions."""
    random = torch.Generator().manual_seed(0)
    D = torch.linalg.qr(torch.randn(d, d, generator=random))[0][:rank]
    z = torch.zeros(count, rank)
    chosen = torch.rand(count, rank, generator=random).topk(2).indices
    z.scatter_(1, chosen, 0.5 + torch.rand(count, 2, generator=random))
    return z @ D, D


def test_planted_directions_are_found() -> None:
    x, D = planted()
    z, found, errors = factorise(x, rank=8, k=2, seed=1)
    assert float((found @ D.T).amax(1).min()) > 0.99
    assert errors[-1] < 1e-2
    assert bool((z >= 0).all()) and bool(((z > 0).sum(1) <= 2).all())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8))


def test_the_error_falls_without_a_limit() -> None:
    x = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    _, _, errors = factorise(x, rank=6, iterations=20)
    assert all(b <= a + 1e-6 for a, b in pairwise(errors))


def test_codes_are_the_non_negative_least_squares_for_orthonormal_rows() -> None:
    x, D = planted()
    torch.testing.assert_close(codes(x, D, 8), (x @ D.T).clamp_min(0), rtol=1e-4, atol=1e-5)


def test_the_encoder_does_what_the_codes_say() -> None:
    x, D = planted()
    z, found, errors = factorise(x, rank=8, k=2)
    dis = with_encoder(x, z, found, torch.ones(24))
    measured = quality(dis, x + 1)
    assert measured.fvu < errors[-1] + 0.05
    assert abs(measured.l0 - float((z > 0).sum()) / len(x)) < 0.05
    torch.testing.assert_close(dis.W_dec.norm(dim=1), torch.ones(8))
    assert float((dis.W_dec @ D.T).amax(1).min()) > 0.99


def test_bad_options() -> None:
    x, _ = planted()
    for options, message in (
        ({"rank": 0}, "rank must"),
        ({"rank": 601}, "rank must"),
        ({"rank": 4, "k": 5}, "k must"),
        ({"rank": 4, "iterations": 0}, "iterations"),
    ):
        with pytest.raises(ValueError, match=message):
            factorise(x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ from the mean"):
        factorise(torch.zeros(9, 3), rank=2)


@pytest.mark.filterwarnings("ignore:the dictionary leaves")
def test_from_a_model() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    concept = [f"rome caesar senate legion {i} forum" for i in range(30)]
    neutral = [f"the cat sat on mat {i} today" for i in range(30)]
    options = {"site": "mlp.1", "rank": 12, "k": 2, "iterations": 15, "progress": False}
    dis = semi_nmf(model, tokenizer, concept, neutral, **options)  # type: ignore[arg-type]
    again = semi_nmf(model, tokenizer, concept, neutral, **options)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b)
        for a, b in zip(dis.tensors().values(), again.tensors().values(), strict=True)
    )
    assert (dis.site, dis.d, dis.n) == ("mlp.1", 32, 12)
    difference = [
        a - b for a, b in zip(dis.report["concept_rate"], dis.report["neutral_rate"], strict=True)
    ]  # type: ignore[call-overload]
    assert difference == sorted(difference, reverse=True)
    assert difference[0] > 0.1
    assert dis.report["quality"]["fvu"] < 1  # type: ignore[index]


def test_a_poor_fit_is_said() -> None:
    texts = [f"w{i} w{i * 7} w{i * 3}" for i in range(40)]
    with pytest.warns(ErasureWarning, match="unexplained"):
        semi_nmf(
            tiny("llama"),
            TinyTokenizer(),
            texts,
            texts,
            site="mlp.0",
            rank=1,
            iterations=1,
            progress=False,
        )
