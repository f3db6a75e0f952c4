"""Tiny random text-to-image pipelines: real diffusers classes, real tokenizers, a vocabulary made here.

`tiny_sd` (CLIP after its last norm, width 32), `tiny_sdxl` (two CLIPs, 32 + 48, pooled 40), `tiny_sd3` (two CLIPs
zero-padded to 96, then T5; pooled 24 + 40) and `tiny_flux` (T5 of width 96; pooled 32). Every call builds a fresh
pipeline with the same weights; norm gains and biases are random, so that no test passes by a one or a zero.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

__all__ = [
    "TINY",
    "WINDOW",
    "clip_tokenizer",
    "latents",
    "t5_tokenizer",
    "tiny_flux",
    "tiny_sd",
    "tiny_sd3",
    "tiny_sdxl",
]

WINDOW = 24  # positions of the CLIPs
WORDS = (
    "a an the of in on by and with style picture photo painting portrait art artist person dog cat horse bird fish "
    "car truck van gogh monet starry night sky sea tree river mountain city garden red green blue yellow happy old"
).split()
RARE = "picasso rembrandt snoopy pikachu nudity celebrity labrador submarine"  # several tokens each


@cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary (``!`` is 0, start and end are last) and merges of a byte-level BPE trained here."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(" ", behavior="removed"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=5,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator([" ".join(WORDS)] * 8 + [RARE] * 2, trainer)
    trained = json.loads(model.to_str())["model"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges = [tuple(pair) for pair in trained["merges"]]
    pieces += ["".join(pair) for pair in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def clip_tokenizer(*, pad: str = "<|endoftext|>", window: int = WINDOW) -> Any:
    """Return a `CLIPTokenizer`; common words are one token, rare ones several."""
    vocabulary, merges = _bpe()
    return transformers.CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), pad_token=pad, model_max_length=window
    )


def t5_tokenizer(window: int = 2 * WINDOW) -> Any:
    """Return a `T5Tokenizer`: pieces, then ``</s>``; no start token."""
    letters = [chr(i) for i in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocabulary = [*special, *((f"▁{w}", -5.0) for w in WORDS), *((c, -10.0) for c in letters)]
    return transformers.T5Tokenizer(
        vocab=vocabulary, extra_ids=0, model_max_length=window, additional_special_tokens=[]
    )


def _clip(width: int, tokenizer: Any, *, projection: int | None = None) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2 if projection is None else 3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        hidden_act="quick_gelu" if projection is None else "gelu",
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if projection is None:
        return transformers.CLIPTextModel(config)
    return transformers.CLIPTextModelWithProjection(config)


def _t5(width: int, tokenizer: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=12,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.T5EncoderModel(config)


def _vae(channels: int = 4) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    )


def _unet(width: int, **more: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
        **more,
    )


def _ready(pipe: Any, modules: list[nn.Module], dtype: torch.dtype) -> Any:
    for module in modules:
        nn.Module.to(module, dtype).eval()  # past diffusers' warning about mixed precision
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _shake(*modules: nn.Module, text: int = 0) -> None:
    """Perturb vectors (norms, biases) of all modules, and matrices of the first ``text``."""
    with torch.no_grad():
        for k, module in enumerate(modules):
            for parameter in module.parameters():
                if parameter.ndim == 1 or k < text:
                    parameter.add_(0.1 * torch.randn_like(parameter))


def _scheduler() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def tiny_sd(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a `StableDiffusionPipeline`: 16 px, text width 32, 4 attentions, so 8 text maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        text, unet, vae = _clip(32, tokenizer), _unet(32), _vae()
        _shake(text, unet, vae, text=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe, [text, unet, vae], dtype)


def tiny_sdxl(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a `StableDiffusionXLPipeline`: text width 32 + 48, pooled 40; 8 text maps and the pooled one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one, two = clip_tokenizer(), clip_tokenizer(pad="!")
        large, giant = _clip(32, one), _clip(48, two, projection=40)
        unet = _unet(
            80,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        )
        vae = _vae()
        _shake(large, giant, unet, vae, text=2)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=large,
        text_encoder_2=giant,
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    return _ready(pipe, [large, giant, unet, vae], dtype)


def tiny_sd3(*, dtype: torch.dtype = torch.float32, seed: int = 0, dual: bool = False) -> Any:
    """Return a `StableDiffusion3Pipeline`; ``dual`` gives its first block SD3.5's second self-attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one, two, three = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
        large, giant = _clip(32, one, projection=24), _clip(48, two, projection=40)
        t5 = _t5(96, three)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
        vae = _vae()
        _shake(large, giant, t5, transformer, vae, text=3)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=large,
        tokenizer=one,
        text_encoder_2=giant,
        tokenizer_2=two,
        text_encoder_3=t5,
        tokenizer_3=three,
    )
    return _ready(pipe, [large, giant, t5, transformer, vae], dtype)


def tiny_flux(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a `FluxPipeline`: T5 of width 96, pooled CLIP 32, 2 double and 2 single blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one, two = clip_tokenizer(), t5_tokenizer()
        clip, t5 = _clip(32, one), _t5(96, two)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=96,
            pooled_projection_dim=32,
            axes_dims_rope=(2, 2, 4),
        )
        vae = _vae()
        _shake(clip, t5, transformer, vae, text=2)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=one,
        text_encoder_2=t5,
        tokenizer_2=two,
        transformer=transformer,
    )
    return _ready(pipe, [clip, t5, transformer, vae], dtype)


TINY = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


def latents(pipe: Any, prompt: str | list[str], *, seed: int = 0, steps: int = 2) -> torch.Tensor:
    """Return the final latents of a 16 px picture, the whole pipeline run with guidance."""
    # asked for by argument, so that both pipelines of a comparison start from the same noise
    options: dict[str, Any] = {}
    if getattr(pipe, "text_encoder_3", None) is not None or type(pipe).__name__ == "FluxPipeline":
        options["max_sequence_length"] = 16
    with torch.no_grad():
        out = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=3.0,
            height=16,
            width=16,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
    return out.images
