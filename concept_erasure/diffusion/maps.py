"""Where a denoiser reads text: the linear maps that see text vectors, found by what they can do.

| denoiser | exact for text | deeper, inexact |
|---|---|---|
| U-Net (SD 1, 2, SDXL) | `attn2.to_k`, `attn2.to_v`; SDXL also columns of `add_embedding.linear_1` (pooled) | |
| joint attention (SD 3, 3.5, Flux) | `context_embedder`; `time_text_embed.text_embedder.linear_1` (pooled) | \
`attn.add_{q,k,v}_proj` |

The `add_*` maps see text mixed with the image and modulated by the time step. SD 3.5's `attn2` is self-attention of
the image and Flux's single blocks share their weights between text and image: neither is listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from concept_erasure.edit import base_fingerprint
from concept_erasure.errors import EditError, ShapeError, SiteNotFoundError

__all__ = [
    "PIPELINE_SITES",
    "TextMap",
    "check_foldable",
    "denoiser",
    "encoder_fingerprint",
    "is_pipeline",
    "module_at",
    "text_encoders",
    "text_maps",
    "text_width",
]

Kind = Literal["key", "value", "query", "context", "pooled"]
PIPELINE_SITES = (
    "text_encoder",
    "cross_attention",
    "pooled",
    "token_embedding",
    "token_embedding_2",
    "token_embedding_3",
)
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_JOINT: tuple[tuple[str, Kind], ...] = (
    ("add_q_proj", "query"),
    ("add_k_proj", "key"),
    ("add_v_proj", "value"),
)
_CROSS: tuple[tuple[str, Kind], ...] = (("to_k", "key"), ("to_v", "value"))
_POOLED_JOINT = "time_text_embed.text_embedder.linear_1"
_POOLED_UNET = "add_embedding.linear_1"


@dataclass(frozen=True)
class TextMap:
    """A linear map that reads text vectors.

    Attributes:
        name: Module path in the denoiser; that of the base layer where an adapter wraps it.
        model: The pipeline's attribute that holds the denoiser: ``unet`` or ``transformer``.
        kind: What the map makes: ``key``, ``value``, ``query``, ``context`` (the embedding of all text tokens) or
            ``pooled`` (of the pooled vector).
        width: Number of text inputs d.
        columns: Inputs that are text; None if all are.
        exact: Whether these inputs are the text vectors themselves. Not so deeper in joint attention.
        adapter: Whether an adapter (LoRA) is active beside it, which reads the same vectors.
        quantised: Whether the weight cannot be changed in place: use the hook or the LoRA form.
    """

    name: str
    model: str
    kind: Kind
    width: int
    columns: slice | None = None
    exact: bool = True
    adapter: bool = False
    quantised: bool = False

    @property
    def text_columns(self) -> slice:
        """The inputs that are text, as a slice."""
        return slice(0, self.width) if self.columns is None else self.columns


def is_pipeline(model: object) -> bool:
    """Say whether an object is a text-to-image pipeline: not a module, but the holder of a denoiser."""
    return not isinstance(model, nn.Module) and _holder(model) is not None


def _holder(pipe: object) -> str | None:
    names = ("unet", "transformer")
    return next((name for name in names if isinstance(getattr(pipe, name, None), nn.Module)), None)


def denoiser(pipe: object) -> nn.Module:
    """Return the U-Net or transformer of a pipeline; a module is its own.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    name = _holder(pipe)
    if name is None:
        raise TypeError(
            f"{type(pipe).__name__} has neither a 'unet' nor a 'transformer'; give a text-to-image pipeline"
        )
    module: nn.Module = getattr(pipe, name)
    return module


