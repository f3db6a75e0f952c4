"""Erase concepts from language models, text representations and text-to-image models.

Names are imported on first use: ``import concept_erasure`` loads no optional package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from importlib.metadata import packages_distributions, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concept_erasure.collect import Representations, collect, fit_streaming, stream
    from concept_erasure.concept import Concept
    from concept_erasure.diffusion.anchored import AnchoredProjectionEraser
    from concept_erasure.diffusion.mace import MaceEraser
    from concept_erasure.diffusion.realera import RealEraEraser
    from concept_erasure.diffusion.rece import ReceEraser
    from concept_erasure.diffusion.speed import SpeedEraser
    from concept_erasure.diffusion.trce import TraceEraser, TrceEraser
    from concept_erasure.diffusion.uce import UceEraser
    from concept_erasure.edit import Edit
    from concept_erasure.eraser import Eraser, ModelEraser, RepresentationEraser
    from concept_erasure.errors import (
        ConceptErasureError,
        EditError,
        ErasureWarning,
        FormatError,
        NotFittedError,
        ShapeError,
        SiteNotFoundError,
        SpaceError,
    )
    from concept_erasure.language.elm import ElmEraser
    from concept_erasure.language.famr import FamrEraser
    from concept_erasure.language.grad_ascent import GradAscentEraser
    from concept_erasure.language.npo import NpoEraser
    from concept_erasure.language.redirect import RedirectEraser
    from concept_erasure.language.rmu import RmuEraser
    from concept_erasure.language.simnpo import SimNpoEraser
    from concept_erasure.language.whp import WhpEraser
    from concept_erasure.linalg import LowRankAffine, Moments, optimal_linear_shrinkage
    from concept_erasure.linear.groupby import GroupedTensor, groupby
    from concept_erasure.linear.inlp import InlpEraser
    from concept_erasure.linear.leace import ErasureMethod, LeaceEraser, LeaceFitter
    from concept_erasure.linear.mean_projection import MeanProjectionEraser, MeanProjectionFitter
    from concept_erasure.linear.oracle import OracleEraser, OracleFitter
    from concept_erasure.linear.quadratic import QuadraticEditor, QuadraticEraser, QuadraticFitter
    from concept_erasure.linear.quantile import QuantileNormalizer, cdf, icdf
    from concept_erasure.linear.rlace import RlaceEraser
    from concept_erasure.linear.sal import SalEraser, SalFitter
    from concept_erasure.linear.scrubbing import ConceptScrubber
    from concept_erasure.linear.splince import SplinceEraser
    from concept_erasure.report import Report
    from concept_erasure.sae.embedding import EmbeddingEditEraser
    from concept_erasure.sae.gate import SaeGateEraser
    from concept_erasure.sae.pisces import PiscesEraser
    from concept_erasure.sae.projection import LatentProjectionEraser
    from concept_erasure.sites import Site, Space, find_sites
    from concept_erasure.utils import assert_type

_PLACES = {
    "collect": ("Representations", "collect", "fit_streaming", "stream"),
    "concept": ("Concept",),
    "diffusion.anchored": ("AnchoredProjectionEraser",),
    "diffusion.mace": ("MaceEraser",),
    "diffusion.realera": ("RealEraEraser",),
    "diffusion.rece": ("ReceEraser",),
    "diffusion.speed": ("SpeedEraser",),
    "diffusion.trce": ("TraceEraser", "TrceEraser"),
    "diffusion.uce": ("UceEraser",),
    "edit": ("Edit",),
    "eraser": ("Eraser", "ModelEraser", "RepresentationEraser"),
    "errors": (
        "ConceptErasureError",
        "EditError",
        "ErasureWarning",
        "FormatError",
        "NotFittedError",
        "ShapeError",
        "SiteNotFoundError",
        "SpaceError",
    ),
    "language.elm": ("ElmEraser",),
    "language.famr": ("FamrEraser",),
    "language.grad_ascent": ("GradAscentEraser",),
    "language.npo": ("NpoEraser",),
    "language.redirect": ("RedirectEraser",),
    "language.rmu": ("RmuEraser",),
    "language.simnpo": ("SimNpoEraser",),
    "language.whp": ("WhpEraser",),
    "linalg": ("LowRankAffine", "Moments", "optimal_linear_shrinkage"),
    "linear.groupby": ("GroupedTensor", "groupby"),
    "linear.leace": ("ErasureMethod", "LeaceEraser", "LeaceFitter"),
    "linear.inlp": ("InlpEraser",),
    "linear.mean_projection": ("MeanProjectionEraser", "MeanProjectionFitter"),
    "linear.rlace": ("RlaceEraser",),
    "linear.sal": ("SalEraser", "SalFitter"),
    "linear.oracle": ("OracleEraser", "OracleFitter"),
    "linear.quadratic": ("QuadraticEditor", "QuadraticEraser", "QuadraticFitter"),
    "linear.quantile": ("QuantileNormalizer", "cdf", "icdf"),
    "linear.scrubbing": ("ConceptScrubber",),
    "linear.splince": ("SplinceEraser",),
    "report": ("Report",),
    "sae.embedding": ("EmbeddingEditEraser",),
    "sae.gate": ("SaeGateEraser",),
    "sae.pisces": ("PiscesEraser",),
    "sae.projection": ("LatentProjectionEraser",),
    "sites": ("Site", "Space", "find_sites"),
    "utils": ("assert_type",),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}
_ROOMS = ("diffusion", "evals", "probes", "sae")  # packages, loaded on first use as well

__version__ = "0.1.0"

__all__ = [
    "AnchoredProjectionEraser",
    "Concept",
    "ConceptErasureError",
    "ConceptScrubber",
    "Edit",
    "EditError",
    "ElmEraser",
    "EmbeddingEditEraser",
    "Eraser",
    "ErasureMethod",
    "ErasureWarning",
    "FamrEraser",
    "FormatError",
    "GradAscentEraser",
    "GroupedTensor",
    "InlpEraser",
    "LatentProjectionEraser",
    "LeaceEraser",
    "LeaceFitter",
    "LowRankAffine",
    "MaceEraser",
    "MeanProjectionEraser",
    "MeanProjectionFitter",
    "ModelEraser",
    "Moments",
    "NotFittedError",
    "NpoEraser",
    "OracleEraser",
    "OracleFitter",
    "PiscesEraser",
    "QuadraticEditor",
    "QuadraticEraser",
    "QuadraticFitter",
    "QuantileNormalizer",
    "RealEraEraser",
    "ReceEraser",
    "RedirectEraser",
    "Report",
    "RepresentationEraser",
    "Representations",
    "RlaceEraser",
    "RmuEraser",
    "SaeGateEraser",
    "SalEraser",
    "SalFitter",
    "ShapeError",
    "SimNpoEraser",
    "Site",
    "SiteNotFoundError",
    "Space",
    "SpaceError",
    "SpeedEraser",
    "SplinceEraser",
    "TraceEraser",
    "TrceEraser",
    "UceEraser",
    "WhpEraser",
    "__version__",
    "assert_type",
    "cdf",
    "collect",
    "find_sites",
    "fit_streaming",
    "groupby",
    "icdf",
    "optimal_linear_shrinkage",
    "stream",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps ``concept_erasure.collect`` the function when the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


def _warn_about_namesake() -> None:
    """Another distribution with this import name overwrites our files, or deletes them when uninstalled."""
    # the other one is looked up by name: listing every distribution would slow each import
    try:
        version("concept-erasure")
    except importlib.metadata.PackageNotFoundError:
        return
    owners = sorted(set(packages_distributions().get(__name__, [])))
    warnings.warn(
        f"the import name {__name__!r} belongs to several distributions here ({', '.join(owners)}); "
        "files of one overwrite the other's. Mend it with:\n"
        "  pip uninstall concept-erasure\n"
        "  pip install --force-reinstall --no-deps deconcept",
        stacklevel=3,
    )


_warn_about_namesake()
