"""The gate: does a pipeline of the emoji world draw what it is asked for, and a twin not what it never saw?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from concept_erasure.evals.diffusion.generate import Row, draw_rows
from concept_erasure.evals.language.statistics import share
from concept_erasure.evals.worlds.emoji.classifier import ConceptClassifier
from concept_erasure.evals.worlds.emoji.grammar import FULL, caption
from concept_erasure.evals.worlds.emoji.render import COLOURS, PIXELS, STYLES
from concept_erasure.evals.worlds.emoji.sprites import load_objects
from concept_erasure.report import Interval

__all__ = ["Gate", "measure_gate"]

OBJECT, STYLE, COLOUR, MARGIN = 0.85, 0.90, 0.90, 0.03


@dataclass(frozen=True)
class Gate:
    """What was measured on drawn pictures.

    Attributes:
        object: Share with the object asked for, among concepts that were shown in training.
        style: Likewise, style.
        colour: Likewise, ground.
        left_out: Share that shows what was left out where it was asked for; None for the whole model.
        chance: Share of that by guessing.
    """

    object: Interval
    style: Interval
    colour: Interval
    left_out: Interval | None
    chance: float

    @property
    def holds(self) -> bool:
        """Whether object >= 85 %, style and ground >= 90 %, and what was left out is within 3 points of chance."""
        ignorant = self.left_out is None or self.left_out.value <= self.chance + MARGIN
        shares = self.object.value, self.style.value, self.colour.value
        return ignorant and shares[0] >= OBJECT and shares[1] >= STYLE and shares[2] >= COLOUR

    def __str__(self) -> str:
        """Return the numbers on one line."""
        tail = "" if self.left_out is None else f", left out {self.left_out}"
        return f"object {self.object}, style {self.style}, ground {self.colour}{tail}"


def measure_gate(
    pipe: object,
    classifier: ConceptClassifier,
    *,
    leave_out: str | None = None,
    pictures: int = 192,
    guidance: float = 5.0,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 48,
) -> Gate:
    """Draw full sentences about everything and judge the pictures.

    Args:
        pipe: The pipeline.
        classifier: The judge.
        leave_out: What a twin never saw: as many pictures again are asked to show it.
        pictures: How many.
        guidance: Guidance scale.
        steps: Of the sampler.
        seed: Of sentences and noise.
        batch_size: Pictures at once.
    """
    names, colours = [one.name for one in load_objects()], list(COLOURS)
    aspect = "style" if leave_out in STYLES else "object"
    rng = Random(seed)  # noqa: S311 - not for secrets
    rows, wanted = [], []
    for turn in range(pictures * (1 if leave_out is None else 2)):
        pool, styles = [n for n in names if n != leave_out], [s for s in STYLES if s != leave_out]
        if turn >= pictures:
            pool, styles = (
                ([str(leave_out)], styles) if aspect == "object" else (pool, [str(leave_out)])
            )
        name, style, colour = pool[turn % len(pool)], rng.choice(styles), rng.choice(colours)
        text = caption(rng.choice(FULL), name, style=style, colour=colour)
        rows.append(
            Row(prompt=text, seed=seed * 100_000 + turn, guidance=guidance, steps=steps, height=PIXELS, width=PIXELS)
        )  # fmt: skip
        wanted.append((names.index(name), STYLES.index(style), colours.index(colour)))
    said = classifier.judge(draw_rows(pipe, rows, batch_size=batch_size) / 255)
    seen = torch.stack(
        [said.object.argmax(1), said.style.argmax(1), said.colour.argmax(1)], 1
    ).cpu()
    right = seen == torch.tensor(wanted)
    shares = [share(right[:pictures, column].tolist()) for column in range(3)]
    column, chance = (1, 1 / len(STYLES)) if aspect == "style" else (0, 1 / len(names))
    left = None if leave_out is None else share(right[pictures:, column].tolist())
    return Gate(shares[0], shares[1], shares[2], left, chance)
