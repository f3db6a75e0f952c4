"""Every linear method on real word vectors: what fresh probes still read, the size of the edit, the seconds.

    python -m tests.benchmarks.vectors --vectors word_vectors.npz [--out vectors.json] [--plots FOLDER] [--seeds 3]

The npz holds ``vectors`` (n, 300), and ``gender`` and ``sentiment`` (0, 1, or -1 for words without one); each concept
is erased from the words that have it. Per seed, half of the words fit the erasers, 30 % train the probes, 20 % test
them; the table's methods and probes are those of `concept_erasure.evals.compare`. The task that ``splince`` keeps is
the other concept, in three classes.

Methods that are given the labels when they erase (``oracle``, ``quadratic``) are measured likewise, with the labels of
the rows they erase, and stand apart: what a probe reads of them is not what it would read of words without labels.

R-LACE and INLP run with their defaults. The goal is that LEACE's edit is no larger than that of any other guarding map
of the vectors alone: exactly so on the rows of the fit without shrinkage (the theorem), and measured with the defaults
on the rows held out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from concept_erasure import registry
from concept_erasure.evals.compare import BASELINE, Measured, _parts, compare
from concept_erasure.evals.plots import plot_tradeoff
from concept_erasure.probes import ProbeResult, evaluate
from concept_erasure.report import Interval

CONCEPTS = {"gender": "sentiment", "sentiment": "gender"}  # concept: task that is kept
PROBES = ("linear", "kernel")
FIT, TEST = 0.5, 0.2
SHARES = (0.1, 0.25, 0.5, 0.65)  # of the words that fit LEACE; what a probe reads is sampling error
UNSHRUNK = "leace, no shrinkage"
Row = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """The words that have a concept: vectors ``(n, 300)``, labels and task labels ``(n,)``."""

    x: Tensor
    z: Tensor
    y: Tensor


def load(path: Path, concept: str) -> Words:
    """Return the words with a concept."""
    with np.load(path, allow_pickle=False) as stored:
        keep = stored[concept] >= 0
        x = stored["vectors"][keep].astype(np.float64)
        z, y = (stored[name][keep].astype(np.int64) for name in (concept, CONCEPTS[concept]))
    return Words(torch.from_numpy(x), torch.from_numpy(z), torch.from_numpy(y))


def linear_methods() -> list[registry.Method]:
    """Return the registered linear methods, by name."""
    found = [registry.METHODS[name] for name in sorted(registry.METHODS)]
    return [method for method in found if method.family == "linear"]


def size(before: Tensor, after: Tensor) -> float:
    """Return E|x' - x|^2 / tr Sigma."""
    total = (before - before.mean(0)).square().sum()
    return float((after - before).square().sum() / total)


def row(
    concept: str,
    seed: int,
    method: str,
    edits: tuple[float | None, float | None],
    seconds: float | None,
    probes: Mapping[str, ProbeResult],
) -> Row:
    """Return a row of the result: sizes of edit on held-out rows and on those of the fit, and the probes."""
    name = "leace" if method == UNSHRUNK else method
    promises = registry.METHODS[name].guarantees if name in registry.METHODS else frozenset()
    out: Row = {"concept": concept, "seed": seed, "method": method}
    out |= {"guards": "guarded" in promises, "needs_labels": "needs_labels" in promises}
    out |= {"edit": edits[0], "edit_fit": edits[1], "cpu_seconds": seconds}
    for probe, result in probes.items():
        gain = result.constant_log_loss - (result.log_loss or math.nan)
        out[probe] = {
            "accuracy": [result.accuracy, result.low, result.high],
            "balanced": [result.balanced_accuracy, result.balanced_low, result.balanced_high],
            "majority": result.majority,
            "bits": gain / math.log(2),
        }
    return out


