"""Every registered eraser of representations passes the battery."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from concept_erasure.linear.inlp import InlpEraser
from concept_erasure.registry import METHODS
from concept_erasure.testing import CheckFailed, EraserBattery


def _task(x: torch.Tensor) -> torch.Tensor:
    """Task labels that depend neither on the rotation, nor the scale, nor the order of the rows."""
    size = x.double().norm(dim=1)
    return size / size.mean()


def _parameters(battery: EraserBattery) -> list[str]:
    """Return the names of the arguments of ``fit``; empty if the module does not import."""
    try:
        kind = battery.eraser_class
    except ImportError:  # `test_every_target_imports` says so
        return []
    return list(inspect.signature(kind.fit).parameters)  # type: ignore[attr-defined]


def _battery(name: str) -> EraserBattery:
    battery = EraserBattery.of(name)
    takes_task = _parameters(battery)[2:3] == ["y"]
    battery = replace(battery, task=_task if takes_task else None)
    if name != "inlp":
        return battery
    # iterative: exact to its classifier's gradient; few rounds, or all of the small sample's dimensions go
    fit = partial(InlpEraser.fit, n_classifiers=3)
    return replace(battery, tolerance=1e-5, fit=lambda x, z: fit(x, z))


BATTERIES = {name: _battery(name) for name, entry in METHODS.items() if entry.family == "linear"}
CASES = [
    pytest.param(battery, check, id=f"{name}-{check}")
    for name, battery in sorted(BATTERIES.items())
    if _parameters(battery)[:2] == ["x", "z"]
    for check in battery.checks()
]


@pytest.mark.parametrize(("battery", "check"), CASES)
def test_battery(battery: EraserBattery, check: str, tmp_path: Path) -> None:
    battery.run(check, tmp_path)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_target_imports(name: str) -> None:
    assert callable(METHODS[name].load())


def test_leace_is_in_the_battery() -> None:
    assert {"guarded", "idempotent"} <= set(BATTERIES["leace"].checks())


def test_declared_guarantees_all_have_a_check() -> None:
    for name, battery in BATTERIES.items():
        if _parameters(battery)[:2] != ["x", "z"]:
            continue
        for guarantee in battery.method.guarantees:
            function = "_check_" + guarantee.replace("-", "_")
            assert hasattr(battery, function), f"{name} declares {guarantee}: nothing checks it"


def test_unknown_check() -> None:
    with pytest.raises(ValueError, match="no check 'nonsense'"):
        BATTERIES["leace"].run("nonsense", Path())


@pytest.mark.parametrize("check", ["guarded", "rank", "scale", "deterministic", "not-mutated"])
def test_the_battery_can_fail(check: str, tmp_path: Path) -> None:
    """An eraser that is wrong in every way is caught: the checks are not vacuous."""
    good = BATTERIES["leace"]

    class Wrong:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            x += torch.rand(x.shape[-1], dtype=x.dtype)
            return x * torch.arange(x.shape[-1]).to(x.dtype)

    bad = EraserBattery(good.method, fit=lambda x, z: Wrong())  # type: ignore[arg-type,return-value]
    with torch.random.fork_rng(), pytest.raises(CheckFailed):
        bad.run(check, tmp_path)
