"""CRCE's part for any eraser: a concept becomes a list of what must go with it and what must stay.

A *coref* is another name under which the concept would survive; it becomes a further pair, of weight at most one. A
*retain* is something near that must not change; it becomes a preserve vector. Lists come from a file or from a function
of the caller. No service is asked.

Paper: CRCE, "Coreference-Retention Concept Erasure" (BMVC 2025). About five corefs and three retains a concept work
best there. Reconstruction: the paper trains an ESD-type loss, and how it turns semantic closeness into weights is not
published. This is the closed-form reading: the same lists, with weights from the file (default one half).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, cast

import yaml

from concept_erasure.errors import FormatError

__all__ = ["ConceptSpec", "Expander", "Expansion", "expand", "load_specs"]

Expander = Callable[[str], tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class ConceptSpec:
    """One concept with its neighbourhood.

    Attributes:
        target: Name of the concept.
        anchor: What takes its place; None leaves the choice to `expand`.
        corefs: Other names that must vanish with it.
        retains: Near but distinct things that must stay.
        weights: One weight in (0, 1] for each coref; empty means the default of `expand`.
    """

    target: str
    anchor: str | None = None
    corefs: tuple[str, ...] = ()
    retains: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not self.target.strip():
            raise FormatError(f"target must be a name; got {self.target!r}")
        if self.anchor is not None and not isinstance(self.anchor, str):
            raise FormatError(f"anchor of {self.target!r} must be a text; got {self.anchor!r}")
        for key in ("corefs", "retains"):
            object.__setattr__(self, key, _names(self.target, key, getattr(self, key)))
        object.__setattr__(self, "weights", _weights(self))
        if both := sorted({_plain(n) for n in self.names} & {_plain(n) for n in self.retains}):
            raise FormatError(
                f"{self.target!r}: {both[0]!r} is to be erased and to be retained; decide"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The target and its corefs."""
        return (self.target, *self.corefs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the spec of plain values, as in a file.

        Raises:
            FormatError: If a key is unknown or a value has another type.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise FormatError(f"a concept has no {unknown[0]!r}; its keys are {', '.join(known)}")
        if "target" not in values:
            raise FormatError(f"a concept needs 'target'; got {', '.join(map(str, values))}")
        return cls(**values)


@dataclass(frozen=True)
class Expansion:
    """What an eraser's ``fit`` takes: ``erase``, ``anchor``, ``erase_weight`` and ``preserve``.

    Attributes:
        erase: Targets and corefs, each once.
        anchor: One a name.
        erase_weight: One a name: 1 for targets, the coref's weight for corefs.
        preserve: All retains, each once.
        specs: Where they come from.
    """

    erase: tuple[str, ...]
    anchor: tuple[str, ...]
    erase_weight: tuple[float, ...]
    preserve: tuple[str, ...]
    specs: tuple[ConceptSpec, ...]


def load_specs(path: str | Path) -> dict[str, ConceptSpec]:
    """Read concepts from a yaml or json file, by target.

    The file holds a list of concepts (``target``, ``anchor``, ``corefs``, ``retains``, ``weights``), or a mapping from
    the target to the other keys.

    Raises:
        FileNotFoundError: If there is no such file.
        FormatError: If it does not hold concepts, or one twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is neither yaml nor json: {error}") from error
    if isinstance(values, Mapping):
        values = [{"target": name, **_mapping(path, rest or {})} for name, rest in values.items()]
    if not isinstance(values, list) or not values:
        raise FormatError(f"{path} must hold concepts; got {type(values).__name__}")
    specs = [ConceptSpec.from_dict(_mapping(path, item)) for item in values]
    found: dict[str, ConceptSpec] = {}
    for spec in specs:
        if _plain(spec.target) in found:
            raise FormatError(f"{path} holds {spec.target!r} twice")
        found[_plain(spec.target)] = spec
    return {spec.target: spec for spec in specs}


def expand(
    target: str | Sequence[str],
    source: str | Path | Mapping[str, ConceptSpec] | Expander,
    *,
    anchor: str = "",
    coref_weight: float = 0.5,
) -> Expansion:
    """Expand targets to names, anchors, weights and retains.

    Args:
        target: A concept or several.
        source: A file for `load_specs`, what it returned, or a function from a target to ``(corefs, retains)``.
        anchor: For concepts whose spec names none.
        coref_weight: For corefs whose spec gives no weight, in (0, 1].

    Returns:
        Lists for any closed-form eraser:
        ``UceEraser.fit(pipe, erase=e.erase, anchor=e.anchor, erase_weight=e.erase_weight, preserve=e.preserve)``.

    Raises:
        ValueError: If no target is given, or a weight is out of range.
        KeyError: If the source has no such concept.
        FormatError: If the source's lists are not lists of names, or a name is to be erased and to be retained.
    """
    targets = [target] if isinstance(target, str) else list(target)
    if not targets:
        raise ValueError("target is empty; name at least one concept")
    if not 0 < coref_weight <= 1:
        raise ValueError(f"coref_weight must be in (0, 1]; got {coref_weight}")
    specs = [_spec(name, source) for name in targets]
    rows: dict[str, tuple[str, str, float]] = {}
    for spec in specs:  # targets first: a name that is a target and a coref keeps weight 1
        instead = anchor if spec.anchor is None else spec.anchor
        rows.setdefault(_plain(spec.target), (spec.target, instead, 1.0))
    for spec in specs:
        instead = anchor if spec.anchor is None else spec.anchor
        weights = spec.weights or (coref_weight,) * len(spec.corefs)
        for name, weight in zip(spec.corefs, weights, strict=True):
            rows.setdefault(_plain(name), (name, instead, weight))
    retains = {_plain(name): name for spec in specs for name in spec.retains}
    if both := [rows[name][0] for name in rows if name in retains]:
        raise FormatError(
            f"{both[0]!r} is to be erased for one concept and retained for another; decide"
        )
    if same := [name for name, instead, _ in rows.values() if _plain(name) == _plain(instead)]:
        raise FormatError(f"{same[0]!r} is to be erased and is the anchor; choose another anchor")
    erase, anchors, weight_of = zip(*rows.values(), strict=True)
    return Expansion(erase, anchors, weight_of, tuple(retains.values()), tuple(specs))


def _spec(name: str, source: str | Path | Mapping[str, ConceptSpec] | Expander) -> ConceptSpec:
    if callable(source):
        answer = source(name)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise FormatError(
                f"the expander must return (corefs, retains) for {name!r}; got {answer!r}"
            )
        corefs, retains = answer
        return ConceptSpec(
            target=name,
            corefs=cast("tuple[str, ...]", corefs),
            retains=cast("tuple[str, ...]", retains),
        )
    specs = load_specs(source) if isinstance(source, str | Path) else source
    found = {_plain(key): spec for key, spec in specs.items()}
    if _plain(name) not in found:
        raise KeyError(f"no concept {name!r}; there are {', '.join(sorted(specs))}")
    return found[_plain(name)]


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _mapping(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{path}: a concept must be keys and values; got {value!r}")
    return dict(value)


def _names(target: str, key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise FormatError(f"{key} of {target!r} must be a list of names; got {value!r}")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise FormatError(f"{key} of {target!r} must hold names; got {item!r}")
    first: dict[str, str] = {}
    for item in value:
        first.setdefault(_plain(item), item)
    if len(first) < len(value):
        raise FormatError(f"{key} of {target!r} holds a name twice; got {list(value)}")
    if key == "corefs" and _plain(target) in first:
        raise FormatError(f"corefs of {target!r} hold the target itself")
    return tuple(first.values())


def _weights(spec: ConceptSpec) -> tuple[float, ...]:
    values = spec.weights
    if isinstance(values, str) or not isinstance(values, list | tuple):
        raise FormatError(f"weights of {spec.target!r} must be a list of numbers; got {values!r}")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            raise FormatError(f"weights of {spec.target!r} must be in (0, 1]; got {value!r}")
    if values and len(values) != len(spec.corefs):
        raise FormatError(
            f"{spec.target!r} has {len(spec.corefs)} corefs and {len(values)} weights; give one each"
        )
    return tuple(float(value) for value in values)
