"""Anchored projection: the bridge's identities, pivoted Cholesky, certificate, per-layer reference, bad input."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from concept_erasure.diffusion.anchored import (
    AnchoredProjectionEraser,
    anchored_projection,
    independent_columns,
)
from concept_erasure.diffusion.core import Pairs, Preserve, metric, solve, text_gram
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.reach import certificate
from concept_erasure.diffusion.uce import UceEraser
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, ShapeError
from tests.diffusion import per_layer
from tests.diffusion.tiny import TINY, latents, tiny_sd, tiny_sdxl

D = 64


def problem(n: int = 4, m: int = 20, seed: int = 0) -> tuple[Tensor, ...]:
    """Concepts, anchors, preserved, blank; rows with a large common part, as encoders give them."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    mean = 3 * torch.randn(D, **options)
    return tuple(mean + torch.randn(k, D, **options) for k in (n, n, m, 6))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def weights(pipe: object) -> dict[str, Tensor]:
    return {
        m.name: module_at(pipe, m).weight.detach().clone()
        for m in text_maps(pipe)
        if m.exact and m.kind in ("key", "value", "context")
    }


# -- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("anchors", ["one", "own", "zero"])
def test_bridge(hard: bool, anchors: str) -> None:
    source, target, kept, blank = problem()
    target = {"one": target[:1].expand(4, -1), "own": target, "zero": 0 * target}[anchors]
    options = {"hard": True} if hard else {"lam": 0.5}
    held = metric(kept.T @ kept, width=D, invariants=torch.cat([blank, target]), **options)
    edit, chosen, dropped = anchored_projection(source, target, held)
    matrix = edit.matrix
    assert chosen == [0, 1, 2, 3] and dropped == []
    assert relative(matrix @ matrix, matrix) < 1e-12
    assert int(torch.linalg.matrix_rank(matrix)) == D - 4
    assert edit.is_projection()
    scale = source.norm()
    assert float((edit(source) - target).norm() / scale) < 1e-12
    assert float((edit(target) - target).norm() / scale) < 1e-12
    assert float((edit(blank) - blank).norm() / blank.norm()) < 1e-12
    drift = float((edit(kept) - kept).norm() / kept.norm())
    assert drift < 1e-12 if hard else 0 < drift < 0.1
    # it is the core's exact solve with the anchors held
    same = solve(Pairs(source, target, math.inf), held)
    assert relative(same.matrix, matrix) < 1e-9


@pytest.mark.parametrize("hard", [True, False])
def test_is_the_least_change(hard: bool) -> None:
    source, target, kept, blank = problem()
    gram = kept.T @ kept
    held_rows = torch.cat([blank, target, kept]) if hard else torch.cat([blank, target])
    options = {"hard": True} if hard else {"lam": 0.5}
    held = metric(gram, width=D, invariants=torch.cat([blank, target]), **options)
    edit, _, _ = anchored_projection(source, target, held)
    eye = torch.eye(D, dtype=torch.float64)
    cost = eye if hard else gram + 0.5 * eye
    for out in (7, 30, 64):
        weight = torch.randn(
            out, D, generator=torch.Generator().manual_seed(out), dtype=torch.float64
        )
        expected = per_layer.least_change(weight, source, target, cost, held_rows)
        assert relative(weight @ edit.matrix, expected) < 1e-8


def test_one_loose_anchor_breaks_it() -> None:
    source, target, kept, blank = problem()
    held = metric(kept.T @ kept, width=D, lam=0.5, invariants=torch.cat([blank, target[1:]]))
    with pytest.raises(ValueError, match="lets an anchor move"):
        anchored_projection(source, target, held)
    loose = solve(Pairs(source, target, math.inf), held).matrix
    assert relative(loose @ loose, loose) > 1e-3
    assert int(torch.linalg.matrix_rank(loose)) == D - 3


