"""The (multinomial) logistic best response: full batch, on the device of the data, to a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from concept_erasure.errors import ShapeError

__all__ = ["LogisticFit", "class_entropy", "fit_logistic"]

CURVATURE = {True: 0.25, False: 0.5}  # bound of the second derivative: binary, multinomial
RELATIVE_RANK = 1e-12  # share of the largest variance below which a direction holds no data
MEMORY = 20


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A fitted classifier.

    Attributes:
        coef: Shape ``(1, d)`` for two classes (log-odds of the second), else ``(C, d)``.
        intercept: Shape ``(1,)`` or ``(C,)``.
        log_loss: Mean cross-entropy on the data of the fit, in nats, without the penalty.
        gradient: Largest entry of the gradient at the end, in the solver's coordinates.
        evaluations: Passes over the data.
    """

    coef: Tensor
    intercept: Tensor
    log_loss: float
    gradient: float
    evaluations: int

    def logits(self, x: Tensor) -> Tensor:
        """Return one logit a class, shape ``(n, C)``, for rows ``(n, d)``."""
        scores = x @ self.coef.T + self.intercept
        return scores if scores.shape[1] > 1 else torch.cat([torch.zeros_like(scores), scores], 1)

    def measure(self, x: Tensor, z: Tensor) -> tuple[float, float]:
        """Return log-loss and accuracy on rows ``(n, d)`` with class indices ``(n,)``."""
        logits = self.logits(x)
        hits = (logits.argmax(1) == z).to(logits.dtype).mean()
        return float(cross_entropy(logits, z)), float(hits)


def class_entropy(z: Tensor, classes: int) -> float:
    """Return H(Z) in nats: the log-loss of the best constant prediction of class indices ``(n,)``."""
    share = torch.tensor(torch.bincount(z, minlength=classes).tolist(), dtype=torch.float64) / len(
        z
    )
    return float(-torch.special.xlogy(share, share).sum())


def fit_logistic(
    x: Tensor,
    z: Tensor,
    classes: int,
    *,
    penalty: float = 1e-3,
    covariance: Tensor | None = None,
    start: LogisticFit | None = None,
    tol: float = 1e-8,
    max_iter: int = 500,
) -> LogisticFit:
    """Minimise ``mean cross-entropy + penalty / 2 |W|^2`` by L-BFGS; the intercept is free.

    The data are rotated and scaled so that the Hessian is at most the identity; the minimum is the same.
    O(n d C) a pass, O(n d) memory.

    Args:
        x: Rows ``(n, d)``, floating point; centre them for speed.
        z: Class indices ``(n,)`` int64, every class present.
        classes: Number of classes C, at least 2.
        penalty: Weight of the squared coefficients, positive.
        covariance: Of x, shape ``(d, d)``, if it is known (an approximation will do: it only sets the speed);
            directions without variance in it get no weight.
        start: Where to start; default zero coefficients and the log-shares as intercept.
        tol: Stop when no entry of the gradient exceeds this.
        max_iter: Most steps.

    Raises:
        ShapeError: If x and z disagree.
        ValueError: If there are fewer than two classes, one is empty, or the penalty is not positive.
    """
    if x.ndim != 2 or z.shape != x.shape[:1]:
        raise ShapeError(f"x must be (n, d) and z (n,); got {tuple(x.shape)} and {tuple(z.shape)}")
    counts = torch.bincount(z, minlength=classes)
    if classes < 2 or len(counts) != classes or bool((counts == 0).any()):
        raise ValueError(f"every one of {classes} >= 2 classes needs rows; got {counts.tolist()}")
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be positive and finite; got {penalty}")
    binary = classes == 2
    if covariance is None:
        centred = x - x.mean(0)
        covariance = centred.T @ centred / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > RELATIVE_RANK * values[-1].clamp_min(torch.finfo(x.dtype).tiny)
    hessian = CURVATURE[binary] * values[keep] + penalty
    root = hessian.sqrt()
    basis = vectors[:, keep] / root
    u = torch.cat([x @ basis, torch.ones_like(x[:, :1])], 1)
    ridge = torch.cat([penalty / hessian, hessian.new_zeros(1)])
    share = (counts / len(z)).to(x.dtype)
    intercept = (share[1] / share[0]).log()[None] if binary else share.log() - share.log().mean()
    first = torch.cat([x.new_zeros(len(intercept), int(keep.sum())), intercept[:, None]], 1)
    if start is not None:
        first = torch.cat([(start.coef @ vectors[:, keep]) * root, start.intercept[:, None]], 1)
    target = z[:, None].to(x.dtype) if binary else one_hot(z, classes).to(x.dtype)
    point, gradient, evaluations = _minimise(u, z, target, ridge, first, tol, max_iter)
    value = _value(u @ point.T, z)
    return LogisticFit(point[:, :-1] @ basis.T, point[:, -1], float(value), gradient, evaluations)


def _value(scores: Tensor, z: Tensor) -> Tensor:
    if scores.shape[1] > 1:
        return cross_entropy(scores, z)
    return (torch.nn.functional.softplus(scores[:, 0]) - scores[:, 0] * z).mean()


def _minimise(
    u: Tensor, z: Tensor, target: Tensor, ridge: Tensor, first: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, float, int]:
    """Return the minimum ``(C', r + 1)``, the largest entry of the gradient there, and the passes made."""
    point = first.clone()
    point.grad = torch.zeros_like(point)
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=max(tol, 20 * torch.finfo(u.dtype).eps),
        tolerance_change=torch.finfo(u.dtype).tiny,
        history_size=MEMORY,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        scores = u @ point.T
        chance = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
        point.grad = (chance - target).T @ u / len(u) + ridge * point
        return _value(scores, z) + 0.5 * (ridge * point.square()).sum()

    optimiser.step(closure)
    closure()
    return point, float(point.grad.abs().max()), evaluations
