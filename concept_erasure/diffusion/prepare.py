"""From lists of names to pairs, preserve sets and the blank prompt: how the fit of every such method begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric
from concept_erasure.diffusion.encode import BlankAnchor, TextEncoder
from concept_erasure.diffusion.maps import text_maps, text_width
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import (
    TASKS,
    Task,
    expand_prompts,
    names_of,
    one_each,
    refuse_overlap,
)

__all__ = ["Preset", "Texts", "chosen_options", "reads_pooled"]

Preset = Literal["paper"]


def chosen_options(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    paper: Mapping[Task, Mapping[str, Any]],
    *,
    preset: Preset | None,
    task: Task | None,
) -> dict[str, Any]:
    """Return the options of a fit: what was said, else what the preset says, else the default.

    Args:
        given: What the caller said; None is nothing.
        defaults: Of this library, all options.
        paper: Of the authors, by task.
        preset: ``"paper"`` or None.
        task: Which of the paper's.

    Raises:
        ValueError: If the preset or task is unknown, or the authors published nothing for the task.
    """
    if preset not in (None, "paper"):
        raise ValueError(f"preset must be 'paper' or None; got {preset!r}")
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if preset == "paper" and (task is None or task not in paper):
        raise ValueError(
            f"preset='paper' needs a task with published constants: {', '.join(paper)}; got {task!r}"
        )
    published = paper[task] if preset == "paper" and task is not None else {}
    said = {name: value for name, value in given.items() if value is not None}
    return {**defaults, **published, **said}


def reads_pooled(pipe: object) -> bool:
    """Say whether the denoiser reads a pooled vector of the text."""
    return any(text_map.kind == "pooled" for text_map in text_maps(pipe))


@dataclass(frozen=True, eq=False)
class Texts:
    """What a fit was asked for, read and checked; encodes on demand and never changes the pipeline.

    Attributes:
        encoder: The text side of the pipeline.
        erase: Concepts.
        anchors: One each.
        preserve: Names of what must not change.
        collected: Gram matrices the caller had collected, or None.
        width: Width d of the text vectors.
    """

    encoder: TextEncoder
    erase: tuple[str, ...]
    anchors: tuple[str, ...]
    preserve: tuple[str, ...]
    collected: Preserve | None
    width: int

    @classmethod
    def read(
        cls,
        pipe: object,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str,
        preserve: Sequence[str] | str | Preserve | None,
        *,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Texts:
        """Check the lists.

        Raises:
            ValueError: If a list is empty, a name comes twice, is its own anchor, or is preserved too.
            ShapeError: If the number of anchors is neither one nor that of the concepts.
        """
        names = names_of(erase, "erase")
        if blank := [name for name in names if not name.strip()]:
            raise ValueError(f"the concept {blank[0]!r} is no token at all; name what to erase")
        anchors = one_each(anchor, names)
        collected = preserve if isinstance(preserve, Preserve) else None
        kept: list[str] = []
        if preserve is not None and not isinstance(preserve, Preserve) and len(preserve):
            kept = names_of(preserve, "preserve")
        refuse_overlap(names, kept)
        width = text_width(pipe)  # refuses a fused or compiled denoiser before any encoding
        encoder = TextEncoder(pipe, batch_size=batch_size, max_sequence_length=max_sequence_length)
        return cls(encoder, tuple(names), tuple(anchors), tuple(kept), collected, width)

    def pairs(
        self,
        rule: TokenRule | str,
        weight: float | Sequence[float],
        *,
        blank_anchor: BlankAnchor = "sot",
        expand: Task | None = None,
    ) -> Pairs:
        """Return the pairs; with ``expand`` also those of each concept in UCE's templates for a task."""
        weights = [weight] * len(self.erase) if isinstance(weight, int | float) else list(weight)
        if len(weights) != len(self.erase):
            weights = weights * len(self.erase) if len(weights) == 1 else weights
        if expand is None:
            return self.encoder.pairs(self.erase, self.anchors, rule, weights, blank=blank_anchor)
        prompts, targets, owners = expand_prompts(self.erase, self.anchors, expand)
        made = self.encoder.pairs(
            prompts, targets, rule, [weights[i] for i in owners], blank=blank_anchor
        )
        number = torch.tensor(owners, device=made.source.device)
        concept = None if made.concept is None else number[made.concept]
        return Pairs(made.source, made.target, made.weights, concept)

    def rows(self, names: Sequence[str], rule: TokenRule | str) -> Tensor | None:
        """Return vectors of names by a rule, shape ``(m, d)``; None if there are no names."""
        return torch.cat(self.encoder.rows(names, rule)) if names else None

    def blank(self) -> Tensor:
        """Return all vectors of the blank prompt, shape ``(T, d)``."""
        return self.encoder.blank()

    def gram(self, rows: Tensor | None, weight: float) -> Preserve:
        """Return the preserve set of some rows and of what the caller collected, each times the weight."""
        device = None if rows is None else rows.device
        out = Preserve(self.width, encoder=self.encoder.fingerprint, device=device)
        if rows is not None:
            out.update(rows, weight)
        return out if self.collected is None else out.merge(self.collected, weight)

    def pooled(
        self,
        weight: float | Sequence[float],
        preserve_weight: float,
        lam: float,
        *,
        hold_blank: bool,
    ) -> tuple[Pairs, Metric]:
        """Return pairs and a soft metric of the pooled vectors."""
        pairs = self.encoder.pooled_pairs(self.erase, self.anchors, weight)
        kept = Preserve(pairs.width, encoder=self.encoder.fingerprint, device=pairs.source.device)
        if self.preserve:
            kept.update(self.encoder.pooled(self.preserve), preserve_weight)
        blank = self.encoder.pooled([""])
        if not hold_blank:
            kept.update(blank, preserve_weight)
        held = blank if hold_blank else None
        return pairs, metric(kept, width=pairs.width, lam=lam, invariants=held)
