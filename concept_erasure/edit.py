"""What changed in a model, and the way back.

An `Edit` is a list of patches applied in one transaction: all or none. Only what changed is kept, so
``undo()`` is bit-exact; edits on one model are undone last in, first out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from concept_erasure.errors import EditError, ShapeError
from concept_erasure.sites import Site, fingerprint, hook

__all__ = [
    "BiasPatch",
    "ColumnPatch",
    "DensePatch",
    "Edit",
    "HookPatch",
    "LowRankPatch",
    "Patch",
    "active_edits",
    "base_fingerprint",
    "check_writable",
]


class Patch(Protocol):
    """One reversible change. ``apply`` leaves the model as it was if it raises."""

    @property
    def target(self) -> str:
        """Name of what is changed."""
        ...

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        ...

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        ...

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        ...

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        ...


def check_writable(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that can be changed in place.

    Raises:
        EditError: If it is missing, tied to another, quantised, sharded or off-loaded; the message names it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if name not in named:
        raise EditError(f"the model has no parameter {name!r}")
    parameter = named[name]
    ties = [other for other, p in named.items() if p is parameter and other != name]
    if ties:
        raise EditError(
            f"{name!r} is tied to {ties[0]!r}: changing it changes both; untie them or use attach()"
        )
    kind = type(parameter).__name__
    if not parameter.is_floating_point() or kind in {"Params4bit", "Int8Params"}:
        raise EditError(
            f"{name!r} is quantised ({kind}, {parameter.dtype}); use attach() or load it in bf16"
        )
    if parameter.is_meta:
        raise EditError(f"{name!r} is off-loaded (meta device); load it or use attach()")
    if hasattr(parameter, "device_mesh") or type(parameter.data).__name__ == "DTensor":
        raise EditError(f"{name!r} is sharded; gather it first or use attach()")
    if parameter.numel() == 0:
        raise EditError(
            f"{name!r} is empty here (sharded by FSDP?); gather it first or use attach()"
        )
    return parameter


@dataclass
class DensePatch:
    """Replace a parameter by ``value`` (same shape); keeps the original."""

    target: str
    value: Tensor | None
    _original: Tensor | None = field(default=None, repr=False)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        kept = self._original
        return 0 if kept is None else kept.numel() * kept.element_size()

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target)
        value = self.value
        if value is None:
            raise EditError(f"the patch on {self.target!r} was applied before; make a new one")
        if value.shape != parameter.shape:
            raise ShapeError(
                f"{self.target!r} has shape {tuple(parameter.shape)}; the patch {tuple(value.shape)}"
            )
        cast = value.to(parameter.device, parameter.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise EditError(f"the new value of {self.target!r} is not finite in {parameter.dtype}")
        self._original = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(cast)
        self.value = None
        return float((parameter.detach().double() - self._original.double()).norm())

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._original is not None:
            with torch.no_grad():
                dict(model.named_parameters(remove_duplicate=False))[self.target].copy_(
                    self._original
                )

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._original = None


@dataclass
class LowRankPatch:
    """Add ``left right^T`` to a 2-D parameter; keeps the original."""

    target: str
    left: Tensor
    right: Tensor
    _dense: DensePatch | None = field(default=None, repr=False)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0 if self._dense is None else self._dense.bytes_held

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target)
        change = self.left.double() @ self.right.double().T
        if change.shape != parameter.shape:
            raise ShapeError(
                f"{self.target!r} has shape {tuple(parameter.shape)}; the patch {tuple(change.shape)}"
            )
        value = parameter.detach().double() + change.to(parameter.device)
        self._dense = DensePatch(self.target, value)
        return self._dense.apply(model)

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._dense is not None:
            self._dense.undo(model)

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._dense = None


@dataclass
class ColumnPatch:
    """Replace some columns of a 2-D parameter; keeps the originals of only those."""

    target: str
    columns: Tensor
    values: Tensor
    _original: Tensor | None = field(default=None, repr=False)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        kept = self._original
        return 0 if kept is None else kept.numel() * kept.element_size()

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target)
        columns = self.columns.to(parameter.device)
        if self.values.shape != (parameter.shape[0], len(columns)):
            raise ShapeError(
                f"{len(columns)} columns of {self.target!r} are {(parameter.shape[0], len(columns))}; "
                f"the patch is {tuple(self.values.shape)}"
            )
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < parameter.shape[1]:
            raise EditError(f"columns of {self.target!r} must be 0..{parameter.shape[1] - 1}")
        cast = self.values.to(parameter.device, parameter.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise EditError(
                f"the new columns of {self.target!r} are not finite in {parameter.dtype}"
            )
        self._original = parameter.detach()[:, columns].clone()
        with torch.no_grad():
            parameter[:, columns] = cast
        return float((cast.double() - self._original.double()).norm())

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._original is not None:
            parameter = dict(model.named_parameters(remove_duplicate=False))[self.target]
            with torch.no_grad():
                parameter[:, self.columns.to(parameter.device)] = self._original

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._original = None


@dataclass
class BiasPatch:
    """Give a linear module that has no bias one."""

    module: str
    value: Tensor

    @property
    def target(self) -> str:
        """Name of what is changed."""
        return f"{self.module}.bias"

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        module = model.get_submodule(self.module)
        if not isinstance(module, nn.Linear) or module.bias is not None:
            raise EditError(f"{self.module!r} cannot be given a bias; use attach()")
        value = self.value.to(module.weight.device, module.weight.dtype)
        if not bool(torch.isfinite(value).all()):
            raise EditError(f"the new bias of {self.module!r} is not finite in {value.dtype}")
        module.bias = nn.Parameter(value, requires_grad=module.weight.requires_grad)
        return float(value.double().norm())

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        model.get_submodule(self.module).register_parameter("bias", None)

    def commit(self) -> None:
        """Nothing is held."""


@dataclass
class HookPatch:
    """Change the activation at a site on every forward pass."""

    site: Site
    function: Callable[[Tensor], Tensor | None]
    _handle: RemovableHandle | None = field(default=None, repr=False)

    @property
    def target(self) -> str:
        """Name of what is changed."""
        return self.site.name

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        self._handle = hook(model, self.site, self.function)
        return 0.0

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        raise EditError(
            "an attached eraser is a hook and cannot be committed; keep it, undo it, or use apply()"
        )


_EDITS: weakref.WeakKeyDictionary[nn.Module, list[Edit]] = weakref.WeakKeyDictionary()
_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def active_edits(model: nn.Module) -> list[Edit]:
    """Return the edits in force on a model, oldest first."""
    return list(_EDITS.get(model, []))


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the weights as they were before the edits in force."""
    return _FINGERPRINTS.get(model) or fingerprint(model)


