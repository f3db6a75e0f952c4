"""Targets computed once and kept: per position the most probable tokens, not the whole vocabulary.

The frozen model is then not run while training. A cache lives in memory, or in a folder as safetensors shards beside a
manifest with their hashes; an interrupted computation goes on where it stopped, and a folder of other texts, another
model or other options is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure._storage import json_default, write
from concept_erasure.edit import base_fingerprint
from concept_erasure.errors import FormatError
from concept_erasure.language.batches import Batch, Encoded, Head, chunked, hidden_at
from concept_erasure.language.targets import Lowered, TopK

__all__ = ["TargetCache", "Targets", "cache_key"]

MANIFEST = "targets.json"
SHARD = 256  # texts
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets at M positions, text by text and place by place.

    Attributes:
        top: The distributions.
        weights: Factor of each in the loss, shape ``(M,)``, float32.
        rows: Index of the text of each, shape ``(M,)``, not falling.
        places: Index of the token it is for in its text, shape ``(M,)``, rising in each text.
        lowered: Tokens that are to be less likely than some level, beside the distribution.
    """

    top: TopK
    weights: Tensor
    rows: Tensor
    places: Tensor
    lowered: Lowered | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, on the CPU."""
        made = {
            "indices": self.top.indices,
            "log_probs": self.top.log_probs,
            "tail": self.top.tail,
            "weights": self.weights.float(),
            "rows": self.rows.int(),
            "places": self.places.int(),
        }
        if self.lowered is not None:
            made |= {"lowered": self.lowered.indices, "levels": self.lowered.levels}
        return {name: value.detach().cpu().contiguous() for name, value in made.items()}

    def where(self, keep: Tensor) -> Self:
        """Return some of them, by a mask ``(M,)``."""
        index = keep.nonzero()[:, 0]
        return type(self)(
            self.top.rows(index),
            self.weights[index],
            self.rows[index],
            self.places[index],
            None if self.lowered is None else self.lowered.rows(index),
        )


Make = Callable[[list[int]], Targets]


def cache_key(
    model: nn.Module, texts: Sequence[Encoded], options: Mapping[str, object]
) -> dict[str, object]:
    """Return what targets depend on: the weights, the texts as tokens, and the options."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(f";{len(text)};".encode())
        sha.update(text.ids.numpy().tobytes() + text.supervised.numpy().tobytes())
    plain = json.loads(json.dumps(dict(options), default=json_default, sort_keys=True))
    return {"model": base_fingerprint(model), "texts": sha.hexdigest(), "options": plain}