def swept(concept: str, words: Words, seed: int) -> list[Row]:
    """Return the methods that map vectors, and LEACE without shrinkage."""
    names = [m.name for m in linear_methods() if "needs_labels" not in m.guarantees]
    options = {"y": words.y, "probes": PROBES, "fit_share": FIT, "test_share": TEST, "seed": seed}
    found = list(compare(words.x, words.z, names, **options).rows)
    bare = {"leace": {"shrinkage": False}}
    again = compare(words.x, words.z, ["leace"], **options, options=bare).rows[1]
    rows = [(one.method, one) for one in found] + [(UNSHRUNK, again)]
    fit = _parts(words.z.tolist(), FIT, TEST, None, seed, words.x.device)[0]
    return [
        row(concept, seed, name, (one.edit, edit_of(one, words.x[fit])), one.seconds, one.probes)
        | {"directions": rank_of(one)}
        for name, one in rows
        if one.ok or refuse(one)
    ]


def by_rows(concept: str, words: Words, seed: int) -> list[Row]:
    """Return what a fresh linear probe reads after LEACE, by the share of words that fit it."""
    rows: list[Row] = []
    for share in SHARES:
        options = {"probes": ["linear"], "fit_share": share, "test_share": TEST, "seed": seed}
        found = compare(words.x, words.z, ["leace"], **options)
        balanced = found.rows[1].probes["linear"].balanced_accuracy
        rows.append({"concept": concept, "seed": seed, "fit": found.sizes[0], "share": share})
        rows[-1] |= {"probe": found.sizes[1], "balanced": balanced}
    return rows


def edit_of(one: Measured, x: Tensor) -> float | None:
    """Return the size of the edit on the rows of the fit."""
    if one.method == BASELINE:
        return 0.0
    return None if one.eraser is None else size(x, one.eraser(x))


def rank_of(one: Measured) -> object:
    """Return how many directions a map removes; None if its report does not say."""
    report: Mapping[str, object] = getattr(one.eraser, "report", {})
    return report.get("rank")


def refuse(one: Measured) -> bool:
    """Stop: a method that is not measured would silently be missing from the table."""
    raise SystemExit(f"{one.method}: {one.status}")


def labelled(concept: str, words: Words, seed: int) -> list[Row]:
    """Return the methods that are given the labels of the rows they erase."""
    rows: list[Row] = []
    fit, train, test = _parts(words.z.tolist(), FIT, TEST, None, seed, words.x.device)
    rest = torch.cat([train, test])
    for method in linear_methods():
        if "needs_labels" not in method.guarantees:
            continue
        start = time.process_time()
        eraser = method.load().fit(words.x[fit], words.z[fit], **method.options)
        seconds = time.process_time() - start
        clean = {name: eraser(words.x[part], words.z[part]) for name, part in
                 (("fit", fit), ("train", train), ("test", test))}  # fmt: skip
        probes = {
            probe: evaluate(
                clean["train"], words.z[train].tolist(), clean["test"], words.z[test].tolist(),
                probe=probe, seed=seed,
            )
            for probe in PROBES
        }  # fmt: skip
        after = torch.cat([clean["train"], clean["test"]])
        edits = size(words.x[rest], after), size(words.x[fit], clean["fit"])
        rows.append(row(concept, seed, method.name, edits, seconds, probes))
    return rows


def goals(rows: list[Row]) -> list[Row]:
    """Return, per concept and seed, LEACE's edit beside the least of the other guarding maps."""
    out: list[Row] = []
    for concept, seed in dict.fromkeys((r["concept"], r["seed"]) for r in rows):
        mine = [r for r in rows if (r["concept"], r["seed"]) == (concept, seed)]
        others = [r for r in mine if r["guards"] and not r["needs_labels"]]
        others = [r for r in others if r["method"] not in ("leace", UNSHRUNK)]
        for ours, key in (("leace", "edit"), (UNSHRUNK, "edit_fit")):
            value = next(r[key] for r in mine if r["method"] == ours)
            best = min(others, key=lambda r: r[key])
            bound = best[key]
            out.append(
                {
                    "goal": f"{ours}: edit on {'held-out' if key == 'edit' else 'fit'} rows",
                    "concept": concept, "seed": seed, "value": value,
                    "least_other": bound, "least_other_method": best["method"],
                    "met": value <= bound * (1 + 1e-9),
                }
            )  # fmt: skip
    return out


