"""Find the latents that stand for a concept, with evidence, and without any service.

Three scores say whether a latent f is about the concept, each with its own blind spots:

- lens: which tokens it writes. The share of the concept's tokens T+ in the top (or bottom) list of its decoder row,
  less the share of its neighbours' tokens T-. The bottom list shows latents that write against the concept.
- contrast: where it fires. P(fires | concept text) less the larger of P(fires | neighbours' text) and P(fires |
  neutral text); it counts where the mean code on the concept is at least three times that on the others.
- attribution: what it does. Mean of ``z_f (d_f . grad log p(answer))`` over the places where texts say T+, less the
  same for T- where other texts say those; to first order, the nats it adds.
- efficiency, for who has questions: what it adds to right answers about the concept, less what it changes, up or down,
  in those about neighbours, over the root of what it is worth to other text. Editing latents moves answers to first
  order and the divergence on other text to second, so this ranks latents by nats of answer lost at equal divergence.
  Not among the default.

A latent that is among the best of at least two is a candidate. Then it is edited alone: it is dropped unless T+ falls,
and if T- falls, if neutral text moves, or if it never fires on the concept. Levels of a Matryoshka dictionary are
ranked each for itself and the general ones come first. If nothing passes, the table is empty and says why: a top of a
list of zeros is never taken.

Sources: lens, match with token lists, and the filters from Gur-Arieh et al. 2025 (arXiv:2505.22586), sections 3-4 and
code, with the divergence on neutral text in place of MMLU; contrast from Ashuach et al. 2025 (arXiv:2508.13650).
Subtracting what neighbours get, efficiency, the vote and the shortlist (see `concept_erasure.sae.lens`)
are ours.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from concept_erasure._storage import library_version
from concept_erasure.collect import Progress
from concept_erasure.concept import Concept
from concept_erasure.errors import ErasureWarning
from concept_erasure.language._texts import forget_and_retain
from concept_erasure.sae._concept_tokens import concept_tokens
from concept_erasure.sae._features import Feature, FeatureTable
from concept_erasure.sae._search_filters import Filters
from concept_erasure.sae._search_run import Judge, Run, Search
from concept_erasure.sae._sparse_eraser import check_no_edits
from concept_erasure.sae.disentangler import Disentangler, by_site
from concept_erasure.sites import fingerprint, model_id

__all__ = ["Feature", "FeatureTable", "Filters", "Scorer", "Search", "find_features"]

Scorer = Literal["lens", "contrast", "attribution", "efficiency"]
KNOWN: tuple[Scorer, ...] = get_args(Scorer)
SCORERS = KNOWN[:3]  # the default: efficiency needs questions
_SEARCH, _FILTERS = Search(), Filters()


def find_features(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    disentanglers: Disentangler | Mapping[int | str, Disentangler],
    concept: Concept,
    *,
    scorers: Sequence[Scorer] = SCORERS,
    top: int = 20,
    vote: int = 2,
    filters: Filters | None = _FILTERS,
    judge: Judge | None = None,
    forget_texts: Sequence[str] | None = None,
    retain_texts: Sequence[str] | None = None,
    neutral_texts: Sequence[str] | None = None,
    answers: Sequence[tuple[str, str]] | None = None,
    near_answers: Sequence[tuple[str, str]] = (),
    words: Sequence[str] = (),
    options: Search = _SEARCH,
    batch_size: int = 16,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> FeatureTable:
    """Return the latents that stand for a concept.

    Args:
        model: A causal language model without edits; left as it is.
        tokenizer: Its tokenizer.
        disentanglers: A dictionary, or several by layer or site.
        concept: What to look for: its names and entities give T+, its neighbours T-.
        scorers: Which of ``"lens"``, ``"contrast"``, ``"attribution"`` and ``"efficiency"`` are used.
        top: Latents of a dictionary, and of each of its levels, that a score can vote for. Higher finds more, with
            less certainty.
        vote: Scores that must vote for a latent.
        filters: What it must do when edited alone; None leaves that out, which saves most of the time on a large
            model.
        judge: Asked last about each feature that passed; returns whether to keep it.
        forget_texts: Texts of the concept; default its own, or the model's samples.
        retain_texts: Texts about its neighbours; default likewise.
        neutral_texts: Texts about something else; default none: then damage is measured on those about neighbours.
        answers: Prompts and right answers about the concept, for ``"efficiency"``. What is found is found on them: keep
            others to measure on.
        near_answers: Likewise about its neighbours, which must stay.
        words: More words of the concept, for T+.
        options: Sizes.
        batch_size: Windows of a forward pass.
        seed: Of the choice of texts.
        cache_dir: Where the model's samples are kept for the next time.
        progress: Whether to show bars; default on a terminal.

    Returns:
        The features, best first: by votes, then level, then rank; with scores ``lens``, ``contrast``, ``ratio``,
        ``attribution``, ``attribution_near``, ``rate_concept``, ``rate_near``, ``rate_neutral``, ``total``, with
        efficiency ``answers``, ``fisher`` and ``efficiency``, and, if filtered, ``effect``, ``effect_near`` and ``kl``.
        Candidates that did not pass are in `dropped`.

    Raises:
        EditError: If an edit is in force.
        ValueError: If options are refused or there are no texts.
        SiteNotFoundError: If a site does not exist.
        ShapeError: If a dictionary is for another model.
    """
    _check(scorers, vote, top, answers)
    check_no_edits(model)
    known = by_site(model, disentanglers)
    forget, retain = forget_and_retain(
        model, tokenizer, concept, forget_texts, retain_texts, seed=seed, cache_dir=cache_dir
    )
    texts = {"concept": forget, "near": retain, "neutral": list(neutral_texts or ())}
    if not retain and not texts["neutral"]:
        raise ValueError(
            f"there are no texts to tell {concept.name!r} from other things: give retain_texts about its neighbours, "
            "or neutral_texts"
        )
    run = Run(
        model, tokenizer, known, texts, scorers, top, vote, options, batch_size, seed, progress,
        plus=concept_tokens(tokenizer, concept, words=words), minus=_near(tokenizer, concept, words),
        pairs={"concept": list(answers or ()), "near": list(near_answers)},
    )  # fmt: skip
    found = run.scored()
    candidates = run.candidates(found)
    kept, dropped = run.filtered(candidates, filters, judge)
    table = FeatureTable(
        tuple(kept), concept.name, tuple(dropped), run.rates(),
        {site: dis.widths for site, dis in known.items() if len(dis.widths) > 1},
        _meta(run, filters, candidates, dropped),
    )  # fmt: skip
    if not kept:
        _say_empty(concept, known, table)
    return table


def _check(
    scorers: Sequence[Scorer], vote: int, top: int, answers: Sequence[object] | None
) -> None:
    if unknown := [name for name in scorers if name not in KNOWN]:
        raise ValueError(f"scorers are {', '.join(KNOWN)}; got {unknown[0]!r}")
    if "efficiency" in scorers and not answers:
        raise ValueError("efficiency needs answers=: prompts and right answers about the concept")
    if not 1 <= vote <= len(set(scorers)):
        raise ValueError(
            f"vote must lie between 1 and the number of scorers, {len(set(scorers))}; got {vote}"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")


def _near(tokenizer: Any, concept: Concept, words: Sequence[str]) -> tuple[int, ...]:  # noqa: ANN401
    """Return T-: tokens of the neighbours that are not the concept's own."""
    if not concept.neighbours:
        return ()
    plus = set(concept_tokens(tokenizer, concept, words=words))
    first, *others = concept.neighbours
    try:
        found = concept_tokens(tokenizer, Concept(name=first, synonyms=tuple(others)))
    except ValueError:
        return ()
    return tuple(i for i in found if i not in plus)


