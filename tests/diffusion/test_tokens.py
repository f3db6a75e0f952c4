"""Token rules: by the mask alone, on CLIP, OpenCLIP and T5 tokenizers, with CLIP's real vocabulary if at hand."""

from __future__ import annotations

import gzip
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest
import torch
from torch import Tensor

from concept_erasure.diffusion.tokens import TokenRule, align, lengths, select
from concept_erasure.errors import ShapeError
from tests.diffusion.tiny import clip_tokenizer, t5_tokenizer

transformers = pytest.importorskip("transformers")


def _real_clip(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer from the vocabulary in open-clip-torch, which is not imported."""
    try:
        found = distribution("open-clip-torch").locate_file(
            "open_clip/bpe_simple_vocab_16e6.txt.gz"
        )
    except PackageNotFoundError:
        pytest.skip("open-clip-torch is not installed: pip install --no-deps open-clip-torch")
    with gzip.open(str(found), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in letters]
    alphabet = [chr(b) for b in letters] + [chr(256 + i) for i in range(len(rest))]
    pieces = [*alphabet, *(f"{a}</w>" for a in alphabet), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        pad_token=pad,
        model_max_length=77,
    )


def _ids(tokenizer: Any, *texts: str, width: int = 16) -> tuple[Tensor, Tensor]:
    out = tokenizer(list(texts), padding="max_length", max_length=width, return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


TOKENIZERS = {
    "clip": (clip_tokenizer, True),
    "open_clip": (lambda: clip_tokenizer(pad="!"), True),
    "t5": (t5_tokenizer, False),
    "real_clip": (_real_clip, True),
    "real_open_clip": (lambda: _real_clip("!"), True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rules(kind: str) -> None:
    make, start = TOKENIZERS[kind]
    tokenizer, texts = make(), ("a painting of a labrador", "dog", "")
    ids, mask = _ids(tokenizer, *texts)
    own = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    first = int(start)
    for i, k in enumerate(own):
        got = {
            rule: select(mask, rule, start=start)[i].tolist()
            for rule in TokenRule
            if rule is not TokenRule.CONTEXT
        }
        end = first + k
        assert ids[i, end] == tokenizer.eos_token_id
        assert got["first_eot"] == [end]
        assert got["eot_and_pads"] == list(range(end, 16))
        assert got["all"] == list(range(16))
        assert got["all_but_sot"] == list(range(first, 16))
        last = max(end - 1, 0)
        assert got["last_subject"] == [last]
        assert got["from_last_subject"] == list(range(last, 16))
        if k:
            word = tokenizer.convert_ids_to_tokens(int(ids[i, last]))
            whole = tokenizer.tokenize(texts[i])
            assert word == whole[-1]
    if "open" in kind:
        assert int(ids[1, -1]) == 0  # the pad is not the end token


def test_real_vocabulary_is_clips() -> None:
    tokenizer = _real_clip()
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer(" ")["input_ids"] == [49406, 49407]
    pieces = tokenizer.tokenize("rembrandt vermicelloni")
    assert len(pieces) > 2  # several pieces a word
    ids, mask = _ids(tokenizer, "vermicelloni")
    (index,) = select(mask, "first_eot", start=True)
    assert ids[0, index] == 49407
    assert int(index) == 1 + len(tokenizer.tokenize("vermicelloni"))


@pytest.mark.parametrize("kind", ["clip", "t5", "real_clip"])
@pytest.mark.parametrize(
    ("concept", "anchor", "template"),
    [
        ("picasso", "art", "{} painting of a dog"),
        ("picasso", "art", "a picture by {} on a car"),
        ("picasso", "art", "a picture by {}"),
        ("dog", "snoopy", "a {} and a cat"),
        ("red dog", "dog", "red {} dog"),
    ],
)
def test_align_leaves_the_phrase_out(kind: str, concept: str, anchor: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind][0]()
    ids, mask = _ids(tokenizer, template.format(concept), template.format(anchor), width=24)
    a, b = (int(n) for n in lengths(mask))
    one, two = align(ids[0], ids[1], source_length=a, anchor_length=b)
    assert torch.equal(ids[0, one], ids[1, two])
    assert len(one.unique()) == len(one)
    words = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (concept, anchor)]
    # the common piece of both phrases ("o", "dog") may count as context, the rest of them may not
    assert len(one) >= 24 - max(words)
    assert bool((one.diff() > 0).all())
    ends = [int(x) for x in (one[one < a][-1], two[two < b][-1])]
    assert ends == [a - 1, b - 1]


def test_align_on_paper() -> None:
    # s x y e p p / s z e p p p
    one, two = align(
        torch.tensor([1, 7, 8, 2, 0, 0]),
        torch.tensor([1, 9, 2, 0, 0, 0]),
        source_length=4,
        anchor_length=3,
    )
    assert one.tolist() == [0, 3, 4, 5]
    assert two.tolist() == [0, 2, 3, 4]
    # repeated words: beginning and end do not overlap
    one, two = align(
        torch.tensor([1, 5, 5, 2]), torch.tensor([1, 5, 2, 2]), source_length=4, anchor_length=3
    )
    assert one.tolist() == [0, 1, 3]
    assert two.tolist() == [0, 1, 2]


def test_bad_input() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="must be one of last_subject, from_last"):
        select(mask, "last", start=True)
    with pytest.raises(ValueError, match="two prompts"):
        select(mask, "context", start=True)
    with pytest.raises(ValueError, match="gaps"):
        select(mask.flip(1), "all", start=True)
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        select(torch.zeros(1, 3), "all", start=True)
    with pytest.raises(ShapeError):
        select(mask[0], "all", start=True)
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="the same"):
        align(ids, ids, source_length=3, anchor_length=3)
    with pytest.raises(ShapeError, match="one length"):
        align(ids, ids[:2], source_length=2, anchor_length=2)
    with pytest.raises(ShapeError, match=r"1\.\.3"):
        align(ids, ids, source_length=4, anchor_length=2)