def text_encoders(pipe: object) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline by attribute name, in order.

    Raises:
        TypeError: If there is none.
    """
    found = {name: getattr(pipe, name, None) for name in _ENCODERS}
    encoders = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
    if not encoders:
        raise TypeError(
            f"{type(pipe).__name__} has no text encoder; load the pipeline with its text encoders"
        )
    return encoders


def encoder_fingerprint(pipe: object) -> str:
    """Return one fingerprint of all text encoders, as they are without the edits in force.

    Which slots they are in counts: CLIP-L alone and CLIP-L beside another encoder give other vectors.

    Raises:
        TypeError: If there is no text encoder.
    """
    digest = hashlib.sha256()
    for name, module in text_encoders(pipe).items():
        digest.update(f"{name}:{base_fingerprint(module)};".encode())
    return digest.hexdigest()


def text_width(pipe: object) -> int:
    """Return the width d of the text vectors that the denoiser reads.

    Raises:
        SiteNotFoundError: If the denoiser does not read text in a known way.
    """
    widths = sorted({m.width for m in text_maps(pipe) if m.exact and m.kind != "pooled"})
    if len(widths) != 1:
        raise SiteNotFoundError(f"the text maps have several widths, {widths}; one was expected")
    return widths[0]


def module_at(pipe: object, text_map: TextMap) -> nn.Linear:
    """Return the linear module of a text map."""
    module = denoiser(pipe).get_submodule(text_map.name)
    if not isinstance(module, nn.Linear):
        raise EditError(f"{text_map.name!r} is a {type(module).__name__}, not a linear module")
    return module


def text_maps(pipe: object) -> list[TextMap]:
    """Return the maps of the denoiser that read text, in the order of its modules.

    Args:
        pipe: A pipeline, or a denoiser alone. It is not run and not changed.

    Raises:
        EditError: If projections are fused, the denoiser is compiled, or text is projected before it is read.
        SiteNotFoundError: If the denoiser does not read text in a known way.
        TypeError: If there is no denoiser.
    """
    model = denoiser(pipe)
    holder = "unet" if isinstance(pipe, nn.Module) else str(_holder(pipe))
    if isinstance(pipe, nn.Module) and _is_linear(getattr(model, "context_embedder", None)):
        holder = "transformer"
    _check_compiled(model, holder)
    _check_fused(model, holder)
    joint = _is_linear(getattr(model, "context_embedder", None))
    found = list(_joint_maps(model, holder) if joint else _cross_maps(pipe, model, holder))
    if not any(m.exact and m.kind != "pooled" for m in found):
        raise SiteNotFoundError(
            f"{type(model).__name__} has neither cross-attention (attn2.to_k of the width of its "
            "cross_attention_dim) nor a context_embedder: its way of reading text is not known"
        )
    return found


def check_foldable(maps: Sequence[TextMap]) -> None:
    """Raise EditError unless a change of these weights is all that the maps' readers see."""
    for text_map in maps:
        if text_map.quantised:
            raise EditError(
                f"{text_map.name!r} is quantised and cannot be changed in place; use attach() (a hook), the LoRA "
                "form, or load the model in bfloat16"
            )
        if text_map.adapter:
            raise EditError(
                f"an adapter is active beside {text_map.name!r} and reads the same vectors: a change of the base "
                "weight alone would miss it; fuse or unload the LoRA first, or use attach()"
            )


def _cross_maps(pipe: object, model: nn.Module, holder: str) -> Iterator[TextMap]:
    config = getattr(model, "config", None)
    hidden = getattr(config, "encoder_hid_dim_type", None)
    if hidden not in (None, "ip_image_proj"):
        raise EditError(
            f"the denoiser projects text first (encoder_hid_dim_type={hidden!r}), so its attention reads other "
            "vectors than the text encoder gives; this is not supported"
        )
    widths = _numbers(getattr(config, "cross_attention_dim", None))
    for path, module in model.named_modules():
        if path.rpartition(".")[2] != "attn2" or not getattr(module, "is_cross_attention", True):
            continue
        for name, kind in _CROSS:
            made = _map(module, f"{path}.{name}", name, holder, kind)
            if made is not None and made.width in widths:
                yield made
    inner = getattr(getattr(model, "add_embedding", None), "linear_1", None)
    if getattr(config, "addition_embed_type", None) == "text_time" and inner is not None:
        width = _pooled_width(pipe, config, inner)
        made = _map(
            model.get_submodule("add_embedding"), _POOLED_UNET, "linear_1", holder, "pooled"
        )
        if made is not None:
            yield TextMap(**{**vars(made), "width": width, "columns": slice(0, width)})


