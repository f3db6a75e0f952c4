"""Collecting: the right rows, whatever the padding; the model left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from concept_erasure.collect import Representations, collect, fit_streaming, select, stream
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.sites import find_sites, fingerprint, hook
from tests.models import KINDS, TinyTokenizer, tiny

TEXTS = ["she is a nurse", "he works", "they went home early today", "one", "a b c"]
LABELS = ["f", "m", "n", "n", "n"]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def alone(model: nn.Module, site: str) -> list[Tensor]:
    """The activations (t, d) of each text run on its own, without padding."""
    out: list[Tensor] = []
    tokenizer = TinyTokenizer()
    with hook(model, find_sites(model)[site], lambda x: out.append(x[0])), torch.no_grad():
        for text in TEXTS:
            model(**tokenizer([text], return_tensors="pt"))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_those_of_texts_run_alone(kind: str, side: str) -> None:
    model = tiny(kind)
    expected = alone(model, "residual.1")
    for tokens, pick in {
        "last": lambda x: x[-1:],
        "first": lambda x: x[:1],
        "mean": lambda x: x.mean(0, keepdim=True),
        "all": lambda x: x,
    }.items():
        got = collect(
            model,
            TinyTokenizer(side),
            TEXTS,
            LABELS,
            sites="residual.1",
            tokens=tokens,
            batch_size=2,
        )  # type: ignore[call-overload]
        assert torch.allclose(got.x, torch.cat([pick(x) for x in expected]), atol=1e-5)
        assert len(got.z) == len(got.x)
    assert got.z == [z for z, x in zip(LABELS, expected, strict=True) for _ in x]
    assert got.space.width == 32 and got.space.fingerprint == fingerprint(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_select_uses_the_mask(side: str) -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    start = 2 if side == "left" else 0
    assert torch.equal(select(x, mask, "last"), torch.stack([x[0, 3], x[1, start + 1]]))
    assert torch.equal(select(x, mask, "first"), torch.stack([x[0, 0], x[1, start]]))
    assert torch.equal(select(x, mask, "mean")[1], x[1, start : start + 2].mean(0))
    assert select(x, mask, "all").shape == (6, 3)
    assert torch.equal(select(x.reshape(8, 3), mask, "last"), select(x, mask, "last"))
    with pytest.raises(ShapeError, match="one vector per token"):
        select(x[:, :2], mask, "last")


def test_everything_is_as_it_was() -> None:
    model, tokenizer = tiny("gpt2").train(), TinyTokenizer("left")
    model.get_submodule("transformer.h.1").eval()
    tokenizer.pad_token = None
    before, modes = state(model), [m.training for m in model.modules()]
    generator = torch.get_rng_state()

    def untouched() -> bool:
        same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        side = (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
        return same and not hooks and side and modes == [m.training for m in model.modules()]

    found = collect(model, tokenizer, TEXTS, sites=["*.0", "norm.final"], batch_size=2)
    assert untouched() and len(found) == 7
    assert torch.equal(generator, torch.get_rng_state())
    again = collect(model, tokenizer, TEXTS, sites="residual.0", batch_size=2)
    assert torch.equal(again.x, found["residual.0"].x)  # dropout is off
    batches = stream(model, tokenizer, TEXTS, sites="residual.0", batch_size=2)
    next(batches)
    assert untouched()  # between batches too
    with pytest.raises(SiteNotFoundError, match="not a tensor"):
        collect(model, tokenizer, TEXTS, sites="transformer")
    assert untouched()


def test_one_site_or_several() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    assert isinstance(collect(model, tokenizer, TEXTS, sites="norm.final"), Representations)
    several = collect(model, tokenizer, TEXTS, sites=["value.*"], dtype=torch.float64)
    assert {k: v.x.shape for k, v in several.items()} == {f"value.{i}": (5, 48) for i in range(3)}
    assert several["value.0"].x.dtype == torch.float64
    assert collect(model, tokenizer, TEXTS, sites="lm_head").x.shape == (5, 128)
    with pytest.raises(SiteNotFoundError, match="names 3 sites"):
        collect(model, tokenizer, TEXTS, sites="value.*")


def test_refusals() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"texts": "one text"}, TypeError, "one string"),
        ({"texts": []}, ValueError, "empty"),
        ({"texts": ["a", ""]}, ValueError, "text 1 has no tokens"),
        ({"texts": ["a", "b " * 65]}, ShapeError, "text 1 has 65 tokens.*max_length=64"),
        ({"labels": [1]}, ShapeError, "5 texts but 1 labels"),
        ({"tokens": "middle"}, ValueError, "'middle'"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_length": 0}, ValueError, "max_length"),
    ]
    for options, error, message in cases:
        arguments = {"texts": TEXTS, "sites": "residual.0", **options}
        with pytest.raises(error, match=message):
            collect(model, tokenizer, **arguments)
    long = collect(model, tokenizer, ["b " * 65], sites="residual.0", tokens="all", max_length=10)
    assert len(long) == 10


class Recorder:
    def __init__(self, width: int) -> None:
        self.width, self.x, self.z = width, list[Tensor](), list[Tensor]()

    def update(self, x: Tensor, z: Tensor) -> Recorder:
        self.x.append(x)
        self.z.append(z)
        return self


@pytest.mark.parametrize(
    "labels", [LABELS, np.array([0, 1, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 2])]
)
def test_fit_streaming_equals_collect(labels: Any) -> None:
    model, tokenizer, done = tiny("qwen2"), TinyTokenizer(), list[int]()
    fitted = fit_streaming(
        model,
        tokenizer,
        TEXTS,
        labels,
        sites=["norm?.*", "value.0"],
        fitter=Recorder,
        batch_size=2,
        progress=lambda n, total: done.append(n),
    )
    assert done == [2, 4, 5] and len(fitted) == 7 and fitted["value.0"].width == 48
    for name, fitter in fitted.items():
        whole = collect(model, tokenizer, TEXTS, sites=name, batch_size=2)
        assert torch.equal(torch.cat(fitter.x), whole.x)
        assert torch.cat(fitter.z).tolist() == [0, 1, 2, 2, 2]


def test_stream_holds_one_batch() -> None:
    sizes = [
        (len(x["residual.0"]), rows.tolist())
        for x, rows in stream(
            tiny("mistral"), TinyTokenizer(), TEXTS, sites="residual.0", tokens="all", batch_size=2
        )
    ]
    assert [n for n, _ in sizes] == [6, 6, 3] and sizes[0][1] == [0, 0, 0, 0, 1, 1]


def test_representations() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    data = collect(model, tokenizer, TEXTS, LABELS, sites="residual.0", tokens="all")
    one, two = data.split(0.6, seed=0)
    assert len(one) + len(two) == len(data) and one.space == data.space
    assert not set(one.rows.tolist()) & set(two.rows.tolist())  # type: ignore[union-attr]
    assert torch.equal(one.x, data.split(0.6, seed=0)[0].x)
    assert "n=15, d=32, labels" in repr(data)
    bare = Representations(torch.zeros(4, 2), np.arange(4))
    assert sorted([*bare.split(0.5, 1)[0].z, *bare.split(0.5, 1)[1].z]) == [0, 1, 2, 3]
    for fraction in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="fraction"):
            bare.split(fraction, 0)
    with pytest.raises(ShapeError, match="4 vectors but 3 z"):
        Representations(torch.zeros(4, 2), [1, 2, 3])
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        Representations(torch.zeros(4))
