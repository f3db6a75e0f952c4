"""Latents that stand for a concept: one of them, and a table of those that were found, with files and controls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

import torch
from safetensors.torch import save_file
from torch import Tensor

from concept_erasure._storage import json_default, plain, read_tensors, write
from concept_erasure.errors import FormatError

if TYPE_CHECKING:
    from concept_erasure.report import Report

__all__ = ["Feature", "FeatureTable"]

FORMAT_VERSION = 1
FILE, RATES = "features.json", "rates.safetensors"
_NEAREST = 20  # latents among which a control is drawn


@dataclass(frozen=True)
class Feature:
    """A latent and what speaks for it.

    Attributes:
        site: Name of the site of its dictionary, such as ``"mlp.9"``.
        index: Its number in the dictionary.
        direction: +1 if it writes the concept, -1 if it writes against it.
        scores: Numbers by name, see `concept_erasure.sae.search.find_features`.
        evidence: What a person can look at: ``top_tokens``, ``bottom_tokens``, ``examples``, ``votes``,
            ``voters``; ``dropped``
            says why a candidate was not kept.
        level: Matryoshka level that it first appears in; None for a flat dictionary.
    """

    site: str
    index: int
    direction: int = 1
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    evidence: Mapping[str, object] = field(default_factory=dict, hash=False)
    level: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in (1, -1):
            raise ValueError(
                f"direction must be +1 (writes the concept) or -1 (writes against it); got {self.direction}"
            )
        if self.index < 0:
            raise ValueError(f"index must not be negative; got {self.index}")

    @property
    def layer(self) -> int | None:
        """Number of the layer in the site's name; None if it has none."""
        tail = self.site.rpartition(".")[2]
        return int(tail) if tail.isdigit() else None

    @property
    def name(self) -> str:
        """Site, number and direction in one word, such as ``mlp.9/1203+``."""
        return f"{self.site}/{self.index}{'+' if self.direction > 0 else '-'}"

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for json."""
        return {
            "site": self.site, "index": self.index, "direction": self.direction, "level": self.level,
            "scores": dict(self.scores), "evidence": plain(dict(self.evidence)),
        }  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class FeatureTable:
    """The features of a concept, best first.

    Attributes:
        features: Those kept.
        concept: Its name.
        dropped: Candidates that a filter or the judge refused; ``evidence["dropped"]`` says why.
        rates: By site, the share of the tokens read on which each latent fires, shape ``(n,)``; for controls.
        widths: By site, the Matryoshka levels.
        meta: How it was found.
    """

    features: tuple[Feature, ...]
    concept: str = ""
    dropped: tuple[Feature, ...] = ()
    rates: Mapping[str, Tensor] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    meta: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        places = [(one.site, one.index) for one in self.features]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(f"latent {place[1]} of {place[0]!r} is in the table twice")

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.features)

    @overload
    def __getitem__(self, key: int) -> Feature: ...
    @overload
    def __getitem__(self, key: slice) -> FeatureTable: ...
    def __getitem__(self, key: int | slice) -> Feature | FeatureTable:
        """Return one feature, or the table of some."""
        if isinstance(key, slice):
            return replace(self, features=self.features[key])
        return self.features[key]

    def __repr__(self) -> str:
        return (
            f"FeatureTable({self.concept!r}, {len(self)} features at {', '.join(self.sites) or 'no site'}, "
            f"{len(self.dropped)} dropped)"
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites of its features, each once."""
        return tuple(dict.fromkeys(one.site for one in self.features))

    def select(
        self,
        n: int | None = None,
        *,
        sites: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        direction: int | None = None,
        level: int | None = None,
    ) -> FeatureTable:
        """Return the table of the first n that fit.

        Args:
            n: How many at most; None takes all.
            sites: Only of these sites.
            names: Only those with these names (`Feature.name`), kept or dropped: a person's choice.
            direction: Only +1 or -1.
            level: Only of this Matryoshka level or an earlier one.

        Raises:
            ValueError: If n is less than 1.
            KeyError: If a name is not in the table.
        """
        if n is not None and n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        pool = self.features
        if names is not None:
            known = {one.name: one for one in (*self.dropped, *self.features)}
            if missing := [name for name in names if name not in known]:
                raise KeyError(f"no feature {missing[0]!r}; there are {', '.join(known) or 'none'}")
            pool = tuple(known[name] for name in dict.fromkeys(names))
        fits = [
            one
            for one in pool
            if (sites is None or one.site in sites)
            and (direction is None or one.direction == direction)
            and (level is None or one.level is None or one.level <= level)
        ]
        return replace(self, features=tuple(fits[:n]))

    def random_control(self, seed: int) -> FeatureTable:
        """Return a table of equal size of other latents: same sites, levels and directions, similar firing rates.

        For each feature one of the 20 latents of its site and level whose firing rate is nearest (in ratio) is drawn;
        none that is in this table, kept or dropped, and none twice. A level in which no other latent fires lends from
        the whole dictionary.

        Args:
            seed: Of the draw.

        Raises:
            ValueError: If rates are not known, or a site has too few other latents that fire.
        """
        generator = torch.Generator().manual_seed(seed)
        taken = {(one.site, one.index) for one in (*self.features, *self.dropped)}
        drawn = []
        for one in self.features:
            index = self._like(one, taken, generator)
            taken.add((one.site, index))
            drawn.append(
                Feature(
                    one.site,
                    index,
                    one.direction,
                    scores={"rate": float(self.rates[one.site][index])},
                    evidence={"control_of": one.name},
                    level=one.level,
                )
            )
        meta = {**self.meta, "control": seed}
        return replace(self, features=tuple(drawn), dropped=(), meta=meta)

    def _like(self, one: Feature, taken: set[tuple[str, int]], generator: torch.Generator) -> int:
        if one.site not in self.rates:
            raise ValueError(
                f"firing rates at {one.site!r} are not known, so no control can be drawn; use a table of find_features"
            )
        rates = self.rates[one.site].double().cpu()
        free = rates > 0
        free[[index for site, index in taken if site == one.site]] = False
        if one.level is not None and one.site in self.widths:
            start, stop = (0, *self.widths[one.site])[one.level : one.level + 2]
            if bool(free[start:stop].any()):
                free[:start], free[stop:] = False, False
        pool = free.nonzero()[:, 0]
        if not len(pool):
            raise ValueError(
                f"no other latent of {one.site!r} fires: there is no control for {one.name}"
            )
        tiny = 1 / (2 * len(rates))
        mine = rates[one.index].clamp_min(tiny).log()
        near = (rates[pool].log() - mine).abs().argsort(stable=True)[:_NEAREST]
        pick = torch.randint(len(near), (1,), generator=generator)
        return int(pool[near[pick]])

    # --- for people ----------------------------------------------------------------------------------------------

    def to_report(self) -> Report:
        """Return a report with one row and one section a feature, to be read before agreeing to an edit."""
        from concept_erasure.sae.feature_report import table_report  # noqa: PLC0415 it imports this module

        return table_report(self)

    def plot(self, path: str | Path) -> Path:
        """Draw where each feature fires and what editing it alone does; needs the extra ``plots``.

        Args:
            path: File to write; its ending says the format.
        """
        from concept_erasure.sae.feature_report import plot_table  # noqa: PLC0415 it imports this module

        return plot_table(self, path)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``features.json`` and ``rates.safetensors`` into a folder, and return the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        held = {
            "format_version": FORMAT_VERSION, "concept": self.concept,
            "features": [one.to_dict() for one in self.features],
            "dropped": [one.to_dict() for one in self.dropped],
            "widths": {site: list(widths) for site, widths in self.widths.items()}, "meta": plain(dict(self.meta)),
        }  # fmt: skip
        text = json.dumps(held, indent=1, ensure_ascii=False, default=json_default) + "\n"
        rates = {site: rate.float().cpu().contiguous() for site, rate in self.rates.items()}
        write(folder / RATES, lambda path: save_file(rates, path))
        write(folder / FILE, lambda path: path.write_text(text, encoding="utf-8"))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> FeatureTable:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If it is not there.
            FormatError: If the files are not a table, or of a newer format.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {FILE} in {folder}; write one with FeatureTable.save or 'concept-erasure sae find'"
            )
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["format_version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{path} is of format {held['format_version']!r}; this library reads {FORMAT_VERSION}"
                )
            kept, dropped = (
                tuple(Feature(**row) for row in held[key]) for key in ("features", "dropped")
            )
            widths = {site: tuple(map(int, row)) for site, row in held["widths"].items()}
            concept, meta = str(held["concept"]), dict(held["meta"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path} is not a table of features ({error!r})") from None
        rates = read_tensors(Path(folder) / RATES)
        return cls(kept, concept, dropped, cast("Mapping[str, Tensor]", rates), widths, meta)
