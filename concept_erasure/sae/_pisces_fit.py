"""From a model, dictionaries and features to the layers that PISCES edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from concept_erasure.collect import accepted, encode_batch, evaluating
from concept_erasure.edit import check_writable
from concept_erasure.errors import ErasureWarning, SiteNotFoundError
from concept_erasure.sae._pisces_edit import Change, Layer, read_layer, value_weight
from concept_erasure.sae._places import named_site, one_site
from concept_erasure.sae.disentangler import Disentangler, by_site
from concept_erasure.sites import find_sites, hook

__all__ = [
    "Place", "dictionaries", "grouped", "layers_of", "mean_rms_ratio", "protected", "value_signs",
]  # fmt: skip

MOST_TEXTS = 1000  # of which signs are counted, as published
Place = tuple[str, int]  # a site and a latent


class Selected(Protocol):
    """A latent with a direction; `concept_erasure.sae.search.Feature` is one."""

    @property
    def site(self) -> str:
        """Name of its site."""
        ...

    @property
    def index(self) -> int:
        """Number of the latent."""
        ...

    @property
    def direction(self) -> int:
        """+1 if it writes the concept, -1 if it writes against it."""
        ...


def dictionaries(
    model: nn.Module,
    given: Disentangler | Mapping[str, Disentangler] | Mapping[int, Disentangler],
) -> dict[str, Disentangler]:
    """Return dictionaries by the name of their site, with post-norm gains filled in.

    Args:
        model: The model.
        given: One, or several by layer or site.

    Raises:
        ValueError: If there is none, or one does not sit at an MLP, or elsewhere than its key says.
        SiteNotFoundError: If the model has no such site.
    """
    made = by_site(model, given)
    for name in made:
        kind = one_site(model, name).kind
        if kind != "mlp":
            raise ValueError(
                f"a dictionary sits at {name!r}, a {kind}; value vectors write at an MLP's output, such as 'mlp.9' "
                "(for one of neurons see LatentProjectionEraser)"
            )
    return made


def grouped(
    model: nn.Module, features: Sequence[Selected], known: Mapping[str, Disentangler]
) -> dict[str, dict[int, int]]:
    """Return latent to direction for each site, in the order of the model.

    Raises:
        ValueError: If there is no feature, one has no dictionary, or one is there twice with both directions.
    """
    made: dict[str, dict[int, int]] = {}
    for one in features:
        site = one_site(model, one.site).name
        if site not in known:
            raise ValueError(
                f"latent {one.index} is of {site!r}, where there is no dictionary; there are {', '.join(known)}"
            )
        if not 0 <= one.index < known[site].n:
            raise ValueError(f"latent {one.index} is not in the {known[site].n} of {site!r}")
        if one.direction not in (1, -1):
            raise ValueError(f"a direction is +1 (writes the concept) or -1; got {one.direction}")
        if made.setdefault(site, {}).setdefault(one.index, one.direction) != one.direction:
            raise ValueError(f"latent {one.index} of {site!r} is given with both directions")
    if not made:
        raise ValueError(
            "no latent is given, and none found: there is nothing to edit. A small or short-trained dictionary has "
            "none for most concepts; see the report of find_features, or use ce.sae.semi_nmf on the concept's texts"
        )
    return {site: made[site] for site in known if site in made}


def protected(
    model: nn.Module,
    given: Mapping[str, Sequence[int]] | Mapping[int, Sequence[int]] | Sequence[Selected],
    known: Mapping[str, Disentangler],
) -> dict[str, list[int]]:
    """Return the latents to protect by the name of their site, each once.

    Raises:
        ValueError: If one has no dictionary, or its dictionary no such latent.
        SiteNotFoundError: If the model has no such site.
    """
    if isinstance(given, Mapping):
        pairs = [(key, int(i)) for key, rows in given.items() for i in rows]
    else:
        pairs = [(one.site, one.index) for one in given]
    made: dict[str, list[int]] = {}
    for key, index in pairs:
        site = named_site(model, key, "").name
        if site not in known:
            raise ValueError(
                f"latent {index} of {site!r} cannot be protected, as there is no dictionary there; there are "
                f"{', '.join(known)}"
            )
        if not 0 <= index < known[site].n:
            raise ValueError(f"latent {index} is not in the {known[site].n} of {site!r}")
        if index not in made.setdefault(site, []):
            made[site].append(index)
    return made


def down_projection(model: nn.Module, site: str) -> str:
    """Return the path of the down projection of an MLP site, such as ``"mlp.9"``.

    Raises:
        SiteNotFoundError: If the model has none there.
    """
    number = site.rpartition(".")[2]
    found = find_sites(model).get(f"value.{number}")
    if found is None:
        raise SiteNotFoundError(f"the model has no single down projection at {site!r}")
    return found.module


def layers_of(
    model: nn.Module,
    known: Mapping[str, Disentangler],
    chosen: Mapping[str, Mapping[int, int]],
    *,
    neurons: Mapping[str, Tensor] | None,
    protect: Mapping[str, Sequence[int]],
    post_norm: bool,
    ridge: float,
    depth: Callable[[float], float] | None,
) -> list[Layer]:
    """Read the value vectors of every site through its dictionary, see `read_layer`."""
    count = sum(name.startswith("residual.") for name in find_sites(model))
    made = []
    for site, latents in chosen.items():
        down = down_projection(model, site)
        check_writable(model, f"{down}.weight")
        relative = int(site.rpartition(".")[2]) / max(1, count - 1)
        if neurons is not None and site not in neurons:
            raise ValueError(f"there are no signs for {site!r}; there are {', '.join(neurons)}")
        kept = protect.get(site, ())
        if both := sorted(set(kept) & set(latents)):
            raise ValueError(f"latent {both[0]} of {site!r} is to be edited and protected")
        weight = value_weight(model.get_submodule(down))
        made.append(
            read_layer(
                known[site],
                weight,
                torch.tensor(list(latents), device=weight.device),
                torch.tensor(list(latents.values()), device=weight.device),
                site=site,
                down=down,
                neurons=None if neurons is None else neurons[site],
                protect=torch.tensor(list(kept), dtype=torch.int64) if kept else None,
                post_norm=post_norm,
                ridge=ridge,
                depth=1.0 if depth is None else depth(relative),
            )
        )
    return made


def value_signs(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    sites: Sequence[str],
    tokens: Sequence[int],
    *,
    max_length: int = 128,
    batch_size: int = 16,
) -> tuple[dict[str, Tensor], int]:
    """Return the majority sign of every neuron where a text says the concept, and at how many places that is.

    Gated activations are products and often negative; without their sign half of the edits of such neurons push the
    concept up. Sums of signs are kept, not activations.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Of the concept; the first thousand are read.
        sites: Names of MLP sites.
        tokens: Ids that say the concept. If none occurs, all places but the first of a text count, with a warning.
        max_length: Tokens of a text.
        batch_size: Texts a forward pass.

    Returns:
        By site, in {-1, 0, 1}, shape ``(m,)``; 0 is a tie, or a neuron never seen.
    """
    wanted = torch.tensor(list(tokens))
    rows = list(texts)[:MOST_TEXTS]
    places = find_sites(model)
    values = {site: places[f"value.{site.rpartition('.')[2]}"] for site in sites}
    sums: dict[str, dict[str, Tensor]] = {"said": {}, "all": {}}
    counts = {"said": 0, "all": 0}
    masks: dict[str, Tensor] = {}

    def adder(site: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            signs = x.sign().float()
            for kind, mask in masks.items():
                total = (signs * mask.to(x.device)[..., None]).sum((0, 1))
                held = sums[kind].get(site)
                sums[kind][site] = total if held is None else held + total

        return add

    with ExitStack() as stack:
        for site, place in values.items():
            stack.callback(hook(model, place, adder(site)).remove)
        stack.enter_context(evaluating(model))
        for start in range(0, len(rows), batch_size):
            batch = encode_batch(
                model, tokenizer, rows[start : start + batch_size], start, max_length
            )
            real = batch["attention_mask"].bool()
            real[:, 0] = False
            ids = batch["input_ids"]
            masks["all"], masks["said"] = real, real & torch.isin(ids, wanted.to(ids.device))
            for kind, mask in masks.items():
                counts[kind] += int(mask.sum())
            model(**accepted(model, batch))
    kind = "said" if counts["said"] else "all"
    if kind == "all":
        warnings.warn(
            f"no text says the concept, so the signs of neurons are those of all {counts['all']} places of its texts",
            ErasureWarning,
            stacklevel=3,
        )
    return {site: sums[kind][site].sign() for site in sites}, counts[kind]


def mean_rms_ratio(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    edits: Mapping[str, tuple[Tensor, Tensor]],
    *,
    max_length: int = 128,
    batch_size: int = 16,
) -> dict[str, float]:
    """Return the mean of ``rms(u) / rms(u')`` over tokens, u an MLP's output before a norm and u' the edited one's.

    Behind the norm everything but the edit shrinks by it. Each layer is measured with the others unedited.

    Args:
        model: The model without the edit.
        tokenizer: Its tokenizer.
        texts: Of the concept.
        edits: Site to columns ``(c,)`` and what is added to them ``(c, d)``.
        max_length: Tokens of a text.
        batch_size: Texts a forward pass.
    """
    places = find_sites(model)
    mask = torch.empty(0)
    more: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0

    def reader(site: str) -> Callable[[Tensor], None]:
        columns, change = edits[site]

        def read(a: Tensor) -> None:
            more[site] = a[..., columns.to(a.device)].float() @ change.to(a.device).float()

        return read

    def comparer(site: str) -> Callable[[Tensor], None]:
        def compare(u: Tensor) -> None:
            u = u.float()
            ratio = u.norm(dim=-1) / (u + more.pop(site)).norm(dim=-1)
            total = (ratio * mask.to(u.device)).sum()
            sums[site] = sums[site] + total if site in sums else total

        return compare

    with ExitStack() as stack:
        for site in edits:
            value = places[f"value.{site.rpartition('.')[2]}"]
            stack.callback(hook(model, value, reader(site)).remove)
            stack.callback(hook(model, places[site], comparer(site)).remove)
        stack.enter_context(evaluating(model))
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = encode_batch(model, tokenizer, part, start, max_length)
            mask = batch["attention_mask"].clone()
            mask[:, 0] = 0
            count += int(mask.sum())
            model(**accepted(model, batch))
    return {site: float(total) / max(1, count) for site, total in sums.items()}


def added(layer: Layer, change: Change) -> Tensor:
    """Return what is added to the edited columns, shape ``(c, d)``."""
    return change.coefficients @ layer.writes
