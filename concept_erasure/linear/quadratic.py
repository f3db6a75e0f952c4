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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from concept_erasure.collect import Representations
from concept_erasure.data import class_indices, is_text, labels_per_row, read_data
from concept_erasure.eraser import Eraser, EraserConfig
from concept_erasure.errors import ErasureWarning, NotFittedError, ShapeError
from concept_erasure.labels import as_tensor
from concept_erasure.linalg import optimal_linear_shrinkage
from concept_erasure.linear.groupby import groupby
from concept_erasure.linear.optimal_transport import ot_barycenter, ot_map, ot_midpoint
from concept_erasure.sites import Space

__all__ = ["QuadraticConfig", "QuadraticEditor", "QuadraticEraser", "QuadraticFitter"]

Shrinkage = bool | Literal["auto"]
SMALL_RESIDUAL = 1e-6  # difference of class covariances below which we call them equal


@dataclass(frozen=True, kw_only=True)
class QuadraticConfig(EraserConfig):
    """Options of the fit, see `QuadraticFitter`.

    Attributes:
        classes: Names of the classes in the order of the eraser's maps; empty for ids ``0 .. k-1``.
    """

    shrinkage: Shrinkage = "auto"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.shrinkage not in (True, False, "auto"):
            raise ValueError(f"shrinkage must be True, False or 'auto'; got {self.shrinkage!r}")
        object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))


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
        x: object,
        z: object = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
    ) -> QuadraticEraser:
        """Fit on data in memory; see `QuadraticFitter.fit` for the arguments and errors.

        Example:
            >>> import torch
            >>> x = torch.tensor([[0.0], [2.0], [5.0], [9.0]])
            >>> z = ["cat", "cat", "dog", "dog"]
            >>> QuadraticEraser.fit(x, z)(x, z).flatten()
            tensor([2.5000, 5.5000, 2.5000, 5.5000])
        """
        return QuadraticFitter.fit(x, z, device=device, dtype=dtype, shrinkage=shrinkage).eraser

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the maps; empty for ids ``0 .. k-1``."""
        return self.config.classes if isinstance(self.config, QuadraticConfig) else ()

    def optimal_transport(self, z: int | str, x: Tensor) -> Tensor:
        """Move rows of class ``z`` to the barycentre.

        Args:
            z: Class of all rows.
            x: Rows, shape ``[..., d]``.

        Returns:
            Tensor of the shape, dtype and device of ``x``.
        """
        return self._transport(_class_index(z, len(self.class_means), self.classes), x)

    def _transport(self, index: int, x: Tensor) -> Tensor:
        return _move(x, self.class_means[index], self.ot_maps[index], self.global_mean)

    def __call__(self, x: Tensor, z: object) -> Tensor:
        """Erase the class from every row.

        Args:
            x: Rows, shape ``[n, d]`` or ``[..., d]``.
            z: Classes in the form used for fitting, one for each row: shape ``x.shape[:-1]``.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If ``z`` does not have one label per row.
            ValueError: If a label is not one of the fitted classes.
        """
        k, width = self.class_means.shape
        rows, labels = _rows(x, z, width, k, self.classes)
        return groupby(rows, labels).map(self._transport).coalesce().view(x.shape)

    def _check(self) -> None:
        k, d = self.class_means.shape
        if len(self.classes) not in (0, k):
            raise ShapeError(f"there are {k} class means and {len(self.classes)} class names")
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
        classes: Names of the classes; empty for ids ``0 .. k-1``.
    """

    class_means: Tensor
    ot_maps: Tensor
    classes: tuple[str, ...] = ()

    def transport(self, x: Tensor, source_z: int | str, target_z: int | str) -> Tensor:
        """Move rows of class ``source_z`` to class ``target_z``.

        Args:
            x: Rows, shape ``[..., d]``.
            source_z: Class of all rows.
            target_z: Class to move to.

        Returns:
            Tensor of the shape, dtype and device of ``x``.
        """
        k = len(self.class_means)
        source, target = (_class_index(z, k, self.classes) for z in (source_z, target_z))
        return self._transport(x, source, target)

    def _transport(self, x: Tensor, source: int, target: int) -> Tensor:
        matrix = self.ot_maps[source, target]
        return _move(x, self.class_means[source], matrix, self.class_means[target])

    def __call__(self, x: Tensor, source_z: object, target_z: int | str) -> Tensor:
        """Move every row from its own class to ``target_z``.

        Args:
            x: Rows, shape ``[..., d]``.
            source_z: Classes in the form used for fitting, shape ``x.shape[:-1]``.
            target_z: Class to move to.

        Returns:
            Tensor of the shape, dtype and device of ``x``.

        Raises:
            ShapeError: If ``source_z`` does not have one label per row.
            ValueError: If a label is not one of the fitted classes.
        """
        k, width = self.class_means.shape
        rows, labels = _rows(x, source_z, width, k, self.classes)
        target = _class_index(target_z, k, self.classes)
        split = groupby(rows, labels)
        return split.map(lambda z, g: self._transport(g, z, target)).coalesce().view(x.shape)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> QuadraticEditor:
        """Return a copy on another device or of another dtype."""
        means = self.class_means.to(device=device, dtype=dtype)
        return QuadraticEditor(means, self.ot_maps.to(device=device, dtype=dtype), self.classes)


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
        x: object,
        z: object = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
    ) -> QuadraticFitter:
        """Return a fitter that has seen the data.

        Args:
            x: Rows, shape ``[n, d]`` or ``[..., d]``, or `Representations` (then z may be left out and
                the eraser carries their space).
            z: Classes, shape ``x.shape[:-1]``: strings, bool or integers, which need not be 0 .. k-1.
            device: See the constructor. Default: that of ``x``.
            dtype: See the constructor.
            shrinkage: See the constructor.

        Raises:
            ShapeError: If the shapes disagree.
            TypeError: If x does not hold numbers, or z holds fractions.
            ValueError: If there are fewer than two rows, or values are not finite.
        """
        if isinstance(x, Representations) and z is None:
            z = x.z
        data, labels, space = read_data(x, z, "classes")
        fractions = [name for name in labels.names if "." in name] if not is_text(z) else []
        if fractions:
            raise TypeError(
                f"quadratic erasure needs classes, and z holds fractions such as {fractions[0]}; cut the values "
                "into bins first, or use LeaceEraser"
            )
        fitter = cls(
            data.shape[-1],
            len(labels.names),
            device=data.device if device is None else device,
            dtype=dtype,
            shrinkage=shrinkage,
            classes=labels.names,
        )
        fitter.space = space
        return fitter._add(data.reshape(-1, data.shape[-1]), labels.values)

    def __init__(
        self,
        x_dim: int,
        num_classes: int,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shrinkage: Shrinkage = "auto",
        classes: Sequence[object] | None = None,
    ) -> None:
        """Start with no data.

        Args:
            x_dim: Width ``d``.
            num_classes: Number of classes ``k``; labels are ``0 .. k-1`` unless ``classes`` names them.
            device: Device of the statistics.
            dtype: Floating type of the statistics. Default: float64.
            shrinkage: Pull each covariance towards a multiple of the identity. ``"auto"``: only
                if some class has no more samples than dimensions, with a warning. Shrinking makes
                the maps steadier on new data and leaves quadratic traces in the data of the fit.
            classes: Class names, so that batches of labels of any type can be streamed.

        Raises:
            ShapeError: If there are not ``num_classes`` names.
            ValueError: If a size is not positive or shrinkage is none of the three.
        """
        if x_dim < 1 or num_classes < 1:
            raise ValueError(
                f"`x_dim` and `num_classes` must be positive, got {x_dim} and {num_classes}"
            )
        if classes is not None and len(classes) != num_classes:
            raise ShapeError(f"num_classes is {num_classes} but there are {len(classes)} classes")
        dtype = torch.float64 if dtype is None else dtype
        self.num_classes = num_classes
        self.config = QuadraticConfig(
            shrinkage=shrinkage, classes=tuple(str(name) for name in classes or ())
        )
        self.space: Space | None = None
        self.mean_x = torch.zeros(num_classes, x_dim, device=device, dtype=dtype)
        self.n = torch.zeros(num_classes, device=device, dtype=dtype)
        self.sigma_xx_ = torch.zeros(num_classes, x_dim, x_dim, device=device, dtype=dtype)
        self._eraser: QuadraticEraser | None = None

    @property
    def shrinkage(self) -> Shrinkage:
        """The option, see the constructor."""
        return self.config.shrinkage

    def update(self, x: Tensor, z: object) -> QuadraticFitter:
        """Add rows ``x``, shape ``[..., d]``, of classes ``z``, shape ``x.shape[:-1]``.

        Raises:
            ShapeError: If the shapes disagree.
            ValueError: If a label is unknown or ``x`` holds NaN or infinities.
        """
        width = self.mean_x.shape[-1]
        return self._add(*_rows(x, z, width, self.num_classes, self.config.classes))

    def _add(self, rows: Tensor, index: Tensor) -> QuadraticFitter:
        _check_finite(rows)
        for label, piece in groupby(rows, index):
            self._add_class(piece, label)
        return self

    def update_single(self, x: Tensor, z: int | str) -> QuadraticFitter:
        """Add rows ``x``, shape ``[..., d]``, all of class ``z``."""
        return self._add_class(x, _class_index(z, self.num_classes, self.config.classes))

    @torch.no_grad()
    def _add_class(self, x: Tensor, z: int) -> QuadraticFitter:
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
        return QuadraticEditor(self.mean_x.clone(), maps, self.config.classes).to(device)

    @property
    def eraser(self) -> QuadraticEraser:
        """The eraser for what was seen so far; computed once and kept until the next update.

        Raises:
            NotFittedError: If a class has fewer than two samples.
        """
        if self._eraser is None:
            self._eraser = self._solve()
        return self._eraser

    def _solve(self) -> QuadraticEraser:
        sigma = self._covariances()
        if self.num_classes == 1:
            warnings.warn(
                "there is one class only (is the label constant?): the eraser is the identity",
                ErasureWarning,
                stacklevel=4,
            )
        prior = self.n / self.n.sum()
        center = _barycenter(sigma, prior)
        maps = ot_map(sigma, center)
        if self.num_classes == 1:
            maps = torch.eye(len(center)).to(maps)[None]
        sample = self.sigma_xx_ / (self.n.view(-1, 1, 1) - 1)
        spread = (maps @ sample @ maps - center).flatten(1).norm(dim=1).max()
        size = center.norm().clamp_min(torch.finfo(center.dtype).tiny)
        residual = float(spread / size)
        few = bool((self.n <= self.mean_x.shape[-1]).any())
        asked = self.shrinkage is True and not few
        if self.num_classes > 1 and residual > SMALL_RESIDUAL and not asked:
            warnings.warn(
                f"the class covariances still differ by {residual:.2g} of their size{self._few()}; a quadratic "
                "probe may do better than chance",
                ErasureWarning,
                stacklevel=4,
            )
        return QuadraticEraser(
            self.mean_x.clone(),
            prior @ self.mean_x,
            maps,
            config=self.config,
            space=self.space,
            report={"n_per_class": self.n.tolist(), "residual": residual},
        )

    @property
    def sigma_xx(self) -> Tensor:
        """Class covariances, shape ``[k, d, d]``, divided by ``n - 1``, or shrunk.

        Raises:
            NotFittedError: If a class has fewer than two samples.
        """
        sigma = self._covariances()
        if self.shrinkage == "auto" and self._shrinks():
            warnings.warn(
                f"class covariances are estimates{self._few()}", ErasureWarning, stacklevel=2
            )
        return sigma

    def _shrinks(self) -> bool:
        if self.shrinkage == "auto":
            return bool((self.n <= self.mean_x.shape[-1]).any())
        return bool(self.shrinkage)

    def _few(self) -> str:
        shrunk = "covariances are shrunk: " if self._shrinks() else ""
        smallest = int(self.n.min())
        return (
            f" ({shrunk}the smallest class, {self._name(int(self.n.argmin()))}, has {smallest} samples for "
            f"{self.mean_x.shape[-1]} dimensions)"
        )

    def _name(self, index: int) -> str:
        return repr(self.config.classes[index]) if self.config.classes else str(index)

    def _covariances(self) -> Tensor:
        few = [self._name(i) for i, n in enumerate(self.n.tolist()) if n < 2]
        if few:
            raise NotFittedError(
                f"classes [{', '.join(few)}] have fewer than two samples, so no covariance; give more data, "
                "or leave these classes out"
            )
        total = (self.sigma_xx_ + self.sigma_xx_.mT) / 2
        count = self.n.view(-1, 1, 1)
        if not self._shrinks():
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


