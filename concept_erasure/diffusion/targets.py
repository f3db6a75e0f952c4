"""What an edit changes in a denoiser: every text map with its share of the edit, as weight, hook or LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from concept_erasure.diffusion.core import compress
from concept_erasure.diffusion.maps import TextMap, text_maps
from concept_erasure.edit import DensePatch, HookPatch, Patch
from concept_erasure.errors import EditError
from concept_erasure.linalg import LowRankAffine, statistics_dtype
from concept_erasure.patches import LoraPatch
from concept_erasure.sites import Site

__all__ = ["ApplyForm", "MapTarget", "SharedEdit", "chosen_maps", "map_path"]

ApplyForm = Literal["weights", "hook", "lora"]


@dataclass(frozen=True, eq=False)
class SharedEdit:
    """The shared edit, made ready for many maps: thin orthogonal factors, or ``E`` itself where that is cheaper.

    Either may be used in single precision: there is no cancellation between large factors left.
    """

    edit: LowRankAffine
    change: Tensor | None

    @classmethod
    def of(cls, edit: LowRankAffine) -> SharedEdit:
        """Return an edit made ready."""
        wide = edit.to(dtype=statistics_dtype(edit.left.device))
        if edit.rank > edit.width // 3:
            return cls(wide, -(wide.left @ wide.right.T))
        return cls(compress(wide), None)

    @property
    def width(self) -> int:
        """Width d of the text vectors."""
        return self.edit.width


@dataclass(frozen=True, eq=False)
class MapTarget:
    """A text map, and what is to be done to it: the shared edit, then its own ``(up, down)``."""

    map: TextMap
    module: nn.Linear
    shared: SharedEdit | None
    own: tuple[Tensor, Tensor] | None

    @property
    def path(self) -> str:
        """Path of the map, an adapter around it included."""
        return map_path(self.map)

    def patches(self, form: ApplyForm) -> list[Patch]:
        """Return the patches of one form."""
        if form == "weights":
            return [DensePatch(f"{self.map.name}.weight", lambda _: self.folded())]
        if form == "hook" and self.own is None and self.shared is not None:
            site = Site(self.path, self.path, "module", "input")
            edit, columns = self.shared.edit, self.map.columns
            if columns is None:
                return [HookPatch(site, partial(_call, edit))]
            return [HookPatch(site, partial(_call_columns, edit, columns))]
        return [LoraPatch(self.path, lambda _: self.factors(self.module))]

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Return the new weight, shape ``(out, in)``, in at least single precision."""
        weight = self.module.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        part = wide[:, self.map.text_columns]
        if self.shared is not None and self.shared.change is not None:
            part += part @ self.shared.change.to(part)
        elif self.shared is not None:
            left, right = self.shared.edit.left.to(part), self.shared.edit.right.to(part)
            part.addmm_(part @ left, right.T, alpha=-1)
        if self.own is not None:
            part.addmm_(self.own[0].to(part), self.own[1].to(part).T)
        return wide

    @torch.no_grad()
    def factors(self, module: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return ``up (out, k)`` and ``down (in, k)`` of the change ``up down^T`` of the weight."""
        device, dtype = module.weight.device, statistics_dtype(module.weight.device)
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.shared is not None:
            edit = self.shared.edit.to(device, dtype)
            pairs.append((-self._through(module, edit.left), edit.right))
        if self.own is not None:
            pairs.append((self.own[0].to(device, dtype), self.own[1].to(device, dtype)))
        up, down = (torch.cat(factors, 1) for factors in zip(*pairs, strict=True))
        columns = self.map.text_columns
        before, after = (
            columns.start or 0,
            module.in_features - (columns.stop or module.in_features),
        )
        return up, nn.functional.pad(down, (0, 0, before, after))

    def _through(self, module: nn.Linear, left: Tensor) -> Tensor:
        """Return ``W left``; a quantised module is asked for it."""
        columns = self.map.text_columns
        if not self.map.quantised:
            return module.weight.detach()[:, columns].to(left) @ left
        wide = left.new_zeros(left.shape[1] + 1, module.in_features)
        wide[1:, columns] = left.T
        compute = next(
            (p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32
        )
        out = module(wide.to(compute if compute.itemsize > 1 else torch.float32)).to(left)
        moved: Tensor = out[1:] - out[0]
        return moved.T


def map_path(text_map: TextMap) -> str:
    """Return the path of a map, an adapter around it included."""
    return text_map.name.removesuffix(".base_layer")


def _call(edit: LowRankAffine, x: Tensor) -> Tensor:
    return edit(x)


def _call_columns(edit: LowRankAffine, columns: slice, x: Tensor) -> Tensor:
    out = x.clone()
    out[..., columns] = edit(x[..., columns])
    return out


def chosen_maps(pipe: object, kinds: Sequence[str], *, pooled: bool) -> list[TextMap]:
    """Return the maps whose inputs are the text vectors themselves, of these kinds."""
    wanted = {*kinds, "context"} | ({"pooled"} if pooled else set())
    found = [m for m in text_maps(pipe) if m.exact and m.kind in wanted]
    if pooled and not any(m.kind == "pooled" for m in found):
        raise EditError(
            "this eraser edits pooled vectors, which the denoiser of this pipeline does not read"
        )
    return found
