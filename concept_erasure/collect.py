"""Representations of texts at the sites of a model: all at once, or streamed batch by batch.

The model is left bit-identical: hooks and evaluation mode last for one batch and end in `finally`,
so that nothing remains even when a stream is left half-way. Texts are padded on the right while
the tokenizer is used (positions then do not depend on the batch) and its own settings put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from concept_erasure.edit import base_fingerprint
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.labels import encode_labels
from concept_erasure.sites import Site, Space, hook, model_id, resolve

__all__ = ["Fitter", "Representations", "Tokens", "collect", "fit_streaming", "select", "stream"]

Tokens = Literal["last", "first", "mean", "all"]
_TOKENS = ("last", "first", "mean", "all")
Progress = Callable[[int, int], None]


class Fitter(Protocol):
    """Anything with `update(x, z)`."""

    def update(self, x: Tensor, z: Tensor) -> object:
        """Take one batch: x (n, d), z (n,) or (n, c)."""
        ...


F = TypeVar("F", bound=Fitter)


@dataclass(frozen=True, eq=False, repr=False)
class Representations:
    """Vectors at one site, their labels, and where they come from.

    Attributes:
        x: (n, d).
        z: n labels, in the form they were given; `None` without labels.
        space: model, site and token rule; `None` for bare vectors.
        rows: (n,) index of the text behind each vector; `None` when vector i is text i.
    """

    x: Tensor
    z: Sized | None = None
    space: Space | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2:
            raise ShapeError(f"x must be (n, d); got shape {tuple(self.x.shape)}")
        for name, value in (("z", self.z), ("rows", self.rows)):
            if value is not None and len(value) != len(self.x):
                raise ShapeError(f"{len(self.x)} vectors but {len(value)} {name}")
        if self.space is not None and self.space.width != self.x.shape[1]:
            raise ShapeError(f"x has width {self.x.shape[1]} but its space {self.space.width}")

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        where = "bare" if self.space is None else f"{self.space.model}:{self.space.site}"
        labels = "no labels" if self.z is None else "labels"
        return f"Representations(n={len(self)}, d={self.x.shape[1]}, {labels}, {where})"

    def __getitem__(self, index: Tensor) -> Representations:
        """Return the vectors at an index tensor (m,)."""
        rows = None if self.rows is None else self.rows[index.to(self.rows.device)]
        z = None if self.z is None else take(self.z, index)
        return Representations(self.x[index.to(self.x.device)], z, self.space, rows)

    def split(self, fraction: float, seed: int) -> tuple[Representations, Representations]:
        """Split at random; the vectors of one text stay on one side.

        Args:
            fraction: share of texts on the first side, in (0, 1).
            seed: of the split.

        Raises:
            ValueError: the fraction is out of range or leaves a side empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie strictly between 0 and 1; got {fraction}")
        texts = torch.arange(len(self)) if self.rows is None else self.rows.cpu()
        unique = torch.unique(texts)
        count = round(fraction * len(unique))
        if not 0 < count < len(unique):
            raise ValueError(f"fraction {fraction} of {len(unique)} texts leaves a side empty")
        order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
        first = torch.isin(texts, unique[order[:count]])
        return self[first.nonzero()[:, 0]], self[(~first).nonzero()[:, 0]]


def take(z: Sized, index: Tensor) -> Sized:
    """Return the labels at an index (m,), in the form they have (tensor, array, pandas, list)."""
    if isinstance(z, Tensor):
        return z[index.to(z.device)]
    numbers = index.tolist()
    values = cast("Any", z)
    if hasattr(z, "iloc"):
        return cast("Sized", values.iloc[numbers])
    if hasattr(z, "dtype"):
        return cast("Sized", values[numbers])
    return [values[i] for i in numbers]


def select(x: Tensor, mask: Tensor, tokens: Tokens) -> Tensor:
    """Keep the requested tokens of a padded batch; padding may be on either side.

    Args:
        x: (b, t, d), or (b * t, d) from modules that flatten their input.
        mask: (b, t), nonzero at real tokens; at least one per row.
        tokens: `last`, `first`, `mean` over the real tokens, or `all` of them in reading order.

    Returns:
        (b, d); for `all` (number of real tokens, d).

    Raises:
        ShapeError: x is not a value per token.
    """
    if x.ndim == 2 and len(x) == mask.numel():
        x = x.reshape(*mask.shape, x.shape[-1])
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ShapeError(
            f"the activation has shape {tuple(x.shape)}, not (batch, tokens, d) = "
            f"({mask.shape[0]}, {mask.shape[1]}, d); choose a site with one vector per token"
        )
    real = mask.to(x.device) != 0
    if tokens == "all":
        return x[real]
    if tokens == "mean":
        total = (x * real[..., None]).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
        return (total / real.sum(1, keepdim=True)).to(x.dtype)
    places = torch.arange(mask.shape[1], device=x.device).expand_as(real)
    at = (
        places.where(real, -1).amax(1)
        if tokens == "last"
        else places.where(real, mask.shape[1]).amin(1)
    )
    return x[torch.arange(len(x), device=x.device), at]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _right_padding(tokenizer: Callable[..., Any]) -> Iterator[None]:
    settings = cast("Any", tokenizer)
    side, pad = getattr(tokenizer, "padding_side", None), getattr(tokenizer, "pad_token", None)
    eos = getattr(tokenizer, "eos_token", None)
    try:
        if side is not None:
            settings.padding_side = "right"
        if pad is None and eos is not None:
            settings.pad_token = eos
        yield
    finally:
        if side is not None:
            settings.padding_side = side
        if pad is None and eos is not None:
            settings.pad_token = pad


