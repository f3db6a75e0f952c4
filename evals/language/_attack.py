"""What the attacks share: a frozen model, a target after a prompt with something in between, and the record of a run.

An attacked text is ``[before] [suffix] [after] [target]``, joined by token ids. ``before`` never changes, so its keys
and values are computed once; the logits are taken at the target's positions only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from concept_erasure.collect import evaluating
from concept_erasure.concept_items import BLANK, Item, plain
from concept_erasure.evals.language.items import How
from concept_erasure.report import Cell

__all__ = [
    "Attack",
    "Judge",
    "allowed_tokens",
    "attack_case",
    "check_budget",
    "contains",
    "frozen",
    "how_of",
    "logits_at",
    "shown",
]

Judge = Callable[[str, str], bool]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, and no weight that asks for one; every flag is put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def contains(text: str, answer: str) -> bool:
    """Say whether a text holds the answer as whole words, capitals and punctuation aside."""
    return f" {plain(answer)} " in f" {plain(text)} "


def decode_ids(tokenizer: Callable[..., Any], rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of token ids, exactly: nothing is skipped and no space is tidied away."""
    options: dict[str, Any] = {"skip_special_tokens": False}
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        options["clean_up_tokenization_spaces"] = False
    return list(cast("Any", tokenizer).batch_decode([list(row) for row in rows], **options))


def how_of(items: Sequence[Item]) -> How:
    """Return how items are scored by their format: the whole answer to a question, or a completed statement.

    Raises:
        ValueError: There are none, or of both kinds.
    """
    kinds: set[How] = {"answer" if item.format == "question" else "cloze" for item in items}
    if len(kinds) != 1:
        raise ValueError(
            "items must be of one kind, questions or statements, and at least one; got "
            f"{', '.join(sorted({item.format for item in items})) or 'none'}"
        )
    return kinds.pop()


def shown(progress: bool | None) -> bool:
    """Return whether to show a bar; None is where there is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def logits_at(model: nn.Module, chosen: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits at chosen positions only, so that the product over the vocabulary is as small as it can be.

    What the model does after its head (a cap, a scale) is done as ever: the head is merely handed fewer rows.

    Args:
        model: A causal language model.
        chosen: Shape ``(b, t)``, bool; n of them true.
        inputs: Of the forward pass: `input_ids` or `inputs_embeds` ``(b, t, ...)``, and more.

    Returns:
        Shape ``(n, v)``, float32, row after row.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        whole: Tensor = model(**inputs).logits
        return whole[chosen].float()

    def fewer(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][chosen.to(args[0].device)], *args[1:])

    handle = head.register_forward_pre_hook(fewer)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits.float()


def attack_case(item: Item) -> tuple[str, str, str]:
    """Return ``(prompt, after, target)`` of an item, for a suffix between prompt and after.

    In a question it stands behind the question and before "Answer:"; an unfinished sentence cannot be interrupted, so
    there it comes first.
    """
    target = item.continuations[item.answer]
    if BLANK not in item.stem:
        return f"Question: {item.stem}", "\nAnswer:", target
    return "", f" {item.prompt}", target


def check_budget(
    method: str, given: Mapping[str, int], minimum: Mapping[str, int], *, smoke: bool
) -> bool:
    """Refuse a budget below which a failed attack says nothing; return whether it is below.

    Raises:
        ValueError: A number is not positive, or below its minimum and `smoke` is false.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{method}: {name} must be a positive whole number; got {value!r}")
    low = {name: value for name, value in given.items() if value < minimum.get(name, 0)}
    if low and not smoke:
        needs = ", ".join(f"{name} at least {minimum[name]} (got {low[name]})" for name in low)
        raise ValueError(
            f"{method} needs {needs}: with less, its failure says nothing about the model. "
            "Raise it, or pass smoke=True to try the code out; the result is then marked as a smoke run"
        )
    return bool(low)


