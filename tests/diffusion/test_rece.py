from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_erasure.diffusion.core import Pairs, Preserve, metric, solve, text_gram
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.rece import (
    ReceEraser,
    adversarial,
    joint_rounds,
    sequential_rounds,
)
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.linalg import LowRankAffine
from tests.diffusion.reference import layers as reference
from tests.diffusion.reference.numbers import layers, read
from tests.diffusion.test_uce import KEEP, problem, relative, state, weights
from tests.diffusion.tiny import latents, tiny_flux, tiny_sd, tiny_sdxl

WIDTH = 24


def dense(M: Tensor) -> LowRankAffine:
    eye = torch.eye(len(M), dtype=M.dtype)
    return LowRankAffine(eye - M, eye)


def case(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor, LowRankAffine]:
    maps, source, target, blank = problem(4, 9, seed)
    soft = metric(Preserve(WIDTH).update(blank, 0.1), width=WIDTH, lam=0.1)
    return maps, source, target, blank, solve(Pairs(source, target), soft)


def test_the_search_equals_the_paper_layer_by_layer() -> None:
    maps, source, _, _, edit = case()
    for reg in (0.1, 1e-3, 10.0):
        now = [w @ edit.matrix for w in maps]
        expected = reference.adversarial(maps, now, source, reg)
        assert relative(adversarial(text_gram(maps), edit, source, reg), expected) < 1e-8


def test_limits_of_the_regulariser() -> None:
    maps, source, _, _, edit = case()
    gram = text_gram(maps)
    inverse = torch.linalg.solve(edit.matrix, source.T).T
    assert relative(adversarial(gram, edit, source, 0.0), inverse) < 1e-8
    assert float(adversarial(gram, edit, source, 1e12).norm()) < 1e-6 * float(source.norm())
    assert relative(adversarial(gram, None, source, 0.0), source) < 1e-8


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_equal_the_paper_layer_by_layer(rounds: int) -> None:
    maps, source, target, blank, start = case()
    keep = torch.full((len(blank),), 0.1, dtype=torch.float64)
    soft = metric(Preserve(WIDTH).update(blank, 0.1), width=WIDTH, lam=0.1)
    pairs = Pairs(source, target)
    edit = sequential_rounds(start, text_gram(maps), pairs, soft, reg=0.1, rounds=rounds)
    now = [w @ start.matrix for w in maps]
    expected = reference.rece(maps, now, source, target, blank, keep, 0.1, 0.1, rounds)
    for w, theirs in zip(maps, expected, strict=True):
        assert relative(w @ edit.matrix, theirs) < 1e-8


def test_rounds_equal_the_authors_code() -> None:
    numbers, options = read("rece")
    before = layers(numbers, "before")
    gram = text_gram(before.values())
    blank, concepts = numbers["blank"], numbers["concept"]
    count = len(concepts)
    # their script lists the blank prompt once for each concept
    preserve = Preserve(16).update(blank, options["preserve_scale"] * count)
    soft = metric(preserve, width=16, lam=options["lamb"])
    edit = dense(numbers["M"])
    pairs = Pairs(concepts.flatten(0, 1), blank.repeat(count, 1))
    for r in range(int(options["rounds"])):
        found = adversarial(gram, edit, pairs.source, options["regular_scale"])
        assert relative(found, numbers[f"adversarial.{r}"].flatten(0, 1)) < 1e-6
        edit = sequential_rounds(edit, gram, pairs, soft, reg=options["regular_scale"], rounds=1)
        after = layers(numbers, f"after.{r}")
        for name, w in before.items():
            assert relative(w @ edit.matrix, after[name]) < 1e-6


def attack(gram: Tensor, edit: LowRankAffine, concepts: Tensor, reg: float) -> Tensor:
    """The least of |H^(1/2)(M x - c)|^2 + r |x|^2, by concept."""
    x = adversarial(gram, edit, concepts, reg)
    missed = edit(x) - concepts
    return ((missed @ gram) * missed).sum(1) + reg * x.square().sum(1)


@pytest.mark.parametrize("joint", [True, False])
def test_every_round_makes_the_attack_dearer(joint: bool) -> None:
    maps, source, target, blank, start = case()
    soft = metric(Preserve(WIDTH).update(blank, 0.1), width=WIDTH, lam=0.1)
    gram, pairs = text_gram(maps), Pairs(source, target)
    cost = [float(attack(gram, start, source, 0.1).sum())]
    for rounds in (1, 2):
        if joint:
            found = joint_rounds(pairs, gram, pairs, soft, reg=0.1, rounds=rounds)
            edit = solve(found, soft)
        else:
            edit = sequential_rounds(start, gram, pairs, soft, reg=0.1, rounds=rounds)
        cost.append(float(attack(gram, edit, source, 0.1).sum()))
    assert cost[0] < cost[1] < cost[2]