class Edit:
    """A transaction of patches on one model, in force from construction until `undo`.

    Args:
        model: The model, changed in place.
        patches: What to change, in order; at least one.
        label: Shown in summaries, e.g. ``"leace at residual.9"``.
        key: Identity of the change; two edits with one key cannot be in force together.

    Raises:
        EditError: If there is nothing to change, a patch is refused (nothing is changed then), or the same
            change is in force already.
    """

    def __init__(
        self,
        model: nn.Module,
        patches: Sequence[Patch],
        *,
        label: str = "edit",
        key: str | None = None,
    ) -> None:
        if not patches:
            raise EditError(f"{label}: there is nothing to change")
        stack = _EDITS.setdefault(model, [])
        if key is not None and any(edit.key == key for edit in stack):
            raise EditError(
                f"{label} is in force on this model already; undo() or commit() it first"
            )
        # weak: the table of edits must not keep a model alive
        self._reference = weakref.ref(model)
        self._patches = list(patches)
        self.label: str = label
        self.key: str | None = key
        self._state = "applied"
        if not stack:
            _FINGERPRINTS[model] = fingerprint(model)
        self._norms: list[float] = []
        try:
            for patch in self._patches:
                self._norms.append(patch.apply(model))
        except BaseException:
            for patch in reversed(self._patches[: len(self._norms)]):
                patch.undo(model)
            if not stack:
                _FINGERPRINTS.pop(model, None)
            raise
        stack.append(self)

    @property
    def _model(self) -> nn.Module:
        model = self._reference()
        if model is None:
            raise EditError(f"the model that {self.label} changed is gone")
        return model

    @property
    def active(self) -> bool:
        """Whether the change is in force and can be undone."""
        return self._state == "applied"

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches, in the order they were applied."""
        return tuple(self._patches)

    def undo(self) -> None:
        """Restore every bit; a second call does nothing.

        Raises:
            EditError: If the edit was committed, or a later edit on the model is still in force.
        """
        if self._state == "undone":
            return
        if self._state == "committed":
            raise EditError(f"{self.label} was committed: its originals are gone")
        stack = _EDITS[self._model]
        if stack[-1] is not self:
            raise EditError(f"undo {stack[-1].label} first: edits are undone last in, first out")
        for patch in reversed(self._patches):
            patch.undo(self._model)
        self._leave(stack)
        self._state = "undone"

    def commit(self) -> None:
        """Keep the change for good and drop the originals.

        Raises:
            EditError: If it was undone, is a hook, or an earlier edit is still in force.
        """
        if self._state == "committed":
            return
        if self._state == "undone":
            raise EditError(f"{self.label} was undone: there is nothing to commit")
        stack = _EDITS[self._model]
        if stack[0] is not self:
            raise EditError(f"commit {stack[0].label} first: its undo would overwrite this edit")
        if any(isinstance(patch, HookPatch) for patch in self._patches):
            raise EditError(
                f"{self.label} is attached by hooks and cannot be committed; undo it, or use apply()"
            )
        for patch in self._patches:
            patch.commit()
        self._leave(stack)
        self._state = "committed"
        if stack:
            _FINGERPRINTS[self._model] = fingerprint(self._model)

    def _leave(self, stack: list[Edit]) -> None:
        stack.remove(self)
        if not stack:
            _FINGERPRINTS.pop(self._model, None)

    def summary(self) -> str:
        """Return what was touched, the norm of each change and the bytes held for the way back."""
        lines = [f"{self.label} ({self._state}): {len(self._patches)} patches"]
        for patch, norm in zip(self._patches, self._norms, strict=True):
            what = type(patch).__name__.removesuffix("Patch").lower()
            change = "" if isinstance(patch, HookPatch) else f", norm of change {norm:.4g}"
            lines.append(f"  {patch.target}: {what}{change}, {patch.bytes_held} bytes held")
        return "\n".join(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._state == "applied":
            self.undo()

    def __repr__(self) -> str:
        return f"Edit({self.label!r}, {self._state}, patches={len(self._patches)})"
