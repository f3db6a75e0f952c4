"""The report of an evaluation: tables, sentences, the record of how it came about, pictures."""

from __future__ import annotations

import importlib.util
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from concept_erasure import __version__
from concept_erasure.errors import ErasureWarning
from concept_erasure.evals.language import _tables as tables
from concept_erasure.evals.language._run import Evaluation
from concept_erasure.evals.language._suites import CONTROLS, fingerprint_of, items_of
from concept_erasure.evals.language.plots import plot_kept, plot_probes, plot_relearning
from concept_erasure.evals.language.statistics import share
from concept_erasure.report import LANGUAGE_TESTS, Interval, Report
from concept_erasure.sites import model_id

__all__ = ["with_plots", "write_up"]


def write_up(run: Evaluation, benchmarks: Report | None, seconds: float) -> Report:
    readings, concept = run.readings, run.concept
    sections: list[Report] = []
    if "concept" in readings:
        found = readings["concept"]
        sections.append(
            tables.concept_section(found, ("cloze",), "The concept: completing statements")
        )
        sections.append(
            tables.concept_section(
                found,
                ("question", "letter", "reversed"),
                "Ripple: the same facts asked in other ways",
            )
        )
        sections.append(tables.halves_section(found))
    if any(reading.scores for reading in readings.get("specificity", {}).values()):
        topics = {
            f"{kind} {name}": [item.topic for item in items_of(concept, kind, format, run.options)]
            for kind in ("near", "far")
            for name, (format, _) in CONTROLS.items()
            if items_of(concept, kind, format, run.options)
        }
        sections.append(tables.controls_section(readings["specificity"], topics, run.kept))
    if "concept" in readings:
        kinds = ("concept", *(("near", "far") if "specificity" in readings else ()))
        every = {kind: items_of(concept, kind, "cloze", run.options) for kind in kinds}
        sections.append(tables.parts_section(readings, {k: v for k, v in every.items() if v}))
    titles = {
        "leak": "What slips out when the model is sampled",
        "fluency": "What the model writes about the concept",
        "probes": "What probes read from the hidden states",
    }
    sections += [
        tables.cells_section(title, readings[name], _notes_of(name, run))
        for name, title in titles.items()
        if name in readings
    ]
    sections += [tables.outcome_section(name, one) for name, one in run.outcomes.items()]
    if benchmarks is not None:
        sections.append(benchmarks)
    notes = [tables.verdict(readings, run.outcomes), *_baseline_notes(run)]
    meta = _meta(run, benchmarks, seconds)
    notes.append(f"Not tried: {'; '.join(meta['not tried'])}.")
    return Report(
        f"Erasing {concept.name}: evaluation",
        tables.summary(readings, run.rows, run.kept) if readings else (),
        meta,
        notes,
        sections,
    )


def _notes_of(suite: str, run: Evaluation) -> list[str]:
    if suite == "leak":
        return [
            "A leak is a sample that holds the right answer as whole words; the next column is the same for one wrong "
            "choice of each item, what such words come to by accident."
        ]
    if suite == "fluency":
        judge = run.options.reference
        who = "no reference model was given" if judge is None else f"judged by {model_id(judge[0])}"
        return [f"Reverse perplexity: {who}. Loops have a low one: read it with distinct-2."]
    return [
        "The maximum over layers, next to that of the same probe on shuffled labels. `truth`: is a completed statement "
        "true; `answer`: which letter is right; `concept`: is the question about the concept or a neighbour, which a "
        "model can tell without knowing anything."
    ]


def _baseline_notes(run: Evaluation) -> list[str]:
    """Return what the baselines say: whether there was anything to erase, and whether asking is as good."""
    concept = run.readings.get("concept", {})
    if not concept:
        return []
    first = concept[tables.FIRST].scores["cloze"]
    notes = []
    if first.accuracy.low <= first.chance:
        words = (
            f"the model without edit is not shown to know {run.concept.name}: cloze accuracy {first.accuracy}, "
            f"guessing {first.chance:.3f}; there may be nothing to erase"
        )
        warnings.warn(words, ErasureWarning, stacklevel=4)
        notes.append(f"Warning: {words}.")
    if "instruction" in concept:
        asked = concept["instruction"].scores["cloze"]
        words = f"The instruction alone gives cloze accuracy {asked.accuracy}"
        if "edited" in concept:
            edited = concept["edited"].scores["cloze"].accuracy
            as_good = asked.accuracy.value <= edited.value
            words += f", the edit {edited}: " + (
                "asking politely is as good" if as_good else "asking politely is not enough"
            )
        notes.append(f"{words}.")
    notes.append(
        "Brackets are 95 % intervals over items (accuracies: Wilson), for one seed and one wording."
    )
    return notes


