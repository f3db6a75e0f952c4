"""One fit of FAMR on a language model, from texts to the eraser with its certificate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language._famr_certify import (
    Start,
    auto_rho,
    backtracked,
    certify,
    measure_influence,
    point_logits,
)
from concept_erasure.language._famr_language import (
    Given,
    LanguageObjective,
    Positions,
    TokenTarget,
    divergence_sum,
    forget_targets,
    retain_targets,
)
from concept_erasure.language._texts import forget_and_retain
from concept_erasure.language.batches import Batch, Batches, Encoded, encode, pad_id
from concept_erasure.language.cache import TargetCache
from concept_erasure.language.contrast import ContrastSource, check_signal, signal
from concept_erasure.language.eraser import fit_eraser
from concept_erasure.language.likelihood import parameters_to_train
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Anchor, Term
from concept_erasure.language.parameters import Lora, LoraParameterisation, Raw, trainable

if TYPE_CHECKING:
    from concept_erasure.language.famr import FamrConfig, FamrEraser

__all__ = ["PRESETS", "Preset", "TokenFit"]

Preset = Literal["default", "paper"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"target": "elm", "retain_weight": 1.0, "positions": None, "top_k": 20},
    "paper": {"target": "uniform", "retain_weight": 0.0, "positions": "all", "top_k": 20},
}
RADIUS = 0.3  # of the weights' norm for rho="auto": curvature keeps the run a tenth as far from the start
HELD_OUT = 0.2  # of the retain texts, which the fit does not see
SOURCES = ("auto", "persona", "anonymise")

E = TypeVar("E", bound="FamrEraser")


@dataclass(frozen=True, kw_only=True)
class TokenFit:
    """Options of a run, see `FamrEraser.fit`."""

    model: nn.Module
    tokenizer: Any
    concept: Concept
    target: TokenTarget
    given: Given | None
    rho: float | Literal["auto"]
    retain_weight: float
    positions: Positions | None
    contrast: ContrastSource | Literal["auto"]
    top_k: int
    inside: bool
    lora: Lora | None
    raw: Raw | None
    training: Training
    certify_texts: int
    lanczos_steps: int
    cache_dir: Path | None

    def __post_init__(self) -> None:
        if self.target not in get_args(TokenTarget):
            names = ", ".join(get_args(TokenTarget))
            raise ValueError(f"target must be one of {names}; got {self.target!r}")
        if self.positions is not None and self.positions not in get_args(Positions):
            raise ValueError(f"positions must be 'all' or 'contrast'; got {self.positions!r}")
        if self.contrast not in SOURCES:
            raise ValueError(f"contrast must be one of {', '.join(SOURCES)}; got {self.contrast!r}")
        if (self.given is not None) != (self.target == "given"):
            raise ValueError("target='given' and given= go together, or neither is used")
        if self.rho != "auto" and not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be positive, or 'auto'; got {self.rho!r}")
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must be at least 0; got {self.retain_weight}")
        if self.training.weight_decay:
            raise ValueError(
                f"weight_decay pulls towards zero, not towards the start; it must be 0, got "
                f"{self.training.weight_decay}"
            )
        for name, least in (("top_k", 2), ("certify_texts", 1), ("lanczos_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def source(self) -> ContrastSource | None:
        """The source of contrast that is used; None if none is."""
        if self.target != "elm" and self.positions == "all":
            return None
        if self.contrast != "auto":
            return self.contrast
        if self.concept.entities:
            return "anonymise"
        # without names to replace only the target that cannot do without asks the model to play
        return "persona" if self.target == "elm" or self.positions == "contrast" else None

    def run(
        self,
        cls: type[E],
        forget_texts: Sequence[str] | None,
        retain_texts: Sequence[str] | None,
        config: FamrConfig,
    ) -> E:
        """Fit, certify, and return the eraser."""
        if edits := active_edits(self.model):
            raise EditError(
                f"{edits[-1].label} is in force on this model: undo() or commit() it first"
            )
        source, measured = self.source, dict[str, object]()
        positions: Positions = self.positions or ("all" if source is None else "contrast")
        texts = self._texts(forget_texts, retain_texts)
        if source is not None:
            found = signal(
                self.model,
                self.tokenizer,
                self.concept,
                source,
                texts=texts[0],
                seed=self.training.seed,
            )
            check_signal(found, source, self.concept)
            measured["signal"] = found.to_dict()
        forget, retain, held = self._targets(texts, source, positions)
        spec = parameters_to_train(self.lora, self.raw, Lora())
        names = _names(self.model, spec, self.training.seed)
        goal = self._objective(forget, retain)
        start = self._start(goal, names, held)
        influence = measure_influence(
            goal, names, start.rho, steps=self.lanczos_steps, seed=self.training.seed
        )
        config = replace(
            config,
            form="language",
            target=self.target,
            rho=start.rho,
            inside=self.inside,
            retain_weight=self.retain_weight,
            positions=positions,
            contrast=source,
            top_k=self.top_k,
            certify_texts=self.certify_texts,
            lanczos_steps=self.lanczos_steps,
        )
        fitted = fit_eraser(
            cls,
            self.model,
            config=config,
            spec=spec,
            terms=self._terms(forget, retain),
            training=self.training,
            anchor=self._anchor(start.rho),
            report=measured,
        )
        return self._finish(fitted, goal, names, start, held, influence)

    def _texts(
        self, forget_texts: Sequence[str] | None, retain_texts: Sequence[str] | None
    ) -> tuple[list[str], list[str]]:
        forget, retain = forget_and_retain(
            self.model,
            self.tokenizer,
            self.concept,
            forget_texts,
            retain_texts,
            seed=self.training.seed,
            cache_dir=self.cache_dir,
        )
        if self.retain_weight and len(retain) < 2:
            raise ValueError(
                f"the retain term has weight {self.retain_weight:g} but there are {len(retain)} retain texts: 2 "
                "are needed, one of them held out; give retain_texts, or retain_weight=0"
            )
        return forget, retain

    def _targets(
        self,
        texts: tuple[list[str], list[str]],
        source: ContrastSource | None,
        positions: Positions,
    ) -> tuple[TargetCache, TargetCache | None, list[Encoded]]:
        """Return the targets to forget and to retain, and the retain texts that are held out."""
        training = self.training
        forget = forget_targets(
            self.model,
            self.tokenizer,
            self.concept,
            texts[0],
            target=self.target,
            positions=positions,
            source=source,
            given=self.given,
            top_k=self.top_k,
            max_length=training.max_length,
            batch_size=training.batch_size,
            seed=training.seed,
            folder=self._folder("forget"),
            progress=training.progress,
        )
        if not texts[1]:
            return forget, None, []
        others = encode(self.tokenizer, texts[1], max_length=training.max_length)
        draw = torch.Generator().manual_seed(training.seed)
        order = torch.randperm(len(others), generator=draw).tolist()
        count = math.ceil(HELD_OUT * len(others))
        held, seen = [others[i] for i in order[:count]], [others[i] for i in order[count:]]
        if not self.retain_weight:
            return forget, None, others
        kept = retain_targets(
            self.model,
            seen,
            batch_size=training.batch_size,
            pad=pad_id(self.tokenizer),
            folder=self._folder("retain"),
            progress=training.progress,
        )
        return forget, kept, held

    def _folder(self, part: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / f"famr_{part}"

    def _objective(self, forget: TargetCache, retain: TargetCache | None) -> LanguageObjective:
        """Return G on fixed samples of the texts the fit sees."""
        draw = torch.Generator().manual_seed(self.training.seed + 1)

        def some(count: int) -> list[int]:
            return torch.randperm(count, generator=draw)[: self.certify_texts].tolist()

        return LanguageObjective(
            self.model,
            forget,
            retain,
            self.retain_weight,
            some(len(forget)),
            [] if retain is None else some(len(retain)),
            self.training.batch_size,
            pad_id(self.tokenizer),
        )

    def _start(self, goal: LanguageObjective, names: Sequence[str], held: list[Encoded]) -> Start:
        rho = auto_rho(goal, names, RADIUS) if self.rho == "auto" else float(self.rho)
        logits = self._points(held) if held else None
        return Start(goal.values(), rho, logits, goal.token_readout())

    def _anchor(self, rho: float) -> Anchor:
        """Return the pull of the loop: outside, the proximal ``D <- D / (1 + lr rho)``, which never overshoots."""
        if self.inside:
            return Anchor(weight=rho, inside=True)
        return Anchor(weight=rho / (1 + self.training.learning_rate * rho))

    def _points(self, held: list[Encoded]) -> Tensor:
        return point_logits(
            self.model,
            held,
            batch_size=self.training.batch_size,
            pad=pad_id(self.tokenizer),
            seed=self.training.seed,
        )

    def _terms(self, forget: TargetCache, retain: TargetCache | None) -> list[Term]:
        training, pad = self.training, pad_id(self.tokenizer)

        def term(
            name: Literal["forget", "retain"], weight: float, cache: TargetCache, seed: int
        ) -> Term:
            def loss(model: nn.Module, batch: Batch) -> Tensor:
                return divergence_sum(model, batch, cache)

            batches = Batches(cache.texts, training.batch_size, seed=seed, pad_id=pad)
            return Term(name, weight, batches, loss)

        made = [term("forget", 1.0, forget, training.seed)]
        if retain is not None:
            made.append(term("retain", self.retain_weight, retain, training.seed + 1))
        return made

    def _finish(
        self,
        fitted: E,
        goal: LanguageObjective,
        names: Sequence[str],
        start: Start,
        held: list[Encoded],
        influence: Any,  # noqa: ANN401 an InfluenceLink or None
    ) -> E:
        """Return the eraser with its certificate, halved as long as that lowers J."""
        kept, factor = backtracked(goal, fitted, start)
        record, readout = certify(
            goal, kept, names, start, lambda: self._points(held), influence=influence
        )
        if not record.lowered:
            warnings.warn(
                f"J ended at {record.objective_end:.4g}, above its start {record.objective_start:.4g}: C1 and C3 do "
                "not apply. Lower rho or the learning rate, or train with inside=True",
                ErasureWarning,
                stacklevel=4,
            )
        report = {
            **fitted.report,
            "distance": record.distance,
            "scaled_by": factor,
            "forget_positions": goal.forget.positions,
            "forget_loss_before": record.forget_start,
            "forget_loss_after": record.forget_end,
            "token_log_prob_before": start.readout[0],
            "token_log_prob_after": readout[0],
            "token_accuracy_before": start.readout[1],
            "token_accuracy_after": readout[1],
            "certificate": record.to_dict(),
        }
        return replace(fitted, weights=kept.weights, report=report)


def _names(model: nn.Module, spec: Lora | Raw, seed: int) -> list[str]:
    """Return the parameters that a specification changes."""
    made = trainable(model, spec, seed=seed)
    if isinstance(made, LoraParameterisation):
        return [f"{path}.weight" for path in made.paths]
    return list(made.named)
