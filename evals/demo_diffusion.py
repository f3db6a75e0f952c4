"""Erase an object and a style from the small pipeline that ships, and show before and after.

``python -m concept_erasure.evals.demo_diffusion --out demo-out``, or ``make demo-diffusion``: no download, under three
minutes on two cores. Fits take a second; the rest is drawing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from concept_erasure.evals.diffusion import evaluate
from concept_erasure.evals.diffusion._methods import METHODS, object_lists, style_lists
from concept_erasure.evals.worlds.emoji.suite import object_suite, style_suite
from concept_erasure.evals.worlds.emoji.world import EmojiWorld, load_pipeline, twins
from concept_erasure.report import Report

__all__ = ["main", "run"]

OBJECT, STYLE = "corn", "sketch"
BEST = "leace and uce, balanced"  # of the study, see docs/results/diffusion.md


def run(
    out: str | Path = "demo-out",
    *,
    pictures: int = 32,
    steps: int = 10,
    method: str = BEST,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Run both parts and write ``diffusion/`` into a folder: report, grids, erasers.

    Args:
        out: The folder.
        pictures: Pictures a kind of prompt.
        steps: Of the sampler.
        method: What erases, a name in the table of the study.
        seed: Of prompts and noise.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        The report; a section an erasure.

    Raises:
        ValueError: If the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    folder = Path(out) / "diffusion"
    world = EmojiWorld()
    parts = {
        OBJECT: (
            object_suite(world, [OBJECT], pictures=pictures, steps=steps, seed=seed),
            object_lists(world.objects, [OBJECT]),
        ),
        STYLE: (
            style_suite(world, STYLE, pictures=pictures, steps=steps, seed=seed),
            style_lists(world.objects, STYLE),
        ),
    }
    sections = []
    for name, (suite, lists) in parts.items():
        fitted = METHODS[method](world.pipe, lists)
        twin = load_pipeline(twin=name) if name in twins() else None
        section = evaluate(
            world.pipe, fitted.eraser, suite, apply=fitted.apply, reference=twin, cache_dir=folder / "cache",
            out=folder / name, progress=progress, batch_size=48,
        )  # fmt: skip
        shown = {caption: f"{name}/{path}" for caption, path in section.images.items()}
        sections.append(replace(section, images=shown))
    notes = [
        "Pipeline, judge and CLIP are the small ones that ship with the project (32 pixels, fifty emoji). A row "
        "'never knew' is a denoiser trained from scratch without the concept.",
        "Erasing by the text side stops prompts. What an embedding, a latent or fine-tuning brings back was not tried.",
    ]
    report = Report(
        "Erasing from a text-to-image pipeline", [], {"method": method}, notes, sections
    )
    report.save(folder)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run the demo and print the report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--method", default=BEST, choices=list(METHODS))
    parser.add_argument("--pictures", type=int, default=32, help="pictures a kind of prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = run(options.out, pictures=options.pictures, method=options.method, seed=options.seed)
    sys.stdout.write(report.to_markdown())
    sys.stdout.write(f"\nwrote report and grids to {options.out / 'diffusion'}\n")


if __name__ == "__main__":
    main()
