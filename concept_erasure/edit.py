"""What changed in a model, and the way back.

An `Edit` is a list of patches applied in one transaction: all or none. What they overwrote is kept, so
``undo()`` is bit-exact; edits on one model are undone last in, first out. A model with its head and the
same model without are one: the tables here are kept for what `base_of` gives of both.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, cast

from torch import Tensor, nn

from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.patches import (
    BiasPatch,
    ColumnPatch,
    DensePatch,
    HookPatch,
    LoraPatch,
    LowRankPatch,
    Patch,
    WatchedPatch,
    check_writable,
)
from concept_erasure.sites import base_of, fingerprint

__all__ = [
    "BiasPatch",
    "ColumnPatch",
    "DensePatch",
    "Edit",
    "HookPatch",
    "JointEdit",
    "LoraPatch",
    "LowRankPatch",
    "Patch",
    "active_edits",
    "base_fingerprint",
    "check_writable",
    "lineage",
    "same_lineage",
]

_EDITS: weakref.WeakKeyDictionary[nn.Module, list[Edit]] = weakref.WeakKeyDictionary()
_BASE: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_LINEAGE: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


def active_edits(model: nn.Module) -> list[Edit]:
    """Return the edits in force on a model, oldest first."""
    return list(_EDITS.get(base_of(model)[1], []))


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the weights as they are without the edits in force."""
    return _BASE.get(base_of(model)[1]) or fingerprint(model)


def lineage(model: nn.Module) -> frozenset[str]:
    """Return every base fingerprint the model has had in this process, today's included.

    Committing an edit changes the weights for good. Erasers collected before it, in the same pass, are still
    about this model; the lineage says so. It is forgotten when the weights change in any other way (training,
    loading), and not saved with the model.
    """
    base = base_fingerprint(model)
    known = _LINEAGE.get(base_of(model)[1], [])
    return frozenset(known) if known and known[-1] == base else frozenset({base})


def same_lineage(one: str, other: str) -> bool:
    """Say whether two fingerprints are of the same weights, or of one model before and after commits."""
    return one == other or any({one, other} <= set(known) for known in _LINEAGE.values())


@contextmanager
def _without(edits: Sequence[Edit]) -> Iterator[None]:
    """Show the parameters as they were before some edits; nothing is copied but patched columns."""
    values: dict[tuple[nn.Module, str], Tensor | None] = {}
    for edit in reversed(edits):
        for patch in reversed(edit.patches):
            for name in patch.targets:
                path, _, leaf = name.rpartition(".")
                module = edit._model.get_submodule(path)
                if (module, leaf) not in values:
                    held = module._parameters[leaf]
                    values[module, leaf] = None if held is None else held.detach()
                values[module, leaf] = patch.before(values[module, leaf])
    swapped: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for (module, leaf), value in values.items():
            swapped.append((module, leaf, module._parameters[leaf]))
            module._parameters[leaf] = (
                None if value is None else nn.Parameter(value, requires_grad=False)
            )
        yield
    finally:
        for module, leaf, parameter in swapped:
            module._parameters[leaf] = parameter


