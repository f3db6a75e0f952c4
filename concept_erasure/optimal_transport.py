"""The import path of concept-erasure 0.2; the code is `concept_erasure.linear.optimal_transport`."""

from concept_erasure.linear.optimal_transport import (
    is_positive_definite,
    ot_barycenter,
    ot_distance,
    ot_map,
    ot_midpoint,
)

__all__ = ["is_positive_definite", "ot_barycenter", "ot_distance", "ot_map", "ot_midpoint"]
