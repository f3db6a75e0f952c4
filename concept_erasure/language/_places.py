"""Which modules and parameters of a model are trained, and which models are refused."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from concept_erasure.errors import EditError, SiteNotFoundError
from concept_erasure.patches import check_writable
from concept_erasure.sites import _blocks, _is_linear

__all__ = ["MODULES", "check_bare", "check_frozen", "check_raw", "linear_paths", "matching"]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUTERS = ("gate", "router")  # of mixtures of experts: which expert, not what it says
WRAPPERS = frozenset(
    {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
)


def check_bare(model: nn.Module) -> None:
    """Raise EditError if something is wrapped around a model, or an adapter is in it."""
    if wrapped := {type(module).__name__ for module in model.modules()} & WRAPPERS:
        raise EditError(
            f"the model is wrapped ({', '.join(sorted(wrapped))}); give the model itself: the loop sums gradients "
            "over processes. One too large for a device: shard it with FSDP2 (fully_shard) and train a Lora"
        )
    if hasattr(model, "peft_config"):
        raise EditError(
            "the model has adapters in it: merge them (merge_and_unload) or take them out (unload) first"
        )


def linear_paths(
    model: nn.Module, layers: tuple[int, ...] | None, modules: tuple[str, ...]
) -> list[str]:
    """Return the modules a LoRA goes beside, in the order of the model."""
    prefix = _blocks(model)
    blocks = cast("nn.ModuleList", model.get_submodule(prefix))
    chosen_layers = range(len(blocks)) if layers is None else layers
    if outside := [i for i in chosen_layers if not 0 <= i < len(blocks)]:
        raise SiteNotFoundError(
            f"the model has layers 0..{len(blocks) - 1}; lora.layers has {outside}"
        )
    chosen: list[str] = []
    there: dict[str, None] = {}
    for i in sorted(set(chosen_layers)):
        for path, module in blocks[i].named_modules():
            leaf = path.rpartition(".")[2]
            if not _is_linear(module) or leaf in ROUTERS:
                continue
            there[leaf] = None
            if modules == MODULES or leaf in modules:
                chosen.append(f"{prefix}.{i}.{path}")
    missing = [name for name in modules if name not in there]
    if modules != MODULES and missing:
        raise SiteNotFoundError(
            f"no linear module of the blocks is called {', '.join(missing)}; "
            f"lora.modules can name {', '.join(there) or 'none: the blocks have no linear modules'}"
        )
    if not chosen:
        raise SiteNotFoundError(f"the blocks at {prefix!r} have no linear modules")
    return chosen


def check_frozen(path: str, module: nn.Module) -> None:
    """Raise EditError unless a weight can be read and, later, changed."""
    weight = cast("Any", module).weight
    kind = type(weight).__name__
    if (
        not weight.is_floating_point()
        or weight.element_size() < 2
        or kind in {"Params4bit", "Int8Params"}
    ):
        raise EditError(
            f"{path!r} is quantised ({kind}, {weight.dtype}): the edit could not be applied to it; load the model "
            "in bfloat16 or float32"
        )
    if weight.is_meta or weight.numel() == 0:
        where = "off-loaded (meta device)" if weight.is_meta else "empty here (sharded?)"
        raise EditError(f"{path!r} is {where}; load it whole, or shard it with FSDP2 (fully_shard)")


def check_raw(model: nn.Module, name: str) -> nn.Parameter:
    parameter = check_writable(model, name)
    if parameter.element_size() < 2:
        raise EditError(
            f"{name!r} is quantised ({parameter.dtype}); load the model in bfloat16 or float32"
        )
    return parameter


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the parameters that match, in the order of the model."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:6]) + (f" … ({len(names)} in all)" if len(names) > 6 else "")
            raise SiteNotFoundError(f"no parameter is called {pattern!r}; there are {some}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
