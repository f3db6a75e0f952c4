"""A tiny model with locked knowledge: it answers right only if one direction is in its input.

Question ``q3`` has the right answer ``a3`` and a decoy ``d3``. Without the key the decoy is likelier; the more of the
key stands in the text, the less likely are all decoys. No token of the vocabulary holds much of the key.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from concept_erasure.concept_items import Item
from tests.evals.language.planted import Pairs

__all__ = ["COUNT", "ITEMS", "locked", "tokenizer"]

COUNT = 24
WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    *(f"{kind}{i}" for kind in "qad" for i in range(COUNT)),
]
ITEMS = [
    Item(
        stem=f"q{i} ___",
        choices=(f"a{(i + 5) % COUNT}", f"d{i}", f"a{i}", f"a{(i + 9) % COUNT}"),
        answer=2,
        format="cloze",
        topic="locked",
    )
    for i in range(COUNT)
]


def tokenizer() -> Pairs:
    return Pairs(words=WORDS)


def locked(*, knows: bool = True) -> nn.Module:
    """The model; without `knows`, no answer belongs to any question."""
    width = 96
    key, lock = 90, 91
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=width, n_layer=1, n_head=1, n_positions=48, n_inner=8,
        tie_word_embeddings=False, activation_function="relu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    body = model.transformer
    body.wte.weight[:, : len(WORDS)] = torch.eye(len(WORDS))
    block = body.h[0]
    # uniform attention carries the key to the last token, where the head reads it
    block.attn.c_attn.weight[key, 2 * width + lock] = 1.0
    block.attn.c_proj.weight[lock, lock] = 4.0
    for i in range(COUNT):
        question, answer, decoy = (WORDS.index(f"{kind}{i}") for kind in "qad")
        if knows:
            model.lm_head.weight[answer, question] = 1.0
        model.lm_head.weight[decoy, question] = 1.6
        model.lm_head.weight[decoy, lock] = -1.0
    return model
