"""The single reversible changes an `Edit` is made of.

Adding to a floating weight cannot be taken back exactly by subtracting, so a patch keeps the bits it
overwrote: all of the parameter (`DensePatch`, `LowRankPatch`) or the columns it touched (`ColumnPatch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from concept_erasure.errors import EditError, ShapeError
from concept_erasure.linalg import statistics_dtype
from concept_erasure.sites import Site, hook

__all__ = [
    "BiasPatch",
    "ColumnPatch",
    "DensePatch",
    "HookPatch",
    "LoraPatch",
    "LowRankPatch",
    "Patch",
    "WatchedPatch",
    "check_writable",
]


class Patch(Protocol):
    """One reversible change. ``apply`` leaves the model as it was if it raises."""

    @property
    def target(self) -> str:
        """Name of what is changed."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` overwrites; hooks have none."""
        ...

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        ...

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        ...

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return what a target with this value was before the patch; None if it was not there."""
        ...

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        ...

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        ...


@runtime_checkable
class WatchedPatch(Protocol):
    """A patch that knows whether somebody else wrote where it did."""

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the targets that hold something else than the patch left there: `undo` discards it."""
        ...


def check_writable(model: nn.Module, name: str, *, tied: bool = False) -> nn.Parameter:
    """Return a parameter that can be changed in place.

    Args:
        model: The model.
        name: Of the parameter.
        tied: Whether it may be one parameter with another name: both change then.

    Raises:
        EditError: If it is missing, tied to another, quantised, sharded or off-loaded; the message names it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if name not in named:
        raise EditError(f"the model has no parameter {name!r}")
    parameter = named[name]
    ties = [other for other, p in named.items() if p is parameter and other != name]
    if ties and not tied:
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


def _bytes(kept: Tensor | None) -> int:
    return 0 if kept is None else kept.numel() * kept.element_size()


def _norm(change: Tensor) -> float:
    change = change.detach()
    dtype = statistics_dtype(change.device)
    if change.ndim > 1 and change.dtype != dtype:
        # rows in single precision: an order of magnitude faster than converting while reducing
        rows = torch.linalg.vector_norm(change.float(), dim=-1)
        total = float(torch.linalg.vector_norm(rows.to(dtype)))
        if math.isfinite(total):
            return total
    return float(torch.linalg.vector_norm(change, dtype=dtype))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mark(value: Tensor) -> tuple[torch.dtype, int]:
    """Return the dtype and the sum of the bits of a tensor.

    Version counters will not do: fused optimizers and ``.data`` do not move them, later edits do.
    """
    flat = value.detach().contiguous().reshape(-1)
    pack = 8 // value.element_size()
    if flat.device.type != "mps" and len(flat) % pack == 0 and flat.storage_offset() % pack == 0:
        # whole words, modulo 2^64: a sum that widens small integers is an order of magnitude slower
        return value.dtype, int(flat.view(torch.int64).sum())
    return value.dtype, int(flat.view(_INTEGERS[value.element_size()]).sum(dtype=torch.int64))


def _differs(value: Tensor, written: tuple[torch.dtype, int] | None) -> bool:
    """Say whether other numbers stand where a patch has written; a cast in between cannot be told."""
    return written is not None and value.dtype == written[0] and _mark(value) != written


@dataclass
class DensePatch:
    """Replace a parameter by ``value`` (same shape); keeps the original.

    Attributes:
        target: Name of the parameter.
        value: The new value, or a function of the model that gives it. A function is called when the patch is
            applied, so that it sees what earlier patches did and only one wide copy lives at a time.
        share_changed: Share of the entries that the patch changed, once applied: in half precision a small
            change is below the rounding of many.
    """

    target: str
    value: Tensor | Callable[[nn.Module], Tensor] | None
    _original: Tensor | None = field(default=None, repr=False)
    _written: tuple[torch.dtype, int] | None = field(default=None, repr=False)
    share_changed: float | None = field(default=None, repr=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` overwrites."""
        return (self.target,)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return _bytes(self._original)

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target)
        if self.value is None:
            raise EditError(f"the patch on {self.target!r} was applied before; make a new one")
        value = self.value if isinstance(self.value, Tensor) else self.value(model)
        if value.shape != parameter.shape:
            raise ShapeError(
                f"{self.target!r} has shape {tuple(parameter.shape)}; the patch {tuple(value.shape)}"
            )
        cast = value.to(parameter.device, parameter.dtype)
        del value
        change = cast.detach() - parameter.detach()
        norm = _norm(change)
        # the norm is needed anyway, and tells in one pass that nothing is wrong
        if not math.isfinite(norm) and not bool(torch.isfinite(cast).all()):
            raise EditError(f"the new value of {self.target!r} is not finite in {parameter.dtype}")
        self.share_changed = int(change.count_nonzero()) / max(1, change.numel())
        del change
        self._original = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(cast)
        self._written = _mark(parameter)
        self.value = None
        return norm

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the original."""
        return self._original

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the target if something else was written there since."""
        return self.targets if _differs(model.get_parameter(self.target), self._written) else ()

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._original is not None:
            with torch.no_grad():
                model.get_parameter(self.target).copy_(self._original)

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._original = None


