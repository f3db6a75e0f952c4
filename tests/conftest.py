"""Shared set-up: no network, one thread, a generator with a fixed seed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    """The checkout's folder."""
    return ROOT


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator with a fixed seed; the global one is never used."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def labelled(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """400 vectors of width 8 and two classes that a linear probe tells apart."""
    z = torch.randint(0, 2, (400,), generator=generator)
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    x[:, 0] += 3 * z
    return x, z
