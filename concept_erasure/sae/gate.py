"""ItD, interpret then deactivate: latents of a concept are turned against it, but only in prompts that use them.

For target prompts and prompts to keep, at one site of a text encoder or a language model:

1. the code of each prompt's tokens; of each latent the largest; the K largest latents of the prompt
2. F = those of any target prompt, without those of any prompt to keep
3. deactivated, x becomes ``x + (s - 1) sum_{f in F} z_f(x) d_f``: s < 0 pushes away, s = 0 takes out
4. the error of a prompt is the mean square of that change over its tokens; theta is 0.99 times the smallest error of a
   target prompt
5. when the model runs, prompts whose error reaches theta are changed; the others keep every bit

Paper: Tian et al. 2025, arXiv:2503.09446, and its code. Deviations: the error is that of the change, not of replacing
x by its reconstruction, and what the dictionary leaves over stays. Faults of the released code that are not repeated:
theta is always fitted, on the target prompts it is for; errors are reduced in the same way when fitting and when
running; prompts to keep are drawn with a seed; BOS, EOS and padding are left out of each prompt (the code drops the
first row of the batch); tensors go where the model is.

The eraser is made of hooks and not persistent: the knowledge stays in the weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, get_args

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import Edit, base_fingerprint
from concept_erasure.eraser import EraserConfig, ModelEraser
from concept_erasure.errors import ShapeError
from concept_erasure.sae._gate_patch import Gate, GatePatch, Reduction, moved, reduced
from concept_erasure.sae._places import one_site
from concept_erasure.sae._reading import read
from concept_erasure.sae._sparse_eraser import check_no_edits
from concept_erasure.sae.activations import special_ids
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sites import Space, model_id

__all__ = ["GateConfig", "SaeGateEraser", "latents_of"]


@dataclass(frozen=True, kw_only=True)
class GateConfig(EraserConfig):
    """Options of the fit and its two numbers.

    Attributes:
        concept: Name of what is erased.
        strength: s.
        theta: Error from which a prompt is changed.
        top: K.
        share: theta as a share of the smallest error of a target prompt.
        reduction: How errors of places become one of a prompt.
        specials: Ids that never count.
        subtract: Whether the dictionary subtracts ``b_dec`` before encoding.
        seed: Of the choice of prompts to keep.
    """

    concept: str = ""
    strength: float = -8.0
    theta: float = 0.0
    top: int = 128
    share: float = 0.99
    reduction: str = "mean"
    specials: tuple[int, ...] = ()
    subtract: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "specials", tuple(self.specials))
        if self.strength >= 1:
            raise ValueError(
                f"strength must be below 1, which changes nothing; got {self.strength}"
            )
        if self.top < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"top must be at least 1 and share in (0, 1]; got {self.top} and {self.share}"
            )
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be 'mean' or 'max'; got {self.reduction!r}")


@dataclass(frozen=True, repr=False, eq=False)
class SaeGateEraser(ModelEraser):
    """Hooks that deactivate a concept's latents in the prompts that use them, see `fit`.

    Attributes:
        latents: F, shape ``(m,)``.
        columns: Their encoder columns, shape ``(d, m)``.
        bias: Shape ``(m,)``.
        threshold: Shape ``(m,)``.
        rows: Their decoder rows, shape ``(m, d)``.
        offset: The dictionary's ``b_dec``, shape ``(d,)``.

    Example:
        >>> eraser = SaeGateEraser.fit(model, tokenizer, concept, disentangler=dis)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "sae-gate"
    config_type: ClassVar[type[EraserConfig]] = GateConfig

    latents: Tensor
    columns: Tensor
    bias: Tensor
    threshold: Tensor
    rows: Tensor
    offset: Tensor

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        disentangler: Disentangler,
        prompts: Sequence[str] | None = None,
        retain_prompts: Sequence[str] | None = None,
        retain_limit: int | None = None,
        strength: float = -8.0,
        top: int = 128,
        share: float = 0.99,
        reduction: Reduction = "mean",
        max_length: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Self:
        """Fit the gate; the model is left bit-identical.

        Args:
            model: A text encoder or a language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            disentangler: A dictionary at one of its sites, of any kind.
            prompts: Target prompts; default the concept's prompts and texts to forget.
            retain_prompts: Prompts to keep; default the concept's texts to retain and its neighbours.
            retain_limit: Draw so many of them; more make F smaller and fewer prompts change by mistake.
            strength: s; the paper's -8 for people and -6 for styles, 0 takes the latents out.
            top: K; the paper's 128 of 524,288. Higher finds more of the concept, and of everything else.
            share: theta as a share of the smallest error of a target prompt.
            reduction: Whether a prompt's error is the mean over its places or the largest.
            max_length: Cut prompts to this many tokens.
            batch_size: Prompts a forward pass.
            seed: Of the choice of prompts to keep.

        Returns:
            The eraser. Its report has the sizes of both sets of latents, theta, the errors of both kinds of prompts and
            the share of each that is flagged.

        Raises:
            ValueError: If there are no prompts, no latent is the concept's alone, or a target prompt uses none of F:
                the message says which, so that it can be left out.
            EditError: If an edit is in force.
        """
        check_no_edits(model)
        config = GateConfig(
            concept=concept.name, strength=strength, top=top, share=share, reduction=reduction,
            specials=tuple(sorted(special_ids(tokenizer))), subtract=disentangler.apply_b_dec_to_input, seed=seed,
        )  # fmt: skip
        if disentangler.k is not None:
            raise ValueError(
                "the dictionary keeps the k largest codes of a vector, so a latent's code depends on all others; "
                "give it thresholds with calibrate()"
            )
        dis = disentangler.for_model(model)
        targets = (
            list(prompts) if prompts is not None else [*concept.prompts, *concept.forget_texts]
        )
        kept = (
            list(retain_prompts)
            if retain_prompts is not None
            else [*concept.retain_texts, *concept.neighbours]
        )
        if not targets or not kept:
            raise ValueError(
                f"{len(targets)} target prompts and {len(kept)} to keep are given; both are needed"
            )
        if retain_limit is not None and retain_limit < len(kept):
            kept = random.Random(seed).sample(kept, retain_limit)  # noqa: S311 - not for secrets
        reader = _Reader(model, tokenizer, dis, config.specials, max_length, batch_size)
        ours, theirs = (reader.used(some, top) for some in (targets, kept))
        alone = ours & ~theirs
        if not bool(alone.any()):
            raise ValueError(
                f"all {int(ours.sum())} latents of the target prompts are among the {int(theirs.sum())} of the prompts "
                "to keep; lower top, or give a dictionary that tells them apart"
            )
        found = alone.nonzero()[:, 0]
        made = cls._of(dis, found, config, model)
        errors = [reader.errors(some, made.gate) for some in (targets, kept)]
        if bool((errors[0] <= 0).any()):
            worst = int(errors[0].argmin())
            raise ValueError(
                f"target prompt {worst} uses none of the {len(found)} latents, so no threshold tells it from others: "
                f"{targets[worst]!r}; leave it out, or raise top"
            )
        theta = share * float(errors[0].min())
        report = {
            "latents_target": int(ours.sum()), "latents_retain": int(theirs.sum()), "latents": len(found),
            "theta": theta, "prompts": [len(targets), len(kept)],
            "flagged": [float((one >= theta).double().mean()) for one in errors],
            "largest_error_retain": float(errors[1].max()), "median_error_target": float(errors[0].median()),
        }  # fmt: skip
        return cls._of(dis, found, GateConfig(**{**_plain(config), "theta": theta}), model, report)

    @classmethod
    def _of(
        cls,
        dis: Disentangler,
        latents: Tensor,
        config: GateConfig,
        model: nn.Module,
        report: dict[str, object] | None = None,
    ) -> Self:
        at = latents.to(dis.device)
        site = dis.activation_site(model)
        space = Space(model_id(model), base_fingerprint(model), site, "all", dis.d)
        return cls(
            latents, dis.W_enc[:, at].contiguous(), dis.b_enc[at], dis.threshold[at],
            dis.W_dec[at].contiguous(), dis.b_dec.clone(), config=config, space=space, report=report or {},
        )  # fmt: skip

    @property
    def gate(self) -> Gate:
        """The equations with this eraser's numbers."""
        config = cast("GateConfig", self.config)
        offset = self.offset if config.subtract else None
        parts = (self.columns, self.bias, self.threshold, self.rows)
        reduction = cast("Reduction", config.reduction)
        return Gate(*parts, offset, config.strength, config.theta, reduction)

    def apply(self, model: nn.Module, *, site: str | None = None) -> Edit:
        """Put the hooks into a model and return the way back; no weight is touched.

        Args:
            model: The model it was fitted in.
            site: Where; default where it was fitted.

        Raises:
            SpaceError: If it was fitted in another model.
            ShapeError: If the site has another width.
            EditError: If it is in force already.
        """
        self._check_model(model)
        name = site or ("" if self.space is None else self.space.site)
        config = cast("GateConfig", self.config)
        patch = GatePatch(one_site(model, name), self.gate, config.specials)
        label = f"{self.method}{f' of {config.concept}' if config.concept else ''} at {name}"
        return Edit(model, [patch], label=label, key=self._identity)

    attach = apply

    def _check(self) -> None:
        d, m = self.columns.shape
        wanted = {
            "latents": (m,), "bias": (m,), "threshold": (m,), "rows": (m, d), "offset": (d,),
        }  # fmt: skip
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                got = tuple(getattr(self, name).shape)
                raise ShapeError(
                    f"{name} must have shape {shape} beside columns {(d, m)}; got {got}"
                )


