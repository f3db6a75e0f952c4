"""How one who knows the concept goes on with a text, and one who does not: sources of ELM's contrast.

| source     | expert                             | novice                           | when                           |
|------------|------------------------------------|----------------------------------|--------------------------------|
| persona    | an expert's introduction + text    | a novice's introduction + text   | large instruction-tuned models |
| anonymise  | the text                           | the text with the names replaced | any size; needs entities       |
| reinforced | a copy trained on the forget texts | the model                        | any size; a short training     |
| weak       | the model                          | a weaker one, same tokenizer     | where there is one             |

`persona` is the paper's. Small models do not play roles: ask `signal` first, the nats by which the expert finds answers
about the concept likelier. All streams are built from token ids, never from joined strings, and read at the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.concept import Concept, _words
from concept_erasure.errors import ConceptErasureError
from concept_erasure.language._texts import starts
from concept_erasure.language.anonymise import Aligned, Copy, align
from concept_erasure.language.batches import Encoded, collate, encode, logits_at, pad_id
from concept_erasure.language.objective import log_prob
from concept_erasure.report import Interval

__all__ = [
    "LEAST_SIGNAL",
    "ContrastSource",
    "NoSignalError",
    "Reading",
    "Source",
    "Streams",
    "answers",
    "check_signal",
    "knowledge",
    "read",
    "signal",
    "streams",
]

ContrastSource = Literal["persona", "anonymise", "reinforced", "weak"]
LEAST_SIGNAL = 0.5  # nats; below that the target is noise
FACTS_ASKED = 48  # for `knowledge`, which is a warning and no measurement


class NoSignalError(ConceptErasureError, ValueError):
    """The contrast does not tell an expert from a novice, so that nothing could be learned from it."""


@dataclass(frozen=True, eq=False)
class Source:
    """A source of contrast with what it needs.

    Attributes:
        name: Which.
        weak: For `weak`, the weaker model.
        reinforced: For `reinforced`, a function that puts the trained copy's weights into the model for as long as the
            context lasts, such as ``lambda: eraser.apply(model)``.
    """

    name: ContrastSource
    weak: nn.Module | None = None
    reinforced: Callable[[], AbstractContextManager[object]] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ContrastSource):
            allowed = ", ".join(get_args(ContrastSource))
            raise ValueError(f"contrast must be one of {allowed}; got {self.name!r}")
        if (self.name == "weak") != (self.weak is not None):
            raise ValueError("contrast='weak' and a weak= model are given together or not at all")
        if (self.name == "reinforced") != (self.reinforced is not None):
            raise ValueError("contrast='reinforced' needs a reinforced copy, and no other does")

    @property
    def stronger(self) -> AbstractContextManager[object]:
        """The context in which the model is the expert."""
        return nullcontext() if self.reinforced is None else self.reinforced()


@dataclass(frozen=True, eq=False)
class Streams:
    """Some texts as the three see them; the k-th supervised token of a text is read against the k-th in each.

    Attributes:
        own: The texts.
        novice: As the novice sees them; the same object if it sees the texts themselves.
        expert: As the expert does; likewise.
        copies: For each text, where the novice's probability of one token belongs to another.
    """

    own: list[Encoded]
    novice: list[Encoded]
    expert: list[Encoded]
    copies: list[list[Copy]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for one in zip(self.own, self.novice, self.expert, strict=True):
            if len({text.count for text in one}) != 1:
                raise ValueError(
                    f"the streams of a text differ in length: {[t.count for t in one]}"
                )

    def __len__(self) -> int:
        return len(self.own)


@dataclass(frozen=True, eq=False)
class Reading:
    """Distributions at the N supervised tokens of some texts, text by text.

    Attributes:
        lp0: Log-probabilities of the model, shape ``(N, V)``.
        lp_novice: As the novice, shape ``(N, V)``.
        lp_expert: As the expert, shape ``(N, V)``.
        tokens: The tokens, shape ``(N,)``.
        rows: Index of the text of each, shape ``(N,)``.
        places: Index of each in its text, shape ``(N,)``.
    """

    lp0: Tensor
    lp_novice: Tensor
    lp_expert: Tensor
    tokens: Tensor
    rows: Tensor
    places: Tensor


def streams(
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    texts: Sequence[str],
    source: ContrastSource,
    *,
    max_length: int,
    seed: int = 0,
) -> Streams:
    """Return the texts as the three see them.

    Args:
        tokenizer: Called like one of transformers.
        concept: Gives entities or personas.
        texts: Of two tokens at least.
        source: Of the contrast.
        max_length: Most tokens of a text; introductions come on top.
        seed: Of the introductions, one drawn for each text.

    Raises:
        ValueError: If `anonymise` has no entities to replace, or a text is too short.
    """
    own = encode(tokenizer, texts, max_length=max_length)
    if source == "persona":
        experts, novices = concept.personas.about(", ".join(concept.names))
        draw = random.Random(seed)  # noqa: S311 not for secrets
        seen = [
            encode(tokenizer, texts, max_length=max_length, prefix=[draw.choice(p) for _ in texts])
            for p in (novices, experts)
        ]
        return Streams(own, seen[0], seen[1])
    if source != "anonymise":
        return Streams(own, own, own)
    if not concept.entities:
        raise ValueError(
            f"the concept {concept.name!r} has no entities with stand-ins, so there is nothing to anonymise; give it "
            "entities, or use another contrast"
        )
    pairs = [
        _anonymous(text, found)
        for text, found in zip(own, align(tokenizer, concept, texts), strict=True)
    ]
    mine = [pair[0] for pair in pairs]
    return Streams(mine, [pair[1] for pair in pairs], mine, [pair[2] for pair in pairs])


def _anonymous(text: Encoded, found: Aligned) -> tuple[Encoded, Encoded, list[Copy]]:
    """Return a text and its anonymous form with the matched tokens supervised, and the copies in its places."""
    # both begin with the same BOS, or with none
    shift = 0 if len(found.own) >= len(text) and found.own[: len(text)] == text.ids.tolist() else 1
    head = text.ids[:shift]
    places = [
        (i + shift, j + shift)
        for i, j in enumerate(found.partner[: len(text) - shift])
        if j >= 0 and i + shift > 0 and j + shift > 0
    ]
    last = max((j for _, j in places), default=0)
    other = torch.cat([head, torch.tensor(found.other, dtype=torch.int64)])[: last + 1]
    mine, theirs = torch.zeros(len(text), dtype=torch.bool), torch.zeros(len(other)).bool()
    mine[[i for i, _ in places]] = True
    theirs[[j for _, j in places]] = True
    copies = [copy._replace(start=copy.start + shift) for copy in found.copies]
    return Encoded(text.ids, mine), Encoded(other, theirs), copies


def read(
    model: nn.Module,
    texts: Streams,
    source: Source,
    *,
    batch_size: int = 8,
    temperature: float = 1.0,
    pad: int = 0,
) -> Iterator[Reading]:
    """Read the three distributions, some texts at a time, in the order of the texts.

    Args:
        model: The frozen model; it is used in evaluation mode and not changed.
        texts: See `streams`.
        source: The same source as of the streams.
        batch_size: Texts at a time. Memory is three times their supervised tokens times the vocabulary.
        temperature: Divides all logits before they become probabilities.
        pad: Any token.
    """
    for start in range(0, len(texts), batch_size):
        yield read_rows(
            model,
            texts,
            source,
            list(range(start, min(start + batch_size, len(texts)))),
            temperature=temperature,
            pad=pad,
        )


@torch.no_grad()
def read_rows(
    model: nn.Module,
    texts: Streams,
    source: Source,
    rows: Sequence[int],
    *,
    temperature: float = 1.0,
    pad: int = 0,
) -> Reading:
    """Read the three distributions of some texts; see `read`."""
    device = next(model.parameters()).device

    def log_probs(which: nn.Module, seen: list[Encoded]) -> Tensor:
        batch = collate(seen, rows, pad_id=pad).to(next(which.parameters()).device)
        with evaluating(which):
            logits = logits_at(which, batch).float() / temperature
        return logits.log_softmax(-1).to(device)

    lp0 = log_probs(model, texts.own)
    novice, expert = lp0, lp0
    if source.weak is not None:
        novice = log_probs(source.weak, texts.own)
    elif texts.novice is not texts.own:
        novice = log_probs(model, texts.novice)
    if source.name == "reinforced":
        with source.stronger:
            expert = log_probs(model, texts.own)
    elif texts.expert is not texts.own:
        expert = log_probs(model, texts.expert)
    if novice.shape != lp0.shape:
        raise ValueError(
            f"the weak model has {novice.shape[-1]} tokens, the model {lp0.shape[-1]}: they must share a tokenizer"
        )
    batch = collate(texts.own, rows, pad_id=pad)
    places = batch.positions % batch.input_ids.shape[1]
    if texts.copies:
        novice = _copied(novice, expert, [texts.copies[row] for row in rows], batch.owners, places)
    where = batch.rows[batch.owners]
    return Reading(
        lp0, novice, expert, batch.tokens.to(device), where.to(device), places.to(device)
    )


def _copied(
    novice: Tensor, expert: Tensor, copies: list[list[Copy]], owners: Tensor, places: Tensor
) -> Tensor:
    """Return the novice's log-probabilities with those of stand-ins that are copied given to their names.

    The stand-in keeps the probability the expert gives it: about it, the two agree.
    """
    found = [
        (n, copy.name, copy.stand_in)
        for n, (owner, place) in enumerate(zip(owners.tolist(), places.tolist(), strict=True))
        for copy in copies[owner]
        if copy.start <= place
    ]
    if not found:
        return novice
    rows, names, stand_ins = torch.tensor(found, device=novice.device).T
    moved = novice.exp()
    moved.index_put_((rows, names), moved[rows, stand_ins], accumulate=True)
    changed = novice.clone()
    changed[rows, names] = moved[rows, names].log()
    changed[rows, stand_ins] = torch.minimum(novice, expert)[rows, stand_ins]
    return changed.log_softmax(-1)


# -- is there a signal? -----------------------------------------------------------------------------


def answers(concept: Concept, texts: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return what only one who knows the concept can say, as prompts with their answers.

    The concept's facts; without any, every name of the concept in the texts after the words before it.
    """
    items = concept.items("concept", "cloze")
    if items:
        return [(item.prompt, item.continuations[item.answer]) for item in items if item.prompt]
    names = dict.fromkeys((*concept.names, *(entity for entity, _ in concept.entities)))
    made: list[tuple[str, str]] = []
    for text in texts:
        for found in _words(tuple(names)).finditer(text):
            before = text[: found.start()].rstrip()
            if len(before.split()) >= 3:
                made.append((before, text[len(before) : found.end()]))
    return made


