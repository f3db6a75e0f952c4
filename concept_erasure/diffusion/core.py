"""The one solve behind every closed-form method: pairs, a metric, and a low-rank edit of what reads the text.

Minimised is ``sum_i w_i |W' c_i - W c_i*|^2 + sum_j g_j |W' p_j - W p_j|^2 + lam |W' - W|^2`` with ``W' K = W K``.
When the targets are outputs of anchors, the answer is ``W' = W (I + E)`` with one ``E`` for all layers: a
`LowRankAffine` on text embeddings. Embeddings are rows everywhere; solves are float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from concept_erasure.errors import ErasureWarning, ShapeError, SpaceError
from concept_erasure.linalg import LowRankAffine, statistics_dtype

__all__ = [
    "Metric",
    "PairSums",
    "Pairs",
    "Preserve",
    "compress",
    "metric",
    "solve",
    "solve_layer",
    "text_gram",
    "wide_rows",
]

Form = Literal["auto", "dual", "primal"]
ROUNDING = 1e-11  # what is left of a preserved vector in a null space found by eigh
FORBIDDEN = 1e-7  # share of a concept below which it lies in what is preserved
ROWS_PER_CHUNK = 4096


def wide_rows(rows: Tensor, name: str, width: int | None = None) -> Tensor:
    """Return rows as (n, d) in the widest dtype of their device."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(
            f"{name} must be a floating tensor; got {getattr(rows, 'dtype', type(rows))}"
        )
    if rows.ndim < 1 or (width is not None and rows.shape[-1] != width):
        raise ShapeError(f"{name} must be (n, {width or 'd'}); got {tuple(rows.shape)}")
    wide = rows.detach().reshape(-1, rows.shape[-1]).to(statistics_dtype(rows.device))
    if not bool(torch.isfinite(wide).all()):
        bad = (~torch.isfinite(wide)).any(1).nonzero()[:, 0]
        raise ValueError(
            f"{name} has {len(bad)} rows that are not finite; the first is row {int(bad[0])}"
        )
    return wide


