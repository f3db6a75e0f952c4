"""The commands of the command line, each a frozen dataclass that tyro turns into options.

What a command works on is said by its options: SOURCE alone is a file of vectors, with ``--model`` texts in a model;
``--model`` with ``--concept`` is a concept in a language model; ``--pipe`` is a text-to-image pipeline. Each has a
module of its own that does the work. An option that would do nothing is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import tyro

from concept_erasure import registry
from concept_erasure._cli_common import check_options, load_eraser, say
from concept_erasure._commands_sae import Find, Sae, Train

__all__ = ["COMMANDS", "OPTIONS", "Apply", "Command", "Compare", "Eval", "Fit", "Place", "Source"]

Tokens = Literal["last", "first", "mean", "all"]
Kind = Literal["auto", "classes", "continuous"]
VECTORS, TEXTS, CONCEPT, PIPE = "vectors", "texts", "concept", "pipe"

# Which options are for which kind of model; those not listed are for all.
_MODEL = (TEXTS, CONCEPT)
_LABELLED = (VECTORS, TEXTS)
_MODES: dict[str, tuple[str, ...]] = {
    "source": _LABELLED,
    "vectors": (VECTORS,),
    "labels": (VECTORS,),
    "task_labels": (VECTORS,),
    "label_column": _LABELLED,
    "task_column": _LABELLED,
    "text_column": (TEXTS,),
    "sites": (TEXTS,),
    "tokens": (TEXTS,),
    "split": (TEXTS,),
    "background": (TEXTS,),
    "bias": (TEXTS,),
    "z_kind": _LABELLED,
    "task_kind": _LABELLED,
    "strength": _LABELLED,
    "affine": _LABELLED,
    "shrinkage": _LABELLED,
    "svd_tol": _LABELLED,
    "held_out": _LABELLED,
    "probes": _LABELLED,
    "folds": _LABELLED,
    "fit_share": (VECTORS,),
    "test_share": (VECTORS,),
    "rank": (VECTORS, TEXTS, PIPE),
    "model": _MODEL,
    "gguf_file": _MODEL,
    "limit": _MODEL,
    "max_length": _MODEL,
    "device": (TEXTS, CONCEPT, PIPE),
    "batch_size": (TEXTS, CONCEPT, PIPE),
    "preset": (CONCEPT, PIPE),
    "concept": (CONCEPT,),
    "steps": (CONCEPT,),
    "learning_rate": (CONCEPT,),
    "forget_texts": (CONCEPT,),
    "retain_texts": (CONCEPT,),
    "cache_dir": (CONCEPT,),
    "suite": (CONCEPT,),
    "data_dir": (CONCEPT,),
    "relearn_steps": (CONCEPT,),
    "pipe": (PIPE,),
    "erase": (PIPE,),
    "anchor": (PIPE,),
    "preserve": (PIPE,),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model, and where in it."""

    model: str | None = None
    """Folder or hub id of a transformers model: the one whose representations are to be used, or, with
    --concept, the language model."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    sites: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--site",))] = ()
    """Where in the model, for example residual.15, norm.final or 'mlp.*'. Default: the middle
    residual; for apply and eval, where the eraser was fitted."""
    device: str | None = None
    """Device of the model, for example cuda:0. Default: cpu."""
    pipe: str | None = None
    """Folder or hub id of a text-to-image pipeline, instead of a model."""

    def _mode(self, *, source: str | None) -> str:
        """Return what the command works on, and refuse options of the others.

        Raises:
            ValueError: If an option is of another kind, or something needed is missing.
        """
        concept = getattr(self, "concept", None)
        if self.pipe is not None:
            mode = PIPE
        elif concept is not None:
            mode = CONCEPT
        else:
            mode = VECTORS if self.model is None else TEXTS
        check_options(self, mode, _MODES)
        if mode == CONCEPT and self.model is None:
            raise ValueError("--concept needs --model: the language model to erase it from")
        if mode in _LABELLED and source is None:
            raise ValueError(self._nothing())
        return mode

    def _nothing(self) -> str:
        return (
            "nothing to work on: name SOURCE (a file of vectors, or texts with --model), --model with "
            "--concept, or --pipe with --erase"
        )


@dataclass(frozen=True, kw_only=True)
class Source(Place):
    """Where vectors or texts come from."""

    source: tyro.conf.Positional[str | None] = None
    """Vectors: a .npy, .safetensors or .csv file. With --model, labelled texts: a .jsonl or .csv
    file, or a data set: a name on the hub, or a folder written by save_to_disk. None with --concept
    or --pipe."""
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
    """Read at most so many texts; with --concept, use at most so many questions of each kind."""
    batch_size: int | None = None
    """Texts in one forward pass. Default: 32; where something is trained, the method's own."""
    max_length: int | None = None
    """Cut texts after so many tokens."""


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
    """Fit an eraser on vectors, on texts or a concept in a model, or on a text-to-image pipeline; save it."""

    out: str
    """Folder for the eraser."""
    method: str | None = None
    """Method, as named by `concept-erasure list`. Default: leace; elm with --concept, uce with --pipe."""
    option: tuple[str, ...] = ()
    """More options of the method's fit, each as NAME=VALUE, for example eta=3 lora.rank=8. A name that
    it lacks is refused with a list of those it has."""
    seed: int | None = None
    """Seed of what the method draws. Default: the method's own, 0."""
    preset: str | None = None
    """Constants to use, such as paper. Default: the method's own default."""

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

    concept: str | None = None
    """With --model: a concept that comes with the library, such as harry_potter, or your yaml file."""
    steps: int | None = None
    """Training steps. Default: the method's own."""
    learning_rate: float | None = None
    """Learning rate. Default: the method's own."""
    forget_texts: str | None = None
    """File of texts that express the concept (.txt, one a line, or .jsonl with --text-column's default
    "text"). Default: those of the concept, else the model's own samples."""
    retain_texts: str | None = None
    """Likewise, texts that do not."""
    cache_dir: str | None = None
    """Folder for what can be used again: the model's own samples, reference targets, finished tasks."""

    erase: tuple[str, ...] = ()
    """With --pipe: concepts to erase, for example 'van gogh' monet; or one .txt, .csv or .json file."""
    anchor: tuple[str, ...] = ()
    """With --pipe: what they become, one for all or one each. Default: the method's own."""
    preserve: tuple[str, ...] = ()
    """With --pipe: names to keep, or one .txt, .csv or .json file of them."""

    def run(self) -> None:
        """Fit, save, and say where each eraser is and what it promises."""
        mode = self._mode(source=self.source)
        if mode == PIPE:
            from concept_erasure._commands_pipe import fit_pipe

            fit_pipe(self)
        elif mode == CONCEPT:
            from concept_erasure._commands_language import fit_concept

            fit_concept(self)
        else:
            from concept_erasure._commands_vectors import fit_vectors

            fit_vectors(self, mode)


