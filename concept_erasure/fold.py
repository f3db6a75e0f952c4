"""Folding a map into the weights beside a site: ``W <- W P`` where it is read, ``W <- P W`` where it is written.

Patches are computed when they are applied, from the weights as they then are, one wide copy at a time; two
folds on one module add up. Undo is bit-exact, and ``W - (W L) R^T`` cannot be taken back exactly by adding,
so the original weight is kept although the change has low rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from concept_erasure.errors import EditError
from concept_erasure.linalg import LowRankAffine, statistics_dtype
from concept_erasure.patches import BiasPatch, DensePatch, Patch, check_writable
from concept_erasure.sites import Site, as_out_in

__all__ = ["Bias", "fold_patches"]

Bias = Literal["auto", "add", "refuse"]


def fold_patches(
    model: nn.Module, sites: Sequence[Site], function: LowRankAffine, *, bias: Bias
) -> list[Patch]:
    """Return the patches that fold a map into the weights beside sites.

    Args:
        model: The model; not changed.
        sites: Where.
        function: The map, of the sites' width.
        bias: What to do where its offset needs a bias that a module lacks: ``"auto"`` adds one if the
            architecture's configuration can, so that saving and loading keeps it, and refuses otherwise;
            ``"add"`` does the same and, where the configuration cannot, adds it in memory; ``"refuse"`` adds none.

    Raises:
        EditError: If no linear module is the only writer, or the only readers, of an activation, a weight cannot
            be changed, or a bias is missing and must not be added.
    """
    folds: list[tuple[str, bool]] = []
    for site in sites:
        if site.writer is None and not site.readers:
            raise EditError(
                f"folding at {site.name!r} would not be exact: its activation is also used elsewhere, or "
                "dropout is active (call model.eval()); use attach()"
            )
        writing = site.writer is not None
        folds += [(path, writing) for path in ((site.writer,) if site.writer else site.readers)]
    for path, _ in folds:
        check_writable(model, f"{path}.weight")
    patches: list[Patch] = []
    if function.center is not None:
        patches += _bias_patches(model, dict.fromkeys(path for path, _ in folds), bias)
    for path, writing in folds:
        had = getattr(model.get_submodule(path), "bias", None) is not None
        if had:
            check_writable(model, f"{path}.bias")
        if function.center is not None or (had and writing):
            # before the weight: what a reader adds is made with its old weight
            patches.append(
                DensePatch(
                    f"{path}.bias", partial(_bias, path=path, function=function, writing=writing)
                )
            )
        patches.append(
            DensePatch(
                f"{path}.weight", partial(_weight, path=path, function=function, writing=writing)
            )
        )
    return patches


def _wide(model: nn.Module, path: str) -> Tensor:
    """Return the weight ``(out, in)`` in the widest dtype of its device."""
    weight = check_writable(model, f"{path}.weight").detach()
    weight = weight.to(statistics_dtype(weight.device))
    return as_out_in(model.get_submodule(path), weight)


def _weight(model: nn.Module, *, path: str, function: LowRankAffine, writing: bool) -> Tensor:
    weight = _wide(model, path)
    wide = LowRankAffine(function.left, function.right).to(weight.device, weight.dtype)
    folded, _ = (wide.fold_writing if writing else wide.fold_reading)(weight, None)
    return as_out_in(model.get_submodule(path), folded)


def _bias(model: nn.Module, *, path: str, function: LowRankAffine, writing: bool) -> Tensor:
    bias = check_writable(model, f"{path}.bias").detach()
    wide = function.to(bias.device, statistics_dtype(bias.device))
    bias = bias.to(wide.left.dtype)
    if writing:
        return bias - wide.left @ (wide.right.T @ bias) + wide.offset
    return bias + _wide(model, path) @ wide.offset


def _bias_patches(model: nn.Module, paths: Iterable[str], bias: Bias) -> list[Patch]:
    """Return the patches that give biases, zeros, to those of the modules that have none."""
    missing, lost = [], []
    for path in paths:
        module = model.get_submodule(path)
        held = getattr(module, "bias", None)
        if held is None:
            missing.append(path)
            if bias == "refuse" or not isinstance(module, nn.Linear):
                raise _no_bias(path, "it has no bias")
        elif getattr(held, "in_memory_only", False):
            lost.append(path)
    patches: list[Patch] = []
    for name, covered in _switches(model) if missing else ():
        if chosen := [path for path in missing if path in covered]:
            patches.append(BiasPatch(dict.fromkeys(covered), {name: True}))
            missing = [path for path in missing if path not in chosen]
        if not missing:
            break
    if bias != "add" and (lost or missing):
        raise _no_bias(
            (lost or missing)[0],
            f"{type(model).__name__} has no bias there, so saving and loading would drop it",
        )
    if missing:
        patches.append(BiasPatch(dict.fromkeys(missing)))
    return patches


def _no_bias(path: str, why: str) -> EditError:
    return EditError(
        f"{path!r} cannot hold the eraser's offset: {why}. Fit with affine=False, use attach(), or "
        "apply(bias='add') to add it in memory, where it works but is lost on save and reload"
    )


def _switches(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield settings of the configuration that create biases, and the modules each covers."""
    config = getattr(model, "config", None)
    for prefix, part in (("", config), ("text_config.", getattr(config, "text_config", None))):
        for name, value in list(getattr(part, "__dict__", {}).items()):
            if value is False and "bias" in name and not name.startswith("_"):
                covered = _covered(model, f"{prefix}{name}")
                if covered:
                    yield f"{prefix}{name}", covered


def _covered(model: nn.Module, name: str) -> tuple[str, ...]:
    """Return the linear modules that get a bias when a setting is on, if nothing else changes by it.

    The model's own code is asked: it is built without memory (meta device) from the changed configuration.
    """
    config = copy.deepcopy(model.config)
    *path, leaf = name.split(".")
    holder: object = config
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, leaf, True)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(model)(config)
    except Exception:  # noqa: BLE001 whatever it is, such a model cannot be built from a configuration
        return ()
    now = {key: value.shape for key, value in model.state_dict().items()}
    then = {key: value.shape for key, value in twin.state_dict().items()}
    new = [key for key in then if key not in now]
    known = now.keys() <= then.keys() and all(then[key] == shape for key, shape in now.items())
    modules = [key.removesuffix(".bias") for key in new]
    if not known or not all(
        key.endswith(".bias") and isinstance(model.get_submodule(path), nn.Linear)
        for key, path in zip(new, modules, strict=True)
    ):
        return ()
    return tuple(modules)
