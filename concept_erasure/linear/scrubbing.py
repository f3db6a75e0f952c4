"""Concept scrubbing: erase a concept at every norm of a language model, layer by layer.

Each eraser is fitted on activations that the earlier erasers have cleaned already, so the model is
fitted as it will be used (Belrose et al. 2023, arXiv:2306.03819, section on concept scrubbing;
reference implementation: EleutherAI concept-erasure 0.2.4). Forward hooks do all of it, so any
transformer whose sites are found will do. Texts are tokenised as in `collect`: padded on the right,
whatever the tokenizer's own side, and refused if empty or too long.

Two routes give the same erasers. Cached: the hidden states between two blocks are kept for all
texts and each block is run on them, ``O(layers)`` compute and ``O(tokens * d)`` memory. Uncached:
one pass from the start for each site, ``O(layers^2)`` compute and ``O(d^2)`` memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from concept_erasure._storage import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, write
from concept_erasure.collect import Reached, accepted, check_texts, encode_batch, evaluating
from concept_erasure.edit import Edit, HookPatch, base_fingerprint, lineage
from concept_erasure.eraser import RepresentationEraser, place_keys
from concept_erasure.errors import (
    EditError,
    FormatError,
    ShapeError,
    SiteNotFoundError,
    SpaceError,
)
from concept_erasure.labels import LabelKind, encode_labels
from concept_erasure.linear.leace import ErasureMethod, LeaceFitter
from concept_erasure.sites import (
    Site,
    Space,
    base_of,
    find_sites,
    hook,
    model_id,
    resolve,
    width_at,
)
from concept_erasure.utils import is_norm_layer, mangle_module_path

__all__ = ["ConceptScrubber", "Tokenizer", "random_scrub"]

INDEX_FILE = "scrubber.json"
HookFunction = Callable[[str, Tensor], Tensor | None]


class Tokenizer(Protocol):
    """What is needed of a tokenizer: called like one of Hugging Face's."""

    def __call__(
        self,
        text: list[str],
        *,
        padding: bool = ...,
        truncation: bool = ...,
        max_length: int | None = ...,
        return_tensors: str | None = ...,
    ) -> Mapping[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, both ``(texts, tokens)``."""


class ConceptScrubber:
    """Erasers for many places of one model.

    A fitted eraser carries its space: it is refused in a model with other weights, or at another
    place. Erasers put in by hand need none, or take ``eraser.with_space(None)``.

    Attributes:
        erasers: By module path below the base model with ``.`` written as ``-``, such as
            ``"layers-0-input_layernorm"``, or by site name, such as ``"norm1.0"``.
        pre_hook: Erase at the input of the modules instead of at their output.
    """

    def __init__(self, pre_hook: bool = False) -> None:
        """Start without erasers."""
        self.erasers: dict[str, RepresentationEraser] = {}
        self.pre_hook = pre_hook

    @classmethod
    def fit(  # noqa: PLR0913 all options of the fitter
        cls,
        model: nn.Module,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        z: object,
        *,
        sites: str | Sequence[str] = "norm?.*",
        cached: bool = True,
        method: ErasureMethod = "leace",
        affine: bool = True,
        shrinkage: bool | Literal["auto"] = "auto",
        rank: int | None = None,
        svd_tol: float | None = None,
        strength: float = 1.0,
        z_kind: LabelKind = "auto",
        background: Sequence[str] | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: bool | None = None,
    ) -> ConceptScrubber:
        """Fit one eraser for each site, in the order of the forward pass.

        Args:
            model: A Hugging Face transformer. It is left as it was, bit for bit.
            tokenizer: Its tokenizer, with a padding token if texts differ in length.
            texts: Texts to fit on; every token that is not padding counts.
            z: Labels: one for each text, which all of its tokens get, or a list of one sequence of
                token labels for each text.
            sites: Sites, patterns or module paths. Default: the norm before every attention and
                every MLP.
            cached: Run block by block on kept hidden states; see the module's description.
            method: ``"leace"`` or ``"orth"``.
            affine: Keep the mean at every site.
            shrinkage: Shrink the covariances, see `LeaceFitter`.
            rank: Remove at most this many directions at every site, strongest first.
            svd_tol: Smallest canonical correlation that counts as one, see `LeaceFitter`.
            strength: 1 erases; less is partial; 2 reflects the class means.
            z_kind: How to read one-dimensional labels: ``"auto"``, ``"classes"``,
                ``"continuous"``.
            background: Texts without labels, on whose tokens the edit should be small as well; see
                `LeaceFitter.update_background`.
            batch_size: Texts in one forward pass.
            max_length: Truncate texts to this many tokens; default: refuse texts that are longer
                than the model allows.
            progress: Show a progress bar. Default: when stderr is a terminal.

        Returns:
            A scrubber whose ``erasers`` are in the order of the forward pass.

        Raises:
            ShapeError: If texts and labels, or tokens and token labels, disagree in number, or a
                text is too long for the model.
            ValueError: If there are no texts, or one has no tokens (the message says which), or an
                option is out of range.
            TypeError: If ``texts`` is one string, or holds something else.
            SiteNotFoundError: If a pattern matches nothing, or a site is not met exactly once in a
                forward pass.
            EditError: If ``cached`` and the blocks do not form a chain; use ``cached=False``.
        """
        check_texts(texts, batch_size, max_length)
        batches = _batches(model, tokenizer, texts, z, z_kind, batch_size, max_length)
        if background is not None:
            check_texts(background, batch_size, max_length)
            batches += _background_batches(model, tokenizer, background, batch_size, max_length)
        make = partial(
            LeaceFitter, method=method, affine=affine, shrinkage=shrinkage, rank=rank,
            svd_tol=svd_tol, strength=strength,
        )  # fmt: skip
        run = _Run(model, batches, make)
        scrubber = cls()
        with evaluating(model):
            order = run.order(resolve(model, sites))
            shown = tqdm(order, "scrubbing", disable=None if progress is None else not progress)
            for site in shown:
                if cached:
                    run.advance(site)
                run.fit(site)
        scrubber.erasers = {_key(model, site): eraser for site, eraser in run.done}
        return scrubber

    @contextmanager
    def scrub(self, model: nn.Module) -> Iterator[ConceptScrubber]:
        """Erase at every site inside the ``with`` block.

        Args:
            model: The model, with or without its head.

        Raises:
            EditError: If there are no erasers, or one of them is in force at its place already.
            SiteNotFoundError: If an eraser's place is not in the model.
            SpaceError: If an eraser was fitted in another model, at another place, or has another
                width. Nothing is changed then.
        """
        with self.attach(model):
            yield self

    @contextmanager
    def apply_hook(self, model: nn.Module, hook_fn: HookFunction) -> Iterator[ConceptScrubber]:
        """Call ``hook_fn(key, activation)`` at every site inside the ``with`` block.

        Args:
            model: The model, with or without its head.
            hook_fn: A returned tensor takes the activation's place; None leaves it.

        Raises:
            EditError: If there are no erasers.
            SiteNotFoundError: If an eraser's place is not in the model.
        """
        places = self._places(model)

        def bind(key: str) -> Callable[[Tensor], Tensor | None]:
            return lambda x: hook_fn(key, x)

        with ExitStack() as stack:
            for key, site in places.items():
                stack.callback(hook(model, site, bind(key)).remove)
            yield self

    def attach(self, model: nn.Module) -> Edit:
        """Erase at every site until the returned edit is undone.

        Raises:
            EditError: If there are no erasers, or one of them is in force at its place already: by
                this scrubber or a copy of it, or by itself. Also if one is given twice for a place.
            SiteNotFoundError: If an eraser's place is not in the model.
            SpaceError: As `scrub`.
        """
        places = self._check_spaces(model)
        patches = [HookPatch(places[key], eraser) for key, eraser in self.erasers.items()]
        keys = place_keys(model, [(self.erasers[key], place) for key, place in places.items()])
        return Edit(model, patches, label="concept scrubbing", key=keys)

    def save_pretrained(self, path: str | Path) -> Path:
        """Write one folder for each eraser, and an index; return the folder.

        The index is written last and whole, and holds the digests of the erasers: a folder over which
        saving was interrupted does not load. Erasers of an earlier, larger scrubber are removed.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for i, eraser in enumerate(self.erasers.values()):
            eraser.save_pretrained(folder / str(i))
        index = {
            "format_version": 1,
            "pre_hook": self.pre_hook,
            "keys": list(self.erasers),
            "digests": [eraser.digest for eraser in self.erasers.values()],
        }
        text = json.dumps(index, indent=2) + "\n"
        write(folder / INDEX_FILE, lambda p: p.write_text(text, encoding="utf-8"))
        _remove_stale(folder, len(self.erasers))
        return folder

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ConceptScrubber:
        """Load what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: If the folder holds no scrubber.
            FormatError: If a file is damaged.
        """
        folder = Path(path)
        if not (folder / INDEX_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no {INDEX_FILE}; is it a saved scrubber?")
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            version, pre_hook, keys = (index[k] for k in ("format_version", "pre_hook", "keys"))
            digests = index.get("digests")  # absent in folders of version 0.1
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{folder / INDEX_FILE} is not a scrubber's index: {error}") from None
        valid = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        valid &= digests is None or (isinstance(digests, list) and len(digests) == len(keys))
        if version != 1 or not valid or not isinstance(pre_hook, bool):
            raise FormatError(f"{folder / INDEX_FILE} is damaged or of version {version!r}, not 1")
        scrubber = cls(pre_hook)
        for i, key in enumerate(keys):
            eraser = RepresentationEraser.from_pretrained(folder / str(i))
            if digests is not None and eraser.digest != digests[i]:
                raise FormatError(
                    f"{folder / str(i)} is not the eraser that {INDEX_FILE} speaks of (digest "
                    f"{eraser.digest}, not {digests[i]}): saving was interrupted. Save it again"
                )
            scrubber.erasers[key] = eraser
        return scrubber

    def _places(self, model: nn.Module) -> dict[str, Site]:
        """Return the place of every eraser."""
        if not self.erasers:
            raise EditError(
                "the scrubber holds no erasers, so nothing would be erased; use ConceptScrubber.fit, "
                "or put erasers in `erasers`"
            )
        return {key: self._site(model, key) for key in self.erasers}

    def _check_spaces(self, model: nn.Module) -> dict[str, Site]:
        """Return the place of every eraser; refuse erasers that do not belong there."""
        spaces = {key: e.space for key, e in self.erasers.items() if e.space is not None}
        marks = lineage(model) if spaces else frozenset()
        for key, space in spaces.items():
            if space.fingerprint not in marks:
                raise SpaceError(
                    f"the eraser {key!r} was fitted in {space.model} (weights "
                    f"{space.fingerprint[:12]}); this model has weights "
                    f"{base_fingerprint(model)[:12]}. Fit it again, or use with_space(None) if you "
                    "are sure"
                )
        places = self._places(model)
        for key, place in places.items():
            if key in spaces and not _fitted_at(model, spaces[key].site, place):
                raise SpaceError(
                    f"the eraser {key!r} was fitted at {spaces[key].site!r}, not at the "
                    f"{place.when} of {place.module!r}; fit one per site, or use with_space(None) "
                    "if you are sure"
                )
            width, needed = width_at(model, place), self.erasers[key].map.width
            if width is not None and width != needed:
                raise SpaceError(
                    f"site {place.name!r} has width {width}; the eraser {key!r} has width {needed}"
                )
        return places

    def _site(self, model: nn.Module, key: str) -> Site:
        """Return the place a key stands for."""
        when: Literal["input", "output"] = "input" if self.pre_hook else "output"
        modules = {path for path, _ in model.named_modules() if path}
        dotted = key.replace("-", ".")
        for path in (f"{base_of(model)[0]}.{dotted}", dotted):
            if path in modules:
                return Site(key, path, "module", when)
        found = resolve(model, key)
        if len(found) != 1:
            raise SiteNotFoundError(
                f"the key {key!r} stands for {len(found)} places; use one key for each"
            )
        return replace(found[0], when=when) if self.pre_hook else found[0]


def _remove_stale(folder: Path, count: int) -> None:
    """Remove the files of erasers numbered ``count`` and above; whatever else lies there stays."""
    for stale in folder.iterdir():
        number = stale.name
        if number.isdecimal() and int(number) >= count and (stale / CONFIG_FILE).is_file():
            for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                (stale / name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                stale.rmdir()


def _fitted_at(model: nn.Module, name: str, place: Site) -> bool:
    """Say whether a space's site is a place; module paths may lack the head's prefix."""
    try:
        (own,) = resolve(model, name)
    except SiteNotFoundError:
        own = Site(name, name, "module")
    pair = sorted((own.module, place.module), key=len)
    return own.when == place.when and (pair[0] == pair[1] or pair[1].endswith(f".{pair[0]}"))


@contextmanager
def random_scrub(
    model: nn.Module,
    subspace_dim: int,
    *,
    sites: str | Sequence[str] | None = None,
    seed: int | torch.Generator = 0,
) -> Iterator[None]:
    """Erase a random subspace instead of a concept: the control for scrubbing.

    Args:
        model: The model.
        subspace_dim: Dimensions to remove; take the rank of the eraser to compare with.
        sites: Where. Default: every norm layer of the base model.
        seed: Seed, or a CPU generator. Every forward pass draws a new subspace, the same at all
            sites of one width.

    Raises:
        SiteNotFoundError: If there is no such site.
        ValueError: If the subspace does not fit the width of a site.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    path, base = base_of(model)
    if sites is None:
        norms = [name for name, module in base.named_modules() if is_norm_layer(module)]
        places = [Site(n, f"{path}.{n}" if path else n, "module") for n in norms]
    else:
        places = resolve(model, sites)
    if not places:
        raise SiteNotFoundError(f"{type(model).__name__} has no norm layers; say sites=...")
    drawn: dict[int, Tensor] = {}

    def erase(x: Tensor) -> Tensor:
        width = x.shape[-1]
        if not 0 < subspace_dim <= width:
            raise ValueError(f"`subspace_dim` must be in 1 .. {width}, got {subspace_dim}")
        if width not in drawn:
            noise = torch.randn(width, subspace_dim, generator=generator, dtype=torch.float64)
            drawn[width] = torch.linalg.qr(noise).Q
        u = drawn[width].to(x.device, torch.promote_types(x.dtype, torch.float32))
        return (x - (x.to(u.dtype) @ u) @ u.T).to(x.dtype)

    def redraw(_: nn.Module, __: object) -> None:
        drawn.clear()

    with ExitStack() as stack:
        stack.callback(base.register_forward_pre_hook(redraw).remove)
        for site in places:
            stack.callback(hook(model, site, erase).remove)
        yield


@dataclass
class _Batch:
    """Model inputs of some texts, the tokens that count ``(b, t)``, their labels and their texts.

    ``labels`` is ``(m, c)``, or None for background; ``rows`` ``(m,)`` is the index of the text.
    """

    inputs: dict[str, Tensor]
    mask: Tensor
    rows: Tensor
    labels: Tensor | None = None


@dataclass
class _Call:
    """How one block was called, without its hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    name: str | None  # the keyword of the hidden states; None: the first positional argument

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.name is None:
            return _first(block(hidden, *self.args, **self.kwargs))
        return _first(block(*self.args, **self.kwargs, **{self.name: hidden}))


class _Run:
    """One fit: the erasers so far, and in the cached route the states before the current block."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[_Batch],
        make: Callable[..., LeaceFitter],
    ) -> None:
        self.model, self.batches, self.make = model, batches, make
        self.done: list[tuple[Site, RepresentationEraser]] = []
        self.base = base_of(model)[1]
        self.name, self.mark = model_id(model), base_fingerprint(model)
        self.blocks: list[str] = []
        self.states: list[Tensor] = []
        self.calls: list[list[_Call]] = []
        self.block: int | None = None

    def forward(self, i: int) -> None:
        """Run batch ``i`` from the start, or from the current block."""
        if self.block is None:
            self.base(**accepted(self.base, self.batches[i].inputs))
        else:
            self._step(i, self.block)

    def _step(self, i: int, block: int) -> Tensor:
        return self.calls[i][block](self.model.get_submodule(self.blocks[block]), self.states[i])

    @contextmanager
    def scrubbed(self) -> Iterator[None]:
        """Hook the erasers fitted so far."""
        with ExitStack() as stack:
            for site, eraser in self.done:
                stack.callback(hook(self.model, site, eraser).remove)
            yield

    def order(self, sites: list[Site]) -> list[Site]:
        """Return the sites in the order in which a forward pass meets them."""
        met: list[Site] = []

        def record(site: Site) -> Callable[[Tensor], None]:
            return lambda _: met.append(site)

        with ExitStack() as stack:
            for site in sites:
                stack.callback(hook(self.model, site, record(site)).remove)
            self.forward(0)
        for site in sites:
            if (times := met.count(site)) != 1:
                raise SiteNotFoundError(
                    f"site {site.name!r} is met {times} times in a forward pass, and scrubbing "
                    "needs exactly one; choose other sites"
                )
        return met

    def fit(self, site: Site) -> None:
        """Fit the eraser of a site on activations that the earlier erasers have cleaned."""
        fitters: list[LeaceFitter] = []  # made from the first activation, which tells the width
        seen: list[Tensor] = []

        def collect(x: Tensor) -> None:
            seen.append(x)
            raise Reached

        with self.scrubbed():
            handle = hook(self.model, site, collect)
            try:
                for i, batch in enumerate(self.batches):
                    with suppress(Reached):
                        self.forward(i)
                    x = seen.pop()
                    if x.shape[:-1] != batch.mask.shape:
                        raise ShapeError(
                            f"site {site.name!r} gives {tuple(x.shape)} for tokens "
                            f"{tuple(batch.mask.shape)}; choose a site with one vector per token"
                        )
                    kept = x[batch.mask.to(x.device)]
                    if batch.labels is None:  # these come last, so there is a fitter
                        fitters[0].update_background(kept)
                        continue
                    if not fitters:
                        width, columns = x.shape[-1], batch.labels.shape[1]
                        fitters.append(self.make(width, columns, device=x.device))
                    fitters[0].update(kept, batch.labels.to(x.device), groups=batch.rows)
            finally:
                handle.remove()
        space = Space(self.name, self.mark, site.name, "all", fitters[0].x_dim)
        self.done.append((site, fitters[0].eraser.with_space(space)))

    def advance(self, site: Site) -> None:
        """Bring the kept states to the block that holds the site; outside of blocks, drop them."""
        if not self.blocks:
            found = find_sites(self.model).values()
            self.blocks = [s.module for s in found if s.kind == "residual"]
        inside = [
            b
            for b, path in enumerate(self.blocks)
            if site.module == path or site.module.startswith(f"{path}.")
        ]
        if not inside:
            self.block, self.states, self.calls = None, [], []
            return
        if self.block is None:
            self._capture()
            self.block = 0
        with self.scrubbed():
            while self.block < inside[0]:
                for i in range(len(self.batches)):
                    self.states[i] = self._step(i, self.block)
                self.block += 1

    def _capture(self) -> None:
        """Record how every block is called, and the states before the first."""
        self.states, self.calls = [], []
        for i in range(len(self.batches)):
            calls: list[_Call] = []
            link: list[Tensor] = []
            with self.scrubbed(), ExitStack() as stack:
                for path in self.blocks:
                    module = self.model.get_submodule(path)
                    before = _recorder(path, calls, link, self.states)
                    handle = module.register_forward_pre_hook(before, with_kwargs=True)
                    stack.callback(handle.remove)
                    stack.callback(module.register_forward_hook(_keep_last(link)).remove)
                self.forward(i)
            if len(calls) != len(self.blocks):
                raise _not_a_chain(f"{len(calls)} calls of {len(self.blocks)} blocks")
            self.calls.append(calls)


def _recorder(
    path: str, calls: list[_Call], link: list[Tensor], states: list[Tensor]
) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    """Return a pre-hook that records a call and checks that the block reads the one before."""

    def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        rest = dict(kwargs)
        name = None if args else "hidden_states"
        hidden = args[0] if args else rest.pop("hidden_states", None)
        if not isinstance(hidden, Tensor):
            raise _not_a_chain(f"block {path!r} gets no hidden states")
        if any(hasattr(value, "get_seq_length") for value in (*args, *rest.values())):
            raise _not_a_chain(f"block {path!r} gets a key-value cache")
        if not calls:
            states.append(hidden)
        elif not (hidden is link[0] or torch.equal(hidden, link[0])):
            raise _not_a_chain(f"block {path!r} does not read the output of the one before it")
        calls.append(_Call(args[1:], rest, name))

    return before


def _keep_last(link: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    """Return a hook that keeps the latest output."""

    def after(_: nn.Module, __: object, output: object) -> None:
        link[:] = [_first(output)]

    return after


def _not_a_chain(reason: str) -> EditError:
    return EditError(f"the blocks cannot be run one by one ({reason}); use cached=False")


def _first(output: object) -> Tensor:
    value = output[0] if isinstance(output, tuple | list) else output
    return cast("Tensor", value)


def _key(model: nn.Module, site: Site) -> str:
    """Return the key of a site: its mangled module path, or its name where that cannot say it."""
    prefix = base_of(model)[0]
    prefix = f"{prefix}." if prefix else ""
    if site.when == "input" or "-" in site.module or not site.module.startswith(prefix):
        return site.name
    return mangle_module_path(site.module.removeprefix(prefix))


def _batches(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    z: object,
    kind: LabelKind,
    size: int,
    max_length: int | None,
) -> list[_Batch]:
    """Tokenise, and pair every token that counts with its label."""
    labels, counts = _encode(z, len(texts), kind)
    batches = []
    start = 0
    for first in range(0, len(texts), size):
        part = list(texts[first : first + size])
        inputs = encode_batch(model, tokenizer, part, first, max_length)
        batch = _unlabelled(inputs, first)
        if counts is None:
            batch.labels = labels[batch.rows.to(labels.device)]
        else:
            lengths = batch.mask.sum(1).tolist()
            _check_lengths(lengths, counts[first : first + size], first)
            batch.labels = labels[start : start + sum(lengths)]
            start += sum(lengths)
        batches.append(batch)
    return batches


def _background_batches(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    size: int,
    max_length: int | None,
) -> list[_Batch]:
    """Tokenise texts that have no labels."""
    return [
        _unlabelled(encode_batch(model, tokenizer, list(texts[i : i + size]), i, max_length), i)
        for i in range(0, len(texts), size)
    ]


def _unlabelled(inputs: dict[str, Tensor], first: int) -> _Batch:
    """Return a batch without labels; ``first`` is the index of its first text."""
    mask = inputs["attention_mask"].bool()
    texts = torch.arange(first, first + len(mask))
    return _Batch(inputs, mask, texts.repeat_interleave(mask.sum(1).cpu()))


def _check_lengths(lengths: list[int], counts: list[int], first: int) -> None:
    for i, (tokens, given) in enumerate(zip(lengths, counts, strict=True), first):
        if tokens != given:
            raise ShapeError(f"text {i} has {tokens} tokens and {given} token labels")


def _encode(z: object, n: int, kind: LabelKind) -> tuple[Tensor, list[int] | None]:
    """Return labels as columns, and the number of labels of each text if they are per token."""
    counts: list[int] | None = None
    nested = isinstance(z, list | tuple) and len(z) > 0 and not isinstance(z[0], str)
    if nested and hasattr(cast("Sequence[object]", z)[0], "__len__"):
        rows = [list(row) for row in cast("Sequence[Sequence[object]]", z)]
        if len(rows) != n:
            raise ShapeError(f"got {n} texts and token labels for {len(rows)}")
        counts = [len(row) for row in rows]
        z = [v.item() if isinstance(v, Tensor) else v for row in rows for v in row]
        n = len(z)
    encoded = encode_labels(z, n=n, kind=kind)
    values = encoded.values
    columns = one_hot(values, encoded.width) if values.ndim == 1 else values
    return columns.double(), counts
