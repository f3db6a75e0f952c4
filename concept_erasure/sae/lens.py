"""What latents write, in words: decoder rows through the final norm and the unembedding.

With u_t the unembedding of token t and y_f what the final norm makes of decoder row d_f, t has the logit ``u_t . y_f``.
A list of the highest tokens of every latent costs a product of the whole dictionary with the whole vocabulary. To find
the latents of a concept that is not needed: its tokens T are few, and how far a logit stands out follows from two
moments of the unembedding, the mean m and the covariance C of its rows::

    z_ft = (u_t - m) . y_f / sqrt(y_f^T C y_f)

So all latents are scored on T, and exact lists are made for the few that score highest (`exact_lists`). The lens and
the match with lists of a concept's tokens are those of Gur-Arieh et al. 2025 (arXiv:2505.22586), section 3; the
shortlist is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from concept_erasure.errors import ShapeError
from concept_erasure.linalg import statistics_dtype
from concept_erasure.sae._places import one_site, post_norm
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sites import Site, as_out_in, find_sites

__all__ = ["Lists", "Screen", "Unembedding", "exact_lists", "screen", "token_lists", "written"]

ROWS = 8192  # of the vocabulary at a time
LATENTS = 4096  # at a time
VALUES = 2**24  # logits at a time


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The rows of a model's head, with their first two moments.

    Attributes:
        weight: Shape ``(V, d)``, the model's own tensor.
        mean: Of its rows, shape ``(d,)``, float32.
        covariance: Of its rows, shape ``(d, d)``, float32; collected in float64.
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Unembedding:
        """Read the head of a causal language model; ``O(V d^2)``, once for all dictionaries.

        Raises:
            ValueError: If the model has no head.
        """
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no head, so nothing says which tokens a latent writes; load the causal "
                "language model, or leave 'lens' out of scorers"
            )
        weight = cast("Tensor", head.weight).detach()
        width, dtype = weight.shape[1], statistics_dtype(weight.device)
        total = torch.zeros(width, dtype=dtype, device=weight.device)
        second = torch.zeros(width, width, dtype=dtype, device=weight.device)
        for rows in weight.split(ROWS):
            part = rows.to(dtype)
            total += part.sum(0)
            second.addmm_(part.T, part)
        mean = total / len(weight)
        covariance = second / len(weight) - torch.outer(mean, mean)
        return cls(weight, mean.float(), covariance.float())

    def deviation(self, y: Tensor) -> Tensor:
        """Return the standard deviation of the logits of directions ``(m, d)`` over the vocabulary, shape ``(m,)``."""
        return ((y @ self.covariance) * y).sum(1).clamp_min(torch.finfo(y.dtype).tiny).sqrt()

    def standardised(self, y: Tensor, tokens: Tensor) -> Tensor:
        """Return ``z_ft`` of directions ``(m, d)`` and tokens ``(t,)``, shape ``(m, t)``."""
        rows = self.weight[tokens.to(self.weight.device)].float() - self.mean
        return y @ rows.T / self.deviation(y)[:, None]


@torch.no_grad()
def written(
    model: nn.Module,
    dis: Disentangler,
    latents: Tensor | None = None,
    *,
    gain: Tensor | None = None,
) -> Tensor:
    """Return what the final norm makes of decoder rows, without its bias, shape ``(m, d)``, float32.

    A row of a dictionary of neurons (``value.9``) counts as what the MLP writes for it, its down projection's product.

    Args:
        model: The model; a final norm that cannot be found counts as none.
        dis: The dictionary.
        latents: Which, shape ``(m,)``; default all.
        gain: Gain ``(d,)`` of a norm between the dictionary's vectors and the residual stream, see `lens_gain`.

    Raises:
        ShapeError: If the dictionary is as wide as another site than the residual stream.
    """
    rows = dis.W_dec if latents is None else dis.W_dec[latents.to(dis.device)]
    parameter = next(model.parameters())
    rows = rows.to(parameter.device, torch.float32)
    neurons = _neurons(model, dis)
    if neurons is not None:
        module = model.get_submodule(neurons.module)
        weight = as_out_in(module, cast("Tensor", module.weight).detach())
        rows = nn.functional.normalize(rows @ weight.to(rows).T, dim=1)
    if gain is not None:
        rows = rows * gain.to(rows)
    place = find_sites(model).get("norm.final")
    if place is None:
        return rows
    norm = model.get_submodule(place.module)
    scale = getattr(norm, "weight", None)
    if isinstance(scale, Tensor) and scale.shape[-1] != rows.shape[1]:
        raise ShapeError(
            f"{dis!r} writes vectors of width {rows.shape[1]}, the residual stream has {scale.shape[-1]}: its latents "
            "have no tokens; leave 'lens' out of scorers"
        )
    dtype = scale.dtype if isinstance(scale, Tensor) else torch.float32
    zero = norm(torch.zeros(1, rows.shape[1], dtype=dtype, device=rows.device)).float()
    # the norm undoes any length; sqrt(d) keeps its epsilon out
    longer = rows * rows.shape[1] ** 0.5
    return torch.cat([norm(part.to(dtype)).float() - zero for part in longer.split(LATENTS)])


def lens_gain(model: nn.Module, dis: Disentangler) -> Tensor | None:
    """Return the gain ``(d,)`` of the norm that a dictionary's vectors still have to pass; None if there is none."""
    if dis.after_post_norm or not dis.site:
        return None
    neurons = _neurons(model, dis)
    site = dis.site if neurons is None else neurons.name.replace("value.", "mlp.")
    found = post_norm(model, site)
    return None if found is None else found[1]


