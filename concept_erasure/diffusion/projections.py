"""Erasers of vectors in text-to-image pipelines: at the text encoder, in what attention reads, in the pooled vector.

| site | `attach` (hook) | `apply` |
|---|---|---|
| `text_encoder` | on the encoder's last norm; with several encoders, on what the denoiser is given | the same hook |
| `cross_attention` | on what the denoiser is given | folded into its text maps, where exact |
| `pooled` | on the map that reads it | folded into the pooled columns of that map |
| `token_embedding`, `_2`, `_3` | on the table's output | folded into the table's rows |

``text_encoder`` and ``cross_attention`` are one space, the vectors that the denoiser reads; nothing behind the last
norm of an encoder could hold a projection, so `apply` there is the hook too.

Offset of an affine map where the text maps have no bias (U-Nets): if the encoder ends in a layer norm with gain g and
shift s, every vector x it gives has ``w^T x = k`` with ``w = 1/g`` and ``k = sum(s/g)``, so the linear map
``x -> P x + b (w^T x) / k`` does the same as ``x -> P x + b``. Exact for what the encoder gives, not for any vector.
SDXL reads a layer without a norm and puts zeros for the missing negative prompt, which an offset would move: refused.
Hooks leave vectors of zeros alone, because no encoder made them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn

from concept_erasure.diffusion.maps import (
    PIPELINE_SITES,
    TextMap,
    check_foldable,
    denoiser,
    encoder_fingerprint,
    text_encoders,
    text_maps,
    text_width,
)
from concept_erasure.edit import Edit
from concept_erasure.eraser import RepresentationEraser
from concept_erasure.errors import EditError, ShapeError, SiteNotFoundError, SpaceError
from concept_erasure.fold import Bias, fold_patches
from concept_erasure.linalg import LowRankAffine, statistics_dtype
from concept_erasure.patches import BiasPatch, DensePatch, HookPatch, Patch, check_writable
from concept_erasure.sites import Site, model_id

__all__ = [
    "ArgumentPatch",
    "apply_to_pipeline",
    "attach_to_pipeline",
    "text_edit",
    "without_offset",
]

if TYPE_CHECKING:
    from concept_erasure.diffusion.eraser import DiffusionEraser

_ONE_SPACE = {"cross_attention": "text_encoder"}
ROUNDING = 1e-2  # largest share of the offset that may be rounded away in the weights' dtype


@dataclass
class ArgumentPatch(HookPatch):
    """Change a named argument of a module's forward on every pass; ``site.name`` is shown in summaries.

    Attributes:
        argument: Name of the argument.
    """

    argument: str = "encoder_hidden_states"

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        module = model.get_submodule(self.site.module)
        names = list(inspect.signature(module.forward).parameters)
        if self.argument not in names:
            raise EditError(f"{type(module).__name__} takes no {self.argument!r}; it takes {names}")
        place = names.index(self.argument)

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            held = args[place] if len(args) > place else kwargs.get(self.argument)
            new = self.function(held) if isinstance(held, Tensor) else None
            if new is None:
                return None
            if len(args) > place:
                return (*args[:place], new, *args[place + 1 :]), kwargs
            return args, {**kwargs, self.argument: new}

        self._handle = module.register_forward_pre_hook(before, with_kwargs=True)
        return 0.0


def attach_to_pipeline(
    eraser: RepresentationEraser, pipe: object, sites: str | Sequence[str] | None = None
) -> Edit:
    """Erase in a pipeline by hooks; works at every site of the table and touches no weight.

    Raises:
        EditError: If this eraser is in force at the place already.
        ShapeError: If the site has another width.
        SiteNotFoundError: If the pipeline has no such site.
        SpaceError: If the eraser was fitted on other encoders or at another site.
    """
    site = _site(eraser, pipe, sites)
    model, patch = _hook(pipe, site, eraser.map)
    return Edit(model, [patch], label=f"{eraser.method} at {site}", key=_key(eraser, site))


def apply_to_pipeline(
    eraser: RepresentationEraser,
    pipe: object,
    sites: str | Sequence[str] | None = None,
    bias: Bias = "auto",
) -> Edit:
    """Erase in a pipeline by its weights where that is exact; at ``text_encoder`` by the hook of `attach`.

    Args:
        eraser: The eraser.
        pipe: The pipeline.
        sites: One site; default the one the eraser was fitted at.
        bias: ``"add"``: where text maps lack the bias for an offset that no layer norm can carry, add it in memory
            (lost on save and reload). ``"auto"`` and ``"refuse"``: refuse there.

    Raises:
        EditError: If the fold would not be exact or a weight cannot be changed (use `attach`), or this eraser is in
            force at the place already.
        ShapeError: If the site has another width.
        SiteNotFoundError: If the pipeline has no such site.
        SpaceError: If the eraser was fitted on other encoders or at another site.
        ValueError: If bias is another word.
    """
    if bias not in get_args(Bias):
        raise ValueError(f"bias must be 'auto', 'add' or 'refuse'; got {bias!r}")
    site = _site(eraser, pipe, sites)
    if site == "text_encoder":
        return attach_to_pipeline(eraser, pipe, site)
    patches: list[Patch]
    if site == "cross_attention":
        model, patches = denoiser(pipe), _fold_attention(pipe, eraser.map, bias)
    elif site == "pooled":
        model, patches = denoiser(pipe), _fold_pooled(pipe, eraser.map)
    else:
        model = _encoder(pipe, site)
        name = f"{_table(model)[0]}.weight"
        check_writable(model, name)
        patches = [DensePatch(name, partial(_rows, name=name, function=eraser.map))]
    return Edit(model, patches, label=f"{eraser.method} at {site}", key=_key(eraser, site))


def text_edit(eraser: RepresentationEraser, pipe: object) -> DiffusionEraser:
    """Return a projection of text vectors as an edit of the maps that read them, for weights or a LoRA file.

    Args:
        eraser: Fitted on the vectors that the denoiser reads.
        pipe: The pipeline; not changed.

    Raises:
        EditError: If an offset has no layer norm to carry it (fit with ``affine=False``, or use `attach`).
        ShapeError: If the width is another.
        SpaceError: If the eraser was fitted on other encoders or elsewhere.
    """
    from concept_erasure.diffusion.eraser import (  # noqa: PLC0415 needed here only
        DiffusionConfig,
        DiffusionEraser,
    )

    site = "text_encoder" if eraser.space is None else eraser.space.site
    if _ONE_SPACE.get(site, site) != "text_encoder":
        raise SpaceError(f"this eraser was fitted at {site!r}, not on what the text maps read")
    _site(eraser, pipe, "cross_attention")
    function = eraser.map
    if function.center is not None:
        _check_offset(pipe, function, "cross_attention")
        maps = [m for m in text_maps(pipe) if m.exact and m.kind != "pooled"]
        weight = cast("Tensor", denoiser(pipe).get_submodule(maps[0].name).weight)
        function = without_offset(function, _layer_norm(pipe), weight.dtype)
    return DiffusionEraser(
        config=DiffusionConfig(concepts=(eraser.method,)),
        left=function.left,
        right=function.right,
        space=eraser.space,
        report={"projection": eraser.method},
    )


def _site(eraser: RepresentationEraser, pipe: object, sites: str | Sequence[str] | None) -> str:
    """Return the one site meant, checked against the eraser's space and width."""
    space = eraser.space
    if sites is None and space is None:
        raise SpaceError(
            "this eraser was fitted on bare tensors and does not know its place; say sites='text_encoder'"
        )
    wanted = [cast("Any", space).site] if sites is None else sites
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if len(wanted) != 1:
        raise SiteNotFoundError(f"in a pipeline name one site at a time; got {wanted}")
    site = str(wanted[0])
    if site not in PIPELINE_SITES:
        raise SiteNotFoundError(
            f"a pipeline has the sites {', '.join(PIPELINE_SITES)}; got {site!r}. For a site inside one model give "
            "that model, such as pipe.text_encoder"
        )
    if space is not None:
        mark = encoder_fingerprint(pipe)
        if space.fingerprint != mark:
            raise SpaceError(
                f"this eraser was fitted on the text encoders of {space.model} ({space.fingerprint[:12]}); this "
                f"pipeline has others ({mark[:12]}). Fit it again, or use with_space(None) if you are sure"
            )
        if _ONE_SPACE.get(site, site) != _ONE_SPACE.get(space.site, space.site):
            raise SpaceError(
                f"this eraser was fitted at {space.site!r}, whose vectors are not those at {site!r}; fit one there"
            )
    width = _width(pipe, site)
    if width != eraser.map.width:
        raise ShapeError(f"{site!r} has width {width}; the eraser has width {eraser.map.width}")
    return site


