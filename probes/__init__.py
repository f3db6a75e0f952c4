"""What can still be read out of vectors: probes, their evaluation and controls.

A probe is a configuration with ``fit(x, z)``; the fitted probe predicts, scores and is immutable.
Nothing here knows a model: vectors and labels only.
"""

from concept_erasure.probes._data import Label, Vectors
from concept_erasure.probes._fitted import FittedProbe, Probe
from concept_erasure.probes.centroid import CentroidProbe, FittedCentroid
from concept_erasure.probes.evaluate import (
    PROBES,
    ControlResult,
    ProbeResult,
    SelectivityResult,
    control,
    cross_validate,
    evaluate,
    fresh_probe,
    selectivity,
    wilson_interval,
)
from concept_erasure.probes.kernel import FittedKernel, KernelProbe
from concept_erasure.probes.layers import probe_layers
from concept_erasure.probes.linear import FittedLinear, LinearProbe
from concept_erasure.probes.mdl import (
    CodeLength,
    VInformation,
    online_code_length,
    v_information,
)
from concept_erasure.probes.mlp import FittedMlp, MlpProbe
from concept_erasure.probes.svm import FittedSvm, SvmProbe

__all__ = [
    "PROBES",
    "CentroidProbe",
    "CodeLength",
    "ControlResult",
    "FittedCentroid",
    "FittedKernel",
    "FittedLinear",
    "FittedMlp",
    "FittedProbe",
    "FittedSvm",
    "KernelProbe",
    "Label",
    "LinearProbe",
    "MlpProbe",
    "Probe",
    "ProbeResult",
    "SelectivityResult",
    "SvmProbe",
    "VInformation",
    "Vectors",
    "control",
    "cross_validate",
    "evaluate",
    "fresh_probe",
    "online_code_length",
    "probe_layers",
    "selectivity",
    "v_information",
    "wilson_interval",
]
