"""Evaluations: what an erasure removed from a model, what it cost, and how that is shown.

Modules are imported one by one, so that ``import concept_erasure.evals`` loads neither transformers
nor matplotlib.
"""

from __future__ import annotations

__all__: list[str] = []
