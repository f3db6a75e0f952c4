"""The methods of the family pass the battery for erasers of models, on a tiny model that was taught a concept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.eraser import ModelEraser
from concept_erasure.registry import METHODS
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.embedding import EmbeddingEditEraser
from concept_erasure.sae.gate import SaeGateEraser
from concept_erasure.sae.pisces import PiscesEraser
from concept_erasure.sae.projection import LatentProjectionEraser
from concept_erasure.testing import CheckFailed, ModelEraserBattery
from tests.language.test_registered import FORGET, RETAIN, concept, logits, taught
from tests.models import TinyTokenizer, tiny
from tests.sae.value_vectors import Chosen, orthonormal

WIDTH = 32


@cache
def dictionary() -> Disentangler:
    return replace(
        orthonormal(width=WIDTH).to(dtype=torch.float32), threshold=torch.full((12,), 0.05)
    )


def pisces(model: nn.Module, seed: int) -> ModelEraser:
    features = [Chosen("mlp.1", 2), Chosen("mlp.1", 5, -1)]
    return PiscesEraser.fit(
        model, TinyTokenizer(), concept(), disentanglers=dictionary(), features=features, tau=0.5, mu=2.0,
        forget_texts=FORGET, retain_texts=RETAIN, embeddings=True, seed=seed,
    )  # fmt: skip


def projection(model: nn.Module, seed: int) -> ModelEraser:
    rows = torch.linalg.qr(torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))).Q.T
    zeros, site = torch.zeros(6), "value.1"
    own = Disentangler(rows.T.clone(), zeros, rows, torch.zeros(48), zeros, site=site)
    return LatentProjectionEraser.fit(
        model, TinyTokenizer(), concept(), disentanglers=own, features=[Chosen(site, 0), Chosen(site, 3)],
        strength=1.5, seed=seed,
    )  # fmt: skip


def embedding(model: nn.Module, seed: int) -> ModelEraser:
    return EmbeddingEditEraser.fit(model, TinyTokenizer(), concept(), seed=seed)


def gate(model: nn.Module, seed: int) -> ModelEraser:
    return SaeGateEraser.fit(
        model, TinyTokenizer(), concept(), disentangler=dictionary(), prompts=FORGET, retain_prompts=RETAIN[:1],
        top=6, strength=-4, seed=seed,
    )  # fmt: skip


def outputs(model: nn.Module) -> Tensor:
    made: Tensor = logits(model)
    return made


FITS = {
    "pisces": pisces,
    "latent-projection": projection,
    "embedding-edit": embedding,
    "sae-gate": gate,
}
BATTERIES = {
    name: ModelEraserBattery(
        METHODS[name], fit=fit, model=taught, other=lambda: tiny("llama", seed=7), outputs=outputs,
        hooks=name == "sae-gate",
    )
    for name, fit in FITS.items()
}  # fmt: skip
CASES = [
    pytest.param(battery, check, id=f"{name}-{check}")
    for name, battery in BATTERIES.items()
    for check in battery.checks()
]


@pytest.mark.parametrize(("battery", "check"), CASES)
def test_battery(battery: ModelEraserBattery, check: str, tmp_path: Path) -> None:
    battery.run(check, tmp_path)


def test_every_method_of_the_family_is_here() -> None:
    assert set(FITS) == {name for name, entry in METHODS.items() if entry.family == "sae"}


def test_unknown_check() -> None:
    with pytest.raises(ValueError, match="no check 'nonsense'"):
        BATTERIES["pisces"].run("nonsense", Path())


def test_the_battery_can_fail(tmp_path: Path) -> None:
    """A fit that changes the model, differs each time and takes any model is caught."""

    def wrong(model: nn.Module, seed: int) -> ModelEraser:
        made = embedding(model, seed)
        with torch.no_grad():
            next(model.parameters()).add_(torch.rand(1))
        return made.with_space(None)

    bad = replace(BATTERIES["embedding-edit"], fit=wrong)
    with torch.random.fork_rng():
        for check in ("fit-leaves-model", "another-model"):
            with pytest.raises(CheckFailed):
                bad.run(check, tmp_path)
