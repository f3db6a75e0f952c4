"""The file from which an interrupted training goes on: whole or not there, and of one run only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from concept_erasure._storage import write
from concept_erasure.errors import FormatError

__all__ = ["STATE_FILE", "read_state", "write_state"]

STATE_FILE = "training.safetensors"


def write_state(
    folder: str | Path,
    key: Mapping[str, Any],
    tensors: dict[str, Tensor],
    record: Mapping[str, Any],
) -> None:
    """Write a state to a temporary file and put it in the place of the last one.

    Args:
        folder: Made if it is not there.
        key: What the result of the run depends on, as plain values.
        tensors: By name, on the CPU.
        record: What else is needed to go on, as plain values.

    Raises:
        FloatingPointError: If a tensor is not finite; the last state is kept.
    """
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise FloatingPointError(
                f"{name} is no longer finite: lower the learning rate, clip the gradient, or use dtype='float32'"
            )
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"key": json.dumps(key, sort_keys=True), "record": json.dumps(record)}
    write(path, lambda p: save_file(tensors, p, metadata=parts))


def read_state(
    folder: str | Path, key: Mapping[str, Any], *, tidy: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the record of a state; None if there is none.

    Args:
        folder: Where to look.
        key: See `write_state`.
        tidy: Whether to delete what a run that was killed while it wrote has left.

    Raises:
        FormatError: If the file is damaged, or of a run with another key; the message names the first difference.
    """
    path = Path(folder) / STATE_FILE
    for left in Path(folder).glob(f".{STATE_FILE}.*") if tidy else ():
        left.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            parts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
        found, record = json.loads(parts["key"]), json.loads(parts["record"])
    except Exception as error:  # noqa: BLE001 safetensors raises its own untyped errors
        raise FormatError(
            f"{path} is not a readable training state ({error}); delete it to start again"
        ) from None
    _check_key(path, found, json.loads(json.dumps(key)))
    return tensors, record


def _check_key(path: Path, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    found, own = ({**one, **one["training"]} for one in (found, own))
    for name in own:
        if name != "training" and found.get(name) != own[name]:
            raise FormatError(
                f"{path} is the state of another run: its {name} is {found.get(name)!r}, here it is "
                f"{own[name]!r}; use another checkpoint folder, or delete it to start again"
            )