class TargetCache:
    """The targets of some texts.

    Attributes:
        texts: The texts with exactly those tokens supervised that have a target. Texts without any are left out, so
            that index k here is text ``kept[k]`` of those it was built from.
        kept: See above.
    """

    def __init__(self, texts: Sequence[Encoded], shards: Sequence[Mapping[str, Tensor]]) -> None:
        self.texts: list[Encoded] = []
        self.kept: list[int] = []
        self._shards = list(shards)
        self._spans: list[tuple[int, int, int]] = []  # shard, first, last + 1
        for number, shard in enumerate(self._shards):
            rows, counts = shard["rows"].unique_consecutive(return_counts=True)
            ends = counts.cumsum(0).tolist()
            for row, start, end in zip(rows.tolist(), [0, *ends], ends, strict=False):
                supervised = torch.zeros(len(texts[row]), dtype=torch.bool)
                supervised[shard["places"][start:end].long()] = True
                self.texts.append(Encoded(texts[row].ids, supervised))
                self.kept.append(row)
                self._spans.append((number, start, end))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def positions(self) -> int:
        """Number of targets."""
        return sum(end - start for _, start, end in self._spans)

    def at(self, batch: Batch) -> tuple[TopK, Tensor]:
        """Return the targets of a batch of `texts`, in the order of its supervised tokens, with their weights."""
        indices, log_probs, tail, weights = self._gather(
            batch, ("indices", "log_probs", "tail", "weights")
        )
        return TopK(indices, log_probs, tail), weights

    def lowered_at(self, batch: Batch) -> Lowered | None:
        """Return the tokens to be lowered of a batch of `texts`, in the same order; None if there are none."""
        if "lowered" not in self._shards[0]:
            return None
        return Lowered(*self._gather(batch, ("lowered", "levels")))

    def _gather(self, batch: Batch, names: Sequence[str]) -> list[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in names]
        for row in batch.rows.tolist():
            number, start, end = self._spans[row]
            for name, into in zip(names, parts, strict=True):
                into.append(self._shards[number][name][start:end])
        return [torch.cat(part).to(batch.input_ids.device) for part in parts]

    def loss(
        self, width: int | None = None, *, lower: float = 0.0, drift: float = 0.0
    ) -> Callable[[nn.Module, Batch], Tensor]:
        """Return the loss of a batch for a `Term`: the sum of weight times ``KL(target || P_th)`` and more.

        The weights are scaled to mean 1.

        Args:
            width: Number of tokens of the vocabulary, if known: it decides how many positions go at a time.
            lower: Factor of the excess of the tokens to be lowered, see `Lowered`.
            drift: Factor of the change of log-probabilities, see `TopK.drift`.
        """
        mean = float(self.column("weights").mean())

        def summed(model: nn.Module, batch: Batch) -> Tensor:
            top, weights = self.at(batch)
            lowered = self.lowered_at(batch) if lower else None

            def part(logits: Tensor, where: Tensor) -> Tensor:
                log_q = logits.float().log_softmax(-1)
                found = top.rows(where).kl(log_q)
                if lowered is not None:
                    found = found + lower * lowered.rows(where).excess(log_q)
                if drift:
                    found = found + drift * top.rows(where).drift(log_q)
                return found * weights[where] / mean

            return chunked(part, hidden_at(model, batch), Head(model), vocabulary=width).sum()

        return summed

    def column(self, name: str) -> Tensor:
        """Return one value of all positions, ``weights`` or ``tail``, shape ``(positions,)``."""
        return torch.cat([shard[name] for shard in self._shards])

    @classmethod
    def build(
        cls,
        texts: Sequence[Encoded],
        make: Make,
        *,
        key: Mapping[str, object],
        folder: str | Path | None = None,
        batch_size: int = 8,
        shard: int = SHARD,
        progress: bool = False,
    ) -> TargetCache:
        """Compute the targets, or read those that are in the folder already.

        Args:
            texts: The texts.
            make: Returns the targets of the texts with these indices.
            key: What the targets depend on; see `cache_key`. A folder is used for one key only.
            folder: Where they are kept; None keeps them in memory.
            batch_size: Texts handed to `make` at a time.
            shard: Texts of a file.
            progress: Whether to show a bar.

        Raises:
            FormatError: If the folder belongs to another key, or a file is damaged; the message says what to delete.
            OSError: If the folder cannot be written, a full disk for instance. Nothing half-written is left, and what
                was written before is used the next time.
        """
        store = None if folder is None else _Store(Path(folder), key, len(texts), shard)
        made: list[Mapping[str, Tensor]] = []
        starts = range(0, len(texts), shard)
        with tqdm(total=len(texts), disable=not progress, desc="targets", leave=False) as bar:
            for number, start in enumerate(starts):
                rows = list(range(start, min(start + shard, len(texts))))
                found = None if store is None else store.read(number)
                if found is None:
                    found = _joined(_parts(texts, make, rows, batch_size, bar))
                    if store is not None:
                        store.save(number, found)
                        found = cast("dict[str, Tensor]", store.read(number))
                else:
                    bar.update(len(rows))
                made.append(found)
        return cls(texts, made)


def _parts(
    texts: Sequence[Encoded],
    make: Make,
    rows: list[int],
    batch_size: int,
    bar: Any,  # noqa: ANN401
) -> Iterator[Targets]:
    """Yield targets, texts of like length together, so that little is padded."""
    order = sorted(rows, key=lambda row: len(texts[row]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        yield make(part)
        bar.update(len(part))


def _joined(parts: Iterator[Targets]) -> dict[str, Tensor]:
    found = [part.tensors() for part in parts]
    whole = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    order = whole["rows"].argsort(stable=True)
    return {name: value[order].contiguous() for name, value in whole.items()}


class _Store:
    """A folder with a manifest and shards, each of which is there whole or not at all."""

    def __init__(self, folder: Path, key: Mapping[str, object], texts: int, shard: int) -> None:
        self.folder = folder
        self.key = {**key, "format_version": FORMAT_VERSION, "number": texts, "shard": shard}
        self.files: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        path = folder / MANIFEST
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known, self.files = record["key"], dict(record["files"])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is damaged ({error}); delete the folder") from None
        if known != self.key:
            names = [
                n for n in self.key if not isinstance(known, dict) or known.get(n) != self.key[n]
            ]
            raise FormatError(
                f"{folder} holds targets of something else (it differs in {', '.join(names)}); use another folder, or "
                "delete it"
            )

    def read(self, number: int) -> dict[str, Tensor] | None:
        name = _name(number)
        if name not in self.files:
            return None
        path = self.folder / name
        advice = f"delete {path} to compute it again"
        if not path.exists():
            return None
        if _sha256(path) != self.files[name]:
            raise FormatError(f"{path} is damaged: its content is not what was written; {advice}")
        try:
            return load_file(path)
        except Exception as error:  # noqa: BLE001 safetensors raises its own untyped errors
            raise FormatError(f"{path} is not readable ({error}); {advice}") from None

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        path = self.folder / _name(number)
        try:
            write(path, lambda temporary: save_file(tensors, temporary))
            self.files[path.name] = _sha256(path)
            text = json.dumps({"key": self.key, "files": self.files}, indent=1, sort_keys=True)
            write(self.folder / MANIFEST, lambda p: p.write_text(text, encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 safetensors wraps the system's errors in its own
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        return OSError(
            f"targets could not be written to {self.folder} ({error}): free some space, use another folder, or "
            "cache_dir=None to keep them in memory"
        )


def _name(number: int) -> str:
    return f"targets-{number:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
