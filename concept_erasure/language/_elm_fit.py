"""What a fit of ELM does before training: measure the signal, get texts, read the streams, keep the targets."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language._elm import (
    TARGET_OPTIONS,
    ElmConfig,
    elm_targets,
    forgotten,
    retain_targets,
)
from concept_erasure.language.batches import Batch, Batches, Encoded, encode, pad_id
from concept_erasure.language.cache import TargetCache, Targets, cache_key
from concept_erasure.language.contrast import (
    ContrastSource,
    Source,
    Streams,
    check_signal,
    knowledge,
    read_rows,
    signal,
    streams,
)
from concept_erasure.language.fluency import fluency_texts
from concept_erasure.language.likelihood import token_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.mixed_texts import check_texts, mixed_texts
from concept_erasure.language.objective import Term
from concept_erasure.language.reinforce import reinforce

__all__ = ["Prepared", "prepare"]

CHANCE = 0.25  # of four choices
REINFORCE_STEPS, REINFORCE_RATE = 100, 3e-4
_ITSELF = Source("persona")  # with streams that are all the same: one pass, and no contrast


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that training needs; the frozen model is not run again.

    Attributes:
        config: Options.
        forget: Targets to forget, with the texts they are for.
        retain: Targets to retain; None if they have no weight.
        fluent: Fluent texts; none if they have no weight.
        report: What was measured: signal, knowledge, numbers of texts and positions.
    """

    config: ElmConfig
    forget: TargetCache
    retain: TargetCache | None
    fluent: list[Encoded] = field(default_factory=list)
    report: dict[str, object] = field(default_factory=dict)

    def terms(self, training: Training, *, pad: int = 0, width: int | None = None) -> list[Term]:
        """Return the terms of the loss.

        Args:
            training: Gives batch size and seed.
            pad: Any token.
            width: Number of tokens of the vocabulary, if known.
        """
        config = self.config

        def batches(texts: list[Encoded], number: int) -> Batches:
            # an order of its own for each, which may have as many texts as another
            return Batches(texts, training.batch_size, seed=training.seed + number, pad_id=pad)

        made = [
            Term(
                "forget",
                config.forget_weight,
                batches(self.forget.texts, 0),
                self.forget.loss(width, lower=config.lower_weight),
            )
        ]
        if self.retain is not None:
            made.append(
                Term(
                    "retain",
                    config.retain_weight,
                    batches(self.retain.texts, 1),
                    self.retain.loss(width, drift=config.drift_weight),
                )
            )
        if self.fluent:

            def likelihood(model: nn.Module, batch: Batch) -> Tensor:
                return token_nll(model, batch).sum()

            made.append(Term("fluency", config.fluency_weight, batches(self.fluent, 2), likelihood))
        return made