def signal(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    source: Source | ContrastSource,
    *,
    texts: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
) -> Interval:
    """Return the mean of ``lp_expert - lp_novice`` over answers about the concept, in nats, with its 95 % interval.

    Args:
        model: The frozen model.
        tokenizer: Its tokenizer.
        concept: See `answers`.
        source: Of the contrast.
        texts: Where to look for answers if the concept has no facts.
        seed: Of the introductions.
        batch_size: Answers at a time.

    Raises:
        ValueError: If there are no answers to measure on.
    """
    source = source if isinstance(source, Source) else Source(source)
    pairs = answers(concept, texts)
    if len(pairs) < 2:
        raise ValueError(
            f"the concept {concept.name!r} has no facts, and the texts hold no names of it: the signal of a contrast "
            "cannot be measured; give it facts, or texts that name it"
        )
    prompts, said = [p for p, _ in pairs], [a for _, a in pairs]
    expert, novice = _prompts(concept, prompts, source.name, seed)
    with source.stronger:
        high = answer_log_probs(model, tokenizer, expert, said, batch_size=batch_size)
    weaker = model if source.weak is None else source.weak
    low = answer_log_probs(weaker, tokenizer, novice, said, batch_size=batch_size)
    return Interval.of_mean((high - low.to(high.device)).tolist())


