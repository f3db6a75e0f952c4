"""What a fit of ELM starts from: options, texts, streams, targets, terms. The method itself is in `elm`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language.batches import (
    Batch,
    Batches,
    Encoded,
    encode,
    pad_id,
)
from concept_erasure.language.cache import TargetCache, Targets, cache_key
from concept_erasure.language.contrast import (
    Reading,
    Source,
    Streams,
    check_signal,
    knowledge,
    read_rows,
    signal,
    streams,
)
from concept_erasure.language.eraser import LanguageConfig
from concept_erasure.language.fluency import fluency_texts
from concept_erasure.language.likelihood import token_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.mixed_texts import check_texts, mixed_texts
from concept_erasure.language.objective import Term
from concept_erasure.language.reinforce import reinforce
from concept_erasure.language.targets import TopK, paper_target, plausible_target, ramp
from concept_erasure.sites import find_sites

__all__ = [
    "Contrast",
    "ElmConfig",
    "Prepared",
    "early_layers",
    "elm_targets",
    "prepare",
    "retain_targets",
]

Contrast = Literal["auto", "persona", "anonymise", "reinforced", "weak"]


@dataclass(frozen=True, kw_only=True)
class ElmConfig(LanguageConfig):
    """Options of the fit, see `ElmEraser.fit`.

    Attributes:
        target: ``plausible``, or ``raw`` for (E1) and (E2) as they stand.
        ramped: Whether eta grows from 1 along each text (``raw``).
        temperature: Divides the logits of all three streams.
        top_k: Most tokens of a target to forget.
        alpha: See `plausible_target`; so are the next four.
        kappa: See `plausible_target`.
        growth: See `plausible_target`.
        widen_from: See `plausible_target`.
        widen_to: See `plausible_target`.
        least: Contrast in nats from which a position is to be forgotten; others are held (``plausible``).
        most: Contrast up to which a position counts for more.
        hold: Factor of positions that are held, in the same units.
        retain_top_k: Tokens kept of a target to retain.
        hard_retain: Whether the target to retain is the most probable token alone.
        retain_anonymous: Whether the texts to forget with names replaced are among those to retain, up to as many as
            there are others: what should change must depend on the names (`anonymise`).
        own_texts: Texts of the model's own in addition to those of the concept, at most.
        fluency_texts: Fluent texts, if they have a weight.
        gamma: Strength of the guidance under which they are written.
        fluency_tokens: Length of their continuations, at most.
    """

    contrast: str = "auto"
    target: Literal["plausible", "raw"] = "plausible"
    eta: float = 3.0
    ramped: bool = False
    temperature: float = 1.0
    top_k: int = 50
    alpha: float = 0.05
    kappa: float = 2.0
    growth: float = 1.0
    widen_from: float = 1.0
    widen_to: int = 20
    least: float = 0.5
    most: float = 5.0
    hold: float = 0.1
    retain_top_k: int = 100
    hard_retain: bool = False
    retain_anonymous: bool = True
    own_texts: int = 400
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    fluency_weight: float = 0.0
    fluency_texts: int = 64
    gamma: float = 3.0
    fluency_tokens: int = 128

    def __post_init__(self) -> None:
        if self.contrast not in get_args(Contrast):
            raise ValueError(
                f"contrast must be one of {', '.join(get_args(Contrast))}; got {self.contrast!r}"
            )
        if self.target not in {"plausible", "raw"}:
            raise ValueError(f"target must be 'plausible' or 'raw'; got {self.target!r}")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive to erase; got {self.eta}")
        if not self.forget_weight > 0:
            raise ValueError(f"forget_weight must be positive; got {self.forget_weight}")
        for name in ("retain_weight", "fluency_weight", "hold", "least", "own_texts"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")


TARGET_OPTIONS = (
    "contrast",
    "target",
    "eta",
    "ramped",
    "temperature",
    "top_k",
    "alpha",
    "kappa",
    "growth",
    "widen_from",
    "widen_to",
    "least",
    "most",
    "hold",
)


# -- targets ----------------------------------------------------------------------------------------


def elm_targets(reading: Reading, config: ElmConfig) -> Targets:
    """Return the targets of positions in texts to forget, with their weights.

    Args:
        reading: What the three streams say there.
        config: Options.
    """
    r = reading
    if config.target == "raw":
        eta: float | Tensor = config.eta
        if config.ramped:
            eta = ramp(config.eta, *_place_in_text(r.rows))
        top = paper_target(r.lp0, r.lp_novice, r.lp_expert, eta, top_k=config.top_k)
        return Targets(top, torch.ones_like(r.rows, dtype=torch.float32), r.rows, r.places)
    found = plausible_target(
        r.lp0,
        r.lp_novice,
        r.lp_expert,
        r.tokens,
        alpha=config.alpha,
        kappa=config.kappa,
        growth=config.growth,
        widen_from=config.widen_from,
        widen_to=config.widen_to,
        eta_max=config.eta,
        top_k=config.top_k,
    )
    forget = found.contrast >= config.least
    held = TopK.of(r.lp0, config.top_k)
    top = TopK(
        torch.where(forget[:, None], found.target.indices, held.indices),
        torch.where(forget[:, None], found.target.log_probs, held.log_probs),
        torch.where(forget, found.target.tail, held.tail),
    )
    weights = torch.where(forget, found.contrast.clamp_max(config.most), config.hold)
    made = Targets(top, weights, r.rows, r.places)
    return made if config.hold else made.where(forget)


def forgotten(targets: TargetCache) -> int:
    """Return how many positions are to be forgotten; those that are held have a tail."""
    return int((targets.column("tail") == -torch.inf).sum())


def _place_in_text(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each position within its text and the number of positions of its text."""
    _, inverse, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - first[inverse], counts[inverse]


