"""BEAST: a suffix found by a beam search in the model's own words, without a gradient.

Every step lets the model propose a few next tokens for each suffix of the beam, scores all of them by the target's
log-probability, and keeps the best. The suffix stays plausible text, and a run takes minutes.

Paper: Sadasivan et al. 2024, arXiv:2402.15570, algorithm 1 (beam k1, proposals k2, length L). Deviations: suffixes that
would be read back from their text as other tokens, or that spell out the answer, are dropped; the best suffix of any
length is returned and not the last; with several prompts the proposals come from the mean of their next-token
probabilities; success is the right content, judged by the answer key. What is said about ``control`` and ``held_out``
in `gcg` holds here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.evals.language._attack import (
    Attack,
    Judge,
    check_budget,
    contains,
    frozen,
)
from concept_erasure.evals.language._search import Run, Search, Texts

__all__ = ["MINIMUM", "beast", "proposals"]

MINIMUM = {"beam": 15, "samples": 15, "length": 40}
TRIES = 20


def proposals(
    probabilities: Tensor, allowed: Tensor, *, samples: int, generator: torch.Generator
) -> Tensor:
    """Draw next tokens without replacement from the allowed part of distributions.

    Args:
        probabilities: Shape ``(n, v)``.
        allowed: Shape ``(v,)``, bool.
        samples: Tokens for each row; fewer if fewer are allowed.
        generator: On the CPU.

    Returns:
        Shape ``(n, samples)``, token ids.
    """
    kept = probabilities.double().masked_fill(~allowed, 0.0)
    # every allowed token keeps a trace of probability, so that a row can always give enough of them
    kept = kept + allowed * torch.finfo(torch.float32).tiny
    count = min(samples, int(allowed.sum()))
    drawn = torch.multinomial(kept.cpu(), count, replacement=False, generator=generator)
    return drawn.to(probabilities.device)


def beast(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: Callable[..., Any],
    prompt: str | Sequence[str],
    target: str | Sequence[str],
    *,
    after: str | Sequence[str] = "",
    control: str | Sequence[str] | None = None,
    held_out: Sequence[tuple[str, str]] = (),
    judge: Judge = contains,
    beam: int = 15,
    samples: int = 15,
    length: int = 40,
    max_new_tokens: int = 24,
    check_every: int = 5,
    chunk: int = 64,
    ascii_only: bool = True,
    seed: int = 0,
    smoke: bool = False,
    progress: bool | None = None,
) -> Attack:
    """Attack a live model; it is left bit-identical.

    Cost: ``length`` times ``beam * samples`` forward passes a prompt over the tokens behind the prompt.

    Args:
        model: A causal language model, edits, hooks and adapters in force included.
        tokenizer: Its tokenizer.
        prompt: What stands before the suffix; several give one suffix for all of them.
        target: The answer, with its leading space if it needs one; one for each prompt. `attack_case` makes prompt,
            after and target of an item.
        after: What stands between the suffix and the answer, such as a line break and "Answer:".
        control: A wrong answer for each prompt, attacked with the same budget if the right one was reached.
        held_out: Further ``(prompt, answer)`` on which the suffix is tried in the end.
        judge: ``(text, answer) -> bool``, whether a greedy continuation holds the right content.
        beam: Suffixes that are kept, the paper's k1.
        samples: Next tokens that are tried for each, the paper's k2.
        length: Tokens of the suffix at most: the number of steps.
        max_new_tokens: Length of the continuation that is judged.
        check_every: Steps between two looks at the continuation; the attack ends when all are reached.
        chunk: Sequences a forward pass; raising it costs memory.
        ascii_only: Use tokens of printable ASCII only.
        seed: Of the draws.
        smoke: Allow a budget below `MINIMUM`, to try the code out; the result says so.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The record, see `Attack`; ``losses`` begins with the best suffix of one token.

    Raises:
        ValueError: The budget is below its minimum, counts disagree, or no suffix survives as text.
    """
    given = {"beam": beam, "samples": samples, "length": length}
    low = check_budget("beast", given, MINIMUM, smoke=smoke)
    other = {"check_every": check_every, "max_new_tokens": max_new_tokens, "chunk": chunk}
    check_budget("beast", other, {}, smoke=False)
    search = Search(tokenizer, judge, max_new_tokens, check_every, ascii_only, chunk)
    found = _attack(model, search, (prompt, target, after), given, seed, held_out, progress)
    wrong: Attack | None = None
    if control is not None and found.success:
        texts = (prompt, control, after)
        other_run = _attack(model, search, texts, given, seed, (), progress)
        wrong = other_run.finish({**given, "steps": length - 1}, smoke=low, control=None)
    return found.finish({**given, "steps": length - 1}, smoke=low, control=wrong)


def _attack(
    model: nn.Module,
    search: Search,
    texts: Texts,
    given: dict[str, int],
    seed: int,
    held_out: Sequence[tuple[str, str]],
    progress: bool | None,
) -> Run:
    with frozen(model):
        run = Run(model, search, "beast", texts, seed)
        empty = torch.empty(1, 0, dtype=torch.long, device=run.objective.device)
        # the first tokens are the beam itself, so as many are drawn as it is wide
        beam, losses = _grow(run, empty, given["beam"] * given["samples"], given["beam"])
        run.note(beam[0], losses[0])
        hidden = None if progress is None else not progress
        for _ in tqdm(range(given["length"] - 1), desc="beast", leave=False, disable=hidden):
            if run.reached_now():
                break
            beam, losses = _grow(run, beam, given["samples"], given["beam"])
            run.note(beam[0], losses[0])
        run.close(held_out)
    return run


def _grow(run: Run, beam: Tensor, samples: int, keep: int) -> tuple[Tensor, Tensor]:
    """Return the best suffixes with one token more, ``(keep, l + 1)``, and their losses, best first."""
    probabilities = run.objective.next_probabilities(beam)
    allowed = run.allowed[: probabilities.shape[1]]
    for _ in range(TRIES):
        new = proposals(probabilities, allowed, samples=samples, generator=run.generator)
        longer = torch.cat([beam.repeat_interleave(new.shape[1], 0), new.reshape(-1, 1)], 1)
        longer = longer[run.usable(longer)]
        if len(longer):
            losses = run.objective.losses(longer)
            best = losses.topk(min(keep, len(losses)), largest=False, sorted=True)
            return longer[best.indices], best.values
    raise ValueError(
        f"none of {TRIES} x {samples} continuations of a suffix survives as text; the prompt or what follows the "
        "suffix may itself be read back as other tokens: shorten or rephrase it"
    )
