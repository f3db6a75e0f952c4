"""The dictionary: its equations, levels, thresholds, and what it asks of a model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concept_erasure.collect import collect
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.sae.disentangler import Disentangler, normalise, post_norm
from tests.models import TinyTokenizer, tiny


def random(
    d: int = 8, n: int = 20, widths: tuple[int, ...] = (4, 9, 20), seed: int = 0
) -> Disentangler:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    columns, bias = (
        rows.T + 0.1 * torch.randn(d, n, generator=generator),
        torch.randn(n, generator=generator),
    )
    theta = torch.rand(n, generator=generator)
    W_enc, b_enc, W_dec, theta = normalise(columns, bias, rows, theta)
    b_dec = torch.randn(d, generator=generator)
    return Disentangler(W_enc, b_enc, W_dec, b_dec, theta, site="mlp.1", widths=widths)


def vectors(count: int = 12, d: int = 8, seed: int = 1) -> Tensor:
    return 2 * torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def test_equations() -> None:
    dis, x = random(), vectors()
    h = (x - dis.b_dec) @ dis.W_enc + dis.b_enc
    z = torch.where(h > dis.threshold, h, 0)
    torch.testing.assert_close(dis.pre(x), h)
    torch.testing.assert_close(dis.encode(x), z)
    torch.testing.assert_close(dis(x), z @ dis.W_dec + dis.b_dec)
    plain = replace(dis, apply_b_dec_to_input=False)
    torch.testing.assert_close(plain.pre(x), x @ dis.W_enc + dis.b_enc)


def test_rows_have_norm_one() -> None:
    torch.testing.assert_close(random().W_dec.norm(dim=1), torch.ones(20))
    with pytest.raises(ValueError, match="norm 1"):
        replace(random(), W_dec=2 * random().W_dec)


@given(st.floats(0.1, 30), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_folding_norms_changes_nothing(size: float, seed: int) -> None:
    dis, x = random(seed=seed), vectors(seed=seed)
    norms = size * (1 + torch.arange(20.0)) / 10
    W_enc, b_enc, W_dec, theta = normalise(
        dis.W_enc / norms, dis.b_enc / norms, dis.W_dec * norms[:, None], dis.threshold / norms
    )
    folded = replace(dis, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, threshold=theta)
    torch.testing.assert_close(folded.encode(x), dis.encode(x), rtol=1e-4, atol=1e-4)


def test_prefix_property() -> None:
    dis, x = random(), vectors()
    z = dis.encode(x)
    for width, made in zip(dis.widths, dis.prefixes(z), strict=True):
        cut = z.clone()
        cut[:, width:] = 0
        torch.testing.assert_close(made, dis.decode(cut), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made, dis(x), rtol=1e-5, atol=1e-5)


def test_a_level_is_the_beginning_of_the_dictionary() -> None:
    dis, x = random(), vectors()
    for g, width in enumerate(dis.widths):
        part = dis.level(g)
        assert part.widths == dis.widths[: g + 1]
        torch.testing.assert_close(part.encode(x), dis.encode(x)[:, :width])
    assert dis.level(-1).n == dis.n
    assert dis.level(-2).widths == (4, 9)
    assert [dis.level_of(f) for f in (0, 3, 4, 8, 9, 19)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(IndexError, match="3 levels"):
        dis.level(3)
    with pytest.raises(IndexError):
        dis.level_of(20)


@pytest.mark.parametrize("k", [None, 3])
def test_a_code_does_not_depend_on_the_batch(k: int | None) -> None:
    dis, x = replace(random(), k=k), vectors()
    whole = dis.encode(x)
    for row in range(len(x)):
        torch.testing.assert_close(
            dis.encode(x[row : row + 1])[0], whole[row], rtol=1e-6, atol=1e-6
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(dis.encode(x[order]), whole[order], rtol=1e-6, atol=1e-6)


def test_k_keeps_the_largest() -> None:
    dis, x = replace(random(), k=3, threshold=torch.zeros(20)), vectors()
    z = dis.encode(x)
    assert bool(((z > 0).sum(1) <= 3).all())
    torch.testing.assert_close(z.sum(1), dis.pre(x).clamp_min(0).topk(3).values.sum(1))


@pytest.mark.parametrize("k", [None, 3])
def test_some_latents_alone(k: int | None) -> None:
    dis, x = replace(random(), k=k), vectors()
    latents = torch.tensor([7, 0, 19])
    torch.testing.assert_close(dis.encode(x, latents), dis.encode(x)[:, latents])
    torch.testing.assert_close(dis.pre(x, latents), dis.pre(x)[:, latents])


def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    dis, x = random(), vectors(30).view(5, 6, 8)
    whole, firing = dis.encode(x), dis.firing(x.flatten(0, 1))
    monkeypatch.setattr("concept_erasure.sae.disentangler.CHUNK_VALUES", 100)
    torch.testing.assert_close(dis.encode(x), whole)
    again = dis.firing(x.flatten(0, 1))
    for name in ("count", "total", "largest", "rate", "mean"):
        torch.testing.assert_close(getattr(again, name), getattr(firing, name))
    torch.testing.assert_close(firing.rate, (whole > 0).float().flatten(0, 1).mean(0))
    torch.testing.assert_close(firing.largest, whole.flatten(0, 1).amax(0))


def test_gradients_pass() -> None:
    x = vectors().requires_grad_()
    random()(x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize("k", [0.5, 2, 5])
def test_calibration_gives_the_wanted_mean(k: float) -> None:
    x = vectors(200)
    dis = random().calibrate(x, k)
    assert float((dis.encode(x) > 0).sum()) == round(k * len(x))
    assert len(dis.threshold.unique()) == 1


def test_calibration_when_too_few_are_positive() -> None:
    dis = replace(random(), b_enc=torch.full((20,), -1e3))
    assert float(dis.calibrate(vectors(), 4).threshold.max()) == 0


def test_dtype_and_input_untouched() -> None:
    dis, x = random().to(dtype=torch.bfloat16), vectors()
    before = x.clone()
    assert dis.encode(x).dtype == torch.bfloat16
    assert torch.equal(x, before)
    assert random().to("cpu", torch.float32).site == "mlp.1"
    same = random()
    assert same.to(dtype=torch.float32) is same


def test_post_norm_is_found_by_running() -> None:
    for kind in ("gemma2", "gemma3"):
        model = tiny(kind)
        path, gain = post_norm(model, "mlp.1") or ("", torch.zeros(0))
        assert path == "model.layers.1.post_feedforward_layernorm"
        torch.testing.assert_close(gain, 1 + model.get_submodule(path).weight, rtol=1e-5, atol=1e-5)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for kind in ("llama", "gpt2", "gpt_neox"):
        assert post_norm(tiny(kind), "mlp.1") is None


def test_for_model() -> None:
    dis = replace(random(d=32), after_post_norm=True)
    gemma, llama = tiny("gemma3"), tiny("llama")
    found = dis.for_model(gemma)
    assert found.post_norm_gain is not None and found.post_norm_gain.shape == (32,)
    assert found.activation_site(gemma) == "model.layers.1.post_feedforward_layernorm"
    assert dis.for_model(llama).after_post_norm is False
    assert dis.for_model(llama).activation_site(llama) == "mlp.1"
    x = collect(gemma, TinyTokenizer(), ["one two three"], sites=found.activation_site(gemma)).x
    assert found.encode(x).shape == (1, 20)
    with pytest.raises(ShapeError, match="width 8"):
        random().for_model(llama)
    with pytest.raises(SiteNotFoundError, match="does not say its site"):
        replace(dis, site="").for_model(llama)


def test_bad_parts_are_refused() -> None:
    dis = random()
    for name, value in (
        ("W_enc", dis.W_dec),
        ("b_enc", dis.b_dec),
        ("b_dec", dis.b_enc),
        ("threshold", dis.b_dec),
        ("post_norm_gain", dis.b_enc),
        ("b_dec", dis.b_dec.double()),
    ):
        with pytest.raises(ShapeError, match=name):
            replace(dis, **{name: value})
    for widths in ((4, 4, 20), (4, 9), (0, 20)):
        with pytest.raises(ShapeError, match="widths"):
            replace(dis, widths=widths)
    with pytest.raises(ValueError, match="negative"):
        replace(dis, threshold=-dis.threshold)
    with pytest.raises(ValueError, match="k must"):
        replace(dis, k=21)
    with pytest.raises(ShapeError, match=r"\(\.\.\., 8\)"):
        dis.encode(torch.zeros(2, 9))
    with pytest.raises(ShapeError, match="20"):
        dis.decode(torch.zeros(2, 9))
    assert all(a < b for a, b in pairwise(dis.widths))