def _key(eraser: RepresentationEraser, site: str) -> str:
    return f"{eraser._identity}@pipeline:{site}"


def _width(pipe: object, site: str) -> int:
    if site == "pooled":
        return _pooled(pipe).width
    if site.startswith("token_embedding"):
        return int(_table(_encoder(pipe, site))[1].embedding_dim)
    if site == "text_encoder":  # a hook there needs no text map that can be changed
        norm = _last_norm(pipe)
        if norm is not None:
            return int(cast("Tensor", norm[2].weight).numel())
    return text_width(pipe)


def _pooled(pipe: object) -> TextMap:
    found = [m for m in text_maps(pipe) if m.kind == "pooled"]
    if not found:
        raise SiteNotFoundError(f"{type(denoiser(pipe)).__name__} reads no pooled text vector")
    return found[0]


def _encoder(pipe: object, site: str) -> nn.Module:
    name = site.replace("token_embedding", "text_encoder")
    encoders = text_encoders(pipe)
    if name not in encoders:
        raise SiteNotFoundError(f"this pipeline has no {name}; it has {', '.join(encoders)}")
    return encoders[name]


def _table(encoder: nn.Module) -> tuple[str, nn.Embedding]:
    module: nn.Embedding = cast("Any", encoder).get_input_embeddings()
    path = next(path for path, inner in encoder.named_modules() if inner is module)
    return path, module


