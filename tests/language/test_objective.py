from __future__ import annotations

import pytest
import torch

from concept_erasure.language.batches import Batches, Encoded
from concept_erasure.language.objective import Anchor, Term, log_prob, nll


def batches():
    texts = [Encoded(torch.ones(n, dtype=torch.int64), torch.arange(n) > 0) for n in (3, 4, 6)]
    return Batches(texts, 2, seed=0, pad_id=0)


def test_nll_is_the_cross_entropy_at_each_position(generator):
    logits = torch.randn(5, 11, generator=generator)
    tokens = torch.randint(0, 11, (5,), generator=generator)
    want = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(nll(logits.log_softmax(-1), tokens), want)
    torch.testing.assert_close(log_prob(logits.log_softmax(-1), tokens), -want)


def test_a_term_counts_positions_or_sequences():
    def loss(model, batch):
        raise AssertionError

    made = batches()
    positions, sequences = (
        Term("forget", 1.0, made, loss, unit) for unit in ("positions", "sequences")
    )
    for step in range(4):
        batch = made.at(step)
        assert positions.count_at(step) == batch.count
        assert sequences.count_at(step) == len(batch.rows)


def test_unknown_names_and_units_and_negative_anchors_are_refused():
    with pytest.raises(ValueError, match="name must be one of forget"):
        Term("oblivion", 1.0, batches(), lambda m, b: m)
    with pytest.raises(ValueError, match="unit must be"):
        Term("forget", 1.0, batches(), lambda m, b: m, "texts")
    with pytest.raises(ValueError, match="at least 0"):
        Anchor(weight=-1.0)
    with pytest.raises(ValueError, match="at least 0"):
        Anchor(weight=float("nan"))
