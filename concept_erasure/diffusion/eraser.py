"""The fitted edit of a text-to-image pipeline: applied in weights, as hooks or as LoRA, saved, extended, reduced.

One low-rank map of the text embeddings serves every layer that reads them (`solve`); edits that differ by layer and
an edit of the pooled vectors may stand beside it. Pairs and Gram matrix are kept, so that a concept is added or
withdrawn by solving again for all, not by editing an edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from concept_erasure._storage import write
from concept_erasure.diffusion.core import (
    Metric,
    Pairs,
    PairSums,
    compress,
    metric,
    solve,
)
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import (
    TextMap,
    check_foldable,
    denoiser,
    encoder_fingerprint,
    module_at,
    text_encoders,
)
from concept_erasure.diffusion.measured import certified, changed_entries, measured
from concept_erasure.diffusion.reach import Certificate
from concept_erasure.diffusion.targets import (
    ApplyForm,
    MapTarget,
    SharedEdit,
    chosen_maps,
    map_path,
)
from concept_erasure.edit import Edit, Patch, active_edits, same_lineage
from concept_erasure.eraser import Eraser, EraserConfig
from concept_erasure.errors import EditError, ShapeError, SpaceError
from concept_erasure.linalg import LowRankAffine, statistics_dtype
from concept_erasure.sites import Space, model_id

__all__ = ["ApplyForm", "DiffusionConfig", "DiffusionEraser", "fit_eraser"]

SITE = "cross_attention"
METRIC_OPTIONS = ("lam", "hard", "tau", "relative_tau", "rank", "ridge", "invariant_ridge")

E = TypeVar("E", bound="DiffusionEraser")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(EraserConfig):
    """Options every method shares; methods add theirs. A subclass that checks calls this one's check first.

    Attributes:
        concepts: What was erased.
        anchors: What each became; empty if that is not text.
        maps: Kinds of text maps edited; the one context map of joint attention stands for all of them.
        rule: Token rule of the pairs.
        lam: See `metric`, as the next five.
        hard: Whether what is preserved is kept exactly.
        tau: Eigenvalues below it are free.
        relative_tau: The same, relative to the largest.
        rank: Dimension of the preserved subspace.
        ridge: Ridge of the hard form.
        invariant_ridge: Softness of the invariants.
        layers: Text maps with an edit of their own.
        layer_rows: Number of outputs of each of those.
        pooled: The same options of the metric of pooled vectors, where they are edited.
    """

    concepts: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    maps: tuple[str, ...] = ("key", "value")
    rule: str = "last_subject"
    lam: float | None = None
    hard: bool = False
    tau: float | None = None
    relative_tau: float | None = None
    rank: int | None = None
    ridge: float | None = None
    invariant_ridge: float = 0.0
    layers: tuple[str, ...] = ()
    layer_rows: tuple[int, ...] = ()
    pooled: dict[str, float | int | bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, list):
                object.__setattr__(self, option.name, tuple(value))
        unknown = sorted(set(self.maps) - {"key", "value"})
        if unknown or not self.maps:
            raise ValueError(f"maps must be 'key', 'value' or both; got {self.maps!r}")
        if self.anchors and len(self.anchors) != len(self.concepts):
            raise ValueError(
                f"{len(self.concepts)} concepts need as many anchors; got {len(self.anchors)}"
            )
        if len(set(self.concepts)) < len(self.concepts):
            twice = next(c for c in self.concepts if self.concepts.count(c) > 1)
            raise ValueError(f"the concept {twice!r} is given twice")


@dataclass(frozen=True, repr=False, eq=False)
class DiffusionEraser(Eraser):
    """An edit of everything in a denoiser that reads text: ``x - x right left^T`` on every embedding.

    Attributes:
        left: Thin factor, shape ``(d, k)``.
        right: Thin factor, shape ``(d, k)``.
        source: Embeddings of the concepts, shape ``(n, d)``; this and what follows may be None.
        target: Embeddings of their anchors, shape ``(n, d)``.
        slack: Inverse weights of the pairs, shape ``(n,)``; 0 is exact.
        concept: Number of the concept of each pair, shape ``(n,)``.
        gram: Gram matrix of what is preserved, shape ``(d, d)``.
        invariants: What stays exactly, shape ``(q, d)``.
        layer_up: Edits that differ by layer, outputs of all layers one after another, shape ``(sum of out, k)``.
        layer_down: Shape ``(layers, d, k)``, or ``(1, d, k)`` if shared.
        pooled_left: The edit of the pooled vector, shape ``(p, k)``; as for the others, as are the rest.
        pooled_right: Shape ``(p, k)``.
        pooled_source: Shape ``(n, p)``.
        pooled_target: Shape ``(n, p)``.
        pooled_slack: Shape ``(n,)``.
        pooled_concept: Shape ``(n,)``.
        pooled_gram: Shape ``(p, p)``.
        pooled_invariants: Shape ``(q, p)``.
    """

    method: ClassVar[str] = "text-edit"
    config_type: ClassVar[type[EraserConfig]] = DiffusionConfig

    left: Tensor
    right: Tensor
    source: Tensor | None = None
    target: Tensor | None = None
    slack: Tensor | None = None
    concept: Tensor | None = None
    gram: Tensor | None = None
    invariants: Tensor | None = None
    layer_up: Tensor | None = None
    layer_down: Tensor | None = None
    pooled_left: Tensor | None = None
    pooled_right: Tensor | None = None
    pooled_source: Tensor | None = None
    pooled_target: Tensor | None = None
    pooled_slack: Tensor | None = None
    pooled_concept: Tensor | None = None
    pooled_gram: Tensor | None = None
    pooled_invariants: Tensor | None = None

    @property
    def options(self) -> DiffusionConfig:
        """The options, with their type."""
        return cast("DiffusionConfig", self.config)

    @property
    def concepts(self) -> tuple[str, ...]:
        """What was erased."""
        return self.options.concepts

    @property
    def map(self) -> LowRankAffine:
        """The edit of text embeddings that all layers share."""
        return LowRankAffine(self.left, self.right)

    @property
    def pooled_map(self) -> LowRankAffine | None:
        """The edit of pooled vectors, if there is one."""
        if self.pooled_left is None or self.pooled_right is None:
            return None
        return LowRankAffine(self.pooled_left, self.pooled_right)

    @property
    def certificate(self) -> Certificate:
        """What no text embedding can reach after the edit, as measured at the fit.

        Raises:
            EditError: If there is none; the message says why.
        """
        return self._certificate("")

    @property
    def pooled_certificate(self) -> Certificate:
        """What no pooled vector can reach through the map that reads it.

        Raises:
            EditError: If there is none; the message says why.
        """
        return self._certificate("pooled_")

    def _certificate(self, prefix: str) -> Certificate:
        found = self.report.get(f"{prefix}certificate")
        if not isinstance(found, Mapping):
            absent = "it was not computed" if not prefix else "no pooled vector is edited"
            why = self.report.get(f"{prefix}certificate_missing", absent)
            raise EditError(f"this eraser has no certificate: {why}")
        return Certificate.from_dict(found)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Edit prompt embeddings, shape ``(..., d)``, instead of the model; device, dtype and shape are kept.

        Pooled vectors are edited by `pooled_map`.

        Raises:
            EditError: If the edit differs by layer, which no change of embeddings can do.
            ShapeError: If the width is another.
        """
        if self.options.layers:
            raise EditError("this edit differs by layer; use apply(pipe)")
        return self.map(embeddings)

    # -- into a pipeline ------------------------------------------------------------------------

    def apply(self, pipe: object, *, form: ApplyForm = "weights") -> Edit:
        """Put the edit into a pipeline's denoiser.

        Args:
            pipe: The pipeline it was fitted on, or another with the same text encoders.
            form: ``"weights"`` changes them in place; ``"hook"`` edits what the maps read; ``"lora"`` adds to what
                they give, which loses nothing to the rounding of half precision.

        Returns:
            The edit: a context manager, whose ``undo()`` restores every bit.

        Raises:
            EditError: If it is in force already, or a weight cannot be changed; nothing is changed then.
            SpaceError: If the text encoders are others.
            ShapeError: If widths differ.
        """
        if form not in get_args(ApplyForm):
            raise ValueError(f"form must be 'weights', 'hook' or 'lora'; got {form!r}")
        targets = list(self._targets(pipe))
        if form == "weights":
            check_foldable([target.map for target in targets])
        patches: list[Patch] = []
        for target in targets:
            patches += target.patches(form)
        return Edit(
            denoiser(pipe),
            patches,
            label=f"{self.method} of {len(self.concepts)} concepts ({form})",
            key=[f"{self._identity}@{target.path}" for target in targets],
        )

    @torch.no_grad()
    def to_lora(
        self, pipe: object, path: str | Path, *, dtype: torch.dtype = torch.float32
    ) -> Path:
        """Write a LoRA file that ``pipe.load_lora_weights`` loads; nothing is lost but the rounding to ``dtype``.

        Args:
            pipe: The pipeline; it is not changed.
            path: File name, ending in ``.safetensors``.
            dtype: Of the file.

        Returns:
            The path.

        Raises:
            EditError: If the pipeline's maps cannot be read.
            SpaceError: If the text encoders are others.
            ValueError: If the name ends otherwise, or dtype is not floating point.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"the name of a LoRA file ends in .safetensors; got {path.name!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point; got {dtype}")
        state: dict[str, Tensor] = {}
        factors = {}
        targets = list(self._thin()._targets(pipe))
        names = {f"{target.map.name}.weight" for target in targets}
        if other := next((e for e in active_edits(denoiser(pipe)) if e.targets & names), None):
            raise EditError(
                f"{other.label} is in force, and the LoRA depends on the weights as they were: undo() it first"
            )
        for target in targets:
            factors[f"{target.map.model}.{target.path}"] = target.factors(target.module)
        # one rank for all: readers take alpha from one layer
        rank = max(up.shape[1] for up, _ in factors.values())
        for name, (up, down) in factors.items():
            size = [torch.linalg.vector_norm(factor, dim=0) for factor in (up, down)]
            balance = (size[0] / size[1]).sqrt()
            balance = torch.where(torch.isfinite(balance) & (balance > 0), balance, 1.0)
            more = rank - up.shape[1]
            for key, factor in (("lora_B", up / balance), ("lora_A", (down * balance))):
                padded = nn.functional.pad(factor, (0, more))
                padded = padded if key == "lora_B" else padded.T
                state[f"{name}.{key}.weight"] = padded.to("cpu", dtype).contiguous()
        lost = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if lost:
            raise ValueError(f"{lost[0]!r} is not finite in {dtype}; write float32")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda p: save_file(state, p, metadata={"format": "pt"}))
        return path

    def _thin(self) -> Self:
        """Return a copy whose shared edits have factors of their numerical rank."""
        changes: dict[str, Any] = {}
        for prefix, edit in (("", self.map), ("pooled_", self.pooled_map)):
            if edit is not None:
                thin = compress(edit.to(dtype=statistics_dtype(edit.left.device)))
                changes |= {f"{prefix}left": thin.left, f"{prefix}right": thin.right}
        return replace(self, **changes)

    def _targets(self, pipe: object) -> Iterator[MapTarget]:
        """Yield what must change, after all checks."""
        self._check_pipe(pipe)
        maps = chosen_maps(pipe, self.options.maps, pooled=self.pooled_left is not None)
        layers = self._layers()
        edits = [
            None if edit is None else SharedEdit.of(edit) for edit in (self.map, self.pooled_map)
        ]
        if unknown := set(layers) - {map_path(m) for m in maps}:
            raise EditError(
                f"the pipeline has no text map {min(unknown)!r}, which this edit changes"
            )
        for text_map in maps:
            shared = edits[text_map.kind == "pooled"]
            own = None if text_map.kind == "pooled" else layers.get(map_path(text_map))
            if shared is not None and shared.width != text_map.width:
                raise ShapeError(
                    f"{text_map.name!r} reads text of width {text_map.width}; the eraser has width {shared.width}"
                )
            if shared is not None or own is not None:
                yield MapTarget(text_map, module_at(pipe, text_map), shared, own)

    def _layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the edits that differ by layer, ``(up, down)`` by path."""
        names, rows = self.options.layers, self.options.layer_rows
        if not names or self.layer_up is None or self.layer_down is None:
            return {}
        downs = self.layer_down.expand(len(names), -1, -1)
        ups = self.layer_up.split(list(rows))
        return {name: (up, down) for name, up, down in zip(names, ups, downs, strict=True)}

    def _check_pipe(self, pipe: object) -> None:
        denoiser(pipe)
        if self.space is None:
            return
        try:
            found = encoder_fingerprint(pipe)
        except TypeError as error:
            raise SpaceError(
                f"the text encoder cannot be compared: {error}; use with_space(None) if you are sure"
            ) from None
        if not same_lineage(self.space.fingerprint, found):
            raise SpaceError(
                f"this eraser was fitted with the text encoder of {self.space.model} (weights "
                f"{self.space.fingerprint[:12]}); this pipeline's has weights {found[:12]}. Fit it again, or use "
                "with_space(None) if you are sure"
            )

    # -- more or fewer concepts -----------------------------------------------------------------

    def add(
        self,
        pipe: object,
        concept: str,
        anchor: str = "",
        *,
        weight: float | None = None,
    ) -> Self:
        """Return an eraser of one concept more: all pairs are solved together again.

        Args:
            pipe: The pipeline; it is not changed.
            concept: What to erase too.
            anchor: What it becomes.
            weight: Weight of its pairs, infinity is exact; default the median of the others'.

        Raises:
            EditError: If the pairs were not kept, or the method's edit is not one solve.
            SpaceError: If the text encoders are others.
            ValueError: If it is among the concepts already, or the pairs cannot be met.
        """
        if concept in self.concepts:
            raise ValueError(f"{concept!r} is among the concepts already")
        self._check_pipe(pipe)
        config = replace(
            self.options,
            concepts=(*self.concepts, concept),
            anchors=(*self.options.anchors, anchor) if self.options.anchors else (),
        )
        parts: dict[str, Pairs] = {}
        for prefix in self._parts():
            kept = self._pairs(prefix)
            median = float(1 / kept.slack.median()) if len(kept) else 1.0
            new = self._new_pairs(
                pipe, concept, anchor, median if weight is None else weight, prefix
            )
            parts[prefix] = Pairs.cat(
                [kept, new.numbered(len(self.concepts)).to(kept.source.device)]
            )
        return self._solved(parts, config, pipe)

    def withdraw(self, concept: str, *, pipe: object | None = None) -> Self:
        """Return an eraser of one concept fewer: all other pairs are solved together again.

        Args:
            concept: What to erase no longer.
            pipe: The pipeline, needed only for the certificate of an edit that is singular.

        Raises:
            EditError: If the pairs were not kept, or the method's edit is not one solve.
            KeyError: If it is not among the concepts.
        """
        if concept not in self.concepts:
            raise KeyError(
                f"no concept {concept!r}; there are {', '.join(map(repr, self.concepts))}"
            )
        gone = self.concepts.index(concept)
        anchors = self.options.anchors
        config = replace(
            self.options,
            concepts=self.concepts[:gone] + self.concepts[gone + 1 :],
            anchors=anchors[:gone] + anchors[gone + 1 :],
        )
        parts: dict[str, Pairs] = {}
        for prefix in self._parts():
            kept = self._pairs(prefix)
            number = cast("Tensor", kept.concept)
            rest = number != gone
            number = (number - (number > gone).long())[rest]
            parts[prefix] = Pairs(kept.source[rest], kept.target[rest], kept.weights[rest], number)
        return self._solved(parts, config, pipe)

    def _parts(self) -> tuple[str, ...]:
        return ("", "pooled_") if self.pooled_left is not None else ("",)

    def _pairs(self, prefix: str) -> Pairs:
        """Return the pairs that were kept.

        Raises:
            EditError: If they were not.
        """
        names = ("source", "target", "slack", "concept")
        source, target, slack, concept = (getattr(self, prefix + name) for name in names)
        if self.options.layers:
            raise EditError(
                "this edit differs by layer, so concepts cannot be added or withdrawn; fit again"
            )
        if source is None or target is None or slack is None or concept is None:
            raise EditError(
                "the pairs of this eraser were not kept (apply-only file, several rounds, or summed pairs), so "
                "concepts cannot be added or withdrawn; fit again"
            )
        return Pairs(source, target, 1 / slack, concept)

    def _new_pairs(
        self, pipe: object, concept: str, anchor: str, weight: float, prefix: str
    ) -> Pairs:
        """Return the pairs of a concept to add; methods with other pairs override it."""
        encoder = TextEncoder(pipe)
        if prefix:
            return encoder.pooled_pairs([concept], [anchor], weight)
        return encoder.pairs([concept], [anchor], self.options.rule, weight)

    def _metric_for(self, prefix: str, pairs: Pairs) -> Metric:
        """Return the metric of a new solve; methods whose metric depends on the pairs override it."""
        held = cast("dict[str, Metric]", getattr(self, "_metrics", {}))
        if prefix not in held:
            own: dict[str, Any] = {name: getattr(self.options, name) for name in METRIC_OPTIONS}
            options = self.options.pooled if prefix else own
            gram, kept = getattr(self, f"{prefix}gram"), getattr(self, f"{prefix}invariants")
            made = metric(gram, width=pairs.width, invariants=kept, **cast("Any", options))
            held = {**held, prefix: made}
            object.__setattr__(self, "_metrics", held)
        return held[prefix]

    @classmethod
    def _solve(cls, pairs: Pairs, metric: Metric) -> LowRankAffine:
        """Return the edit; methods that solve otherwise override it."""
        return solve(pairs, metric)

    def _solved(
        self, parts: Mapping[str, Pairs], config: DiffusionConfig, pipe: object | None
    ) -> Self:
        changes: dict[str, Any] = {}
        metrics: dict[str, Metric] = {}
        for prefix, pairs in parts.items():
            if not len(pairs):
                raise ValueError("no concept would be left; undo the edit instead")
            metrics[prefix] = self._metric_for(prefix, pairs)
            edit = self._solve(pairs, metrics[prefix])
            changes |= _tensors(prefix, edit, pairs, metrics[prefix])
        made = replace(self, **changes, config=config, report={})
        report = measured(made, parts[""], metrics[""])
        for prefix, pairs in parts.items():
            report |= certified(made, pairs, pipe, prefix)
        kept = {k: v for k, v in self.report.items() if k in ("weight_dtype", "encoder")}
        made = replace(made, report={**kept, **report})
        object.__setattr__(made, "_metrics", metrics)
        return made

    # -- storage --------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, apply_only: bool = False) -> Path:
        """Write the eraser to a folder.

        Args:
            path: The folder.
            apply_only: Write the factors alone, in float32: all that is needed to apply the edit, but not to add or
                withdraw concepts.

        Returns:
            The folder.
        """
        return super(DiffusionEraser, self.apply_only() if apply_only else self).save_pretrained(
            path
        )

    def apply_only(self) -> Self:
        """Return a copy without pairs, Gram and invariants, in float32."""
        dropped = {
            f"{prefix}{name}": None
            for prefix in ("", "pooled_")
            for name in ("source", "target", "slack", "concept", "gram", "invariants")
        }
        made = replace(self, **dropped)  # type: ignore[arg-type]  # names of optional tensor fields
        made = self._same_as(made)
        return made.to(dtype=torch.float32)

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        own = {f.name for f in fields(DiffusionEraser)}
        return own - {"left", "right", "config", "space", "report"}

    def _check(self) -> None:
        shared, pooled = self.map, self.pooled_map
        if (self.pooled_left is None) != (self.pooled_right is None):
            raise ShapeError("pooled_left and pooled_right belong together")
        for prefix, made in (("", shared), ("pooled_", pooled)):
            width = None if made is None else made.width
            rows = {
                name: tuple(value.shape)
                for name in ("source", "target", "gram", "invariants")
                if (value := getattr(self, prefix + name)) is not None
            }
            if any(len(shape) != 2 or shape[1] != width for shape in rows.values()):
                raise ShapeError(f"{prefix or 'the '}tensors must have width {width}; got {rows}")
        names, rows_of = self.options.layers, self.options.layer_rows
        if len(names) != len(rows_of) or bool(names) != (self.layer_up is not None):
            raise ShapeError("layers, layer_rows and layer_up do not belong together")
        if self.layer_up is not None and (
            self.layer_down is None
            or self.layer_down.ndim != 3
            or len(self.layer_down) not in (1, len(names))
            or self.layer_up.shape != (sum(rows_of), self.layer_down.shape[2])
        ):
            raise ShapeError(
                f"layer_up must be (sum of out, k) and layer_down (layers, d, k); got {tuple(self.layer_up.shape)}"
            )

    def _check_space(self) -> None:
        if self.space is not None and self.space.width != self.map.width:
            raise SpaceError(
                f"space.width is {self.space.width}; the factors have width {self.map.width}"
            )


