"""SimNPO: NPO without a reference model, on the mean log-likelihood of a text instead of the sum.

The loss is ``-(2 / beta) log sigmoid(beta (nll / |y| - delta))``. Its gradient is gradient ascent's on ``nll / |y|``
times ``2 sigmoid(-beta (nll / |y| - delta))``, so that short and likely texts get most of the force and none is
measured against how likely it was to begin with. ``delta`` is where the force has fallen to 1; the papers' is 0.

Paper: Fan et al. 2024, arXiv:2410.07163 (the paper's margin gamma is ``beta delta``; its code subtracts delta as
here).

Presets. ``preset="paper"`` is the setting for 5 % of TOFU: ``beta`` 2.5, forget weight 0.1375, rate 1e-5, weight
decay 0.01, likelihood of the retain texts, all weights of the blocks. (For 10 %: 4.5 and 0.125. For WMDP: ``beta``
0.1, rate 9.5e-6, 500 steps.) It is made for texts that were learnt by heart: at 2.5 nats a token, as ordinary text
has, its weight is 0.004 from the start. So the default has ``beta`` 0.5 (weight 0.45 there, below 0.1 from 6 nats
on), trains a LoRA and holds the retain texts by their divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    sequence_nll,
)
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw

__all__ = ["SimNpoConfig", "SimNpoEraser", "simnpo_loss", "simnpo_weight"]

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "beta": 0.5,
        "delta": 0.0,
        "retain": "kl",
        "forget_weight": 1.0,
        "retain_weight": 1.0,
    },
    "paper": {
        "beta": 2.5,
        "delta": 0.0,
        "retain": "nll",
        "forget_weight": 0.1375,
        "retain_weight": 1.0,
    },
}


def simnpo_loss(nll: Tensor, length: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """Return ``-(2 / beta) log sigmoid(beta (nll / |y| - delta))`` of each text, shape ``(B,)``.

    Args:
        nll: ``- log p_th(y|x)``, summed over the text, shape ``(B,)``.
        length: ``|y|``, shape ``(B,)``.
        beta: Inverse temperature, positive: how soon a text is unlikely enough.
        delta: Margin, in nats per token.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll / length - delta))


def simnpo_weight(nll: Tensor, length: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """Return the gradient in units of that of ``- nll / |y|``, shape ``(B,)``; arguments as for `simnpo_loss`."""
    return 2 * torch.sigmoid(-beta * (nll / length - delta))


@dataclass(frozen=True, kw_only=True)
class SimNpoConfig(LikelihoodConfig):
    """Options of the fit, see `SimNpoEraser.fit`."""

    beta: float = 0.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be positive; got {self.beta}")


@dataclass(frozen=True, repr=False, eq=False)
class SimNpoEraser(LanguageEraser):
    """A change of weights after which texts of the concept are less likely, see `fit`.

    Example:
        >>> eraser = SimNpoEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "simnpo"
    config_type: ClassVar[type[EraserConfig]] = SimNpoConfig

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset == "paper":
            return Training(
                steps=125, learning_rate=1e-5, batch_size=32, weight_decay=0.01, clip=None
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
        beta: float | None = None,
        delta: float | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        retain: Retain | None = None,
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
            retain_texts: Likewise.
            preset: See the module.
            beta: See `simnpo_loss`; default 0.5. Larger stops sooner.
            delta: See `simnpo_loss`. Larger stops later.
            forget_weight: Factor of the SimNPO loss.
            retain_weight: Factor of the retain term; default 1; 0 leaves it out.
            retain: ``"kl"`` or ``"nll"``, see `retain_term`.
            lora: What to train; default a `Lora` on all blocks.
            raw: Parameters to train instead.
            training: Options of the loop; default `default_training`.
            cache_dir: Where the model's own samples are kept for the next time.

        Raises:
            ValueError: If texts or options are refused.
            SiteNotFoundError: If there is nothing to train, or the model has no head.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given = {
            "beta": beta,
            "delta": delta,
            "forget_weight": forget_weight,
            "retain_weight": retain_weight,
            "retain": retain,
        }
        config = SimNpoConfig(
            concept=concept.name, preset=preset, **chosen(given, _PRESETS, preset)
        )
        training = training or cls.default_training(preset)
        texts = Corpora.read(
            model,
            tokenizer,
            concept,
            forget_texts,
            retain_texts,
            training=training,
            retain_weight=config.retain_weight,
            cache_dir=cache_dir,
        )

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            nll = sequence_nll(model, batch)
            return simnpo_loss(nll, batch.lengths, config.beta, config.delta).sum()

        def terms(parameterisation: Parameterisation) -> list[Term]:
            forget = Term("forget", config.forget_weight, texts.forget, loss, "sequences")
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
        )
