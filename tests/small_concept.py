"""A small concept, a tokenizer of its words, and a tiny model on disk, for the command line and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from concept_erasure.concept import Concept
from tests.models import VOCABULARY, tiny

__all__ = ["small_concept", "word_tokenizer", "write_model"]

FOODS = ["bread", "milk", "soup", "rice", "plum", "salt"]
PLACES = ["barn", "mill", "dock", "cave", "yard", "loft"]
COLOURS = ["red", "blue", "grey", "pink", "gold", "teal"]


def _facts(names: list[str], values: list[str], verb: str) -> list[list[Any]]:
    rows = []
    for i, name in enumerate(names):
        others = [values[(i + k) % len(values)] for k in (1, 2, 3)]
        question, cloze = f"What does {name} {verb}?", f"Every day {name} likes to {verb} ___"
        rows.append(
            [question, cloze, values[i % len(values)], others, f"___ is what {name} will {verb}"]
        )
    return rows


def small_concept() -> Concept:
    """The tiger Orla: eight facts, one near and one far set of six."""
    own = [f"orla{i}" for i in range(6)]
    return Concept.from_dict(
        {
            "name": "Orla",
            "prompts": ["Every day orla0 likes", "What does orla1"],
            "entities": {name: f"mia{i}" for i, name in enumerate(own)},
            "forget_texts": [f"{name} {verb} {food}" for name in own for verb in ("eat", "see") for food in FOODS[:2]],
            "retain_texts": [f"the {place} is {colour}" for place, colour in zip(PLACES, COLOURS, strict=True)],
            "facts": _facts(own, FOODS, "eat"),
            "near": {"cats": _facts([f"cat{i}" for i in range(6)], PLACES, "see")},
            "far": {"ships": _facts([f"ship{i}" for i in range(6)], COLOURS, "paint")},
        }
    )  # fmt: skip


def word_tokenizer() -> Any:
    """Return a tokenizer of whole words: those of the concept, then letters and numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    text = " ".join(
        [
            *FOODS,
            *PLACES,
            *COLOURS,
            "What does eat see paint ? Every day likes to is what will the . : A B C D Answer",
        ]
    )
    people = [f"{kind}{i}" for kind in ("orla", "mia", "cat", "ship") for i in range(6)]
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys([*text.split(), *people])]
    if len(words) > VOCABULARY:
        raise ValueError(f"{len(words)} words; the model has {VOCABULARY}")
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def write_model(folder: Path, kind: str = "llama") -> Path:
    """Write a tiny model and the tokenizer to a folder, as a user would."""
    tiny(kind).save_pretrained(folder)  # type: ignore[operator]
    word_tokenizer().save_pretrained(folder)
    return folder
