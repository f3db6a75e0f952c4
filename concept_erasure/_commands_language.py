"""The commands for a concept in a language model: fit, eval and compare with ``--model`` and ``--concept``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from concept_erasure import registry
from concept_erasure._cli_common import announce, comma_names, family_of, load_eraser, say
from concept_erasure._cli_data import load_model
from concept_erasure._fit_options import fit_options, given_options, options_by_method
from concept_erasure.concept import Concept
from concept_erasure.errors import FormatError

if TYPE_CHECKING:
    from concept_erasure._commands import Compare, Eval, Fit

__all__ = ["compare_concept", "eval_concept", "fit_concept"]

DEFAULT = "elm"
COMPARED = ("elm", "famr", "rmu", "npo")


def _concept(name: str | None) -> Concept:
    """Return the concept of that name, or in that file."""
    try:
        return Concept.load(name or "")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--concept: {error}") from None


def _load(command: Fit | Eval | Compare) -> tuple[Any, Any]:
    """Return model and tokenizer; refuse one that does not write text."""
    name = cast("str", command.model)
    model, tokenizer = load_model(name, command.gguf_file, command.device)
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"--model {name}: {type(model).__name__} is no causal language model")
    return model, tokenizer


def _texts(path: str | None, option: str) -> list[str] | None:
    """Return the texts of a file: lines of a .txt, the field ``text`` of a .jsonl."""
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}: no such file: {path}")
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8").split("\n")
        texts = [line.strip() for line in lines if line.strip()]
    elif file.suffix == ".jsonl":
        from concept_erasure._cli_data import _jsonl_rows

        texts = [str(row.get("text") or "") for row in _jsonl_rows(file)]
        if "" in texts:
            raise FormatError(f"{option} {path}: row {texts.index('') + 1} has no field 'text'")
    else:
        raise FormatError(f"{option} {path}: texts are read from .txt and .jsonl files")
    if not texts:
        raise FormatError(f"{option} {path} holds no texts")
    return texts


def _named(command: Fit | Compare) -> dict[str, Any]:
    """Return the options of a fit that have flags of their own and were given."""
    names = ("preset", "seed", "steps", "learning_rate", "batch_size", "max_length")
    return {name: value for name in names if (value := getattr(command, name, None)) is not None}


def fit_concept(command: Fit) -> None:
    """Fit an eraser of a concept and save it."""
    name = command.method or DEFAULT
    entry = family_of(name, "concept")
    kind: Any = entry.load()
    concept = _concept(command.concept)
    texts = {
        option: found
        for option in ("forget_texts", "retain_texts")
        if (found := _texts(getattr(command, option), f"--{option.replace('_', '-')}")) is not None
    }
    named: dict[str, Any] = _named(command)
    if command.cache_dir is not None:
        named["cache_dir"] = command.cache_dir
    known = signature(kind.fit).parameters
    if not sys.stderr.isatty() and "training" in known:
        named["training.progress"] = False
    options = fit_options(name, kind, named, given_options(command.option))
    parts = _dictionaries(name, kind, options)
    if unused := [f"--{key.replace('_', '-')}" for key in texts if key not in known]:
        raise ValueError(f"method {name!r} reads no texts: leave out {unused[0]}")
    model, tokenizer = _load(command)
    eraser = kind.fit(model, tokenizer, concept, **{**entry.options, **texts, **options, **parts})
    eraser.save_pretrained(command.out)
    announce(eraser, command.out)


def _dictionaries(name: str, kind: type[Any], options: Mapping[str, Any]) -> dict[str, object]:
    """Return the sparse dictionaries and features of a method, read from the folders that its options name.

    Raises:
        ValueError: If the method needs a dictionary and none is named.
        FileNotFoundError: If a folder is not there.
    """
    from concept_erasure.sae.disentangler import Disentangler

    known = signature(kind.fit).parameters
    read: dict[str, object] = {}
    for option in ("disentangler", "disentanglers"):
        if option not in known:
            continue
        given = options.get(option)
        if given is None:
            raise ValueError(
                f"method {name!r} needs a sparse dictionary: give its folder as the option {option!r}; "
                "`concept-erasure sae train` makes one"
            )
        folders = given if isinstance(given, list) else [given]
        found = [Disentangler.from_pretrained(str(folder)) for folder in folders]
        if option == "disentangler" and len(found) > 1:
            raise ValueError(f"method {name!r} takes one dictionary; got {len(found)}")
        read[option] = found[0] if len(found) == 1 else {one.site: one for one in found}
    if "features" in known and isinstance(options.get("features"), str):
        from concept_erasure.sae.search import FeatureTable

        read["features"] = FeatureTable.load(options["features"])
    return read


def eval_concept(command: Eval) -> None:
    """Print the evaluation of an eraser, and write it when --out is given."""
    suite = comma_names(command.suite)
    if not suite:
        raise ValueError("--suite names nothing; try --suite concept,specificity")
    _check_suite(suite)
    concept = _concept(command.concept)
    eraser: Any = load_eraser(command.eraser)
    if not hasattr(eraser, "apply"):
        raise TypeError(
            f"--eraser {command.eraser} is a {eraser.method} eraser, which no model takes"
        )
    model, tokenizer = _load(command)
    from concept_erasure.evals.language.evaluate import evaluate

    report = evaluate(
        model,
        tokenizer,
        concept,
        eraser=eraser,
        suite=tuple(suite),
        seed=command.seed,
        batch_size=16 if command.batch_size is None else command.batch_size,
        limit=command.limit,
        cache_dir=command.cache_dir,
        data_dir=command.data_dir,
        out=command.out,
        progress=None,
    )
    say(report.to_markdown())
    if command.out is not None:
        say(f"wrote the report to {command.out}")


def _check_suite(suite: list[str]) -> None:
    """Refuse names that are neither suites nor tasks of lm-eval, before anything is loaded.

    Raises:
        ValueError: If there is one.
        ImportError: If a task is asked for and lm-eval is absent.
    """
    from concept_erasure.evals.language._tasks import known_task
    from concept_erasure.evals.language.evaluate import SUITES

    for name in suite:
        if name not in SUITES and not known_task(name):
            raise ValueError(
                f"--suite {name}: neither one of {', '.join(SUITES)} nor a task of lm-eval, such as mmlu_500 or wmdp"
            )


def compare_concept(command: Compare) -> None:
    """Fit several methods on a concept; write table and plot, and print the table."""
    from concept_erasure.evals.language_study import Protocol, Study, Trial
    from concept_erasure.evals.language_study_tables import plot_study, study_report

    methods = comma_names(command.methods) or [n for n in COMPARED if n in registry.names()]
    if len(set(methods)) < len(methods):
        raise ValueError(f"--methods names one twice: {', '.join(methods)}")
    own = options_by_method(methods, command.option)
    common = {key: value for key, value in _named(command).items() if key != "seed"}
    for name in methods:
        kind = family_of(name, "concept").load()
        fit_options(
            name, kind, common, own[name]
        )  # refuse what a method lacks before anything runs
    concept = _concept(command.concept)
    relearn: Mapping[str, Any] = {
        "steps": command.relearn_steps,
        "every": max(1, command.relearn_steps // 6),
        "shares": (0.1,),
        "counts": (),
        "rates": (2e-4,),
    }
    attacks = ("relearn",) if command.relearn_steps else ()
    protocol = Protocol(
        suite=("concept", "specificity", *attacks),
        budgets={"relearn": relearn} if attacks else {},
        limit=command.limit,
        seed=command.seed,
    )
    model, tokenizer = _load(command)
    out = Path(command.out)
    study = Study(
        model,
        tokenizer,
        concept,
        folder=command.cache_dir or out / "cache",
        protocol=protocol,
        progress=sys.stderr.isatty(),
    )
    rows = study.run(
        Trial(method=name, options={**common, **own[name]}, seed=command.seed) for name in methods
    )
    if not any(row.ok for row in rows):
        reasons = "; ".join(f"{row.trial.label}: {row.status}" for row in rows)
        raise ValueError(f"no method could be measured: {reasons}")
    title = f"{concept.name}: methods compared"
    picture = plot_study(rows, out / "compare.png", title=title)
    meta = {"model": Path(cast("str", command.model)).name, "seed": command.seed}
    report = study_report(rows, title=title, meta=meta)
    report = type(report)(
        report.title,
        report.rows,
        report.meta,
        report.notes,
        report.sections,
        {"Concept accuracy against kept accuracy, and relearning": picture.name},
    )
    report.save(out, name="compare")
    say(report.to_markdown())
    say(f"wrote the table and the plot to {command.out}")
