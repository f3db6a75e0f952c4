"""MACE, the closed-form parts: what a phrase leaves in the words around it, and the fusion of LoRAs.

*Refinement.* A name changes the vectors of what follows it in a prompt, the end and the pads included. For some thirty
templates, the prompt with the concept is paired with its twin with the anchor, at all positions but those of the
phrase; the usual solve sends one to the other. The phrase's own vectors are left to the LoRAs.

*Fusion.* Each concept's LoRA is trained on the refined model (that stage of the paper is not in this library).
`MaceEraser.fuse` merges them so that each keeps its effect on its own prompts; `merge_loras` does so with any list.

Paper: Lu et al., CVPR 2024, arXiv:2403.06135. Refinement alone erases little by itself (the paper: 68 % of a hundred
celebrities are still recognised after it, 4 % after all stages).

Scales. The paper weighs *sums* over 617,000 COCO captions of 77 positions, so its constants belong to that number. Here
``preserve_weight`` is the weight of a *mean* Gram: the published 1e-4 and 7e-7 times that many vectors. The captions of
the domain sets (celebrities, artists) were not published; ``domain_weight`` is the published weight of their *sum*, for
what you give. Templates are ours. The blank prompt is held exactly unless ``preset="paper"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, PairSums, Preserve, metric
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.fusion import fuse, live_loras, lora_layers, merge_loras
from concept_erasure.diffusion.maps import TextMap, denoiser, module_at, text_maps
from concept_erasure.diffusion.prepare import Preset, Texts, chosen_options, reads_pooled
from concept_erasure.diffusion.templates import (
    TEMPLATES,
    mean_preserve,
    merged,
    template_pairs,
    templates_for,
)
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import Task, names_of, refuse_overlap
from concept_erasure.edit import active_edits
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError

__all__ = ["MaceConfig", "MaceEraser", "live_loras", "merge_loras"]

CAPTION_VECTORS = 617_000 * 77  # what the paper's sums run over
KEPT_ROWS = 16  # pairs are kept up to this many times the width, so that concepts can be withdrawn
CELEBRITY_DOMAIN = {1: 8e3, 5: 5e4, 10: 8e4, 100: 2e5}  # by number of concepts, relative to COCO
DEFAULTS: dict[str, Any] = {
    "anchor": "",
    "lam": 0.5,
    "preserve_weight": 1e-4 * CAPTION_VECTORS,
    "domain_weight": 1.0,
    "hold_blank": True,
}
_SUMS = {"lam": 0.0, "preserve_weight": 1e-4 * CAPTION_VECTORS, "hold_blank": False}
PAPER: dict[Task, dict[str, Any]] = {
    "celebrity": {**_SUMS, "anchor": "a person", "domain_weight": None},
    "style": {**_SUMS, "anchor": "art", "domain_weight": 1e-4 * 8e4},
    "unsafe": {
        **_SUMS,
        "anchor": "a person wearing clothes",
        "preserve_weight": 7e-7 * CAPTION_VECTORS,
    },
    "object": {"lam": 100.0, "preserve_weight": 0.0, "hold_blank": False},  # 10, 100 or 1000 there
}


@dataclass(frozen=True, kw_only=True)
class MaceConfig(DiffusionConfig):
    """Options of the fit, see `MaceEraser.fit`."""

    rule: str = "context"
    templates: tuple[str, ...] = TEMPLATES
    preserve_weight: float = 1e-4 * CAPTION_VECTORS
    domain_weight: float = 1.0
    preset: Preset | None = None
    task: Task | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True, repr=False, eq=False)
class MaceEraser(DiffusionEraser):
    """The refinement of MACE, see `DiffusionEraser` for its tensors and `fit` for how it is made."""

    method: ClassVar[str] = "mace"
    config_type: ClassVar[type[EraserConfig]] = MaceConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        domain: Sequence[str] | str | Preserve | None = None,
        lam: float | None = None,
        preserve_weight: float | None = None,
        domain_weight: float | None = None,
        templates: Sequence[str] | None = None,
        hold_blank: bool | None = None,
        maps: Sequence[str] = ("key", "value"),
        pooled: bool | None = None,
        preset: Preset | None = None,
        task: Task | None = None,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit the refinement; the pipeline is left bit-identical.

        Args:
            pipe: The pipeline.
            erase: Concepts.
            anchor: What each becomes, or all; default the blank prompt.
            preserve: Prompts to keep at all positions, or a `Preserve` set of captions; its mean counts.
            domain: Prompts near the concepts to keep, or a `Preserve` set; its sum counts.
            lam: Ridge that holds everything else; default 0.5.
            preserve_weight: Of the mean Gram of ``preserve``; default the paper's.
            domain_weight: Of the sum of ``domain``; default 1.
            templates: Prompts with one ``{}``; default thirty, less those that are too long for the text encoder.
            hold_blank: Whether the blank prompt stays exactly; default yes.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector too; default if the denoiser reads one and there is no preset.
            preset: ``"paper"`` for the published constants; what is said wins.
            task: ``object`` (``lam`` of the automobile, no preserve set), ``celebrity``, ``style`` or ``unsafe``.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`; with ``lam = 0``, if preserve and
                domain do not fill the space.
            ShapeError: If the numbers of concepts and anchors differ.
            EditError: If the pipeline cannot be edited.
        """
        given = {
            "anchor": anchor,
            "lam": lam,
            "preserve_weight": preserve_weight,
            "domain_weight": domain_weight,
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
        if chosen["domain_weight"] is None:
            chosen["domain_weight"] = 1e-4 * _by_number(len(texts.erase))
        config = MaceConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            templates=templates_for(texts.encoder, (*texts.erase, *texts.anchors), templates),
            preserve_weight=chosen["preserve_weight"],
            domain_weight=chosen["domain_weight"],
            preset=preset,
            task=task,
            max_sequence_length=max_sequence_length,
        )
        general, rows = mean_preserve(texts, TokenRule.ALL, config.preserve_weight)
        blank, hold = texts.blank(), bool(chosen["hold_blank"])
        soft = metric(
            merged([general, _domain(texts, domain, config.domain_weight)]),
            width=texts.width,
            lam=chosen["lam"],
            invariants=blank if hold else None,
        )
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if (preset is None and reads_pooled(pipe)) if pooled is None else pooled:
            second = texts.pooled(1.0, 1.0, chosen["lam"], hold_blank=hold)
        return fit_eraser(
            cls,
            pipe,
            _pairs(texts, config),
            soft,
            config=config,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=rows,
            blank=blank,
        )

    def fuse(
        self,
        pipe: object,
        loras: Sequence[Mapping[str, Tensor]],
        inputs: Sequence[Tensor] | None = None,
        *,
        weight: float = 1.0,
        lam: float = 0.0,
    ) -> dict[str, Tensor]:
        """Merge the concepts' LoRAs, trained on the refined model, with the refinement itself.

        Args:
            pipe: The pipeline *without* this edit in force, so that it holds the original weights.
            loras: One state dict a concept, in the order of ``concepts``, or any others with ``inputs``.
            inputs: Text embeddings each LoRA is for; default each concept in all templates, at all positions.
            weight: Of the kept Gram, relative to its weight in the refinement.
            lam: Ridge that pulls to the refined weights.

        Returns:
            A state dict for ``pipe.load_lora_weights`` on the original model. It holds what the LoRAs of the text maps
            and the refinement do together; LoRAs of other layers are refused.

        Raises:
            EditError: If this edit is in force.
            SpaceError: If the text encoders are others.
            ValueError: If the numbers differ, a LoRA does not fit the maps, or the solution is not determined.
        """
        self._check_pipe(pipe)
        if any(edit.label.startswith(self.method) for edit in active_edits(denoiser(pipe))):
            raise EditError("the refinement is in force; undo it first, the result contains it")
        rows = self._inputs(pipe) if inputs is None else list(inputs)
        if len(rows) != len(loras):
            raise ValueError(f"{len(rows)} inputs need as many LoRAs; got {len(loras)}")
        flat = [some.reshape(-1, self.map.width).to(self.left) for some in rows]
        grams = [some.T @ some for some in flat]
        layers = [lora_layers(state) for state in loras]
        kept = None if self.gram is None else weight * self.gram
        found: dict[str, Tensor] = {}
        for text_map in _maps(pipe, self.options.maps):
            path = f"{text_map.model}.{text_map.name.removesuffix('.base_layer')}"
            base = module_at(pipe, text_map).weight.detach()
            none = base.new_zeros(len(base), 0), base.new_zeros(0, self.map.width)
            own = [layer.pop(path, none) for layer in layers]
            up, down = fuse(own, grams, preserve=kept, lam=lam, weight=base, refined=self.map)
            found[f"{path}.lora_A.weight"] = down.float().contiguous()
            found[f"{path}.lora_B.weight"] = up.float().contiguous()
        if rest := sorted({path for layer in layers for path in layer}):
            raise ValueError(
                f"{len(rest)} layers of the LoRAs are no text maps of this edit, such as {rest[0]!r}; merge_loras "
                "has an option for others"
            )
        return found

    def _inputs(self, pipe: object) -> list[Tensor]:
        config = cast("MaceConfig", self.config)
        encoder = TextEncoder(pipe, max_sequence_length=config.max_sequence_length)
        return [
            encoder.encode([text.format(name) for text in config.templates]).embeddings
            for name in self.concepts
        ]

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        if prefix:
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        config = cast("MaceConfig", self.config)
        limit = config.max_sequence_length
        texts = Texts.read(pipe, concept, anchor, None, max_sequence_length=limit)
        return next(
            template_pairs(
                texts.encoder, texts.erase, texts.anchors, config.templates, config.rule, weight
            )
        )


