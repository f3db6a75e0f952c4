"""Vectors at several sites of a model from one pass, kept in bfloat16, given out shuffled and again and again.

Texts are cut into windows of `max_length` tokens, and the windows are put in random order, so that every shard is
a sample of all texts. A forward pass ends after the last site. The first token of a window is left out, and so are
padding and the tokenizer's begin- and end-of-text tokens: their norms are outliers that a dictionary would spend
latents on.

Vectors lie in memory, or in a folder: safetensors shards beside a manifest with their hashes, each written whole or
not at all. An interrupted pass goes on where it stopped; a folder of other texts, sites or weights is refused. One
window in 20 is never given out for training, so that quality can be measured on vectors that were not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from concept_erasure._storage import write
from concept_erasure.collect import (
    Progress,
    Reached,
    _may_stop,
    _runner,
    _shown,
    accepted,
    check_texts,
    evaluating,
    select,
)
from concept_erasure.errors import FormatError, ShapeError, SiteNotFoundError
from concept_erasure.sites import Site, fingerprint, hook, model_id, resolve

__all__ = ["Activations", "Window", "collect_activations", "cut", "padded", "special_ids"]

MANIFEST = "activations.json"
FORMAT_VERSION = 1
SHARD = 2**16  # tokens of a shard, at most
BUFFER = 2**18  # vectors shuffled at a time
HELD_OUT = 20  # one window in so many is held out
_TEXTS_AT_ONCE = 256

Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens the model reads together.

    Attributes:
        ids: Shape ``(t,)``, int64.
        text: Index of the text they are from.
    """

    ids: Tensor
    text: int


