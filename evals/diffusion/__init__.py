"""Evaluate what an erasure did to a text-to-image pipeline: `evaluate` writes the report, the rest are its parts."""

from concept_erasure.evals.diffusion.erase_eval import Precision, Views, erase_eval
from concept_erasure.evals.diffusion.evaluate import NegativePrompt, evaluate, read_rows
from concept_erasure.evals.diffusion.generate import Row, draw_rows, pipeline_hash
from concept_erasure.evals.diffusion.grids import picture_grid
from concept_erasure.evals.diffusion.scores import (
    bootstrap,
    clip_score,
    cmmd,
    frechet_distance,
    harmonic_mean,
    kernel_distance,
    mace_celebrity_score,
    mace_object_score,
)
from concept_erasure.evals.diffusion.suite import KINDS, Reading, Suite

__all__ = [
    "KINDS",
    "NegativePrompt",
    "Precision",
    "Reading",
    "Row",
    "Suite",
    "Views",
    "bootstrap",
    "clip_score",
    "cmmd",
    "draw_rows",
    "erase_eval",
    "evaluate",
    "frechet_distance",
    "harmonic_mean",
    "kernel_distance",
    "mace_celebrity_score",
    "mace_object_score",
    "picture_grid",
    "pipeline_hash",
    "read_rows",
]
