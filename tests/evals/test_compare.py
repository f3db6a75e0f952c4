"""The sweep over methods: honest parts, honest sizes, and methods that cannot take part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from concept_erasure import LeaceEraser, registry
from concept_erasure.errors import ShapeError
from concept_erasure.evals.compare import BASELINE, Comparison, _parts, compare
from concept_erasure.evals.plots import _points, plot_tradeoff
from concept_erasure.probes import LinearProbe, evaluate
from concept_erasure.report import Interval, Report
from tests.probes.test_linear import data

Vectors = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return data(400, 6, 2)


@pytest.fixture(scope="module")
def sweep(vectors: Vectors) -> Comparison:
    return compare(*vectors, ["leace", "orth", "oracle", "splince"], probes=["linear", "kernel"])


def test_numbers_are_those_of_the_parts(vectors: Vectors, sweep: Comparison) -> None:
    x, z = vectors
    fit, train, test = _parts(z.tolist(), 0.5, 0.2, None, 0, x.device)
    assert sweep.sizes == (len(fit), len(train), len(test))
    assert sorted(torch.cat([fit, train, test]).tolist()) == list(range(400))
    eraser = LeaceEraser.fit(x[fit], z[fit])
    row = next(row for row in sweep.rows if row.method == "leace")
    rest = torch.cat([train, test])
    variance = (x[rest] - x[rest].mean(0)).square().sum()
    assert row.edit == pytest.approx(float((eraser(x[rest]) - x[rest]).square().sum() / variance))
    expected = evaluate(eraser(x[train]), z[train], eraser(x[test]), z[test])
    assert row.probes["linear"].accuracy == expected.accuracy
    assert row.probes["linear"].log_loss == pytest.approx(expected.log_loss)
    assert row.seconds is not None
    assert 0 <= row.seconds < 5


def test_erasure_lowers_the_leak_and_leace_edits_least(sweep: Comparison) -> None:
    none, leace, orth, oracle, splince = sweep.rows
    assert (none.method, none.edit) == (BASELINE, 0.0)
    assert none.probes["linear"].low > leace.probes["linear"].high
    assert leace.edit is not None
    assert orth.edit is not None
    assert 0 < leace.edit < 1.05 * orth.edit
    assert "needs the labels" in oracle.status
    assert "task" in splince.status
    assert not oracle.ok


def test_report_and_picture(tmp_path: Path, sweep: Comparison) -> None:
    report = sweep.save(tmp_path, meta={"data": "drawn"})
    assert Report.load(tmp_path / "compare.json") == report
    text = (tmp_path / "compare.md").read_text("utf-8")
    assert "| oracle | - |" in text
    assert "oracle: not applicable" in text
    assert "compare.png" in text
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert json.loads((tmp_path / "compare.json").read_text("utf-8"))["meta"]["data"] == "drawn"
    leak = sweep.leaks()["kernel"]["leace"]
    assert leak.low < leak.value < leak.high


def test_a_task_text_labels_and_options(vectors: Vectors) -> None:
    x, z = vectors
    names = ["no" if i == 0 else "yes" for i in z.tolist()]
    task = (x[:, 3] > 0).long()
    found = compare(
        x.numpy(),
        names,
        ["splince", "leace"],
        y=task,
        probes={"strong": LinearProbe(C=100)},
        options={"leace": {"strength": 0.0}},
    )
    none, splince, leace = found.rows
    assert splince.ok
    assert list(splince.probes) == ["strong"]
    assert leace.edit == pytest.approx(0.0, abs=1e-12)
    assert leace.probes["strong"].accuracy == none.probes["strong"].accuracy
    again = compare(x, z, ["leace"], probes=["linear"], seed=1)
    assert again.rows[0] != found.rows[0]


def test_svm_only_and_groups(tmp_path: Path, vectors: Vectors) -> None:
    x, z = vectors
    groups = [i // 8 for i in range(400)]
    found = compare(x, z, ["leace"], probes=["svm"], groups=groups)
    found.save(tmp_path, meta={})
    fit, train, test = _parts(z.tolist(), 0.5, 0.2, groups, 0, x.device)
    named = [{groups[i] for i in part.tolist()} for part in (fit, train, test)]
    assert not (named[0] & named[1] or named[0] & named[2] or named[1] & named[2])
    assert abs(len(fit) - 200) < 40
    assert abs(len(test) - 80) < 30


def test_a_failing_method_is_listed_and_the_sweep_goes_on(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("too\nfew rows")

    original = LeaceEraser.fit

    def only_leace(x: object, z: object, *, method: str = "leace", **rest: object) -> object:
        return refuse() if method == "orth" else original(x, z)

    monkeypatch.setattr(LeaceEraser, "fit", only_leace)
    found = compare(*vectors, ["orth", "leace"], probes=["linear"])
    assert found.rows[1].status == "failed: too few rows"
    assert found.rows[2].ok
    with pytest.raises(ValueError, match="no method could be measured: orth: failed"):
        compare(*vectors, ["orth"], probes=["linear"])


@pytest.mark.parametrize("name", registry.names())
def test_every_method_is_measured_or_says_why_not(name: str, vectors: Vectors) -> None:
    x, z = vectors
    task = (x[:, 3] > 0).long()
    found = compare(x, z, list({"leace", name}), y=task, probes=["centroid"])
    row = next(row for row in found.rows if row.method == name)
    assert row.ok or row.status.startswith("not applicable: ")


def test_mistakes(vectors: Vectors) -> None:
    x, z = vectors
    with pytest.raises(KeyError, match="leace"):
        compare(x, z, ["leec"])
    with pytest.raises(ValueError, match="no methods"):
        compare(x, z, [])
    with pytest.raises(ValueError, match="got the text 'leace'"):
        compare(x, z, "leace")
    with pytest.raises(ValueError, match="named twice: leace"):
        compare(x, z, ["leace", "leace"])
    with pytest.raises(ValueError, match="unknown probe 'tree'"):
        compare(x, z, ["leace"], probes=["tree"])
    with pytest.raises(ValueError, match="leave rows"):
        compare(x, z, ["leace"], fit_share=0.8)
    with pytest.raises(ValueError, match="not among the methods"):
        compare(x, z, ["leace"], options={"orth": {}})
    with pytest.raises(ValueError, match="no option colour"):
        compare(x, z, ["leace"], options={"leace": {"colour": 1}}, probes=["centroid"])
    with pytest.raises(ValueError, match="not applicable"):
        compare(x, z, ["oracle"], probes=["centroid"])
    with pytest.raises(ShapeError, match="3 task labels"):
        compare(x, z, ["splince"], y=[1, 2, 3])
    with pytest.raises(ValueError, match="class 1 has 2 vectors"):
        compare(x[:50], [0] * 48 + [1] * 2, ["leace"])


def test_tradeoff_plot_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_tradeoff({"linear": {}}, {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="size of edit for leace"):
        plot_tradeoff({"linear": {"leace": Interval(0.5, 0.4, 0.6)}}, {}, tmp_path / "a.png")


def test_methods_that_are_one_map_share_a_point() -> None:
    place = Interval(0.6, 0.5, 0.7)
    rows = {"sal": place, "leace": Interval(0.61, 0.5, 0.7), "orth": place}
    leaks = {"linear": rows, "mlp": {"sal": place, "leace": place, "orth": place}}
    names = ["sal", "leace", "orth"]
    together = _points(names, leaks, {"sal": 0.03, "leace": 0.03, "orth": 0.03000001})
    assert together == {"sal": "sal, orth", "leace": "leace"}
    apart = _points(names, leaks, {"sal": 0.03, "leace": 0.03, "orth": 0.031})
    assert list(apart) == names
