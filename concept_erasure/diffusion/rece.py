"""RECE: find the embedding that still brings a concept back, erase it too, and again.

After an edit ``W' = W M`` of all layers, the embedding that best restores a concept's outputs, kept short by r, is::

    c_adv = argmin_x sum_l |W'_l x - W_l c|^2 + r |x|^2 = (r I + M^T H M)^-1 M^T H c,        H = sum_l W_l^T W_l,

so H, one d x d matrix of the model, is all that is needed of its layers. With r = 0 it is ``M^-1 c``.

Paper: Gong et al., ECCV 2024, arXiv:2407.12383. The first edit is UCE. With ``preset="paper"`` each round edits the
edited model (``joint=False``). The default solves all pairs found so far together, from the original weights: the
result does not depend on an order, the ridge pulls to the original and not to the last round, concepts can be added
and withdrawn (with the embeddings found so far), and the blank prompt stays exactly. Choosing the best round by a
detector, as the authors' script does, is model selection on pictures and is left to the caller. Degrades quickly with
many concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from concept_erasure.diffusion.core import (
    Metric,
    Pairs,
    Preserve,
    compress,
    metric,
    solve,
    text_gram,
)
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.prepare import Preset, Texts, chosen_options, reads_pooled
from concept_erasure.diffusion.reach import certificate
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import Task
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import ShapeError
from concept_erasure.linalg import LowRankAffine, statistics_dtype

__all__ = ["ReceConfig", "ReceEraser", "adversarial", "joint_rounds", "sequential_rounds"]

E = TypeVar("E", bound="ReceEraser")

DEFAULTS: dict[str, Any] = {
    "anchor": "",
    "rule": "last_subject",
    "lam": 0.1,
    "reg": 0.1,
    "rounds": 2,
    "preserve_weight": 0.1,
    "joint": True,
    "hold_blank": True,
}
_PUBLISHED: dict[str, Any] = {"rule": "from_last_subject", "joint": False, "hold_blank": False}
PAPER: dict[Task, dict[str, Any]] = {
    "unsafe": {**_PUBLISHED, "reg": 0.1, "rounds": 3},  # nudity; 2 rounds for the other I2P words
    "style": {**_PUBLISHED, "anchor": "art", "reg": 1e-3, "rounds": 1},
    "object": {**_PUBLISHED, "reg": 0.1, "rounds": 1},  # easy ones; reg 1e-3 for hard ones
}


@dataclass(frozen=True, kw_only=True)
class ReceConfig(DiffusionConfig):
    """Options of the fit, see `ReceEraser.fit`."""

    reg: float = 0.1
    rounds: int = 2
    joint: bool = True
    preserve_weight: float = 0.1
    preset: Preset | None = None
    task: Task | None = None
    max_sequence_length: int | None = None


def adversarial(H: Tensor, edit: LowRankAffine | None, concepts: Tensor, reg: float) -> Tensor:
    """Return the short embeddings whose outputs after an edit are nearest to the concepts' before it.

    Args:
        H: `text_gram` of the edited maps, shape ``(d, d)``.
        edit: The edit in force; None is none.
        concepts: Shape ``(n, d)``.
        reg: Weight r of their squared length, at least 0.

    Returns:
        Shape ``(n, d)``, float64.

    Raises:
        ShapeError: If widths differ.
        ValueError: If ``reg`` is negative, or 0 while the edit or H is singular.
    """
    rows = concepts.to(statistics_dtype(concepts.device))
    if rows.ndim != 2 or H.shape != (rows.shape[1], rows.shape[1]):
        raise ShapeError(
            f"concepts must be (n, d) and H (d, d); got {tuple(rows.shape)}, {tuple(H.shape)}"
        )
    if not reg >= 0:
        raise ValueError(f"reg must be at least 0; got {reg!r}")
    gram = H.to(rows)
    wanted = rows @ gram
    if edit is not None:
        left, right = edit.left.to(rows), edit.right.to(rows)
        half = gram - (gram @ left) @ right.T  # H M
        gram = half - right @ (left.T @ half)  # M^T H M
        wanted = wanted - (wanted @ left) @ right.T
    system = (gram + gram.T) / 2
    system.diagonal().add_(reg)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        raise ValueError(
            f"reg = {reg:g} does not determine the embeddings: the edit or H is singular; give reg > 0"
        )
    return torch.cholesky_solve(wanted.T, factor).T


def sequential_rounds(
    start: LowRankAffine,
    H: Tensor,
    pairs: Pairs,
    metric: Metric,
    *,
    reg: float,
    rounds: int,
) -> LowRankAffine:
    """Edit the edited model, as published: ``W_r+1 = W_r (I + E_r)``.

    Args:
        start: The first edit, by UCE.
        H: `text_gram` of the edited maps.
        pairs: Embeddings of the concepts at the attacked positions, and of their anchors.
        metric: How freely; the same in each round.
        reg: See `adversarial`.
        rounds: How many.
    """
    edit = start
    for _ in range(rounds):
        found = adversarial(H, edit, pairs.source, reg)
        step = solve(Pairs(found, pairs.target, pairs.weights, pairs.concept), metric)
        edit = compress(edit.compose(step))
    return edit


def joint_rounds(
    start: Pairs, H: Tensor, pairs: Pairs, metric: Metric, *, reg: float, rounds: int
) -> Pairs:
    """Return the pairs of all rounds, to be solved together; arguments as for `sequential_rounds`.

    Args:
        start: Pairs of the first edit.
        H: `text_gram` of the edited maps.
        pairs: Embeddings of the concepts at the attacked positions, and of their anchors.
        metric: How freely.
        reg: See `adversarial`.
        rounds: How many.
    """
    found = start
    for _ in range(rounds):
        attack = adversarial(H, solve(found, metric), pairs.source, reg)
        found = Pairs.cat([found, Pairs(attack, pairs.target, pairs.weights, pairs.concept)])
    return found


@dataclass(frozen=True, repr=False, eq=False)
class ReceEraser(DiffusionEraser):
    """The edit of RECE, see `DiffusionEraser` for its tensors and `fit` for how it is made.

    Example:
        >>> eraser = ReceEraser.fit(pipe, erase="nudity", preset="paper", task="unsafe")  # doctest: +SKIP
        >>> eraser.apply(pipe)  # doctest: +SKIP
    """

    method: ClassVar[str] = "rece"
    config_type: ClassVar[type[EraserConfig]] = ReceConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        reg: float | None = None,
        rounds: int | None = None,
        joint: bool | None = None,
        lam: float | None = None,
        preserve_weight: float | None = None,
        rule: TokenRule | str | None = None,
        hold_blank: bool | None = None,
        maps: Sequence[str] = ("key", "value"),
        pooled: bool | None = None,
        preset: Preset | None = None,
        task: Task | None = None,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit the edit; the pipeline is left bit-identical.

        Args:
            pipe: The pipeline.
            erase: Concepts.
            anchor: What each becomes, or all; default the blank prompt, ``"art"`` for the paper's styles.
            preserve: Names to keep at all positions, or a `Preserve` set collected before.
            reg: Weight of the squared length of what is searched for, default 0.1. Smaller finds embeddings that
                restore more and erases harder; the paper's 1e-3 is for styles and hard objects.
            rounds: Of search and erase, default 2; 0 is UCE.
            joint: Solve all rounds together from the original weights.
            lam: Ridge, default 0.1.
            preserve_weight: Of what is kept, default 0.1.
            rule: Positions of the first edit; the attack is at all positions.
            hold_blank: Whether the blank prompt stays exactly; otherwise it is preserved, once for each concept as
                in the authors' script.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector by UCE too; default if the denoiser reads one.
            preset: ``"paper"`` for the published constants; what is said wins.
            task: ``unsafe``, ``style`` or ``object``: which of them.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`.
            ShapeError: If the numbers of concepts and anchors differ.
            EditError: If the pipeline cannot be edited.
        """
        given = {
            "anchor": anchor,
            "rule": rule,
            "lam": lam,
            "reg": reg,
            "rounds": rounds,
            "preserve_weight": preserve_weight,
            "joint": joint,
            "hold_blank": hold_blank,
        }
        chosen = chosen_options(given, DEFAULTS, PAPER, preset=preset, task=task)
        if type(chosen["rounds"]) is not int or chosen["rounds"] < 0:
            raise ValueError(f"rounds must be a whole number from 0; got {chosen['rounds']!r}")
        texts = Texts.read(
            pipe,
            erase,
            chosen["anchor"],
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        hold, blank = bool(chosen["hold_blank"]), texts.blank()
        kept = texts.rows(texts.preserve, TokenRule.ALL)
        gram = texts.gram(kept, chosen["preserve_weight"])
        if not hold:
            gram.update(blank, chosen["preserve_weight"] * len(texts.erase))
        held = blank if hold else None
        soft = metric(gram, width=texts.width, lam=chosen["lam"], invariants=held)
        config = ReceConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            rule=str(TokenRule.of(chosen["rule"])),
            reg=chosen["reg"],
            rounds=chosen["rounds"],
            joint=chosen["joint"],
            preserve_weight=chosen["preserve_weight"],
            preset=preset,
            task=task,
            max_sequence_length=max_sequence_length,
        )
        pairs, edit = _rounds(texts, pipe, config, soft)
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if reads_pooled(pipe) if pooled is None else pooled:
            second = texts.pooled(1.0, chosen["preserve_weight"], chosen["lam"], hold_blank=hold)
        made = fit_eraser(
            cls,
            pipe,
            pairs,
            soft,
            config=config,
            edit=edit,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=kept,
            blank=blank,
        )
        return made if pairs is not None else _certified(made, texts, pipe)

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        config = self.config
        if prefix or not isinstance(config, ReceConfig):
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        texts = Texts.read(
            pipe, concept, anchor, None, max_sequence_length=config.max_sequence_length
        )
        found = self._pairs("")
        soft = self._metric_for("", found)
        return _attacked(texts, pipe, config, soft, found)


