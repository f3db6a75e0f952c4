"""What is sampled is the model's own distribution, and what is said of it is by an independent judge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item
from concept_erasure.edit import DensePatch, Edit
from concept_erasure.evals.language.generate import (
    _draw,
    distinct,
    fluency,
    leak_rate,
    reverse_perplexity,
    sample,
)
from tests.evals.language.test_continuations import NoCache
from tests.models import TinyTokenizer, tiny

PROMPTS = ["a b c", "one two three four five", "x", "the cat sat on the mat and ran"]


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
        if token == 2:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt2", "gpt_neox"])
def test_greedy_is_one_token_after_another(kind: str) -> None:
    model, tokenizer = tiny(kind), TinyTokenizer(add_bos=True)
    found = sample(model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=20, batch_size=3)
    for prompt, (text,) in zip(PROMPTS, found, strict=True):
        expected = greedy(model, tokenizer.encode(prompt), 20)
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_model_without_a_cache() -> None:
    tokenizer = TinyTokenizer()
    one, other = (
        sample(m, tokenizer, PROMPTS, n=2, max_new_tokens=5) for m in (NoCache(), tiny("llama"))
    )
    assert one == other


def test_samples_follow_the_distribution() -> None:
    model, tokenizer, n = tiny("llama"), TinyTokenizer(), 4000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer.encode("a b c")])).logits[0, -1]
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (1.0, 0.3):
        p = (logits / temperature).softmax(-1).double()
        drawn = torch.bincount(_draw(logits.expand(n, -1), uniform, temperature), minlength=128) / n
        deviation = (drawn - p) / (p * (1 - p) / n).sqrt().clamp_min(1e-9)
        assert float(deviation[p > 1e-3].abs().max()) < 4.5
    assert int(_draw(logits[None], torch.tensor([1.0 - 1e-16], dtype=torch.float64), 1.0)) < 128


def test_neither_batches_nor_the_global_generator_matter() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    state = torch.random.get_rng_state()
    few = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=6, batch_size=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    many = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=6, batch_size=64)
    torch.random.set_rng_state(state)
    assert few == many
    assert few != sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=6, seed=1)
    assert len({text for row in few for text in row}) > 6  # samples of one prompt differ


def test_a_text_ends_at_its_end() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    texts = sample(model, TinyTokenizer(), ["a"], n=200, max_new_tokens=64, batch_size=200)[0]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) < 30 and "<eos>" not in " ".join(texts)


def saying(item: Item, tokenizer: TinyTokenizer, share: float) -> nn.Module:
    """A model that says the answer with a given probability, and otherwise a filler."""
    right, filler = (int(tokenizer.convert_tokens_to_ids(w)) for w in (item.right, "filler"))  # type: ignore[arg-type]

    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> object:
            logits = torch.full((*input_ids.shape, 128), -60.0)
            logits[..., right], logits[..., filler] = math.log(share), math.log(1 - share)
            return type("Out", (), {"logits": logits})

    return Says()


def test_leak_rate_counts_prompts_and_samples() -> None:
    tokenizer = TinyTokenizer()
    item = Item(stem="the owl is called ___", choices=("Hedwig", "Errol"), answer=0, format="cloze")
    model = saying(item, tokenizer, 0.05)
    found = leak_rate(model, tokenizer, [item] * 50, samples=20, max_new_tokens=1)
    # a prompt leaks with 1 - 0.95^20, a sample with 0.05: one greedy look would have seen nothing
    assert found.leaked.value == pytest.approx(1 - 0.95**20, abs=0.2)
    assert found.per_sample == pytest.approx(0.05, abs=0.025)
    assert found.greedy.value == 0.0
    assert found.wrong.value == 0.0
    sure = leak_rate(saying(item, tokenizer, 0.9), tokenizer, [item], samples=3, max_new_tokens=2)
    assert sure.greedy.value == 1.0
    with pytest.raises(ValueError, match="no prompt before its answer"):
        leak_rate(model, tokenizer, Concept.load("harry_potter").items("concept", "reversed")[:2])


def test_reverse_perplexity_is_that_of_the_texts() -> None:
    judge, tested, tokenizer = tiny("gpt2"), tiny("llama"), TinyTokenizer()
    texts, starts = ["red green blue", "", "one two"], ["the sky", "x", "count now"]
    total, count = 0.0, 0
    for start, text in zip(starts, texts, strict=True):
        head, tail = tokenizer.encode(start), tokenizer.encode(text)
        if tail:
            with torch.no_grad():
                log_p = judge(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
            total -= sum(float(log_p[len(head) - 1 + j, t]) for j, t in enumerate(tail))
            count += len(tail)
    found = reverse_perplexity(texts, judge, tokenizer, model=tested, prompts=starts)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)
    assert reverse_perplexity(texts, judge, tokenizer, model=tested) != pytest.approx(found)
    assert math.isnan(reverse_perplexity([""], judge, tokenizer, model=tested))


def test_a_model_does_not_judge_itself() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    for judge in (model, tiny("llama")):  # itself, and a copy of it
        with pytest.raises(ValueError, match="is the tested model itself"):
            reverse_perplexity(["a b"], judge, tokenizer, model=model)
    name = "model.layers.0.mlp.down_proj.weight"
    edit = Edit(model, [DensePatch(name, 1.5 * model.get_parameter(name).detach())])
    with pytest.raises(ValueError, match="is the tested model itself"), edit:  # nor its original
        reverse_perplexity(["a b"], tiny("llama"), tokenizer, model=model)
    with pytest.raises(ValueError, match="one prompt a text"):
        reverse_perplexity(["a b"], tiny("gpt2"), tokenizer, model=model, prompts=["a", "b"])


def test_loops_and_empty_texts_show() -> None:
    assert distinct(["one two three four"]) == 1.0
    assert distinct(["spam " * 50]) == pytest.approx(1 / 49)
    assert math.isnan(distinct(["", "one"]))
    # repetition within a text counts, two texts that are alike do not
    assert distinct(["one two three", "one two three"]) == 1.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        distinct(["a"], 0)


def test_fluency_has_everything() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    found = fluency(
        model, tokenizer, PROMPTS, reference=(tiny("gpt2"), tokenizer), max_new_tokens=8
    )
    assert found.prompts == 4 and found.reverse_perplexity is not None
    assert found.reverse_perplexity > 1 and 0 < found.distinct_2 <= 1
    assert fluency(model, tokenizer, PROMPTS, max_new_tokens=2).reverse_perplexity is None
    with pytest.raises(ValueError, match="temperature at least 0"):
        sample(model, tokenizer, PROMPTS, temperature=-1.0)
    with pytest.raises(ValueError, match="non-empty list of texts"):
        sample(model, tokenizer, "one prompt")
