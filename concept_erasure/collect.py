"""Representations of texts at the sites of a model: all at once, or streamed batch by batch.

The model is left bit-identical: hooks and evaluation mode last for one batch and end in `finally`,
so that nothing remains even when a stream is left half-way. Texts are padded on the right while
the tokenizer is used (positions then do not depend on the batch) and its own settings put back.

The first batch runs to the end and shows how often each site is met. If each is met once, later
batches stop at the last of them: reading inner layers does not pay for the outer ones.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.edit import HookPatch, active_edits, base_fingerprint
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.labels import encode_concepts
from concept_erasure.sites import Site, Space, hook, model_id, resolve

__all__ = [
    "Fitter",
    "Progress",
    "Reached",
    "Representations",
    "Tokens",
    "accepted",
    "check_texts",
    "collect",
    "encode_batch",
    "evaluating",
    "fit_streaming",
    "select",
    "stream",
]

Tokens = Literal["last", "first", "mean", "all"]
_TOKENS = ("last", "first", "mean", "all")
Progress = bool | Callable[[int, int], None]


class Reached(Exception):  # noqa: N818 not an error
    """Ends a forward pass that has served its purpose; always caught where it is raised for."""


class Fitter(Protocol):
    """Anything with `update(x, z)`.

    A `space` that is `None` is filled in. With `classes`, labels are handed on as they were given.
    If `update` takes `groups`, it is given the index of the text of every token (n,) with
    `tokens="all"`. `update_background(x)` is needed for `background=True` only.
    """

    def update(self, x: Tensor, z: Tensor) -> object:
        """Take one batch: x (n, d), z (n,) or (n, c)."""
        ...


F = TypeVar("F", bound=Fitter)


@dataclass(frozen=True, eq=False, repr=False)
class Representations:
    """Vectors at one site, their labels, and where they come from.

    Attributes:
        x: (n, d).
        z: n labels, in the form they were given (a mapping holds n for each concept); `None`
            without labels.
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
            if value is not None and _count(value) != len(self.x):
                raise ShapeError(f"{len(self.x)} vectors but {_count(value)} {name}")
        if self.space is not None and self.space.width != self.x.shape[1]:
            raise ShapeError(f"x has width {self.x.shape[1]} but its space {self.space.width}")

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        where = "bare" if self.space is None else f"{self.space.model}:{self.space.site}"
        labels = "no labels" if self.z is None else "labels"
        return f"Representations(n={len(self)}, d={self.x.shape[1]}, {labels}, {where})"

    def __getitem__(self, index: Tensor) -> Representations:
        """Return the vectors at an index tensor (m,), or where a bool mask (n,) is true.

        Raises:
            ShapeError: a mask has another length.
        """
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise ShapeError(f"{len(self)} vectors but a mask of shape {tuple(index.shape)}")
            index = index.nonzero()[:, 0]
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


def _count(z: Sized) -> int:
    """Return the number of rows labelled; a mapping holds one sequence for each concept."""
    if not isinstance(z, Mapping):
        return len(z)
    counts = {str(name): len(cast("Sized", values)) for name, values in z.items()}
    if len(set(counts.values())) != 1:
        raise ShapeError(f"a mapping of labels needs as many for every concept; got {counts}")
    return next(iter(counts.values()))


def take(z: Sized, index: Tensor) -> Sized:
    """Return the labels at an index (m,), in their form (tensor, array, pandas, list, mapping)."""
    if isinstance(z, Mapping):
        return {name: take(values, index) for name, values in z.items()}
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients; every module gets its own mode back."""
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


def encode_batch(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    start: int,
    max_length: int | None,
) -> dict[str, Tensor]:
    """Tokenize one batch, padded on the right.

    Args:
        model: the model that will read it.
        tokenizer: its tokenizer.
        texts: b texts.
        start: number of the first text, for messages.
        max_length: truncate to this many tokens; `None` truncates nothing.

    Returns:
        `input_ids`, `attention_mask` and perhaps `token_type_ids`, (b, t), on the model's device.

    Raises:
        TypeError: a text is not a string.
        ValueError: a text has no tokens.
        ShapeError: a text is longer than the model allows.
    """
    for row, text in enumerate(texts, start):
        if not isinstance(text, str):
            raise TypeError(f"text {row} is {type(text).__name__}, not a string")
    with _right_padding(tokenizer):
        coded = tokenizer(
            list(texts),
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
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)  # a tokenizer may pad left still
    return {name: coded[name].gather(1, order).to(device) for name in names if name in coded}


def accepted(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a forward pass: the inputs it takes, and no cache."""
    known = inspect.signature(module.forward).parameters
    arguments: dict[str, Any] = {
        name: value for name, value in inputs.items() if name != "token_type_ids" or name in known
    }
    if "use_cache" in known:
        arguments["use_cache"] = False
    return arguments


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


