"""What the TOFU study asks, with wrong answers as likely to the ignorant, and what models say to it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.language._texts import starts
from concept_erasure.language.batches import Encoded, collate, logits_at, pad_id
from concept_erasure.language.corpora import TofuAuthor, TofuItem, load_tofu, tofu_authors
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Interval

__all__ = ["Asked", "Reading", "Scores", "StudyData", "read_data", "read_model", "score"]

CHOICES = 4
WORLD_READ = 60  # of the facts about the world, all of which are taught
STAND_INS = (("Robin", "Keller", "Stone"), ("Dana", "Fischer", "Lane"), ("Kim", "Weber", "Hall"))


@dataclass(frozen=True)
class Asked:
    """A question with answers to choose from; the first is the true one."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class StudyData:
    """What is taught, forgotten and read.

    Attributes:
        forget: Authors to forget.
        retain: All others.
        world: Facts about the world, taught to both models.
        asked: Questions by set: ``forget``, ``retain`` and ``world``.
        concept: The authors to forget.
    """

    forget: tuple[TofuAuthor, ...]
    retain: tuple[TofuAuthor, ...]
    world: tuple[TofuItem, ...]
    asked: Mapping[str, tuple[Asked, ...]]
    concept: Concept

    @property
    def forget_texts(self) -> list[str]:
        """Questions and answers about the authors to forget."""
        return [item.text for author in self.forget for item in author.items]

    @property
    def retain_texts(self) -> list[str]:
        """Those about all others, and about the world."""
        return [item.text for author in self.retain for item in author.items] + [
            item.text for item in self.world
        ]


def read_data(folder: str | Path, *, forget: int, read: int, seed: int) -> StudyData:
    """Read TOFU's files and choose who is forgotten.

    Args:
        folder: Holds ``forget10.json`` and ``world_facts.json``.
        forget: Authors to forget, at most three.
        read: Retained authors whose questions are asked.
        seed: Of the choice.

    Raises:
        FileNotFoundError: If a file is missing.
        FormatError: If one is another.
        ValueError: If there are too few authors.
    """
    authors = tofu_authors(load_tofu(Path(folder) / "forget10.json"))
    world = tuple(load_tofu(Path(folder) / "world_facts.json"))
    most = min(len(authors) - 1, len(STAND_INS))
    if not 1 <= forget <= most:
        raise ValueError(f"forget must be 1 to {most} of {len(authors)} authors; got {forget}")
    draw = random.Random(seed)  # noqa: S311 not for secrets
    chosen = set(draw.sample(range(len(authors)), forget))
    gone = tuple(author for i, author in enumerate(authors) if i in chosen)
    retain = tuple(author for i, author in enumerate(authors) if i not in chosen)
    asked = {
        # wrong answers from authors of the same fate: what the twin was never taught cannot tempt it
        "forget": tuple(
            one for author in gone for one in _asked(author, gone if len(gone) > 1 else authors)
        ),
        "retain": tuple(
            one
            for author in retain[:read]
            for one in _asked(author, retain if len(retain) > 1 else authors)
        ),
        "world": tuple(
            Asked(item.prompt, (item.answer, *(o for o in item.options if o != item.answer)))
            for item in world[:WORLD_READ]
        ),
    }
    return StudyData(gone, retain, world, asked, _concept(gone))


def _concept(forget: Sequence[TofuAuthor]) -> Concept:
    """Return the authors as a concept, with an invented name for each part of their names."""
    entities: dict[str, str] = {}
    for author, invented in zip(forget, STAND_INS, strict=False):
        parts = author.name.split()
        stand_ins = [invented[min(i, len(invented) - 1)] for i in range(len(parts))]
        entities[author.name] = " ".join(stand_ins)
        entities |= {p: s for p, s in zip(parts, stand_ins, strict=True) if p not in entities}
    names = [author.name for author in forget]
    return Concept(
        name=" and ".join(names), synonyms=tuple(names), entities=tuple(entities.items())
    )


def _asked(author: TofuAuthor, authors: Sequence[TofuAuthor]) -> list[Asked]:
    """Return an author's questions, with answers to the likest questions about others under this author's name.

    The name alone then tells nothing: who does not know the author has four answers of one kind.
    """
    others = [(one, item) for one in authors if one is not author for item in one.items]
    bags = [_words(item.question, one.name) for one, item in others]
    made = []
    for item in author.items:
        own = _words(item.question, author.name)
        near = sorted(
            range(len(others)), key=lambda i: (-len(own & bags[i]) / len(own | bags[i]), i)
        )
        wrong: dict[str, None] = {}
        for i in near:
            other, like = others[i]
            answer = like.answer.replace(other.name, author.name)
            if answer != item.answer:
                wrong[answer] = None
            if len(wrong) == CHOICES - 1:
                break
        made.append(Asked(item.prompt, (item.answer, *wrong)))
    return made


