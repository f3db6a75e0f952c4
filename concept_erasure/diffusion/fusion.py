"""Merge LoRAs without interference: each keeps its effect on its own prompts, the rest stays as it was.

Stage 3 of MACE (Lu et al., CVPR 2024), for any list of LoRAs. For LoRA i with change ``D_i`` and inputs ``C_i`` (rows),
the merged weight minimises::

    sum_i |C_i (W* - W - D_i)^T|^2 + g sum_p |p (W* - W)^T|^2 + lam |W* - W|^2,

whose solution ``sum_i D_i S_i K^-1``, with ``S_i = C_i^T C_i`` and ``K = sum_i S_i + g G + lam I``, is again a LoRA, of
rank ``sum_i r_i``: nothing is lost, and the weights of the model are not needed. All maps that read the text share one
Cholesky of ``K``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from concept_erasure.errors import FormatError, ShapeError
from concept_erasure.linalg import LowRankAffine, statistics_dtype

__all__ = ["TEXT_LAYERS", "fuse", "live_loras", "lora_layers", "merge_loras"]

Other = Literal["refuse", "sum", "drop"]
TEXT_LAYERS = ("*attn2[._]to_k", "*attn2[._]to_v", "*context_embedder")  # they read the text
KEY = re.compile(
    r"(?P<path>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"
)
OLD_KEY = re.compile(r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$")
NAMES = {True: ("lora_down", "lora_up"), False: ("lora_A", "lora_B")}  # for kohya's flat paths?


@dataclass
class _Lora:
    up: Tensor
    down: Tensor


def fuse(
    loras: Sequence[tuple[Tensor, Tensor]],
    grams: Sequence[Tensor],
    *,
    preserve: Tensor | None = None,
    lam: float = 0.0,
    weight: Tensor | None = None,
    refined: LowRankAffine | None = None,
) -> tuple[Tensor, Tensor]:
    """Fuse the LoRAs of one map.

    Args:
        loras: Pairs ``(up, down)`` of shapes ``(out, r_i)`` and ``(r_i, d)``.
        grams: Weighted ``C_i^T C_i``, shape ``(d, d)``, one a LoRA.
        preserve: Weighted Gram ``g G`` on which the outputs of the original ``W`` are held, shape ``(d, d)``.
        lam: Ridge that pulls to no change of ``W`` or, with ``refined``, of ``W'``.
        weight: Original ``W``, shape ``(out, d)``; for ``refined``.
        refined: The edit ``W' = W P`` the LoRAs were trained on.

    Returns:
        ``up`` and ``down`` of the change against the original W, float64, lossless.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If inputs, Gram and ridge leave a direction undetermined.
    """
    if len(loras) != len(grams) or not loras:
        raise ShapeError(f"one Gram for each LoRA; got {len(loras)} LoRAs and {len(grams)} Grams")
    width = grams[0].shape[0]
    for up, down in loras:
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or down.shape[1] != width:
            raise ShapeError(
                f"up and down must be (out, r) and (r, {width}); got {tuple(up.shape)} and {tuple(down.shape)}"
            )
    factor = _system(grams, preserve, lam)
    ups = [up.to(factor) for up, _ in loras]
    downs = [
        down.to(factor) @ gram.to(factor) for (_, down), gram in zip(loras, grams, strict=True)
    ]
    if refined is None:
        return torch.cat(ups, 1), torch.cholesky_solve(torch.cat(downs).T, factor).T
    if weight is None:
        raise ValueError("refined needs the original weight; pass weight=W")
    moved, right = weight.to(factor) @ refined.left.to(factor), refined.right.to(factor)
    held = right.T @ (torch.zeros_like(factor) if preserve is None else preserve.to(factor))
    solved = torch.cholesky_solve(torch.cat([*downs, held]).T, factor).T
    solved[len(solved) - refined.rank :] -= right.T
    return torch.cat([*ups, moved], 1), solved


def merge_loras(  # noqa: C901 one check after another
    loras: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    *,
    preserve: Tensor | None = None,
    preserve_weight: float = 1.0,
    lam: float = 0.0,
    strengths: Sequence[float] | None = None,
    layers: Sequence[str] = TEXT_LAYERS,
    other: Other = "refuse",
) -> dict[str, Tensor]:
    """Merge LoRAs of one model into one LoRA.

    Args:
        loras: State dicts as ``load_file`` of safetensors returns them, or `live_loras` of a model. Keys of diffusers,
            peft and kohya are read; an ``alpha`` and the strength go into the factors.
        inputs: What each is for: text embeddings of its prompts, rows ``(n_i, d)`` or ``(prompts, positions, d)``, all
            positions the model attends to.
        preserve: Gram ``(d, d)`` of embeddings on which nothing may change, such as ``Preserve.gram``.
        preserve_weight: Factor g of that Gram.
        lam: Ridge that pulls to no change; needed where inputs and preserve do not span the space.
        strengths: One factor a LoRA; default 1.
        layers: Patterns of the maps that read the text embeddings; of these, the ones of width d are solved.
        other: LoRA layers that do not read the text have no inputs here. ``"sum"`` adds them as loading all would,
            ``"drop"`` leaves them out, ``"refuse"`` raises.

    Returns:
        A state dict for ``pipe.load_lora_weights``; factors float32, rank the sum of ranks.

    Raises:
        FormatError: If a key or factor is no LoRA's, or the files name layers in different ways.
        ShapeError: If shapes disagree.
        ValueError: If an option is out of range, nothing reads the text, there are other layers and they are
            refused, or the solution is not determined.
    """
    if other not in get_args(Other):
        raise ValueError(f"other must be 'refuse', 'sum' or 'drop'; got {other!r}")
    if not loras or len(loras) != len(inputs):
        raise ValueError(
            f"one tensor of inputs a LoRA; got {len(loras)} LoRAs, {len(inputs)} inputs"
        )
    factors = [1.0] * len(loras) if strengths is None else list(strengths)
    if len(factors) != len(loras):
        raise ValueError(f"one strength a LoRA; got {len(factors)} for {len(loras)}")
    if not (preserve_weight >= 0 and lam >= 0):
        raise ValueError(f"preserve_weight and lam must be >= 0; got {preserve_weight} and {lam}")
    grams = [_gram(rows, inputs[0].shape[-1]) for rows in inputs]
    kept = None if preserve is None else preserve_weight * preserve
    read = [_read(state, factor) for state, factor in zip(loras, factors, strict=True)]
    paths = list(dict.fromkeys(path for found in read for path in found))
    if len({"." in path for path in paths}) > 1:
        raise FormatError("some LoRAs use dotted layer names and some flat (kohya) ones; convert")
    text = {path for path in paths if _reads_text(path, read, layers, len(grams[0]))}
    rest = [path for path in paths if path not in text]
    if not text:
        raise ValueError(
            f"no layer of the LoRAs matches {list(layers)} with width {len(grams[0])}; there are {paths[:3]}"
        )
    if rest and other == "refuse":
        raise ValueError(
            f"{len(rest)} of {len(paths)} layers do not read the text, such as {rest[0]!r}: nothing says what they "
            "are for. Pass other='sum' to add them up, or other='drop'"
        )
    factor = _system(grams, kept, lam)
    merged: dict[str, Tensor] = {}
    for path in [*text] + (rest if other == "sum" else []):
        own = [
            (found[path], gram) for found, gram in zip(read, grams, strict=True) if path in found
        ]
        up = torch.cat([lora.up for lora, _ in own], 1)
        if path in text:
            down = torch.cat([lora.down.to(gram) @ gram for lora, gram in own])
            down = torch.cholesky_solve(down.T, factor).T
        else:
            down = torch.cat([lora.down for lora, _ in own])
        for name, value in zip(NAMES["." not in path], (down, up), strict=True):
            merged[f"{path}.{name}.weight"] = value.float().contiguous()
    return merged


def live_loras(model: nn.Module, names: Sequence[str] | None = None) -> list[dict[str, Tensor]]:
    """Return the LoRAs that sit in a model as peft layers, their scaling folded in, one state dict a name.

    Args:
        model: The U-Net or transformer of a pipeline; keys are those of ``pipe.load_lora_weights`` for it.
        names: Adapter names; default all.

    Raises:
        ValueError: If the model holds no adapter, or none of a name.
    """
    held = {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}
    there = list(dict.fromkeys(name for module in held.values() for name in module.lora_A))
    wanted = there if names is None else list(names)
    if missing := [name for name in wanted if name not in there] or not wanted:
        raise ValueError(
            f"the model holds the adapters {there}; asked for {missing if names else 'all'}"
        )
    prefix = "unet" if "UNet" in type(model).__name__ else "transformer"
    states: list[dict[str, Tensor]] = []
    for name in wanted:
        state: dict[str, Tensor] = {}
        for path, module in held.items():
            if name in module.lora_A:
                key = f"{prefix}.{path}"
                state[f"{key}.lora_A.weight"] = module.lora_A[name].weight.detach()
                state[f"{key}.lora_B.weight"] = (
                    module.lora_B[name].weight.detach() * module.scaling[name]
                )
        states.append(state)
    return states


def lora_layers(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``(up, down)`` by layer of a LoRA's state dict, an ``alpha`` folded into ``up``.

    Raises:
        FormatError: If a key or factor is no LoRA's.
        ShapeError: If the factors of a layer disagree.
    """
    return {path: (lora.up, lora.down) for path, lora in _read(state, 1.0).items()}


