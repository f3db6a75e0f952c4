"""What the methods do with lists of names before anything is encoded: tidy, repeat, expand, refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from concept_erasure.errors import ShapeError

__all__ = ["Task", "drop_mentions", "expand_prompts", "names_of", "one_each", "refuse_overlap"]

Task = Literal["object", "celebrity", "style", "unsafe"]
TASKS = ("object", "celebrity", "style", "unsafe")
TEMPLATES = {
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def names_of(texts: Sequence[str] | str, role: str) -> list[str]:
    """Return names as a list, in order; one string is one name.

    Raises:
        TypeError: If a name is no string.
        ValueError: If there are none, or one comes twice.
    """
    names = [texts] if isinstance(texts, str) else list(texts)
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{role} must be texts; got {strange[0]!r}")
    if not names:
        raise ValueError(f"{role} is empty; name at least one")
    plain = [_plain(name) for name in names]
    if twice := [name for i, name in enumerate(names) if plain[i] in plain[:i]]:
        raise ValueError(f"{role} has {twice[0]!r} twice; name each once")
    return names


def one_each(anchor: Sequence[str] | str, erase: Sequence[str], role: str = "anchor") -> list[str]:
    """Return one anchor for each concept; a single one serves all.

    Raises:
        ShapeError: If their numbers differ.
        ValueError: If an anchor is the concept itself.
    """
    anchors = [anchor] if isinstance(anchor, str) else list(anchor)
    anchors = anchors * len(erase) if len(anchors) == 1 else anchors
    if len(anchors) != len(erase):
        raise ShapeError(
            f"{len(erase)} concepts need as many of {role}, or one; got {len(anchors)}"
        )
    for name, instead in zip(erase, anchors, strict=True):
        if _plain(name) == _plain(instead):
            raise ValueError(
                f"anchor equal to the concept: {name!r} would be changed into itself; give another anchor"
            )
    return anchors


def refuse_overlap(erase: Sequence[str], preserve: Sequence[str]) -> None:
    """Raise ValueError if a name is to be erased and to be preserved."""
    wanted = {_plain(name) for name in erase}
    if both := [name for name in preserve if _plain(name) in wanted]:
        raise ValueError(
            f"preserve contains the concept {both[0]!r} ({len(both)} of {len(preserve)} names are to be erased); "
            "take it out of one of the lists"
        )


def drop_mentions(erase: Sequence[str], preserve: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split names to preserve into those that mention no concept, and those that do (whole words)."""
    words = [re.compile(rf"\b{re.escape(_plain(name))}\b") for name in erase if _plain(name)]
    kept: list[str] = []
    dropped: list[str] = []
    for name in preserve:
        (dropped if any(word.search(_plain(name)) for word in words) else kept).append(name)
    return kept, dropped


def expand_prompts(
    erase: Sequence[str], anchors: Sequence[str], task: Task | None
) -> tuple[list[str], list[str], list[int]]:
    """Put every concept and its anchor into UCE's five templates as well.

    Args:
        erase: Concepts.
        anchors: One each.
        task: ``style`` has templates of its own; all others share those of objects.

    Returns:
        Prompts, their anchors, and which concept each belongs to.
    """
    templates = ("{}", *TEMPLATES["style" if task == "style" else "object"])
    prompts, targets, owners = [], [], []
    for i, (name, instead) in enumerate(zip(erase, anchors, strict=True)):
        prompts += [template.format(name) for template in templates]
        targets += [template.format(instead) for template in templates]
        owners += [i] * len(templates)
    return prompts, targets, owners
