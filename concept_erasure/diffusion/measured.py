"""What a fit reports of an edit: how far it moves what should stay, what the cast loses, and the certificate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_erasure.diffusion.core import Metric, Pairs, PairSums, text_gram
from concept_erasure.diffusion.maps import TextMap, module_at
from concept_erasure.diffusion.reach import Certificate, certificate, certificate_by_layer
from concept_erasure.diffusion.targets import chosen_maps
from concept_erasure.linalg import LowRankAffine

if TYPE_CHECKING:
    from concept_erasure.diffusion.eraser import DiffusionEraser

__all__ = ["certified", "changed_entries", "measured"]

ROWS_PER_CONCEPT = 8  # tokens of a concept for which the certificate is computed
SAMPLED_MAPS = 4  # weights on which the effect of the cast is measured


def measured(
    made: DiffusionEraser,
    pairs: Pairs | PairSums | None,
    metric: Metric,
    *,
    preserved: Tensor | None = None,
    blank: Tensor | None = None,
) -> dict[str, object]:
    """Return what the shared edit does to the embeddings."""
    edit = made.map
    report: dict[str, object] = {
        "concepts": len(made.concepts),
        "rank": edit.rank,
        "free_dimensions": metric.dimension,
        "edit_size": float(
            ((edit.left.T @ edit.left) * (edit.right.T @ edit.right)).sum().clamp_min(0).sqrt()
        ),
    }
    if pairs is not None:
        report["pairs"] = len(pairs)
    if isinstance(pairs, Pairs) and len(pairs):
        wanted = torch.linalg.vector_norm(pairs.target - pairs.source, dim=1)
        left = torch.linalg.vector_norm(pairs.target - edit(pairs.source), dim=1)
        report["residual"] = float((left[wanted > 0] / wanted[wanted > 0]).max())
    if metric.gram is not None and float(metric.gram.trace()) > 0:
        moved = edit.right.T @ metric.gram @ edit.right
        size = ((edit.left.T @ edit.left) * moved).sum().clamp_min(0)
        report["preserved_drift_rms"] = float((size / metric.gram.trace()).sqrt())
    for name, rows in (("preserved_drift_max", preserved), ("blank_drift", blank)):
        if rows is not None and len(rows):
            report[name] = _drift(edit, rows)
    if blank is None and metric.invariants is not None:
        report["invariant_drift"] = _drift(edit, metric.invariants)
    return report


def _drift(edit: LowRankAffine, rows: Tensor) -> float:
    rows = rows.reshape(-1, edit.width).to(edit.left)
    size = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    moved = torch.linalg.vector_norm((rows @ edit.right) @ edit.left.T, dim=1)
    return float((moved / size).max())


@torch.no_grad()
def changed_entries(made: DiffusionEraser, pipe: object) -> dict[str, object]:
    """Return which share of the weight entries is another number after the edit was cast to their dtype."""
    targets = [
        t for t in made._targets(pipe) if not t.map.quantised and not t.module.weight.is_meta
    ]
    if not targets:
        return {}
    step = -(-len(targets) // SAMPLED_MAPS)
    changed = total = 0
    for target in targets[::step]:
        weight = target.module.weight.detach()
        now = target.folded().to(weight.dtype)
        columns = target.map.text_columns
        changed += int((now != weight)[:, columns].sum())
        total += weight[:, columns].numel()
    dtype = str(targets[0].module.weight.dtype).removeprefix("torch.")
    return {"changed_entries": changed / total, "weight_dtype": dtype}


def certified(
    made: DiffusionEraser, pairs: Pairs | PairSums | None, pipe: object | None, prefix: str = ""
) -> dict[str, object]:
    """Return the certificate: for each concept the token that is easiest to reach.

    Args:
        made: The eraser.
        pairs: Those of the prefix; without them, or if they do not tell the concepts apart, there is none.
        pipe: The pipeline whose weights see the edit; None where an invertible edit needs none.
        prefix: ``""`` for text embeddings, ``"pooled_"`` for pooled vectors.
    """
    missing = f"{prefix}certificate_missing"
    if not isinstance(pairs, Pairs) or pairs.concept is None or not len(pairs):
        return {missing: "the pairs do not tell the concepts apart"}
    moved = (pairs.source != pairs.target).any(1)
    owned = [
        ((pairs.concept == number) & moved).nonzero()[:ROWS_PER_CONCEPT, 0]
        for number in range(len(made.concepts))
    ]
    rows = torch.cat(owned)
    if not len(rows):
        return {missing: "no concept moves"}
    try:
        found = _found(made, pairs.source[rows], pairs.target[rows], pipe, prefix)
    except ValueError as error:
        return {missing: str(error)}
    easiest: list[int] = []
    order = list(zip(found.rho.tolist(), found.distance.tolist(), range(len(rows)), strict=True))
    for start, own in zip(
        torch.tensor([len(own) for own in owned]).cumsum(0).tolist(), owned, strict=True
    ):
        if len(own):
            easiest.append(min(order[start - len(own) : start])[2])
    names = tuple(made.concepts[int(pairs.concept[rows[i]])] for i in easiest)
    kept = Certificate(
        found.rho[easiest], found.distance[easiest], found.norm[easiest], True, names
    )
    return {f"{prefix}certificate": kept.to_dict()}


def _found(
    made: DiffusionEraser, source: Tensor, target: Tensor, pipe: object | None, prefix: str
) -> Certificate:
    if made.options.layers and not prefix:
        if pipe is None:
            raise ValueError("the edit differs by layer, so its certificate needs the pipeline")
        return certificate_by_layer(partial(_layer_weights, made, pipe), source, target)
    edit = made.pooled_map if prefix else made.map
    seen = None if pipe is None else partial(_seen, made, pipe, pooled=bool(prefix))
    return certificate(seen, edit or made.map, source, target)


def _maps(made: DiffusionEraser, pipe: object, *, pooled: bool) -> list[TextMap]:
    found = chosen_maps(pipe, made.options.maps, pooled=pooled)
    return [m for m in found if not m.quantised and (m.kind == "pooled") == pooled]


def _seen(made: DiffusionEraser, pipe: object, *, pooled: bool) -> Tensor:
    """Return H of the maps that are edited."""
    maps = _maps(made, pipe, pooled=pooled)
    return text_gram(module_at(pipe, m).weight.detach()[:, m.text_columns] for m in maps)


def _layer_weights(made: DiffusionEraser, pipe: object) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(W, W')`` of the text maps, in at least single precision."""
    for target in made._targets(pipe):
        if target.map.kind != "pooled" and not target.map.quantised:
            columns = target.map.text_columns
            yield target.module.weight.detach()[:, columns], target.folded()[:, columns]