def _may_stop(model: nn.Module) -> bool:
    """Say whether a forward pass may be left half-way: nobody else acts after a module's forward.

    Attached erasers do not count: they change activations and nothing beside them.
    """
    patches = [patch for edit in active_edits(model) for patch in edit.patches]
    own = {patch.handle_id for patch in patches if isinstance(patch, HookPatch)}
    return not any(
        module._forward_hooks.keys() - own
        or module._forward_pre_hooks.keys() - own
        or hasattr(module, "_hf_hook")
        or getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__module__.startswith(("torch._dynamo", "torch.distributed"))
        for module in model.modules()
    )


class _Reader:
    """Runs batches and keeps the requested rows at every site."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], rules: Sequence[Tokens]) -> None:
        self.model, self.sites, self.rules = model, sites, rules
        self.runner = _runner(model, sites)
        self.once = False  # a whole pass met every site once

    def __call__(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the rows by site name, for every token rule."""
        kept: dict[str, list[Tensor]] = {}
        met: Counter[str] = Counter()
        mask = inputs["attention_mask"]
        stop = self.once and _may_stop(self.model)
        with ExitStack() as stack:
            for site in self.sites:

                def keep(x: Tensor, name: str = site.name) -> None:
                    kept[name] = [select(x, mask, rule).detach().clone() for rule in self.rules]
                    met[name] += 1
                    if stop and len(kept) == len(self.sites):
                        raise Reached

                stack.callback(hook(self.model, site, keep).remove)
            stack.enter_context(evaluating(self.model))
            with suppress(Reached):
                self.runner(**accepted(self.runner, inputs))
        missing = [site.name for site in self.sites if site.name not in kept]
        if missing:
            raise SiteNotFoundError(f"the forward pass did not reach {', '.join(missing)}")
        self.once = all(count == 1 for count in met.values())
        return [
            {site.name: kept[site.name][i] for site in self.sites} for i in range(len(self.rules))
        ]


