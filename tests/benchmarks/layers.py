"""Fit LEACE at all layers of SmolLM2 from one pass, and show that memory does not grow with the texts.

Run ``python -m tests.benchmarks.layers --out layers.json``; a few minutes on two cores. Each size runs in its
own process, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from concept_erasure import LeaceFitter, fit_streaming
from concept_erasure.evals.models import load_smollm2
from concept_erasure.evals.texts import gender_texts

SIZES = (200, 800, 2000)


def measure(texts: int) -> dict[str, float]:
    """Fit every residual site on the first ``texts`` texts of the generator."""
    model, tokenizer = load_smollm2()
    items = gender_texts("fit", texts, seed=0)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    start = time.process_time()
    labels = torch.tensor([item.gender for item in items])
    fitters = fit_streaming(
        model,
        tokenizer,
        [item.text for item in items],
        labels,
        sites="residual.*",
        fitter=lambda width: LeaceFitter(width, 2),
        batch_size=16,
    )
    residuals = [float(str(f.eraser.report["residual"])) for f in fitters.values()]
    return {
        "texts": texts,
        "layers": len(fitters),
        "cpu_seconds": time.process_time() - start,
        "peak_mib_loaded": loaded,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "largest_residual": max(residuals),
    }


def main() -> None:
    """Print one row a size and write them as json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--texts", type=int, default=None, help="measure one size in this process")
    options = parser.parse_args()
    if options.texts is not None:
        print(json.dumps(measure(options.texts)))
        return
    rows = []
    for size in SIZES:
        command = [sys.executable, "-m", "tests.benchmarks.layers", "--texts", str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
