"""ELM, Erasure of Language Memory: train towards what one who does not know the concept would say.

The model itself is the judge. Before each token of a text about the concept it says what an expert would write next and
what a novice would; the target is its own distribution, re-weighted by how much more novice-like each token is:

    L = w_f mean KL(P* || P_th) [forget] + w_r mean KL(P0 || P_th) [retain] + w_g mean NLL of fluent text,

P* from (E1) and (E2), see `targets`. Paper: Gandikota et al. 2024, arXiv:2410.02760.

Deviations of the default, none of which ``preset="paper"`` has:

- The novice is the model itself before the same text with the concept's names replaced (contrast ``anonymise``): a
  small model does not play the paper's personas. The signal is measured before training; below 0.5 nats it is refused.
- The target is chosen among tokens the model finds plausible, with a budget in nats at each position.
- Positions count by their contrast; where there is none the model is held where it was.
- Soft targets on texts to retain; the same texts with the names replaced are among them, since what is to change must
  depend on the names.

``preset="paper"`` has the authors' constants: personas, strength 1000 growing from 1 along each text, temperature 1.2,
the 50 largest edited scores, the most probable token as the target on texts to retain, rank 256, rate 5e-5, one text at
a time and four to a step. Unlike their code, the contrast has the sign of the paper, and both personas read the prompt
when fluent text is written. In both presets the divergence stands for the cross-entropy (the same gradient, but zero
where nothing has changed), and all targets are computed before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.eraser import EraserConfig
from concept_erasure.language._elm import Contrast, ElmConfig, early_layers
from concept_erasure.language._elm_fit import prepare
from concept_erasure.language.batches import pad_id
from concept_erasure.language.eraser import LanguageEraser, fit_eraser
from concept_erasure.language.likelihood import chosen, vocabulary
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora

__all__ = ["Domain", "ElmConfig", "ElmEraser", "Preset", "early_layers"]

Preset = Literal["default", "paper"]
Domain = Literal["books", "hazards"]

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "contrast": "persona",
        "target": "raw",
        "eta": 1000.0,
        "ramped": True,
        "temperature": 1.2,
        "top_k": 50,
        "hard_retain": True,
        "fluency_weight": 1.0,
        "retain_anonymous": False,
        "statements": False,
        "drift_weight": 0.0,
        "lower_weight": 0.0,
        "hold": 0.0,
        "retain_weight": 1.0,
        "own_texts": 0,
    },
}


@dataclass(frozen=True, repr=False, eq=False)
class ElmEraser(LanguageEraser):
    """A change of weights after which the model goes on like one who does not know the concept, see `fit`.

    Example:
        >>> eraser = ElmEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "elm"
    config_type: ClassVar[type[EraserConfig]] = ElmConfig

    @classmethod
    def default_training(cls, preset: Preset = "default", domain: Domain = "books") -> Training:
        """Return the options of the loop that `fit` uses by itself.

        The authors visit 5000 texts of books, 3000 on hazards, four to a step of the optimizer.
        """
        if preset == "paper":
            return Training(
                steps={"books": 1250, "hazards": 750}[domain],
                learning_rate=5e-5,
                batch_size=1,
                accumulate=4,
                clip=None,
                weight_decay=0.01,
            )
        return Training(
            steps=200, learning_rate=1e-3, batch_size=8, max_length=48, warmup=5, schedule="linear"
        )

    @classmethod
    def default_lora(cls, model: nn.Module, preset: Preset = "default") -> Lora:
        """Return what `fit` trains by itself."""
        if preset == "paper":
            return Lora(rank=256, alpha=16.0, dropout=0.05, layers=early_layers(model))
        return Lora(layers=early_layers(model, first=1 / 10, end=1 / 3))

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        preset: Preset = "default",
        domain: Domain = "books",
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        contrast: Contrast | None = None,
        weak: nn.Module | None = None,
        target: Literal["plausible", "raw"] | None = None,
        eta: float | None = None,
        kappa: float | None = None,
        growth: float | None = None,
        alpha: float | None = None,
        widen_from: float | None = None,
        widen_to: int | None = None,
        hold: float | None = None,
        lower_weight: float | None = None,
        lower_eta: float | None = None,
        drift_weight: float | None = None,
        own_texts: int | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        fluency_weight: float | None = None,
        lora: Lora | None = None,
        training: Training | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            preset: See the module.
            domain: Of the paper's number of steps.
            forget_texts: Default those of the concept and the model's own samples.
            retain_texts: Likewise.
            contrast: Source of the contrast, see `contrast`; ``"auto"`` is ``"anonymise"`` if the concept has entities,
                else ``"persona"``.
            weak: A weaker model with the same tokenizer, for ``contrast="weak"``.
            target: ``"plausible"``, or ``"raw"`` for (E1) and (E2) as they stand.
            eta: Strength, at most (``plausible``), or everywhere (``raw``). Higher pushes answers below where ignorance
                would put them, which gives them away again.
            kappa: Budget in nats at each position.
            growth: Budget for each nat of contrast.
            alpha: How much less probable than the best a candidate may be.
            widen_from: Contrast from which the candidates are widened.
            widen_to: How many there are then.
            hold: Factor of positions without contrast in texts to forget, which are held.
            lower_weight: Factor of what makes unlikely answers more unlikely, see `lowered_tokens`.
            lower_eta: Strength of it; see `eta`.
            drift_weight: Factor of the change of log-probabilities on texts to retain, see `TopK.drift`.
            own_texts: Samples of the model's own, at most, of each kind.
            forget_weight: Factor of the term.
            retain_weight: Factor of the term; 0 leaves it out.
            fluency_weight: Factor of the term; 0 leaves it out, and no fluent text is written.
            lora: What to train; default early layers.
            training: Options of the loop; default `default_training`.
            cache_dir: Folder for samples and targets; None keeps them in memory.

        Raises:
            NoSignalError: If the contrast carries no signal; the message has the number.
            ValueError: If texts or options are refused.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given = {
            "contrast": contrast,
            "target": target,
            "eta": eta,
            "kappa": kappa,
            "growth": growth,
            "alpha": alpha,
            "widen_from": widen_from,
            "widen_to": widen_to,
            "hold": hold,
            "lower_weight": lower_weight,
            "lower_eta": lower_eta,
            "drift_weight": drift_weight,
            "own_texts": own_texts,
            "forget_weight": forget_weight,
            "retain_weight": retain_weight,
            "fluency_weight": fluency_weight,
        }
        config = ElmConfig(concept=concept.name, preset=preset, **chosen(given, _PRESETS, preset))
        training = training or cls.default_training(preset, domain)
        layers = cls.default_lora(model, preset).layers
        lora = lora or cls.default_lora(model, preset)
        made = prepare(
            model,
            tokenizer,
            concept,
            config,
            training,
            forget_texts=forget_texts,
            retain_texts=retain_texts,
            weak=weak,
            cache_dir=cache_dir,
        )
        return fit_eraser(
            cls,
            model,
            config=made.config,
            spec=lora if lora.layers is not None else replace(lora, layers=layers),
            terms=made.terms(training, pad=pad_id(tokenizer), width=vocabulary(model)),
            training=training,
            report=made.report,
        )
