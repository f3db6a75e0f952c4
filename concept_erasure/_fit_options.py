"""Options of a method's ``fit`` by name: which there are, and how those inside others are reached."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

__all__ = ["fit_options", "given_options", "options_by_method"]


def given_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the options that were written as NAME=VALUE.

    Values are read as JSON where they are JSON (numbers, true, false, null, lists), else as text.

    Raises:
        ValueError: If one is not NAME=VALUE, or is given twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--option {pair}: write NAME=VALUE, such as --option eta=3")
        if name in found:
            raise ValueError(f"--option {name} is given twice")
        found[name] = _value(text.strip())
    return found


def options_by_method(methods: Sequence[str], pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of each method: those written METHOD.NAME=VALUE are one method's, others are all methods'.

    Raises:
        ValueError: If one is not NAME=VALUE, or names a method that is not compared.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for name, value in given_options(pairs).items():
        owner, dot, rest = name.partition(".")
        owner = owner.replace("_", "-") if owner not in found else owner
        if dot and owner in found:
            found[owner][rest] = value
        elif dot and owner not in ("lora", "training"):
            raise ValueError(
                f"--option {name}: {owner!r} is not among the methods {', '.join(methods)}"
            )
        else:
            for own in found.values():
                own.setdefault(name, value)
    return found


def _value(text: str) -> object:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text) if text.lower() in ("inf", "-inf") else json.loads(text)
    except json.JSONDecodeError:
        try:
            return float(text)  # 1e-4 is JSON, .5 and 1. are not
        except ValueError:
            return text


def fit_options(
    method: str,
    kind: type[Any],
    named: Mapping[str, object],
    extra: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the keyword arguments of a method's ``fit``.

    A name that ``fit`` has is its own. Others are options of the training loop (``steps``) or, written ``lora.rank``,
    of the low-rank update; they replace those of the method's default for its preset, one by one.

    Args:
        method: Name of the method, for messages.
        kind: Class of the eraser.
        named: Options by name.
        extra: More, by name.

    Raises:
        ValueError: If the method has no such option, or one is given twice; the message lists those it has.
    """
    if both := sorted(set(named) & set(extra)):
        raise ValueError(f"the option {both[0]!r} of {method!r} is given twice")
    known = inspect.signature(kind.fit).parameters
    fit: dict[str, Any] = {}
    loop: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    parts = _parts(known)
    for name, value in {**named, **extra}.items():
        group, _, field = name.rpartition(".")
        if name in known and name not in POSITIONAL:
            fit[name] = value
        elif group in ("", "training") and field in parts.get("training", ()):
            loop[field] = value
        elif group == "lora" and field in parts.get("lora", ()):
            lora[field] = tuple(value) if isinstance(value, list) else value
        else:
            own = [one for one in known if one not in POSITIONAL]
            own += list(parts.get("training", ()))
            own += [f"lora.{field}" for field in parts.get("lora", ())]
            raise ValueError(
                f"method {method!r} has no option {name!r}; it has: {', '.join(dict.fromkeys(own))}"
            )
    if loop:
        fit["training"] = _training(kind, fit, loop)
    if lora:
        from concept_erasure.language.parameters import Lora

        fit["lora"] = Lora(**lora)
    return fit


# What a command gives by itself, not an option of the user's.
POSITIONAL = frozenset(
    {"self", "cls", "x", "y", "z", "model", "tokenizer", "concept", "pipe", "erase", "anchor"}
    | {"preserve", "training", "lora", "raw", "forget_texts", "retain_texts", "held_out"}
)


def _parts(known: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the options inside the options: of the training loop and of the low-rank update."""
    found: dict[str, tuple[str, ...]] = {}
    if "training" in known:
        from concept_erasure.language.loop import Training

        found["training"] = tuple(one.name for one in fields(Training))
    if "lora" in known:
        from concept_erasure.language.parameters import Lora

        found["lora"] = tuple(one.name for one in fields(Lora))
    return found


def _training(kind: type[Any], fit: Mapping[str, Any], changes: Mapping[str, Any]) -> object:
    """Return the method's own training options for the preset, with some replaced."""
    from concept_erasure.language.loop import Training

    default: Callable[..., Training] | None = getattr(kind, "default_training", None)
    if default is None:
        return replace(Training(), **changes)
    asked = inspect.signature(default).parameters  # such as the preset
    return replace(default(**{k: v for k, v in fit.items() if k in asked}), **changes)
