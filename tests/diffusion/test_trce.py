"""TRCE, stage 1: which positions are paired, and the fit against a per-layer reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from concept_erasure.diffusion.core import Preserve
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.trce import FIFTEEN, TraceEraser, TrceEraser, end_pairs
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ShapeError
from tests.diffusion import per_layer
from tests.diffusion.tiny import TINY, WINDOW, tiny_sd, tiny_sd3, tiny_sdxl

FEW = ("{}", "a photo of {}", "{} at night, by the sea")


def weights(pipe: object) -> dict[str, Tensor]:
    return {
        m.name: module_at(pipe, m).weight.detach().clone()
        for m in text_maps(pipe)
        if m.exact and m.kind in ("key", "value", "context")
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def hidden(pipe: object, prompt: str) -> Tensor:
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return pipe.text_encoder(ids).last_hidden_state[0].double()


@pytest.mark.parametrize("name", ["snoopy", "van gogh", "rembrandt, nudity!", "a dog"])
def test_end_token_of_words_in_several_pieces(name: str) -> None:
    pipe = tiny_sd(dtype=torch.float64)
    prompt, twin = f"a photo of {name} at night", "a photo of art at night"
    pairs = end_pairs(TextEncoder(pipe), [prompt], [twin], 0.5)
    ids = [pipe.tokenizer(text)["input_ids"] for text in (prompt, twin)]
    if name in ("snoopy", "rembrandt, nudity!"):
        assert len(ids[0]) - 2 > len(prompt.split())  # counting words would miss the end
    source, target = (
        hidden(pipe, text)[len(own) - 1] for text, own in zip((prompt, twin), ids, strict=True)
    )
    torch.testing.assert_close(pairs.source[0], source, rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.target[0], target, rtol=0, atol=1e-12)
    assert pairs.weights.tolist() == [0.5]


def test_other_pad_ids_do_not_matter() -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    encoder = TextEncoder(pipe)
    pairs = end_pairs(encoder, ["a photo of snoopy !"], ["a dog"], 1.0)
    length = len(pipe.tokenizer("a photo of snoopy !")["input_ids"])
    expected = encoder.encode(["a photo of snoopy !"]).embeddings[0, length - 1]
    torch.testing.assert_close(pairs.source[0], expected, rtol=0, atol=1e-12)


def test_other_token_weights() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    prompt, twin = "a photo of snoopy at night", "a photo of van gogh at night"
    pairs = end_pairs(TextEncoder(pipe), [prompt], [twin], 2.0, (1.0, 0.5, 0.25))
    one, two = (pipe.tokenizer(text)["input_ids"] for text in (prompt, twin))
    pads = WINDOW - max(len(one), len(two))
    assert pairs.weights.tolist() == [2.0, 2 * 0.5 * pads, 0.5]
    # "at night", the end: the phrase's last token stands four places before the start of the pads
    for rows, text, own in ((pairs.source, prompt, one), (pairs.target, twin, two)):
        states = hidden(pipe, text)
        expected = states[[len(own) - 1, WINDOW - 1, len(own) - 1 - len(_tail(pipe))]]
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)


def _tail(pipe: object) -> list[int]:
    return pipe.tokenizer("at night", add_special_tokens=False)["input_ids"] + [0]


def test_both_segments_of_sd3() -> None:
    pairs = end_pairs(TextEncoder(tiny_sd3()), ["a photo of snoopy"], ["a dog"], 1.0)
    assert len(pairs) == 2  # CLIP's end token and T5's


@pytest.mark.parametrize("hold", [True, False])
def test_equals_least_squares_layer_by_layer(hold: bool) -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before = weights(pipe)
    names, twins = ["van gogh", "snoopy", "nudity"], ["art", "a dog", "art"]
    eraser = TrceEraser.fit(
        pipe,
        erase=names,
        anchor=twins,
        preserve=["red car", "sea"],
        preserve_weight=0.02,
        lam=0.01,
        templates=FEW,
        hold_blank=hold,
    )
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    source, target = (
        torch.stack(
            [
                hidden(pipe, prompt)[len(pipe.tokenizer(prompt)["input_ids"]) - 1]
                for name in side
                for prompt in (text.format(name) for text in FEW)
            ]
        )
        for side in (names, twins)
    )
    kept = torch.cat([hidden(pipe, name) for name in ("red car", "sea")])
    with eraser.apply(pipe):
        after = weights(pipe)
    for name, weight in before.items():
        expected = per_layer.least_squares(
            weight,
            source,
            target,
            torch.full((len(source),), 1 / len(source), dtype=torch.float64),
            kept,
            torch.full((len(kept),), 0.02 / len(kept), dtype=torch.float64),
            0.01,
            hidden(pipe, "") if hold else None,
        )
        assert relative(after[name], expected) < 1e-8
    blank = hidden(pipe, "")
    if hold:
        assert relative(eraser(blank), blank) <= 1e-6


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_pipeline(kind: str) -> None:
    pipe = TINY[kind]()
    eraser = TraceEraser.fit(
        pipe, erase="van gogh", anchor="art", templates=FEW[:2], max_sequence_length=16
    )
    blank = TextEncoder(pipe, max_sequence_length=16).blank()
    assert relative(eraser(blank), blank) <= 1e-6
    before = weights(pipe)
    with eraser.apply(pipe):
        assert any(not torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_add_withdraw_and_files(tmp_path) -> None:
    pipe = tiny_sd()
    both = TrceEraser.fit(pipe, erase=["van gogh", "monet"], anchor="art", templates=FEW)
    again = both.withdraw("monet").add(pipe, "monet", "art")
    assert relative(again.map.matrix, both.map.matrix) < 1e-8
    loaded = Eraser.from_pretrained(both.save_pretrained(tmp_path / "trce"))
    assert loaded.digest == both.digest
    assert TraceEraser is TrceEraser and TrceEraser.method == "trce"


def test_paper_preset() -> None:
    captions = Preserve(32).update(torch.randn(200, 32, generator=torch.Generator().manual_seed(0)))
    short = tuple(text for text in FIFTEEN if len(text) < 15)  # the tiny window
    found = TrceEraser.fit(
        tiny_sd(), erase="nudity", preserve=captions, templates=short, preset="paper", task="unsafe"
    )
    options = found.options
    assert options.lam == 0.0 and options.preserve_weight == 0.01
    assert options.anchors == ("Peaceful and calm",) and found.invariants is None
    assert relative(found.gram, 0.01 * captions.gram / 200) < 1e-12
    assert len(FIFTEEN) == 15 and found.report["pairs"] == len(short)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"erase": []}, ValueError, "empty"),
        ({"anchor": "Van Gogh"}, ValueError, "anchor equal"),
        ({"anchor": ["art", "dog"]}, ShapeError, "as many"),
        ({"preserve": ["van gogh"]}, ValueError, "preserve contains"),
        ({"templates": ["no place"]}, ValueError, "one {}"),
        ({"token_weights": (0.0, 0.0, 0.0)}, ValueError, "not all 0"),
        ({"token_weights": (1.0, -1.0, 0.0)}, ValueError, "at least 0"),
        ({"lam": 0.0}, ValueError, "lam = 0"),
        ({"preset": "paper", "task": "object"}, ValueError, "published"),
    ],
)
def test_bad_input_leaves_the_pipeline(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    pipe = tiny_sd()
    before = weights(pipe)
    options: dict[str, object] = {"erase": "van gogh", "anchor": "art", "templates": FEW, **change}
    with pytest.raises(error, match=words):
        TrceEraser.fit(pipe, **options)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
