"""TPP and SCR on clusters whose answers are known (methods/sae.md, section 3.5), and through models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_erasure.collect import collect
from concept_erasure.errors import ShapeError
from concept_erasure.evals.sae import Erase, by_method, in_model, recovered, scr, tpp
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.probes import LinearProbe
from tests.models import TinyTokenizer, tiny

WIDTH, CLASSES = 8, 4
PROBE = LinearProbe(C=1.0, standardize="median")
SEEDS = (0, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(rows: int = 400) -> tuple[Tensor, Tensor]:
    """Return vectors in which class c is a step of 6 along axis c, and the classes."""
    z = torch.arange(rows) % CLASSES
    x = noise(rows, WIDTH)
    x[torch.arange(rows), z] += 6
    return x, z


def axes(which: str) -> Erase:
    """Return an eraser that knows: it zeroes the class's own axis, nothing, or all axes."""

    def erase(x: Tensor, z: Tensor, *, target: int, seed: int) -> object:
        mask = torch.ones(WIDTH, dtype=x.dtype)
        if which == "own":
            mask[target] = 0
        elif which == "all":
            mask[:] = 0
        return lambda rows: rows * mask

    return erase  # type: ignore[return-value]


def test_erasing_each_class_alone_gives_one_half() -> None:
    found = tpp(*clusters(), axes("own"), seeds=SEEDS, probe=PROBE)
    assert found.mean == pytest.approx(0.5, abs=0.08)
    assert min(found.before) > 0.97 and max(map(abs, found.unintended)) < 0.06
    assert len(found.per_class) == CLASSES and found.to_dict()["seeds"] == 2


@pytest.mark.parametrize("which", ["nothing", "all"])
def test_erasing_nothing_or_everything_gives_zero(which: str) -> None:
    found = tpp(*clusters(), axes(which), seeds=SEEDS, probe=PROBE)
    assert found.mean == pytest.approx(0, abs=1e-9)
    assert found.intended[0] == pytest.approx(0.0 if which == "nothing" else 0.5, abs=0.05)


def test_a_registered_method_is_targeted_on_such_clusters() -> None:
    found = tpp(*clusters(), by_method("leace"), seeds=SEEDS, probe=PROBE)
    assert found.mean > 0.3 and found.deviation < 0.2
    with pytest.raises(ValueError, match="in_model"):
        by_method("pisces")
    with pytest.raises(ValueError, match="in_model"):
        by_method("oracle")


def attributes(rows: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors with a weak wanted attribute on axis 0 and a strong unwanted one on axis 1."""
    a, b = torch.arange(rows) % 2 == 0, (torch.arange(rows) // 2) % 2 == 0
    x = noise(rows, WIDTH)
    x[:, 0] += 4 * a.double()
    x[:, 1] += 12 * b.double()
    return x, a, b


def exact(x: Tensor, z: Tensor, *, target: int, seed: int) -> object:
    """Set the axis of the attribute to its mean."""
    middle = x[:, target].mean()

    def change(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, target] = middle
        return rows

    return change


def test_removing_the_spurious_direction_brings_the_wanted_one_back() -> None:
    found = scr(*attributes(), exact, seeds=SEEDS, probe=PROBE)  # type: ignore[arg-type]
    assert found.direction == (0, 0) and max(found.before) < 0.75
    assert found.mean == pytest.approx(1, abs=0.15)
    assert found.to_dict()["seeds"] == 2


def test_doing_nothing_gives_zero_and_so_does_no_room() -> None:
    nothing = scr(*attributes(), axes("nothing"), seeds=SEEDS, probe=PROBE)
    assert nothing.mean == pytest.approx(0, abs=1e-9)
    assert recovered(0.9, 0.5, 0.9005) == 0 and recovered(0.5, 0.7, 0.9) == pytest.approx(0.5)


def test_seeds_decide_and_are_enough() -> None:
    one, two = (tpp(*clusters(), by_method("leace"), seeds=(3,), probe=PROBE) for _ in range(2))
    assert one == two and one.deviation == 0
    other = tpp(*clusters(), by_method("leace"), seeds=(4,), probe=PROBE)
    assert other.scores != one.scores


def test_edits_of_a_model_are_measured_by_what_comes_out() -> None:
    """The same LEACE as a map on vectors and as a hook in the model gives the same TPP, where the site is read."""
    model, tokenizer = tiny("llama"), TinyTokenizer()
    words = ("apple", "river", "stone")
    texts = [f"{words[i % 3]} {k} {chr(97 + i % 7)}" for i, k in enumerate(range(60))]
    z = torch.arange(60) % 3
    x = collect(model, tokenizer, texts, sites="residual.1", tokens="mean").x.double()
    erasers = {c: LeaceEraser.fit(x, (z == c).long()) for c in range(3)}
    clean, changed = in_model(
        model, tokenizer, texts, {c: (lambda e=e: e.attach(model, sites="residual.1")) for c, e in erasers.items()},
        site="residual.1",
    )  # fmt: skip
    torch.testing.assert_close(clean.double(), x, atol=1e-5, rtol=1e-4)
    through = tpp(clean, z, by_method("leace"), erased=changed, seeds=(0,), probe=PROBE)
    maps = tpp(
        x,
        z,
        by_method("leace"),
        erased={c: e(x) for c, e in erasers.items()},
        seeds=(0,),
        probe=PROBE,
    )
    assert through.scores == pytest.approx(maps.scores, abs=0.05)


def test_bad_inputs() -> None:
    x, z = clusters()
    with pytest.raises(ShapeError, match="like x"):
        tpp(x, z[:-1], axes("own"))
    with pytest.raises(ShapeError, match="shape"):
        tpp(x[None], z, axes("own"))
    with pytest.raises(ValueError, match="three classes"):
        tpp(x, z % 2, axes("own"))
    with pytest.raises(ValueError, match="too few"):
        tpp(x[:4], z[:4], axes("own"))
    with pytest.raises(ValueError, match="four combinations"):
        scr(x, z % 2 == 0, z % 2 == 0, axes("own"))
