"""Synthetic samples and plain float64 formulas the tests compare the library with."""

from __future__ import annotations

import torch
from torch import Tensor

from concept_erasure.testing import make_data


def sample(rows: int, width: int, classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ``x (rows, width)`` float64 and class labels ``z (rows,)``."""
    return make_data(rows, width, classes, seed)


def one_hot(z: Tensor, classes: int) -> Tensor:
    """Return ``(n, classes)`` float64."""
    return torch.nn.functional.one_hot(z, classes).double()


def cross_covariance(x: Tensor, z: Tensor) -> Tensor:
    """Return ``Cov(x, z)``, shape ``(d, c)``, both sides centred."""
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def residual(matrix: Tensor, x: Tensor, z: Tensor) -> float:
    """Return ``||P A|| / ||A||`` in the Frobenius norm."""
    cross = cross_covariance(x, z)
    return float(torch.linalg.matrix_norm(matrix @ cross) / torch.linalg.matrix_norm(cross))


def class_gap(x: Tensor, z: Tensor) -> float:
    """Return the largest distance of a class mean from the mean."""
    mean = x.mean(0)
    return max(float((x[z == j].mean(0) - mean).norm()) for j in z.unique())


def edit_size(before: Tensor, after: Tensor) -> float:
    """Return the mean squared distance of the edit."""
    return float((after - before).square().sum(-1).mean())


def square_root_projection(x: Tensor, z: Tensor) -> Tensor:
    """Return LEACE's projection as in the paper: whiten, project, unwhiten."""
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(x))
    whiten = vectors * values.rsqrt() @ vectors.T
    colour = vectors * values.sqrt() @ vectors.T
    left, strength, _ = torch.linalg.svd(whiten @ cross_covariance(x, z), full_matrices=False)
    left = left[:, strength > 1e-10 * strength[0]]
    return torch.eye(x.shape[1], dtype=x.dtype) - colour @ left @ left.T @ whiten
