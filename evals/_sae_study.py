"""The study of sparse features on one model: dictionaries, latents, rows at equal divergence, relearning."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from concept_erasure.concept_items import Item
from concept_erasure.errors import ConceptErasureError
from concept_erasure.evals._sae_study_arms import (
    Arm,
    Matched,
    NeutralScore,
    baseline_arms,
    clamp_arm,
    match,
    nothing,
    pisces_arm,
    projection_arm,
)
from concept_erasure.evals._sae_study_data import (
    StudyConcept,
    training_texts,
    with_texts,
)
from concept_erasure.evals._sae_study_report import study_report
from concept_erasure.evals.language._attack import how_of
from concept_erasure.evals.language.items import item_scores
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.neutral import neutral_texts
from concept_erasure.evals.language.relearn import relearn, relearning_texts
from concept_erasure.report import Report
from concept_erasure.sae._concept_tokens import concept_tokens
from concept_erasure.sae._pisces_fit import value_signs
from concept_erasure.sae.activations import collect_activations
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.search import Feature, FeatureTable, Search, find_features
from concept_erasure.sae.seminmf import semi_nmf
from concept_erasure.sae.train import TrainConfig, train_vectors
from concept_erasure.sites import fingerprint

__all__ = ["SaeStudy", "Settings"]

logger = logging.getLogger(__name__)
BASELINES = ("leace", "directional ablation", "elm", "rmu")
PISCES, CLAMP, PROJECTION = "Matryoshka", "Matryoshka, codes", "semi-NMF"
STARTS = {CLAMP: 16.0, PROJECTION: 1.0}  # strengths to try first
MATCHING = 40  # neutral sentences that strengths are matched on


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Attributes:
        sites: MLPs whose outputs a Matryoshka dictionary is trained on, and whose neurons a semi-NMF is fitted to.
        routes: Kinds of dictionary and of edit.
        widths: Levels of the Matryoshka dictionary.
        k: Latents that fire on a vector.
        tokens: Of the texts it is trained on.
        steps: Of its training, about; None follows from the number of vectors.
        rank: Latents of the semi-NMF.
        nmf_tokens: Vectors of either kind it is fitted to.
        features: Latents of a site that are edited, at most.
        spare: Whether latents are looked for that neighbours' answers do not need.
        taus: Among which one is chosen.
        kls: Divergences in nats.
        controls: Draws of other latents.
        samples: The model's own, for each concept.
        baselines: Names, see `baseline_arms`.
        baseline_site: Where LEACE is fitted.
        steps_baseline: Of ELM and RMU.
        texts: That signs are counted on and baselines are fitted to.
        relearn_steps: 0 for no relearning.
        seed: Of everything random.
    """

    sites: tuple[str, ...] = ("mlp.8", "mlp.12", "mlp.16")
    routes: tuple[str, ...] = (PISCES, CLAMP, PROJECTION)
    widths: tuple[int, ...] = (288, 576, 1152, 2304)
    k: float = 32
    tokens: int = 330_000
    steps: int | None = None
    rank: int = 128
    nmf_tokens: int = 4000
    features: int = 8
    spare: bool = True
    taus: tuple[float, ...] = (0.3, 0.6)
    kls: tuple[float, ...] = (0.02, 0.05)
    controls: int = 5
    samples: int = 60
    baselines: tuple[str, ...] = BASELINES
    baseline_site: str = "residual.12"
    steps_baseline: int = 100
    texts: int = 150
    relearn_steps: int = 10
    seed: int = 0


