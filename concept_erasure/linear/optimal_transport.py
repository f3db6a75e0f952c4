"""Optimal transport between Gaussians that differ in their covariance only.

Pure functions on batches of symmetric positive semi-definite matrices; ``[...]`` stands for any
batch shape, and arguments broadcast. Each costs one or two symmetric eigendecompositions,
``O(d^3)`` time and ``O(d^2)`` memory per matrix, and is differentiable.

References:
    Alvarez-Esteban, del Barrio, Cuesta-Albertos, Matran 2016, "A fixed-point approach to
    barycenters in Wasserstein space" (arXiv:1511.05355), equations 7 and 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError

__all__ = [
    "is_positive_definite",
    "ot_barycenter",
    "ot_distance",
    "ot_map",
    "ot_midpoint",
    "psd_sqrt",
    "psd_sqrt_rsqrt",
]


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, as a row of shape ``[..., 1, d]`` and not negative, and vectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0.0).unsqueeze(-2), vectors


def _trace(matrix: Tensor) -> Tensor:
    return torch.einsum("...ii->...", matrix)


def is_positive_definite(A: Tensor) -> Tensor:
    """Say of each matrix of a batch whether it has a Cholesky factor.

    Args:
        A: Symmetric matrices, shape ``[..., d, d]``.

    Returns:
        Boolean tensor of shape ``[...]``.
    """
    info: Tensor = torch.linalg.cholesky_ex(A).info
    return info == 0


def psd_sqrt(A: Tensor) -> Tensor:
    """Return the positive semi-definite square root.

    Args:
        A: Symmetric PSD matrices, shape ``[..., d, d]``; eigenvalues below zero count as zero.

    Returns:
        Tensor ``B`` of the same shape with ``B @ B = A``.
    """
    values, vectors = _spectrum(A)
    return (vectors * values.sqrt()) @ vectors.mH


def psd_sqrt_rsqrt(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root and its pseudo-inverse from one eigendecomposition.

    Args:
        A: Symmetric PSD matrices, shape ``[..., d, d]``.

    Returns:
        ``(root, inverse_root)``, both ``[..., d, d]``. Eigenvalues up to ``d * eps`` times the
        largest one are treated as zero in the inverse.
    """
    values, vectors = _spectrum(A)
    cutoff = values[..., -1:] * (A.shape[-1] * torch.finfo(A.dtype).eps)
    kept = values > cutoff
    inverse = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    return (vectors * values.sqrt()) @ vectors.mH, (vectors * inverse) @ vectors.mH


def ot_map(K1: Tensor, K2: Tensor) -> Tensor:
    """Return the matrix that moves ``N(0, K1)`` onto ``N(0, K2)`` at the least expected cost.

    Args:
        K1: Source covariances, shape ``[..., d, d]``.
        K2: Target covariances, shape ``[..., d, d]``; broadcasts with ``K1``.

    Returns:
        The PSD matrices ``T`` with ``T @ K1 @ T = K2``, shape ``[..., d, d]``. If ``K1`` is
        singular, what it can reach: the target restricted to the support of ``K1``.
    """
    root, inverse = psd_sqrt_rsqrt(K1)
    return inverse @ psd_sqrt(root @ K2 @ root) @ inverse


def ot_distance(K1: Tensor, K2: Tensor) -> Tensor:
    """Return the 2-Wasserstein (Bures) distance between ``N(0, K1)`` and ``N(0, K2)``.

    Args:
        K1: Covariances, shape ``[..., d, d]``.
        K2: Covariances, shape ``[..., d, d]``; broadcasts with ``K1``.

    Returns:
        Distances, shape ``[...]``; rounding cannot make them NaN.
    """
    root = psd_sqrt(K1)
    cross = psd_sqrt(root @ K2 @ root)
    return (_trace(K1) + _trace(K2) - 2 * _trace(cross)).clamp_min(0.0).sqrt()


def ot_midpoint(K1: Tensor, K2: Tensor, w1: float = 0.5, w2: float = 0.5) -> Tensor:
    """Return the barycentre of two centred Gaussians in closed form.

    Args:
        K1: First covariances, shape ``[..., d, d]``.
        K2: Second covariances, shape ``[..., d, d]``.
        w1: Weight of the first; the weights are expected to sum to one.
        w2: Weight of the second.

    Returns:
        Covariances of the barycentre, shape ``[..., d, d]``.
    """
    root, inverse = psd_sqrt_rsqrt(K1)
    cross = root @ psd_sqrt(root @ K2 @ root) @ inverse
    return w1**2 * K1 + w2**2 * K2 + w1 * w2 * (cross + cross.mT)


def ot_barycenter(Ks: Tensor, weights: Tensor | None = None, *, max_iter: int = 100) -> Tensor:
    """Return the 2-Wasserstein barycentre of centred Gaussians by fixed-point iteration.

    Starts at the weighted arithmetic mean; the objective falls in every round (Alvarez-Esteban
    et al. 2016, theorem 4.2). Stops when a round moves the matrix by less than rounding error.

    Args:
        Ks: Covariances, shape ``[n, d, d]`` with ``n >= 2``.
        weights: Non-negative weights, shape ``[n]``; they are normalised. Default: equal.
        max_iter: Most rounds to run; each costs ``n + 1`` eigendecompositions.

    Returns:
        Covariance of the barycentre, shape ``[d, d]``.

    Raises:
        ShapeError: If there are fewer than two matrices, or not one weight for each.
    """
    if Ks.ndim != 3 or len(Ks) < 2:
        raise ShapeError(f"`Ks` must be [n, d, d] with n >= 2, got {tuple(Ks.shape)}")
    if weights is None:
        weights = Ks.new_ones(len(Ks))
    if weights.shape != Ks.shape[:1]:
        raise ShapeError(
            f"`weights` must have one entry for each of {len(Ks)} matrices, got "
            f"{tuple(weights.shape)}"
        )
    share = (weights / weights.sum()).to(Ks).view(-1, 1, 1)
    center = (share * Ks).sum(0)
    tol = 10 * Ks.shape[-1] * torch.finfo(Ks.dtype).eps
    for _ in range(max_iter):
        root, inverse = psd_sqrt_rsqrt(center)
        inner = (share * psd_sqrt(root @ Ks @ root)).sum(0)
        half = inverse @ inner
        moved = half @ half.mT
        step, size = torch.linalg.norm(moved - center), torch.linalg.norm(moved)
        center = moved
        if bool(step <= tol * size):
            break
    return center
