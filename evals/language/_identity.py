"""What makes two live models the same for a measurement: every bit of the weights, the edits and the adapters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concept_erasure.edit import active_edits

__all__ = ["Identity", "identify"]


@dataclass(frozen=True)
class Identity:
    """A live model.

    Attributes:
        weights: Hash of every bit of the parameters and buffers.
        edits: Identities of the edits in force that are hooks.
        adapters: Modules whose adapter is switched off, or which of several is on.
        unknown: Whether something acts on it that cannot be told apart: hooks of unknown origin.
    """

    weights: str
    edits: tuple[str, ...]
    adapters: tuple[str, ...]
    unknown: bool


@torch.no_grad()
def identify(model: nn.Module) -> Identity:
    """Return the identity of a live model.

    Unlike `fingerprint`, which reads a few values to recognise a checkpoint, it sees every bit, so that a change of
    one entry is another model. It takes as long as hashing the weights: about a second a gigabyte.
    """
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        if value.device.type != "meta" and value.numel():
            digest.update(_bytes(value))
    held = [edit for edit in active_edits(model) if _hooks_of(edit)]
    own = sum(_hooks_of(edit) for edit in held)
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    keys = tuple(sorted(key for edit in held for key in edit.keys))
    unknown = hooks != own or any(not edit.keys for edit in held)
    return Identity(digest.hexdigest(), keys, tuple(_adapters(model)), unknown)


def _bytes(value: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it lies in memory in order."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _hooks_of(edit: object) -> int:
    """Return how many hooks an edit has in force."""
    return sum(getattr(patch, "_handle", None) is not None for patch in edit.patches)  # type: ignore[attr-defined]


def _adapters(model: nn.Module) -> list[str]:
    """Return which adapters are off or on, where there are any."""
    found = []
    for name, module in model.named_modules():
        off, on = (
            getattr(module, "disable_adapters", None),
            getattr(module, "active_adapters", None),
        )
        if isinstance(off, bool) and not callable(on):
            found.append(f"{name}:{off}:{on}:{getattr(module, 'merged_adapters', None)}")
    return found
