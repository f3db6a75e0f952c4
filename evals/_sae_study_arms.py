"""What is compared at equal divergence: an edit with one knob, and the strength of it that costs so many nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import collect, evaluating
from concept_erasure.concept import Concept
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.eraser import Eraser
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.language.batches import Batch, collate, encode, logits_at, pad_id
from concept_erasure.language.elm import ElmEraser
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora
from concept_erasure.language.rmu import RmuEraser
from concept_erasure.linalg import LowRankAffine
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.linear.mean_projection import MeanProjectionEraser
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.pisces import PiscesEraser
from concept_erasure.sae.projection import LatentProjectionEraser
from concept_erasure.sae.search import FeatureTable
from concept_erasure.sites import resolve

__all__ = [
    "Arm",
    "Matched",
    "NeutralScore",
    "baseline_arms",
    "clamp_arm",
    "match",
    "pisces_arm",
    "projection_arm",
]

Applied = Callable[[float], AbstractContextManager[object]]
_HELD = 1 << 27  # log-probabilities of the original that are kept
_TRIES = 7
_CLOSE = 0.1  # of the wanted divergence


@dataclass(frozen=True)
class Arm:
    """An edit with a knob; 0 changes nothing, or least.

    Attributes:
        name: In tables.
        applied: From a strength to a context in which the model is edited.
        start: Strength to try first.
        most: Largest strength to try.
    """

    name: str
    applied: Applied
    start: float = 1.0
    most: float = 200.0


class NeutralScore:
    """Mean ``KL(P0 || P)`` of a token on texts, with the original's distributions kept.

    Args:
        model: The model without edits.
        tokenizer: Its tokenizer.
        texts: The texts.
        max_length: Tokens of a text.
        batch_size: Texts a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerLike,
        texts: Sequence[str],
        *,
        max_length: int = 48,
        batch_size: int = 16,
    ) -> None:
        self.model = model
        device = next(model.parameters()).device
        rows = encode(tokenizer, list(texts), max_length=max_length)
        self._held: list[tuple[Batch, Tensor]] = []
        values = 0
        with evaluating(model):
            for part in torch.arange(len(rows)).split(batch_size):
                batch = collate(rows, part.tolist(), pad_id=pad_id(tokenizer)).to(device)
                before = logits_at(model, batch).float().log_softmax(-1)
                values += before.numel()
                if self._held and values > _HELD:
                    break
                self._held.append((batch, before))

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(batch.count for batch, _ in self._held)

    def __call__(self) -> float:
        """Return the divergence of the model as it is now, in nats."""
        total, count = 0.0, 0
        with evaluating(self.model):
            for batch, before in self._held:
                after = logits_at(self.model, batch).float().log_softmax(-1)
                total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
                count += batch.count
        return max(0.0, total / count)


@dataclass(frozen=True)
class Matched:
    """A strength and what it costs.

    Attributes:
        strength: Of the knob.
        kl: Divergence in nats on the texts it was matched on.
        reached: Whether that is within a tenth of what was wanted; not so if even the largest strength costs less.
    """

    strength: float
    kl: float
    reached: bool


def match(arm: Arm, wanted: float, divergence: Callable[[], float]) -> Matched:
    """Return the strength of an arm at which its divergence is the wanted one, within a tenth.

    The divergence grows about as the square of the strength, so the next try is ``s sqrt(wanted / kl)`` inside the
    bracket that is known, or its middle.

    Args:
        arm: The arm.
        wanted: In nats.
        divergence: Measures the model as it is.
    """
    low, high = 0.0, math.inf
    strength, best = min(arm.start, arm.most), Matched(0.0, 0.0, False)
    for _ in range(_TRIES):
        with arm.applied(strength):
            kl = divergence()
        if abs(kl - wanted) < abs(best.kl - wanted):
            best = Matched(strength, kl, abs(kl - wanted) <= _CLOSE * wanted)
        if best.reached:
            break
        if kl < wanted:
            low = strength
        else:
            high = strength
        if low >= arm.most:
            break
        guess = strength * math.sqrt(wanted / kl) if kl > 0 else 4 * strength
        inside = low < guess < high
        middle = (low + high) / 2 if high < math.inf else min(arm.most, 4 * max(low, 1e-3))
        strength = min(arm.most, guess if inside else middle)
    return best


def pisces_arm(
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    disentanglers: dict[str, Disentangler],
    features: Any,  # noqa: ANN401 a FeatureTable or a list of features
    signs: dict[str, Tensor],
    *,
    tau: float,
    name: str,
    start: float = 1.0,
) -> Arm:
    """Return PISCES with mu as the knob; the published coefficient, so that mu = 0 changes little."""

    def applied(mu: float) -> AbstractContextManager[object]:
        eraser = PiscesEraser.fit(
            model, tokenizer, concept, disentanglers=disentanglers, features=features, tau=tau, mu=mu,
            coefficient="code", exact=True, signs={site: signs[site] for site in disentanglers},
        )  # fmt: skip
        return eraser.apply(model)

    return Arm(name, applied, start)