def _read(state: Mapping[str, Tensor], strength: float) -> dict[str, _Lora]:
    """Return the factors by layer, alpha and strength folded into ``up``."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith(".alpha"):
            halves.setdefault(key.removesuffix(".alpha"), {})["alpha"] = value
            continue
        match = KEY.match(OLD_KEY.sub(r".\1.lora.\2.weight", key))
        if match is None:
            raise FormatError(
                f"{key!r} is no LoRA weight; DoRA, LoKr and the like cannot be merged"
            )
        halves.setdefault(match["path"], {})["down" if match["down"] else "up"] = value
    found: dict[str, _Lora] = {}
    for path, half in halves.items():
        if "up" not in half or "down" not in half:
            raise FormatError(f"{path!r} has {sorted(half)}; a LoRA layer needs up and down")
        up, down = half["up"], half["down"]
        if up.ndim != down.ndim or up.shape[1] != down.shape[0]:
            raise ShapeError(
                f"{path!r}: up {tuple(up.shape)} and down {tuple(down.shape)} disagree"
            )
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise FormatError(f"{path!r} holds values that are not finite")
        scale = strength * float(half["alpha"]) / len(down) if "alpha" in half else strength
        found[path] = _Lora(up.to(statistics_dtype(up.device)) * scale, down.to(up.device))
    return found


def _reads_text(
    path: str, read: Sequence[Mapping[str, _Lora]], layers: Sequence[str], width: int
) -> bool:
    if not any(fnmatch(path, pattern) for pattern in layers):
        return False
    downs = [found[path].down for found in read if path in found]
    return all(down.ndim == 2 and down.shape[1] == width for down in downs)


def _gram(rows: Tensor, width: int) -> Tensor:
    if rows.ndim < 2 or rows.shape[-1] != width:
        raise ShapeError(f"inputs must be (n, {width}); got {tuple(rows.shape)}")
    wide = rows.detach().reshape(-1, width).to(statistics_dtype(rows.device))
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("inputs hold values that are not finite")
    return wide.T @ wide


def _system(grams: Sequence[Tensor], preserve: Tensor | None, lam: float) -> Tensor:
    """Return the Cholesky factor of what all maps share."""
    system = torch.zeros_like(grams[0], dtype=statistics_dtype(grams[0].device))
    for gram in grams:
        system += gram.to(system)
    if preserve is not None:
        if preserve.shape != system.shape:
            raise ShapeError(
                f"the preserve Gram must be {tuple(system.shape)}; got {tuple(preserve.shape)}"
            )
        system += preserve.to(system)
    system.diagonal().add_(lam)
    return _cholesky(system)


def _cholesky(system: Tensor) -> Tensor:
    """Return the factor of a matrix that must be positive definite."""
    factor, info = torch.linalg.cholesky_ex(system)
    diagonal = factor.diagonal()
    small = len(system) * torch.finfo(system.dtype).eps
    if int(info) or float(diagonal.min() / diagonal.max()) ** 2 <= small:
        raise ValueError(
            f"inputs and preserve Gram do not span the space of width {len(system)}, and lam is too small to decide "
            "the rest; pass lam > 0 (it pulls to no change there)"
        )
    out: Tensor = factor
    return out
