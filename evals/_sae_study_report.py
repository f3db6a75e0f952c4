"""Table, comparison with the controls, and picture of the study of sparse features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concept_erasure.report import Cell, Interval, Report

__all__ = ["against_controls", "study_report"]

Row = Mapping[str, Any]
BASELINE = "no edit"


def _of(rows: Sequence[Row], concept: str, arm: str, kl: float | None = None) -> list[Row]:
    return [
        row for row in rows
        if row["concept"] == concept and row["key"]["arm"] == arm and "failed" not in row
        and (kl is None or row["wanted"] == kl)
    ]  # fmt: skip


def against_controls(edit: Row, controls: Sequence[Row]) -> dict[str, Cell]:
    """Return how much more an edit does than the mean of its controls, item by item.

    Args:
        edit: Its row.
        controls: Rows of other latents at the same divergence, on the same items.

    Returns:
        ``nats``: how much lower the log-probability of the right answer is; ``accuracy``: how much lower the share of
        right answers; both with 95 % intervals over items. ``controls ahead``: how many controls have a lower mean
        log-probability than the edit.
    """
    count = len(edit["log_prob"])

    def mean(key: str, i: int) -> float:
        return sum(float(row[key][i]) for row in controls) / len(controls)

    nats = [mean("log_prob", i) - edit["log_prob"][i] for i in range(count)]
    right = [mean("correct", i) - edit["correct"][i] for i in range(count)]
    ahead = sum(row["mean"] < edit["mean"] for row in controls)
    return {
        "nats": Interval.of_mean(nats),
        "accuracy": Interval.of_mean(right),
        "controls ahead": f"{ahead} of {len(controls)}",
    }


def _line(row: Row, base: Row | None) -> dict[str, Cell]:
    line: dict[str, Cell] = {
        "concept": row["concept"], "method": row["key"]["arm"], "KL wanted": row["wanted"] or None,
    }  # fmt: skip
    if "failed" in row:
        return line | {"status": row["failed"]}
    line |= {"KL": row["kl"], "strength": row["strength"], "accuracy": _share(row["correct"])}
    if base is not None and base is not row:
        line["nats"] = _change(base["log_prob"], row["log_prob"])
        if "near_log_prob" in row:
            line["near, nats"] = _change(base["near_log_prob"], row["near_log_prob"])
    if "near_correct" in row:
        line["near accuracy"] = _share(row["near_correct"])
        line["KL, other texts"] = row["kl_reported"]
    if "relearnt" in row:
        curve = row["relearnt"]
        line["relearnt accuracy"] = curve["accuracy"][-1]
        line["relearnt log-prob"] = curve["log_prob"][-1]
    line["status"] = "measured" if row["reached"] else "KL not reached"
    if "relearning failed" in row:
        line["status"] = f"relearning failed: {row['relearning failed']}"
    return line


def _share(values: Sequence[int]) -> Cell:
    from concept_erasure.evals.language.statistics import share

    return share([bool(one) for one in values])


def _change(before: Sequence[float], after: Sequence[float]) -> Cell:
    return Interval.of_mean([b - a for a, b in zip(before, after, strict=True)])


def study_report(
    rows: Sequence[Row],
    out: Path,
    *,
    meta: Mapping[str, object],
    notes: Sequence[str] = (),
    picture: bool = True,
) -> Report:
    """Write ``sae_flagship.json``, ``.md`` and ``.png`` to a folder and return the report.

    Args:
        rows: What was measured.
        out: The folder.
        meta: How it came about.
        notes: More sentences.
        picture: Whether to draw.
    """
    table: list[dict[str, Cell]] = []
    compared: list[dict[str, Cell]] = []
    for concept in dict.fromkeys(row["concept"] for row in rows):
        base = next(iter(_of(rows, concept, BASELINE)), None)
        own = [row for row in rows if row["concept"] == concept]
        table += [_line(row, base) for row in own if "draw" not in row["key"]]
        for row in own:
            if "draw" in row["key"] or "failed" in row or not row["wanted"]:
                continue
            drawn = _of(rows, concept, f"{row['key']['arm']}, control", row["wanted"])
            # one that could not be made to cost as much is no control: it did less for less
            controls = [one for one in drawn if one["reached"]]
            if controls:
                compared.append(
                    {
                        "concept": concept, "method": row["key"]["arm"], "KL wanted": row["wanted"],
                        **against_controls(row, controls),
                        "KL of controls": sum(one["kl"] for one in controls) / len(controls),
                    }
                )  # fmt: skip
    lines = [
        "Accuracy is that of choosing the right answer of four by log-probability, nats the mean change of the right "
        "answer's log-probability against the model without edit (negative: less likely), brackets 95 % intervals over "
        "items. Strengths are matched to the wanted divergence on 40 neutral sentences; the divergence on other texts "
        "is on the library's own paragraphs. tau was chosen on the questions to tune on.",
        "Against controls: how much lower the edit brings the right answer than the mean of the draws of other "
        "latents of like firing rate, at the same sites and divergence (positive: the edit does more).",
        *notes,
    ]
    sections = [Report("Against controls", compared)] if compared else []
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    if picture and (plot := _plot(rows, out / "sae_flagship.png")):
        images["Change of the answers' log-probability at equal divergence"] = plot.name
    report = Report(
        "Sparse features: edits at equal divergence", table, dict(meta), lines, sections, images
    )
    report.save(out, name="sae_flagship")
    return report


def _plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the change of the answers' log-probability of each method, controls as dots, for each concept and KL."""
    try:
        from concept_erasure.evals.plots import _COLORS, _figure
        from concept_erasure.evals.plots import _write as write
    except ImportError:
        return None
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    kls = sorted({row["wanted"] for row in rows if row["wanted"]})
    arms = list(
        dict.fromkeys(
            row["key"]["arm"] for row in rows if "draw" not in row["key"] and row["wanted"]
        )
    )
    if not kls or not arms:
        return None
    figure = _figure(5.5 * len(concepts), 4.2)
    axes = figure.subplots(1, len(concepts), squeeze=False)[0]
    for axis, concept in zip(axes, concepts, strict=True):
        base = next(iter(_of(rows, concept, BASELINE)), None)
        if base is None:
            continue
        for place, kl in enumerate(kls):
            for k, arm in enumerate(arms):
                x = k + 0.25 * place
                for row in _of(rows, concept, arm, kl):
                    value = _change(base["log_prob"], row["log_prob"])
                    if isinstance(value, Interval):
                        reach = [[value.value - value.low], [value.high - value.value]]
                        axis.errorbar(
                            [x], [value.value], yerr=reach, fmt="o", capsize=2, color=_COLORS[place]
                        )
                for row in _of(rows, concept, f"{arm}, control", kl):
                    axis.plot([x], [row["mean"] - base["mean"]], "_", color="grey")
        axis.axhline(0, color="grey", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize="small")
        axis.set(title=concept, ylabel="change of log-probability, nats")
    return write(figure, path)