def retain_targets(reading: Reading, config: ElmConfig) -> Targets:
    """Return the targets of positions in texts to retain: P0, or its most probable token alone (E4)."""
    lp0 = reading.lp0
    if config.hard_retain:
        best = lp0.argmax(-1, keepdim=True).int()
        zeros = torch.zeros(best.shape, device=lp0.device)
        top = TopK(best, zeros, torch.full_like(zeros[:, 0], -torch.inf))
    else:
        top = TopK.of(lp0, config.retain_top_k)
    weights = torch.ones_like(reading.rows, dtype=torch.float32)
    return Targets(top, weights, reading.rows, reading.places)


def early_layers(model: nn.Module) -> tuple[int, ...]:
    """Return layers N/8 to N/4 of N: the paper's 4 to 7 of 32, where facts are looked up."""
    n = sum(name.startswith("residual.") for name in find_sites(model))
    first = round(n / 8)
    return tuple(range(first, max(first + 1, round(n / 4))))


# -- all of it --------------------------------------------------------------------------------------


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
                self.forget.loss(width),
            )
        ]
        if self.retain is not None:
            made.append(
                Term(
                    "retain",
                    config.retain_weight,
                    batches(self.retain.texts, 1),
                    self.retain.loss(width),
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
    name = _source(config.contrast, concept)
    config = replace(config, contrast=name)
    report: dict[str, object] = {}
    early = name != "reinforced"  # the copy has to be trained first, on the texts
    if early:
        source = Source(name, weak=weak)
        _measure(
            model,
            tokenizer,
            concept,
            source,
            forget_texts or concept.forget_texts,
            report,
            training.seed,
        )
    forget, retain = mixed_texts(
        model,
        tokenizer,
        concept,
        forget_texts,
        retain_texts if config.retain_weight else [],
        own_texts=config.own_texts,
        seed=training.seed,
        cache_dir=cache_dir,
        progress=training.progress,
    )
    check_texts(forget, retain, config.retain_weight)
    if not early:
        source = _reinforced(model, tokenizer, forget, training)
        _measure(model, tokenizer, concept, source, forget, report, training.seed)
    build = _Builder(model, tokenizer, concept, config, training, cache_dir)
    made = build.forget(forget, source)
    if name == "anonymise" and config.retain_anonymous and retain:
        retain = retain + [concept.anonymise(text) for text in forget[: len(retain)]]
    kept = build.retain(retain) if config.retain_weight else None
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


def _source(contrast: str, concept: Concept) -> Any:  # noqa: ANN401 one of ContrastSource
    if contrast != "auto":
        return contrast
    return "anonymise" if concept.entities else "persona"


def _measure(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see prepare
    concept: Concept,
    source: Source,
    texts: Sequence[str],
    report: dict[str, object],
    seed: int,
) -> None:
    """Put signal and knowledge into the report, refuse without the one, warn without the other."""
    known = knowledge(model, tokenizer, concept)
    if known is not None:
        report["knowledge"] = known.to_dict()
        if known.low <= CHANCE:
            warnings.warn(
                f"the model hardly knows {concept.name!r}: it finds the right answer in {known} of the questions, and "
                f"chance is {CHANCE}; there is little to erase, and no measurement can show that it was",
                ErasureWarning,
                stacklevel=4,
            )
    found = signal(model, tokenizer, concept, source, texts=texts, seed=seed)
    report["signal"] = found.to_dict()
    report["contrast"] = source.name
    check_signal(found, source.name, concept)


CHANCE = 0.25


def _reinforced(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see prepare
    texts: Sequence[str],
    training: Training,
) -> Source:
    encoded = encode(tokenizer, texts, max_length=training.max_length)
    copy = reinforce(
        model,
        encoded,
        training=replace(
            training,
            steps=min(REINFORCE_STEPS, training.steps),
            checkpoint=None,
            learning_rate=REINFORCE_RATE,
        ),
        pad=pad_id(tokenizer),
    )
    return Source("reinforced", reinforced=lambda: copy.apply(model))


REINFORCE_STEPS, REINFORCE_RATE = 100, 3e-4


@dataclass(frozen=True, eq=False)
class _Builder:
    """Makes targets and fluent texts, from the cache where they are there."""

    model: nn.Module
    tokenizer: Any
    concept: Concept
    config: ElmConfig
    training: Training
    cache_dir: str | Path | None

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
            _source(self.config.contrast, self.concept),
            n=self.config.fluency_texts,
            max_length=self.training.max_length,
            gamma=self.config.gamma,
            max_new_tokens=min(self.config.fluency_tokens, self.training.max_length),
            seed=self.training.seed,
            progress=self.training.progress,
        )


_ITSELF = Source("persona")  # with streams that are all the same: one pass, and no contrast


def _digest(seen: Streams) -> str:
    """Return a hash of what novice and expert read, and of the copies."""
    sha = hashlib.sha256(repr(seen.copies).encode())
    for texts in (seen.novice, seen.expert):
        for text in texts:
            sha.update(text.ids.numpy().tobytes() + text.supervised.numpy().tobytes())
    return sha.hexdigest()
