"""Redirection: inside the model, a text about the concept is read as the same text about somebody unknown.

With ``h^l(x)_i`` the output of block l, x~ the text x with the concept's names replaced by their stand-ins and i~ the
place in it that i corresponds to, the target is::

    t_i = h_0^l(x~)_i~  +  reach (h_0^l(x~)_i~ - h_0^l(x)_i)

of the frozen model, and the loss over texts x of the concept, r to retain and g to write fluently::

    mean_i |h^l(x)_i - t_i|^2 / d  +  w_r mean_i |h^l(r)_i - h_0^l(r)_i|^2 / d  +  w_g mean_i NLL(g)_i,

where each coordinate of a state is divided by its standard deviation on all these texts, so that a few coordinates of
huge variance do not outweigh the rest. As in RMU (arXiv:2403.03218) the passes of the first two terms end after block
l; low-rank updates of blocks up to l are trained, and the texts with names replaced are among those to retain, since
what is to change must depend on the names. The target is ELM's idea (arXiv:2410.02760) of one who does not know the
concept, taken from the anonymous text as in `contrast`, but as a hidden state.

The texts g begin with prompts about the concept and go on as the frozen model does after the anonymous prompt, at a
temperature below 1 (`fluency.anonymous_continuations`). They are needed: one who does not know a name is less sure of
what follows it, so that samples read worse, and states beyond those of ignorance make that worse still. This is the
only pass to the end of the model; its batches are half as large.

This method is ours; no paper has it. Compared with RMU's random direction, the model goes on in plain language, since
the later blocks read states they know. Compared with ELM there is no target over the vocabulary.

``reach`` 0 asks for the states of ignorance itself. What stands beside a name ("wizard" says much without "Potter")
then still gives answers away, and a part of the way is not gone because the update is small; a positive reach aims
beyond. Too much of it makes answers improbable that ignorance would find likely, which gives them away again.

What to expect: names that are not among the concept's entities are not redirected; relearning is quick, as with every
update that is small. Measure both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError, SiteNotFoundError
from concept_erasure.language.batches import (
    Batch,
    Batches,
    Encoded,
    activations_at,
    check_head,
    collate,
    encode,
    pad_id,
)
from concept_erasure.language.contrast import streams
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser
from concept_erasure.language.fluency import anonymous_continuations
from concept_erasure.language.likelihood import chosen, parameters_to_train, token_nll
from concept_erasure.language.loop import Training
from concept_erasure.language.mixed_texts import check_texts, mixed_texts
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Raw
from concept_erasure.sites import find_sites

__all__ = ["RedirectConfig", "RedirectEraser", "redirect_target"]

DEPTH = (
    1 / 3
)  # of the block whose output is redirected; the later half of those up to it is trained
PROMPT_WORDS = 6  # of a text that lends its beginning as a prompt
READ_TEXTS = 32  # at a time, without gradient

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "reach": 3.0,
        "retain_weight": 4.0,
        "own_texts": 400,
        "fluency_weight": 0.3,
        "fluency_texts": 128,
    }
}


def redirect_target(own: Tensor, anonymous: Tensor, reach: float) -> Tensor:
    """Return the target of some states, shape ``(N, d)``.

    Args:
        own: Of the text, shape ``(N, d)``.
        anonymous: Of its anonymous form at the corresponding places, shape ``(N, d)``.
        reach: How far beyond the anonymous state, in units of the way to it.
    """
    return anonymous + reach * (anonymous - own)


@dataclass(frozen=True, kw_only=True)
class RedirectConfig(LanguageConfig):
    """Options of the fit, see `RedirectEraser.fit`.

    Attributes:
        layer: l.
        reach: See the module.
        retain_weight: Factor of the second term.
        own_texts: Texts of the model's own of each kind, at most.
        fluency_weight: Factor of the third term.
        fluency_texts: Texts of it, at most.
        fluency_temperature: At which they are written.
        fluency_tokens: Length of their continuations.
    """

    layer: int = 0
    reach: float = 3.0
    retain_weight: float = 4.0
    own_texts: int = 400
    fluency_weight: float = 0.3
    fluency_texts: int = 128
    fluency_temperature: float = 0.7
    fluency_tokens: int = 40

    def __post_init__(self) -> None:
        for name in ("reach", "retain_weight", "own_texts", "fluency_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.fluency_texts < 1 or self.fluency_tokens < 2:
            raise ValueError(
                "fluency_texts must be at least 1 and fluency_tokens at least 2; got "
                f"{self.fluency_texts} and {self.fluency_tokens}"
            )


@dataclass(frozen=True, repr=False, eq=False)
class RedirectEraser(LanguageEraser):
    """A change of weights after which the concept's names are read as those of unknown people, see `fit`.

    Example:
        >>> eraser = RedirectEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "redirect"
    config_type: ClassVar[type[EraserConfig]] = RedirectConfig

    @classmethod
    def default_training(cls, preset: Literal["default"] = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        chosen({}, _PRESETS, preset)
        return Training(
            steps=160, learning_rate=2e-3, batch_size=8, max_length=48, warmup=5, schedule="linear"
        )

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        preset: Literal["default"] = "default",
        layer: int | None = None,
        reach: float | None = None,
        retain_weight: float | None = None,
        own_texts: int | None = None,
        fluency_weight: float | None = None,
        fluency_texts: int | None = None,
        lora: Lora | None = None,
        raw: Raw | None = None,
        training: Training | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        The targets are kept on the model's device: as many numbers as the texts have tokens, times the width.

        Args:
            model: A causal language model; it needs no head if texts are given and `fluency_weight` is 0.
            tokenizer: Its tokenizer.
            concept: What to erase; it has entities with stand-ins.
            forget_texts: Default those of the concept and the model's own samples.
            retain_texts: Likewise.
            preset: There is one.
            layer: l; default at a third of the depth.
            reach: See the module; 0 to 5 make sense. Larger erases more.
            retain_weight: Factor of the second term; 0 leaves it out.
            own_texts: Samples of the model's own, at most, of each kind.
            fluency_weight: Factor of the third term; 0 leaves it out.
            fluency_texts: Texts of it, at most.
            lora: What to train; default rank 16 on the later half of the blocks up to l.
            raw: Train other parameters instead.
            training: Options of the loop; default `default_training`.
            cache_dir: Where the model's own samples are kept for the next time.

        Returns:
            The eraser. Its report has ``gap`` (mean squared distance from the anonymous state, in the units of the
            loss, before and after) and ``retain_change`` (the second term, after).

        Raises:
            ValueError: If texts or options are refused, or the texts have none of the concept's names.
            SiteNotFoundError: If the model has no such block.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given = {
            "reach": reach,
            "retain_weight": retain_weight,
            "own_texts": own_texts,
            "fluency_weight": fluency_weight,
            "fluency_texts": fluency_texts,
        }
        options = chosen(given, _PRESETS, preset)
        training = training or cls.default_training(preset)
        if options["fluency_weight"]:
            check_head(model)
        site, blocks = _site(model, layer)
        config = RedirectConfig(concept=concept.name, preset=preset, layer=blocks[-1], **options)
        if lora is not None and lora.layers is None:
            lora = replace(lora, layers=blocks)
        spec = parameters_to_train(lora, raw, Lora(layers=blocks))
        if edits := active_edits(model):
            raise EditError(f"{edits[-1].label} is in force; undo() or commit() it first")
        forget, retain = _texts(
            model, tokenizer, concept, forget_texts, retain_texts, config, training, cache_dir
        )
        fill = pad_id(tokenizer)
        made = _Prepared.of(model, tokenizer, concept, (forget, retain), site, training, fill)
        fluent = _fluent(model, tokenizer, concept, forget, config, training)
        eraser = fit_eraser(
            cls,
            model,
            config=config,
            spec=spec,
            terms=made.terms(config, training, fluent),
            training=training,
        )
        with eraser.apply(model):
            after = made.compared(model)
        counts = {
            "forget_texts": len(made.own),
            "retain_texts": len(made.retain),
            "fluency_texts": len(fluent),
        }
        return replace(eraser, report={**eraser.report, **counts, **after})


@dataclass(frozen=True, eq=False)
class _States:
    """States of the supervised tokens of some texts, one text after another.

    Attributes:
        values: Shape ``(N, d)``, float32.
        starts: Index of the first of each text, shape ``(texts,)``.
    """

    values: Tensor
    starts: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, texts: Sequence[Encoded], site: str, fill: int) -> _States:
        """Run the model, in evaluation mode."""
        device = next(model.parameters()).device
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        counts = torch.tensor([text.count for text in texts])
        parts: list[Tensor] = [torch.empty(0)] * len(texts)
        with evaluating(model):
            for start in range(0, len(order), READ_TEXTS):
                rows = order[start : start + READ_TEXTS]
                found = activations_at(
                    model, collate(texts, rows, pad_id=fill).to(device), site
                ).float()
                for row, part in zip(rows, found.split(counts[rows].tolist()), strict=True):
                    parts[row] = part
        return cls(torch.cat(parts), (counts.cumsum(0) - counts).to(device))

    def at(self, batch: Batch) -> Tensor:
        """Return the states of the supervised tokens of a batch, in their order."""
        lengths = batch.lengths
        first = lengths.cumsum(0) - lengths
        owners = batch.owners
        within = torch.arange(len(owners), device=owners.device) - first[owners]
        return self.values[self.starts[batch.rows][owners] + within]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Texts, targets and the scale of each coordinate."""

    site: str
    fill: int
    own: list[Encoded]
    retain: list[Encoded]
    states: _States
    anonymous: _States
    held: _States | None
    scale: Tensor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 see fit
        concept: Concept,
        texts: tuple[list[str], list[str]],
        site: str,
        training: Training,
        fill: int,
    ) -> _Prepared:
        """Read the frozen model.

        Raises:
            ValueError: If the texts are the same without the concept's names.
        """
        seen = streams(tokenizer, concept, texts[0], "anonymise", max_length=training.max_length)
        pairs = [_pair(*one) for one in zip(seen.own, seen.novice, strict=True)]
        pairs = [pair for pair in pairs if pair[0].count]
        own, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        retain = encode(tokenizer, texts[1], max_length=training.max_length) if texts[1] else []
        if not own or all(torch.equal(one.ids[: len(two)], two.ids) for one, two in pairs):
            raise ValueError(
                f"none of the {len(texts[0])} forget_texts has a name of {concept.name!r} that has a stand-in, so "
                "there is nothing to redirect; give other forget_texts, or the concept other entities"
            )
        states, anonymous = (_States.of(model, one, site, fill) for one in (own, other))
        held = _States.of(model, retain, site, fill) if retain else None
        every = [states.values, anonymous.values, *([] if held is None else [held.values])]
        scale = torch.cat(every).var(0).clamp_min(torch.finfo(torch.float32).tiny)
        return cls(site, fill, own, retain, states, anonymous, held, scale)

    def terms(
        self, config: RedirectConfig, training: Training, fluent: list[Encoded]
    ) -> list[Term]:
        """Return the terms of the loss."""
        values = redirect_target(self.states.values, self.anonymous.values, config.reach)
        target = replace(self.states, values=values)

        def batches(texts: list[Encoded], number: int, size: int = training.batch_size) -> Batches:
            return Batches(texts, size, seed=training.seed + number, pad_id=self.fill)

        made = [Term("forget", 1.0, batches(self.own, 0), self._loss(target))]
        if self.held is not None:
            held = batches(self.retain, 1)
            made.append(Term("retain", config.retain_weight, held, self._loss(self.held)))
        if fluent:

            def likelihood(model: nn.Module, batch: Batch) -> Tensor:
                return token_nll(model, batch).sum()

            half = max(1, training.batch_size // 2)
            made.append(
                Term("fluency", config.fluency_weight, batches(fluent, 2, half), likelihood)
            )
        return made

    def _loss(self, target: _States) -> Any:  # noqa: ANN401 a loss of a Term
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            hidden = activations_at(model, batch, self.site).float()
            return ((hidden - target.at(batch)).square() / self.scale).mean(-1).sum()

        return loss

    def compared(self, model: nn.Module) -> dict[str, object]:
        """Return what the edit in force does, for the report."""

        def distance(one: _States, other: _States) -> float:
            return float(((one.values - other.values).square() / self.scale).mean())

        now = _States.of(model, self.own, self.site, self.fill)
        made: dict[str, object] = {
            "gap": [distance(one, self.anonymous) for one in (self.states, now)]
        }
        if self.held is not None:
            kept = _States.of(model, self.retain, self.site, self.fill)
            made["retain_change"] = distance(kept, self.held)
        return made


def _pair(own: Encoded, other: Encoded) -> tuple[Encoded, Encoded]:
    """Return two texts with the places supervised at which the matched tokens are predicted.

    There the states have read what comes before alone: a whole name in the one, its whole stand-in in the other. The
    first token is left out: what is made of it does not depend on the text.
    """
    mine, theirs = (one.supervised.roll(-1) for one in (own, other))
    mine[-1] = theirs[-1] = False
    if bool(mine[0]) or bool(theirs[0]):
        mine[mine.nonzero()[0]] = False
        theirs[theirs.nonzero()[0]] = False
    return replace(own, supervised=mine), replace(other, supervised=theirs)


def _site(model: nn.Module, layer: int | None) -> tuple[str, tuple[int, ...]]:
    """Return the site of ``h^l`` and the numbers of the blocks that are trained.

    Raises:
        SiteNotFoundError: If there is no such block.
    """
    count = sum(name.startswith("residual.") for name in find_sites(model))
    if layer is None:
        layer = min(count - 1, round(DEPTH * count))
    if not 0 <= layer < count:
        raise SiteNotFoundError(f"the model has blocks 0..{count - 1}; layer is {layer}")
    return f"residual.{layer}", tuple(range((layer + 1) // 2, layer + 1))


def _texts(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see fit
    concept: Concept,
    forget_texts: Sequence[str] | None,
    retain_texts: Sequence[str] | None,
    config: RedirectConfig,
    training: Training,
    cache_dir: str | Path | None,
) -> tuple[list[str], list[str]]:
    """Return texts to forget and to retain, the anonymous forms of the first among the second."""
    given = [[""] if one is None else one for one in (forget_texts, retain_texts)]
    check_texts(given[0], given[1], config.retain_weight)
    forget, retain = mixed_texts(
        model,
        tokenizer,
        concept,
        forget_texts,
        retain_texts if config.retain_weight else [],
        own_texts=config.own_texts,
        seed=training.seed,
        statements=True,
        max_new_tokens=training.max_length,
        cache_dir=cache_dir,
        progress=training.progress,
    )
    check_texts(forget, retain, config.retain_weight)
    if config.retain_weight:
        retain += [concept.anonymise(text) for text in forget]
    return forget, retain


def _fluent(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see fit
    concept: Concept,
    texts: Sequence[str],
    config: RedirectConfig,
    training: Training,
) -> list[Encoded]:
    """Return the texts of the third term, none without its weight."""
    if not config.fluency_weight:
        return []
    asked: Sequence[str] = concept.prompts
    if concept.forget_recipe is not None or concept.prompts:
        asked = concept.sample_prompts("forget")
    return anonymous_continuations(
        model,
        tokenizer,
        concept,
        asked or [" ".join(text.split()[:PROMPT_WORDS]) for text in texts],
        n=config.fluency_texts,
        temperature=config.fluency_temperature,
        max_new_tokens=config.fluency_tokens,
        seed=training.seed,
        progress=training.progress,
    )
