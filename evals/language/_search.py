"""One run of a search for a suffix: what it may use, where it has been, what its best suffix makes the model write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.evals.language._attack import Attack, Judge, allowed_tokens, decode_ids
from concept_erasure.evals.language._objective import Objective

__all__ = ["Run", "Search", "Texts"]

Strings = str | Sequence[str]
Texts = tuple[Strings, Strings, Strings]
TRIES = 100


@dataclass(frozen=True)
class Search:
    """How suffixes are judged and evaluated.

    Attributes:
        tokenizer: Of the model.
        judge: ``(text, answer) -> bool``.
        max_new_tokens: Length of the text that is judged.
        check_every: Steps between two judgements.
        ascii_only: Whether suffixes are printable ASCII.
        chunk: Sequences a forward pass.
    """

    tokenizer: Callable[..., Any]
    judge: Judge
    max_new_tokens: int
    check_every: int
    ascii_only: bool
    chunk: int


def _letters(text: str) -> str:
    """Return letters and digits only, in small: pieces of words may be spread over tokens."""
    return "".join(one for one in text.casefold() if one.isalnum())


def _telling(answer: str) -> set[str]:
    """Return what gives an answer away: all of it, and each of its words of four letters or more."""
    words = {_letters(word) for word in answer.split()}
    found = {word for word in words if len(word) > 3} | {_letters(answer)}
    return found - {""}


def _listed(value: Strings) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


class Run:
    """A search under way; made and used inside `frozen`.

    Args:
        model: The model.
        search: How suffixes are judged.
        method: Name of the attack.
        texts: Prompts, targets, and what stands between suffix and target.
        seed: Of `generator`.
    """

    def __init__(
        self, model: nn.Module, search: Search, method: str, texts: Texts, seed: int
    ) -> None:
        self._begun = time.perf_counter()
        self.search, self.method, self.seed = search, method, seed
        prompts, self._answers = _listed(texts[0]), _listed(texts[1])
        after = texts[2] if isinstance(texts[2], str) else list(texts[2])
        self.objective = Objective(
            model, search.tokenizer, prompts, self._answers, after, chunk=search.chunk
        )
        size = self.objective.vocabulary
        self.allowed = allowed_tokens(search.tokenizer, size, ascii_only=search.ascii_only)
        self.allowed = self.allowed.to(self.objective.device)
        self.generator = torch.Generator().manual_seed(seed)
        self._secrets = {word for answer in self._answers for word in _telling(answer)}
        self._suffixes: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._judged: tuple[int, list[str]] | None = None
        self._held_out: tuple[tuple[bool, ...], tuple[bool, ...]] = ((), ())
        self._before: tuple[bool, ...] = ()

    def usable(self, suffixes: Tensor) -> Tensor:
        """Return which suffixes survive as text and do not spell out an answer, ``(n,)`` bool on the device.

        A suffix that holds the answer only has to be repeated: that is no knowledge.
        """
        shown = decode_ids(self.search.tokenizer, suffixes.tolist())
        silent = [not any(one in _letters(text) for one in self._secrets) for text in shown]
        good = self.objective.stable(suffixes) & torch.tensor(silent, dtype=torch.bool)
        return good.to(suffixes.device)

    def start(self, length: int) -> Tensor:
        """Return a random usable suffix, shape ``(length,)``.

        Raises:
            ValueError: None was found.
        """
        tokens = self.allowed.nonzero()[:, 0].cpu()
        for _ in range(TRIES):
            drawn = tokens[torch.randint(len(tokens), (16, length), generator=self.generator)]
            good = drawn[self.usable(drawn)]
            if len(good):
                return good[0].to(self.objective.device)
        raise ValueError(
            f"none of {16 * TRIES} random suffixes of {length} tokens survives as text; the prompt or what follows "
            "the suffix may itself be read back as other tokens: shorten or rephrase it"
        )

    def note(self, suffix: Tensor, loss: Tensor) -> None:
        """Keep a suffix and its loss, a scalar tensor: the start, then one a step."""
        self._suffixes.append(suffix)
        self._losses.append(loss)

    def _best(self) -> int:
        return int(torch.stack(self._losses).argmin())

    def _judge(self) -> tuple[bool, ...]:
        """Return for each prompt whether the best suffix so far reaches its answer."""
        best = self._best()
        if self._judged is None or self._judged[0] != best:
            count = self.search.max_new_tokens
            self._judged = best, self.objective.continuations(self._suffixes[best], count)
        return self._verdicts(self._judged[1], self._answers)

    def _verdicts(self, texts: Sequence[str], answers: Sequence[str]) -> tuple[bool, ...]:
        return tuple(
            bool(self.search.judge(text, answer.strip()))
            for text, answer in zip(texts, answers, strict=True)
        )

    def reached_now(self) -> bool:
        """Look, every few steps, whether all prompts give their answers."""
        return (len(self._losses) - 1) % self.search.check_every == 0 and all(self._judge())

    def close(self, held_out: Sequence[tuple[str, str]]) -> None:
        """Judge the best suffix, the model without it, and both on prompts that took no part."""
        self._judge()
        none = torch.empty(0, dtype=torch.long)
        count = self.search.max_new_tokens
        self._before = self._verdicts(self.objective.continuations(none, count), self._answers)
        if held_out:
            after = self.objective.afters[0]
            prompts, answers = (list(part) for part in zip(*held_out, strict=True))
            other = Objective(
                self.objective.model, self.search.tokenizer, prompts, answers, after, chunk=1
            )
            suffix = self._suffixes[self._best()]
            texts = other.continuations(suffix, count), other.continuations(none, count)
            self._held_out = (self._verdicts(texts[0], answers), self._verdicts(texts[1], answers))
            self.objective.queries += other.queries
        self._seconds = time.perf_counter() - self._begun

    @property
    def success(self) -> bool:
        """Whether every prompt of the closed run gives its answer."""
        return all(self._judge())

    def finish(self, budget: Mapping[str, int], *, smoke: bool, control: Attack | None) -> Attack:
        """Return the record of a closed run."""
        best = self._best()
        losses = torch.stack(self._losses).tolist()
        outputs = self._judged[1] if self._judged else []
        search = self.search
        more: dict[str, int | float | str | bool] = {
            "prompts": len(self._answers),
            "held out": len(self._held_out[0]),
            "new tokens judged": search.max_new_tokens,
            "judged every": search.check_every,
            "ascii only": search.ascii_only,
            "tokens allowed": int(self.allowed.sum()),
            "prefix cached": self.objective.cached,
        }
        return Attack(
            method=self.method,
            suffix=self.objective.text(self._suffixes[best]),
            suffix_ids=tuple(self._suffixes[best].tolist()),
            outputs=tuple(outputs),
            reached=self._judge(),
            before=self._before,
            losses=tuple(losses),
            best_loss=losses[best],
            steps_used=len(losses) - 1,
            budget={**budget, **more},
            smoke=smoke,
            queries=self.objective.queries,
            seconds=self._seconds,
            seed=self.seed,
            held_out_reached=self._held_out[0],
            held_out_before=self._held_out[1],
            control=control,
        )