def check_texts(texts: Sequence[str], batch_size: int, max_length: int | None) -> None:
    """Refuse one string, no texts, and options out of range.

    Raises:
        TypeError: one string was given.
        ValueError: no texts, or an option is out of range.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts; got one string, pass [text]")
    if len(texts) == 0:
        raise ValueError("texts is empty; at least one text is needed")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")


def _check_labels(labels: Sized | None, n: int) -> None:
    if labels is not None and (count := _count(labels)) != n:
        raise ShapeError(f"{n} texts but {count} labels; one label per text")


@contextmanager
def _shown(progress: Progress | None, total: int, title: str) -> Iterator[Callable[[int], object]]:
    """Give a function that is told how many texts are done."""
    if callable(progress):
        call = progress
        yield lambda done: call(done, total)
        return
    off = None if progress is None else not progress  # None: off unless stderr is a terminal
    with tqdm(total=total, desc=title, unit=" texts", disable=off) as bar:
        yield lambda done: bar.update(done - bar.n)


@dataclass(frozen=True)
class _Pass:
    """One pass over texts, batch by batch."""

    model: nn.Module
    tokenizer: Callable[..., Any]
    texts: Sequence[str]
    sites: list[Site]
    rules: tuple[Tokens, ...]
    batch_size: int
    max_length: int | None
    dtype: torch.dtype | None
    progress: Progress | None
    title: str

    def __post_init__(self) -> None:
        check_texts(self.texts, self.batch_size, self.max_length)
        if self.rules[0] not in _TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(_TOKENS)}; got {self.rules[0]!r}")
        if not (
            self.progress is None or isinstance(self.progress, bool) or callable(self.progress)
        ):
            raise TypeError(
                "progress must be True, False, None or a function of (texts done, texts in all); "
                f"got {self.progress!r}"
            )

    def __iter__(self) -> Iterator[tuple[list[dict[str, Tensor]], Tensor, Tensor]]:
        """Yield the vectors by site for every rule, the first rule's texts, and the texts' lengths."""
        read = _Reader(self.model, self.sites, self.rules)
        total = len(self.texts)
        with _shown(self.progress, total, self.title) as tell:
            for start in range(0, total, self.batch_size):
                part = list(self.texts[start : start + self.batch_size])
                inputs = encode_batch(self.model, self.tokenizer, part, start, self.max_length)
                found = read(inputs)
                rows = torch.arange(start, start + len(part))
                lengths = (inputs["attention_mask"] != 0).sum(1).cpu()
                if self.rules[0] == "all":
                    rows = rows.repeat_interleave(lengths)
                if self.dtype is not None:
                    found = [{k: x.to(self.dtype) for k, x in by.items()} for by in found]
                yield found, rows, lengths
                tell(start + len(part))


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
        progress: `True` shows a bar, `None` does on a terminal; or a function, called with (texts
            done, texts in all) after every batch.

    Returns:
        Iterator over ({site: (m, d)}, rows): `rows` (m,) is the index of the text of each vector.

    Raises:
        SiteNotFoundError: a site does not exist or is not reached.
        ShapeError: labels and texts differ in number, or a text is too long for the model.
        ValueError: no texts, an empty text, or an option out of range.
        TypeError: texts, sites or progress are of the wrong type.
    """
    batches = _Pass(
        model, tokenizer, texts, resolve(model, sites), (tokens,), batch_size, max_length, dtype,
        progress, "reading texts",
    )  # fmt: skip
    _check_labels(labels, len(texts))
    return ((found[0], rows) for found, rows, _ in batches)


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
        labels: n labels in any form, or a mapping with n for each concept; with `tokens="all"` each
            is repeated for the text's tokens.
        sites: a string naming one site, or a list of names and patterns.
        tokens: `last`, `first`, `mean` or `all` real tokens of each text.
        batch_size: texts per forward pass.
        max_length: truncate to this many tokens; `None` truncates nothing.
        dtype: of x; default the model's.
        progress: `True` shows a bar, `None` does on a terminal; or a function, called with (texts
            done, texts in all) after every batch.

    Returns:
        One `Representations` for a string, a dictionary by site name for a list.

    Raises:
        SiteNotFoundError: a site does not exist, or a string names several.
        ShapeError, ValueError, TypeError: as `stream`.
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
    background: bool = False,
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
        labels: n labels, or a mapping or table with n for each concept (then erased jointly). A
            tensor is handed on as it is; anything else is encoded once for all batches
            (`encode_concepts`), so that class numbers do not depend on the batch.
        sites: names, patterns or module paths.
        fitter: called with the width d of a site, returns its fitter.
        tokens: `last`, `first`, `mean` or `all` real tokens of each text.
        background: give the tokens that carry no label to `update_background(x)`: an eraser in a
            language model acts on every token, so its edit should be small on every token. With
            `tokens="mean"` these are all real tokens (what carries the labels is no token); with
            `tokens="all"` there are none.
        batch_size: texts per forward pass.
        max_length: truncate to this many tokens; `None` truncates nothing.
        dtype: of x; default the model's.
        progress: `True` shows a bar, `None` does on a terminal; or a function, called with (texts
            done, texts in all) after every batch.

    Returns:
        The fitters by site name; `update(x, z)` was called once per batch with x (m, d), and with
        `groups=` the texts (m,) of x if `tokens="all"` and it takes them. A fitter with a `space`
        of `None` gets its space, which its eraser carries.

    Raises:
        SiteNotFoundError, ShapeError, ValueError: as `stream`.
        TypeError: as `stream`, or `background` and the fitter has no `update_background`.
    """
    if labels is None:
        raise ValueError("labels is None; a fitter needs one label per text")
    rules: tuple[Tokens, ...] = (tokens, "all") if background and tokens != "all" else (tokens,)
    batches = _Pass(
        model, tokenizer, texts, resolve(model, sites), rules, batch_size, max_length, dtype,
        progress, "fitting",
    )  # fmt: skip
    _check_labels(labels, len(texts))
    z = labels if isinstance(labels, Tensor) else encode_concepts(labels, n=len(texts)).values
    name_of_model, mark = model_id(model), base_fingerprint(model)
    fitters: dict[str, F] = {}
    for found, rows, lengths in batches:
        unlabelled = _unlabelled(lengths, tokens)
        for name, x in found[0].items():
            if name not in fitters:
                space = Space(name_of_model, mark, name, tokens, x.shape[1])
                fitters[name] = _placed(fitter(x.shape[1]), space, len(rules) > 1)
            one = fitters[name]
            chosen = _labels_for(one, labels, z, rows, x.device)
            if tokens == "all" and "groups" in inspect.signature(one.update).parameters:
                cast("Any", one).update(x, chosen, groups=rows)
            else:
                one.update(x, chosen)
            if len(found) > 1 and bool(unlabelled.any()):
                every = found[1][name]
                cast("Any", one).update_background(every[unlabelled.to(every.device)])
    return fitters


def _unlabelled(lengths: Tensor, tokens: Tokens) -> Tensor:
    """Return which of the real tokens (sum of lengths,) in reading order carry no label."""
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    if tokens == "last":
        mask[lengths.cumsum(0) - 1] = False
    elif tokens == "first":
        mask[lengths.cumsum(0) - lengths] = False
    return mask


def _placed(fitter: F, space: Space, background: bool) -> F:
    """Give a fitter its space, if it keeps one and has none."""
    if background and not callable(getattr(fitter, "update_background", None)):
        raise TypeError(
            f"background=True needs a fitter with update_background(x), such as LeaceFitter; "
            f"{type(fitter).__name__} has none: leave background out"
        )
    if hasattr(fitter, "space") and fitter.space is None:
        fitter.space = space
    return fitter


def _labels_for(
    fitter: object, labels: Sized, z: Tensor, rows: Tensor, device: torch.device
) -> Tensor:
    """Return the labels of some rows; a fitter that names its classes numbers them itself."""
    single = not isinstance(labels, Tensor | Mapping) and not hasattr(labels, "columns")
    if single and getattr(fitter, "classes", None):
        return cast("Tensor", take(labels, rows))
    return z[rows.to(z.device)].to(device)