def _tensors(
    prefix: str, edit: LowRankAffine, pairs: Pairs | PairSums | None, held: Metric | None
) -> dict[str, Any]:
    """Return fields of an eraser by name."""
    names = ("left", "right", "source", "target", "slack", "concept", "gram", "invariants")
    rows = pairs if isinstance(pairs, Pairs) else None
    values = (
        edit.left,
        edit.right,
        None if rows is None else rows.source,
        None if rows is None else rows.target,
        None if rows is None else rows.slack,
        None if rows is None else rows.concept,
        None if held is None else held.gram,
        None if held is None else held.invariants,
    )
    return {prefix + name: value for name, value in zip(names, values, strict=True)}


def fit_eraser(
    cls: type[E],
    pipe: object,
    pairs: Pairs | PairSums | None,
    metric: Metric,
    *,
    config: DiffusionConfig,
    edit: LowRankAffine | None = None,
    layers: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    pooled_pairs: Pairs | None = None,
    pooled_metric: Metric | None = None,
    pooled_edit: LowRankAffine | None = None,
    preserved: Tensor | None = None,
    blank: Tensor | None = None,
    report: Mapping[str, object] | None = None,
) -> E:
    """Solve, measure and pack: the ending of every method's fit. The pipeline is not changed.

    Args:
        cls: The class to make, derived from `DiffusionEraser`.
        pipe: The pipeline.
        pairs: What becomes what; kept, so that concepts can be added and withdrawn. None with an ``edit`` that no
            single solve gives.
        metric: How freely.
        config: Options; those of the metric are filled in here.
        edit: The shared edit if it is known already.
        layers: Edits of single layers on top, ``(up, down)`` of shapes ``(out, k)`` and ``(d, k)`` by path.
        pooled_pairs: Pairs of pooled vectors; None leaves the pooled path alone.
        pooled_metric: Their metric.
        pooled_edit: Their edit if it is known already.
        preserved: Embeddings to measure the drift on, shape ``(m, d)``.
        blank: Embeddings of the blank prompt, the same.
        report: More to report.

    Raises:
        EditError: If the pipeline cannot be edited.
        ShapeError: If widths differ.
        ValueError: If the pairs cannot be solved, or a weight of the pipeline is not finite.
    """
    own: dict[str, Any] = {k: v for k, v in metric.options.items() if k in METRIC_OPTIONS}
    config = replace(config, **own)
    if pooled_metric is not None:
        config = replace(config, pooled=dict(pooled_metric.options))
    maps = chosen_maps(
        pipe, config.maps, pooled=pooled_metric is not None or pooled_edit is not None
    )
    _check_weights(pipe, maps, metric.width)
    rows = _told_apart(pairs, len(config.concepts))
    if edit is None:
        if rows is None:
            raise ValueError("give pairs, or the edit itself")
        edit = cls._solve(rows, metric) if isinstance(rows, Pairs) else solve(rows, metric)
    tensors = _tensors("", edit, rows, metric)
    pooled_rows = _told_apart(pooled_pairs, len(config.concepts))
    if pooled_metric is not None or pooled_edit is not None:
        tensors |= _pooled(cls, pooled_rows, pooled_metric, pooled_edit)
    if layers:
        packed, names, outs = _packed(layers)
        tensors |= packed
        config = replace(config, layers=names, layer_rows=outs)
    encoders = text_encoders(pipe)
    space = Space(
        model_id(next(iter(encoders.values()))),
        encoder_fingerprint(pipe),
        SITE,
        config.rule,
        metric.width,
    )
    made = cls(**tensors, config=config, space=space, report={})
    made._check()
    found = {
        **measured(made, rows, metric, preserved=preserved, blank=blank),
        **changed_entries(made, pipe),
        **certified(made, rows, pipe),
        **(certified(made, pooled_rows, pipe, "pooled_") if made.pooled_left is not None else {}),
        **(report or {}),
    }
    made = replace(made, report=found)
    object.__setattr__(
        made, "_metrics", {"": metric, "pooled_": pooled_metric} if pooled_metric else {"": metric}
    )
    return made


