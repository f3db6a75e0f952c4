"""Probes by layer: planted knowledge is found, what is not there is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from concept_erasure.concept import Concept
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.evals.language.plots import plot_kept, plot_probes, plot_relearning
from concept_erasure.evals.language.probing import _data, probe_concept
from concept_erasure.report import Interval
from concept_erasure.sites import find_sites
from tests.models import TinyTokenizer, tiny

CONCEPT = Concept.load("harry_potter")
SMALL: dict[str, Any] = {"limit": 24, "probe": "centroid", "layers": (0, -1)}


def test_letters_are_balanced_and_answers_are_at_them() -> None:
    texts, labels, groups, n = _data(CONCEPT, "answer", 0, 40)
    assert n == len(texts) == len(set(groups)) == 40
    assert [labels.count(letter) for letter in "ABCD"] == [10] * 4
    right = {fact.question: fact.answer for fact in CONCEPT.facts}
    for text, letter in zip(texts, labels, strict=True):
        assert f"{letter}. {right[text.splitlines()[0]]}" in text


def test_both_completions_of_a_fact_are_one_group() -> None:
    texts, labels, groups, n = _data(CONCEPT, "truth", 0, 30)
    assert len(texts) == 2 * n
    assert labels == ["true", "false"] * n
    assert groups == [i // 2 for i in range(2 * n)]
    right = {fact.answer for fact in CONCEPT.facts}
    assert all(any(text.endswith(a) for a in right) for text in texts[::2])


def test_what_is_planted_is_found_where_it_is() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    letters = {"true": 3.0, "false": -3.0}
    texts, labels, *_ = _data(CONCEPT, "truth", 0, SMALL["limit"])
    wanted = {tuple(tokenizer.encode(t)): letters[z] for t, z in zip(texts, labels, strict=True)}
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def plant(x: torch.Tensor) -> torch.Tensor:
        ids = seen[-1]
        sign = torch.tensor(
            [wanted.get(tuple(t for t in row if t), 0.0) for row in ids.tolist()], dtype=x.dtype
        )
        return x + 5 * sign[:, None, None] * torch.eye(x.shape[-1])[3]

    with Edit(model, [HookPatch(find_sites(model)["residual.2"], plant)]):
        found = probe_concept(model, tokenizer, CONCEPT, "truth", **SMALL)
    assert list(found.results) == ["residual.0", "residual.2"]
    assert found.best == "residual.2"
    assert found.maximum.value > 0.95
    assert found.selectivity > 0.2
    assert found.to_dict()["best"] == "residual.2"
    without = probe_concept(model, tokenizer, CONCEPT, "truth", **SMALL)
    assert without.maximum.value < 0.8
    assert without.chance == 0.5


def test_the_maximum_is_over_layers_and_so_is_its_control() -> None:
    found = probe_concept(tiny("gpt2"), TinyTokenizer(), CONCEPT, "concept", **SMALL)
    assert found.maximum.value == max(one.accuracy for one in found.results.values())
    assert found.control_maximum == max(one.accuracy for one in found.controls.values())


def test_bad_requests() -> None:
    model, tokenizer = tiny("llama"), TinyTokenizer()
    with pytest.raises(ValueError, match="task must be one of truth, answer, concept"):
        probe_concept(model, tokenizer, CONCEPT, "taste")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need at least 10 items"):
        probe_concept(model, tokenizer, CONCEPT, limit=5)
    with pytest.raises(ValueError, match=r"layers must lie in 0 \.\.\. 2"):
        probe_concept(model, tokenizer, CONCEPT, layers=[7])


def test_pictures(tmp_path: Any) -> None:
    one = Interval(0.5, 0.4, 0.6)
    for path in (
        plot_kept({"no edit": (one, one), "edited": (one, one)}, tmp_path / "kept.png"),
        plot_relearning({"10 texts": ([0, 10], [0.2, 0.4])}, tmp_path / "again.png", base=0.7),
        plot_probes({"no edit": [one, one]}, tmp_path / "probes.png"),
    ):
        assert path.stat().st_size > 1000
    for draw in (plot_kept, plot_relearning, plot_probes):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 values for 2 steps"):
        plot_relearning({"a": ([0, 1], [0.5])}, tmp_path / "x.png")