class SaeStudy:
    """The study of one model; every finished part is a file.

    Args:
        model: A causal language model without edits; bit-identical afterwards.
        tokenizer: Its tokenizer.
        concepts: Concepts with items.
        neutral: Sentences about none of them: the last ones match strengths, the others are kept texts.
        general: Paragraphs to train the dictionary on.
        folder: For everything that is finished.
        settings: See `Settings`.
        reported: Texts on which the divergence is reported; default the library's own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerLike,
        concepts: Sequence[StudyConcept],
        neutral: Sequence[str],
        general: Sequence[str],
        *,
        folder: str | Path,
        settings: Settings | None = None,
        reported: Sequence[str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.folder, self.settings = Path(folder), settings or Settings()
        cut = max(len(neutral) - MATCHING, len(neutral) // 2)
        self.retain, self.matching = list(neutral[:cut]), list(neutral[cut:])
        self.neutral, self.general = list(neutral), list(general)
        self.reported = list(neutral_texts() if reported is None else reported)
        self.concepts = [
            with_texts(
                model, tokenizer, one, samples=self.settings.samples, cache=self.folder / "texts",
                seed=self.settings.seed,
            )
            for one in concepts
        ]  # fmt: skip
        self.mark = fingerprint(model)[:16]

    # -- dictionaries ---------------------------------------------------------------------------------------------

    @cached_property
    def matryoshka(self) -> dict[str, Disentangler]:
        """The dictionaries trained on all texts, by site."""
        s = self.settings
        texts = training_texts(
            self.tokenizer, self.concepts, self.neutral, self.general, tokens=s.tokens, seed=s.seed
        )
        logger.info("reading %d texts at %s", len(texts), ", ".join(s.sites))
        held = collect_activations(
            self.model, self.tokenizer, texts, sites=s.sites, cache_dir=self.folder / "activations",
            max_length=128, seed=s.seed, progress=False,
        )  # fmt: skip
        made = {}
        for site in s.sites:
            config = TrainConfig(widths=s.widths, k=s.k, seed=s.seed)
            if s.steps is not None:
                size = config.resolved(len(held)).batch_size or 1
                config = TrainConfig(widths=s.widths, k=s.k, seed=s.seed, tokens=s.steps * size)
            logger.info("%s: training on %d vectors", site, len(held))
            folder = self.folder / "dictionaries" / site
            made[site] = train_vectors(held, config, site=site, folder=folder, progress=False)
            logger.info("%s: %s", site, made[site].report.get("quality"))
        return made

    def factorised(self, one: StudyConcept) -> dict[str, Disentangler]:
        """Return the semi-NMF of the neurons on a concept's texts and on neutral ones, by site."""
        s, made = self.settings, {}
        for site in self.sites(PROJECTION):
            folder = self.folder / "dictionaries" / f"{_slug(one)}-nmf-{s.rank}-{site}"
            if (folder / "cfg.json").is_file():
                made[site] = Disentangler.from_pretrained(folder)
                continue
            logger.info("%s: semi-NMF at %s", one.concept.name, site)
            made[site] = semi_nmf(
                self.model, self.tokenizer, list(one.concept.forget_texts), self.retain, site=site, rank=s.rank,
                tokens=s.nmf_tokens, max_length=64, seed=s.seed, progress=False,
            )  # fmt: skip
            made[site].save_pretrained(folder)
        return made

    def sites(self, route: str) -> tuple[str, ...]:
        """Return where the dictionaries of a route sit: PISCES edits what MLPs write, a projection what is read."""
        own = self.settings.sites
        return own if route != PROJECTION else tuple(s.replace("mlp.", "value.") for s in own)

    def dictionaries(self, one: StudyConcept, route: str) -> dict[str, Disentangler]:
        """Return the dictionaries of a route."""
        return self.factorised(one) if route == PROJECTION else self.matryoshka

    def digest(self, one: StudyConcept, route: str) -> str:
        """Return a short hash of the dictionaries' tensors, part of the name of whatever is made with them."""
        known = self.dictionaries(one, route)
        tensors = [
            known[site].W_enc.detach().cpu().float().numpy().tobytes() for site in sorted(known)
        ]
        return hashlib.sha256(b"".join(tensors)).hexdigest()[:12]

    def features(self, one: StudyConcept, route: str) -> FeatureTable:
        """Return the concept's latents, at most so many a site: the most efficient on the questions to tune on."""
        s = self.settings
        linear = route == PROJECTION  # which takes the linear coefficient away
        what = [
            f"efficiency beyond what neighbours change{', linear' if linear else ''}",
            "semi-NMF" if linear else "Matryoshka",
            self.digest(one, route),
            s.features,
            s.texts,
            one.concept.to_dict(),
        ]
        mark = self._hash(what if s.spare else [*what, "near not spared"])
        folder = self.folder / "features" / f"{_slug(one)}-{mark}"
        if (folder / "features.json").is_file():
            return FeatureTable.load(folder)
        logger.info("%s: looking for features, %s", one.concept.name, route)
        found = find_features(
            self.model, self.tokenizer, cast("Any", self.dictionaries(one, route)), one.concept, filters=None,
            scorers=("efficiency",), vote=1, top=s.features,
            answers=_answers(one.train), near_answers=_answers(one.near_train) if s.spare else (),
            forget_texts=list(one.concept.forget_texts)[: s.texts], retain_texts=self.retain[: s.texts], seed=s.seed,
            options=Search(linear=linear), progress=False,
        )  # fmt: skip
        # over all levels: the table's own order has the general ones first
        best = sorted(found, key=lambda feature: -abs(feature.scores["efficiency"]))
        if linear:  # a projection has no sign to turn: what speaks against the answers has to stay
            best = [feature for feature in best if feature.direction > 0]
        kept: list[Feature] = []
        for site in self.sites(route):
            kept += [feature for feature in best if feature.site == site][: s.features]
        table = FeatureTable(
            tuple(kept), found.concept, found.dropped, found.rates, found.widths, found.meta
        )
        table.save(folder)
        return table

    # -- rows -----------------------------------------------------------------------------------------------------

    def signs(self, one: StudyConcept) -> dict[str, Tensor]:
        """Return the signs of neurons on a concept, by site."""
        path = self.folder / "signs" / f"{_slug(one)}-{self._hash([self.settings.sites])}.json"
        if not path.is_file():
            ids = concept_tokens(self.tokenizer, one.concept)
            texts = list(one.concept.forget_texts)[: self.settings.texts]
            found, _ = value_signs(
                self.model, self.tokenizer, texts, list(self.settings.sites), ids, max_length=64
            )
            _write(path, {site: signs.int().tolist() for site, signs in found.items()})
        return {site: torch.tensor(rows) for site, rows in _read(path).items()}

    def _hash(self, what: object) -> str:
        text = json.dumps([self.mark, what], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _match(self) -> NeutralScore:
        return NeutralScore(self.model, self.tokenizer, self.matching)

    @cached_property
    def _report(self) -> NeutralScore:
        return NeutralScore(self.model, self.tokenizer, self.reported, max_length=96)

    def row(
        self,
        one: StudyConcept,
        key: Mapping[str, object],
        make: Callable[[], Arm],
        kl: float,
        *,
        whole: bool = True,
    ) -> dict[str, Any]:
        """Return an arm's row at a divergence, from its file or measured now.

        Args:
            one: The concept.
            key: What tells this arm from others.
            make: Gives the arm.
            kl: Divergence to match; 0 for no edit.
            whole: Whether near items and the divergence on other texts are measured, too.
        """
        mark = self._hash([dict(key), kl, self.settings.seed, len(one.test), whole])
        path = self.folder / "rows" / f"{_slug(one)}-{mark}.json"
        if path.is_file():
            return _read(path)
        begun = time.perf_counter()
        try:
            arm = make()
            found = match(arm, kl, self._match) if kl else Matched(0.0, 0.0, True)
            with arm.applied(found.strength):
                row = self._measured(one, whole)
        except (ConceptErasureError, ValueError) as error:
            logger.warning("%s %s: %s", one.concept.name, dict(key), error)
            row, found = {"failed": " ".join(str(error).split())}, Matched(0.0, 0.0, False)
        row |= {
            "concept": one.concept.name, "key": dict(key), "wanted": kl, **asdict(found),
            "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        logger.info(
            "%s %s at %.3g: strength %.3g, kl %.4f, log-prob %s", one.concept.name, dict(key), kl,
            found.strength, found.kl, row.get("mean"),
        )  # fmt: skip
        _write(path, row)
        return row

    def _measured(self, one: StudyConcept, whole: bool) -> dict[str, Any]:
        test = item_scores(self.model, self.tokenizer, one.test, how=how_of(one.test))
        made: dict[str, Any] = {
            "log_prob": test.log_prob_right.tolist(),
            "correct": test.correct.int().tolist(),
            "mean": float(test.log_prob_right.mean()),
        }
        if whole:
            near = item_scores(self.model, self.tokenizer, one.near_test, how=how_of(one.near_test))
            made |= {
                "near_log_prob": near.log_prob_right.tolist(),
                "near_correct": near.correct.int().tolist(),
                "kl_reported": self._report(),
            }
        return made

    def relearnt(
        self, one: StudyConcept, row: Mapping[str, Any], make: Callable[[], Arm]
    ) -> dict[str, Any]:
        """Return the row with what some steps of training on the concept's texts bring back.

        Args:
            one: The concept.
            row: A row of `row`.
            make: Gives its arm again.
        """
        steps = self.settings.relearn_steps
        if not steps or "failed" in row:
            return dict(row)
        mark = self._hash([row["key"], row["wanted"], row["strength"], steps, self.settings.seed])
        path = self.folder / "relearnt" / f"{_slug(one)}-{mark}.json"
        if path.is_file():
            return {**row, "relearnt": _read(path)}
        begun = time.perf_counter()
        texts = relearning_texts(
            one.concept.forget_texts, one.test, share=0.3, seed=self.settings.seed
        )
        try:
            with make().applied(row["strength"]):
                curve = relearn(
                    self.model, self.tokenizer, texts, one.test, steps=steps, every=steps, lr=2e-4, max_length=64,
                    how=how_of(one.test), seed=self.settings.seed, progress=False,
                )  # fmt: skip
        except (ConceptErasureError, ValueError) as error:
            logger.warning("%s %s, relearning: %s", one.concept.name, row["key"]["arm"], error)
            return {**row, "relearning failed": " ".join(str(error).split())}
        made = {
            "steps": list(curve.steps), "accuracy": list(curve.accuracy), "log_prob": list(curve.log_prob),
            "texts": len(texts), "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        logger.info("%s %s relearnt: %s", one.concept.name, row["key"]["arm"], made["log_prob"])
        _write(path, made)
        return {**row, "relearnt": made}

    # -- the whole ------------------------------------------------------------------------------------------------

    def tau(self, one: StudyConcept, route: str, features: FeatureTable) -> tuple[float, float]:
        """Return the tau at which the answers to tune on are least likely, and its strength, at the largest KL.

        Only PISCES has a tau.
        """
        if route in STARTS:
            return 0.0, STARTS[route]
        names = [feature.name for feature in features]
        mark = self._hash([route, self.digest(one, route), names, self.settings.taus])
        path = self.folder / "tau" / f"{_slug(one)}-{mark}.json"
        if path.is_file():
            held = _read(path)
            return float(held["tau"]), float(held["strength"])
        tried = []
        for tau in self.settings.taus:
            arm = self._edit(one, route, features, tau, 1.0)
            found = match(arm, self.settings.kls[-1], self._match)
            with arm.applied(found.strength):
                scores = item_scores(self.model, self.tokenizer, one.train, how=how_of(one.train))
            tried.append((float(scores.log_prob_right.mean()), tau, found.strength, found.reached))
            logger.info("%s %s tau %s: %s", one.concept.name, route, tau, tried[-1])
        reached = [t for t in tried if t[3]] or tried
        mean, tau, strength, _ = min(reached)
        _write(path, {"tau": tau, "strength": strength, "train": mean, "tried": tried})
        return tau, strength

    def _edit(
        self, one: StudyConcept, route: str, features: FeatureTable, tau: float, start: float
    ) -> Arm:
        known = self.dictionaries(one, route)
        used = {site: known[site] for site in features.sites}
        if route == CLAMP:
            return clamp_arm(self.model, used, features, name=route, start=start)
        if route == PROJECTION:
            return projection_arm(
                self.model, self.tokenizer, one.concept, used, features, name=route, start=start
            )
        return pisces_arm(
            self.model, self.tokenizer, one.concept, used, features, self.signs(one), tau=tau, name=route,
            start=start,
        )  # fmt: skip

    def run(self, out: str | Path, *, meta: Mapping[str, object] | None = None) -> Report:
        """Run what is missing; write ``sae_flagship.json`` and ``.md`` after each part, and at the end ``.png``."""
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        begun = time.perf_counter()

        def write(picture: bool = False) -> Report:
            record = {
                **(meta or {}),
                "hours of this run": round((time.perf_counter() - begun) / 3600, 2),
            }
            quality = {
                site: dis.report.get("quality")
                for site, dis in self.__dict__.get("matryoshka", {}).items()
            }
            record |= {"settings": asdict(self.settings), "dictionaries": quality}
            record["hours of all rows"] = round(sum(row["seconds"] for row in rows) / 3600, 2)
            return study_report(rows, Path(out), meta=record, notes=notes, picture=picture)

        # what needs no long training comes first
        routes = sorted(self.settings.routes, key=lambda route: route != PROJECTION)
        parts: list[_Part] = [
            lambda one: [(self.row(one, {"arm": "no edit"}, _no_edit, 0.0), _no_edit)]
        ]
        parts += [lambda one, route=route: self._route(one, route, notes) for route in routes]  # type: ignore[misc]
        parts.insert(2, self._baselines)
        waiting: list[tuple[StudyConcept, int, Callable[[], Arm]]] = []
        for place, part in enumerate(parts):
            for one in self.concepts:
                for row, make in part(one):
                    if make is not None:
                        waiting.append((one, len(rows), make))
                    rows.append(row)
                write()
            if place in (2, len(parts) - 1):  # before the long training, and at the end
                for one, number, make in waiting:
                    rows[number] = self.relearnt(one, rows[number], make)
                    write()
                waiting.clear()
        return write(picture=True)

    def _route(self, one: StudyConcept, route: str, notes: list[str]) -> list[_Made]:
        s = self.settings
        features = self.features(one, route)
        names = ", ".join(feature.name for feature in features) or "none"
        notes.append(f"{one.concept.name}, {route}: latents {names}.")
        if not len(features):
            return []
        try:
            tau, start = self.tau(one, route, features)
        except (ConceptErasureError, ValueError) as error:
            notes.append(f"{one.concept.name}, {route}: failed: {' '.join(str(error).split())}")
            return []
        made: list[_Made] = []
        digest = self.digest(one, route)
        label = {
            "arm": route, "tau": tau, "latents": [feature.name for feature in features], "digest": digest,
        }  # fmt: skip
        for kl in s.kls:
            first = start * (kl / s.kls[-1]) ** 0.5

            def mine(first: float = first) -> Arm:
                return self._edit(one, route, features, tau, first)

            made.append((self.row(one, label, mine, kl), mine if kl == s.kls[-1] else None))
            for draw in range(s.controls):
                other = features.random_control(draw)

                def control(other: FeatureTable = other, first: float = first) -> Arm:
                    return self._edit(one, route, other, tau, first)

                latents = [feature.name for feature in other]
                key = {
                    "arm": f"{route}, control", "draw": draw, "tau": tau, "latents": latents, "digest": digest,
                }  # fmt: skip
                made.append((self.row(one, key, control, kl, whole=False), None))
        return made

    def _baselines(self, one: StudyConcept) -> list[_Made]:
        s = self.settings
        makers = baseline_arms(
            self.model, self.tokenizer, one.concept, self.retain, site=s.baseline_site, steps=s.steps_baseline,
            texts=s.texts, names=s.baselines, folder=self.folder / "erasers" / f"{_slug(one)}-{self.mark}",
        )  # fmt: skip
        rows: list[_Made] = []
        for name, make in makers.items():
            logger.info("%s: %s", one.concept.name, name)
            key = {
                "arm": name,
                "steps": s.steps_baseline,
                "site": s.baseline_site,
                "texts": s.texts,
            }
            for kl in s.kls:
                rows.append((self.row(one, key, make, kl), make if kl == s.kls[-1] else None))
        return rows


_Made = tuple[dict[str, Any], Callable[[], Arm] | None]
_Part = Callable[[StudyConcept], list[_Made]]


def _answers(items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(item.prompt, item.continuations[item.answer]) for item in items]


def _no_edit() -> Arm:
    return Arm("no edit", nothing)


def _slug(one: StudyConcept) -> str:
    return one.concept.name.lower().replace(" ", "_").replace("'", "")


def _read(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(path)