def _encode(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: list[str],
    start: int,
    max_length: int | None,
) -> dict[str, Tensor]:
    """Tokenize one batch; refuse texts without tokens and texts longer than the model allows."""
    with _right_padding(tokenizer):
        coded = tokenizer(
            texts,
            padding=True,
            truncation=max_length is not None,
            max_length=max_length,
            return_tensors="pt",
        )
    mask = coded["attention_mask"]
    empty = (mask.sum(1) == 0).nonzero()[:, 0]
    if mask.shape[1] == 0 or len(empty):
        row = start + (int(empty[0]) if len(empty) else 0)
        raise ValueError(f"text {row} has no tokens; remove empty texts")
    limit = _max_positions(model)
    if limit is not None and mask.shape[1] > limit:
        row = start + int(mask.sum(1).argmax())
        raise ShapeError(
            f"text {row} has {mask.shape[1]} tokens but the model takes {limit}; "
            f"shorten it or pass max_length={limit}"
        )
    names = ("input_ids", "attention_mask", "token_type_ids")
    device = _input_device(model)
    return {name: coded[name].to(device) for name in names if name in coded}


def _max_positions(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _input_device(model: nn.Module) -> torch.device:
    getter = getattr(model, "get_input_embeddings", None)
    module = getter() if getter is not None else None
    parameter = next((module if isinstance(module, nn.Module) else model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _runner(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """Return the model without its head when every site lies inside: no logits are computed."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    if not isinstance(base, nn.Module):
        return model
    inside = {id(module) for module in base.modules()}
    return base if all(id(model.get_submodule(s.module)) in inside for s in sites) else model


def _forward(
    model: nn.Module, inputs: dict[str, Tensor], sites: Sequence[Site], tokens: Tokens
) -> dict[str, Tensor]:
    """Run one batch and return the requested rows at every site."""
    kept: dict[str, Tensor] = {}
    mask = inputs["attention_mask"]
    runner = _runner(model, sites)
    known = inspect.signature(runner.forward).parameters
    arguments: dict[str, Any] = {
        name: value for name, value in inputs.items() if name != "token_type_ids" or name in known
    }
    if "use_cache" in known:
        arguments["use_cache"] = False
    with ExitStack() as stack:
        for site in sites:

            def keep(x: Tensor, name: str = site.name) -> None:
                kept[name] = select(x, mask, tokens).detach().clone()

            stack.callback(hook(model, site, keep).remove)
        stack.enter_context(_evaluating(model))
        runner(**arguments)
    missing = [site.name for site in sites if site.name not in kept]
    if missing:
        raise SiteNotFoundError(f"the forward pass did not reach {', '.join(missing)}")
    return {site.name: kept[site.name] for site in sites}


def _check(
    texts: Sequence[str], labels: Sized | None, tokens: str, batch_size: int, max_length: int | None
) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts; got one string, pass [text]")
    if len(texts) == 0:
        raise ValueError("texts is empty; at least one text is needed")
    if labels is not None and len(labels) != len(texts):
        raise ShapeError(f"{len(texts)} texts but {len(labels)} labels; one label per text")
    if tokens not in _TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(_TOKENS)}; got {tokens!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")


def stream(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    labels: Sized | None = None,
    *,
    sites: str | Sequence[str],
    tokens: Tokens = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield representations one batch at a time; memory does not depend on the number of texts.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer; called, never changed.
        texts: the texts.
        labels: one per text; only their number is checked here.
        sites: names, patterns or module paths, see `concept_erasure.sites.resolve`.
        tokens: `last`, `first`, `mean` or `all` real tokens of each text.
        batch_size: texts per forward pass.
        max_length: truncate to this many tokens; `None` truncates nothing.
        dtype: of the result; default the model's.
        progress: called with (texts done, texts in all) after every batch.

    Returns:
        Iterator over ({site: (m, d)}, rows): `rows` (m,) is the index of the text of each vector.

    Raises:
        SiteNotFoundError: a site does not exist or is not reached.
        ShapeError: labels and texts differ in number, or a text is too long for the model.
        ValueError: no texts, an empty text, or an option out of range.
    """
    _check(texts, labels, tokens, batch_size, max_length)
    places = resolve(model, sites)

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            inputs = _encode(model, tokenizer, part, start, max_length)
            found = _forward(model, inputs, places, tokens)
            rows = torch.arange(start, start + len(part))
            if tokens == "all":
                rows = rows.repeat_interleave((inputs["attention_mask"] != 0).sum(1).cpu())
            if dtype is not None:
                found = {name: x.to(dtype) for name, x in found.items()}
            yield found, rows
            if progress is not None:
                progress(start + len(part), len(texts))

    return batches()


@overload
def collect(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    labels: Sized | None = None,
    *,
    sites: str,
    tokens: Tokens = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Representations: ...


@overload
def collect(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    labels: Sized | None = None,
    *,
    sites: list[str] | tuple[str, ...],
    tokens: Tokens = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Representations]: ...


def collect(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    labels: Sized | None = None,
    *,
    sites: str | Sequence[str],
    tokens: Tokens = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Representations | dict[str, Representations]:
    """Return the representations of all texts, with their labels and space.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer; called, never changed.
        texts: n texts.
        labels: n labels in any form; with `tokens="all"` each is repeated for the text's tokens.
        sites: a string naming one site, or a list of names and patterns.
        tokens: `last`, `first`, `mean` or `all` real tokens of each text.
        batch_size: texts per forward pass.
        max_length: truncate to this many tokens; `None` truncates nothing.
        dtype: of x; default the model's.
        progress: called with (texts done, texts in all) after every batch.

    Returns:
        One `Representations` for a string, a dictionary by site name for a list.

    Raises:
        SiteNotFoundError: a site does not exist, or a string names several.
        ShapeError, ValueError: as `stream`.
    """
    places = resolve(model, sites)
    if isinstance(sites, str) and len(places) != 1:
        raise SiteNotFoundError(f"{sites!r} names {len(places)} sites; pass a list, [{sites!r}]")
    batches = stream(
        model, tokenizer, texts, labels, sites=sites, tokens=tokens, batch_size=batch_size,
        max_length=max_length, dtype=dtype, progress=progress,
    )  # fmt: skip
    pieces: dict[str, list[Tensor]] = {site.name: [] for site in places}
    indices: list[Tensor] = []
    for found, rows in batches:
        indices.append(rows)
        for name, x in found.items():
            pieces[name].append(x)
    rows = torch.cat(indices)
    every = tokens == "all"
    z = take(labels, rows) if every and labels is not None else labels
    mark, name_of_model = base_fingerprint(model), model_id(model)
    result: dict[str, Representations] = {}
    for site in places:
        x = torch.cat(pieces.pop(site.name))
        space = Space(name_of_model, mark, site.name, tokens, x.shape[1])
        result[site.name] = Representations(x, z, space, rows if every else None)
    return next(iter(result.values())) if isinstance(sites, str) else result


def fit_streaming(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    labels: Sized | None,
    *,
    sites: str | Sequence[str],
    fitter: Callable[[int], F],
    tokens: Tokens = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, F]:
    """Feed one fitter per site in a single pass over the texts.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer; called, never changed.
        texts: n texts.
        labels: n labels. A tensor is handed on as it is; anything else is encoded once for all
            batches (`encode_labels`), so that class numbers do not depend on the batch.
        sites: names, patterns or module paths.
        fitter: called with the width d of a site, returns its fitter.
        tokens: `last`, `first`, `mean` or `all` real tokens of each text.
        batch_size: texts per forward pass.
        max_length: truncate to this many tokens; `None` truncates nothing.
        dtype: of x; default the model's.
        progress: called with (texts done, texts in all) after every batch.

    Returns:
        The fitters by site name; `update(x, z)` was called once per batch with x (m, d).

    Raises:
        SiteNotFoundError, ShapeError, ValueError: as `stream`.
    """
    if labels is None:
        raise ValueError("labels is None; a fitter needs one label per text")
    batches = stream(
        model, tokenizer, texts, labels, sites=sites, tokens=tokens, batch_size=batch_size,
        max_length=max_length, dtype=dtype, progress=progress,
    )  # fmt: skip
    z = labels if isinstance(labels, Tensor) else encode_labels(labels, n=len(texts)).values
    fitters: dict[str, F] = {}
    for found, rows in batches:
        for name, x in found.items():
            if name not in fitters:
                fitters[name] = fitter(x.shape[1])
            fitters[name].update(x, z[rows.to(z.device)].to(x.device))
    return fitters
