from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.linear.oracle import OracleEraser, OracleFitter, oracle_coefficients
from concept_erasure.sites import Space


def blobs(n: int = 600, d: int = 8, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, k, (n,), generator=g)
    centers = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    return centers[z] + torch.randn(n, d, generator=g, dtype=torch.float64) + 5, z


@pytest.mark.parametrize("k", [2, 3, 5])
def test_class_means_meet_at_the_global_mean(k: int) -> None:
    x, z = blobs(k=k)
    out = OracleEraser.fit(x, z)(x, z)
    for label in range(k):
        torch.testing.assert_close(out[z == label].mean(0), x.mean(0))


def test_integers_and_one_hot_give_the_same() -> None:
    x, z = blobs()
    one_hot = torch.nn.functional.one_hot(z)
    by_id = OracleEraser.fit(x, z)
    torch.testing.assert_close(by_id(x, z), OracleEraser.fit(x, one_hot)(x, one_hot))
    torch.testing.assert_close(by_id(x, z), by_id(x, one_hot))


def test_sparse_class_ids() -> None:
    x, z = blobs()
    eraser = OracleEraser.fit(x, z * 10 + 3)
    assert eraser.classes == ("3", "13", "23")
    torch.testing.assert_close(eraser(x, z * 10 + 3), OracleEraser.fit(x, z)(x, z))
    with pytest.raises(ValueError, match=r"unknown labels \['4'\]"):
        eraser(x[:1], torch.tensor([4]))


