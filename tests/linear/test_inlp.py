from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from concept_erasure import registry
from concept_erasure.collect import Representations
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ErasureWarning, ShapeError
from concept_erasure.linear.inlp import InlpEraser
from concept_erasure.linear.mean_projection import MeanProjectionEraser
from concept_erasure.linear.sal import SalEraser
from concept_erasure.logistic import class_entropy, fit_logistic
from tests.linear.samples import edit_size, sample

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "word_vectors.npz"


def noisy(rows: int = 600, width: int = 10, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes that overlap, 30 % of one."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(rows, generator=g) < 0.3).long()
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64) @ mix
    return x + z[:, None] * torch.randn(width, generator=g, dtype=torch.float64) + 5, z


def numbers(eraser: InlpEraser, key: str) -> list[float]:
    return cast("list[float]", eraser.report[key])


def number(eraser: InlpEraser, key: str) -> float:
    return cast("float", eraser.report[key])


def test_is_an_orthogonal_projection_that_keeps_the_mean() -> None:
    x, z = sample(480, 12, 3)
    eraser = InlpEraser.fit(x, z, n_classifiers=3)
    p, left = eraser.P, eraser.proj_left
    assert eraser.report["rank"] == left.shape[1] == 6  # C - 1 a round
    torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=x.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.T)
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0))
    assert eraser.report["edit_size"] == pytest.approx(
        edit_size(x, eraser(x)) / float((x - x.mean(0)).square().sum(1).mean())
    )


def test_log_loss_rises_to_the_entropy_and_stops() -> None:
    x, z = noisy()
    eraser = InlpEraser.fit(x, z)
    loss = numbers(eraser, "log_loss")
    assert loss == sorted(loss)
    assert number(eraser, "log_loss_after") >= loss[-2]
    entropy = class_entropy(z, 2)
    assert number(eraser, "entropy") == entropy
    assert number(eraser, "log_loss_after") == pytest.approx(entropy, abs=2e-4)
    assert eraser.report["stopped"] == "log-loss"
    assert number(eraser, "majority") == pytest.approx(float((z == 0).double().mean()))
    assert len(loss) == len(numbers(eraser, "accuracy")) == eraser.report["rounds"]


def test_removes_more_than_one_closed_form_direction() -> None:
    x, z = noisy()
    eraser, mean = InlpEraser.fit(x, z), MeanProjectionEraser.fit(x, z)
    assert number(eraser, "rank") > 1
    assert number(eraser, "edit_size") > cast("float", mean.report["edit_size"])


def test_sal_with_the_same_number_of_directions_leaves_less() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.arange(480) % 6
    x = torch.randn(480, 16, generator=g, dtype=torch.float64)
    x = x + 0.5 * torch.randn(6, 16, generator=g, dtype=torch.float64)[z]
    ours, theirs = [], []
    for k in (3, 5):
        for kind, losses in ((InlpEraser, ours), (SalEraser, theirs)):
            out = kind.fit(x, z, k=k)(x)
            losses.append(fit_logistic(out - out.mean(0), z, 6, tol=1e-6).log_loss)
    assert ours == sorted(ours)
    assert all(a <= b + 1e-3 for a, b in zip(ours, theirs, strict=True))
    assert theirs[-1] == pytest.approx(class_entropy(z, 6), abs=1e-8)
    assert InlpEraser.fit(x, z, k=3).report["stopped"] == "k"


def test_width_and_accuracy_end_the_rounds() -> None:
    x, z = noisy(width=3)
    eraser = InlpEraser.fit(x, z, tolerance=None)
    assert eraser.report["rank"] == 3
    assert eraser.report["stopped"] == "width"
    torch.testing.assert_close(eraser(x), x.mean(0).expand_as(x))
    x, z = noisy(2000)
    early = InlpEraser.fit(x, z, tolerance=None, min_accuracy="majority")
    assert early.report["stopped"] == "accuracy"
    with pytest.warns(ErasureWarning, match="stopped: accuracy"):
        assert InlpEraser.fit(x, z, min_accuracy=0.999).report["rounds"] == 1


def test_held_out_rows_decide_and_are_reported() -> None:
    x, z = noisy(900)
    eraser = InlpEraser.fit(x[:600], z[:600], held_out=(x[600:], z[600:]))
    for key in ("held_out_log_loss_after", "held_out_accuracy_after", "held_out_gap"):
        assert key in eraser.report
    assert number(eraser, "rounds") <= number(InlpEraser.fit(x[:600], z[:600]), "rounds")
    assert "held_out_log_loss_after" in InlpEraser.fit(x, z).report


