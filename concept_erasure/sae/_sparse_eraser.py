"""What the erasers that change some columns or rows have in common: their tensors, files and checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from concept_erasure._storage import CONFIG_FILE, config_from
from concept_erasure.edit import Edit, Patch, active_edits, base_fingerprint, lineage
from concept_erasure.eraser import ModelEraser
from concept_erasure.errors import EditError, FormatError, ShapeError, SpaceError
from concept_erasure.sites import Space

__all__ = ["SparseEraser", "check_no_edits", "check_same_model", "settled"]


@dataclass(frozen=True, repr=False, eq=False)
class SparseEraser(ModelEraser):
    """An eraser whose tensors are held by name.

    Attributes:
        weights: Tensors by name; each class says which.
    """

    weights: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(self.weights)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a copy on another device or in another floating dtype."""
        moved = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in self.weights.items()
        }
        return self._same_as(replace(self, weights=moved))

    def apply(self, model: nn.Module) -> Edit:
        """Change the model in place and return the way back.

        Args:
            model: The model it was fitted in, with its head or without, in any floating dtype.

        Raises:
            SpaceError: If it was fitted in another model.
            EditError: If a weight cannot be changed, holds something else than at the fit, or this eraser is in
                force already.
        """
        check_same_model(self.space, model)
        concept = getattr(self.config, "concept", "")
        label = f"{self.method}{f' of {concept}' if concept else ''}"
        return Edit(model, self._patches(model), label=label, key=self._identity)

    @abstractmethod
    def _patches(self, model: nn.Module) -> list[Patch]:
        """Return the patches for this model."""

    @classmethod
    def _build(cls, record: dict[str, object], tensors: dict[str, Tensor], folder: Path) -> Self:
        config = config_from(cls.config_type, record["config"], folder / CONFIG_FILE)
        try:
            space = (
                None
                if record["space"] is None
                else Space.from_dict(cast("dict[str, object]", record["space"]))
            )
            report = cast("dict[str, object]", record["report"])
            built = cls(tensors, config=config, space=space, report=report)
            built._check()
            built._check_space()
        except (ShapeError, SpaceError, TypeError, ValueError, KeyError) as error:
            raise FormatError(f"{folder}: {error}") from None
        return built


def check_same_model(space: Space | None, model: nn.Module) -> None:
    """Raise SpaceError unless an eraser of this space may be applied to a model."""
    if space is not None and space.fingerprint not in lineage(model):
        raise SpaceError(
            f"this eraser was fitted in {space.model} (weights {space.fingerprint[:12]}); this model has weights "
            f"{base_fingerprint(model)[:12]}. Fit it again, or use with_space(None) if you are sure"
        )


def check_no_edits(model: nn.Module) -> None:
    """Raise EditError if an edit is in force: what is fitted then is no edit of the model itself."""
    if edits := active_edits(model):
        raise EditError(
            f"{edits[-1].label} is in force: what is fitted under it would not be an edit of the model itself; "
            "undo() or commit() it first"
        )


def settled(current: Tensor, original: Tensor, change: Tensor, name: str) -> Tensor:
    """Return what stands in a parameter after the edit, so that a second application changes nothing.

    Args:
        current: What stands there now.
        original: What stood there at the fit, in whatever dtype.
        change: What the fit adds to it, same shape.
        name: Of the parameter, for the message.

    Raises:
        EditError: If it is neither what it was at the fit, nor that with the change made.
    """
    wide = torch.promote_types(torch.float32, current.dtype)
    before, more = original.to(current.device), change.to(current.device)
    after = current.to(wide) + more.to(wide)
    rough = min(current.dtype, original.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    if torch.equal(current.to(rough), before.to(rough)):
        return after
    done = (before.to(wide) + more.to(wide)).to(current.dtype)
    slack = 2 * torch.finfo(rough).eps * float(done.abs().max() if done.numel() else 0)
    if torch.allclose(current.to(wide), done.to(wide), rtol=0, atol=slack):
        return current
    raise EditError(
        f"{name!r} holds neither what it held at the fit nor the edit: something else changed it. Undo that, or fit "
        "again"
    )