def prepare(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    config: ElmConfig,
    training: Training,
    *,
    forget_texts: Sequence[str] | None = None,
    retain_texts: Sequence[str] | None = None,
    weak: nn.Module | None = None,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Measure the signal, get the texts, read the streams, compute the targets.

    Args:
        model: The model, without edits.
        tokenizer: Its tokenizer.
        concept: What to erase.
        config: Options.
        training: Gives batch size, length, seed, and whether to show bars.
        forget_texts: See `mixed_texts`.
        retain_texts: See `mixed_texts`.
        weak: See `Source`.
        cache_dir: Folder for samples and targets.

    Raises:
        NoSignalError: If the contrast carries no signal; texts are not sampled before that is known.
        ValueError: If texts are refused.
        EditError: If an edit is in force.
    """
    if edits := active_edits(model):
        raise EditError(f"{edits[-1].label} is in force; undo() or commit() it first")
    check_texts(
        [""] if forget_texts is None else forget_texts,
        [""] if retain_texts is None else retain_texts,
        config.retain_weight,
    )
    config = replace(config, contrast=_source(config.contrast, concept))
    build = _Builder(model, tokenizer, concept, config, training, cache_dir)
    # a reinforced copy is trained on the texts; other sources are measured before any text is sampled
    source = None if config.contrast == "reinforced" else Source(build.contrast, weak=weak)
    report = {} if source is None else build.measure(source, forget_texts or concept.forget_texts)
    forget, retain = build.texts(forget_texts, retain_texts)
    if source is None:
        source = build.reinforced(forget)
        report = build.measure(source, forget)
    made = build.forget(forget, source)
    kept = build.retain(retain) if retain else None
    fluent = build.fluent(forget) if config.fluency_weight else []
    report |= {
        "forget_texts": len(forget),
        "retain_texts": len(retain),
        "forget_positions": forgotten(made),
        "held_positions": made.positions - forgotten(made),
        "retain_positions": 0 if kept is None else kept.positions,
        "fluency_texts": len(fluent),
    }
    return Prepared(config, made, kept, fluent, report)


def _source(contrast: str, concept: Concept) -> str:
    if contrast != "auto":
        return contrast
    return "anonymise" if concept.entities else "persona"


@dataclass(frozen=True, eq=False)
class _Builder:
    """Makes targets and fluent texts, from the cache where they are there."""

    model: nn.Module
    tokenizer: Any
    concept: Concept
    config: ElmConfig
    training: Training
    cache_dir: str | Path | None

    @property
    def contrast(self) -> ContrastSource:
        return cast("ContrastSource", self.config.contrast)

    def measure(self, source: Source, texts: Sequence[str]) -> dict[str, object]:
        """Return signal and knowledge; refuse without the one, warn without the other."""
        known = knowledge(self.model, self.tokenizer, self.concept)
        if known is not None and known.low <= CHANCE:
            warnings.warn(
                f"the model hardly knows {self.concept.name!r}: it finds the right answer in {known} of the questions, "
                f"and chance is {CHANCE}; there is little to erase, and no measurement can show that it was",
                ErasureWarning,
                stacklevel=5,
            )
        found = signal(
            self.model,
            self.tokenizer,
            self.concept,
            source,
            texts=texts,
            seed=self.training.seed,
        )
        check_signal(found, source.name, self.concept)
        report: dict[str, object] = {"contrast": source.name, "signal": found.to_dict()}
        return report if known is None else {**report, "knowledge": known.to_dict()}

    def texts(
        self, forget: Sequence[str] | None, retain: Sequence[str] | None
    ) -> tuple[list[str], list[str]]:
        """Return texts to forget and to retain, anonymous forms of the first among the second."""
        config = self.config
        found, kept = mixed_texts(
            self.model,
            self.tokenizer,
            self.concept,
            forget,
            retain if config.retain_weight else [],
            own_texts=config.own_texts,
            seed=self.training.seed,
            statements=config.statements,
            max_new_tokens=self.training.max_length,
            cache_dir=self.cache_dir,
            progress=self.training.progress,
        )
        check_texts(found, kept, config.retain_weight)
        if config.contrast == "anonymise" and config.retain_anonymous:
            kept += [self.concept.anonymise(text) for text in found[: (len(kept) + 1) // 2]]
        return found, kept

    def reinforced(self, texts: Sequence[str]) -> Source:
        """Train the copy."""
        training = replace(
            self.training,
            steps=min(REINFORCE_STEPS, self.training.steps),
            learning_rate=REINFORCE_RATE,
            checkpoint=None,
        )
        encoded = encode(self.tokenizer, texts, max_length=training.max_length)
        copy = reinforce(self.model, encoded, training=training, pad=pad_id(self.tokenizer))
        return Source("reinforced", reinforced=lambda: copy.apply(self.model))

    def forget(self, texts: Sequence[str], source: Source) -> TargetCache:
        seen = streams(
            self.tokenizer,
            self.concept,
            texts,
            source.name,
            max_length=self.training.max_length,
            seed=self.training.seed,
        )

        def make(rows: list[int]) -> Targets:
            found = read_rows(self.model, seen, source, rows, temperature=self.config.temperature)
            return elm_targets(found, self.config)

        options = {name: getattr(self.config, name) for name in TARGET_OPTIONS}
        options |= {"stream": "forget", "others": _digest(seen), "seed": self.training.seed}
        made = self._built(
            seen, make, options, kept_in_memory=source.name in {"reinforced", "weak"}
        )
        if not (len(made) and forgotten(made)):
            raise ValueError(
                f"no position of the {len(texts)} texts has a contrast of {self.config.least} nats or more, so there "
                "is nothing to forget in them; give other forget_texts"
            )
        return made

    def retain(self, texts: Sequence[str]) -> TargetCache:
        own = encode(self.tokenizer, texts, max_length=self.training.max_length)
        seen = Streams(own, own, own)

        def make(rows: list[int]) -> Targets:
            return retain_targets(read_rows(self.model, seen, _ITSELF, rows), self.config)

        options = {"top_k": self.config.retain_top_k, "hard": self.config.hard_retain}
        return self._built(seen, make, {**options, "stream": "retain"})

    def _built(
        self,
        seen: Streams,
        make: Callable[[list[int]], Targets],
        options: dict[str, object],
        *,
        kept_in_memory: bool = False,
    ) -> TargetCache:
        key = cache_key(self.model, seen.own, options)
        folder = None
        if self.cache_dir is not None and not kept_in_memory:
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            folder = Path(self.cache_dir) / f"targets_{options['stream']}_{digest}"
        return TargetCache.build(
            seen.own,
            make,
            key=key,
            folder=folder,
            batch_size=max(1, self.training.batch_size),
            progress=self.training.progress,
        )

    def fluent(self, texts: Sequence[str]) -> list[Encoded]:
        return fluency_texts(
            self.model,
            self.tokenizer,
            self.concept,
            texts,
            self.contrast,
            n=self.config.fluency_texts,
            max_length=self.training.max_length,
            gamma=self.config.gamma,
            max_new_tokens=min(self.config.fluency_tokens, self.training.max_length),
            seed=self.training.seed,
            progress=self.training.progress,
        )


def _digest(seen: Streams) -> str:
    """Return a hash of what novice and expert read, and of the copies."""
    sha = hashlib.sha256(repr(seen.copies).encode())
    for texts in (seen.novice, seen.expert):
        for text in texts:
            sha.update(text.ids.numpy().tobytes() + text.supervised.numpy().tobytes())
    return sha.hexdigest()
