"""Texts read at one site, without the tokens whose vectors are outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import _runner, accepted, encode_batch, evaluating
from concept_erasure.errors import ShapeError
from concept_erasure.sae._gate_patch import counted
from concept_erasure.sites import Site, hook

__all__ = ["read"]


def read(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    site: Site,
    specials: Sequence[int],
    *,
    max_length: int | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the activations of texts ``(b, t, d)``, and which of their places count ``(b, t)``, batch by batch.

    Args:
        model: The model; left as it is.
        tokenizer: Its tokenizer.
        texts: The texts.
        site: Where.
        specials: Ids that never count.
        max_length: Cut texts to this many tokens.
        batch_size: Texts a forward pass.

    Raises:
        ShapeError: If the site holds no vector a token.
        ValueError: If a text has special tokens only.
    """
    left_out = torch.tensor(list(specials))
    runner = _runner(model, [site])
    held: list[Tensor] = []
    handle = hook(model, site, held.append)
    try:
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            batch = encode_batch(model, tokenizer, part, start, max_length)
            with evaluating(model):
                runner(**accepted(runner, batch))
            x, ids = held.pop(), batch["input_ids"]
            held.clear()
            if x.ndim == 2 and len(x) == ids.numel():  # from modules that flatten their input
                x = x.reshape(*ids.shape, -1)
            if x.ndim != 3 or x.shape[:2] != ids.shape:
                raise ShapeError(
                    f"{site.name!r} holds shape {tuple(x.shape)}, not a vector for each of {tuple(ids.shape)} tokens"
                )
            mask = counted(ids, batch["attention_mask"], left_out, x)
            if bool((empty := ~mask.any(1)).any()):
                row = start + int(empty.int().argmax())
                raise ValueError(f"text {row} has special tokens only: {texts[row]!r}")
            yield x, mask
    finally:
        handle.remove()
