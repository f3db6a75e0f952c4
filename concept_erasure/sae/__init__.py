"""Sparse dictionaries: read or train them, find the latents that write a concept, edit parameters through them.

Names are imported on first use, so that ``import concept_erasure.sae`` needs no sae-lens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concept_erasure.sae.activations import Activations, collect_activations
    from concept_erasure.sae.disentangler import Disentangler
    from concept_erasure.sae.measure import Quality, quality
    from concept_erasure.sae.search import Feature, FeatureTable, Filters, Search, find_features
    from concept_erasure.sae.seminmf import semi_nmf
    from concept_erasure.sae.train import train_matryoshka

_PLACES = {
    "activations": ("Activations", "collect_activations"),
    "disentangler": ("Disentangler",),
    "measure": ("Quality", "quality"),
    "search": ("Feature", "FeatureTable", "Filters", "Search", "find_features"),
    "seminmf": ("semi_nmf",),
    "train": ("train_matryoshka",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "Activations", "Disentangler", "Feature", "FeatureTable", "Filters", "Quality", "Search", "collect_activations",
    "find_features", "quality", "semi_nmf", "train_matryoshka",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