def _pooled_width(pipe: object, config: object, inner: nn.Module) -> int:
    """Return how many inputs of SDXL's added embedding are text; the rest are sizes, six numbers embedded."""
    total = int(_base(inner).in_features)
    encoder = getattr(pipe, "text_encoder_2", None)
    width = getattr(getattr(encoder, "config", None), "projection_dim", None)
    if width is None:
        width = total - 6 * int(getattr(config, "addition_time_embed_dim", 0) or 0)
    if not 0 < width <= total:
        raise ShapeError(f"{_POOLED_UNET!r} has {total} inputs; {width} of them cannot be text")
    return int(width)


def _joint_maps(model: nn.Module, holder: str) -> Iterator[TextMap]:
    context = _map(model, "context_embedder", "context_embedder", holder, "context")
    if context is not None:
        yield context
    for path, module in model.named_modules():
        for name, kind in _JOINT:
            made = _map(module, f"{path}.{name}", name, holder, kind)
            if made is not None:
                yield TextMap(**{**vars(made), "exact": False})
    embedder = getattr(getattr(model, "time_text_embed", None), "text_embedder", None)
    if isinstance(embedder, nn.Module):
        pooled = _map(embedder, _POOLED_JOINT, "linear_1", holder, "pooled")
        if pooled is not None:
            yield pooled


def _map(parent: nn.Module, path: str, name: str, holder: str, kind: Kind) -> TextMap | None:
    """Describe the linear child of a module; None if there is no such child."""
    child = getattr(parent, name, None)
    base = _base(child)
    if not _is_linear(base):
        return None
    wrapped = base is not child
    return TextMap(
        name=f"{path}.base_layer" if wrapped else path,
        model=holder,
        kind=kind,
        width=int(base.in_features),
        adapter=wrapped and _adapter_active(child),
        quantised=_quantised(base.weight),
    )


def _base(module: Any) -> Any:  # noqa: ANN401 linear modules and wrappers of many makes
    """Return the layer inside an adapter's wrapper."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _is_linear(module: object) -> bool:
    module = _base(module)
    return isinstance(module, nn.Linear) and isinstance(getattr(module, "weight", None), Tensor)


def _adapter_active(wrapper: Any) -> bool:  # noqa: ANN401 wrappers of many makes
    """Say whether an adapter adds something of its own: in use, enabled and not merged into the base."""
    if getattr(wrapper, "disable_adapters", False):
        return False
    active = getattr(wrapper, "active_adapters", ()) or ()
    names = [active] if isinstance(active, str) else list(active)
    present = getattr(wrapper, "lora_A", None)
    if present is not None:
        names = [name for name in names if name in present]
    merged = set(getattr(wrapper, "merged_adapters", ()) or ())
    return any(name not in merged for name in names)


def _quantised(weight: Tensor) -> bool:
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return not plain or not weight.is_floating_point() or weight.element_size() < 2


def _check_compiled(model: nn.Module, holder: str) -> None:
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise EditError(
            f"the {holder} is compiled (torch.compile); edit first and compile then: "
            f"pipe.{holder} = pipe.{holder}._orig_mod"
        )
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise EditError(
                f"{path or holder!r} is compiled (module.compile()); edit first and compile then"
            )


def _check_fused(model: nn.Module, holder: str) -> None:
    copies = ("to_kv", "to_qkv", "to_added_qkv")
    for path, module in model.named_modules():
        copied = next((c for c in copies if isinstance(getattr(module, c, None), nn.Module)), None)
        if getattr(module, "fused_projections", False) is True:
            copied = copied or "a fused copy"
        if copied is not None:
            raise EditError(
                f"{path!r} has fused projections ({copied}): it reads copies of the weights, which an edit would "
                f"miss; call pipe.{holder}.unfuse_qkv_projections() (or reload) and edit before fusing"
            )


def _numbers(value: object) -> set[int]:
    """Return the whole numbers in a number or in nested sequences of them."""
    if isinstance(value, int):
        return {value}
    if isinstance(value, list | tuple):
        return set().union(*(_numbers(member) for member in value))
    return set()
