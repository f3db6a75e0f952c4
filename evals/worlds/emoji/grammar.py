"""What can be said in the emoji world: captions to train on, prompts to evaluate with, names, neighbours.

A caption that leaves the style (ground) unsaid belongs to a flat or glossy drawing (white ground), so that every
prompt fixes what its picture shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from concept_erasure.evals.worlds.emoji.render import COLOURS, STYLES
from concept_erasure.evals.worlds.emoji.sprites import EmojiObject

__all__ = ["FULL", "NAME", "WITH_COLOUR", "WITH_STYLE", "Drawing", "caption", "draw"]

FULL = (
    "a {s} picture of a {n} on a {c} background", "a {n}, {s} style, {c} background", "{s} drawing of a {n} on {c}",
    "a {s} {n} with a {c} background", "an image of a {n} in {s} style on a {c} background",
)  # fmt: skip
WITH_STYLE = (
    "a {s} picture of a {n}", "a {n}, {s} style", "{s} drawing of a {n}", "a {s} {n}", "a {n} in {s} style",
)  # fmt: skip
WITH_COLOUR = (
    "a picture of a {n} on a {c} background", "a {n} on {c}", "a {n} with a {c} background",
    "an image of a {n} on a {c} background",
)  # fmt: skip
NAME = (
    "a picture of a {n}", "a {n}", "{n}", "an image of a {n}", "an emoji of a {n}", "a drawing of a {n}",
)  # fmt: skip
_KIND_SHARE = 0.15  # captions that add "a kind of ..."
_UNSAID_STYLES = ("flat", "glossy")


@dataclass(frozen=True)
class Drawing:
    """What a caption says and its picture shows.

    Attributes:
        caption: The text.
        obj: Number of the object.
        style: Number in `STYLES`.
        colour: Number in `COLOURS`.
    """

    caption: str
    obj: int
    style: int
    colour: int


def caption(template: str, name: str, *, style: str = "", colour: str = "") -> str:
    """Fill a template; what it does not mention is ignored."""
    return template.format(n=name, s=style, c=colour)


def draw(
    objects: Sequence[EmojiObject],
    count: int,
    *,
    seed: int,
    leave_out_object: int | None = None,
    leave_out_style: int | None = None,
) -> list[Drawing]:
    """Draw captions with what their pictures show.

    Args:
        objects: All of them.
        count: How many captions.
        seed: Of everything drawn.
        leave_out_object: An object of which there shall be neither captions nor pictures.
        leave_out_style: A style likewise.

    Returns:
        In the order drawn: 40 % say style and ground, 20 % the style, 20 % the ground, 20 % neither.
    """
    rng = Random(seed)  # noqa: S311 - not for secrets
    things = [i for i in range(len(objects)) if i != leave_out_object]
    styles = [s for i, s in enumerate(STYLES) if i != leave_out_style]
    unsaid = [s for s in _UNSAID_STYLES if s in styles]
    made = []
    for _ in range(count):
        number = rng.choice(things)
        name = rng.choice(objects[number].names)
        if rng.random() < _KIND_SHARE:
            name = f"{name}, a kind of {objects[number].kind}"
        style, colour, form = rng.choice(styles), rng.choice(list(COLOURS)), rng.random()
        if form < 0.4:
            template = rng.choice(FULL)
        elif form < 0.6:
            template, colour = rng.choice(WITH_STYLE), "white"
        elif form < 0.8:
            template, style = rng.choice(WITH_COLOUR), rng.choice(unsaid)
        else:
            template, style, colour = rng.choice(NAME), rng.choice(unsaid), "white"
        text = caption(template, name, style=style, colour=colour)
        made.append(Drawing(text, number, STYLES.index(style), list(COLOURS).index(colour)))
    return made