def cut(tokenizer: Callable[..., Any], texts: Sequence[str], max_length: int) -> list[Window]:
    """Return texts as windows of at most `max_length` tokens, each with the begin-of-text token if texts have one.

    A rest of fewer than two tokens is dropped: its first token would be left out anyway.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    made: list[Window] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        for row, ids in enumerate(tokenizer(part)["input_ids"], start):
            head = ids[:1] if ids and ids[0] == bos else []
            body, step = ids[len(head) :], max_length - len(head)
            for at in range(0, len(body), step):
                piece = [*head, *body[at : at + step]]
                if len(piece) > 1:
                    made.append(Window(torch.tensor(piece), row))
    return made


class Activations:
    """Vectors at some sites, in shards.

    Attributes:
        sites: Names of the sites.
        widths: Width of the vectors of each.
        model: Name of the model.
        fingerprint: Of its weights.
    """

    def __init__(
        self, shards: Sequence[Mapping[str, Tensor] | Path], *, model: str = "", mark: str = ""
    ) -> None:
        if not shards:
            raise ValueError("there are no vectors")
        self._shards = list(shards)
        self.model, self.fingerprint = model, mark
        names = _names(self._shards[0])
        self.sites = tuple(name for name in names if name not in ("windows", "texts"))
        self.widths = {site: _tensor(self._shards[0], site).shape[1] for site in self.sites}
        windows = [_tensor(shard, "windows") for shard in self._shards]
        few = len(torch.cat(windows).unique()) < 2 * HELD_OUT
        self._held = [
            (torch.arange(len(w)) if few else w) % HELD_OUT == HELD_OUT - 1 for w in windows
        ]

    @classmethod
    def of(cls, x: Tensor, site: str = "vectors") -> Activations:
        """Return vectors ``(N, d)`` that are at hand already, each its own window."""
        if x.ndim != 2:
            raise ShapeError(f"vectors must have shape (N, d); got {tuple(x.shape)}")
        rows = torch.arange(len(x), dtype=torch.int32)
        return cls([{site: x.detach(), "windows": rows, "texts": rows}])

    def __len__(self) -> int:
        """Return the number of vectors of a site that are given out for training."""
        return sum(int((~held).sum()) for held in self._held)

    def held_out(self, site: str, limit: int = 2**15) -> Tensor:
        """Return vectors ``(m, d)`` of a site that are never in `batches`, m at most `limit`."""
        parts: list[Tensor] = []
        for shard, held in zip(self._shards, self._held, strict=True):
            if sum(map(len, parts)) < limit:
                parts.append(_tensor(shard, self._known(site))[held])
        return torch.cat(parts)[:limit]

    def all(self, site: str) -> Tensor:
        """Return every vector of a site, held out or not, shape ``(N, d)``."""
        return torch.cat([_tensor(shard, self._known(site)) for shard in self._shards])

    def sample(self, site: str, limit: int = 2**15, seed: int = 0) -> Tensor:
        """Return up to `limit` random vectors of the first training buffer, shape ``(m, d)``."""
        size = min(limit, len(self))
        return next(self.batches(site, size, seed=seed))

    def _known(self, site: str) -> str:
        if site not in self.sites:
            raise SiteNotFoundError(f"no vectors of {site!r}; there are {', '.join(self.sites)}")
        return site

    def _groups(self, batch_size: int, order: Sequence[int]) -> list[list[int]]:
        """Return shards that are shuffled together: as many as fill the buffer, at least a batch."""
        size = max(BUFFER, batch_size)
        groups: list[list[int]] = [[]]
        filled = 0
        for number in order:
            rows = int((~self._held[number]).sum())
            if groups[-1] and filled >= batch_size and filled + rows > size:
                groups.append([])
                filled = 0
            groups[-1].append(number)
            filled += rows
        if len(groups) > 1 and filled < batch_size:
            last = groups.pop()
            groups[-1] += last
        return groups

    def batches(
        self, site: str, batch_size: int, *, seed: int = 0, start: int = 0
    ) -> Iterator[Tensor]:
        """Yield batches ``(batch_size, d)`` without end, every vector once before any comes again.

        Shards are taken in random order and shuffled together, a buffer of them at a time; what is left of a buffer
        when no whole batch remains is dropped until the next round.

        Args:
            site: Name of the site.
            batch_size: Vectors a batch.
            seed: Of the order.
            start: Number of the first batch wanted; those before it cost nothing to skip.

        Raises:
            SiteNotFoundError: If there are no vectors of the site.
            ValueError: If there are fewer vectors than a batch holds.
        """
        self._known(site)
        if not 1 <= batch_size <= len(self):
            raise ValueError(
                f"batch_size must lie between 1 and the {len(self)} vectors; got {batch_size}"
            )
        return self._batches(site, batch_size, seed, start)

    def _batches(self, site: str, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        held: tuple[list[int], Tensor, Tensor] | None = None
        while True:
            order = torch.randperm(len(self._shards), generator=generator).tolist()
            for group in self._groups(batch_size, order):
                rows = sum(int((~self._held[number]).sum()) for number in group)
                mixed = torch.randperm(rows, generator=generator)
                count = rows // batch_size
                if start >= count:
                    start -= count
                    continue
                if held is None or held[0] != group:
                    held = None  # the old buffer goes before the new one comes
                    held = (group, *self._pool(site, group))
                _, pool, index = held
                for number in range(start, count):
                    yield pool[index[mixed[number * batch_size : (number + 1) * batch_size]]]
                start = 0

    def _pool(self, site: str, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = [_tensor(self._shards[number], site) for number in group]
        free = torch.cat([~self._held[number] for number in group]).nonzero()[:, 0]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), free


def collect_activations(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    *,
    sites: str | Sequence[str],
    cache_dir: str | Path | None = None,
    tokens: int | None = None,
    max_length: int = 128,
    batch_size: int = 16,
    keep: Keep | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    resume: bool = True,
    progress: Progress | None = None,
) -> Activations:
    """Return the vectors of texts at some sites, all from one pass over the texts.

    Args:
        model: A Hugging Face model; not changed.
        tokenizer: Its tokenizer.
        texts: The texts, of any length.
        sites: Names, patterns or module paths, see `concept_erasure.sites.resolve`.
        cache_dir: Folder for the shards; None keeps them in memory (2 bytes a number: 1.1 GB for a million vectors of
            width 576).
        tokens: Read so many tokens at most, of randomly chosen windows; None reads all.
        max_length: Tokens of a window.
        batch_size: Windows of a forward pass.
        keep: Which tokens to keep besides: from input ids ``(b, t)`` to a mask ``(b, t)``.
        dtype: Of the vectors kept.
        seed: Of the order of the windows.
        resume: Whether to use what a folder holds already; False computes it again.
        progress: Whether to show a bar; a function is called with (windows done, windows in all). Default: on a
            terminal.

    Raises:
        FormatError: If the folder holds other vectors, or a shard is damaged.
        SiteNotFoundError: If a site does not exist or is not reached.
        ValueError: If no tokens are left, options are out of range, or activations are not finite.
    """
    check_texts(texts, batch_size, None)
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2: the first token is left out; got {max_length}"
        )
    places = resolve(model, sites)
    windows = _chosen(cut(tokenizer, texts, max_length), tokens, seed)
    size = max(1, SHARD // max_length)
    specials = special_ids(tokenizer)
    reader = _Reader(model, places, specials, keep, dtype)
    parts = [list(range(s, min(s + size, len(windows)))) for s in range(0, len(windows), size)]
    store = None
    if cache_dir is not None:
        key = {
            "model": fingerprint(model), "windows": _digest(windows), "sites": [p.name for p in places],
            "modules": [f"{p.module}:{p.when}" for p in places], "specials": sorted(specials), "dtype": str(dtype),
            "keep": keep is not None, "shard": size, "shards": len(parts), "format_version": FORMAT_VERSION,
        }  # fmt: skip
        store = _Store(Path(cache_dir), key, resume)
    shards: list[Mapping[str, Tensor] | Path] = []
    with _shown(progress, len(windows), "reading windows") as tell:
        for number, part in enumerate(parts):
            path = None if store is None else store.path(number)
            if path is None:
                made = _shard(reader, windows, part, batch_size)
                shards.append(made if store is None else store.save(number, made))
            else:
                shards.append(path)
            tell(part[-1] + 1)
    if store is None:
        shards = [_joined(cast("list[Mapping[str, Tensor]]", shards))]
    return Activations(shards, model=model_id(model), mark=fingerprint(model))


def _chosen(windows: Sequence[Window], tokens: int | None, seed: int) -> list[Window]:
    """Return windows in random order, no more than have so many tokens."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    made: list[Window] = []
    total = 0
    for number in order:
        if tokens is not None and total >= tokens:
            break
        made.append(windows[number])
        total += len(windows[number].ids) - 1
    if not made:
        raise ValueError("the texts hold no tokens beyond the first of each; give longer texts")
    return made


