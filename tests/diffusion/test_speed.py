from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_erasure.diffusion.core import Pairs, metric
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.speed import (
    Filter,
    SpeedEraser,
    blank_invariants,
    filtered_gram,
    influence,
    probe_edit,
    smallest_directions,
    solve_means,
)
from concept_erasure.errors import EditError, ShapeError
from tests.diffusion.reference import layers as reference
from tests.diffusion.reference.numbers import layers, read
from tests.diffusion.test_uce import KEEP, problem, relative, state, weights
from tests.diffusion.tiny import latents, tiny_flux, tiny_sd, tiny_sdxl

WIDTH = 24
LIST = ["dog", "cat", "red", "sea", "horse", "bird", "fish", "truck", "happy old dog"]


def decaying(rows: Tensor) -> Tensor:
    """Give rows a spectrum with room for edits below a threshold."""
    return rows * torch.logspace(0, -3, rows.shape[1], dtype=rows.dtype)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_equals_the_paper_layer_by_layer(ridge: float, scale: float) -> None:
    maps, source, target, kept = problem(3, 40)
    source, target, kept = decaying(source), decaying(target), decaying(kept)
    blank = kept[:4] + 0.01
    hard = metric(
        kept.T @ kept / 40,
        width=WIDTH,
        hard=True,
        tau=1e-2,
        ridge=scale,
        invariants=blank,
        invariant_ridge=ridge,
    )
    edit = solve_means(Pairs(source, target), hard, 3)
    projector = reference.speed_projector(kept, 1e-2)
    for w in maps:
        expected = reference.speed(w, source, target, 3, projector, blank, scale, ridge)
        assert relative(w @ edit.matrix, expected) < 1e-8
    if not ridge:
        assert float(((edit(blank) - blank) / blank.norm()).abs().max()) < 1e-10


@pytest.mark.parametrize("augment", [0, 5])
@pytest.mark.parametrize("filtering", [True, False])
def test_filters_equal_the_paper_layer_by_layer(filtering: bool, augment: int) -> None:
    maps, source, target, kept = problem(3, 60)
    noise = torch.randn(60, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    probe = probe_edit(Pairs(source, target), 3)
    for w in maps:
        chosen = influence(kept, probe, w)
        own = reference.speed_filter(w, source, target, 3, kept)
        assert torch.equal(chosen > chosen.mean(), own)
        basis = smallest_directions(w, 1)
        gram, originals, drawn = filtered_gram(
            kept,
            probe,
            w,
            Filter(1.0 if filtering else None, augment),
            draws=noise @ basis,
        )
        given = noise if augment else None
        rows = reference.speed_retained(w, source, target, 3, kept, given, filtering=filtering)
        assert originals + drawn == len(rows)
        assert relative(gram, rows.T @ rows / len(rows)) < 1e-10


def test_several_directions_are_a_sum_over_drawn_rows() -> None:
    maps, source, target, kept = problem(2, 20)
    probe = probe_edit(Pairs(source, target), 2)
    draws = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(2)).double()
    gram, originals, drawn = filtered_gram(kept, probe, maps[1], Filter(None, 4, 3), draws=draws)
    near = (kept[:, None] + draws @ smallest_directions(maps[1], 3).T).flatten(0, 1)
    size = influence(near, probe, maps[1])
    near = near[size > size.mean()]
    both = torch.cat([kept, near])
    assert (originals, drawn) == (20, len(near))
    assert relative(gram, both.T @ both / len(both)) < 1e-10


