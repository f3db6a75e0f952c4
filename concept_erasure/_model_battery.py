"""The battery for erasers that change a model and have no map on vectors, for our methods and for plug-ins.

A plug-in tests itself in a few lines::

    BATTERY = ModelEraserBattery(get("my-method"), fit=fit_mine, model=make, other=make_another, outputs=logits)

    @pytest.mark.parametrize("check", BATTERY.checks())
    def test_battery(check, tmp_path):
        BATTERY.run(check, tmp_path)
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from concept_erasure.edit import Edit, active_edits
from concept_erasure.eraser import Eraser, ModelEraser
from concept_erasure.errors import EditError, SpaceError
from concept_erasure.registry import Method

__all__ = ["Battery", "CheckFailed", "ModelEraserBattery"]

CHECKS = (
    "fit-leaves-model",
    "fit-under-edit",
    "apply",
    "undo",
    "twice",
    "commit",
    "save-load",
    "copy",
    "deterministic",
    "half-precision",
    "another-model",
    "options",
)


class CheckFailed(AssertionError):  # noqa: N818 it says what happened
    """An eraser does not keep what it declares; the message gives the number and the bound."""


class Battery(ABC):
    """Named checks of one method; each is a method ``_check_<name>``."""

    method: Method

    @abstractmethod
    def checks(self) -> tuple[str, ...]:
        """Return the names of the checks that apply."""

    def run(self, check: str, folder: Path) -> None:
        """Run one check.

        Args:
            check: One of `checks`.
            folder: An empty folder the check may write to.

        Raises:
            ValueError: If there is no such check.
            CheckFailed: If the eraser does not pass.
        """
        function = getattr(self, "_check_" + check.replace("-", "_"), None)
        if function is None:
            raise ValueError(f"no check {check!r}; there are {', '.join(self.checks())}")
        if check == "save-load":
            function(folder)
        else:
            function()

    def run_all(self, folder: Path) -> tuple[str, ...]:
        """Run every check and return their names; ``folder`` as in `run`."""
        for check in self.checks():
            self.run(check, folder)
        return self.checks()

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise CheckFailed(f"{self.method.name}: {what}")


@dataclass(frozen=True)
class ModelEraserBattery(Battery):
    """The checks of one method.

    Args:
        method: Registry entry.
        fit: Fits an eraser on a model with a seed.
        model: Makes the model; always the same one, in evaluation mode, float32.
        other: Makes another model of the same shape.
        outputs: Runs a model and returns what must change.
        hooks: Whether the eraser is made of hooks: no weight changes and it cannot be committed.
        exempt: Names of checks that cannot hold for this method (say why where it is set).
    """

    method: Method
    fit: Callable[[nn.Module, int], ModelEraser]
    model: Callable[[], nn.Module]
    other: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], Tensor]
    hooks: bool = False
    exempt: frozenset[str] = field(default_factory=frozenset)

    def checks(self) -> tuple[str, ...]:
        """Return the names of the checks that apply."""
        return tuple(name for name in CHECKS if name not in self.exempt)

    # ------------------------------------------------------------------ helpers

    def _fitted(self) -> tuple[ModelEraser, nn.Module]:
        model = self.model()
        return self.fit(model, 0), model

    def _apply(self, eraser: ModelEraser, model: nn.Module) -> Edit:
        return eraser.apply(model)

    def _same(self, before: dict[str, object], model: nn.Module, when: str) -> None:
        for name, value in _snapshot(model).items():
            held = before.get(name)
            same = torch.equal(held, value) if isinstance(value, Tensor) else held == value  # type: ignore[arg-type]
            self._require(same, f"{name} differs {when}")

    def _refuses(self, kind: type[Exception], what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except kind:
            return
        except Exception as error:
            raise CheckFailed(
                f"{self.method.name}: {what}: raised {type(error).__name__} ({error}), want {kind.__name__}"
            ) from error
        raise CheckFailed(f"{self.method.name}: {what}: raised nothing, want {kind.__name__}")

    # ------------------------------------------------------------------ checks

    def _check_fit_leaves_model(self) -> None:
        """A fit leaves every bit, mode, gradient flag and hook of the model, and the global generator."""
        model = self.model()
        model.train()
        next(model.parameters()).requires_grad_(False)
        before = _snapshot(model)
        state = torch.get_rng_state()
        self.fit(model, 0)
        self._same(before, model, "after a fit")
        self._require(not active_edits(model), "an edit is left in force by a fit")
        self._require(torch.equal(state, torch.get_rng_state()), "a fit uses the global RNG")

    def _check_fit_under_edit(self) -> None:
        """Fitting a model that is edited is refused."""
        eraser, model = self._fitted()
        with self._apply(eraser, model):
            self._refuses(EditError, "a fit under an edit", lambda: self.fit(model, 0))

    def _check_apply(self) -> None:
        """The outputs change, and of the weights only those the edit names."""
        eraser, model = self._fitted()
        plain = self.outputs(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with self._apply(eraser, model) as edit:
            self._require(not torch.equal(self.outputs(model), plain), "nothing changes")
            state = model.state_dict()
            changed = {
                name for name, value in state.items() if not torch.equal(value, before[name])
            }
            self._require(
                changed == set(edit.targets),
                f"changed {sorted(changed)}, named {sorted(edit.targets)}",
            )
            self._require(not (self.hooks and changed), "an eraser of hooks changes weights")

    def _check_undo(self) -> None:
        """Undoing restores every bit, also when the body raises."""
        eraser, model = self._fitted()
        plain, before = self.outputs(model), _snapshot(model)
        self._apply(eraser, model).undo()
        self._same(before, model, "after undo")
        try:
            with self._apply(eraser, model):
                raise KeyError("body")
        except KeyError:
            pass
        self._same(before, model, "after a body that raised")
        self._require(torch.equal(self.outputs(model), plain), "undo does not restore the outputs")

    def _check_twice(self) -> None:
        """A second application, of the eraser or of a copy, is refused while the first is in force."""
        eraser, model = self._fitted()
        with self._apply(eraser, model):
            for one in (eraser, eraser.to(dtype=torch.float64)):
                self._refuses(EditError, "applied twice", lambda one=one: one.apply(model))  # type: ignore[misc]

    def _check_commit(self) -> None:
        """Committed, it stays, and a second application changes nothing; one of hooks refuses."""
        eraser, model = self._fitted()
        edit = self._apply(eraser, model)
        if self.hooks:
            self._refuses(EditError, "commit of hooks", edit.commit)
            edit.undo()
            return
        edit.commit()
        once = self.outputs(model)
        with self._apply(eraser, model):
            self._require(torch.equal(self.outputs(model), once), "twice is not once")

    def _check_save_load(self, folder: Path) -> None:
        """Saved and loaded, by its class and by the base class, it makes the same edit bit for bit."""
        eraser, model = self._fitted()
        with self._apply(eraser, model):
            want = self.outputs(model)
        eraser.save_pretrained(folder / "eraser")
        for loader in (type(eraser), Eraser):
            again = cast("ModelEraser", loader.from_pretrained(folder / "eraser"))
            self._require(type(again) is type(eraser), f"loaded as {type(again).__name__}")
            self._require(again.digest == eraser.digest, "the digest changed on disk")
            self._require(again.config == eraser.config, "the config changed on disk")
            with self._apply(again, model):
                self._require(torch.equal(self.outputs(model), want), "loaded, it edits otherwise")
        self._require(self.method.name in eraser.card(), "the card does not name the method")

    def _check_copy(self) -> None:
        """A copy in another dtype keeps its type, and makes the same edit but for rounding."""
        eraser, model = self._fitted()
        copy = eraser.to("cpu", torch.float64)
        self._require(type(copy) is type(eraser), "`to` lost the type")
        with self._apply(eraser, model):
            want = self.outputs(model)
        with self._apply(copy, model):
            gap = float((self.outputs(model) - want).abs().max() / want.abs().max())
        self._require(gap < 1e-4, f"a float64 copy is off by {gap:.1e}")

    def _check_deterministic(self) -> None:
        """Two fits with one seed give the same eraser."""
        one, two = self.fit(self.model(), 0), self.fit(self.model(), 0)
        self._require(one.digest == two.digest, "two fits with one seed differ")

    def _check_half_precision(self) -> None:
        """A bfloat16 model is fitted, edited and restored; only what is named changes."""
        model = self.model().to(torch.bfloat16)
        eraser = self.fit(model, 0)
        floats = [value for value in eraser.tensors().values() if value.is_floating_point()]
        self._require(all(bool(x.isfinite().all()) for x in floats), "a tensor is not finite")
        before = _snapshot(model)
        with self._apply(eraser, model) as edit:
            for name, value in model.state_dict().items():
                same = torch.equal(value, cast("Tensor", before[name]))
                self._require(same or name in edit.targets, f"{name} changed without being named")
        self._same(before, model, "after undo in bfloat16")

    def _check_another_model(self) -> None:
        """Another model is refused."""
        eraser, _ = self._fitted()
        other = self.other()
        self._refuses(SpaceError, "another model", lambda: eraser.apply(other))

    def _check_options(self) -> None:
        """Options of `fit` are spelled out."""
        fit = cast("Callable[..., object]", getattr(type(self._fitted()[0]), "fit"))  # noqa: B009 not on the base
        kinds = {one.kind for one in inspect.signature(fit).parameters.values()}
        self._require(inspect.Parameter.VAR_KEYWORD not in kinds, "fit takes **options")


def _snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that a fit or an undone edit has to leave as it was."""
    made: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, one in model.named_parameters(remove_duplicate=False):
        made[f"{name} (parameter)"] = (one.requires_grad, one.grad is None, id(one))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        made[f"{name} (module)"] = (module.training, hooks)
    return made