def _meta(
    run: Run, filters: Filters | None, candidates: Sequence[Feature], dropped: Sequence[Feature]
) -> dict[str, object]:
    words = {"T+": run.plus, "T-": run.minus}
    return {
        "model": model_id(run.model), "fingerprint": fingerprint(run.model), "library_version": library_version(),
        "dictionaries": {site: f"{dis.n} latents, levels {list(dis.widths)}" for site, dis in run.known.items()},
        "scorers": list(run.scorers), "vote": run.vote, "top": run.top, "options": asdict(run.options),
        "filters": None if filters is None else asdict(filters), "seed": run.seed,
        **{name: [str(run.tokenizer.decode([i])) for i in ids] for name, ids in words.items()},
        "texts": {kind: len(texts) for kind, texts in run.texts.items()},
        "tokens read": {kind: len(one.places) for kind, one in next(iter(run.fired.values())).items()},
        "answers": dict(run.answers), "candidates": len(candidates),
        "dropped": dict(Counter(_short(str(one.evidence["dropped"])) for one in dropped)),
    }  # fmt: skip


def _short(reason: str) -> str:
    for sign, name in (
        ("edited alone", "no fall of the concept's tokens"),
        ("the neighbours'", "neighbours' tokens fall"),
        ("neutral text", "neutral text moves"),
    ):
        if reason.startswith(sign):
            return name
    return reason


def _say_empty(concept: Concept, known: Mapping[str, Disentangler], table: FeatureTable) -> None:
    dropped = table.meta["dropped"]
    reasons = (
        ", ".join(f"{name}: {count}" for name, count in dropped.items())
        if isinstance(dropped, dict) and dropped
        else "no latent got enough votes"
    )
    warnings.warn(
        f"no latent of {', '.join(known)} stands for {concept.name!r} ({reasons}). A small or short-trained dictionary "
        "has none for most concepts: take other layers, train longer on texts about it, or use ce.sae.semi_nmf",
        ErasureWarning,
        stacklevel=3,
    )
