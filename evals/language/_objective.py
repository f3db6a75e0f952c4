"""The loss of a target behind prompts, as a function of the suffix in between, and its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from concept_erasure.evals.language._attack import decode_ids, logits_at
from concept_erasure.evals.language.items import opening_ids, token_ids

__all__ = ["Objective"]


@dataclass(frozen=True)
class _Case:
    """One prompt: its three fixed pieces, and the keys and values of the first."""

    before: Tensor
    after: Tensor
    target: Tensor
    lead: int
    cache: Any = None


class Objective:
    """The mean negative log-probability of targets behind prompts with a suffix, as a function of the suffix.

    Use it inside `frozen`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: What stands before the suffix.
        targets: What is wanted at the end, one for each prompt, each with its leading space if it needs one.
        after: What stands between suffix and target, the same for all or one for each.
        chunk: Sequences a forward pass; raising it costs memory.

    Raises:
        ValueError: A count disagrees, or a target or prompt has no tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        prompts: Sequence[str],
        targets: Sequence[str],
        after: str | Sequence[str] = "",
        *,
        chunk: int = 64,
    ) -> None:
        if len(prompts) != len(targets) or not prompts:
            raise ValueError(
                f"as many targets as prompts, and at least one; got {len(prompts)} prompts and "
                f"{len(targets)} targets"
            )
        afters = [after] * len(prompts) if isinstance(after, str) else list(after)
        if len(afters) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many afters; got {len(afters)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {chunk}")
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self.embedding: nn.Module = cast("Any", model).get_input_embeddings()
        self.device = next(self.embedding.parameters()).device
        self.vocabulary = int(cast("Tensor", self.embedding.weight).shape[0])
        self.queries = 0
        self.afters = afters
        self.cases = [self._case(*one) for one in zip(prompts, afters, targets, strict=True)]

    def _case(self, prompt: str, after: str, target: str) -> _Case:
        lead = opening_ids(self.tokenizer, self.model)
        before, behind, wanted = token_ids(self.tokenizer, [prompt, after, target])
        if not wanted:
            raise ValueError(f"the target {target!r} has no tokens")
        if not lead and not before:
            raise ValueError(
                "a prompt without tokens needs a tokenizer that begins every text with one"
            )
        pieces = [
            torch.tensor(ids, dtype=torch.long, device=self.device)
            for ids in (lead + before, behind, wanted)
        ]
        return _Case(pieces[0], pieces[1], pieces[2], len(lead), self._cached(pieces[0]))

    def _cached(self, before: Tensor) -> Any:  # noqa: ANN401 a cache of the model's own class
        """Return the keys and values of a beginning, or None if the model gives the same logits only without."""
        probe = torch.cat([before, before[-1:]])[None]
        try:
            cache = self.model(input_ids=before[None], use_cache=True).past_key_values
            with_it = self.model(
                input_ids=before[-1:][None], past_key_values=copy.deepcopy(cache), use_cache=True
            ).logits
            copy.deepcopy(cache).batch_repeat_interleave(2)
        except (AttributeError, TypeError, ValueError):
            return None
        without = self.model(input_ids=probe).logits[:, -1:]
        gap = with_it.float().log_softmax(-1) - without.float().log_softmax(-1)
        slack = 1e-3 if without.dtype in {torch.float32, torch.float64} else 0.1
        return cache if bool(gap.exp().sub(1).abs().max() <= slack) else None

    @property
    def cached(self) -> bool:
        """Whether the keys and values of the beginnings are reused."""
        return all(case.cache is not None for case in self.cases)

    def _run(self, case: _Case, inner: Tensor, wanted: int) -> Tensor:
        """Return logits at the last ``wanted`` positions, ``(n, wanted, v)``, for what follows the beginning.

        Args:
            case: The prompt.
            inner: Token ids ``(n, t)`` or embeddings ``(n, t, d)`` of what follows.
            wanted: How many positions.
        """
        n = len(inner)
        embedded = inner.is_floating_point()
        inputs: dict[str, Any] = {}
        if case.cache is not None:
            cache = copy.deepcopy(case.cache)
            if n > 1:
                cache.batch_repeat_interleave(n)
            inputs |= {"past_key_values": cache, "use_cache": True}
        else:
            before = case.before.expand(n, -1)
            inner = torch.cat([self.embedding(before) if embedded else before, inner], 1)
            inputs["use_cache"] = False
        chosen = torch.zeros(inner.shape[:2], dtype=torch.bool, device=inner.device)
        chosen[:, -wanted:] = True
        inputs["inputs_embeds" if embedded else "input_ids"] = inner
        self.queries += n
        logits = logits_at(self.model, chosen, inputs)
        return logits.reshape(n, wanted, -1)

    def _loss(self, case: _Case, inner: Tensor) -> Tensor:
        """Return the mean loss of a target token, ``(n,)``; ``inner`` is the suffix with what follows it."""
        target = case.target
        logits = self._run(case, inner, len(target) + 1)[:, :-1]
        places = target.expand(len(inner), -1)[..., None]
        return -logits.log_softmax(-1).gather(-1, places)[..., 0].mean(1)

    def losses(self, suffixes: Tensor) -> Tensor:
        """Return the loss of suffixes ``(n, l)``, shape ``(n,)``, float32: the mean over prompts."""
        total = torch.zeros(len(suffixes), device=self.device)
        for case in self.cases:
            tail = torch.cat([case.after, case.target])
            parts = [
                self._loss(case, torch.cat([part, tail.expand(len(part), -1)], 1))
                for part in suffixes.to(self.device).split(self.chunk)
            ]
            total += torch.cat(parts)
        return total / len(self.cases)

    def gradient(self, suffix: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the one-hot rows of a suffix ``(l,)``, shape ``(l, v)``."""
        suffix = suffix.to(self.device)
        rows = self.embedding(suffix[None]).detach()
        total = torch.zeros(rows.shape[1:], device=self.device)
        for case in self.cases:
            tail = self.embedding(torch.cat([case.after, case.target])[None]).detach()
            with torch.enable_grad():
                free = rows.clone().requires_grad_(True)
                loss = self._loss(case, torch.cat([free, tail], 1)).sum()
                (found,) = torch.autograd.grad(loss, free)
            total += found[0].float()
        return self._to_one_hot(total / len(self.cases))

    def _to_one_hot(self, gradient: Tensor) -> Tensor:
        """Chain with the embedding, which is linear in the one-hot rows: ``(l, d) -> (l, v)``."""
        plain_kind = type(self.embedding) is nn.Embedding and not self.embedding._forward_hooks
        if plain_kind:
            return gradient @ cast("Tensor", self.embedding.weight).float().T
        # a scale or an edit acts behind the table: ask for the rows as the model reads them
        everything = torch.arange(self.vocabulary, device=self.device)
        parts = [
            gradient @ self.embedding(ids[None])[0].float().T for ids in everything.split(16384)
        ]
        return torch.cat(parts, 1)

    def next_probabilities(self, suffixes: Tensor) -> Tensor:
        """Return what the model would write after ``[before] [suffix]``, ``(n, v)``, the mean over prompts."""
        total: Tensor | None = None
        for case in self.cases:
            if suffixes.shape[1]:
                parts = [self._run(case, part, 1)[:, 0] for part in suffixes.split(self.chunk)]
                logits = torch.cat(parts)
            else:
                whole = self.model(input_ids=case.before[None], use_cache=False).logits[:, -1]
                logits = whole.float().expand(len(suffixes), -1)
            found = logits.softmax(-1)
            total = found if total is None else total + found
        return cast("Tensor", total) / len(self.cases)

    def stable(self, suffixes: Tensor) -> Tensor:
        """Return which suffixes survive as text, ``(n,)`` bool on the CPU.

        The text of ``[before] [suffix] [after]`` must be read back as the same tokens: only such a suffix can be typed.
        """
        rows = suffixes.tolist()
        good = torch.ones(len(rows), dtype=torch.bool)
        for case in self.cases:
            before, after = case.before[case.lead :].tolist(), case.after.tolist()
            whole = [before + row + after for row in rows]
            back = token_ids(self.tokenizer, decode_ids(self.tokenizer, whole))
            good &= torch.tensor(
                [one == other for one, other in zip(whole, back, strict=True)], dtype=torch.bool
            )
        return good

    def text(self, suffix: Tensor) -> str:
        """Return the suffix as it is typed behind the first prompt."""
        case = self.cases[0]
        before = case.before[case.lead :].tolist()
        start, whole = decode_ids(self.tokenizer, [before, before + suffix.tolist()])
        return whole.removeprefix(start)

    def continuations(self, suffix: Tensor, max_new_tokens: int) -> list[str]:
        """Return what the model writes, greedily, after ``[before] [suffix] [after]`` of each prompt."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        made = []
        for case in self.cases:
            ids = torch.cat([case.before, suffix.to(self.device), case.after])[None]
            new = _greedy(self.model, ids, max_new_tokens, end)
            made += decode_ids(self.tokenizer, [new])
            self.queries += 1
        return made


def _greedy(model: nn.Module, ids: Tensor, count: int, end: int | None) -> list[int]:
    """Return up to ``count`` tokens of the greedy continuation of ``ids`` (1, t), without the end token."""
    made: list[Tensor] = []
    output = model(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    for _ in range(count):
        new = output.logits[:, -1].argmax(-1, keepdim=True)
        made.append(new)
        if len(made) == count:
            break
        if cache is None:
            output = model(input_ids=torch.cat([ids, *made], 1), use_cache=False)
        else:
            output = model(input_ids=new, past_key_values=cache, use_cache=True)
    tokens = torch.cat(made, 1)[
        0
    ].tolist()  # fetched once: waiting for the end token would cost a trip each
    return tokens[: tokens.index(end)] if end in tokens else tokens