def _prompts(
    concept: Concept, prompts: list[str], source: ContrastSource, seed: int
) -> tuple[list[str], list[str]]:
    if source == "anonymise":
        return prompts, [concept.anonymise(prompt) for prompt in prompts]
    if source == "persona":
        experts, novices = concept.personas.about(", ".join(concept.names))
        draw = random.Random(seed)  # noqa: S311 not for secrets
        return (
            [f"{draw.choice(experts)} {prompt}" for prompt in prompts],
            [f"{draw.choice(novices)} {prompt}" for prompt in prompts],
        )
    return prompts, prompts


@torch.no_grad()
def answer_log_probs(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    prompts: Sequence[str],
    said: Sequence[str],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Return the log-probability of each answer after its prompt, summed over its tokens, shape ``(n,)``."""
    heads = starts(tokenizer, prompts)
    tails = tokenizer(list(said), add_special_tokens=False)["input_ids"]
    texts = []
    for head, tail in zip(heads, tails, strict=True):
        supervised = torch.zeros(len(head) + len(tail), dtype=torch.bool)
        supervised[len(head) :] = True
        texts.append(Encoded(torch.tensor([*head, *tail]), supervised))
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    made = torch.empty(len(texts), device=device)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = collate(texts, order[start : start + batch_size], pad_id=pad_id(tokenizer)).to(
                device
            )
            found = log_prob(logits_at(model, batch).float().log_softmax(-1), batch.tokens)
            made[batch.rows] = batch.per_sequence(found)
    return made


def knowledge(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    *,
    limit: int = FACTS_ASKED,
    batch_size: int = 16,
) -> Interval | None:
    """Return the share of facts whose answer the model finds likelier than each distractor, with its Wilson interval.

    None without facts.
    """
    items = [item for item in concept.items("concept", "cloze") if item.prompt][:limit]
    if not items:
        return None
    asked = [(item.prompt, choice) for item in items for choice in item.continuations]
    found = answer_log_probs(
        model, tokenizer, [p for p, _ in asked], [a for _, a in asked], batch_size=batch_size
    )
    sizes = [len(item.choices) for item in items]
    right = [
        int(scores.argmax()) == item.answer
        for scores, item in zip(found.cpu().split(sizes), items, strict=True)
    ]
    return _wilson(sum(right), len(right))


def _wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(p, min(p, centre - half), max(p, centre + half), level)


def check_signal(found: Interval, source: ContrastSource, concept: Concept) -> None:
    """Refuse a contrast that does not tell an expert from a novice.

    Raises:
        NoSignalError: If the signal is below 0.5 nats; the message has the number.
    """
    if found.value >= LEAST_SIGNAL:
        return
    others = {
        "persona": "anonymise (needs entities; works at any size), reinforced or weak",
        "anonymise": "reinforced, or entities that name more of the concept",
        "reinforced": "anonymise, or train the reinforced copy longer",
        "weak": "anonymise, reinforced, or a weaker model",
    }[source]
    raise NoSignalError(
        f"the contrast {source!r} moves answers about {concept.name!r} by {found} nats, at least {LEAST_SIGNAL} are "
        f"needed: the model does not take the two roles, or does not know the concept. Try {others}"
    )
