"""The hooks of the gate: which places count, how far a prompt's codes move, and which prompts are changed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from concept_erasure.errors import EditError
from concept_erasure.sites import Site, base_of, hook

__all__ = ["GatePatch", "Reduction", "moved", "reduced"]

Reduction = Literal["mean", "max"]
_Errors = tuple[Tensor, Tensor]  # what `reduced` gives


def moved(x: Tensor, gate: Gate) -> Tensor:
    """Return how deactivating the latents changes x: ``(s - 1) sum_{f in F} z_f(x) d_f``, shape ``(..., d)``.

    The difference of two reconstructions, so that what the dictionary leaves over stays, and s = 1 changes nothing.
    """
    wide = gate.columns.dtype
    h = x.to(wide)
    if gate.offset is not None:
        h = h - gate.offset
    h = h @ gate.columns + gate.bias
    z = h * (h > gate.threshold)
    return (gate.strength - 1) * (z @ gate.rows)


@dataclass(frozen=True, eq=False)
class Gate:
    """The part of a dictionary that a gate needs, and its two numbers.

    Attributes:
        columns: Encoder of the latents to deactivate, shape ``(d, m)``.
        bias: Shape ``(m,)``.
        threshold: Shape ``(m,)``.
        rows: Decoder, shape ``(m, d)``.
        offset: What is subtracted before encoding, shape ``(d,)``; None for nothing.
        strength: s.
        theta: Error from which a prompt is changed.
        reduction: How errors of places become one of a prompt.
    """

    columns: Tensor
    bias: Tensor
    threshold: Tensor
    rows: Tensor
    offset: Tensor | None
    strength: float
    theta: float
    reduction: Reduction

    def to(self, device: torch.device) -> Gate:
        """Return it on a device."""
        return replace(
            self,
            columns=self.columns.to(device),
            bias=self.bias.to(device),
            threshold=self.threshold.to(device),
            rows=self.rows.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )


def reduced(errors: Tensor, mask: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Return sum (or largest) and count of the errors of each prompt's places, ``(b,)`` each.

    Args:
        errors: Shape ``(b, t)``.
        mask: Places that count, shape ``(b, t)``.
        reduction: Mean or largest; the mean is the first by the second.
    """
    kept = errors * mask
    total = kept.sum(1) if reduction == "mean" else kept.amax(1)
    return total, mask.sum(1)


def counted(ids: Tensor | None, mask: Tensor | None, specials: Tensor, like: Tensor) -> Tensor:
    """Return which places of each prompt are neither padding nor special tokens, shape ``(b, t)`` bool.

    Args:
        ids: Shape ``(b, t)``; None if the model was given embeddings.
        mask: The attention mask, shape ``(b, t')`` with the last t for these places; None for no padding.
        specials: Ids of BOS, EOS, padding and the like.
        like: The activations, shape ``(b, t, d)``.
    """
    places = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if mask is not None and mask.ndim == 2:
        places = places & mask[:, -like.shape[1] :].to(like.device).bool()
    if ids is not None:
        ids = ids.reshape(-1, ids.shape[-1]).to(like.device)
        places = places & ~torch.isin(ids, specials.to(like.device))
    return places


@dataclass
class GatePatch:
    """Deactivate latents at a site in the prompts whose codes would move far enough, and leave the others' bits alone.

    While a text is being generated, the places of all calls with the same cache count. Beam search reorders the rows of
    a cache out of sight: a beam is then judged with the earlier places of another beam, as a rule of the same prompt.
    A copied cache starts anew.

    Attributes:
        site: Where.
        gate: See `Gate`.
        specials: Ids that never count.
    """

    is_hook: ClassVar[bool] = True  # an edit of it cannot be committed

    site: Site
    gate: Gate
    specials: Sequence[int]
    flagged: Tensor | None = None  # of the last call, for looking
    _handles: list[RemovableHandle] = field(default_factory=list, repr=False)
    _inputs: dict[str, Any] = field(default_factory=dict, repr=False)
    _seen: WeakKeyDictionary[Any, _Errors] = field(default_factory=WeakKeyDictionary, repr=False)
    _before: _Errors | None = field(default=None, repr=False)  # what this call goes on from
    _now: _Errors | None = field(default=None, repr=False)

    @property
    def target(self) -> str:
        """Name of what is changed."""
        return self.site.name

    @property
    def targets(self) -> tuple[str, ...]:
        """No parameter is touched."""
        return ()

    @property
    def bytes_held(self) -> int:
        """Nothing is kept for the way back."""
        return 0

    def apply(self, model: nn.Module) -> float:
        """Put the hooks in place and return 0."""
        base = base_of(model)[1]
        names = list(inspect.signature(base.forward).parameters)

        def look(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | options
            self._inputs = {key: given.get(key) for key in ("input_ids", "attention_mask")}
            # asked before the first layer runs: behind it the cache holds this call's places, too
            cache = given.get("past_key_values")
            length = getattr(cache, "get_seq_length", None)
            self._before = self._seen.get(cache) if length and int(length()) > 0 else None
            self._now = None

        def keep(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:  # noqa: ANN401
            parts = out if isinstance(out, tuple) else getattr(out, "values", tuple)()
            for cache in parts:  # which the first call makes, as a rule
                if self._now is not None and hasattr(cache, "get_seq_length"):
                    self._seen[cache] = self._now

        self._handles = [
            base.register_forward_pre_hook(look, with_kwargs=True),
            base.register_forward_hook(keep),
            hook(model, self.site, self._change),
        ]
        return 0.0

    def _change(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise EditError(
                f"a gate decides for prompts; {self.site.name!r} holds shape {tuple(x.shape)}, not (b, t, d)"
            )
        gate = self.gate = self.gate.to(x.device)
        change = moved(x, gate)
        ids, mask = self._inputs.get("input_ids"), self._inputs.get("attention_mask")
        places = counted(ids, mask, torch.tensor(list(self.specials)), x)
        total, count = reduced(change.square().mean(-1), places, gate.reduction)
        if self._before is not None and len(self._before[0]) == len(total):
            before, places_before = self._before
            total = total + before if gate.reduction == "mean" else torch.maximum(total, before)
            count = count + places_before
        self._now = total, count
        error = total / count.clamp_min(1) if gate.reduction == "mean" else total
        self.flagged = error >= gate.theta
        # special places of a flagged prompt stay as they are; where() keeps the bits of the rest
        on = (self.flagged[:, None] & places)[..., None]
        return torch.where(on, (x.to(change.dtype) + change).to(x.dtype), x)

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the value: no parameter is touched."""
        return value

    def undo(self, model: nn.Module) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._seen = [], {}, WeakKeyDictionary()
        self._before = self._now = None

    def commit(self) -> None:
        """Refuse."""
        raise EditError("a gate is a hook and cannot be committed; keep it, or undo it")
