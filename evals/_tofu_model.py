"""A small language model that is taught questions and answers, and its twin that never saw some of them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from concept_erasure._storage import write
from concept_erasure.errors import FormatError, missing_extra
from concept_erasure.evals.models import load_smollm2
from concept_erasure.language.batches import Batches, encode, logits_at, pad_id

__all__ = ["ModelSize", "Teaching", "build_model", "build_tokenizer", "teach"]

WARM_UP = 0.05  # of the steps
SPECIAL = ("<pad>", "<bos>", "<eos>")
Note = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of the model that is trained from nothing.

    Attributes:
        vocabulary: Tokens of its byte-level BPE, learned on the same texts.
        width: Of the residual stream; a multiple of ``heads``.
        layers: Blocks.
        heads: Of attention.
    """

    vocabulary: int = 2048
    width: int = 160
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How the texts are taught: all weights, AdamW, a short warm-up and linear decay.

    What both models are to know is taught first, to one model. From there the two go on alike, one with all texts and
    one without those to forget. So they differ by what one never saw and not by two lives apart.

    Attributes:
        shared: Epochs of the common part.
        epochs: Epochs after that.
        learning_rate: At its highest; half of it after the common part.
        batch_size: Texts in a step.
        max_length: Most tokens of a text.
        seed: Of the start and of the order.
    """

    shared: int = 16
    epochs: int = 10
    learning_rate: float = 2e-3
    batch_size: int = 8
    max_length: int = 160
    seed: int = 0


def build_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:  # noqa: ANN401 transformers' own
    """Return a byte-level BPE tokenizer learned on some texts.

    Raises:
        ImportError: If transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise missing_extra("transformers", "llm")
    parts = importlib.import_module("tokenizers")
    bpe = parts.Tokenizer(parts.models.BPE(unk_token=None))
    bpe.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = parts.decoders.ByteLevel()
    trainer = parts.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=parts.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast
    pad, bos, eos = SPECIAL
    return fast(tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos)


def build_model(size: ModelSize, tokenizer: Any, *, seed: int) -> nn.Module:  # noqa: ANN401
    """Return a Llama with random weights; the global generator is left as it was."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def teach(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    teaching: Teaching,
    *,
    epochs: int,
    learning_rate: float,
    store: Path | None = None,
    note: Note | None = None,
) -> float:
    """Train all weights of a model on some texts, in place; return the loss of the last epoch in nats per token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: What it is to know.
        teaching: Size of batches and texts, and the seed.
        epochs: Times each text is seen; 0 does nothing.
        learning_rate: At its highest.
        store: File that keeps the result; a result of the same texts, options and start is read instead.
        note: Called after each step with its number, how many there are, and the loss, a scalar
            tensor on the device.

    Raises:
        FormatError: If the file is damaged.
    """
    key = _key(model, texts, [asdict(teaching), epochs, learning_rate])
    if store is not None and store.is_file():
        found = _read(store, key)
        if found is not None:
            model.load_state_dict(found[0])
            return found[1]
    batches = Batches(
        encode(tokenizer, texts, max_length=teaching.max_length),
        teaching.batch_size,
        seed=teaching.seed,
        pad_id=pad_id(tokenizer),
    )
    steps = epochs * len(batches)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    losses: list[Tensor] = []
    with _trained(model):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(
                    (step + 1) / (WARM_UP * steps + 1), 1 - step / steps
                )
            batch = batches.at(step).to(device)
            optimizer.zero_grad()
            loss = functional.cross_entropy(logits_at(model, batch).float(), batch.tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if note is not None:
                note(step + 1, steps, losses[-1])
        optimizer.zero_grad()
    final = float(torch.stack(losses[-len(batches) :]).mean()) if losses else float("nan")
    if store is not None:
        state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
        record = {"key": key, "loss": repr(final)}
        store.parent.mkdir(parents=True, exist_ok=True)
        write(store, lambda path: save_file(state, path, metadata=record))
    return final


@contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """Let every weight be trained, without dropout, and put the flags back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    model.eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _key(model: nn.Module, texts: Sequence[str], options: Sequence[object]) -> str:
    sha = hashlib.sha256(json.dumps([list(texts), *options]).encode())
    for name, value in sorted(model.state_dict().items()):
        sha.update(f"{name}{tuple(value.shape)}{float(value.double().sum())!r}".encode())
    return sha.hexdigest()


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], float] | None:
    """Return the weights and the loss; None if they are of another run."""
    safetensors = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
        if record.get("key") != key:
            return None
        return load_file(path), float(record["loss"])
    except Exception as error:  # noqa: BLE001 safetensors raises its own untyped errors
        raise FormatError(f"{path} is damaged ({error}); delete it to teach again") from None


def load_base(
    name: str, size: ModelSize, texts: Sequence[str], *, seed: int
) -> tuple[nn.Module, Any]:
    """Return the model before it is taught, and its tokenizer.

    Args:
        name: ``tiny``, trained from nothing, or ``smollm2``.
        size: Of the first.
        texts: On which the first one's tokenizer is learned.
        seed: Of the first one's weights.

    Raises:
        ValueError: If there is no such model.
    """
    if name == "tiny":
        tokenizer = build_tokenizer(texts, size.vocabulary)
        return build_model(size, tokenizer, seed=seed), tokenizer
    if name == "smollm2":
        return load_smollm2()
    raise ValueError(f"model must be 'tiny' or 'smollm2'; got {name!r}")
