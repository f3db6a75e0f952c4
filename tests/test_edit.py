"""Edits are transactions: all or none, undone to the bit, last in first out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.edit import (
    BiasPatch,
    ColumnPatch,
    DensePatch,
    Edit,
    HookPatch,
    LowRankPatch,
    Patch,
    active_edits,
    base_fingerprint,
)
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.sites import Site, fingerprint, resolve
from concept_erasure.testing import ToyModel

D = 6


def _site(model: nn.Module) -> Site:
    return resolve(model, ["block"])[0]


def _dense(model: ToyModel) -> Patch:
    return DensePatch("block.weight", torch.ones(D, D, dtype=torch.float64))


def _low_rank(model: ToyModel) -> Patch:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, D, 2, generator=generator, dtype=torch.float64) / 3
    return LowRankPatch("block.weight", left, right)


def _columns(model: ToyModel) -> Patch:
    return ColumnPatch("block.weight", torch.tensor([4, 1]), torch.zeros(D, 2).double())


def _hook(model: ToyModel) -> Patch:
    return HookPatch(_site(model), lambda x: x * 2)


KINDS = {"dense": _dense, "low rank": _low_rank, "columns": _columns, "hook": _hook}


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_undo_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    model = ToyModel(D).to(dtype)
    x = torch.linspace(-1, 1, 4 * D, dtype=dtype).reshape(4, D)
    before = _bits(model)
    plain = model(x)[0]
    edit = Edit(model, [KINDS[kind](model)])
    assert not torch.equal(model(x)[0], plain)
    edit.undo()
    assert _same(model, before)
    assert torch.equal(model(x)[0], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_undone_when_the_body_raises(kind: str) -> None:
    model = ToyModel(D)
    x = torch.ones(2, D, dtype=torch.float64)
    before, plain = _bits(model), model(x)[0]
    with pytest.raises(KeyError, match="body"), Edit(model, [KINDS[kind](model)]):
        raise KeyError("body")
    assert _same(model, before)
    assert torch.equal(model(x)[0], plain)
    assert active_edits(model) == []


def test_what_each_kind_does() -> None:
    model = ToyModel(D)
    weight = model.block.weight.detach().clone()
    patch = _low_rank(model)
    assert isinstance(patch, LowRankPatch)
    with Edit(model, [patch]):
        assert torch.allclose(model.block.weight, weight + patch.left @ patch.right.T)
    with Edit(model, [_columns(model)]):
        changed = (model.block.weight != weight).any(0)
        assert changed.nonzero()[:, 0].tolist() == [1, 4]
    with Edit(model, [_dense(model)]):
        assert (model.block.weight == 1).all()


def test_only_what_changed_is_kept() -> None:
    model = ToyModel(D)
    with Edit(model, [_columns(model)]) as edit:
        assert sum(patch.bytes_held for patch in edit.patches) == 2 * D * 8


def test_all_or_none() -> None:
    model = ToyModel(D)
    before = _bits(model)
    bad = [
        DensePatch("block.weight", torch.ones(D, D + 1)),
        DensePatch("nowhere.weight", torch.ones(D, D)),
        DensePatch("head.bias", torch.full((3,), float("nan"))),
        ColumnPatch("block.weight", torch.tensor([D]), torch.zeros(D, 1)),
        BiasPatch("block", torch.zeros(D)),
    ]
    for patch in bad:
        with pytest.raises((EditError, ShapeError)):
            Edit(model, [_low_rank(model), _hook(model), patch])
        assert _same(model, before)
        assert active_edits(model) == []
        assert not any(module._forward_hooks for module in model.modules())


def test_bias_where_there_is_none() -> None:
    model = ToyModel(D)
    model.block = nn.Linear(D, D, bias=False).double()
    before = _bits(model)
    with Edit(model, [BiasPatch("block", torch.ones(D))]):
        assert torch.equal(model.block.bias, torch.ones(D, dtype=torch.float64))
    assert model.block.bias is None
    assert _same(model, before)


def test_last_in_first_out() -> None:
    model = ToyModel(D)
    before = _bits(model)
    first, second = (
        Edit(model, [_low_rank(model)], label="one"),
        Edit(model, [_columns(model)], label="two"),
    )
    assert active_edits(model) == [first, second]
    with pytest.raises(EditError, match="two first"):
        first.undo()
    second.undo()
    first.undo()
    assert _same(model, before)


def test_undo_twice_does_nothing() -> None:
    model = ToyModel(D)
    first = Edit(model, [_low_rank(model)])
    first.undo()
    second = Edit(model, [_columns(model)])
    now = _bits(model)
    first.undo()
    assert _same(model, now)
    second.undo()


def test_commit_drops_the_originals() -> None:
    model = ToyModel(D)
    edit = Edit(model, [_low_rank(model), _dense(model)])
    edit.commit()
    after = _bits(model)
    assert sum(patch.bytes_held for patch in edit.patches) == 0
    with pytest.raises(EditError, match="committed"):
        edit.undo()
    assert _same(model, after)
    assert active_edits(model) == []
    edit.commit()


def test_commit_in_a_context_stays() -> None:
    model = ToyModel(D)
    with Edit(model, [_dense(model)]) as edit:
        edit.commit()
    assert (model.block.weight == 1).all()


def test_commit_refusals() -> None:
    model = ToyModel(D)
    hooked = Edit(model, [_hook(model)])
    with pytest.raises(EditError, match="hook"):
        hooked.commit()
    later = Edit(model, [_dense(model)])
    with pytest.raises(EditError, match="first"):
        later.commit()
    later.undo()
    hooked.undo()
    with pytest.raises(EditError, match="undone"):
        later.commit()


def test_nothing_to_change() -> None:
    with pytest.raises(EditError, match="nothing"):
        Edit(ToyModel(D), [])


def test_one_key_is_in_force_once() -> None:
    model = ToyModel(D)
    edit = Edit(model, [_dense(model)], key="same")
    with pytest.raises(EditError, match="undo"):
        Edit(model, [_dense(model)], key="same")
    edit.undo()
    Edit(model, [_dense(model)], key="same").undo()


def test_tied_parameters_are_named() -> None:
    model = ToyModel(D)
    model.block.weight = model.encoder.weight
    with pytest.raises(EditError, match=r"(?s)block\.weight.*encoder\.weight|encoder.*block"):
        Edit(model, [_dense(model)])


def test_parameters_that_are_elsewhere() -> None:
    with pytest.raises(EditError, match=r"block\.weight.*meta"):
        Edit(ToyModel(D).to("meta"), [_dense(ToyModel(D))])


def test_fingerprint_is_that_of_the_weights_before() -> None:
    model = ToyModel(D)
    before = fingerprint(model)
    with Edit(model, [_dense(model)]):
        assert base_fingerprint(model) == before
        assert fingerprint(model) != before
    assert base_fingerprint(model) == before


def test_summary_says_what_was_touched() -> None:
    model = ToyModel(D)
    with Edit(model, [_dense(model), _hook(model)], label="mine") as edit:
        text = edit.summary()
    for word in ("mine", "block.weight", "dense", "hook", "bytes"):
        assert word in text
    assert "undone" in repr(edit)


def test_gradients_and_modes_are_left_alone() -> None:
    model = ToyModel(D).train()
    model.block.weight.requires_grad_(False)
    with Edit(model, [_low_rank(model)]):
        assert not model.block.weight.requires_grad
        assert model.head.weight.requires_grad
    assert model.training
    assert not model.block.weight.requires_grad
