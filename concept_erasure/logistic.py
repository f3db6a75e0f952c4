"""The (multinomial) logistic best response: full batch, on the device of the data, to a tolerance.

L-BFGS whose steps and line searches stay on the device; the host reads one number every few steps, to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from concept_erasure.errors import ShapeError

__all__ = ["LogisticFit", "class_entropy", "fit_logistic"]

CURVATURE = {True: 0.25, False: 0.5}  # bound of the second derivative: binary, multinomial
RELATIVE_RANK = 1e-12  # share of the largest variance below which a direction holds no data
MEMORY = 20
CHECK = 4  # steps between two looks at the gradient
LINE_STEPS = 4  # Newton steps along a line: they cost no pass over the data


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
        x: Rows ``(n, d)``, floating point.
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
    mean = x.mean(0)
    x = x - mean
    if covariance is None:
        covariance = x.T @ x / len(x)
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
        intercept = start.intercept + start.coef @ mean
        first = torch.cat([(start.coef @ vectors[:, keep]) * root, intercept[:, None]], 1)
    target = z[None].to(x.dtype) if binary else one_hot(z, classes).to(x.dtype).T.contiguous()
    problem = _Problem(u, target, ridge)
    point, gradient, evaluations = _minimise(problem, first, tol, max_iter)
    value = problem.loss(point @ u.T)
    coef = point[:, :-1] @ basis.T
    return LogisticFit(coef, point[:, -1] - coef @ mean, float(value), gradient, evaluations)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Rows ``(n, m)`` with a last column of ones, targets ``(C', n)``, and the ridge ``(m,)``.

    Scores and targets lie class by class: a softmax over a short last axis is many times slower.
    """

    u: Tensor
    target: Tensor
    ridge: Tensor

    def chance(self, scores: Tensor) -> Tensor:
        """Return the probabilities of scores ``(C', n)``."""
        return scores.sigmoid() if len(scores) == 1 else scores.softmax(0)

    def loss(self, scores: Tensor) -> Tensor:
        total = softplus(scores[0]) if len(scores) == 1 else scores.logsumexp(0)
        return (total - (self.target * scores).sum(0)).mean()

    def gradient(self, point: Tensor, scores: Tensor) -> Tensor:
        """Return the gradient ``(C', m)``; one pass."""
        slope = self.chance(scores) - self.target
        return slope @ self.u / len(self.u) + self.ridge * point

    def along(self, point: Tensor, step: Tensor, scores: Tensor, moved: Tensor) -> Tensor:
        """Return the minimum of the objective on a line, a number on the device.

        Newton steps on its derivative, which rises; bisection where one leaves the bracket. Values are not
        compared, because near the minimum their differences drown in rounding.

        Args:
            point: Where the line starts, shape ``(C', m)``.
            step: Its direction.
            scores: Scores of the point, shape ``(C', n)``.
            moved: What the step adds to them.
        """
        n = scores.shape[1]
        pull, bend = (self.ridge * point * step).sum(), (self.ridge * step * step).sum()
        fixed = (self.target * moved).sum()
        low, size = torch.zeros_like(pull), torch.ones_like(pull)
        high = torch.full_like(pull, math.inf)
        for _ in range(LINE_STEPS):
            weighted = self.chance(scores + size * moved)
            weighted, share = weighted * moved, weighted
            slope = (weighted.sum() - fixed) / n + pull + size * bend
            spread = (weighted * moved).sum() - (
                (share * weighted * moved).sum()
                if len(scores) == 1
                else weighted.sum(0).square().sum()
            )
            curve = (spread / n + bend).clamp_min(torch.finfo(bend.dtype).tiny)
            low, high = torch.where(slope < 0, size, low), torch.where(slope < 0, high, size)
            new = size - slope / curve
            middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
            inside = (new > low) & (new < torch.minimum(high, 4 * size))
            size = torch.where(inside | (slope == 0), new, middle)
        return size


def _minimise(
    problem: _Problem, first: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, float, int]:
    """Return the minimum ``(C', m)``, the largest entry of the gradient there, and the passes made."""
    tol = max(tol, 20 * torch.finfo(first.dtype).eps)
    point, scores = first, first @ problem.u.T
    gradient = problem.gradient(point, scores)
    moves = changes = first.new_zeros(0, first.numel())
    passes = 1
    while (largest := float(gradient.abs().max())) > tol and passes <= max_iter:
        for _ in range(CHECK):
            step = -_inverse_hessian_times(gradient.flatten(), moves, changes).view_as(point)
            moved = step @ problem.u.T
            size = problem.along(point, step, scores, moved)
            old, point, scores = gradient, point + size * step, scores + size * moved
            gradient = problem.gradient(point, scores)
            pair = torch.stack([size * step, gradient - old]).flatten(1)
            pair = torch.where((pair[0] @ pair[1]) > 0, pair, 0)  # else rounding is all there is
            moves, changes = (
                torch.cat([kept[1 - MEMORY :], new[None]])
                for kept, new in zip((moves, changes), pair, strict=True)
            )
        passes += CHECK
    return point, largest, passes


def _inverse_hessian_times(gradient: Tensor, moves: Tensor, changes: Tensor) -> Tensor:
    """Return L-BFGS's estimate, from steps and changes of the gradient ``(m, p)``; rows of zeros are skipped.

    The compact form of Byrd, Nocedal and Schnabel 1994: a dozen products whatever m is.
    """
    if not len(moves):
        return gradient
    products = moves @ changes.T
    diagonal = products.diagonal()
    upper = products.triu() + torch.diag((diagonal == 0).to(products.dtype))
    scale = diagonal[-1] / changes[-1].square().sum()
    scale = torch.where(scale > 0, scale, 1)
    part = torch.linalg.solve_triangular(upper, (moves @ gradient)[:, None], upper=True)[:, 0]
    rest = scale * (gradient - part @ changes)
    back = (diagonal * part - changes @ rest)[:, None]
    step: Tensor = rest + torch.linalg.solve_triangular(upper.T, back, upper=False)[:, 0] @ moves
    return step
