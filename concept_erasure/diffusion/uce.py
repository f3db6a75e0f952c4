"""UCE, Unified Concept Editing: every concept's key and value become those of its anchor, in one least-squares solve.

Minimised is ``sum w |W'c - W c*|^2 + sum g |W'p - W p|^2 + lam |W' - W|^2`` over each key and value matrix. As the
targets are outputs of anchors, the answer is ``W' = W (I + E)`` with one E for all of them.

Paper: Gandikota et al., WACV 2024, arXiv:2308.14761. `UceEraser.debias` is its second use, ``technique="tensor"`` an
option of its first release. Limits: with many concepts what should stay is lost too, most with a small ``lam``;
the edit is invertible, so an embedding that brings a concept back exists always (see the certificate).

Presets. The default is the authors' current script (last subject token, weights 1, ``lam`` 0.5: one rank for each
concept) plus one thing: all vectors of the blank prompt stay exactly, because guidance reads them in every step.
``preset="paper"`` is the first release, with which the paper's numbers were made: from the last subject token to the
end, preserved prompts at all positions, the blank prompt among them with weight ``max(0.1, 1 / prompts)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric, solve_layer
from concept_erasure.diffusion.debias import Debiasing, balance
from concept_erasure.diffusion.encode import BlankAnchor
from concept_erasure.diffusion.eraser import ApplyForm, DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.prepare import Preset, Texts, chosen_options, reads_pooled
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import Task
from concept_erasure.eraser import EraserConfig
from concept_erasure.linalg import LowRankAffine

__all__ = ["Measure", "UceConfig", "UceEraser", "tensor_residual"]

Technique = Literal["replace", "tensor"]
Measure = Callable[[object, list[str]], Tensor | Sequence[Sequence[float]]]
E = TypeVar("E", bound="UceEraser")

DEFAULTS: dict[str, Any] = {
    "anchor": "",
    "rule": "last_subject",
    "preserve_rule": "last_subject",
    "lam": 0.5,
    "erase_weight": 1.0,
    "preserve_weight": 1.0,
    "hold_blank": True,
}
_FIRST_RELEASE: dict[str, Any] = {
    "rule": "from_last_subject",
    "preserve_rule": "all",
    "preserve_weight": None,  # max(0.1, 1 / prompts)
    "hold_blank": False,
}
PAPER: dict[Task, dict[str, Any]] = {
    "object": {**_FIRST_RELEASE, "anchor": ""},
    "style": {**_FIRST_RELEASE, "anchor": "art"},
    "unsafe": {**_FIRST_RELEASE, "anchor": ""},
}


@dataclass(frozen=True, kw_only=True)
class UceConfig(DiffusionConfig):
    """Options of the fit, see `UceEraser.fit`."""

    erase_weight: float | tuple[float, ...] = 1.0
    preserve_weight: float = 1.0
    preserve_rule: str = "last_subject"
    blank_anchor: BlankAnchor = "sot"
    expand: bool = False
    technique: Technique = "replace"
    preset: Preset | None = None
    task: Task | None = None
    max_sequence_length: int | None = None


def tensor_residual(weight: Tensor, pairs: Pairs) -> Tensor:
    """Return what the first release's ``technique="tensor"`` adds to one layer's outputs, shape ``(n, out)``.

    The target is the anchor's output less its component along the concept's output, where the outputs of all tokens
    of a concept count as one long vector: ``v = W c* - <u, W c*> u`` with ``u = W c / |W c|``.

    Args:
        weight: Shape ``(out, d)``.
        pairs: Rows of all concepts.
    """
    wide = weight.detach().to(pairs.source)
    old, new = pairs.source @ wide.T, pairs.target @ wide.T
    owner = torch.zeros(len(pairs), dtype=torch.long) if pairs.concept is None else pairs.concept
    owner = owner.to(old.device)
    count = int(owner.max()) + 1 if len(pairs) else 0
    along = old.new_zeros(count).index_add(0, owner, (old * new).sum(1))
    size = old.new_zeros(count).index_add(0, owner, old.square().sum(1))
    share = along / size.clamp_min(torch.finfo(old.dtype).tiny)
    return new - share[owner, None] * old - old


@dataclass(frozen=True, repr=False, eq=False)
class UceEraser(DiffusionEraser):
    """The edit of UCE, see `DiffusionEraser` for its tensors and `fit` for how it is made.

    Example:
        >>> eraser = UceEraser.fit(pipe, erase=["van gogh", "monet"], anchor="art")  # doctest: +SKIP
        >>> with eraser.apply(pipe):  # doctest: +SKIP
        ...     images = pipe("a starry night in the style of van gogh").images
    """

    method: ClassVar[str] = "uce"
    config_type: ClassVar[type[EraserConfig]] = UceConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        lam: float | None = None,
        erase_weight: float | Sequence[float] | None = None,
        preserve_weight: float | None = None,
        rule: TokenRule | str | None = None,
        preserve_rule: TokenRule | str | None = None,
        blank_anchor: BlankAnchor = "sot",
        hold_blank: bool | None = None,
        expand: bool = False,
        technique: Technique = "replace",
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
            anchor: What each becomes, or all; default ``""``, the blank prompt, and ``"art"`` for the paper's styles.
            preserve: Names to keep, or a `Preserve` set collected before.
            lam: Ridge that holds everything else; default 0.5.
            erase_weight: Of the concepts, one or one each; infinity is exact. Default 1.
            preserve_weight: Of what is kept; default 1.
            rule: Positions of the pairs.
            preserve_rule: Positions of what is kept.
            blank_anchor: Where the blank prompt is read as an anchor of a subject token.
            hold_blank: Whether the blank prompt stays exactly; otherwise it is one of the preserved prompts.
            expand: Add the concepts in five prompt templates each.
            technique: ``"tensor"`` makes targets of each layer by itself, see `tensor_residual`.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector too; default if the denoiser reads one (not with ``technique="tensor"``).
            preset: ``"paper"`` for the constants the paper's numbers were made with; what is said wins.
            task: ``object``, ``style`` or ``unsafe``: which of them; also chooses the templates.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused: an anchor equal to its concept, a preserved concept, a concept
                without tokens, a prompt longer than the window, ``lam = 0`` with too few preserved vectors.
            ShapeError: If the numbers of concepts, anchors and weights differ.
            EditError: If the pipeline cannot be edited.
        """
        if technique not in ("replace", "tensor"):
            raise ValueError(f"technique must be 'replace' or 'tensor'; got {technique!r}")
        given = {
            "anchor": anchor,
            "rule": rule,
            "preserve_rule": preserve_rule,
            "lam": lam,
            "erase_weight": erase_weight,
            "preserve_weight": preserve_weight,
            "hold_blank": hold_blank,
        }
        chosen = chosen_options(given, DEFAULTS, PAPER, preset=preset, task=task)
        texts = Texts.read(
            pipe,
            erase,
            chosen["anchor"],
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        blank, hold = texts.blank(), bool(chosen["hold_blank"])
        names = texts.preserve if hold else tuple(dict.fromkeys((*texts.preserve, "")))
        if chosen["preserve_weight"] is None:
            chosen["preserve_weight"] = max(0.1, 1 / len(names))
        kept = texts.rows(names, chosen["preserve_rule"])
        soft = metric(
            texts.gram(kept, chosen["preserve_weight"]),
            width=texts.width,
            lam=chosen["lam"],
            invariants=blank if hold else None,
        )
        pairs = texts.pairs(
            chosen["rule"],
            chosen["erase_weight"],
            blank_anchor=blank_anchor,
            expand=(task or "object") if expand else None,
        )
        weights = chosen["erase_weight"]
        config = UceConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            rule=str(TokenRule.of(chosen["rule"])),
            erase_weight=weights if isinstance(weights, int | float) else tuple(weights),
            preserve_weight=chosen["preserve_weight"],
            preserve_rule=str(TokenRule.of(chosen["preserve_rule"])),
            blank_anchor=blank_anchor,
            expand=expand,
            technique=technique,
            preset=preset,
            task=task,
            max_sequence_length=max_sequence_length,
        )
        if technique == "tensor":
            return _fit_tensor(cls, pipe, pairs, soft, config)
        wanted = reads_pooled(pipe) if pooled is None else pooled
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if wanted:
            second = texts.pooled(
                weights, chosen["preserve_weight"], chosen["lam"], hold_blank=hold
            )
        return fit_eraser(
            cls,
            pipe,
            pairs,
            soft,
            config=config,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=kept,
            blank=blank,
        )

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        config = self.config
        if prefix or not isinstance(config, UceConfig):
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        texts = Texts.read(
            pipe, concept, anchor, None, max_sequence_length=config.max_sequence_length
        )
        return texts.pairs(
            config.rule,
            weight,
            blank_anchor=config.blank_anchor,
            expand=(config.task or "object") if config.expand else None,
        )

    @classmethod
    def debias(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        concepts: Sequence[str],
        attributes: Sequence[str],
        measure: Measure,
        ratios: Sequence[float] | Tensor | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        lam: float = 0.5,
        edit_weight: float = 1.0,
        preserve_weight: float = 1.0,
        hold_blank: bool = True,
        step: float = 1.0,
        tolerance: float = 0.05,
        rounds: int = 30,
        form: ApplyForm = "weights",
        maps: Sequence[str] = ("key", "value"),
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit an edit after which pictures of each concept show the attributes in the wanted shares.

        The concept's outputs become those of ``c + sum_k alpha_k a_k``; the amounts start at zero and follow the
        measured errors, each time from the original weights (`balance`).

        Args:
            pipe: The pipeline; bit-identical afterwards.
            concepts: E.g. professions.
            attributes: E.g. ``["a man", "a woman"]``.
            measure: ``measure(pipe, concepts)`` makes pictures with the edited pipeline and returns the share of each
                attribute for each concept, shape ``(n, a)``. The paper: 10 pictures of 20 steps at guidance 7.5, judged
                by zero-shot CLIP.
            ratios: Wanted shares, for all or for each concept; default equal ones.
            preserve: As in `fit`.
            lam: As in `fit`.
            edit_weight: As ``erase_weight`` in `fit`.
            preserve_weight: As in `fit`.
            hold_blank: As in `fit`.
            step: See `balance`.
            tolerance: See `balance`.
            rounds: See `balance`.
            form: How the edit is put in while measuring.
            maps: As in `fit`.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If nothing needs to change: all shares are within the tolerance already.
            ShapeError: If the shares have another shape.
        """
        texts = Texts.read(
            pipe,
            concepts,
            " ",
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        config = UceConfig(
            concepts=texts.erase,
            maps=tuple(maps),
            erase_weight=edit_weight,
            preserve_weight=preserve_weight,
        )
        task = Debiasing.of(
            texts, attributes, ratios, lam, edit_weight, preserve_weight, hold_blank=hold_blank
        )

        def shares(alpha: Tensor) -> Tensor:
            trial = task.solve(alpha)
            if trial is None:
                return torch.as_tensor(measure(pipe, list(texts.erase)))
            with cls(trial.left, trial.right, config=config).apply(pipe, form=form):
                return torch.as_tensor(measure(pipe, list(texts.erase)))

        alpha, error, done = balance(
            shares, task.wanted, step=step, tolerance=tolerance, rounds=rounds
        )
        pairs, soft = task.parts(alpha)
        if not len(pairs):
            raise ValueError(
                f"nothing to change: all measured shares are within {tolerance:g} of the wanted ones"
            )
        report = {
            "rounds": done,
            "largest_error": float(error.abs().max()),
            "amounts": alpha.tolist(),
        }
        return fit_eraser(
            cls,
            pipe,
            pairs,
            soft,
            config=config,
            preserved=task.kept,
            blank=task.blank,
            report=report,
        )


def _fit_tensor(cls: type[E], pipe: object, pairs: Pairs, soft: Metric, config: UceConfig) -> E:
    """Fit an edit whose targets are each layer's own."""
    layers = {
        text_map.name: solve_layer(
            pairs.source,
            tensor_residual(module_at(pipe, text_map).weight, pairs),
            pairs.weights,
            soft,
        )
        for text_map in text_maps(pipe)
        if text_map.exact and text_map.kind in (*config.maps, "context")
    }
    none = pairs.source.new_zeros(pairs.width, 0)
    return fit_eraser(
        cls, pipe, None, soft, config=config, edit=LowRankAffine(none, none), layers=layers
    )
