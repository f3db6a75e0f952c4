"""Probing layer by layer, and the picture of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concept_erasure.collect import Representations
from concept_erasure.evals.plots import plot_layers
from concept_erasure.probes import cross_validate, probe_layers
from tests.probes.test_linear import data


def test_one_result_a_layer_and_a_picture(tmp_path: Path) -> None:
    x, z = data(120, 4, 2)
    noise = torch.randn(120, 4, generator=torch.Generator().manual_seed(5)).double()
    found = {"residual.0": Representations(noise, z), "residual.1": Representations(x, z)}
    results = probe_layers(found, folds=3)
    assert list(results) == ["residual.0", "residual.1"]
    assert results["residual.1"] == cross_validate(x, z, folds=3)
    assert results["residual.1"].accuracy > results["residual.0"].accuracy
    assert plot_layers(results, tmp_path / "a.png").stat().st_size > 1000
    picture = plot_layers(results, tmp_path / "b.svg", after=results, name="linear")
    assert "linear, after" in picture.read_text("utf-8") or picture.stat().st_size > 1000
    with pytest.raises(ValueError, match="no results"):
        plot_layers({}, tmp_path / "c.png")
    with pytest.raises(ValueError, match="sites"):
        plot_layers(results, tmp_path / "c.png", after={})


def test_tokens_of_one_text_are_a_group() -> None:
    x, z = data(120, 4, 2)
    rows = torch.arange(120) // 4
    result = probe_layers({"a": Representations(x, z, rows=rows)}, folds=3)["a"]
    assert result.groups == 30


def test_concepts_by_name_and_mistakes() -> None:
    x, z = data(60, 4, 2)
    both = {"a": Representations(x, {"gender": z, "tense": 1 - z})}
    assert probe_layers(both, concept="gender", folds=3)["a"].n == 60
    assert probe_layers({"a": Representations(x, {"gender": z})}, folds=3)["a"].n == 60
    with pytest.raises(ValueError, match=r"\['gender', 'tense'\]"):
        probe_layers(both)
    with pytest.raises(ValueError, match="without a name"):
        probe_layers({"a": Representations(x, z)}, concept="gender")
    with pytest.raises(ValueError, match="no labels"):
        probe_layers({"a": Representations(x)})
    with pytest.raises(ValueError, match="at least one site"):
        probe_layers({})
