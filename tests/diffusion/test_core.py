import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_erasure.diffusion.core import (
    Pairs,
    PairSums,
    Preserve,
    compress,
    metric,
    solve,
    solve_layer,
    text_gram,
)
from concept_erasure.diffusion.reach import Certificate, certificate, certificate_by_layer
from concept_erasure.errors import ErasureWarning, ShapeError, SpaceError
from concept_erasure.linalg import LowRankAffine

D, OUT = 24, 17
LAM = 0.3


def rows(n, seed, width=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def weights(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64) + 0.2


def brute_force(weight, pairs, preserved, lam):
    """Least squares with one row for each term."""
    root = pairs.weights.sqrt()[:, None]
    eye = torch.eye(D, dtype=torch.float64)
    inputs = torch.cat([pairs.source * root, preserved, eye * math.sqrt(lam)])
    outputs = torch.cat([pairs.target * root, preserved, eye * math.sqrt(lam)]) @ weight.T
    return torch.linalg.lstsq(inputs, outputs).solution.T


@pytest.mark.parametrize("n", [0, 1, 5, 40])
@pytest.mark.parametrize("repeated", [False, True])
def test_dual_primal_and_brute_force_agree(n, repeated):
    source, preserved, weight = rows(n, 1), rows(30, 2), rows(OUT, 3)
    if repeated and n > 1:
        source[1] = source[0]
    pairs = Pairs(source, rows(n, 4), weights(n, 5))
    held = metric(Preserve(D).update(preserved), width=D, lam=LAM)
    dual = solve(pairs, held, "dual").matrix
    for other in (
        solve(pairs, held, "primal").matrix,
        solve(pairs, held).matrix,
        solve(PairSums(D).update(pairs), held).matrix,
    ):
        torch.testing.assert_close(other, dual, atol=1e-10, rtol=1e-10)
    if n == 0:
        torch.testing.assert_close(dual, torch.eye(D, dtype=torch.float64))
    expected = brute_force(weight, pairs, preserved, LAM)
    torch.testing.assert_close(weight @ dual, expected, atol=1e-10, rtol=1e-10)
    residual = (pairs.target - pairs.source) @ weight.T
    for form in ("dual", "primal"):
        up, down = solve_layer(source, residual, pairs.weights, held, form)
        torch.testing.assert_close(weight + up @ down.T, expected, atol=1e-10, rtol=1e-10)
        assert torch.linalg.matrix_rank(up @ down.T) <= n


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_primal_respects_the_constraints(hard, ridge):
    kept = rows(3, 9)
    options = {"hard": True, "ridge": 0.4} if hard else {"lam": LAM}
    held = metric(
        Preserve(D).update(rows(8, 2)), width=D, invariants=kept, invariant_ridge=ridge, **options
    )
    pairs = Pairs(rows(6, 1), rows(6, 4), weights(6, 5))
    dual, primal = (solve(pairs, held, form).matrix for form in ("dual", "primal"))
    torch.testing.assert_close(primal, dual, atol=1e-12, rtol=1e-12)
    moved = (kept @ dual.T - kept).norm() / kept.norm()
    assert (moved < 1e-13) == (ridge == 0)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_metric_is_its_formula(hard, ridge):
    preserved, kept = rows(8, 2), rows(3, 9)
    gram = preserved.T @ preserved
    eye = torch.eye(D, dtype=torch.float64)
    if hard:
        q = (eye - torch.linalg.pinv(preserved) @ preserved) / 0.4
        options = {"hard": True, "ridge": 0.4}
    else:
        q = torch.linalg.inv(LAM * eye + gram)
        options = {"lam": LAM}
    inner = kept @ q @ kept.T + ridge * torch.eye(3, dtype=torch.float64)
    q = q - q @ kept.T @ torch.linalg.solve(inner, kept @ q)
    held = metric(gram, width=D, invariants=kept, invariant_ridge=ridge, **options)
    torch.testing.assert_close(held(eye), q, atol=1e-11, rtol=1e-11)
    assert held.dimension == D - 8 * hard - 3 * (ridge == 0)


def test_more_weight_means_less_residual():
    pairs, held = (rows(4, 1), rows(4, 4)), metric(rows(30, 2).T @ rows(30, 2), width=D, lam=LAM)
    left = []
    for weight in (1e-9, 1e-2, 1.0, 1e2, 1e9):
        edit = solve(Pairs(*pairs, weight), held)
        left.append(float((edit(pairs[0]) - pairs[1]).norm() / (pairs[0] - pairs[1]).norm()))
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(1, abs=1e-6)
    assert left[-1] < 1e-7
    assert (solve(Pairs(*pairs, 1e-9), held).matrix - torch.eye(D)).norm() < 1e-6


def test_exact_pairs_interpolate_with_the_least_change():
    source, target, preserved = rows(4, 1), rows(4, 4), rows(30, 2)
    held = metric(Preserve(D).update(preserved), width=D, lam=LAM)
    edit = solve(Pairs(source, target, math.inf), held)
    torch.testing.assert_close(edit(source), target, atol=1e-12, rtol=1e-12)
    # Lagrange system of  min |E p|^2 + lam |E|^2  s.t. E c = c* - c
    gram = preserved.T @ preserved + LAM * torch.eye(D, dtype=torch.float64)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    system = torch.cat([torch.cat([gram, source.T], 1), torch.cat([source, zero], 1)])
    right = torch.cat([torch.zeros(D, D, dtype=torch.float64), target - source])
    expected = torch.linalg.solve(system, right)[:D].T
    change = edit.matrix - torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(change, expected, atol=1e-10, rtol=1e-10)


def test_exact_and_soft_pairs_in_one_solve():
    weight = torch.tensor([math.inf, 1.0, math.inf, 0.1], dtype=torch.float64)
    source, target = rows(4, 1), rows(4, 4)
    held = metric(None, width=D, lam=LAM)
    edit = solve(Pairs(source, target, weight), held)
    error = (edit(source) - target).norm(dim=1)
    assert error[[0, 2]].max() < 1e-12
    assert error[[1, 3]].min() > 1e-3
    large = torch.where(torch.isinf(weight), 1e12, weight)
    close = solve(Pairs(source, target, large), held)
    torch.testing.assert_close(edit.matrix, close.matrix, atol=1e-8, rtol=1e-8)


def test_exact_pairs_that_repeat_or_contradict():
    source, target = rows(3, 1), rows(3, 4)
    held = metric(None, width=D, lam=LAM)
    twice = Pairs(torch.cat([source, source]), torch.cat([target, target]), math.inf)
    torch.testing.assert_close(solve(twice, held)(source), target, atol=1e-10, rtol=1e-10)
    torn = Pairs(torch.cat([source, source]), torch.cat([target, -target]), math.inf)
    with pytest.raises(ValueError, match="contradict"):
        solve(torn, held)
    with pytest.raises(ValueError, match="primal form has no infinite"):
        solve(twice, held, "primal")


def test_what_is_preserved_stays_with_weight_and_exactly_in_the_hard_form():
    pairs, preserved, kept = Pairs(rows(4, 1), rows(4, 4)), rows(9, 2), rows(2, 9)
    edits, drift = [], []
    for weight in (1.0, 1e2, 1e4, 1e6):
        held = metric(Preserve(D).update(preserved, weight), width=D, lam=1.0, invariants=kept)
        edits.append(solve(pairs, held).matrix)
        drift.append(float((preserved @ edits[-1].T - preserved).norm()))
    assert drift == sorted(drift, reverse=True)
    assert drift[-1] < 1e-5
    hard = metric(Preserve(D).update(preserved), width=D, hard=True, ridge=1.0, invariants=kept)
    edit = solve(pairs, hard)
    for vectors in (preserved, kept):
        moved = (edit(vectors) - vectors).norm(dim=1) / vectors.norm(dim=1)
        assert moved.max() < 1e-10
    gaps = [float((other - edit.matrix).norm()) for other in edits]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4


def test_tau_rank_and_relative_tau_name_the_same_subspace():
    scale = torch.logspace(0, -6, 12, dtype=torch.float64)
    basis = torch.linalg.qr(rows(D, 3).T)[0][:12]
    gram = basis.T @ (basis * scale[:, None])
    eye = torch.eye(D, dtype=torch.float64)
    by_tau = metric(gram, width=D, hard=True, tau=float(scale[5]) * 0.9)
    by_rank = metric(gram, width=D, hard=True, rank=6)
    by_share = metric(gram, width=D, hard=True, relative_tau=float(scale[5] / scale[0]) * 0.9)
    assert by_tau.dimension == by_rank.dimension == by_share.dimension == D - 6
    torch.testing.assert_close(by_tau(eye), by_rank(eye))
    torch.testing.assert_close(by_tau(eye), by_share(eye))
    assert metric(gram, width=D, hard=True).dimension == D - 12


def test_invariants_that_are_preserved_already_take_nothing_off():
    preserved = rows(6, 2)
    hard = metric(Preserve(D).update(preserved), width=D, hard=True, invariants=preserved[:3] * 5)
    assert hard.dimension == D - 6
    everything = metric(None, width=D, lam=1.0, invariants=rows(2 * D, 3))
    assert everything.dimension == 0
    with pytest.raises(ValueError, match="1 independent pairs do not fit .* 0 dimensions of 24"):
        solve(Pairs(rows(1, 1), rows(1, 4)), everything)


def test_more_pairs_than_the_null_space_has_dimensions():
    held = metric(Preserve(D).update(rows(20, 2)), width=D, hard=True)
    with pytest.raises(ValueError, match="5 independent pairs .* 4 dimensions"):
        solve(Pairs(rows(5, 1), rows(5, 4)), held)
    same = rows(1, 1).expand(9, -1)  # many, but one direction
    solve(Pairs(same, rows(1, 4).expand(9, -1)), held)
    with pytest.raises(ValueError, match="lie in what is preserved"):
        solve(Pairs(rows(20, 2)[3:5], rows(2, 4)), held)


def test_bridge_between_interpolation_and_projection():
    source, target, preserved, blank = rows(4, 1), rows(4, 4), rows(6, 2), rows(3, 9)
    for hard in (True, False):
        options = {"hard": True} if hard else {"lam": LAM}
        held = metric(
            Preserve(D).update(preserved),
            width=D,
            invariants=torch.cat([blank, target]),
            **options,
        )
        edit = solve(Pairs(source, target, math.inf), held)
        matrix = edit.matrix
        torch.testing.assert_close(matrix @ matrix, matrix, atol=1e-12, rtol=1e-12)
        assert torch.linalg.matrix_rank(matrix, rtol=1e-9) == D - 4
        torch.testing.assert_close(edit(source), target, atol=1e-12, rtol=1e-12)
        for vectors in (target, blank, *([preserved] if hard else [])):
            torch.testing.assert_close(edit(vectors), vectors, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pairs_refuse_bad_input(bad):
    source, target = rows(3, 1), rows(3, 4)
    broken = source.clone()
    broken[1, 2] = bad
    with pytest.raises(ValueError, match="row 1"):
        Pairs(broken, target)
    with pytest.raises(ValueError, match="row 1"):
        Pairs(source, broken)
    with pytest.raises(ShapeError, match="one shape"):
        Pairs(source, target[:2])
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            Pairs(source, target, weight)
    with pytest.raises(ShapeError, match="weight must be"):
        Pairs(source, target, torch.ones(2))
    with pytest.raises(TypeError, match="floating"):
        Pairs(source.long(), target)


def test_an_anchor_equal_to_its_concept():
    source, target = rows(3, 1), rows(3, 4)
    with pytest.raises(ValueError, match="anchor equal to the concept"):
        Pairs(source, source)
    shared = torch.cat([source[:1], target[1:]])  # a common prefix token is fine
    Pairs(source, shared)
    with pytest.raises(ValueError, match=r"anchor equal to the concept \(concept 0\)"):
        Pairs(source, shared, concept=torch.tensor([0, 1, 1]))


def test_pairs_are_joined_and_cut():
    one = Pairs(rows(2, 1), rows(2, 4), 2.0).numbered(0)
    two = Pairs(rows(3, 5), rows(3, 6), math.inf).numbered(1)
    both = Pairs.cat([one, two])
    assert len(both) == 5
    assert both.concept.tolist() == [0, 0, 1, 1, 1]
    assert both.slack.tolist() == [0.5, 0.5, 0, 0, 0]
    assert torch.equal(both[both.concept == 1].source, two.source)
    assert Pairs.cat([one, Pairs(rows(1, 7), rows(1, 8))]).concept is None
    with pytest.raises(ShapeError, match="widths"):
        Pairs.cat([one, Pairs(rows(2, 1, 5), rows(2, 2, 5))])
    with pytest.raises(ValueError, match="no pairs"):
        Pairs.cat([])
    assert len(Pairs.empty(D)) == 0
    assert "exact=3" in repr(both)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 99))
