"""What editing one latent alone does to a model: to the concept's tokens, to its neighbours', and to neutral text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.edit import ColumnPatch, Edit, HookPatch
from concept_erasure.language.batches import Batch, encode, logits_at
from concept_erasure.sae._features import Feature
from concept_erasure.sae._pisces_edit import change, read_layer, value_weight
from concept_erasure.sae._pisces_fit import value_signs
from concept_erasure.sae._places import one_site
from concept_erasure.sae._search_scores import batches_of, saying
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sites import Site, find_sites

__all__ = ["Alone", "Filters"]

_HELD = 2**26  # log-probabilities of the original that are kept: 256 MiB
_AT_ONCE = 2**24  # log-probabilities of a batch of neutral texts


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a latent must do when it is edited alone; the defaults are the published ones where there are any.

    Attributes:
        tau: Share of the largest coefficient above which a value vector is edited.
        mu: Size of the opposing coefficient in units of the largest. Higher shows an effect more clearly, and damage
            too.
        min_fall: Nats by which the mean log-probability of the concept's tokens has to fall at least.
        max_near_fall: Nats by which that of the neighbours' tokens may fall at most.
        max_kl: Mean divergence from the original on neutral text, in nats a token, at most.
        texts: Of each kind, at most.
        max_length: Tokens of each.
    """

    tau: float = 0.9
    mu: float = 16.0
    min_fall: float = 0.0
    max_near_fall: float = 0.05
    max_kl: float = 0.01
    texts: int = 8
    max_length: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1 or not self.mu >= 0:
            raise ValueError(
                f"tau must be in [0, 1) and mu at least 0; got {self.tau} and {self.mu}"
            )
        if self.texts < 1 or self.max_length < 3:
            raise ValueError(
                f"texts must be at least 1 and max_length at least 3; got {self.texts} and {self.max_length}"
            )

    def refuses(self, effect: Mapping[str, float]) -> str | None:
        """Return why a latent with this effect is dropped; None if it is kept."""
        if not -effect["effect"] > self.min_fall:
            return (
                f"edited alone, the concept's tokens change by {effect['effect']:+.2g} nats: no fall"
                + (f" of {self.min_fall:g}" if self.min_fall else "")
            )
        if effect["effect_near"] < -self.max_near_fall:
            return f"the neighbours' tokens fall by {-effect['effect_near']:.2g} nats, more than {self.max_near_fall:g}"
        if effect["kl"] > self.max_kl:
            return f"neutral text moves by {effect['kl']:.2g} nats, more than {self.max_kl:g}"
        return None