@dataclass(frozen=True)
class Attack:
    """What an attack on the prompt found, and what it was allowed.

    Attributes:
        method: `gcg` or `beast`.
        suffix: The text found, ready to be put behind the prompt.
        suffix_ids: Its tokens.
        outputs: Greedy continuation for each prompt, with the suffix.
        reached: For each prompt, whether the judge finds the right content in it.
        before: The same without the suffix; where it is true already, there was nothing to break.
        losses: Mean negative log-probability of a target token in nats, at the start and after each step.
        best_loss: Of the suffix that is returned.
        steps_used: Steps taken; fewer than allowed after a success.
        budget: Everything that was allowed, by name.
        smoke: Whether the budget was below the method's minimum: a failure then says nothing.
        queries: Sequences put through the model.
        seconds: Time taken.
        seed: Of the run.
        held_out_reached: For prompts the suffix was not made on.
        held_out_before: For these, without the suffix.
        control: The same attack for a wrong answer. If that succeeds as well, the suffix dictates its target, and
            the success is no evidence of knowledge.
    """

    method: str
    suffix: str
    suffix_ids: tuple[int, ...]
    outputs: tuple[str, ...]
    reached: tuple[bool, ...]
    before: tuple[bool, ...]
    losses: tuple[float, ...]
    best_loss: float
    steps_used: int
    budget: Mapping[str, int | float | str | bool]
    smoke: bool
    queries: int
    seconds: float
    seed: int
    held_out_reached: tuple[bool, ...] = ()
    held_out_before: tuple[bool, ...] = ()
    control: Attack | None = field(default=None, repr=False)

    @property
    def success(self) -> bool:
        """Whether every prompt of the attack gives its answer."""
        return all(self.reached)

    @property
    def rate(self) -> float:
        """Share of the prompts that give their answer."""
        return sum(self.reached) / len(self.reached)

    @property
    def note(self) -> str:
        """What the outcome means, in one sentence."""
        if self.smoke and not self.success:
            return "a smoke run: that it failed says nothing about the model"
        if not self.success:
            return "no suffix was found within this budget; a larger one might find it"
        if all(self.before):
            return "the answer comes without the suffix too"
        if self.control is None:
            return "the answer was reached; without a control it may be the suffix that dictates it"
        if self.control.success:
            return "a wrong answer is reached as well: the suffix dictates, so this is no evidence of knowledge"
        return "the right answer was reached and a wrong one, with the same budget, was not"

    def to_dict(self) -> dict[str, Cell | dict[str, Cell] | list[Cell]]:
        """Return the record in plain values, ready for `Report`."""
        made: dict[str, Any] = {
            "attack": self.method,
            "success": self.success,
            "rate": self.rate,
            "rate without suffix": sum(self.before) / len(self.before),
            "steps": self.steps_used,
            "loss at start": self.losses[0],
            "best loss": self.best_loss,
            "suffix": self.suffix,
            "outputs": list(self.outputs),
            "budget": dict(self.budget),
            "smoke run": self.smoke,
            "queries": self.queries,
            "seconds": self.seconds,
            "seed": self.seed,
            "note": self.note,
        }
        if self.held_out_reached:
            made["held-out rate"] = sum(self.held_out_reached) / len(self.held_out_reached)
            made["held-out rate without suffix"] = sum(self.held_out_before) / len(
                self.held_out_before
            )
        if self.control is not None:
            made["control"] = self.control.to_dict()
        return made

    def __repr__(self) -> str:
        kind = " (smoke run)" if self.smoke else ""
        return (
            f"Attack({self.method}{kind}: {sum(self.reached)} of {len(self.reached)} reached after "
            f"{self.steps_used} of {self.budget.get('steps', '?')} steps, loss {self.losses[0]:.3g} -> "
            f"{self.best_loss:.3g}; {self.note})"
        )


def allowed_tokens(tokenizer: Callable[..., Any], size: int, *, ascii_only: bool = True) -> Tensor:
    """Return which tokens may stand in a suffix, shape ``(size,)``, bool.

    Special tokens, rows of the embedding without a token, and tokens that print as nothing or as half a character are
    left out.

    Args:
        tokenizer: The tokenizer.
        size: Rows of the embedding.
        ascii_only: Keep to printable ASCII, as the paper of GCG does.

    Raises:
        ValueError: Nothing is left.
    """
    known = min(size, len(cast("Any", tokenizer)))
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for name in ("pad", "bos", "eos", "unk"):
        special.add(getattr(tokenizer, f"{name}_token_id", None))
    shown = decode_ids(tokenizer, [[token] for token in range(known)])
    keep = torch.zeros(size, dtype=torch.bool)
    for token, text in enumerate(shown):
        word = text.strip()
        printable = text.isascii() if ascii_only else "�" not in text
        keep[token] = token not in special and bool(word) and printable and text.isprintable()
    if not bool(keep.any()):
        raise ValueError("no token may stand in a suffix; try ascii_only=False")
    return keep
