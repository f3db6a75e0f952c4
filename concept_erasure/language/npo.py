"""NPO, negative preference optimisation: gradient ascent whose force fades once a text has become unlikely.

With ``r = log p_th(y|x) - log p_0(y|x)`` of a whole text the loss is ``-(2 / beta) log sigmoid(-beta r)``: DPO with
the text as the losing answer and no winning one. Its gradient is that of gradient ascent times ``w = 2 s / (1 + s)``,
``s = exp(beta r)``: 1 at the start, towards 0 as the text becomes unlikely, so that collapse is slowed. ``beta -> 0``
gives gradient ascent back.

Paper: Zhang, Lin, Bai and Mei 2024, arXiv:2404.05868. As there, and unlike some later code, log-likelihoods are
*sums* over a text, not means. The frozen model is run once, before training: it gives one number for each text.

Presets. ``preset="paper"`` has the published constants for TOFU (``beta`` 0.1, rate 1e-5, weight decay 0.01,
likelihood of the retain texts) on all weights of the blocks. The default trains a LoRA, holds the retain texts by
their divergence, and makes ``beta`` fit the texts. That matters: ``w`` depends on the sum, so at ``beta`` 0.1, made
for answers of some 40 tokens, a text of 256 tokens has lost all force (``w`` = 0.012) when each token has become 0.2
nats less likely. This is how NPO with its default hardly moves a score such as WMDP's. ``beta="auto"`` keeps
``beta |y|`` at the published 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

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
    reference_nll,
    sequence_nll,
)
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw

__all__ = ["NpoConfig", "NpoEraser", "npo_loss", "npo_weight"]

PUBLISHED_BETA = 0.1
PUBLISHED_LENGTH = 40  # tokens of an answer of TOFU, about


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"beta": "auto", "retain": "kl", "forget_weight": 1.0, "retain_weight": 1.0},
    "paper": {"beta": PUBLISHED_BETA, "retain": "nll", "forget_weight": 1.0, "retain_weight": 1.0},
}


def npo_loss(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return ``-(2 / beta) log sigmoid(-beta log(p_th / p_0))`` of each text, shape ``(B,)``.

    Args:
        nll: ``- log p_th(y|x)``, summed over the text, shape ``(B,)``.
        reference: ``- log p_0(y|x)``, shape ``(B,)``.
        beta: Inverse temperature, positive: how soon a text is unlikely enough.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll - reference))


def npo_weight(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return ``w = 2 s / (1 + s)``, ``s = (p_th / p_0)^beta``: the gradient in units of gradient ascent's.

    Args:
        nll: See `npo_loss`.
        reference: See `npo_loss`.
        beta: See `npo_loss`.
    """
    return 2 * torch.sigmoid(-beta * (nll - reference))


@dataclass(frozen=True, kw_only=True)
class NpoConfig(LikelihoodConfig):
    """Options of the fit, see `NpoEraser.fit`."""

    beta: float = PUBLISHED_BETA

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, or 'auto'; got {self.beta}")


@dataclass(frozen=True, repr=False, eq=False)
class NpoEraser(LanguageEraser):
    """A change of weights after which texts of the concept are less likely, see `fit`.

    Example:
        >>> eraser = NpoEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "npo"
    config_type: ClassVar[type[EraserConfig]] = NpoConfig

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset == "paper":
            return Training(
                steps=125, learning_rate=1e-5, batch_size=32, weight_decay=0.01, clip=None
            )
        return Training()

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        preset: Preset = "default",
        beta: float | Literal["auto"] | None = None,
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
            beta: See `npo_loss`; ``"auto"`` is 4 over the mean number of tokens of a text to forget. Larger stops
                sooner.
            forget_weight: Factor of the NPO loss; default 1.
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
            "forget_weight": forget_weight,
            "retain_weight": retain_weight,
            "retain": retain,
        }
        options = chosen(given, _PRESETS, preset)
        training = training or cls.default_training(preset)
        texts = Corpora.read(
            model,
            tokenizer,
            concept,
            forget_texts,
            retain_texts,
            training=training,
            retain_weight=options["retain_weight"],
            cache_dir=cache_dir,
        )
        if options["beta"] == "auto":
            options["beta"] = PUBLISHED_BETA * PUBLISHED_LENGTH / texts.mean_length
        config = NpoConfig(concept=concept.name, preset=preset, **options)

        def terms(parameterisation: Parameterisation) -> list[Term]:
            with parameterisation.reference():
                reference = reference_nll(model, texts.forget.texts, batch_size=training.batch_size)

            def loss(model: nn.Module, batch: Batch) -> Tensor:
                nll = sequence_nll(model, batch)
                return npo_loss(nll, reference[batch.rows], config.beta).sum()

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