@dataclass(frozen=True, eq=False)
class Pairs:
    """What must change into what: embeddings of concepts and of their anchors, row by row.

    Attributes:
        source: Embeddings to change, shape ``(n, d)``; kept in float64.
        target: Embeddings whose outputs they shall give, shape ``(n, d)``.
        weight: Positive weights, a number or shape ``(n,)``; infinity is exact.
        concept: Number of the concept each row belongs to, shape ``(n,)``; None if they are not told apart.
            It is what lets a concept be withdrawn later.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If values are not finite, a weight is not positive, or a concept equals its anchor.
    """

    source: Tensor
    target: Tensor
    weight: Tensor | float = 1.0
    concept: Tensor | None = None

    def __post_init__(self) -> None:
        source, target = wide_rows(self.source, "source"), wide_rows(self.target, "target")
        if source.shape != target.shape:
            raise ShapeError(
                f"source and target must have one shape; got {tuple(source.shape)} and {tuple(target.shape)}"
            )
        weight = torch.as_tensor(self.weight, dtype=source.dtype, device=source.device)
        weight = weight.expand(len(source)) if weight.ndim == 0 else weight
        if weight.shape != (len(source),):
            raise ShapeError(f"weight must be ({len(source)},); got {tuple(weight.shape)}")
        if not bool((weight > 0).all()):
            raise ValueError(
                "weights must be positive; infinity makes a pair exact, leave out others"
            )
        concept = self.concept
        if concept is not None:
            concept = concept.to(source.device)
            if concept.shape != weight.shape or concept.is_floating_point():
                raise ShapeError(
                    f"concept must be whole numbers of shape ({len(source)},); "
                    f"got {tuple(concept.shape)} {concept.dtype}"
                )
        for name, value in (("source", source), ("target", target.to(source.device))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "concept", concept)
        self._refuse_equal(source, target)

    def _refuse_equal(self, source: Tensor, target: Tensor) -> None:
        """Raise if all rows of a concept equal their targets; single rows (a shared prefix) may."""
        same = (source == target.to(source.device)).all(1)
        groups = torch.zeros_like(same, dtype=torch.long) if self.concept is None else self.concept
        for number in groups[same].unique().tolist():
            if bool(same[groups == number].all()):
                which = "" if self.concept is None else f" (concept {number})"
                raise ValueError(
                    f"anchor equal to the concept{which}: source and target embeddings are the same, so there is "
                    "nothing to change; give another anchor"
                )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def width(self) -> int:
        """Width d of the embeddings."""
        return self.source.shape[1]

    @property
    def weights(self) -> Tensor:
        """The weights as a tensor, shape ``(n,)``."""
        return torch.as_tensor(self.weight)

    @property
    def exact(self) -> Tensor:
        """Which rows have infinite weight, shape ``(n,)`` bool."""
        return torch.isinf(self.weights)

    @property
    def slack(self) -> Tensor:
        """``1 / weight``, shape ``(n,)``; zero where exact."""
        return 1 / self.weights

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        """Return some of the rows, by mask, indices or slice."""
        concept = None if self.concept is None else self.concept[rows]
        return Pairs(self.source[rows], self.target[rows], self.weights[rows], concept)

    def to(self, device: torch.device | str) -> Pairs:
        """Return the same pairs on another device."""
        concept = None if self.concept is None else self.concept.to(device)
        return Pairs(
            self.source.to(device), self.target.to(device), self.weights.to(device), concept
        )

    def numbered(self, concept: int) -> Pairs:
        """Return the same rows, all of concept number ``concept``."""
        number = torch.full((len(self),), concept, dtype=torch.long, device=self.source.device)
        return Pairs(self.source, self.target, self.weights, number)

    @classmethod
    def empty(cls, width: int) -> Pairs:
        """Return no pairs of some width."""
        none = torch.zeros(0, width, dtype=torch.float64)
        return cls(none, none, 1.0, torch.zeros(0, dtype=torch.long))

    @classmethod
    def cat(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the rows of all; concepts are kept if every part tells them apart.

        Raises:
            ValueError: If there are none.
            ShapeError: If widths differ.
        """
        if not parts:
            raise ValueError("there are no pairs to join; Pairs.empty(width) is a start")
        if len({part.width for part in parts}) > 1:
            raise ShapeError(f"widths differ: {sorted({part.width for part in parts})}")
        known = [part.concept for part in parts if part.concept is not None]
        concept = torch.cat(known) if len(known) == len(parts) else None
        return cls(
            torch.cat([part.source for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat([part.weights for part in parts]),
            concept,
        )

    def __repr__(self) -> str:
        return f"Pairs(n={len(self)}, width={self.width}, exact={int(self.exact.sum())})"


class PairSums:
    """Sums over any number of pairs in O(d^2) memory; `solve` takes it in place of `Pairs` (finite weights).

    Attributes:
        gram: ``sum w c c^T``, shape ``(d, d)``.
        cross: ``sum w (c* - c) c^T``, shape ``(d, d)``.
        count: Number of pairs seen.
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        dtype = statistics_dtype(device)
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)
        self.cross = torch.zeros_like(self.gram)
        self.count = 0

    def update(self, pairs: Pairs) -> Self:
        """Add pairs.

        Raises:
            ShapeError: If the width is another.
            ValueError: If a weight is infinite.
        """
        if pairs.width != len(self.gram):
            raise ShapeError(f"the sums have width {len(self.gram)}; the pairs {pairs.width}")
        if bool(pairs.exact.any()):
            raise ValueError("exact pairs cannot be summed; give them to solve() as Pairs")
        weighted = (pairs.source * pairs.weights[:, None]).to(self.gram)
        self.gram += weighted.T @ pairs.source.to(self.gram)
        self.cross += (pairs.target - pairs.source).to(self.gram).T @ weighted
        self.count += len(pairs)
        return self

    def __len__(self) -> int:
        return self.count


