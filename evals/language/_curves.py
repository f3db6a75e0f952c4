"""Curves of relearning: accuracy over steps, the share that is back, and when half of it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval

__all__ = ["Curve", "Relearning"]


@dataclass(frozen=True)
class Curve:
    """Accuracy while an edited model is trained again.

    Attributes:
        steps: Steps taken at each measurement, from 0, which is the edited model itself.
        accuracy: Share of right items at each.
        log_prob: Mean log-probability of the right answer in nats at each; it moves before the accuracy does.
        items: Items asked.
        base_accuracy: Of the model before the edit; None if it was not given, and then there is no recovery.
        texts: Texts trained on.
        tokens: Tokens trained on, repeats included.
        lr: Learning rate.
        batch_size: Texts a step.
        rank: Of the LoRA.
        seed: Of the LoRA's start and the batches.
        seconds: Time taken.
        name: What it was trained on.
        reference: The same training of a model that never knew.
    """

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    log_prob: tuple[float, ...]
    items: int
    base_accuracy: float | None
    texts: int
    tokens: int
    lr: float
    batch_size: int
    rank: int
    seed: int
    seconds: float
    name: str = "texts"
    reference: Curve | None = field(default=None, repr=False)

    @property
    def erased_accuracy(self) -> float:
        """Accuracy before the training."""
        return self.accuracy[0]

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The accuracies with their 95 % Wilson intervals."""
        made = []
        for value in self.accuracy:
            low, high = wilson_interval(round(value * self.items), self.items)
            made.append(Interval(value, min(low, value), max(high, value)))
        return tuple(made)

    @property
    def recovery(self) -> tuple[float, ...] | None:
        """Share of the lost accuracy that is back at each step; None if nothing was lost, or the base is not known.

        It may exceed 1, and be negative.
        """
        if self.base_accuracy is None or self.base_accuracy <= self.erased_accuracy:
            return None
        lost = self.base_accuracy - self.erased_accuracy
        return tuple((value - self.erased_accuracy) / lost for value in self.accuracy)

    @property
    def half_life(self) -> int | None:
        """First measured step with half of the lost accuracy back; None if there is none, see `note`."""
        back = self.recovery
        if back is None:
            return None
        half = 0.5 - 1e-9  # a ratio of rounded differences: 0.3 of 0.6 is half
        return next((step for step, b in zip(self.steps, back, strict=True) if b >= half), None)

    @property
    def resolved(self) -> bool:
        """Whether the loss is larger than the items can tell: the base lies above the edited model's interval."""
        return self.base_accuracy is not None and self.base_accuracy > self.intervals[0].high

    @property
    def note(self) -> str:
        """What the half-life is, in words."""
        if self.base_accuracy is None:
            return "the accuracy before the edit was not given: no recovery can be told"
        if self.recovery is None:
            return (
                f"nothing was lost: the edited model has {self.erased_accuracy:.3f}, the original "
                f"{self.base_accuracy:.3f}"
            )
        doubt = (
            ""
            if self.resolved
            else f"; the loss is within the interval of {self.items} items, so this is noise"
        )
        if self.half_life is None:
            most = max(self.recovery)
            return f"never half recovered within {self.steps[-1]} steps (at most {most:.0%}){doubt}"
        count = len(self.steps)
        return f"half recovered after {self.half_life} steps, measured {count} times in {self.steps[-1]}{doubt}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record in plain values, ready for the record of a `Report`; `row` is a line of a table."""
        made: dict[str, Any] = {
            **self.row(),
            "steps": list(self.steps),
            "accuracies": list(self.accuracy),
            "log-probabilities": list(self.log_prob),
            "recovery": None if self.recovery is None else list(self.recovery),
        }
        if self.reference is not None:
            made["never knew"] = self.reference.to_dict()
        return made

    def row(self) -> dict[str, Cell]:
        """Return a line of a table."""
        made: dict[str, Cell] = {
            "relearning on": self.name,
            "learning rate": self.lr,
            "accuracy, edited": self.intervals[0],
            "accuracy, highest": max(self.intervals, key=lambda one: one.value),
            "accuracy, original": self.base_accuracy,
            "highest recovery": None if self.recovery is None else max(self.recovery),
            "half-life": "never" if self.recovery and self.half_life is None else self.half_life,
            "steps allowed": self.steps[-1],
            "texts": self.texts,
            "tokens": self.tokens,
            "batch size": self.batch_size,
            "rank": self.rank,
            "items": self.items,
            "seed": self.seed,
            "seconds": self.seconds,
            "note": self.note,
        }
        if self.reference is not None:
            made["accuracy, never knew, highest"] = max(
                self.reference.intervals, key=lambda one: one.value
            )
        return made

    def __repr__(self) -> str:
        return (
            f"Curve({self.name}, lr {self.lr:g}, {self.texts} texts: accuracy {self.accuracy[0]:.3f} -> "
            f"{self.accuracy[-1]:.3f}, highest {max(self.accuracy):.3f}; {self.note})"
        )


@dataclass(frozen=True)
class Relearning:
    """Curves of one edited model.

    Attributes:
        curves: One for each set of texts and rate.
    """

    curves: tuple[Curve, ...]

    @property
    def worst(self) -> Curve:
        """The curve that brings the most accuracy back."""
        return max(self.curves, key=lambda curve: max(curve.accuracy))

    @property
    def half_life(self) -> int | None:
        """The shortest half-life; None if no curve has one."""
        return min((c.half_life for c in self.curves if c.half_life is not None), default=None)

    def rows(self) -> list[dict[str, Cell]]:
        """Return a line for each curve, ready for a `Report`."""
        return [curve.row() for curve in self.curves]

    def to_dict(self) -> dict[str, Any]:
        """Return all records in plain values."""
        return {"curves": [curve.to_dict() for curve in self.curves], "half-life": self.half_life}

    def __repr__(self) -> str:
        return f"Relearning({len(self.curves)} curves; worst: {self.worst!r})"
