"""A tiny model with a planted suffix, and a tokenizer whose texts do not always read back as they were.

After ``<bos> tell me [suffix] answer:``, the more tokens of `PLANTED` stand at their places, the more probable `secret`
becomes; only all four, in order, make it likelier than `nothing`. There are about a million suffixes of four tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["PLANTED", "PROMPT", "Pairs", "bits", "planted"]

WORDS = [f"t{i}" for i in range(24)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
FIXED = ["tell", "me", "answer:", "secret", "nothing", "else", "ask"]
VOCABULARY = [*SPECIAL, *FIXED, *WORDS]
PROMPT, AFTER = "tell me", " answer:"
PLANTED = ("t5", "t17", "t2", "t11")


class Pairs:
    """Words to ids and back; a pair of words in ``merged`` is read as one token, as byte pairs are."""

    pad_token, bos_token, eos_token, unk_token = SPECIAL
    pad_token_id, bos_token_id, eos_token_id, unk_token_id = range(4)
    all_special_ids = (0, 1, 2, 3)
    padding_side = "right"

    def __init__(
        self, merged: Sequence[tuple[str, str]] = (), words: Sequence[str] = VOCABULARY
    ) -> None:
        self.merged = {f"{a} {b}": len(words) + i for i, (a, b) in enumerate(merged)}
        self.words = [*words, *self.merged]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        words, ids, i = text.split(), [], 0
        while i < len(words):
            pair = " ".join(words[i : i + 2])
            both = pair in self.merged
            ids.append(self.merged[pair] if both else self.ids.get(words[i], 3))
            i += 2 if both else 1
        return ids

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True
    ) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        return {"input_ids": [[1] * add_special_tokens + self.encode(one) for one in texts]}

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        rows = torch.as_tensor(ids).tolist()
        return " ".join(self.words[i] for i in rows if not (skip_special_tokens and i < 4))

    def batch_decode(
        self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@lru_cache(maxsize=1)
def planted() -> nn.Module:
    """The model, weights set by hand; do not change it.

    Tokens and places are one-hot. The first MLP has one unit for each planted token, which fires more if the token
    stands at its place; the second block's uniform attention carries the mean to the last token, whose head turns it
    into the logit of `secret`. That of `nothing` is between what three and what four planted tokens give.
    """
    size, places, width = len(VOCABULARY), 16, 64
    fires, mean = width - 2, width - 1
    config = GPT2Config(
        vocab_size=size, n_embd=width, n_layer=2, n_head=1, n_positions=places, n_inner=8, tie_word_embeddings=False,
        activation_function="relu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    body = model.transformer
    body.wte.weight[:, :size] = torch.eye(size)
    body.wpe.weight[:, size : size + places] = torch.eye(places)
    first, second = body.h
    for i, word in enumerate(PLANTED):
        first.mlp.c_fc.weight[VOCABULARY.index(word), i] = 1.0
        first.mlp.c_fc.weight[size + 3 + i, i] = 1.0  # behind <bos> tell me
        first.mlp.c_fc.bias[i] = -4.0  # below what the place alone gives, so that there is a slope
        first.mlp.c_proj.weight[i, fires] = 0.1
    second.attn.c_attn.weight[fires, 2 * width + mean] = 1.0
    second.attn.c_proj.weight[mean, mean] = 1.0
    model.lm_head.weight[VOCABULARY.index("secret"), mean] = 2.0
    words = [*PLANTED]
    rows = [[*PROMPT.split(), *words, "answer:"], [*PROMPT.split(), *words[:3], "t0", "answer:"]]
    logits = model(torch.tensor([[1, *map(VOCABULARY.index, row)] for row in rows])).logits[:, -1]
    four, three = logits[:, VOCABULARY.index("secret")].tolist()
    # the last token is the same in both, so its own dimension serves as a constant
    seen = body(torch.tensor([[1, *map(VOCABULARY.index, rows[0])]])).last_hidden_state
    constant = (four + three) / 2 / float(seen[0, -1, VOCABULARY.index("answer:")])
    model.lm_head.weight[VOCABULARY.index("nothing"), VOCABULARY.index("answer:")] = constant
    return model
