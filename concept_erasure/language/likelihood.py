"""How likely a model finds texts: what gradient ascent, NPO, SimNPO and their retain terms share.

``nll`` is the sum ``- sum_j log p(y_j | x, y_<j)`` over the supervised tokens of a text, ``|y|`` their number. Tokens
that are not supervised and padding do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from concept_erasure.concept import Concept
from concept_erasure.language._texts import forget_and_retain
from concept_erasure.language.batches import (
    Batch,
    Batches,
    Encoded,
    Head,
    chunked,
    collate,
    encode,
    hidden_at,
    pad_id,
)
from concept_erasure.language.eraser import LanguageConfig
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw
from concept_erasure.language.targets import kl
from concept_erasure.sites import find_sites

__all__ = [
    "Corpora",
    "LikelihoodConfig",
    "Preset",
    "Retain",
    "block_weights",
    "chosen",
    "divergence",
    "parameters_to_train",
    "reference_nll",
    "retain_term",
    "sequence_nll",
    "token_nll",
]

Preset = Literal["default", "paper"]
Retain = Literal["nll", "kl"]


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(LanguageConfig):
    """Options that methods on the likelihood of texts share.

    Attributes:
        forget_weight: Factor of the forget term.
        retain_weight: Factor of the retain term.
        retain: Kind of the retain term, see `retain_term`.
    """

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain: Retain = "kl"

    def __post_init__(self) -> None:
        if not (self.forget_weight > 0 and self.retain_weight >= 0):
            raise ValueError(
                "forget_weight must be positive and retain_weight at least 0; got "
                f"{self.forget_weight} and {self.retain_weight}"
            )
        if self.retain not in get_args(Retain):
            raise ValueError(f"retain must be 'nll' or 'kl'; got {self.retain!r}")


# -- equations --------------------------------------------------------------------------------------


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return ``- log p(token)`` of the supervised tokens, shape ``(N,)``; logits are made in chunks."""
    tokens = batch.tokens

    def loss(logits: Tensor, where: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), tokens[where], reduction="none")

    return chunked(loss, hidden_at(model, batch), Head(model), vocabulary=vocabulary(model))


def sequence_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of each text, *summed* over its supervised tokens, shape ``(B,)``."""
    return batch.per_sequence(token_nll(model, batch))


@torch.no_grad()
def reference_nll(model: nn.Module, texts: Sequence[Encoded], *, batch_size: int) -> Tensor:
    """Return `sequence_nll` of all texts under the model as it is now, shape ``(n,)``.

    Texts of like length share a batch. The model has to be in evaluation mode, as inside a parameterisation.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    values = torch.empty(len(texts), device=device)
    for start in range(0, len(order), batch_size):
        batch = collate(texts, order[start : start + batch_size], pad_id=0).to(device)
        values[batch.rows] = sequence_nll(model, batch).float()
    return values


def divergence(model: nn.Module, batch: Batch, parameterisation: Parameterisation) -> Tensor:
    """Return ``KL(p_0 || p_th)`` where the supervised tokens are predicted, shape ``(N,)``.

    Neither side's logits are ever held for all positions.
    """
    head = Head(model)
    with parameterisation.reference(), torch.no_grad():
        frozen = hidden_at(model, batch)

    def loss(logits: Tensor, where: Tensor) -> Tensor:
        with parameterisation.reference(), torch.no_grad():
            log_p = head(frozen[where]).float().log_softmax(-1)
        return kl(log_p, logits.float().log_softmax(-1))

    return chunked(loss, hidden_at(model, batch), head, vocabulary=vocabulary(model))


def retain_term(
    kind: Retain, weight: float, batches: Batches, parameterisation: Parameterisation
) -> Term:
    """Return what holds a model on texts to retain, a mean over their supervised positions.

    Args:
        kind: ``"nll"``, the likelihood of the texts, or ``"kl"``, ``KL(p_0 || p_th)``: on texts the model wrote itself
            the same gradient in expectation, but zero at the start, with less variance and no pull to learn the texts.
        weight: Factor of the term.
        batches: The texts.
        parameterisation: Gives the frozen model.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if kind == "nll":
            return token_nll(model, batch).sum()
        return divergence(model, batch, parameterisation).sum()

    return Term("retain", weight, batches, loss)


# -- what a fit starts from -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Corpora:
    """Texts to forget and to retain, as batches.

    Attributes:
        forget: The first.
        retain: The second; None if they have no weight.
    """

    forget: Batches
    retain: Batches | None

    @classmethod
    def read(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        forget_texts: Sequence[str] | None,
        retain_texts: Sequence[str] | None,
        *,
        training: Training,
        retain_weight: float,
        cache_dir: str | Path | None = None,
    ) -> Corpora:
        """Return the texts that are given, else the concept's, else the model's own.

        Raises:
            ValueError: If there is nothing to forget, nothing to retain though it has a weight, or a text is shorter
                than two tokens.
        """
        if forget_texts is not None and len(forget_texts) == 0:
            raise ValueError("forget_texts is empty; give texts, or None for those of the concept")
        if retain_weight and retain_texts is not None and len(retain_texts) == 0:
            raise ValueError(
                f"the retain term has weight {retain_weight:g} but retain_texts is empty; give texts, None for "
                "those of the concept, or retain_weight=0"
            )
        forget, retain = forget_and_retain(
            model,
            tokenizer,
            concept,
            forget_texts,
            retain_texts if retain_weight else (),
            seed=training.seed,
            cache_dir=cache_dir,
        )

        def batches(texts: Sequence[str], seed: int) -> Batches:
            made = encode(tokenizer, texts, max_length=training.max_length)
            return Batches(made, training.batch_size, seed=seed, pad_id=pad_id(tokenizer))

        return cls(
            batches(forget, training.seed),
            # another order than the forget texts', which may be as many
            batches(retain, training.seed + 1) if retain_weight else None,
        )

    def terms(
        self, forget: Term, config: LikelihoodConfig, parameterisation: Parameterisation
    ) -> list[Term]:
        """Return the forget term and, if it has a weight, the retain term."""
        if self.retain is None:
            return [forget]
        held = retain_term(config.retain, config.retain_weight, self.retain, parameterisation)
        return [forget, held]

    @property
    def mean_length(self) -> float:
        """Mean number of supervised tokens of a text to forget."""
        return sum(text.count for text in self.forget.texts) / len(self.forget.texts)


def chosen(
    given: Mapping[str, object], presets: Mapping[str, Mapping[str, Any]], preset: str
) -> dict[str, Any]:
    """Return the options of a preset, with those that are given (not None) in their place.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}; got {preset!r}")
    said = {name: value for name, value in given.items() if value is not None}
    return {**presets[preset], **said}


def block_weights(model: nn.Module) -> Raw:
    """Return all parameters of the transformer blocks: full fine-tuning but for embeddings and head.

    These two stay: they are often one tensor, and tied tensors are refused.
    """
    first = find_sites(model)["residual.0"].module
    return Raw(patterns=(f"{first.rpartition('.')[0]}.*",))


def parameters_to_train(lora: Lora | None, raw: Raw | None, default: Lora | Raw) -> Lora | Raw:
    """Return the one that is given, else the default.

    Raises:
        ValueError: If both are given.
    """
    if lora is not None and raw is not None:
        raise ValueError("give lora= or raw=, not both: one of them says what is trained")
    return lora or raw or default


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of tokens, if the model says."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    return cast("int | None", getattr(text, "vocab_size", None))
