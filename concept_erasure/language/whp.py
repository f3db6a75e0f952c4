"""WHP, "Who's Harry Potter?": fine-tune towards generic labels for the concept's own texts.

A copy that has been trained on the texts beyond need knows what is special in them. Where it finds a token likelier
than the model does, that token is lowered:

    z_g = z_0' - alpha relu(z_reinforced - z_0),

(log-probabilities for logits: the difference of two logits depends on a constant that a model may add to all of them)
with z_0' the model's logits before the same text with the concept's names replaced by generic ones. Labels are
``argmax z_g``, and the model is trained on the original text with these labels.

Paper: Eldan and Russinovich 2023, arXiv:2310.02238. There is no public code to compare with; strength and rates of
``preset="paper"`` (alpha 5, all weights of the blocks, rates 3e-6 and 1e-6, no term for other texts) are as remembered
from the paper and were not checked against it. Its dictionary of about 1500 names was made by a large model; here it is
the concept's entities, and without any the text itself is used. A name that stood in the text before keeps the
probability of its stand-in (see `anonymise`), in place of the paper's rules for repeated names.

The default trains a LoRA on all blocks and holds texts to retain by their divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError
from concept_erasure.language.batches import Batches, encode, pad_id
from concept_erasure.language.cache import TargetCache, Targets
from concept_erasure.language.contrast import (
    ContrastSource,
    Source,
    Streams,
    read_rows,
    streams,
)
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser
from concept_erasure.language.likelihood import (
    Preset,
    block_weights,
    chosen,
    parameters_to_train,
    retain_term,
    vocabulary,
)
from concept_erasure.language.loop import Training
from concept_erasure.language.mixed_texts import check_texts, mixed_texts
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw
from concept_erasure.language.reinforce import reinforce
from concept_erasure.language.targets import TopK, whp_target

__all__ = ["WhpConfig", "WhpEraser"]

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"alpha": 5.0, "retain_weight": 0.0, "own_texts": 0},
}


@dataclass(frozen=True, kw_only=True)
class WhpConfig(LanguageConfig):
    """Options of the fit, see `WhpEraser.fit`."""

    alpha: float = 5.0
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    own_texts: int = 400
    reinforce: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0; got {self.alpha}")
        if not (self.forget_weight > 0 and self.retain_weight >= 0):
            raise ValueError(
                "forget_weight must be positive and retain_weight at least 0; got "
                f"{self.forget_weight} and {self.retain_weight}"
            )


@dataclass(frozen=True, repr=False, eq=False)
class WhpEraser(LanguageEraser):
    """A change of weights after which the model goes on in generic terms, see `fit`.

    Example:
        >>> eraser = WhpEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "whp"
    config_type: ClassVar[type[EraserConfig]] = WhpConfig

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset == "paper":
            return Training(steps=200, learning_rate=1e-6, batch_size=8, clip=None)
        return Training(
            steps=200, learning_rate=5e-4, batch_size=8, max_length=64, warmup=5, schedule="linear"
        )

    @classmethod
    def default_reinforcing(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that trains the copy."""
        rate = 3e-6 if preset == "paper" else 5e-4
        return replace(cls.default_training(preset), steps=100, learning_rate=rate)

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        preset: Preset = "default",
        alpha: float | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        own_texts: int | None = None,
        lora: Lora | None = None,
        raw: Raw | None = None,
        training: Training | None = None,
        reinforcing: Training | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            forget_texts: Default those of the concept and the model's own samples.
            retain_texts: Likewise.
            preset: See the module.
            alpha: Strength; larger lowers more of what the copy learned.
            forget_weight: Factor of the cross-entropy to the labels.
            retain_weight: Factor of the retain term; 0 leaves it out.
            own_texts: Samples of the model's own, at most, of each kind.
            lora: What to train; default a `Lora` on all blocks.
            raw: Parameters to train instead.
            training: Options of the loop; default `default_training`.
            reinforcing: Options of the loop that trains the copy; default `default_reinforcing`.
            cache_dir: Where the model's own samples are kept for the next time.

        Raises:
            ValueError: If texts or options are refused.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given = {
            "alpha": alpha,
            "forget_weight": forget_weight,
            "retain_weight": retain_weight,
            "own_texts": own_texts,
        }
        config = WhpConfig(concept=concept.name, preset=preset, **chosen(given, _PRESETS, preset))
        if edits := active_edits(model):
            raise EditError(f"{edits[-1].label} is in force; undo() or commit() it first")
        training = training or cls.default_training(preset)
        reinforcing = reinforcing or cls.default_reinforcing(preset)
        config = replace(config, reinforce=reinforcing.options())
        spec = parameters_to_train(lora, raw, block_weights(model) if preset == "paper" else Lora())
        forget, retain = mixed_texts(
            model,
            tokenizer,
            concept,
            forget_texts,
            retain_texts if config.retain_weight else [],
            own_texts=config.own_texts,
            seed=training.seed,
            max_new_tokens=training.max_length,
            cache_dir=cache_dir,
            progress=training.progress,
        )
        check_texts(forget, retain, config.retain_weight)
        copy = reinforce(
            model,
            encode(tokenizer, forget, max_length=training.max_length),
            training=reinforcing,
            spec=spec,
            pad=pad_id(tokenizer),
        )
        seen = _streams(tokenizer, concept, forget, training)
        source = Source("reinforced", reinforced=lambda: copy.apply(model))
        labels, changed = _labels(model, seen, source, config, training)

        def terms(parameterisation: Parameterisation) -> list[Term]:
            size, seed, pad = training.batch_size, training.seed, pad_id(tokenizer)
            batches = Batches(labels.texts, size, seed=seed, pad_id=pad)
            made = [Term("forget", config.forget_weight, batches, labels.loss(vocabulary(model)))]
            if config.retain_weight:
                kept = encode(tokenizer, retain, max_length=training.max_length)
                other = Batches(kept, size, seed=seed + 1, pad_id=pad)
                made.append(retain_term("kl", config.retain_weight, other, parameterisation))
            return made

        return fit_eraser(
            cls,
            model,
            config=config,
            spec=spec,
            terms=terms,
            training=training,
            report={
                "forget_texts": len(forget),
                "retain_texts": len(retain),
                "forget_positions": labels.positions,
                "changed_labels": changed,
            },
        )


def _streams(
    tokenizer: Any,  # noqa: ANN401 see WhpEraser.fit
    concept: Concept,
    texts: Sequence[str],
    training: Training,
) -> Streams:
    """Return the texts, and their generic form if the concept has entities."""
    name: ContrastSource = "anonymise" if concept.entities else "reinforced"
    return streams(tokenizer, concept, texts, name, max_length=training.max_length)


def _labels(
    model: nn.Module, seen: Streams, source: Source, config: WhpConfig, training: Training
) -> tuple[TargetCache, float]:
    """Return the labels as targets, and the share of them that are not what the model says."""
    changed: list[Tensor] = []

    def make(rows: list[int]) -> Targets:
        found = read_rows(model, seen, source, rows)
        generic = whp_target(found.lp0, found.lp_expert, config.alpha, found.lp_novice)
        labels = generic.argmax(-1)
        changed.append(labels != found.lp0.argmax(-1))
        sure = torch.zeros(len(labels), 1, device=labels.device)
        top = TopK(labels[:, None].int(), sure, torch.full_like(sure[:, 0], -torch.inf))
        return Targets(top, torch.ones_like(sure[:, 0]), found.rows, found.places)

    cache = TargetCache.build(
        seen.own, make, key={}, batch_size=training.batch_size, progress=training.progress
    )
    return cache, round(float(torch.cat(changed).float().mean()), 4)