def _last_norm(pipe: object) -> tuple[nn.Module, str, nn.Module] | None:
    """Return encoder, path and module of the norm whose output the denoiser reads as it is; None if there is none.

    SD 1 and 2: CLIP's final layer norm. Flux: T5's. SDXL and SD 3 read several encoders side by side.
    """
    encoders = text_encoders(pipe)
    if isinstance(getattr(pipe, "unet", None), nn.Module):
        name = "" if hasattr(pipe, "tokenizer_2") else "text_encoder"
    else:
        name = "" if hasattr(pipe, "tokenizer_3") else "text_encoder_2"
    encoder = encoders.get(name)
    if encoder is None:
        return None
    for path in ("final_layer_norm", "text_model.final_layer_norm", "encoder.final_layer_norm"):
        try:
            return encoder, path, encoder.get_submodule(path)
        except AttributeError:
            continue
    return None


def _hook(pipe: object, site: str, function: LowRankAffine) -> tuple[nn.Module, Patch]:
    if site.startswith("token_embedding"):
        encoder = _encoder(pipe, site)
        place = Site(site, _table(encoder)[0], "embedding")
        return encoder, HookPatch(place, partial(_mapped, function=function))
    model = denoiser(pipe)
    if site == "pooled":
        pooled = _pooled(pipe)
        place = Site(site, pooled.name.removesuffix(".base_layer"), "module", "input")
        part = partial(_mapped_columns, function=function, columns=pooled.text_columns)
        return model, HookPatch(place, part)
    norm = _last_norm(pipe) if site == "text_encoder" else None
    if norm is not None:
        place = Site(site, norm[1], "norm")
        return norm[0], HookPatch(place, partial(_mapped, function=function))
    return model, ArgumentPatch(
        Site(site, "", "module", "input"), partial(_mapped_made, function=function)
    )


def _mapped(x: Tensor, *, function: LowRankAffine) -> Tensor:
    return function(x)


def _mapped_made(x: Tensor, *, function: LowRankAffine) -> Tensor:
    """Map the vectors that an encoder made: zeros stand for a missing prompt and stay."""
    if function.center is None:
        return function(x)
    return torch.where((x != 0).any(-1, keepdim=True), function(x), x)


def _mapped_columns(x: Tensor, *, function: LowRankAffine, columns: slice) -> Tensor:
    new = x.clone()
    new[..., columns] = _mapped_made(x[..., columns], function=function)
    return new


def _rows(model: nn.Module, *, name: str, function: LowRankAffine) -> Tensor:
    weight = check_writable(model, name).detach()
    return function.to(weight.device)(weight.to(statistics_dtype(weight.device)))


def _zeros(pipe: object) -> str | None:
    """Return why the denoiser of a pipeline is sometimes given zeros in place of text; None if it never is."""
    config = getattr(pipe, "config", None)
    forced = getattr(config, "force_zeros_for_empty_prompt", None)
    if forced or (forced is None and _is_xl(pipe)):
        return "it puts zeros for the missing negative prompt (force_zeros_for_empty_prompt)"
    if hasattr(pipe, "tokenizer_3") and getattr(pipe, "text_encoder_3", None) is None:
        return "it puts zeros for the missing text_encoder_3"
    return None


def _is_xl(pipe: object) -> bool:
    return isinstance(getattr(pipe, "unet", None), nn.Module) and hasattr(pipe, "tokenizer_2")


def _check_offset(pipe: object, function: LowRankAffine, site: str) -> None:
    reason = _zeros(pipe) if function.center is not None else None
    if reason is not None:
        raise EditError(
            f"folding the eraser's offset into the weights that read {site!r} would not be exact for this pipeline: "
            f"{reason}, and an offset would move the zeros. Use attach(), which leaves them alone, or fit with "
            "affine=False"
        )


