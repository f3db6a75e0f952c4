"""A search for features as it goes: what has been read, the scores, and the filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import Progress, _shown
from concept_erasure.language.batches import Encoded, encode
from concept_erasure.sae._features import Feature
from concept_erasure.sae._search_filters import Alone, Filters
from concept_erasure.sae._search_scores import (
    Attributed,
    Fired,
    answering,
    attributions,
    fired,
    places_of,
    saying,
    windows_of,
)
from concept_erasure.sae._search_vote import SIDES, elected, levels, order
from concept_erasure.sae.activations import Window, special_ids
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.lens import Lists, Unembedding, screen, token_lists

__all__ = ["Judge", "Run", "Search"]

Judge = Callable[[Feature], bool]
_CONTEXT = 8  # tokens of an example before the place where the latent fires, and half as many after


@dataclass(frozen=True, kw_only=True)
class Search:
    """Sizes of a search.

    Attributes:
        list_length: Tokens of the lists at both ends; at most a twentieth of the vocabulary.
        matches: Tokens of the concept that such a list must hold; 1 is the published rule, 2 is more precise.
        shortlist: Latents of a dictionary for which exact lists are made, for each end.
        ratio: Mean code on the concept over that on other texts, at least.
        fires: Tokens of the concept's texts on which a latent fires, at least.
        tokens: Tokens of texts of each kind that are read.
        attributed: Texts of each kind through which gradients are taken.
        max_length: Tokens read together.
        limit: Candidates that are edited alone, best first; each costs a forward pass over the texts of `Filters`.
            Without filters all candidates stay.
        linear: Attribution and efficiency of a latent's linear coefficient ``d_f . x``, which a projection takes away
            (`LatentProjectionEraser`), in place of its code.
    """

    list_length: int = 50
    matches: int = 2
    shortlist: int = 128
    ratio: float = 3.0
    fires: int = 3
    tokens: int = 8192
    attributed: int = 64
    max_length: int = 128
    limit: int = 24
    linear: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in {"ratio", "max_length", "linear"} and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3; got {self.max_length}")
        if not self.ratio >= 0:
            raise ValueError(f"ratio must not be negative; got {self.ratio}")


@dataclass(eq=False)
class Run:
    """What a search works on, and what it has read so far."""

    model: nn.Module
    tokenizer: Any
    known: dict[str, Disentangler]
    texts: dict[str, list[str]]
    scorers: Sequence[str]
    top: int
    vote: int
    options: Search
    batch_size: int
    seed: int
    progress: Progress | None
    plus: tuple[int, ...]
    minus: tuple[int, ...]
    pairs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = places_of(self.model, self.known)
        self.windows: dict[str, list[Window]] = {}
        self.fired: dict[str, dict[str, Fired]] = {site: {} for site in self.known}
        self.lists: dict[str, Lists] = {}
        self.answers = {"concept": 0, "near": 0}
        self.length = max(
            1, min(self.options.list_length, self._vocabulary() // 20)
        )  # tiny vocabularies

    def _vocabulary(self) -> int:
        head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        return self.options.list_length * 20 if head is None else len(head.weight)

    def scored(self) -> dict[str, dict[str, Tensor]]:
        """Return every score of every latent: by site, then name, each ``(n,)`` on the CPU."""
        self._read()
        found = {site: self._contrast(site) for site in self.known}
        if "attribution" in self.scorers:
            self._attribution(found)
        if "efficiency" in self.scorers:
            self._efficiency(found)
        if "lens" in self.scorers:
            unembedding = Unembedding.of(self.model)
            for site, dis in self.known.items():
                found[site] |= self._lens(unembedding, site, dis)
        return found

    def _read(self) -> None:
        specials = special_ids(self.tokenizer)
        for kind, texts in self.texts.items():
            if not texts:
                continue
            self.windows[kind] = windows_of(
                self.tokenizer, texts, max_length=self.options.max_length, tokens=self.options.tokens, seed=self.seed
            )  # fmt: skip
            made = fired(
                self.model, self.known, self.places, self.windows[kind], specials, batch_size=self.batch_size,
                progress=self.progress,
            )  # fmt: skip
            for site, one in made.items():
                self.fired[site][kind] = one

    def rates(self) -> dict[str, Tensor]:
        """Return by site the share of all tokens read on which each latent fires, shape ``(n,)``."""
        made = {}
        for site, rows in self.fired.items():
            count = torch.stack([one.count for one in rows.values()]).sum(0)
            made[site] = count.float() / max(1, sum(len(one.places) for one in rows.values()))
        return made

    def _contrast(self, site: str) -> dict[str, Tensor]:
        """Return firing rates, their difference, and the ratio of mean codes with one more firing on other texts."""
        rows = self.fired[site]
        concept = rows["concept"]
        code = concept.total / concept.count.clamp_min(1)
        made = {f"rate_{kind}": one.rate for kind, one in rows.items()}
        others = [one for kind, one in rows.items() if kind != "concept"]
        rate = torch.stack([one.rate for one in others]).amax(0)
        mean = torch.stack([(one.total + code) / max(1, len(one.places)) for one in others]).amax(0)
        made["contrast"] = concept.rate - rate
        made["ratio"] = concept.mean / mean.clamp_min(torch.finfo(torch.float32).tiny)
        return made

    def _attribution(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Add what latents add to T+ in the concept's texts and to T- in the others."""
        for name, kind, texts, ids in (
            ("attribution", "concept", self.texts["concept"], self.plus),
            ("attribution_near", "near", self._others, self.minus),
        ):
            rows = saying(self.tokenizer, texts, ids, self.options.max_length) if texts else []
            made = self._attributed(rows[: self.options.attributed])
            self.answers[kind] = made.answers
            for site, value in made.mean.items():
                found[site][name] = value

    @property
    def _others(self) -> list[str]:
        return [*self.texts["near"], *self.texts["neutral"]]

    def _attributed(self, rows: Sequence[Encoded]) -> Attributed:
        return attributions(
            self.model, self.tokenizer, self.known, self.places, rows, linear=self.options.linear,
            batch_size=max(1, self.batch_size // 2), progress=self.progress,
        )  # fmt: skip

    def _efficiency(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Add what latents add to the concept's answers, for what they are worth to other text.

        ``sign(a_f) max(|a_f| - |a_near,f|, 0) / sqrt(F_f + median F)`` with a in nats a token of answers and F the
        Fisher information a token of other text. What neighbours' answers lose counts against a latent, and so does
        what they would gain. The median keeps latents that do nearly nothing anywhere from the top.
        """
        length = self.options.max_length
        mine, near = (
            self._attributed(answering(self.tokenizer, self.pairs[kind], length) if self.pairs[kind] else [])
            for kind in ("concept", "near")
        )  # fmt: skip
        other = encode(self.tokenizer, self._others[: self.options.attributed], max_length=length)
        cost = self._attributed(other).square
        for site in self.known:
            floor = cost[site].median().clamp_min(torch.finfo(torch.float32).eps)
            own, beside = mine.mean[site], near.mean[site]
            gain = own.sign() * (own.abs() - beside.abs()).clamp_min(0)
            found[site] |= {"answers": gain, "fisher": cost[site]}
            found[site]["efficiency"] = gain / (cost[site] + floor).sqrt()

    def _lens(self, unembedding: Unembedding, site: str, dis: Disentangler) -> dict[str, Tensor]:
        """Return the lens score of both ends, 0 outside the shortlist, and keep the shortlist's lists."""
        matches = min(self.options.matches, len(self.plus))
        first = screen(unembedding, self.model, dis, self.plus, self.minus, matches=matches)
        chosen: list[Tensor] = []
        for start, stop in levels(dis):
            size = min(stop - start, max(self.top, self.options.shortlist // len(dis.widths)))
            chosen += [end[start:stop].topk(size).indices + start for end in (first.up, first.down)]
        latents = torch.cat(chosen).unique()
        lists = token_lists(unembedding, self.model, dis, latents, self.length)
        self.lists[site] = lists
        made = {}
        for name, bottom in (("lens_up", False), ("lens_down", True)):
            count, share = lists.shares(self.plus, bottom=bottom)
            score = (share - lists.shares(self.minus, bottom=bottom)[1]) * (count >= matches)
            whole = torch.zeros(dis.n)
            whole[latents.cpu()] = score.clamp_min(0).cpu()
            made[name] = whole
        return made

    def candidates(self, found: Mapping[str, Mapping[str, Tensor]]) -> list[Feature]:
        """Return the latents with enough votes, best first."""
        made: list[Feature] = []
        for site, dis in self.known.items():
            enough = self.fired[site]["concept"].count >= self.options.fires
            made += elected(
                site, dis, found[site], enough, scorers=self.scorers, top=self.top, vote=self.vote,
                ratio=self.options.ratio,
            )  # fmt: skip
        return sorted(made, key=order)

    def filtered(
        self, candidates: Sequence[Feature], filters: Filters | None, judge: Judge | None
    ) -> tuple[list[Feature], list[Feature]]:
        """Return candidates that pass, and those that do not with the reason, all with their evidence."""
        limit = len(candidates) if filters is None else self.options.limit
        tested = list(candidates[:limit])
        rest = [
            _because(one, f"not tested: more than {limit} candidates") for one in candidates[limit:]
        ]
        if not tested:
            return [], rest
        alone = None if filters is None else self._alone(filters)
        kept, dropped = list[Feature](), list[Feature]()
        with _shown(self.progress, len(tested), "editing alone") as tell:
            for number, one in enumerate(self._with_evidence(tested), 1):
                made, reason = self._tested(one, alone, filters, judge)
                if reason is None:
                    kept.append(made)
                else:
                    dropped.append(_because(made, reason))
                tell(number)
        return kept, dropped + rest

    def _tested(
        self, one: Feature, alone: Alone | None, filters: Filters | None, judge: Judge | None
    ) -> tuple[Feature, str | None]:
        """Return a candidate with its effect, and why it is dropped.

        Contrast says that a latent is about the concept, not whether it writes it or writes against it. Where nothing
        else voted, both edits are tried and the one that lowers the concept's tokens more is kept.
        """
        if self.fired[one.site]["concept"].count[one.index] == 0:
            return one, "never fires on the concept's texts"
        if alone is not None and filters is not None:
            told = one.evidence["voters"] != ["contrast"]
            sides = (one.direction,) if told else SIDES
            tried = [replace(one, direction=side) for side in sides]
            effects = [alone(each) for each in tried]
            best = min(range(len(tried)), key=lambda k: effects[k]["effect"])
            one = replace(tried[best], scores={**one.scores, **effects[best]})
            if (reason := filters.refuses(effects[best])) is not None:
                return one, reason
        if judge is not None and not judge(one):
            return one, "refused by the judge"
        return one, None

    def _alone(self, filters: Filters) -> Alone:
        return Alone(
            self.model, self.tokenizer, self.known, self.places, forget_texts=self.texts["concept"],
            retain_texts=self.texts["near"], neutral_texts=self.texts["neutral"] or self.texts["near"],
            tokens=self.plus, near=self.minus, filters=filters, batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip

    def _with_evidence(self, features: Sequence[Feature]) -> list[Feature]:
        """Add token lists, where the model has a head, and the places where latents fire most."""
        unembedding: Unembedding | None = None
        made: dict[tuple[str, int], dict[str, object]] = {}
        for site in dict.fromkeys(one.site for one in features):
            latents = torch.tensor([one.index for one in features if one.site == site])
            lists = self.lists.get(site)
            if lists is None or not bool(torch.isin(latents, lists.latents.cpu()).all()):
                if getattr(self.model, "get_output_embeddings", lambda: None)() is None:
                    continue
                unembedding = unembedding or Unembedding.of(self.model)
                lists = token_lists(unembedding, self.model, self.known[site], latents, self.length)
            row = {int(latent): i for i, latent in enumerate(lists.latents.tolist())}
            for index in latents.tolist():
                ends = {"top_tokens": lists.top, "bottom_tokens": lists.bottom}
                made[site, index] = {
                    name: [str(self.tokenizer.decode([t])) for t in held[row[index]].tolist()]
                    for name, held in ends.items()
                }
        return [
            replace(
                one,
                evidence={
                    **one.evidence, **made.get((one.site, one.index), {}), "examples": self._examples(one)
                },
            )
            for one in features
        ]  # fmt: skip

    def _examples(self, one: Feature) -> dict[str, dict[str, object]]:
        """Return for each kind of text the place where a latent fires most, the token in double brackets."""
        made: dict[str, dict[str, object]] = {}
        for kind, held in self.fired[one.site].items():
            if int(held.count[one.index]) == 0:
                continue
            window, at = held.places[held.where[one.index]].tolist()
            ids = self.windows[kind][window].ids.tolist()
            before, token, after = (
                str(self.tokenizer.decode(part)) if part else ""
                for part in (ids[max(0, at - _CONTEXT) : at], [ids[at]], ids[at + 1 : at + 1 + _CONTEXT // 2])
            )  # fmt: skip
            made[kind] = {
                "code": float(held.largest[one.index]),
                "text": " ".join(f"{before}[[{token}]]{after}".split()),
            }
        return made


def _because(one: Feature, reason: str) -> Feature:
    return replace(one, evidence={**one.evidence, "dropped": reason})
