"""Which latents have enough votes: each scorer votes for the best of each level of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from concept_erasure.sae._features import Feature
from concept_erasure.sae.disentangler import Disentangler

__all__ = ["SIDES", "elected", "levels", "order"]

SIDES = (1, -1)


def levels(dis: Disentangler) -> list[tuple[int, int]]:
    """Return the first latent of each level, and the one behind its last."""
    return list(zip((0, *dis.widths[:-1]), dis.widths, strict=True))


def ranked(ballot: Tensor, dis: Disentangler, top: int) -> Tensor:
    """Return 1 for the best of each level falling to 1/top for the last that gets a vote, 0 for the rest.

    Args:
        ballot: What a scorer ranks by, shape ``(n,)``; 0 or less gets no vote.
        dis: The dictionary, for its levels.
        top: Votes for each level.
    """
    made = torch.zeros(dis.n)
    for start, stop in levels(dis):
        part = ballot[start:stop]
        best = part.topk(min(top, len(part)))
        value = 1 - torch.arange(len(best.indices)) / top
        made[start:stop][best.indices] = value * (best.values > 0)
    return made


def ballots(
    side: int, scores: Mapping[str, Tensor], scorers: Sequence[str], ratio: float
) -> dict[str, Tensor]:
    """Return for one direction what each scorer ranks by, each ``(n,)``.

    Args:
        side: +1 for latents that write the concept, -1 for those that write against it.
        scores: Of all latents, see `elected`.
        scorers: Names of those that vote.
        ratio: Least mean code on the concept over that on other texts.
    """
    made = {}
    if "lens" in scorers:
        made["lens"] = scores["lens_up" if side > 0 else "lens_down"]
    if "contrast" in scorers:
        made["contrast"] = scores["contrast"] * (scores["ratio"] >= ratio)
    if "attribution" in scorers:
        made["attribution"] = side * (scores["attribution"] - scores["attribution_near"])
    if "efficiency" in scorers:
        made["efficiency"] = side * scores["efficiency"]
    return made


def elected(
    site: str,
    dis: Disentangler,
    scores: Mapping[str, Tensor],
    enough: Tensor,
    *,
    scorers: Sequence[str],
    top: int,
    vote: int,
    ratio: float,
) -> list[Feature]:
    """Return the latents of one dictionary that have enough votes for one direction.

    Args:
        site: Name of its site.
        dis: The dictionary.
        scores: ``lens_up``, ``lens_down``, ``contrast``, ``ratio``, ``attribution``, ``attribution_near`` and others,
            each ``(n,)``; those with ``lens_`` are only used here.
        enough: Whether a latent fires often enough for contrast and attribution to say something, shape ``(n,)``.
        scorers: Names of those that vote.
        top: Votes of each scorer and level.
        vote: Votes needed.
        ratio: See `ballots`.
    """
    votes, merit = {}, {}
    given: dict[int, dict[str, Tensor]] = {}
    for side in SIDES:
        given[side] = {
            name: ranked(ballot if name == "lens" else ballot * enough, dis, top)
            for name, ballot in ballots(side, scores, scorers, ratio).items()
        }
        ranks = torch.stack(list(given[side].values()))
        votes[side], merit[side] = (ranks > 0).sum(0), ranks.sum(0)
    best = torch.maximum(votes[1], votes[-1])
    made = []
    for index in (best >= vote).nonzero()[:, 0].tolist():
        side = max(SIDES, key=lambda s: (int(votes[s][index]), float(merit[s][index])))
        numbers = {
            name: float(v[index]) for name, v in scores.items() if not name.startswith("lens_")
        }
        if "lens" in scorers:
            numbers["lens"] = float(scores["lens_up" if side > 0 else "lens_down"][index])
        numbers["total"] = float(merit[side][index]) / len(scorers)
        level = dis.level_of(index) if len(dis.widths) > 1 else None
        voters = [name for name, rank in given[side].items() if rank[index] > 0]
        evidence: dict[str, object] = {"votes": len(voters), "voters": voters}
        made.append(Feature(site, index, side, numbers, evidence, level))
    return made


def order(one: Feature) -> tuple[int, int, float, str, int]:
    """Return what candidates are sorted by: votes, then level, then rank."""
    votes = cast("int", one.evidence["votes"])
    return -votes, one.level or 0, -one.scores["total"], one.site, one.index
