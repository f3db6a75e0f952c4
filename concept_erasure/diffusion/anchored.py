"""Anchored projection: the exact edit that joins UCE and SPEED with LEACE.

The core's edit with exact targets and *all anchors among the invariants* is an oblique projection of rank d - n,

    I + E = I - (C - C*) (C^T Q C)^-1 C^T Q        (C concepts, C* anchors, as columns; Q the metric, Q C* = 0).

It sends every concept exactly to its anchor, leaves anchors and blank prompt exactly where they are, leaves retained
embeddings exactly there too (``hard=True``, if no direction of theirs is dropped) or nearly (soft), and is the
least-change map that does so, measured in the metric. Being singular, it cannot be undone by a clever embedding: its
certificate is not zero, as that of every invertible edit (UCE, RECE, MACE, TRCE, RealEra, SPEED as published) is.

Derived for this library; not in a paper. Nearest of kin: LEACE (arXiv:2306.03819), UCE (arXiv:2308.14761) and SPEED
(arXiv:2503.07392).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from concept_erasure.diffusion.core import FORBIDDEN, Metric, Pairs, Preserve, metric
from concept_erasure.diffusion.encode import BlankAnchor
from concept_erasure.diffusion.eraser import (
    METRIC_OPTIONS,
    DiffusionConfig,
    DiffusionEraser,
    fit_eraser,
)
from concept_erasure.diffusion.prepare import Texts, reads_pooled
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.linalg import LowRankAffine

__all__ = [
    "AnchoredConfig",
    "AnchoredProjectionEraser",
    "anchored_projection",
    "independent_columns",
]

MISSED = 1e-6  # share of the way to its anchor by which a dropped concept may miss it


@dataclass(frozen=True, kw_only=True)
class AnchoredConfig(DiffusionConfig):
    """Options of the fit, see `AnchoredProjectionEraser.fit`."""

    preserve_rule: str = "last_subject"
    blank_anchor: BlankAnchor = "sot"
    max_sequence_length: int | None = None


def independent_columns(gram: Tensor, rtol: float = 1e-10) -> tuple[list[int], list[int]]:
    """Split columns into independent ones and the rest, by pivoted Cholesky of their Gram matrix.

    Args:
        gram: Shape ``(n, n)``, positive semi-definite.
        rtol: A column is dependent if no more than this share of its squared length is left.

    Returns:
        Kept and dropped indices, each ascending. Of equal columns the first is kept.
    """
    n = len(gram)
    size = gram.diagonal().clone()
    left = size.clone()
    rows = gram.new_zeros(n, n)
    kept: list[int] = []
    for step in range(n):
        share = torch.where(size > 0, left / size, torch.zeros_like(left))
        pivot = int((left * (share > rtol)).argmax())
        if float(share[pivot]) <= rtol:
            break
        row = (gram[pivot] - rows[:step, pivot] @ rows[:step]) / left[pivot].sqrt()
        rows[step] = row
        left = left - row**2
        left[pivot] = 0
        kept.append(pivot)
    return sorted(kept), sorted(set(range(n)) - set(kept))


def anchored_projection(
    source: Tensor, target: Tensor, metric: Callable[[Tensor], Tensor], *, rtol: float = 1e-10
) -> tuple[LowRankAffine, list[int], list[int]]:
    """Return the projection that sends ``source`` to ``target``, and which rows it rests on.

    Args:
        source: Concepts, rows ``(n, d)``.
        target: Anchors, rows ``(n, d)``; the metric must hold them (``metric(target) = 0``).
        metric: ``y -> y Q`` on rows.
        rtol: Below this share of its squared length a row depends on the others.

    Returns:
        The map, the kept rows and the dropped rows.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If the metric does not hold the anchors, or forbids a concept to move.
    """
    if source.ndim != 2 or source.shape != target.shape:
        raise ShapeError(
            f"source and target must both be (n, d); got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    free, fixed = metric(source), metric(target)
    gram = free @ source.T
    gram = (gram + gram.T) / 2
    limit = 1e-6 * float(free.norm(dim=1).max()) if len(source) else 0.0
    if len(source) and float(fixed.norm(dim=1).max()) > limit:
        raise ValueError("the metric lets an anchor move; put all anchors among its invariants")
    kept, dropped = independent_columns(gram, rtol)
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    right = torch.cholesky_solve(free[kept], factor)
    return (
        LowRankAffine((source - target)[kept].T.contiguous(), right.T.contiguous()),
        kept,
        dropped,
    )


@dataclass(frozen=True, repr=False, eq=False)
class AnchoredProjectionEraser(DiffusionEraser):
    """The projection, see `DiffusionEraser` for its tensors and `fit` for how it is made."""

    method: ClassVar[str] = "anchored-projection"
    config_type: ClassVar[type[EraserConfig]] = AnchoredConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str = "",
        preserve: Sequence[str] | str | Preserve | None = None,
        hard: bool = True,
        lam: float | None = None,
        relative_tau: float | None = None,
        rank: int | None = None,
        preserve_weight: float = 1.0,
        rule: TokenRule | str = TokenRule.LAST_SUBJECT,
        preserve_rule: TokenRule | str = TokenRule.LAST_SUBJECT,
        blank_anchor: BlankAnchor = "sot",
        maps: Sequence[str] = ("key", "value"),
        pooled: bool | None = None,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit the projection; the pipeline is left bit-identical.

        Args:
            pipe: The pipeline.
            erase: Concepts.
            anchor: What each becomes exactly, or all; anchors do not move.
            preserve: Names to keep, or a `Preserve` set collected before.
            hard: Keep them exactly. They and the anchors then use up dimensions; a long list needs ``hard=False``.
            lam: Soft form: the ridge, default 0.5.
            relative_tau: Hard form: eigenvalues below this share of the largest may be edited; default rounding.
            rank: Hard form: the dimension of what is kept instead.
            preserve_weight: Soft form: of what is kept.
            rule: Positions of the pairs.
            preserve_rule: Positions of what is kept.
            blank_anchor: Where the blank prompt is read as an anchor of a subject token.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector too; default if the denoiser reads one.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`; if a concept lies in what must stay (the
                blank prompt, anchors and, if hard, what is preserved); or if there is no room for all.
            ShapeError: If the numbers of concepts and anchors differ.
            EditError: If the pipeline cannot be edited.

        Warns:
            ErasureWarning: If a concept depends on others and so does not reach its own anchor.
        """
        texts = Texts.read(
            pipe,
            erase,
            anchor,
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        config = AnchoredConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            rule=str(TokenRule.of(rule)),
            preserve_rule=str(TokenRule.of(preserve_rule)),
            blank_anchor=blank_anchor,
            max_sequence_length=max_sequence_length,
        )
        options: dict[str, Any] = {"hard": hard, "relative_tau": relative_tau, "rank": rank}
        if not hard or lam is not None:
            options["lam"] = 0.5 if lam is None else lam
        kept, blank = texts.rows(texts.preserve, preserve_rule), texts.blank()
        pairs = texts.pairs(rule, math.inf, blank_anchor=blank_anchor)
        gram = None
        if kept is not None or texts.collected is not None:
            gram = texts.gram(kept, preserve_weight).gram
        held = metric(gram, width=texts.width, invariants=_held(blank, pairs.target), **options)
        edit, report = _solved(pairs, held)
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if reads_pooled(pipe) if pooled is None else pooled:
            second = _pooled(texts, preserve_weight, options)
        return fit_eraser(
            cls,
            pipe,
            pairs,
            held,
            config=config,
            edit=edit,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=kept,
            blank=blank,
            report=report,
        )

    @classmethod
    def _solve(cls, pairs: Pairs, metric: Metric) -> LowRankAffine:
        return _solved(pairs, metric)[0]

    def _metric_for(self, prefix: str, pairs: Pairs) -> Metric:
        """Return the metric that holds the anchors of new concepts too."""
        own: dict[str, Any] = {name: getattr(self.options, name) for name in METRIC_OPTIONS}
        options = cast("dict[str, Any]", self.options.pooled) if prefix else own
        gram, held = getattr(self, f"{prefix}gram"), getattr(self, f"{prefix}invariants")
        return metric(gram, width=pairs.width, invariants=_held(held, pairs.target), **options)

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        if not math.isinf(weight):
            raise ValueError(f"the projection meets every anchor exactly; got weight={weight}")
        if prefix:
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        config = cast("AnchoredConfig", self.config)
        limit = config.max_sequence_length
        texts = Texts.read(pipe, concept, anchor, None, max_sequence_length=limit)
        return texts.pairs(config.rule, weight, blank_anchor=config.blank_anchor)


