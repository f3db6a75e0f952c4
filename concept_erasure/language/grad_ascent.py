"""Gradient ascent on the likelihood of texts, and GradDiff, which descends on other texts meanwhile.

The loss is ``- gamma mean(nll_f) + alpha L_r``: the mean over tokens of the negative log-likelihood of the texts to
forget, with its sign turned, plus a retain term. Gradient ascent is ``alpha = 0``; GradDiff is ``gamma = alpha = 1``.

Papers: Jang et al. 2023, arXiv:2210.01504; Liu et al. 2022, arXiv:2203.12817 (GradDiff); as baselines in Maini et al.
2024, arXiv:2401.06121, whose constants ``preset="paper"`` has (rate 1e-5, weight decay 0.01, 5 epochs of 32 texts,
all weights of the blocks, likelihood of the retain texts).

The loss has no lower bound, so it diverges: early stopping is part of the method. By default it stops when the texts
are as unlikely as under a uniform guess, ``log V`` nats a token, beyond which there is nothing to forget. It is a
baseline: gradient ascent alone destroys the model with the concept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.eraser import EraserConfig
from concept_erasure.language.batches import Batch
from concept_erasure.language.eraser import LanguageEraser, fit_eraser
from concept_erasure.language.likelihood import (
    Corpora,
    LikelihoodConfig,
    Preset,
    Retain,
    block_weights,
    chosen,
    parameters_to_train,
    token_nll,
    vocabulary,
)
from concept_erasure.language.loop import Row, Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw

__all__ = ["GradAscentConfig", "GradAscentEraser", "ascent_loss"]

Variant = Literal["ascent", "graddiff"]

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"retain": "kl", "forget_weight": 1.0},
    "paper": {"retain": "nll", "forget_weight": 1.0},
}


def ascent_loss(nll: Tensor) -> Tensor:
    """Return ``- nll`` of each token, shape ``(N,)``: minimising it makes the text unlikely."""
    return -nll


def stop_above(max_nll: float) -> Callable[[int, Row], bool]:
    """Return a rule that ends a training when the texts to forget have so many nats per token."""
    return lambda _, row: -row["forget"] >= max_nll


@dataclass(frozen=True, kw_only=True)
class GradAscentConfig(LikelihoodConfig):
    """Options of the fit, see `GradAscentEraser.fit`."""

    variant: Variant = "ascent"
    retain_weight: float = 0.0
    max_nll: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be 'ascent' or 'graddiff'; got {self.variant!r}")
        if self.max_nll is not None and not self.max_nll > 0:
            raise ValueError(f"max_nll must be positive, 'auto' or 'never'; got {self.max_nll}")


@dataclass(frozen=True, repr=False, eq=False)
class GradAscentEraser(LanguageEraser):
    """A change of weights after which texts of the concept are unlikely, see `fit`.

    Example:
        >>> eraser = GradAscentEraser.fit(model, tokenizer, concept, variant="graddiff")  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "grad-ascent"
    config_type: ClassVar[type[EraserConfig]] = GradAscentConfig

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset == "paper":
            return Training(
                steps=60, learning_rate=1e-5, batch_size=32, weight_decay=0.01, clip=None
            )
        return Training()

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
        variant: Variant | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        retain: Retain | None = None,
        max_nll: float | Literal["auto", "never"] = "auto",
        lora: Lora | None = None,
        raw: Raw | None = None,
        training: Training | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            forget_texts: Default those of the concept, else the model's own samples.
            retain_texts: Likewise; not read without a retain weight.
            preset: See the module.
            variant: ``"ascent"`` or ``"graddiff"``; default the second if there is a retain weight.
            forget_weight: gamma; default 1.
            retain_weight: alpha; default 0 for ascent, 1 for GradDiff.
            retain: ``"kl"`` or ``"nll"``, see `retain_term`.
            max_nll: Stop when the texts to forget have so many nats per token; ``"auto"`` is the logarithm of the size
                of the vocabulary. It is looked at every ``training.log_every`` steps.
            lora: What to train; default a `Lora` on all blocks.
            raw: Parameters to train instead.
            training: Options of the loop; default `default_training`.
            cache_dir: Where the model's own samples are kept for the next time.

        Raises:
            ValueError: If texts or options are refused.
            SiteNotFoundError: If there is nothing to train, or the model has no head.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        kind, alpha = _variant(variant, retain_weight)
        config = GradAscentConfig(
            concept=concept.name,
            preset=preset,
            variant=kind,
            retain_weight=alpha,
            max_nll=_bound(max_nll, model),
            **chosen({"forget_weight": forget_weight, "retain": retain}, _PRESETS, preset),
        )
        training = training or cls.default_training(preset)
        texts = Corpora.read(
            model,
            tokenizer,
            concept,
            forget_texts,
            retain_texts,
            training=training,
            retain_weight=alpha,
            cache_dir=cache_dir,
        )

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return ascent_loss(token_nll(model, batch)).sum()

        def terms(parameterisation: Parameterisation) -> list[Term]:
            forget = Term("forget", config.forget_weight, texts.forget, loss)
            return texts.terms(forget, config, parameterisation)

        return fit_eraser(
            cls,
            model,
            config=config,
            spec=parameters_to_train(
                lora, raw, block_weights(model) if preset == "paper" else Lora()
            ),
            terms=terms,
            training=training,
            stop=None if config.max_nll is None else stop_above(config.max_nll),
        )


def _variant(variant: Variant | None, retain_weight: float | None) -> tuple[Variant, float]:
    """Return the variant and its retain weight, of which either may be left to the other.

    Raises:
        ValueError: If they contradict each other.
    """
    if variant is None:
        variant = "graddiff" if retain_weight else "ascent"
    weight = float(variant == "graddiff") if retain_weight is None else retain_weight
    if (variant == "graddiff") != (weight != 0):
        raise ValueError(
            f"variant {variant!r} has retain_weight {'> 0' if variant == 'graddiff' else '0'}; got {weight:g}"
        )
    return variant, weight


def _bound(max_nll: float | Literal["auto", "never"], model: nn.Module) -> float | None:
    if max_nll == "never":
        return None
    if max_nll != "auto":
        return float(max_nll)
    size = vocabulary(model)
    return None if size is None else math.log(size)
