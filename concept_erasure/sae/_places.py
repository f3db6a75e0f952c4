"""Where in a model a dictionary sits: its site, and the norm that may lie behind it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from concept_erasure.collect import Reached, accepted, evaluating
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.sites import Site, hook, resolve

__all__ = ["named_site", "one_site", "post_norm"]


@torch.no_grad()
def post_norm(model: nn.Module, site: str) -> tuple[str, Tensor] | None:
    """Return the path and the gain ``(d,)`` of the norm that follows an MLP or attention; None where none does.

    Found by running the model on two tokens: it is the norm beside the module that is handed the very tensor the
    module puts out. Its gain is what it makes of a vector of ones, whose root mean square is 1.

    Args:
        model: The model, left as it is.
        site: Name of a site.

    Raises:
        SiteNotFoundError: If the model has no such site.
    """
    place = one_site(model, site)
    made: list[Tensor] = []
    found: list[str] = []
    handles = [hook(model, place, made.append)]
    for path, module in model.named_modules():
        beside = path.rpartition(".")[0] == place.module.rpartition(".")[0]
        if beside and "norm" in type(module).__name__.lower():

            def reads(_: nn.Module, args: tuple[object, ...], name: str = path) -> None:
                if made and args and args[0] is made[-1]:
                    found.append(name)
                    raise Reached

            handles.append(module.register_forward_pre_hook(reads))
    parameter = next(model.parameters())
    ids = torch.zeros(1, 2, dtype=torch.int64, device=parameter.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with evaluating(model):
            model(**accepted(model, inputs))
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not found or made[-1].ndim != 3:
        return None
    norm = model.get_submodule(found[0])
    ones = torch.ones(1, 1, made[-1].shape[-1], device=made[-1].device)
    return found[0], cast("Tensor", norm(ones))[0, 0].float()


def named_site(model: nn.Module, key: str | int, own: str) -> Site:
    """Return the site of a dictionary that is given under a key, and may say its site itself.

    Args:
        model: The model.
        key: Name of a site, or number of a layer; a layer is that of its MLP where the dictionary says nothing.
        own: Site that the dictionary says, or nothing.

    Raises:
        ValueError: If the two disagree.
        SiteNotFoundError: If the model has no such site.
    """
    if not own:
        return one_site(model, f"mlp.{key}" if isinstance(key, int) else key)
    site = one_site(model, own)
    if isinstance(key, int):
        layer = site.name.rpartition(".")[2]  # a module path has none to compare
        same = layer == str(key) or not layer.isdigit()
    else:
        same = one_site(model, key).name == site.name
    if not same:
        raise ValueError(f"the dictionary given for {key!r} says that it sits at {site.name!r}")
    return site


def one_site(model: nn.Module, site: str) -> Site:
    """Return the one site that a name stands for.

    Raises:
        SiteNotFoundError: If it names none, or several.
    """
    if not site:
        raise SiteNotFoundError("this dictionary does not say its site; pass site='mlp.9' or such")
    places = resolve(model, site)
    if len(places) != 1:
        raise SiteNotFoundError(f"{site!r} must name one site; it names {len(places)}")
    return places[0]
