"""The tokenizer of the emoji world: CLIP's kind of byte-pair encoding, learned from captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from concept_erasure.evals.worlds.emoji.grammar import draw
from concept_erasure.evals.worlds.emoji.sprites import EmojiObject

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["WINDOW", "make_tokenizer"]

WINDOW = 16  # tokens of a prompt, start and end included
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(
    objects: Sequence[EmojiObject], folder: str | Path, *, size: int = 900, seed: int = 0
) -> CLIPTokenizer:
    """Learn merges from captions and write the tokenizer.

    Args:
        objects: What captions speak of.
        folder: Where its files go.
        size: Largest vocabulary before the bytes at word ends and the two special tokens.
        seed: Of the captions.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [d.caption for d in draw(objects, 20 * len(objects), seed=seed)]
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    # Every byte may end a word, and the special tokens come last, as in CLIP.
    for token in (*(letter + "</w>" for letter in alphabet), _START, _END):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    made: CLIPTokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=WINDOW
    )
    made.save_pretrained(folder)
    return made
