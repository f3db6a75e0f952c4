"""What the best method of the language study should reach, and how near a row is to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concept_erasure.evals.language._halves import Half
from concept_erasure.evals.language_study import PARTS, Row
from concept_erasure.report import Cell, Interval

__all__ = ["Goals", "best", "goals_of", "number", "shortfalls"]

SLACK = 1e-9  # rounding of a difference of shares


@dataclass(frozen=True)
class Goals:
    """What the best method should reach (the study's figures; each is reported whether met or not).

    Attributes:
        chance: Concept accuracy of guessing.
        band: How far from it the concept accuracy may be.
        nats: How far the answers' log-probability must fall.
        kept: How far accuracy on near and far items may fall.
        divergence: Largest mean KL on neutral text.
        fluency: Largest reverse perplexity, as a multiple of the model's without edit.
    """

    chance: float = 0.25
    band: float = 0.10
    nats: float = 4.0
    kept: float = 0.03
    divergence: float = 0.05
    fluency: float = 1.3


def number(cell: Cell) -> float | None:
    """Return the value of a cell; None if it is not a number."""
    if isinstance(cell, Interval):
        return cell.value
    return float(cell) if isinstance(cell, int | float) and not isinstance(cell, bool) else None


def _figures(row: Row, model: str, half: Half | None) -> Mapping[str, Cell]:
    """Return the main figures of a row, those of items on one half of the facts if one is named."""
    if half is None:
        return row.summary(model)
    if row.ok and not row.section(PARTS):
        raise ValueError(
            f"{row.trial.label} was measured without halves; delete its row to measure it again"
        )
    of_items = ("concept, cloze", "log-probability of the answer", "near", "far")
    rest = {key: cell for key, cell in row.summary(model).items() if key not in of_items}
    return {**rest, **row.part(half, model)}


def shortfalls(
    row: Row, goals: Goals | None = None, *, half: Half | None = None
) -> dict[str, float]:
    """Return how far a row is from each goal, from 0 (met) to 1; goals that were not measured are left out.

    One is doing nothing at all (concept and nats), falling to guessing (near and far), a nat of divergence, and twice
    the largest reverse perplexity.

    Args:
        row: A measured row.
        goals: The goals.
        half: Count the items of this half only; default all.

    Raises:
        ValueError: If the row was measured without halves.
    """
    goals = goals or Goals()
    now, base = _figures(row, "edited", half), _figures(row, "no edit", half)

    def pair(key: str) -> tuple[float, float] | None:
        one, two = number(now.get(key)), number(base.get(key))
        return None if one is None or two is None else (one, two)

    over: dict[
        str, tuple[float, float]
    ] = {}  # excess over the goal, and the excess that counts as 1
    if (concept := pair("concept, cloze")) is not None:
        away = [abs(value - goals.chance) - goals.band for value in concept]
        over["concept"] = away[0], away[1]
    if (answer := pair("log-probability of the answer")) is not None:
        over["nats"] = goals.nats - (answer[1] - answer[0]), goals.nats
    for kind in ("near", "far"):
        if (kept := pair(kind)) is not None:
            over[kind] = kept[1] - kept[0] - goals.kept, kept[1] - goals.chance - goals.kept
    if (divergence := number(now.get("KL on neutral text"))) is not None:
        over["KL"] = divergence - goals.divergence, 1.0
    if (written := pair("reverse perplexity")) is not None:
        over["fluency"] = written[0] / written[1] - goals.fluency, goals.fluency
    return {
        name: 0.0 if excess <= SLACK else min(1.0, excess / max(scale, SLACK))
        for name, (excess, scale) in over.items()
    }


def goals_of(row: Row, goals: Goals | None = None, *, half: Half | None = None) -> dict[str, bool]:
    """Return which goals a row meets; those that were not measured are left out. See `shortfalls`."""
    return {name: value == 0 for name, value in shortfalls(row, goals, half=half).items()}


def best(rows: Sequence[Row], count: int = 2, *, half: Half | None = None) -> list[Row]:
    """Return the rows nearest to the goals, by the sum of `shortfalls`, then by divergence.

    Counting goals would not do: a method that does nothing meets most of them.

    Args:
        rows: Measured or not.
        count: How many.
        half: See `shortfalls`.
    """

    def key(row: Row) -> tuple[float, float]:
        divergence = number(row.summary().get("KL on neutral text"))
        return sum(shortfalls(row, half=half).values()), float(
            "inf"
        ) if divergence is None else divergence

    return sorted((row for row in rows if row.ok), key=key)[:count]