class Edit:
    """A transaction of patches on one model, in force from construction until `undo`.

    As a context manager it is undone on exit, together with later edits that are still in force.

    Args:
        model: The model, changed in place.
        patches: What to change, in order; at least one.
        label: Shown in summaries, e.g. ``"leace at residual.9"``.
        key: Identity of the change, or one for each place; edits in force share none.

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
        key: str | Iterable[str] | None = None,
    ) -> None:
        if not patches:
            raise EditError(f"{label}: there is nothing to change")
        keys = frozenset({key} if isinstance(key, str) else key or ())
        path, base = base_of(model)
        stack = _EDITS.setdefault(base, [])
        if other := next((edit for edit in stack if edit.keys & keys), None):
            raise EditError(
                f"{label}: all or part of it is in force on this model already ({other.label}); "
                "undo() or commit() that first"
            )
        # weak: the table of edits must not keep a model alive
        self._reference, self._base, self._path = weakref.ref(model), weakref.ref(base), path
        self._patches = list(patches)
        self.label: str = label
        self.keys: frozenset[str] = keys
        self._state = "applied"
        if not stack:
            _BASE[base] = fingerprint(base)
        self._norms: list[float] = []
        try:
            for patch in self._patches:
                self._norms.append(patch.apply(model))
        except BaseException:
            for patch in reversed(self._patches[: len(self._norms)]):
                patch.undo(model)
            if not stack:
                _BASE.pop(base, None)
            raise
        stack.append(self)

    @property
    def _model(self) -> nn.Module:
        """The model that was given; if only its base is left, a stand-in with the base at its path."""
        model, base = self._reference(), self._base()
        if model is None and base is not None:
            model = inner = nn.Module()
            model.__dict__["config"] = getattr(base, "config", None)
            *path, leaf = self._path.split(".")
            for name in path:
                inner.add_module(name, nn.Module())
                inner = inner.get_submodule(name)
            inner.add_module(leaf, base)
        if model is None:
            raise EditError(f"the model that {self.label} changed is gone")
        return model

    @property
    def _stack(self) -> list[Edit]:
        base = self._base()
        if base is None:
            raise EditError(f"the model that {self.label} changed is gone")
        return _EDITS[base]

    @property
    def active(self) -> bool:
        """Whether the change is in force and can be undone."""
        return self._state == "applied"

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches, in the order they were applied."""
        return tuple(self._patches)

    @property
    def targets(self) -> frozenset[str]:
        """Names of the parameters that undoing overwrites."""
        return frozenset(name for patch in self._patches for name in patch.targets)

    def undo(self) -> None:
        """Restore every bit; a second call does nothing.

        What was trained or loaded into a parameter after the edit is overwritten, with an `ErasureWarning`
        that names the parameter.

        Raises:
            EditError: If the edit was committed, or a later edit on the model is still in force.
        """
        self._undo(stacklevel=3)

    def _undo(self, stacklevel: int) -> None:
        if self._state == "undone":
            return
        if self._state == "committed":
            raise EditError(f"{self.label} was committed: its originals are gone")
        self._check_last()
        stack, model = self._stack, self._model
        failures: list[Exception] = []
        discarded: list[str] = []
        for patch in reversed(self._patches):
            try:
                if isinstance(patch, WatchedPatch):
                    discarded += patch.changed(model)
                patch.undo(model)
            except Exception as failure:  # noqa: BLE001 the other patches are still undone
                failures.append(failure)
        self._leave(stack)
        self._state = "undone"
        if failures:
            raise failures[0]
        if discarded:
            names = ", ".join(repr(name) for name in dict.fromkeys(discarded))
            warnings.warn(
                f"{names} changed after {self.label} (trained, or loaded): undo() put back what was there "
                "before the edit and discarded that; commit() an edit before training on it",
                ErasureWarning,
                stacklevel=stacklevel,
            )

    def _check_last(self) -> None:
        stack = self._stack
        if stack[-1] is not self:
            raise EditError(f"undo {stack[-1].label} first: edits are undone last in, first out")

    def commit(self) -> None:
        """Keep the change for good and drop the originals.

        Erasers fitted before stay usable on this model, see `lineage`.

        Raises:
            EditError: If it was undone, is a hook, or undoing an earlier edit in force would overwrite it.
        """
        if self._state == "committed":
            return
        self._check_commit()
        stack = self._stack
        base = cast("nn.Module", self._base())  # alive: it has a stack
        known = _LINEAGE.get(base, [])
        mark = base_fingerprint(base)
        if not known or known[-1] != mark:
            known = [mark]
        self._leave(stack)
        for patch in self._patches:
            patch.commit()
        self._state = "committed"
        with _without(stack):
            mark = fingerprint(base)
        _LINEAGE[base] = [*(old for old in known if old != mark), mark]
        if stack:
            _BASE[base] = mark

    def _check_commit(self) -> None:
        if self._state == "undone":
            raise EditError(f"{self.label} was undone: there is nothing to commit")
        hooks = (
            isinstance(p, HookPatch | LoraPatch) or getattr(p, "is_hook", False)
            for p in self._patches
        )
        if any(hooks):
            raise EditError(
                f"{self.label} is attached by hooks and cannot be committed; undo it, or use apply()"
            )
        stack = self._stack
        for older in stack[: stack.index(self)]:
            if shared := sorted(older.targets & self.targets):
                raise EditError(
                    f"commit or undo {older.label} first: its undo would overwrite {shared[0]!r}"
                )

    def _leave(self, stack: list[Edit]) -> None:
        stack.remove(self)
        base = self._base()
        if not stack and base is not None:
            _BASE.pop(base, None)

    def summary(self) -> str:
        """Return what was touched, the norm of each change and the bytes held for the way back."""
        lines = [f"{self.label} ({self._state}): {len(self._patches)} patches"]
        for patch, norm in zip(self._patches, self._norms, strict=True):
            what = type(patch).__name__.removesuffix("Patch").lower()
            change = "" if isinstance(patch, HookPatch) else f", norm of change {norm:.4g}"
            share = getattr(patch, "share_changed", None)
            if share is not None and share < 1:
                change += f", {share:.1%} of the entries changed"
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
        """Undo, later edits in force first; an error of the body is never hidden by one of the undoing."""
        if self._state != "applied" or self._base() is None:
            return
        stack = self._stack
        failures: list[Exception] = []
        for edit in reversed(stack[stack.index(self) :]):
            try:
                edit._undo(stacklevel=3)
            except Exception as failure:  # noqa: BLE001 the earlier edits are still undone
                failures.append(failure)
        if failures and error is None:
            raise failures[0]
        for note in failures:
            if error is not None:
                error.add_note(f"undoing {self.label} failed too: {note}")

    def __repr__(self) -> str:
        return f"Edit({self.label!r}, {self._state}, patches={len(self._patches)})"


