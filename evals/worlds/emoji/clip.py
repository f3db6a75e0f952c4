"""A small CLIP of the emoji world: how well a picture fits a text, and embeddings for CMMD.

Its text tower is the pipeline's text encoder: the two were trained together, contrastively (Radford et al. 2021,
arXiv:2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from concept_erasure.errors import FormatError
from concept_erasure.evals.worlds.emoji.grammar import draw
from concept_erasure.evals.worlds.emoji.render import PIXELS, render
from concept_erasure.evals.worlds.emoji.sprites import Sprites

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["EmojiClip", "train_clip"]

_WIDTH, _SHARED = 128, 64
_TEXT = "text."


class EmojiClip(nn.Module):
    """Image tower, projections and the text encoder of the pipeline.

    Args:
        text_encoder: Of the pipeline; not saved with the rest.
        tokenizer: Its tokenizer.
    """

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=4, num_attention_heads=4,
            image_size=PIXELS, patch_size=8,
        )  # fmt: skip
        self.text, self.tokenizer = text_encoder, tokenizer
        self.vision = CLIPVisionModel(config)
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, _SHARED, bias=False)
        self.image_projection = nn.Linear(_WIDTH, _SHARED, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.6592))

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors, shape ``(n, 64)``, of pictures in [-1, 1], shape ``(n, 3, 32, 32)``."""
        weight = self.image_projection.weight
        pooled = self.vision(pixel_values=images.to(weight)).pooler_output
        return functional.normalize(self.image_projection(pooled).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors, shape ``(n, 64)``."""
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.text_projection.weight.device)
        pooled = self.text(ids).pooler_output
        return functional.normalize(
            self.text_projection(pooled.to(self.text_projection.weight)).float(), dim=-1
        )

    def save(self, path: str | Path) -> None:
        """Write everything but the text encoder, in float16."""
        own = {
            k: v.half().contiguous()
            for k, v in self.state_dict().items()
            if not k.startswith(_TEXT)
        }
        save_file(own, path)

    def load(self, path: str | Path) -> EmojiClip:
        """Read what `save` wrote, and return self in evaluation mode.

        Raises:
            FormatError: If the file has other tensors.
        """
        held = {k: v.float() for k, v in load_file(path).items()}
        own = {k for k in self.state_dict() if not k.startswith(_TEXT)}
        if set(held) != own:
            raise FormatError(f"{path}: unexpected tensors {sorted(set(held) ^ own)[:4]}")
        self.load_state_dict(held, strict=False)
        return self.eval().requires_grad_(False)


def _contrastive(images: Tensor, texts: Tensor, scale: Tensor, captions: Sequence[str]) -> Tensor:
    """Return the symmetric cross-entropy; pictures of equal captions are all right answers."""
    logits = scale.exp().clamp(max=100) * images @ texts.T
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([number[caption] for caption in captions], device=logits.device)
    aim = (ids[:, None] == ids[None]).float()
    aim = aim / aim.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, aim) + functional.cross_entropy(logits.T, aim)) / 2


def train_clip(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    sprites: Sprites,
    *,
    steps: int = 1500,
    batch_size: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
) -> EmojiClip:
    """Train both towers together on rendered pictures and captions; the text encoder is trained in place.

    Args:
        text_encoder: A `CLIPTextModel` of width 128 with random weights.
        tokenizer: Its tokenizer.
        sprites: The sheet, on the same device.
        steps: Updates.
        batch_size: Pictures an update.
        rate: Highest learning rate of AdamW; it falls in a line after a warm-up of 3 %.
        seed: Of the image tower and everything drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = EmojiClip(text_encoder, tokenizer)
    clip.to(sprites.images.device).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(clip.parameters(), lr=rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (0.03 * steps)) * (1 - step / steps)
        drawings = draw(sprites.objects, batch_size, seed=seed * 1_000_003 + step)
        factors: Any = torch.tensor([(d.obj, d.style, d.colour) for d in drawings]).unbind(1)
        pictures = render(sprites, *factors, generator=generator)
        captions = [d.caption for d in drawings]
        images, texts = clip.embed_images(pictures), clip.embed_texts(captions)
        loss = _contrastive(images, texts, clip.log_scale, captions)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
    return clip.eval().requires_grad_(False)