def table(rows: list[Row], concept: str) -> str:
    """Return one line a method: means over seeds, and the interval of the first seed."""
    head = ["method", "directions", "edit", "edit on fit rows", "CPU s"]
    for probe in PROBES:
        head += [f"{probe}, all seeds", f"{probe}, seed 0", f"{probe} bits"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        mine = [r for r in rows if r["method"] == method and r["concept"] == concept]
        cells = [method + (" (given the labels)" if mine[0]["needs_labels"] else "")]
        ranks = sorted({r["directions"] for r in mine if r.get("directions") is not None})
        cells.append("-".join(str(rank) for rank in dict.fromkeys(ranks[:1] + ranks[-1:])) or "-")
        cells += [_mean(mine, lambda r: r["edit"], 4), _mean(mine, lambda r: r["edit_fit"], 4)]
        cells.append(_mean(mine, lambda r: r["cpu_seconds"], 3))
        for probe in PROBES:
            value, low, high = mine[0][probe]["balanced"]
            cells.append(_mean(mine, lambda r, p=probe: r[p]["balanced"][0], 3))
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]")
            cells.append(_mean(mine, lambda r, p=probe: r[p]["bits"], 3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares_table(rows: list[Row], concept: str) -> str:
    """Return one line a share of the words that fit LEACE: means over seeds."""
    lines = ["| words of the fit | words of the probe | linear probe |", "|---|---|---|"]
    for share in SHARES:
        mine = [r for r in rows if (r["concept"], r["share"]) == (concept, share)]
        value = _mean(mine, lambda r: r["balanced"], 3)
        lines.append(f"| {mine[0]['fit']} | {mine[0]['probe']} | {value} |")
    return "\n".join(lines)


def _mean(rows: list[Row], value: Callable[[Row], object], digits: int) -> str:
    found = [v for r in rows if isinstance(v := value(r), int | float)]
    return f"{mean(found):.{digits}f}" if found else "-"


def plot(result: Mapping[str, object], folder: Path) -> list[Path]:
    """Draw balanced accuracy against size of edit from the json, first seed, a picture a concept."""
    paths = []
    for concept in CONCEPTS:
        rows = [
            one
            for one in cast("list[Any]", result["rows"])
            if one["concept"] == concept and one["seed"] == 0 and one["method"] != BASELINE
        ]
        leaks = {
            f"{probe} probe": {one["method"]: Interval(*one[probe]["balanced"]) for one in rows}
            for probe in PROBES
        }
        edits = {one["method"]: one["edit"] for one in rows}
        path = folder / f"vectors_{concept}.png"
        words = cast("dict[str, int]", result["words"])[concept]
        paths.append(
            plot_tradeoff(
                leaks, edits, path, chance=0.5, title=f"{concept}, {words} word vectors, seed 0",
                leak_label="balanced accuracy of a fresh probe",
            )
        )  # fmt: skip
    return paths


def main() -> int:
    """Measure, print the tables, write json and plot; 1 if LEACE's edit is not the least."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=Path, help="npz with vectors, gender and sentiment")
    parser.add_argument("--out", type=Path, help="json file to write")
    parser.add_argument("--plots", type=Path, help="folder of the pictures")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    if options.vectors is None or not options.vectors.is_file():
        print(f"skipped: --vectors must name an npz of word vectors; got {options.vectors}")
        return 0
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    shares: list[Row] = []
    sizes: dict[str, int] = {}
    for concept in CONCEPTS:
        words = load(options.vectors, concept)
        sizes[concept] = len(words.x)
        for seed in range(options.seeds):
            rows += swept(concept, words, seed) + labelled(concept, words, seed)
            shares += by_rows(concept, words, seed)
            print(f"{concept}, seed {seed}: done", file=sys.stderr)
    found = goals(rows)
    result = {
        "met": all(bool(goal["met"]) for goal in found), "goals": found, "rows": rows,
        "leace_by_rows": shares,
        "data": options.vectors.name, "words": sizes, "seeds": options.seeds,
        "shares": {"fit": FIT, "probe": round(1 - FIT - TEST, 3), "test": TEST},
        "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "threads": options.threads,
    }  # fmt: skip
    for concept in CONCEPTS:
        print(f"\n## {concept}, {sizes[concept]} words\n\n{table(rows, concept)}")
        print(f"\n{shares_table(shares, concept)}")
    for goal in found:
        print(goal)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plots is not None:
        plot(result, options.plots)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
