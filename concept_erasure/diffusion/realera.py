"""RealEra: erase the neighbourhood of a concept in embedding space, and hold what lies just beyond it.

The closed-form phase (2024 preprint): embeddings drawn near the concept are paired with its anchor, embeddings drawn
outside that neighbourhood are preserved. The LoRA phase that follows in the paper trains a model and is left out.

Reconstruction: there is no public code, and the paper's radius, cosine bounds, outer bound and numbers of samples are
not known to us, so there is no ``preset="paper"``. All are chosen from data here (`fit_bands`):

* the neighbourhood reaches from a cosine just below one down to the farthest of the concept's own paraphrases that is
  nearer than unrelated words are (their median);
* beyond it lies the next band, down to that median.

Samples are drawn directly, because in many dimensions a random direction is almost orthogonal to any other and
rejection would waste nearly all draws: ``e' = |e| (s e/|e| + sqrt(1-s^2) u)`` with ``s ~ U[S1, S2]`` and u a
random unit vector orthogonal to e. Then ``|e'-e| = |e| sqrt(2-2s)``: the radius D1 and the bound S1 are one parameter.
On average the samples shrink *every* direction towards the anchor by ``(1-s^2)/(d-1) |e|^2``; that is why the beyond
set is indispensable, and why ``span="paraphrases"`` (u from the differences of real paraphrases) is offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric
from concept_erasure.diffusion.encode import BlankAnchor
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.prepare import Texts, reads_pooled
from concept_erasure.diffusion.templates import check_templates
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import names_of
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.linalg import statistics_dtype

__all__ = [
    "Bands",
    "RealEraConfig",
    "RealEraEraser",
    "fit_bands",
    "on_norm_output",
    "sample_neighbours",
]

Span = Literal["all", "paraphrases"]
PARAPHRASES = (
    "a photo of {}",
    "a picture of {}",
    "a painting of {}",
    "the style of {}",
    "a story about {}",
    "a drawing by {}",
)  # the name comes last: what is read is its last token
UNRELATED = (
    "chair", "river", "bread", "music", "window", "horse", "mountain", "letter", "garden", "car", "sugar", "teacher",
    "bridge", "rain", "shoe", "candle", "forest", "clock", "train", "shirt", "stone", "kitchen", "ocean", "paper",
)  # fmt: skip
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
    """Choose the bands from data; paraphrases farther off than unrelated words (median) do not count.

    Args:
        concept: Embedding of the concept, shape ``(d,)``.
        paraphrases: Embeddings of the same concept said otherwise, shape ``(p, d)``.
        unrelated: Embeddings of other things, shape ``(m, d)``.

    Raises:
        ShapeError: If shapes disagree or a set is empty.
        ValueError: If no paraphrase is nearer than unrelated words, so that no band separates them.
    """
    for name, rows in (("paraphrases", paraphrases), ("unrelated", unrelated)):
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != concept.shape[-1]:
            raise ShapeError(
                f"{name} must be (n, {concept.shape[-1]}), n > 0; got {tuple(rows.shape)}"
            )
    cosines = _cosines(concept, paraphrases)
    far = float(_cosines(concept, unrelated).median())
    if float(cosines.max()) <= far:
        raise ValueError(
            f"the nearest paraphrase has cosine {float(cosines.max()):.3f} with the concept, unrelated words {far:.3f} "
            "(median): no neighbourhood separates them. Give nearer paraphrases, or bands=Bands(...)"
        )
    near = float(cosines[cosines > far].min())
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


@dataclass(frozen=True, kw_only=True)
class RealEraConfig(DiffusionConfig):
    """Options of the fit, see `RealEraEraser.fit`; ``bands`` has a row (nearest, near, far) for each concept."""

    samples: int = 100
    beyond: int = 200
    bands: tuple[tuple[float, ...], ...] = ()
    span: Span = "all"
    erase_weight: float = 1.0
    neighbour_weight: float = 1.0
    preserve_weight: float = 1.0
    beyond_weight: float = 1.0
    blank_anchor: BlankAnchor = "sot"
    seed: int = 0
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        DiffusionConfig.__post_init__(self)
        object.__setattr__(self, "bands", tuple(tuple(row) for row in self.bands))
        for name in ("samples", "beyond"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be a whole number from 1; got {getattr(self, name)!r}"
                )
        if self.span not in get_args(Span):
            raise ValueError(f"span must be 'all' or 'paraphrases'; got {self.span!r}")


@dataclass(frozen=True, repr=False, eq=False)
class RealEraEraser(DiffusionEraser):
    """The closed-form edit of RealEra, see `DiffusionEraser` for its tensors and `fit` for how it is made."""

    method: ClassVar[str] = "realera"
    config_type: ClassVar[type[EraserConfig]] = RealEraConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str = "",
        preserve: Sequence[str] | str | Preserve | None = None,
        paraphrases: Sequence[str] = PARAPHRASES,
        unrelated: Sequence[str] = UNRELATED,
        bands: Bands | None = None,
        samples: int = 100,
        beyond: int = 200,
        span: Span = "all",
        lam: float = 0.5,
        erase_weight: float = 1.0,
        neighbour_weight: float = 1.0,
        preserve_weight: float = 1.0,
        beyond_weight: float = 1.0,
        blank_anchor: BlankAnchor = "sot",
        hold_blank: bool = True,
        maps: Sequence[str] = ("key", "value"),
        pooled: bool | None = None,
        seed: int = 0,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit the edit; the pipeline is left bit-identical.

        Args:
            pipe: The pipeline.
            erase: Concepts; the last subject token of each is the centre of its neighbourhood.
            anchor: What each and its neighbours become, or all.
            preserve: Names to keep, or a `Preserve` set collected before.
            paraphrases: Templates with one ``{}``, the name last: the farthest ends the neighbourhood.
            unrelated: Words whose median cosine ends the beyond band.
            bands: The bands themselves instead, for all concepts.
            samples: Neighbours drawn for each concept.
            beyond: Embeddings drawn beyond each neighbourhood, to be preserved.
            span: ``"paraphrases"`` draws neighbours only along the differences of real paraphrases.
            lam: Ridge that holds everything else.
            erase_weight: Of each concept.
            neighbour_weight: Of all neighbours of a concept together.
            preserve_weight: Of each preserved name.
            beyond_weight: Of all samples beyond a concept together.
            blank_anchor: Where the blank prompt is read as an anchor of a subject token.
            hold_blank: Whether the blank prompt stays exactly.
            maps: ``"key"``, ``"value"`` or both.
            pooled: Edit the pooled vector too (concepts only); default if the denoiser reads one.
            seed: Of the draws.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`, or no band separates a concept's
                paraphrases from unrelated words.
            ShapeError: If the numbers of concepts and anchors differ.
            EditError: If the pipeline cannot be edited.
        """
        texts = Texts.read(
            pipe,
            erase,
            anchor,
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        centers = texts.pairs(TokenRule.LAST_SUBJECT, erase_weight, blank_anchor=blank_anchor)
        said = _paraphrases(texts, paraphrases)
        if bands is None:
            other = torch.cat(
                texts.encoder.rows(names_of(unrelated, "unrelated"), TokenRule.LAST_SUBJECT)
            )
            found = [
                fit_bands(*both, other) for both in zip(_centers(centers, texts), said, strict=True)
            ]
        else:
            found = [bands] * len(texts.erase)
        config = RealEraConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            samples=samples,
            beyond=beyond,
            bands=tuple((band.nearest, band.near, band.far) for band in found),
            span=span,
            erase_weight=erase_weight,
            neighbour_weight=neighbour_weight,
            preserve_weight=preserve_weight,
            beyond_weight=beyond_weight,
            blank_anchor=blank_anchor,
            seed=seed,
            max_sequence_length=max_sequence_length,
        )
        near, far = _drawn(centers, said, config)
        kept, blank = texts.rows(texts.preserve, TokenRule.LAST_SUBJECT), texts.blank()
        gram = texts.gram(kept, preserve_weight).update(far, beyond_weight / beyond)
        soft = metric(gram, width=texts.width, lam=lam, invariants=blank if hold_blank else None)
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if reads_pooled(pipe) if pooled is None else pooled:
            second = texts.pooled(erase_weight, preserve_weight, lam, hold_blank=hold_blank)
        return fit_eraser(
            cls,
            pipe,
            Pairs.cat([centers, near]),
            soft,
            config=config,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=kept,
            blank=blank,
            report={"beyond_rows": len(far)},
        )

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        raise EditError("a new concept needs a beyond set of its own in the metric; fit again")