class Alone:
    """Edits latents one at a time and measures what that does; the model is left as it is.

    At an MLP its value vectors are edited, as PISCES would; elsewhere the latent's part of the activation is taken
    away (doubled, for a latent that writes against the concept) by a hook.

    Args:
        model: The model without edits.
        tokenizer: Its tokenizer.
        dictionaries: By site, with their post-norm gains.
        places: Where their activations are.
        forget_texts: Texts of the concept; those that say its tokens are used.
        retain_texts: Texts about neighbours.
        neutral_texts: Texts about nothing of the sort.
        tokens: Ids of the concept's tokens.
        near: Ids of the neighbours'.
        filters: Sizes and numbers.
        batch_size: Texts of a forward pass.
        seed: Of the choice of texts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        dictionaries: Mapping[str, Disentangler],
        places: Mapping[str, Site],
        *,
        forget_texts: Sequence[str],
        retain_texts: Sequence[str],
        neutral_texts: Sequence[str],
        tokens: Sequence[int],
        near: Sequence[int],
        filters: Filters,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.model, self.dictionaries, self.places, self.filters = (
            model,
            dictionaries,
            places,
            filters,
        )
        device = next(model.parameters()).device
        pick = torch.Generator().manual_seed(seed)

        def some(texts: Sequence[str], ids: Sequence[int]) -> list[Batch]:
            if not len(texts):
                return []
            length = filters.max_length
            # of texts that never say the tokens all places count
            rows = saying(tokenizer, texts, ids, length) or encode(
                tokenizer, texts, max_length=length
            )
            order = torch.randperm(len(rows), generator=pick).tolist()[: filters.texts]
            return batches_of([rows[i] for i in order], tokenizer, batch_size, device)

        self.said, self.near = some(forget_texts, tokens), some(retain_texts, near)
        self.neutral = _thinned(
            model, tokenizer, neutral_texts, filters, batch_size, device, generator=pick
        )
        self.downs = _down_projections(model, dictionaries)
        self.signs: dict[str, Tensor] = {}
        if self.downs:
            self.signs, _ = value_signs(
                model, tokenizer, list(forget_texts)[:200], list(self.downs), tokens, batch_size=batch_size
            )  # fmt: skip
        with evaluating(model):
            self.before = {"effect": self._mean(self.said), "effect_near": self._mean(self.near)}
            self.held = [logits_at(model, batch).float().log_softmax(-1) for batch in self.neutral]

    def _mean(self, batches: Sequence[Batch]) -> float:
        total, count = 0.0, 0
        for batch in batches:
            found = logits_at(self.model, batch).float().log_softmax(-1)
            total += float(found.gather(1, batch.tokens[:, None]).sum())
            count += batch.count
        return total / max(1, count)

    def edit(self, feature: Feature) -> Edit:
        """Edit one latent alone and return the way back."""
        dis = self.dictionaries[feature.site]
        down = self.downs.get(feature.site)
        label = f"edit of {feature.name}"
        if down is None:
            place, sign = self.places[feature.site], feature.direction
            latent = torch.tensor([feature.index], device=dis.device)
            row = dis.W_dec[feature.index]

            def shift(x: Tensor) -> Tensor:
                z = dis.encode(x, latent.to(x.device))
                return x - (sign * z * row.to(x.device)).to(x.dtype)

            return Edit(self.model, [HookPatch(place, shift)], label=label)
        module = self.model.get_submodule(down)
        values = value_weight(module)
        layer = read_layer(
            dis,
            values,
            torch.tensor([feature.index], device=values.device),
            torch.tensor([feature.direction], device=values.device),
            site=feature.site,
            down=down,
            neurons=self.signs[feature.site],
        )
        made = change(layer, tau=self.filters.tau, mu=self.filters.mu, coefficient="linear")
        new = values[made.columns].to(layer.writes) + made.coefficients @ layer.writes
        linear = isinstance(module, nn.Linear)
        patch = ColumnPatch(
            f"{down}.weight", made.columns, new.T if linear else new, axis=1 if linear else 0
        )
        return Edit(self.model, [patch], label=label)

    def __call__(self, feature: Feature) -> dict[str, float]:
        """Return the changes in nats: ``effect`` and ``effect_near`` of mean log-probabilities, and ``kl``."""
        with self.edit(feature), evaluating(self.model):
            made = {
                "effect": self._mean(self.said) - self.before["effect"],
                "effect_near": self._mean(self.near) - self.before["effect_near"],
            }
            divergence, count = 0.0, 0
            for batch, before in zip(self.neutral, self.held, strict=True):
                after = logits_at(self.model, batch).float().log_softmax(-1)
                divergence += float((before.exp() * (before - after)).sum())
                count += batch.count
        return {**made, "kl": max(0.0, divergence / max(1, count))}


def _down_projections(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Return the paths of the down projections of those sites that are MLPs with one."""
    found = find_sites(model)
    made = {}
    for site in sites:
        place = one_site(model, site)
        value = found.get(f"value.{place.name.rpartition('.')[2]}")
        if place.kind == "mlp" and value is not None:
            made[site] = value.module
    return made


def _thinned(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    filters: Filters,
    batch_size: int,
    device: torch.device,
    *,
    generator: torch.Generator,
) -> list[Batch]:
    """Return neutral texts with no more places than distributions can be kept, in batches of a bounded size."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    rows = encode(tokenizer, texts, max_length=filters.max_length)
    order = torch.randperm(len(rows), generator=generator).tolist()[: filters.texts]
    most = max(1, _HELD // (len(head.weight) * len(order)))
    made = []
    for i in order:
        at = rows[i].supervised.nonzero()[:, 0]
        kept = at[torch.randperm(len(at), generator=generator)[:most]]
        mask = torch.zeros_like(rows[i].supervised)
        mask[kept] = True
        made.append(replace(rows[i], supervised=mask))
    places = max(one.count for one in made)
    size = max(1, min(batch_size, _AT_ONCE // (len(head.weight) * places)))
    return batches_of(made, tokenizer, size, device)
