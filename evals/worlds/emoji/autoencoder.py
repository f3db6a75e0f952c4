"""The autoencoder of the emoji world: 32 pixels to an 8 x 8 grid of 8 channels and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from concept_erasure.evals.worlds.emoji.render import COLOURS, PIXELS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import Sprites

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["psnr", "random_pictures", "train_autoencoder"]

_CHANNELS = (24, 48, 96)
_KL = 2e-6  # weight of the divergence, a latent value


def random_pictures(sprites: Sprites, count: int, generator: torch.Generator) -> Tensor:
    """Render pictures of everything in equal shares, shape ``(count, 3, 32, 32)``."""
    limits = (len(sprites.objects), len(STYLES), len(COLOURS))
    factors = [torch.randint(limit, (count,), generator=generator) for limit in limits]
    return render(sprites, factors[0], factors[1], factors[2], generator=generator)


def train_autoencoder(
    sprites: Sprites, *, steps: int = 4000, batch_size: int = 48, rate: float = 1e-3, seed: int = 0
) -> AutoencoderKL:
    """Train on rendered pictures: absolute and squared error, edges, a little divergence.

    Args:
        sprites: The sheet.
        steps: Updates.
        batch_size: Pictures an update.
        rate: Highest learning rate of AdamW; it falls in a line.
        seed: Of weights and pictures.

    Returns:
        The autoencoder in evaluation mode, scaled so that latents have unit variance.
    """
    from diffusers import AutoencoderKL

    device = sprites.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=8, block_out_channels=_CHANNELS,
            layers_per_block=1, norm_num_groups=8, sample_size=PIXELS,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
    vae.to(device).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.01, 1 - step / steps)
        pictures = random_pictures(sprites, batch_size, generator)
        found = vae.encode(pictures).latent_dist
        noise = torch.randn(found.mean.shape, generator=generator).to(device)
        error = vae.decode(found.mean + found.std * noise).sample - pictures
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        divergence = found.kl().mean() * _KL
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges + divergence
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(random_pictures(sprites, 512, generator)).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


@torch.no_grad()
def psnr(vae: Any, sprites: Sprites, *, count: int = 256, seed: int = 1) -> float:  # noqa: ANN401 - optional
    """Return the peak signal-to-noise ratio of reconstructions, in decibels.

    Args:
        vae: An autoencoder of diffusers.
        sprites: The sheet.
        count: Fresh pictures.
        seed: Of them.
    """
    pictures = random_pictures(sprites, count, torch.Generator().manual_seed(seed))
    error = (vae(pictures).sample.clamp(-1, 1) - pictures).square().mean()
    return float(10 * torch.log10(4 / error))
