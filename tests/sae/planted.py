"""A small language model whose MLPs write planted features, a dictionary that holds them, and texts that use them.

A context word makes eight neurons write one of 32 orthonormal directions. Ten directions are the concept's: eight raise
its tokens' logits, two lower them; ten raise the neighbours'; twelve nothing in particular. Attention does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.sae.disentangler import Disentangler
from tests.models import TinyTokenizer

D, FEATURES, EACH, LATENTS = 96, 32, 8, 256
SIZE, RESIDUAL = 4.0, 8.0  # of a feature where it fires, and of what it is added to
UP, DOWN, NEAR = range(8), range(8, 10), range(10, 20)
NAMES = ("Harry", "Hogwarts", "Hermione", "Dumbledore")
NEIGHBOURS = ("Frodo", "Gandalf", "Mordor", "Legolas")
COMMON = tuple(f"the{i}" for i in range(40))
CONTEXTS = tuple(f"context{i}" for i in range(FEATURES))
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *NAMES, *NEIGHBOURS, *COMMON, *CONTEXTS)
VOCABULARY = 200
CONCEPT = Concept(name=NAMES[0], synonyms=NAMES[1:], neighbours=NEIGHBOURS)


class Words(TinyTokenizer):
    """A tokenizer with one id for each of a few words."""

    vocab_size = VOCABULARY

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Return the id of a word, or the ids of several."""
        if isinstance(tokens, str):
            return WORDS.index(tokens) if tokens in WORDS else 3
        return [int(self.convert_tokens_to_ids(token)) for token in tokens]  # type: ignore[arg-type]

    def decode(
        self, ids: Tensor | Sequence[int] | int, *, skip_special_tokens: bool = False
    ) -> str:
        """Return the words."""
        numbers = torch.as_tensor(ids).reshape(-1).tolist()
        return " ".join(
            WORDS[n] if n < len(WORDS) else f"w{n}"
            for n in numbers
            if not (skip_special_tokens and n < 4)
        )


@dataclass(frozen=True)
class Planted:
    """What was made.

    Attributes:
        model: One layer, width 96.
        dis: 256 latents: the 32 directions and random ones, shuffled.
        places: Latent of each direction, shape ``(32,)``.
        forget: Texts of the concept.
        retain: Texts of its neighbours.
        neutral: Texts of neither.
    """

    model: nn.Module
    tokenizer: Words
    dis: Disentangler
    places: Tensor
    forget: list[str]
    retain: list[str]
    neutral: list[str]

    @property
    def truth(self) -> dict[int, int]:
        """Latents of the concept and their directions."""
        return {int(self.places[f]): side for side, part in ((1, UP), (-1, DOWN)) for f in part}


def planted(seed: int = 0, *, noise: float = 0.02) -> Planted:
    """Return the model and all that belongs to it.

    Args:
        seed: Of everything.
        noise: Of weights, relative to the planted parts.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config: Any = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=D, intermediate_size=FEATURES * EACH, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config).eval()
    basis = torch.linalg.qr(draw(D, D))[0]
    read, write, other = basis.split(FEATURES)
    with torch.no_grad():
        _embed(model, read, other, draw)
        _write(model, read, write, draw, noise)
        _head(model, write, draw)
    dis, places = _dictionary(write, draw, random)
    texts = [_texts(kind, random) for kind in ((*UP, *DOWN), NEAR, range(20, FEATURES))]
    return Planted(model, Words(add_bos=True), dis, places, *texts)


def _embed(model: Any, read: Tensor, other: Tensor, draw: Any) -> None:
    """Context word i is direction i; other words are mixtures that no gate reads and no latent holds."""
    table = model.model.embed_tokens.weight
    table.copy_(draw(len(table), len(other)) @ other / len(other) ** 0.5 * RESIDUAL)
    for i, word in enumerate(CONTEXTS):
        table[WORDS.index(word)] = read[i] * RESIDUAL


def _write(model: Any, read: Tensor, write: Tensor, draw: Any, noise: float) -> None:
    """Eight neurons for each direction, half of them with negative activations."""
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    sign = torch.tensor([1.0, -1.0]).repeat(FEATURES * EACH // 2)[:, None]
    layer.mlp.gate_proj.weight.copy_(read.repeat_interleave(EACH, 0))
    layer.mlp.up_proj.weight.copy_(sign * read.repeat_interleave(EACH, 0))
    values = (sign * write.repeat_interleave(EACH, 0)).T * SIZE / (EACH * D)
    layer.mlp.down_proj.weight.copy_(values + noise * SIZE / (EACH * D) * draw(*values.shape))


def _head(model: Any, write: Tensor, draw: Any) -> None:
    """Every token is a mixture of directions; those of the concept and its neighbours are planted."""
    head = model.lm_head.weight
    head.copy_(draw(len(head), FEATURES) @ write * 0.4 * (10 / FEATURES) ** 0.5)
    up, down = write[list(UP)].sum(0), write[list(DOWN)].sum(0)
    for word in NAMES:
        head[WORDS.index(word)] = 0.8 * (up - down)
    for word in NEIGHBOURS:
        head[WORDS.index(word)] = 0.8 * write[list(NEAR)].sum(0)


def _dictionary(write: Tensor, draw: Any, random: torch.Generator) -> tuple[Disentangler, Tensor]:
    others = draw(LATENTS - FEATURES, FEATURES) @ write
    rows = torch.cat((write, others / others.norm(dim=1, keepdim=True)))
    order = torch.randperm(LATENTS, generator=random)
    rows = rows[order]
    dis = Disentangler(
        rows.T.contiguous(), torch.zeros(LATENTS), rows, torch.zeros(D), torch.full((LATENTS,), 0.6 * SIZE), "mlp.0"
    )  # fmt: skip
    return dis, order.argsort()[:FEATURES]


def _texts(features: Sequence[int], random: torch.Generator) -> list[str]:
    """Return 40 texts in which context words of some directions are followed by the words they speak of."""
    spoken = NAMES if 0 in features else NEIGHBOURS if 10 in features else COMMON
    made = []
    for _ in range(40):
        words: list[str] = []
        for _ in range(8):
            pick = torch.randint(10_000, (3,), generator=random).tolist()
            words += [
                COMMON[pick[0] % len(COMMON)], CONTEXTS[features[pick[1] % len(features)]],
                spoken[pick[2] % len(spoken)],
            ]  # fmt: skip
        made.append(" ".join(words))
    return made
