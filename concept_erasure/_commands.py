"""The commands of the command line, each a frozen dataclass that tyro turns into options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

import torch
import tyro
from torch import Tensor

from concept_erasure import _cli_data, registry
from concept_erasure.errors import EditError, missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from concept_erasure.edit import Edit
    from concept_erasure.eraser import Eraser
    from concept_erasure.linear.leace import LeaceEraser, LeaceFitter

__all__ = ["COMMANDS", "Command"]

Tokens = Literal["last", "first", "mean", "all"]
STREAMED = registry.METHODS["leace"].target  # the class that has a streaming fitter


def say(text: str = "") -> None:
    """Write a line to standard output, the command line's only way to speak."""
    sys.stdout.write(f"{text}\n")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where vectors or texts come from."""

    source: tyro.conf.Positional[str]
    """Vectors: a .npy, .safetensors or .csv file. With --model, labelled texts: a .jsonl or .csv
    file, or a data set: a name on the hub, or a folder written by save_to_disk."""
    labels: str | None = None
    """File with the labels (.npy, .csv, or text with one label a line) when SOURCE has none."""
    label_column: str = "label"
    """Column, key or tensor that holds the label."""
    text_column: str = "text"
    """Column or key that holds the text (with --model)."""
    task_column: str | None = None
    """Column, key or tensor with the labels of a task to keep (for splince). In a csv file of
    vectors it is never a feature."""
    model: str | None = None
    """Folder or hub id of a transformers model whose representations are to be used."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    sites: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--site",))] = ()
    """Where in the model, for example residual.15, norm.final or 'mlp.*'. Default: the middle
    residual; for apply, where the eraser was fitted."""
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

    task_labels: str | None = None
    """File with the labels of a task to keep (for splince), when SOURCE has none."""
    task_kind: Literal["auto", "classes", "continuous"] = "auto"
    """How the task's labels are read."""

    def run(self) -> None:
        """Fit, save, and say where each eraser is and what it promises."""
        entry = registry.get(self.method)
        fit = getattr(entry.load(), "fit", None)
        if fit is None:
            raise ValueError(f"method {self.method!r} cannot be fitted from the command line")
        options = self._options(fit)
        if self.model is None:
            self._save(self._fit_vectors(fit, options | entry.options), self.out)
            return
        if self.labels is not None or self.task_labels is not None:
            raise ValueError(
                "files of labels are for vectors; with --model labels are columns of the texts, "
                "--label-column and --task-column"
            )
        texts = self._texts()
        model, tokenizer = _load_model(self.model, self.gguf_file, self.device)
        sites = _site_names(model, self.sites)
        if entry.target == STREAMED:
            fitted = self._stream(model, tokenizer, texts, sites, options | entry.options)
        else:
            say(
                f"{self.method} cannot be fitted in a stream: the vectors of all {len(texts)} "
                "texts are held in memory"
            )
            fitted = self._collect(model, tokenizer, texts, sites, fit, options | entry.options)
        for site, eraser in fitted.items():
            self._save(eraser, self.out if len(fitted) == 1 else str(Path(self.out) / site))

    def _options(self, fit: Callable[..., Eraser]) -> dict[str, Any]:
        """Return the options that were given; refuse those the method lacks."""
        options = {
            name: value
            for name in ("rank", "strength", "affine")
            if (value := getattr(self, name)) is not None
        }
        if self.z_kind != "auto":
            options["z_kind"] = self.z_kind
        _check_options(self.method, fit, options)
        if "y" in inspect.signature(fit).parameters:
            if self.task_column is None and self.task_labels is None:
                raise ValueError(
                    f"method {self.method!r} keeps what a task needs; name the task's labels with "
                    "--task-column, or a file of them with --task-labels"
                )
            if self.task_kind != "auto":
                options["y_kind"] = self.task_kind
        elif self.task_labels is not None:
            raise ValueError(f"method {self.method!r} has no option --task-labels")
        return options

    def _fit_vectors(self, fit: Callable[..., Eraser], options: dict[str, Any]) -> Eraser:
        takes_task = "y" in inspect.signature(fit).parameters
        vectors = _cli_data.read_vectors(
            self.source,
            labels=self.labels,
            label_column=self.label_column,
            task_labels=self.task_labels,
            task_column=self.task_column,
        )
        if vectors.z is None:
            raise ValueError(f"{self.source} holds no labels")
        z = _read_labels(vectors.z, self.method, continuous=self.z_kind == "continuous")
        if takes_task and vectors.y is not None:
            y = _numbers(vectors.y) if self.task_kind == "continuous" else vectors.y
            options = {**options, "y": y}
        return fit(vectors.x, z, **options)

    def _texts(self) -> _cli_data.Texts:
        return _cli_data.open_texts(
            self.source,
            text_column=self.text_column,
            label_column=self.label_column,
            task_column=self.task_column,
            continuous=self.z_kind == "continuous",
            continuous_task=self.task_kind == "continuous",
            split=self.split,
            limit=self.limit,
        )

    def _stream(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: _cli_data.Texts,
        sites: list[str],
        options: dict[str, Any],
    ) -> Mapping[str, Eraser]:
        """Fit at all sites in one pass; one batch of texts and vectors is in memory at a time."""
        from concept_erasure.collect import fit_streaming
        from concept_erasure.edit import base_fingerprint
        from concept_erasure.linear.leace import LeaceFitter
        from concept_erasure.sites import Space, model_id

        names = texts.z.names

        def fitter(width: int) -> LeaceFitter:
            return LeaceFitter(width, max(1, len(names)), **options)

        fitters = fit_streaming(
            model,
            tokenizer,
            texts,
            texts.z.values,
            sites=sites,
            fitter=fitter,
            tokens=self.tokens,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        name, mark = model_id(model), base_fingerprint(model)
        return {
            site: _named(one.eraser, names).with_space(
                Space(name, mark, site, self.tokens, one.x_dim)
            )
            for site, one in fitters.items()
        }

    def _collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: _cli_data.Texts,
        sites: list[str],
        fit: Callable[..., Eraser],
        options: dict[str, Any],
    ) -> Mapping[str, Eraser]:
        """Fit on the vectors of all texts at once."""
        from concept_erasure.collect import collect, take

        found = collect(
            model,
            tokenizer,
            texts,
            sites=sites,
            tokens=self.tokens,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        fitted: dict[str, Eraser] = {}
        for site in sites:
            vectors = found.pop(site)
            rows = torch.arange(len(texts)) if vectors.rows is None else vectors.rows
            z = take(texts.z.plain(), rows)
            given = dict(options)
            if "y" in inspect.signature(fit).parameters and texts.y is not None:
                given["y"] = take(texts.y.plain(), rows)
            labels = _read_labels(cast("Tensor | list[str]", z), self.method)
            fitted[site] = fit(vectors.x, labels, **given).with_space(vectors.space)
        return fitted

    def _save(self, eraser: Eraser, out: str) -> None:
        eraser.save_pretrained(out)
        say(f"saved {self.method} eraser to {out}")
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
            task_column=self.task_column,
            need_labels=False,
        )
        z = None if vectors.z is None else _read_labels(vectors.z, eraser.method)
        erased = _erase(eraser, vectors.x, z)
        _cli_data.write_vectors(erased, self.out)
        say(f"wrote {erased.shape[0]} vectors of width {erased.shape[1]} to {self.out}")

    def _apply_to_model(self, eraser: Eraser, name: str) -> None:
        from concept_erasure.eraser import ModelEraser, RepresentationEraser

        model, tokenizer = _load_model(name, self.gguf_file, self.device)
        before = set(model.state_dict())
        if isinstance(eraser, RepresentationEraser):
            edit = eraser.apply(model, sites=self.sites or None)
        elif isinstance(eraser, ModelEraser):
            edit = eraser.apply(model)
        else:
            raise TypeError(f"a {eraser.method} eraser cannot be put into a model")
        _check_saved_whole(model, before, edit)
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
        erased = _erase(eraser, x, _read_labels(z, eraser.method))
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