def test_certificate() -> None:
    source, target, kept, blank = problem()
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(40, D, generator=generator, dtype=torch.float64) for _ in range(3)]
    H = text_gram(maps)
    held = metric(kept.T @ kept, width=D, hard=True, invariants=torch.cat([blank, target]))
    edit, _, _ = anchored_projection(source, target, held)
    rho = certificate(H, edit, source, target).rho
    soft = solve(Pairs(source, target, 1.0), metric(kept.T @ kept, width=D, lam=0.5))
    assert certificate(H, soft, source, target).rho.max() < 1e-8
    assert rho.min() > 1e-2 and rho.max() <= 1 + 1e-9
    # brute force over x: the residual of H^(1/2) c outside the range of H^(1/2) M
    stacked = torch.cat(maps)
    for c, a, found in zip(source, target, rho, strict=True):
        best = torch.linalg.lstsq(stacked @ edit.matrix, stacked @ c, driver="gelsd").solution
        missed = (stacked @ (edit.matrix @ best - c)).norm() / (stacked @ (c - a)).norm()
        assert float(found) == pytest.approx(float(missed), rel=1e-6)
    # nothing depends on the scale of all embeddings
    held = metric(49 * kept.T @ kept, width=D, hard=True, invariants=7 * torch.cat([blank, target]))
    scaled, _, _ = anchored_projection(7 * source, 7 * target, held)
    torch.testing.assert_close(certificate(H, scaled, 7 * source, 7 * target).rho, rho)


def test_dependent_concepts_are_dropped() -> None:
    source, target, kept, blank = problem(6)
    target = target[:1].expand(6, -1)
    source = source.clone()
    source[2] = source[0]
    source[5] = 0.25 * source[1] + 0.75 * source[3]
    held = metric(kept.T @ kept, width=D, hard=True, invariants=torch.cat([blank, target]))
    edit, chosen, dropped = anchored_projection(source, target, held)
    assert len(chosen) == 4 and edit.rank == 4
    assert 2 in dropped or 0 in dropped
    # with one anchor an affine combination of concepts goes there too
    assert float((edit(source) - target).norm() / source.norm()) < 1e-9


