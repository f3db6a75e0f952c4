"""Erasers in models: folded, saved, loaded again; what counts as applied twice; representations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from concept_erasure import Representations, collect
from concept_erasure.edit import Edit, active_edits
from concept_erasure.eraser import Eraser, RepresentationEraser
from concept_erasure.errors import EditError, FormatError, ShapeError, SpaceError
from concept_erasure.linear.leace import LeaceConfig, LeaceEraser
from concept_erasure.linear.splince import SplinceEraser
from concept_erasure.sites import Space, find_sites, fingerprint, width_at
from concept_erasure.testing import make_data
from tests.models import KINDS, TinyTokenizer, tiny

PLACES = ("norm1.1", "attention.1", "norm2.1", "value.1", "mlp.1", "norm.final")
# where the architecture has no bias, and no setting that makes one
REFUSED = {
    "llama": {"norm.final"},
    "gemma2": {"norm2.1", "value.1", "mlp.1"},
    "gemma3": {"norm2.1", "value.1", "mlp.1"},
    "qwen2": {"attention.1", "norm2.1", "value.1", "mlp.1"},
    "mistral": {"norm1.1", "attention.1", "norm2.1", "value.1", "mlp.1", "norm.final"},
    "gpt2": set(),
    "gpt_neox": {"norm.final"},
    "bert": set(),
}
SETTING = {"norm1.1": "attention_bias", "attention.1": "attention_bias"}
FOLDS = [
    (kind, place)
    for kind in KINDS
    for place, site in find_sites(tiny(kind)).items()
    if place in PLACES and (site.readers or site.writer)
]
TEXTS = ["a b c d", "d c", "e f g a b", "b", "h a", "i j k", "l m", "n"]
LABELS = [0, 1, 0, 1, 0, 1, 0, 1]


def _eraser(width: int, *, affine: bool = True, seed: int = 0) -> LeaceEraser:
    x, z = make_data(400, width, 3, seed)
    return LeaceEraser.fit(x, z, affine=affine)


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 16).reshape(2, 6)
    out: Tensor = model(input_ids=ids).logits
    return out


def _reloaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation=model.config._attn_implementation,  # not saved; another sums otherwise
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.eval()


def _config(model: nn.Module) -> dict[str, object]:
    noted = ("architectures", "dtype")  # written by save_pretrained
    return {k: v for k, v in vars(model.config).items() if k not in noted}


def _width(model: nn.Module, place: str) -> int:
    width = width_at(model, find_sites(model)[place])
    assert width is not None
    return width


def test_there_are_folds_everywhere() -> None:
    assert {kind for kind, _ in FOLDS} == set(KINDS)
    assert len(FOLDS) > 35


@pytest.mark.parametrize(("kind", "place"), FOLDS)
def test_a_fold_survives_saving(kind: str, place: str, tmp_path: Path) -> None:
    """apply, save, load: the same logits; or, without a place for the offset, the refusal."""
    model = tiny(kind)
    before, config = _bits(model), _config(model)
    eraser = _eraser(_width(model, place))
    plain = _logits(model)
    if place in REFUSED[kind]:
        with pytest.raises(EditError, match=r"(?s)affine=False.*attach\(\).*bias='add'.*lost"):
            eraser.apply(model, sites=place)
        assert _same(model, before)
        assert _config(model) == config
        eraser = _eraser(_width(model, place), affine=False)
    with eraser.attach(model, sites=place):
        want = _logits(model)
    edit = eraser.apply(model, sites=place)
    got = _logits(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3)
    assert torch.equal(_logits(_reloaded(model, tmp_path)), got)
    edit.undo()
    assert _same(model, before)
    assert _config(model) == config
    assert torch.equal(_logits(model), plain)


@pytest.mark.parametrize("place", ["norm1.1", "mlp.1"])
def test_the_setting_covers_its_siblings(place: str) -> None:
    model = tiny("llama")
    flag = SETTING.get(place, "mlp_bias")
    with _eraser(32).apply(model, sites=place) as edit:
        assert getattr(model.config, flag) is True
        names = [name for name in model.state_dict() if name.endswith(".bias")]
        part = "self_attn" if flag == "attention_bias" else "mlp"
        want = [n for n, m in model.named_modules() if part in n and isinstance(m, nn.Linear)]
        assert names == [f"{name}.bias" for name in want]
        assert flag in edit.summary()
        Edit(model, [*_eraser(32, seed=1).attach(model, sites="residual.0").patches])
    assert getattr(model.config, flag) is False


def test_the_global_generator_is_left_alone() -> None:
    model = tiny("llama")
    state = torch.get_rng_state()
    with _eraser(32).apply(model, sites="mlp.1"):
        pass
    assert torch.equal(state, torch.get_rng_state())


def test_biases_in_memory_are_a_choice() -> None:
    model = tiny("mistral")
    before, eraser = _bits(model), _eraser(32)
    for choice in ("auto", "refuse"):
        with pytest.raises(EditError, match="affine=False"):
            eraser.apply(model, sites="norm1.1", bias=choice)
    with eraser.attach(model, sites="norm1.1"):
        want = _logits(model)
    with eraser.apply(model, sites="norm1.1", bias="add") as edit:
        torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)
        assert "in memory only" in edit.summary()
        with pytest.raises(EditError, match="drop"):  # it is there, but would not be saved
            _eraser(32, seed=1).apply(model, sites="norm1.1")
    assert _same(model, before)
    with pytest.raises(ValueError, match="'auto', 'add' or 'refuse'"):
        eraser.apply(model, sites="norm1.1", bias="maybe")  # type: ignore[arg-type]


def test_refuse_adds_none_even_where_it_could() -> None:
    with pytest.raises(EditError, match="affine=False"):
        _eraser(32).apply(tiny("llama"), sites="mlp.1", bias="refuse")


def test_a_model_that_cannot_be_rebuilt_is_refused() -> None:
    model = tiny("llama")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(EditError, match="affine=False"):
        _eraser(32).apply(model, sites="mlp.1")


# -------------------------------------------------------------- several folds, one module


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("order", [("value.0", "mlp.0"), ("mlp.0", "value.0")])
def test_two_folds_on_one_module(kind: str, order: tuple[str, str]) -> None:
    model = _square(kind)
    before, eraser = _bits(model), _eraser(32)
    with eraser.attach(model, sites=order):
        want = _logits(model)
    with eraser.apply(model, sites=order):
        torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)
    assert _same(model, before)


def _square(kind: str) -> nn.Module:
    """A tiny model whose MLP is as wide as the residual stream."""
    model = tiny(kind)
    config = model.config
    setattr(config, "n_inner" if kind == "gpt2" else "intermediate_size", 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(config).eval()


def test_all_or_none_of_several_folds() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    before, config = _bits(model), _config(model)
    with pytest.raises(EditError, match="not finite"):
        _eraser(32).apply(model, sites=["attention.*", "mlp.*"])
    assert _same(model, before)
    assert _config(model) == config


# ------------------------------------------------------------------------- applied twice


def test_part_of_it_counts() -> None:
    model, eraser = tiny("llama"), _eraser(32)
    with eraser.attach(model, sites="residual.1"):
        with pytest.raises(EditError, match="in force"):
            eraser.attach(model, sites=["residual.1", "residual.2"])
        eraser.attach(model, sites="residual.2")
        _eraser(32, seed=1).attach(model, sites="residual.1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_counts(dtype: torch.dtype) -> None:
    model, eraser = tiny("llama"), _eraser(32)
    for copy in (eraser.to(dtype=dtype), eraser.to(dtype=dtype).to(dtype=torch.float64)):
        for one, other in ((eraser, copy), (copy, eraser)):
            with one.attach(model, sites="residual.1"), pytest.raises(EditError, match="in force"):
                other.with_space(None).attach(model, sites="residual.1")
    assert eraser.to(dtype=dtype).digest != eraser.digest


def test_another_name_counts() -> None:
    model, eraser = tiny("llama"), _eraser(32)
    names = ["mlp.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj"]
    for name in names:
        with eraser.attach(model, sites=name):
            for other in names:
                with pytest.raises(EditError, match="in force"):
                    eraser.attach(model, sites=other)
    with eraser.attach(model, sites=names) as edit:
        assert len(edit.patches) == 1
    with _eraser(32, affine=False).apply(model, sites=names[::-1]) as edit:
        assert len(edit.patches) == 1  # the one name that can be folded
    assert active_edits(model) == []


def test_two_names_are_hooked_once() -> None:
    model = tiny("llama")
    half = replace(_eraser(32), proj_left=_eraser(32).proj_left / 2)
    with half.attach(model, sites="residual.1"):
        want = _logits(model)
    with half.attach(model, sites=["residual.1", "model.layers.1"]):
        assert torch.equal(_logits(model), want)


def test_another_name_of_the_fitted_site() -> None:
    model = tiny("llama")
    eraser = _eraser(32).with_space(Space("tiny", fingerprint(model), "residual.1", "last", 32))
    eraser.attach(model, sites="model.layers.1").undo()
    with pytest.raises(SpaceError, match=r"residual\.1"):
        eraser.attach(model, sites="model.layers.2")


# ------------------------------------------------------------------ commits and lineage


def _pass(model: nn.Module) -> dict[str, LeaceEraser]:
    found = collect(model, TinyTokenizer(), TEXTS, LABELS, sites=["mlp.0", "mlp.2"], tokens="all")
    return {name: LeaceEraser.fit(one, affine=False) for name, one in found.items()}


def test_erasers_of_one_pass_outlive_a_commit() -> None:
    model = tiny("gpt2")
    erasers = _pass(model)
    before = fingerprint(model)
    erasers["mlp.0"].apply(model).commit()
    assert fingerprint(model) != before
    with erasers["mlp.2"].apply(model) as edit:
        assert edit.active
    later = collect(model, TinyTokenizer(), TEXTS, LABELS, sites="mlp.2", tokens="all")
    assert erasers["mlp.2"](later).z == later.z
    with pytest.raises(SpaceError, match="fitted in"):
        erasers["mlp.2"].attach(tiny("gpt2", seed=1))


# ----------------------------------------------------------------------- representations


def test_representations_keep_their_labels() -> None:
    model = tiny("llama")
    found = collect(model, TinyTokenizer(), TEXTS, LABELS, sites="residual.1", tokens="all")
    eraser = LeaceEraser.fit(found)
    clean = eraser(found)
    assert isinstance(clean, Representations)
    assert torch.equal(clean.x, eraser(found.x))
    assert clean.z == found.z
    assert clean.space == found.space
    assert clean.rows is found.rows
    bare = Representations(found.x, found.z)
    assert eraser(bare).space is None
    assert eraser.with_space(None)(found).space == found.space


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("fingerprint", "0" * 64, "000"), ("site", "residual.2", "residual.2")],
)
def test_representations_of_another_space(field: str, value: str, message: str) -> None:
    model = tiny("llama")
    found = collect(model, TinyTokenizer(), TEXTS, LABELS, sites="residual.1")
    assert found.space is not None
    eraser = LeaceEraser.fit(found)
    with pytest.raises(SpaceError, match=message):
        eraser(replace(found, space=replace(found.space, **{field: value})))
    narrow = replace(found, x=found.x[:, :5], space=replace(found.space, width=5))
    with pytest.raises(SpaceError, match="width"):
        eraser(narrow)
    with pytest.raises(ShapeError, match="5"):
        eraser(Representations(found.x[:, :5]))


# -------------------------------------------------------------------- the artefact itself


def test_the_map_is_in_one_place() -> None:
    eraser = RepresentationEraser(torch.ones(3, 1) / 3, torch.ones(1, 3), torch.arange(3.0))
    assert torch.allclose(eraser.P, torch.eye(3) - 1 / 3)
    assert torch.allclose(eraser(torch.arange(3.0)), torch.arange(3.0))
    assert RepresentationEraser._optional_tensors() == {"bias"}
    with pytest.raises(ShapeError, match="proj_left"):
        RepresentationEraser(torch.ones(3, 1), torch.ones(1, 4), None)._check()
    for kind in (LeaceEraser, SplinceEraser):
        assert issubclass(kind, RepresentationEraser)


def test_the_digest_covers_what_it_says() -> None:
    eraser = _eraser(6)
    others = [
        replace(eraser, config=LeaceConfig(strength=0.5)),
        replace(eraser, bias=None),
        replace(eraser, proj_left=eraser.proj_left.T, proj_right=eraser.proj_right.T),
        replace(eraser, proj_left=eraser.proj_left.view(torch.int64)),
        SplinceEraser(eraser.proj_left, eraser.proj_right, eraser.bias),
        eraser.to(dtype=torch.float32),
    ]
    digests = {eraser.digest, *(one.digest for one in others)}
    assert len(digests) == 1 + len(others)
    assert replace(eraser, report={}).digest == eraser.digest


def test_numpy_options_are_plain_numbers(tmp_path: Path) -> None:
    x, z = make_data(400, 6, 3, 0)
    eraser = LeaceEraser.fit(
        x, z, rank=np.int64(1), strength=np.float32(0.5), affine=np.bool_(True)
    )
    assert [type(v) for v in vars(eraser.config).values()] == [
        str,
        bool,
        str,
        int,
        type(None),
        float,
    ]
    noted = replace(eraser, report={"seen": np.float32(0.5), "n": torch.tensor(3)})
    noted.save_pretrained(tmp_path)
    again = Eraser.from_pretrained(tmp_path)
    assert again.config == eraser.config
    assert again.report == {"seen": 0.5, "n": 3}
    assert json.loads((tmp_path / "eraser_config.json").read_text())["digest"] == eraser.digest


# ------------------------------------------------- one model, with its head and without


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_base_is_the_same_model(kind: str) -> None:
    model, eraser = tiny(kind), _eraser(32)
    base = model.base_model
    for one, other in ((model, base), (base, model)):
        with eraser.attach(one, sites="residual.1"):
            with pytest.raises(EditError, match="in force"):
                eraser.attach(other, sites="residual.1")
            with eraser.attach(other, sites="residual.2"):
                pass
    before = _bits(model)
    first = eraser.apply(model, sites="attention.1")
    second = _eraser(32, seed=1).apply(base, sites="attention.1")
    with pytest.raises(EditError, match="first"):
        first.undo()
    second.undo()
    first.undo()
    assert _same(model, before)


def test_a_copy_counts_after_saving(tmp_path: Path) -> None:
    x, z = make_data(400, 32, 3, 0)
    model, half = tiny("llama"), LeaceEraser.fit(x, z, strength=0.5)
    narrow = half.to(dtype=torch.float32)
    narrow.save_pretrained(tmp_path / "narrow")
    half.save_pretrained(tmp_path / "half")
    again = Eraser.from_pretrained(tmp_path / "narrow")
    again.to(dtype=torch.float64).save_pretrained(tmp_path / "twice")
    twice = Eraser.from_pretrained(tmp_path / "twice")
    for copy in (again, twice, Eraser.from_pretrained(tmp_path / "half")):
        assert isinstance(copy, LeaceEraser)
        for one, other in ((half, copy), (copy, half)):
            with (
                one.attach(model, sites="residual.1"),
                pytest.raises(EditError, match="in force"),
            ):
                other.attach(model, sites="residual.1")
    record = json.loads((tmp_path / "narrow" / "eraser_config.json").read_text())
    assert record["identity"] == half.digest != record["digest"]
    assert "identity" not in json.loads((tmp_path / "half" / "eraser_config.json").read_text())
    for wrong in (None, 3, "text", half.digest.upper() + "0"):
        config = tmp_path / "narrow" / "eraser_config.json"
        config.write_text(json.dumps({**record, "identity": wrong}))
        with pytest.raises(FormatError, match="identity"):
            Eraser.from_pretrained(tmp_path / "narrow")


# ----------------------------------------------------------------------------- token rules


def test_representations_of_another_token_rule() -> None:
    model = tiny("llama")
    found = {
        rule: collect(model, TinyTokenizer(), TEXTS, LABELS, sites="residual.1", tokens=rule)
        for rule in ("last", "first", "mean", "all")
    }
    for rule, data in found.items():
        eraser = LeaceEraser.fit(data)
        for other, vectors in found.items():
            if rule in (other, "all"):
                assert torch.equal(eraser(vectors).x, eraser(vectors.x))
                continue
            with pytest.raises(
                SpaceError, match=rf"'{rule}', not on tokens='{other}'.*with_space\(None\)"
            ):
                eraser(vectors)
            assert torch.equal(eraser.with_space(None)(vectors).x, eraser(vectors.x))


def test_all_tokens_and_their_mean() -> None:
    """Why an eraser of all tokens may have the means: it erases them as it does in the model."""
    model, options = tiny("llama"), {"sites": "residual.1", "dtype": torch.float64}
    every = collect(model, TinyTokenizer(), TEXTS, LABELS, tokens="all", **options)
    means = collect(model, TinyTokenizer(), TEXTS, LABELS, tokens="mean", **options)
    eraser = LeaceEraser.fit(every)
    clean, rows = eraser(every.x), every.rows
    assert rows is not None
    want = torch.stack([clean[rows == i].mean(0) for i in range(len(TEXTS))])
    torch.testing.assert_close(eraser(means).x, want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ arrays and tables


def test_an_array_for_an_array() -> None:
    x, z = make_data(400, 6, 3, 0)
    eraser = LeaceEraser.fit(x.numpy(), z.numpy())
    want = eraser(x)
    got = eraser(x.numpy())
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float64
    assert np.array_equal(got, want.numpy())
    narrow = eraser(x.numpy().astype(np.float32).reshape(4, 100, 6))
    assert narrow.dtype == np.float32
    assert narrow.shape == (4, 100, 6)
    whole = np.arange(12).reshape(2, 6)
    assert eraser(whole).dtype == np.float64
    assert np.allclose(eraser(whole), eraser(whole.astype(np.float64)))
    assert np.allclose(eraser(whole.tolist()), eraser(whole))
    with pytest.raises(ShapeError, match="5"):
        eraser(x.numpy()[:, :5])
    with pytest.raises(TypeError, match="floating point"):
        eraser(whole * 1j)
    with pytest.raises(TypeError, match="NoneType"):
        eraser(None)  # type: ignore[call-overload]


def test_an_array_for_a_table() -> None:
    x, z = make_data(400, 6, 3, 0)
    table = pd.DataFrame(x.numpy(), columns=list("abcdef"))
    eraser = LeaceEraser.fit(table, pd.Series(z.numpy()))
    before = table.copy()
    got = eraser(table)
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, eraser(x).numpy())
    assert table.equals(before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"floating point.*got torch\..*x\.double\(\)"):
        _eraser(6)(torch.ones(2, 6).to(dtype))


# ------------------------------------------------------------------ linear modules by path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_eraser_folds_at_a_linear_module(kind: str) -> None:
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.attn.c_proj"}[kind]
    model = tiny(kind)
    found = collect(model, TinyTokenizer(), TEXTS, LABELS, sites=name, tokens="all")
    eraser = LeaceEraser.fit(found)
    before = _bits(model)
    with eraser.attach(model):
        want = _logits(model)
    with eraser.apply(model):
        torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)
    assert _same(model, before)


def test_a_linear_module_that_shares_its_weight_is_not_folded() -> None:
    model = tiny("qwen2")  # the head is tied to the embedding
    with pytest.raises(EditError, match="not be exact"):
        _eraser(128, affine=False).apply(model, sites="lm_head")
    with pytest.raises(EditError, match="not be exact"):
        _eraser(32, affine=False).apply(model, sites="model.layers.1")


# ------------------------------------------------------------------------- where bias goes


def test_add_uses_the_setting_where_there_is_one(tmp_path: Path) -> None:
    model, eraser = tiny("llama"), _eraser(32)
    with eraser.attach(model, sites="mlp.1"):
        want = _logits(model)
    eraser.apply(model, sites="mlp.1", bias="add").commit()
    assert model.config.mlp_bias is True
    again = _reloaded(model, tmp_path)
    torch.testing.assert_close(_logits(again), want, rtol=1e-4, atol=1e-4)