def special_ids(tokenizer: Callable[..., Any]) -> set[int]:
    """Return the ids that begin, end and pad texts: their vectors are left out."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    found = (getattr(tokenizer, name, None) for name in names)
    return {number for number in found if isinstance(number, int)}


class _Reader:
    """Runs batches of windows and returns the vectors of the tokens kept."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        specials: set[int],
        keep: Keep | None,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.sites, self.keep, self.dtype = model, sites, keep, dtype
        self.runner = _runner(model, sites)
        self.specials = torch.tensor(sorted(specials), dtype=torch.int64)
        self.device = next(model.parameters()).device
        self.once = False  # a whole pass met every site once

    def __call__(self, windows: Sequence[Window]) -> tuple[dict[str, Tensor], Tensor]:
        """Return vectors ``(m, d)`` by site, and which of the windows each is from, on the CPU."""
        ids, real = padded(windows)
        kept = real & ~torch.isin(ids, self.specials)
        kept[:, 0] = False
        if self.keep is not None:
            kept &= self.keep(ids).to(kept)
        inputs = {"input_ids": ids.to(self.device), "attention_mask": real.long().to(self.device)}
        found = self._run(inputs, kept.to(self.device))
        return found, torch.arange(len(windows))[:, None].expand_as(kept)[kept]

    def _run(self, inputs: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        met: Counter[str] = Counter()
        stop = self.once and _may_stop(self.model)
        with ExitStack() as stack:
            for site in self.sites:

                def take(x: Tensor, name: str = site.name) -> None:
                    found[name] = select(x, kept, "all").detach().to("cpu", self.dtype)
                    met[name] += 1
                    if stop and len(found) == len(self.sites):
                        raise Reached

                stack.callback(hook(self.model, site, take).remove)
            stack.enter_context(evaluating(self.model))
            with suppress(Reached):
                self.runner(**accepted(self.runner, inputs))
        missing = [site.name for site in self.sites if site.name not in found]
        if missing:
            raise SiteNotFoundError(f"the forward pass did not reach {', '.join(missing)}")
        self.once = all(count == 1 for count in met.values())
        return found


def padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Return ids and a mask of real tokens ``(b, t)``, padded on the right."""
    lengths = torch.tensor([len(w.ids) for w in windows])
    ids = nn.utils.rnn.pad_sequence([w.ids for w in windows], batch_first=True)
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def _shard(
    reader: _Reader, windows: Sequence[Window], part: Sequence[int], batch_size: int
) -> dict[str, Tensor]:
    """Return the vectors of some windows; those of like length are read together, so that little is padded."""
    order = sorted(part, key=lambda number: len(windows[number].ids))
    pieces: dict[str, list[Tensor]] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found, rows = reader([windows[number] for number in numbers])
        found["windows"] = torch.tensor(numbers, dtype=torch.int32)[rows]
        texts = torch.tensor([windows[number].text for number in numbers], dtype=torch.int32)
        found["texts"] = texts[rows]
        for name, value in found.items():
            pieces.setdefault(name, []).append(value)
    made = {name: torch.cat(values) for name, values in pieces.items()}
    for name, value in made.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"activations at {name!r} are not finite; run the model in float32 or bfloat16"
            )
    return made


def _joined(shards: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    if len(shards) == 1:
        return shards[0]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def _names(shard: Mapping[str, Tensor] | Path) -> list[str]:
    if isinstance(shard, Path):
        with safe_open(shard, framework="pt") as file:
            return sorted(file.keys())
    return sorted(shard)


def _tensor(shard: Mapping[str, Tensor] | Path, name: str) -> Tensor:
    if isinstance(shard, Path):
        with safe_open(shard, framework="pt") as file:
            return cast("Tensor", file.get_tensor(name))
    return shard[name]


def _digest(windows: Sequence[Window]) -> str:
    sha = hashlib.sha256()
    for window in windows:
        sha.update(f";{len(window.ids)};".encode())
        sha.update(window.ids.numpy().tobytes())
    return sha.hexdigest()


class _Store:
    """A folder with a manifest and shards, each of which is there whole or not at all."""

    def __init__(self, folder: Path, key: Mapping[str, object], resume: bool) -> None:
        self.folder, self.key = folder, json.loads(json.dumps(dict(key)))
        self.files: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if not resume or not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known, files = dict(record["key"]), dict(record["files"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise FormatError(
                f"{path} is damaged ({error}); delete the folder, or pass resume=False"
            ) from None
        if known != self.key:
            names = [name for name in self.key if known.get(name) != self.key[name]]
            raise FormatError(
                f"{folder} holds vectors of something else (it differs in {', '.join(names)}); use another folder, or "
                "pass resume=False to overwrite it"
            )
        self.files = files

    def path(self, number: int) -> Path | None:
        """Return the file of a shard if it is there; a damaged one is an error."""
        path = self.folder / f"activations-{number:05d}.safetensors"
        if path.name not in self.files or not path.exists():
            return None
        if _sha256(path) != self.files[path.name]:
            raise FormatError(
                f"{path} is damaged: its content is not what was written; delete it to compute it again"
            )
        return path

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write a shard, then say in the manifest that it is there."""
        path = self.folder / f"activations-{number:05d}.safetensors"
        held = {name: value.contiguous() for name, value in tensors.items()}
        try:
            write(path, lambda temporary: save_file(held, temporary))
            self.files[path.name] = _sha256(path)
            text = json.dumps({"key": self.key, "files": self.files}, indent=1, sort_keys=True)
            write(self.folder / MANIFEST, lambda p: p.write_text(text, encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 safetensors wraps the system's errors in its own
            raise OSError(
                f"vectors could not be written to {self.folder} ({error}): free some space, or use another folder"
            ) from error
        return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
