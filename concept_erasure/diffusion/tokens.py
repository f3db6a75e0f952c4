"""Which positions of an encoded prompt an edit looks at; decided by the attention mask, never by pad ids.

CLIP encodes ``[SOT] t_1 .. t_k [EoT] pad ..`` and every position is read by the denoiser. The first position is the
same for every prompt; the end and the pads after it see the whole prompt. T5 has no start: ``t_1 .. t_k </s> pad ..``.
With L real tokens (the ones in the mask) the last token of the text is at L - 2 and the end at L - 1 in both.

Pads carry other ids in other tokenizers (the end token in CLIP-L, ``!`` in SDXL's second one), so ids say nothing.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError

__all__ = ["BLANK_ANCHORS", "TokenRule", "align", "lengths", "select"]

BLANK_ANCHORS = ("sot", "first_eot", "aligned")


class TokenRule(StrEnum):
    """Positions of a prompt.

    Attributes:
        LAST_SUBJECT: The last token of the text; the first position if there is none.
        FROM_LAST_SUBJECT: From there to the end of the window.
        ALL_BUT_SOT: All but the start token, which is the same in every prompt.
        ALL: Every position, pads included.
        CONTEXT: All but the phrase in which two prompts differ; needs both, see `align`.
        FIRST_EOT: The end token.
        EOT_AND_PADS: The end token and the pads after it.
    """

    LAST_SUBJECT = "last_subject"
    FROM_LAST_SUBJECT = "from_last_subject"
    ALL_BUT_SOT = "all_but_sot"
    ALL = "all"
    CONTEXT = "context"
    FIRST_EOT = "first_eot"
    EOT_AND_PADS = "eot_and_pads"

    @classmethod
    def of(cls, rule: TokenRule | str) -> TokenRule:
        """Return the rule of a name.

        Raises:
            ValueError: If there is none.
        """
        try:
            return cls(rule)
        except ValueError:
            known = ", ".join(cls)
            raise ValueError(f"the token rule must be one of {known}; got {rule!r}") from None

    @property
    def needs_pads(self) -> bool:
        """Whether pads are among the positions, so that a shorter window gives another result."""
        return self not in (TokenRule.LAST_SUBJECT, TokenRule.FIRST_EOT)


def lengths(mask: Tensor) -> Tensor:
    """Return the number L of real tokens of each prompt, shape ``(n,)``.

    Args:
        mask: Shape ``(n, T)``, nonzero at real tokens, which come first.

    Raises:
        ShapeError: If it is not two-dimensional.
        ValueError: If a prompt has no token at all, or the padding is on the left.
    """
    if mask.ndim != 2:
        raise ShapeError(f"mask must be (prompts, positions); got shape {tuple(mask.shape)}")
    real = mask != 0
    count = real.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if not bool((real == (places < count[:, None])).all()):
        raise ValueError(
            "the real tokens must come first (padding_side='right'); this mask has gaps"
        )
    if bool((count == 0).any()):
        raise ValueError(f"prompt {int(count.argmin())} has no token, not even an end token")
    return count


def select(mask: Tensor, rule: TokenRule | str, *, start: bool) -> list[Tensor]:
    """Return the positions of each prompt that a rule stands for.

    Args:
        mask: Shape ``(n, T)``, nonzero at real tokens, which come first.
        rule: Any but ``context``.
        start: Whether the tokenizer puts a start token first (CLIP does, T5 does not).

    Returns:
        n index tensors, each increasing, on the CPU.

    Raises:
        ValueError: If the rule is unknown or needs two prompts, or the mask is not right-padded.
        ShapeError: If the mask is not two-dimensional.
    """
    rule = TokenRule.of(rule)
    if rule is TokenRule.CONTEXT:
        raise ValueError("'context' is about two prompts: use align(source, anchor), or pairs()")
    width = mask.shape[-1]
    return [_positions(int(n), width, rule, first=int(start)) for n in lengths(mask)]


def _positions(length: int, width: int, rule: TokenRule, *, first: int) -> Tensor:
    end = length - 1
    last = max(length - 2, 0)
    begin, stop = {
        TokenRule.LAST_SUBJECT: (last, last + 1),
        TokenRule.FROM_LAST_SUBJECT: (last, width),
        TokenRule.ALL_BUT_SOT: (first, width),
        TokenRule.ALL: (0, width),
        TokenRule.FIRST_EOT: (end, end + 1),
        TokenRule.EOT_AND_PADS: (end, width),
    }[rule]
    return torch.arange(begin, stop)


def align(
    source: Tensor, anchor: Tensor, *, source_length: int, anchor_length: int
) -> tuple[Tensor, Tensor]:
    """Return the positions that two prompts share: all but the phrase that one has in place of the other's.

    The longest common beginning, then the longest common end of the rest (the end token included), then the pads
    from the first one on, as many as both have.

    Args:
        source: Token ids of the prompt with the concept, shape ``(T,)``.
        anchor: Token ids of the same prompt with the anchor, shape ``(T,)``.
        source_length: Number of real tokens of the source.
        anchor_length: Number of real tokens of the anchor.

    Returns:
        Two index tensors of one length: position i of the first stands for position i of the second.

    Raises:
        ShapeError: If the ids are not vectors of one length, or too short.
        ValueError: If the prompts are the same.
    """
    if source.ndim != 1 or source.shape != anchor.shape:
        raise ShapeError(
            f"ids must be two vectors of one length; got {tuple(source.shape)} and {tuple(anchor.shape)}"
        )
    if (
        not 0
        < min(source_length, anchor_length)
        <= max(source_length, anchor_length)
        <= len(source)
    ):
        raise ShapeError(
            f"lengths {source_length} and {anchor_length} must lie in 1..{len(source)}"
        )
    a, b = source[:source_length].tolist(), anchor[:anchor_length].tolist()
    if a == b:
        raise ValueError("the two prompts are the same: there is no phrase to leave out")
    room = min(len(a), len(b))
    head = next((i for i in range(room) if a[i] != b[i]), room)
    room -= head
    tail = next((i for i in range(room) if a[-1 - i] != b[-1 - i]), room)
    pads = len(source) - max(len(a), len(b))
    return _context(len(a), head, tail, pads), _context(len(b), head, tail, pads)


def _context(length: int, head: int, tail: int, pads: int) -> Tensor:
    return torch.cat([torch.arange(head), torch.arange(length - tail, length + pads)])
