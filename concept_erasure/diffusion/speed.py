"""SPEED: move concepts to their anchors only in directions that nothing to be kept uses.

The retained embeddings' Gram matrix is eigen-decomposed; the edit lives where its eigenvalues are below ``tau``, with
the blank prompt's embeddings as exact invariants (IEC). What is retained is first chosen by influence (IPF: only what
an edit without any protection would move more than the average), then surrounded by drawn neighbours (DPA: along the
direction that the weights see least).

Paper: Li et al., ICLR 2026, arXiv:2503.07392. Identical to the published expression, but symmetric, of the size of the
pairs, and without a singular value decomposition of any weight: with P2 the projector,
``dW = W A (C^T P2 C + s n I)^-1 C^T P2``.

Presets. ``preset="paper"`` filters and augments for each layer by itself (``scope="layer"``), holds the start token and
three k-means centroids of the blank prompt, and takes an absolute ``tau``. The default measures influence over all
edited layers together (``scope="shared"``), so that one edit of the embeddings serves all of them, which can be
attached as a hook, certified, extended and reduced; holds all of the blank prompt; and takes ``tau`` relative to the
largest eigenvalue, since embeddings of other encoders have other sizes (1e-4 is about the paper's 0.1 for CLIP-L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, Preserve, metric, solve, text_gram
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.prepare import Preset, Texts, chosen_options, reads_pooled
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.diffusion.wording import Task, drop_mentions, names_of
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import ShapeError
from concept_erasure.linalg import LowRankAffine

__all__ = [
    "Filter",
    "SpeedConfig",
    "SpeedEraser",
    "blank_invariants",
    "filtered_gram",
    "influence",
    "probe_edit",
    "smallest_directions",
    "solve_means",
]

Scope = Literal["shared", "layer"]
E = TypeVar("E", bound="SpeedEraser")

DEFAULTS: dict[str, Any] = {
    "anchor": "",
    "rule": "last_subject",
    "scale": 1.0,
    "invariant_ridge": 0.0,
    "filtering": True,
    "augment": 10,
    "scope": "shared",
    "centroids": None,
    "drop_mentions": False,
}
_PUBLISHED: dict[str, Any] = {
    "tau": 0.1,
    "scope": "layer",
    "centroids": 3,
    "drop_mentions": True,
}
PAPER: dict[Task, dict[str, Any]] = {
    "object": _PUBLISHED,
    "style": {**_PUBLISHED, "anchor": "art"},
    "celebrity": {
        **_PUBLISHED,
        "anchor": "person",
        "tau": 1e-4,
        "scale": 0.05,
        "filtering": False,
    },
    "unsafe": {**_PUBLISHED, "rule": "all_but_sot", "scale": 0.7, "invariant_ridge": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(DiffusionConfig):
    """Options of the fit, see `SpeedEraser.fit`."""

    maps: tuple[str, ...] = ("value",)
    scale: float = 1.0
    filtering: bool = True
    augment: int = 10
    scope: Scope = "shared"
    centroids: int | None = None
    seed: int = 0
    preset: Preset | None = None
    task: Task | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Filter:
    """How retained embeddings are chosen and surrounded.

    Attributes:
        above: Keep what has more than this multiple of the mean influence; None keeps all.
        augment: Neighbours drawn for each.
        directions: Number of least-seen directions they are drawn along.
    """

    above: float | None = 1.0
    augment: int = 10
    directions: int = 1


def solve_means(pairs: Pairs, metric: Metric, concepts: int) -> LowRankAffine:
    """Solve with means over concepts instead of sums, as the paper's ``s`` expects."""
    scaled = Pairs(pairs.source, pairs.target, pairs.weights / concepts, pairs.concept)
    return solve(scaled, metric)


def probe_edit(pairs: Pairs, concepts: int) -> LowRankAffine:
    """Return the edit that erases and protects nothing, ``(U - T)(I + T)^-1``: its effect is influence."""
    return solve_means(pairs, metric(None, width=pairs.width, lam=1.0), concepts)


