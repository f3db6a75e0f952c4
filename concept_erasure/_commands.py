"""The commands of the command line, each a frozen dataclass that tyro turns into options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import tyro
from torch import Tensor

from concept_erasure import _cli_data, registry
from concept_erasure.errors import missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from concept_erasure.eraser import Eraser

__all__ = ["COMMANDS", "Command"]

Tokens = Literal["last", "first", "mean", "all"]


def say(text: str = "") -> None:
    """Write a line to standard output, the command line's only way to speak."""
    sys.stdout.write(f"{text}\n")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where vectors or texts come from."""

    source: tyro.conf.Positional[str]
    """Vectors: a .npy, .safetensors or .csv file. With --model, labelled texts: a .jsonl or .csv
    file, or the name of a data set."""
    labels: str | None = None
    """File with the labels (.npy, .csv, or text with one label a line) when SOURCE has none."""
    label_column: str = "label"
    """Column, key or tensor that holds the label."""
    text_column: str = "text"
    """Column or key that holds the text (with --model)."""
    model: str | None = None
    """Folder or hub id of a transformers model whose representations are to be used."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    site: str | None = None
    """Where in the model, for example residual.15 or norm.final. Default: the middle residual."""
    tokens: Tokens = "last"
    """Which tokens' representations to take."""
    split: str = "train"
    """Split of a named data set."""
    limit: int | None = None
    """Read at most so many texts."""
    batch_size: int = 32
    """Texts in one forward pass."""
    max_length: int | None = None
    """Cut texts after so many tokens."""
    device: str | None = None
    """Device of the model, for example cuda:0. Default: cpu."""


@dataclass(frozen=True, kw_only=True)
class List:
    """List the methods, with what each one guarantees."""

    family: str | None = None
    """Only methods of this family."""

    def run(self) -> None:
        """Print the table of methods."""
        rows = [registry.get(name) for name in registry.names()]
        families = sorted({row.family for row in rows})
        if self.family is not None and self.family not in families:
            raise ValueError(f"no family {self.family!r}; there are: {', '.join(families)}")
        rows = [row for row in rows if self.family in (None, row.family)]
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            promises = ", ".join(sorted(row.guarantees)) or "no guarantee"
            say(f"{row.name:<{width}}  {row.summary}  [{row.family}; {promises}]")


@dataclass(frozen=True, kw_only=True)
class Fit(Source):
    """Fit an eraser on labelled vectors, or on a model and labelled texts, and save it."""

    out: str
    """Folder for the eraser."""
    method: str = "leace"
    """Method, as named by `concept-erasure list`."""
    z_kind: Literal["auto", "classes", "continuous"] = "auto"
    """How labels are read: as classes, or as numbers."""
    rank: int | None = None
    """Erase only so many directions. Default: all that carry the concept."""
    strength: float | None = None
    """Fraction of the concept to erase, from 0 to 1. Default: the method's own, 1."""
    affine: bool | None = None
    """Keep the mean of the vectors (an offset is added). Default: the method's own."""

    def run(self) -> None:
        """Fit, save, and say where the eraser is and what it promises."""
        entry = registry.get(self.method)
        fit = getattr(entry.load(), "fit", None)
        options: dict[str, object] = {
            name: value
            for name in ("rank", "strength", "affine")
            if (value := getattr(self, name)) is not None
        }
        if self.z_kind != "auto":
            options["z_kind"] = self.z_kind
        if fit is None:
            raise ValueError(f"method {self.method!r} cannot be fitted from the command line")
        _check_options(self.method, fit, options)
        options |= entry.options
        x, z = _load(self, continuous=self.z_kind == "continuous")
        eraser: Eraser = fit(x, z, **options)
        eraser.save_pretrained(self.out)
        say(f"saved {self.method} eraser to {self.out}")
        for name, value in eraser.report.items():
            say(f"  {name}: {_short(value)}")


@dataclass(frozen=True, kw_only=True)
class Apply(Source):
    """Apply an eraser to vectors, or fold it into a model's weights, and save the result."""

    eraser: str
    """Folder or hub id of the eraser."""
    out: str
    """File for the erased vectors (.npy or .safetensors), or folder for the edited model."""
    source: tyro.conf.Positional[str | None] = None  # type: ignore[assignment]
    """Vectors: a .npy, .safetensors or .csv file. Leave it out with --model."""

    def run(self) -> None:
        """Write erased vectors, or an edited model."""
        eraser = _load_eraser(self.eraser)
        if self.model is not None:
            self._apply_to_model(eraser, self.model)
            return
        if self.source is None:
            raise ValueError("nothing to apply the eraser to; name a file of vectors or a --model")
        vectors = _cli_data.read_vectors(
            self.source,
            labels=self.labels,
            label_column=self.label_column,
            need_labels=self.labels is not None,
        )
        erased = _erase(eraser, vectors.x, vectors.z)
        _cli_data.write_vectors(erased, self.out)
        say(f"wrote {erased.shape[0]} vectors of width {erased.shape[1]} to {self.out}")

    def _apply_to_model(self, eraser: Eraser, name: str) -> None:
        from concept_erasure.eraser import ModelEraser, RepresentationEraser

        model, tokenizer = _load_model(name, self.gguf_file, self.device)
        if isinstance(eraser, RepresentationEraser):
            edit = eraser.apply(model, sites=self.site)
        elif isinstance(eraser, ModelEraser):
            edit = eraser.apply(model)
        else:
            raise TypeError(f"a {eraser.method} eraser cannot be put into a model")
        say(edit.summary())
        edit.commit()
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        say(f"wrote the edited model to {self.out}")


