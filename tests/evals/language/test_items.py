"""Scores of items: against plain computations, and unmoved by what must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item
from concept_erasure.evals.language.items import (
    ItemScores,
    equivalence,
    ignorance,
    instruction_ids,
    item_scores,
    mcnemar,
    opening_ids,
)
from tests.models import TinyTokenizer, tiny

CONCEPT = Concept.load("harry_potter")
N = 10


def items(format: str = "cloze", kind: str = "concept") -> tuple[Item, ...]:
    return CONCEPT.items(kind, format)[:N]


def plain(model: nn.Module, tokenizer: TinyTokenizer, first: str, second: str) -> float:
    start, rest = (tokenizer.encode(x, add_special_tokens=x is first) for x in (first, second))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + rest])).logits[0].log_softmax(-1)
    return sum(float(logits[len(start) - 1 + j, token]) for j, token in enumerate(rest))


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("format", "how"), [("question", "answer"), ("cloze", "cloze"), ("reversed", "cloze")]
)
def test_scores_are_those_of_one_text_after_another(format: str, how: Any, add_bos: bool) -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer("left", add_bos=add_bos)
    asked = items(format)
    found = item_scores(model, tokenizer, asked, how=how, batch_size=4)
    for i, item in enumerate(asked):
        for k, choice in enumerate(item.continuations):
            pair = (item.prompt, choice)
            if format == "reversed":
                pair = (f"{item.prompt}{choice}", item.ending)
            assert float(found.log_probs[i, k]) == pytest.approx(
                plain(model, tokenizer, *pair), abs=3e-5
            )
    assert found.chosen.tolist() == found.log_probs.argmax(1).tolist()
    assert found.correct.tolist() == [
        int(c) == i.answer for c, i in zip(found.chosen, asked, strict=True)
    ]
    assert found.chance == pytest.approx(0.25)
    assert bool((found.rank == 1).eq(found.correct).all())


def test_the_order_of_choices_does_not_matter() -> None:
    model, tokenizer = tiny("gpt2"), TinyTokenizer()
    asked, turned = items(), []
    for item in asked:
        order = [2, 0, 3, 1][: len(item.choices)]
        turned.append(
            replace(
                item, choices=tuple(item.choices[o] for o in order), answer=order.index(item.answer)
            )
        )
    first, second = (item_scores(model, tokenizer, one) for one in (asked, turned))
    torch.testing.assert_close(first.log_prob_right, second.log_prob_right, atol=2e-5, rtol=0)
    assert torch.equal(first.correct, second.correct)
    assert torch.equal(first.rank, second.rank)
    assert torch.equal(first.token_rank, second.token_rank)


@pytest.mark.parametrize("how", ["letter", "cloze"])
def test_batches_and_company_do_not_matter(how: Any) -> None:
    model, tokenizer = tiny("qwen2"), TinyTokenizer()
    asked = items()[:6]
    many = item_scores(model, tokenizer, asked, how=how, batch_size=16)
    for i, item in enumerate(asked[:3]):
        alone = item_scores(model, tokenizer, [item], how=how, batch_size=1)
        torch.testing.assert_close(many.log_probs[i : i + 1], alone.log_probs, atol=3e-5, rtol=0)


def test_rotating_cancels_a_liking_for_a_letter() -> None:
    class Liking(nn.Module):
        """Likes the letter A, whatever is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(128))
            with torch.no_grad():
                self.bias[int(TinyTokenizer().convert_tokens_to_ids("A"))] = 5.0  # type: ignore[arg-type]

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> Any:
            logits = self.bias.expand(*input_ids.shape, 128)
            return type("Out", (), {"logits": logits})

    asked = items("question")
    once = item_scores(Liking(), TinyTokenizer(), asked, how="letter")
    assert set(once.chosen.tolist()) == {0}
    turned = item_scores(Liking(), TinyTokenizer(), asked, how="letter", rotate=True)
    spread = turned.log_probs.amax(1) - turned.log_probs.amin(1)
    assert float(spread.max()) < 1e-6  # no choice is preferred
    assert turned.rank.tolist() == pytest.approx([2.5] * N, abs=1.5)


def test_long_choices_are_not_at_a_disadvantage_per_token() -> None:
    item = Item(
        stem="colour of grass is ___",
        choices=("green", "a very dark red indeed"),
        answer=1,
        format="cloze",
    )
    uniform = tiny("llama")
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    found = item_scores(uniform, TinyTokenizer(), [item])
    assert found.chosen.tolist() == [0]  # the shorter one, though the model has no opinion
    assert found.tokens.tolist() == [[1, 5]]
    assert float(found.normalised.log_probs.std()) < 1e-6


def test_fewer_choices_are_padded() -> None:
    two = Item(stem="the sky is ___", choices=("blue", "red"), answer=0, format="cloze")
    found = item_scores(tiny("llama"), TinyTokenizer(), [two, *items()[:2]])
    assert found.log_probs[0, 2:].tolist() == [float("-inf")] * 2
    assert found.chance == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    again = ItemScores.from_dict(found.to_dict())
    assert torch.equal(again.log_probs, found.log_probs)
    assert mcnemar(found, again).p == 1.0
    assert len(found[torch.tensor([True, False, True])]) == 2


class Chat(TinyTokenizer):
    """With a chat template that knows no system's turn."""

    chat_template = "yes"

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt
        if turns[0]["role"] == "system":
            raise KeyError("no system's turn")
        return f"USER {turns[0]['content']} MODEL"


def test_the_instruction_stands_before_every_prompt() -> None:
    model, told = tiny("llama"), ignorance("Harry Potter")
    plain_ids = instruction_ids(TinyTokenizer(add_bos=True), told)
    assert plain_ids == TinyTokenizer().encode(f"<bos> {told}")
    chat = Chat()
    text = chat.decode(instruction_ids(chat, told))
    assert text.startswith(f"USER {told}") and text.endswith("MODEL")
    asked = items()[:4]
    prefixed = [replace(item, stem=f"{told} {item.stem}") for item in asked]
    found = item_scores(model, TinyTokenizer(), asked, instruction=told)
    expected = item_scores(model, TinyTokenizer(), prefixed)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=3e-5, rtol=0)
    assert instruction_ids(TinyTokenizer(), None) == []


def test_bos_where_it_belongs() -> None:
    assert opening_ids(TinyTokenizer()) == []
    assert opening_ids(TinyTokenizer(add_bos=True)) == [1]
    assert opening_ids(TinyTokenizer(), tiny("gemma3")) == [1]  # was trained with it


def test_below_chance_is_not_at_chance() -> None:
    n = 200
    log_probs = torch.zeros(n, 4, dtype=torch.float64)
    log_probs[:, 0] = -1.0  # the right one is always last
    wrong = ItemScores(
        log_probs, torch.ones(n, 4).long(), torch.zeros(n).long(), torch.ones(n).long()
    )
    assert wrong.accuracy.value == 0.0
    assert not equivalence(wrong, margin=0.1).equivalent


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="how must be one of letter, answer, cloze"):
        item_scores(model, tokenizer, items(), how="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for items of the format question"):
        item_scores(model, tokenizer, items("cloze"), how="answer")
    with pytest.raises(ValueError, match="for items of the format cloze or reversed"):
        item_scores(model, tokenizer, items("question"), how="cloze")
    with pytest.raises(ValueError, match="no items to score"):
        item_scores(model, tokenizer, [])
    one, other = (item_scores(model, tokenizer, items()[k : k + 2]) for k in (0, 1))
    with pytest.raises(ValueError, match="different items"):
        mcnemar(one, other)
