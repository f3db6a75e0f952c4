"""Compare methods on one text-to-image pipeline: what they do to the text maps, with no picture drawn.

Every method is fitted with the same lists and applied; then the keys and values that the denoiser makes of prompts
are compared with those it made before. That is all a closed-form edit changes, so it orders methods in seconds; what
it does not tell is how pictures look. Erasers of vectors (LEACE and the like) are fitted on the names in sentences and
measured as what they do to the vectors that the maps read.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from concept_erasure import registry
from concept_erasure.diffusion.core import text_gram
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.labelled import SENTENCES, named_representations
from concept_erasure.diffusion.maps import TextMap, module_at, text_maps
from concept_erasure.diffusion.reach import certificate
from concept_erasure.diffusion.wording import names_of, one_each
from concept_erasure.eraser import RepresentationEraser
from concept_erasure.errors import ConceptErasureError
from concept_erasure.report import Cell, Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from concept_erasure.diffusion.eraser import DiffusionEraser

__all__ = ["OTHERS", "EditMeasured", "PipeComparison", "compare_pipe"]

# What nobody named: how far the edit spreads.
OTHERS = (
    "a dog", "a cat", "a horse", "a bird", "a fish", "a car", "a tree", "a flower", "a house", "a bridge", "a river",
    "a mountain", "the sea", "a street", "a table", "a cup", "a book", "a child", "an old man", "a woman",
)  # fmt: skip
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a painting of {}")
KINDS = ("key", "value", "context")
_NAMES = ("erase", "anchor", "preserve", *SENTENCES)


@dataclass(frozen=True, kw_only=True)
class EditMeasured:
    """What became of one method.

    Attributes:
        method: Its name in the registry.
        status: ``"measured"``, or why it was not.
        edit: ``|W' - W| / |W|`` over all text maps (Frobenius).
        erased: Kind of map to how far the concepts' outputs still are from the anchors', relative to before: 0 is
            there, 1 is unmoved.
        preserved: Largest relative move of the outputs of a preserved name; None without any.
        preserved_mean: Its mean.
        others: Mean relative move of things nobody named.
        certificate: Smallest share of the way from anchor to concept that no embedding can travel; None if there is
            no certificate.
        seconds: Of the fit.
        eraser: The fitted eraser, of the pipeline or of its text vectors; None when not measured.
    """

    method: str
    status: str = "measured"
    edit: float | None = None
    erased: Mapping[str, float] = field(default_factory=dict)
    preserved: float | None = None
    preserved_mean: float | None = None
    others: float | None = None
    certificate: float | None = None
    seconds: float | None = None
    eraser: DiffusionEraser | RepresentationEraser | None = field(
        default=None, repr=False, compare=False
    )

    @property
    def ok(self) -> bool:
        """Whether the method was measured."""
        return self.status == "measured"


@dataclass(frozen=True, kw_only=True)
class PipeComparison:
    """The sweep over methods.

    Attributes:
        rows: One a method, in the order asked for.
        erase: The concepts.
        anchors: One each.
        preserve: What was to be kept.
    """

    rows: tuple[EditMeasured, ...]
    erase: tuple[str, ...]
    anchors: tuple[str, ...]
    preserve: tuple[str, ...]

    def to_report(
        self, *, title: str = "Edits compared", meta: Mapping[str, object] | None = None
    ) -> Report:
        """Return the table.

        Args:
            title: Heading.
            meta: What else is to be known of the numbers.
        """
        notes = [
            "Measured on what the denoiser makes of the text, at the last token of prompts such as 'a photo of …'; no "
            "pictures were drawn, and no attack was run.",
            "Edit is |W' - W| / |W| over all text maps; a projection P of text vectors counts as "
            "W' = W P. Left is the distance of a concept's outputs from its anchor's, "
            "as a share of what it was: 0 is moved onto the anchor, 1 is unmoved (a method may leave keys alone).",
            "Preserved and others are relative moves of outputs that should stay: of the names given, and of everyday "
            "things nobody named.",
            "Certificate is the smallest share of the way back from anchor to concept that no text embedding can "
            "travel: 0 means that some embedding still brings the concept back in full.",
        ]
        notes += [f"{row.method}: {row.status}." for row in self.rows if not row.ok]
        record = {
            "erase": list(self.erase),
            "anchors": list(self.anchors),
            "preserve": len(self.preserve),
            "templates": list(TEMPLATES),
            **(meta or {}),
        }
        return Report(title, [_cells(row) for row in self.rows], record, notes)

    def plot(self, path: str | Path, *, title: str = "") -> Path:
        """Draw what is left of the concepts against what happened to the rest, a point a method.

        Args:
            path: Where the picture goes; the ending says the format.
            title: Heading.

        Raises:
            ImportError: If matplotlib is absent.
        """
        from concept_erasure.evals.plots import plot_points

        done = [row for row in self.rows if row.ok]
        kinds = dict.fromkeys(kind for row in done for kind in row.erased)
        panels = {
            f"{kind} maps": {row.method: (float(row.others or 0), row.erased[kind]) for row in done}
            for kind in kinds
        }
        return plot_points(
            panels,
            path,
            x_label="mean move of things nobody named",
            y_label="distance left to the anchor (1: unmoved)",
            title=title,
        )

    def save(
        self,
        folder: str | Path,
        *,
        title: str = "Edits compared",
        meta: Mapping[str, object] | None = None,
    ) -> Report:
        """Write ``compare.json``, ``compare.md`` and ``compare.png`` into a folder; return the report.

        Raises:
            ImportError: If matplotlib is absent.
        """
        picture = self.plot(Path(folder) / "compare.png", title=", ".join(self.erase))
        report = replace(
            self.to_report(title=title, meta=meta),
            images={"What is left against what else moved": picture.name},
        )
        report.save(folder, name="compare")
        return report


def compare_pipe(
    pipe: object,
    methods: Sequence[str],
    *,
    erase: Sequence[str] | str,
    anchor: Sequence[str] | str = "",
    preserve: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] | None = None,
    seed: int = 0,
) -> PipeComparison:
    """Fit methods on one pipeline and measure each edit; the pipeline is bit-identical afterwards.

    A method that refuses the lists is listed with its reason; the sweep goes on.

    Args:
        pipe: A text-to-image pipeline.
        methods: Names in the registry, of those that `registry.for_pipelines` lists.
        erase: Concepts.
        anchor: What each becomes, or all; ``""`` is the blank prompt.
        preserve: Names to keep.
        options: Method to keyword arguments of its ``fit``.
        seed: Of methods that draw.

    Raises:
        KeyError: If a method is unknown.
        ValueError: If a method is of another family, a list is refused, or no method could be measured.
        TypeError: If the pipeline has no denoiser.
    """
    if isinstance(methods, str) or not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be different names, at least one; got {methods!r}")
    entries = [registry.get(name) for name in methods]
    known = registry.for_pipelines()
    if foreign := [entry.name for entry in entries if entry.name not in known]:
        raise ValueError(
            f"{foreign[0]!r} is not a method for text-to-image pipelines; those are: {', '.join(known)}"
        )
    names = names_of(erase, "erase")
    anchors = one_each(anchor, names)
    world = _World.of(pipe, names, anchors, preserve)
    lists = {"erase": names, "anchor": anchors, "preserve": list(preserve) or None}
    rows = tuple(
        _sweep(entry, world, {**lists, **dict((options or {}).get(entry.name, {}))}, seed)
        for entry in entries
    )
    if not any(row.ok for row in rows):
        reasons = "; ".join(f"{row.method}: {row.status}" for row in rows)
        raise ValueError(f"no method could be measured: {reasons}")
    return PipeComparison(
        rows=rows, erase=tuple(names), anchors=tuple(anchors), preserve=tuple(preserve)
    )


def _sweep(
    entry: registry.Method, world: _World, given: Mapping[str, object], seed: int
) -> EditMeasured:
    """Fit and measure one method, or say why not."""
    fit = getattr(entry.load(), "fit", None)
    known = {} if fit is None else inspect.signature(fit).parameters
    projects = entry.family == "linear"
    if fit is None or not ({"x"} if projects else {"pipe", "erase"}) <= set(known):
        return EditMeasured(method=entry.name, status="not applicable: no fit on a pipeline")
    options: dict[str, Any] = {**entry.options, **given}
    names = {name: options.pop(name) for name in _NAMES if projects and name in options}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"method {entry.name!r} has no option {', '.join(unknown)}")
    if "seed" in known:
        options.setdefault("seed", seed)
    try:
        start = time.perf_counter()
        source = named_representations(world.pipe, **names) if projects else world.pipe
        eraser = fit(source, **options)
        seconds = time.perf_counter() - start
        return world.measure(entry.name, eraser, seconds)
    except (ConceptErasureError, ValueError) as error:
        return EditMeasured(method=entry.name, status=f"failed: {' '.join(str(error).split())}")


@dataclass(frozen=True, eq=False)
class _World:
    """A pipeline and the text vectors to measure on.

    Attributes:
        pipe: The pipeline.
        maps: Its maps that read text vectors themselves.
        source: Vectors of the concepts, shape ``(n, d)``.
        target: Vectors of their anchors, shape ``(n, d)``.
        kept: Vectors of the preserved names, shape ``(m, d)``, maybe none.
        others: Vectors of everyday things, shape ``(q, d)``.
        weights: Map to its weight before, shape ``(out, d)``, in float32.
    """

    pipe: object
    maps: tuple[TextMap, ...]
    source: Tensor
    target: Tensor
    kept: Tensor
    others: Tensor
    weights: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, pipe: object, erase: Sequence[str], anchors: Sequence[str], preserve: Sequence[str]
    ) -> _World:
        maps = tuple(m for m in text_maps(pipe) if m.exact and m.kind in KINDS)
        encoder = TextEncoder(pipe)
        prompts, aims = [], []
        for template in TEMPLATES:
            for name, anchor in zip(erase, anchors, strict=True):
                prompts.append(template.format(name))
                aims.append(template.format(anchor) if anchor.strip() else "")
        pairs = encoder.pairs(prompts, aims, "last_subject")
        plain = {name.casefold() for name in (*erase, *anchors, *preserve)}
        others = [
            name for name in OTHERS if name.split(" ", 1)[1] not in plain and name not in plain
        ]
        world = cls(
            pipe=pipe,
            maps=maps,
            source=pairs.source.float(),
            target=pairs.target.float(),
            kept=_rows(encoder, preserve, pairs.source),
            others=_rows(encoder, others, pairs.source),
            weights={},
        )
        return replace(world, weights={m.name: world.weight(m).clone() for m in maps})

    def weight(self, text_map: TextMap) -> Tensor:
        """Return the text columns of a map's weight as it is now, in float32."""
        weight = module_at(self.pipe, text_map).weight.detach()
        return weight[:, text_map.text_columns].to(self.source)

    @torch.no_grad()
    def measure(
        self, method: str, eraser: DiffusionEraser | RepresentationEraser, seconds: float
    ) -> EditMeasured:
        """Apply an eraser, look, and undo it."""
        sums = _Sums(len(self.kept), len(self.others), self.source)
        for text_map, change, shift in self._changes(eraser):
            before = self.weights[text_map.name]
            sums.size += torch.stack([change.square().sum(), before.square().sum()])
            away = (self.source - self.target) @ before.T
            left = away + self.source @ change.T + shift
            held = sums.left.setdefault(text_map.kind, sums.size.new_zeros(2))
            held += torch.stack([left.square().sum(), away.square().sum()])
            for moved, rows in ((sums.kept, self.kept), (sums.others, self.others)):
                moved[0] += (rows @ change.T + shift).square().sum(1)
                moved[1] += (rows @ before.T).square().sum(1)
        kept, others = (_share(one[0], one[1]) for one in (sums.kept, sums.others))
        return EditMeasured(
            method=method,
            edit=float(_share(sums.size[0], sums.size[1])),
            erased={kind: float(_share(one[0], one[1])) for kind, one in sums.left.items()},
            preserved=float(kept.max()) if len(kept) else None,
            preserved_mean=float(kept.mean()) if len(kept) else None,
            others=float(others.mean()),
            certificate=self._certificate(eraser),
            seconds=seconds,
            eraser=eraser,
        )

    def _changes(
        self, eraser: DiffusionEraser | RepresentationEraser
    ) -> Iterator[tuple[TextMap, Tensor, Tensor]]:
        """Yield each map with the change of its weight, and of its outputs whatever it reads."""
        if isinstance(eraser, RepresentationEraser):
            function = eraser.map.to(self.source.device, self.source.dtype)
            for text_map in self.maps:
                before = self.weights[text_map.name]
                change = -(before @ function.left) @ function.right.T
                yield text_map, change, before @ function.offset
            return
        none = self.source.new_zeros(())
        with _applied(eraser, self.pipe):
            for text_map in self.maps:
                yield text_map, self.weight(text_map) - self.weights[text_map.name], none

    def _certificate(self, eraser: DiffusionEraser | RepresentationEraser) -> float | None:
        try:
            if isinstance(eraser, RepresentationEraser):
                seen = partial(text_gram, list(self.weights.values()))
                found = certificate(seen, eraser.map, self.source, self.target)
            else:
                found = eraser.certificate
        except (ConceptErasureError, ValueError):
            return None
        return float(found.rho.min())


