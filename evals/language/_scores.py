"""What a model did on lm-eval's tasks, question by question, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concept_erasure.evals.language.statistics import paired, share
from concept_erasure.report import Cell, Interval, Report

__all__ = ["Scores", "report_of"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model did on one task.

    Attributes:
        task: Name.
        values: Metric to leaf to one number a question (1 or 0 for accuracies), in the order of the questions.
        chance: Leaf to the mean of one over the number of choices; empty where nothing is chosen.
        plain: Metric to the task's own number, where it is no mean over questions (perplexity).
        versions: Leaf to lm-eval's version of it.
        shots: Leaf to examples in the prompt.
        source: ``"hub"``, ``"package"`` or ``"files"``.
        files: Local files with the start of their sha256.
        cached: Whether it was read from the cache.
    """

    task: str
    values: Mapping[str, Mapping[str, Sequence[float]]]
    chance: Mapping[str, float]
    plain: Mapping[str, float]
    versions: Mapping[str, float | str]
    shots: Mapping[str, int]
    source: str
    files: Mapping[str, str]
    cached: bool = False

    @property
    def count(self) -> int:
        """Number of questions."""
        first = next(iter(self.values.values()), {})
        return sum(len(values) for values in first.values())

    @property
    def guessing(self) -> float | None:
        """Accuracy of a guess; None where nothing is chosen."""
        sizes = {leaf: len(v) for leaf, v in next(iter(self.values.values()), {}).items()}
        if not self.chance or not sum(sizes.values()):
            return None
        return sum(self.chance[leaf] * n for leaf, n in sizes.items()) / sum(sizes.values())

    def pooled(self, metric: str, leaf: str | None = None) -> list[float]:
        """Return the numbers of all questions, or of one leaf's."""
        held = self.values[metric]
        return [v for name, own in held.items() if leaf in (None, name) for v in own]

    def interval(self, metric: str, leaf: str | None = None) -> Interval | float:
        """Return the mean: with a Wilson interval for accuracies, a normal one for others."""
        return _interval(self.pooled(metric, leaf))


def _interval(values: Sequence[float]) -> Interval | float:
    if set(values) <= {0.0, 1.0}:
        return share([value == 1 for value in values])
    return Interval.of_mean(values) if len(values) > 1 else float(values[0])


def report_of(found: Mapping[str, Sequence[Scores]], meta: Mapping[str, object]) -> Report:
    """Return the table of one model's tasks, or of a model's before and after.

    Args:
        found: Name of the model, or ``""`` if there is only one, to what it did on the same tasks.
        meta: How the numbers came about.
    """
    rows: list[dict[str, Cell]] = []
    notes: list[str] = []
    sections: list[Report] = []
    base = next(iter(found.values()))
    for i, scores in enumerate(base):
        for model, measured in found.items():
            now = measured[i]
            rows += _rows(now, model, scores)
            if note := _near_chance(now, model):
                notes.append(note)
        if any(len(leaves) > 1 for leaves in scores.values.values()):
            sections.append(_parts(scores.task, {model: own[i] for model, own in found.items()}))
        notes.append(_how(scores))
    notes.append(
        "Brackets are 95 % intervals over questions (Wilson for accuracies). The p-value is McNemar's exact test on "
        "the same questions; a task that lm-eval scores only as a whole (perplexity) has neither."
    )
    return Report("Tasks of lm-eval", rows, meta, notes, sections)


def _rows(now: Scores, model: str, base: Scores) -> list[dict[str, Cell]]:
    first: dict[str, Cell] = {"task": now.task, **({"model": model} if model else {})}
    rows: list[dict[str, Cell]] = []
    for metric in now.values:
        row = {**first, "metric": metric, "value": now.interval(metric)}
        if metric.startswith("acc") and now.guessing is not None:
            row["guessing"] = now.guessing
        if now is not base and metric in base.values:
            before, after = base.pooled(metric), now.pooled(metric)
            if set(before) | set(after) <= {0.0, 1.0}:
                compared = paired([v == 1 for v in before], [v == 1 for v in after])
                row |= {"change": compared.difference, "p": compared.p}
            else:
                row["change"] = _interval([b - a for a, b in zip(before, after, strict=True)])
        rows.append({**row, "questions": now.count})
    for metric, value in now.plain.items():
        row = {**first, "metric": metric, "value": value}
        if now is not base and metric in base.plain:
            row["change"] = value - base.plain[metric]
        rows.append({**row, "questions": now.count or None})
    return rows


def _near_chance(scores: Scores, model: str) -> str:
    """Return a sentence if the accuracy cannot be told apart from guessing, or is below it."""
    guessing, found = scores.guessing, scores.interval("acc") if "acc" in scores.values else None
    if guessing is None or not isinstance(found, Interval):
        return ""
    who = f"{scores.task}{', ' + model if model else ''}"
    if found.low <= guessing <= found.high:
        return (
            f"{who}: {found} is near chance ({guessing:.3f}): on these questions the model cannot be told apart from "
            "one that guesses, so damage cannot show here; the divergence on neutral text shows it."
        )
    if found.high < guessing:
        return f"{who}: {found} is below chance ({guessing:.3f}): systematic wrong answers are knowledge too."
    return ""


def _parts(task: str, found: Mapping[str, Scores]) -> Report:
    """Return the subtasks, accuracy where there is one."""
    rows: list[dict[str, Cell]] = []
    base = next(iter(found.values()))
    metric = "acc" if "acc" in base.values else next(iter(base.values))
    for leaf in base.values[metric]:
        row: dict[str, Cell] = {"subtask": leaf, "questions": len(base.pooled(metric, leaf))}
        for model, scores in found.items():
            row[f"{metric} {model}".strip()] = scores.interval(metric, leaf)
        rows.append(row)
    return Report(f"{task}: subtasks", rows)


def _how(scores: Scores) -> str:
    """Return versions, few-shot examples and data of a task as a sentence."""
    versions = ", ".join(sorted({str(one) for one in scores.versions.values()}))
    shots = ", ".join(sorted({str(one) for one in scores.shots.values()}))
    where = {
        "hub": "data from the hub",
        "package": "questions from this library (Hendrycks et al. 2021)",
        "files": "local files, prompts as in lm-eval's task",
    }[scores.source]
    parts = f"{len(scores.versions)} subtasks, " if len(scores.versions) > 1 else ""
    return (
        f"{scores.task}: {parts}task version {versions}, {shots} examples in the prompt, {where}."
    )
