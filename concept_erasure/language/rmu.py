"""RMU, representation misdirection: inside the model, text of the concept becomes one fixed random direction.

With ``h^l`` the output of block l, ``h_0^l`` that of the frozen model, and for each topic a unit vector v drawn once
from ``[0, 1)^d``, the loss is

    mean_{t,j} ( h^l(x_t)_j - c v_j )^2  +  alpha mean_{t,j} ( h^l(r_t)_j - h_0^l(r_t)_j )^2

over texts x of the concept and r to retain; only the MLPs' down projections of blocks l-2, l-1 and l are trained. All
forward passes end after block l: neither later blocks nor logits are ever computed. The frozen model is the same
model with its original weights put back, so there is no second copy.

Paper: Li et al. 2024, arXiv:2403.03218, and its code. Deviations: padding does not count (the code averages over it);
topics share batches and count equally (the code takes them in turns). The default further scales c to the model, as
three times the mean norm of ``h_0^l`` on the topic's texts, because a published constant fits the one model it was
tuned on, and takes l at the published depth, 7/32. In it the first token counts only among what is retained: what a
model makes of it does not depend on the text (it is the BOS, and often of a huge norm), so the two terms would pull
on one vector. ``preset="paper"`` is the published recipe for Zephyr-7B: l = 7, c = 6.5, alpha = 1200, 150 batches of
4, rate 5e-5, all tokens. (Defaults of the code: c = 20, alpha = 100, 80 batches. Mixtral: c = 300, alpha = 1600.)

What to expect: text about the concept turns into gibberish; v lies in the positive orthant, so that vectors of two
topics have a cosine of about 0.75; one direction carries most of the effect, so that ablating it brings much back;
and where a norm follows the down projection (Gemma 2 and 3) an update can turn its output but not lengthen it, so
that c v is out of reach: see ``alignment`` in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from concept_erasure.collect import evaluating
from concept_erasure.concept import Concept
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.language._texts import forget_and_retain
from concept_erasure.language.batches import (
    Batch,
    Batches,
    Encoded,
    activations_at,
    collate,
    encode,
    pad_id,
)
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser
from concept_erasure.language.likelihood import Preset, chosen, parameters_to_train
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, Parameterisation, Raw
from concept_erasure.sites import find_sites

__all__ = ["RmuConfig", "RmuEraser", "rmu_loss", "steering_vectors"]

PUBLISHED_DEPTH = 7 / 32
TRAINED_BLOCKS = 3
MEASURED_TEXTS = 32

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"c": "auto", "retain_weight": 100.0, "all_tokens": False},
    "paper": {"c": 6.5, "retain_weight": 1200.0, "all_tokens": True},
}


def steering_vectors(topics: int, width: int, *, seed: int) -> Tensor:
    """Return a unit vector for each topic, drawn uniformly from ``[0, 1)^d`` and normalised, shape ``(topics, d)``."""
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.rand(topics, width, generator=generator), dim=1)


def rmu_loss(hidden: Tensor, target: Tensor) -> Tensor:
    """Return ``mean_j (h_j - target_j)^2`` of each position, shape ``(N,)``.

    Args:
        hidden: ``h^l``, shape ``(N, d)``.
        target: ``c v`` or ``h_0^l``, shape ``(N, d)`` or ``(d,)``.
    """
    return (hidden.float() - target.float()).square().mean(-1)


@dataclass(frozen=True, kw_only=True)
class RmuConfig(LanguageConfig):
    """Options of the fit, see `RmuEraser.fit`.

    Attributes:
        topics: Names of the concepts.
        layer: l.
        c: Of each topic.
        c_scale: c in units of the mean norm, where it was scaled to it; else None.
        retain_weight: alpha.
        all_tokens: Whether the first token of a text is steered too.
    """

    topics: tuple[str, ...] = ()
    layer: int = 7
    c: tuple[float, ...] = ()
    c_scale: float | None = None
    retain_weight: float = 100.0
    all_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("topics", "c"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(value > 0 for value in self.c):
            raise ValueError(f"c must be positive, or 'auto'; got {list(self.c)}")
        if not self.retain_weight >= 0:
            raise ValueError(f"retain_weight must be at least 0; got {self.retain_weight}")


@dataclass(frozen=True, eq=False)
class _Texts:
    """Texts as tokens: those of all topics one after another, the topic of each, those to retain."""

    forget: list[Encoded]
    topic: Tensor
    retain: list[Encoded]

    def of_topic(self, topic: int, most: int = MEASURED_TEXTS) -> list[Encoded]:
        """Return the first texts of a topic."""
        rows = (self.topic == topic).nonzero()[:most, 0].tolist()
        return [self.forget[row] for row in rows]

    def shares(self) -> Tensor:
        """Return the weight of a position in each text to forget, so that topics count equally, shape ``(n,)``."""
        counts = torch.tensor([float(text.count) for text in self.forget])
        totals = torch.zeros(int(self.topic.max()) + 1).index_add(0, self.topic, counts)
        return (totals.sum() / (len(totals) * totals))[self.topic]


@dataclass(frozen=True, repr=False, eq=False)
class RmuEraser(LanguageEraser):
    """A change of weights that misdirects text of the concept inside the model, see `fit`.

    Example:
        >>> eraser = RmuEraser.fit(model, tokenizer, concept)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "rmu"
    config_type: ClassVar[type[EraserConfig]] = RmuConfig

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset == "paper":
            return Training(
                steps=150,
                learning_rate=5e-5,
                batch_size=4,
                max_length=768,
                weight_decay=0.01,
                clip=None,
            )
        return Training(steps=50, learning_rate=5e-4, batch_size=4)

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept | Sequence[Concept],
        *,
        forget_texts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        retain_texts: Sequence[str] | None = None,
        preset: Preset = "default",
        layer: int | None = None,
        c: float | Sequence[float] | Literal["auto"] | None = None,
        c_scale: float = 3.0,
        retain_weight: float | None = None,
        all_tokens: bool | None = None,
        lora: Lora | None = None,
        raw: Raw | None = None,
        training: Training | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        Args:
            model: A language model; it needs no head if texts are given.
            tokenizer: Its tokenizer.
            concept: What to erase; several are topics with a vector each.
            forget_texts: Default those of each concept, else the model's own samples. For several concepts a mapping
                from their names.
            retain_texts: Default those of all concepts, else the model's own samples. The paper's: Wikipedia.
            preset: See the module.
            layer: l; default 7 of 32, as deep in other models.
            c: Length of the target, one or one for each topic; ``"auto"`` is `c_scale` times the mean norm.
            c_scale: See above; 2 to 5 make sense. Larger misdirects more.
            retain_weight: alpha; default 100.
            all_tokens: Whether the first token of a text is steered too.
            lora: Train a `Lora` instead, by default on blocks l-2 to l.
            raw: Train other parameters instead.
            training: Options of the loop; default `default_training`.
            cache_dir: Where the model's own samples are kept for the next time.

        Returns:
            The eraser. Its report has ``norms`` (mean norm of ``h_0^l`` for each topic), ``alignment`` (mean cosine of
            ``h^l`` with v on texts to forget, before and after) and ``retain_change`` (``|h - h_0|^2 / |h_0|^2``).

        Raises:
            ValueError: If texts or options are refused.
            SiteNotFoundError: If the model has no such block, or no down projection there.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given = {"c": c, "retain_weight": retain_weight, "all_tokens": all_tokens}
        options = chosen(given, _PRESETS, preset)
        training = training or cls.default_training(preset)
        site, blocks = _site(model, layer, preset)
        topics = (concept,) if isinstance(concept, Concept) else tuple(concept)
        texts = _read(
            model, tokenizer, topics, forget_texts, retain_texts, training, options, cache_dir
        )
        before = _Measured.of(model, texts, site, training.batch_size)
        lengths = _lengths(options["c"], c_scale, before.norms)
        config = RmuConfig(
            concept=", ".join(one.name for one in topics),
            preset=preset,
            topics=tuple(one.name for one in topics),
            layer=blocks[-1],
            c=lengths,
            c_scale=c_scale if options["c"] == "auto" else None,
            retain_weight=options["retain_weight"],
            all_tokens=options["all_tokens"],
        )
        vectors = steering_vectors(len(topics), before.width, seed=training.seed)
        eraser = fit_eraser(
            cls,
            model,
            config=config,
            spec=_parameters(model, lora, raw, blocks),
            terms=_Terms(config, training, texts, site, vectors, pad_id(tokenizer)),
            training=training,
        )
        with eraser.apply(model):
            after = _Measured.of(model, texts, site, training.batch_size)
        return replace(eraser, report={**eraser.report, **before.compared(after, vectors)})


