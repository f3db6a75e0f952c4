"""Tiny random models of every supported kind, and a tokenizer that needs no files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BatchEncoding

__all__ = ["KINDS", "TinyTokenizer", "tiny"]

WIDTH = 32
VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "attn_implementation": "eager",
}

_SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 16}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "use_parallel_residual": True}),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {k: v for k, v in _COMMON.items() if k not in {"bos_token_id", "eos_token_id"}},
    ),
}
KINDS: tuple[str, ...] = tuple(_SPECS)


def tiny(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a random model: 3 layers, width 32, 128 tokens, eval mode, no trivial parameters.

    Norm gains and biases are perturbed, so that a test cannot pass by a one or a zero.

    Args:
        kind: one of `KINDS`.
        seed: of the weights; the global generator is left as it was.
        dtype: of the parameters.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in _SPECS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    config_name, model_name, options = _SPECS[kind]
    options = dict(options)
    attention = options.pop("attn_implementation", None)
    config = getattr(transformers, config_name)(**options)
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


class TinyTokenizer:
    """Words to hashed ids in [4, 128); called like a Hugging Face tokenizer."""

    pad_token: str | None = "<pad>"
    bos_token = "<bos>"
    eos_token = "<eos>"
    unk_token = "<unk>"
    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    unk_token_id = 3
    vocab_size = VOCABULARY
    model_max_length = 64
    name_or_path = "tiny"

    def __init__(self, padding_side: str = "right", *, add_bos: bool = False) -> None:
        self.padding_side = padding_side
        self.add_bos = add_bos
        self._words: dict[int, str] = {}

    def __len__(self) -> int:
        return self.vocab_size

    def tokenize(self, text: str) -> list[str]:
        """Split at white space."""
        return text.split()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Return the id of a word, or the ids of several."""
        if isinstance(tokens, str):
            special = {self.bos_token: 1, self.eos_token: 2, self.unk_token: 3, "<pad>": 0}
            if tokens in special:
                return special[tokens]
            digest = hashlib.sha256(tokens.encode()).digest()
            number = 4 + int.from_bytes(digest[:4], "big") % (VOCABULARY - 4)
            self._words.setdefault(number, tokens)
            return number
        return [int(self.convert_tokens_to_ids(token)) for token in tokens]  # type: ignore[arg-type]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of one text."""
        ids = [int(self.convert_tokens_to_ids(t)) for t in self.tokenize(text)]  # type: ignore[arg-type]
        return [self.bos_token_id, *ids] if self.add_bos and add_special_tokens else ids

    def decode(
        self, ids: Tensor | Sequence[int] | int, *, skip_special_tokens: bool = False
    ) -> str:
        """Return the words of ids seen before; `w<id>` for others."""
        numbers = torch.as_tensor(ids).reshape(-1).tolist()
        special = {0: "<pad>", 1: self.bos_token, 2: self.eos_token, 3: self.unk_token}
        names = {**{n: self._words.get(n, f"w{n}") for n in numbers}, **special}
        return " ".join(names[n] for n in numbers if not (skip_special_tokens and n in special))

    def batch_decode(
        self, ids: Tensor | Sequence[Sequence[int]], *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Decode every row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, padded on `padding_side`."""
        if return_offsets_mapping:
            raise NotImplementedError("TinyTokenizer has no offsets")
        single = isinstance(text, str)
        texts: list[str] = [str(text)] if single else list(text)
        rows = [self.encode(t, add_special_tokens=add_special_tokens) for t in texts]
        if truncation:
            rows = [row[: max_length or self.model_max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max((len(row) for row in rows), default=0)
            longest = max_length or longest if padding == "max_length" else longest
            for name, table in (("ids", rows), ("mask", masks)):
                fill = self.pad_token_id if name == "ids" else 0
                for k, row in enumerate(table):
                    extra = [fill] * (longest - len(row))
                    table[k] = extra + row if self.padding_side == "left" else row + extra
        if return_tensors == "pt":
            tensors = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
            return BatchEncoding(tensors)
        if single:
            return BatchEncoding({"input_ids": rows[0], "attention_mask": masks[0]})
        return BatchEncoding({"input_ids": rows, "attention_mask": masks})
