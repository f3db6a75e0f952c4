"""Oracle LEACE: remove a concept from rows whose labels are known when erasing.

Subtracts from ``x`` the part that the least-squares regression of ``x`` on ``z`` explains, so every
class mean becomes the global mean. No eraser that guards ``z`` linearly changes the data less.

Method: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form"
(arXiv:2306.03819), oracle theorem. Reference implementation: EleutherAI concept-erasure 0.2.4.

Deviations from it: the pseudo-inverse of the covariance of ``z`` is taken of the correlations with
a relative tolerance (an absolute one of 0.01 leaves rare classes in place); more than two integer
labels are classes, not one number; statistics accumulate in float64.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from concept_erasure.eraser import Eraser, EraserConfig
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import as_tensor, encode_labels
from concept_erasure.linalg import Moments, optimal_linear_shrinkage

__all__ = ["OracleConfig", "OracleEraser", "OracleFitter", "oracle_coefficients"]

RELATIVE_TOLERANCE = 1e-10


def oracle_coefficients(sigma_xz: Tensor, sigma_zz: Tensor, *, rtol: float | None = None) -> Tensor:
    """Return the coefficients of the regression of x on z, ``sigma_xz sigma_zz^+``.

    Columns of z are scaled to unit variance first, so their units do not matter.

    Args:
        sigma_xz: Cross-covariance, shape ``[d, c]``.
        sigma_zz: Covariance of z, shape ``[c, c]``.
        rtol: Eigenvalues of the correlation matrix of z below ``rtol`` times the largest count as
            zero. Higher is steadier and leaves more of nearly collinear concepts. Default: 1e-10.

    Returns:
        Tensor of shape ``[d, c]``.
    """
    variance = sigma_zz.diagonal().clamp_min(0)
    scale = torch.where(variance > 0, variance.rsqrt(), torch.zeros_like(variance))
    rtol = RELATIVE_TOLERANCE if rtol is None else rtol
    correlation = scale[:, None] * sigma_zz * scale
    inverse: Tensor = torch.linalg.pinv(correlation, rtol=rtol, hermitian=True)
    return (sigma_xz * scale) @ inverse * scale


@dataclass(frozen=True, kw_only=True)
class OracleConfig(EraserConfig):
    """Options of the fit, see `OracleFitter`."""

    shrinkage: bool = False
    svd_tol: float | None = None


@dataclass(frozen=True, repr=False, eq=False)
class OracleEraser(Eraser):
    """The fitted regression of x on z.

    Attributes:
        coef: Coefficients, shape ``[d, c]``.
        mean_z: Mean of the labels, shape ``[c]``.
        classes: The class ids that the columns stand for, shape ``[c]``, int64; None when labels
            are used as numbers.
    """

    method: ClassVar[str] = "oracle"
    config_type: ClassVar[type[EraserConfig]] = OracleConfig

    coef: Tensor
    mean_z: Tensor
    classes: Tensor | None = None

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
    ) -> OracleEraser:
        """Fit on data in memory; see `OracleFitter.fit` for the arguments and errors.

        Example:
            >>> import torch
            >>> x, z = torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
            >>> OracleEraser.fit(x, z)(x, z).flatten()
            tensor([2.5000, 4.5000, 2.5000, 4.5000])
        """
        return OracleFitter.fit(
            x, z, device=device, dtype=dtype, shrinkage=shrinkage, svd_tol=svd_tol
        ).eraser

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return ``x`` without what ``z`` explains.

        Args:
            x: Rows, shape ``[..., d]``, floating point.
            z: Labels of the rows in the form used for fitting: shape ``x.shape[:-1]`` for class
                ids or a single column, ``[..., c]`` otherwise.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If the shapes disagree with each other or with the fit.
            ValueError: If a class id was not seen when fitting.
        """
        x, z = as_tensor(x), as_tensor(z, name="z")
        width, columns = self.coef.shape
        if x.ndim < 1 or x.shape[-1] != width:
            raise ShapeError(f"expected rows of width {width}, got x of shape {tuple(x.shape)}")
        rows = x.reshape(-1, width)
        labels = _columns(z.to(x.device), len(rows), columns, self.classes)
        work = torch.promote_types(x.dtype, self.coef.dtype)
        coef, mean = self.coef.to(x.device, work), self.mean_z.to(x.device, work)
        explained = (labels.to(work) - mean) @ coef.mT
        return (rows.to(work) - explained).to(x.dtype).view(x.shape)

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        return {"classes"}

    def _check(self) -> None:
        columns = self.coef.shape[-1:]
        named = columns if self.classes is None else self.classes.shape
        if self.coef.ndim != 2 or self.mean_z.shape != columns or named != columns:
            raise ShapeError(
                f"coef must be [d, c] and mean_z and classes [c]; got {tuple(self.coef.shape)}, "
                f"{tuple(self.mean_z.shape)} and {tuple(named)}"
            )