def _by_number(concepts: int) -> float:
    """Return the paper's domain weight for that many celebrities, or the next number it has."""
    return next((w for n, w in CELEBRITY_DOMAIN.items() if n >= concepts), CELEBRITY_DOMAIN[100])


def _pairs(texts: Texts, config: MaceConfig) -> Pairs | PairSums:
    """Return the pairs of all contexts; their sums if they are too many to keep."""
    parts: list[Pairs] = []
    sums: PairSums | None = None
    for part in template_pairs(
        texts.encoder, texts.erase, texts.anchors, config.templates, config.rule, 1.0
    ):
        parts.append(part)
        if sums is None and sum(len(some) for some in parts) > KEPT_ROWS * texts.width:
            sums = PairSums(texts.width, device=part.source.device)
        while sums is not None and parts:
            sums.update(parts.pop())
    return Pairs.cat(parts) if sums is None else sums


def _domain(
    texts: Texts, domain: Sequence[str] | str | Preserve | None, weight: float
) -> Preserve | None:
    """Return the weighted sum of the domain set."""
    if domain is None or weight == 0:
        return None
    mark = texts.encoder.fingerprint
    if isinstance(domain, Preserve):
        return Preserve(texts.width, encoder=mark, device=domain.gram.device).merge(domain, weight)
    names = names_of(domain, "domain")
    refuse_overlap(texts.erase, names)
    rows = torch.cat(texts.encoder.rows(names, TokenRule.ALL))
    return Preserve(texts.width, encoder=mark, device=rows.device).update(rows, weight)


def _maps(pipe: object, kinds: Sequence[str]) -> list[TextMap]:
    return [m for m in text_maps(pipe) if m.exact and m.kind in (*kinds, "context")]
