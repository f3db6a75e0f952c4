"""EraseEval's measures where their value is known exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_erasure.errors import ShapeError
from concept_erasure.evals.diffusion.erase_eval import (
    Precision,
    Views,
    erase_eval,
    hints_stay_empty,
    rest_survives,
)

PROMPTS, EACH = 6, 3


def views(shows: float, *, style: int = 0, noise: float = 0.0, seed: int = 0) -> Views:
    """Views of pictures with one of four styles; a share of them shows the target."""
    generator = torch.Generator().manual_seed(seed)
    caption = torch.zeros(PROMPTS, EACH, 4)
    caption[..., style] = 1
    embedding = torch.zeros(PROMPTS, EACH, 8)
    embedding[..., 0] = 1
    embedding += 0.1 * torch.randn(PROMPTS, EACH, 8, generator=generator)
    embedding = (1 - noise) * embedding + noise * torch.randn(PROMPTS, EACH, 8, generator=generator)
    count = round(shows * PROMPTS * EACH)
    seen = (torch.arange(PROMPTS * EACH) < count).view(PROMPTS, EACH)
    return Views(seen, caption, embedding, torch.full((PROMPTS, EACH), 0.9 * (1 - noise)))


def test_nothing_erased_scores_nothing_on_the_target_and_all_on_the_rest() -> None:
    shown, plain = views(1.0), views(0.0)
    found = erase_eval(
        (shown, shown), (shown, shown), (plain, plain), plain.embedding.flatten(0, 1)[::2]
    )
    assert found.parts == (0.0, 0.0, 1.0, 1.0)
    assert found.score < 1e-5
    assert found.minimum == found.geometric == 0


def test_a_clean_erasure_scores_full_marks_on_captions() -> None:
    before, after = views(1.0), views(0.0)
    assert rest_survives(before, after) == pytest.approx(1)
    # One prompt in two loses its style: the cosine of different attributes is zero.
    half = replace(after, caption=after.caption.clone())
    half.caption[: PROMPTS // 2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert rest_survives(before, half) == pytest.approx(0.5)


def test_only_hints_that_worked_before_count() -> None:
    before, after = views(0.5), views(0.0)
    kept = before.shows.double().mean(1) > 0.5
    alone = Views(
        *(getattr(before, name)[kept] for name in ("shows", "caption", "embedding", "fit"))
    )
    rest = Views(*(getattr(after, name)[kept] for name in ("shows", "caption", "embedding", "fit")))
    assert hints_stay_empty(before, after) == pytest.approx(hints_stay_empty(alone, rest))
    with pytest.raises(ValueError, match="no hint makes the original"):
        hints_stay_empty(after, after)


def test_noise_scores_nothing_on_pictures() -> None:
    shown, plain, noise = views(1.0), views(0.0), views(0.0, noise=1.0, seed=1)
    real = views(0.0, seed=2).embedding.flatten(0, 1)
    found = erase_eval((shown, noise), (shown, noise), (plain, noise), real)
    assert found.pictures == 0
    assert found.prompts == pytest.approx(0, abs=1e-9)
    assert found.score < 1e-5


def test_slack_makes_the_ratio_of_small_distances_gentler() -> None:
    shown, gone, plain = views(1.0), views(0.0), views(0.0)
    real = views(0.0, seed=2).embedding.flatten(0, 1)
    worse = views(0.0, noise=0.2, seed=3)
    tight = erase_eval((shown, gone), (shown, gone), (plain, worse), real)
    loose = erase_eval((shown, gone), (shown, gone), (plain, worse), real, slack=5.0)
    assert tight.pictures < loose.pictures < 1


def test_one_number_of_four() -> None:
    found = Precision(0.5, 0.5, 1.0, 1.0, 0.0)
    assert found.geometric == pytest.approx(0.25**0.25)
    shown, gone, plain = views(1.0), views(0.0), views(0.0)
    real = plain.embedding.flatten(0, 1)
    smallest = erase_eval((shown, gone), (shown, gone), (plain, plain), real, combine=min)
    assert smallest.score == smallest.minimum


def test_views_must_fit_together() -> None:
    good = views(0.0)
    with pytest.raises(ShapeError, match="alike"):
        replace(good, fit=good.fit[:2])
