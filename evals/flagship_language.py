"""The language study: every method on Harry Potter in two small models, with attacks; hours, cached and resumable.

``python -m concept_erasure.evals.flagship_language --out docs/results --cache FOLDER`` writes ``language_MODEL.json``,
``.md`` and ``.png``. Each row is a file in ``docs/results/rows``, kept with the results, because it costs half an hour;
stop the study and start it again at will. ``--models``, ``--methods`` and ``--seeds`` do a part of it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concept_erasure import registry
from concept_erasure.concept import Concept
from concept_erasure.evals.language._halves import HALVES, Half
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language_goals import Goals, best, goals_of, number, shortfalls
from concept_erasure.evals.language_study import PARTS, Protocol, Row, Study, Trial
from concept_erasure.evals.language_study_tables import plot_study, study_report
from concept_erasure.report import Cell, Report

__all__ = ["MODELS", "Goals", "best", "goals_of", "main", "run_study", "shortfalls"]

logger = logging.getLogger(__name__)
Loaded = tuple[nn.Module, TokenizerLike]

METHODS = (
    "redirect",
    "rmu",
    "elm",
    "graddiff",
    "npo",
    "simnpo",
    "grad-ascent",
    "whp",
    "famr",
)
SUITE = ("concept", "specificity", "fluency", "relearn", "soft_prompt")
BUDGETS: dict[str, dict[str, Any]] = {
    "fluency": {"prompts": 40, "max_new_tokens": 60},
    "relearn": {
        "shares": (0.01, 0.1),
        "counts": (100,),
        "rates": (2e-4,),
        "steps": 40,
        "every": 20,
    },
    "soft_prompt": {"steps": 60},
}
# the baselines' own defaults would take hours: half their steps, and texts cut where the others' are
SHORTER: dict[str, dict[str, Any]] = {
    **{
        method: {"steps": 100, "max_length": 64}
        for method in ("npo", "simnpo", "graddiff", "grad-ascent", "whp")
    },
    "famr": {"steps": 100, "max_length": 48},
}
MMLU = ("mmlu_500",)  # for the default method only: both models are near chance
MMLU_QUESTIONS = 200


@dataclass(frozen=True)
class Model:
    """A model of the study.

    Attributes:
        name: In files.
        module: Where its loader is; loaders are imported when needed.
        loader: Name of the function.
        options: Method to options of its fit on this model.
    """

    name: str
    module: str
    loader: str
    options: Mapping[str, Mapping[str, Any]]

    def load(self, cache: Path) -> Loaded:
        """Return model and tokenizer."""
        load: Callable[..., Loaded] = getattr(importlib.import_module(self.module), self.loader)
        return load(cache_dir=cache) if "gemma" in self.loader else load()


_LOADERS = "concept_erasure.evals.models"
MODELS: dict[str, Model] = {
    "smollm2": Model("smollm2_135m", _LOADERS, "load_smollm2", SHORTER),
    "gemma3": Model("gemma3_270m", _LOADERS, "load_gemma3_270m", SHORTER),
}


def _goal_cells(row: Row, base: Mapping[str, Cell]) -> dict[str, Cell]:
    del base
    cells: dict[str, Cell] = {}
    halves: tuple[tuple[str, Half | None], ...] = (("", None), (", test facts", "test"))
    for words, half in halves:
        met = goals_of(row, half=half)
        missed = [name for name, ok in met.items() if not ok]
        cells[f"goals{words}"] = f"{sum(met.values())} of {len(met)}"
        cells[f"missed{words}"] = ", ".join(missed) or "-"
    return cells


def _half_rows(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """Return the figures of items on each half of the facts, a line a method and half."""
    done = [row for row in rows if row.ok]
    lines: list[dict[str, Cell]] = []
    named = [(model, done[0], model) for model in ("no edit", "instruction") if done]
    for label, row, model in [*named, *((row.trial.label, row, "edited") for row in done)]:
        for half in HALVES:
            part, first = row.part(half, model), row.part(half, "no edit")
            if not part:
                continue
            now, before = (
                number(one.get("log-probability of the answer")) for one in (part, first)
            )
            line: dict[str, Cell] = {"method": label, "half": half}
            line["concept"] = part.get("concept, cloze")
            line["nats"] = None if now is None or before is None else now - before
            lines.append({**line, "near": part.get("near"), "far": part.get("far")})
    return lines


def run_study(
    study: Study,
    name: str,
    *,
    methods: Sequence[str] = METHODS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path,
    mmlu: Sequence[str] = MMLU,
    meta: Mapping[str, object] | None = None,
) -> Report:
    """Run every method with the first seed, the best two with the others, and write table and picture.

    The best are those on the development facts.

    The table is written after each row, so that a study that was stopped leaves what it has.

    Args:
        study: The model, the concept and the protocol.
        name: Of the model, in file names.
        methods: Names in the registry; those it lacks are listed as absent.
        options: Method to options of its fit.
        seeds: The first is everyone's.
        out: Folder for ``language_NAME.json``, ``.md`` and ``.png``.
        mmlu: Tasks of lm-eval for the first method.
        meta: More to record.

    Raises:
        ValueError: If no method could be measured.
    """
    known = set(registry.names())
    chosen = [method for method in methods if method in known]
    absent = [f"{method}: not in this version." for method in methods if method not in known]
    rows: list[Row] = []
    begun = time.perf_counter()

    def add(method: str, seed: int) -> None:
        trial = Trial(method=method, options=dict((options or {}).get(method, {})), seed=seed)
        logger.info("%s: %s", name, trial.label)
        rows.append(study.row(trial))
        if any(row.ok for row in rows):
            _write(rows, name, Path(out), absent, study, begun, meta)

    for method in chosen:
        add(method, seeds[0])
    for row in best(rows, half="development"):
        for seed in seeds[1:]:
            add(row.trial.method, seed)
    if not any(row.ok for row in rows):
        reasons = "; ".join(f"{row.trial.label}: {row.status}" for row in rows)
        raise ValueError(f"no method could be measured: {reasons}")
    section = _benchmark(study, rows, mmlu) if mmlu else None
    return _write(rows, name, Path(out), absent, study, begun, meta, section)


def _benchmark(study: Study, rows: Sequence[Row], tasks: Sequence[str]) -> Report | None:
    """Return MMLU before and after the first measured method."""
    from concept_erasure.evals.language.harness import run

    first = next(row for row in rows if row.ok)
    eraser = study.eraser(first.trial)
    found = run(
        study.model,
        study.tokenizer,
        tasks,
        eraser=eraser,
        limit=MMLU_QUESTIONS,
        batch_size=study.protocol.batch_size,
        cache_dir=study.folder / "readings",
    )
    return replace(found, title=f"Benchmarks, {first.trial.label}")


def _seed_rows(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """Return mean and range over seeds of the methods that were run with several."""
    table: list[dict[str, Cell]] = []
    for method in dict.fromkeys(row.trial.method for row in rows):
        own = [row for row in rows if row.ok and row.trial.method == method]
        if len(own) < 2:
            continue
        line: dict[str, Cell] = {"method": method, "seeds": len(own)}
        for key in ("concept, cloze", "near", "far", "KL on neutral text", "reverse perplexity"):
            found = [v for row in own if (v := number(row.summary().get(key))) is not None]
            if found:
                mean = sum(found) / len(found)
                line[key] = f"{mean:.3f} ({min(found):.3f} to {max(found):.3f})"
        table.append(line)
    return table


def _write(
    rows: Sequence[Row],
    name: str,
    out: Path,
    absent: Sequence[str],
    study: Study,
    begun: float,
    meta: Mapping[str, object] | None,
    benchmark: Report | None = None,
) -> Report:
    title = f"{study.concept.name}, {name}: methods compared"
    spent = sum(sum(row.seconds.values()) for row in rows)
    record = {
        "model": name,
        "concept": study.concept.name,
        "protocol": list(study.protocol.suite),
        "budgets": {key: dict(value) for key, value in study.protocol.budgets.items()},
        "limit": study.protocol.limit,
        "hardware": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {
            one: version(one) for one in ("torch", "transformers", "peft", "lm_eval") if _has(one)
        },
        "hours of all rows": round(spent / 3600, 2),
        "hours of this run": round((time.perf_counter() - begun) / 3600, 2),
        **(meta or {}),
    }
    goals = Goals()
    notes = [
        f"Goals: concept within {goals.band:.2f} of {goals.chance}, answers at least {goals.nats:g} nats down, near "
        f"and far items at most {goals.kept:.0%} down, KL on neutral text at most {goals.divergence:g} nats, reverse "
        f"perplexity at most {goals.fluency:g} times that without edit.",
        *absent,
    ]
    report = study_report(rows, title=title, meta=record, cells=_goal_cells, notes=notes)
    sections = [Report("Over seeds: mean and range", seeds)] if (seeds := _seed_rows(rows)) else []
    if halves := _half_rows(rows):
        note = (
            "Options were chosen on `development`; the figures of `test` are free of that choice."
        )
        sections.append(Report(PARTS, halves, notes=[note]))
    sections += [benchmark] if benchmark is not None else []
    out.mkdir(parents=True, exist_ok=True)
    picture = plot_study(rows, out / f"language_{name}.png", title=title)
    images = {"Concept accuracy against kept accuracy, and relearning": picture.name}
    report = replace(report, sections=sections, images=images)
    report.save(out, name=f"language_{name}")
    return report


def _has(name: str) -> bool:
    try:
        version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    """Return the commit of the checkout, if this is one."""
    import shutil
    import subprocess

    git = shutil.which("git")
    if git is None:
        return "unknown"
    done = subprocess.run(  # noqa: S603 fixed arguments
        [git, "describe", "--always", "--dirty"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for tables")
    parser.add_argument("--cache", type=Path, help="folder for finished rows (default: user cache)")
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--seeds", default="0,1,2", help="the first is everyone's")
    parser.add_argument("--concept", default="harry_potter", help="name or yaml file")
    parser.add_argument("--steps", type=int, help="training steps of every method")
    parser.add_argument("--limit", type=int, help="items of each kind at most")
    parser.add_argument("--no-mmlu", action="store_true", help="leave MMLU out")
    return parser.parse_args(argv)


def _load(names: Sequence[str], cache: Path) -> dict[str, Loaded]:
    """Return the models asked for, and another one as a judge where its package is installed."""
    loaded = {name: MODELS[name].load(cache) for name in names}
    for name in () if len(loaded) > 1 else [one for one in MODELS if one not in loaded][:1]:
        try:
            loaded[name] = MODELS[name].load(cache)
        except ImportError as error:
            logger.warning("no reverse perplexity, for want of a second model: %s", error)
    return loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line; returns 0."""
    from concept_erasure.evals.models import user_cache

    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cache: Path = arguments.cache or user_cache() / "flagship-language"
    concept = Concept.load(arguments.concept)
    names = [name.strip() for name in arguments.models.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        raise SystemExit(f"--models {unknown[0]}: choose of {', '.join(MODELS)}")
    loaded = _load(names, cache)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    protocol = Protocol(suite=SUITE, budgets=BUDGETS, limit=arguments.limit)
    for name in names:
        # the other model judges what this one writes
        judge = next((other for key, other in loaded.items() if key != name), None)
        own = dict(MODELS[name].options)
        if arguments.steps is not None:
            own = {method: {**own.get(method, {}), "steps": arguments.steps} for method in methods}
        study = Study(
            *loaded[name],
            concept,
            folder=cache / name,
            rows=arguments.out / "rows" / MODELS[name].name,
            protocol=protocol,
            reference=judge,
            progress=False,
        )
        run_study(
            study,
            MODELS[name].name,
            methods=methods,
            options=own,
            seeds=[int(seed) for seed in arguments.seeds.split(",")],
            out=arguments.out,
            mmlu=() if arguments.no_mmlu else MMLU,
            meta={"commit": _commit()},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
