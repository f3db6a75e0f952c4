"""The tables and sentences of an evaluation, from its readings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from concept_erasure.concept_items import Item
from concept_erasure.evals.language._halves import HALVES, half_mask
from concept_erasure.evals.language._robustness import WHITE_BOX, Outcome
from concept_erasure.evals.language._suites import Reading
from concept_erasure.evals.language.items import ItemScores, equivalence, mcnemar
from concept_erasure.evals.language.neutral import Divergence
from concept_erasure.report import Cell, Interval, Report

__all__ = [
    "cells_section",
    "concept_section",
    "controls_section",
    "halves_section",
    "outcome_section",
    "parts_section",
    "summary",
    "verdict",
]

Readings = Mapping[str, Mapping[str, Reading]]  # suite -> row -> reading
FIRST = "no edit"
MARGIN = 0.02


def _share(reading: Reading | None, name: str) -> Interval | None:
    scores = None if reading is None else reading.scores.get(name)
    return None if scores is None else scores.accuracy


def summary(
    readings: Readings, rows: Sequence[str], kept: Divergence | None
) -> list[dict[str, Cell]]:
    """Return the main table: one row a model."""
    table = []
    for row in rows:
        concept = readings.get("concept", {}).get(row)
        controls = readings.get("specificity", {}).get(row)
        cells: dict[str, Cell] = {"model": row}
        if concept is not None:
            cells |= {
                "concept, cloze": _share(concept, "cloze"),
                "log-probability of the answer": concept.scores["cloze"].mean_log_prob,
                "concept, question": _share(concept, "question"),
            }
        if controls is not None:
            cells |= {kind: _share(controls, f"{kind} cloze") for kind in ("near", "far")}
            if kept is not None and row in {FIRST, "edited"}:
                first = row == FIRST
                cells["KL on neutral text"] = 0.0 if first else kept.kl
                before, after = kept.perplexity_before, kept.perplexity_after
                cells["perplexity of neutral text"] = before if first else after
        leak = readings.get("leak", {}).get(row)
        if leak is not None:
            cells["prompts with a leak"] = leak.cells["prompts with a leak"]
        written = readings.get("fluency", {}).get(row)
        if written is not None:
            cells |= {
                key: written.cells[key] for key in ("reverse perplexity", "distinct-2", "empty")
            }
        probed = readings.get("probes", {}).get(row)
        if probed is not None:
            cells["truth probe, best layer"] = probed.cells.get("truth")
        table.append(cells)
    return table


def _line(row: str, scores: ItemScores, first: ItemScores) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"model": row, "accuracy": scores.accuracy}
    if scores is not first:
        change = mcnemar(first, scores)
        cells |= {"change": change.difference, "lost": change.lost, "gained": change.gained}
        cells["McNemar p"] = change.p
        moved = scores.log_prob_right - first.log_prob_right
        cells["change of log-probability"] = _interval(moved)
    return cells


def _interval(values: torch.Tensor) -> Cell:
    if len(values) < 2 or not bool(values.isfinite().all()):
        return float(values.mean())
    return Interval.of_mean(values.tolist())


def concept_section(readings: Mapping[str, Reading], formats: Sequence[str], title: str) -> Report:
    """Return the table of the concept in some formats, with the test of equivalence to guessing."""
    table: list[dict[str, Cell]] = []
    for name in formats:
        first = readings[FIRST].scores[name]
        for row, reading in readings.items():
            scores = reading.scores[name]
            level = equivalence(scores, margin=MARGIN)
            table.append(
                {
                    "format": name,
                    **_line(row, scores, first),
                    "accuracy, per token": scores.normalised.accuracy,
                    "log-probability": scores.mean_log_prob,
                    "mean rank of 4": float(scores.rank.mean()),
                    "median rank in the vocabulary": float(scores.token_rank.double().median()),
                    "guessing": scores.chance,
                    f"p, within {MARGIN} of guessing": level.p,
                    "shown within": level.shown,
                }
            )
    notes = [
        "`shown within` is the smallest distance from guessing that two one-sided tests at 5 % show; accuracy below "
        "guessing is knowledge too and counts as distance.",
    ]
    for name in formats:
        scores = readings[FIRST].scores[name]
        accuracy = scores.accuracy
        if accuracy.low <= scores.chance:
            notes.append(
                f"{name}: the model without edit is not shown to know the facts in this format ({accuracy}, guessing "
                f"{scores.chance:.3f}), so this format cannot show an erasure."
            )
    return Report(title, table, notes=notes)


def controls_section(
    readings: Mapping[str, Reading], topics: Mapping[str, Sequence[str]], kept: Divergence | None
) -> Report:
    """Return near and far sets, each set by itself, with paired differences.

    Args:
        readings: Of the suite.
        topics: Name of the scores to the topic of each of its items.
        kept: Divergence on neutral text.
    """
    table: list[dict[str, Cell]] = []
    for name, every in topics.items():
        parts = dict.fromkeys(every)
        for topic in (*(parts if len(parts) > 1 else ()), "all"):
            mask = torch.tensor([topic in (one, "all") for one in every])
            first = readings[FIRST].scores[name][mask]
            for row, reading in readings.items():
                scores = first if row == FIRST else reading.scores[name][mask]
                label = f"{name.partition(' ')[0]}: {topic if topic != 'all' else ', '.join(parts)}"
                table.append(
                    {
                        "set": label,
                        "format": name.partition(" ")[2],
                        "items": len(scores),
                        **_line(row, scores, first),
                    }
                )
    notes = []
    if kept is not None:
        notes.append(
            f"Neutral text: KL(P0 || P) is {kept.kl} nats a token over {kept.tokens} tokens of {kept.texts} texts; "
            f"the largest mean of a text is {max(kept.per_text):.3f}. Perplexity {kept.perplexity_before:.2f} -> "
            f"{kept.perplexity_after:.2f}; the most probable token is the same at {kept.agreement:.1%}."
        )
    return Report("What has to stay: near neighbours and far controls", table, notes=notes)


def halves_section(readings: Mapping[str, Reading]) -> Report:
    """Return the facts that were better and worse known before the edit, each half by itself (the long tail)."""
    first = readings[FIRST].scores["cloze"]
    order = first.log_prob_right.argsort(descending=True)
    half = len(order) // 2
    table: list[dict[str, Cell]] = []
    for label, index in (("better known", order[:half]), ("less known", order[half:])):
        part = first[index]
        for row, reading in readings.items():
            scores = part if row == FIRST else reading.scores["cloze"][index]
            table.append({"half of the facts": label, "items": half, **_line(row, scores, part)})
    note = (
        "Halves by the log-probability of the answer before the edit, a stand-in for popularity. Since the same "
        "numbers split and start the comparison, the better known half falls a little without any edit."
    )
    return Report("Better and less known facts", table, notes=[note])


def parts_section(
    readings: Mapping[str, Mapping[str, Reading]], items: Mapping[str, Sequence[Item]]
) -> Report:
    """Return cloze accuracies of the facts that options may be chosen on, and of those kept for the report.

    Args:
        readings: Suite to row to reading.
        items: Items of `concept`, `near` and `far`, where there are any, in the order of their scores.
    """
    table: list[dict[str, Cell]] = []
    for kind, own in items.items():
        suite, name = (
            ("concept", "cloze") if kind == "concept" else ("specificity", f"{kind} cloze")
        )
        for half in HALVES:
            mask = half_mask(own, half)
            if not bool(mask.any()):
                continue
            first = readings[suite][FIRST].scores[name][mask]
            for row, reading in readings[suite].items():
                scores = first if row == FIRST else reading.scores[name][mask]
                line: dict[str, Cell] = {"half": half, "set": kind, "items": len(scores)}
                line |= _line(row, scores, first)
                table.append({**line, "log-probability": scores.mean_log_prob})
    note = (
        "Halves by a hash of the fact: choose options on `development` only, and the figures of `test` are free of "
        "that choice."
    )
    return Report("Development and test facts", table, notes=[note])


def cells_section(title: str, readings: Mapping[str, Reading], notes: Sequence[str] = ()) -> Report:
    """Return a table of readings that are one line a model."""
    table = [{"model": row, **reading.cells} for row, reading in readings.items()]
    return Report(title, table, notes=notes)


def outcome_section(name: str, outcome: Outcome) -> Report:
    """Return the table of an attack."""
    words = "came back" if outcome.broke else "did not come back"
    notes = [
        f"Budget: {outcome.budget}.",
        f"Knowledge {words} under this attack (rule: {outcome.rule}).",
    ]
    if outcome.smoke:
        notes.append("The budget is that of a smoke test: a failure says nothing about the model.")
    return Report(f"Attack: {name}", outcome.rows, notes=notes)


def _guessing(scores: ItemScores) -> bool:
    """Say whether guessing lies in the interval of the accuracy: neither above nor below."""
    return scores.accuracy.low <= scores.chance <= scores.accuracy.high


def first_known(concept: Mapping[str, Reading]) -> list[str]:
    """Return the formats in which the model without edit is shown to know the facts."""
    first = concept[FIRST].scores
    return [name for name, scores in first.items() if scores.accuracy.low > scores.chance]


def verdict(readings: Readings, outcomes: Mapping[str, Outcome]) -> str:
    """Return what may be said of the edit.

    "Removed" needs accuracies that cannot be told from guessing in every format in which the facts were known, and
    relearning and an attack with access to the weights, both run in earnest and withstood, as every other attack that
    was run. Anything less is "suppressed under the tests listed".
    """
    concept = readings.get("concept", {})
    if "edited" not in concept:
        return "No edit was measured: these are the baselines."
    first, edited = (concept[row].scores["cloze"] for row in (FIRST, "edited"))
    change = mcnemar(first, edited)
    moved = float((edited.log_prob_right - first.log_prob_right).mean())
    figures = (
        f"cloze accuracy {first.accuracy.value:.3f} -> {edited.accuracy.value:.3f} (p = {change.p:.1e}), "
        f"log-probability of the answer {moved:+.2f} nats"
    )
    if not (change.difference.value < 0 and change.p < 0.05):
        if not (math.isfinite(moved) and moved < -1):
            return f"The concept is not shown to be suppressed: {figures}."
        figures += "; the answers are less probable, but mostly still ahead of the wrong ones"
    broken = [name for name, one in outcomes.items() if one.broke]
    if broken:
        return f"The concept is suppressed under the tests listed, and comes back under {', '.join(broken)}: {figures}."
    above = [name for name in first_known(concept) if not _guessing(concept["edited"].scores[name])]
    if above:
        return (
            f"The concept is suppressed under the tests listed, in part: {figures}; accuracy is not that of guessing "
            f"in the formats {', '.join(above)}."
        )
    serious = {name for name, one in outcomes.items() if not one.smoke}
    if "relearn" in serious and serious & WHITE_BOX:
        ran = ", ".join(sorted(serious))
        return (
            f"The concept is removed as far as the tests listed can tell, {ran} among them: {figures}. Other texts, "
            "steps and attacks may still bring it back."
        )
    return f"The concept is suppressed under the tests listed: {figures}."
