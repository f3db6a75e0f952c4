"""The demo's texts: balanced, seeded, and split without leaks."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from concept_erasure.evals.texts import (
    CUES,
    ENDINGS,
    NEUTRAL_SENTENCES,
    ODDS,
    PROFESSIONS,
    SPLITS,
    TEMPLATES,
    Split,
    cued_prompts,
    gender_texts,
    open_prompts,
    profession_sentences,
)

GENDERED = {word for pairs in CUES.values() for pair in pairs for word in pair}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_seeded_different_and_balanced(split: Split) -> None:
    texts = gender_texts(split, 401, seed=3)
    assert texts == gender_texts(split, 401, seed=3)
    assert texts != gender_texts(split, 401, seed=4)
    assert len({item.text for item in texts}) == 401
    assert Counter(item.gender for item in texts) == {0: 201, 1: 200}
    shares = Counter(item.cue for item in texts)
    assert set(shares) == set(CUES)
    assert min(shares.values()) > 30


@pytest.mark.parametrize("split", SPLITS)
def test_each_text_says_its_gender_and_no_other(split: Split) -> None:
    for item in gender_texts(split, 400):
        feminine = {a for pairs in CUES.values() for a, _ in pairs}
        found = words(item.text) & GENDERED
        assert found, item
        assert found <= feminine if item.gender == 0 else not found & feminine, item


def test_splits_share_nothing() -> None:
    for a, b in combinations(SPLITS, 2):
        jobs = [{j for group in PROFESSIONS[s].values() for j in group} for s in (a, b)]
        patterns = [{t for group in TEMPLATES[s].values() for t in group} for s in (a, b)]
        assert not jobs[0] & jobs[1]
        assert not patterns[0] & patterns[1]
        assert not set(ENDINGS[a]) & set(ENDINGS[b])
    assert sum(len(g) for s in PROFESSIONS.values() for g in s.values()) >= 60


def test_gender_follows_the_stated_odds() -> None:
    texts = [item for seed in range(4) for item in gender_texts("fit", 1600, seed=seed)]
    for lean, odds in ODDS.items():
        genders = [item.gender for item in texts if item.lean == lean]
        assert 1 - sum(genders) / len(genders) == pytest.approx(odds, abs=0.05)


def test_articles_fit() -> None:
    for split in SPLITS:
        for item in gender_texts(split, 500):
            assert not re.search(r"\b[Aa] [aeiou]", item.text), item.text
            assert not re.search(r"\b[Aa]n [^aeiou]", item.text), item.text


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="split must be one of fit, probe, test"):
        gender_texts("train", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2"):
        gender_texts("fit", 1)
    few = dict.fromkeys(CUES, ("The {job} saw {cue} {end}",))
    monkeypatch.setitem(TEMPLATES, "test", few)
    monkeypatch.setitem(PROFESSIONS, "test", {"even": ("poet",)})
    with pytest.raises(ValueError, match="ask for fewer"):
        gender_texts("test", 200)


def test_prompts() -> None:
    assert not any(words(prompt) & GENDERED for prompt in open_prompts())
    pairs = cued_prompts()
    assert len(pairs) == len({pair for pair in pairs})
    for feminine, masculine in pairs:
        assert words(feminine) & GENDERED
        assert len(feminine.split()) == len(masculine.split())


def test_neutral_sentences_name_nobody() -> None:
    assert len(set(NEUTRAL_SENTENCES)) == 60
    assert not any(words(text) & GENDERED for text in NEUTRAL_SENTENCES)
    assert not any(words(text) & GENDERED for text in profession_sentences())
