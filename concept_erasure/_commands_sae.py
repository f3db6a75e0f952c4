"""The commands for sparse dictionaries: ``sae train`` and ``sae find``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from concept_erasure._cli_common import comma_names, say, short
from concept_erasure._cli_data import load_model
from concept_erasure._commands_language import _concept, _texts

if TYPE_CHECKING:
    from concept_erasure.sae.disentangler import Disentangler

__all__ = ["Find", "Sae", "Train", "load_dictionaries"]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a Matryoshka dictionary for each of some sites of a model, all from one pass over the texts."""

    model: str
    """Folder or hub id of a transformers model."""
    texts: str
    """File of texts: .txt, one a line, or .jsonl with the field "text". General ones, with more about the
    concepts to be looked for than usual; a few hundred thousand tokens at least."""
    sites: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--site",))]
    """Where in the model: MLP outputs such as mlp.9 to edit parameters."""
    out: str
    """Folder: one dictionary each in OUT/SITE, activations and checkpoints beside them. An interrupted run
    goes on from there."""
    widths: str | None = None
    """Sizes of the levels, rising, with commas between. Default: doubling from half the width of the site to
    eight times it."""
    k: float = 32
    """Latents that fire on a vector, on average."""
    tokens: int | None = None
    """Vectors to train on, repeats included. Default: each once, and at least 1000 steps."""
    batch_size: int | None = None
    """Vectors a step. Default: a 500th of what there is, from 256 to 4096."""
    learning_rate: float | None = None
    """Default: 3e-3 for runs of up to 1000 steps, falling to 3e-4 for long ones."""
    max_length: int = 128
    """Tokens the model reads together."""
    seed: int = 0
    """Of everything random."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    device: str | None = None
    """Device of the model, for example cuda:0. Default: cpu."""

    def run(self) -> None:
        """Train, save, and say how good the dictionaries are."""
        from concept_erasure.sae.disentangler import Disentangler
        from concept_erasure.sae.train import train_matryoshka

        texts = _texts(self.texts, "--texts")
        widths = None if self.widths is None else _widths(self.widths)
        model, tokenizer = load_model(self.model, self.gguf_file, self.device)
        made = train_matryoshka(
            model, tokenizer, texts or [], sites=self.sites, widths=widths, k=self.k, tokens=self.tokens,
            batch_size=self.batch_size, learning_rate=self.learning_rate, max_length=self.max_length,
            cache_dir=self.out, seed=self.seed, progress=sys.stderr.isatty(),
        )  # fmt: skip
        for dis in [made] if isinstance(made, Disentangler) else made.values():
            say(f"trained {dis!r}, saved to {Path(self.out) / dis.site}")
            quality = dis.report.get("quality")
            for name, value in quality.items() if isinstance(quality, dict) else ():
                if value not in (None, {}):
                    say(f"  {name}: {short(value)}")


@dataclass(frozen=True, kw_only=True)
class Find:
    """Find the latents of a concept; write a table for the edit and a report to read before."""

    model: str
    """Folder or hub id of the language model."""
    concept: str
    """A concept that comes with the library, such as harry_potter, or your yaml file."""
    disentanglers: tuple[str, ...]
    """Dictionaries: folders or files (of this library, sae-lens, dictionary_learning or sparsify), or
    RELEASE:ID of sae-lens' registry, such as gemma-scope-2-270m-pt-mlp:layer_9_width_16k_l0_medium."""
    out: str
    """Folder for features.json (the table), report.md and features.png."""
    scorers: str = "lens,contrast,attribution"
    """Scores that vote, with commas between."""
    top: int = 20
    """Latents of each dictionary, and each of its levels, that a score votes for."""
    vote: int = 2
    """Votes that a latent needs."""
    filters: bool = True
    """Edit each candidate alone, and drop those that do not lower the concept's tokens or damage others."""
    forget_texts: str | None = None
    """File of texts that express the concept (.txt, one a line, or .jsonl with the field "text"). Default:
    those of the concept, else the model's own samples."""
    retain_texts: str | None = None
    """Likewise, texts about its neighbours."""
    neutral_texts: str | None = None
    """Likewise, texts about something else. Default: none; damage is measured on those about neighbours."""
    batch_size: int = 16
    """Texts in one forward pass."""
    seed: int = 0
    """Of the choice of texts."""
    cache_dir: str | None = None
    """Folder for the model's own samples, so that they can be used again."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    device: str | None = None
    """Device of the model, for example cuda:0. Default: cpu."""

    def run(self) -> None:
        """Search, write, and print the table."""
        from concept_erasure.sae.feature_report import table_report, write_report
        from concept_erasure.sae.search import Filters, find_features

        concept = _concept(self.concept)
        texts: dict[str, Any] = {
            name: _texts(getattr(self, name), f"--{name.replace('_', '-')}")
            for name in ("forget_texts", "retain_texts", "neutral_texts")
        }
        scorers: Any = comma_names(self.scorers)
        if not self.disentanglers:
            raise ValueError("--disentanglers names no dictionary; train one with 'sae train'")
        known = load_dictionaries(self.disentanglers)
        model, tokenizer = load_model(self.model, self.gguf_file, self.device)
        table = find_features(
            model, tokenizer, known, concept, scorers=scorers, top=self.top, vote=self.vote,
            filters=Filters() if self.filters else None, batch_size=self.batch_size, seed=self.seed,
            cache_dir=self.cache_dir, progress=sys.stderr.isatty(), **texts,
        )  # fmt: skip
        write_report(table, self.out)
        report = table_report(table)
        if report.rows:
            say(report.to_table())
        say(f"{len(table)} features of {table.concept}, {len(table.dropped)} candidates dropped")
        say(f"wrote the table and the report to {self.out}; read {Path(self.out) / 'report.md'}")


@dataclass(frozen=True, kw_only=True)
class Sae:
    """Sparse dictionaries: train them, and find the latents of a concept in them."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[Find, tyro.conf.subcommand("find", prefix_name=False)]
    ]

    def run(self) -> None:
        """Do it."""
        self.command.run()


def load_dictionaries(names: tuple[str, ...]) -> dict[int | str, Disentangler]:
    """Return dictionaries by the name of their site, from folders, files or ``RELEASE:ID``.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If one does not say its site, or two sit at the same.
    """
    from concept_erasure.sae.disentangler import Disentangler

    made: dict[int | str, Disentangler] = {}
    for name in names:
        release, colon, inside = name.partition(":")
        local = not colon or Path(name).exists()
        dis = (
            Disentangler.from_pretrained(name)
            if local
            else Disentangler.from_pretrained(release, inside)
        )
        if not dis.site:
            raise ValueError(f"--disentanglers {name}: the files do not say its site; use Python")
        if dis.site in made:
            raise ValueError(f"--disentanglers {name}: there is another one at {dis.site}")
        made[dis.site] = dis
    return made


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in comma_names(text)]
    except ValueError:
        raise ValueError(
            f"--widths must be whole numbers with commas between; got {text}"
        ) from None
