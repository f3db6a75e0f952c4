"""EMBER: take a concept's sparse factors out of its tokens' embeddings.

The embeddings of some tokens are factorised, ``E - mean ~ G F`` with few codes a token (the winners) and none negative;
factors that are much larger on the concept's tokens than on others are the concept's, and are taken away there:

    e_i <- e_i - delta sum_{j in K} g_ij f_j        for the concept's tokens i only

Paper: Suslik, Shafran and Geva 2026, arXiv:2606.03695, and its code. Edits of MLPs (PISCES) leave a concept's name
readable at the input, from where training finds the rest again; the two go together in one call,
``PiscesEraser.fit(..., embeddings=True)``. Deviations: the tokens come from the concept's names and entities, and
factors are chosen by the ratio alone, where the paper asks a language model for both; the tokens factorised are the
concept's, those of its neighbours, the nearest others and some drawn at random, instead of a vocabulary list; a mean is
taken out first. Where input and output embeddings are one tensor, the head gets a copy of its own, so that only
reading changes (``tied="both"`` changes writing too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.edit import Patch, base_fingerprint
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import ShapeError
from concept_erasure.sae._embedding_edit import (
    _PARTS,
    EmbeddingOptions,
    Tied,
    embedding_patches,
    fit_rows,
)
from concept_erasure.sae._sparse_eraser import SparseEraser, check_no_edits
from concept_erasure.sites import Space, model_id

__all__ = ["EmbeddingEditConfig", "EmbeddingEditEraser", "EmbeddingOptions"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingEditConfig(EraserConfig):
    """Options of the fit.

    Attributes:
        concept: Name of what was erased.
        options: See `EmbeddingOptions`.
        seed: Of the other tokens and the factorisation.
    """

    concept: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, repr=False, eq=False)
class EmbeddingEditEraser(SparseEraser):
    """Changed rows of the token embeddings, see `fit`.

    ``weights`` holds ``embedding.rows`` ``(r,)``, ``embedding.original`` and ``embedding.change`` ``(r, d)``.

    Example:
        >>> eraser = EmbeddingEditEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "embedding-edit"
    config_type: ClassVar[type[EraserConfig]] = EmbeddingEditConfig

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        rank: int = 64,
        k: int = 4,
        ratio: float = 2.0,
        delta: float = 1.0,
        near: int = 10,
        iterations: int = 50,
        tied: Tied = "untie",
        tokens: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit the edit; the model is left bit-identical. No text is read and no forward pass made.

        Args:
            model: A model with token embeddings.
            tokenizer: Its tokenizer.
            concept: Its names and entities say which tokens; those of its neighbours are kept apart.
            rank: Factors, at most.
            k: Factors of a token, at most. Higher takes more of a token's embedding.
            ratio: How much larger a factor must be on the concept's tokens. Higher takes fewer factors.
            delta: Share that is taken away; above 1 overshoots.
            near: Nearest other tokens looked at for each token.
            iterations: Of the factorisation.
            tied: What to do where input and output embeddings are one tensor, see the module; ``"refuse"`` raises.
            tokens: Ids to edit instead.
            seed: Of the other tokens and the factorisation.

        Returns:
            The eraser. Its report has the tokens edited and left alone, the factors, and the share of the embeddings'
            norm that was removed.

        Raises:
            ValueError: If no factor tells the concept's tokens from others.
            EditError: If an edit is in force, or the embeddings are tied and that is refused.
        """
        check_no_edits(model)
        options = EmbeddingOptions(
            rank=rank, k=k, ratio=ratio, delta=delta, near=near, iterations=iterations, tied=tied,
            tokens=None if tokens is None else tuple(tokens),
        )  # fmt: skip
        weights, report = fit_rows(model, tokenizer, concept, options, seed=seed)
        width = weights["embedding.change"].shape[1]
        space = Space(model_id(model), base_fingerprint(model), "embedding", "all", width)
        config = EmbeddingEditConfig(concept=concept.name, options=asdict(options), seed=seed)
        return cls(weights, config=config, space=space, report=report)

    def _patches(self, model: nn.Module) -> list[Patch]:
        return embedding_patches(model, self.weights)

    def _check(self) -> None:
        if set(self.weights) != set(_PARTS):
            raise ShapeError(f"the tensors must be {', '.join(_PARTS)}; got {sorted(self.weights)}")
        rows, original, more, _ = (self.weights[name] for name in _PARTS)
        if original.shape != more.shape or len(rows) != len(more):
            raise ShapeError(
                f"{len(rows)} rows need as many embeddings; got {tuple(original.shape)} and {tuple(more.shape)}"
            )

    def __repr__(self) -> str:
        where = "bare tensors" if self.space is None else self.space.model
        return (
            f"EmbeddingEditEraser({len(self.weights['embedding.rows'])} tokens; fitted on {where})"
        )
