"""What is trained: a LoRA beside linear modules, or some of a model's own parameters.

Masters are float32 and lie outside the model; hooks bring them in. Switched off, the model is its own reference,
so that no second copy is needed.

The LoRA is peft's (the tests compare gradients) and is written in its format, but its layers are not put into the
model: they replace modules, so that sites, names and the fingerprint are others while it trains, an interrupt can
leave some behind, and starting them draws from the global generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from concept_erasure.errors import EditError
from concept_erasure.language._places import (
    MODULES,
    check_bare,
    check_frozen,
    check_raw,
    linear_paths,
    matching,
)
from concept_erasure.sites import _features

__all__ = [
    "LEFT",
    "RIGHT",
    "Lora",
    "LoraParameterisation",
    "Parameterisation",
    "Raw",
    "RawParameterisation",
    "trainable",
]

LEFT, RIGHT = ".lora_left", ".lora_right"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank update ``s B A`` of linear modules, ``s = alpha / rank``.

    Attributes:
        rank: Columns of B.
        alpha: See above.
        dropout: Of the input of A, while training.
        layers: Numbers of the blocks; None is all, or a method's own rule.
        modules: Last names of the modules in a block. The default stands for every linear module of attention
            and MLP, whatever an architecture calls them.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        for name in ("layers", "modules"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
                if isinstance(value, str) or not value:
                    raise ValueError(f"{name} must be a non-empty tuple; got {value!r}")

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Some parameters of the model itself.

    Attributes:
        patterns: Names or ``fnmatch`` patterns, such as ``"model.layers.[5-7].mlp.down_proj.weight"``.
    """

    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not self.patterns:
            raise ValueError(f"patterns must be a non-empty tuple; got {self.patterns!r}")
        object.__setattr__(self, "patterns", tuple(self.patterns))


