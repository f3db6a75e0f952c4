from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from concept_erasure.errors import SiteNotFoundError
from concept_erasure.language.batches import (
    IGNORE,
    Batches,
    Encoded,
    Head,
    activations_at,
    chunked,
    collate,
    encode,
    hidden_at,
    logits_at,
    pad_id,
)
from tests.models import KINDS, TinyTokenizer, tiny

CAUSAL = tuple(kind for kind in KINDS if kind != "bert")
TEXTS = [" ".join(f"w{(i * j + i) % 23}" for j in range(3 + 2 * i)) for i in range(9)]


def encoded(texts=TEXTS, **options):
    return encode(TinyTokenizer(), texts, max_length=40, **options)


def a_batch(rows=(0, 3, 5)):
    return collate(encoded(), rows, pad_id=0)


def words(text: Encoded) -> list[int]:
    return text.ids[text.supervised].tolist()


class NoBos(TinyTokenizer):
    bos_token_id = None


class Neither(NoBos):
    eos_token_id = None


@pytest.mark.parametrize("tokenizer", [TinyTokenizer(), NoBos(), Neither()])
def test_a_text_has_the_same_supervised_tokens_under_every_prefix(tokenizer):
    prefixes = [f"by an expert number {i}" + " so" * i for i in range(len(TEXTS))]
    plain = encode(tokenizer, TEXTS, max_length=10)
    led = encode(tokenizer, TEXTS, max_length=10, prefix=prefixes)
    for one, other in zip(plain, led, strict=True):
        assert words(one) == words(other)
        assert len(other) > len(one)
        assert not one.supervised[0]


def test_the_prefix_is_joined_by_ids_and_only_the_text_is_supervised():
    tokenizer = TinyTokenizer(add_bos=True)  # which would put a BOS before the text if it were let
    (one,) = encode(tokenizer, ["b c d"], max_length=9, prefix=["a a"])
    assert one.ids.tolist() == [1, *tokenizer.convert_tokens_to_ids(["a", "a", "b", "c", "d"])]
    assert one.supervised.tolist() == [False, False, False, True, True, True]


def test_without_bos_the_eos_starts_a_text_and_without_both_its_first_token_is_context():
    ids = TinyTokenizer().convert_tokens_to_ids(["b", "c"])
    assert encode(NoBos(), ["b c"], max_length=9)[0].ids.tolist() == [2, *ids]
    (one,) = encode(Neither(), ["b c"], max_length=9)
    assert one.ids.tolist() == ids
    assert one.supervised.tolist() == [False, True]


def test_max_length_counts_bos_and_text():
    assert max(len(text) for text in encode(TinyTokenizer(), TEXTS, max_length=7)) == 7


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a b", "c", "d e"], {}, "text 1 has 1 token"),
        (["a b", ""], {}, "text 1 has 0 token"),
        ([], {}, "non-empty list"),
        ("a b", {}, "non-empty list"),
        (["a b"], {"prefix": ["x", "y"]}, "as many prefixes"),
        (["a b"], {"max_length": 2}, "at least 3"),
    ],
)
def test_bad_texts_are_refused_with_a_clear_message(texts, options, message):
    with pytest.raises(ValueError, match=message):
        encode(TinyTokenizer(), texts, **{"max_length": 9, **options})


def test_labels_are_aligned_with_the_ids_and_padding_is_on_the_right():
    batch = a_batch()
    counted = batch.labels != IGNORE
    assert torch.equal(batch.labels[counted], batch.input_ids[counted])
    assert torch.equal(batch.tokens, batch.labels[counted])
    assert batch.count == int(counted.sum()) == len(batch.positions)
    assert bool((batch.attention_mask.diff(dim=1) <= 0).all())
    assert not bool(counted[batch.attention_mask == 0].any())
    assert torch.equal(batch.lengths, counted.sum(1))
    assert torch.equal(batch.per_sequence(torch.ones(batch.count)), counted.sum(1).float())


def test_every_text_comes_once_an_epoch_the_last_incomplete_batch_too():
    batches = Batches(encoded(), 4, seed=0, pad_id=0)
    assert len(batches) == 3
    for epoch in range(4):
        rows = [r for k in range(3) for r in batches.at(epoch * 3 + k).rows.tolist()]
        assert Counter(rows) == Counter(range(len(TEXTS)))