def test_preserve_does_not_depend_on_batches(sizes, seed):
    total = sum(sizes)
    vectors, factor = rows(total, seed), weights(total, seed)
    whole = Preserve(D).update(vectors, factor)
    parts = [
        Preserve(D).update(v, w)
        for v, w in zip(vectors.split(sizes), factor.split(sizes), strict=True)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    torch.testing.assert_close(merged.gram, whole.gram)
    torch.testing.assert_close(whole.gram, vectors.T @ (vectors * factor[:, None]))
    assert merged.count == total
    assert merged.total == pytest.approx(float(factor.sum()))
    again = Preserve.from_tensors(whole.tensors())
    assert torch.equal(again.gram, whole.gram)
    assert (again.count, again.total) == (whole.count, pytest.approx(whole.total))


def test_preserve_normalised_and_its_errors():
    vectors = rows(10, 2)
    one = Preserve(D, encoder="a").update(vectors).normalised()
    two = Preserve(D, encoder="a").update(vectors).update(vectors).normalised()
    torch.testing.assert_close(one.gram, two.gram)
    assert one.mean_eigenvalue == pytest.approx(float(vectors.square().sum() / 10 / D))
    with pytest.raises(SpaceError, match="two text encoders"):
        one.merge(Preserve(D, encoder="b"))
    with pytest.raises(ShapeError, match="widths"):
        one.merge(Preserve(D + 1))
    with pytest.raises(ShapeError, match="vectors"):
        one.update(rows(2, 1, D + 1))
    with pytest.raises(ValueError, match="not negative"):
        one.update(vectors, -1.0)
    with pytest.raises(ValueError, match="not finite"):
        one.update(vectors * math.nan)
    assert torch.equal(Preserve(D).normalised().gram, torch.zeros(D, D, dtype=torch.float64))


def test_metric_refuses_bad_options():
    gram = rows(5, 2).T @ rows(5, 2)
    with pytest.raises(ValueError, match=r"full rank 24; this one has rank 5"):
        metric(gram, width=D, lam=0.0)
    with pytest.raises(ValueError, match="give lam > 0"):
        metric(None, width=D, lam=0.0)
    with pytest.raises(ValueError, match="belong to hard=True"):
        metric(gram, width=D, lam=1.0, tau=0.1)
    with pytest.raises(ValueError, match="lam belongs to the soft"):
        metric(gram, width=D, hard=True, lam=1.0)
    with pytest.raises(ValueError, match="one of tau"):
        metric(gram, width=D, hard=True, tau=0.1, rank=3)
    with pytest.raises(ValueError, match="rank must be 0..24"):
        metric(gram, width=D, hard=True, rank=25)
    with pytest.raises(ValueError, match="at least 0"):
        metric(gram, width=D, lam=-1.0)
    with pytest.raises(ValueError, match="ridge must be above 0"):
        metric(gram, width=D, hard=True, ridge=0.0)
    with pytest.raises(ShapeError, match="Gram"):
        metric(gram, width=D + 1, lam=1.0)
    with pytest.raises(ShapeError, match="invariants"):
        metric(gram, width=D, lam=1.0, invariants=rows(2, 1, D + 1))
    full = rows(60, 2).T @ rows(60, 2)
    metric(full, width=D, lam=0.0)


def test_a_gram_beyond_float64_warns():
    gram = torch.diag(torch.logspace(8, -14, D, dtype=torch.float64))
    gram[-1, -1] = -1e-9  # rounding
    with pytest.warns(ErasureWarning, match="ill-conditioned"):
        metric(gram, width=D, lam=1e-13)


def test_certificate_is_zero_where_the_edit_can_be_inverted():
    source, target = rows(4, 1), rows(4, 4)
    held = metric(Preserve(D).update(rows(30, 2)), width=D, lam=LAM)
    for weight in (1.0, math.inf):
        edit = solve(Pairs(source, target, weight), held)
        found = certificate(None, edit, source, target)
        assert found.rho.tolist() == [0] * 4
        back = torch.linalg.solve(edit.matrix, source.T).T
        size = source.norm(dim=1)
        torch.testing.assert_close(found.distance, (back - source).norm(dim=1) / size)
        torch.testing.assert_close(found.norm, back.norm(dim=1) / size)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("anchored", [True, False])
def test_certificate_of_a_projection_is_the_least_squares_value(scale, anchored):
    source, target = rows(4, 1) * scale, rows(4, 4) * scale
    held = metric(None, width=D, lam=LAM, invariants=torch.cat([target, rows(2, 9) * scale]))
    edit = solve(Pairs(source, target, math.inf), held)
    H = text_gram([rows(20, 7), rows(15, 8)])
    found = certificate(lambda: H, edit, source, target if anchored else None)
    root = torch.linalg.cholesky(H).T
    best = torch.linalg.lstsq(root @ edit.matrix, root @ source.T, driver="gelsd").solution
    missed = (root @ (edit.matrix @ best - source.T)).norm(dim=0)
    below = (root @ ((source - target) if anchored else source).T).norm(dim=0)
    torch.testing.assert_close(found.rho, missed / below, atol=1e-9, rtol=1e-9)
    assert found.rho.min() > 0.01
    if anchored:
        assert found.rho.max() <= 1
        first = certificate(H, edit, source / scale, target / scale)
        torch.testing.assert_close(found.rho, first.rho, atol=1e-9, rtol=1e-9)
    inside = edit(rows(2, 11))
    assert certificate(H, edit, inside).rho.max() < 1e-9


def test_certificate_of_an_orthogonal_projection():
    basis = torch.linalg.qr(rows(3, 1).T)[0]
    edit = LowRankAffine(basis, basis)
    concept = rows(2, 5)
    found = certificate(torch.eye(D, dtype=torch.float64), edit, concept)
    share = (concept @ basis).norm(dim=1) / concept.norm(dim=1)
    torch.testing.assert_close(found.rho, share)
    assert not found.anchored


def test_certificate_errors_and_text():
    source, target = rows(2, 1), rows(2, 4)
    held = metric(None, width=D, lam=LAM, invariants=target)
    edit = solve(Pairs(source, target, math.inf), held)
    with pytest.raises(ValueError, match="H is needed"):
        certificate(None, edit, source, target)
    with pytest.raises(ValueError, match="full rank 24"):
        certificate(text_gram([rows(5, 1)]), edit, source, target)
    with pytest.raises(ShapeError, match="2 concepts and 1 anchors"):
        certificate(None, edit, source, target[:1])
    found = certificate(text_gram([rows(40, 1)]), edit, source, target, names=["van gogh", "monet"])
    assert "'monet': 0." in repr(found)
    again = Certificate.from_dict(found.to_dict())
    assert torch.equal(again.rho, found.rho)
    assert again.names == found.names
    with pytest.raises(ValueError, match="no weights"):
        text_gram([])


def test_compress_keeps_the_map():
    first, second = (LowRankAffine(rows(D, s)[:, :9], rows(D, s + 1)[:, :9]) for s in (1, 3))
    whole = first.compose(second).compose(first)
    thin = compress(whole)
    assert thin.rank <= D
    torch.testing.assert_close(thin.matrix, whole.matrix, atol=1e-10, rtol=1e-10)
    single = LowRankAffine(rows(D, 1)[:, :1].expand(-1, 5), rows(D, 2)[:, :1].expand(-1, 5))
    assert compress(single).rank == 1
    assert compress(LowRankAffine(first.left[:, :0], first.right[:, :0])).rank == 0
    with pytest.raises(ValueError, match="origin"):
        compress(LowRankAffine(first.left, first.right, rows(1, 1)[0]))


def test_layer_targets_and_sums_refuse_bad_input():
    held = metric(None, width=D, lam=LAM)
    with pytest.raises(ShapeError, match="3 embeddings and 2 residuals"):
        solve_layer(rows(3, 1), rows(2, 1, OUT), 1.0, held)
    with pytest.raises(ValueError, match="positive"):
        solve_layer(rows(3, 1), rows(3, 1, OUT), 0.0, held)
    with pytest.raises(ShapeError, match="width"):
        solve(Pairs(rows(1, 1, 5), rows(1, 2, 5)), held)
    with pytest.raises(ValueError, match="'auto', 'dual' or 'primal'"):
        solve(Pairs(rows(1, 1), rows(1, 2)), held, "best")
    with pytest.raises(ValueError, match="primal form"):
        solve(PairSums(D), held, "dual")
    with pytest.raises(ValueError, match="exact pairs"):
        PairSums(D).update(Pairs(rows(1, 1), rows(1, 2), math.inf))
    up, down = solve_layer(rows(3, 1), rows(3, 4, OUT), math.inf, held)
    torch.testing.assert_close(rows(3, 1) @ down @ up.T, rows(3, 4, OUT), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_solved_in_float64(dtype):
    source, target, preserved = (rows(n, s).to(dtype) for n, s in ((3, 1), (3, 4), (9, 2)))
    low = solve(Pairs(source, target), metric(Preserve(D).update(preserved), width=D, lam=LAM))
    high = solve(
        Pairs(source.double(), target.double()),
        metric(Preserve(D).update(preserved.double()), width=D, lam=LAM),
    )
    assert low.left.dtype == torch.float64
    assert torch.equal(low.matrix, high.matrix)


@pytest.mark.gpu
def test_the_device_follows_the_input():
    source, target, preserved = (rows(n, s).cuda() for n, s in ((3, 1), (3, 4), (9, 2)))
    held = metric(Preserve(D, device="cuda").update(preserved), width=D, lam=LAM)
    edit = solve(Pairs(source, target), held)
    assert edit.left.is_cuda
    other = solve(
        Pairs(source.cpu(), target.cpu()),
        metric(Preserve(D).update(preserved.cpu()), width=D, lam=LAM),
    )
    torch.testing.assert_close(edit.matrix.cpu(), other.matrix, atol=1e-10, rtol=1e-10)


def test_certificate_by_layer_is_the_shared_one_where_all_layers_share():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(10, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
    concepts, anchors = torch.randn(2, 4, 12, generator=generator, dtype=torch.float64)
    held = metric(None, width=12, lam=1.0, invariants=anchors)
    exact = Pairs(concepts, anchors, torch.full((4,), math.inf, dtype=torch.float64))
    for pairs in (exact, Pairs(concepts, anchors, torch.ones(4, dtype=torch.float64))):
        edit = solve(pairs, held)
        edited = [edit.fold_reading(weight, None)[0] for weight in weights]
        shared = certificate(text_gram(weights), edit, concepts, anchors)
        layered = certificate_by_layer(
            lambda e=edited: zip(weights, e, strict=True), concepts, anchors
        )
        torch.testing.assert_close(layered.rho, shared.rho, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(layered.distance, shared.distance, atol=1e-6, rtol=1e-6)


def test_certificate_by_layer_is_the_stacked_least_squares_value():
    generator = torch.Generator().manual_seed(4)
    layers = [
        tuple(torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)) for _ in range(3)
    ]
    concepts, anchors = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    before, after = (torch.cat(parts) for parts in zip(*layers, strict=True))
    found = certificate_by_layer(lambda: layers, concepts, anchors, names=("a", "b", "c"))
    x = torch.linalg.lstsq(after, before @ concepts.T).solution
    left = torch.linalg.vector_norm(after @ x - before @ concepts.T, dim=0)
    way = torch.linalg.vector_norm((concepts - anchors) @ before.T, dim=1)
    torch.testing.assert_close(found.rho, left / way)
    with pytest.raises(ValueError, match="no layers"):
        certificate_by_layer(list, concepts)
    with pytest.raises(ShapeError):
        certificate_by_layer(lambda: layers, concepts, anchors[:1])