@pytest.mark.parametrize("name", ["plain", "full", "unfiltered", "nudity"])
def test_equals_the_authors_code(name: str) -> None:
    numbers, options = read(f"speed_{name}")
    before, after, noise = (layers(numbers, part) for part in ("before", "after", "noise"))
    pairs = Pairs(numbers["source"], numbers["target"])
    count, augment = int(options["concepts"]), int(options["augment"])
    probe, retain = probe_edit(pairs, count), numbers["retain"]
    filtering = name in ("full", "nudity")
    for key, w in before.items():
        draws = None
        if augment:
            draws = noise[key] @ smallest_directions(w, 1)
        how = Filter(1.0 if filtering else None, augment)
        gram, _, _ = filtered_gram(retain, probe, w, how, draws=draws)
        hard = metric(
            gram,
            width=16,
            hard=True,
            tau=options["tau"],
            ridge=options["scale"],
            invariants=numbers["invariants"],
            invariant_ridge=options["lamb"],
        )
        edit = solve_means(pairs, hard, count)
        delta = after[key] - w
        assert float(delta.norm()) > 1e-3 * float(w.norm())
        assert relative(w @ (edit.matrix - torch.eye(16, dtype=w.dtype)), delta) < 1e-6


def test_smallest_directions() -> None:
    maps, *_ = problem(1, 1)
    for w in maps:
        theirs = torch.linalg.svd(w, full_matrices=False)[2][-2:]
        ours = smallest_directions(w, 2)
        assert relative(ours @ ours.T, theirs.T @ theirs) < 1e-8
    with pytest.raises(ValueError, match="directions must be in 1..8"):
        smallest_directions(maps[0], 9)


def test_centroids() -> None:
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    cloud = torch.cat([c + 0.1 * torch.randn(7, 2, generator=g).double() for c in corners])
    blank = torch.cat([torch.full((1, 2), 5.0, dtype=torch.float64), cloud])
    held = blank_invariants(blank, 3)
    assert torch.equal(held[0], blank[0])
    expected = torch.stack([cloud[i : i + 7].mean(0) for i in (0, 7, 14)])
    assert float(torch.cdist(expected, held[1:]).amin(1).max()) < 1e-12
    assert torch.equal(blank_invariants(blank, None), blank)
    same = torch.ones(6, 2, dtype=torch.float64)
    assert bool(torch.isfinite(blank_invariants(same, 3)).all())


# -- on pipelines -------------------------------------------------------------------------------


def test_the_published_edit_on_a_pipeline() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before, old = state(pipe), weights(pipe)
    eraser = SpeedEraser.fit(
        pipe, erase=["van gogh", "monet"], preserve=LIST, preset="paper", task="style", augment=0
    )
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    encoder = TextEncoder(pipe)
    source = torch.cat(encoder.rows(["van gogh", "monet"], "last_subject"))
    target = torch.cat(encoder.rows(["art", "art"], "last_subject"))
    retain = torch.cat(encoder.rows(LIST, "last_subject"))
    held = blank_invariants(encoder.blank(), 3)
    with eraser.apply(pipe):
        new = weights(pipe)
    changed = 0
    for name, w in old.items():
        if not name.endswith("to_v"):
            assert torch.equal(new[name], w)
            continue
        rows = reference.speed_retained(w, source, target, 2, retain, None, filtering=True)
        projector = reference.speed_projector(rows, 0.1)
        expected = reference.speed(w, source, target, 2, projector, held, 1.0, 0.0)
        assert relative(new[name], expected) < 1e-8
        changed += 1
    assert changed == len(eraser.options.layers) == 4
    with pytest.raises(EditError, match="differs by layer"):
        eraser.withdraw("monet")


def test_one_edit_for_all_layers() -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    plain = latents(pipe, "")
    options = {"preserve": LIST, "anchor": "art", "relative_tau": 1e-6}
    eraser = SpeedEraser.fit(pipe, erase=["van gogh", "monet"], **options)
    assert eraser.report["blank_drift"] < 1e-9
    assert eraser.report["retained"] < len(LIST)
    assert eraser.certificate.names == ("van gogh", "monet")
    with eraser.apply(pipe):
        assert relative(latents(pipe, ""), plain) < 1e-6
    again = SpeedEraser.fit(pipe, erase=["van gogh", "monet"], **options)
    assert torch.equal(again.left, eraser.left)
    other = SpeedEraser.fit(pipe, erase=["van gogh", "monet"], seed=1, **options)
    assert not torch.equal(other.left, eraser.left)


