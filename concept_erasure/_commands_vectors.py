"""The commands for vectors, and for texts in a model: fit, apply, eval and compare with SOURCE."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from concept_erasure import registry
from concept_erasure._cli_common import (
    announce,
    comma_names,
    family_of,
    flag,
    load_eraser,
    refuse_idle,
    say,
)
from concept_erasure._cli_data import ModelSource, VectorSource, load_model, write_vectors
from concept_erasure._fit_options import fit_options, given_options, options_by_method
from concept_erasure.errors import ErasureWarning

if TYPE_CHECKING:
    from concept_erasure._commands import Apply, Compare, Eval, Fit, Source
    from concept_erasure.collect import Representations, Tokens
    from concept_erasure.eraser import Eraser
    from concept_erasure.labels import LabelKind
    from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
    from concept_erasure.sites import Space

__all__ = ["apply_to_model", "apply_to_vectors", "compare_vectors", "eval_vectors", "fit_vectors"]

STREAMED = registry.METHODS["leace"].target  # the class that has a streaming fitter
TUNING = ("rank", "strength", "affine", "shrinkage", "svd_tol")  # what some methods have


def _reader(
    command: Source,
    mode: str,
    *,
    task_labels: str | None = None,
    space: Space | None = None,
) -> VectorSource | ModelSource:
    """Return what reads the source; the space's site and tokens are used where none are given."""
    source = cast("str", command.source)  # checked: there is one
    if mode == "vectors":
        return VectorSource(
            source=source,
            labels=command.labels,
            label_column=command.label_column,
            task_labels=task_labels,
            task_column=command.task_column,
        )
    default: Tokens = "last" if space is None else cast("Tokens", space.tokens)
    return ModelSource(
        source=source,
        model=cast("str", command.model),
        gguf_file=command.gguf_file,
        device=command.device,
        sites=command.sites or (() if space is None else (space.site,)),
        tokens=command.tokens or default,
        text_column=command.text_column,
        label_column=command.label_column,
        task_column=command.task_column,
        split=command.split,
        limit=command.limit,
        batch_size=32 if command.batch_size is None else command.batch_size,
        max_length=command.max_length,
    )


# -- fit --------------------------------------------------------------------------------------------


def fit_vectors(command: Fit, mode: str) -> None:
    """Fit, save, and say where each eraser is and what it promises."""
    name = command.method or "leace"
    entry = family_of(name, mode)
    kind = entry.load()
    fit = getattr(kind, "fit", None)
    if fit is None:
        raise ValueError(f"method {name!r} cannot be fitted from the command line")
    options = _options(command, name, kind) | entry.options
    reader = _reader(command, mode, task_labels=command.task_labels)
    fitted: Mapping[str, Eraser]
    if isinstance(reader, ModelSource) and entry.target == STREAMED:
        fitted = _stream(command, name, reader, options)
    else:
        fitted = _fit(command, name, reader, fit, options)
    for site, eraser in fitted.items():
        out = command.out if len(fitted) == 1 else str(Path(command.out) / site)
        eraser.save_pretrained(out)
        announce(eraser, out)


def _options(command: Fit, name: str, kind: type[Eraser]) -> dict[str, Any]:
    """Return the options that were given; refuse those the method lacks."""
    known = inspect.signature(cast("Any", kind).fit).parameters
    given = {option: value for option in TUNING if (value := getattr(command, option)) is not None}
    for option in (*given, *(("held_out",) if command.held_out is not None else ())):
        if option not in known or (option == "shrinkage" and name == "orth"):
            raise ValueError(f"method {name!r} has no option {flag(option)}")
    if command.seed is not None:
        given["seed"] = command.seed
    given = fit_options(name, kind, given, given_options(command.option))
    _check_background(command, name)
    _check_task(command, name, "y" in known)
    if command.z_kind == "continuous" and "z_kind" not in known:
        raise ValueError(f"method {name!r} needs classes; leave out --z-kind continuous")
    if command.z_kind != "auto" and "z_kind" in known:
        given["z_kind"] = command.z_kind
    if command.task_kind != "auto":
        given["y_kind"] = command.task_kind
    return given


def _check_background(command: Fit, name: str) -> None:
    if command.background and name != "leace":
        raise ValueError(f"method {name!r} has no option --background")
    if command.background and command.tokens == "all":
        raise ValueError("--background does nothing with --tokens all, which are all tokens")


def _check_task(command: Fit, name: str, takes_task: bool) -> None:
    if not takes_task:
        # in a csv file of vectors the task's column is no feature, whatever the method
        idle = ("task_labels", "task_kind", *(("task_column",) if command.model else ()))
        refuse_idle(command, idle, f"is for a task to keep; method {name!r} keeps none")
    elif command.task_column is None and command.task_labels is None:
        raise ValueError(
            f"method {name!r} keeps what a task needs; name the task's labels with "
            "--task-column, or a file of them with --task-labels"
        )


