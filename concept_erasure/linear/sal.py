"""SAL: remove the strongest directions of the cross-covariance by an orthogonal projection.

Shao, Ziser and Cohen 2023 (arXiv:2203.07893): with ``Sigma_xz = U S V^T`` the first k columns of U are projected
out. No covariance of x is formed: O(n d c) time and O(d c) memory, the choice for wide or few data.

With ``k >= rank(Sigma_xz)`` (C - 1 for C classes; the default) no affine predictor of z is left on the data of the
fit. With fewer directions the concept stays readable and the report's ``residual`` says how much. Nothing is
promised about non-linear probes, or about a second classifier stacked on a softmax trained on the output.

Deviations: the map is affine (the mean of the data stays; the published one moves it, ``affine=False``), and
``balance=True`` divides each class's column by the root of its share, so that rare classes are not the last to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import read_data
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.labels import LabelKind
from concept_erasure.linalg import Moments
from concept_erasure.spectral import SpectralFitter, check_k, relative_edit, row_shape

__all__ = ["SalConfig", "SalEraser", "SalFitter"]


@dataclass(frozen=True, kw_only=True)
class SalConfig(EraserConfig):
    """Options of the fit, see `SalEraser.fit`."""

    k: int | None = None
    balance: bool = False
    affine: bool = True

    def __post_init__(self) -> None:
        check_k(self.k)


@dataclass(frozen=True, repr=False, eq=False)
class SalEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``, an orthogonal projection.

    Attributes:
        proj_left: Orthonormal directions, shape ``(d, k)``, strongest first when k is below the rank.
        proj_right: The same, shape ``(k, d)``.
        bias: Mean of the fit data, shape ``(d,)``; None without ``affine``.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> z = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        >>> SalEraser.fit(x, z).report["rank"]
        2
    """

    method: ClassVar[str] = "sal"
    config_type: ClassVar[type[EraserConfig]] = SalConfig

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        k: int | None = None,
        balance: bool = False,
        affine: bool = True,
        z_kind: LabelKind = "auto",
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        held_out: tuple[object, object] | Representations | None = None,
        dtype: torch.dtype | None = None,
    ) -> SalEraser:
        """Fit on representations ``x`` ``(..., d)`` and labels ``z``.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Labels, one a row: classes, real targets, or columns.
            k: Number of directions; default the rank of the cross-covariance, which guards. A larger number
                removes no more than the rank.
            balance: Weigh classes alike; matters for k below the rank. Needs class labels.
            affine: Keep the mean of the data.
            z_kind: ``"classes"`` or ``"continuous"`` overrides the reading of one-dimensional z.
            mask: Rows of x to use, shape ``x.shape[:-1]``.
            weight: Row weights, same shape.
            held_out: ``(x, z)`` never fitted on, for the report; default five-fold cross-fitting.
            dtype: Dtype of the factors; default float64.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, or options out of range.
            ShapeError: If x and z disagree.

        Warns:
            ErasureWarning: If z is not correlated with x; the eraser is then the identity.
        """
        data, labels, space = read_data(x, z, z_kind)
        fitter = SalFitter(
            data.shape[-1],
            labels.width,
            k=k,
            balance=balance,
            affine=affine,
            classes=labels.names or None,
            device=data.device,
            dtype=dtype,
        )
        groups = x.rows if isinstance(x, Representations) else None
        fitter._add(data, row_shape(data, labels.values), mask, weight, groups)
        if fitter.n < 2:
            raise ValueError(f"at least 2 rows are needed to fit; the mask leaves {fitter.n}")
        if held_out is not None:
            other = (held_out.x, held_out.z) if isinstance(held_out, Representations) else held_out
            fitter.hold_out(*other, z_kind=z_kind)
        fitter.space = space
        eraser = fitter.eraser
        size = relative_edit(eraser.map, data, fitter.mean_x, mask=mask, weight=weight)
        return replace(eraser, report={**eraser.report, "edit_size": size})


class SalFitter(SpectralFitter):
    """Streams data and gives the SAL eraser of all of it: O(n d c) time, O(d c) memory, in any order of batches.

    Args:
        x_dim: Width d.
        z_dim: Number of concept columns c. With c > 1, integer z of shape ``(n,)`` are class indices.
        k: Number of directions; None is the rank of the cross-covariance.
        balance: Weigh classes alike.
        affine: Keep the mean of the data.
        classes: Class names, so that batches of labels of any type can be streamed.
        device: Where the statistics live.
        dtype: Dtype of the factors given out; statistics stay float64.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        k: int | None = None,
        balance: bool = False,
        affine: bool = True,
        classes: Sequence[object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = SalConfig(k=k, balance=balance, affine=affine)
        super().__init__(
            x_dim, z_dim, k=k, affine=affine, classes=classes, device=device, dtype=dtype
        )

    @property
    def eraser(self) -> SalEraser:
        """The eraser of all data seen.

        Raises:
            NotFittedError: If fewer than two rows were seen.
            ValueError: If classes are to be balanced and z are not classes.
        """
        map_, report = self._solve()
        return SalEraser(
            map_.left,
            map_.right.T.contiguous(),
            map_.center,
            config=self.config,
            space=self.space,
            report=report,
        )

    @property
    def _identity(self) -> tuple[object, ...]:
        return (*super()._identity, self.config)

    def _directions(self, moments: Moments) -> Tensor:
        if not self.config.balance:
            return moments.sigma_xz
        if not self._binary:
            raise ValueError(
                "balance=True weighs classes alike, and z are real numbers; pass class labels, 0/1 columns or "
                "z_kind='classes'"
            )
        share = moments.mean_z
        return moments.sigma_xz * torch.where(share > 0, share.rsqrt(), torch.zeros_like(share))
