"""Quadratic erasure (QLEACE): equal class means and class covariances at the least transport cost.

Each class is moved onto the Wasserstein barycentre of the classes by its Gaussian optimal transport
map. On the data of the fit, linear and quadratic probes of the class are left at chance. The labels
are needed when erasing.

Method: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form"
(arXiv:2306.03819), appendix on quadratic erasure. Reference implementation: EleutherAI
concept-erasure 0.2.4.

Deviations from it: the common mean is weighted by the class sizes, so the mean of the data stays
where it was; covariances are shrunk only when asked for or when a class has no more samples than
dimensions, since a map made from a shrunk covariance no longer equalises the sample's covariances;
statistics accumulate in float64.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from concept_erasure.eraser import Eraser, EraserConfig
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import as_tensor
from concept_erasure.linalg import optimal_linear_shrinkage
from concept_erasure.linear.groupby import groupby
from concept_erasure.linear.optimal_transport import ot_barycenter, ot_map, ot_midpoint

__all__ = ["QuadraticConfig", "QuadraticEditor", "QuadraticEraser", "QuadraticFitter"]

Shrinkage = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class QuadraticConfig(EraserConfig):
    """Options of the fit, see `QuadraticFitter`."""

    shrinkage: Shrinkage = "auto"


@dataclass(frozen=True, repr=False, eq=False)
class QuadraticEraser(Eraser):
    """The fitted maps; needs the class of every row.

    Attributes:
        class_means: Class centroids, shape ``[k, d]``.
        global_mean: Mean that every class gets, shape ``[d]``.
        ot_maps: Symmetric transport matrices to the barycentre, shape ``[k, d, d]``.
    """

    method: ClassVar[str] = "quadratic"
    config_type: ClassVar[type[EraserConfig]] = QuadraticConfig

    class_means: Tensor
    global_mean: Tensor
    ot_maps: Tensor

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
    ) -> QuadraticEraser:
        """Fit on data in memory; see `QuadraticFitter` for the arguments and errors."""
        return QuadraticFitter.fit(x, z, device=device, dtype=dtype, shrinkage=shrinkage).eraser

    def optimal_transport(self, z: int, x: Tensor) -> Tensor:
        """Move rows of class ``z`` to the barycentre.

        Args:
            z: Class of all rows.
            x: Rows, shape ``[..., d]``.

        Returns:
            Tensor of the shape, dtype and device of ``x``.
        """
        _check_class(z, len(self.class_means))
        return _move(x, self.class_means[z], self.ot_maps[z], self.global_mean)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Erase the class from every row.

        Args:
            x: Rows, shape ``[n, d]`` or ``[..., d]``.
            z: Classes, integers, one for each row: shape ``x.shape[:-1]``.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If ``z`` does not have one label per row.
            ValueError: If a label is not one of the fitted classes.
        """
        rows, labels = _rows(x, z, self.class_means.shape[-1])
        return groupby(rows, labels).map(self.optimal_transport).coalesce().view(x.shape)

    def _check(self) -> None:
        k, d = self.class_means.shape
        if self.global_mean.shape != (d,) or self.ot_maps.shape != (k, d, d):
            raise ShapeError(
                f"class_means {(k, d)} needs global_mean {(d,)} and ot_maps {(k, d, d)}; got "
                f"{tuple(self.global_mean.shape)} and {tuple(self.ot_maps.shape)}"
            )


@dataclass(frozen=True)
class QuadraticEditor:
    """Moves rows from one class to another: what they would be, had they been of that class.

    Attributes:
        class_means: Class centroids, shape ``[k, d]``.
        ot_maps: Transport matrices, shape ``[k, k, d, d]``, indexed by source, then target.
    """

    class_means: Tensor
    ot_maps: Tensor

    def transport(self, x: Tensor, source_z: int, target_z: int) -> Tensor:
        """Move rows of class ``source_z`` to class ``target_z``.

        Args:
            x: Rows, shape ``[..., d]``.
            source_z: Class of all rows.
            target_z: Class to move to.

        Returns:
            Tensor of the shape, dtype and device of ``x``.
        """
        for label in (source_z, target_z):
            _check_class(label, len(self.class_means))
        matrix = self.ot_maps[source_z, target_z]
        return _move(x, self.class_means[source_z], matrix, self.class_means[target_z])

    def __call__(self, x: Tensor, source_z: Tensor, target_z: int) -> Tensor:
        """Move every row from its own class to ``target_z``.

        Args:
            x: Rows, shape ``[..., d]``.
            source_z: Classes, integers, shape ``x.shape[:-1]``.
            target_z: Class to move to.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If ``source_z`` does not have one label per row.
            ValueError: If a label is not one of the fitted classes.
        """
        rows, labels = _rows(x, source_z, self.class_means.shape[-1])
        split = groupby(rows, labels)
        return split.map(lambda z, g: self.transport(g, z, target_z)).coalesce().view(x.shape)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> QuadraticEditor:
        """Return a copy on another device or of another dtype."""
        means = self.class_means.to(device=device, dtype=dtype)
        return QuadraticEditor(means, self.ot_maps.to(device=device, dtype=dtype))


