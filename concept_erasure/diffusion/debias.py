"""UCE's second use: find how much of each attribute to add to a concept until pictures show the wanted shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric, solve
from concept_erasure.diffusion.prepare import Texts
from concept_erasure.diffusion.wording import names_of, refuse_overlap
from concept_erasure.errors import ShapeError
from concept_erasure.linalg import LowRankAffine

__all__ = ["Debiasing", "balance"]


def balance(
    measure: Callable[[Tensor], Tensor],
    wanted: Tensor,
    *,
    step: float = 1.0,
    tolerance: float = 0.05,
    rounds: int = 30,
) -> tuple[Tensor, Tensor, int]:
    """Find how much of each attribute to add to each concept, so that measured shares become the wanted ones.

    Args:
        measure: Shares of the attributes, shape ``(n, a)``, from the amounts, of the same shape.
        wanted: Wanted shares, shape ``(n, a)``.
        step: Amount added for an error of one. The authors' script has an option for it but uses 1.
        tolerance: A concept whose largest error is smaller does not move in that round.
        rounds: Largest number of measurements.

    Returns:
        Amounts, the errors measured with them (wanted less measured), and the number of measurements.

    Raises:
        ShapeError: If the measured shares have another shape.
        ValueError: If they are not finite.
    """
    alpha = torch.zeros_like(wanted)
    error = torch.zeros_like(wanted)
    for done in range(1, rounds + 1):
        shares = torch.as_tensor(measure(alpha.clone()), dtype=wanted.dtype, device=wanted.device)
        if shares.shape != wanted.shape:
            raise ShapeError(
                f"measure must return shares of shape {tuple(wanted.shape)}; got {tuple(shares.shape)}"
            )
        if not bool(torch.isfinite(shares).all()):
            raise ValueError("measure returned a share that is not a finite number")
        error = wanted - shares
        frozen = error.abs().amax(1, keepdim=True) < tolerance
        if bool(frozen.all()) or done == rounds:
            return alpha, error, done
        alpha = alpha + step * torch.where(frozen, torch.zeros_like(error), error)
    return alpha, error, 0


@dataclass(frozen=True, eq=False)
class Debiasing:
    """What the rounds share: embeddings, what is held, and what is wanted.

    Attributes:
        source: Embeddings of the concepts, shape ``(n, d)``.
        attributes: Embeddings of the attributes, shape ``(a, d)``.
        wanted: Wanted shares, shape ``(n, a)``.
        gram: What is preserved.
        kept: The preserved embeddings, shape ``(m, d)``, or None.
        blank: Embeddings of the blank prompt.
        weight: Of the concepts.
        lam: Ridge.
        hold_blank: Whether the blank prompt stays exactly.
    """

    source: Tensor
    attributes: Tensor
    wanted: Tensor
    gram: Preserve
    kept: Tensor | None
    blank: Tensor
    weight: float
    lam: float
    hold_blank: bool

    @classmethod
    def of(
        cls,
        texts: Texts,
        attributes: Sequence[str],
        ratios: Sequence[float] | Tensor | None,
        lam: float,
        weight: float,
        preserve_weight: float,
        *,
        hold_blank: bool,
    ) -> Debiasing:
        """Encode what is needed.

        Raises:
            ShapeError: If the shares have another shape.
            ValueError: If shares are not between 0 and 1, or a name is a concept and an attribute.
        """
        words = names_of(attributes, "attributes")
        refuse_overlap(texts.erase, words)
        n, a = len(texts.erase), len(words)
        shares = torch.full((a,), 1 / a) if ratios is None else torch.as_tensor(ratios)
        if shares.shape not in {(a,), (n, a)}:
            raise ShapeError(f"ratios must be ({a},) or ({n}, {a}); got {tuple(shares.shape)}")
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError(f"ratios must lie in 0..1; got {shares.tolist()}")
        source = torch.cat(texts.encoder.rows(texts.erase, "last_subject"))
        added = torch.cat(texts.encoder.rows(words, "last_subject"))
        kept = texts.rows(texts.preserve, "last_subject")
        gram = texts.gram(kept, preserve_weight)
        wanted = shares.to(source).expand(n, a)
        return cls(source, added, wanted, gram, kept, texts.blank(), weight, lam, hold_blank)

    def parts(self, alpha: Tensor) -> tuple[Pairs, Metric]:
        """Return pairs and metric for some amounts, shape ``(n, a)``; a concept with none of any is preserved."""
        moved = (alpha != 0).any(1)
        width = self.source.shape[1]
        still = Preserve(width, device=self.source.device).merge(self.gram)
        still.update(self.source[~moved], self.weight)
        held = self.blank if self.hold_blank else None
        soft = metric(still, width=width, lam=self.lam, invariants=held)
        if not bool(moved.any()):
            return Pairs.empty(width), soft
        target = self.source + alpha.to(self.source) @ self.attributes
        number = moved.nonzero()[:, 0]
        return Pairs(self.source[moved], target[moved], self.weight, number), soft

    def solve(self, alpha: Tensor) -> LowRankAffine | None:
        """Return the edit for some amounts; None if there is nothing to change."""
        pairs, soft = self.parts(alpha)
        return solve(pairs, soft) if len(pairs) else None