@pytest.mark.parametrize("n", [0, 1, 7])
def test_independent_columns(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    free = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    rows = torch.cat([free, free[: n // 2] * 3, 0 * free[:1]])
    chosen, dropped = independent_columns(rows @ rows.T)
    assert len(chosen) == n and sorted(chosen + dropped) == list(range(len(rows)))
    assert n == 0 or int(torch.linalg.matrix_rank(rows[chosen])) == n


# -- on pipelines -------------------------------------------------------------------------------


def test_fit_equals_the_reference_layer_by_layer() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before = weights(pipe)
    names, kept = ["van gogh", "snoopy"], ["dog", "red"]
    eraser = AnchoredProjectionEraser.fit(pipe, erase=names, anchor="art", preserve=kept)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    encoder = TextEncoder(pipe)
    rows = {key: torch.cat(encoder.rows(key, "last_subject")) for key in (*names, "art", *kept)}
    source, target = torch.cat([rows[n] for n in names]), rows["art"].expand(2, -1)
    held = torch.cat([encoder.blank(), rows["art"], *(rows[k] for k in kept)])
    eye = torch.eye(32, dtype=torch.float64)
    with eraser.apply(pipe):
        after = weights(pipe)
    for name, weight in before.items():
        assert (
            relative(after[name], per_layer.least_change(weight, source, target, eye, held)) < 1e-8
        )
    blank = encoder.blank()
    assert relative(eraser(blank), blank) <= 1e-6
    found = eraser.certificate
    assert found.names == ("van gogh", "snoopy") and float(found.rho.min()) > 1e-3
    soft = UceEraser.fit(pipe, erase=names, anchor="art", preserve=kept).certificate
    assert float(soft.rho.max()) < 1e-8


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_pipeline(kind: str) -> None:
    pipe = TINY[kind]()
    eraser = AnchoredProjectionEraser.fit(
        pipe, erase="van gogh", anchor="art", preserve=["dog"], max_sequence_length=16
    )
    assert eraser.map.is_projection()
    assert eraser.pooled_map is None or eraser.pooled_map.is_projection()
    blank = TextEncoder(pipe, max_sequence_length=16).blank()
    assert relative(eraser(blank), blank) <= 1e-6
    before = weights(pipe)
    with eraser.apply(pipe):
        assert any(not torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_pictures() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    eraser = AnchoredProjectionEraser.fit(pipe, erase="van gogh", anchor="art", preserve=["dog"])
    blank, other = latents(pipe, ""), latents(pipe, "a picture by van gogh")
    with eraser.apply(pipe):
        folded = latents(pipe, "a picture by van gogh")
        assert relative(latents(pipe, ""), blank) <= 1e-6
    with eraser.apply(pipe, form="hook"):
        assert relative(latents(pipe, "a picture by van gogh"), folded) < 1e-8
    assert relative(folded, other) > 1e-4


def test_add_withdraw_and_files(tmp_path) -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    both = AnchoredProjectionEraser.fit(pipe, erase=["van gogh", "snoopy"], anchor=["art", "dog"])
    one = AnchoredProjectionEraser.fit(pipe, erase="van gogh", anchor="art")
    joined = one.add(pipe, "snoopy", "dog")
    assert relative(joined.map.matrix, both.map.matrix) < 1e-8
    assert relative(joined.pooled_map.matrix, both.pooled_map.matrix) < 1e-8
    assert joined.map.is_projection() and len(joined.certificate) == 2
    left = both.withdraw("snoopy", pipe=pipe)
    assert left.map.is_projection() and left.map.rank == 1
    with pytest.raises(ValueError, match="exactly"):
        one.add(pipe, "snoopy", "dog", weight=1.0)
    loaded = Eraser.from_pretrained(both.save_pretrained(tmp_path / "anchored"))
    assert loaded.digest == both.digest and isinstance(loaded, AnchoredProjectionEraser)


def test_a_dependent_concept_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    names = ["van gogh", "Van  Gogh art dog", "monet"]
    real = TextEncoder.pairs

    def pairs(self: TextEncoder, *args: object, **options: object) -> Pairs:
        made = real(self, *args, **options)
        source = made.source.clone()
        source[1] = 2 * source[0]  # with an anchor of its own it cannot reach it
        return Pairs(source, made.target, made.weights, made.concept)

    monkeypatch.setattr(TextEncoder, "pairs", pairs)
    with pytest.warns(ErasureWarning, match="1 of 3 rows of concepts depend on others"):
        found = AnchoredProjectionEraser.fit(
            pipe, erase=names, anchor=["art", "dog", "art"], pooled=False
        )
    assert len(found.report["dropped_rows"]) == 1 and found.report["dropped_miss"] > 1e-3


def test_soft_form_takes_a_long_list() -> None:
    pipe = tiny_sd()
    captions = Preserve(32).update(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)))
    options = {"erase": "van gogh", "anchor": "art", "preserve": captions}
    with pytest.raises(ValueError, match="leave 0 of 32 dimensions"):
        AnchoredProjectionEraser.fit(pipe, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft = AnchoredProjectionEraser.fit(pipe, **options, hard=False)
    assert soft.map.is_projection() and float(soft.certificate.rho) > 0
    assert soft.options.lam == 0.5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"erase": []}, ValueError, "empty"),
        ({"erase": [" "]}, ValueError, "no token"),
        ({"anchor": "van gogh"}, ValueError, "anchor equal"),
        ({"anchor": ["art", "dog"]}, ShapeError, "as many"),
        ({"preserve": ["van gogh"]}, ValueError, "preserve contains"),
        ({"erase": ["van gogh", "art"], "anchor": ["art", "dog"]}, ValueError, "must stay"),
        ({"rule": "last"}, ValueError, "token rule"),
        ({"rank": 99}, ValueError, "rank"),
        ({"lam": 1.0}, ValueError, "hard=True takes ridge"),
        ({"hard": False, "rank": 3}, ValueError, "belong to hard"),
    ],
)
def test_bad_input_leaves_the_pipeline(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    pipe = tiny_sd()
    before = weights(pipe)
    options: dict[str, object] = {"erase": "van gogh", "anchor": "art", **change}
    if "rank" in change:
        options["preserve"] = ["dog"]
    with pytest.raises(error, match=words):
        AnchoredProjectionEraser.fit(pipe, **options)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_more_concepts_than_room() -> None:
    words = ["a", "an", "the", "of", "in", "on", "by", "and", "with", "style", "picture", "photo"]
    with pytest.raises(ValueError, match=r"of 32 dimensions"):
        AnchoredProjectionEraser.fit(tiny_sd(), erase=words, anchor="art")


def test_projection_needs_shapes() -> None:
    with pytest.raises(ShapeError, match="must both be"):
        anchored_projection(torch.ones(2, 3), torch.ones(3, 3), lambda y: y)
