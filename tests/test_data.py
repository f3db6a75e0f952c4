"""One way to read x and z: shapes, kinds, scales and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import class_indices, labels_per_row, read_data
from concept_erasure.errors import ShapeError
from concept_erasure.sites import Space

TEXTS = ["b", "a", "b"]
GRID = [["b", "a"], ["a", "a"], ["b", "b"]]
X = torch.arange(12.0).reshape(3, 2, 2)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_text_labels_of_sequences(kind: type) -> None:
    _, repeated, _ = read_data(X, kind(TEXTS))
    assert repeated.values.tolist() == [1, 1, 0, 0, 1, 1]
    assert repeated.names == ("a", "b")
    _, flat, _ = read_data(X, kind(GRID))
    assert flat.values.tolist() == [1, 0, 0, 0, 1, 1]
    _, given, _ = read_data(X, kind([v for row in GRID for v in row]))
    assert given.values.tolist() == flat.values.tolist()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_number_labels_of_sequences(kind: type) -> None:
    _, repeated, _ = read_data(X, kind([7, 3, 7]))
    assert repeated.values.tolist() == [1, 1, 0, 0, 1, 1]
    _, flat, _ = read_data(X, kind([[7, 3], [3, 3], [7, 7]]))
    assert flat.values.tolist() == [1, 0, 0, 0, 1, 1]
    _, columns, _ = read_data(X, kind(torch.ones(3, 2, 4).tolist()))
    assert columns.values.shape == (6, 4)


def test_tables_of_sequences() -> None:
    pandas = pytest.importorskip("pandas")
    for z in ({"a": TEXTS, "b": [0.5, 1, 2]}, pandas.DataFrame({"a": TEXTS, "b": [0.5, 1, 2]})):
        _, labels, _ = read_data(X, z)
        assert labels.values[:, 2].tolist() == [0.5, 0.5, 1, 1, 2, 2]
        assert labels.values[:, 1].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("z", [["a", "b"], GRID[:2], [["a", "b"], ["a"], ["b", "b"]], [1, 2]])
def test_labels_that_do_not_fit_the_sequences(z: object) -> None:
    with pytest.raises(ShapeError):
        read_data(X, z)


def test_deeper_batches() -> None:
    lead = torch.Size([2, 3, 4])
    assert len(labels_per_row(["a", "b"], lead)) == 24  # type: ignore[arg-type]
    z = labels_per_row(torch.arange(6).reshape(2, 3), lead)
    assert isinstance(z, Tensor)
    assert z.tolist() == [i for i in range(6) for _ in range(4)]


def test_sparse_and_complex_are_refused() -> None:
    scipy = pytest.importorskip("scipy.sparse")
    x = torch.eye(4)
    for bad in (x.to_sparse(), scipy.csr_matrix(x.numpy())):
        with pytest.raises(TypeError, match=r"x is sparse.*dense"):
            read_data(bad, [0, 1, 0, 1])
    with pytest.raises(TypeError, match="z is sparse"):
        read_data(x, x.to_sparse())
    for bad in (x + 1j, (x + 1j).numpy()):
        with pytest.raises(TypeError, match="x is complex"):
            read_data(bad, [0, 1, 0, 1])


@pytest.mark.parametrize(("scale", "verb"), [(1e200, "overflow"), (1e-200, "vanish")])
def test_squares_must_stay_in_range(scale: float, verb: str) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.arange(20) % 2
    with pytest.raises(ValueError, match=f"squares {verb} in float64; rescale x"):
        read_data(x * scale, z)
    x[3, 1] = float("nan")  # it may be masked out, so only the others count here
    with pytest.raises(ValueError, match=verb):
        read_data(x * scale, z)


@pytest.mark.parametrize("scale", [1e-100, 1e-20, 1e20, 1e100, 0.0])
def test_scales_in_range_are_read(scale: float) -> None:
    x = torch.ones(4, 2, dtype=torch.float64) * scale
    assert torch.equal(read_data(x, [0, 1, 0, 1])[0], x)


def test_empty_labels_and_rows() -> None:
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match="z has no columns"):
        read_data(x, torch.zeros(4, 0))
    with pytest.raises(ValueError, match="at least 2 rows are needed to fit; got 1"):
        read_data(x[:1], [0])
    with pytest.raises(ShapeError, match="x has no columns"):
        read_data(x[:, :0], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="labels are missing"):
        read_data(x, None)
    with pytest.raises(ValueError, match="meta"):
        read_data(x.to("meta"), [0, 1, 0, 1])


def test_x_is_blamed_before_labels_made_from_it() -> None:
    x = torch.ones(4, 2)
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="x has 1 rows that are not finite; the first is row 2"):
        read_data(x, x[:, 0])
    assert read_data(x, [0, 1, 0, 1])[0] is x  # may be masked out


def test_representations_carry_their_labels_and_space() -> None:
    space = Space("m", "f", "residual.1", "last", 2)
    given = Representations(torch.ones(3, 2), TEXTS, space)
    _, labels, found = read_data(given, None)
    assert labels.names == ("a", "b")
    assert found is space
    assert read_data(given, [1, 2, 3])[1].names == ("1", "2", "3")


def test_class_indices() -> None:
    lead = torch.Size([3])
    assert class_indices(TEXTS, lead, ["b", "a"]).tolist() == [0, 1, 0]
    assert class_indices([1, 0, 1], lead, ["False", "True"]).tolist() == [1, 0, 1]
    assert class_indices([True, False, True], lead, ["0", "1"]).tolist() == [1, 0, 1]
    assert class_indices(torch.tensor([8.0, 2, 8]), lead, ["2", "8"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="unknown labels"):
        class_indices([2, 0, 1], lead, ["False", "True"])
