"""TPP and SCR on clusters whose answers are known (methods/sae.md, section 3.5), and through models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
    maps = {c: e(x) for c, e in erasers.items()}
    through, mapped = (
        tpp(v, z, erased=e, seeds=(0,), probe=PROBE) for v, e in ((clean, changed), (x, maps))
    )
    assert through.scores == pytest.approx(mapped.scores, abs=0.05)


def test_special_tokens_are_no_part_of_a_mean() -> None:
    """Without them the mean is that of the words, whose vectors in the embedding do not depend on the rest."""
    model, texts = tiny("llama"), ["apple river", "stone", "one two three"]
    alone, _ = in_model(model, TinyTokenizer(), texts, {}, site="embedding")
    begun, _ = in_model(model, TinyTokenizer(add_bos=True), texts, {}, site="embedding")
    torch.testing.assert_close(begun, alone)
    with pytest.raises(ValueError, match="text 1 has special tokens only"):
        in_model(model, TinyTokenizer(add_bos=True), ["apple", ""], {}, site="embedding")


class Flat(nn.Module):
    """Flattens the tokens of a batch, and has a place with one vector a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 4)
        self.flat, self.pooled = nn.Identity(), nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        self.flat(x.flatten(0, 1))
        return self.pooled(x.mean(1))


def test_a_site_needs_a_vector_a_token() -> None:
    model, texts = Flat(), ["apple river", "stone", "one two three"]
    means = [in_model(model, TinyTokenizer(), texts, {}, site=s)[0] for s in ("embed", "flat")]
    assert torch.equal(*means)
    with pytest.raises(ShapeError, match="a vector for each"):
        in_model(model, TinyTokenizer(), texts, {}, site="pooled")


def test_vectors_behind_an_edit_stand_in_place_of_an_eraser() -> None:
    """SCR and TPP of what does not depend on rows are the same, fitted or given."""
    x, a, b = attributes()
    given = {one: axes("own")(x, a, target=one, seed=0)(x) for one in range(CLASSES)}
    assert scr(x, a, b, erased=given, seeds=SEEDS, probe=PROBE) == scr(
        x, a, b, axes("own"), seeds=SEEDS, probe=PROBE
    )
    x, z = clusters()
    given = {one: axes("own")(x, z, target=one, seed=0)(x) for one in range(CLASSES)}
    assert tpp(x, z, erased=given, seeds=SEEDS, probe=PROBE) == tpp(
        x, z, axes("own"), seeds=SEEDS, probe=PROBE
    )


def test_a_method_that_draws_takes_the_seed_of_the_run() -> None:
    x, z = clusters(80)
    fitted = [
        by_method("inlp", options=options)(x, z == 0, target=0, seed=seed)
        for options, seed in (({}, 3), ({"seed": 3}, 4), ({"seed": 0}, 3))
    ]
    assert [one.config.seed for one in fitted] == [3, 3, 0]  # type: ignore[attr-defined]


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
    _, a, b = attributes()
    whole = dict.fromkeys(range(CLASSES), x)
    with pytest.raises(ValueError, match="no vectors for 3"):
        tpp(x, z, erased={0: x, 1: x, 2: x})
    with pytest.raises(ValueError, match="no vectors for 0"):
        scr(x, a, b, erased={1: x})
    with pytest.raises(ShapeError, match="like x"):
        tpp(x, z, erased=whole | {2: x[:-1]})
    for both in ((None, None), (axes("own"), whole)):
        with pytest.raises(ValueError, match="either erase"):
            scr(x, a, b, both[0], erased=both[1])
