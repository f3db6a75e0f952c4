"""RealEra: the sampler, the bands, and the fit against a per-layer reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.realera import (
    PARAPHRASES,
    UNRELATED,
    Bands,
    RealEraEraser,
    fit_bands,
    on_norm_output,
    sample_neighbours,
)
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, ShapeError
from tests.diffusion import per_layer
from tests.diffusion.tiny import TINY, tiny_sd

BANDS = Bands(0.99, 0.8, 0.4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [3, 64, 768])
@pytest.mark.parametrize("band", [(0.7, 0.95), (-0.2, 0.1), (0.9, 0.9), (1.0, 1.0)])
def test_samples(width: int, band: tuple[float, float]) -> None:
    concept = 28 * randn(width)
    found = sample_neighbours(concept, 500, *band, generator=seeded(1))
    cosine = torch.nn.functional.cosine_similarity(found, concept[None], dim=1)
    assert cosine.min() >= band[0] - 1e-12
    assert cosine.max() <= band[1] + 1e-12
    torch.testing.assert_close(found.norm(dim=1), concept.norm().expand(500))
    distance = concept.norm() * (2 - 2 * cosine).clamp_min(0).sqrt()
    torch.testing.assert_close((found - concept).norm(dim=1), distance, rtol=0, atol=1e-4)
    if band[0] < band[1]:
        middle = float(cosine.mean() - sum(band) / 2)
        assert abs(middle) < 4 * (band[1] - band[0]) / 12**0.5 / 500**0.5


def test_radius_is_the_bound() -> None:
    bands = Bands(0.99, 0.8, 0.5)
    concept = randn(64)
    edge = sample_neighbours(concept, 5, 0.8, 0.8, generator=seeded())
    radius = torch.tensor(bands.radius(float(concept.norm())), dtype=torch.float64)
    torch.testing.assert_close((edge - concept).norm(dim=1), radius.expand(5))
    assert 1 - float(radius) ** 2 / (2 * float(concept.norm()) ** 2) == pytest.approx(0.8)


def test_samples_repeat_and_directions_are_isotropic() -> None:
    concept = randn(16)
    one, same, other = (
        sample_neighbours(concept, 4000, 0.8, 0.8, generator=seeded(s)) for s in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    gram = one.T @ one / 4000
    size = concept.norm() ** 2
    along = torch.outer(concept, concept) / size
    eye = torch.eye(16, dtype=torch.float64)
    expected = size * (0.64 * along + (1 - 0.64) / 15 * (eye - along))
    assert (gram - expected).norm() < 0.05 * expected.norm()


def test_span() -> None:
    concept, span = randn(32), randn(3, 32, seed=1)
    found = sample_neighbours(concept, 50, 0.5, 0.9, generator=seeded(), span=span)
    basis = torch.linalg.qr(torch.cat([concept[None], span]).T).Q
    torch.testing.assert_close(found @ basis @ basis.T, found)
    with pytest.raises(ValueError, match="nothing but the concept"):
        sample_neighbours(concept, 5, 0.5, 0.9, generator=seeded(), span=2 * concept[None])


def test_norm_output() -> None:
    norm = torch.nn.LayerNorm(16, eps=0.0, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * randn(16, seed=1))
        norm.bias.copy_(randn(16, seed=2))
        real = norm(randn(10, 16))
        torch.testing.assert_close(on_norm_output(real, norm.weight, norm.bias), real)
        moved = on_norm_output(randn(10, 16, seed=3), norm.weight, norm.bias)
        kappa = (norm.bias / norm.weight).sum().expand(10)
        torch.testing.assert_close(moved @ (1 / norm.weight), kappa)
        torch.testing.assert_close(on_norm_output(moved, norm.weight, norm.bias), moved)
        with pytest.raises(ValueError, match="zero somewhere"):
            on_norm_output(real, torch.zeros(16), norm.bias)


def test_bands() -> None:
    concept = randn(64)
    near = sample_neighbours(concept, 20, 0.8, 0.9, generator=seeded(1))
    far = sample_neighbours(concept, 20, 0.2, 0.4, generator=seeded(2))
    bands = fit_bands(concept, near, far)
    assert 0.8 <= bands.near <= 0.9 <= bands.nearest < 1
    assert 0.2 <= bands.far <= 0.4
    odd = torch.cat([near, sample_neighbours(concept, 3, -0.1, 0.1, generator=seeded(3))])
    assert fit_bands(concept, odd, far) == bands  # a paraphrase farther off than other words
    with pytest.raises(ValueError, match="no neighbourhood separates"):
        fit_bands(concept, far, near)
    with pytest.raises(ShapeError, match="n > 0"):
        fit_bands(concept, near[:0], far)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"concept": torch.zeros(4)}, ValueError, "zero"),
        ({"concept": torch.full((4,), torch.nan)}, ValueError, "not finite"),
        ({"concept": torch.zeros(2, 4)}, ShapeError, "concept must be"),
        ({"low": 0.9, "high": 0.5}, ValueError, "low <= high"),
        ({"high": 1.5}, ValueError, "low <= high"),
        ({"count": -1}, ValueError, "count"),
    ],
)
def test_bad_samples(change: dict[str, object], error: type[Exception], words: str) -> None:
    options = {"concept": randn(4), "count": 3, "low": 0.5, "high": 0.9, **change}
    with pytest.raises(error, match=words):
        sample_neighbours(**options, generator=seeded())  # type: ignore[arg-type]


# -- the fit ------------------------------------------------------------------------------------


def weights(pipe: object) -> dict[str, Tensor]:
    return {
        m.name: module_at(pipe, m).weight.detach().clone()
        for m in text_maps(pipe)
        if m.exact and m.kind in ("key", "value", "context")
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("hold", [True, False])
def test_equals_least_squares_layer_by_layer(hold: bool) -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before = weights(pipe)
    names = ["van gogh", "snoopy"]
    eraser = RealEraEraser.fit(
        pipe,
        erase=names,
        anchor="art",
        preserve=["dog"],
        bands=BANDS,
        samples=7,
        beyond=9,
        lam=0.3,
        neighbour_weight=0.7,
        beyond_weight=1.5,
        hold_blank=hold,
        seed=5,
    )
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    encoder = TextEncoder(pipe)
    centers, kept = (torch.cat(encoder.rows(some, "last_subject")) for some in (names, ["dog"]))
    target = encoder.rows(["art"], "last_subject")[0]
    generator, source, weight, far = seeded(5), [centers], [torch.ones(2)], []
    for center in centers:
        source.append(sample_neighbours(center, 7, 0.8, 0.99, generator=generator))
        far.append(sample_neighbours(center, 9, 0.4, 0.8, generator=generator))
        weight.append(torch.full((7,), 0.1, dtype=torch.float64))
    keep = torch.cat([torch.ones(1), torch.full((18,), 1.5 / 9, dtype=torch.float64)])
    rows = torch.cat(source)
    with eraser.apply(pipe):
        after = weights(pipe)
    for name, old in before.items():
        expected = per_layer.least_squares(
            old,
            rows,
            target.expand(len(rows), -1),
            torch.cat(weight).double(),
            torch.cat([kept, *far]),
            keep.double(),
            0.3,
            encoder.blank() if hold else None,
        )
        assert relative(after[name], expected) < 1e-8
    if hold:
        assert relative(eraser(encoder.blank()), encoder.blank()) <= 1e-6


@pytest.mark.parametrize("kind", sorted(TINY))
@pytest.mark.parametrize("span", ["all", "paraphrases"])
def test_every_pipeline(kind: str, span: str) -> None:
    pipe = TINY[kind]()
    options = {"erase": "van gogh", "anchor": "art", "span": span, "max_sequence_length": 32}
    eraser = RealEraEraser.fit(pipe, **options)
    assert torch.equal(RealEraEraser.fit(pipe, **options).left, eraser.left)
    nearest, near, far = eraser.options.bands[0]
    assert -1 < far < near < nearest < 1
    blank = TextEncoder(pipe, max_sequence_length=32).blank()
    assert relative(eraser(blank), blank) <= 1e-6
    before = weights(pipe)
    with eraser.apply(pipe):
        assert any(not torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_withdraw_and_files(tmp_path) -> None:
    pipe = tiny_sd()
    both = RealEraEraser.fit(pipe, erase=["van gogh", "snoopy"], anchor="art", bands=BANDS)
    assert both.withdraw("snoopy").concepts == ("van gogh",)
    with pytest.raises(EditError, match="fit again"):
        both.add(pipe, "monet", "art")
    loaded = Eraser.from_pretrained(both.save_pretrained(tmp_path / "realera"))
    assert loaded.digest == both.digest
    assert len(set(UNRELATED)) == 24 and all(text.endswith("{}") for text in PARAPHRASES)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"erase": []}, ValueError, "empty"),
        ({"anchor": "van gogh"}, ValueError, "anchor equal"),
        ({"preserve": ["van gogh"]}, ValueError, "preserve contains"),
        ({"paraphrases": ["{} at night"]}, ValueError, "must come last"),
        ({"unrelated": []}, ValueError, "empty"),
        ({"samples": 0}, ValueError, "samples"),
        ({"beyond": 1.5}, ValueError, "beyond"),
        ({"span": "some"}, ValueError, "span"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"erase": "dog"}, ValueError, "no neighbourhood separates"),  # in this random encoder
    ],
)
def test_bad_input_leaves_the_pipeline(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    pipe = tiny_sd()
    before = weights(pipe)
    with pytest.raises(error, match=words):
        RealEraEraser.fit(pipe, **{"erase": "van gogh", "anchor": "art", **change})
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