def _plain(config: GateConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def latents_of(largest: Tensor, top: int) -> Tensor:
    """Return which latents are among the K largest of any prompt, shape ``(n,)`` bool; codes of 0 never are.

    Args:
        largest: Largest code of each latent in each prompt, shape ``(N, n)``.
        top: K.
    """
    best = largest.topk(min(top, largest.shape[1]), dim=1)
    used = torch.zeros_like(largest, dtype=torch.bool)
    used.scatter_(1, best.indices, best.values > 0)
    return used.any(0)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Prompts read at the dictionary's site, without special tokens."""

    model: nn.Module
    tokenizer: Any
    dis: Disentangler
    specials: Sequence[int]
    max_length: int | None
    batch_size: int

    def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        site = one_site(self.model, self.dis.activation_site(self.model))
        return read(
            self.model, self.tokenizer, prompts, site, self.specials, max_length=self.max_length,
            batch_size=self.batch_size,
        )  # fmt: skip

    @torch.no_grad()
    def used(self, prompts: Sequence[str], top: int) -> Tensor:
        """Return which latents are among the K largest of any prompt, shape ``(n,)`` bool, in a chunk's memory."""
        found = torch.zeros(self.dis.n, dtype=torch.bool, device=self.dis.device)
        for x, mask in self._batches(prompts):
            for row, places in zip(x, mask, strict=True):
                largest = self.dis.firing(row[places]).largest
                found |= latents_of(largest[None], top).to(found.device)
        return found

    @torch.no_grad()
    def errors(self, prompts: Sequence[str], gate: Gate) -> Tensor:
        """Return the error of each prompt, shape ``(N,)``."""
        made = []
        for x, mask in self._batches(prompts):
            here = gate.to(x.device)
            total, count = reduced(moved(x, here).square().mean(-1), mask, gate.reduction)
            made.append(total / count if gate.reduction == "mean" else total)
        return torch.cat(made)
