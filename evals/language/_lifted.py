"""The model as it is without an edit, for as long as a reading takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from concept_erasure.edit import Edit, _without, active_edits

__all__ = ["lifted"]


@contextmanager
def lifted(model: nn.Module, edits: Sequence[Edit] | None = None) -> Iterator[None]:
    """Show a model without edits in force: their weights are swapped out, their hooks are silent.

    Args:
        model: The edited model; as it was afterwards.
        edits: The last edits in force; default all.

    Raises:
        ValueError: If they are not the last edits in force.
    """
    active = active_edits(model)
    chosen = active if edits is None else [edit for edit in active if edit in edits]
    if edits is not None and (
        len(chosen) != len(edits) or active[len(active) - len(chosen) :] != chosen
    ):
        raise ValueError(
            f"only the last edits in force can be lifted, got {len(edits)} of {len(active)}; undo in order"
        )
    handles = {
        handle.id
        for edit in chosen
        for patch in edit.patches
        if (handle := getattr(patch, "_handle", None)) is not None
    }
    silent: list[tuple[dict[int, Any], OrderedDict[int, Any]]] = []
    try:
        for module in model.modules() if handles else ():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if handles & hooks.keys():
                    silent.append((hooks, OrderedDict(hooks)))
                    for key in handles & hooks.keys():
                        del hooks[key]
        with _without(chosen):
            yield
    finally:
        for hooks, held in silent:  # the same dictionary, in the old order: handles point to it
            hooks.clear()
            hooks.update(held)