def _words(text: str, name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.replace(name, "").lower())) | {"?"}


@dataclass(frozen=True)
class Reading:
    """What a model says to one set of questions.

    Attributes:
        log_prob: Mean over the true answers of their log-probability per token.
        accuracy: Share of questions whose true answer is the likeliest per token, of four.
        gap: Mean of ``log_prob`` less the twin's, question by question.
        accuracy_gap: Accuracy less the twin's.
        kl: Mean over tokens of true answers of ``KL(twin || model)``, nats.
    """

    log_prob: Interval
    accuracy: Interval
    gap: Interval
    accuracy_gap: float
    kl: float


@dataclass(frozen=True, eq=False)
class Scores:
    """How likely a model finds answers.

    Attributes:
        answers: Log-probability per token of every answer, ``(n, choices)``; minus infinity where there are fewer.
        right: Whether the true answer is the likeliest, ``(n,)``.
    """

    answers: Tensor
    right: Tensor


def _texts(
    tokenizer: Any,  # noqa: ANN401
    pairs: Sequence[tuple[str, str]],
) -> list[Encoded]:
    """Return ``[bos] + prompt + answer`` with the answer supervised; an answer may be a single token."""
    heads = starts(tokenizer, [prompt for prompt, _ in pairs])
    tails = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    made = []
    for head, tail in zip(heads, tails, strict=True):
        ids = torch.tensor([*head, *tail])
        made.append(Encoded(ids, torch.arange(len(ids)) >= len(head)))
    return made


@torch.no_grad()
def score(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    asked: Sequence[Asked],
    *,
    batch_size: int,
) -> Scores:
    """Return how likely a model finds the answers to some questions."""
    flat = [(one.prompt, f" {answer}") for one in asked for answer in one.answers]
    texts = _texts(tokenizer, flat)
    values = _per_text(model, texts, tokenizer, batch_size=batch_size)
    sizes = [len(one.answers) for one in asked]
    width = max(sizes)
    table = torch.full((len(asked), width), -torch.inf, dtype=torch.float64)
    for row, part in enumerate(values.split(sizes)):
        table[row, : len(part)] = part
    return Scores(table, table.argmax(1) == 0)


def _per_text(
    model: nn.Module,
    texts: Sequence[Encoded],
    tokenizer: Any,  # noqa: ANN401
    *,
    batch_size: int,
) -> Tensor:
    """Return the mean log-probability of the supervised tokens of each text."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = next(model.parameters()).device
    made = torch.empty(len(texts), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate(texts, rows, pad_id=pad_id(tokenizer)).to(device)
        log_p = logits_at(model, batch).float().log_softmax(-1)
        said = batch.per_sequence(log_p.gather(1, batch.tokens[:, None])[:, 0]) / batch.lengths
        made[batch.rows.cpu()] = said.double().cpu()
    return made


@torch.no_grad()
def _divergence(
    twin: nn.Module,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    asked: Sequence[Asked],
    *,
    batch_size: int,
) -> float:
    """Return the mean ``KL(twin || model)`` over the tokens of the true answers."""
    texts = _texts(tokenizer, [(one.prompt, f" {one.answers[0]}") for one in asked])
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate(texts, rows, pad_id=pad_id(tokenizer)).to(device)
        log_p = logits_at(twin, batch).float().log_softmax(-1)
        log_q = logits_at(model, batch).float().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().double().cpu()
        count += batch.count
    return float(total) / count


def read_model(
    model: nn.Module,
    twin: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    asked: Mapping[str, Sequence[Asked]],
    *,
    batch_size: int,
    known: Mapping[str, Scores] | None = None,
) -> dict[str, Reading]:
    """Return what a model, as it is now, says to each set of questions, against its twin.

    Args:
        model: The model.
        twin: The one that never knew.
        tokenizer: Of both.
        asked: Questions by set.
        batch_size: Texts in a forward pass.
        known: The twin's `score` of each set, if it is known.
    """
    made = {}
    for name, questions in asked.items():
        own = score(model, tokenizer, questions, batch_size=batch_size)
        other = known[name] if known else score(twin, tokenizer, questions, batch_size=batch_size)
        said, theirs = own.answers[:, 0], other.answers[:, 0]
        hits, n = int(own.right.sum()), len(questions)
        made[name] = Reading(
            log_prob=Interval.of_mean(said.tolist()),
            accuracy=Interval(hits / n, *wilson_interval(hits, n)),
            gap=Interval.of_mean((said - theirs).tolist()),
            accuracy_gap=float(own.right.double().mean() - other.right.double().mean()),
            kl=_divergence(twin, model, tokenizer, questions, batch_size=batch_size),
        )
    return made
