"""One evaluation while it runs: the models that are compared, and what was found so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.evals.language._identity import identify
from concept_erasure.evals.language._lifted import lifted
from concept_erasure.evals.language._robustness import ATTACKS, Case, Outcome
from concept_erasure.evals.language._suites import (
    READINGS,
    Options,
    Reading,
    Store,
    fingerprint_of,
)
from concept_erasure.evals.language._tables import FIRST
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.neutral import Applicable, Divergence, kl_to_original

__all__ = ["Evaluation"]

logger = logging.getLogger(__name__)

_NO_INSTRUCTION = {
    "probes"
}  # suites that say the same with and without a sentence before the prompt


@dataclass
class Evaluation:
    """One run: the models that are compared, and what was found so far."""

    model: nn.Module
    tokenizer: TokenizerLike
    concept: Concept
    eraser: Applicable | None
    options: Options
    told: str | None
    store: Store
    texts: Sequence[str]
    readings: dict[str, dict[str, Reading]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    kept: Divergence | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        active = len(active_edits(self.model))
        self.live = self.eraser is None and active > 0
        self.below = 0 if self.live else active  # edits in force that belong to every row

    @property
    def edited(self) -> bool:
        """Whether there is an edit to measure."""
        return self.eraser is not None or self.live

    @property
    def rows(self) -> tuple[str, ...]:
        """The models, in the order of the table."""
        made = [FIRST, *(["instruction"] if self.told else [])]
        return (*made, *(["edited"] if self.edited else []))

    def original(self) -> AbstractContextManager[object]:
        """Show the model without the edit that is in force."""
        return lifted(self.model, active_edits(self.model)[self.below :])

    def under(self, row: str) -> AbstractContextManager[object]:
        """Show the model of a row."""
        if row == "edited":
            return nullcontext() if self.eraser is None else self.eraser.apply(self.model)
        return lifted(self.model) if self.live else nullcontext()

    def _key(self, row: str) -> dict[str, object] | None:
        """Return what results on a row depend on; None if something acts on the model that cannot be told apart."""
        if self.store.folder is None:
            return None
        found = identify(self.model)
        if found.unknown or (self.live and row != "edited" and found.edits):
            return None
        return {
            "weights": found.weights,
            "edits": found.edits,
            "adapters": found.adapters,
            "told": self.told if row == "instruction" else None,
            "concept": fingerprint_of(self.concept.to_dict()),
            "tokenizer": str(
                getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)
            ),
            "seed": self.options.seed,
            "limit": self.options.limit,
        }

    def _of_suite(self, key: dict[str, object] | None, suite: str) -> dict[str, object] | None:
        if key is None:
            return None
        more = {"suite": suite, "budget": fingerprint_of(self.options.budget(suite))}
        judge = self.options.reference if suite == "fluency" else None
        return {**key, **more, "judge": None if judge is None else identify(judge[0]).weights}

    def read(self, suites: Sequence[str], bar: Callable[[str], object]) -> None:
        """Measure the suites on every row; the edit is made once."""
        for row in self.rows:
            told = self.told if row == "instruction" else None
            with self.under(row):
                key = self._key(row)
                for suite in suites:
                    if row == "instruction" and suite in _NO_INSTRUCTION:
                        continue
                    bar(f"{row}: {suite}")
                    begun = time.perf_counter()
                    make = partial(
                        READINGS[suite],
                        self.model,
                        self.tokenizer,
                        self.concept,
                        self.options,
                        told,
                    )
                    made = self.store.get(self._of_suite(key, suite), Reading, make)
                    self.readings.setdefault(suite, {})[row] = made
                    self.spent(suite, begun)

    def spent(self, suite: str, begun: float) -> None:
        self.seconds[suite] = self.seconds.get(suite, 0.0) + time.perf_counter() - begun
        logger.info("%s: %.1f s", suite, self.seconds[suite])

    def compare(self) -> None:
        """Measure the divergence on neutral text."""
        begun = time.perf_counter()
        change = active_edits(self.model) if self.live else self.eraser
        if change is not None:
            self.kept = kl_to_original(
                self.model, change, self.tokenizer, batch_size=self.options.batch_size
            )
        self.spent("specificity", begun)

    def attack(self, suites: Sequence[str], bar: Callable[[str], object]) -> None:
        """Attack the edited model."""
        concept = self.readings["concept"]
        with self.under("edited"):
            case = Case(
                model=self.model, tokenizer=self.tokenizer, concept=self.concept, options=self.options,
                original=self.original, before=concept[FIRST].scores,
                after=concept["edited"].scores, texts=self.texts,
            )  # fmt: skip
            key = self._key("edited")
            if key is not None:
                key |= {
                    "texts": fingerprint_of(list(self.texts)),
                    "before": [one.to_dict() for one in case.before.values()],
                }
            for suite in suites:
                bar(f"attack: {suite}")
                begun = time.perf_counter()
                make = partial(ATTACKS[suite], case)
                self.outcomes[suite] = self.store.get(self._of_suite(key, suite), Outcome, make)
                self.spent(suite, begun)
