from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.fantope import capped_simplex, fantope_projection, round_to_projection


def symmetric(d: int, *lead: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(*lead, d, d, generator=g, dtype=torch.float64) * scale
    return (s + s.mT) / 2


def projection(d: int, k: int, seed: int = 0) -> Tensor:
    v = torch.linalg.qr(symmetric(d, seed=seed))[0][:, :k]
    return v @ v.T


@pytest.mark.parametrize("method", ["exact", "bisection"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("d", "k"), [(1, 1), (6, 1), (8, 3), (12, 5), (12, 11)])
def test_feasible(d: int, k: int, scale: float, method: str) -> None:
    q = fantope_projection(symmetric(d, scale=scale), k, method=method)  # type: ignore[arg-type]
    values = torch.linalg.eigvalsh(q)
    assert torch.equal(q, q.T)
    assert values.min() > -1e-12
    assert values.max() < 1 + 1e-12
    assert abs(float(q.trace()) - k) < 1e-10


@pytest.mark.parametrize(("d", "k"), [(6, 1), (8, 3), (12, 5)])
def test_nearest_point_satisfies_the_variational_inequality(d: int, k: int) -> None:
    s = symmetric(d)
    q = fantope_projection(s, k)
    # <S - Q, Y - Q> <= 0 for all Y; the maximum over Y is at the top k eigenvectors of S - Q
    best = torch.linalg.eigvalsh(s - q)[d - k :].sum()
    assert float(best - ((s - q) * q).sum()) < 1e-10


def test_bisection_is_exact() -> None:
    for k in range(1, 9):
        s = symmetric(9, 5, seed=k, scale=3)
        one, two = (fantope_projection(s, k, method=m) for m in ("exact", "bisection"))  # type: ignore[arg-type]
        assert (one - two).abs().max() < 1e-10


def test_batch_is_one_by_one() -> None:
    s = symmetric(7, 2, 3)
    whole = fantope_projection(s, 2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(whole[i, j], fantope_projection(s[i, j], 2))


def test_nothing_and_everything() -> None:
    s = symmetric(4, 2)
    assert torch.equal(fantope_projection(s, 0), torch.zeros_like(s))
    assert torch.equal(fantope_projection(s, 4), torch.eye(4).double().expand(2, 4, 4))
    assert fantope_projection(torch.zeros(0, 0), 0).shape == (0, 0)


def test_repeated_eigenvalues_and_flat_segments() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(fantope_projection(5 * eye, 2), eye / 3)
    torch.testing.assert_close(fantope_projection(0 * eye, 3), eye / 2)
    flat = torch.diag(torch.tensor([9.0, 9, 0, 0, -3, -3], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(fantope_projection(flat, 2), expected)


def test_idempotent_and_non_expansive() -> None:
    a, b = symmetric(10, seed=1, scale=2), symmetric(10, seed=2, scale=2)
    p, q = fantope_projection(a, 4), fantope_projection(b, 4)
    torch.testing.assert_close(fantope_projection(p, 4), p)
    assert (p - q).norm() <= (a - b).norm()


def test_the_shift_of_large_values_costs_no_digits() -> None:
    values = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        capped_simplex(values + 1e6, 1), capped_simplex(values, 1), atol=1e-9, rtol=0
    )


def test_rounding() -> None:
    q = projection(9, 3)
    v, gap = round_to_projection(q, 3)
    torch.testing.assert_close(v @ v.T, q)
    assert float(gap) == pytest.approx(1)
    assert float(round_to_projection(torch.eye(4) / 2, 2)[1]) == pytest.approx(0, abs=1e-6)
    assert round_to_projection(q, 0)[0].shape == (9, 0)
    assert round_to_projection(q, 9)[0].shape == (9, 9)
    assert round_to_projection(torch.stack([q, q]), 3)[0].shape == (2, 9, 3)


def test_low_precision_keeps_its_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q = fantope_projection(symmetric(6).to(dtype), 2)
        assert q.dtype == dtype
        assert float(q.float().trace()) == pytest.approx(2, abs=0.05)


def test_bad_input_raises() -> None:
    with pytest.raises(ShapeError, match=r"\(\.\.\., d, d\)"):
        fantope_projection(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="from 0 to the width 3"):
        fantope_projection(torch.zeros(3, 3), 4)
    with pytest.raises(ValueError, match="whole number"):
        fantope_projection(torch.zeros(3, 3), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bisection"):
        fantope_projection(torch.zeros(3, 3), 1, method="newton")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating"):
        fantope_projection(torch.zeros(3, 3, dtype=torch.int64), 1)


@pytest.mark.parametrize(("d", "k"), [(6, 1), (8, 3), (12, 5)])
def test_equals_the_semidefinite_programme(d: int, k: int) -> None:
    pytest.importorskip("cvxpy")
    from concept_erasure.certify import fantope_oracle

    s = symmetric(d)
    assert (fantope_projection(s, k) - fantope_oracle(s, k)).abs().max() < 1e-6
