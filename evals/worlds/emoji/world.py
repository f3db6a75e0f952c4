"""The emoji world as it ships: pipeline, twins, judge and CLIP.

Weights are float16 and loaded as float32 unless told otherwise. Made by `concept_erasure.evals.worlds.emoji.make`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from concept_erasure.errors import missing_extra
from concept_erasure.evals.worlds.emoji.classifier import ConceptClassifier
from concept_erasure.evals.worlds.emoji.clip import EmojiClip
from concept_erasure.evals.worlds.emoji.sprites import (
    EmojiObject,
    Sprites,
    load_objects,
    load_sprites,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["EmojiWorld", "load_classifier", "load_pipeline", "twins", "weights_folder"]


def weights_folder() -> Path:
    """Return the folder of the pipeline; diffusers loads it as any other."""
    return Path(__file__).parent / "weights"


def twins(folder: Path | None = None) -> tuple[str, ...]:
    """Return what was left out of each twin that is there."""
    return tuple(
        sorted(p.stem for p in ((folder or weights_folder()) / "twins").glob("*.safetensors"))
    )


def load_pipeline(
    *,
    twin: str | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """Load the text-to-image pipeline.

    Args:
        twin: Name of an object or style: the pipeline that never knew it.
        folder: Of the weights; default those that ship.
        device: Where to.
        dtype: Of all weights.

    Raises:
        ImportError: If diffusers is absent.
        ValueError: If there is no such twin.
    """
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "diffusion") from None
    folder = folder or weights_folder()
    if twin is not None and twin not in twins(folder):
        raise ValueError(
            f"no twin without {twin!r}; there are {', '.join(twins(folder)) or 'none'}: train it with make world-emoji"
        )
    quiet = not diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        # Newer releases call it dtype and warn; those we support since 0.35 know only this name.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    if not quiet:
        diffusers.utils.logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    if twin is not None:
        pipe.unet.load_state_dict(load_file(folder / "twins" / f"{twin}.safetensors"))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe.to(device)


def load_classifier(folder: Path | None = None) -> ConceptClassifier:
    """Load the judge, in float32 and evaluation mode."""
    net = ConceptClassifier(len(load_objects()))
    held = load_file((folder or weights_folder()) / "classifier.safetensors")
    net.load_state_dict({k: v.float() for k, v in held.items()})
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class EmojiWorld:
    """Everything there is to evaluate with, loaded when first asked for.

    Attributes:
        folder: Of the weights; default those that ship.
    """

    folder: Path | None = None

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        """The pipeline that knows everything."""
        return load_pipeline(folder=self.folder)

    @cached_property
    def classifier(self) -> ConceptClassifier:
        """The judge."""
        return load_classifier(self.folder)

    @cached_property
    def clip(self) -> EmojiClip:
        """The small CLIP, with a text encoder of its own that no edit touches."""
        pipe = load_pipeline(folder=self.folder)
        clip = EmojiClip(pipe.text_encoder, pipe.tokenizer)
        return clip.load((self.folder or weights_folder()) / "clip.safetensors")

    @cached_property
    def sprites(self) -> Sprites:
        """The pictures it was trained on."""
        return load_sprites()

    @property
    def objects(self) -> tuple[EmojiObject, ...]:
        """The fifty objects."""
        return load_objects()
