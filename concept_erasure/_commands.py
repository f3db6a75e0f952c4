"""The commands of the command line, each a frozen dataclass that tyro turns into options."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

import tyro
from torch import Tensor

from concept_erasure import registry
from concept_erasure._cli_data import ModelSource, VectorSource, load_model, write_vectors
from concept_erasure.errors import ErasureWarning

if TYPE_CHECKING:
    from concept_erasure.collect import Representations
    from concept_erasure.eraser import Eraser
    from concept_erasure.labels import LabelKind
    from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
    from concept_erasure.sites import Space

__all__ = ["COMMANDS", "Command"]

Tokens = Literal["last", "first", "mean", "all"]
Kind = Literal["auto", "classes", "continuous"]
STREAMED = registry.METHODS["leace"].target  # the class that has a streaming fitter


def say(text: str = "") -> None:
    """Write a line to standard output, the command line's only way to speak."""
    sys.stdout.write(f"{text}\n")


# Options that do something for vectors only, and with --model only.
VECTOR_OPTIONS = ("labels", "task_labels")
MODEL_OPTIONS = (
    "gguf_file",
    "sites",
    "device",
    "bias",
    "tokens",
    "text_column",
    "split",
    "limit",
    "batch_size",
    "max_length",
    "background",
)

TUNING = ("rank", "strength", "affine", "shrinkage", "svd_tol")  # what some methods have


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model, and where in it."""

    model: str | None = None
    """Folder or hub id of a transformers model whose representations are to be used."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    sites: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--site",))] = ()
    """Where in the model, for example residual.15, norm.final or 'mlp.*'. Default: the middle
    residual; for apply and eval, where the eraser was fitted."""
    device: str | None = None
    """Device of the model, for example cuda:0. Default: cpu."""

    def _refuse_idle(self, names: Iterable[str], why: str) -> None:
        """Refuse those of the options that were given though they would do nothing."""
        for option in fields(self):
            if option.name in names and getattr(self, option.name) != option.default:
                raise ValueError(f"{_flag(option.name)} {why}")

    def _check_mode(self) -> None:
        if self.model is None:
            self._refuse_idle(
                MODEL_OPTIONS, "is for texts in a model; with vectors it does nothing"
            )
        else:
            self._refuse_idle(VECTOR_OPTIONS, "is for vectors; with --model it does nothing")


