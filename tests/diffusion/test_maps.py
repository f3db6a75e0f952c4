"""The maps that read text: counts on the published models (no weights), and every way to go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.diffusion.maps import (
    check_foldable,
    denoiser,
    encoder_fingerprint,
    is_pipeline,
    module_at,
    text_maps,
    text_width,
)
from concept_erasure.errors import EditError, ShapeError, SiteNotFoundError
from tests.diffusion.tiny import TINY, latents, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

diffusers = pytest.importorskip("diffusers")

_CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _CROSS,
    "up_block_types": _UP,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = SD | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35 = SD3 | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FLUX: dict[str, Any] = {"guidance_embeds": True}
MODELS = {
    "sd14": ("UNet2DConditionModel", SD, 768, {"key": 16, "value": 16}),
    "sd21": ("UNet2DConditionModel", SD21, 1024, {"key": 16, "value": 16}),
    "sdxl": ("UNet2DConditionModel", SDXL, 2048, {"key": 70, "value": 70, "pooled": 1}),
    "sd3": (
        "SD3Transformer2DModel",
        SD3,
        4096,
        {"context": 1, "query": 24, "key": 24, "value": 24, "pooled": 1},
    ),
    "sd35": (
        "SD3Transformer2DModel",
        SD35,
        4096,
        {"context": 1, "query": 24, "key": 24, "value": 24, "pooled": 1},
    ),
    "flux": (
        "FluxTransformer2DModel",
        FLUX,
        4096,
        {"context": 1, "query": 19, "key": 19, "value": 19, "pooled": 1},
    ),
}


def _meta(name: str) -> nn.Module:
    kind, options, _, _ = MODELS[name]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, kind)(**options)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_the_published_models(name: str) -> None:
    _, _, width, counts = MODELS[name]
    model = _meta(name)
    holder = "unet" if "UNet" in MODELS[name][0] else "transformer"
    pipe = SimpleNamespace(**{holder: model})
    maps = text_maps(pipe)
    found = {kind: sum(m.kind == kind for m in maps) for kind in {m.kind for m in maps}}
    assert found == counts
    assert text_width(pipe) == width
    assert {m.model for m in maps} == {holder}
    assert text_maps(model) == maps  # the denoiser alone is enough
    assert len({m.name for m in maps}) == len(maps)
    for text_map in maps:
        module = module_at(pipe, text_map)
        assert text_map.width == (module.in_features if text_map.columns is None else 1280)
        assert text_map.exact == (
            not text_map.name.endswith(("add_q_proj", "add_k_proj", "add_v_proj"))
        )
        assert not text_map.quantised
    assert not any("single_transformer_blocks" in m.name for m in maps)
    if holder == "transformer":
        assert not any("attn2" in m.name for m in maps)
    if name == "sdxl":
        pooled = maps[-1]
        assert (pooled.name, pooled.columns) == ("add_embedding.linear_1", slice(0, 1280))
    if name == "sd14":
        assert sum(module_at(pipe, m).out_features for m in maps) == 24_960


def test_the_traps_are_really_there() -> None:
    """SD 3.5 has attn2 modules of linear maps, Flux single blocks have to_k: the tests above mean something."""
    names = [n for n, m in _meta("sd35").named_modules() if isinstance(m, nn.Linear)]
    assert sum(".attn2.to_k" in name for name in names) == 13
    flux = [n for n, _ in _meta("flux").named_modules()]
    assert "single_transformer_blocks.0.attn.to_k" in flux


@pytest.mark.parametrize("kind", TINY)
def test_exactly_the_listed_maps_are_given_the_text(kind: str) -> None:
    pipe = TINY[kind]()
    model, text, given = denoiser(pipe), [], []

    def note_text(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text.append(kwargs["encoder_hidden_states"])

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and args[0].shape == text[0].shape and torch.equal(args[0], text[0]):
                given.append(name)

        return hook

    model.register_forward_pre_hook(note_text, with_kwargs=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    latents(pipe, "a dog", steps=1)
    listed = {m.name for m in text_maps(pipe) if m.exact and m.kind != "pooled"}
    assert set(given) == listed
    assert text[0].shape[-1] == text_width(pipe)


def test_self_attention_of_the_same_width_is_left_out() -> None:
    pipe = tiny_sd()
    names = [m.name for m in text_maps(pipe)]
    assert len(names) == 8
    assert all(".attn2.to_" in name for name in names)
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.in_features == 32
    double = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    strange = double.mid_block.attentions[0].transformer_blocks[0].attn2
    strange.to_k = nn.Linear(32, 32, bias=False)  # reads something else than text
    assert sum(m.kind == "key" for m in text_maps(double)) == 3


def test_fused_projections_are_refused() -> None:
    for make, holder in ((tiny_sd, "unet"), (tiny_sd3, "transformer"), (tiny_flux, "transformer")):
        pipe = make()
        with torch.no_grad():
            getattr(pipe, holder).fuse_qkv_projections()
        with pytest.raises(EditError, match=rf"fused.*pipe\.{holder}\.unfuse_qkv_projections"):
            text_maps(pipe)


def test_compiled_models_are_refused() -> None:
    pipe = tiny_sd()
    pipe.unet.mid_block.compile()
    with pytest.raises(EditError, match=r"'mid_block' is compiled"):
        text_maps(pipe)
    wrapped = SimpleNamespace(unet=torch.compile(tiny_sd().unet))
    with pytest.raises(EditError, match=r"_orig_mod"):
        text_maps(wrapped)


def test_adapters_show_their_base_layer() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_sd()
    plain = text_maps(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    maps = text_maps(pipe)
    assert [m.name for m in maps] == [f"{m.name}.base_layer" for m in plain]
    assert all(m.adapter for m in maps)
    assert module_at(pipe, maps[0]).in_features == 32
    with pytest.raises(EditError, match=r"adapter is active.*fuse or unload"):
        check_foldable(maps)
    pipe.unet.disable_adapters()
    check_foldable(text_maps(pipe))
    pipe.unet.enable_adapters()
    for module in pipe.unet.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    check_foldable(text_maps(pipe))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_marked(dtype: torch.dtype) -> None:
    pipe = tiny_sd()
    module = module_at(pipe, text_maps(pipe)[3])
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    maps = text_maps(pipe)
    assert [m.quantised for m in maps] == [i == 3 for i in range(len(maps))]
    with pytest.raises(EditError, match=r"to_v' is quantised.*LoRA"):
        check_foldable(maps)


def test_subclasses_of_parameter_are_quantised() -> None:
    class Params4bit(nn.Parameter):
        pass

    pipe = tiny_sd()
    module = module_at(pipe, text_maps(pipe)[0])
    module.weight = Params4bit(module.weight.detach())
    assert text_maps(pipe)[0].quantised


def test_other_denoisers_are_refused() -> None:
    with pytest.raises(TypeError, match="neither a 'unet' nor a 'transformer'"):
        text_maps(object())
    with pytest.raises(SiteNotFoundError, match="not known"):
        text_maps(SimpleNamespace(unet=nn.Linear(3, 3)))
    pipe = tiny_sd()
    pipe.unet.config["encoder_hid_dim_type"] = "text_proj"
    object.__setattr__(pipe.unet.config, "encoder_hid_dim_type", "text_proj")
    with pytest.raises(EditError, match="projects text first"):
        text_maps(pipe)
    pipe = tiny_sdxl()
    pipe.text_encoder_2.config.projection_dim = 4000
    with pytest.raises(ShapeError, match="cannot be text"):
        text_maps(pipe)


def test_pipelines_are_not_modules() -> None:
    assert is_pipeline(tiny_sd())
    assert not is_pipeline(tiny_sd().unet)
    holder = nn.Module()
    holder.transformer = nn.Linear(2, 2)  # GPT-2 has an attribute of that name
    assert not is_pipeline(holder)
    assert not is_pipeline(None)


def test_fingerprints_tell_encoders_apart() -> None:
    pipe = tiny_sdxl()
    mark = encoder_fingerprint(pipe)
    assert mark == encoder_fingerprint(tiny_sdxl())
    assert mark == encoder_fingerprint(tiny_sdxl(dtype=torch.float64))
    alone = SimpleNamespace(unet=pipe.unet, text_encoder=pipe.text_encoder)
    assert len({mark, encoder_fingerprint(alone), encoder_fingerprint(tiny_sdxl(seed=1))}) == 3
    with pytest.raises(TypeError, match="no text encoder"):
        encoder_fingerprint(SimpleNamespace(unet=pipe.unet))
