"""Every check the guarantees of the entry call for, and those all erasers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from concept_erasure.testing import EraserBattery

BATTERY = EraserBattery.of("ridge")  # found through the entry point


@pytest.mark.parametrize("check", BATTERY.checks())
def test_battery(check: str, tmp_path: Path) -> None:
    BATTERY.run(check, tmp_path)