def _fit(
    command: Fit,
    name: str,
    reader: VectorSource | ModelSource,
    fit: Callable[..., Eraser],
    options: Mapping[str, Any],
) -> dict[str, Eraser]:
    """Fit on all vectors at once."""
    if isinstance(reader, ModelSource):
        say(f"{name} cannot be fitted in a stream: the vectors of all texts are held in memory")
    found = reader.read(command.z_kind, command.task_kind)
    other = (
        {} if command.held_out is None else reader.held_out(command.held_out).read(command.z_kind)
    )
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


def _stream(
    command: Fit, name: str, reader: ModelSource, options: Mapping[str, Any]
) -> dict[str, LeaceEraser]:
    """Fit at all sites in one pass over the texts."""
    from concept_erasure.linear.leace import LeaceFitter

    texts = reader.texts(command.z_kind)
    names = texts.z.names

    def fitter(width: int) -> LeaceFitter:
        return LeaceFitter(width, max(1, len(names)), classes=names or None, **options)

    other = (
        {} if command.held_out is None else reader.held_out(command.held_out).read(command.z_kind)
    )
    background = name == "leace" and command.background is not False
    fitters = reader.stream(texts, fitter, background=background)
    for site, data in other.items():
        fitters[site].hold_out(data.x)
    return {site: one.eraser for site, one in fitters.items()}


# -- apply ------------------------------------------------------------------------------------------


def apply_to_vectors(command: Apply) -> None:
    """Write erased vectors."""
    eraser = load_eraser(command.eraser)
    needed = _needs_labels(eraser)
    if not needed:
        refuse_idle(command, ("labels",), f"does nothing: {eraser.method} erases without labels")
    reader = VectorSource(
        source=cast("str", command.source),
        labels=command.labels,
        label_column=command.label_column,
        task_column=command.task_column,
    )
    data = reader.read(_label_kind(eraser), need_labels=needed)[""]
    erased = _erase(eraser, data.x)
    write_vectors(erased, command.out)
    say(f"wrote {erased.shape[0]} vectors of width {erased.shape[1]} to {command.out}")


def apply_to_model(command: Apply, name: str) -> None:
    """Write a model with the eraser in its weights."""
    from concept_erasure.eraser import ModelEraser, RepresentationEraser

    eraser = load_eraser(command.eraser)
    model, tokenizer = load_model(name, command.gguf_file, command.device)
    if isinstance(eraser, RepresentationEraser):
        edit = eraser.apply(model, sites=command.sites or None, bias=command.bias)
    elif isinstance(eraser, ModelEraser):
        refuse_idle(command, ("sites", "bias"), f"does nothing for a {eraser.method} eraser")
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
    model.save_pretrained(command.out)
    tokenizer.save_pretrained(command.out)
    say(f"wrote the edited model to {command.out}")


# -- eval and compare -------------------------------------------------------------------------------


def eval_vectors(command: Eval, mode: str) -> None:
    """Print what probes read before and after, and write it when --out is given."""
    from concept_erasure.probes import cross_validate
    from concept_erasure.report import Cell, Report

    eraser = load_eraser(command.eraser)
    data = _read(command, mode, eraser)
    _check_classes(data.z)
    x, erased = data.x, _erase(eraser, data)
    rows: list[Mapping[str, Cell]] = []
    for probe in command.probes:
        for name, values in (("before", x), ("after", erased)):
            result = cross_validate(
                values,
                data.z,
                probe=probe,
                folds=command.folds,
                seed=command.seed,
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
    meta = {
        "eraser": command.eraser,
        "source": command.source,
        "seed": command.seed,
        "n": len(x),
    }
    report = Report("What probes still read", rows, meta)
    say(report.to_markdown())
    if command.out is not None:
        report.save(command.out)
        say(f"wrote the report to {command.out}")


def _read(command: Eval, mode: str, eraser: Eraser) -> Representations:
    """Return the vectors to measure on, by default where the eraser was fitted."""
    reader = _reader(command, mode, space=eraser.space)
    if isinstance(reader, ModelSource) and len(reader.names) != 1:
        raise ValueError(f"one site at a time; --sites names {', '.join(reader.names)}")
    (data,) = reader.read(_label_kind(eraser)).values()
    return data.x


def compare_vectors(command: Compare) -> None:
    """Write table and plot, and print the table."""
    from concept_erasure.evals.compare import compare

    methods = comma_names(command.methods) or [
        name for name in registry.names() if registry.get(name).family == "linear"
    ]
    for name in methods:
        registry.get(name)
    source = VectorSource(
        source=cast("str", command.vectors),
        labels=command.labels,
        label_column=command.label_column,
        task_labels=command.task_labels,
        task_column=command.task_column,
    )
    (data,) = source.read("classes").values()
    found = compare(
        data.x.x,
        data.x.z,
        methods,
        y=data.y,
        probes=comma_names(command.probes),
        options=options_by_method(methods, command.option),
        fit_share=command.fit_share,
        test_share=command.test_share,
        seed=command.seed,
    )
    report = found.save(command.out, meta={"vectors": Path(cast("str", command.vectors)).name})
    say(report.to_markdown())
    say(f"wrote the table and the plot to {command.out}")


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
