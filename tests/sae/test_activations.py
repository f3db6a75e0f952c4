"""Vectors from a model: which tokens, in what order, kept where, and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from concept_erasure.collect import collect
from concept_erasure.errors import FormatError, ShapeError, SiteNotFoundError
from concept_erasure.sae import activations
from concept_erasure.sae.activations import Activations, collect_activations, cut
from tests.models import TinyTokenizer, tiny

TEXTS = [" ".join(f"w{i}x{j}" for j in range(3 + i % 9)) for i in range(50)]


def test_windows() -> None:
    tokenizer = TinyTokenizer(add_bos=True)
    found = cut(tokenizer, ["a b c d e f g", "h", ""], 4)
    assert [(w.text, len(w.ids)) for w in found] == [(0, 4), (0, 4), (0, 2), (1, 2)]
    assert all(int(w.ids[0]) == 1 for w in found)
    plain = cut(TinyTokenizer(), ["a b c d e", "h"], 4)
    assert [(w.text, len(w.ids)) for w in plain] == [(0, 4)]


@pytest.mark.parametrize("add_bos", [False, True])
def test_vectors_are_those_of_collect_without_the_first(add_bos: bool) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer(add_bos=add_bos)
    found = collect_activations(
        model,
        tokenizer,
        TEXTS,
        sites=["mlp.0", "mlp.1"],
        dtype=torch.float32,
        batch_size=7,
        progress=False,
    )
    whole = collect(model, tokenizer, TEXTS, sites=["mlp.0", "mlp.1"], tokens="all")
    for site in found.sites:
        rows = whole[site].rows
        assert rows is not None
        later = torch.cat((torch.tensor([False]), rows[1:] == rows[:-1]))
        wanted = whole[site].x[later]
        mine = found.all(site)
        assert len(mine) == len(wanted)
        order = lambda x: x[x[:, 0].argsort()]  # noqa: E731
        torch.testing.assert_close(order(mine), order(wanted), rtol=1e-4, atol=1e-5)


def test_special_tokens_padding_and_masks_are_left_out() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    texts = ["a <eos> b", "c d e f g"]
    found = collect_activations(model, tokenizer, texts, sites="mlp.0", progress=False)
    assert len(found.all("mlp.0")) == 1 + 4
    number = int(tokenizer.convert_tokens_to_ids("e"))  # type: ignore[arg-type]
    found = collect_activations(
        model, tokenizer, texts, sites="mlp.0", keep=lambda ids: ids != number, progress=False
    )
    assert len(found.all("mlp.0")) == 1 + 3


def test_the_model_is_left_alone_and_the_pass_ends_early() -> None:
    model = tiny("llama").train()
    calls: list[int] = []
    handle = model.get_submodule("model.layers.2").register_forward_hook(lambda *_: calls.append(1))
    collect_activations(model, TinyTokenizer(), TEXTS, sites="mlp.0", batch_size=10, progress=False)
    assert len(calls) == 5  # a hook of others: the pass is not cut short
    handle.remove()
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    inner = model.get_submodule("model.layers.2.mlp")
    original, ran = type(inner).forward, []
    inner.forward = lambda x: (ran.append(1), original(inner, x))[1]  # type: ignore[method-assign]
    collect_activations(model, TinyTokenizer(), TEXTS, sites="mlp.0", batch_size=10, progress=False)
    assert len(ran) == 1  # the first batch runs to the end, to see that each site is met once


def test_batches_hold_every_training_vector_once_a_round_and_no_other() -> None:
    x = torch.arange(200.0)[:, None]
    held = Activations.of(x)
    unseen = held.held_out("vectors")[:, 0]
    assert len(unseen) == 10 and len(held) == 190
    stream = held.batches("vectors", 19, seed=3)
    for _ in range(2):
        seen = torch.cat([next(stream)[:, 0] for _ in range(10)])
        assert len(seen.unique()) == 190
        assert not torch.isin(seen, unseen).any()
    first, second = (next(held.batches("vectors", 19, seed=s)) for s in (3, 4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("start", [0, 1, 4, 9, 23])
def test_skipping_is_exact(start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD", 64)
    monkeypatch.setattr(activations, "BUFFER", 90)
    model = tiny("llama")
    held = collect_activations(
        model,
        TinyTokenizer(),
        TEXTS,
        sites="mlp.0",
        max_length=8,
        cache_dir=tmp_path,
        progress=False,
    )
    assert len(held._shards) > 4
    stream, later = (
        held.batches("mlp.0", 16, seed=1),
        held.batches("mlp.0", 16, seed=1, start=start),
    )
    for _ in range(start):
        next(stream)
    for _ in range(12):
        assert torch.equal(next(stream), next(later))


def test_the_cache_is_what_memory_holds_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "SHARD", 64)
    model, tokenizer = tiny("llama"), TinyTokenizer()
    options = {"sites": ["mlp.0", "mlp.2"], "max_length": 8, "progress": False}
    memory = collect_activations(model, tokenizer, TEXTS, **options)  # type: ignore[arg-type]
    made = activations._shard
    count = 0

    def stopping(*args: object) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return made(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(activations, "_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        collect_activations(model, tokenizer, TEXTS, cache_dir=tmp_path, **options)  # type: ignore[arg-type]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(written) == 2 and not list(tmp_path.glob(".*"))
    disk = collect_activations(model, tokenizer, TEXTS, cache_dir=tmp_path, **options)  # type: ignore[arg-type]
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    for site in memory.sites:
        assert torch.equal(memory.all(site), disk.all(site))
        assert disk.all(site).dtype == torch.bfloat16
        assert torch.equal(memory.held_out(site), disk.held_out(site))
    with pytest.raises(FormatError, match="differs in sites"):
        collect_activations(
            model, tokenizer, TEXTS, cache_dir=tmp_path, **{**options, "sites": "mlp.1"}
        )  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="differs in model"):
        collect_activations(tiny("llama", seed=1), tokenizer, TEXTS, cache_dir=tmp_path, **options)  # type: ignore[arg-type]
    path = next(iter(written))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match="damaged"):
        collect_activations(model, tokenizer, TEXTS, cache_dir=tmp_path, **options)  # type: ignore[arg-type]
    again = collect_activations(
        model, tokenizer, TEXTS, cache_dir=tmp_path, resume=False, **options
    )  # type: ignore[arg-type]
    assert torch.equal(again.all("mlp.0"), memory.all("mlp.0"))
    (tmp_path / "activations.json").write_text(json.dumps({"key": 1}))
    with pytest.raises(FormatError, match=r"activations\.json is damaged"):
        collect_activations(model, tokenizer, TEXTS, cache_dir=tmp_path, **options)  # type: ignore[arg-type]


def test_a_limit_takes_a_sample_of_all_texts() -> None:
    model = tiny("llama")
    held = collect_activations(
        model, TinyTokenizer(), TEXTS, sites="mlp.0", tokens=60, progress=False
    )
    count = len(held.all("mlp.0"))
    assert 60 <= count < 75
    texts = activations._tensor(held._shards[0], "texts")
    assert int(texts.max()) > 25 > int(texts.min())


def test_errors() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(SiteNotFoundError):
        collect_activations(model, tokenizer, TEXTS, sites="mlp.9")
    with pytest.raises(ValueError, match="no tokens beyond"):
        collect_activations(model, tokenizer, ["a", "b"], sites="mlp.0")
    with pytest.raises(ValueError, match="max_length"):
        collect_activations(model, tokenizer, TEXTS, sites="mlp.0", max_length=1)
    with pytest.raises(ShapeError):
        Activations.of(torch.zeros(3))
    with pytest.raises(ValueError, match="batch_size"):
        Activations.of(torch.zeros(30, 2)).batches("vectors", 99)
    with pytest.raises(SiteNotFoundError, match="vectors"):
        Activations.of(torch.zeros(30, 2)).batches("mlp.0", 9)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        collect_activations(model, tokenizer, TEXTS, sites="mlp.0")