class OracleFitter:
    """Streaming statistics for an `OracleEraser`; ``O(d c)`` memory, no covariance of x.

    Attributes:
        x_dim: Width ``d``.
        z_dim: Number of concept columns ``c``.
        moments: The running means and covariances.
    """

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
    ) -> OracleFitter:
        """Return a fitter that has seen the data.

        Args:
            x: Rows, shape ``[n, d]`` or ``[..., d]``.
            z: Labels: class ids of shape ``x.shape[:-1]`` (integers or bool), one real column of
                the same shape, or columns ``[..., c]``.
            device: See the constructor. Default: that of ``x``.
            dtype: See the constructor.
            shrinkage: See the constructor.
            svd_tol: See the constructor.

        Raises:
            ShapeError: If the shapes disagree.
            TypeError: If x or z do not hold numbers.
            ValueError: If there are fewer than two rows, or values are not finite.
        """
        x, z = as_tensor(x), as_tensor(z, name="z")
        if x.ndim < 2:
            raise ShapeError(f"x must have shape (n, d) or (..., d), got {tuple(x.shape)}")
        if (rows_given := x.shape[:-1].numel()) < 2:
            raise ValueError(f"at least 2 rows are needed to fit, got {rows_given}")
        rows = x.reshape(-1, x.shape[-1])
        classes: Tensor | None = None
        values = z.reshape(len(rows), -1) if z.ndim > 1 and z.shape != x.shape[:-1] else z.flatten()
        if len(values) != len(rows):
            raise ShapeError(f"got {len(rows)} rows in x and {len(values)} labels in z")
        if values.ndim == 1 and not values.is_floating_point():
            names = encode_labels(values, n=len(rows)).names
            if len(names) > 2:
                classes = torch.tensor([int(name) for name in names])
        columns = len(classes) if classes is not None else values.reshape(len(rows), -1).shape[1]
        fitter = cls(
            x.shape[-1],
            columns,
            device=x.device if device is None else device,
            dtype=dtype,
            shrinkage=shrinkage,
            svd_tol=svd_tol,
        )
        fitter.classes = classes
        return fitter.update(rows, values)

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
    ) -> None:
        """Start with no data.

        Args:
            x_dim: Width ``d``.
            z_dim: Number of concept columns; with class ids, the number of classes.
            device: Device of the statistics.
            dtype: Floating type of the statistics. Default: float64.
            shrinkage: Pull the covariance of z towards a multiple of the identity. The concept is
                then no longer removed exactly.
            svd_tol: Relative tolerance of the pseudo-inverse, see `oracle_coefficients`.

        Raises:
            ValueError: If a size or the tolerance is not positive.
        """
        if svd_tol is not None and svd_tol <= 0:
            raise ValueError(f"`svd_tol` must be positive, got {svd_tol}; leave it out for 1e-10")
        self.x_dim, self.z_dim = x_dim, z_dim
        self.shrinkage, self.svd_tol = shrinkage, svd_tol
        self.classes: Tensor | None = None
        self.moments = Moments(x_dim, z_dim, covariance=False, device=device, dtype=dtype)
        self._eraser: OracleEraser | None = None

    @torch.no_grad()
    def update(self, x: Tensor, z: Tensor) -> OracleFitter:
        """Add rows.

        Args:
            x: Rows, shape ``[..., d]``.
            z: Labels as in `OracleEraser.__call__`; integers of shape ``x.shape[:-1]`` are class
                ids ``0 .. z_dim-1`` when ``z_dim > 1``.

        Raises:
            ShapeError: If the shapes disagree.
            ValueError: If values are not finite or a class id is out of range.
        """
        if x.ndim < 1 or x.shape[-1] != self.x_dim:
            raise ShapeError(f"expected rows of width {self.x_dim}, got {tuple(x.shape)}")
        rows = x.reshape(-1, self.x_dim)
        self.moments.update(rows, _columns(z, len(rows), self.z_dim, self.classes))
        self._eraser = None
        return self

    def merge(self, other: OracleFitter) -> OracleFitter:
        """Add what another fitter has seen."""
        mine, theirs = (None if f.classes is None else f.classes.tolist() for f in (self, other))
        if mine != theirs:
            raise ValueError(f"the fitters disagree on classes: {mine} and {theirs}")
        self.moments.merge(other.moments)
        self._eraser = None
        return self

    @property
    def n(self) -> float:
        """Number of rows seen."""
        return self.moments.n

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, shape ``[d]``."""
        return self.moments.mean_x

    @property
    def mean_z(self) -> Tensor:
        """Mean of z, shape ``[c]``."""
        return self.moments.mean_z

    def _bessel(self) -> float:
        if self.n <= 1:
            raise NotFittedError(f"need at least 2 rows, got {self.n:g}; call update(x, z) first")
        return self.n / (self.n - 1)

    @property
    def sigma_xz(self) -> Tensor:
        """Cross-covariance, shape ``[d, c]``, divided by ``n - 1``."""
        return self._bessel() * self.moments.sigma_xz

    @property
    def sigma_zz(self) -> Tensor:
        """Covariance of z, shape ``[c, c]``, divided by ``n - 1``, or shrunk."""
        factor, sigma = self._bessel(), self.moments.sigma_zz
        return optimal_linear_shrinkage(sigma, self.n) if self.shrinkage else factor * sigma

    @property
    def eraser(self) -> OracleEraser:
        """The eraser for what was seen so far; computed once and kept until the next update.

        Raises:
            NotFittedError: If fewer than two rows were seen.
        """
        if self._eraser is None:
            sigma_xz, sigma_zz = self.sigma_xz, self.sigma_zz
            coef = oracle_coefficients(sigma_xz, sigma_zz, rtol=self.svd_tol)
            left_over = (sigma_xz - coef @ (self._bessel() * self.moments.sigma_zz)).norm()
            tiny = torch.finfo(coef.dtype).tiny
            if not bool(sigma_xz.any()):
                warnings.warn(
                    "x is not correlated with z (is the label constant?): the eraser is the identity",
                    ErasureWarning,
                    stacklevel=2,
                )
            self._eraser = OracleEraser(
                coef,
                self.mean_z.clone(),
                self.classes,
                config=OracleConfig(shrinkage=self.shrinkage, svd_tol=self.svd_tol),
                report={
                    "n": self.n,
                    "residual": float(left_over / sigma_xz.norm().clamp_min(tiny)),
                },
            )
        return self._eraser


def _columns(z: Tensor, n: int, c: int, classes: Tensor | None) -> Tensor:
    """Return labels as ``[n, c]``, float64 for class ids."""
    ids = c > 1 and z.numel() == n and not z.is_floating_point()
    if not ids:
        if z.numel() != n * c:
            raise ShapeError(f"for {n} rows and {c} concept columns, z has shape {tuple(z.shape)}")
        columns = z.reshape(n, c)
        return columns if columns.is_floating_point() else columns.double()
    known = torch.arange(c, device=z.device) if classes is None else classes.to(z.device)
    match = z.reshape(n, 1).long() == known
    unknown = z.reshape(n)[~match.any(1)]
    if len(unknown):
        raise ValueError(
            f"unknown class ids {unknown.unique().tolist()[:5]}; known: {known.tolist()}"
        )
    return match.double()