def influence(rows: Tensor, probe: LowRankAffine, weight: Tensor) -> Tensor:
    """Return how much the unprotected edit would change outputs, ``|W E p|``, shape ``(m,)``.

    Args:
        rows: Retained embeddings p, shape ``(m, d)``.
        probe: `probe_edit`.
        weight: Shape ``(out, d)``; for several layers any root of their `text_gram`.
    """
    seen = weight.to(rows) @ probe.left.to(rows)
    coordinates = rows @ probe.right.to(rows)
    return ((coordinates @ (seen.T @ seen)) * coordinates).sum(1).clamp_min(0).sqrt()


def smallest_directions(weight: Tensor, count: int) -> Tensor:
    """Return the right singular vectors of the smallest of the ``min(out, d)`` singular values, shape ``(d, count)``.

    As in the authors' code: of a wide matrix, not vectors of its null space.
    """
    out, d = weight.shape
    if not 1 <= count <= min(out, d):
        raise ValueError(f"directions must be in 1..{min(out, d)}; got {count}")
    if out >= d:
        vectors: Tensor = torch.linalg.eigh(weight.T @ weight)[1]
        return vectors[:, :count]
    left = torch.linalg.eigh(weight @ weight.T)[1][:, :count]
    return torch.nn.functional.normalize(weight.T @ left, dim=0)


def filtered_gram(
    rows: Tensor,
    probe: LowRankAffine,
    weight: Tensor,
    options: Filter,
    *,
    seed: int = 0,
    draws: Tensor | None = None,
) -> tuple[Tensor, int, int]:
    """Return the mean Gram matrix of what is retained after filtering and augmentation.

    Neighbours are ``p + V g`` with V the least-seen directions and g standard normal. Their Gram matrix follows from
    that of the originals and from sums of g, so that they are never built.

    Args:
        rows: Retained embeddings, shape ``(m, d)``.
        probe: `probe_edit`.
        weight: Shape ``(out, d)``, see `influence`.
        options: What to do.
        seed: Of the draws.
        draws: The draws g themselves, shape ``(m, augment, directions)``.

    Returns:
        The Gram matrix, the number of originals and of neighbours kept.

    Raises:
        ShapeError: If shapes disagree.
    """
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != weight.shape[-1]:
        raise ShapeError(f"rows must be (m, {weight.shape[-1]}), m > 0; got {tuple(rows.shape)}")
    weight = weight.to(rows)
    kept = rows
    if options.above is not None:
        size = influence(rows, probe, weight)
        chosen = size > options.above * size.mean()
        kept = rows[chosen] if bool(chosen.any()) else rows
        draws = draws[chosen] if draws is not None and bool(chosen.any()) else draws
    gram = kept.T @ kept
    if not options.augment:
        return gram / len(kept), len(kept), 0
    shape = (len(kept), options.augment, options.directions)
    if draws is None:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draws.shape != shape:
        raise ShapeError(f"draws must be {shape} for the rows kept; got {tuple(draws.shape)}")
    basis = smallest_directions(weight, options.directions)
    drawn = draws.to(rows)
    near = _above(kept, basis, drawn, probe, weight, options.above).to(rows)
    count = near.sum(1)
    moved = (drawn * near[..., None]).sum(1)  # sum of g by row
    spread = torch.einsum("mar,mas,ma->rs", drawn, drawn, near)
    cross = kept.T @ moved @ basis.T
    gram = gram + (kept * count[:, None]).T @ kept + cross + cross.T + basis @ spread @ basis.T
    total = len(kept) + int(count.sum())
    return gram / total, len(kept), int(count.sum())


def _above(
    rows: Tensor,
    basis: Tensor,
    draws: Tensor,
    probe: LowRankAffine,
    weight: Tensor,
    above: float | None,
) -> Tensor:
    """Return which neighbours have more than the mean influence of all neighbours, shape ``(m, augment)`` bool."""
    left, right = probe.left.to(rows), probe.right.to(rows)
    seen = weight @ left
    gram = seen.T @ seen
    own, along = rows @ right, basis.T @ right
    size = ((own @ gram) * own).sum(1)[:, None] + 2 * torch.einsum(
        "mar,mr->ma", draws, own @ gram @ along.T
    )
    size = size + torch.einsum("mar,rs,mas->ma", draws, along @ gram @ along.T, draws)
    size = size.clamp_min(0).sqrt()
    return size > (1.0 if above is None else above) * size.mean()


