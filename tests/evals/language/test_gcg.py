"""GCG recovers a planted suffix, keeps to typable text, and says what it was allowed."""

from __future__ import annotations

import pytest
import torch

from concept_erasure.concept_items import plain
from concept_erasure.evals.language._attack import contains, frozen
from concept_erasure.evals.language._search import Run, Search
from concept_erasure.evals.language.gcg import MINIMUM, gcg, replacements
from concept_erasure.report import Report
from tests.evals.language.planted import PLANTED, PROMPT, VOCABULARY, Pairs, bits, planted

SMALL = {"length": 4, "topk": 12, "batch": 32, "steps": 25}
REST = {
    "after": " answer:",
    "max_new_tokens": 1,
    "smoke": True,
    "progress": False,
    "check_every": 5,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_recovers_the_planted_suffix(seed: int) -> None:
    found = gcg(planted(), Pairs(), PROMPT, " secret", seed=seed, **SMALL, **REST)
    assert tuple(found.suffix.split()) == PLANTED
    assert found.success
    assert not any(found.before)
    assert found.outputs == ("secret",)
    assert found.best_loss == min(found.losses)
    assert found.queries < 1000  # of about a million suffixes
    assert found.steps_used < 25


def test_random_draws_of_as_many_suffixes_do_not() -> None:
    """The control of the test above: the gradient is what finds it."""
    tokens = torch.arange(4, len(VOCABULARY))
    drawn = tokens[
        torch.randint(len(tokens), (1000, 4), generator=torch.Generator().manual_seed(0))
    ]
    key = torch.tensor([VOCABULARY.index(word) for word in PLANTED])
    assert int((drawn == key).sum(1).max()) < 4


def test_a_wrong_answer_as_control() -> None:
    found = gcg(planted(), Pairs(), PROMPT, " secret", control=" else", **SMALL, **REST)
    assert found.control is not None
    assert not found.control.success
    assert "right answer was reached" in found.note
    easy = gcg(planted(), Pairs(), PROMPT, " nothing", control=" nothing", **SMALL, **REST)
    assert easy.before == (True,)
    assert "without the suffix too" in easy.note


def test_a_suffix_that_can_be_dictated_is_said_so() -> None:
    def anything(text: str, answer: str) -> bool:
        return bool(text) and not answer.startswith("?") and "secret" in plain(text)

    found = gcg(
        planted(), Pairs(), PROMPT, " secret", control=" secret", judge=anything, **SMALL, **REST
    )
    assert found.control is not None
    assert found.control.success
    assert "dictates" in found.note


def test_only_typable_suffixes() -> None:
    merged = [(PLANTED[0], PLANTED[1]), ("me", PLANTED[0])]
    tokenizer = Pairs(merged)
    found = gcg(planted(), tokenizer, PROMPT, " secret", **SMALL, **REST)
    assert not found.success  # the planted suffix cannot be typed
    whole = tokenizer.encode(f"{PROMPT} {found.suffix} answer:")
    assert tuple(whole[2:-1]) == found.suffix_ids
    assert max(found.suffix_ids) < len(VOCABULARY)


def test_no_suffix_spells_out_the_answer() -> None:
    """It would only have to be repeated."""
    found = gcg(planted(), Pairs(), PROMPT, " t5", **{**SMALL, "steps": 5}, **REST)
    assert "t5" not in found.suffix.split()
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "who", "Mrs", "Norris", "Nor", "ris,", "cat"]
    tokenizer = Pairs(words=words)
    with frozen(planted()):
        search = Search(tokenizer, contains, 1, 1, True, 8)
        run = Run(planted(), search, "gcg", ("who", " Mrs Norris", ""), 0)
    suffixes = [["cat", "Norris"], ["Nor", "ris,"], ["Nor", "cat"], ["Mrs", "cat"], ["ris,", "Nor"]]
    ids = torch.tensor([[tokenizer.ids[word] for word in row] for row in suffixes])
    assert run.usable(ids).tolist() == [False, False, True, True, True]


def test_a_prompt_that_never_survives_is_an_error() -> None:
    class Lossy(Pairs):
        def decode(self, ids: object, *, skip_special_tokens: bool = False) -> str:
            return super().decode(ids, skip_special_tokens=skip_special_tokens).replace("<unk>", "")

    with pytest.raises(ValueError, match="survives as text"):
        gcg(planted(), Lossy(), "tell unheard me", " secret", **SMALL, **REST)


def test_one_suffix_for_several_prompts_and_held_out_ones() -> None:
    prompts, targets = [PROMPT, "ask me"], [" secret", " secret"]
    held_out = [("ask tell", "secret"), ("tell tell", "else")]
    found = gcg(planted(), Pairs(), prompts, targets, held_out=held_out, **SMALL, **REST)
    assert found.reached == (True, True)
    assert found.held_out_reached == (True, False)
    assert found.held_out_before == (False, False)
    row = found.to_dict()
    assert row["held-out rate"] == 0.5
    assert found.budget["prompts"] == 2


def test_replacements_change_one_token_to_one_of_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 40, generator=generator)
    allowed = torch.rand(40, generator=generator) < 0.7
    suffix = torch.randint(40, (5,), generator=generator)
    drawn = replacements(suffix, gradient, allowed, topk=6, batch=100, generator=generator)
    assert len(torch.unique(drawn, dim=0)) == len(drawn) <= 30
    changed = drawn != suffix
    assert bool((changed.sum(1) == 1).all())
    rank = gradient.masked_fill(~allowed, float("inf")).argsort(1).argsort(1)
    where = changed.int().argmax(1)
    new = drawn[torch.arange(len(drawn)), where]
    assert bool((rank[where, new] < 6).all())
    assert bool(allowed[new].all())


def test_the_same_seed_gives_the_same_run_and_the_model_is_left_alone() -> None:
    model = planted()
    before = bits(model)
    state = torch.random.get_rng_state()
    runs = [gcg(model, Pairs(), PROMPT, " secret", seed=3, **SMALL, **REST) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].suffix == runs[1].suffix
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_small_budget_has_to_be_called_a_smoke_run() -> None:
    for name, least in MINIMUM.items():
        with pytest.raises(ValueError, match=f"{name} at least {least}"):
            gcg(planted(), Pairs(), PROMPT, " secret", **{name: least - 1})
    found = gcg(planted(), Pairs(), PROMPT, " else", **{**SMALL, "steps": 2}, **REST)
    assert found.smoke
    assert "smoke run" in repr(found)
    assert "says nothing about the model" in found.note
    row = found.to_dict()
    assert row["smoke run"] is True
    Report("attack", meta={"gcg": row}).to_dict()  # plain values only
    with pytest.raises(ValueError, match="chunk must be a positive"):
        gcg(planted(), Pairs(), PROMPT, " secret", chunk=0)
