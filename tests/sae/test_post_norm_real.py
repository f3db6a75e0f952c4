"""The correction for a norm behind the MLP, on Gemma 3 270M's weights with a planted direction."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.evals.models import GEMMA3_270M, load_gemma3_270m
from concept_erasure.sae._pisces_edit import change, read_layer, value_weight
from concept_erasure.sae.disentangler import Disentangler, post_norm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(find_spec(name) for name in (GEMMA3_270M[0], "gguf")),
        reason=f"needs {GEMMA3_270M[1]} and gguf",
    ),
]
LAYERS = (5, 9, 12, 15)
PLANTED = 20


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_gemma3_270m()[0]


def errors(model: nn.Module, layer: int, ridge: float = 1e-3) -> dict[str, float]:
    """Plant a direction of the space behind the norm in 20 value vectors, edit it, and measure what arrives.

    The wanted change of vector i is delta_i along d. Reported, as shares of its norm: how far the change along d is
    from it (ours, published), how much goes elsewhere, and how many planted vectors are selected.
    """
    found = post_norm(model, f"mlp.{layer}")
    assert found is not None
    gain = found[1].double()
    generator = torch.Generator().manual_seed(layer)
    width = len(gain)
    d = torch.randn(width, generator=generator, dtype=torch.float64)
    d /= d.norm()
    path = f"model.layers.{layer}.mlp.down_proj"
    values = value_weight(model.get_submodule(path)).double()
    seen = values * gain
    strength = 4 * (seen @ d).abs().max()
    rows = torch.randperm(len(values), generator=generator)[:PLANTED]
    # planted behind the norm, so that g * v carries d; divided by g in front of it
    seen[rows] += strength * d
    values = seen / gain
    dis = Disentangler(
        d[:, None], d.new_zeros(1), d[None].clone(), d.new_zeros(width), d.new_full((1,), 0.1), site=f"mlp.{layer}",
        post_norm_gain=gain,
    )  # fmt: skip

    def run(ours: bool) -> tuple[Tensor, Tensor, set[int]]:
        read = read_layer(
            dis,
            values,
            torch.tensor([0]),
            torch.tensor([1]),
            site="",
            down="",
            post_norm=ours,
            ridge=ridge,
        )
        made = change(read, tau=0.5, mu=4.0, coefficient="linear")
        effect = (made.coefficients @ read.writes) * gain
        return effect, made.coefficients[:, 0], set(made.columns.tolist())

    effect, wanted, picked = run(True)
    plain, asked, chosen = run(False)
    return {
        "ours": float(((effect @ d) - wanted).norm() / wanted.norm()),
        "ours elsewhere": float((effect - (effect @ d)[:, None] * d).norm() / wanted.norm()),
        "ours selected": len(picked & set(rows.tolist())) / PLANTED,
        "published": float(((plain @ d) - asked).norm() / asked.norm()),
        "published elsewhere": float((plain - (plain @ d)[:, None] * d).norm() / asked.norm()),
        "published selected": len(chosen & set(rows.tolist())) / PLANTED,
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_the_effect_in_the_dictionarys_space_is_within_five_percent(
    model: nn.Module, layer: int
) -> None:
    found = errors(model, layer)
    assert found["ours"] < 0.05 and found["ours selected"] == 1
    assert found["published"] > 4 * found["ours"]
