"""Texts as tokens, batches as pure functions of the step, and logits where they count.

A token is *supervised* if its probability under the tokens before it enters a loss. Only the positions that
predict such tokens ever reach the head, whose product with the vocabulary is the widest in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from concept_erasure.collect import Reached
from concept_erasure.errors import SiteNotFoundError
from concept_erasure.sites import base_of, hook, resolve

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Encoded",
    "Head",
    "activations_at",
    "check_head",
    "chunked",
    "collate",
    "encode",
    "hidden_at",
    "logits_at",
    "pad_id",
]

IGNORE = -100
POOL = 32  # batches whose texts are sorted by length together: little padding, and still shuffled
CHUNK_VALUES = 2**24  # logits held at once by `chunked`, 64 MB in float32


@dataclass(frozen=True, eq=False)
class Encoded:
    """One text as tokens.

    Attributes:
        ids: Shape ``(T,)``, int64.
        supervised: Which tokens count, shape ``(T,)``, bool. `encode` leaves out the first, which nothing predicts;
            methods that read activations may count it.
    """

    ids: Tensor
    supervised: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.shape != self.supervised.shape:
            raise ValueError(
                f"ids and supervised must have one shape (T,); got {tuple(self.ids.shape)} and "
                f"{tuple(self.supervised.shape)}"
            )
        if not bool(self.supervised.any()):
            raise ValueError(f"none of the {len(self.ids)} tokens of a text is supervised")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of supervised tokens."""
        return int(self.supervised.sum())


