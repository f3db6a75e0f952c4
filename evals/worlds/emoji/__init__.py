"""A text-to-image pipeline of Stable Diffusion's own classes that knows fifty emoji, three styles and five grounds."""

from __future__ import annotations

__all__: list[str] = []
