"""Edits are transactions: all or none, undone to the bit, last in first out."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path

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
    lineage,
    same_lineage,
)
from concept_erasure.errors import EditError, ErasureWarning, ShapeError
from concept_erasure.sites import Site, fingerprint, resolve
from concept_erasure.testing import ToyModel
from tests.models import tiny

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
        BiasPatch({"block": torch.zeros(D)}),
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
    with Edit(model, [BiasPatch({"block": torch.ones(D)})]):
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
    hooked.undo()
    first, later = Edit(model, [_low_rank(model)], label="one"), Edit(model, [_dense(model)])
    with pytest.raises(EditError, match=r"(?s)one first.*block\.weight"):
        later.commit()
    later.undo()
    first.undo()
    with pytest.raises(EditError, match="undone"):
        later.commit()


def test_commit_is_blocked_by_overlap_only() -> None:
    model = ToyModel(D)
    before = _bits(model)
    hooked = Edit(model, [_hook(model)])
    elsewhere = Edit(model, [DensePatch("encoder.weight", torch.ones(D, D))])
    Edit(model, [_dense(model)]).commit()
    elsewhere.undo()
    hooked.undo()
    assert (model.block.weight == 1).all()
    assert _same(model, {**before, "block.weight": model.block.weight.detach()})


@pytest.mark.parametrize("error", [None, KeyError("body"), KeyboardInterrupt()])
def test_exit_unwinds_later_edits(error: BaseException | None) -> None:
    model = ToyModel(D)
    before = _bits(model)
    raised: BaseException | None = None
    try:
        with Edit(model, [_low_rank(model)]):
            Edit(model, [_columns(model)])
            Edit(model, [_hook(model), _dense(model)])
            if error is not None:
                raise error
    except BaseException as caught:  # noqa: BLE001 looked at below
        raised = caught
    assert raised is error
    assert _same(model, before)
    assert active_edits(model) == []
    assert not any(module._forward_hooks for module in model.modules())


class _Stuck(HookPatch):
    def undo(self, model: nn.Module) -> None:
        super().undo(model)
        raise RuntimeError("stuck")


def test_an_undo_that_fails_does_not_hide_the_body() -> None:
    model = ToyModel(D)
    before = _bits(model)
    stuck = [_dense(model), _Stuck(_site(model), lambda x: x)]
    with (
        pytest.raises(KeyError, match="body") as caught,
        Edit(model, [_low_rank(model)]),
        Edit(model, stuck),
    ):
        raise KeyError("body")
    assert "stuck" in caught.value.__notes__[0]
    assert _same(model, before)
    with (
        pytest.raises(RuntimeError, match="stuck"),
        Edit(model, [_dense(model), _Stuck(_site(model), lambda x: x)]),
    ):
        pass
    assert _same(model, before)


def test_values_are_made_when_applied() -> None:
    model = ToyModel(D)
    before = _bits(model)
    double = [DensePatch("block.weight", lambda m: 2 * m.block.weight.detach()) for _ in range(2)]
    with Edit(model, double):
        assert torch.equal(model.block.weight, 4 * before["block.weight"])
    assert _same(model, before)


def test_fingerprints_after_a_commit() -> None:
    """Committing A under B and C: the base is the model with A, whatever is undone after."""
    model, twin = ToyModel(D), ToyModel(D)
    original = fingerprint(model)
    value = torch.eye(D, dtype=torch.float64)
    Edit(twin, [DensePatch("block.weight", value)]).commit()
    with_a = fingerprint(twin)
    first = Edit(model, [DensePatch("block.weight", value)])
    second = Edit(model, [_columns(model), DensePatch("encoder.weight", value)])
    third = Edit(model, [_low_rank(model), _hook(model)])
    now = _bits(model)
    first.commit()
    assert _same(model, now)
    for edit in (third, second):
        assert base_fingerprint(model) == with_a
        edit.undo()
    assert base_fingerprint(model) == fingerprint(model) == with_a
    assert lineage(model) == {original, with_a}
    assert same_lineage(original, with_a)
    assert not same_lineage(original, "other")


def test_lineage_ends_where_weights_change_otherwise() -> None:
    model = ToyModel(D)
    Edit(model, [_dense(model)]).commit()
    assert len(lineage(model)) == 2
    with torch.no_grad():
        model.head.weight.mul_(3)
    assert lineage(model) == {fingerprint(model)}


def test_fingerprint_without_a_bias_that_was_added() -> None:
    model, plain = ToyModel(D), ToyModel(D)
    for one in (model, plain):
        one.block = nn.Linear(D, D, bias=False).double()
        one.block.weight.detach().copy_(torch.eye(D))
    Edit(plain, [_dense(plain)]).commit()
    first = Edit(model, [_dense(model)])
    with Edit(model, [BiasPatch({"block": None})]):
        first.commit()
        assert base_fingerprint(model) == fingerprint(plain)
        assert model.block.bias is not None


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


def test_edits_share_no_key() -> None:
    model = ToyModel(D)
    with Edit(model, [_dense(model)], key=["a", "b"], label="old"):
        with pytest.raises(EditError, match="old"):
            Edit(model, [_dense(model)], key=["b", "c"])
        Edit(model, [_dense(model)], key="c")


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


# ------------------------------------------------------- one model, with its head and without


def test_edits_through_a_model_and_its_base_are_one_stack() -> None:
    """Undone out of order, the older edit would bring the weights of the newer one back."""
    model = tiny("llama")
    base = model.get_submodule("model")
    before = _bits(model)
    one = Edit(model, [DensePatch("model.norm.weight", torch.ones(32))], label="one")
    two = Edit(base, [DensePatch("norm.weight", torch.zeros(32))], label="two")
    assert active_edits(model) == active_edits(base) == [one, two]
    with pytest.raises(EditError, match="undo two first"):
        one.undo()
    two.undo()
    one.undo()
    assert _same(model, before)


def test_commit_under_an_edit_of_the_base() -> None:
    model, twin = tiny("llama"), tiny("llama")
    base, original = model.get_submodule("model"), fingerprint(model)
    value = torch.eye(32)
    Edit(twin, [DensePatch("model.layers.1.self_attn.q_proj.weight", value)]).commit()
    first = Edit(model, [DensePatch("model.layers.1.self_attn.q_proj.weight", value)])
    with Edit(base, [DensePatch("layers.0.self_attn.q_proj.weight", value)]):
        assert base_fingerprint(model) == base_fingerprint(base) == original
        first.commit()
        assert base_fingerprint(model) == base_fingerprint(base) == fingerprint(twin)
    assert lineage(base) == lineage(model) == {original, fingerprint(twin)}


def test_undo_when_only_the_base_is_left() -> None:
    model = tiny("gpt2")
    base = model.get_submodule("transformer")
    before = _bits(base)
    edit = Edit(model, [DensePatch("transformer.h.0.mlp.c_proj.bias", torch.ones(32))])
    del model
    gc.collect()
    edit.undo()
    assert _same(base, before)
    assert active_edits(base) == []


def test_the_table_keeps_no_model_alive() -> None:
    model = tiny("gpt2")
    reference = weakref.ref(model.get_submodule("transformer"))
    edit = Edit(model, [DensePatch("transformer.h.0.mlp.c_proj.bias", torch.ones(32))])
    del model
    gc.collect()
    assert reference() is None
    with pytest.raises(EditError, match="gone"):
        edit.undo()


# ------------------------------------------------------------------- trained in between


def _train(model: nn.Module, name: str, *, fused: bool = False) -> None:
    parameter = model.get_parameter(name)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    (parameter - 3).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["dense", "low rank", "columns"])
def test_undo_says_that_training_is_discarded(kind: str, fused: bool) -> None:
    model = ToyModel(D)
    before = _bits(model)
    edit = Edit(model, [KINDS[kind](model)], label="mine")
    _train(model, "block.weight", fused=fused)
    with pytest.warns(ErasureWarning, match=r"'block\.weight' changed after mine"):
        edit.undo()
    if kind != "columns":
        assert _same(model, before)


def test_undo_says_nothing_of_later_edits_and_other_columns() -> None:
    model = ToyModel(D)
    before = _bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Edit(model, [_low_rank(model), _dense(model)]):
            Edit(model, [_columns(model)])
            Edit(model, [_low_rank(model)]).undo()
        edit = Edit(model, [_columns(model)])
        with torch.no_grad():
            model.block.weight[:, 0] += 1
        edit.undo()
    assert not _same(model, before)


def test_training_between_two_edits() -> None:
    model = ToyModel(D)
    before = _bits(model)
    edit = Edit(model, [_dense(model)])
    _train(model, "block.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Edit(model, [_low_rank(model)]).undo()
    with pytest.warns(ErasureWarning, match=r"'block\.weight' changed after edit"):
        edit.undo()
    assert _same(model, before)


def test_a_bias_that_was_added_and_trained() -> None:
    model = ToyModel(D)
    model.block = nn.Linear(D, D, bias=False).double()
    edit = Edit(model, [BiasPatch({"block": torch.ones(D)})])
    _train(model, "block.bias")
    with pytest.warns(ErasureWarning, match=r"block\.bias"):
        edit.undo()
    assert model.block.bias is None


def test_a_cast_in_between_is_no_training() -> None:
    model = ToyModel(D)
    edit = Edit(model, [_low_rank(model)])
    model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.undo()


def test_the_warning_on_leaving_a_context() -> None:
    model = ToyModel(D)

    def body() -> None:
        with Edit(model, [_dense(model)], label="mine"):
            _train(model, "block.weight")

    with pytest.warns(ErasureWarning, match="changed after mine") as caught:
        body()
    assert [Path(one.filename).name for one in caught] == ["test_edit.py"]