def _pooled(
    cls: type[DiffusionEraser],
    pairs: Pairs | PairSums | None,
    metric: Metric | None,
    edit: LowRankAffine | None,
) -> dict[str, Any]:
    """Return the fields of the pooled edit, solved if it is not known."""
    if edit is None and metric is not None and isinstance(pairs, Pairs):
        edit = cls._solve(pairs, metric)
    if edit is None:
        raise ValueError("the pooled path needs pooled_pairs and pooled_metric, or pooled_edit")
    return _tensors("pooled_", edit, pairs, metric)


def _told_apart(pairs: Pairs | PairSums | None, concepts: int) -> Pairs | PairSums | None:
    """Return pairs that know their concepts where that is clear."""
    if not isinstance(pairs, Pairs):
        return pairs
    if concepts == 1:
        return pairs.numbered(0)
    if pairs.concept is None and len(pairs) == concepts:
        number = torch.arange(concepts, device=pairs.source.device)
        return Pairs(pairs.source, pairs.target, pairs.weights, number)
    if pairs.concept is not None and len(pairs) and int(pairs.concept.max()) >= concepts:
        raise ValueError(
            f"the pairs number {int(pairs.concept.max()) + 1} concepts; config.concepts has {concepts}"
        )
    return pairs


def _check_weights(pipe: object, maps: Sequence[TextMap], width: int) -> None:
    for text_map in maps:
        if text_map.kind != "pooled" and text_map.width != width:
            raise ShapeError(
                f"{text_map.name!r} reads text of width {text_map.width}; the metric has {width}"
            )
        weight = module_at(pipe, text_map).weight.detach()
        plain = weight.is_floating_point() and not weight.is_meta and not text_map.quantised
        if plain and not bool(torch.isfinite(weight.sum(dtype=statistics_dtype(weight.device)))):
            raise ValueError(
                f"the weight of {text_map.name!r} is not finite; load the pipeline again"
            )


def _packed(
    layers: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[int, ...]]:
    """Return edits of single layers as two tensors, with their names and numbers of outputs."""
    rank = max(up.shape[1] for up, _ in layers.values())
    for name, (up, down) in layers.items():
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[1]:
            raise ShapeError(
                f"{name!r} needs up (out, k) and down (d, k); got {tuple(up.shape)} and {tuple(down.shape)}"
            )
    ups = [nn.functional.pad(up, (0, rank - up.shape[1])) for up, _ in layers.values()]
    downs = [nn.functional.pad(down, (0, rank - down.shape[1])) for _, down in layers.values()]
    same = all(torch.equal(down, downs[0]) for down in downs[1:])
    packed = {"layer_up": torch.cat(ups), "layer_down": torch.stack(downs[:1] if same else downs)}
    names = tuple(name.removesuffix(".base_layer") for name in layers)
    return packed, names, tuple(len(up) for up in ups)
