"""RealEra: erase the neighbourhood of a concept in embedding space, and hold what lies just beyond it.

The closed-form phase (2024 preprint): embeddings drawn near the concept are paired with its anchor, embeddings drawn
outside that neighbourhood are preserved. The LoRA phase that follows in the paper trains a model and is left out.

Reconstruction: there is no public code, and the paper's radius, cosine bounds, outer bound and numbers of samples are
not known to us, so there is no ``preset="paper"``. All are chosen from data here (`fit_bands`):

* the neighbourhood reaches from a cosine just below one down to the concept's farthest own paraphrase;
* beyond it lies the next band, down to the median cosine of unrelated words.

Samples are drawn directly, because in many dimensions a random direction is almost orthogonal to any other and
rejection would waste nearly all draws: ``e' = |e| (s e/|e| + sqrt(1-s^2) u)`` with ``s ~ U[S1, S2]`` and u a
random unit vector orthogonal to e. Then ``|e'-e| = |e| sqrt(2-2s)``: the radius D1 and the bound S1 are one parameter.
On average the samples shrink *every* direction towards the anchor by ``(1-s^2)/(d-1) |e|^2``; that is why the beyond
set is indispensable, and why ``span="paraphrases"`` (u from the differences of real paraphrases) is offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.linalg import statistics_dtype

__all__ = ["Bands", "fit_bands", "on_norm_output", "sample_neighbours"]

NEAREST = 0.999  # S2 < 1: at one the samples are the concept itself


@dataclass(frozen=True)
class Bands:
    """Cosine bands around a concept: ``far <= beyond <= near <= nearest``.

    Attributes:
        nearest: Upper bound S2 of the neighbourhood.
        near: Lower bound S1 of the neighbourhood, upper bound of the beyond band.
        far: Lower bound of the beyond band.
    """

    nearest: float
    near: float
    far: float

    def radius(self, norm: float) -> float:
        """Return the distance D1 from an embedding of that norm to the edge of the neighbourhood."""
        return float(norm * (2 - 2 * self.near) ** 0.5)


def fit_bands(concept: Tensor, paraphrases: Tensor, unrelated: Tensor) -> Bands:
    """Choose the bands from data.

    Args:
        concept: Embedding of the concept, shape ``(d,)``.
        paraphrases: Embeddings of the same concept said otherwise, shape ``(p, d)``.
        unrelated: Embeddings of other things, shape ``(m, d)``.

    Raises:
        ShapeError: If shapes disagree or a set is empty.
        ValueError: If the paraphrases are not nearer than unrelated words, so that no band separates them.
    """
    for name, rows in (("paraphrases", paraphrases), ("unrelated", unrelated)):
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != concept.shape[-1]:
            raise ShapeError(
                f"{name} must be (n, {concept.shape[-1]}), n > 0; got {tuple(rows.shape)}"
            )
    near = float(_cosines(concept, paraphrases).min())
    far = float(_cosines(concept, unrelated).median())
    if near <= far:
        raise ValueError(
            f"the farthest paraphrase has cosine {near:.3f} with the concept, unrelated words {far:.3f} (median): "
            "no neighbourhood separates them. Give nearer paraphrases, or bands=Bands(...)"
        )
    return Bands(max(NEAREST, (1 + near) / 2), near, far)


def sample_neighbours(
    concept: Tensor,
    count: int,
    low: float,
    high: float,
    *,
    generator: torch.Generator,
    span: Tensor | None = None,
) -> Tensor:
    """Draw embeddings whose cosine with the concept is uniform in ``[low, high]`` and whose norm is the concept's.

    Args:
        concept: Shape ``(d,)``, not zero.
        count: Number of samples.
        low: Smallest cosine.
        high: Largest cosine.
        generator: Source of randomness, on the CPU, so that devices agree.
        span: Rows ``(p, d)``; directions are drawn in their span. None: in all dimensions.

    Returns:
        Shape ``(count, d)``, float64.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If the concept is zero, the band is none, or the span holds nothing but the concept.
    """
    if concept.ndim != 1 or (
        span is not None and (span.ndim != 2 or span.shape[1] != len(concept))
    ):
        raise ShapeError(f"concept must be (d,) and span (p, d); got {tuple(concept.shape)}")
    if count < 0 or not -1 <= low <= high <= 1:
        raise ValueError(f"need count >= 0 and -1 <= low <= high <= 1; got {count}, {low}, {high}")
    center = concept.detach().to(statistics_dtype(concept.device))
    norm = center.norm()
    if not bool(torch.isfinite(center).all()) or float(norm) == 0:
        raise ValueError("the concept's embedding is zero or not finite")
    unit = center / norm
    width = len(unit) if span is None else len(span)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64).to(unit)
    if span is not None:
        rows = span.detach().to(unit)
        rows = rows - (rows @ unit)[:, None] * unit
        if float(rows.norm()) <= 1e-9 * float(span.norm()):
            raise ValueError("the span holds nothing but the concept; give other directions")
        noise = noise @ rows
    for _ in range(2):  # twice is enough: the second pass removes the rounding of the first
        noise = noise - (noise @ unit)[:, None] * unit
    side = noise / noise.norm(dim=1, keepdim=True)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(unit)
    cosine = (low + (high - low) * drawn)[:, None]
    drawn_near: Tensor = norm * (cosine * unit + (1 - cosine**2).clamp_min(0).sqrt() * side)
    return drawn_near


def on_norm_output(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Return the nearest rows, in the norm's own scale, that a LayerNorm with this gain and bias can put out.

    Outputs of an encoder that ends in a LayerNorm lie on an ellipsoid; samples do not. Cosines move a little.

    Args:
        x: Shape ``(n, d)``.
        gain: Shape ``(d,)``, nowhere zero.
        bias: Shape ``(d,)``.

    Raises:
        ValueError: If the gain is zero somewhere.
    """
    if bool((gain == 0).any()):
        raise ValueError("the norm's gain is zero somewhere, so its outputs fill no ellipsoid")
    plain = (x - bias.to(x)) / gain.to(x)
    plain = plain - plain.mean(-1, keepdim=True)
    return plain / plain.pow(2).mean(-1, keepdim=True).sqrt() * gain.to(x) + bias.to(x)


def _cosines(concept: Tensor, rows: Tensor) -> Tensor:
    dtype = statistics_dtype(rows.device)
    return torch.nn.functional.cosine_similarity(rows.to(dtype), concept.to(dtype)[None], dim=1)
