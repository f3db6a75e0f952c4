"""The judge of the emoji world: object, style and ground of a picture, and features for Fréchet distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from concept_erasure.errors import ShapeError
from concept_erasure.evals.worlds.emoji.render import COLOURS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import Sprites

__all__ = ["ConceptClassifier", "Judgement", "train_classifier"]

_HEADS = ("object", "style", "colour")


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the classifier sees.

    Attributes:
        object: Log-probabilities, shape ``(n, objects)``.
        style: Shape ``(n, styles)``.
        colour: Shape ``(n, grounds)``.
        features: Shape ``(n, 128)``, what the three are read from.
    """

    object: Tensor
    style: Tensor
    colour: Tensor
    features: Tensor


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions, the first of which halves the picture."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.GELU(),
    )  # fmt: skip


class ConceptClassifier(nn.Module):
    """Seven convolutions and three linear heads on their mean.

    Args:
        objects: How many.
        styles: How many.
        colours: How many grounds.
        width: Channels of the first layer; features are four times as wide.
    """

    def __init__(
        self,
        objects: int,
        styles: int = len(STYLES),
        colours: int = len(COLOURS),
        *,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.GELU(),
            _halving(width, width),
            _halving(width, 2 * width),
            _halving(2 * width, 4 * width),
        )
        counts = dict(zip(_HEADS, (objects, styles, colours), strict=True))
        self.heads = nn.ModuleDict({k: nn.Linear(4 * width, n) for k, n in counts.items()})

    def forward(self, images: Tensor) -> Judgement:
        """Judge pictures.

        Args:
            images: Shape ``(n, 3, 32, 32)``, in [-1, 1].

        Raises:
            ShapeError: If the pictures have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"pictures must have shape (n, 3, h, w), got {tuple(images.shape)}")
        features = self.body(images).mean((2, 3))
        said = {k: self.heads[k](features).log_softmax(-1) for k in _HEADS}
        return Judgement(said["object"], said["style"], said["colour"], features)

    @torch.no_grad()
    def judge(self, images: Tensor, *, batch_size: int = 256) -> Judgement:
        """Judge pictures in [0, 1] in batches, as pipelines give them.

        Args:
            images: Shape ``(n, 3, 32, 32)``, in [0, 1].
            batch_size: Pictures at once.
        """
        weight = next(self.parameters())
        parts = [self(part.to(weight) * 2 - 1) for part in images.split(batch_size)]
        names = (*_HEADS, "features")
        return Judgement(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def train_classifier(
    sprites: Sprites,
    vae: Any,  # noqa: ANN401 - diffusers is optional
    *,
    steps: int = 1500,
    batch_size: int = 128,
    rate: float = 2e-3,
    seed: int = 0,
) -> ConceptClassifier:
    """Train the judge on renders, every second batch of them through the autoencoder, with noise.

    Args:
        sprites: The sheet.
        vae: An autoencoder of diffusers on the same device, so that its blur does not count as evidence.
        steps: Updates.
        batch_size: Pictures an update.
        rate: Highest learning rate of AdamW; it falls in a line.
        seed: Of weights and pictures.

    Returns:
        The classifier in evaluation mode.
    """
    device, n = sprites.images.device, len(sprites.objects)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConceptClassifier(n)
    net.to(device).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        answers = _factors(batch_size, (n, len(STYLES), len(COLOURS)), generator)
        images = render(sprites, *answers, generator=generator)
        if step % 2:
            with torch.no_grad():
                images = vae(images).sample.clamp(-1, 1)
        amount = 0.15 * torch.rand(batch_size, 1, 1, 1, generator=generator)
        noise = amount * torch.randn(images.shape, generator=generator)
        said = net(images + noise.to(device))
        right = [a.to(device) for a in answers]
        loss = functional.cross_entropy(said.object, right[0], label_smoothing=0.05)
        loss = loss + 0.5 * (
            functional.nll_loss(said.style, right[1]) + functional.nll_loss(said.colour, right[2])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def _factors(count: int, limits: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(limit, (count,), generator=generator) for limit in limits]
