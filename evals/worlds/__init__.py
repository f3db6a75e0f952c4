"""Small real worlds to evaluate erasure in: models that know their concepts, and twins that never did."""

from __future__ import annotations

__all__: list[str] = []
