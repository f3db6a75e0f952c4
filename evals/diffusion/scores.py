"""Numbers from pictures that were drawn: distances between sets, harmonic means, similarities, EraseEval.

All are functions of features or labels that a judge gave, so any feature extractor will do; what one reports must name
it, since none of these numbers can be compared across extractors. Sums run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.report import Interval

__all__ = [
    "bootstrap", "clip_score", "cmmd", "frechet_distance", "harmonic_mean", "kernel_distance",
    "mace_celebrity_score", "mace_object_score", "mean_interval",
]  # fmt: skip


Distance = Literal["kernel", "cmmd"]


def _sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ShapeError(
            f"two sets of at least 2 features (n, d) are needed, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return a.double(), b.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of two sets as Gaussians, ``|m - m'|^2 + Tr(S + S' - 2 (S S')^(1/2))``.

    With n features of width d it needs n > d for covariances of full rank, and falls with n; compare equal n only
    (Heusel et al. 2017, arXiv:1706.08500).

    Args:
        a: Shape ``(n, d)``, n >= 2.
        b: Shape ``(m, d)``, m >= 2.

    Raises:
        ShapeError: If the widths differ or a set is too small.
    """
    a, b = _sets(a, b)
    left, right = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # S S' and S^(1/2) S' S^(1/2) have the same eigenvalues; the second is symmetric.
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(gap + left.trace() + right.trace() - 2 * cross))


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> float:
    """Return the unbiased squared MMD with the kernel ``(<a, b> / d + 1)^3``: KID without random subsets.

    It has no bias at any n, so it is the one to read below some thousand pictures; it can be negative
    (Binkowski et al. 2018, arXiv:1801.01401).

    Args:
        a: Shape ``(n, d)``, n >= 2.
        b: Shape ``(m, d)``, m >= 2.
        paired: Whether row i of both comes from the same prompt and noise. Such pairs are alike by construction and
            are left out of the cross term, as in the U-statistic of Gretton et al. 2012, Eq. 4; a set has distance 0
            from itself.

    Raises:
        ShapeError: If the widths differ, a set is too small, or paired sets differ in size.
    """
    a, b = _sets(a, b)
    if paired and len(a) != len(b):
        raise ShapeError(f"paired sets must be of one size, got {len(a)} and {len(b)}")
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_cubic(a, a), _cubic(b, b))]
    across = _cubic(a, b)
    n = len(a)
    cross = (across.sum() - across.trace()) / (n * (n - 1)) if paired else across.mean()
    return float(own[0] + own[1] - 2 * cross)


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0) -> float:
    """Return 1000 times the biased squared MMD of unit vectors with a Gaussian kernel (Jayasumana et al. 2024).

    Args:
        a: Embeddings of one set, shape ``(n, d)``; scaled to unit length here.
        b: Of the other, shape ``(m, d)``.
        sigma: Width of the kernel.

    Raises:
        ShapeError: If the widths differ or a set is too small.
    """
    a, b = _sets(a, b)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        # 1 - k, which is small: the kernel itself would round the difference of means away.
        return -torch.expm1((x @ y.T - 1) / sigma**2).mean()

    return 1000 * float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return cosines of pictures with their texts, raw, shape ``(n,)``.

    Args:
        images: Unit vectors, shape ``(n, d)``.
        texts: Unit vectors, shape ``(n, d)``.

    Raises:
        ShapeError: If the shapes differ.
    """
    if images.shape != texts.shape:
        raise ShapeError(
            f"a text for each picture is needed: {tuple(images.shape)}, {tuple(texts.shape)}"
        )
    return (images * texts).sum(1)


def harmonic_mean(*values: float) -> float:
    """Return the harmonic mean; 0 if a value is 0 or less.

    Raises:
        ValueError: If there are none.
    """
    if not values:
        raise ValueError("a mean needs at least one value, got none")
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def mace_object_score(erased: float, kept: float, synonyms: float) -> float:
    """Return MACE's ``H_o``, the harmonic mean of ``1 - erased``, ``kept`` and ``1 - synonyms`` (arXiv:2403.06135).

    Args:
        erased: Accuracy on the erased names, low is good.
        kept: Accuracy on other names.
        synonyms: Accuracy on other names of the erased.
    """
    return harmonic_mean(1 - erased, kept, 1 - synonyms)


def mace_celebrity_score(erased: float, kept: float) -> float:
    """Return MACE's ``H_c``, the harmonic mean of ``1 - erased`` and ``kept``.

    Args:
        erased: Accuracy on the erased names, low is good.
        kept: Accuracy on other names.
    """
    return harmonic_mean(1 - erased, kept)


def mean_interval(values: Sequence[float] | Tensor) -> Interval:
    """Return the mean of independent values with its 95 % normal interval.

    Raises:
        ValueError: If there are fewer than two.
    """
    return Interval.of_mean([float(value) for value in values])


def bootstrap(
    a: Tensor,
    b: Tensor,
    *,
    distance: Distance = "kernel",
    paired: bool = False,
    rounds: int = 100,
    seed: int = 0,
) -> Interval:
    """Return a distance of two sets with a 95 % interval: estimate and spread of resampled estimates.

    Resampling repeats rows, which pulls a distance up; so only the spread is taken from it, not the middle.

    Args:
        a: Shape ``(n, d)``.
        b: Shape ``(m, d)``.
        distance: ``"kernel"`` (`kernel_distance`) or ``"cmmd"``.
        paired: Whether rows belong together; they are resampled together then.
        rounds: Resamples.
        seed: Of the resamples.

    Raises:
        ValueError: If the distance is unknown or there are fewer than two rounds.
        ShapeError: If the widths differ, a set is too small, or paired sets differ in size.
    """
    if distance not in get_args(Distance) or rounds < 2:
        raise ValueError(
            f"distance must be one of {get_args(Distance)} and rounds >= 2; got {distance!r}, {rounds}"
        )

    def measure(x: Tensor, y: Tensor) -> float:
        return kernel_distance(x, y, paired=paired) if distance == "kernel" else cmmd(x, y)

    middle = measure(a, b)
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(rounds, dtype=torch.float64)
    for turn in range(rounds):
        i = torch.randint(len(a), (len(a),), generator=generator)
        j = i if paired else torch.randint(len(b), (len(b),), generator=generator)
        found[turn] = measure(a[i.to(a.device)], b[j.to(b.device)])
    half = NormalDist().inv_cdf(0.975) * math.sqrt(found.var().item())
    return Interval(middle, middle - half, middle + half)
