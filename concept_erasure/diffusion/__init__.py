"""Closed-form erasure for text-to-image models: what reads the text is edited, images are never needed.

Names are imported on first use, so that ``import concept_erasure.diffusion`` needs no diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concept_erasure.diffusion.anchored import AnchoredProjectionEraser
    from concept_erasure.diffusion.core import Pairs, Preserve, metric, solve
    from concept_erasure.diffusion.crce import ConceptSpec, expand, load_specs
    from concept_erasure.diffusion.encode import TextEncoder, text_representations
    from concept_erasure.diffusion.fusion import live_loras, merge_loras
    from concept_erasure.diffusion.labelled import named_representations
    from concept_erasure.diffusion.mace import MaceEraser
    from concept_erasure.diffusion.reach import certificate
    from concept_erasure.diffusion.realera import RealEraEraser
    from concept_erasure.diffusion.rece import ReceEraser
    from concept_erasure.diffusion.speed import SpeedEraser
    from concept_erasure.diffusion.tokens import TokenRule
    from concept_erasure.diffusion.trce import TraceEraser, TrceEraser
    from concept_erasure.diffusion.uce import UceEraser

_PLACES = {
    "anchored": ("AnchoredProjectionEraser",),
    "core": ("Pairs", "Preserve", "metric", "solve"),
    "crce": ("ConceptSpec", "expand", "load_specs"),
    "encode": ("TextEncoder", "text_representations"),
    "fusion": ("live_loras", "merge_loras"),
    "labelled": ("named_representations",),
    "mace": ("MaceEraser",),
    "reach": ("certificate",),
    "realera": ("RealEraEraser",),
    "rece": ("ReceEraser",),
    "speed": ("SpeedEraser",),
    "tokens": ("TokenRule",),
    "trce": ("TraceEraser", "TrceEraser"),
    "uce": ("UceEraser",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "AnchoredProjectionEraser", "ConceptSpec", "MaceEraser", "Pairs", "Preserve", "RealEraEraser", "ReceEraser",
    "SpeedEraser", "TextEncoder", "TokenRule", "TraceEraser", "TrceEraser", "UceEraser", "certificate", "expand",
    "live_loras", "load_specs", "merge_loras", "metric", "named_representations", "solve", "text_representations",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