def test_a_rare_class_is_erased() -> None:
    x, _ = blobs(n=4000)
    z = torch.zeros(4000, dtype=torch.int64)
    z[:8] = 1
    x[:8] += 3
    out = OracleEraser.fit(x, z)(x, z)
    torch.testing.assert_close(out[z == 1].mean(0), out[z == 0].mean(0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_of_z_do_not_matter(scale: float) -> None:
    x, labels = blobs()
    z = torch.stack([labels.double(), x[:, 0].sin()], 1)
    scaled = z * torch.tensor([1.0, scale])
    expected = OracleEraser.fit(x, z)(x, z)
    torch.testing.assert_close(OracleEraser.fit(x, scaled)(x, scaled), expected)


def test_residual_is_uncorrelated_with_continuous_z() -> None:
    x, _ = blobs()
    z = x[:, :2] + x[:, 2:4].square()
    out = OracleEraser.fit(x, z)(x, z)
    cross = (out - out.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert cross.abs().max() < 1e-10


def test_batches_merge_and_order_do_not_matter() -> None:
    x, z = blobs()
    whole = OracleFitter(8, 3).update(x, z).eraser
    parts = OracleFitter(8, 3).update(x[:7], z[:7])
    other = OracleFitter(8, 3).update(x[300:], z[300:]).update(x[7:300], z[7:300])
    torch.testing.assert_close(parts.merge(other).eraser(x, z), whole(x, z))
    assert parts.n == len(x)


def test_dtype_and_shape_are_kept_and_input_is_not_changed() -> None:
    x, z = blobs()
    low = x.to(torch.bfloat16).view(20, 30, 8)
    before = low.clone()
    out = OracleEraser.fit(low, z.view(20, 30))(low, z.view(20, 30))
    assert out.dtype == torch.bfloat16
    assert out.shape == low.shape
    assert torch.equal(low, before)


def test_to_keeps_the_classes() -> None:
    x, z = blobs()
    eraser = OracleEraser.fit(x, z).to("cpu", torch.float32)
    assert eraser.coef.dtype == torch.float32
    assert eraser.classes == ("0", "1", "2")


@pytest.mark.parametrize("k", [2, 3])
def test_save_and_load(k: int, tmp_path: Path) -> None:
    x, z = blobs(k=k)
    eraser = OracleEraser.fit(x, z)
    assert cast("float", eraser.report["residual"]) < 1e-12
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, OracleEraser)
    assert torch.equal(loaded(x, z), eraser(x, z))


def test_coefficients_of_collinear_columns() -> None:
    x, z = blobs()
    one_hot = torch.nn.functional.one_hot(z).double()
    fitter = OracleFitter(8, 3).update(x, one_hot)
    coef = oracle_coefficients(fitter.sigma_xz, fitter.sigma_zz)
    torch.testing.assert_close(coef @ fitter.sigma_zz, fitter.sigma_xz)


def test_bad_input_raises() -> None:
    x, z = blobs()
    with pytest.raises(ShapeError, match="600 rows and z has 599 labels"):
        OracleEraser.fit(x, z[:-1])
    with pytest.raises(ValueError, match="at least 2 rows"):
        OracleEraser.fit(x[:0], z[:0])
    with pytest.raises(NotFittedError, match="at least 2 rows"):
        _ = OracleFitter(8, 2).eraser
    with pytest.raises(ValueError, match="svd_tol"):
        OracleFitter(8, 2, svd_tol=0.0)
    with pytest.raises(ShapeError, match="width 8"):
        OracleEraser.fit(x, z)(x[:, :3], z)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        OracleEraser.fit(x, z)


def test_constant_label_warns() -> None:
    x, z = blobs()
    with pytest.warns(ErasureWarning, match="identity"):
        eraser = OracleEraser.fit(x, torch.zeros_like(z))
    assert torch.equal(eraser(x, torch.zeros_like(z)), x)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("kind", ["list", "numpy"])
def test_string_labels_survive_saving(k: int, kind: str, tmp_path: Path) -> None:
    x, z = blobs(k=k)
    names = [["cat", "axolotl", "dog"][i] for i in z.tolist()]
    labels = names if kind == "list" else np.array(names)
    eraser = OracleEraser.fit(x, labels)
    assert eraser.classes == tuple(sorted(set(names)))
    torch.testing.assert_close(eraser(x, labels), OracleEraser.fit(x, z)(x, z))
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, OracleEraser)
    assert loaded.config == eraser.config
    assert torch.equal(loaded(x[:5], names[:5]), eraser(x[:5], names[:5]))
    with pytest.raises(ValueError, match=r"unknown labels \['bird'\]"):
        loaded(x[:1], ["bird"])


def test_two_integers_stay_one_number_and_flags_are_the_same() -> None:
    x, z = blobs(k=2)
    eraser = OracleEraser.fit(x, z)
    assert eraser.coef.shape == (8, 1)
    torch.testing.assert_close(eraser(x, z == 1), eraser(x, z))
    torch.testing.assert_close(OracleEraser.fit(x, (z == 1).tolist())(x, z), eraser(x, z))


def test_strings_are_streamed_with_named_classes() -> None:
    x, z = blobs()
    names = [f"c{i}" for i in z.tolist()]
    fitter = OracleFitter(8, 3, classes=["c0", "c1", "c2"])
    fitter.update(x[:100], names[:100]).update(x[100:], names[100:])
    torch.testing.assert_close(fitter.eraser(x, names), OracleEraser.fit(x, z)(x, z))
    with pytest.raises(ValueError, match="disagree on classes"):
        fitter.merge(OracleFitter(8, 3))
    with pytest.raises(ShapeError, match="2 classes"):
        OracleFitter(8, 3, classes=["a", "b"])


def test_labels_of_texts_are_repeated_over_their_tokens() -> None:
    x, _ = blobs()
    texts = ["abc"[i % 3] for i in range(20)]
    tokens = [name for name in texts for _ in range(30)]
    whole = OracleEraser.fit(x.view(20, 30, 8), texts)
    torch.testing.assert_close(
        whole(x.view(20, 30, 8), texts).view(-1, 8), OracleEraser.fit(x, tokens)(x, tokens)
    )


def test_representations_give_labels_and_space() -> None:
    x, z = blobs()
    space = Space("m", "f", "residual.1", "last", 8)
    names = [f"c{i}" for i in z.tolist()]
    eraser = OracleEraser.fit(Representations(x, names, space))
    assert eraser.space == space
    torch.testing.assert_close(eraser(x, names), OracleEraser.fit(x, z)(x, z))


def test_several_concepts_are_refused() -> None:
    x, z = blobs()
    with pytest.raises(ValueError, match="2 concepts"):
        OracleEraser.fit(x, {"a": z, "b": z})
    one = OracleEraser.fit(x, {"a": z})
    torch.testing.assert_close(one(x, z), OracleEraser.fit(x, z)(x, z))
