"""A dictionary from tensors under whatever names other libraries give them, and where it sits by their names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from concept_erasure.errors import ErasureWarning, FormatError
from concept_erasure.sae.disentangler import Disentangler, normalise

__all__ = ["assemble", "site_of"]

_NAMES = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight", "encoder_weight"),
    "b_enc": ("b_enc", "encoder.bias", "encoder_bias", "latent_bias"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight", "decoder_weight"),
    "b_dec": ("b_dec", "bias", "decoder.bias", "decoder_bias", "pre_bias"),
    "threshold": ("threshold", "jump_relu_threshold", "topk_threshold"),
}
# as nn.Linear stores them
_OUT_IN = ("encoder.weight", "encoder_weight", "decoder.weight", "decoder_weight")
_OTHER_KINDS = {
    "gate_bias": "a gated dictionary",
    "b_gate": "a gated dictionary",
    "r_mag": "a gated dictionary",
    "W_skip": "a transcoder with a skip connection",
    "affine_skip_connection": "a transcoder with a skip connection",
}
_EXAMPLE = "Disentangler(W_enc, b_enc, W_dec, b_dec, threshold, site='mlp.9')"


def site_of(hook_name: str) -> tuple[str, bool]:
    """Return the site that a hook name or module path stands for, and whether a post-norm may lie before it.

    Args:
        hook_name: Such as ``"blocks.9.hook_mlp_out"`` or ``"model.layers.9.mlp"``. In TransformerLens' names, and as
            ``post_feedforward_layernorm.output``, an MLP's output is taken behind the norm that follows it, if the
            model has one; a module path is that module's own output.

    Returns:
        The name of the site (the hook name itself where this library has none), and the second answer.
    """
    patterns = (
        (r"blocks\.(\d+)\.hook_mlp_out", "mlp", True),
        (r"blocks\.(\d+)\.hook_attn_out", "attention", True),
        (r"blocks\.(\d+)\.hook_resid_post", "residual", False),
        (r".*layers\.(\d+)\.post_feedforward_layernorm(?:\.output)?", "mlp", True),
        (r".*(?:layers|h)\.(\d+)\.mlp(?:\.output)?", "mlp", False),
        (r".*(?:layers|h)\.(\d+)(?:\.output)?", "residual", False),
        (r"resid_post_layer_(\d+)", "residual", False),
        (r"mlp_out_layer_(\d+)", "mlp", False),
    )
    for pattern, kind, behind in patterns:
        found = re.fullmatch(pattern, hook_name)
        if found:
            return f"{kind}.{found[1]}", behind
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook_name)
    if found:
        layer = int(found[1])
        return ("embedding" if layer == 0 else f"residual.{layer - 1}"), False
    return ("embedding" if hook_name == "hook_embed" else hook_name), False


def assemble(
    tensors: Mapping[str, Tensor],
    *,
    origin: str,
    hook_name: str = "",
    model: str = "",
    widths: tuple[int, ...] = (),
    k: int | None = None,
    apply_b_dec_to_input: bool = True,
    threshold_of_unit_rows: bool = False,
    report: Mapping[str, object] | None = None,
) -> Disentangler:
    """Return a dictionary from tensors under any of the usual names, decoder norms folded.

    Args:
        tensors: By name; matrices may be stored either way round.
        origin: What messages call it.
        hook_name: Where it sits, see `site_of`.
        model: Name of its model.
        widths: Matryoshka levels.
        k: Latents kept of each vector; None where there is a threshold.
        apply_b_dec_to_input: Whether the encoder subtracts ``b_dec``.
        threshold_of_unit_rows: The threshold already is one for decoder rows of norm 1.
        report: Kept with it.

    Raises:
        FormatError: If tensors are missing, of other kinds or shapes.
    """
    for name, kind in _OTHER_KINDS.items():
        if name in tensors:
            raise FormatError(f"{origin} is {kind} (it has {name!r}), which cannot be read")
    found = {name: _first(tensors, aliases) for name, aliases in _NAMES.items()}
    W_enc, W_dec, b_dec = found["W_enc"], found["W_dec"], found["b_dec"]
    if W_enc is None or W_dec is None:
        raise FormatError(
            f"{origin} has no encoder or decoder under a known name; it has {sorted(tensors)}. Rename them, or "
            f"build one yourself: {_EXAMPLE}"
        )
    dtype = torch.promote_types(W_dec[1].dtype, torch.float32)
    d = len(b_dec[1]) if b_dec is not None else min(W_dec[1].shape)
    bias = torch.zeros(d) if b_dec is None else b_dec[1]
    rows = _turned(*W_dec, d, 1, origin).to(dtype)
    columns = _turned(*W_enc, d, 0, origin).to(dtype)
    n = len(rows)
    b_enc = torch.zeros(n) if found["b_enc"] is None else found["b_enc"][1]
    theta = _threshold(found["threshold"], n, k, origin).to(dtype)
    if k is not None and not threshold_of_unit_rows:
        _warn_of_norms(rows, origin)
    columns, b_enc, rows, scaled = normalise(columns, b_enc.to(dtype), rows, theta)
    theta = theta if threshold_of_unit_rows else scaled
    site, behind = site_of(hook_name)
    return Disentangler(
        columns.contiguous(), b_enc, rows.contiguous(), bias.to(dtype), theta, site=site, widths=widths, model=model,
        report=dict(report or {}), apply_b_dec_to_input=apply_b_dec_to_input, after_post_norm=behind, k=k,
    )  # fmt: skip


def _first(tensors: Mapping[str, Tensor], aliases: tuple[str, ...]) -> tuple[str, Tensor] | None:
    return next(((name, tensors[name]) for name in aliases if name in tensors), None)


def _turned(name: str, weight: Tensor, d: int, axis: int, origin: str) -> Tensor:
    """Return a matrix with d along an axis; a square one is turned by what its name says."""
    if weight.ndim != 2 or d not in weight.shape:
        raise FormatError(f"{origin}: {name} has shape {tuple(weight.shape)}; one side must be {d}")
    if weight.shape[0] == weight.shape[1]:
        return weight.T if name in _OUT_IN else weight
    return weight if weight.shape[axis] == d else weight.T


def _warn_of_norms(rows: Tensor, origin: str) -> None:
    """Say that folding the norms changes which latents are among the k largest."""
    norms = rows.norm(dim=1)
    off = float(((norms - 1).abs() * (norms > 0)).max())
    if off > 1e-2:
        warnings.warn(
            f"{origin}: it keeps the k largest codes, and its decoder rows have norms up to {off:.2g} away from 1; "
            "with the norms folded into the codes others may be kept. Measure it with quality()",
            ErasureWarning,
            stacklevel=4,
        )


def _threshold(found: tuple[str, Tensor] | None, n: int, k: int | None, origin: str) -> Tensor:
    if found is None or (
        k is not None and found[1].ndim == 0
    ):  # TopK dictionaries do not use theirs
        return torch.zeros(n)
    value = found[1].float()
    if bool((value < 0).any()):
        if value.ndim == 0:
            warnings.warn(
                f"{origin}: its threshold was never set in training ({float(value):.3g}); taken as 0. Call "
                "calibrate(vectors, k) with vectors of the site",
                ErasureWarning,
                stacklevel=4,
            )
        value = value.clamp_min(0)
    return value.expand(n).clone()
