"""Small helpers that several rooms share: a checked cast and names of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

__all__ = ["assert_type", "is_norm_layer", "mangle_module_path"]


def assert_type(typ: type[T], obj: object) -> T:
    """Return ``obj`` if it is an instance of ``typ``, for the type checker and at run time.

    Args:
        typ: The class that is expected.
        obj: Any object.

    Returns:
        ``obj`` itself.

    Raises:
        TypeError: If ``obj`` is something else.

    Example:
        >>> assert_type(int, 3)
        3
    """
    if isinstance(obj, typ):
        return obj
    raise TypeError(f"Expected {typ.__name__}, got {type(obj).__name__}")


def is_norm_layer(module: nn.Module) -> bool:
    """Say whether a module is a layer or root-mean-square normalisation, by its class name."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def mangle_module_path(name: str) -> str:
    """Turn a dotted module path into a key without dots.

    Args:
        name: Path such as ``"layers.0.input_layernorm"``.

    Returns:
        The path with every dot replaced by a hyphen.

    Raises:
        ValueError: If the path already holds a hyphen, because the key could not be read back.

    Example:
        >>> mangle_module_path("layers.0.input_layernorm")
        'layers-0-input_layernorm'
    """
    if "-" in name:
        raise ValueError(
            f"module path {name!r} contains '-', which keys reserve for '.'; rename the module"
        )
    return name.replace(".", "-")
