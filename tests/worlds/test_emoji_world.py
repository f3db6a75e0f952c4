"""The weights that ship: the pipeline draws what it is asked for, the judge and the CLIP see it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from concept_erasure.errors import FormatError, ShapeError
from concept_erasure.evals.diffusion import Row, draw_rows
from concept_erasure.evals.worlds.emoji.autoencoder import psnr, random_pictures
from concept_erasure.evals.worlds.emoji.classifier import ConceptClassifier, train_classifier
from concept_erasure.evals.worlds.emoji.clip import EmojiClip, train_clip
from concept_erasure.evals.worlds.emoji.gate import Gate, measure_gate
from concept_erasure.evals.worlds.emoji.render import COLOURS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import Sprites, load_objects
from concept_erasure.evals.worlds.emoji.suite import EmojiJudge, object_suite, style_suite
from concept_erasure.evals.worlds.emoji.tokenizer import make_tokenizer
from concept_erasure.evals.worlds.emoji.world import (
    EmojiWorld,
    load_pipeline,
    twins,
    weights_folder,
)
from concept_erasure.report import Interval


def test_the_weights_are_small_and_named() -> None:
    folder = weights_folder()
    size = sum(
        f.stat().st_size for f in folder.rglob("*") if f.is_file() and "twins" not in f.parts
    )
    assert size < 20e6
    assert "CC-BY 4.0" in (folder / "README.md").read_text()


def test_the_pipeline_draws_what_it_is_asked_for(world: EmojiWorld) -> None:
    wanted = [("banana", "flat", "red"), ("pizza", "glossy", "blue"), ("rocket", "flat", "white")]
    rows = [
        Row(prompt=f"a {s} picture of a {n} on a {c} background", seed=i, guidance=5.0, steps=8, height=32, width=32)
        for i, (n, s, c) in enumerate(wanted)
    ]  # fmt: skip
    said = world.classifier.judge(draw_rows(world.pipe, rows) / 255)
    names = [one.name for one in load_objects()]
    assert [names[i] for i in said.object.argmax(1)] == [n for n, _, _ in wanted]
    assert [STYLES[i] for i in said.style.argmax(1)] == [s for _, s, _ in wanted]
    assert [list(COLOURS)[i] for i in said.colour.argmax(1)] == [c for _, _, c in wanted]


def test_the_judge_and_the_autoencoder_hold_on_fresh_pictures(world: EmojiWorld) -> None:
    n = 100
    obj, style = torch.arange(n) % 50, torch.arange(n) % 3
    pictures = render(
        world.sprites, obj, style, torch.arange(n) % 5, generator=torch.Generator().manual_seed(9)
    )
    said = world.classifier.judge((pictures + 1) / 2)
    assert (said.object.argmax(1) == obj).float().mean() >= 0.98
    assert torch.equal(said.style.argmax(1), style)
    assert said.features.shape == (n, 128)
    assert psnr(world.pipe.vae, world.sprites, count=16) > 24


def test_the_clip_prefers_the_right_text(world: EmojiWorld) -> None:
    generator = torch.Generator().manual_seed(1)
    obj = torch.arange(12)
    pictures = render(world.sprites, obj, obj % 3, obj % 5, generator=generator)
    texts = [
        f"a {STYLES[i % 3]} picture of a {world.objects[i].name} on a {list(COLOURS)[i % 5]} background"
        for i in range(12)
    ]
    cosines = world.clip.embed_images(pictures) @ world.clip.embed_texts(texts).T
    assert (cosines.argmax(1) == obj).float().mean() >= 0.9


def test_clip_is_saved_without_the_text_encoder(world: EmojiWorld, tmp_path: Path) -> None:
    world.clip.save(tmp_path / "clip.safetensors")
    again = EmojiClip(world.clip.text, world.clip.tokenizer).load(tmp_path / "clip.safetensors")
    assert again.log_scale == world.clip.log_scale
    with pytest.raises(FormatError, match="unexpected tensors"):
        again.load(weights_folder() / "classifier.safetensors")


def test_pictures_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match="pictures must have shape"):
        ConceptClassifier(4)(torch.zeros(2, 1, 32, 32))


def test_an_unknown_twin_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no twin without 'unicorn'"):
        load_pipeline(twin="unicorn")


@pytest.mark.parametrize("name", twins())
def test_a_twin_shares_everything_but_the_denoiser(world: EmojiWorld, name: str) -> None:
    twin = load_pipeline(twin=name)
    for part in ("text_encoder", "vae"):
        own, other = getattr(twin, part).state_dict(), getattr(world.pipe, part).state_dict()
        assert all(torch.equal(own[k], other[k]) for k in own)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(twin.unet.parameters(), world.pipe.unet.parameters(), strict=True)
    )


def test_suites_ask_for_what_they_say(world: EmojiWorld) -> None:
    suite = object_suite(world, ["corn", "dog"], pictures=12)
    assert suite.kinds == ("erased", "synonym", "neighbour", "kept")
    assert len({row.seed for row in suite.rows}) == len(suite.rows)
    for row in suite.rows:
        obj, style, colour = row.case.split("/")
        assert row.concept == obj
        assert style in row.prompt
        assert colour in row.prompt or colour == "white"
    erased = [suite.rows[i] for i in suite.of_kind("erased")]
    assert {row.concept for row in erased} == {"corn", "dog"}
    asked = [suite.rows[i].prompt for i in suite.of_kind("neighbour", "kept")]
    assert not any("corn" in prompt.split() or "dog" in prompt.split() for prompt in asked)
    real = suite.read(suite.real(suite.rows))
    assert real.hits.float().mean() > 0.9
    with pytest.raises(ValueError, match="targets must be objects"):
        object_suite(world, ["unicorn"])
    with pytest.raises(ValueError, match="at least 2 pictures"):
        object_suite(world, ["corn"], pictures=1)


def test_the_style_suite_judges_styles(world: EmojiWorld) -> None:
    suite = style_suite(world, "sketch", pictures=8)
    assert suite.chance == pytest.approx(1 / 3)
    assert all("sketch" in suite.rows[i].prompt for i in suite.of_kind("erased", "synonym"))
    assert not any("sketch" in suite.rows[i].prompt for i in suite.of_kind("kept"))
    with pytest.raises(ValueError, match="target must be one of flat"):
        style_suite(world, "oil")


def test_the_gate_counts_what_was_left_out_apart(world: EmojiWorld) -> None:
    whole = measure_gate(world.pipe, world.classifier, leave_out="corn", pictures=3, steps=6)
    assert whole.left_out is not None
    assert whole.left_out.value > 0.5  # the whole model is no twin
    assert not whole.holds
    good = Interval(0.99, 0.9, 1.0)
    assert Gate(good, good, good, Interval(0.05, 0.0, 0.1), 0.02).holds
    assert not dataclasses.replace(whole, object=good, style=good, colour=good).holds
    assert "left out" in str(whole)


def test_training_moves_the_classifier_towards_its_answers(
    sprites: Sprites, world: EmojiWorld
) -> None:
    few = Sprites(sprites.images[:4], sprites.objects[:4])
    start, net = (
        train_classifier(few, world.pipe.vae, steps=n, batch_size=16, seed=1) for n in (0, 8)
    )
    generator, n = torch.Generator().manual_seed(5), 30
    colour = torch.arange(n) % 5
    pictures = render(few, torch.arange(n) % 4, torch.arange(n) % 3, colour, generator=generator)
    likelihoods = [one(pictures).colour[torch.arange(n), colour].mean() for one in (start, net)]
    assert likelihoods[1] > likelihoods[0] + 0.1
    assert not net.training


def test_the_tokenizer_learns_the_words_it_was_shown(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(load_objects(), tmp_path, size=700)
    assert tokenizer.tokenize("a banana") == ["a</w>", "banana</w>"]
    assert len(tokenizer.tokenize("zyx")) >= 2
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_clip_training_lowers_its_loss(sprites: Sprites, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(load_objects(), tmp_path, size=700)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = CLIPTextModel(config)
    before = text.state_dict()["embeddings.token_embedding.weight"].clone()
    clip = train_clip(text, tokenizer, sprites, steps=3, batch_size=8)
    assert not torch.equal(before, text.state_dict()["embeddings.token_embedding.weight"])
    pictures = random_pictures(sprites, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(clip.embed_images(pictures).norm(dim=1), torch.ones(3))


def test_a_judge_of_colours_reads_bytes(world: EmojiWorld) -> None:
    ground = torch.tensor(list(COLOURS.values()))[:, :, None, None].expand(-1, -1, 32, 32)
    judge = EmojiJudge(world.classifier, "colour")
    seen = judge.probabilities((ground * 255).round().to(torch.uint8)).argmax(1)
    assert [judge.labels[i] for i in seen] == list(COLOURS)


@pytest.fixture(scope="session")
def sprites(world: EmojiWorld) -> Sprites:
    return world.sprites