def encode(
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    texts: Sequence[str],
    *,
    max_length: int,
    prefix: Sequence[str] | None = None,
) -> list[Encoded]:
    """Return ``[bos] + prefix + text`` for every text, with the tokens of the text supervised.

    Prefix and text are tokenised apart and their ids joined, so that a text has the same tokens under every prefix:
    the k-th supervised token is the same token in all streams. A tokenizer without BOS lends its EOS; if it
    has neither, the first token of each text is context only, with a prefix and without.

    Args:
        tokenizer: Called like one of transformers.
        texts: The texts, at least one.
        max_length: Most tokens of BOS and text together; a prefix comes on top.
        prefix: One for each text.

    Returns:
        One `Encoded` for each text, in their order.

    Raises:
        ValueError: If a text has fewer than two tokens (the message names its index), there is none, or the numbers
            of texts and prefixes differ.
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"texts must be a non-empty list of texts; got {texts!r}")
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3; got {max_length}")
    if prefix is not None and len(prefix) != len(texts):
        raise ValueError(f"{len(texts)} texts need as many prefixes; got {len(prefix)}")
    start = next(
        (
            [int(found)]
            for name in ("bos_token_id", "eos_token_id")
            if (found := getattr(tokenizer, name, None)) is not None
        ),
        [],
    )
    bodies = _tokens(tokenizer, texts)
    heads = [[]] * len(texts) if prefix is None else _tokens(tokenizer, prefix)
    made: list[Encoded] = []
    for i, (head, whole) in enumerate(zip(heads, bodies, strict=True)):
        if len(whole) < 2:
            raise ValueError(
                f"text {i} has {len(whole)} token(s), at least 2 are needed: {texts[i]!r}; leave it out"
            )
        body = whole[: max_length - len(start)]
        ids = torch.tensor([*start, *head, *body], dtype=torch.int64)
        supervised = torch.zeros(len(ids), dtype=torch.bool)
        supervised[len(ids) - len(body) + (0 if start else 1) :] = True
        made.append(Encoded(ids, supervised))
    return made


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:  # noqa: ANN401 see encode
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def pad_id(tokenizer: Any) -> int:  # noqa: ANN401 see encode
    """Return the id to pad with: any will do, since padding is on the right and never supervised."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts padded on the right.

    Attributes:
        input_ids: Shape ``(B, T)``.
        attention_mask: Shape ``(B, T)``.
        labels: Token at each supervised place, `IGNORE` elsewhere, shape ``(B, T)``; aligned with `input_ids`,
            not shifted.
        rows: Index of each text among all, shape ``(B,)``.
        positions: Places in the flattened ``(B T)`` of the supervised tokens, row by row, shape ``(N,)``.
        count: N.
        predictable: Whether each has a token before it, so that a model says something of it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor
    positions: Tensor
    count: int
    predictable: bool = True

    @property
    def tokens(self) -> Tensor:
        """The supervised tokens, shape ``(N,)``, in the order of `logits_at`."""
        return self.input_ids.reshape(-1)[self.positions]

    @property
    def owners(self) -> Tensor:
        """Place in the batch of the text of each supervised token, shape ``(N,)``."""
        return self.positions // self.input_ids.shape[1]

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum values of the supervised tokens, shape ``(N,)``, over each text, shape ``(B,)``."""
        return values.new_zeros(len(self.rows)).index_add(0, self.owners, values)

    @property
    def lengths(self) -> Tensor:
        """Number of supervised tokens of each text, shape ``(B,)``, int64."""
        return self.per_sequence(torch.ones_like(self.positions))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        names = ("input_ids", "attention_mask", "labels", "rows", "positions")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def collate(texts: Sequence[Encoded], rows: Sequence[int], *, pad_id: int) -> Batch:
    """Return the texts with these indices as one batch on the CPU.

    Args:
        texts: All texts.
        rows: Which of them.
        pad_id: Id that fills up the shorter ones, on the right.
    """
    chosen = [texts[row] for row in rows]
    shape = (len(chosen), max(len(text) for text in chosen))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for k, text in enumerate(chosen):
        ids[k, : len(text)] = text.ids
        mask[k, : len(text)] = 1
        supervised[k, : len(text)] = text.supervised
    positions = supervised.reshape(-1).nonzero()[:, 0]
    labels = ids.masked_fill(~supervised, IGNORE)
    first = bool(supervised[:, 0].any())
    return Batch(ids, mask, labels, torch.tensor(list(rows)), positions, len(positions), not first)


class Batches:
    """Batches of texts of like length, shuffled anew each epoch, for ever.

    `at` is a pure function of its argument, so that resuming and sharding over processes need no state.

    Args:
        texts: The texts.
        batch_size: Texts in a batch; the last batch of an epoch may hold fewer.
        seed: Of the order.
        pad_id: See `collate`.
    """

    def __init__(
        self, texts: Sequence[Encoded], batch_size: int, *, seed: int, pad_id: int
    ) -> None:
        if not texts:
            raise ValueError("there are no texts to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.texts: list[Encoded] = list(texts)
        self.batch_size, self.seed, self.pad_id = batch_size, seed, pad_id
        self._plans: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self.texts) // self.batch_size)

    @property
    def digest(self) -> str:
        """Hash of the texts and of their order."""
        sha = hashlib.sha256(f"{self.batch_size};{self.seed}".encode())
        for text in self.texts:
            sha.update(f";{len(text)};".encode())
            sha.update(text.ids.numpy().tobytes() + text.supervised.numpy().tobytes())
        return sha.hexdigest()

    def rows_at(self, step: int) -> list[int]:
        """Return the indices of the texts of a batch."""
        epoch, k = divmod(step, len(self))
        if epoch not in self._plans:
            # a step looks at one epoch, or two where one ends
            self._plans = {old: plan for old, plan in self._plans.items() if old == epoch - 1}
            self._plans[epoch] = self._plan(epoch)
        return self._plans[epoch][k]

    def count_at(self, step: int) -> int:
        """Return the number of supervised tokens of a batch without making it."""
        return sum(self.texts[row].count for row in self.rows_at(step))

    def at(self, step: int) -> Batch:
        """Return a batch, on the CPU."""
        return collate(self.texts, self.rows_at(step), pad_id=self.pad_id)

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.texts), generator=generator).tolist()
        size, plan = self.batch_size, list[list[int]]()
        for start in range(0, len(order), size * POOL):
            pool = sorted(order[start : start + size * POOL], key=lambda row: len(self.texts[row]))
            plan += [pool[k : k + size] for k in range(0, len(pool), size)]
        return [plan[k] for k in torch.randperm(len(plan), generator=generator).tolist()]


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits that predict the supervised tokens, shape ``(N, V)``.

    The same numbers as ``model(...).logits`` at the position before each supervised token, with whatever the model
    does after its head (soft capping, scaling), but the head sees only N positions instead of ``B T``.

    Args:
        model: A causal language model of transformers.
        batch: N supervised tokens.

    Raises:
        SiteNotFoundError: If the model has no head over a base model.
        ValueError: If the first token of a text is supervised: nothing predicts it.
    """
    base, before = _base(model), _predicting(batch)

    def gather(_: nn.Module, __: object, output: object) -> object:
        return _with_hidden(output, _hidden(output).flatten(0, 1)[before][None])

    handle = base.register_forward_hook(gather)
    try:
        return cast("Tensor", _forward(model, batch).logits[0])
    finally:
        handle.remove()


def hidden_at(model: nn.Module, batch: Batch) -> Tensor:
    """Return the last hidden states that predict the supervised tokens, shape ``(N, d)``: what `Head` takes."""
    base, before, kept = _base(model), _predicting(batch), list[Tensor]()

    def gather(_: nn.Module, __: object, output: object) -> object:
        kept.append(_hidden(output).flatten(0, 1)[before])
        return _with_hidden(output, kept[0][None, :1])  # the head then costs nothing

    handle = base.register_forward_hook(gather)
    try:
        _forward(model, batch)
    finally:
        handle.remove()
    return kept[0]


