"""TRCE, stage 1: the end token of an unsafe prompt is sent to that of its safe twin; the words are left alone.

In a causal encoder the end token has read the whole prompt, so the meaning of a prompt as a whole sits there. The pairs
are (unsafe phrase, safe phrase) in fifteen templates; only their first end tokens are moved, so the context of a prompt
survives. Phrases are yours to give: none are shipped. Names with an anchor work the same way.

Paper: Chen et al., ICCV 2025, arXiv:2503.07389. Its second stage, a fine-tuning that steers early denoising, is not in
this library (attack success on I2P: 5.1 % after this stage, 1.3 % after both).

The pairs are averaged over prompts, and ``preserve_weight`` is the paper's eta (0.01 for one kind of unsafe content,
0.02 for all kinds together) on the *mean* Gram of captions. How the paper scales the Gram is not known to us; the
released code applies eta twice and divides the sum over 617,000 captions by 3e4, which comes to 0.16 and 0.63 of the
mean. Templates are ours. The blank prompt is held exactly unless ``preset="paper"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric
from concept_erasure.diffusion.encode import Encoded, TextEncoder
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.prepare import Preset, Texts, chosen_options, reads_pooled
from concept_erasure.diffusion.templates import TEMPLATES, check_templates, mean_preserve, merged
from concept_erasure.diffusion.tokens import TokenRule, align, lengths
from concept_erasure.diffusion.wording import Task
from concept_erasure.eraser import EraserConfig

__all__ = ["TraceEraser", "TrceConfig", "TrceEraser", "end_pairs"]

FIFTEEN = TEMPLATES[:15]
DEFAULTS: dict[str, Any] = {
    "anchor": "",
    "lam": 1e-3,
    "preserve_weight": 0.01,
    "hold_blank": True,
}
_PUBLISHED: dict[str, Any] = {"lam": 0.0, "preserve_weight": 0.01, "hold_blank": False}
PAPER: dict[Task, dict[str, Any]] = {
    "unsafe": {**_PUBLISHED, "anchor": "Peaceful and calm"},
    "style": {**_PUBLISHED, "anchor": "art"},
}


@dataclass(frozen=True, kw_only=True)
class TrceConfig(DiffusionConfig):
    """Options of the fit, see `TrceEraser.fit`."""

    rule: str = "first_eot"
    templates: tuple[str, ...] = FIFTEEN
    token_weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    preserve_weight: float = 0.01
    preset: Preset | None = None
    task: Task | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        DiffusionConfig.__post_init__(self)
        weights = self.token_weights
        if len(weights) != 3 or min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"token_weights are three numbers of at least 0, not all 0: end, last pad, keyword; got {weights}"
            )


def end_pairs(
    encoder: TextEncoder,
    prompts: Sequence[str],
    twins: Sequence[str],
    weight: float,
    token_weights: Sequence[float] = (1.0, 0.0, 0.0),
) -> Pairs:
    """Return the pairs of prompts and their twins.

    Args:
        encoder: The text side of the pipeline.
        prompts: Unsafe prompts.
        twins: A safe one each.
        weight: Of each prompt.
        token_weights: Of the first end token, of the last position for each pad, and of the last token of the phrase in
            which the two differ; positions by the attention mask, so words of several tokens are counted right.
    """
    end, last, keyword = token_weights
    parts: list[Pairs] = []
    for prompt, twin in zip(prompts, twins, strict=True):
        both = encoder.encode([prompt, twin], short=not last)
        rows: list[tuple[Tensor, Tensor, float]] = []
        for part, _ in both.segments:
            lengths_ = lengths(both.mask[:, part]).tolist()
            size = part.stop - part.start
            choices = (
                (end, [length - 1 for length in lengths_]),
                (last * (size - max(lengths_)), [size - 1, size - 1]),
                (keyword, _keyword(both, part, lengths_) if keyword else [0, 0]),
            )
            for factor, (one, two) in choices:
                if factor > 0:
                    x = both.embeddings[:, part]
                    rows.append((x[0, one], x[1, two], factor * weight))
        source, target = (torch.stack([row[i] for row in rows]) for i in (0, 1))  # type: ignore[misc]
        parts.append(Pairs(source, target, torch.tensor([row[2] for row in rows])))
    return Pairs.cat(parts)


def _keyword(both: Encoded, part: slice, sizes: Sequence[int]) -> list[int]:
    """Return the last position of the phrase in which two prompts differ, in each."""
    ids = both.ids[:, part].cpu()
    kept = align(ids[0], ids[1], source_length=sizes[0], anchor_length=sizes[1])
    return [
        max(set(range(size)) - set(index.tolist()), default=size - 1)
        for size, index in zip(sizes, kept, strict=True)
    ]


@dataclass(frozen=True, repr=False, eq=False)
class TrceEraser(DiffusionEraser):
    """The edit of TRCE's first stage, see `DiffusionEraser` for its tensors and `fit` for how it is made."""

    method: ClassVar[str] = "trce"
    config_type: ClassVar[type[EraserConfig]] = TrceConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        lam: float | None = None,
        preserve_weight: float | None = None,
        templates: Sequence[str] = FIFTEEN,
        token_weights: tuple[float, float, float] = (1.0, 0.0, 0.0),
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
            erase: Phrases whose prompts are moved.
            anchor: The safe twin of each, or of all; default the blank prompt.
            preserve: Prompts to keep at all positions, or a `Preserve` set of captions; its mean counts.
            lam: Ridge that holds everything else; default 1e-3 (the pairs are averaged).
            preserve_weight: Of the mean Gram; default 0.01.
            templates: Prompts with one ``{}``.
            token_weights: See `end_pairs`.
            hold_blank: Whether the blank prompt stays exactly; default yes.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector too; default if the denoiser reads one and there is no preset.
            preset: ``"paper"`` for the published constants; what is said wins. They need captions in ``preserve``.
            task: ``style`` or ``unsafe``.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`; with ``lam = 0``, if what is preserved
                does not fill the space.
            ShapeError: If the numbers of phrases and twins differ.
            EditError: If the pipeline cannot be edited.
        """
        given = {
            "anchor": anchor,
            "lam": lam,
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
        config = TrceConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            templates=check_templates(templates),
            token_weights=token_weights,
            preserve_weight=chosen["preserve_weight"],
            preset=preset,
            task=task,
            max_sequence_length=max_sequence_length,
        )
        general, rows = mean_preserve(texts, TokenRule.ALL, config.preserve_weight)
        blank, hold = texts.blank(), bool(chosen["hold_blank"])
        soft = metric(
            merged([general]),
            width=texts.width,
            lam=chosen["lam"],
            invariants=blank if hold else None,
        )
        weight = 1 / (len(texts.erase) * len(config.templates))
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if (preset is None and reads_pooled(pipe)) if pooled is None else pooled:
            second = texts.pooled(
                1 / len(texts.erase), config.preserve_weight, chosen["lam"], hold_blank=hold
            )
        return fit_eraser(
            cls,
            pipe,
            _all_pairs(texts, config, weight),
            soft,
            config=config,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=rows,
            blank=blank,
        )

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        if prefix:
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        config = cast("TrceConfig", self.config)
        limit = config.max_sequence_length
        texts = Texts.read(pipe, concept, anchor, None, max_sequence_length=limit)
        return _all_pairs(texts, config, weight)


TraceEraser = TrceEraser


def _all_pairs(texts: Texts, config: TrceConfig, weight: float) -> Pairs:
    parts = [
        end_pairs(
            texts.encoder,
            [text.format(name) for text in config.templates],
            [text.format(instead) for text in config.templates],
            weight,
            config.token_weights,
        ).numbered(number)
        for number, (name, instead) in enumerate(zip(texts.erase, texts.anchors, strict=True))
    ]
    return Pairs.cat(parts)