def _neurons(model: nn.Module, dis: Disentangler) -> Site | None:
    """Return the site of a dictionary if its vectors are activations of an MLP's neurons."""
    place = one_site(model, dis.site) if dis.site else None
    return place if place is not None and place.kind == "value" else None


@dataclass(frozen=True, eq=False)
class Screen:
    """How far each latent's logits of some tokens stand out, for both ends of its list.

    Attributes:
        up: The k-th highest ``z_ft`` over T+, less that over T- where it is positive, shape ``(n,)``: a list that
            holds k tokens of T+ reaches down to the k-th.
        down: The same for ``-z_ft``.
    """

    up: Tensor
    down: Tensor


@torch.no_grad()
def screen(
    unembedding: Unembedding,
    model: nn.Module,
    dis: Disentangler,
    tokens: Sequence[int],
    near: Sequence[int] = (),
    *,
    matches: int = 2,
) -> Screen:
    """Score every latent of a dictionary on a concept's tokens; ``O(n d (d + |T+| + |T-|))`` time.

    Args:
        unembedding: The model's.
        model: The model.
        dis: The dictionary.
        tokens: T+, ids of the concept's tokens.
        near: T-, ids of its neighbours' tokens.
        matches: k; 1 is satisfied with one token.
    """
    gain = lens_gain(model, dis)
    plus = torch.tensor(list(tokens), dtype=torch.int64)
    minus = torch.tensor(list(near), dtype=torch.int64)
    up, down = [], []
    for latents in torch.arange(dis.n).split(LATENTS):
        y = written(model, dis, latents, gain=gain)
        z = unembedding.standardised(y, plus)
        ends = [_best(z, matches), _best(-z, matches)]
        if len(minus):
            z = unembedding.standardised(y, minus)
            ends = [
                end - _best(side, matches).clamp_min(0)
                for end, side in zip(ends, (z, -z), strict=True)
            ]
        up.append(ends[0])
        down.append(ends[1])
    return Screen(torch.cat(up), torch.cat(down))


def _best(z: Tensor, matches: int) -> Tensor:
    return z.topk(min(matches, z.shape[1]), dim=1).values[:, -1]


@dataclass(frozen=True, eq=False)
class Lists:
    """The ends of the vocabulary for some latents.

    Attributes:
        latents: Their numbers, shape ``(m,)``.
        top: Ids of the tokens with the highest logits, highest first, shape ``(m, k)``.
        bottom: Ids of those with the lowest, lowest first.
    """

    latents: Tensor
    top: Tensor
    bottom: Tensor

    def shares(self, tokens: Sequence[int], *, bottom: bool = False) -> tuple[Tensor, Tensor]:
        """Return how many of some tokens are in each list, and as a share of what the list could hold.

        Args:
            tokens: Ids; without any, both are 0.
            bottom: Look in the bottom lists.

        Returns:
            Counts ``(m,)``, int64, and shares ``(m,)``.
        """
        held = self.bottom if bottom else self.top
        wanted = torch.tensor(list(tokens), dtype=torch.int64, device=held.device)
        count = torch.isin(held, wanted).sum(1)
        return count, count.float() / max(1, min(len(wanted), held.shape[1]))


@torch.no_grad()
def exact_lists(weight: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ids of the k highest and k lowest logits of directions ``(m, d)``, each ``(m, k)``.

    Blocks of the vocabulary are compared with the best so far, so that the logits of all tokens are never held.

    Args:
        weight: Unembedding, shape ``(V, d)``.
        y: Directions.
        k: Length of the lists, at most V.
    """
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must lie between 1 and the {len(weight)} tokens; got {k}")
    tops, bottoms = [], []
    for part in y.split(LATENTS):
        rows = max(k, VALUES // max(1, len(part)))
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(weight), rows):
            logits = part @ weight[start : start + rows].to(part).T
            size = min(k, logits.shape[1])
            ends = [(side.topk(size, dim=1)) for side in (logits, -logits)]
            found = [(end.values, end.indices + start) for end in ends]
            best = [_merged(*pair, k) for pair in zip(best, found, strict=True)] if best else found
        tops.append(best[0][1])
        bottoms.append(best[1][1])
    return torch.cat(tops), torch.cat(bottoms)


def _merged(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    values = torch.cat((one[0], other[0]), 1)
    top = values.topk(k, dim=1)
    return top.values, torch.cat((one[1], other[1]), 1).gather(1, top.indices)


def token_lists(
    unembedding: Unembedding, model: nn.Module, dis: Disentangler, latents: Tensor, k: int
) -> Lists:
    """Return the exact lists of some latents ``(m,)``; ``O(m V d)`` time.

    Args:
        unembedding: The model's.
        model: The model.
        dis: The dictionary.
        latents: Their numbers.
        k: Length of the lists.
    """
    y = written(model, dis, latents, gain=lens_gain(model, dis))
    return Lists(latents.to(y.device), *exact_lists(unembedding.weight, y, k))