def test_a_batch_is_a_pure_function_of_the_step():
    one, other = (Batches(encoded(), 2, seed=5, pad_id=0) for _ in range(2))
    late = one.rows_at(57)
    for step in range(60):
        assert other.count_at(step) == other.at(step).count
    assert other.rows_at(57) == late
    assert [one.rows_at(k) for k in range(5)] == [other.rows_at(k) for k in range(5)]


def test_epochs_and_seeds_have_orders_of_their_own():
    texts = encoded()
    orders = {
        tuple(
            r for k in range(9) for r in Batches(texts, 1, seed=seed, pad_id=0).rows_at(e * 9 + k)
        )
        for seed in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


def test_texts_of_like_length_are_together():
    texts = [Encoded(torch.ones(n, dtype=torch.int64), torch.arange(n) > 0) for n in range(2, 130)]
    batches = Batches(texts, 8, seed=0, pad_id=0)
    spread = [
        max(s) - min(s) for k in range(16) if (s := [len(texts[r]) for r in batches.rows_at(k)])
    ]
    assert max(spread) == 7


def test_the_digest_tells_texts_and_orders_apart():
    texts = encoded()
    made = [
        Batches(texts, 2, seed=0, pad_id=0),
        Batches(texts, 3, seed=0, pad_id=0),
        Batches(texts, 2, seed=1, pad_id=0),
        Batches(texts[::-1], 2, seed=0, pad_id=0),
    ]
    assert len({one.digest for one in made}) == 4
    assert made[0].digest == Batches(encoded(), 2, seed=0, pad_id=9).digest


@pytest.mark.parametrize("kind", CAUSAL)
def test_logits_are_those_of_the_model(kind):
    model, batch = tiny(kind), a_batch()
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        want = whole[:, :-1][batch.labels[:, 1:] != IGNORE]
        assert torch.equal(logits_at(model, batch), want)
        assert torch.equal(Head(model)(hidden_at(model, batch)), want)


def test_soft_capping_and_scales_after_the_head_are_kept():
    model, batch = tiny("gemma2"), a_batch()
    model.config.final_logit_softcapping = None
    free = logits_at(model, batch)
    model.config.final_logit_softcapping = 0.5
    capped = logits_at(model, batch)
    torch.testing.assert_close(capped, 0.5 * (free / 0.5).tanh())
    torch.testing.assert_close(Head(model)(hidden_at(model, batch)), capped)


def test_logits_do_not_depend_on_the_padding():
    model, texts = tiny("llama"), encoded()
    together = logits_at(model, collate(texts, [0, 8], pad_id=0))
    alone = logits_at(model, collate(texts, [0], pad_id=0))
    torch.testing.assert_close(together[: len(alone)], alone)


def test_the_head_sees_supervised_positions_only():
    model, batch, seen = tiny("llama"), a_batch(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    logits_at(model, batch)
    assert seen == [batch.count]


def test_the_base_runs_as_before_after_a_failure_in_the_head():
    model, batch = tiny("llama"), a_batch()
    want = logits_at(model, batch)
    with pytest.raises(RuntimeError):
        Head(model)(torch.zeros(3, 5))
    assert "forward" not in model.model.__dict__
    assert not model.model._forward_hooks
    assert torch.equal(logits_at(model, batch), want)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(SiteNotFoundError, match="no language-model head"):
        logits_at(tiny("llama").model, a_batch())


def test_a_token_that_nothing_predicts_has_no_logits_but_an_activation():
    text = Encoded(torch.tensor([1, 5, 6]), torch.tensor([True, True, True]))
    batch = collate([text], [0], pad_id=0)
    with pytest.raises(ValueError, match="no position predicts it"):
        logits_at(tiny("llama"), batch)
    with pytest.raises(ValueError, match="no position predicts it"):
        hidden_at(tiny("llama"), batch)
    assert activations_at(tiny("llama"), batch, "residual.0").shape == (3, 32)
    with pytest.raises(ValueError, match="none of the 3 tokens"):
        Encoded(text.ids, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="one shape"):
        Encoded(text.ids, torch.ones(2, dtype=torch.bool))


def nll(batch):
    def loss(logits, places):
        return -logits.float().log_softmax(-1).gather(1, batch.tokens[places][:, None])[:, 0]

    return loss


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000, None])
def test_chunks_have_the_loss_and_the_gradient_of_the_whole(chunk):
    model, batch = tiny("gemma2").double(), a_batch()
    want = nll(batch)(logits_at(model, batch), torch.arange(batch.count))
    model.zero_grad()
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = chunked(nll(batch), hidden_at(model, batch), Head(model), chunk=chunk)
    got.sum().backward()
    torch.testing.assert_close(got, want)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_chunks_never_hold_the_logits_of_all_positions():
    model, batch, shapes = tiny("llama"), a_batch(), []
    loss = nll(batch)

    def watched(logits, places):
        shapes.append(tuple(logits.shape))
        return loss(logits, places)

    values = chunked(watched, hidden_at(model, batch), Head(model), chunk=4)
    hidden, saved = hidden_at(model, batch).detach().requires_grad_(), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        chunked(loss, hidden, Head(model), chunk=4)
    values.sum().backward()
    assert max(rows for rows, _ in shapes) <= 4
    assert not any(size >= 128 * batch.count for size in saved)
    with pytest.raises(ValueError, match="chunk must be"):
        chunked(loss, torch.zeros(2, 32), Head(model), chunk=0)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logits_are_computed_once_unless_the_head_is_trained(chunk):
    model, batch, seen = tiny("llama").requires_grad_(False), a_batch(), list[int]()
    want = hidden_at(model, batch).requires_grad_()
    weight = torch.linspace(-1, 2, batch.count)  # of the positions, known in the backward pass only

    def watched(logits, places):
        seen.extend(places.tolist())
        return nll(batch)(logits, places)

    (weight * nll(batch)(Head(model)(want), torch.arange(batch.count))).sum().backward()
    got = want.detach().requires_grad_()
    (weight * chunked(watched, got, Head(model), chunk=chunk)).sum().backward()
    torch.testing.assert_close(got.grad, want.grad)
    assert seen == [0, *range(batch.count)]  # the first tells whether the head is trained


