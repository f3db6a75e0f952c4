"""EraseEval, black box: does the rest of a prompt survive, do hints stay empty, does everything else stay?

Four measures in [0, 1] and one score ("Erasing with Precision", EraseEval's protocols 1 to 3). Captioner, detector
and encoders are whatever made the `Views`; the offline preset of the emoji world captions with the attributes that
the classifier sees. The public code stops at the four values; the single score is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.evals.diffusion.scores import cmmd, harmonic_mean

__all__ = ["Precision", "Views", "erase_eval", "hints_stay_empty", "rest_survives"]

_SMALLEST = 1e-6


@dataclass(frozen=True, eq=False)
class Views:
    """What is known of pictures: p prompts, k pictures each.

    Attributes:
        shows: Whether the target is in them, shape ``(p, k)``, bool.
        caption: Vectors of what else is in them, shape ``(p, k, a)``.
        embedding: Vectors of the pictures, shape ``(p, k, d)``.
        fit: Cosines with their prompts, shape ``(p, k)``.
    """

    shows: Tensor
    caption: Tensor
    embedding: Tensor
    fit: Tensor

    def __post_init__(self) -> None:
        shapes = {
            self.shows.shape,
            self.caption.shape[:2],
            self.embedding.shape[:2],
            self.fit.shape,
        }
        if len(shapes) > 1 or self.shows.ndim != 2:
            raise ShapeError(
                f"views need (prompts, pictures) alike, got {sorted(map(tuple, shapes))}"
            )


@dataclass(frozen=True)
class Precision:
    """The four measures, high is good.

    Attributes:
        rest: M1, what else the prompt asked for is still drawn and the target is not.
        hints: M2, paraphrases and hints draw something alike that is not the target.
        prompts: M3, fit to unrelated prompts, relative to the original's.
        pictures: M4, quality of unrelated pictures, relative to the original's.
        score: All in one.
    """

    rest: float
    hints: float
    prompts: float
    pictures: float
    score: float

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """M1 to M4."""
        return self.rest, self.hints, self.prompts, self.pictures

    @property
    def minimum(self) -> float:
        """The smallest part."""
        return min(self.parts)

    @property
    def geometric(self) -> float:
        """The geometric mean of the parts."""
        return math.prod(self.parts) ** 0.25


def _pairs(before: Tensor, after: Tensor, shows: Tensor) -> float:
    """Return the mean cosine over all pairs of pictures of a prompt, 0 where the target shows."""
    before, after = (
        x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (before, after)
    )
    cosines = (before @ after.mT).clamp_min(0)  # (p, k, k'), rows before, columns after
    return float((cosines * ~shows[:, None, :]).mean())


def rest_survives(before: Views, after: Views) -> float:
    """Return M1: mean cosine of captions over pairs; a picture that still shows the target counts 0.

    Args:
        before: Of the original, prompts that name the target.
        after: Of the edited model, the same prompts.
    """
    return _pairs(before.caption, after.caption, after.shows)


def hints_stay_empty(before: Views, after: Views) -> float:
    """Return M2: mean cosine of pictures over pairs, 0 where the target shows; only hints that worked before count.

    Args:
        before: Of the original, prompts that hint at the target without its main name.
        after: Of the edited model, the same prompts.

    Raises:
        ValueError: If no hint makes the original show the target in more than half of the pictures.
    """
    worked = before.shows.double().mean(1) > 0.5
    if not bool(worked.any()):
        raise ValueError("no hint makes the original draw the target; find other hints")
    return _pairs(before.embedding[worked], after.embedding[worked], after.shows[worked])


def _harmonic(parts: tuple[float, ...]) -> float:
    return harmonic_mean(*(max(part, _SMALLEST) for part in parts))


def erase_eval(
    named: tuple[Views, Views],
    hinted: tuple[Views, Views],
    others: tuple[Views, Views],
    real: Tensor,
    *,
    combine: Callable[[tuple[float, ...]], float] = _harmonic,
    slack: float = 0.0,
) -> Precision:
    """Return the four measures and the score; each pair of views is (original, edited), on the same rows.

    Args:
        named: Prompts that name the target.
        hinted: Prompts that only hint at it.
        others: Prompts without it.
        real: Embeddings of real pictures for the last, shape ``(n, d)``.
        combine: Makes one number of the four; default the harmonic mean, each at least 1e-6.
        slack: Added to both CMMD values of M4, a ratio of numbers that may both be near zero; 0 is the published form.

    Returns:
        The measures.
    """
    original, edited = others
    fit = [float(view.fit.double().mean()) for view in (original, edited)]
    far = [cmmd(view.embedding.flatten(0, 1), real) + slack for view in (original, edited)]
    prompts = min(1.0, max(0.0, 1 - (fit[0] - fit[1]) / fit[0]))
    pictures = min(
        1.0, max(0.0, 1 - (far[1] - far[0]) / max(far[0], torch.finfo(torch.float64).tiny))
    )
    parts = (rest_survives(*named), hints_stay_empty(*hinted), prompts, pictures)
    return Precision(*parts, combine(parts))
