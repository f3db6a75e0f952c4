"""Read the authors' numbers; see fixtures/README.md."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures"


def read(name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors and options of a fixture."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta = {key: float(value) for key, value in (file.metadata() or {}).items()}
        return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 not a dict


def layers(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights under a prefix, by the path of the map."""
    start = f"{prefix}."
    return {
        key.removeprefix(start).removesuffix(".weight"): value
        for key, value in tensors.items()
        if key.startswith(start)
    }