class Preserve:
    """Streaming Gram matrix ``sum g p p^T`` of what must not change, in float64 and O(d^2) memory.

    Args:
        width: Width d of the embeddings.
        encoder: Fingerprint of the text encoder; Grams of different ones are not merged.
        device: Where it lives.
    """

    def __init__(
        self,
        width: int,
        *,
        encoder: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        self.width, self.encoder = width, encoder
        self.gram = torch.zeros(width, width, dtype=statistics_dtype(device), device=device)
        self.count = 0
        self.total = 0.0

    def update(self, vectors: Tensor, weight: Tensor | float | None = None) -> Self:
        """Add embeddings.

        Args:
            vectors: Shape ``(..., d)``.
            weight: Non-negative, a number or one for each vector; default 1.

        Raises:
            ShapeError: If shapes disagree.
            ValueError: If something is not finite, or a weight is negative.
        """
        wide = wide_rows(vectors, "vectors", self.width).to(self.gram)
        factor = torch.as_tensor(1.0 if weight is None else weight, dtype=wide.dtype).to(
            wide.device
        )
        factor = factor.expand(len(wide)) if factor.ndim == 0 else factor.reshape(-1)
        if factor.shape != (len(wide),):
            raise ShapeError(f"weight must be one number or {len(wide)}; got {len(factor)}")
        if not bool((torch.isfinite(factor) & (factor >= 0)).all()):
            raise ValueError("weights of what is preserved must be finite and not negative")
        for start in range(0, len(wide), ROWS_PER_CHUNK):
            rows = wide[start : start + ROWS_PER_CHUNK]
            self.gram.addmm_((rows * factor[start : start + ROWS_PER_CHUNK, None]).T, rows)
        self.count += len(wide)
        self.total += float(factor.sum())
        return self

    def merge(self, other: Preserve, weight: float = 1.0) -> Self:
        """Add another set, times a weight.

        Raises:
            ShapeError: If the widths differ.
            SpaceError: If it comes from another text encoder.
        """
        if other.width != self.width:
            raise ShapeError(f"widths differ: {self.width} and {other.width}")
        if self.encoder and other.encoder and self.encoder != other.encoder:
            raise SpaceError(
                f"these embeddings come from two text encoders ({self.encoder[:12]} and {other.encoder[:12]}); "
                "collect both with one"
            )
        self.encoder = self.encoder or other.encoder
        self.gram += weight * other.gram.to(self.gram)
        self.count += other.count
        self.total += weight * other.total
        return self

    def normalised(self) -> Preserve:
        """Return a copy whose Gram is a mean, not a sum: its scale does not depend on how many there are."""
        out = Preserve(self.width, encoder=self.encoder, device=self.gram.device)
        out.gram = self.gram / self.total if self.total > 0 else self.gram.clone()
        out.count, out.total = self.count, float(self.total > 0)
        return out

    @property
    def mean_eigenvalue(self) -> float:
        """``trace / d``: what a ridge can be set relative to."""
        return float(self.gram.trace()) / self.width

    def tensors(self) -> dict[str, Tensor]:
        """Return what must be saved, by name."""
        sizes = self.gram.new_tensor([float(self.count), self.total])
        return {"gram": self.gram, "sizes": sizes}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, encoder: str | None = None) -> Preserve:
        """Return what `tensors` gave."""
        gram = tensors["gram"]
        out = cls(len(gram), encoder=encoder, device=gram.device)
        out.gram = gram.to(out.gram)
        out.count, out.total = round(float(tensors["sizes"][0])), float(tensors["sizes"][1])
        return out

    def __repr__(self) -> str:
        return f"Preserve(width={self.width}, count={self.count}, total={self.total:g})"


