"""What the erasers that change some columns or rows have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concept_erasure.edit import Edit, Patch, active_edits
from concept_erasure.eraser import WeightsEraser
from concept_erasure.errors import EditError

__all__ = ["SparseEraser", "check_no_edits", "settled"]


@dataclass(frozen=True, repr=False, eq=False)
class SparseEraser(WeightsEraser):
    """An eraser that changes some columns or rows of weights."""

    def apply(self, model: nn.Module) -> Edit:
        """Change the model in place and return the way back.

        Args:
            model: The model it was fitted in, with its head or without, in any floating dtype.

        Raises:
            SpaceError: If it was fitted in another model.
            EditError: If a weight cannot be changed, holds something else than at the fit, or this eraser is in
                force already.
        """
        self._check_model(model)
        return Edit(model, self._patches(model), label=self._title, key=self._identity)

    @abstractmethod
    def _patches(self, model: nn.Module) -> list[Patch]:
        """Return the patches for this model."""


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
