"""The report of an evaluation of pictures: tables, paired tests, distances, EraseEval, grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from concept_erasure.evals.diffusion.erase_eval import Precision, erase_eval
from concept_erasure.evals.diffusion.grids import picture_grid
from concept_erasure.evals.diffusion.scores import (
    bootstrap,
    frechet_distance,
    mace_celebrity_score,
    mace_object_score,
    mean_interval,
)
from concept_erasure.evals.diffusion.suite import KINDS, Reading, Suite
from concept_erasure.evals.language.statistics import paired
from concept_erasure.report import Cell, Report

__all__ = ["precision_of", "with_pictures", "write_up"]

_STAY = ("neighbour", "kept")
_FEW = 2048  # pictures below which a Fréchet distance of wide features is mostly bias


def write_up(
    suite: Suite,
    readings: Mapping[str, Reading],
    *,
    meta: Mapping[str, object],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Report:
    """Return the report; the reading ``original`` comes first, ``never knew`` is the reference if it is there."""
    counts = {kind: len(suite.of_kind(kind)) for kind in suite.kinds}
    notes = [f"{kind}: {KINDS[kind]}, {count} pictures" for kind, count in counts.items()]
    notes += [
        f"Accuracy is the share of pictures in which {suite.judge.name} sees what was asked for; guessing gives "
        f"{suite.chance:.3f}. Intervals are Wilson's, 95 %.",
        "No attack was run: what a prompt, an embedding, a latent or fine-tuning brings back is not in this report.",
    ]
    sections = [
        _paired_section(suite, readings),
        _distance_section(suite, readings, perceptual, seed),
    ]
    sections += _precision_sections(suite, readings)
    record = {"targets": list(suite.targets), "rows": len(suite.rows), **_settings(suite), **meta}
    rows = [{"pipeline": name, **_cells(suite, one)} for name, one in readings.items()]
    return Report(suite.name, rows, record, notes, sections)


def _settings(suite: Suite) -> dict[str, object]:
    guidance, steps, height, width, _ = suite.rows[0].settings()
    matcher = None if suite.matcher is None else suite.matcher.name
    size = f"{width} x {height}"
    return {
        "guidance": guidance,
        "steps": steps,
        "size": size,
        "judge": suite.judge.name,
        "matcher": matcher,
    }


def _cells(suite: Suite, reading: Reading) -> dict[str, Cell]:
    """Return a row of the first table."""
    found = {kind: reading.accuracy(suite.of_kind(kind)) for kind in suite.kinds}
    cells: dict[str, Cell] = dict(found)
    stays = [kind for kind in _STAY if kind in found]
    if stays:
        kept = float(reading.hits[suite.of_kind(*stays)].double().mean())
        erased = found["erased"].value
        if "synonym" in found:
            cells["harmonic mean"] = mace_object_score(erased, kept, found["synonym"].value)
        else:
            cells["harmonic mean"] = mace_celebrity_score(erased, kept)
    if reading.fit is not None:
        cells["CLIP erased"] = mean_interval(100 * reading.fit[suite.of_kind("erased")])
        if stays:
            cells["CLIP kept"] = mean_interval(100 * reading.fit[suite.of_kind(*stays)])
    return cells


def _paired_section(suite: Suite, readings: Mapping[str, Reading]) -> Report:
    """Compare every pipeline with the original, row by row."""
    rows: list[dict[str, Cell]] = []
    for name, reading in list(readings.items())[1:]:
        for kind in suite.kinds:
            index = suite.of_kind(kind)
            test = paired(readings["original"].hits[index].tolist(), reading.hits[index].tolist())
            rows.append(
                {"pipeline": name, "kind": kind, "lost": test.lost, "gained": test.gained,
                 "difference": test.difference, "p": test.p}
            )  # fmt: skip
    note = "Same prompts and same noise; lost and gained count pictures, p is McNemar's exact test."
    return Report("Against the original, picture by picture", rows, notes=[note])


def _distance_section(
    suite: Suite,
    readings: Mapping[str, Reading],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    seed: int,
) -> Report:
    """Return distances of each pipeline from the original on what must stay, and from the twin on everything."""
    rows: list[dict[str, Cell]] = []
    kinds = {"target": ("erased", "synonym"), "rest": _STAY}
    aims = [name for name in ("original", "never knew") if name in readings]
    for aim in aims:
        for name, reading in readings.items():
            for part, chosen in kinds.items():
                index = suite.of_kind(*chosen)
                if name == aim or len(index) < 2 or (name, aim) == ("original", "never knew"):
                    continue
                cells: dict[str, Cell] = {"pipeline": name, "from": aim, "rows": part}
                far = _distances(reading, readings[aim], index, perceptual, seed)
                rows.append(cells | far)
    smallest = min((len(suite.of_kind(*chosen)) for chosen in kinds.values()), default=0)
    notes = [
        f"KID and FID are of features of {suite.judge.name}, CMMD (times 1000) of the matcher; their zero is the other "
        "pipeline's pictures of the same rows, not real ones. KID: unbiased, without subsets or the pairs themselves, "
        "bootstrap interval.",
        "Change is the mean absolute difference of a pixel, of 255, in paired pictures.",
    ]
    if smallest < _FEW:
        notes.append(
            f"FID of {smallest} pictures is biased upwards; compare it within this table only."
        )
    return Report("How far pictures are", rows, notes=notes)


def _distances(
    one: Reading,
    other: Reading,
    index: list[int],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    seed: int,
) -> dict[str, Cell]:
    cells: dict[str, Cell] = {
        "KID": bootstrap(one.features[index], other.features[index], paired=True, seed=seed),
        "FID": frechet_distance(one.features[index], other.features[index]),
    }
    if one.embedding is not None and other.embedding is not None:
        cells["CMMD"] = bootstrap(
            one.embedding[index], other.embedding[index], distance="cmmd", paired=True, seed=seed
        )
    pictures = one.images[index], other.images[index]
    cells["change"] = float((pictures[0].float() - pictures[1].float()).abs().mean())
    if perceptual is not None:
        cells["LPIPS"] = mean_interval(perceptual(*pictures))
    return cells


def precision_of(suite: Suite, original: Reading, edited: Reading) -> Precision | None:
    """Return EraseEval's measures of an edited model; None if they cannot be had: parts are missing, or no hint works.

    Args:
        suite: With matcher, captions, real pictures, and rows of kinds erased, synonym and kept.
        original: Reading of the original.
        edited: Reading of the edited model.
    """
    parts = [
        (original.views(suite, *kinds), edited.views(suite, *kinds))
        for kinds in (("erased",), ("synonym",), _STAY)
    ]
    if suite.real is None or suite.matcher is None:
        return None
    rows = [suite.rows[i] for i in suite.of_kind(*_STAY)]
    named, hinted, others = parts
    if None in named or None in hinted or None in others or not rows:
        return None
    if not bool((hinted[0].shows.double().mean(1) > 0.5).any()):  # type: ignore[union-attr]
        return None  # no hint works on the original: nothing to measure
    real = suite.matcher.embed_images(suite.real(rows)).cpu()
    return erase_eval(named, hinted, others, real)  # type: ignore[arg-type]  # none of them is None


def _precision_sections(suite: Suite, readings: Mapping[str, Reading]) -> list[Report]:
    rows: list[dict[str, Cell]] = []
    for name, reading in readings.items():
        found = precision_of(suite, readings["original"], reading)
        if found is None:
            return []
        rows.append(
            {"pipeline": name, "M1 rest": found.rest, "M2 hints": found.hints, "M3 prompts": found.prompts,
             "M4 pictures": found.pictures, "score": found.score, "minimum": found.minimum,
             "geometric mean": found.geometric}
        )  # fmt: skip
    notes = [
        "EraseEval's four measures with the offline preset: the judge detects, captions are the attributes it sees.",
        "The score is the harmonic mean. M4 is a ratio of small numbers: read it with CMMD above.",
    ]
    return [Report("EraseEval", rows, notes=notes)]


def with_pictures(
    report: Report, suite: Suite, readings: Mapping[str, Reading], out: Path, *, each: int = 3
) -> Report:
    """Return the report with a grid of pictures, written into the folder: the first rows of each kind.

    Args:
        report: The report.
        suite: Its suite.
        readings: What to show.
        out: The folder.
        each: Different prompts of each kind.
    """
    index = []
    for kind in suite.kinds:
        first: dict[str, int] = {}
        for i in suite.of_kind(kind):
            first.setdefault(suite.rows[i].prompt, i)
        index += list(first.values())[:each]
    columns = {name: reading.images[torch.tensor(index)] for name, reading in readings.items()}
    labels = [suite.rows[i].prompt for i in index]
    path = picture_grid(columns, labels, out / "pictures.png", title=suite.name)
    return replace(report, images={**report.images, "Same prompt, same noise": path.name})