@dataclass(frozen=True, eq=False)
class Metric:
    """How freely each input direction may be edited: ``y -> y Q`` with Q symmetric, PSD and kept factored.

    ``Q = F F^T``; soft, F is a triangular inverse, hard, an orthonormal basis of the null space. Invariants are
    taken off in whitened coordinates, where that is an orthogonal projection.

    Attributes:
        width: Width d.
        options: What it was made with, plain numbers by name.
        gram: Gram matrix of what is preserved, shape ``(d, d)``, or None.
        invariants: Shape ``(q, d)``, or None.
    """

    width: int
    options: Mapping[str, float | int | bool | None] = field(default_factory=dict)
    gram: Tensor | None = None
    invariants: Tensor | None = None
    _scale: float = 1.0
    _factor: Tensor | None = None
    _basis: Tensor | None = None
    _held: Tensor | None = None
    _shrink: Tensor | None = None

    @property
    def hard(self) -> bool:
        """Whether what is preserved is kept exactly."""
        return bool(self.options.get("hard"))

    @property
    def dimension(self) -> int:
        """Number of directions that may be edited: the rank of Q."""
        free = self.width if self._basis is None else self._basis.shape[1]
        if self._shrink is None:
            return free
        return free - int((self._shrink >= 1).sum())

    def whiten(self, rows: Tensor) -> Tensor:
        """Return the rows times F, shape ``(m, r)``; their inner products are those of Q."""
        return self._take_off(self._whiten(rows))

    def _whiten(self, rows: Tensor) -> Tensor:
        rows = rows.to(statistics_dtype(rows.device))
        if self._factor is not None:
            out: Tensor = torch.linalg.solve_triangular(self._factor, rows.T, upper=False).T
        elif self._basis is not None:
            out = rows @ self._basis * self._scale
        else:
            out = rows * self._scale
        return out

    def freedom(self, rows: Tensor) -> Tensor:
        """Return which share of each row may be edited, shape ``(m,)``; 0 lies in what is preserved or invariant."""
        rows = rows.to(statistics_dtype(rows.device))
        whole = rows * self._scale if self._factor is None else self._whiten(rows)
        size = torch.linalg.vector_norm(whole, dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
        share: Tensor = torch.linalg.vector_norm(self.whiten(rows), dim=1) / size
        return share

    def unwhiten(self, rows: Tensor) -> Tensor:
        """Return rows times the transpose of F, shape ``(m, d)``."""
        rows = self._take_off(rows)
        if self._factor is not None:
            out: Tensor = torch.linalg.solve_triangular(self._factor.T, rows.T, upper=True).T
        elif self._basis is not None:
            out = rows @ self._basis.T * self._scale
        else:
            out = rows * self._scale
        return out

    def _take_off(self, rows: Tensor) -> Tensor:
        if self._held is None or self._shrink is None:
            return rows
        held = self._held.to(rows.device)
        return rows - (rows @ held * self._shrink.to(rows.device)) @ held.T

    @property
    def free(self) -> int:
        """Number of whitened coordinates r."""
        return self.width if self._basis is None else self._basis.shape[1]

    def __call__(self, y: Tensor) -> Tensor:
        """Return ``y Q``, shape ``(m, d)``, for rows of shape ``(m, d)``.

        Raises:
            ShapeError: If the width is another.
        """
        if y.ndim != 2 or y.shape[1] != self.width:
            raise ShapeError(f"the metric has width {self.width}; got {tuple(y.shape)}")
        return self.unwhiten(self.whiten(y))

    def __repr__(self) -> str:
        kind = "hard" if self.hard else "soft"
        return f"Metric({kind}, width={self.width}, dimension={self.dimension})"


def metric(
    preserve: Preserve | Tensor | None,
    *,
    width: int,
    lam: float | None = None,
    hard: bool = False,
    tau: float | None = None,
    relative_tau: float | None = None,
    rank: int | None = None,
    ridge: float | None = None,
    invariants: Tensor | None = None,
    invariant_ridge: float = 0.0,
) -> Metric:
    """Return how freely each direction may be edited.

    Args:
        preserve: What must not change, or its Gram matrix, shape ``(d, d)``; None is nothing.
        width: Width d of the embeddings.
        lam: Soft form: ridge that pulls to no change, ``Q = (lam I + gram)^-1``.
        hard: Edit only directions orthogonal to the preserved subspace, ``Q = P / ridge``.
        tau: Hard form: eigenvectors of the Gram with eigenvalues below it may be edited.
        relative_tau: The same as a share of the largest eigenvalue; the default is the rounding of the Gram.
        rank: The same as the dimension of the preserved subspace.
        ridge: Hard form: the ridge, default 1; it matters for finite weights only.
        invariants: Embeddings whose outputs stay exactly, shape ``(q, d)``.
        invariant_ridge: Keep invariants softly: ``Q - Q K (K^T Q K + r I)^-1 K^T Q``.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If options contradict each other, or ``lam = 0`` and the Gram is not of full rank.
    """
    options = {
        "lam": lam,
        "hard": hard,
        "tau": tau,
        "relative_tau": relative_tau,
        "rank": rank,
        "ridge": ridge,
        "invariant_ridge": invariant_ridge,
    }
    _check_options(options)
    gram = preserve.gram if isinstance(preserve, Preserve) else preserve
    if gram is not None:
        if gram.shape != (width, width):
            raise ShapeError(f"the Gram must be ({width}, {width}); got {tuple(gram.shape)}")
        gram = wide_rows(gram, "the Gram")
    scale, factor, basis = 1.0, None, None
    if hard:
        scale = (1.0 if ridge is None else ridge) ** -0.5
        basis = None if gram is None else _null_basis(gram, tau, relative_tau, rank)
    elif gram is None:
        if not lam:
            raise ValueError(
                "lam = 0 without a preserve set leaves the edit undecided; give lam > 0"
            )
        scale = lam**-0.5
    else:
        factor = _cholesky(gram, 0.0 if lam is None else lam)
    kept = (
        None
        if invariants is None or not len(invariants)
        else wide_rows(invariants, "invariants", width)
    )
    made = Metric(width, options, gram, kept, scale, factor, basis)
    return made if kept is None else _hold(made, kept, invariant_ridge)


def _hold(made: Metric, kept: Tensor, ridge: float) -> Metric:
    """Return a metric with invariants taken off."""
    # of an invariant that is preserved already, a hard metric leaves rounding
    longest = float(torch.linalg.vector_norm(kept, dim=1).max())
    white = made.whiten(kept)
    if not white.numel():
        return made
    floor = ROUNDING * made._scale * longest if made._basis is not None else 0.0
    held, shrink = _held_directions(white, floor, ridge)
    return replace(made, _held=held, _shrink=shrink)


def _check_options(options: Mapping[str, float | int | bool | None]) -> None:
    for name in ("lam", "tau", "relative_tau", "ridge", "invariant_ridge"):
        value = options[name]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")
    rules = [name for name in ("tau", "relative_tau", "rank") if options[name] is not None]
    if len(rules) > 1:
        raise ValueError(f"give one of tau, relative_tau and rank; got {' and '.join(rules)}")
    if not options["hard"] and (rules or options["ridge"] is not None):
        raise ValueError("tau, relative_tau, rank and ridge belong to hard=True; soft takes lam")
    if options["hard"] and options["lam"] is not None:
        raise ValueError("lam belongs to the soft form; hard=True takes ridge")
    if options["hard"] and options["ridge"] == 0:
        raise ValueError("ridge must be above 0; for exact targets give infinite weights")


def _cholesky(gram: Tensor, lam: float) -> Tensor:
    """Return the factor of ``lam I + gram``."""
    system = gram.clone()
    system.diagonal().add_(lam)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    eps = torch.finfo(gram.dtype).eps
    pivots = factor.diagonal().square()
    if lam == 0 and (bool(failed) or float(pivots.min()) < len(gram) * eps * float(pivots.max())):
        values = torch.linalg.eigvalsh(gram)
        found = int((values > len(gram) * eps * values[-1]).sum())
        raise ValueError(
            f"lam = 0 needs a preserve Gram of full rank {len(gram)}; this one has rank {found}. "
            "Add vectors to preserve, or give lam > 0"
        )
    if bool(failed):
        more = 1e-12 * float(gram.trace()) / len(gram)
        warnings.warn(
            f"the preserve Gram is so ill-conditioned that lam = {lam:g} was raised by {more:.3g}",
            ErasureWarning,
            stacklevel=3,
        )
        system.diagonal().add_(more)
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise ValueError(
                f"lam I + Gram is not positive definite with lam = {lam:g}: is the Gram a sum of p p^T?"
            )
    return factor


def _null_basis(
    gram: Tensor, tau: float | None, relative_tau: float | None, rank: int | None
) -> Tensor:
    """Return an orthonormal basis of the directions that may be edited, shape ``(d, r)``."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    d = len(values)
    if rank is not None:
        if not 0 <= rank <= d:
            raise ValueError(f"rank must be 0..{d}; got {rank}")
        return vectors[:, : d - rank].contiguous()
    largest = float(values[-1].clamp_min(0))
    if tau is None:
        share = d * torch.finfo(gram.dtype).eps if relative_tau is None else relative_tau
        tau = share * largest
    free = values < max(tau, torch.finfo(gram.dtype).tiny)
    return vectors[:, free].contiguous()


def _held_directions(white: Tensor, floor: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Return orthonormal whitened directions ``(r, q)`` to take off, and the share of each (1 is all)."""
    _, sizes, rows = torch.linalg.svd(white, full_matrices=False)
    rounding = max(white.shape) * torch.finfo(white.dtype).eps * float(sizes.max())
    found = sizes > max(floor, rounding)
    sizes, rows = sizes[found], rows[found]
    # (1 - share)^2 = r / (s^2 + r), so that taking off twice gives the formula
    share = 1 - (ridge / (sizes.square() + ridge)).sqrt()
    return rows.T.contiguous(), share


def solve(pairs: Pairs | PairSums, metric: Metric, form: Form = "auto") -> LowRankAffine:
    """Return the edit ``I + E`` of the text embeddings that every layer shares.

    Args:
        pairs: What must change into what.
        metric: How freely.
        form: ``"dual"`` solves n x n and has rank n, its ``right`` is ``Q C``; ``"primal"`` solves d x d (finite
            weights); ``"auto"`` is the smaller one.

    Raises:
        ShapeError: If widths differ.
        ValueError: If there are more pairs than directions that may be edited, exact pairs contradict each other
            or cannot be met, or the form does not fit.
    """
    if isinstance(pairs, PairSums):
        if form == "dual":
            raise ValueError("sums of pairs need the primal form; give Pairs for the dual")
        _check_room(pairs.gram, pairs.count, metric)
        up, down = _primal(pairs.cross, pairs.gram, metric)
        return LowRankAffine(-up, down)
    if pairs.width != metric.width:
        raise ShapeError(f"the pairs have width {pairs.width}; the metric {metric.width}")
    if _chosen(form, pairs.weights, metric) == "primal":
        sums = PairSums(pairs.width, device=pairs.source.device).update(pairs)
        _check_room(pairs.source, len(pairs), metric)
        up, down = _primal(sums.cross, sums.gram, metric)
        return LowRankAffine(-up, down)
    residual = pairs.target - pairs.source
    right, inner = _dual(pairs.source, residual, pairs.weights, metric)
    return LowRankAffine(-_divide(inner, residual, pairs.exact), right)


def solve_layer(
    source: Tensor,
    residual: Tensor,
    weight: Tensor | float,
    metric: Metric,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the edit of one layer whose targets are its own: ``dW = up down^T``.

    Args:
        source: Embeddings, shape ``(n, d)``.
        residual: Wanted outputs minus those of the layer as it is, shape ``(n, out)``.
        weight: Positive, a number or shape ``(n,)``; infinity is exact.
        metric: How freely.
        form: As for `solve`.

    Returns:
        ``up`` of shape ``(out, k)`` and ``down`` of shape ``(d, k)``.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: As for `solve`.
    """
    source = wide_rows(source, "source", metric.width)
    residual = wide_rows(residual, "residual").to(source)
    if len(residual) != len(source):
        raise ShapeError(f"{len(source)} embeddings and {len(residual)} residuals")
    weights = torch.as_tensor(weight, dtype=source.dtype, device=source.device).expand(len(source))
    if not bool((weights > 0).all()):
        raise ValueError("weights must be positive; infinity makes a row exact, leave out others")
    if _chosen(form, weights, metric) == "primal":
        _check_room(source, len(source), metric)
        weighted = source * weights[:, None]
        return _primal(residual.T @ weighted, source.T @ weighted, metric)
    right, inner = _dual(source, residual, weights, metric)
    return _divide(inner, residual, torch.isinf(weights)), right


def _chosen(form: Form, weights: Tensor, metric: Metric) -> Form:
    if form not in ("auto", "dual", "primal"):
        raise ValueError(f"form must be 'auto', 'dual' or 'primal'; got {form!r}")
    exact = bool(torch.isinf(weights).any())
    if form == "primal" and exact:
        raise ValueError("the primal form has no infinite weights; use form='dual'")
    if form == "auto":
        return "primal" if len(weights) > metric.free and not exact else "dual"
    return form


def _check_room(source: Tensor, count: int, metric: Metric) -> None:
    """Raise if there are more independent concepts than directions that a hard metric leaves free."""
    if count <= metric.dimension or not (metric.hard or metric.dimension == 0):
        return
    wanted = int(torch.linalg.matrix_rank(source)) if len(source) else 0
    if wanted > metric.dimension:
        raise ValueError(
            f"{wanted} independent pairs do not fit into the null space of what is preserved: it has "
            f"{metric.dimension} dimensions of {metric.width}. Preserve less, raise tau, or erase fewer concepts"
        )


def _dual(
    source: Tensor, residual: Tensor, weights: Tensor, metric: Metric
) -> tuple[Tensor, Tensor]:
    """Return ``Y = Q C`` as (d, n) and ``S = C^T Q C + 1/w`` as (n, n)."""
    _check_room(source, len(source), metric)
    if metric.hard or metric.invariants is not None:
        moved = torch.linalg.vector_norm(residual, dim=1) > 0
        stuck = (moved & (metric.freedom(source) < FORBIDDEN)).nonzero()[:, 0].tolist()
        if stuck:
            raise ValueError(
                f"{len(stuck)} of {len(source)} pairs (the first is row {stuck[0]}) lie in what is preserved or "
                "invariant, so nothing can change for them: take the concept out of preserve"
            )
    white = metric.whiten(source)
    inner = white @ white.T
    inner.diagonal().add_(1 / weights.to(inner))
    return metric.unwhiten(white).T.contiguous(), inner


def _divide(inner: Tensor, residual: Tensor, exact: Tensor) -> Tensor:
    """Return ``residual^T S^-1``, shape ``(out, n)``; a singular S must not contradict the residuals."""
    residual = residual.to(inner)
    scale = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).rsqrt()
    scaled = inner * scale[:, None] * scale
    factor, failed = torch.linalg.cholesky_ex(scaled)
    eps = torch.finfo(inner.dtype).eps
    pivots = factor.diagonal().square()
    if not len(inner) or (not bool(failed) and float(pivots.min()) > len(inner) * eps * 10):
        return (torch.cholesky_solve(residual * scale[:, None], factor) * scale[:, None]).T
    values, vectors = torch.linalg.eigh(scaled)
    keep = values > len(values) * eps * 10 * values[-1].clamp_min(1.0)
    vectors, values = vectors[:, keep], values[keep]
    wanted = residual * scale[:, None]
    inside = vectors.T @ wanted
    missed = (wanted - vectors @ inside)[exact] / scale[exact, None]
    if float(missed.norm()) > 1e-6 * float(residual[exact].norm()):
        raise ValueError(
            f"{int(exact.sum())} exact pairs span only {int(keep.sum())} directions that may be edited, and their "
            "targets contradict each other there: a concept depends on others, or on what is preserved. Leave it "
            "out or give finite weights"
        )
    solved: Tensor = scale[:, None] * (vectors @ (inside / values[:, None]))
    return solved.T


def _primal(cross: Tensor, gram: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return ``up (out, r)`` and ``down (d, r)`` from ``sum w r c^T`` and ``sum w c c^T``, in whitened coordinates."""
    inner = metric.whiten(metric.whiten(gram).T)
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(inner)
    up = torch.cholesky_solve(metric.whiten(cross).T, factor).T
    down = metric.unwhiten(torch.eye(metric.free, dtype=up.dtype, device=up.device)).T
    return up, down.contiguous()


def compress(edit: LowRankAffine, *, rtol: float | None = None) -> LowRankAffine:
    """Return the same linear map with factors of its numerical rank; wide compositions become thin again.

    Args:
        edit: A map about the origin.
        rtol: Singular values of ``E`` below this share of the largest are dropped; default rounding.
    """
    if edit.center is not None:
        raise ValueError("only maps about the origin are compressed")
    left, tall = torch.linalg.qr(edit.left)
    right, wide = torch.linalg.qr(edit.right)
    u, sizes, vh = torch.linalg.svd(tall @ wide.T, full_matrices=False)
    share = max(edit.left.shape) * torch.finfo(sizes.dtype).eps if rtol is None else rtol
    keep = sizes > share * (sizes.max() if len(sizes) else 0)
    half = sizes[keep].sqrt()
    return LowRankAffine(left @ u[:, keep] * half, right @ vh[keep].T * half)


def text_gram(weights: Iterable[Tensor]) -> Tensor:
    """Return ``H = sum W^T W``, shape ``(d, d)``: what all maps together see of an embedding.

    Args:
        weights: Weights that read text, each of shape ``(out, d)``.

    Raises:
        ValueError: If there are none, or a weight is not finite.
    """
    total: Tensor | None = None
    for weight in weights:
        wide = wide_rows(weight, "a weight", None if total is None else len(total))
        total = wide.new_zeros(wide.shape[1], wide.shape[1]) if total is None else total
        total.addmm_(wide.to(total).T, wide.to(total))
    if total is None:
        raise ValueError("there are no weights")
    return total
