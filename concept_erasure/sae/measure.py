"""How well a dictionary says what a model says: reconstruction, sparsity, dead latents, and what the model loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import accepted, evaluating
from concept_erasure.errors import ShapeError
from concept_erasure.sae.activations import (
    Window,
    collect_activations,
    cut,
    padded,
    special_ids,
)
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sites import hook, resolve

__all__ = ["Quality", "quality"]


@dataclass(frozen=True)
class Quality:
    """Measured on vectors that should not be those of training.

    Attributes:
        fvu: Fraction of variance unexplained, ``sum ||x - x^||^2 / sum ||x - mean||^2``; 0 is perfect, 1 is the mean.
        l0: Mean number of latents that fire on a vector.
        dead: Share of the latents that fire on none of the vectors.
        per_level_fvu: The same fraction for each Matryoshka level alone, smallest first.
        vectors: Number of vectors.
        loss_recovered: Share of the loss of ablation that the reconstruction avoids: 1 if the model predicts text as
            well with ``x^`` in place of x, 0 if as badly as with the mean. None where no model was given.
        losses: Cross-entropy in nats a token: ``clean``, ``spliced`` (with ``x^``), ``ablated`` (with the mean).
    """

    fvu: float
    l0: float
    dead: float
    per_level_fvu: tuple[float, ...]
    vectors: int
    loss_recovered: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return {**asdict(self), "per_level_fvu": list(self.per_level_fvu)}


def quality(
    dis: Disentangler,
    activations: Tensor | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Callable[..., Any] | None = None,
    texts: Sequence[str] | None = None,
    max_length: int = 128,
    batch_size: int = 8,
) -> Quality:
    """Return the quality of a dictionary on vectors, on a model and texts, or on both.

    Args:
        dis: The dictionary.
        activations: Vectors ``(N, d)`` of its site; without them they are read from the model.
        model: The model; with it the loss is measured too.
        tokenizer: Its tokenizer.
        texts: Texts not used in training.
        max_length: Tokens read together.
        batch_size: Windows of a forward pass.

    Raises:
        ShapeError: If vectors have another width.
        ValueError: If there are neither vectors nor model, tokenizer and texts.
    """
    found: dict[str, float] = {}
    if model is not None and tokenizer is not None and texts is not None:
        if activations is None:
            site = dis.activation_site(model)
            held = collect_activations(
                model, tokenizer, texts, sites=site, max_length=max_length, batch_size=batch_size,
                dtype=torch.float32, progress=False,
            )  # fmt: skip
            activations = held.all(site).to(next(model.parameters()).device)
        windows = cut(tokenizer, texts, max_length)
        mean = activations.mean(0, dtype=torch.float32)
        found = _losses(dis, model, windows, special_ids(tokenizer), mean, batch_size)
    elif activations is None:
        raise ValueError("give vectors of the site, or model, tokenizer and texts")
    if activations.ndim != 2 or activations.shape[1] != dis.d or len(activations) < 2:
        raise ShapeError(
            f"vectors must have shape (N, {dis.d}) with N at least 2; got {tuple(activations.shape)}"
        )
    fvu, l0, dead = _reconstruction(dis, activations)
    share = None
    if found:
        gap = found["ablated"] - found["clean"]
        share = 1 - (found["spliced"] - found["clean"]) / gap if gap > 1e-6 else None
    return Quality(fvu[-1], l0, dead, tuple(fvu), len(activations), share, found)


@torch.no_grad()
def _reconstruction(dis: Disentangler, x: Tensor) -> tuple[list[float], float, float]:
    """Return the unexplained fraction of each level, the mean number of active latents, and the dead share."""
    mean = x.mean(0, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    missed = torch.zeros(len(dis.widths), dtype=torch.float64, device=x.device)
    fired = torch.zeros(dis.n, dtype=torch.int64, device=x.device)
    for where, z in dis.chunks(x):
        part = x[where].double()
        total += (part - mean).square().sum()
        missed += torch.stack([(part - made).square().sum() for made in dis.prefixes(z)])
        fired += (z > 0).sum(0)
    fvu = (missed / total.clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return fvu, float(fired.sum()) / len(x), float((fired == 0).double().mean())


@torch.no_grad()
def _losses(
    dis: Disentangler,
    model: nn.Module,
    windows: Sequence[Window],
    specials: set[int],
    mean: Tensor,
    batch_size: int,
) -> dict[str, float]:
    """Return the cross-entropy as it is, with reconstructions, and with the mean, in the tokens that are encoded."""
    place = resolve(model, dis.activation_site(model))[0]
    device = next(model.parameters()).device
    left_out = torch.tensor(sorted(specials), dtype=torch.int64)
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": dis,
        "ablated": lambda x: mean.to(x.device).expand_as(x),
    }
    totals = dict.fromkeys(changes, 0.0)
    count = 0
    for start in range(0, len(windows), batch_size):
        ids, real = padded(windows[start : start + batch_size])
        kept = real & ~torch.isin(ids, left_out)
        kept[:, 0] = False
        inputs = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}
        count += int(real[:, 1:].sum())
        for name, change in changes.items():
            with ExitStack() as stack:
                if change is not None:
                    swap = _swapping(change, kept.to(device))
                    stack.callback(hook(model, place, swap).remove)
                stack.enter_context(evaluating(model))
                logits = model(**accepted(model, inputs)).logits[:, :-1].float()
            target = inputs["input_ids"][:, 1:].masked_fill(~real[:, 1:].to(device), -100)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="sum"
            )
            totals[name] += float(loss)
    return {name: total / max(count, 1) for name, total in totals.items()}


def _swapping(change: Callable[[Tensor], Tensor], kept: Tensor) -> Callable[[Tensor], Tensor]:
    def swap(x: Tensor) -> Tensor:
        made = x.clone()
        shaped = made.view(*kept.shape, x.shape[-1])
        shaped[kept] = change(shaped[kept]).to(x.dtype)
        return made

    return swap