def _paraphrases(texts: Texts, templates: Sequence[str]) -> list[Tensor]:
    """Return each concept's last token in each template, ``(p, d)`` a concept."""
    checked = check_templates(templates)
    if wrong := [text for text in checked if not text.endswith("{}")]:
        raise ValueError(f"the name must come last in a paraphrase; got {wrong[0]!r}")
    prompts = [text.format(name) for name in texts.erase for text in checked]
    rows = torch.stack([row[-1] for row in texts.encoder.rows(prompts, TokenRule.LAST_SUBJECT)])
    return list(rows.reshape(len(texts.erase), len(checked), -1))


def _centers(centers: Pairs, texts: Texts) -> list[Tensor]:
    """Return one row for each concept; of several segments (SD 3) the last counts."""
    number = cast("Tensor", centers.concept)
    return [centers.source[number == i][-1] for i in range(len(texts.erase))]


def _drawn(centers: Pairs, said: Sequence[Tensor], config: RealEraConfig) -> tuple[Pairs, Tensor]:
    """Return the pairs of the neighbours, and what was drawn beyond them, for every row of the concepts."""
    generator = torch.Generator().manual_seed(config.seed)
    number = cast("Tensor", centers.concept)
    pairs: list[Pairs] = []
    far: list[Tensor] = []
    for row, instead, i in zip(centers.source, centers.target, number.tolist(), strict=True):
        nearest, near, outer = config.bands[i]
        options: dict[str, Any] = {"generator": generator}
        along = said[i] - row if config.span == "paraphrases" else None
        found = sample_neighbours(row, config.samples, near, nearest, span=along, **options)
        weight = config.neighbour_weight / config.samples
        pairs.append(Pairs(found, instead.expand_as(found), weight).numbered(i))
        far.append(sample_neighbours(row, config.beyond, outer, near, **options))
    return Pairs.cat(pairs), torch.cat(far)
