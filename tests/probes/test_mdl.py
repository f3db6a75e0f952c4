"""Online code length and V-information, against their definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from concept_erasure import LeaceEraser
from concept_erasure.errors import ShapeError
from concept_erasure.probes import (
    LinearProbe,
    evaluate,
    online_code_length,
    v_information,
)
from concept_erasure.probes.mdl import FRACTIONS
from tests.probes.test_linear import data

PROBE = LinearProbe(C=1.0, standardize=None)


def test_blocks_are_those_of_the_paper_and_agree_with_sklearn() -> None:
    x, z = data(400, 5, 2)
    code = online_code_length(x, z, probe=PROBE, fractions=(0.1, 0.3, 1.0), seed=1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    x, z = x[order], z[order]
    assert [(b.start, b.stop) for b in code.blocks] == [(0, 40), (40, 120), (120, 400)]
    assert code.blocks[0].bits == 40
    for block in code.blocks[1:]:
        a, b = block.start, block.stop
        oracle = LogisticRegression(tol=1e-10, max_iter=5000).fit(x[:a].numpy(), z[:a].numpy())
        proba = oracle.predict_proba(x[a:b].numpy())[np.arange(b - a), z[a:b].numpy()]
        assert block.bits == pytest.approx(-np.log2(proba).sum(), rel=1e-3)
        assert block.bits_per_label == block.bits / (b - a)
    assert code.uniform_bits == 400
    assert code.bits == sum(block.bits for block in code.blocks)
    assert code.compression == pytest.approx(400 / code.bits)
    assert json.loads(json.dumps(code.to_dict()))["n"] == 400
    assert "compression" in str(code)


def test_erasure_lengthens_the_code() -> None:
    x, z = data(600, 5, 3)
    before = online_code_length(x, z, probe=PROBE)
    after = online_code_length(LeaceEraser.fit(x, z)(x), z, probe=PROBE)
    assert len(before.blocks) == len(FRACTIONS)
    assert len(online_code_length(x[:100], z[:100], probe=PROBE).blocks) < len(
        FRACTIONS
    )  # shares below a label
    assert before.compression > 1.2 > 1.02 > after.compression
    assert before.beats_frequencies
    assert not after.beats_frequencies
    assert after.entropy <= math.log2(3) + 1e-9


def test_classes_that_come_late_cost_a_finite_price() -> None:
    x, _ = data(200, 3, 2)
    z = ["a"] * 120 + ["b"] * 79 + ["rare"]
    code = online_code_length(x, z, fractions=(0.02, 0.1, 1.0), probe=PROBE)
    assert math.isfinite(code.bits)
    early = online_code_length(x[:4], [0, 0, 0, 1], fractions=(0.25, 1.0))
    assert math.isfinite(early.bits)
    assert early.blocks[0].bits == 1


def test_every_probability_of_a_block_sums_to_one() -> None:
    from concept_erasure.probes.mdl import _block_loss

    x, z = data(60, 3, 2)
    for known in (30, 2):
        total = torch.zeros(30, dtype=torch.float64)
        for label in range(3):
            index = torch.cat([z[:30], torch.full((30,), label)])
            if known == 2:
                index[:30] = 0
            total += (-_block_loss(PROBE, x, index, 30, (0, 1, 2), None)).exp()
        torch.testing.assert_close(total, torch.ones(30, dtype=torch.float64))


def test_groups_are_sent_in_one_block() -> None:
    x, z = data(300, 4, 2)
    groups = [f"t{i // 10}" for i in range(300)]
    code = online_code_length(x, z, probe=PROBE, groups=groups)
    assert all(block.stop % 10 == 0 for block in code.blocks)
    assert code.blocks[-1].stop == 300
    assert code == online_code_length(x, z, probe=PROBE, groups=groups)
    assert code != online_code_length(x, z, probe=PROBE, groups=groups, seed=1)


def test_bad_code_options() -> None:
    x, z = data(50, 3, 2)
    for fractions in ((), (0.5,), (0.5, 0.2, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="fractions must increase"):
            online_code_length(x, z, fractions=fractions)
    with pytest.raises(TypeError, match="needs probabilities"):
        online_code_length(x, z, probe="svm")
    with pytest.raises(ValueError, match="unknown probe"):
        online_code_length(x, z, probe="tree")


def test_v_information_is_the_gain_over_the_frequencies() -> None:
    x, z = data(400, 5, 3)
    split = (x[:250], z[:250], x[250:], z[250:])
    found, result = v_information(*split, probe=PROBE), evaluate(*split, probe=PROBE)
    assert result.log_loss is not None
    assert found.conditional == pytest.approx(result.log_loss / math.log(2))
    assert found.entropy == pytest.approx(result.constant_log_loss / math.log(2))
    assert found.bits == pytest.approx(found.entropy - found.conditional)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.bits < found.high
    assert json.loads(json.dumps(found.to_dict()))["n"] == 150
    assert "bits a label" in str(found)
    erased = LeaceEraser.fit(x, z)(x)
    assert v_information(erased[:250], z[:250], erased[250:], z[250:], probe=PROBE).bits < 0.1


def test_v_information_with_groups_and_bad_input() -> None:
    x, z = data(200, 4, 2)
    groups = [i // 10 for i in range(200)]
    grouped = v_information(x[:100], z[:100], x[100:], z[100:], groups=(groups[:100], groups[100:]))
    assert grouped.low is not None
    assert v_information(x[:100], z[:100], x[100:101], z[100:101]).low is None
    with pytest.raises(ShapeError, match="one width"):
        v_information(x, z, x[:, :2], z)
    with pytest.raises(TypeError, match="needs probabilities"):
        v_information(x, z, x, z, probe="svm")