def blank_invariants(blank: Tensor, centroids: int | None, *, sweeps: int = 50) -> Tensor:
    """Return what is held of the blank prompt: all of it, or its first vector and centroids of the others.

    Args:
        blank: Shape ``(T, d)``.
        centroids: Number of k-means centroids; None holds all.
        sweeps: Largest number of Lloyd's iterations; the start is the farthest point, so there is no seed.
    """
    if centroids is None or len(blank) - 1 <= centroids:
        return blank
    rest = blank[1:]
    chosen = rest[:1]
    while len(chosen) < centroids:
        far = torch.cdist(rest, chosen).amin(1).argmax()
        chosen = torch.cat([chosen, rest[far][None]])
    for _ in range(sweeps):
        nearest = torch.cdist(rest, chosen).argmin(1)
        own = torch.nn.functional.one_hot(nearest, centroids).to(rest)
        sums = own.T @ rest / own.sum(0).clamp_min(1)[:, None]
        moved = torch.where(own.sum(0)[:, None] > 0, sums, chosen)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return torch.cat([blank[:1], chosen])


@dataclass(frozen=True, repr=False, eq=False)
class SpeedEraser(DiffusionEraser):
    """The edit of SPEED, see `DiffusionEraser` for its tensors and `fit` for how it is made.

    Example:
        >>> eraser = SpeedEraser.fit(pipe, erase="van gogh", anchor="art", preserve=artists)  # doctest: +SKIP
        >>> eraser.report["free_dimensions"]  # doctest: +SKIP
    """

    method: ClassVar[str] = "speed"
    config_type: ClassVar[type[EraserConfig]] = SpeedConfig

    @classmethod
    def _solve(cls, pairs: Pairs, metric: Metric) -> LowRankAffine:
        concepts = 1 if pairs.concept is None else len(pairs.concept.unique())
        return solve_means(pairs, metric, concepts)

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        config = self.config
        if prefix or not isinstance(config, SpeedConfig):
            return super()._new_pairs(pipe, concept, anchor, weight, prefix)
        texts = Texts.read(
            pipe, concept, anchor, None, max_sequence_length=config.max_sequence_length
        )
        return texts.pairs(config.rule, weight)

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        pipe: object,
        *,
        erase: Sequence[str] | str,
        anchor: Sequence[str] | str | None = None,
        preserve: Sequence[str] | str | Preserve | None = None,
        tau: float | None = None,
        relative_tau: float | None = None,
        rank: int | None = None,
        scale: float | None = None,
        invariant_ridge: float | None = None,
        filtering: bool | None = None,
        augment: int | None = None,
        directions: int = 1,
        scope: Scope | None = None,
        centroids: int | None = None,
        rule: TokenRule | str | None = None,
        maps: Sequence[str] = ("value",),
        pooled: bool | None = None,
        seed: int = 0,
        preset: Preset | None = None,
        task: Task | None = None,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
    ) -> Self:
        """Fit the edit; the pipeline is left bit-identical.

        Args:
            pipe: The pipeline.
            erase: Concepts.
            anchor: What each becomes, or all; default the blank prompt, the paper's ``"art"`` and ``"person"``.
            preserve: Names to keep. A `Preserve` set collected before is taken as it is: it cannot be filtered.
            tau: Eigenvalues of the mean Gram matrix below it are free.
            relative_tau: The same relative to the largest; default 1e-4.
            rank: The same as the dimension of the preserved subspace.
            scale: The paper's ``s``; smaller erases harder. Default 1.
            invariant_ridge: The paper's ``l``; above 0 the blank prompt is held softly.
            filtering: Retain only what has more than the mean influence.
            augment: Neighbours drawn for each, default 10; 0 none.
            directions: Number of least-seen directions they are drawn along.
            scope: ``"shared"`` or ``"layer"``: over which weights influence is measured.
            centroids: Hold the start token and this many centroids of the blank prompt; default all of it.
            rule: Positions of the pairs.
            maps: ``"value"`` as in the paper, or both kinds, which erases no more and preserves less.
            pooled: Edit the pooled vector too; default if the denoiser reads one and there is no preset.
            seed: Of the draws.
            preset: ``"paper"`` for the published constants; what is said wins. It also drops names that mention a
                concept from ``preserve``.
            task: ``object``, ``celebrity``, ``style`` or ``unsafe``: which of them.
            batch_size: Prompts encoded at once.
            max_sequence_length: Window of T5, as in the call of the pipeline.

        Raises:
            ValueError: If a list or option is refused, as for `UceEraser.fit`, or there are more pairs than directions
                left free: the message has both numbers.
            ShapeError: If the numbers of concepts and anchors differ.
            EditError: If the pipeline cannot be edited.
        """
        given = {
            "anchor": anchor,
            "scale": scale,
            "invariant_ridge": invariant_ridge,
            "filtering": filtering,
            "augment": augment,
            "scope": scope,
            "centroids": centroids,
            "rule": rule,
        }
        chosen = chosen_options(given, DEFAULTS, PAPER, preset=preset, task=task)
        freedom = {"tau": tau, "relative_tau": relative_tau, "rank": rank}
        if all(value is None for value in freedom.values()):
            freedom = {"tau": chosen["tau"]} if "tau" in chosen else {"relative_tau": 1e-4}
        chosen["directions"], chosen["freedom"] = directions, freedom
        _check(chosen)
        dropped: list[str] = []
        if chosen["drop_mentions"] and preserve is not None and not isinstance(preserve, Preserve):
            preserve, dropped = drop_mentions(
                names_of(erase, "erase"), [preserve] if isinstance(preserve, str) else preserve
            )
        texts = Texts.read(
            pipe,
            erase,
            chosen["anchor"],
            preserve,
            batch_size=batch_size,
            max_sequence_length=max_sequence_length,
        )
        config = SpeedConfig(
            concepts=texts.erase,
            anchors=texts.anchors,
            maps=tuple(maps),
            rule=str(TokenRule.of(chosen["rule"])),
            scale=chosen["scale"],
            filtering=chosen["filtering"],
            augment=chosen["augment"],
            scope=chosen["scope"],
            centroids=chosen["centroids"],
            seed=seed,
            preset=preset,
            task=task,
            max_sequence_length=max_sequence_length,
        )
        job = _Job(texts, pipe, config, chosen)
        second: tuple[Pairs | None, Metric | None] = (None, None)
        if (preset is None and reads_pooled(pipe)) if pooled is None else pooled:
            second = job.pooled()
        return job.fit(cls, second, dropped)