@dataclass(frozen=True, kw_only=True)
class Apply(Place):
    """Apply an eraser to vectors, fold it into a model's weights, or write it as a LoRA for a pipeline."""

    source: tyro.conf.Positional[str | None] = None
    """Vectors: a .npy, .safetensors or .csv file. Leave it out with --model and --pipe."""
    eraser: str
    """Folder or hub id of the eraser."""
    out: str
    """File for the erased vectors (.npy or .safetensors), or folder for the edited model. With --pipe, a
    .safetensors file for a LoRA, or folder for the edited pipeline."""
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

    def _nothing(self) -> str:
        return "nothing to apply the eraser to; name a file of vectors, a --model or a --pipe"

    def run(self) -> None:
        """Write erased vectors, an edited model, or a LoRA."""
        if self.pipe is not None:
            from concept_erasure._commands_pipe import apply_pipe

            check_options(self, PIPE, _MODES)
            apply_pipe(self)
            return
        from concept_erasure._commands_vectors import apply_to_model, apply_to_vectors

        if self.model is not None:
            idle = {name: (VECTORS,) for name in ("source", "label_column", "task_column")}
            check_options(self, TEXTS, {**_MODES, **idle})
            apply_to_model(self, self.model)
        else:
            self._mode(source=self.source)
            apply_to_vectors(self)


