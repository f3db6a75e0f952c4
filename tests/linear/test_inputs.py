"""What users really pass: each row of the misuse table and of the issue's list, and its message."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_erasure.errors import (
    EditError,
    ErasureWarning,
    ShapeError,
    SiteNotFoundError,
    SpaceError,
)
from concept_erasure.linear import leace
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.testing import ToyModel
from tests.linear.samples import class_gap, one_hot, sample

N, D = 500, 8


# ------------------------------------------------------------------- the misuse table


def test_integer_labels_are_classes_unless_told() -> None:
    x, z = sample(N, D, 3)
    assert class_gap(LeaceEraser.fit(x, z)(x), z) <= 1e-12 * class_gap(x, z)
    number = LeaceEraser.fit(x, z, z_kind="continuous")
    assert class_gap(number(x), z) > 0.05 * class_gap(x, z)


def test_rare_label_is_erased() -> None:
    x, _ = sample(20_000, D, 2)
    z = torch.zeros(20_000, dtype=torch.long)
    z[:20] = 1
    assert class_gap(LeaceEraser.fit(x, z)(x), z) <= 1e-10 * class_gap(x, z)


def test_promise_not_met_warns_with_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leace, "remaining_gap", lambda *_: 0.125)
    with pytest.warns(ErasureWarning, match=r"1\.25e-01"):
        LeaceEraser.fit(*sample(N, D, 4))


def test_a_rank_that_was_asked_for_is_reported_not_warned_about() -> None:
    x, z = sample(N, D, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = LeaceEraser.fit(x, z, rank=1).report
    assert float(str(report["residual"])) > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_says_how_many_and_where(value: float) -> None:
    x, z = sample(N, D, 2)
    x[37, 2] = x[37, 3] = x[101, 0] = value
    with pytest.raises(ValueError, match=r"(?s)(3|2).*37"):
        LeaceEraser.fit(x, z)


def test_not_finite_labels() -> None:
    x, _ = sample(N, D, 2)
    z = x[:, 0].clone()
    z[41] = float("nan")
    with pytest.raises(ValueError, match="41"):
        LeaceEraser.fit(x, z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_accepted(dtype: torch.dtype) -> None:
    x, z = sample(N, D, 3)
    eraser = LeaceEraser.fit(x.to(dtype), z)
    assert eraser(x.to(dtype)).dtype == dtype


def test_batch_and_sequence_with_mask() -> None:
    x, z = sample(N, D, 2)
    mask = torch.arange(N).reshape(50, 10) % 10 != 9
    eraser = LeaceEraser.fit(x.reshape(50, 10, D), z.reshape(50, 10), mask=mask)
    kept = mask.flatten()
    assert class_gap(eraser(x[kept]), z[kept]) <= 1e-12 * class_gap(x, z)


def test_mask_of_another_shape() -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(ShapeError, match="mask"):
        LeaceEraser.fit(x.reshape(50, 10, D), z.reshape(50, 10), mask=torch.ones(50, 9).bool())


@pytest.mark.parametrize("kind", ["integers", "one-hot", "strings"])
def test_z_one_row_short_names_both_lengths(kind: str) -> None:
    x, z = sample(N, D, 2)
    short = {"integers": z[:-1], "one-hot": one_hot(z, 2)[:-1], "strings": ["a", "b"] * 249 + ["a"]}
    with pytest.raises(ShapeError, match=r"(?s)(500.*499|499.*500)"):
        LeaceEraser.fit(x, short[kind])


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(rows: int) -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(ValueError, match=str(rows)):
        LeaceEraser.fit(x[:rows], z[:rows])


def test_all_rows_masked() -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(ValueError, match="0"):
        LeaceEraser.fit(x, z, mask=torch.zeros(N, dtype=torch.bool))


@pytest.mark.parametrize("label", ["integer", "string", "float", "one-hot"])
def test_constant_label_warns_and_is_the_identity(label: str) -> None:
    x, _ = sample(N, D, 2)
    z = {
        "integer": torch.ones(N, dtype=torch.long),
        "string": ["same"] * N,
        "float": torch.full((N,), 0.1, dtype=torch.float64),
        "one-hot": one_hot(torch.zeros(N, dtype=torch.long), 2),
    }[label]
    with pytest.warns(ErasureWarning, match="(?i)constant|one value|one class|single"):
        eraser = LeaceEraser.fit(x, z)
    assert torch.equal(eraser(x), x)


# ------------------------------------------------------------------- kinds of labels


def _names(z: torch.Tensor) -> list[str]:
    return [["cat", "dog", "axolotl"][i] for i in z.tolist()]


@pytest.mark.parametrize("kind", ["list", "numpy", "pandas", "category", "object"])
def test_string_labels(kind: str) -> None:
    x, z = sample(N, D, 3)
    names = _names(z)
    pandas = pytest.importorskip("pandas")
    labels = {
        "list": names,
        "numpy": np.array(names),
        "pandas": pandas.Series(names, index=range(7, 7 + N)),
        "category": pandas.Series(names).astype("category"),
        "object": np.array(names, dtype=object),
    }[kind]
    want = LeaceEraser.fit(x, z)
    assert torch.allclose(LeaceEraser.fit(x, labels)(x), want(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["tensor", "list", "numpy", "pandas"])
def test_bool_labels(kind: str) -> None:
    x, z = sample(N, D, 2)
    flags = z == 1
    pandas = pytest.importorskip("pandas")
    labels = {
        "tensor": flags,
        "list": flags.tolist(),
        "numpy": flags.numpy(),
        "pandas": pandas.Series(flags.tolist()),
    }[kind]
    want = LeaceEraser.fit(x, z)
    assert torch.allclose(LeaceEraser.fit(x, labels)(x), want(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.float64])
def test_one_hot_labels(dtype: torch.dtype) -> None:
    x, z = sample(N, D, 3)
    want = LeaceEraser.fit(x, z)
    got = LeaceEraser.fit(x, one_hot(z, 3).to(dtype))
    assert torch.allclose(got(x), want(x), rtol=0, atol=1e-10)


def test_float_labels_are_numbers() -> None:
    x, _ = sample(N, D, 2)
    z = x[:, 0] * 2 + x[:, 1] ** 2
    eraser = LeaceEraser.fit(x, z)
    out = eraser(x)
    assert eraser.map.rank == 1
    cross = (out - out.mean(0)).T @ (z - z.mean()) / N
    assert cross.norm() <= 1e-11 * ((x - x.mean(0)).T @ (z - z.mean()) / N).norm()


def test_integers_with_gaps_and_negatives() -> None:
    x, z = sample(N, D, 3)
    odd = torch.tensor([-7, 10**9, 3])[z]
    want = LeaceEraser.fit(x, z)
    assert torch.allclose(LeaceEraser.fit(x, odd)(x), want(x), rtol=0, atol=1e-10)


def test_column_of_integers_is_a_vector() -> None:
    x, z = sample(N, D, 3)
    want = LeaceEraser.fit(x, z)
    assert torch.allclose(LeaceEraser.fit(x, z[:, None])(x), want(x), rtol=0, atol=1e-10)


def test_unknown_z_kind() -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(ValueError, match="continuous.*nonsense|nonsense.*continuous"):
        LeaceEraser.fit(x, z, z_kind="nonsense")


def test_missing_labels_in_a_list() -> None:
    x, z = sample(N, D, 2)
    labels: list[str | None] = [*_names(z)]
    labels[13] = None
    with pytest.raises((ValueError, TypeError), match="(?i)none|missing|13"):
        LeaceEraser.fit(x, labels)


# ------------------------------------------------------------------ kinds of features


def test_numpy_features() -> None:
    x, z = sample(N, D, 2)
    eraser = LeaceEraser.fit(x.numpy(), z.numpy())
    assert torch.allclose(eraser(x), LeaceEraser.fit(x, z)(x), rtol=0, atol=1e-12)


def test_pandas_features() -> None:
    pandas = pytest.importorskip("pandas")
    x, z = sample(N, D, 2)
    frame = pandas.DataFrame(x.numpy(), columns=list("abcdefgh"), index=range(3, N + 3))
    eraser = LeaceEraser.fit(frame, pandas.Series(z.numpy()))
    assert torch.allclose(eraser(x), LeaceEraser.fit(x, z)(x), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_on_another_device() -> None:
    x, z = sample(N, D, 2)
    eraser = LeaceEraser.fit(x.cuda(), z)
    assert eraser(x.cuda()).is_cuda
    assert torch.allclose(eraser(x.cuda()).cpu(), LeaceEraser.fit(x, z)(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", ["text", None, 3, {"a": 1}])
def test_features_of_no_use(bad: object) -> None:
    _, z = sample(N, D, 2)
    with pytest.raises((TypeError, ShapeError), match="x must"):
        LeaceEraser.fit(bad, z)


def test_complex_features_are_refused() -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(TypeError, match="complex"):
        LeaceEraser.fit(torch.complex(x, x), z)


def test_integer_features_are_refused_or_right() -> None:
    x, z = sample(N, D, 2)
    rounded = (x * 100).long()
    try:
        eraser = LeaceEraser.fit(rounded, z)
    except TypeError as error:
        assert "int64" in str(error)
    else:
        assert class_gap(eraser(rounded.double()), z) <= 1e-11 * class_gap(rounded.double(), z)


def test_one_dimension_is_refused() -> None:
    _, z = sample(N, D, 2)
    with pytest.raises(ShapeError, match="500"):
        LeaceEraser.fit(torch.zeros(N), z)


def test_more_features_than_rows() -> None:
    x, z = sample(20, 64, 2)
    assert class_gap(LeaceEraser.fit(x, z)(x), z) <= 1e-11 * class_gap(x, z)


def test_duplicated_features() -> None:
    x, z = sample(N, D, 2)
    twice = torch.cat([x, x], 1)
    for shrinkage in (True, False):
        out = LeaceEraser.fit(twice, z, shrinkage=shrinkage)(twice)
        assert class_gap(out, z) <= 1e-11 * class_gap(twice, z)
        assert torch.allclose(out[:, :D], out[:, D:], rtol=0, atol=1e-8)


def test_wrong_width_when_erasing() -> None:
    x, z = sample(N, D, 2)
    with pytest.raises(ShapeError, match="(?s)8.*9|9.*8"):
        LeaceEraser.fit(x, z)(torch.zeros(3, 9))


@pytest.mark.parametrize(
    "option",
    [
        {"method": "nonsense"},
        {"rank": 0},
        {"rank": -1},
        {"svd_tol": -1.0},
        {"shrinkage": "nonsense"},
        {"strength": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range(option: dict[str, object]) -> None:
    x, z = sample(N, D, 2)
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"(?s){name}|{value}"):
        LeaceEraser.fit(x, z, **option)


# ------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("where", ["x", "z"])
def test_bad_batch_of_a_stream_leaves_no_trace(where: str) -> None:
    x, z = sample(N, D, 2)
    target = one_hot(z, 2)
    fitter = LeaceFitter(D, 2).update(x[:200], target[:200])
    bad_x, bad_z = x[200:300].clone(), target[200:300].clone()
    (bad_x if where == "x" else bad_z)[17, 1] = float("nan")
    with pytest.raises(ValueError, match="17" if where == "x" else "z .*not finite"):
        fitter.update(bad_x, bad_z)
    fitter.update(x[300:], target[300:])
    want = LeaceFitter(D, 2).update(x[:200], target[:200]).update(x[300:], target[300:])
    assert torch.equal(fitter.eraser(x), want.eraser(x))


def test_batch_of_another_width() -> None:
    x, z = sample(N, D, 2)
    fitter = LeaceFitter(D, 2).update(x, one_hot(z, 2))
    with pytest.raises(ShapeError, match="(?s)8.*7|7.*8"):
        fitter.update(x[:, :7], one_hot(z, 2))
    with pytest.raises(ShapeError, match="(?s)2.*3|3.*2"):
        fitter.update(x, torch.zeros(N, 3, dtype=torch.float64))


def test_merge_of_another_width() -> None:
    with pytest.raises(ShapeError, match="(?s)8.*9|9.*8"):
        LeaceFitter(D, 2).merge(LeaceFitter(9, 2))


# ---------------------------------------------------------------------------- models


def _in_model() -> tuple[LeaceEraser, ToyModel]:
    model = ToyModel(D)
    x, z = sample(N, D, 2)
    with torch.no_grad():
        return LeaceEraser.fit(model.block(model.encoder(x)), z), model


def test_another_space_is_refused() -> None:
    from concept_erasure.collect import Representations
    from concept_erasure.sites import Space, fingerprint

    model, other = ToyModel(D), ToyModel(D, seed=1)
    x, z = sample(N, D, 2)
    with torch.no_grad():
        states = model.block(model.encoder(x))
    space = Space(model="toy", fingerprint=fingerprint(model), site="block", tokens="all", width=D)
    eraser = LeaceEraser.fit(Representations(x=states, z=z, space=space))
    assert eraser.space == space
    with eraser.attach(model):
        pass
    with pytest.raises(SpaceError, match="block|toy|fingerprint"):
        eraser.attach(other)
    with pytest.raises(SpaceError, match="encoder"):
        eraser.attach(model, sites=["encoder"])
    wrong = replace(space, width=D + 1)
    with pytest.raises((SpaceError, ShapeError)):
        LeaceEraser.fit(Representations(x=states, z=z, space=wrong)).attach(model)


def test_representations_need_labels() -> None:
    from concept_erasure.collect import Representations

    x, z = sample(N, D, 2)
    want = LeaceEraser.fit(x, z)(x)
    with_labels = LeaceEraser.fit(Representations(x=x, z=z, space=None))
    assert torch.equal(with_labels(x), want)
    with pytest.raises((ValueError, TypeError), match="z|label"):
        LeaceEraser.fit(Representations(x=x, z=None, space=None))
    with pytest.raises((ValueError, TypeError), match="z|label"):
        LeaceEraser.fit(x)


def test_bare_vectors_need_a_site() -> None:
    eraser, model = _in_model()
    with pytest.raises((SpaceError, ValueError), match="sites"):
        eraser.attach(model)


def test_a_site_of_another_width() -> None:
    x, z = sample(N, D + 1, 2)
    model = ToyModel(D)
    eraser = LeaceEraser.fit(x, z)
    with pytest.raises((ShapeError, SpaceError), match="(?s)8.*9|9.*8"):
        eraser.attach(model, sites=["block"])


def test_edit_that_matches_nothing() -> None:
    eraser, model = _in_model()
    for sites in (["blok"], ["nothing.*"], []):
        with pytest.raises((SiteNotFoundError, ValueError, EditError)):
            eraser.attach(model, sites=sites)
    with pytest.raises(SiteNotFoundError, match="block"):
        eraser.attach(model, sites=["blok"])


def test_undo_out_of_order() -> None:
    eraser, model = _in_model()
    first = eraser.attach(model, sites=["block"])
    second = eraser.attach(model, sites=["encoder"])
    with pytest.raises(EditError, match="order|later|last|first"):
        first.undo()
    second.undo()
    first.undo()


def test_twice_at_one_site_is_refused() -> None:
    eraser, model = _in_model()
    edit = eraser.attach(model, sites=["block"])
    with pytest.raises(EditError, match="block|undo|commit|already"):
        eraser.attach(model, sites=["block"])
    edit.undo()
    eraser.attach(model, sites=["block"]).undo()


def test_good_data_do_not_warn() -> None:
    x, z = sample(N, D, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LeaceEraser.fit(x, z)