def test_a_gradient_to_differentiate_has_to_be_asked_for():
    model, batch = tiny("llama").requires_grad_(False), a_batch()
    hidden = hidden_at(model, batch).requires_grad_()
    curved = []
    for value in (
        nll(batch)(Head(model)(hidden), torch.arange(batch.count)),
        chunked(nll(batch), hidden, Head(model), chunk=4, twice=True),
    ):
        (slope,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
        curved += torch.autograd.grad(slope.square().sum(), hidden)
    torch.testing.assert_close(*curved)
    value = chunked(nll(batch), hidden, Head(model), chunk=4)
    with pytest.raises(RuntimeError, match="twice=True"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)


def test_activations_are_those_of_the_site_and_later_layers_do_not_run():
    model, batch = tiny("llama"), a_batch()
    out = model(input_ids=batch.input_ids, output_hidden_states=True)
    want = out.hidden_states[2].flatten(0, 1)[batch.positions]
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    got = activations_at(model, batch, "residual.1")
    torch.testing.assert_close(got, want)
    assert 2 not in ran
    got.sum().backward()
    assert model.model.layers[2].mlp.down_proj.weight.grad is None
    with pytest.raises(SiteNotFoundError, match="must name one site"):
        activations_at(model, batch, "residual.*")


def test_something_to_pad_with_is_always_found():
    assert pad_id(TinyTokenizer()) == 0
    assert pad_id(nn.Module()) == 0

    class NoPad(TinyTokenizer):
        pad_token_id = None

    assert pad_id(NoPad()) == 2


@pytest.mark.parametrize(("texts", "size"), [([], 2), (encoded(), 0)])
def test_no_texts_or_no_size_are_refused(texts, size):
    with pytest.raises(ValueError, match=r"no texts|batch_size"):
        Batches(texts, size, seed=0, pad_id=0)


@pytest.mark.slow
def test_logits_and_chunks_of_a_real_model():
    models = pytest.importorskip("concept_erasure.evals.models")
    model, tokenizer = models.load_smollm2()
    texts = encode(
        tokenizer, ["The weather is fine.", "A recipe for bread, and more."], max_length=20
    )
    batch = collate(texts, [0, 1], pad_id=pad_id(tokenizer))
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        want = whole[:, :-1][batch.labels[:, 1:] != IGNORE]
        assert torch.equal(logits_at(model, batch), want)
        values = chunked(nll(batch), hidden_at(model, batch), Head(model), chunk=5)
    torch.testing.assert_close(values, nll(batch)(want, torch.arange(batch.count)))