class Parameterisation(ABC):
    """A model with parameters to train, as a context manager; made by `trainable`.

    Inside, every parameter of the model is frozen and every module in evaluation mode, so that the trained
    model starts as exactly the original. On exit all is as it was before, whatever happened.

    Attributes:
        model: The model.
        spec: What is trained.
        dropping: Whether dropout is on; the training loop turns it on for its own steps.
    """

    spec: Lora | Raw

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dropping = False
        self._on = False
        self._entered = False
        self._handles: list[RemovableHandle] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def active(self) -> bool:
        """Whether it is entered, and not the reference but the trained model is shown."""
        return self._on

    @property
    @abstractmethod
    def named(self) -> dict[str, nn.Parameter]:
        """The float32 masters by name."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the float32 masters."""
        return list(self.named.values())

    @abstractmethod
    def squared_distance(self) -> Tensor:
        """Return ``||theta - theta_0||^2`` of the weights in effect, a scalar that has a gradient."""

    @abstractmethod
    def pull(self, step: float) -> None:
        """Move towards the start, ``theta <- theta - step (theta - theta_0)``."""

    @abstractmethod
    def spectral_norms(self) -> dict[str, float]:
        """Return the largest singular value of each matrix's change, by the name of the parameter."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return copies of what an eraser keeps; see the subclasses."""

    def state(self) -> dict[str, Tensor]:
        """Return copies of the masters by name, to resume from."""
        return {name: p.detach().cpu().clone() for name, p in self.named.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Write the masters.

        Raises:
            ValueError: If names or shapes differ.
        """
        shapes = {name: tuple(p.shape) for name, p in self.named.items()}
        if (got := {name: tuple(value.shape) for name, value in state.items()}) != shapes:
            raise ValueError(f"the state is of other parameters: it has {got}, needed are {shapes}")
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state[name])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Show the model as it was, bit by bit."""
        before = self._on
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    @abstractmethod
    def _attach(self) -> None:
        """Register the hooks."""

    def _switch(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> Self:
        if self._entered:
            raise EditError("a parameterisation can be entered once; make a new one")
        self._entered = True
        self._flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self._modes = [(m, m.training) for m in self.model.modules()]
        try:
            self.model.requires_grad_(False)
            self.model.eval()
            self._attach()
            self._switch(True)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._switch(False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode


class LoraParameterisation(Parameterisation):
    """``W + s B A`` of linear modules; B starts at zero, A as peft's does.

    Args:
        model: The model.
        spec: What to train.
        seed: Of A.
    """

    def __init__(self, model: nn.Module, spec: Lora, *, seed: int) -> None:
        super().__init__(model)
        self.spec: Lora = spec
        self.scale: float = spec.scale
        generator = torch.Generator().manual_seed(seed)
        self._down: dict[str, nn.Parameter] = {}
        self._up: dict[str, nn.Parameter] = {}
        for path in linear_paths(model, spec.layers, spec.modules):
            module = model.get_submodule(path)
            check_frozen(path, module)
            inner, outer = _features(module)
            # uniform in +-1/sqrt(in): the start of a linear module of torch, as in peft
            start = torch.empty(spec.rank, inner).uniform_(-1, 1, generator=generator)
            device = cast("Tensor", module.weight).device
            self._down[path] = nn.Parameter((start / math.sqrt(inner)).to(device))
            self._up[path] = nn.Parameter(torch.zeros(outer, spec.rank, device=device))

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules."""
        return tuple(self._down)

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The masters, A and B of each module."""
        pairs = (
            (f"{path}.lora_{key}.weight", part[path])
            for path in self._down
            for key, part in (("A", self._down), ("B", self._up))
        )
        return dict(pairs)

    def _attach(self) -> None:
        for path in self._down:
            module = self.model.get_submodule(path)
            down, up = self._down[path], self._up[path]

            def after(
                _: nn.Module,
                args: tuple[Tensor, ...],
                out: Tensor,
                down: Tensor = down,
                up: Tensor = up,
            ) -> Tensor | None:
                if not self._on:
                    return None
                x = args[0].to(down.dtype)
                if self.dropping and self.spec.dropout:
                    x = functional.dropout(x, self.spec.dropout)
                more = functional.linear(functional.linear(x, down), up) * self.scale
                return (out + more).to(out.dtype)

            self._handles.append(module.register_forward_hook(after))

    def squared_distance(self) -> Tensor:
        """Return ``sum s^2 tr((B^T B)(A A^T))``, the squared Frobenius norm of all updates."""
        total = [((u.T @ u) * (d @ d.T)).sum() for d, u in self._pairs()]
        device = total[0].device
        return self.scale**2 * torch.stack([one.to(device) for one in total]).sum()

    def pull(self, step: float) -> None:
        """Shrink B, and with it the update, by the factor ``1 - step``."""
        with torch.no_grad():
            for up in self._up.values():
                up.mul_(1 - step)

    def spectral_norms(self) -> dict[str, float]:
        """Return ``s ||R_B R_A^T||_2`` from two thin QR decompositions, by the name of the weight."""
        made: dict[str, float] = {}
        with torch.no_grad():
            for path, (down, up) in zip(self.paths, self._pairs(), strict=True):
                r_up, r_down = (torch.linalg.qr(f.double())[1] for f in (up, down.T))
                norm = torch.linalg.matrix_norm(r_up @ r_down.T, ord=2)
                made[f"{path}.weight"] = self.scale * float(norm)
        return made

    def weights(self) -> dict[str, Tensor]:
        """Return ``s B``, shape ``(out, r)``, and ``A^T``, shape ``(in, r)``, of every module."""
        made: dict[str, Tensor] = {}
        for path, (down, up) in zip(self.paths, self._pairs(), strict=True):
            made[path + LEFT] = (up.detach() * self.scale).clone()
            made[path + RIGHT] = down.detach().T.contiguous().clone()
        return made

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self._down.values(), self._up.values(), strict=True)


class RawParameterisation(Parameterisation):
    """Parameters of the model, trained through float32 masters that are cast to their type on the way in.

    So the model that is trained is bit by bit the one an applied eraser makes, in whatever precision.

    Args:
        model: The model.
        spec: What to train.
    """

    def __init__(self, model: nn.Module, spec: Raw) -> None:
        super().__init__(model)
        self.spec: Raw = spec
        self._originals: dict[str, nn.Parameter] = {
            name: check_raw(model, name) for name in matching(model, spec.patterns)
        }
        self._masters = {
            name: nn.Parameter(value.detach().clone().float())
            for name, value in self._originals.items()
        }

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The masters."""
        return dict(self._masters)

    def _attach(self) -> None:
        for name in self._masters:
            path, _, leaf = name.rpartition(".")

            def before(module: nn.Module, _: object, name: str = name, leaf: str = leaf) -> None:
                self._show(module, name, leaf)

            handle = self.model.get_submodule(path).register_forward_pre_hook(before)
            self._handles.append(handle)

    def _show(self, module: nn.Module, name: str, leaf: str) -> None:
        original = self._originals[name]
        shown = self._masters[name].to(original.dtype) if self._on else original
        module._parameters[leaf] = cast("nn.Parameter", shown)

    def _switch(self, on: bool) -> None:
        super()._switch(on)
        for name in self._masters:
            path, _, leaf = name.rpartition(".")
            self._show(self.model.get_submodule(path), name, leaf)

    def _changes(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            yield name, master - self._originals[name].detach().float()

    def squared_distance(self) -> Tensor:
        """Return ``||theta - theta_0||^2``."""
        total = [change.square().sum() for _, change in self._changes()]
        return torch.stack([one.to(total[0].device) for one in total]).sum()

    def pull(self, step: float) -> None:
        """Move by that share of the way back."""
        with torch.no_grad():
            for name, change in self._changes():
                self._masters[name].sub_(change, alpha=step)

    def spectral_norms(self) -> dict[str, float]:
        """Return the norms of the matrices; vectors have none, stacked matrices the largest of theirs."""
        with torch.no_grad():
            return {
                name: float(torch.linalg.matrix_norm(change.double(), ord=2).max())
                for name, change in self._changes()
                if change.ndim > 1
            }

    def weights(self) -> dict[str, Tensor]:
        """Return the new values by the names of the parameters, in their own types."""
        return {
            name: master.detach().to(self._originals[name].dtype).clone()
            for name, master in self._masters.items()
        }


def trainable(model: nn.Module, spec: Lora | Raw, *, seed: int) -> Parameterisation:
    """Return the parameters to train; nothing is changed before it is entered.

    Args:
        model: A language model, or for `Raw` any module.
        spec: What to train.
        seed: Of the random start of a LoRA.

    Raises:
        SiteNotFoundError: If nothing matches; the message lists what there is.
        EditError: If a weight is quantised, off-loaded or, for `Raw`, sharded or tied to another, there is an
            adapter in the model, or something is wrapped around it.
    """
    check_bare(model)
    if isinstance(spec, Lora):
        return LoraParameterisation(model, spec, seed=seed)
    if isinstance(spec, Raw):
        return RawParameterisation(model, spec)
    raise TypeError(f"spec must be a Lora or a Raw; got {type(spec).__name__}")
