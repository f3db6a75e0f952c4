"""The demo on tiny random models; on the real ones when asked for slow tests."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from concept_erasure.collect import collect
from concept_erasure.eraser import Eraser
from concept_erasure.evals._demo import read_data
from concept_erasure.evals._language_demo import fit_in_order, residual_sites
from concept_erasure.evals._sentence_demo import neighbour_correlation, profession_retrieval
from concept_erasure.evals.demo import DemoConfig, Part, Progress, run
from concept_erasure.evals.models import package_folder
from concept_erasure.report import Interval, Report
from tests.models import TinyTokenizer, tiny

SMALL = DemoConfig(n_fit=120, n_probe=40, n_test=40, layers=(0, -1))


def test_language_part_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = run(
        tmp_path, config=SMALL, parts=["language"], language_model=(model, TinyTokenizer())
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert Report.load(tmp_path).to_markdown() == report.to_markdown()
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.to_markdown()
    printed = capsys.readouterr().out
    for name in ("report.json", "report.md", "language_plane.png", "language_accuracy.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in printed
    for site in ("residual.0", "residual.2"):
        loaded = Eraser.from_pretrained(tmp_path / "erasers" / "language" / site)
        assert loaded.space is not None
        assert loaded.space.site == site
    said = {row["measure"]: row for row in report.sections[0].sections[2].rows}
    assert said["perplexity after undo"]["after"] == pytest.approx(
        said["perplexity of neutral sentences"]["before"]
    )


def test_sentence_part(tmp_path: Path) -> None:
    report = run(
        tmp_path, config=SMALL, parts=["sentences"], sentence_model=(tiny("bert"), TinyTokenizer())
    )
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["title"] == report.title
    assert Eraser.from_pretrained(tmp_path / "erasers" / "sentences" / "leace").space is not None


def test_every_site_is_guarded_with_all_erasers_attached() -> None:
    model, tokenizer, data = tiny("llama"), TinyTokenizer(), read_data(SMALL)["fit"]
    sites = residual_sites(model, (0, 1, -1))
    assert sites == ["residual.0", "residual.1", "residual.2"]
    with ExitStack() as stack:
        fit_in_order(
            model, tokenizer, data, sites,
            stack=stack, batch_size=16, bars=Progress(False),
        )  # fmt: skip
        erased = collect(model, tokenizer, data.texts, sites=sites, dtype=torch.float64)
    for item in erased.values():
        gap = item.x[data.gender == 1].mean(0) - item.x[data.gender == 0].mean(0)
        assert float(gap.norm() / item.x.std(0).norm()) < 1e-4


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts must be some of"):
        run(tmp_path, parts=["pictures"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layers must lie in 0 ... 2"):
        residual_sites(tiny("llama"), (7,))
    with pytest.raises(ImportError, match="pip install --no-deps some-package==1"):
        package_folder("no_such_module_here", "some-package==1")


def test_neighbours() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    same, kept = neighbour_correlation(x, 2 * x)
    assert same.value == pytest.approx(1.0)
    assert kept == 1.0
    other, _ = neighbour_correlation(x, x.flip(0))
    assert other.value < 0.5
    assert profession_retrieval(x, x, torch.arange(20)).value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["language", "sentences"])
def test_real_models(part: Part, tmp_path: Path) -> None:
    for module in ("transformers", "gguf"):
        pytest.importorskip(module)
    config = DemoConfig(n_fit=600, n_probe=400, n_test=300, layers=(25, -1))
    try:
        report = run(tmp_path, config=config, parts=[part])
    except ImportError as error:
        pytest.skip(str(error))
    section = report.sections[0]
    linear = [row for row in section.sections[0].rows if row["probe"] == "linear"][-1]
    before, after = linear["before"], linear["after" if part == "language" else "LEACE"]
    assert isinstance(before, Interval)
    assert isinstance(after, Interval)
    assert before.value > 0.8
    assert after.value < before.value - 0.15
