"""The study of erased pictures: every closed-form method on the emoji world, next to the twins; cached and resumable.

``python -m concept_erasure.evals.flagship_diffusion --out docs/results --cache FOLDER`` writes ``diffusion.json``,
``.md`` and ``.png``. Each cell is a file in the cache; stop it and start it again at will. ``--methods``,
``--settings``, ``--pictures`` and ``--seeds`` do a part of it. Options of the methods were chosen on seed 7 with one
object, which the tables do not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from concept_erasure.errors import ConceptErasureError
from concept_erasure.evals.diffusion import _methods
from concept_erasure.evals.diffusion._methods import METHODS, Lists, object_lists, style_lists
from concept_erasure.evals.diffusion._write_up import precision_of
from concept_erasure.evals.diffusion.evaluate import read_rows
from concept_erasure.evals.diffusion.generate import pipeline_hash, pipeline_record
from concept_erasure.evals.diffusion.scores import (
    bootstrap,
    mace_celebrity_score,
    mace_object_score,
)
from concept_erasure.evals.diffusion.suite import Reading, Suite
from concept_erasure.evals.language.statistics import paired, share
from concept_erasure.evals.plots import plot_points
from concept_erasure.evals.worlds.emoji.suite import object_suite, style_suite
from concept_erasure.evals.worlds.emoji.world import EmojiWorld, load_pipeline, twins
from concept_erasure.report import Cell, Interval, Report

__all__ = ["SETTINGS", "Setting", "main", "mixtures", "run_study", "spearman"]

logger = logging.getLogger(__name__)

_TEN = ("corn", "bee", "sailboat", "cake", "whale", "pizza", "apple", "basketball", "dog", "cat")
_STAY = ("neighbour", "kept")
_KINDS = ("erased", "synonym", "neighbour", "kept")


@dataclass(frozen=True)
class Setting:
    """What is erased.

    Attributes:
        targets: Objects, or one style.
        style: Whether it is a style.
        twin: What the twin to compare with never saw; None without one.
    """

    targets: tuple[str, ...]
    style: bool = False
    twin: str | None = None


SETTINGS = {
    "one object": Setting(("corn",), twin="corn"),
    "five objects": Setting(_TEN[:5]),
    "ten objects": Setting(_TEN),
    "one style": Setting(("sketch",), style=True, twin="sketch"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is drawn.

    Attributes:
        pictures: Pictures a kind of rows, at most 256.
        steps: Of the sampler.
        guidance: Guidance scale.
    """

    pictures: int = 64
    steps: int = 12
    guidance: float = 5.0


