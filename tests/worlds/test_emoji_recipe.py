"""Training of denoisers on a tiny architecture: what is left out, and going on where a run stopped."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from concept_erasure.evals.worlds.emoji.grammar import draw
from concept_erasure.evals.worlds.emoji.recipe import (
    Captions,
    Recipe,
    make_latents,
    noise_loss,
    train_denoiser,
)
from concept_erasure.evals.worlds.emoji.render import STYLES
from concept_erasure.evals.worlds.emoji.sprites import Sprites
from concept_erasure.evals.worlds.emoji.world import EmojiWorld

TINY = Recipe(cycles=(4,), batch_size=4, copies=1, warm_up=2)


@pytest.fixture(scope="module")
def parts(world: EmojiWorld) -> tuple[Any, Sprites]:
    """The pipeline's own text encoder and autoencoder with a tiny denoiser, and three objects."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, cross_attention_dim=128, block_out_channels=(8, 8),
        layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    own = world.pipe
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "device")
    pipe = SimpleNamespace(**{name: getattr(own, name) for name in names} | {"unet": unet})
    return pipe, Sprites(
        world.sprites.images[[31, 0, 1]], tuple(world.objects[i] for i in (31, 0, 1))
    )


def test_a_run_that_stopped_gives_the_same_weights(
    parts: tuple[Any, Sprites], tmp_path: Path
) -> None:
    pipe, sprites = parts
    whole = train_denoiser(pipe, sprites, TINY, tmp_path / "whole")

    def stop(_: torch.nn.Module) -> bool:
        return True

    train_denoiser(pipe, sprites, TINY, tmp_path / "parts", gate=stop, gate_every=2)
    again = train_denoiser(pipe, sprites, TINY, tmp_path / "parts")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_run_of_another_recipe_is_refused(parts: tuple[Any, Sprites], tmp_path: Path) -> None:
    pipe, sprites = parts
    train_denoiser(pipe, sprites, replace(TINY, cycles=(1,)), tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        train_denoiser(pipe, sprites, replace(TINY, rate=1.0), tmp_path)


def test_another_length_is_allowed_until_the_rate_falls() -> None:
    longer = replace(TINY, cycles=(100,))
    assert longer.continues(asdict(TINY), 2)
    assert not longer.continues(asdict(TINY), 3)
    rates = [longer.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(5e-4)
    assert rates[1:70] == [1e-3] * 69
    assert rates[70] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(1e-3 / 30)


def test_a_finished_run_may_be_given_another_cycle() -> None:
    more = replace(TINY, cycles=(4, 24))
    assert more.steps == 24
    assert more.continues(asdict(TINY), 4)
    assert more.continues(asdict(TINY), 3)
    assert not replace(TINY, cycles=(5, 24)).continues(asdict(TINY), 4)
    assert not replace(more, seed=1).continues(asdict(TINY), 4)
    assert more.learning_rate(3) < more.learning_rate(4) == 1e-3
    assert more.learning_rate(17) == 1e-3
    assert more.learning_rate(23) == pytest.approx(1e-3 / 6)


def test_what_is_left_out_has_no_pictures(parts: tuple[Any, Sprites], world: EmojiWorld) -> None:
    _, sprites = parts
    recipe = replace(TINY, leave_out="corn")
    latents = make_latents(world.pipe.vae, sprites, recipe)
    assert latents.mean[0].abs().max() == 0
    assert (latents.mean[1:].float().flatten(3).std(-1) > 0.1).all()
    flat = make_latents(world.pipe.vae, sprites, replace(TINY, leave_out="sketch"))
    assert flat.mean[:, STYLES.index("sketch")].abs().max() == 0
    assert recipe.numbers_left_out(sprites) == {"leave_out_object": 0}
    with pytest.raises(ValueError, match="leave_out must be an object"):
        replace(TINY, leave_out="unicorn").numbers_left_out(sprites)
    drawings = draw(sprites.objects, 20, seed=0, leave_out_object=0)
    assert (
        latents.sample(drawings, torch.Generator().manual_seed(0))
        .abs()
        .flatten(1)
        .max(1)
        .values.min()
        > 0
    )


def test_the_loss_is_zero_for_the_noise_itself(parts: tuple[Any, Sprites]) -> None:
    pipe, _ = parts
    latents = torch.zeros(6, 8, 8, 8)
    alphas = pipe.scheduler.alphas_cumprod

    class Oracle(torch.nn.Module):
        def forward(
            self, x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> SimpleNamespace:
            return SimpleNamespace(sample=x / (1 - alphas[t]).sqrt()[:, None, None, None])

    loss = noise_loss(
        Oracle(),
        latents,
        torch.zeros(6, 16, 128),
        alphas,
        generator=torch.Generator().manual_seed(0),
        snr=5.0,
    )
    assert loss < 1e-10


def test_captions_are_what_the_pipeline_reads(world: EmojiWorld) -> None:
    found = Captions(world.pipe)(["a flat corn", "", "a flat corn"])
    ids = world.pipe.tokenizer("a flat corn", padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(found[0], world.pipe.text_encoder(ids).last_hidden_state[0])
    assert torch.equal(found[0], found[2])