def _seen(pipe: object, kinds: Sequence[str]) -> Tensor:
    """Return H of the maps that are edited."""
    chosen = [m for m in text_maps(pipe) if m.exact and m.kind in (*kinds, "context")]
    return text_gram(module_at(pipe, m).weight for m in chosen)


def _certified(made: E, texts: Texts, pipe: object) -> E:
    """Return a copy with the certificate of edits made one after another, at the subject tokens."""
    rows = texts.pairs(TokenRule.LAST_SUBJECT, 1.0)
    kept = {k: v for k, v in made.report.items() if k != "certificate_missing"}
    found = certificate(
        partial(_seen, pipe, made.options.maps),
        made.map,
        rows.source,
        rows.target,
        names=[texts.erase[int(i)] for i in torch.as_tensor(rows.concept)],
    )
    return replace(made, report={**kept, "certificate": found.to_dict()})


def _rounds(
    texts: Texts, pipe: object, config: ReceConfig, soft: Metric
) -> tuple[Pairs | None, LowRankAffine | None]:
    """Return the pairs to solve together, or the edit if the rounds are one after another."""
    if config.joint or config.rounds == 0:
        return _attacked(texts, pipe, config, soft, None), None
    start = solve(texts.pairs(config.rule, 1.0), soft)
    H = _seen(pipe, config.maps)
    attacked = texts.pairs(TokenRule.ALL, 1.0)
    edit = sequential_rounds(start, H, attacked, soft, reg=config.reg, rounds=config.rounds)
    return None, edit


def _attacked(
    texts: Texts, pipe: object, config: ReceConfig, soft: Metric, others: Pairs | None
) -> Pairs:
    """Return the pairs of all rounds for some concepts, with others' pairs in force meanwhile."""
    first = texts.pairs(config.rule, 1.0)
    if config.rounds == 0:
        return first
    number = 0 if others is None or others.concept is None else int(others.concept.max()) + 1
    shifted = first if first.concept is None else _shift(first, number)
    start = shifted if others is None else Pairs.cat([others, shifted])
    attacked = _shift(texts.pairs(TokenRule.ALL_BUT_SOT, 1.0), number)
    H = _seen(pipe, config.maps)
    found = joint_rounds(start, H, attacked, soft, reg=config.reg, rounds=config.rounds)
    return found if others is None else _shift(found[len(others) :], -number)


def _shift(pairs: Pairs, number: int) -> Pairs:
    concept = None if pairs.concept is None else pairs.concept + number
    return Pairs(pairs.source, pairs.target, pairs.weights, concept)
