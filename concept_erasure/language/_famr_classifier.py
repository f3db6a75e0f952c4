"""FAMR on a classifier: the objective, its minimisation, and what can still be read out afterwards.

``J(th) = F + w_r R + w_m M + (rho / 2) sum_i a_i D_i^2`` with ``F = mean KL(q || p_th)`` over the forget rows,
``R = mean KL(p_0 || p_th)`` over retain rows, ``M = mean max(0, z_y - mean_{k != y} z_k + m)`` and ``D = th - th0``.
Everything is full batch and runs on parameters that lie outside the model, which is never written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from concept_erasure.errors import SiteNotFoundError
from concept_erasure.linalg import statistics_dtype
from concept_erasure.patches import check_writable

__all__ = [
    "ClassifierOptimizer",
    "Minimum",
    "Objective",
    "chosen_parameters",
    "class_logits",
    "divergence",
    "dual_norm",
    "fisher_diagonal",
    "in_evaluation_mode",
    "label_log_target",
    "minimise",
    "norm",
]

ClassifierOptimizer = Literal["lbfgs", "adam", "sgd"]
Parameters = dict[str, Tensor]
RATES: Mapping[str, float] = {"lbfgs": 1.0, "adam": 1e-3, "sgd": 1e-2}
FISHER_FLOOR = 1e-2  # of the mean: what the retain data do not feel is still held a little
CHECK_EVERY = 10  # steps between two looks at the gradient, each a round trip


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, gradients as they are, and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def chosen_parameters(model: nn.Module, patterns: Sequence[str]) -> Parameters:
    """Return float32 (or wider) copies of the floating parameters whose names match.

    Raises:
        SiteNotFoundError: If a pattern matches nothing; the message lists what there is.
        EditError: If one cannot be changed in place: tied, quantised, sharded or off-loaded.
    """
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:6]) + (f" … ({len(names)} in all)" if len(names) > 6 else "")
            raise SiteNotFoundError(
                f"no parameter is called {pattern!r}; there are {some or 'none'}"
            )
    made: Parameters = {}
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            value = check_writable(model, name).detach()
            made[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    return made


def label_log_target(
    kind: str, log_p0: Tensor, labels: Tensor, classes: Tensor | None, given: Tensor | None
) -> Tensor:
    """Return ``log q`` of every forget row, shape ``(n, K)``.

    Args:
        kind: ``uniform``; ``renormalised``, ``p_0`` without what is forgotten; ``others``, uniform without it;
            ``given``.
        log_p0: Of the original, shape ``(n, K)``.
        labels: Shape ``(n,)``; left out by ``renormalised`` and ``others`` where no classes are forgotten.
        classes: Forgotten classes.
        given: Probabilities ``(K,)`` or ``(n, K)``.

    Raises:
        ValueError: If the target is unknown, not a distribution, or leaves no class.
    """
    if kind == "uniform":
        return torch.full_like(log_p0, -math.log(log_p0.shape[1]))
    if kind == "given":
        return _given_log_target(given, log_p0)
    if kind not in ("renormalised", "others"):
        raise ValueError(
            f"target must be 'uniform', 'renormalised', 'others' or 'given'; got {kind!r}"
        )
    out = torch.zeros_like(log_p0, dtype=torch.bool)
    if classes is None:
        out.scatter_(1, labels[:, None], True)
    else:
        out[:, classes.to(out.device)] = True
    if bool(out.all(1).any()):
        raise ValueError(f"target {kind!r} leaves no class; forget fewer than all {out.shape[1]}")
    base = log_p0 if kind == "renormalised" else torch.zeros_like(log_p0)
    return base.masked_fill(out, -math.inf).log_softmax(1)


def _given_log_target(given: Tensor | None, log_p0: Tensor) -> Tensor:
    if given is None:
        raise ValueError("target='given' needs given=, probabilities (K,) or (n, K)")
    rows = given.to(log_p0)
    rows = rows.expand_as(log_p0) if rows.ndim == 1 and len(rows) == log_p0.shape[1] else rows
    if rows.shape != log_p0.shape:
        raise ValueError(
            f"given must be ({log_p0.shape[1]},) or {tuple(log_p0.shape)}; got {tuple(given.shape)}"
        )
    if bool((rows < 0).any()) or bool(((rows.sum(1) - 1).abs() > 1e-4).any()):
        raise ValueError("given must hold probabilities: not negative, each row with sum 1")
    return (rows / rows.sum(1, keepdim=True)).log()


@dataclass(frozen=True, eq=False)
class Objective:
    """G and F of a classifier as functions of its parameters.

    Attributes:
        model: In evaluation mode while this is used; never written to.
        forget: Inputs ``(n, ...)``.
        log_target: ``log q``, shape ``(n, K)``.
        labels: Of the forget rows, ``(n,)``, for the margin.
        retain: Inputs of the retain term.
        log_retain: ``log p_0`` there.
        retain_weight: ``w_r``.
        margin: m.
        margin_weight: ``w_m``.
        batch_size: Rows at once; the result does not depend on it.
    """

    model: nn.Module
    forget: Tensor
    log_target: Tensor
    labels: Tensor
    retain: Tensor
    log_retain: Tensor
    retain_weight: float = 0.0
    margin: float = 0.0
    margin_weight: float = 0.0
    batch_size: int = 1024

    def logits(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the logits, shape ``(n, K)``, in the dtype of statistics."""
        return class_logits(self.model, parameters, x)

    def pieces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the shares of (G, F) of one batch of rows after the other; their sums are G and F."""
        size, n = self.batch_size, len(self.forget)
        for i in range(0, n, size):
            logits = self.logits(parameters, self.forget[i : i + size])
            target = self.log_target[i : i + size]
            found = divergence(target, logits.log_softmax(1)).sum() / n
            more = found
            if self.margin_weight:
                lead = _lead(logits, self.labels[i : i + size]) + self.margin
                more = found + self.margin_weight * lead.clamp_min(0).sum() / n
            yield more, found
        if not self.retain_weight:
            return
        for i in range(0, len(self.retain), size):
            logits = self.logits(parameters, self.retain[i : i + size])
            kept = divergence(self.log_retain[i : i + size], logits.log_softmax(1)).sum()
            yield self.retain_weight * kept / len(self.retain), torch.zeros_like(kept)

    @torch.no_grad()
    def values(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``(G, F)``, shape ``(2,)``."""
        return torch.stack([torch.stack(pair) for pair in self.pieces(parameters)]).sum(0)

    def gradient(self, parameters: Parameters) -> tuple[Tensor, Parameters]:
        """Return ``(G, F)`` and the gradient of G."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        total: Parameters = {name: torch.zeros_like(p) for name, p in parameters.items()}
        seen = []
        for piece, found in self.pieces(leaves):
            parts = torch.autograd.grad(piece, list(leaves.values()), allow_unused=True)
            for name, part in zip(total, parts, strict=True):
                if part is not None:
                    total[name] += part
            seen.append(torch.stack([piece.detach(), found.detach()]))
        return torch.stack(seen).sum(0), total

    def hessian_product(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the Hessian of G times a flat vector."""
        leaves = [p.detach().requires_grad_() for p in parameters.values()]
        names, sizes = list(parameters), [p.numel() for p in leaves]

        def product(vector: Tensor) -> Tensor:
            parts = [v.view_as(p) for v, p in zip(vector.split(sizes), leaves, strict=True)]
            total = torch.zeros_like(vector)
            for piece, _ in self.pieces(dict(zip(names, leaves, strict=True))):
                first = torch.autograd.grad(piece, leaves, create_graph=True, allow_unused=True)
                along = [(f * v).sum() for f, v in zip(first, parts, strict=True) if f is not None]
                slope = torch.stack(along).sum()
                if not slope.requires_grad:
                    continue  # linear in the parameters
                second = torch.autograd.grad(slope, leaves, allow_unused=True)
                flat = [
                    (torch.zeros_like(p) if s is None else s).reshape(-1)
                    for s, p in zip(second, leaves, strict=True)
                ]
                total = total + torch.cat(flat)
            return total

        return product


