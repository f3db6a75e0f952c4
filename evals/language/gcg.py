"""GCG: a suffix of tokens, found along the gradient, after which a model gives the answer it should not know.

Every step takes the gradient of the target's log-probability with respect to the one-hot rows of the suffix, draws
replacements of single tokens among the most promising of each position, and moves to the best one that was drawn.

Paper: Zou et al. 2023, arXiv:2307.15043, algorithm 1 (several prompts at once: algorithm 2, without its schedule).
Deviations: the suffix starts from random tokens and not from exclamation marks; only suffixes that are read back from
their text as the same tokens are moved to, and none that spells out the answer; success is the right *content*,
judged by the answer key, and not an affirmative opening.

With the answer itself as target an attack can dictate it to a model that does not know it: pass ``control`` (a wrong
answer, same budget), or several prompts and ``held_out`` ones.
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

__all__ = ["MINIMUM", "gcg", "replacements"]

MINIMUM = {"length": 20, "topk": 256, "batch": 512, "steps": 500}
PAPER_STEPS = 5000  # what the erasure papers allow
TRIES = 20


def replacements(
    suffix: Tensor,
    gradient: Tensor,
    allowed: Tensor,
    *,
    topk: int,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """Return suffixes with one token replaced, each once (algorithm 1, lines 3 to 7).

    Args:
        suffix: Shape ``(l,)``, token ids.
        gradient: Of the loss with respect to the one-hot rows, shape ``(l, v)``.
        allowed: Tokens that may be used, shape ``(v,)``, bool.
        topk: Candidates of each position: those with the steepest descent.
        batch: Draws; a replacement that is drawn twice, or changes nothing, counts once or not at all.
        generator: On the CPU.

    Returns:
        Shape ``(n, l)``, n at most ``batch``.
    """
    length = len(suffix)
    best = (-gradient).masked_fill(~allowed, float("-inf"))
    top = best.topk(min(topk, int(allowed.sum())), dim=1).indices
    where = torch.randint(length, (batch,), generator=generator).to(suffix.device)
    which = torch.randint(top.shape[1], (batch,), generator=generator).to(suffix.device)
    drawn = suffix.repeat(batch, 1)
    drawn[torch.arange(batch, device=suffix.device), where] = top[where, which]
    drawn = drawn.unique(dim=0)
    kept: Tensor = drawn[(drawn != suffix).any(1)]
    return kept


def gcg(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: Callable[..., Any],
    prompt: str | Sequence[str],
    target: str | Sequence[str],
    *,
    after: str | Sequence[str] = "",
    control: str | Sequence[str] | None = None,
    held_out: Sequence[tuple[str, str]] = (),
    judge: Judge = contains,
    length: int = 20,
    topk: int = 256,
    batch: int = 512,
    steps: int = 500,
    max_new_tokens: int = 24,
    check_every: int = 10,
    chunk: int = 64,
    ascii_only: bool = True,
    seed: int = 0,
    smoke: bool = False,
    progress: bool | None = None,
) -> Attack:
    """Attack a live model; it is left bit-identical.

    Cost: a step is one forward and backward pass a prompt, and up to ``batch`` forward passes a prompt, over the
    tokens behind the prompt (its keys and values are kept).

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
        length: Tokens of the suffix.
        topk: Candidates of a position.
        batch: Candidates a step.
        steps: Steps at most; the papers allow 5,000.
        max_new_tokens: Length of the continuation that is judged.
        check_every: Steps between two looks at the continuation; the attack ends when all are reached.
        chunk: Sequences a forward pass; raising it costs memory.
        ascii_only: Use tokens of printable ASCII only.
        seed: Of the start and the draws.
        smoke: Allow a budget below `MINIMUM`, to try the code out; the result says so.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The record, see `Attack`.

    Raises:
        ValueError: The budget is below its minimum, counts disagree, or no suffix survives as text.
    """
    given = {"length": length, "topk": topk, "batch": batch, "steps": steps}
    low = check_budget("gcg", given, MINIMUM, smoke=smoke)
    other = {"check_every": check_every, "max_new_tokens": max_new_tokens, "chunk": chunk}
    check_budget("gcg", other, {}, smoke=False)
    search = Search(tokenizer, judge, max_new_tokens, check_every, ascii_only, chunk)
    found = _attack(model, search, (prompt, target, after), given, seed, held_out, progress)
    wrong: Attack | None = None
    if control is not None and found.success:
        texts = (prompt, control, after)
        other_run = _attack(model, search, texts, given, seed, (), progress)
        wrong = other_run.finish(given, smoke=low, control=None)
    return found.finish({**given, "steps in the papers": PAPER_STEPS}, smoke=low, control=wrong)


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
        run = Run(model, search, "gcg", texts, seed)
        suffix = run.start(given["length"])
        run.note(suffix, run.objective.losses(suffix[None])[0])
        hidden = None if progress is None else not progress
        for _ in tqdm(range(given["steps"]), desc="gcg", leave=False, disable=hidden):
            suffix, loss = _step(run, suffix, given)
            run.note(suffix, loss)
            if run.reached_now():
                break
        run.close(held_out)
    return run


def _step(run: Run, suffix: Tensor, given: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return the best replacement that was drawn, and its loss (algorithm 1, lines 2 to 8)."""
    gradient = run.objective.gradient(suffix)
    options = {name: given[name] for name in ("topk", "batch")}
    for _ in range(TRIES):
        drawn = replacements(suffix, gradient, run.allowed, generator=run.generator, **options)
        drawn = drawn[run.usable(drawn)]
        if len(drawn):
            losses = run.objective.losses(drawn)
            best = losses.argmin()
            return drawn[best], losses[best]
    raise ValueError(
        f"none of {TRIES} x {given['batch']} replacements survives as text; the prompt or what follows the suffix "
        "may itself be read back as other tokens: shorten or rephrase it"
    )
