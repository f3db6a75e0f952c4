"""Measure concept-erasure 0.2.4; run by `linear.py` in a process where that package comes first.

Usage: ``python linear_reference.py FOLDER OUT_JSON OUT_TENSORS THREADS WIDTH...``
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from linear_data import ROWS, cases, features, residual
from safetensors.torch import save_file

import concept_erasure


def main() -> None:
    """Write CPU seconds, residuals and outputs of the reference."""
    folder, out_json, out_tensors, threads, *widths = sys.argv[1:]
    if not Path(concept_erasure.__file__).resolve().is_relative_to(Path(folder).resolve()):
        raise SystemExit(f"concept_erasure was not imported from {folder}")
    torch.set_num_threads(int(threads))
    found: dict[str, object] = {}
    tensors = {}
    for width in map(int, widths):
        x, z = features(ROWS, width)
        runs = []
        for _ in range(3 if width < 1000 else 1):
            start = time.process_time()
            fitter = concept_erasure.LeaceFitter.fit(x, z, shrinkage=False, svd_tol=1e-6)
            middle = time.process_time()
            eraser = fitter.eraser
            stop = time.process_time()
            runs.append((stop - start, middle - start, stop - middle))
        names = ("fit", "statistics", "eraser")
        least = [min(column) for column in zip(*runs, strict=True)]
        found[str(width)] = dict(zip(names, least, strict=True))
        tensors[str(width)] = eraser(x[:512]).contiguous()
    table = {}
    for case in cases():
        try:
            eraser = concept_erasure.LeaceEraser.fit(case.x, case.z)
            table[case.name] = residual(eraser.proj_left, eraser.proj_right, case)
        except (RuntimeError, AssertionError) as error:
            table[case.name] = f"{type(error).__name__}"
    found["exactness"] = table
    Path(out_json).write_text(json.dumps(found))
    save_file(tensors, out_tensors)


main()
