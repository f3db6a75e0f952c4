"""Train the whole emoji world: ``python -m concept_erasure.evals.worlds.emoji.make``, or ``make world-emoji``.

Every part that is there already is kept, so an interrupted run goes on; with the weights that ship in place, only
missing twins are trained. Two to three hours for everything on two idle cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from concept_erasure.evals.worlds.emoji.autoencoder import psnr, train_autoencoder
from concept_erasure.evals.worlds.emoji.classifier import train_classifier
from concept_erasure.evals.worlds.emoji.clip import train_clip
from concept_erasure.evals.worlds.emoji.gate import measure_gate
from concept_erasure.evals.worlds.emoji.recipe import Recipe, train_denoiser
from concept_erasure.evals.worlds.emoji.sprites import Sprites, load_sprites, pack_sprites
from concept_erasure.evals.worlds.emoji.tokenizer import WINDOW, make_tokenizer
from concept_erasure.evals.worlds.emoji.world import (
    load_classifier,
    load_pipeline,
    twins,
    weights_folder,
)

__all__ = ["main", "make_parts", "make_twin"]

_LOG = logging.getLogger(__name__)
_WIDTH = 128
TWINS = ("corn", "sketch")


def _denoiser() -> Any:  # noqa: ANN401 - diffusers is optional
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, cross_attention_dim=_WIDTH, block_out_channels=(96, 128),
        layers_per_block=1, attention_head_dim=4, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip


def _sampler() -> Any:  # noqa: ANN401 - diffusers is optional
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def make_parts(folder: Path, sprites: Sprites, *, work: Path, seed: int = 0) -> None:
    """Train tokenizer, CLIP, autoencoder, judge and denoiser, and write the pipeline.

    Args:
        folder: Where the weights go; nothing is done if there is a pipeline.
        sprites: The sheet, on the device to train on.
        work: For checkpoints of the denoiser.
        seed: Of everything.
    """
    if (folder / "model_index.json").is_file():
        return
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    device = sprites.images.device
    tokenizer = make_tokenizer(sprites.objects, folder / "tokenizer", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=WINDOW, projection_dim=64,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    clip = train_clip(text, tokenizer, sprites, seed=seed)
    vae = train_autoencoder(sprites, seed=seed)
    _LOG.info("autoencoder: %.1f dB", psnr(vae, sprites))
    judge = train_classifier(sprites, vae, seed=seed)
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=_denoiser(), scheduler=_sampler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(device)  # fmt: skip
    unet = train_denoiser(
        pipe, sprites, Recipe(cycles=(4700,), batch_size=96, seed=seed), work / "whole"
    )
    pipe.unet.load_state_dict(unet.state_dict())
    clip.save(folder / "clip.safetensors")
    _save_half(judge, folder / "classifier.safetensors")
    pipe.to(dtype=torch.float16).save_pretrained(folder)


def make_twin(
    leave_out: str, folder: Path, sprites: Sprites, *, work: Path, recipe: Recipe | None = None
) -> None:
    """Train a denoiser that never knew an object or style, and write it beside the pipeline.

    Args:
        leave_out: Name of the object or style.
        folder: Of the pipeline; nothing is done if the twin is there.
        sprites: The sheet, on the device to train on.
        work: For checkpoints; a run that stopped goes on.
        recipe: How, default that of the twins that ship.
    """
    if leave_out in twins(folder):
        return
    pipe: Any = load_pipeline(folder=folder, device=sprites.images.device)
    unet = train_denoiser(pipe, sprites, recipe or Recipe(leave_out=leave_out), work / leave_out)
    pipe.unet.load_state_dict(unet.state_dict())
    gate = measure_gate(pipe, load_classifier(folder).to(pipe.device), leave_out=leave_out)
    _LOG.info("twin without %s: %s", leave_out, gate)
    _save_half(unet, folder / "twins" / f"{leave_out}.safetensors")
    record = folder / "twins" / f"{leave_out}.json"
    record.write_text(
        json.dumps({"gate": str(gate), "holds": gate.holds}, indent=2) + "\n", "utf-8"
    )


def _save_half(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in module.state_dict().items()}, path)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train what is missing."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=weights_folder(), help="folder of the weights")
    parser.add_argument("--work", type=Path, default=Path("emoji-work"), help="for checkpoints")
    parser.add_argument(
        "--packages", type=Path, help="unpacked npm packages, to pack sprites again"
    )
    parser.add_argument(
        "--twins", nargs="*", default=list(TWINS), help="objects and styles to leave out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sheet = None
    if options.packages is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        sheet = pack_sprites(options.packages, options.work / "sprites.png")
    sprites = load_sprites(sheet).to(options.device)
    make_parts(options.out, sprites, work=options.work)
    for name in options.twins:
        make_twin(name, options.out, sprites, work=options.work)


if __name__ == "__main__":
    main()