class _Sums:
    """Squared sums over maps: of changes and of what they changed."""

    def __init__(self, kept: int, others: int, like: Tensor) -> None:
        self.size = like.new_zeros(2)
        self.left: dict[str, Tensor] = {}
        self.kept, self.others = like.new_zeros(2, kept), like.new_zeros(2, others)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return (part / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt()


def _rows(encoder: TextEncoder, names: Sequence[str], like: Tensor) -> Tensor:
    """Return the last token of each name in each template, shape ``(m, d)``."""
    if not names:
        return like.new_zeros(0, like.shape[1], dtype=torch.float32)
    prompts = [template.format(name) for template in TEMPLATES for name in names]
    return torch.cat(encoder.rows(prompts, "last_subject")).to(like.device, torch.float32)


@contextmanager
def _applied(eraser: DiffusionEraser, pipe: object) -> Iterator[None]:
    edit: Any = eraser.apply(pipe)
    try:
        yield
    finally:
        edit.undo()


def _cells(row: EditMeasured) -> dict[str, Cell]:
    """Return a row of the table."""
    cells: dict[str, Cell] = {"method": row.method, "edit": row.edit}
    for kind, value in row.erased.items():
        cells[f"left ({kind})"] = value
    return cells | {
        "preserved, mean": row.preserved_mean,
        "preserved, worst": row.preserved,
        "others, mean": row.others,
        "certificate": row.certificate,
        "seconds": row.seconds,
        "status": row.status.partition(":")[0],
    }