@dataclass(frozen=True, kw_only=True)
class Eval(Source):
    """Measure an eraser: what probes still read, or with --concept what a language model still knows."""

    eraser: str
    """Folder or hub id of the eraser."""
    probes: tuple[Literal["linear", "svm", "mlp"], ...] = ("linear", "svm", "mlp")
    """Probes to train, afresh on the vectors before and after."""
    folds: int = 5
    """Folds of the cross-validation."""
    seed: int = 0
    """Seed of the folds, of the probes, and of whatever is drawn."""
    out: str | None = None
    """Folder for the report (json and markdown)."""

    concept: str | None = None
    """With --model: a concept that comes with the library, such as harry_potter, or your yaml file."""
    suite: str = "concept,specificity"
    """With --concept: what to measure, with commas between: concept, specificity and other parts of the
    evaluation; relearn, soft_prompt and other attacks; mmlu, wmdp, hellaswag or any other task of lm-eval."""
    data_dir: str | None = None
    """With --concept: folder with local files of lm-eval's tasks, such as mmlu/test.jsonl or
    wmdp_bio.jsonl, instead of the hub."""
    cache_dir: str | None = None
    """Folder for finished tasks, so that an interrupted run goes on where it was."""

    def run(self) -> None:
        """Print the table, and write it when --out is given."""
        if self.pipe is not None:
            raise ValueError("--pipe has no eval; use compare --pipe, which measures the edit")
        mode = self._mode(source=self.source)
        if mode == CONCEPT:
            from concept_erasure._commands_language import eval_concept

            eval_concept(self)
        else:
            from concept_erasure._commands_vectors import eval_vectors

            eval_vectors(self, mode)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Fit several methods on vectors, on a concept in a model, or on a pipeline: one table and one plot."""

    out: str
    """Folder for the table (json and markdown) and the plot."""
    methods: str = ""
    """Methods, as named by `concept-erasure list`, with commas between. Default: all that apply."""
    seed: int = 0
    """Seed of the parts and of whatever methods and probes draw."""
    option: tuple[str, ...] = ()
    """More options of the methods' fits, each as NAME=VALUE for all of them or METHOD.NAME=VALUE for one."""
    device: str | None = None
    """Device of the model or pipeline, for example cuda:0. Default: cpu."""

    vectors: str | None = None
    """A .npy, .safetensors or .csv file."""
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

    model: str | None = None
    """With --concept: folder or hub id of a language model."""
    gguf_file: str | None = None
    """Name of the GGUF file inside --model, when that is what it holds."""
    concept: str | None = None
    """A concept that comes with the library, such as harry_potter, or your yaml file."""
    steps: int | None = None
    """Training steps of every method. Default: each method's own."""
    learning_rate: float | None = None
    """Learning rate of every method. Default: each method's own."""
    limit: int | None = None
    """Use at most so many questions of each kind."""
    relearn_steps: int = 60
    """Steps of the relearning attack; 0 leaves it out."""
    cache_dir: str | None = None
    """Folder for finished rows and texts, so that an interrupted run goes on. Default: cache in --out."""

    pipe: str | None = None
    """Folder or hub id of a text-to-image pipeline."""
    erase: tuple[str, ...] = ()
    """With --pipe: concepts to erase, or one .txt, .csv or .json file of them."""
    anchor: tuple[str, ...] = ()
    """With --pipe: what they become, one for all or one each. Default: the blank prompt."""
    preserve: tuple[str, ...] = ()
    """With --pipe: names to keep, or one .txt, .csv or .json file of them."""

    def run(self) -> None:
        """Write table and plot, and print the table."""
        if self.pipe is not None:
            from concept_erasure._commands_pipe import compare_pipes

            check_options(self, PIPE, _MODES)
            compare_pipes(self)
        elif self.concept is not None or self.model is not None:
            from concept_erasure._commands_language import compare_concept

            check_options(self, CONCEPT, _MODES)
            if self.model is None or self.concept is None:
                raise ValueError("a language model needs both --model and --concept")
            compare_concept(self)
        else:
            from concept_erasure._commands_vectors import compare_vectors

            check_options(self, VECTORS, _MODES)
            if self.vectors is None:
                raise ValueError(
                    "nothing to compare on: name --vectors, --model with --concept, or --pipe with --erase"
                )
            compare_vectors(self)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Print an eraser's card: what it was fitted on, what it promises, what was measured."""

    eraser: tyro.conf.Positional[str]
    """Folder or hub id of the eraser."""

    def run(self) -> None:
        """Print the card."""
        say(load_eraser(self.eraser).card())


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
    "sae": Sae,
    "card": Card,
    "demo": Demo,
}
OPTIONS = frozenset(
    option.name
    for command in (*COMMANDS.values(), Train, Find)
    for option in fields(cast("Any", command))
) - {"command"}