def clamp_arm(
    model: nn.Module,
    disentanglers: dict[str, Disentangler],
    features: FeatureTable,
    *,
    name: str,
    start: float = 16.0,
) -> Arm:
    """Return hooks that take the codes of latents out of the activations, ``x - s sum_f +-z_f(x) d_f``; s the knob.

    The same latents as PISCES edits in the weights: what it does tells wrong latents from a wrong edit.
    """
    held: dict[str, dict[int, int]] = {}
    for one in features:
        held.setdefault(one.site, {})[one.index] = one.direction

    def applied(strength: float) -> AbstractContextManager[object]:
        patches = []
        for site, signs in held.items():
            dis, latents = disentanglers[site], torch.tensor(list(signs))
            rows = dis.W_dec[latents] * torch.tensor(list(signs.values()))[:, None]

            def shift(
                x: Tensor, dis: Disentangler = dis, latents: Tensor = latents, rows: Tensor = rows
            ) -> Tensor:
                z = dis.encode(x, latents.to(x.device))
                return x - (strength * (z @ rows.to(z))).to(x.dtype)

            patches.append(HookPatch(resolve(model, site)[0], shift))
        return Edit(model, patches, label=f"{name} {strength}")

    return Arm(name, applied, start, most=2000.0)


def projection_arm(
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    disentanglers: dict[str, Disentangler],
    features: Any,  # noqa: ANN401 a FeatureTable or a list of features
    *,
    name: str,
    start: float = 1.0,
) -> Arm:
    """Return a projection of latents with its strength as the knob."""
    eraser = LatentProjectionEraser.fit(
        model, tokenizer, concept, disentanglers=disentanglers, features=features
    )
    return Arm(name, lambda s: eraser.scaled(s).apply(model), start)


def baseline_arms(
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    retain: Sequence[str],
    *,
    site: str,
    steps: int,
    texts: int,
    folder: Path,
    names: Sequence[str] = ("leace", "directional ablation", "elm", "rmu"),
    max_length: int = 64,
) -> dict[str, Callable[[], Arm]]:
    """Return functions that fit the baselines, by name; the knob scales what the fitted edit adds.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        concept: With texts to forget.
        retain: Texts to keep.
        site: Of LEACE, and where the direction of directional ablation is read.
        steps: Of what is trained.
        texts: Read by the two that are not.
        folder: For the fitted erasers.
        names: Which.
        max_length: Tokens of a text.
    """
    forget = list(concept.forget_texts)
    kept = list(retain)
    training = Training(
        steps=steps, learning_rate=1e-3, batch_size=4, max_length=max_length, progress=False
    )

    def vectors() -> tuple[Any, Tensor]:
        both = [*forget[:texts], *kept[:texts]]
        labels = torch.tensor([1] * len(forget[:texts]) + [0] * len(kept[:texts]))
        options: dict[str, Any] = {"tokens": "mean", "max_length": max_length, "batch_size": 8}
        return collect(model, tokenizer, both, sites=site, progress=False, **options), labels

    def kept_as(name: str, fit: Callable[[], Any]) -> Any:  # noqa: ANN401 of whatever method
        path = folder / f"{name}-{site}-{steps}-{texts}"
        if not path.is_dir():
            fit().save_pretrained(path)
        return Eraser.from_pretrained(path)

    def leace() -> Arm:
        eraser = kept_as("leace", lambda: LeaceEraser.fit(*vectors()))
        return Arm("LEACE", lambda s: _hooked(model, [site], eraser.map.scale(s), f"leace {s}"))

    def ablation() -> Arm:
        eraser = kept_as("ablation", lambda: MeanProjectionEraser.fit(*vectors(), affine=False))
        every = [one.name for one in resolve(model, "residual.*")]
        return Arm(
            "directional ablation",
            lambda s: _hooked(model, every, eraser.map.scale(s), f"ablation {s}"),
        )

    def elm() -> Arm:
        own = replace(
            ElmEraser.default_training(), steps=steps, max_length=max_length, progress=False
        )
        eraser = kept_as(
            "elm",
            lambda: ElmEraser.fit(
                model, tokenizer, concept, forget_texts=forget[:texts], retain_texts=kept[:texts], training=own
            ),
        )  # fmt: skip
        return Arm("ELM", lambda s: eraser.scaled(s).apply(model), most=4.0)

    def rmu() -> Arm:
        eraser = kept_as(
            "rmu",
            lambda: RmuEraser.fit(
                model, tokenizer, concept, forget_texts=forget[:texts], retain_texts=kept[:texts],
                lora=Lora(rank=16), training=training,
            ),
        )  # fmt: skip
        return Arm("RMU", lambda s: eraser.scaled(s).apply(model), most=4.0)

    made = {"leace": leace, "directional ablation": ablation, "elm": elm, "rmu": rmu}
    return {name: made[name] for name in names}


def _hooked(
    model: nn.Module,
    sites: Sequence[str],
    function: LowRankAffine,
    label: str,
) -> AbstractContextManager[object]:
    patches = [HookPatch(site, function) for site in resolve(model, list(sites))]
    return Edit(model, patches, label=label)


def nothing(_: float) -> AbstractContextManager[object]:
    """Return a context in which nothing changes."""
    return nullcontext()