def _fold_attention(pipe: object, function: LowRankAffine, bias: Bias) -> list[Patch]:
    maps = [m for m in text_maps(pipe) if m.exact and m.kind != "pooled"]
    check_foldable(maps)
    _check_offset(pipe, function, "cross_attention")
    model = denoiser(pipe)
    bare = [m for m in maps if getattr(model.get_submodule(m.name), "bias", None) is None]
    patches: list[Patch] = []
    if function.center is not None and bare:
        weight = cast("Tensor", model.get_submodule(bare[0].name).weight)
        try:
            function = without_offset(function, _layer_norm(pipe), weight.dtype)
        except EditError:
            if bias != "add":
                raise
            patches.append(BiasPatch(dict.fromkeys(m.name for m in bare)))
            bias = "add"
    site = Site("cross_attention", "", "module", "input", tuple(m.name for m in maps))
    if not patches:
        return fold_patches(model, [site], function, bias="refuse")
    return [*patches, *_weights_and_biases(maps, function)]


def _fold_pooled(pipe: object, function: LowRankAffine) -> list[Patch]:
    pooled = _pooled(pipe)
    check_foldable([pooled])
    _check_offset(pipe, function, "pooled")
    return _weights_and_biases([pooled], function)


def _weights_and_biases(maps: Sequence[TextMap], function: LowRankAffine) -> list[Patch]:
    """Return the patches ``b <- b + W offset`` (before the weight changes) and ``W <- W P`` on the text columns."""
    patches: list[Patch] = []
    for text_map in maps:
        fold: Callable[..., Callable[[nn.Module], Tensor]] = partial(
            partial, path=text_map.name, columns=text_map.text_columns, function=function
        )
        if function.center is not None:
            patches.append(DensePatch(f"{text_map.name}.bias", fold(_bias)))
        patches.append(DensePatch(f"{text_map.name}.weight", fold(_weight)))
    return patches


def _wide(model: nn.Module, name: str) -> Tensor:
    value = check_writable(model, name).detach()
    return value.to(statistics_dtype(value.device))


def _weight(model: nn.Module, *, path: str, columns: slice, function: LowRankAffine) -> Tensor:
    weight = _wide(model, f"{path}.weight").clone()
    wide = LowRankAffine(function.left, function.right).to(weight.device, weight.dtype)
    weight[:, columns] = wide.fold_reading(weight[:, columns], None)[0]
    return weight


def _bias(model: nn.Module, *, path: str, columns: slice, function: LowRankAffine) -> Tensor:
    bias, weight = _wide(model, f"{path}.bias"), _wide(model, f"{path}.weight")
    return bias + weight[:, columns] @ function.to(weight.device, weight.dtype).offset


def _layer_norm(pipe: object) -> nn.LayerNorm:
    """Return the layer norm that makes what the denoiser reads.

    Raises:
        EditError: If there is none.
    """
    norm = _last_norm(pipe)
    if norm is None or not isinstance(norm[2], nn.LayerNorm):
        names = ", ".join(model_id(encoder) for encoder in text_encoders(pipe).values())
        raise EditError(
            f"the text maps have no bias for the eraser's offset, and what they read is not made by a layer norm "
            f"({names}) that could stand in; use attach(), fit with affine=False, or apply(bias='add') to add "
            "biases in memory"
        )
    return norm[2]


def without_offset(
    function: LowRankAffine, norm: nn.LayerNorm, dtype: torch.dtype = torch.float32
) -> LowRankAffine:
    """Return the linear map that does what an affine one does to every output of a layer norm.

    Args:
        function: The affine map ``x -> P x + b``.
        norm: The layer norm, with gain and shift, whose outputs are mapped.
        dtype: Of the weights the map will be folded into; its rounding decides whether that is good enough.

    Returns:
        ``M = P + b w^T / k``, of rank at most one more.

    Raises:
        EditError: If the norm has no gain or shift, a gain is zero, or ``k`` is too small for the dtype.
    """
    gain, shift = (cast("Tensor | None", getattr(norm, name, None)) for name in ("weight", "bias"))
    advice = "use attach(), fit with affine=False, or apply(bias='add') to add biases in memory"
    if gain is None or shift is None or bool((gain == 0).any()):
        raise EditError(
            f"the last layer norm needs a shift and a gain without zeros to carry an offset; {advice}"
        )
    wide = statistics_dtype(gain.device)
    function = function.to(gain.device, wide)
    w = 1 / gain.detach().to(wide)
    ratio = shift.detach().to(wide) * w
    k = float(ratio.sum())
    size = float((len(w) + ratio.square().sum()).sqrt())  # of w * x for typical x
    if not abs(k) * ROUNDING > size * torch.finfo(dtype).eps:
        raise EditError(
            f"the last layer norm carries an offset poorly: sum(shift / gain) is {k:.3g} against entries of size "
            f"{size:.3g}, too little for weights in {dtype}; {advice}"
        )
    offset = function.offset
    left = torch.cat([function.left, -offset[:, None] / k], 1)
    return replace(
        function, left=left, right=torch.cat([function.right, w[:, None]], 1), center=None
    )