@dataclass(frozen=True, eq=False)
class Head:
    """All that a causal language model does after its last hidden state, as a function.

    The model's own code runs, on hidden states that are handed to it instead of computed, so that nothing an
    architecture does there (biases, soft capping, scaling) has to be repeated here.

    Attributes:
        model: The model.
    """

    model: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits, shape ``(N, V)``, of hidden states of shape ``(N, d)``."""
        with _returning(_base(self.model), _States(hidden[None])):
            ids = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
            return cast("Tensor", self.model(input_ids=ids, use_cache=False).logits[0])


def chunked(
    loss: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk: int | None = None,
    vocabulary: int | None = None,
    twice: bool = False,
) -> Tensor:
    """Return a loss at every position without ever holding the logits of all.

    The loss at a position depends on the hidden state there alone, so its gradient is found at once, while the
    logits of its chunk are there, and kept at the width of the hidden states: no logits wait for the backward pass,
    and none are computed twice. Where that is not all of the gradient (the head is trained itself, or `twice`), each
    chunk's logits are computed again in the backward pass.

    Args:
        loss: Function of logits ``(c, V)`` and of the places ``(c,)`` among the N they are for; returns ``(c,)``.
        hidden: Shape ``(N, d)``, see `hidden_at`.
        head: From hidden states to logits, a `Head`.
        chunk: Positions at a time; default as many as make 2^24 logits.
        vocabulary: V, needed for the default chunk only; default 2^17.
        twice: Whether the gradient will be differentiated; without it that raises.

    Returns:
        The losses, shape ``(N,)``.
    """
    size = max(1, CHUNK_VALUES // (vocabulary or 2**17)) if chunk is None else chunk
    if size < 1:
        raise ValueError(f"chunk must be at least 1; got {size}")
    places = torch.arange(len(hidden), device=hidden.device)

    def part(states: Tensor, where: Tensor) -> Tensor:
        return loss(head(states), where)

    pieces = list(zip(hidden.split(size), places.split(size), strict=True))
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([part(*piece) for piece in pieces])
    if twice or part(hidden[:1].detach(), places[:1]).requires_grad:
        if len(pieces) == 1:
            return part(hidden, places)
        again = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(cast("list[Tensor]", again))
    losses, slopes = list[Tensor](), list[Tensor]()
    for states, where in pieces:
        leaf = states.detach().requires_grad_()
        losses.append(part(leaf, where))
        slopes += torch.autograd.grad(losses[-1].sum(), leaf)
        losses[-1] = losses[-1].detach()
    made = _WithSlopes.apply(hidden, torch.cat(losses), torch.cat(slopes))  # type: ignore[no-untyped-call]
    return cast("Tensor", made)


class _WithSlopes(torch.autograd.Function):
    """Losses ``(N,)`` whose gradients ``(N, d)`` at the hidden states are known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, slopes: Tensor) -> Tensor:  # noqa: ANN401 a context of torch
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 a context of torch
        if torch.is_grad_enabled():  # create_graph=True: the slopes would be constants
            raise RuntimeError("to differentiate this gradient again, call chunked(…, twice=True)")
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None


def activations_at(model: nn.Module, batch: Batch, site: str) -> Tensor:
    """Return the activation at a site for the supervised tokens themselves, shape ``(N, d)``.

    The forward pass ends at the site: layers after it are neither run nor kept for the gradient. A sharded model
    runs to its end, since it puts its parts away there.

    Args:
        model: Any model that `resolve` knows.
        batch: N supervised tokens.
        site: Name of one site, such as ``"residual.7"``.

    Raises:
        SiteNotFoundError: If the name is not that of one site.
    """
    places = resolve(model, site)
    if len(places) != 1:
        raise SiteNotFoundError(f"{site!r} must name one site; it names {len(places)}")
    kept: list[Tensor] = []
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())

    def take(x: Tensor) -> None:
        kept.append(x)
        if not sharded:
            raise Reached

    handle = hook(model, places[0], take)
    try:
        _forward(model, batch)
    except Reached:
        pass
    finally:
        handle.remove()
    return kept[0].flatten(0, 1)[batch.positions]


def _predicting(batch: Batch) -> Tensor:
    """Return the places whose logits are for the supervised tokens."""
    if not batch.predictable:
        raise ValueError("the first token of a text is supervised, but no position predicts it")
    return batch.positions - 1


def _forward(model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 an output of transformers
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def check_head(model: nn.Module) -> None:
    """Refuse a model that gives no logits.

    Raises:
        SiteNotFoundError: If it has no language-model head.
    """
    _base(model)


def _base(model: nn.Module) -> nn.Module:
    base = base_of(model)[1]
    if base is model:
        raise SiteNotFoundError(
            f"{type(model).__name__} has no language-model head over a base model; load it with "
            "AutoModelForCausalLM"
        )
    return base


def _hidden(output: object) -> Tensor:
    return cast("Tensor", output[0])  # type: ignore[index]  # a tuple, or an output of transformers


def _with_hidden(output: object, hidden: Tensor) -> object:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden  # type: ignore[attr-defined]
    return output


class _States:
    """What a base model returns, with hidden states and nothing else in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: int | slice) -> Tensor | tuple[Tensor, ...]:
        return (self.last_hidden_state,)[key]

    def __getattr__(self, name: str) -> None:
        """Return None, as outputs of transformers do for what was not asked for."""
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Let a module return something without running."""
    held = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if held is not None:
            module.__dict__["forward"] = held
