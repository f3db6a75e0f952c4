"""Independent solutions of small problems by cvxpy (extra ``certify``), to check this library's closed forms with."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from concept_erasure.errors import missing_extra
from concept_erasure.fantope import fantope_projection
from concept_erasure.linalg import LowRankAffine, Moments
from concept_erasure.linear._rlace_data import QUOTIENTS, Frame, Rows
from concept_erasure.linear.games import Game, best_response
from concept_erasure.linear.leace import LeaceEraser

__all__ = [
    "LARGEST",
    "certificate",
    "fantope_oracle",
    "least_squares_oracle",
    "relaxed_value_oracle",
]

LARGEST = 64  # width up to which these problems are solved in seconds
LARGEST_SCORES = 40_000  # rows times columns of z


def _cvxpy() -> ModuleType:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise missing_extra("cvxpy", "certify") from error


def _check_width(width: int) -> None:
    if width > LARGEST:
        raise ValueError(f"certificates are for at most {LARGEST} dimensions; got {width}")


def fantope_oracle(S: Tensor, k: int) -> Tensor:
    """Return the nearest point of the Fantope by a semidefinite programme.

    Args:
        S: Symmetric matrix, shape ``(d, d)``.
        k: Trace of the result.

    Raises:
        ImportError: If cvxpy is not installed.
        ValueError: If d is too large, or the solver fails.
    """
    cp = _cvxpy()
    width = S.shape[0]
    _check_width(width)
    q = cp.Variable((width, width), symmetric=True)
    target = S.detach().double().cpu().numpy()
    inside = [q >> 0, np.eye(width) - q >> 0, cp.trace(q) == k]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(q - target)), inside)
    problem.solve(solver=cp.SCS, eps=1e-9, max_iters=200_000)
    return _solution(q.value, S)


def least_squares_oracle(sigma_xx: Tensor, sigma_xz: Tensor) -> Tensor:
    """Return the matrix P with ``P sigma_xz = 0`` and the least ``|(P - I) sigma_xx^{1/2}|_F``.

    This is LEACE's definition (Belrose et al. 2023, theorem 4.2), solved as it stands.

    Args:
        sigma_xx: Covariance, shape ``(d, d)``, positive definite.
        sigma_xz: Cross-covariance, shape ``(d, c)``.

    Raises:
        ImportError: If cvxpy is not installed.
        ValueError: If d is too large, or the solver fails.
    """
    cp = _cvxpy()
    width = sigma_xx.shape[0]
    _check_width(width)
    values, vectors = np.linalg.eigh(sigma_xx.detach().double().cpu().numpy())
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    left, strength, _ = np.linalg.svd(sigma_xz.detach().double().cpu().numpy())
    concept = left[:, : int((strength > 1e-10 * strength[0]).sum())]
    p = cp.Variable((width, width))
    cost = cp.sum_squares((p - np.eye(width)) @ (root / np.sqrt(values.max())))
    problem = cp.Problem(cp.Minimize(cost), [p @ concept == 0])
    problem.solve(solver=cp.OSQP, eps_abs=1e-10, eps_rel=1e-10, max_iter=200_000, polishing=True)
    return _solution(p.value, sigma_xx)


def relaxed_value_oracle(game: Game, q: Tensor) -> float:
    """Return the predictor's optimal value against a fixed point of the Fantope, by a conic programme.

    For a projection ``q = V V^T`` this is the value of the game at V.

    Args:
        game: Data, loss and penalty.
        q: The removed matrix, shape ``(d, d)``; need not be a projection.

    Raises:
        ImportError: If cvxpy is not installed.
        ValueError: If the problem is too large, or the solver fails.
    """
    cp = _cvxpy()
    columns, n = game.z.shape
    _check_width(q.shape[0])
    if n * columns > LARGEST_SCORES:
        raise ValueError(
            f"certificates are for at most {LARGEST_SCORES} rows x columns of z; got {n} x {columns}"
        )
    kept = (game.x - game.x @ q.to(game.x)).double().cpu().numpy()
    z = game.z.T.double().cpu().numpy()
    theta, bias = cp.Variable((kept.shape[1], columns)), cp.Variable((1, columns))
    scores = kept @ theta + np.ones((n, 1)) @ bias
    if game.loss == "squared":
        loss = cp.sum_squares(scores - z)
    elif game.loss == "cross_entropy":
        loss = cp.sum(cp.log_sum_exp(scores, axis=1)) - cp.sum(cp.multiply(z, scores))
    else:
        loss = cp.sum(cp.logistic(scores)) - cp.sum(cp.multiply(z, scores))
    problem = cp.Problem(cp.Minimize(loss / n + game.penalty * cp.sum_squares(theta)))
    problem.solve(solver=cp.CLARABEL)
    if problem.value is None:
        raise ValueError(f"the solver failed: {problem.status}")
    return float(problem.value)


def certificate(rows: Rows, map_: LowRankAffine, penalty: float) -> dict[str, float]:
    """Return how far cvxpy's solutions of a fit's problems are from this library's.

    Args:
        rows: What R-LACE was fitted on.
        map_: What came out.
        penalty: Of the game.

    Returns:
        The largest differences: of the Fantope projection, of LEACE, and of the game's value at the solution (for
        losses that have a game), together with that value.

    Raises:
        ImportError: If cvxpy is not installed.
        ValueError: If the problem is too large, or the solver fails.
    """
    moments = Moments(rows.x.shape[1], rows.width, device=rows.x.device)
    moments.update(rows.x, rows.encoded)
    cross = moments.sigma_xz
    target = cross @ cross.T / cross.square().sum().clamp_min(torch.finfo(cross.dtype).tiny)
    target, k = target + map_.left @ map_.left.T, max(1, map_.rank)
    gap = fantope_projection(target, k) - fantope_oracle(target, k)
    ours = LeaceEraser.fit(rows.x, rows.encoded, shrinkage=False).P.to(cross)
    theirs = least_squares_oracle(moments.sigma_xx, cross)
    out = {
        "certificate_fantope": float(gap.abs().max()),
        "certificate_leace": float((ours - theirs).abs().max()),
    }
    if rows.loss not in QUOTIENTS:
        frame = replace(Frame.of(rows), basis=None)
        game, v = frame.game(rows, penalty), map_.left
        value = relaxed_value_oracle(game, v @ v.T)
        out["certificate_value"] = abs(float(best_response(game, v).value) - value) * frame.unit
        out["oracle_value"] = value * frame.unit
    return out


def _solution(value: object, like: Tensor) -> Tensor:
    if value is None:
        raise ValueError("the solver failed; is the problem well scaled?")
    return torch.as_tensor(np.asarray(value)).to(like)
