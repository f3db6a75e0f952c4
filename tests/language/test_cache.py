"""Targets that are kept: equal to those computed on the fly, resumable, and refused where they do not belong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import concept_erasure.language.cache as module
from concept_erasure.errors import FormatError
from concept_erasure.language.batches import Batches, collate, encode, logits_at
from concept_erasure.language.cache import TargetCache, Targets, cache_key
from concept_erasure.language.contrast import Source, Streams, read_rows
from concept_erasure.language.targets import TopK, lowered_tokens
from tests.models import TinyTokenizer, tiny

TEXTS = [
    "one two three four five six",
    "seven eight",
    "nine ten eleven twelve thirteen",
    "a b c",
    "red green blue yellow black white grey",
]


def _texts():
    return encode(TinyTokenizer(), TEXTS, max_length=32)


def _make(model, texts, calls=None, k=5):
    def make(rows):
        if calls is not None:
            calls.append(list(rows))
        found = read_rows(model, Streams(texts, texts, texts), Source("persona"), rows)
        weights = 0.5 + found.places.float()
        return Targets(TopK.of(found.lp0, k), weights, found.rows, found.places)

    return make


@pytest.mark.parametrize("folder", [False, True])
def test_the_cached_loss_is_the_loss_computed_on_the_fly(folder, tmp_path):
    """2.9: for every batch, in whatever order and padding."""
    model, other, texts = tiny("llama"), tiny("llama", seed=1), _texts()
    cache = TargetCache.build(
        texts,
        _make(model, texts),
        key={"a": 1},
        folder=tmp_path if folder else None,
        batch_size=2,
        shard=2,
    )
    mean = float(cache.column("weights").mean())
    loss = cache.loss()
    batches = Batches(cache.texts, 2, seed=3, pad_id=0)
    for step in range(7):
        batch = batches.at(step)
        with torch.no_grad():
            lp0 = logits_at(model, batch).log_softmax(-1)
            lq = logits_at(other, batch).log_softmax(-1)
            places = batch.positions % batch.input_ids.shape[1]
            wanted = (TopK.of(lp0, 5).kl(lq) * (0.5 + places)).sum() / mean
            found = loss(other, batch)
        assert float(found) == pytest.approx(float(wanted), abs=1e-4)
    assert cache.positions == sum(text.count for text in texts)


def test_positions_and_texts_without_target_are_left_out():
    model, texts = tiny("llama"), _texts()
    whole = _make(model, texts)

    def make(rows):
        found = whole(rows)
        return found.where((found.places > 2) & (found.rows != 3))

    cache = TargetCache.build(texts, make, key={}, batch_size=2)
    assert cache.kept == [0, 2, 4]  # text 1 is too short, text 3 was left out
    for text, k in zip(cache.texts, cache.kept, strict=True):
        assert torch.equal(text.ids, texts[k].ids)
        assert text.supervised.nonzero()[:, 0].tolist() == list(range(3, len(text)))
    batch = collate(cache.texts, [2, 0], pad_id=0)
    top, weights = cache.at(batch)
    assert len(top) == batch.count == len(weights)
    lp0 = logits_at(model, batch).log_softmax(-1)
    assert torch.allclose(top.log_probs[:, 0], lp0.max(-1).values, atol=1e-5)


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path):
    model, texts, calls = tiny("llama"), _texts(), []
    good = _make(model, texts, calls)

    def fails(rows):
        if 4 in rows:
            raise KeyboardInterrupt
        return good(rows)

    with pytest.raises(KeyboardInterrupt):
        TargetCache.build(texts, fails, key={"a": 1}, folder=tmp_path, batch_size=2, shard=2)
    calls.clear()
    cache = TargetCache.build(texts, good, key={"a": 1}, folder=tmp_path, batch_size=2, shard=2)
    assert calls == [[4]]
    fresh = TargetCache.build(texts, good, key={"a": 1}, batch_size=5)
    batch = collate(cache.texts, [0, 4, 2], pad_id=0)
    for mine, wanted in zip(cache.at(batch), fresh.at(batch), strict=True):
        if isinstance(mine, TopK):
            assert torch.equal(mine.indices, wanted.indices)
            assert torch.allclose(mine.log_probs, wanted.log_probs, atol=1e-5)
            assert torch.allclose(mine.tail, wanted.tail, atol=1e-4)
        else:
            assert torch.equal(mine, wanted)
    calls.clear()
    TargetCache.build(texts, good, key={"a": 1}, folder=tmp_path, shard=2)
    assert calls == []


def test_another_key_is_refused(tmp_path):
    model, texts = tiny("llama"), _texts()
    TargetCache.build(texts, _make(model, texts), key={"a": 1}, folder=tmp_path)
    with pytest.raises(FormatError, match="differs in a"):
        TargetCache.build(texts, _make(model, texts), key={"a": 2}, folder=tmp_path)
    one = cache_key(model, texts, {"k": 5})
    assert one == cache_key(model, _texts(), {"k": 5})
    assert one != cache_key(tiny("llama", seed=1), texts, {"k": 5})
    assert one != cache_key(model, texts[:-1], {"k": 5})
    assert one != cache_key(model, texts, {"k": 6})


@pytest.mark.parametrize("damage", ["flip", "cut", "replace"])
def test_a_damaged_shard_is_named(damage, tmp_path):
    model, texts = tiny("llama"), _texts()
    TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path)
    path = tmp_path / "targets-00000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-40]))
    else:
        save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(FormatError, match="delete .*targets-00000"):
        TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path)
    path.unlink()
    assert len(TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path)) == 5


def test_a_damaged_manifest_is_named(tmp_path):
    model, texts = tiny("llama"), _texts()
    TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path)
    for text in ("{", "[]", json.dumps({"key": 1}), json.dumps({"key": {}, "files": 3})):
        (tmp_path / "targets.json").write_text(text)
        with pytest.raises(FormatError, match=r"targets\.json|differs"):
            TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, texts = tiny("llama"), _texts()
    written = []

    def full(tensors, path):
        if written:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="free some space"):
        TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path, shard=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "targets-00000.safetensors",
        "targets.json",
    ]
    assert load_file(tmp_path / "targets-00000.safetensors")["rows"].unique().tolist() == [0, 1]
    monkeypatch.undo()
    assert len(TargetCache.build(texts, _make(model, texts), key={}, folder=tmp_path, shard=2)) == 5


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not be written"):
        TargetCache.build(
            _texts(), _make(tiny("llama"), _texts()), key={}, folder=tmp_path / "file" / "x"
        )


def test_weights_are_scaled_to_mean_one():
    model, texts = tiny("llama"), _texts()
    one = _make(model, texts)

    def tenfold(rows):
        found = one(rows)
        return Targets(found.top, 10 * found.weights, found.rows, found.places)

    losses = []
    other = tiny("llama", seed=1)
    for make in (one, tenfold):
        cache = TargetCache.build(texts, make, key={})
        losses.append(float(cache.loss()(other, collate(cache.texts, range(5), pad_id=0)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert math.isfinite(losses[0])


@pytest.mark.parametrize("folder", [False, True])
def test_tokens_to_be_lowered_are_kept_and_enter_the_loss_with_their_factor(folder, tmp_path):
    model, other, texts = tiny("llama"), tiny("llama", seed=1), _texts()
    one = _make(model, texts)

    def make(rows):
        found = read_rows(model, Streams(texts, texts, texts), Source("weak", weak=other), rows)
        low = lowered_tokens(found.lp0, found.lp_novice, found.lp_expert, eta=2.0, m=4)
        plain = one(rows)
        return Targets(plain.top, plain.weights, plain.rows, plain.places, low)

    cache = TargetCache.build(
        texts, make, key={}, folder=tmp_path if folder else None, batch_size=2, shard=2
    )
    batch = collate(cache.texts, [4, 0, 2], pad_id=0)
    with torch.no_grad():
        log_q = logits_at(other, batch).log_softmax(-1)
        _, weights = cache.at(batch)
        excess = cache.lowered_at(batch).excess(log_q)
        with_it, without = (float(cache.loss(lower=x)(other, batch)) for x in (0.7, 0.0))
    wanted = 0.7 * float((weights * excess).sum()) / float(cache.column("weights").mean())
    assert float(excess.sum()) > 0
    assert with_it - without == pytest.approx(wanted, rel=1e-4)
    assert TargetCache.build(texts, one, key={}).lowered_at(batch) is None


def test_drift_enters_with_its_factor():
    model, other, texts = tiny("llama"), tiny("llama", seed=1), _texts()
    cache = TargetCache.build(texts, _make(model, texts), key={})
    batch = collate(cache.texts, range(5), pad_id=0)
    with torch.no_grad():
        top, weights = cache.at(batch)
        found = top.drift(logits_at(other, batch).log_softmax(-1))
        gap = float(cache.loss(drift=0.3)(other, batch)) - float(cache.loss()(other, batch))
    wanted = 0.3 * float((weights * found).sum()) / float(cache.column("weights").mean())
    assert gap == pytest.approx(wanted, rel=1e-4)
