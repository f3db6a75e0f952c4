"""Oracle LEACE: remove a concept from rows whose labels are known when erasing.

Subtracts from ``x`` the part that the least-squares regression of ``x`` on ``z`` explains, so every
class mean becomes the global mean. No eraser that guards ``z`` linearly changes the data less.

Method: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form"
(arXiv:2306.03819), oracle theorem. Reference implementation: EleutherAI concept-erasure 0.2.4.

Deviations from it: the pseudo-inverse of the covariance of ``z`` is taken of the correlations with
a relative tolerance (an absolute one of 0.01 leaves rare classes in place); strings, and more than two
integers, are classes, not one number; statistics accumulate in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import class_indices, is_text, labels_per_row, read_data
from concept_erasure.eraser import Eraser, EraserConfig
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import LabelKind, as_tensor
from concept_erasure.linalg import Moments, optimal_linear_shrinkage
from concept_erasure.sites import Space

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
    """Options of the fit, see `OracleFitter`.

    Attributes:
        classes: Names of the classes that the columns of the eraser stand for; empty for numbers.
    """

    shrinkage: bool = False
    svd_tol: float | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))


@dataclass(frozen=True, repr=False, eq=False)
class OracleEraser(Eraser):
    """The fitted regression of x on z.

    Attributes:
        coef: Coefficients, shape ``[d, c]``.
        mean_z: Mean of the labels, shape ``[c]``.
    """

    method: ClassVar[str] = "oracle"
    config_type: ClassVar[type[EraserConfig]] = OracleConfig

    coef: Tensor
    mean_z: Tensor

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
        z_kind: LabelKind = "auto",
    ) -> OracleEraser:
        """Fit on data in memory; see `OracleFitter.fit` for the arguments and errors.

        Example:
            >>> import torch
            >>> x, z = torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1])
            >>> OracleEraser.fit(x, z)(x, z).flatten()
            tensor([2.5000, 4.5000, 2.5000, 4.5000])
        """
        return OracleFitter.fit(
            x, z, device=device, dtype=dtype, shrinkage=shrinkage, svd_tol=svd_tol, z_kind=z_kind
        ).eraser

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the columns stand for; empty when labels are numbers."""
        return self.config.classes if isinstance(self.config, OracleConfig) else ()

    def __call__(self, x: Tensor, z: object) -> Tensor:
        """Return ``x`` without what ``z`` explains.

        Args:
            x: Rows, shape ``[..., d]``, floating point.
            z: Labels of the rows in the form used for fitting: shape ``x.shape[:-1]`` for classes
                (strings, ids) or a single column, ``[..., c]`` otherwise.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If the shapes disagree with each other or with the fit.
            ValueError: If a class was not seen when fitting.
        """
        x = as_tensor(x)
        width, columns = self.coef.shape
        if x.ndim < 1 or x.shape[-1] != width:
            raise ShapeError(f"expected rows of width {width}, got x of shape {tuple(x.shape)}")
        rows = x.reshape(-1, width)
        labels = _columns(z, x.shape[:-1], columns, self.classes).to(x.device)
        work = torch.promote_types(x.dtype, self.coef.dtype)
        coef, mean = self.coef.to(x.device, work), self.mean_z.to(x.device, work)
        explained = (labels.to(work) - mean) @ coef.mT
        return (rows.to(work) - explained).to(x.dtype).view(x.shape)

    def _check(self) -> None:
        columns = self.coef.shape[-1:]
        named = len(self.classes) in (0, *columns)
        if self.coef.ndim != 2 or self.mean_z.shape != columns or not named:
            raise ShapeError(
                f"coef must be [d, c], mean_z [c] and classes c or no names; got {tuple(self.coef.shape)}, "
                f"{tuple(self.mean_z.shape)} and {len(self.classes)}"
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
        x: object,
        z: object = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
        z_kind: LabelKind = "auto",
    ) -> OracleFitter:
        """Return a fitter that has seen the data.

        Args:
            x: Rows, shape ``[n, d]`` or ``[..., d]``, or `Representations` (then z may be left out and
                the eraser carries their space).
            z: Labels of one concept: classes (strings, integers or bool) of shape ``x.shape[:-1]``, one
                real column of the same shape, or columns ``[..., c]``. One or two integers are numbers.
            device: See the constructor. Default: that of ``x``.
            dtype: See the constructor.
            shrinkage: See the constructor.
            svd_tol: See the constructor.
            z_kind: ``"classes"`` or ``"continuous"`` overrides the reading of one-dimensional z.

        Raises:
            ShapeError: If the shapes disagree.
            TypeError: If x does not hold numbers, or z neither numbers nor strings.
            ValueError: If there are fewer than two rows, values are not finite, or z holds several
                concepts.
        """
        if isinstance(x, Representations) and z is None:
            z = x.z
        z = _one_concept(z)
        data, labels, space = read_data(x, z, z_kind)
        names = labels.names if len(labels.names) > 2 or is_text(z) else ()
        fitter = cls(
            data.shape[-1],
            len(names) if names else labels.width if labels.values.ndim > 1 else 1,
            device=data.device if device is None else device,
            dtype=dtype,
            shrinkage=shrinkage,
            svd_tol=svd_tol,
            classes=names or None,
        )
        fitter.space = space
        return fitter.update(data, z if labels.values.ndim == 1 else labels.values)

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: bool = False,
        svd_tol: float | None = None,
        classes: Sequence[object] | None = None,
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
            classes: Class names, so that batches of labels of any type can be streamed.

        Raises:
            ShapeError: If there are not ``z_dim`` classes.
            ValueError: If a size or the tolerance is not positive.
        """
        if classes is not None and len(classes) != z_dim:
            raise ShapeError(f"z_dim is {z_dim} but there are {len(classes)} classes")
        if svd_tol is not None and svd_tol <= 0:
            raise ValueError(f"`svd_tol` must be positive, got {svd_tol}; leave it out for 1e-10")
        self.x_dim, self.z_dim = x_dim, z_dim
        self.shrinkage, self.svd_tol = shrinkage, svd_tol
        self.classes = () if classes is None else tuple(str(name) for name in classes)
        self.space: Space | None = None
        self.moments = Moments(x_dim, z_dim, covariance=False, device=device, dtype=dtype)
        self._eraser: OracleEraser | None = None

    @torch.no_grad()
    def update(self, x: Tensor, z: object) -> OracleFitter:
        """Add rows.

        Args:
            x: Rows, shape ``[..., d]``.
            z: Labels as in `OracleEraser.__call__`; integers of shape ``x.shape[:-1]`` are class
                ids ``0 .. z_dim-1`` when ``z_dim > 1`` and no classes were named.

        Raises:
            ShapeError: If the shapes disagree.
            ValueError: If values are not finite or a class is unknown.
        """
        if x.ndim < 1 or x.shape[-1] != self.x_dim:
            raise ShapeError(f"expected rows of width {self.x_dim}, got {tuple(x.shape)}")
        rows = x.reshape(-1, self.x_dim)
        columns = _columns(z, x.shape[:-1], self.z_dim, self.classes)
        self.moments.update(rows, columns.to(rows.device))
        self._eraser = None
        return self

    def merge(self, other: OracleFitter) -> OracleFitter:
        """Add what another fitter has seen."""
        if self.classes != other.classes:
            raise ValueError(
                f"the fitters disagree on classes: {self.classes} and {other.classes}; name the same ones in "
                "both constructors"
            )
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
                config=OracleConfig(
                    shrinkage=self.shrinkage, svd_tol=self.svd_tol, classes=self.classes
                ),
                space=self.space,
                report={
                    "n": self.n,
                    "residual": float(left_over / sigma_xz.norm().clamp_min(tiny)),
                },
            )
        return self._eraser


def _columns(z: object, lead: torch.Size, c: int, classes: tuple[str, ...]) -> Tensor:
    """Return labels as ``[n, c]``, float64 for classes."""
    n = lead.numel()
    if classes and not _is_matrix(z, n, c):
        return torch.nn.functional.one_hot(class_indices(z, lead, classes), c).double()
    values = as_tensor(labels_per_row(z, lead), name="z")
    if c > 1 and values.numel() == n and not values.is_floating_point():
        match = values.reshape(n, 1).long() == torch.arange(c, device=values.device)
        unknown = values.reshape(n)[~match.any(1)]
        if len(unknown):
            raise ValueError(
                f"unknown class ids {unknown.unique().tolist()[:5]}; known: 0 .. {c - 1}"
            )
        return match.double()
    if values.numel() != n * c:
        raise ShapeError(f"for {n} rows and {c} concept columns, z has shape {tuple(values.shape)}")
    columns = values.reshape(n, c)
    return columns if columns.is_floating_point() else columns.double()


def _is_matrix(z: object, n: int, c: int) -> bool:
    """Say whether z holds columns (one-hot, soft) and not classes."""
    if c == 1 or is_text(z):
        return False
    values = as_tensor(z, name="z")
    return values.shape[-1:] == (c,) and values.numel() == n * c


def _one_concept(z: object) -> object:
    """Take the only column out of a mapping or table."""
    columns = z if isinstance(z, Mapping) else getattr(z, "columns", None)
    if columns is None:
        return z
    names = list(columns)
    if len(names) != 1:
        raise ValueError(
            f"z holds {len(names)} concepts; oracle erasure takes one: choose a column, or pass numbers as "
            "an array (n, c)"
        )
    return cast("Mapping[object, object]", z)[names[0]]