@dataclass(frozen=True, kw_only=True)
class Eval(Source):
    """Measure what probes read out of vectors before and after an eraser."""

    eraser: str
    """Folder or hub id of the eraser."""
    probes: tuple[Literal["linear", "svm", "mlp"], ...] = ("linear", "svm", "mlp")
    """Probes to train, afresh on the vectors before and after."""
    folds: int = 5
    """Folds of the cross-validation."""
    seed: int = 0
    """Seed of the folds and of the probes."""
    out: str | None = None
    """Folder for the report (json and markdown)."""

    def run(self) -> None:
        """Print the table, and write it when --out is given."""
        from concept_erasure.probes import cross_validate
        from concept_erasure.report import Cell, Report

        eraser = _load_eraser(self.eraser)
        x, z = _load(self)
        x = getattr(x, "x", x)
        if not isinstance(x, Tensor):
            raise TypeError(f"vectors must be a tensor, not {type(x).__name__}")
        erased = _erase(eraser, x, z)
        rows: list[Mapping[str, Cell]] = []
        for probe in self.probes:
            for name, values in (("before", x), ("after", erased)):
                result = cross_validate(values, z, probe=probe, folds=self.folds, seed=self.seed)
                rows.append(
                    {
                        "probe": probe,
                        "vectors": name,
                        "accuracy": result.accuracy,
                        "low": result.low,
                        "high": result.high,
                        "majority": result.majority,
                    }
                )
        meta = {"eraser": self.eraser, "source": self.source, "seed": self.seed, "n": len(x)}
        report = Report("What probes still read", rows, meta)
        say(report.to_markdown())
        if self.out is not None:
            report.save(self.out)
            say(f"wrote the report to {self.out}")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Print an eraser's card: what it was fitted on, what it promises, what was measured."""

    eraser: tyro.conf.Positional[str]
    """Folder or hub id of the eraser."""

    def run(self) -> None:
        """Print the card."""
        say(_load_eraser(self.eraser).card())


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Erase gender from a language model and from sentence embeddings; write report and plots."""

    out: str = "demo-out"
    """Folder for erasers, report and plots."""

    def run(self) -> None:
        """Run both demos."""
        from concept_erasure.evals import demo

        demo.run(Path(self.out))


class Command(Protocol):
    """What every command has."""

    def run(self) -> None:
        """Do it."""


COMMANDS: dict[str, Callable[..., Command]] = {
    "list": List,
    "fit": Fit,
    "apply": Apply,
    "eval": Eval,
    "card": Card,
    "demo": Demo,
}


def _load_eraser(name: str) -> Eraser:
    from concept_erasure.eraser import Eraser

    return Eraser.from_pretrained(name)


def _check_options(method: str, fit: Callable[..., object], options: Mapping[str, object]) -> None:
    """Refuse options that the method's ``fit`` does not have."""
    known = inspect.signature(fit).parameters
    for name in options:
        if name not in known:
            raise ValueError(f"method {method!r} has no option --{name.replace('_', '-')}")


def _load(source: Source, *, continuous: bool = False) -> tuple[object, object]:
    """Return vectors (or representations) and labels, as the options say."""
    if source.model is None:
        vectors = _cli_data.read_vectors(
            source.source, labels=source.labels, label_column=source.label_column
        )
        z = vectors.z
        return vectors.x, _numbers(z) if continuous and z is not None else z
    if source.labels is not None:
        raise ValueError("--labels is for vectors; with --model the label is a column of the texts")
    texts, labels = _cli_data.read_texts(
        source.source,
        text_column=source.text_column,
        label_column=source.label_column,
        split=source.split,
        limit=source.limit,
    )
    from concept_erasure.collect import collect
    from concept_erasure.sites import find_sites

    model, tokenizer = _load_model(source.model, source.gguf_file, source.device)
    residual = sorted(
        (name for name in find_sites(model) if name.startswith("residual.")),
        key=lambda name: int(name.split(".")[1]),
    )
    if source.site is None and not residual:
        raise ValueError("the model has no residual stream that is known by name; give --site")
    site = source.site or residual[len(residual) // 2]
    found = collect(
        model,
        tokenizer,
        texts,
        _numbers(labels) if continuous else labels,
        sites=site,
        tokens=source.tokens,
        batch_size=source.batch_size,
        max_length=source.max_length,
    )
    return found, found.z


def _load_model(
    name: str, gguf_file: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (causal where it can be) and its tokenizer."""
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "llm") from None
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or ())
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = loader.from_pretrained(name, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if device is None else model.to(device)), tokenizer


def _erase(eraser: Eraser, x: Tensor, z: object) -> Tensor:
    """Apply an eraser to vectors, with labels where it needs them."""
    if not callable(eraser):
        raise TypeError(f"a {eraser.method} eraser edits models and has no map on vectors")
    required = [
        parameter
        for parameter in inspect.signature(eraser).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    result = eraser(x) if len(required) < 2 else eraser(x, z)
    if not isinstance(result, Tensor):
        raise TypeError(f"the eraser returned {type(result).__name__}, not a tensor")
    return result


def _numbers(z: Tensor | list[str]) -> Tensor:
    """Return labels read from text as floats."""
    if isinstance(z, Tensor):
        return z
    try:
        return torch.tensor([float(value) for value in z], dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"--z-kind continuous needs numbers as labels: {error}") from None


def _short(value: object) -> str:
    """Show a report's value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