def test_the_published_rounds_on_a_pipeline() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before, old = state(pipe), weights(pipe)
    words = ["nudity", "happy"]
    eraser = ReceEraser.fit(pipe, erase=words, preset="paper", task="unsafe", rounds=2)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    encoder = TextEncoder(pipe)
    blank = encoder.blank()
    keep = torch.full((len(blank),), 0.2, dtype=torch.float64)
    start = encoder.pairs(words, "", "from_last_subject")
    ones = torch.ones(len(start), dtype=torch.float64)
    now = [
        reference.uce(w, start.source, start.target, ones, blank, keep, 0.1) for w in old.values()
    ]
    concepts = encoder.encode(words).embeddings.flatten(0, 1)
    expected = reference.rece(
        list(old.values()), now, concepts, blank.repeat(2, 1), blank, keep, 0.1, 0.1, 2
    )
    with eraser.apply(pipe):
        new = weights(pipe)
    for ours, theirs in zip(new.values(), expected, strict=True):
        assert relative(ours, theirs) < 1e-8
    assert eraser.certificate.names == ("nudity", "happy")
    with pytest.raises(EditError, match="several rounds"):
        eraser.withdraw("happy")


def test_joint_rounds_hold_the_blank_prompt_and_can_be_reduced() -> None:
    pipe = tiny_sdxl()
    eraser = ReceEraser.fit(pipe, erase=["nudity", "monet"], preserve=KEEP)
    assert eraser.report["blank_drift"] < 1e-9
    fewer = eraser.withdraw("monet")
    assert fewer.concepts == ("nudity",)
    alone = ReceEraser.fit(pipe, erase=["nudity"], preserve=KEEP)
    # the embeddings that were found while the other concept was erased too still make the attack dearer
    plain = ReceEraser.fit(pipe, erase=["nudity"], preserve=KEEP, rounds=0)
    gram = text_gram(module_at(pipe, m).weight for m in text_maps(pipe) if m.kind != "pooled")
    rows = TextEncoder(pipe).rows("nudity", "last_subject")[0]
    cost = [float(attack(gram, e.map, rows, 0.1)) for e in (plain, fewer, alone)]
    assert cost[0] < cost[1] and cost[0] < cost[2]
    more = alone.add(pipe, "monet")
    assert more.concepts == ("nudity", "monet") and len(more.source) == len(eraser.source)


def test_no_round_is_uce_and_other_pipelines() -> None:
    pipe = tiny_sd()
    plain = latents(pipe, "")
    none = ReceEraser.fit(pipe, erase="monet", rounds=0)
    assert none.map.rank == 1
    eraser = ReceEraser.fit(pipe, erase="monet")
    with eraser.apply(pipe):
        assert relative(latents(pipe, ""), plain) < 1e-6
    flux = tiny_flux()
    assert ReceEraser.fit(flux, erase="monet", max_sequence_length=16).pooled_map is not None


def test_bad_input() -> None:
    pipe = tiny_sd()
    before = state(pipe)
    for options, error, message in (
        ({"erase": "monet", "reg": -1.0}, ValueError, "reg must be"),
        ({"erase": "monet", "reg": float("nan")}, ValueError, "reg must be"),
        ({"erase": "monet", "rounds": -1}, ValueError, "rounds must be"),
        ({"erase": "monet", "rounds": 1.5}, ValueError, "rounds must be"),
        ({"erase": "monet", "preserve": "Monet"}, ValueError, "preserve contains"),
        ({"erase": "art", "preset": "paper", "task": "style"}, ValueError, "anchor equal"),
        ({"erase": "monet", "preset": "paper", "task": "celebrity"}, ValueError, "unsafe, style"),
        ({"erase": "  ", "anchor": "art"}, ValueError, "no token at all"),
        ({"erase": "monet", "lam": 0.0}, ValueError, "full rank|lam = 0"),
    ):
        with pytest.raises(error, match=message):
            ReceEraser.fit(pipe, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    _, source, _, _, edit = case()
    with pytest.raises(ShapeError, match="H \\(d, d\\)"):
        adversarial(torch.eye(3), edit, source, 0.1)
    singular = dense(torch.diag(torch.tensor([0.0] + [1.0] * (WIDTH - 1), dtype=torch.float64)))
    with pytest.raises(ValueError, match="singular"):
        adversarial(torch.eye(WIDTH, dtype=torch.float64), singular, source, 0.0)