class JointEdit(Edit):
    """One transaction on several models, such as the denoiser and the text encoders of a pipeline.

    Each model keeps its own stack of edits; here all are applied, undone and committed, or none.

    Args:
        parts: The models with their patches, in the order they are applied.
        label: Shown in summaries.
        key: As for `Edit`.

    Raises:
        EditError: If there is nothing to change, or a part is refused (no model is changed then).
    """

    def __init__(
        self,
        parts: Sequence[tuple[nn.Module, Sequence[Patch]]],
        *,
        label: str = "edit",
        key: str | Iterable[str] | None = None,
    ) -> None:
        self.label = label
        self.keys = frozenset({key} if isinstance(key, str) else key or ())
        self._parts: list[Edit] = []
        filled = [(model, patches) for model, patches in parts if patches]
        if not filled:
            raise EditError(f"{label}: there is nothing to change")
        try:
            for model, patches in filled:
                self._parts.append(Edit(model, patches, label=label, key=self.keys))
        except BaseException:
            for part in reversed(self._parts):
                part.undo()
            raise

    @property
    def active(self) -> bool:
        """Whether the change is in force and can be undone."""
        return all(part.active for part in self._parts)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches of all models, in the order they were applied."""
        return tuple(patch for part in self._parts for patch in part.patches)

    @property
    def targets(self) -> frozenset[str]:
        """Names of the parameters that undoing overwrites, each in its own model."""
        return frozenset(name for part in self._parts for name in part.targets)

    def undo(self) -> None:
        """Restore every bit in every model, see `Edit.undo`; nothing is undone if one part cannot be."""
        for part in self._parts:
            if part._state == "committed":
                raise EditError(f"{self.label} was committed: its originals are gone")
            if part.active:
                part._check_last()
        for part in reversed(self._parts):
            part._undo(stacklevel=3)

    def commit(self) -> None:
        """Keep the change for good, see `Edit.commit`; nothing is committed if one part cannot be."""
        for part in self._parts:
            if part._state != "committed":
                part._check_commit()
        for part in self._parts:
            part.commit()

    def summary(self) -> str:
        """Return the summaries of all models."""
        return "\n".join(part.summary() for part in self._parts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo in every model, later edits in force first."""
        failures: list[Exception] = []
        for part in reversed(self._parts):
            try:
                part.__exit__(kind, error, trace)
            except Exception as failure:  # noqa: BLE001 the other models are still undone
                failures.append(failure)
        if failures and error is None:
            raise failures[0]

    def __repr__(self) -> str:
        return f"JointEdit({self.label!r}, models={len(self._parts)}, patches={len(self.patches)})"