def _check(chosen: dict[str, Any]) -> None:
    for name, least in (("augment", 0), ("directions", 1), ("centroids", 1)):
        value = chosen[name]
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name} must be a whole number from {least}; got {value!r}")
    if chosen["scope"] not in get_args(Scope):
        raise ValueError(f"scope must be 'shared' or 'layer'; got {chosen['scope']!r}")


@dataclass(frozen=True, eq=False)
class _Job:
    """One fit: the lists, the pipeline, the options kept with the eraser, and those that are not."""

    texts: Texts
    pipe: object
    config: SpeedConfig
    chosen: dict[str, Any]

    def fit(
        self,
        cls: type[E],
        second: tuple[Pairs | None, Metric | None],
        dropped: Sequence[str],
    ) -> E:
        pairs = self.texts.pairs(self.config.rule, 1.0)
        blank = self.texts.blank()
        rows = self._retained(blank)
        held = blank_invariants(blank, self.config.centroids)
        report: dict[str, object] = {"dropped": list(dropped)} if dropped else {}
        layers: dict[str, tuple[Tensor, Tensor]] | None = None
        edit: LowRankAffine | None = None
        if rows is not None and self.config.scope == "layer" and self._chooses:
            layers, found = self._layers(pairs, rows, held)
            report |= found
            none = pairs.source.new_zeros(pairs.width, 0)
            edit, hard = LowRankAffine(none, none), self._metric(None, held)
        else:
            gram, found = self._gram(pairs, rows)
            report |= found
            hard = self._metric(gram, held)
        return fit_eraser(
            cls,
            self.pipe,
            None if layers else pairs,
            hard,
            config=self.config,
            edit=edit,
            layers=layers,
            pooled_pairs=second[0],
            pooled_metric=second[1],
            preserved=None if layers else rows,
            blank=None if layers else blank,
            report=report,
        )

    @property
    def _chooses(self) -> bool:
        return self.config.filtering or self.config.augment > 0

    @property
    def _filter(self) -> Filter:
        above = 1.0 if self.config.filtering else None
        return Filter(above, self.config.augment, self.chosen["directions"])

    def _retained(self, blank: Tensor) -> Tensor | None:
        """Return what is retained; for the paper's unsafe concepts without a list it is the blank prompt."""
        rows = self.texts.rows(self.texts.preserve, TokenRule.LAST_SUBJECT)
        published = self.config.preset == "paper" and self.config.task == "unsafe"
        return blank[1:] if rows is None and published else rows

    def _metric(self, gram: Tensor | None, held: Tensor) -> Metric:
        return metric(
            gram,
            width=self.texts.width,
            hard=True,
            ridge=self.config.scale,
            invariants=held,
            invariant_ridge=self.chosen["invariant_ridge"],
            **self.chosen["freedom"],
        )

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights that are edited, by path."""
        kinds = (*self.config.maps, "context")
        maps = [m for m in text_maps(self.pipe) if m.exact and m.kind in kinds]
        return {m.name: module_at(self.pipe, m).weight.detach() for m in maps}

    def _gram(self, pairs: Pairs, rows: Tensor | None) -> tuple[Tensor | None, dict[str, object]]:
        """Return the Gram matrix that all layers share, and what was retained."""
        collected = self.texts.collected
        if rows is None:
            return (None if collected is None else collected.normalised().gram), {}
        if not self._chooses:
            return rows.T @ rows / len(rows), {"retained": len(rows)}
        values, vectors = torch.linalg.eigh(text_gram(self._weights().values()).to(rows))
        root = (vectors * values.clamp_min(0).sqrt()).T
        gram, kept, drawn = filtered_gram(
            rows,
            probe_edit(pairs, len(self.texts.erase)),
            root,
            self._filter,
            seed=self.config.seed,
        )
        return gram, {"retained": kept, "drawn": drawn}

    def _layers(
        self, pairs: Pairs, rows: Tensor, held: Tensor
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, object]]:
        """Return an edit for each layer, and what they do."""
        count = len(self.texts.erase)
        probe = probe_edit(pairs, count)
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        free: list[int] = []
        drift: list[float] = []
        for i, (name, weight) in enumerate(self._weights().items()):
            wide = weight.to(rows)
            gram, _, _ = filtered_gram(rows, probe, wide, self._filter, seed=self.config.seed + i)
            hard = self._metric(gram, held)
            edit = solve_means(pairs, hard, count)
            layers[name] = (-(wide @ edit.left), edit.right)
            free.append(hard.dimension)
            moved = rows @ edit.right @ layers[name][0].T
            size = torch.linalg.vector_norm(rows @ wide.T, dim=1)
            drift.append(float((torch.linalg.vector_norm(moved, dim=1) / size).max()))
        return layers, {"free_dimensions": min(free), "preserved_drift_max": max(drift)}

    def pooled(self) -> tuple[Pairs, Metric]:
        """Return pairs and a hard metric of the pooled vectors; they are neither filtered nor augmented."""
        encoder = self.texts.encoder
        pairs = encoder.pooled_pairs(self.texts.erase, self.texts.anchors)
        gram: Tensor | None = None
        if self.texts.preserve:
            rows = encoder.pooled(self.texts.preserve)
            gram = rows.T @ rows / len(rows)
        hard = metric(
            gram,
            width=pairs.width,
            hard=True,
            ridge=self.config.scale,
            invariants=encoder.pooled([""]),
            invariant_ridge=self.chosen["invariant_ridge"],
            **self.chosen["freedom"],
        )
        return pairs, hard
