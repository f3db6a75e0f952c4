"""The tests against scipy's, and what they must and must not conclude."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from concept_erasure.evals.language.statistics import _at_most, equivalence_to, paired, share

flags = st.lists(st.booleans(), min_size=1, max_size=60)


def hits(k: int, n: int) -> list[bool]:
    return [True] * k + [False] * (n - k)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0, 1))
def test_binomial_tail(k: int, n: int, p: float) -> None:
    assert _at_most(k, n, p) == pytest.approx(float(binom.cdf(k, n, p)), abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_is_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [list(part) for part in zip(*pairs, strict=True)]
    found = paired(before, after)
    changed = found.lost + found.gained
    expected = binomtest(found.gained, changed, 0.5).pvalue if changed else 1.0
    assert found.p == pytest.approx(float(expected), abs=1e-9)
    assert found.difference.value == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert -1 <= found.difference.low <= found.difference.high <= 1
    back = paired(after, before)
    assert (back.lost, back.gained, back.p) == (found.gained, found.lost, found.p)


@given(flags)
def test_share(one: list[bool]) -> None:
    found = share(one)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_pairs_see_what_two_shares_do_not() -> None:
    before = hits(60, 100)
    after = [False] * 8 + before[8:]
    assert share(before).low < share(after).value  # the intervals overlap
    assert paired(before, after).p < 0.01


@pytest.mark.parametrize(("k", "n"), [(25, 100), (250, 1000), (26, 105)])
def test_equivalence_is_two_one_sided_tests(k: int, n: int) -> None:
    for margin in (0.05, 0.1, 0.2):
        found = equivalence_to(0.25, hits(k, n), margin=margin)
        above = binomtest(k, n, 0.25 - margin, alternative="greater").pvalue
        below = binomtest(k, n, 0.25 + margin, alternative="less").pvalue
        assert found.p == pytest.approx(max(float(above), float(below)), abs=1e-9)
        assert found.equivalent == (found.shown <= margin)


def test_not_significant_is_not_equivalent() -> None:
    few = equivalence_to(0.25, hits(5, 20), margin=0.02)
    assert few.share.value == 0.25  # exactly chance, and nothing is shown
    assert not few.equivalent
    assert few.shown > 0.15
    many = equivalence_to(0.25, hits(2500, 10_000), margin=0.02)
    assert many.equivalent


def test_below_chance_is_no_equivalence() -> None:
    assert not equivalence_to(0.25, hits(5, 100), margin=0.1).equivalent
    assert equivalence_to(0.25, hits(5, 100), margin=0.1).shown > 0.2


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="at least one case"):
        share([])
    with pytest.raises(ValueError, match="pairs are needed, got 1 and 2"):
        paired([True], [True, False])
    with pytest.raises(ValueError, match="chance and margin"):
        equivalence_to(0.25, [True], margin=0.0)