def class_logits(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits of a classifier with other parameters, shape ``(n, K)``.

    Raises:
        TypeError: If the model returns neither a matrix nor something with one under ``logits``.
    """
    own = dict(model.named_parameters())
    cast = {name: p.to(own[name].dtype) for name, p in parameters.items()}
    out = functional_call(model, cast, (x,))
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise TypeError(f"the model must return logits (n, K); got {got}")
    return logits.to(statistics_dtype(logits.device))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``KL(p || q)`` by row, shape ``(n,)``; classes with ``p = 0`` add nothing."""
    p = log_p.exp()
    rows: Tensor = (torch.special.xlogy(p, p) - torch.where(p > 0, p * log_q, 0.0)).sum(1)
    return rows


def _lead(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``z_y - mean of the other logits``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - (logits.sum(1) - own) / (logits.shape[1] - 1)


def norm(change: Parameters, weights: Parameters) -> Tensor:
    """Return ``sqrt(sum a D^2)``."""
    parts = [(weights[name] * value.square()).double().sum() for name, value in change.items()]
    return torch.stack(parts).sum().sqrt()


def dual_norm(gradient: Parameters, weights: Parameters) -> Tensor:
    """Return ``sqrt(sum g^2 / a)``."""
    return norm(gradient, {name: 1 / value for name, value in weights.items()})


def fisher_diagonal(
    model: nn.Module, parameters: Parameters, x: Tensor, *, seed: int, batch_size: int
) -> Parameters:
    """Return the diagonal of the Fisher information on some rows, scaled to mean 1 and cut from below at 0.01.

    One label is drawn from the model's own prediction for each row, so the expectation is the true Fisher information
    and not the empirical one. The cut keeps every parameter held, without which C1 and C2 bound nothing.

    Args:
        model: In evaluation mode.
        parameters: Where.
        x: Retain rows.
        seed: Of the labels drawn.
        batch_size: Rows at once; memory is that many gradients.

    Raises:
        ValueError: If it is zero everywhere.
    """

    def loss(values: Parameters, row: Tensor, label: Tensor) -> Tensor:
        return -class_logits(model, values, row[None]).log_softmax(1)[0].gather(0, label[None])[0]

    per_row = vmap(grad(loss), in_dims=(None, 0, 0))
    draw = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(0, len(x), batch_size):
        rows = x[i : i + batch_size]
        with torch.no_grad():
            chances = class_logits(model, parameters, rows).softmax(1)
        labels = torch.multinomial(chances.cpu(), 1, generator=draw)[:, 0].to(rows.device)
        for name, value in per_row(parameters, rows, labels).items():
            total[name] += value.detach().square().sum(0)
    count = sum(p.numel() for p in total.values())
    mean = torch.stack([value.double().sum() for value in total.values()]).sum() / count
    if not float(mean) > 0:
        raise ValueError(
            "the Fisher information on the retain rows is zero: the model is certain of all; use anchor='euclidean'"
        )
    return {n: (value / mean.to(value)).clamp_min(FISHER_FLOOR) for n, value in total.items()}


@dataclass(eq=False)
class Minimum:
    """The best point that was evaluated.

    Attributes:
        parameters: There.
        value: J there, a scalar tensor.
        trace: J at every evaluation, in order.
    """

    parameters: Parameters
    value: Tensor
    trace: list[Tensor] = field(default_factory=list)

    def offer(self, parameters: Parameters, value: Tensor) -> None:
        """Take a point if it is better; on the device, without a look at the numbers."""
        better = value < self.value
        self.value = torch.where(better, value, self.value)
        for name, kept in self.parameters.items():
            kept.copy_(torch.where(better, parameters[name], kept))
        self.trace.append(value)


def minimise(
    objective: Objective,
    start: Parameters,
    weights: Parameters,
    rho: float,
    *,
    optimizer: ClassifierOptimizer,
    steps: int,
    learning_rate: float | None,
    inside: bool,
    tolerance: float,
) -> Minimum:
    """Minimise J from the start and return its best point; weight decay is 0 throughout.

    Args:
        objective: G.
        start: ``th0``.
        weights: ``a`` of the anchor.
        rho: Its strength.
        optimizer: ``lbfgs`` (strong Wolfe line search), ``adam`` or ``sgd``.
        steps: Most steps.
        learning_rate: Default 1, 1e-3 or 1e-2.
        inside: With ``adam``, whether the anchor is part of the loss, where Adam rescales it; otherwise
            ``D <- D / (1 + lr rho a)`` after each step, which never overshoots. The others need it inside.
        tolerance: Stop when ``|grad J|`` is below this share of what it was at the start.

    Raises:
        FloatingPointError: If J is not finite at the start.
    """
    rate = RATES[optimizer] if learning_rate is None else learning_rate
    free = {name: p.clone().requires_grad_() for name, p in start.items()}
    held = optimizer != "adam" or inside
    first = objective.values(start)[0]
    if not bool(torch.isfinite(first)):
        raise FloatingPointError(
            f"the objective is {float(first)} at the start; does the model give finite logits?"
        )
    best = Minimum({name: p.clone() for name, p in start.items()}, first)
    size = first.new_zeros(())

    def closure() -> Tensor:
        nonlocal size
        values, gradient = objective.gradient(free)
        change = {name: (p - start[name]).detach() for name, p in free.items()}
        value = values[0] + rho / 2 * norm(change, weights).square().to(values)
        total = {n: gradient[n] + rho * weights[n] * change[n] for n in free}
        size = dual_norm(total, weights)
        for name, p in free.items():
            p.grad = total[name] if held else gradient[name]
        best.offer({name: p.detach() for name, p in free.items()}, value)
        return value

    closure()
    limit = tolerance * float(size)
    if optimizer == "lbfgs":
        _lbfgs(list(free.values()), rate, steps, tolerance).step(closure)
        return best
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    engine: Any = kind(list(free.values()), lr=rate)
    for step in range(1, steps + 1):
        engine.step(closure)
        if not held:
            with torch.no_grad():
                for name, p in free.items():
                    p.copy_(start[name] + (p - start[name]) / (1 + rate * rho * weights[name]))
        if step % CHECK_EVERY == 0 and float(size) <= limit:
            break
    closure()
    return best


def _lbfgs(free: list[Tensor], rate: float, steps: int, tolerance: float) -> Any:  # noqa: ANN401
    """Return L-BFGS with a line search; one call of its ``step`` is the whole run."""
    largest = max(float(p.grad.abs().max()) for p in free if p.grad is not None)
    return torch.optim.LBFGS(
        free,
        lr=rate,
        max_iter=steps,
        max_eval=4 * steps + 25,  # the line search gets what is left of this
        history_size=20,
        tolerance_grad=tolerance * largest,
        tolerance_change=torch.finfo(free[0].dtype).eps,
        line_search_fn="strong_wolfe",
    )