@dataclass
class LowRankPatch:
    """Add ``left right^T`` to a 2-D parameter.

    The factors are small, what is kept is not: subtracting them again would leave rounding behind, and `undo`
    promises every bit, so the original is kept as in `DensePatch`.

    Attributes:
        target: Name of the parameter, shape ``(m, n)``.
        left: Shape ``(m, k)``.
        right: Shape ``(n, k)``.
    """

    target: str
    left: Tensor
    right: Tensor
    _dense: DensePatch | None = field(default=None, repr=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` overwrites."""
        return (self.target,)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0 if self._dense is None else self._dense.bytes_held

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target)
        shape = (len(self.left), len(self.right))
        if shape != parameter.shape:
            raise ShapeError(
                f"{self.target!r} has shape {tuple(parameter.shape)}; the patch {shape}"
            )
        dtype = statistics_dtype(parameter.device)
        left, right = (f.to(parameter.device, dtype) for f in (self.left, self.right))
        self._dense = DensePatch(
            self.target, torch.addmm(parameter.detach().to(dtype), left, right.T)
        )
        return self._dense.apply(model)

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the original."""
        return value if self._dense is None else self._dense.before(value)

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the target if something else was written there since."""
        return () if self._dense is None else self._dense.changed(model)

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._dense is not None:
            self._dense.undo(model)

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._dense = None


@dataclass
class ColumnPatch:
    """Replace some columns of a 2-D parameter, or some rows; keeps the originals of only those.

    Attributes:
        target: Name of the parameter, shape ``(m, n)``.
        columns: Which, shape ``(k,)``, int64, each once.
        values: The new values, shape ``(m, k)``, or ``(k, n)`` of rows.
        axis: 1 for columns, 0 for rows.
        tied: Whether the parameter may have two names; see `check_writable`.
    """

    target: str
    columns: Tensor
    values: Tensor
    axis: int = 1
    tied: bool = False
    _original: Tensor | None = field(default=None, repr=False)
    _written: tuple[torch.dtype, int] | None = field(default=None, repr=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` overwrites."""
        return (self.target,)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return _bytes(self._original)

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        parameter = check_writable(model, self.target, tied=self.tied)
        what = ("rows", "columns")[self.axis]
        columns = self.columns.to(parameter.device)
        size, other = parameter.shape[self.axis], parameter.shape[1 - self.axis]
        wanted = (other, len(columns)) if self.axis else (len(columns), other)
        if self.values.shape != wanted:
            raise ShapeError(
                f"{len(columns)} {what} of {self.target!r} are {wanted}; the patch is {tuple(self.values.shape)}"
            )
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < size:
            raise EditError(f"{what} of {self.target!r} must be 0..{size - 1}")
        cast = self.values.to(parameter.device, parameter.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise EditError(
                f"the new {what} of {self.target!r} are not finite in {parameter.dtype}"
            )
        self._original = self._held(parameter).clone()
        self._put(parameter, cast)
        self._written = _mark(self._held(parameter))
        return _norm(cast - self._original)

    def _held(self, parameter: Tensor) -> Tensor:
        return parameter.detach().index_select(self.axis, self.columns.to(parameter.device))

    @torch.no_grad()
    def _put(self, parameter: Tensor, values: Tensor) -> None:
        parameter.index_copy_(self.axis, self.columns.to(parameter.device), values)

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return a copy with the columns put back."""
        if value is None or self._original is None:
            return value
        whole = value.clone()
        self._put(whole, self._original.to(whole.device))
        return whole

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the target if something else was written into the columns since."""
        held = self._held(model.get_parameter(self.target))
        return self.targets if _differs(held, self._written) else ()

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._original is not None:
            parameter = model.get_parameter(self.target)
            self._put(parameter, self._original.to(parameter.device))

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._original = None


@dataclass
class BiasPatch:
    """Give linear modules that have no bias one.

    A bias the architecture does not have is lost when the model is saved and loaded again. Some
    architectures have a switch in their configuration that creates it: then ``settings`` turns it on and
    ``values`` covers every module that the switch covers, so that the saved model holds what it needs.

    Attributes:
        values: The bias of each module path, shape ``(out,)``; None is zeros.
        settings: Attributes of ``model.config`` to set (dotted for nested ones).
    """

    values: Mapping[str, Tensor | None]
    settings: Mapping[str, object] = field(default_factory=dict)
    _settings_before: dict[str, object] = field(default_factory=dict, repr=False)
    _written: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> str:
        """Name of what is changed."""
        first, more = next(iter(self.values), "nothing"), len(self.values) - 1
        names = f"{first}.bias" + (f" and {more} more" if more > 0 else "")
        if self.settings:
            return f"{names} (config: {', '.join(self.settings)})"
        return f"{names} (in memory only)"

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` removes."""
        return tuple(f"{path}.bias" for path in self.values)

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        made: dict[nn.Linear, Tensor] = {}
        for path, value in self.values.items():
            module = model.get_submodule(path)
            if not isinstance(module, nn.Linear) or module.bias is not None:
                raise EditError(f"{path!r} cannot be given a bias; use attach()")
            weight = check_writable(model, f"{path}.weight")
            bias = weight.new_zeros(module.out_features) if value is None else value
            if bias.shape != (module.out_features,):
                raise ShapeError(
                    f"the bias of {path!r} is ({module.out_features},); got {tuple(bias.shape)}"
                )
            made[module] = bias.detach().to(weight.device, weight.dtype)
            if not bool(torch.isfinite(made[module]).all()):
                raise EditError(f"the new bias of {path!r} is not finite in {weight.dtype}")
        for name in self.settings:
            holder, leaf = _setting(model, name)
            self._settings_before[name] = getattr(holder, leaf)
        for module, bias in made.items():
            module.bias = nn.Parameter(bias.clone(), requires_grad=module.weight.requires_grad)
            # remembered by the parameter, so that a later fold does not rely on it being saved
            module.bias.in_memory_only = not self.settings  # type: ignore[attr-defined]
        self._written = {
            f"{path}.bias": _mark(model.get_parameter(f"{path}.bias")) for path in self.values
        }
        for name, setting in self.settings.items():
            holder, leaf = _setting(model, name)
            setattr(holder, leaf, setting)
        return math.hypot(*(_norm(bias) for bias in made.values()))

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return None: there was no bias."""
        return None

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the biases into which something else was written since."""
        written = self._written.items()
        return tuple(name for name, mark in written if _differs(model.get_parameter(name), mark))

    def undo(self, model: nn.Module) -> None:
        """Take the biases away and put the configuration back."""
        for path in self.values:
            model.get_submodule(path).register_parameter("bias", None)
        for name, setting in self._settings_before.items():
            holder, leaf = _setting(model, name)
            setattr(holder, leaf, setting)
        self._settings_before = {}

    def commit(self) -> None:
        """Nothing is held."""


def _setting(model: nn.Module, name: str) -> tuple[object, str]:
    """Return the part of the configuration that holds a dotted attribute, and its last name."""
    *path, leaf = name.split(".")
    holder: object = model.config
    for part in path:
        holder = getattr(holder, part)
    return holder, leaf


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
    def targets(self) -> tuple[str, ...]:
        """No parameter is touched."""
        return ()

    @property
    def bytes_held(self) -> int:
        """Bytes kept for the way back."""
        return 0

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        self._handle = hook(model, self.site, self.function)
        return 0.0

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the value: no parameter is touched."""
        return value

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """No parameter is touched."""
        return ()

    @property
    def handle_id(self) -> int | None:
        """Number of the hook among those of its module; None while there is none."""
        return None if self._handle is None else self._handle.id

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


@dataclass
class LoraPatch:
    """Add ``x down up^T`` to what a linear module gives; its weight is not touched, so nothing is rounded away.

    Attributes:
        module: Path of the module.
        factors: Function of the model that gives ``up`` of shape ``(out, k)`` and ``down`` of shape ``(in, k)``;
            called when the patch is applied.
    """

    module: str
    factors: Callable[[nn.Module], tuple[Tensor, Tensor]]
    _handle: RemovableHandle | None = field(default=None, repr=False)
    _bytes: int = 0

    @property
    def target(self) -> str:
        """Name of what is changed."""
        return self.module

    @property
    def targets(self) -> tuple[str, ...]:
        """No parameter is touched."""
        return ()

    @property
    def bytes_held(self) -> int:
        """Bytes of the factors."""
        return self._bytes

    def apply(self, model: nn.Module) -> float:
        """Change the model and return the norm of the change."""
        up, down = self.factors(model)
        change = ((up.T @ up) * (down.T @ down)).sum().clamp_min(0).sqrt()
        if not bool(torch.isfinite(change)):
            raise EditError(f"the change of {self.module!r} is not finite")
        dtype = torch.promote_types(model.get_submodule(self.module).weight.dtype, torch.float32)  # type: ignore[arg-type]
        up, down = up.detach().to(dtype), down.detach().to(dtype)
        self._bytes = _bytes(up) + _bytes(down)

        def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0].to(dtype)
            more = (x @ down.to(x.device)) @ up.T.to(x.device)
            return (out.to(dtype) + more).to(out.dtype)

        self._handle = model.get_submodule(self.module).register_forward_hook(after)
        return float(change)

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the value: no parameter is touched."""
        return value

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """No parameter is touched."""
        return ()

    def undo(self, model: nn.Module) -> None:
        """Restore every bit."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        raise EditError(
            "a LoRA beside the weights is a hook and cannot be committed; use form='weights', or write it to a file"
        )
