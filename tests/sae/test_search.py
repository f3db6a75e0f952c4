"""The search on planted features, its scores one by one, levels, filters, tables, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.edit import DensePatch, Edit
from concept_erasure.errors import EditError, ErasureWarning, FormatError
from concept_erasure.language.batches import logits_at
from concept_erasure.sae._search_filters import Alone
from concept_erasure.sae._search_scores import (
    attributions,
    batches_of,
    fired,
    places_of,
    saying,
    windows_of,
)
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.search import Feature, FeatureTable, Filters, Search, find_features
from concept_erasure.sites import fingerprint
from tests.models import TinyTokenizer, tiny
from tests.sae.planted import CONCEPT, DOWN, NAMES, NEAR, WORDS, Planted, planted

PLUS = tuple(WORDS.index(name) for name in NAMES)


def search(p: Planted, *, dis: Any = None, **options: Any) -> FeatureTable:
    texts = {"forget_texts": p.forget, "retain_texts": p.retain, "neutral_texts": p.neutral}
    return find_features(
        p.model, p.tokenizer, dis or p.dis, CONCEPT, progress=False, **{**texts, **options}
    )


@pytest.fixture(scope="module")
def one() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def found(one: Planted) -> FeatureTable:
    before = fingerprint(one.model)
    table = search(one)
    assert fingerprint(one.model) == before
    assert all(p.grad is None for p in one.model.parameters())
    assert not any(m._forward_hooks for m in one.model.modules())
    return table


def test_planted_features_are_found_with_their_directions(found: FeatureTable) -> None:
    hits, kept, truth = 0, 0, 0
    for seed in range(3):
        p = planted(seed)
        table = found if seed == 0 else search(p)
        got = {one.index: one.direction for one in table}
        hits += sum(got.get(index) == side for index, side in p.truth.items())
        kept += len(got)
        truth += len(p.truth)
    assert hits / truth >= 0.95  # recall
    assert hits / kept >= 0.95  # precision


def test_scores_and_evidence_of_a_feature(one: Planted, found: FeatureTable) -> None:
    feature = next(f for f in found if f.index == int(one.places[0]))
    assert (feature.site, feature.direction, feature.level, feature.layer) == ("mlp.0", 1, None, 0)
    scores = feature.scores
    assert scores["lens"] == 1 and scores["attribution"] > 0 and scores["effect"] < -0.1
    assert scores["rate_concept"] > 0.02 and scores["rate_near"] == scores["rate_neutral"] == 0
    assert scores["kl"] < 1e-3
    evidence: Any = feature.evidence
    assert set(evidence["top_tokens"][:4]) == set(NAMES)
    assert "[[context0]]" in evidence["examples"]["concept"]["text"]
    assert "near" not in evidence["examples"]
    against = next(f for f in found if f.index == int(one.places[DOWN[0]]))
    assert against.direction == -1 and set(NAMES) <= set(against.evidence["bottom_tokens"])  # type: ignore[arg-type]


def test_the_lens_sees_every_planted_feature_at_its_own_end(one: Planted) -> None:
    options = Search(limit=256, shortlist=256)
    table = search(one, scorers=["lens"], vote=1, top=256, filters=None, options=options)
    got = {f.index: f for f in table}
    for index, side in one.truth.items():
        assert got[index].direction == side and got[index].scores["lens"] == 1


@pytest.mark.parametrize("scorer", ["contrast", "attribution"])
def test_each_other_score_finds_most_alone(one: Planted, scorer: Any) -> None:
    table = search(one, scorers=[scorer], vote=1, filters=None, options=Search(limit=100))
    got = {f.index for f in table}
    assert len(got & set(one.truth)) >= 6
    near = {int(one.places[f]) for f in NEAR}
    assert not got & near


def test_efficiency_finds_what_answers_need_with_its_direction(one: Planted) -> None:
    """The questions: sentences of the concept up to a name, which is the answer; likewise about neighbours."""

    def cut(texts: list[str], ids: tuple[int, ...]) -> list[tuple[str, str]]:
        wanted = {WORDS[i] for i in ids}
        made = []
        for text in texts:
            words = text.split()
            at = next((k for k, word in enumerate(words) if k and word in wanted), None)
            if at is not None:
                made.append((" ".join(words[:at]), f" {words[at]}"))
        return made[:64]

    answers = cut(list(one.forget), PLUS)
    table = search(
        one,
        scorers=["efficiency"],
        vote=1,
        answers=answers,
        filters=None,
        options=Search(limit=100),
    )
    got = {f.index: f.direction for f in table}
    first = [f.index for f in table][: len(one.truth)]
    assert len(set(first) & set(one.truth)) >= len(one.truth) // 2
    assert all(got[index] == side for index, side in one.truth.items() if index in first)
    assert all(f.scores["fisher"] >= 0 and f.scores["efficiency"] != 0 for f in table)
    # what neighbours need as much is not the concept's, and neither is what works against them
    with pytest.warns(ErasureWarning, match="no latent"):
        none = search(
            one, scorers=["efficiency"], vote=1, answers=answers, near_answers=answers, filters=None
        )
    assert len(none) == 0
    with pytest.raises(ValueError, match="efficiency needs answers="):
        search(one, scorers=["efficiency"], vote=1)
    with pytest.raises(ValueError, match="has no token"):
        search(one, scorers=["efficiency"], vote=1, answers=[("context0 name0", "")])


def test_the_limit_counts_what_is_edited_alone(one: Planted, found: FeatureTable) -> None:
    every = search(one, filters=None, options=Search(limit=2))
    assert len(every) >= len(found) > 2 and not every.dropped
    few = search(one, options=Search(limit=2))
    assert len(few) <= 2
    assert any("more than 2 candidates" in str(f.evidence["dropped"]) for f in few.dropped)


def test_firing_is_counted_where_texts_say_it(one: Planted) -> None:
    windows = windows_of(one.tokenizer, one.forget, max_length=30, tokens=10_000, seed=0)
    places = places_of(one.model, {"mlp.0": one.dis})
    made = fired(one.model, {"mlp.0": one.dis}, places, windows, {0, 1, 2}, batch_size=7)["mlp.0"]
    latent = int(one.places[3])
    said = sum(text.split().count("context3") for text in one.forget)
    assert int(made.count[latent]) == said
    assert len(made.places) == sum(len(text.split()) for text in one.forget)
    window, at = made.places[made.where[latent]].tolist()
    assert int(windows[window].ids[at]) == WORDS.index("context3")
    few = windows_of(one.tokenizer, one.forget, max_length=30, tokens=100, seed=0)
    assert 100 <= sum(len(w.ids) - 1 for w in few) < 130


def test_attribution_is_the_slope_of_the_log_probability(one: Planted) -> None:
    latent, size = int(one.places[0]), 1e-2
    row = one.dis.W_dec[latent]
    batches = batches_of(saying(one.tokenizer, one.forget, PLUS, 30), one.tokenizer, 8, row.device)

    def mean() -> float:
        with torch.no_grad():
            parts = [
                logits_at(one.model, b).double().log_softmax(-1).gather(1, b.tokens[:, None]).sum()
                for b in batches
            ]
        return float(torch.stack(parts).sum()) / sum(b.count for b in batches)

    def grown(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        return out + size * one.dis.encode(out, torch.tensor([latent])) * row

    before = mean()
    handle = one.model.model.layers[0].mlp.register_forward_hook(grown)  # type: ignore[union-attr, index, operator]
    try:
        slope = (mean() - before) / size
    finally:
        handle.remove()
    places = places_of(one.model, {"mlp.0": one.dis})
    rows = saying(one.tokenizer, one.forget, PLUS, 30)
    got = attributions(one.model, one.tokenizer, {"mlp.0": one.dis}, places, rows)
    assert got.answers == sum(b.count for b in batches)
    assert float(got.mean["mlp.0"][latent]) == pytest.approx(slope, rel=0.05)
    # the squares are those of sums over one text
    alone = [
        attributions(one.model, one.tokenizer, {"mlp.0": one.dis}, places, [row])
        for row in rows[:5]
    ]
    few = attributions(one.model, one.tokenizer, {"mlp.0": one.dis}, places, rows[:5])
    wanted = sum((a.mean["mlp.0"] * a.answers).square() for a in alone) / few.answers
    torch.testing.assert_close(few.square["mlp.0"], wanted, rtol=1e-3, atol=1e-9)
    swapped = attributions(one.model, one.tokenizer, {"mlp.0": one.dis}, places, rows[:5][::-1])
    torch.testing.assert_close(few.square["mlp.0"], swapped.square["mlp.0"], rtol=1e-3, atol=1e-9)


def test_contrast_alone_has_no_sign_so_both_edits_are_tried(one: Planted) -> None:
    table = search(one, scorers=["contrast"], vote=1)
    got = {f.index: f.direction for f in table}
    assert all(got.get(index) == side for index, side in one.truth.items() if index in got)
    assert len(set(got) & set(one.truth)) >= 9
    assert all(f.evidence["voters"] == ["contrast"] for f in table)


def test_levels_are_searched_one_by_one(one: Planted) -> None:
    order = torch.cat(
        (one.places[:2], torch.tensor([i for i in range(256) if i not in one.places[:2].tolist()]))
    )
    dis = replace(
        one.dis, W_enc=one.dis.W_enc[:, order], W_dec=one.dis.W_dec[order], widths=(16, 64, 256)
    )
    table = search(one, dis={0: dis}, top=4, filters=None)
    assert {f.level for f in table} == {0, 1, 2}  # the best of each level, however weak the level
    keys = [(-int(str(f.evidence["votes"])), f.level) for f in table]
    assert keys == sorted(keys)  # type: ignore[type-var]
    first = [f for f in table if f.level == 0]
    assert {f.index for f in first} >= {0, 1}
    assert len(table.select(level=0)) == len(first)
    assert table.widths == {"mlp.0": (16, 64, 256)}


def test_filters_drop_with_a_reason(one: Planted, found: FeatureTable) -> None:
    filters = Filters(min_fall=100.0)
    with pytest.warns(ErasureWarning, match="no fall of the concept's tokens: "):
        table = search(one, filters=filters)
    assert len(table) == 0 and len(table.dropped) >= len(found)
    assert all("no fall of 100" in str(f.evidence["dropped"]) for f in table.dropped)
    assert Filters().refuses({"effect": -1.0, "effect_near": -0.06, "kl": 0.0})
    assert Filters().refuses({"effect": -1.0, "effect_near": 0.0, "kl": 0.02})
    assert Filters().refuses({"effect": 0.0, "effect_near": 0.0, "kl": 0.0})
    assert Filters().refuses({"effect": -1e-3, "effect_near": -0.04, "kl": 0.009}) is None


def test_the_judge_has_the_last_word_and_reads_the_evidence(
    one: Planted, found: FeatureTable
) -> None:
    asked: list[Feature] = []

    def judge(feature: Feature) -> bool:
        asked.append(feature)
        return feature.direction > 0

    table = search(one, judge=judge)
    assert {f.index for f in asked} == {f.index for f in found}
    assert all("top_tokens" in f.evidence and "effect" in f.scores for f in asked)
    assert {f.direction for f in table} == {1} and len(table) == len(found.select(direction=1))
    assert all(f.evidence["dropped"] == "refused by the judge" for f in table.dropped)


def test_nothing_is_made_up_when_there_is_nothing(one: Planted) -> None:
    rows = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(9)))[0]
    silent = Disentangler(
        rows.T.contiguous(), torch.zeros(96), rows, torch.zeros(96), torch.full((96,), 50.0), "mlp.0"
    )  # fmt: skip
    with pytest.warns(ErasureWarning, match="no latent of mlp.0 stands for 'Harry'"):
        table = search(one, dis=silent)
    assert len(table) == 0 and table.meta["candidates"] == 0


def test_editing_alone_leaves_the_model_as_it_was(one: Planted) -> None:
    filters = Filters(texts=4)
    alone = Alone(
        one.model, one.tokenizer, {"mlp.0": one.dis}, places_of(one.model, {"mlp.0": one.dis}),
        forget_texts=one.forget, retain_texts=one.retain, neutral_texts=one.neutral, tokens=PLUS, near=(),
        filters=filters,
    )  # fmt: skip
    before = fingerprint(one.model)
    feature = Feature("mlp.0", int(one.places[0]), 1)
    first = alone(feature)
    assert alone(feature) == first and fingerprint(one.model) == before
    assert first["effect"] < 0 < alone(replace(feature, direction=-1))["effect"]
    assert first["kl"] < 1e-3
    nothing = alone(Feature("mlp.0", int(one.places[25]), 1))
    assert abs(nothing["effect"]) < 0.05 and nothing["kl"] > first["kl"]


@pytest.mark.parametrize("site", ["residual.0", "mlp.0"])
def test_other_sites_and_post_norms_run(site: str) -> None:
    model = tiny("gemma3")
    rows = torch.nn.functional.normalize(
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1
    )
    dis = Disentangler(
        rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(32), torch.full((64,), 0.01), site,
        after_post_norm=site == "mlp.0",
    )  # fmt: skip
    words = [" ".join(f"Name{(i * k) % 7} w{(i + k) % 5}" for i in range(6)) for k in range(1, 9)]
    table = find_features(
        model, TinyTokenizer(), dis, Concept(name="Name1", synonyms=("Name2",)), vote=1, forget_texts=words,
        retain_texts=[text.replace("Name", "Other") for text in words], progress=False,
        filters=Filters(max_kl=100.0, max_near_fall=100.0), options=Search(ratio=0.0, fires=1),
    )  # fmt: skip
    assert len(table) > 0 and all(f.site == site and f.scores["effect"] < 0 for f in table)


def test_tables_choose_and_remember(found: FeatureTable, tmp_path: Path) -> None:
    assert [f.name for f in found.select(2)] == [f.name for f in found[:2]]
    names = [found[3].name, found[0].name]
    assert [f.name for f in found.select(names=names)] == names
    assert found.select(direction=-1).sites == ("mlp.0",)
    assert len(found.select(sites=["mlp.1"])) == 0
    again = FeatureTable.load(found.save(tmp_path / "table"))
    assert again.features == tuple(
        Feature(**{**f.to_dict()})  # type: ignore[arg-type]
        for f in found
    )
    assert torch.equal(again.rates["mlp.0"], found.rates["mlp.0"])
    assert again.random_control(1).features == found.random_control(1).features
    with pytest.raises(KeyError, match=r"no feature 'mlp.0/9999\+'"):
        found.select(names=["mlp.0/9999+"])
    with pytest.raises(FileNotFoundError, match="features.json"):
        FeatureTable.load(tmp_path)
    (tmp_path / "features.json").write_text('{"format_version": 1}')
    with pytest.raises(FormatError, match="not a table of features"):
        FeatureTable.load(tmp_path)
    (tmp_path / "features.json").write_text('{"format_version": 2}')
    with pytest.raises(FormatError, match="of format 2"):
        FeatureTable.load(tmp_path)


def test_controls_are_other_latents_of_like_rate() -> None:
    rates = torch.linspace(0, 0.5, 101)
    features = tuple(Feature("mlp.0", i, 1 if i % 2 else -1) for i in (50, 51, 80))
    table = FeatureTable(features, "c", (Feature("mlp.0", 52),), {"mlp.0": rates})
    controls = [table.random_control(seed) for seed in range(5)]
    for control in controls:
        assert len(control) == 3
        assert len({f.index for f in control}) == 3
        assert not {f.index for f in control} & {50, 51, 52, 80, 0}
        assert [f.direction for f in control] == [f.direction for f in features]
        for mine, theirs in zip(features, control, strict=True):
            assert 0.5 < float(rates[theirs.index] / rates[mine.index]) < 2
    assert len({tuple(f.index for f in control) for control in controls}) > 1
    levels = replace(
        table,
        features=(Feature("mlp.0", 5, level=0), Feature("mlp.0", 50, level=1)),
        widths={"mlp.0": (6, 101)},
    )
    assert [f.index < 6 for f in levels.random_control(0)] == [True, False]
    lonely = replace(
        levels, widths={"mlp.0": (1, 6, 101)}, features=(Feature("mlp.0", 0, level=0),)
    )
    assert lonely.random_control(0)[0].index > 0  # 0 never fires, and is alone in its level
    with pytest.raises(ValueError, match="no other latent of 'mlp.0' fires"):
        replace(lonely, rates={"mlp.0": torch.zeros(101)}).random_control(0)
    with pytest.raises(ValueError, match="firing rates at 'mlp.0' are not known"):
        FeatureTable(features).random_control(0)


def test_bad_arguments_are_refused(one: Planted) -> None:
    for options, message in (
        (
            {"scorers": ["lens", "guess"]},
            "scorers are lens, contrast, attribution, efficiency; got 'guess'",
        ),
        ({"scorers": ["lens"]}, "vote must lie between 1 and the number of scorers, 1; got 2"),
        ({"top": 0}, "top must be at least 1"),
        ({"retain_texts": [], "neutral_texts": []}, "no texts to tell 'Harry' from other things"),
        ({"dis": {0: one.dis, "mlp.0": one.dis}}, "two dictionaries sit at 'mlp.0'"),
    ):
        with pytest.raises(ValueError, match=message):
            search(one, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction must be"):
        Feature("mlp.0", 1, 0)
    with pytest.raises(ValueError, match="in the table twice"):
        FeatureTable((Feature("mlp.0", 1), Feature("mlp.0", 1, -1)))
    with pytest.raises(ValueError, match="fires must be at least 1"):
        Search(fires=0)
    weight = one.model.lm_head.weight  # type: ignore[union-attr]
    with (
        Edit(one.model, [DensePatch("lm_head.weight", weight.detach() * 2)]),  # type: ignore[operator]
        pytest.raises(EditError, match="is in force"),
    ):
        search(one)