class QuadraticFitter:
    """Streaming class means and covariances, and the erasers made from them.

    Memory: ``k * d^2`` numbers; an editor holds ``k^2 * d^2``.

    Attributes:
        mean_x: Running class means, shape ``[k, d]``.
        sigma_xx_: Running sums of centred squares, shape ``[k, d, d]``.
        n: Samples seen of each class, shape ``[k]``.
    """

    mean_x: Tensor
    sigma_xx_: Tensor
    n: Tensor

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
    ) -> QuadraticFitter:
        """Return a fitter that has seen ``x``, shape ``[n, d]``, with labels ``z``, shape ``[n]``.

        The number of classes is the largest label plus one.
        """
        x, z = as_tensor(x), as_tensor(z, name="z")
        if z.numel() < 2:
            raise ValueError(f"at least 2 rows are needed to fit, got {z.numel()}")
        fitter = cls(
            x.shape[-1],
            int(z.max()) + 1,
            device=x.device if device is None else device,
            dtype=dtype,
            shrinkage=shrinkage,
        )
        return fitter.update(x, z)

    def __init__(
        self,
        x_dim: int,
        num_classes: int,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
    ) -> None:
        """Start with no data.

        Args:
            x_dim: Width ``d``.
            num_classes: Number of classes ``k``; labels are ``0 .. k-1``.
            device: Device of the statistics.
            dtype: Floating type of the statistics. Default: float64.
            shrinkage: Pull each covariance towards a multiple of the identity. ``"auto"``: only
                if some class has no more samples than dimensions, with a warning. Shrinking makes
                the maps steadier on new data and leaves quadratic traces in the data of the fit.

        Raises:
            ValueError: If a size is not positive.
        """
        if x_dim < 1 or num_classes < 1:
            raise ValueError(
                f"`x_dim` and `num_classes` must be positive, got {x_dim} and {num_classes}"
            )
        dtype = torch.float64 if dtype is None else dtype
        self.num_classes = num_classes
        self.shrinkage = shrinkage
        self.mean_x = torch.zeros(num_classes, x_dim, device=device, dtype=dtype)
        self.n = torch.zeros(num_classes, device=device, dtype=dtype)
        self.sigma_xx_ = torch.zeros(num_classes, x_dim, x_dim, device=device, dtype=dtype)
        self._eraser: QuadraticEraser | None = None

    def update(self, x: Tensor, z: Tensor) -> QuadraticFitter:
        """Add rows ``x``, shape ``[..., d]``, of classes ``z``, shape ``x.shape[:-1]``.

        Raises:
            ShapeError: If the shapes disagree.
            ValueError: If a label is out of range or ``x`` holds NaN or infinities.
        """
        rows, labels = _rows(x, z, self.mean_x.shape[-1])
        _check_finite(rows)
        for label, piece in groupby(rows, labels):
            self.update_single(piece, label)
        return self

    @torch.no_grad()
    def update_single(self, x: Tensor, z: int) -> QuadraticFitter:
        """Add rows ``x``, shape ``[..., d]``, all of class ``z``."""
        _check_class(z, self.num_classes)
        rows = x.reshape(-1, x.shape[-1]).to(self.mean_x)
        if rows.shape[-1] != self.mean_x.shape[-1]:
            raise ShapeError(f"expected width {self.mean_x.shape[-1]}, got {rows.shape[-1]}")
        _check_finite(rows)
        if len(rows) == 0:
            return self
        total = self.n[z] + len(rows)
        mean = rows.mean(0)
        shift = mean - self.mean_x[z]
        rows = rows - mean
        self.sigma_xx_[z] += rows.mT @ rows
        self.sigma_xx_[z] += torch.outer(shift, shift) * (self.n[z] * len(rows) / total)
        self.mean_x[z] += shift * (len(rows) / total)
        self.n[z] = total
        self._eraser = None
        return self

    def editor(self, device: str | torch.device | None = None) -> QuadraticEditor:
        """Return the editor between all pairs of classes, on ``device``."""
        sigma = self.sigma_xx
        maps = ot_map(sigma[:, None], sigma)
        return QuadraticEditor(self.mean_x.clone(), maps).to(device)

    @property
    def eraser(self) -> QuadraticEraser:
        """The eraser for what was seen so far; computed once and kept until the next update.

        Raises:
            NotFittedError: If a class has fewer than two samples.
        """
        if self._eraser is None:
            sigma = self.sigma_xx
            if self.num_classes == 1:
                warnings.warn(
                    "there is one class only (is the label constant?): the eraser is the identity",
                    ErasureWarning,
                    stacklevel=2,
                )
            prior = self.n / self.n.sum()
            center = _barycenter(sigma, prior)
            maps = ot_map(sigma, center)
            if self.num_classes == 1:
                maps = torch.eye(len(center)).to(maps)[None]
            sample = self.sigma_xx_ / (self.n.view(-1, 1, 1) - 1)
            spread = (maps @ sample @ maps - center).flatten(1).norm(dim=1).max()
            size = center.norm().clamp_min(torch.finfo(center.dtype).tiny)
            self._eraser = QuadraticEraser(
                self.mean_x.clone(),
                prior @ self.mean_x,
                maps,
                config=QuadraticConfig(shrinkage=self.shrinkage),
                report={"n_per_class": self.n.tolist(), "residual": float(spread / size)},
            )
        return self._eraser

    @property
    def sigma_xx(self) -> Tensor:
        """Class covariances, shape ``[k, d, d]``, divided by ``n - 1``, or shrunk.

        Raises:
            NotFittedError: If a class has fewer than two samples.
        """
        few = [i for i, n in enumerate(self.n.tolist()) if n < 2]
        if few:
            raise NotFittedError(
                f"classes {few} have fewer than two samples, so no covariance; give more data, or "
                "number the classes without gaps"
            )
        total = (self.sigma_xx_ + self.sigma_xx_.mT) / 2
        count = self.n.view(-1, 1, 1)
        shrink, width = self.shrinkage, self.mean_x.shape[-1]
        if shrink == "auto":
            shrink = bool((self.n <= width).any())
            if shrink:
                warnings.warn(
                    f"the smallest class has {int(self.n.min())} samples for {width} dimensions: "
                    "covariances are shrunk, and a quadratic probe may do better than chance",
                    ErasureWarning,
                    stacklevel=3,
                )
        if not shrink:
            return total / (count - 1)
        return torch.stack(
            [optimal_linear_shrinkage(s, n) for s, n in zip(total / count, self.n, strict=True)]
        )


