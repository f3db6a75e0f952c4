"""Collecting: the right rows, whatever the padding; the model left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from concept_erasure.collect import Representations, collect, fit_streaming, select, stream
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.labels import encode_concepts
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.sites import Space, find_sites, fingerprint, hook
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
        ({"texts": ["a", None]}, TypeError, "text 1 is NoneType"),
        ({"progress": 5}, TypeError, "progress must be True"),
        ({"labels": {"a": LABELS, "b": [1]}}, ShapeError, "as many for every concept"),
        ({"labels": {"a": [1]}}, ShapeError, "5 texts but 1 labels"),
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


def texts_and_labels(n: int = 40) -> tuple[list[str], list[str], list[int]]:
    """Texts, a concept in words, and a concept in numbers; both can be read off the texts."""
    words = ["sun", "moon", "sea", "tree", "bird", "stone", "river", "cloud"]
    generator = torch.Generator().manual_seed(0)
    texts, gender, tense = [], list[str](), list[int]()
    for i in range(n):
        picks = torch.randint(0, 8, (3 + i % 4,), generator=generator).tolist()
        gender.append("f" if i % 2 else "m")
        tense.append(i // 2 % 3)
        cues = ["she" if i % 2 else "he", ("was", "is", "will")[tense[-1]]]
        texts.append(" ".join([*(words[p] for p in picks), *cues]))
    return texts, gender, tense


def test_fitters_get_their_space_and_words_are_labels() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    texts, gender, _ = texts_and_labels()
    for classes in (None, ("m", "f")):
        fitted = fit_streaming(
            model,
            tokenizer,
            texts,
            gender,
            sites=["residual.*"],
            fitter=lambda width: LeaceFitter(width, 2, classes=classes),  # noqa: B023
            tokens="mean",
            batch_size=7,
        )
        for name, fitter in fitted.items():
            eraser = fitter.eraser
            assert eraser.space == Space("LlamaForCausalLM", fingerprint(model), name, "mean", 32)
            whole = collect(model, tokenizer, texts, gender, sites=name, tokens="mean")
            expected = LeaceEraser.fit(whole)
            assert torch.allclose(eraser.P, expected.P, atol=1e-4)
            assert eraser.space == expected.space
    eraser.attach(model).undo()  # it knows its place


def test_a_space_set_by_hand_is_kept() -> None:
    own = Space("mine", "mark", "residual.0", "last", 32)

    def fitter(width: int) -> LeaceFitter:
        made = LeaceFitter(width, 3)
        made.space = own
        return made

    fitted = fit_streaming(
        tiny("llama"), TinyTokenizer(), TEXTS, LABELS, sites="residual.0", fitter=fitter
    )
    assert fitted["residual.0"].space is own


@pytest.mark.parametrize("form", ["mapping", "table"])
def test_joint_concepts(form: str) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    texts, gender, tense = texts_and_labels()
    joint: Any = {"gender": gender, "tense": tense}
    joint = pd.DataFrame(joint) if form == "table" else joint
    fitted = fit_streaming(
        model,
        tokenizer,
        texts,
        joint,
        sites="residual.1",
        fitter=lambda width: LeaceFitter(width, 5),
        batch_size=7,
    )["residual.1"]
    data = collect(model, tokenizer, texts, joint, sites="residual.1")
    assert len(data.split(0.5, 0)[0].z["gender"]) == 20  # type: ignore[index]
    expected = LeaceEraser.fit(data)
    assert fitted.eraser.map.rank == expected.map.rank == 3
    assert torch.allclose(fitted.eraser.P, expected.P, atol=1e-4)
    clean = fitted.eraser(data.x.double())
    z = encode_concepts(joint).values
    gap = (clean - clean.mean(0)).T @ (z - z.mean(0))
    assert gap.abs().max() < 1e-6


def test_background_gives_every_token() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer("left")
    texts, gender, _ = texts_and_labels()
    options: dict[str, Any] = {
        "sites": "residual.1",
        "fitter": lambda width: LeaceFitter(width, 2, shrinkage=False),
        "batch_size": 7,
    }
    bare = fit_streaming(model, tokenizer, texts, gender, **options)["residual.1"].eraser
    wide = fit_streaming(model, tokenizer, texts, gender, background=True, **options)["residual.1"]
    every = collect(model, tokenizer, texts, gender, sites="residual.1", tokens="all")
    data = collect(model, tokenizer, texts, gender, sites="residual.1")
    rows = every.rows
    assert rows is not None
    inner = torch.cat([rows[1:] == rows[:-1], torch.tensor([False])])  # all but the last tokens
    expected = LeaceEraser.fit(data, background=every[inner], shrinkage=False)
    assert torch.allclose(wide.eraser.P, expected.P, atol=1e-4)
    assert wide.eraser.report["background_rows"] == len(every) - len(data)
    assert wide.eraser.space == data.space and wide.eraser.report["residual"] < 1e-6  # type: ignore[operator]

    def moved(eraser: LeaceEraser) -> float:
        x = torch.cat([every.x, data.x]).double()
        return float((eraser(x) - x).square().sum())

    assert moved(wide.eraser) < moved(bare)
    same = fit_streaming(model, tokenizer, texts, gender, tokens="all", background=True, **options)
    assert same["residual.1"].n == len(every)
    with pytest.raises(TypeError, match="Recorder has none"):
        fit_streaming(
            model,
            tokenizer,
            texts,
            gender,
            sites="residual.1",
            fitter=Recorder,
            background=True,
        )


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    collect(model, tokenizer, TEXTS, sites="residual.0", batch_size=2, progress=progress)
    first = capsys.readouterr().err
    fit_streaming(
        model, tokenizer, TEXTS, LABELS, sites="residual.0", fitter=Recorder, progress=progress
    )
    second = capsys.readouterr().err
    if progress:
        assert "reading texts: 100%" in first and "5/5" in first and "fitting: 100%" in second
    else:
        assert not first and not second  # no terminal here


def calls(model: nn.Module, path: str) -> list[int]:
    """Count the runs of a module, without a hook on it."""
    module, count = model.get_submodule(path), [0]
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return inner(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_passes_stop_at_the_last_site(kind: str) -> None:
    model, tokenizer = tiny(kind), TinyTokenizer()
    before, sites = state(model), ["norm2.0", "residual.0"]
    full = collect(model, tokenizer, TEXTS, sites=[*sites, "residual.2"], batch_size=1)
    block = find_sites(model)
    inner, outer = (
        calls(model, block["residual.0"].module),
        calls(model, block["residual.2"].module),
    )
    found = collect(model, tokenizer, TEXTS, sites=sites, batch_size=1)
    assert (inner[0], outer[0]) == (5, 1)  # the first pass is a whole one
    assert all(torch.equal(found[name].x, full[name].x) for name in sites)
    with hook(model, block["residual.1"], lambda x: None):  # somebody else's hook must run
        collect(model, tokenizer, TEXTS, sites=sites, batch_size=1)
    assert outer[0] == 6
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_run_twice_is_read_at_its_last_run() -> None:
    model = tiny("llama")
    layers = model.get_submodule("model.layers")
    layers[2] = layers[0]
    whole = collect(model, TinyTokenizer(), TEXTS, sites="model.layers.0.mlp", batch_size=5)
    parts = collect(model, TinyTokenizer(), TEXTS, sites="model.layers.0.mlp", batch_size=1)
    assert torch.allclose(whole.x, parts.x, atol=1e-5)


def test_a_tokenizer_that_pads_left_whatever_it_is_told() -> None:
    def stubborn(texts: list[str], **options: Any) -> Any:
        return TinyTokenizer("left")(texts, **options)

    model = tiny("gpt2")
    left = collect(model, stubborn, TEXTS, sites="residual.1", tokens="all")
    right = collect(model, TinyTokenizer(), TEXTS, sites="residual.1", tokens="all")
    assert torch.equal(left.x, right.x)


class Groups(Recorder):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.groups, self.background = list[Tensor | None](), list[Tensor]()

    def update(self, x: Tensor, z: Tensor, *, groups: Tensor | None = None) -> Groups:
        self.groups.append(groups)
        super().update(x, z)
        return self

    def update_background(self, x: Tensor) -> None:
        self.background.append(x)


def test_tokens_of_a_text_are_one_group() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer("left")
    options: dict[str, Any] = {"sites": "residual.0", "batch_size": 2, "fitter": Groups}
    every = fit_streaming(model, tokenizer, TEXTS, LABELS, tokens="all", **options)["residual.0"]
    whole = collect(model, tokenizer, TEXTS, LABELS, sites="residual.0", tokens="all")
    assert torch.equal(torch.cat(every.groups), whole.rows)  # type: ignore[arg-type]
    last = fit_streaming(model, tokenizer, TEXTS, LABELS, **options)["residual.0"]
    assert last.groups == [None] * 3
    options["fitter"] = Recorder  # takes no groups
    fit_streaming(model, tokenizer, TEXTS, LABELS, tokens="all", **options)


@pytest.mark.parametrize("rule", ["last", "first", "mean"])
def test_background_is_the_tokens_without_labels(rule: Any) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer("left")
    fitted = fit_streaming(
        model,
        tokenizer,
        TEXTS,
        LABELS,
        sites="residual.0",
        fitter=Groups,
        tokens=rule,
        background=True,
        batch_size=2,
    )["residual.0"]
    expected = alone(model, "residual.0")
    part = {"last": slice(None, -1), "first": slice(1, None), "mean": slice(None)}[rule]
    want = torch.cat([x[part] for x in expected])
    assert torch.allclose(torch.cat(fitted.background), want, atol=1e-5)


def test_background_of_texts_of_one_token() -> None:
    fitted = fit_streaming(
        tiny("llama"),
        TinyTokenizer(),
        ["a", "b"],
        [0, 1],
        sites="residual.0",
        fitter=Groups,
        background=True,
    )["residual.0"]
    assert fitted.background == []


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, pd.Series])
def test_a_mask_is_an_index(form: Any) -> None:
    labels = form([3, 1, 2, 0])
    data = Representations(torch.eye(4), {"a": labels, "b": list("wxyz")}, rows=torch.arange(4))
    mask = torch.tensor([True, False, False, True])
    one, two = data[mask], data[torch.tensor([0, 3])]
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.rows, torch.tensor([0, 3]))  # type: ignore[arg-type]
    assert list(one.z["a"]) == [3, 0]  # type: ignore[index]
    assert one.z["b"] == ["w", "z"]  # type: ignore[index]
    with pytest.raises(ShapeError, match="4 vectors but a mask"):
        data[mask[:3]]


def test_attached_erasers_do_not_make_passes_longer() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    eraser = LeaceEraser.fit(torch.eye(32).repeat(4, 1), torch.arange(128) % 2)
    with eraser.attach(model, sites=["residual.0", "residual.2"]):
        full = collect(model, tokenizer, TEXTS, sites=["residual.1", "norm.final"], batch_size=1)
        outer = calls(model, "model.layers.2")
        found = collect(model, tokenizer, TEXTS, sites="residual.1", batch_size=1)
    assert outer[0] == 1
    assert torch.equal(found.x, full["residual.1"].x)