def _class_index(z: int | str, k: int, names: tuple[str, ...]) -> int:
    """Return the position of one class."""
    if names:
        return int(class_indices([z], torch.Size([1]), names)[0])
    if isinstance(z, str) or not 0 <= z < k:
        raise ValueError(f"class {z!r} is out of range; the fitted classes are 0 .. {k - 1}")
    return int(z)


def _check_finite(rows: Tensor) -> None:
    bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"x has {len(bad)} rows with NaN or infinite values; the first is row {int(bad[0])}"
        )


def _rows(
    x: Tensor, z: object, width: int, k: int, names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Return ``x`` as ``[n, d]`` and class positions ``[n]``, or say how they disagree."""
    x = as_tensor(x)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ShapeError(f"expected rows of width {width}, got x of shape {tuple(x.shape)}")
    lead = x.shape[:-1]
    rows = x.reshape(lead.numel(), width)
    if names:
        return rows, class_indices(z, lead, names).to(x.device)
    labels = as_tensor(labels_per_row(z, lead), name="z").reshape(-1)
    if len(labels) != len(rows):
        raise ShapeError(f"got {len(rows)} rows in x and {len(labels)} labels in z")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < k:
        raise ValueError(
            f"classes {int(labels.min())}..{int(labels.max())} are out of range; the fitted classes are "
            f"0 .. {k - 1}"
        )
    return rows, labels


def _move(x: Tensor, source: Tensor, matrix: Tensor, target: Tensor) -> Tensor:
    """Return ``(x - source) @ matrix.T + target`` in the wider dtype, on the device and in the dtype of x."""
    work = torch.promote_types(x.dtype, matrix.dtype)
    source, matrix, target = (value.to(x.device, work) for value in (source, matrix, target))
    moved = (x.to(work) - source) @ matrix.mT + target
    return moved.to(x.dtype)
