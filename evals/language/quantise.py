"""Rounding of weights to 8 or 4 bits: does an erasure survive it, or was it smaller than the rounding?

Round to nearest, as *simulated* quantisation: the weights are replaced by the nearest values that the grid has, in
their own dtype, so that every hook, edit and evaluation still works, and `undo` restores every bit.

It is not bitsandbytes (int8 with outlier columns kept in half precision; 4 bits on a normal-float grid with double
quantisation), nor GPTQ or AWQ, which use data; activations are not rounded, and nothing gets smaller or faster.

Rounding costs knowledge of its own: of the accuracy of SmolLM2-135M-Instruct on the shipped cloze items of Harry
Potter, 0.73, it leaves 0.72 at 8 bits and 0.56 at 4. So compare with the original, rounded likewise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from concept_erasure.edit import DensePatch, Edit
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.sites import _is_linear, as_out_in

__all__ = ["quantised", "round_to_nearest"]

Bits = Literal[4, 8]


def round_to_nearest(
    weight: Tensor, bits: int, *, group: int | None = None, symmetric: bool = True
) -> Tensor:
    """Return the nearest values of a uniform grid, one grid for each group of a row.

    Symmetric: ``q = clamp(round(w / s), -m, m)``, ``s = max |w| / m``, ``m = 2^(bits-1) - 1``, so that zero stays
    zero. Otherwise the ``2^bits`` values lie evenly from the least to the largest weight of the group.

    Args:
        weight: Shape ``(out, in)``.
        bits: 2 to 8.
        group: Columns that share a grid; the last group may be narrower. None is the whole row.
        symmetric: See above.

    Returns:
        Shape ``(out, in)``, in the dtype of the weight; each entry is off by half a step of its grid at most.

    Raises:
        ValueError: A number is out of range or the weight is not a matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"the weight must be a matrix; got shape {tuple(weight.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8; got {bits}")
    outer, inner = weight.shape
    size = inner if group is None else group
    if size < 1:
        raise ValueError(f"group must be at least 1; got {group}")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    count = math.ceil(inner / size)
    # the last group is filled with copies of a value it holds: its grid stays what it is
    filled = torch.cat([wide, wide[:, -1:].expand(outer, count * size - inner)], 1)
    blocks = filled.reshape(outer, count, size)
    rounded = _symmetric(blocks, bits) if symmetric else _even(blocks, bits)
    return rounded.reshape(outer, -1)[:, :inner].to(weight.dtype)


def _symmetric(blocks: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    step = blocks.abs().amax(-1, keepdim=True) / most
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (blocks / step).round().clamp(-most, most) * step


def _even(blocks: Tensor, bits: int) -> Tensor:
    low = blocks.amin(-1, keepdim=True)
    step = (blocks.amax(-1, keepdim=True) - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return ((blocks - low) / step).round() * step + low


def quantised(
    model: nn.Module,
    bits: Bits = 8,
    *,
    group: int | None = 128,
    symmetric: bool = True,
    skip: Sequence[str] = (),
    head: bool = False,
) -> Edit:
    """Round the weights of all linear modules of a live model; use it in a ``with`` block, or call `undo`.

    Embeddings, norms and biases are not rounded, nor is the output head unless asked for: where it is tied to the
    embedding, rounding it would round both, and is refused. A LoRA beside the weights is not rounded.

    Args:
        model: The model, edits in force included.
        bits: 8, one grid for each row, or 4, one for each group of columns.
        group: Columns that share a grid at 4 bits; None is the whole row. More is coarser.
        symmetric: Whether zero stays zero, see `round_to_nearest`.
        skip: Paths of modules, or patterns over them, to leave alone.
        head: Round the output head as well.

    Returns:
        The edit, in force. It holds a copy of every weight it changed, for the way back.

    Raises:
        ValueError: There is no such number of bits.
        SiteNotFoundError: The model has no linear module to round.
        EditError: A weight is tied, quantised already, sharded or off-loaded.
    """
    if bits not in {4, 8}:
        raise ValueError(f"bits must be 8 or 4; got {bits}")
    size = None if bits == 8 else group
    if size is not None and size < 1:
        raise ValueError(f"group must be at least 1, or None for the whole row; got {group}")
    getter = getattr(model, "get_output_embeddings", None)
    out = getter() if getter is not None else None
    patches = []
    for path, module in model.named_modules():
        last = module is out and not head
        if not _is_linear(module) or last or any(fnmatchcase(path, one) for one in skip):
            continue

        def rounded(m: nn.Module, path: str = path) -> Tensor:
            inner = m.get_submodule(path)
            weight = m.get_parameter(f"{path}.weight")
            whole = as_out_in(inner, weight.detach())
            return as_out_in(inner, round_to_nearest(whole, bits, group=size, symmetric=symmetric))

        patches.append(DensePatch(f"{path}.weight", rounded))
    if not patches:
        raise SiteNotFoundError(
            f"{type(model).__name__} has no linear module to round"
            + (f" besides those skipped by {list(skip)}" if skip else "")
        )
    label = f"int{bits}" + ("" if size is None else f" in groups of {size}")
    return Edit(model, patches, label=f"{label}, rounded to nearest", key=f"quantised:{bits}")