@dataclass(frozen=True, eq=False)
class _Terms:
    """The two terms of the loss, made when the frozen model is at hand."""

    config: RmuConfig
    training: Training
    texts: _Texts
    site: str
    vectors: Tensor
    pad_id: int

    def __call__(self, parameterisation: Parameterisation) -> list[Term]:
        device = next(parameterisation.model.parameters()).device
        targets = (torch.tensor(self.config.c)[:, None] * self.vectors).to(device)
        topic, shares = self.texts.topic.to(device), self.texts.shares().to(device)
        site = self.site

        def misdirect(model: nn.Module, batch: Batch) -> Tensor:
            rows = batch.rows[batch.owners]
            return (
                shares[rows] * rmu_loss(activations_at(model, batch, site), targets[topic[rows]])
            ).sum()

        def hold(model: nn.Module, batch: Batch) -> Tensor:
            with parameterisation.reference(), torch.no_grad():
                frozen = activations_at(model, batch, site)
            return rmu_loss(activations_at(model, batch, site), frozen).sum()

        terms = [Term("forget", 1.0, self._batches(self.texts.forget, 0), misdirect)]
        if self.config.retain_weight:
            held = self._batches(self.texts.retain, 1)
            terms.append(Term("retain", self.config.retain_weight, held, hold))
        return terms

    def _batches(self, texts: list[Encoded], offset: int) -> Batches:
        seed = self.training.seed + offset
        return Batches(texts, self.training.batch_size, seed=seed, pad_id=self.pad_id)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Activations on some texts, for each topic and for what is retained."""

    forget: list[Tensor]
    retain: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, texts: _Texts, site: str, batch_size: int) -> _Measured:
        """Run the model, in evaluation mode."""
        device = next(model.parameters()).device

        def run(chosen: list[Encoded]) -> Tensor:
            parts = [
                activations_at(model, collate(chosen, rows, pad_id=0).to(device), site).float()
                for rows in torch.arange(len(chosen)).split(batch_size)
            ]
            return torch.cat(parts)

        with evaluating(model):
            topics = range(int(texts.topic.max()) + 1)
            retain = run(texts.retain[:MEASURED_TEXTS]) if texts.retain else None
            return cls([run(texts.of_topic(k)) for k in topics], retain)

    @property
    def width(self) -> int:
        """The width d."""
        return self.forget[0].shape[1]

    @property
    def norms(self) -> list[float]:
        """Mean norm for each topic."""
        return [float(hidden.norm(dim=1).mean()) for hidden in self.forget]

    def compared(self, after: _Measured, vectors: Tensor) -> dict[str, object]:
        """Return what the edit did, for the report."""

        def alignment(hidden: list[Tensor]) -> list[float]:
            pairs = zip(hidden, vectors, strict=True)
            return [float(torch.cosine_similarity(h, v.to(h)[None]).mean()) for h, v in pairs]

        made: dict[str, object] = {
            "norms": self.norms,
            "norms_after": after.norms,
            "alignment": [alignment(self.forget), alignment(after.forget)],
        }
        if self.retain is not None and after.retain is not None:
            change = (after.retain - self.retain).square().sum() / self.retain.square().sum()
            made["retain_change"] = float(change)
        return made


def _site(model: nn.Module, layer: int | None, preset: str) -> tuple[str, tuple[int, ...]]:
    """Return the site of ``h^l`` and the numbers of the blocks that are trained, the last of which is l.

    Raises:
        SiteNotFoundError: If there is no such block.
    """
    count = sum(name.startswith("residual.") for name in find_sites(model))
    if layer is None:
        layer = 7 if preset == "paper" else min(count - 1, round(PUBLISHED_DEPTH * count))
    if not 0 <= layer < count:
        raise SiteNotFoundError(f"the model has blocks 0..{count - 1}; layer is {layer}")
    return f"residual.{layer}", tuple(range(max(0, layer - TRAINED_BLOCKS + 1), layer + 1))


def _parameters(
    model: nn.Module, lora: Lora | None, raw: Raw | None, blocks: tuple[int, ...]
) -> Lora | Raw:
    """Return what is trained: by default the down projections of some blocks."""
    if lora is not None and lora.layers is None:
        lora = replace(lora, layers=blocks)
    sites = find_sites(model)
    missing = [i for i in blocks if f"value.{i}" not in sites]
    if missing and lora is None and raw is None:
        raise SiteNotFoundError(
            f"block {missing[0]} has no single down projection; say lora= or raw="
        )
    if lora is not None or raw is not None:
        return parameters_to_train(lora, raw, lora or raw or Lora())
    return Raw(patterns=tuple(f"{sites[f'value.{i}'].module}.weight" for i in blocks))


def _lengths(
    c: float | Sequence[float] | Literal["auto"], c_scale: float, norms: Sequence[float]
) -> tuple[float, ...]:
    """Return c for each topic.

    Raises:
        ValueError: If there are too many or too few.
    """
    if isinstance(c, str):
        if c != "auto":
            raise ValueError(f"c must be a number, one for each topic, or 'auto'; got {c!r}")
        return tuple(c_scale * norm for norm in norms)
    if isinstance(c, int | float):
        return (float(c),) * len(norms)
    if len(c) != len(norms):
        raise ValueError(f"{len(norms)} topics need one c, or as many; got {len(c)}")
    return tuple(float(value) for value in c)


def _read(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see fit
    topics: Sequence[Concept],
    forget_texts: Sequence[str] | Mapping[str, Sequence[str]] | None,
    retain_texts: Sequence[str] | None,
    training: Training,
    options: Mapping[str, Any],
    cache_dir: str | Path | None,
) -> _Texts:
    """Return the texts of all topics as tokens.

    Raises:
        ValueError: If there are no topics, two share a name, or there is nothing to forget or to retain.
    """
    weight = options["retain_weight"]
    if retain_texts is not None and len(retain_texts) == 0 and weight:
        raise ValueError(
            f"the retain term has weight {weight:g} but retain_texts is empty; give texts, None for those of "
            "the concept, or retain_weight=0"
        )
    given = _by_topic([topic.name for topic in topics], forget_texts)
    forget: list[Encoded] = []
    owner: list[int] = []
    retain: list[str] = []
    for k, topic in enumerate(topics):
        mine, kept = forget_and_retain(
            model,
            tokenizer,
            topic,
            given[k],
            retain_texts if weight else (),
            seed=training.seed,
            cache_dir=cache_dir,
        )
        made = encode(tokenizer, mine, max_length=training.max_length)
        forget += [_whole(text) for text in made] if options["all_tokens"] else made
        owner += [k] * len(made)
        retain += [text for text in kept if text not in retain]
    held = encode(tokenizer, retain, max_length=training.max_length) if weight else []
    return _Texts(forget, torch.tensor(owner), [_whole(text) for text in held])


def _whole(text: Encoded) -> Encoded:
    """Return a text all of whose tokens count, the first too."""
    return replace(text, supervised=torch.ones_like(text.supervised))


def _by_topic(
    names: Sequence[str], texts: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> list[Sequence[str] | None]:
    """Return the texts of each topic, None where they are the concept's own."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"topics must have different names, at least one; got {list(names)}")
    if texts is None:
        return [None] * len(names)
    if isinstance(texts, Mapping):
        if set(texts) != set(names):
            raise ValueError(
                f"forget_texts has texts of {', '.join(texts)}; the concepts are {', '.join(names)}"
            )
        made = [texts[name] for name in names]
    elif len(names) > 1:
        raise ValueError(f"{len(names)} concepts need forget_texts as a mapping from their names")
    else:
        made = [texts]
    if empty := [name for name, one in zip(names, made, strict=True) if len(one) == 0]:
        raise ValueError(f"forget_texts of {empty[0]!r} is empty; give texts, or None")
    return list(made)
