"""Table and picture of a language study, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from concept_erasure.evals.language_study import BASELINE, Row, code_hash
from concept_erasure.report import Cell, Interval, Report

__all__ = ["plot_study", "study_report"]


def study_report(
    rows: Sequence[Row],
    *,
    title: str,
    meta: Mapping[str, object] | None = None,
    cells: Callable[[Row, Mapping[str, Cell]], Mapping[str, Cell]] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Return one table: the baselines, then a row a trial, with what relearning and the soft prompt brought back.

    Args:
        rows: Of one study.
        title: Heading.
        meta: How the numbers came about.
        cells: More columns: of a row and the summary without edit.
        notes: More sentences.
    """
    done = [row for row in rows if row.ok]
    table: list[dict[str, Cell]] = []
    base: Mapping[str, Cell] = done[0].summary(BASELINE) if done else {}
    for name in (BASELINE, "instruction"):
        if done and (found := done[0].summary(name)):
            table.append({"method": name, **_main(found, base), "kept": done[0].kept(name)})
    for row in rows:
        line: dict[str, Cell] = {"method": row.trial.label}
        if row.ok:
            line |= {**_main(row.summary(), base), "kept": row.kept()}
            line |= {**_attacks(row), "fit, s": row.seconds.get("fit")}
            line |= dict(cells(row, base)) if cells else {}
        table.append({**line, "status": row.status.partition(":")[0]})
    lines = [
        "Concept, near and far are accuracies of completing statements out of four (guessing 0.25), kept is near and "
        "far together; nats is the change of the log-probability of the right answer. Brackets are 95 % intervals over "
        "items.",
        *notes,
    ]
    lines += [f"{row.trial.label}: {row.status}." for row in rows if not row.ok]
    lines += [
        f"{row.trial.label}: {row.report.notes[0]}"
        for row in done
        if row.report and row.report.notes
    ]
    codes = sorted({row.code for row in done})
    if codes and codes != [now := code_hash()]:
        old = [row.trial.label for row in done if row.code != now]
        lines.append(
            f"Measured before the code came to its state of now ({now}): {', '.join(old)}. What these methods do has "
            "not changed since."
        )
    record = {
        "options": {row.trial.label: dict(row.trial.options) for row in rows if row.trial.options},
        "code": codes,
        "tried": done[0].report.meta.get("tried", {}) if done and done[0].report else {},
        **(meta or {}),
    }
    return Report(title, table, record, lines)


def _main(found: Mapping[str, Cell], base: Mapping[str, Cell]) -> dict[str, Cell]:
    """Return the columns that every model has."""
    before, after = (one.get("log-probability of the answer") for one in (base, found))
    cells: dict[str, Cell] = {"concept": found.get("concept, cloze")}
    if isinstance(before, Interval) and isinstance(after, Interval):
        cells["nats"] = after.value - before.value
    cells |= {key: found[key] for key in ("near", "far") if key in found}
    names = {
        "KL on neutral text": "KL, neutral",
        "reverse perplexity": "reverse ppl",
        "distinct-2": "distinct-2",
        "prompts with a leak": "leaks",
    }
    return cells | {short: found[key] for key, short in names.items() if key in found}


def _attacks(row: Row) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for line in row.section("Attack: relearn"):
        name = str(line["relearning on"])
        cells[f"relearnt, {name}"] = line["accuracy, highest"]
        cells[f"half-life, {name}"] = line["half-life"]
    for line in row.section("Attack: soft_prompt"):
        cells["soft prompt"] = line["test accuracy"]
    return cells


def plot_study(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Draw concept accuracy against kept accuracy, and beside it the relearning curves, in one picture.

    Args:
        rows: Of one study.
        path: Where the picture goes; the ending says the format.
        title: Heading.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If no row was measured.
    """
    from concept_erasure.evals.plots import _COLORS, _MARKERS, _figure
    from concept_erasure.evals.plots import _write as write

    done = [row for row in rows if row.ok]
    if not done:
        raise ValueError("there is nothing to draw; no method was measured")
    figure = _figure(11.5, 4.8)
    left, right = figure.subplots(1, 2)
    points = [
        (name, done[0].kept(name), done[0].summary(name)) for name in (BASELINE, "instruction")
    ]
    points += [(row.trial.label, row.kept(), row.summary()) for row in done]
    for place, (name, kept, summary) in enumerate(points):
        concept = summary.get("concept, cloze")
        if kept is None or not isinstance(concept, Interval):
            continue
        style: dict[str, Any] = {
            "color": "black" if place < 2 else _COLORS[(place - 2) % len(_COLORS)],
            "fmt": _MARKERS[(place if place < 2 else (place - 2) // len(_COLORS)) % len(_MARKERS)],
        }
        left.errorbar(
            [kept.value], [concept.value], xerr=_reach(kept), yerr=_reach(concept), capsize=2, label=name, **style
        )  # fmt: skip
    for place, row in enumerate(done):
        for k, (name, (steps, accuracy)) in enumerate(row.curves.items()):
            right.plot(
                steps,
                accuracy,
                color=_COLORS[place % len(_COLORS)],
                linestyle=("-", "--", ":", "-.")[k % 4],
                marker=_MARKERS[place // len(_COLORS) % len(_MARKERS)],
                markersize=3,
                label=f"{row.trial.label}: {name}",
            )
    for axis in (left, right):
        axis.axhline(0.25, color="grey", linewidth=1, linestyle=":")
    left.set(xlabel="accuracy on near and far items (kept)", ylabel="accuracy on the concept")
    right.set(xlabel="steps of relearning", ylabel="accuracy on the concept")
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize="x-small")
    figure.suptitle(title)
    return write(figure, path)


def _reach(value: Interval) -> list[list[float]]:
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
