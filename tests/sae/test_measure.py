"""Quality: fractions that are known, and the loss of a model with reconstructions in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.errors import ShapeError
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.measure import quality
from tests.models import TinyTokenizer, tiny
from tests.sae.test_disentangler import random, vectors

TEXTS = [" ".join(f"w{i}x{j}" for j in range(4 + i % 5)) for i in range(8)]


def identity(d: int, **options: object) -> Disentangler:
    """Return the dictionary of both signs of every coordinate: it reconstructs everything."""
    rows = torch.cat((torch.eye(d), -torch.eye(d)))
    zeros = torch.zeros(2 * d)
    return Disentangler(rows.T, zeros, rows, torch.zeros(d), zeros, **options)  # type: ignore[arg-type]


def test_known_fractions() -> None:
    x = vectors(50)
    found = quality(identity(8, widths=(4, 8, 16)), x)
    assert found.fvu < 1e-10
    assert found.l0 == 8
    assert found.dead == 0
    positive = x.clamp_min(0)
    total = (x - x.mean(0)).square().sum()
    wanted = [
        float((x - positive * keep).square().sum() / total)
        for keep in (torch.arange(8) < 4, torch.ones(8))
    ]
    assert found.per_level_fvu[:2] == pytest.approx(wanted)
    assert found.vectors == 50


def test_the_mean_explains_nothing_and_dead_latents_are_counted() -> None:
    x = vectors(50)
    dis = replace(random(), threshold=torch.full((20,), 1e6), b_dec=x.mean(0))
    found = quality(dis, x)
    assert found.fvu == pytest.approx(1)
    assert (found.l0, found.dead) == (0, 1)
    few = torch.full((20,), 1e6)
    few[:5] = 0
    assert quality(replace(dis, threshold=few), x).dead >= 0.75


def test_it_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(40)
    whole = quality(random(), x)
    monkeypatch.setattr("concept_erasure.sae.disentangler.CHUNK_VALUES", 60)
    assert quality(random(), x).fvu == pytest.approx(whole.fvu)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_loss_recovered(kind: str) -> None:
    model, tokenizer = tiny(kind), TinyTokenizer()
    behind = kind == "gemma3"
    perfect = identity(32, site="mlp.1", after_post_norm=behind)
    found = quality(perfect, model=model, tokenizer=tokenizer, texts=TEXTS)
    assert found.losses["spliced"] == pytest.approx(found.losses["clean"], abs=1e-4)
    assert found.losses["ablated"] != pytest.approx(found.losses["clean"], abs=1e-4)
    if found.losses["ablated"] > found.losses["clean"]:
        assert found.loss_recovered == pytest.approx(1, abs=1e-3)
    else:  # a random model may lose nothing by ablation
        assert found.loss_recovered is None
    assert found.vectors == sum(len(text.split()) - 1 for text in TEXTS)
    mean = replace(perfect, threshold=torch.full((64,), 1e9))
    x = vectors(4, 32)
    one = quality(mean, x, model=model, tokenizer=tokenizer, texts=TEXTS)
    assert one.vectors == 4 and one.losses["clean"] == pytest.approx(found.losses["clean"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(found.to_dict()) == {*found.__dataclass_fields__}


def test_errors() -> None:
    with pytest.raises(ShapeError):
        quality(random(), torch.zeros(5, 9))
    with pytest.raises(ShapeError):
        quality(random(), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="give vectors"):
        quality(random(), model=tiny("llama"))
