from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concept_erasure.errors import ShapeError
from concept_erasure.linear.quantile import QuantileNormalizer, cdf, icdf

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
quantiles = st.lists(numbers, min_size=2, max_size=60, unique=True).map(sorted)


@given(st.lists(numbers, min_size=1, max_size=10), quantiles)
def test_galois_connection(values: list[float], table: list[float]) -> None:
    x, q = torch.tensor(values).double(), torch.tensor(table).double()
    p = cdf(x, q)
    back = icdf(p, q)
    inside = p > 0
    assert bool((back[inside] <= x[inside]).all())
    assert bool((cdf(back, q) >= p).all())
    assert torch.equal(icdf(cdf(q, q), q), q)


@given(st.lists(numbers, min_size=1, max_size=10), quantiles)
def test_cdf_counts(values: list[float], table: list[float]) -> None:
    x, q = torch.tensor(values), torch.tensor(table)
    expected = torch.tensor([sum(t <= v for t in q.tolist()) / len(q) for v in x.tolist()])
    torch.testing.assert_close(cdf(x, q), expected)


def test_tables_broadcast() -> None:
    q = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    x = torch.tensor([2.0, 25.0])
    torch.testing.assert_close(cdf(x, q) * 3, torch.tensor([[2.0, 3.0], [0.0, 2.0]]))
    p = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(icdf(p, q), torch.tensor([[1.0, 3.0], [10.0, 30.0]]))


def test_one_quantile_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least two"):
        cdf(0.0, torch.zeros(1))


@pytest.mark.parametrize("dim", [0, 1])
def test_transport_makes_marginals_equal(dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.arange(400) % 2 * 5  # labels with a gap
    x = torch.randn(400, 3, generator=g) * (1 + z[:, None]) + z[:, None]
    data = x if dim == 0 else x.T
    normalizer = QuantileNormalizer(data, z, num_bins=200, dim=dim)
    assert normalizer.num_bins == 200
    assert normalizer.labels == [0, 5]
    out = normalizer.transport(data, z, 5).movedim(dim, 0)
    moved, target = out[z == 0].sort(0).values, x[z == 5].sort(0).values
    assert (moved - target).abs().max() < 1.0
    assert (moved.mean(0) - target.mean(0)).abs().max() < 0.1
    torch.testing.assert_close(out[z == 5], x[z == 5])


def test_transport_keeps_the_order_within_a_class() -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.arange(300) % 3
    x = torch.randn(300, 1, generator=g) + z[:, None]
    out = QuantileNormalizer(x, z).transport(x, z, 1)
    order = x[z == 0].flatten().argsort()
    assert bool((out[z == 0].flatten()[order].diff() >= 0).all())


def test_cdf_and_samples_of_a_class() -> None:
    g = torch.Generator().manual_seed(2)
    x, z = torch.randn(500, 2, generator=g), torch.zeros(500, dtype=torch.int64)
    normalizer = QuantileNormalizer(x, z)
    assert (normalizer.cdf(0, x).mean(0) - 0.5).abs().max() < 0.01
    before = torch.get_rng_state()
    drawn = normalizer.sample(0, 1000, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert drawn.shape == (1000, 2)
    assert (drawn.mean(0) - x.mean(0)).abs().max() < 0.15
    assert torch.equal(drawn, normalizer.sample(0, 1000, seed=3))


def test_low_precision_and_bad_input() -> None:
    x, z = torch.arange(12.0).view(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    out = QuantileNormalizer(x.bfloat16(), z, 3).transport(x.bfloat16(), z, 0)
    assert out.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="class 4 was not in the data"):
        QuantileNormalizer(x, z).transport(x, z, 4)
    with pytest.raises(ValueError, match="num_bins"):
        QuantileNormalizer(x, z, 1)
    with pytest.raises(ValueError, match="NaN"):
        QuantileNormalizer(x / 0, z)