def test_by_class_and_dropout_follow_the_seed() -> None:
    x, z = noisy()
    tasks = torch.arange(600) % 3
    one, same, other = (
        InlpEraser.fit(x, z, n_classifiers=4, by_class=tasks, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.proj_left, same.proj_left)
    assert not torch.equal(one.proj_left, other.proj_left)
    state = torch.get_rng_state()
    dropped = InlpEraser.fit(x, z, n_classifiers=4, dropout=0.3, tolerance=None)
    assert torch.equal(state, torch.get_rng_state())
    left = dropped.proj_left
    torch.testing.assert_close(left.T @ left, torch.eye(4, dtype=x.dtype), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no task class holds two"):
        InlpEraser.fit(x, z, by_class=z)


def test_rotation_scale_and_order_do_not_matter() -> None:
    x, z = noisy()
    want = InlpEraser.fit(x, z, n_classifiers=4)(x)
    g = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=g, dtype=torch.float64)).Q
    order = torch.randperm(600, generator=g)
    close = {"rtol": 0.0, "atol": 1e-4}
    torch.testing.assert_close(
        InlpEraser.fit(x @ turn, z, n_classifiers=4)(x @ turn), want @ turn, **close
    )
    torch.testing.assert_close(
        InlpEraser.fit(x[order], z[order], n_classifiers=4)(x), want, **close
    )
    scaled = InlpEraser.fit(x * 1e6, z, n_classifiers=4)(x * 1e6) / 1e6
    torch.testing.assert_close(scaled, want, **close)
    torch.testing.assert_close(InlpEraser.fit(x, 1 - z, n_classifiers=4)(x), want, **close)


def test_wide_data() -> None:
    x, z = noisy(40, 200)
    eraser = InlpEraser.fit(x, z, n_classifiers=2, tolerance=None)
    assert eraser.proj_left.shape == (200, 2)
    assert number(eraser, "residual") < 0.5


def test_preset_of_the_paper() -> None:
    x, z = noisy(width=30)
    eraser = InlpEraser.fit(x, z, preset="paper")
    assert eraser.bias is None
    assert eraser.report["rank"] == eraser.report["rounds"] == 20


def test_labels_of_every_form() -> None:
    x, z = noisy()
    want = InlpEraser.fit(x, z, n_classifiers=2).P
    hot = torch.nn.functional.one_hot(z)
    for labels in (z.bool(), ["ab"[i] for i in z.tolist()], hot, z.double()):
        torch.testing.assert_close(InlpEraser.fit(x, labels, n_classifiers=2).P, want)
    mask = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.6
    masked = InlpEraser.fit(x.view(20, 30, -1), z.view(20, 30), mask=mask.view(20, 30), k=1)
    torch.testing.assert_close(masked.P, InlpEraser.fit(x[mask], z[mask], k=1).P)


def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Method(
        name="inlp",
        family="linear",
        target="concept_erasure.linear.inlp:InlpEraser",
        guarantees=frozenset(),
        summary="",
        paper="",
    )
    monkeypatch.setitem(registry.METHODS, "inlp", entry)
    x, z = noisy()
    eraser = InlpEraser.fit(Representations(x, z, None), n_classifiers=2)
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, InlpEraser)
    assert torch.equal(loaded(x), eraser(x))
    assert loaded.config == eraser.config


def test_bad_input() -> None:
    x, z = noisy()
    for options in (
        {"n_classifiers": 0},
        {"k": 0},
        {"tolerance": -1},
        {"min_accuracy": 2},
        {"min_accuracy": "chance"},
        {"dropout": 1},
        {"penalty": 0},
        {"preset": "demo"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            InlpEraser.fit(x, z, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one class a row"):
        InlpEraser.fit(x, x[:, 0])
    with pytest.raises(ShapeError, match="600"):
        InlpEraser.fit(x, z[:-1])
    with pytest.raises(ValueError, match="row 3"):
        InlpEraser.fit(x.index_fill(0, torch.tensor([3]), float("nan")), z)
    with pytest.raises(ShapeError, match="held-out"):
        InlpEraser.fit(x, z, held_out=(x[:, :4], z))
    with pytest.warns(ErasureWarning, match="identity"):
        eraser = InlpEraser.fit(x, torch.zeros_like(z))
    torch.testing.assert_close(eraser(x), x)


@pytest.mark.skipif(not VECTORS.exists(), reason="word vectors are not here")
def test_ladder_on_word_vectors() -> None:
    with np.load(VECTORS) as file:
        known = file["gender"] >= 0
        x = torch.from_numpy(file["vectors"][known]).double()
        z = torch.from_numpy(file["gender"][known]).long()
    closed = MeanProjectionEraser.fit(x, z)
    out = closed(x)
    one = fit_logistic(out - out.mean(0), z, 2, penalty=1e-5, tol=1e-5)
    assert one.log_loss == pytest.approx(class_entropy(z, 2), abs=1e-8)
    fitted, held = torch.arange(len(z)) % 3 > 0, torch.arange(len(z)) % 3 == 0
    eraser = InlpEraser.fit(
        x[fitted], z[fitted], n_classifiers=8, tolerance=None, held_out=(x[held], z[held])
    )
    ladder = numbers(
        eraser, "accuracy"
    )  # 100, 82, 74, 65 and 56 % with 0, 1, 2, 4 and 8 directions
    assert ladder[0] == 1.0
    assert ladder[1] == pytest.approx(0.82, abs=0.04)
    assert ladder[2] == pytest.approx(0.74, abs=0.04)
    assert ladder[4] == pytest.approx(0.65, abs=0.04)
    assert number(eraser, "accuracy_after") == pytest.approx(0.56, abs=0.04)
    assert number(eraser, "held_out_accuracy_after") == pytest.approx(0.55, abs=0.05)
    assert number(eraser, "edit_size") > 2 * cast("float", closed.report["edit_size"])