@dataclass(frozen=True, kw_only=True)
class Source(Place):
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
    tokens: Tokens | None = None
    """Which tokens' representations to take. Default: last; for eval, as the eraser was fitted."""
    split: str | None = None
    """Split of a named data set. Default: train."""
    limit: int | None = None
    """Read at most so many texts."""
    batch_size: int = 32
    """Texts in one forward pass."""
    max_length: int | None = None
    """Cut texts after so many tokens."""

    def _reader(
        self,
        *,
        task_labels: str | None = None,
        space: Space | None = None,
    ) -> VectorSource | ModelSource:
        """Return what reads the source; the space's site and tokens are used where none are given."""
        self._check_mode()
        if self.model is None:
            return VectorSource(
                source=self.source,
                labels=self.labels,
                label_column=self.label_column,
                task_labels=task_labels,
                task_column=self.task_column,
            )
        return ModelSource(
            source=self.source,
            model=self.model,
            gguf_file=self.gguf_file,
            device=self.device,
            sites=self.sites or (() if space is None else (space.site,)),
            tokens=self.tokens or ("last" if space is None else cast("Tokens", space.tokens)),
            text_column=self.text_column,
            label_column=self.label_column,
            task_column=self.task_column,
            split=self.split,
            limit=self.limit,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class List:
    """List the methods, with what each one guarantees and its paper."""

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
            say(f"{row.name:<{width}}  {row.summary}  [{row.family}; {promises}; {row.paper}]")


@dataclass(frozen=True, kw_only=True)
class Fit(Source):
    """Fit an eraser on labelled vectors, or on a model and labelled texts, and save it."""

    out: str
    """Folder for the eraser."""
    method: str = "leace"
    """Method, as named by `concept-erasure list`."""
    z_kind: Kind = "auto"
    """How labels are read: as classes, or as numbers. Default: labels in text are numbers if all are
    and some are fractions; in arrays whole numbers are classes, floats are numbers."""
    rank: int | None = None
    """Erase only so many directions. Default: all that carry the concept."""
    strength: float | None = None
    """Fraction of the concept to erase, from 0 to 1. Default: the method's own, 1."""
    affine: bool | None = None
    """Keep the mean of the vectors (an offset is added). Default: the method's own."""
    shrinkage: bool | None = None
    """Shrink the covariance: a smaller edit when rows are few. Default: the method's own, for leace
    when there are at most 20 rows a dimension."""
    svd_tol: float | None = None
    """Smallest correlation with the concept that counts. Higher is steadier and leaves more.
    Default: the method's own, rounding error."""
    background: bool | None = None
    """With --model: make the edit small on all tokens of the texts, not only on those that --tokens
    takes. Default: True for leace (SmolLM2, last tokens: perplexity 90 with it, 412 without)."""
    held_out: str | None = None
    """File like SOURCE, with labels, that is only measured on. Default: cross-fitting on SOURCE."""

    task_labels: str | None = None
    """File with the labels of a task to keep (for splince), when SOURCE has none."""
    task_kind: Kind = "auto"
    """How the task's labels are read."""

    def run(self) -> None:
        """Fit, save, and say where each eraser is and what it promises."""
        entry = registry.get(self.method)
        fit = getattr(entry.load(), "fit", None)
        if fit is None:
            raise ValueError(f"method {self.method!r} cannot be fitted from the command line")
        options = self._options(fit) | entry.options
        reader = self._reader(task_labels=self.task_labels)
        fitted: Mapping[str, Eraser]
        if isinstance(reader, ModelSource) and entry.target == STREAMED:
            fitted = self._stream(reader, options)
        else:
            fitted = self._fit(reader, fit, options)
        for site, eraser in fitted.items():
            out = self.out if len(fitted) == 1 else str(Path(self.out) / site)
            eraser.save_pretrained(out)
            say(f"saved {self.method} eraser to {out}")
            for name, value in eraser.report.items():
                say(f"  {name}: {_short(value)}")

    def _options(self, fit: Callable[..., Eraser]) -> dict[str, Any]:
        """Return the options that were given; refuse those the method lacks."""
        known = inspect.signature(fit).parameters
        given = {name: value for name in TUNING if (value := getattr(self, name)) is not None}
        for name in (*given, *(("held_out",) if self.held_out is not None else ())):
            if name not in known or (name == "shrinkage" and self.method == "orth"):
                raise ValueError(f"method {self.method!r} has no option {_flag(name)}")
        self._check_background()
        self._check_task("y" in known)
        if self.z_kind == "continuous" and "z_kind" not in known:
            raise ValueError(f"method {self.method!r} needs classes; leave out --z-kind continuous")
        if self.z_kind != "auto" and "z_kind" in known:
            given["z_kind"] = self.z_kind
        if self.task_kind != "auto":
            given["y_kind"] = self.task_kind
        return given

    def _check_background(self) -> None:
        if self.background and self.method != "leace":
            raise ValueError(f"method {self.method!r} has no option --background")
        if self.background and self.tokens == "all":
            raise ValueError("--background does nothing with --tokens all, which are all tokens")

    def _check_task(self, takes_task: bool) -> None:
        if not takes_task:
            # in a csv file of vectors the task's column is no feature, whatever the method
            idle = ("task_labels", "task_kind", *(("task_column",) if self.model else ()))
            self._refuse_idle(idle, f"is for a task to keep; method {self.method!r} keeps none")
        elif self.task_column is None and self.task_labels is None:
            raise ValueError(
                f"method {self.method!r} keeps what a task needs; name the task's labels with "
                "--task-column, or a file of them with --task-labels"
            )

    def _fit(
        self,
        reader: VectorSource | ModelSource,
        fit: Callable[..., Eraser],
        options: Mapping[str, Any],
    ) -> dict[str, Eraser]:
        """Fit on all vectors at once."""
        if isinstance(reader, ModelSource):
            say(
                f"{self.method} cannot be fitted in a stream: the vectors of all texts are held "
                "in memory"
            )
        found = reader.read(self.z_kind, self.task_kind)
        other = {} if self.held_out is None else reader.held_out(self.held_out).read(self.z_kind)
        given = dict(options)
        fitted = {}
        for site in list(found):
            data = found.pop(site)
            if site in other:
                given["held_out"] = other[site].x
            if "y" in inspect.signature(fit).parameters:
                given["y"] = data.y
            fitted[site] = fit(data.x, **given)
        return fitted

    def _stream(self, reader: ModelSource, options: Mapping[str, Any]) -> dict[str, LeaceEraser]:
        """Fit at all sites in one pass over the texts."""
        from concept_erasure.linear.leace import LeaceFitter

        texts = reader.texts(self.z_kind)
        names = texts.z.names

        def fitter(width: int) -> LeaceFitter:
            return LeaceFitter(width, max(1, len(names)), classes=names or None, **options)

        other = {} if self.held_out is None else reader.held_out(self.held_out).read(self.z_kind)
        background = self.method == "leace" and self.background is not False
        fitters = reader.stream(texts, fitter, background=background)
        for site, data in other.items():
            fitters[site].hold_out(data.x)
        return {site: one.eraser for site, one in fitters.items()}


@dataclass(frozen=True, kw_only=True)
class Apply(Place):
    """Apply an eraser to vectors, or fold it into a model's weights, and save the result."""

    source: tyro.conf.Positional[str | None] = None
    """Vectors: a .npy, .safetensors or .csv file. Leave it out with --model."""
    eraser: str
    """Folder or hub id of the eraser."""
    out: str
    """File for the erased vectors (.npy or .safetensors), or folder for the edited model."""
    labels: str | None = None
    """File with the labels (.npy, .csv, or text with one label a line), for methods that need them
    when erasing."""
    label_column: str = "label"
    """Column or tensor that holds the label. In a csv file it is never a feature."""
    task_column: str | None = None
    """Column of a csv file that is no feature either."""
    bias: Literal["auto", "add", "refuse"] = "auto"
    """With --model: what to do where the eraser's offset needs a bias that a module lacks. auto: add
    it if the architecture can load it again, otherwise refuse; add: add it anyhow; refuse: never."""

    def run(self) -> None:
        """Write erased vectors, or an edited model."""
        self._check_mode()
        if self.model is not None:
            idle = ("source", "label_column", "task_column")
            self._refuse_idle(idle, "is for vectors; with --model it does nothing")
            self._apply_to_model(_load_eraser(self.eraser), self.model)
            return
        if self.source is None:
            raise ValueError("nothing to apply the eraser to; name a file of vectors or a --model")
        eraser = _load_eraser(self.eraser)
        needed = _needs_labels(eraser)
        if not needed:
            self._refuse_idle(("labels",), f"does nothing: {eraser.method} erases without labels")
        reader = VectorSource(
            source=self.source,
            labels=self.labels,
            label_column=self.label_column,
            task_column=self.task_column,
        )
        data = reader.read(_label_kind(eraser), need_labels=needed)[""]
        erased = _erase(eraser, data.x)
        write_vectors(erased, self.out)
        say(f"wrote {erased.shape[0]} vectors of width {erased.shape[1]} to {self.out}")

    def _apply_to_model(self, eraser: Eraser, name: str) -> None:
        from concept_erasure.eraser import ModelEraser, RepresentationEraser

        model, tokenizer = load_model(name, self.gguf_file, self.device)
        if isinstance(eraser, RepresentationEraser):
            edit = eraser.apply(model, sites=self.sites or None, bias=self.bias)
        elif isinstance(eraser, ModelEraser):
            self._refuse_idle(("sites", "bias"), f"does nothing for a {eraser.method} eraser")
            edit = eraser.apply(model)
        else:
            raise TypeError(f"a {eraser.method} eraser cannot be put into a model")
        say(edit.summary())
        edit.commit()
        for path, value in model.named_parameters():
            if getattr(value, "in_memory_only", False):
                warnings.warn(
                    f"{path} is written, but {type(model).__name__} has no place for it: loading "
                    "the model will drop it, and with it the eraser's offset",
                    ErasureWarning,
                    stacklevel=2,
                )
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

        self._check_mode()
        eraser = _load_eraser(self.eraser)
        data = self._read(eraser)
        _check_classes(data.z)
        x, erased = data.x, _erase(eraser, data)
        rows: list[Mapping[str, Cell]] = []
        for probe in self.probes:
            for name, values in (("before", x), ("after", erased)):
                result = cross_validate(
                    values,
                    data.z,
                    probe=probe,
                    folds=self.folds,
                    seed=self.seed,
                    groups=data.rows,
                )
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

    def _read(self, eraser: Eraser) -> Representations:
        """Return the vectors to measure on, by default where the eraser was fitted."""
        reader = self._reader(space=eraser.space)
        if isinstance(reader, ModelSource) and len(reader.names) != 1:
            raise ValueError(f"one site at a time; --sites names {', '.join(reader.names)}")
        (data,) = reader.read(_label_kind(eraser)).values()
        return data.x


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Fit several methods on vectors; compare what fresh probes still read with the size of the edit."""

    vectors: str
    """A .npy, .safetensors or .csv file."""
    out: str
    """Folder for the table (json and markdown) and the plot."""
    methods: str = ""
    """Methods, as named by `concept-erasure list`, with commas between. Default: all linear ones."""
    probes: str = "linear,kernel,mlp"
    """Probes to train afresh on what each method leaves, with commas between."""
    labels: str | None = None
    """File with the labels when the vectors have none."""
    label_column: str = "label"
    """Column or tensor that holds the label."""
    task_labels: str | None = None
    """File with the labels of a task to keep (for splince)."""
    task_column: str | None = None
    """Column or tensor with the labels of a task to keep; in a csv file it is never a feature."""
    fit_share: float = 0.5
    """Share of the vectors on which the methods are fitted."""
    test_share: float = 0.2
    """Share on which the probes are tested; they are trained on what is left."""
    seed: int = 0
    """Seed of the parts and of whatever methods and probes draw."""

    def run(self) -> None:
        """Write table and plot, and print the table."""
        from concept_erasure.evals.compare import compare

        methods = _names(self.methods) or [
            name for name in registry.names() if registry.get(name).family == "linear"
        ]
        for name in methods:
            registry.get(name)
        source = VectorSource(
            source=self.vectors,
            labels=self.labels,
            label_column=self.label_column,
            task_labels=self.task_labels,
            task_column=self.task_column,
        )
        (data,) = source.read("classes").values()
        found = compare(
            data.x.x,
            data.x.z,
            methods,
            y=data.y,
            probes=_names(self.probes),
            fit_share=self.fit_share,
            test_share=self.test_share,
            seed=self.seed,
        )
        report = found.save(self.out, meta={"vectors": Path(self.vectors).name})
        say(report.to_markdown())
        say(f"wrote the table and the plot to {self.out}")


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
    "compare": Compare,
    "card": Card,
    "demo": Demo,
}
OPTIONS = frozenset(
    option.name for command in COMMANDS.values() for option in fields(cast("Any", command))
)


def _names(text: str) -> list[str]:
    """Return names that are written with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _load_eraser(name: str) -> Eraser:
    from concept_erasure.eraser import Eraser

    return Eraser.from_pretrained(name)


def _flag(name: str) -> str:
    """Return an option as it is typed."""
    return name.upper() if name == "source" else f"--{name.replace('_', '-')}"


def _needs_labels(eraser: Eraser) -> bool:
    """Say whether an eraser needs the labels of what it erases."""
    if not callable(eraser):
        raise TypeError(f"a {eraser.method} eraser edits models and has no map on vectors")
    parameters = inspect.signature(eraser).parameters.values()
    return sum(one.default is inspect.Parameter.empty for one in parameters) > 1


def _label_kind(eraser: Eraser) -> LabelKind:
    """Return how an eraser that needs labels knows them: by the names of classes, or as numbers."""
    classes = getattr(eraser, "classes", None) if _needs_labels(eraser) else None
    return "auto" if classes is None else "classes" if classes else "continuous"


def _check_classes(z: object) -> None:
    """Refuse labels that no probe can learn."""
    plain = z.flatten().tolist() if isinstance(z, Tensor) else list(cast("list[str]", z))
    fraction = next((one for one in plain if isinstance(one, float) and one != round(one)), None)
    if fraction is not None or len(set(plain)) * 2 > len(plain):
        some = plain[0] if fraction is None else f"{fraction:.4g}"
        raise ValueError(
            f"probes need classes, and the labels are {len(set(plain))} different values such as "
            f"{some}; name another --label-column, or cut numbers into bins first"
        )


def _erase(eraser: Eraser, data: Representations) -> Tensor:
    """Apply an eraser to representations, with labels where it needs them.

    Raises:
        SpaceError: If they come from another model, site or kind of token than the eraser.
    """
    from concept_erasure.eraser import RepresentationEraser, _check_same_space

    own, other = eraser.space, data.space
    if own is not None and other is not None:
        _check_same_space(own, other)  # those that need labels are called with bare tensors
    needs_labels, call = _needs_labels(eraser), cast("Callable[..., object]", eraser)
    if isinstance(eraser, RepresentationEraser):
        return eraser(data).x
    result = call(data.x, data.z) if needs_labels else call(data.x)
    if not isinstance(result, Tensor):
        raise TypeError(f"the eraser returned {type(result).__name__}, not a tensor")
    return result


def _short(value: object) -> str:
    """Show a report's value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