def _load(source: Source) -> tuple[Tensor, Tensor | list[str]]:
    """Return vectors ``(n, d)`` and their labels, as the options of an evaluation say."""
    if source.model is None:
        vectors = _cli_data.read_vectors(
            source.source,
            labels=source.labels,
            label_column=source.label_column,
            task_column=source.task_column,
        )
        if vectors.z is None:
            raise ValueError(f"{source.source} holds no labels")
        return vectors.x, vectors.z
    if source.labels is not None:
        raise ValueError("--labels is for vectors; with --model the label is a column of the texts")
    from concept_erasure.collect import collect, take

    texts = _cli_data.open_texts(
        source.source,
        text_column=source.text_column,
        label_column=source.label_column,
        split=source.split,
        limit=source.limit,
    )
    model, tokenizer = _load_model(source.model, source.gguf_file, source.device)
    sites = _site_names(model, source.sites)
    if len(sites) != 1:
        raise ValueError(f"one site at a time; --sites names {', '.join(sites)}")
    found = collect(
        model,
        tokenizer,
        texts,
        sites=sites[0],
        tokens=source.tokens,
        batch_size=source.batch_size,
        max_length=source.max_length,
    )
    z = texts.z.plain()
    return found.x, z if found.rows is None else cast("Tensor | list[str]", take(z, found.rows))


