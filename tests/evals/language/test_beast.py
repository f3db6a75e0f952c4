"""BEAST recovers a planted suffix without a gradient."""

from __future__ import annotations

import pytest
import torch

from concept_erasure.evals.language.beast import MINIMUM, beast, proposals
from tests.evals.language.planted import PLANTED, PROMPT, VOCABULARY, Pairs, bits, planted

SMALL = {"beam": 6, "samples": 31, "length": 4}
REST = {
    "after": " answer:",
    "max_new_tokens": 1,
    "smoke": True,
    "progress": False,
    "check_every": 1,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_recovers_the_planted_suffix(seed: int) -> None:
    found = beast(
        planted(), Pairs(), PROMPT, " secret", seed=seed, control=" else", **SMALL, **REST
    )
    assert tuple(found.suffix.split()) == PLANTED
    assert found.success
    assert found.queries < 2000
    assert found.control is not None
    assert not found.control.success
    assert list(found.losses) == sorted(found.losses, reverse=True)


def test_it_stops_when_the_answer_is_there() -> None:
    found = beast(planted(), Pairs(), PROMPT, " secret", **{**SMALL, "length": 9}, **REST)
    assert len(found.suffix_ids) == 4
    assert found.steps_used == 3
    assert found.budget["steps"] == 8


def test_only_typable_suffixes() -> None:
    tokenizer = Pairs([(PLANTED[1], PLANTED[2])])
    found = beast(planted(), tokenizer, PROMPT, " secret", **SMALL, **REST)
    assert not found.success
    whole = tokenizer.encode(f"{PROMPT} {found.suffix} answer:")
    assert tuple(whole[2:-1]) == found.suffix_ids


def test_proposals_are_allowed_tokens_each_once() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.zeros(3, 50)
    probabilities[:, 7] = 1.0  # a certain model still gives as many as are asked for
    allowed = torch.rand(50, generator=generator) < 0.5
    allowed[7] = True
    drawn = proposals(probabilities, allowed, samples=10, generator=generator)
    assert drawn.shape == (3, 10)
    assert bool(allowed[drawn].all())
    assert bool((drawn == 7).any(1).all())
    assert all(len(set(row)) == 10 for row in drawn.tolist())
    assert proposals(probabilities, allowed, samples=99, generator=generator).shape[1] == int(
        allowed.sum()
    )


def test_several_prompts() -> None:
    prompts = [PROMPT, "ask me"]
    found = beast(
        planted(),
        Pairs(),
        prompts,
        [" secret"] * 2,
        held_out=[("ask tell", "secret")],
        **SMALL,
        **REST,
    )
    assert found.reached == (True, True)
    assert found.held_out_reached == (True,)


def test_the_same_seed_gives_the_same_run_and_the_model_is_left_alone() -> None:
    model = planted()
    before = bits(model)
    runs = [
        beast(model, Pairs(), PROMPT, " secret", seed=1, **{**SMALL, "samples": 8}, **REST)
        for _ in range(2)
    ]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_small_budget_has_to_be_called_a_smoke_run() -> None:
    for name, least in MINIMUM.items():
        with pytest.raises(ValueError, match=f"{name} at least {least}"):
            beast(planted(), Pairs(), PROMPT, " secret", **{name: least - 1})
    assert len(VOCABULARY) == 35
