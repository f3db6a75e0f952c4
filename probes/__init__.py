"""What can still be read out of vectors: probes, their evaluation and controls.

A probe is a configuration with ``fit(x, z)``; the fitted probe predicts, scores and is immutable.
Nothing here knows a model: vectors and labels only.
"""

from concept_erasure.probes._data import Label, Vectors
from concept_erasure.probes._fitted import FittedProbe, Probe
from concept_erasure.probes.evaluate import (
    PROBES,
    ControlResult,
    ProbeResult,
    control,
    cross_validate,
    evaluate,
    wilson_interval,
)
from concept_erasure.probes.linear import FittedLinear, LinearProbe
from concept_erasure.probes.mlp import FittedMlp, MlpProbe
from concept_erasure.probes.svm import FittedSvm, SvmProbe

__all__ = [
    "PROBES",
    "ControlResult",
    "FittedLinear",
    "FittedMlp",
    "FittedProbe",
    "FittedSvm",
    "Label",
    "LinearProbe",
    "MlpProbe",
    "Probe",
    "ProbeResult",
    "SvmProbe",
    "Vectors",
    "control",
    "cross_validate",
    "evaluate",
    "wilson_interval",
]