def _site_names(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """Return the names of the sites that patterns stand for; of none, the middle residual."""
    from concept_erasure.sites import find_sites, resolve

    if wanted:
        return [site.name for site in resolve(model, wanted)]
    residual = [name for name, site in find_sites(model).items() if site.kind == "residual"]
    if not residual:
        raise ValueError("the model has no residual stream that is known by name; give --sites")
    return [residual[len(residual) // 2]]


def _named(eraser: LeaceEraser, names: tuple[str, ...]) -> LeaceEraser:
    """Return an eraser fitted on class numbers with the names of the classes in its report."""
    counts = eraser.report.get("n_per_class")
    if not isinstance(counts, Mapping):
        return eraser
    by_name = {name: counts[str(i)] for i, name in enumerate(names) if str(i) in counts}
    return replace(eraser, report={**eraser.report, "n_per_class": by_name})


def _check_saved_whole(model: PreTrainedModel, before: set[str], edit: Edit) -> None:
    """Undo an edit that saving the model would lose.

    Folding an offset can give a module a bias that the model's own code does not have; loading
    would then drop it without an error.
    """
    lost = [name for name in model.state_dict() if name not in before]
    if lost:
        edit.undo()
        raise EditError(
            f"a saved {type(model).__name__} has no place for {lost[0]!r}, which holds the "
            "eraser's offset; fit the eraser with --affine False, or choose another site"
        )


def _load_model(
    name: str, gguf_file: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (causal where it can be) and its tokenizer."""
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "llm") from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
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
    if len(required) > 1 and z is None:
        raise ValueError(
            f"a {eraser.method} eraser needs the labels of what it erases; name a file of them with "
            "--labels, or their column with --label-column"
        )
    result = eraser(x) if len(required) < 2 else eraser(x, z)
    if not isinstance(result, Tensor):
        raise TypeError(f"the eraser returned {type(result).__name__}, not a tensor")
    return result


def _read_labels(
    z: Tensor | list[str], method: str, *, continuous: bool = False
) -> Tensor | list[str]:
    """Return labels as numbers where the method needs numbers: when erasing it sees no others."""
    if continuous:
        return _numbers(z)
    if isinstance(z, Tensor) or "needs_labels" not in registry.get(method).guarantees:
        return z
    try:
        return torch.tensor([int(value) for value in z])
    except ValueError:
        return z


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
