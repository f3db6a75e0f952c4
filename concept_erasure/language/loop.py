"""The one training loop of all methods.

A step is a pure function of its number and of the state before it: batches, learning rate and dropout are
computed from the number, so that an interrupted run resumes to the same bits. Losses are divided by how
much there is over all micro-batches and processes, so that neither accumulation nor sharding changes the result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm.auto import tqdm

from concept_erasure.edit import base_fingerprint
from concept_erasure.errors import EditError
from concept_erasure.language._state import read_state, write_state
from concept_erasure.language.objective import Anchor, Term
from concept_erasure.language.parameters import Parameterisation

__all__ = [
    "Checkpointing",
    "OptimizerName",
    "Row",
    "Training",
    "learning_rate_at",
    "processes",
    "train",
]

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]
Checkpointing = bool | Literal["cheap"]
Row = dict[str, float]
_ABSENT = object()
DEAR = 64  # terms in a sum from which the sum is rather kept than computed again
HOW = ("checkpoint", "save_every", "log_every", "progress")  # options that do not change the result


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of the loop.

    Attributes:
        steps: Steps of the optimizer.
        learning_rate: At its highest.
        batch_size: Texts in a micro-batch of each term, on each process.
        accumulate: Micro-batches in a step, on each process.
        max_length: Most tokens of a text.
        clip: Largest norm of the gradient; None does not clip.
        weight_decay: Pull towards zero, not towards the start; see `Anchor`.
        warmup: Steps in which the rate grows linearly.
        schedule: What the rate does after them: stay, or fall to zero.
        dtype: Precision of the matrix products. ``"bfloat16"`` is autocast over float32 masters; ``"auto"`` is
            that on accelerators which have it and the model's own precision elsewhere; ``"float32"`` never.
        checkpointing: Compute activations again in the backward pass instead of keeping them: none, ``"cheap"`` ones
            (norms, activation functions, narrow products, see `_kept`), or all. A block that changes its products in
            place refuses ``"cheap"``.
        seed: Of everything random.
        checkpoint: Folder for the state; a run that finds its own state there goes on from it.
        save_every: Steps between two states.
        log_every: Steps between two rows of the history.
        progress: Whether to show a bar.
    """

    steps: int = 200
    learning_rate: float = 1e-4
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 256
    clip: float | None = 1.0
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    dtype: Precision = "auto"
    checkpointing: Checkpointing = False
    seed: int = 0
    checkpoint: str | None = None
    save_every: int = 50
    log_every: int = 10
    progress: bool = True

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch_size": 1, "accumulate": 1, "max_length": 3, "warmup": 0}
        for name, low in {**least, "save_every": 1, "log_every": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}; got {value!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None; got {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")
        if not isinstance(self.checkpointing, bool) and self.checkpointing != "cheap":
            raise ValueError(
                f"checkpointing must be False, 'cheap' or True; got {self.checkpointing!r}"
            )
        for name, kind in (("schedule", Schedule), ("dtype", Precision)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")

    def options(self) -> dict[str, Any]:
        """Return the options that change the result, as plain values."""
        return {name: value for name, value in asdict(self).items() if name not in HOW}


def learning_rate_at(training: Training, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < training.warmup:
        return training.learning_rate * (step + 1) / (training.warmup + 1)
    left = 1 - (step - training.warmup) / max(1, training.steps - training.warmup)
    factor = {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
    }[training.schedule]
    return training.learning_rate * factor


def train(
    model: nn.Module,
    parameterisation: Parameterisation,
    terms: Sequence[Term],
    training: Training,
    *,
    anchor: Anchor | None = None,
    optimizer: OptimizerName = "adamw",
    stop: Callable[[int, Row], bool] | None = None,
    options: Mapping[str, object] | None = None,
) -> list[Row]:
    """Minimise the weighted sum of terms.

    Start it with ``accelerate launch`` or ``torchrun`` to use several processes; gradients are summed over them.
    Each has a copy of the model, or, beside a LoRA, its part of one sharded by FSDP2 (``fully_shard``). The model is
    not wrapped: what wraps it sees neither masters outside it nor losses that run it several times, or in part, before
    one step of the optimizer. So a model in DistributedDataParallel, FSDP1 or DeepSpeed is refused.

    Args:
        model: The model.
        parameterisation: What is trained, entered.
        terms: Terms of the loss, with different names. Those of weight zero are left out.
        training: Options.
        anchor: Pull towards the start.
        optimizer: Of the masters.
        stop: Called with the step and its row of the history whenever one is written; True ends the training.
        options: What else the result depends on, as plain values: a state found in the checkpoint folder is used if
            it was written under the same ones.

    Returns:
        Rows with ``step``, the loss of each term at that step (not weighted), ``grad_norm`` before clipping and
        ``learning_rate``.

    Raises:
        EditError: If the parameterisation is not entered, or the processes do not see one checkpoint folder.
        ValueError: If there is nothing to minimise, two terms share a name, or a text does not fit the model.
        FloatingPointError: If a loss is not finite.
        FormatError: If the checkpoint folder holds the state of another run, or a damaged one.
    """
    if parameterisation.model is not model or not parameterisation.active:
        raise EditError("enter the parameterisation of this model first: with trainable(…) as p: …")
    terms = [term for term in terms if term.weight != 0]
    names = [term.name for term in terms]
    if not terms and anchor is None:
        raise ValueError("there is nothing to minimise: no term has a weight other than zero")
    if len(set(names)) < len(names):
        raise ValueError(f"terms must have different names; got {', '.join(names)}")
    run = _Run(model, parameterisation, terms, training, anchor, optimizer, options or {})
    history = run.resume()
    bar = tqdm(
        total=training.steps,
        initial=run.step,
        disable=not training.progress or run.rank > 0,
        desc="training",
        leave=False,
    )
    with bar, _checkpointing(model, training.checkpointing):
        while run.step < training.steps and not run.stopped:
            row = run.advance()
            bar.update()
            if row:
                history.append(row)
                bar.set_postfix({n: f"{row[n]:.3g}" for n in names}, refresh=False)
                run.stopped = stop is not None and stop(int(row["step"]), row)
            due = run.step % training.save_every == 0 or run.step == training.steps
            if due or run.stopped:
                run.save(history)
    return history


class _Run:
    """The state of a training between two steps."""

    def __init__(
        self,
        model: nn.Module,
        parameterisation: Parameterisation,
        terms: Sequence[Term],
        training: Training,
        anchor: Anchor | None,
        optimizer: OptimizerName,
        options: Mapping[str, object],
    ) -> None:
        if optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer must be 'adamw' or 'sgd'; got {optimizer!r}")
        self.model, self.parameterisation, self.terms = model, parameterisation, terms
        self.training, self.anchor = training, anchor
        self.rank, self.world = processes()
        self.parameters = parameterisation.parameters()
        self.device = next(model.parameters()).device
        kind: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
        self.optimizer: torch.optim.Optimizer = kind(
            self.parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.step, self.stopped = 0, False
        self.options = options
        _check_texts(model, terms)

    def advance(self) -> Row:
        """Take a step; return its row of the history if one is due."""
        training, step = self.training, self.step
        rate = learning_rate_at(training, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=False)
        with _dropout(self.parameterisation, training.seed, step, self.rank, self.device):
            losses = torch.stack(
                [self._accumulate(term) for term in self.terms] or [torch.zeros(())]
            )
        self._reduce(losses)
        if self.anchor is not None and self.anchor.inside:
            (self.anchor.weight / 2 * self.parameterisation.squared_distance()).backward()
        clip = math.inf if training.clip is None else training.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        if self.anchor is not None and not self.anchor.inside:
            self.parameterisation.pull(rate * self.anchor.weight)
        self.step += 1
        if step % training.log_every and self.step < training.steps:
            return {}
        return self._row(step, losses, norm, rate)

    def _accumulate(self, term: Term) -> Tensor:
        """Add the gradient of a term over this process's micro-batches; return its share of the loss."""
        group = self.training.accumulate * self.world
        first = self.step * group
        count = sum(term.count_at(first + k) for k in range(group))
        total = torch.zeros((), device=self.device)
        for k in range(self.rank, group, self.world):
            batch = term.batches.at(first + k).to(self.device)
            with _autocast(self.training.dtype, self.model, self.device):
                loss = term.loss(self.model, batch).float() / max(1, count)
            if loss.requires_grad:
                (term.weight * loss).backward()
            total += loss.detach().to(self.device)
        return total

    def _reduce(self, losses: Tensor) -> None:
        """Sum gradients and losses over the processes; a parameter no loss reached has gradient zero."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1:
            return
        grads = [cast("Tensor", p.grad) for p in self.parameters]
        flat = torch.cat([losses.reshape(-1), *(g.reshape(-1).to(losses.device) for g in grads)])
        dist.all_reduce(flat)
        sizes = [len(losses), *(g.numel() for g in grads)]
        for into, part in zip([losses, *grads], flat.split(sizes), strict=True):
            into.copy_(part.view_as(into))

    def _row(self, step: int, losses: Tensor, norm: Tensor, rate: float) -> Row:
        values = torch.stack([*losses, norm.to(losses.device)]).tolist()
        row = {"step": float(step), "learning_rate": rate, "grad_norm": values[-1]}
        row |= {term.name: value for term, value in zip(self.terms, values, strict=False)}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{bad[0]} is {row[bad[0]]} at step {step}: lower the learning rate "
                f"({self.training.learning_rate:g}), clip the gradient, or use dtype='float32'"
            )
        return row

    def save(self, history: Sequence[Row]) -> None:
        """Write the state to the checkpoint folder, whole or not at all."""
        if self.training.checkpoint is None or self.rank > 0:
            return
        tensors = {f"master.{n}": v for n, v in self.parameterisation.state().items()}
        states = cast("dict[int, dict[str, Tensor]]", self.optimizer.state_dict()["state"])
        for i, state in states.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{name}"] = value.detach().cpu().contiguous().clone()
        record = {"step": self.step, "stopped": self.stopped, "history": list(history)}
        write_state(self.training.checkpoint, self._key(), tensors, record)

    def resume(self) -> list[Row]:
        """Go on from the checkpoint folder if it holds a state; return the history so far."""
        folder = self.training.checkpoint
        found = None if folder is None else read_state(folder, self._key(), tidy=self.rank == 0)
        history: list[Row] = []
        if found is not None:
            tensors, record = found
            masters = {n[7:]: v for n, v in tensors.items() if n.startswith("master.")}
            self.parameterisation.load_state(masters)
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, i, leaf = name.split(".", 2)
                    states.setdefault(int(i), {})[leaf] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
            self.step, self.stopped = int(record["step"]), bool(record["stopped"])
            history = cast("list[Row]", record["history"])
        self._agree()
        return history

    def _agree(self) -> None:
        """Raise EditError unless all processes start at one step: they may not share a folder."""
        if self.world == 1:
            return
        steps = torch.zeros(self.world, device=self.device)
        steps[self.rank] = self.step
        dist.all_reduce(steps)
        if len(starts := sorted({int(step) for step in steps.tolist()})) > 1:
            raise EditError(
                f"the processes found states of different steps ({starts}): the checkpoint folder must be one "
                "that all of them see"
            )

    def _key(self) -> dict[str, Any]:
        """Return what the result depends on, as plain values."""
        with self.parameterisation.reference():  # raw masters stand in the model otherwise
            weights = base_fingerprint(self.model)
        return {
            "training": self.training.options(),
            "processes": self.world,
            "optimizer": type(self.optimizer).__name__,
            "anchor": None if self.anchor is None else asdict(self.anchor),
            "terms": [[t.name, t.weight, t.unit, t.batches.digest] for t in self.terms],
            "parameters": asdict(self.parameterisation.spec),
            "weights": weights,
            "options": dict(self.options),
        }


def processes() -> tuple[int, int]:
    """Return this process's number and how many there are; joins them if a launcher started several."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # noqa: PLC0415 needed for several processes only

        PartialState()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _check_texts(model: nn.Module, terms: Sequence[Term]) -> None:
    """Raise ValueError if a text does not fit the model: on an accelerator that would be an obscure error."""
    texts = [text.ids for term in terms for text in term.batches.texts]
    look_up = getattr(model, "get_input_embeddings", lambda: None)()
    if not texts or not isinstance(look_up, nn.Embedding):
        return
    largest, longest = max(int(ids.max()) for ids in texts), max(map(len, texts))
    if largest >= look_up.num_embeddings:
        raise ValueError(
            f"token {largest} is not among the model's {look_up.num_embeddings}: give the model's own tokenizer"
        )
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if places is not None and longest > places:
        raise ValueError(
            f"a text has {longest} tokens; the model has {places} places: lower training.max_length"
        )


def _autocast(
    dtype: Precision, model: nn.Module, device: torch.device
) -> AbstractContextManager[object]:
    """Return the precision of the matrix products; on accelerators bfloat16 for a float32 model."""
    auto = (
        dtype == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported()
        and next(model.parameters()).dtype == torch.float32
    )
    if dtype == "bfloat16" or auto:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def _dropout(
    parameterisation: Parameterisation, seed: int, step: int, rank: int, device: torch.device
) -> Iterator[None]:
    """Turn dropout on, with random numbers that depend on seed, step and process only."""
    if not getattr(parameterisation.spec, "dropout", 0.0):
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)
        parameterisation.dropping = True
        try:
            yield
        finally:
            parameterisation.dropping = False


def _kept(_: object, op: torch._ops.OpOverload, *args: object, **__: object) -> bool:
    """Return whether the result of an operation is kept for the backward pass: attention and products that are dear.

    A product costs as much a number as its sums have terms, so that the way up from a LoRA's rank is nearly free.
    Those that narrow are few numbers to compute again (grouped keys and values), or nothing in the block needs them
    after (the way out of an MLP). Anything else is pointwise.
    """
    if op in {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}:
        terms, width = cast("Tensor", args[-1]).shape
        return DEAR <= terms <= width
    return "attention" in op.name()


@contextmanager
def _checkpointing(model: nn.Module, what: Checkpointing) -> Iterator[None]:
    """Let the blocks compute their activations again, without the dropout that training mode brings.

    The switches of transformers are set directly: its own method also leaves a hook on the embedding.
    """
    modules = [m for m in model.modules() if what and hasattr(m, "gradient_checkpointing")]
    if what and not modules:
        raise EditError(
            f"{type(model).__name__} has no blocks that can compute their activations again; use "
            "checkpointing=False"
        )
    again = partial(checkpoint, use_reentrant=False)
    if what == "cheap":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _kept))
    switches = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": again,
        "training": True,  # of the module that decides, not of those in it: dropout stays off
    }
    before = [{name: m.__dict__.get(name, _ABSENT) for name in switches} for m in modules]
    try:
        for module in modules:
            module.__dict__.update(switches)
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name, value in values.items():
                module.__dict__.pop(name, None)
                if value is not _ABSENT:
                    module.__dict__[name] = value