def test_unfiltered_everything_retained_stays() -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    options = {"preserve": LIST, "anchor": "art", "filtering": False, "augment": 0}
    eraser = SpeedEraser.fit(pipe, erase=["van gogh"], relative_tau=1e-14, **options)
    assert eraser.report["preserved_drift_max"] < 1e-9
    assert eraser.report["free_dimensions"] <= 80 - len(LIST)
    loose = SpeedEraser.fit(pipe, erase=["van gogh"], rank=2, **options)
    assert loose.report["free_dimensions"] > eraser.report["free_dimensions"]


def test_add_and_withdraw_are_fits() -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    options = {"preserve": LIST, "anchor": "art", "filtering": False, "augment": 0}
    two = SpeedEraser.fit(pipe, erase=["van gogh", "monet"], **options)
    one = SpeedEraser.fit(pipe, erase=["van gogh"], **options)
    assert relative(two.withdraw("monet").map.matrix, one.map.matrix) < 1e-9
    assert relative(one.add(pipe, "monet", "art").map.matrix, two.map.matrix) < 1e-9


def test_presets_of_the_paper() -> None:
    pipe = tiny_sdxl()
    for task, anchor, tau, scale in (
        ("object", "", 0.1, 1.0),
        ("style", "art", 0.1, 1.0),
        ("celebrity", "person", 1e-4, 0.05),
        ("unsafe", "", 0.1, 0.7),
    ):
        names = ["red dog"] if task == "unsafe" else ["monet"]
        keep = None if task == "unsafe" else [*LIST, "monet painting"]
        eraser = SpeedEraser.fit(pipe, erase=names, preserve=keep, preset="paper", task=task)
        config = eraser.config
        assert (eraser.options.anchors, config.tau, config.ridge) == ((anchor,), tau, scale)
        assert config.invariant_ridge == (0.5 if task == "unsafe" else 0.0)
        assert config.filtering == (task != "celebrity")
        assert config.rule == ("all_but_sot" if task == "unsafe" else "last_subject")
        assert eraser.report.get("dropped") == (None if keep is None else ["monet painting"])
        assert len(eraser.options.layers) == 4


def test_without_a_list_and_on_flux() -> None:
    pipe = tiny_sd()
    eraser = SpeedEraser.fit(pipe, erase="monet", anchor="art")
    assert eraser.gram is None and eraser.report["free_dimensions"] < 32
    flux = tiny_flux()
    with SpeedEraser.fit(flux, erase="monet", preserve=["dog"], max_sequence_length=16).apply(flux):
        pass


def test_bad_input() -> None:
    pipe = tiny_sd()
    before = state(pipe)
    for options, error, message in (
        ({"rank": 32}, ValueError, "1 independent pairs do not fit.*0 dimensions of 32"),
        ({"tau": -1.0}, ValueError, "tau must be"),
        ({"tau": 0.1, "rank": 3}, ValueError, "give one of tau"),
        ({"scale": 0.0}, ValueError, "ridge must be above 0"),
        ({"augment": -1}, ValueError, "augment must be"),
        ({"directions": 0}, ValueError, "directions must be"),
        ({"scope": "model"}, ValueError, "scope must be"),
        ({"centroids": 0}, ValueError, "centroids must be"),
        ({"preserve": ["monet"]}, ValueError, "preserve contains"),
        ({"anchor": "monet"}, ValueError, "anchor equal"),
    ):
        with pytest.raises(error, match=message):
            SpeedEraser.fit(pipe, erase="monet", **{"preserve": KEEP, **options})
    with pytest.raises(ValueError, match="no token at all"):
        SpeedEraser.fit(pipe, erase=" ", anchor="art")
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    maps, source, target, kept = problem(1, 5)
    probe = probe_edit(Pairs(source, target), 1)
    with pytest.raises(ShapeError, match="rows must be"):
        filtered_gram(kept[:0], probe, maps[0], Filter())
    with pytest.raises(ShapeError, match="draws must be"):
        filtered_gram(kept, probe, maps[0], Filter(None, 2), draws=torch.zeros(5, 3, 1))
