"""Rounded weights are the nearest of the grid, and every bit comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concept_erasure.edit import DensePatch, Edit
from concept_erasure.errors import EditError, SiteNotFoundError
from concept_erasure.evals.language.quantise import quantised, round_to_nearest
from tests.evals.language.planted import bits as copies
from tests.models import tiny


def grids(weight: Tensor, bits: int, group: int, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
    """Each group of each row with all values that its grid has."""
    made = []
    for row in weight:
        for part in row.split(group):
            if symmetric:
                most = 2 ** (bits - 1) - 1
                made.append((part, torch.arange(-most, most + 1) * part.abs().max() / most))
            else:
                low, high = part.min(), part.max()
                made.append((part, low + torch.arange(2**bits) * (high - low) / (2**bits - 1)))
    return made


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 40), group=st.integers(1, 50),
    bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(), scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_entry_is_the_nearest_of_its_grid(
    rows: int, columns: int, group: int, bits: int, symmetric: bool, scale: float, seed: int
) -> None:
    weight = (
        scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    )
    found = round_to_nearest(weight, bits, group=group, symmetric=symmetric)
    parts = [part for row in found for part in row.split(group)]
    for (part, grid), made in zip(grids(weight, bits, group, symmetric), parts, strict=True):
        least = (part[:, None] - grid).abs().amin(1)
        torch.testing.assert_close((part - made).abs(), least, atol=1e-9 * scale, rtol=1e-6)
        assert len(made.unique()) <= 2**bits
    again = round_to_nearest(found, bits, group=group, symmetric=symmetric)
    torch.testing.assert_close(again, found, atol=1e-9 * scale, rtol=1e-9)


def test_zeros_and_constants_stay() -> None:
    weight = torch.zeros(3, 10)
    weight[1] = 0.7
    for symmetric in (True, False):
        torch.testing.assert_close(
            round_to_nearest(weight, 4, group=4, symmetric=symmetric), weight
        )
    sparse = torch.randn(4, 12) * (torch.arange(12) % 3 == 0)
    assert bool((round_to_nearest(sparse, 4, group=6)[sparse == 0] == 0).all())


def test_fewer_bits_and_wider_groups_are_coarser() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((round_to_nearest(weight, b, group=g) - weight).norm())
        for b, g in ((8, None), (4, 16), (4, 128), (4, None), (2, None))
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_bit_comes_back(kind: str, bits: int) -> None:
    model = tiny(kind, dtype=torch.bfloat16 if kind == "llama" else torch.float32)
    before = copies(model)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with quantised(model, bits, group=16) as edit:  # type: ignore[arg-type]
            changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
            assert changed == set(edit.targets)
            assert not any(
                "embed" in name or "wte" in name or "lm_head" in name for name in changed
            )
            assert not torch.equal(model(input_ids=ids).logits, logits)
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_rows_of_a_transposed_module_are_its_outputs() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 3] *= (
            1e4  # one output; the others keep their grid
        )
    before = copies(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    with quantised(model, 8):
        change = (model.get_parameter(name).detach() - before[name]).abs().amax(0)
    assert float(change[3]) > 1e2 * float(change[[0, 1, 2]].max())


def test_it_lies_over_an_edit_and_leaves_it() -> None:
    model = tiny("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    value = 2 * model.get_parameter(name).detach()
    with Edit(model, [DensePatch(name, value)], label="double"):
        with quantised(model, 8):
            expected = round_to_nearest(value, 8)
            torch.testing.assert_close(model.get_parameter(name).detach(), expected)
        assert torch.equal(model.get_parameter(name), value)


def test_a_change_below_the_rounding_is_lost_and_a_large_one_is_not() -> None:
    """Why the measurement is made: rounding undoes edits that are small beside the weights."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    change = torch.randn(32, 1) @ torch.randn(1, 64)
    rounded = round_to_nearest(weight, 4)
    small = round_to_nearest(weight + 1e-6 * change, 4) - rounded
    large = round_to_nearest(weight + change, 4) - rounded
    assert float(small.norm()) < 1e-3 * float(rounded.norm())
    assert float((large - change).norm() / change.norm()) < 0.5


def test_bad_requests() -> None:
    model = tiny("qwen2")  # its head is tied to the embedding
    before = copies(model)
    with pytest.raises(EditError, match="tied"):
        quantised(model, 8, head=True)
    with pytest.raises(ValueError, match="8 or 4"):
        quantised(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be"):
        quantised(model, 4, group=0)
    with pytest.raises(SiteNotFoundError, match="besides those skipped"):
        quantised(model, 8, skip=["*"])
    with pytest.raises(ValueError, match="matrix"):
        round_to_nearest(torch.zeros(3), 8)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with quantised(model, 8, skip=["*.mlp.*"]) as edit:
        assert not any(".mlp." in name for name in edit.targets)
        assert "int8" in edit.summary()
