"""A copy of the model that has read the concept's texts too often: WHP's reinforced model, ELM's strong expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from concept_erasure.language.batches import Batch, Batches, Encoded
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser
from concept_erasure.language.likelihood import token_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Raw

__all__ = ["Reinforced", "reinforce"]


class Reinforced(LanguageEraser):
    """The change of weights that makes the reinforced copy; the opposite of an eraser, in its form."""

    method: ClassVar[str] = "reinforced"


def reinforce(
    model: nn.Module,
    texts: Sequence[Encoded],
    *,
    training: Training,
    spec: Lora | Raw | None = None,
    pad: int = 0,
) -> Reinforced:
    """Train a small adapter on the likelihood of texts, beyond what would generalise; the model stays as it is.

    Args:
        model: The model.
        texts: Texts of the concept.
        training: Options of the loop.
        spec: What to train; default an adapter on all layers.
        pad: Any token.

    Returns:
        What has to be applied to the model for it to be the copy.
    """
    batches = Batches(texts, training.batch_size, seed=training.seed, pad_id=pad)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return token_nll(model, batch).sum()

    return fit_eraser(
        Reinforced,
        model,
        config=LanguageConfig(concept="reinforced"),
        spec=spec or Lora(),
        terms=[Term("forget", 1.0, batches, loss)],
        training=training,
    )