def _barycenter(sigma: Tensor, prior: Tensor) -> Tensor:
    """Return the barycentre, shape ``[d, d]``: in closed form for two classes."""
    if len(sigma) == 1:
        return sigma[0]
    if len(sigma) == 2:
        first, second = prior.tolist()
        return ot_midpoint(sigma[0], sigma[1], first, second)
    return ot_barycenter(sigma, prior)


def _check_class(z: int, k: int) -> None:
    if not 0 <= z < k:
        raise ValueError(f"class {z} is out of range; the fitted classes are 0 .. {k - 1}")


def _check_finite(rows: Tensor) -> None:
    bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"x has {len(bad)} rows with NaN or infinite values; the first is row {int(bad[0])}"
        )


def _rows(x: Tensor, z: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` as ``[n, d]`` and ``z`` as ``[n]``, or say how they disagree."""
    x, z = as_tensor(x), as_tensor(z, name="z")
    if x.ndim < 1 or x.shape[-1] != width:
        raise ShapeError(f"expected rows of width {width}, got x of shape {tuple(x.shape)}")
    rows = x.reshape(x.shape[:-1].numel(), width)
    labels = z.reshape(-1)
    if len(labels) != len(rows):
        raise ShapeError(f"got {len(rows)} rows in x and {len(labels)} labels in z")
    return rows, labels


def _move(x: Tensor, source: Tensor, matrix: Tensor, target: Tensor) -> Tensor:
    """Return ``(x - source) @ matrix.T + target`` in the wider dtype, cast back to that of x."""
    work = torch.promote_types(x.dtype, matrix.dtype)
    moved = (x.to(work) - source.to(work)) @ matrix.to(work).mT + target.to(work)
    return moved.to(x.dtype)
