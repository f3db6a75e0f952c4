"""Evaluate an erasure from a text-to-image pipeline: the same rows before and after, and by a twin that never knew.

What is gone (names, other names), what else went (neighbours, unrelated things), how pictures changed, and how far
the edited model is from one that never saw the concept. No attack is run here, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from concept_erasure.errors import EditError
from concept_erasure.evals.diffusion._write_up import with_pictures, write_up
from concept_erasure.evals.diffusion.generate import draw_rows, pipeline_record
from concept_erasure.evals.diffusion.suite import Reading, Suite
from concept_erasure.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Editing", "NegativePrompt", "evaluate", "read_rows"]


class Editing(Protocol):
    """Any eraser of this library that a pipeline takes."""

    def apply(self, pipe: Any) -> Any:  # noqa: ANN401 - pipelines and edits have no common class
        """Put the edit in; the result has ``undo()``."""
        ...


@dataclass(frozen=True)
class NegativePrompt:
    """The baseline that changes no weight: the concept as negative prompt of every picture.

    Attributes:
        text: What is not to be drawn.
    """

    text: str


@contextmanager
def _edited(pipe: object, eraser: Editing | None, options: Mapping[str, object]) -> Iterator[None]:
    if eraser is None:
        yield
        return
    apply: Callable[..., Any] = eraser.apply
    edit = apply(pipe, **options)
    try:
        yield
    finally:
        edit.undo()


def read_rows(
    pipe: object,
    suite: Suite,
    *,
    eraser: Editing | NegativePrompt | None = None,
    apply: Mapping[str, object] | None = None,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    progress: bool | None = False,
) -> Reading:
    """Draw and judge the rows of a suite with one pipeline; it is bit-identical afterwards.

    Args:
        pipe: A text-to-image pipeline of diffusers.
        suite: What to draw.
        eraser: Applied while drawing.
        apply: Keyword arguments of its ``apply``, such as ``{"sites": "text_encoder"}`` of a linear eraser.
        batch_size: Pictures at once.
        cache_dir: See `draw_rows`.
        progress: Show a bar; ``None`` shows it on a terminal.
    """
    rows = suite.rows
    edit = None if isinstance(eraser, NegativePrompt) else eraser
    if isinstance(eraser, NegativePrompt):
        rows = tuple(replace(row, negative=eraser.text) for row in rows)
    with _edited(pipe, edit, apply or {}):
        images: Tensor = draw_rows(
            pipe, rows, batch_size=batch_size, cache_dir=cache_dir, progress=progress
        )
    return suite.read(images)


def evaluate(
    pipe: object,
    eraser: Editing | NegativePrompt,
    suite: Suite,
    *,
    apply: Mapping[str, object] | None = None,
    reference: object | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool | None = False,
    seed: int = 0,
) -> Report:
    """Measure an erasure and write the report.

    Args:
        pipe: A text-to-image pipeline of diffusers; bit-identical afterwards.
        eraser: What to apply, or a `NegativePrompt`.
        suite: What to draw and who judges it.
        apply: Keyword arguments of the eraser's ``apply``.
        reference: A pipeline that never knew the targets; gaps to it are reported.
        perceptual: Distance of pictures ``(n, 3, h, w)``, uint8, one number each, such as `Lpips`.
        batch_size: Pictures at once.
        cache_dir: Folder for pictures of pipelines without hooks; an interrupted evaluation goes on.
        out: Folder for ``report.json``, ``report.md`` and the grid of pictures.
        progress: Show a bar; ``None`` shows it on a terminal.
        seed: Of bootstrap intervals.

    Returns:
        The report: a row a pipeline, then paired tests, distances and EraseEval as sections.

    Raises:
        ValueError: If the suite and its pictures do not fit.
        EditError: If the edit is in force already.
        ImportError: If ``out`` is given and matplotlib is absent.
    """
    begun = time.perf_counter()
    if reference is pipe:
        raise EditError("the reference must be another pipeline than the one that is edited")

    def read(which: object, edit: Editing | NegativePrompt | None) -> Reading:
        return read_rows(
            which, suite, eraser=edit, apply=apply, batch_size=batch_size, cache_dir=cache_dir,
            progress=progress,
        )  # fmt: skip

    readings = {"original": read(pipe, None), "edited": read(pipe, eraser)}
    if reference is not None:
        readings["never knew"] = read(reference, None)
    meta = {
        **pipeline_record(pipe),
        "eraser": getattr(eraser, "method", type(eraser).__name__),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    report = write_up(suite, readings, meta=meta, perceptual=perceptual, seed=seed)
    if out is not None:
        report = with_pictures(report, suite, readings, Path(out))
        report.save(out)
    return report
