"""What background rows are worth: perplexity after one LEACE eraser at one layer of SmolLM2, with and without.

Run ``python -m tests.benchmarks.background --out background.json``; about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from concept_erasure import LeaceFitter, fit_streaming
from concept_erasure.evals.language import perplexity
from concept_erasure.evals.models import load_smollm2
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, gender_texts


def measure(layers: list[int], texts: int, seed: int) -> list[dict[str, float | bool]]:
    """Return one row a layer and setting, after a first row for the untouched model."""
    model, tokenizer = load_smollm2()
    items = gender_texts("fit", texts, seed=seed)
    rows: list[dict[str, float | bool]] = [
        {"layer": -1, "perplexity": perplexity(model, tokenizer, NEUTRAL_SENTENCES)}
    ]
    for background in (False, True):
        fitters = fit_streaming(
            model,
            tokenizer,
            [item.text for item in items],
            [item.gender for item in items],
            sites=[f"residual.{layer}" for layer in layers],
            tokens="last",
            background=background,
            fitter=lambda width: LeaceFitter(width, 2, classes=(0, 1)),
        )
        for layer, fitter in zip(layers, fitters.values(), strict=True):
            with fitter.eraser.attach(model):
                found = perplexity(model, tokenizer, NEUTRAL_SENTENCES)
            gap = float(str(fitter.eraser.report["residual"]))
            rows.append(
                {"layer": layer, "background": background, "perplexity": found, "residual": gap}
            )
    return rows


def main() -> None:
    """Print the rows and write them as json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", type=int, nargs="+", default=[14, 20, 26, 29])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = measure(options.layers, options.texts, options.seed)
    for row in rows:
        print(row)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
