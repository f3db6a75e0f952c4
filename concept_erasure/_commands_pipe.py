"""The commands for text-to-image pipelines: fit, apply and compare with ``--pipe``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from concept_erasure import registry
from concept_erasure._cli_common import (
    announce,
    comma_names,
    family_of,
    load_eraser,
    names_from,
    say,
)
from concept_erasure._fit_options import fit_options, given_options, options_by_method
from concept_erasure.errors import FormatError, missing_extra

if TYPE_CHECKING:
    from concept_erasure._commands import Apply, Compare, Fit

__all__ = ["apply_pipe", "compare_pipes", "fit_pipe", "load_pipe"]


def load_pipe(name: str, device: str | None = None) -> Any:  # noqa: ANN401 - pipelines have no common class
    """Load a text-to-image pipeline from a folder or the hub.

    Raises:
        ImportError: If diffusers is absent.
        FormatError: If a folder holds no pipeline.
    """
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "diffusion") from None
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise FormatError(f"--pipe {name}: the folder holds no pipeline (model_index.json)")
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        import transformers

        transformers.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def _lists(command: Fit | Compare) -> dict[str, Any]:
    """Return what to erase, what it becomes and what to keep."""
    if not command.erase:
        raise ValueError(
            "--pipe needs --erase: name the concepts, such as --erase 'van gogh' monet"
        )
    erase = names_from(command.erase, "erase")
    lists: dict[str, Any] = {"erase": erase}
    if command.anchor:
        lists["anchor"] = names_from(command.anchor, "anchor")
        if len(lists["anchor"]) not in (1, len(erase)):
            raise ValueError(
                f"--anchor names {len(lists['anchor'])} anchors for {len(erase)} concepts; give one, or one each"
            )
    if command.preserve:
        lists["preserve"] = names_from(command.preserve, "preserve")
    return lists


def fit_pipe(command: Fit) -> None:
    """Fit an edit of a pipeline and save it."""
    name = command.method or "uce"
    entry = family_of(name, "pipe")
    kind: Any = entry.load()
    lists = _lists(command)
    named = {
        option: value
        for option in ("preset", "seed", "batch_size", "rank")
        if (value := getattr(command, option)) is not None
    }
    given = given_options(command.option)
    projects = entry.family == "linear"
    if projects:
        from concept_erasure.diffusion.labelled import SENTENCES, named_representations

        if "batch_size" in named and "batch_size" in given:
            raise ValueError(f"the option 'batch_size' of {name!r} is given twice")
        for held in (named, given):  # how sentences are made is no option of the fit
            lists |= {option: held.pop(option) for option in SENTENCES if option in held}
    options = {**entry.options, **fit_options(name, kind, named, given)}
    pipe = load_pipe(command.pipe or "", command.device)
    if projects:
        eraser = kind.fit(named_representations(pipe, **lists), **options)
    else:
        eraser = kind.fit(pipe, **lists, **options)
    eraser.save_pretrained(command.out)
    announce(eraser, command.out)


def apply_pipe(command: Apply) -> None:
    """Write an edit as a LoRA file, or the edited pipeline to a folder."""
    from concept_erasure.diffusion.eraser import DiffusionEraser
    from concept_erasure.diffusion.projections import text_edit
    from concept_erasure.eraser import RepresentationEraser

    eraser = load_eraser(command.eraser)
    if not isinstance(eraser, DiffusionEraser | RepresentationEraser):
        raise TypeError(
            f"--eraser {command.eraser} is a {eraser.method} eraser, which no pipeline takes"
        )
    pipe = load_pipe(command.pipe or "", command.device)
    if isinstance(eraser, RepresentationEraser):
        eraser = text_edit(eraser, pipe)
    if Path(command.out).suffix == ".safetensors":
        eraser.to_lora(pipe, command.out, dtype=torch.float32)
        say(f"wrote a LoRA to {command.out}; load it with pipe.load_lora_weights")
        return
    if Path(command.out).suffix:
        raise ValueError(
            f"--out {command.out}: name a .safetensors file for a LoRA, or a folder for the edited pipeline"
        )
    edit = eraser.apply(pipe)
    say(edit.summary())
    edit.commit()
    pipe.save_pretrained(command.out)
    say(f"wrote the edited pipeline to {command.out}")


def compare_pipes(command: Compare) -> None:
    """Fit several methods on a pipeline; write table and plot, and print the table."""
    methods = comma_names(command.methods) or registry.for_pipelines()
    for name in methods:
        family_of(name, "pipe")
    lists = _lists(command)
    pipe = load_pipe(command.pipe or "", command.device)
    from concept_erasure.evals.compare_pipe import compare_pipe

    found = compare_pipe(
        pipe,
        methods,
        erase=lists["erase"],
        anchor=lists.get("anchor", ""),
        preserve=lists.get("preserve", ()),
        options=options_by_method(methods, command.option),
        seed=command.seed,
    )
    report = found.save(
        command.out, meta={"pipeline": Path(command.pipe or "").name, "seed": command.seed}
    )
    say(report.to_markdown())
    say(f"wrote the table and the plot to {command.out}")
