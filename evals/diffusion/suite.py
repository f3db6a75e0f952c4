"""A suite: rows to draw, who judges them, and what one reads off the pictures of one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from concept_erasure.evals.diffusion.erase_eval import Views
from concept_erasure.evals.diffusion.generate import Row
from concept_erasure.evals.diffusion.judges import Judge, Matcher
from concept_erasure.evals.language.statistics import share
from concept_erasure.report import Interval

__all__ = ["KINDS", "Reading", "Suite"]

KINDS = {
    "erased": "the target by its name",
    "synonym": "the target by other names and wordings",
    "neighbour": "near things that must stay",
    "kept": "unrelated things that must stay",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """What to draw and how to judge it.

    Attributes:
        name: Heading of the report.
        targets: Labels of the judge that must not be seen.
        rows: Each with a ``kind`` of `KINDS` and the label that its prompt asks for as ``concept``.
        judge: Names what is seen.
        matcher: Fits pictures to texts; None leaves CLIP scores, CMMD and EraseEval out.
        caption: Vectors of what else is in pictures ``(n, 3, h, w)``, shape ``(n, a)``, for EraseEval.
        real: Real pictures for rows, uint8, for EraseEval.
        chance: Accuracy of blind guessing; default one over the number of labels.

    Raises:
        ValueError: If there is no row of kind ``erased``, a kind is unknown, or a concept or target is no label.
    """

    name: str
    targets: tuple[str, ...]
    rows: tuple[Row, ...]
    judge: Judge
    matcher: Matcher | None = None
    caption: Callable[[Tensor], Tensor] | None = None
    real: Callable[[Sequence[Row]], Tensor] | None = None
    chance: float = field(default=0.0)

    def __post_init__(self) -> None:
        kinds = {row.kind for row in self.rows}
        if "erased" not in kinds or not kinds <= set(KINDS):
            raise ValueError(
                f"rows need kinds among {', '.join(KINDS)}, at least one 'erased'; got {sorted(map(str, kinds))}"
            )
        named = {row.concept for row in self.rows} | set(self.targets)
        if unknown := sorted(str(name) for name in named - set(self.judge.labels)):
            raise ValueError(f"{self.judge.name} has no label {', '.join(unknown[:5])}")
        if not self.chance:
            object.__setattr__(self, "chance", 1 / len(self.judge.labels))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of rows that there are, in the order of `KINDS`."""
        there = {row.kind for row in self.rows}
        return tuple(kind for kind in KINDS if kind in there)

    def of_kind(self, *kinds: str) -> list[int]:
        """Return the numbers of the rows of some kinds."""
        return [i for i, row in enumerate(self.rows) if row.kind in kinds]

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Judge the pictures of all rows.

        Args:
            images: Shape ``(rows, 3, h, w)``, uint8.

        Raises:
            ValueError: If their number is another.
        """
        if len(images) != len(self.rows):
            raise ValueError(
                f"{len(self.rows)} rows need as many pictures, got {len(images)}; draw them all"
            )
        labels = list(self.judge.labels)
        seen = self.judge.probabilities(images)
        asked = torch.tensor(
            [labels.index(str(row.concept)) for row in self.rows], device=seen.device
        )
        first = seen.argmax(1)
        aims = torch.tensor([labels.index(target) for target in self.targets], device=seen.device)
        embedding = fit = None
        if self.matcher is not None:
            embedding = self.matcher.embed_images(images)
            texts = self.matcher.embed_texts([row.prompt for row in self.rows])
            fit = (embedding * texts.to(embedding)).sum(1).cpu()
        return Reading(
            images=images,
            hits=(first == asked).cpu(),
            shows=torch.isin(first, aims).cpu(),
            probability=seen.gather(1, asked[:, None])[:, 0].float().cpu(),
            features=self.judge.features(images).cpu(),
            embedding=None if embedding is None else embedding.cpu(),
            fit=fit,
            caption=None if self.caption is None else self.caption(images).cpu(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What is known of the pictures of one pipeline, a row of the suite each.

    Attributes:
        images: Shape ``(n, 3, h, w)``, uint8.
        hits: Whether the judge's first label is the one asked for, shape ``(n,)``.
        shows: Whether its first label is a target, shape ``(n,)``.
        probability: Of the label asked for, shape ``(n,)``.
        features: Shape ``(n, d)``.
        embedding: Of the matcher, shape ``(n, e)``, or None.
        fit: Cosines with the prompts, shape ``(n,)``, or None.
        caption: Shape ``(n, a)``, or None.
    """

    images: Tensor
    hits: Tensor
    shows: Tensor
    probability: Tensor
    features: Tensor
    embedding: Tensor | None = None
    fit: Tensor | None = None
    caption: Tensor | None = None

    def accuracy(self, rows: Sequence[int]) -> Interval:
        """Return the share of hits among some rows with its Wilson interval."""
        return share(self.hits[list(rows)].tolist())

    def take(self, source: Reading, rows: Tensor) -> Reading:
        """Return a copy in which some rows come from another reading of the same suite.

        Args:
            source: The other reading.
            rows: Which rows, shape ``(n,)``, bool.
        """

        def mix(own: Tensor | None, other: Tensor | None) -> Tensor | None:
            if own is None or other is None:
                return None
            return torch.where(rows.view(-1, *[1] * (own.ndim - 1)), other, own)

        names = (
            "images",
            "hits",
            "shows",
            "probability",
            "features",
            "embedding",
            "fit",
            "caption",
        )
        mixed = {name: mix(getattr(self, name), getattr(source, name)) for name in names}
        return Reading(**mixed)  # type: ignore[arg-type]  # the required ones are never None

    def views(self, suite: Suite, *kinds: str) -> Views | None:
        """Return what EraseEval needs of some kinds of rows; None if parts are missing.

        Args:
            suite: The suite of the reading.
            kinds: Kinds of rows.
        """
        groups: dict[str, list[int]] = {}
        for i in suite.of_kind(*kinds):
            groups.setdefault(suite.rows[i].prompt, []).append(i)
        if self.embedding is None or self.fit is None or self.caption is None or not groups:
            return None
        # A sentence may have been drawn twice: as many pictures of each as of the rarest.
        count = min(map(len, groups.values()))
        index = torch.tensor([group[:count] for group in groups.values()])
        return Views(self.shows[index], self.caption[index], self.embedding[index], self.fit[index])
