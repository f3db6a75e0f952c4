"""The files of a saved eraser: written whole or not at all, read with every value checked."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file
from torch import Tensor

from concept_erasure.errors import FormatError

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "UPGRADE",
    "WEIGHTS_FILE",
    "config_from",
    "json_default",
    "library_version",
    "local_folder",
    "manifest",
    "plain",
    "read_config",
    "read_tensors",
    "write",
]

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "eraser.safetensors", "eraser_config.json", "README.md"
CONFIG_KEYS = {
    "format_version",
    "library_version",
    "method",
    "config",
    "space",
    "report",
    "tensors",
    "digest",
}
OPTIONAL_KEYS = {"identity"}  # of a copy in another dtype: the digest of what it is a copy of
UPGRADE = "pip install --upgrade deconcept"


T = TypeVar("T")


def plain(value: object) -> object:
    """Return a NumPy scalar, or an array or tensor without dimensions, as a plain number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def json_default(value: object) -> object:
    made = plain(value)
    if made is value:
        raise TypeError(f"a {type(value).__name__} cannot be saved; give plain numbers and text")
    return made


def manifest(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return dtype and shape by name, as written beside the tensors."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in sorted(tensors.items())
    }


def library_version() -> str:
    try:
        return version("deconcept")
    except PackageNotFoundError:
        return "0+unknown"


def write(path: Path, fill: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        fill(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def local_folder(path_or_repo: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if isinstance(path_or_repo, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {name!r}; give a folder or a hub id like 'user/name'")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 slow to import

    wanted = [WEIGHTS_FILE, CONFIG_FILE]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder {name!r}, and the hub gave no such repository ({type(error).__name__})"
        ) from error


def read_config(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{path} must hold a JSON object; got {type(record).__name__}")
    found = record.get("format_version")
    if type(found) is not int or found < 1:
        raise FormatError(f"{path}: format_version must be a whole number from 1; got {found!r}")
    if found > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format_version {found}; this library reads up to {FORMAT_VERSION}. {UPGRADE}"
        )
    keys = set(record) - OPTIONAL_KEYS
    if keys != CONFIG_KEYS:
        unknown, missing = sorted(keys - CONFIG_KEYS), sorted(CONFIG_KEYS - keys)
        raise FormatError(
            f"{path}: unknown keys {unknown}, missing keys {missing}; perhaps {UPGRADE}"
        )
    for key, kinds in (
        ("method", str),
        ("config", dict),
        ("space", (dict, type(None))),
        ("report", dict),
        ("tensors", dict),
        ("digest", str),
    ):
        if not isinstance(record[key], kinds):
            raise FormatError(f"{path}: {key!r} has type {type(record[key]).__name__}")
    identity = record.get("identity", "0" * 16)
    if not isinstance(identity, str) or not re.fullmatch("[0-9a-f]{16}", identity):
        raise FormatError(f"{path}: 'identity' must be a digest of 16 hexadecimal digits")
    return record


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _fits(value: object, hint: object) -> bool:
    """Say whether a JSON value has an annotated type; a bool is not a number, a whole number is a float."""
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if hint is float:
        return type(value) in (float, int)
    if hint in (bool, int, str, NoneType):
        return type(value) is hint
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    plain_type = kind or hint
    return isinstance(value, plain_type) if isinstance(plain_type, type) else True


def config_from(kind: type[T], values: object, path: Path) -> T:
    known = {f.name for f in fields(cast("Any", kind))}
    given = cast("dict[str, object]", values)
    if unknown := sorted(set(given) - known):
        raise FormatError(f"{path}: unknown options {unknown}; perhaps {UPGRADE}")
    for name, hint in get_type_hints(kind).items():
        if name in given and not _fits(given[name], hint):
            raise FormatError(f"{path}: option {name!r} must be {hint}; got {given[name]!r}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:  # noqa: BLE001 safetensors raises its own untyped errors
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FormatError(f"{path}: tensor {name!r} holds values that are not finite")
    return tensors