def _held(*parts: Tensor) -> Tensor:
    """Return all rows, each once."""
    rows: Tensor = torch.unique(torch.cat([part.to(parts[0]) for part in parts]), dim=0)
    return rows


def _pooled(texts: Texts, weight: float, options: dict[str, Any]) -> tuple[Pairs, Metric]:
    """Return pairs and metric of the pooled vectors."""
    pairs = texts.encoder.pooled_pairs(texts.erase, texts.anchors, math.inf)
    gram = None
    if texts.preserve:
        rows = texts.encoder.pooled(texts.preserve)
        gram = Preserve(pairs.width, device=rows.device).update(rows, weight).gram
    held = _held(texts.encoder.pooled([""]), pairs.target)
    return pairs, metric(gram, width=pairs.width, invariants=held, **options)


def _solved(pairs: Pairs, held: Metric) -> tuple[LowRankAffine, dict[str, object]]:
    """Return the projection and what to report.

    Raises:
        ValueError: If a concept lies in what must stay, or there is no room for all.
    """
    moving = (pairs.source != pairs.target).any(1)
    source, target = pairs.source[moving], pairs.target[moving]
    stuck = (held.freedom(source) < FORBIDDEN).nonzero()[:, 0].tolist()
    if stuck:
        raise ValueError(
            f"{len(stuck)} of {len(source)} rows of concepts (the first is row {stuck[0]}) lie in what must stay: "
            f"blank prompt, anchors{' and what is preserved' if held.hard else ''}, which leave {held.dimension} of "
            f"{held.width} dimensions. Take the concept out of preserve, choose another anchor or rule, or hard=False"
        )
    edit, _, dropped = anchored_projection(source, target, held)
    wanted = int(torch.linalg.matrix_rank(source))
    if dropped and wanted > held.dimension:
        raise ValueError(
            f"{wanted} independent rows of concepts do not fit into the {held.dimension} of {held.width} dimensions "
            "that what must stay leaves free. Preserve less, use hard=False, or erase fewer concepts"
        )
    report: dict[str, object] = {"dropped_rows": dropped}
    if dropped:
        way = torch.linalg.vector_norm(source - target, dim=1)[dropped]
        missed = torch.linalg.vector_norm(edit(source) - target, dim=1)[dropped] / way
        report["dropped_miss"] = float(missed.max())
        if float(missed.max()) > MISSED:
            warnings.warn(
                f"{len(dropped)} of {len(source)} rows of concepts depend on others and were dropped; they miss their "
                f"anchors by up to {float(missed.max()):.2g} of the way. Give concepts that say the same one anchor",
                ErasureWarning,
                stacklevel=3,
            )
    return edit, report
