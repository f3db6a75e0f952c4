"""Benchmark of LEACE: exactness, and CPU time against concept-erasure 0.2.4.

    python -m tests.benchmarks.linear --out results.json [--reference FOLDER]

FOLDER is where the reference is installed on its own, as both packages have one import name::

    pip install --no-deps --target FOLDER concept-erasure==0.2.4

It runs in a child process. Times are CPU seconds (``time.process_time``, all threads), float64 data,
``shrinkage=False`` on both sides; the reference keeps its other defaults. Goals are ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from concept_erasure.linalg import Moments
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from tests.benchmarks.linear_data import ROWS, cases, features, residual

WIDTHS = (768, 2048)
Row = dict[str, object]


def cpu_seconds(function: Callable[[], object], repeat: int = 3) -> float:
    """Return the least CPU time of some runs."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def exactness(reference: dict[str, object]) -> list[Row]:
    """Return one row per case: ``||PA|| / ||A||`` with the factors in the dtype they are applied in."""
    rows: list[Row] = []
    for case in cases():
        kind = torch.float64 if case.x.dtype == torch.float64 else torch.float32
        for method in ("leace", "orth"):
            eraser = LeaceEraser.fit(case.x, case.z, method=method, z_kind="continuous")
            factors = eraser.map.to(dtype=kind)
            got = residual(factors.left, factors.right.T, case)
            row: Row = {
                "case": case.name,
                "method": method,
                "residual": got,
                "bound": case.bound,
                "met": got <= case.bound,
            }
            if method == "leace" and case.name in reference:
                row["reference"] = reference[case.name]
            rows.append(row)
    return rows


def goal(name: str, value: float, bound: float, *, at_least: bool) -> Row:
    """Return a row of the goals table."""
    met = value >= bound if at_least else value <= bound
    return {
        "goal": name,
        "value": value,
        "want": f"{'>=' if at_least else '<='} {bound:g}",
        "met": met,
    }


def statistics() -> list[Row]:
    """Return the cost of `Moments` over that of a bare product of the same shape and dtype."""
    rows = []
    for width in WIDTHS:
        for dtype in (torch.float64, torch.float32):
            x, z = features(ROWS, width)
            x, target = x.to(dtype), z[:, None]
            product = cpu_seconds(lambda x=x: x.T @ x)  # type: ignore[misc]
            ours = cpu_seconds(lambda x=x, t=target, w=width: Moments(w, 1).update(x, t))  # type: ignore[misc]
            kind = str(dtype).removeprefix("torch.")
            name = f"statistics / bare product, {ROWS} x {width} {kind}"
            rows.append(goal(name, ours / product, 1.6, at_least=False))
    return rows


def ours_at(width: int) -> tuple[dict[str, float], torch.Tensor]:
    """Return our CPU seconds at one width and the erased first rows."""
    x, z = features(ROWS, width)
    target = z[:, None]
    fitter = LeaceFitter(width, 1, shrinkage=False).update(x, target)
    more = [LeaceFitter(width, 1, shrinkage=False).merge(fitter) for _ in range(3)]
    step = cpu_seconds(lambda: more.pop().eraser)
    fit = cpu_seconds(lambda: LeaceEraser.fit(x, target, z_kind="continuous", shrinkage=False))
    return {"fit": fit, "eraser": step}, fitter.eraser(x[:512])


def run_reference(
    folder: str, work: Path, threads: int
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Run the reference in a child process; return its numbers and outputs."""
    script = Path(__file__).with_name("linear_reference.py")
    out_json, out_tensors = work / "reference.json", work / "reference.safetensors"
    command = [sys.executable, str(script), folder, str(out_json), str(out_tensors), str(threads)]
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, *map(str, WIDTHS)], check=True, env=environment, cwd=work)
    return json.loads(out_json.read_text()), load_file(out_tensors)


def compare(
    reference: dict[str, object], outputs: dict[str, torch.Tensor]
) -> tuple[list[Row], Row]:
    """Return the goals against the reference, and the CPU seconds behind them."""
    rows, seconds = [], {}
    for width in WIDTHS:
        ours, erased = ours_at(width)
        theirs = reference[str(width)]
        if not isinstance(theirs, dict):
            raise TypeError(f"the reference's numbers are not a table: {theirs!r}")
        seconds[str(width)] = {"ours": ours, "reference": theirs}
        step, fit = theirs["eraser"] / ours["eraser"], theirs["fit"] / ours["fit"]
        if width == 2048:
            rows.append(
                goal(f"eraser step, reference / ours, d = {width}", step, 20, at_least=True)
            )
        least = 2.0 if width == 2048 else 1.0
        rows.append(
            goal(f"whole fit, reference / ours, {ROWS} x {width}", fit, least, at_least=True)
        )
        gap = float((erased - outputs[str(width)]).abs().max())
        rows.append(goal(f"largest difference of outputs, d = {width}", gap, 1e-10, at_least=False))
    return rows, seconds


def table(rows: list[Row]) -> str:
    """Return rows as a markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    """Run everything, print the tables, write the json; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="json file to write")
    parser.add_argument("--reference", help="folder with concept-erasure 0.2.4")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, both sides")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reference: dict[str, object] = {}
    goals, seconds = statistics(), {}
    if options.reference:
        with tempfile.TemporaryDirectory() as work:
            folder = str(Path(options.reference).resolve())
            reference, outputs = run_reference(folder, Path(work), options.threads)
        against, seconds = compare(reference, outputs)
        goals += against
    known = reference.get("exactness", {})
    exact = exactness(known if isinstance(known, dict) else {})
    print(table(exact), table(goals), sep="\n\n")
    met = all(bool(row["met"]) for row in [*exact, *goals])
    result = {
        "met": met,
        "exactness": exact,
        "goals": goals,
        "cpu_seconds": seconds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": options.threads,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