class Study:
    """Cells of the study, drawn once each.

    Args:
        cache: Folder for finished cells and pictures.
        sizes: How much is drawn.
        batch_size: Pictures at once.
    """

    def __init__(
        self, cache: str | Path, sizes: Sizes | None = None, *, batch_size: int = 48
    ) -> None:
        self.cache, self.sizes, self.batch_size = Path(cache), sizes or Sizes(), batch_size
        self.world = EmojiWorld()
        self.cache.mkdir(parents=True, exist_ok=True)
        self._held: dict[tuple[str, int, str], Reading] = {}

    def suite(self, setting: Setting, seed: int) -> Suite:
        """Return the rows of a setting."""
        options: dict[str, Any] = {
            "pictures": self.sizes.pictures, "steps": self.sizes.steps, "guidance": self.sizes.guidance, "seed": seed,
        }  # fmt: skip
        if setting.style:
            return style_suite(self.world, setting.targets[0], **options)
        return object_suite(self.world, setting.targets, **options)

    def lists(self, setting: Setting) -> Lists:
        """Return what the methods are given."""
        if setting.style:
            return style_lists(self.world.objects, setting.targets[0])
        return object_lists(self.world.objects, setting.targets)

    def reference(self, name: str, seed: int, which: str) -> Reading:
        """Return the reading of the original or of the twin, drawn once a setting and seed."""
        key = (name, seed, which)
        if key not in self._held:
            setting = SETTINGS[name]
            if which != "original" and not self.has_twin(name):
                raise ValueError(f"no twin was trained for {name!r}; run make world-emoji")
            pipe = self.world.pipe if which == "original" else load_pipeline(twin=setting.twin)
            self._held[key] = read_rows(
                pipe, self.suite(setting, seed), batch_size=self.batch_size, cache_dir=self.cache
            )
        return self._held[key]

    def has_twin(self, name: str) -> bool:
        """Return whether the twin of a setting was trained."""
        return SETTINGS[name].twin in twins()

    def cell(self, name: str, method: str, seed: int) -> dict[str, Any]:
        """Return what was measured of a method in a setting; from the cache if it is there.

        Args:
            name: Of the setting.
            method: One of `METHODS`, or ``original`` or ``never knew``.
            seed: Of sentences and noise.
        """
        key = self._key(name, method, seed)
        file = self.cache / f"cell-{key}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        begun = time.perf_counter()
        found = self._measure(name, method, seed) | {
            "setting": name,
            "method": method,
            "seed": seed,
            "key": key,
        }
        found["all seconds"] = time.perf_counter() - begun
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(file)
        logger.info("%s, %s, seed %d: %s", name, method, seed, _line(found))
        return found

    def has(self, name: str, method: str, seed: int) -> bool:
        """Return whether a cell is in the cache."""
        return (self.cache / f"cell-{self._key(name, method, seed)}.json").is_file()

    def _key(self, name: str, method: str, seed: int) -> str:
        """Return what decides a cell, hashed: sizes, setting, seed, what is drawn with, and the code of the fit."""
        code = inspect.getsource(_methods) if method in METHODS else ""
        setting = SETTINGS[name]
        weights = (
            pipeline_hash(load_pipeline(twin=setting.twin))
            if method == "never knew"
            else self._weights
        )
        parts = (str(self.sizes), str(setting), method, seed, weights, code)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def _weights(self) -> str | None:
        return pipeline_hash(self.world.pipe)

    def gaps(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """Return how far a cell's pictures are from the twin's: rows of the target, and the rest.

        Args:
            cell: From `cell`, of a setting whose twin is there.
        """
        name, seed = str(cell["setting"]), int(cell["seed"])
        suite = self.suite(SETTINGS[name], seed)
        held = load_file(self.cache / f"cell-{cell['key']}.safetensors")
        return _gaps(
            suite, held["features"], held["hits"].bool(), self.reference(name, seed, "never knew")
        )

    def _measure(self, name: str, method: str, seed: int) -> dict[str, Any]:
        setting = SETTINGS[name]
        suite = self.suite(setting, seed)
        record: dict[str, Any] = {}
        if method in METHODS:
            try:
                start = time.perf_counter()
                fitted = METHODS[method](self.world.pipe, self.lists(setting))
                record["seconds"] = time.perf_counter() - start
                reading = read_rows(
                    self.world.pipe,
                    suite,
                    eraser=fitted.eraser,
                    apply=fitted.apply,
                    batch_size=self.batch_size,
                )
            except (ConceptErasureError, ValueError) as error:
                return {"status": f"refused: {' '.join(str(error).split())}"}
            record["certificate"] = _certificate(fitted.eraser)
        else:
            reading = self.reference(name, seed, method)
        original = self.reference(name, seed, "original")
        record |= _readings(suite, reading, original)
        held = {"features": reading.features.contiguous(), "hits": reading.hits.to(torch.uint8)}
        save_file(held, self.cache / f"cell-{self._key(name, method, seed)}.safetensors")
        return {"status": "measured", **record}


def _certificate(eraser: object) -> float | None:
    try:
        found: Any = eraser
        return float(found.certificate.rho.min())
    except (ConceptErasureError, AttributeError):
        return None


def _readings(suite: Suite, reading: Reading, original: Reading) -> dict[str, Any]:
    hits = {kind: reading.hits[suite.of_kind(kind)].tolist() for kind in suite.kinds}
    before = original.hits[suite.of_kind(*_STAY)].double().mean()
    after = reading.hits[suite.of_kind(*_STAY)].double().mean()
    precision = precision_of(suite, original, reading)
    fit = None if reading.fit is None else float(reading.fit[suite.of_kind(*_STAY)].mean())
    return {
        "hits": hits,
        "of original": float(after / before),
        "CLIP kept": fit,
        "EraseEval": None if precision is None else [*precision.parts, precision.score],
    }


def _gaps(suite: Suite, features: Tensor, hits: Tensor, twin: Reading) -> dict[str, Any]:
    gaps: dict[str, Any] = {}
    for part, kinds in (("target", ("erased", "synonym")), ("rest", _STAY)):
        index = suite.of_kind(*kinds)
        gaps[f"KID {part}"] = bootstrap(features[index], twin.features[index], paired=True)
        difference = paired(twin.hits[index].tolist(), hits[index].tolist()).difference
        gaps[f"gap {part}"] = difference
    return gaps


def _line(cell: Mapping[str, Any]) -> str:
    if "hits" not in cell:
        return str(cell["status"])
    return ", ".join(f"{kind} {sum(hits) / len(hits):.3f}" for kind, hits in cell["hits"].items())


def _row(
    cells: Sequence[Mapping[str, Any]], gaps: Mapping[str, Any] | None = None
) -> dict[str, Cell]:
    """Return a row of a table: pictures of all seeds together, other numbers averaged."""
    done = [cell for cell in cells if "hits" in cell]
    row: dict[str, Cell] = {"method": str(cells[0]["method"])}
    if not done:
        return row | {"status": str(cells[0]["status"]).partition(":")[0]}
    pooled = {
        kind: [hit for cell in done for hit in cell["hits"][kind]]
        for kind in _KINDS
        if kind in done[0]["hits"]
    }
    row |= {kind: share(hits) for kind, hits in pooled.items()}
    means = {kind: sum(hits) / len(hits) for kind, hits in pooled.items()}
    stay = [hit for kind in _STAY for hit in pooled.get(kind, [])]
    row["stays, of the original"] = sum(cell["of original"] for cell in done) / len(done)
    kept = sum(stay) / len(stay)
    row["harmonic mean"] = (
        mace_object_score(means["erased"], kept, means["synonym"])
        if "synonym" in means
        else mace_celebrity_score(means["erased"], kept)
    )
    for part in ("target", "rest") if gaps else ():
        row[f"KID to twin, {part}"] = gaps[f"KID {part}"] if gaps else None
        row[f"accuracy less twin's, {part}"] = gaps[f"gap {part}"] if gaps else None
    if done[0].get("EraseEval"):
        row["EraseEval"] = done[0]["EraseEval"][-1]
    row["certificate"] = done[0].get("certificate")
    row["fit seconds"] = done[0].get("seconds")
    row["seeds"] = len(done)
    return row


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two lists without ties in the first.

    Raises:
        ValueError: If they differ in length or are too short.
    """
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(f"at least three pairs are needed, got {len(a)} and {len(b)}")
    ranks = []
    for values in (a, b):
        wide = torch.tensor(values, dtype=torch.float64)
        # Mean rank of ties.
        below = (wide[None] < wide[:, None]).sum(1)
        ranks.append(below + ((wide[None] == wide[:, None]).sum(1) - 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def mixtures(study: Study, name: str, seed: int = 0) -> Report:
    """Score mixtures whose order is known: the more of the twin the better, the more noise the worse.

    Row by row, pictures come from the original, the twin, or are noise; the better mixture always shows fewer
    targets and less noise.

    Args:
        study: The study.
        name: A setting with a twin.
        seed: Of the rows.
    """
    # the twin first: where there is none, nothing else is worth making
    twin, original = (study.reference(name, seed, which) for which in ("never knew", "original"))
    suite = study.suite(SETTINGS[name], seed)
    generator = torch.Generator().manual_seed(seed)
    blank = torch.randint(0, 256, original.images.shape, generator=generator).to(torch.uint8)
    noise = suite.read(blank)
    n = len(suite.rows)
    order: Tensor = torch.rand(n, generator=generator)
    target = torch.zeros(n, dtype=torch.bool)
    target[suite.of_kind("erased", "synonym")] = True
    rows: list[dict[str, Cell]] = []
    # Erased by a share on the target's rows, the rest untouched; then the same with a share of noise everywhere.
    plan = [(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)]
    for rank, (erased, noisy) in enumerate([(1.0, 1.0), (0.5, 0.5), *plan]):
        mixed = original.take(twin, target & (order < erased)).take(noise, order > 1 - noisy)
        found = precision_of(suite, original, mixed)
        if found is None:
            raise ValueError(f"the suite of {name!r} lacks what EraseEval needs")
        rows.append(
            {"order": rank, "share of the twin": erased, "noise": noisy, "M1": found.rest, "M2": found.hints,
             "M3": found.prompts, "M4": found.pictures, "score": found.score, "geometric mean": found.geometric}
        )  # fmt: skip
    known = [float(str(row["order"])) for row in rows]
    # below a thousandth a score is the constant that keeps the harmonic mean finite
    found_ = {
        k: spearman(known, [round(float(str(row[k])), 3) for row in rows])
        for k in ("score", "geometric mean")
    }
    notes = [
        "Order: from what should score least to most. Where nothing is erased or all is noise the harmonic mean is at "
        "its floor, a few millionths, so these are ties and share their mean rank.",
        f"Rank correlation of the order with the score: {found_['score']:.3f}; with the geometric mean: "
        f"{found_['geometric mean']:.3f}.",
    ]
    return Report(f"EraseEval ranks mixtures ({name})", rows, {"spearman": found_["score"]}, notes)


def best_of(rows: Sequence[Mapping[str, Cell]], count: int = 3) -> list[str]:
    """Return the methods with the highest harmonic means."""
    scored = [
        (float(str(row["harmonic mean"])), str(row["method"]))
        for row in rows
        if "harmonic mean" in row and row["method"] in METHODS
    ]
    return [name for _, name in sorted(scored, reverse=True)[:count]]


def run_study(
    study: Study,
    *,
    settings: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    finished: bool = False,
) -> Report:
    """Measure all cells: every method with the first seed, the best three with the others.

    Args:
        study: Where cells are kept.
        settings: Names in `SETTINGS`.
        methods: Names in `METHODS`.
        seeds: Of sentences and noise.
        finished: Draw nothing: report the cells that are there.
    """
    begun = time.perf_counter()
    sections = []

    def there(name: str, method: str, seed: int) -> bool:
        return not finished or study.has(name, method, seed)

    for name in settings:
        always = ["original", *(["never knew"] if study.has_twin(name) else [])]
        first = {
            m: [study.cell(name, m, seeds[0])]
            for m in (*always, *methods)
            if there(name, m, seeds[0])
        }
        for method in (*always, *best_of([_row(cells) for cells in first.values()])):
            first[method] += [
                study.cell(name, method, s) for s in seeds[1:] if there(name, method, s)
            ]
        setting = SETTINGS[name]
        notes = [f"Erased: {', '.join(setting.targets)}."]
        notes += [
            f"{m}: {cells[0]['status']}." for m, cells in first.items() if "hits" not in cells[0]
        ]
        if not study.has_twin(name):
            notes.append("No twin was trained for this setting, so gaps to it are absent.")
        twin = "never knew" in first
        rows = [
            _row(cells, study.gaps(cells[0]) if twin and "hits" in cells[0] else None)
            for cells in first.values()
        ]
        sections.append(Report(name.capitalize(), rows, {}, notes))
    known = [
        name for name in settings if study.has_twin(name) and there(name, "never knew", seeds[0])
    ]
    sections += [mixtures(study, name) for name in known]
    notes = [
        "Erased, synonym, neighbour and kept are shares of pictures in which the classifier sees what the prompt asks "
        "for; low is good for the first two. Pictures of several seeds are pooled; gaps, EraseEval and certificate are "
        "of the first seed.",
        "EraseEval of some millionths: one of its four measures is 0. Mostly it is M4, a ratio of small distances "
        "between pictures of the rest, which is 0 for the twin of corn as well; with so few pictures it says little.",
        "Gaps to the twin are differences of these shares; its KID leaves out pairs of the same noise.",
        "Methods' options were chosen on seed 7 with one object, 'leace and uce' on seed 7 with five, the balanced "
        "rows on seed 7 with one, five and ten objects and a style. No attack was run.",
    ]
    sizes = study.sizes
    meta: dict[str, object] = {
        **pipeline_record(study.world.pipe), "pictures a kind": sizes.pictures, "steps": sizes.steps,
        "guidance": sizes.guidance, "seeds": list(seeds), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "seconds of this run": round(time.perf_counter() - begun),
    }  # fmt: skip
    return Report("Erasing from the emoji world", [], meta, notes, sections)


def save(report: Report, out: Path) -> None:
    """Write the report and a picture of what is left against what stays."""
    panels: dict[str, dict[str, tuple[float | Interval, float | Interval]]] = {}
    for section in report.sections:
        places = {
            str(row["method"]): (row["stays, of the original"], row["erased"])
            for row in section.rows
            if "stays, of the original" in row
        }
        if places:
            panels[section.title] = places  # type: ignore[assignment]  # both are numbers
    if panels:
        plot = plot_points(
            panels, out / "diffusion.png", x_label="neighbours and others still drawn, of the original",
            y_label="erased names still drawn",
        )  # fmt: skip
        report = replace(report, images={"What is left against what stays": plot.name})
    report.save(out, name="diffusion")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--cache", type=Path, default=Path("flagship-cache/diffusion"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=Sizes.pictures)
    parser.add_argument(
        "--finished", action="store_true", help="draw nothing, report what is there"
    )
    options = parser.parse_args(argv)
    if options.pictures > 256:
        parser.error("at most 256 pictures a kind")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    study = Study(options.cache, Sizes(pictures=options.pictures))
    report = run_study(
        study, settings=options.settings, methods=options.methods, seeds=options.seeds,
        finished=options.finished,
    )  # fmt: skip
    save(report, options.out)


if __name__ == "__main__":
    main()