def _meta(run: Evaluation, benchmarks: Report | None, seconds: float) -> dict[str, Any]:
    tried = {
        suite: next(iter(found.values())).budget for suite, found in run.readings.items() if found
    }
    tried |= {
        suite: f"smoke run, {one.budget}" if one.smoke else one.budget
        for suite, one in run.outcomes.items()
    }
    if benchmarks is not None:
        tried["harness"] = ", ".join(dict.fromkeys(str(row["task"]) for row in benchmarks.rows))
    parameter = next(run.model.parameters())
    eraser = run.eraser
    return {
        "model": model_id(run.model),
        "concept": run.concept.name,
        "concept file": fingerprint_of(run.concept.to_dict()),
        "method": str(getattr(eraser, "method", "")) or ("edits in force" if run.live else None),
        "eraser": str(getattr(eraser, "digest", "")) or None,
        "rows": list(run.rows),
        "instruction": run.told,
        "tried": tried,
        "withstood": [name for name, one in run.outcomes.items() if not one.broke],
        "came back under": [name for name, one in run.outcomes.items() if one.broke],
        "curves": {
            name: {"steps": list(steps), "accuracy": list(accuracy)}
            for one in run.outcomes.values()
            for name, (steps, accuracy) in one.curves.items()
        },
        "not tried": [words for name, words in LANGUAGE_TESTS.items() if name not in tried],
        "seed": run.options.seed,
        "limit": run.options.limit,
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {
            "deconcept": __version__,
            "torch": torch.__version__,
            "transformers": _transformers(),
        },
        "seconds": {name: round(one, 1) for name, one in run.seconds.items()}
        | {"all": round(seconds, 1)},
    }


def _transformers() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def with_plots(run: Evaluation, report: Report, out: Path) -> Report:
    """Return the report with its pictures, drawn into the folder."""
    if importlib.util.find_spec("matplotlib") is None:
        notes = [*report.notes, "No pictures: matplotlib is not installed (extra `plots`)."]
        return Report(report.title, report.rows, report.meta, notes, report.sections)
    images: dict[str, str] = {}
    concept, controls = run.readings.get("concept", {}), run.readings.get("specificity", {})
    points: dict[str, tuple[Interval, Interval]] = {}
    for row in concept:
        shares = (
            [controls[row].scores.get(f"{kind} cloze") for kind in ("near", "far")]
            if row in controls
            else []
        )
        kept = [one for one in shares if one is not None]
        if kept:
            hits = torch.cat([one.correct for one in kept]).tolist()
            points[row] = (share(hits), concept[row].scores["cloze"].accuracy)
    title = f"{run.concept.name}, {model_id(run.model)}"
    if points:
        plot_kept(
            points, out / "kept.png", title=title, kept_label="cloze accuracy, near and far items"
        )
        images["Accuracy on the concept against accuracy on what has to stay"] = "kept.png"
    curves = {
        name: one for outcome in run.outcomes.values() for name, one in outcome.curves.items()
    }
    if curves:
        base = concept[tables.FIRST].scores["cloze"].accuracy.value
        plot_relearning(curves, out / "relearning.png", base=base, title=title)
        images["Relearning"] = "relearning.png"
    probes = {row: one.layers["truth"] for row, one in run.readings.get("probes", {}).items()}
    if probes:
        plot_probes(probes, out / "probes.png", title=f"{title}: is a statement true?")
        images["Truth of statements about the concept, read by a linear probe"] = "probes.png"
    return Report(report.title, report.rows, report.meta, report.notes, report.sections, images)
