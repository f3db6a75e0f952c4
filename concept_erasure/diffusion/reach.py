"""What a white-box attacker who may choose any text embedding can still reach after an edit; needs no images.

``rho(c) = min_x |H^(1/2) (M x - c)| / |H^(1/2) (c - c*)|``, the share of the way from anchor to concept that no
embedding can travel. Every invertible edit has 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_erasure.diffusion.core import wide_rows
from concept_erasure.errors import ShapeError
from concept_erasure.linalg import LowRankAffine

__all__ = ["Certificate", "certificate", "certificate_by_layer"]

SINGULAR = 1e-10  # a direction shrunk by more than this cannot be brought back in float64


@dataclass(frozen=True, eq=False)
class Certificate:
    """What somebody who may choose any text embedding can still reach, one number for each concept.

    Attributes:
        rho: Share of the way from anchor to concept that no embedding can travel; 0 is fully restorable.
        distance: ``|x - c| / |c|`` of the best such embedding that is nearest to the concept.
        norm: ``|x| / |c|`` of it.
        anchored: Whether rho is relative to the anchors, and not to the concepts themselves.
        names: The concepts, if they have names.
    """

    rho: Tensor
    distance: Tensor
    norm: Tensor
    anchored: bool = True
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rho)

    def to_dict(self) -> dict[str, list[float] | bool | list[str]]:
        """Return plain numbers for a report."""
        return {
            "rho": self.rho.tolist(),
            "distance": self.distance.tolist(),
            "norm": self.norm.tolist(),
            "anchored": self.anchored,
            "names": list(self.names),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Certificate:
        """Return what `to_dict` gave."""
        rho, distance, norm = (
            torch.tensor(values[key], dtype=torch.float64) for key in ("rho", "distance", "norm")
        )
        names = values.get("names", [])
        return cls(
            rho,
            distance,
            norm,
            bool(values.get("anchored", True)),
            tuple(str(name) for name in names) if isinstance(names, list | tuple) else (),
        )

    def __repr__(self) -> str:
        below = "|c - anchor|" if self.anchored else "|c|"
        lines = [
            f"Certificate: out of reach of every text embedding, as a share of {below} (0: restorable)"
        ]
        rows = list(zip(self.rho.tolist(), self.distance.tolist(), self.norm.tolist(), strict=True))
        for k, (rho, distance, norm) in enumerate(rows[:20]):
            name = repr(self.names[k]) if k < len(self.names) else f"concept {k}"
            lines.append(
                f"  {name}: {rho:.3g}; the nearest way back lies {distance:.3g} |c| away, at {norm:.3g} |c|"
            )
        if len(rows) > 20:
            lines.append(f"  ... and {len(rows) - 20} more, {min(r[0] for r in rows):.3g} at least")
        return "\n".join(lines)


def certificate(
    H: Tensor | Callable[[], Tensor] | None,
    map: LowRankAffine,
    concepts: Tensor,
    anchors: Tensor | None = None,
    *,
    names: Sequence[str] = (),
) -> Certificate:
    """Return what no choice of a text embedding can reach after an edit; needs no images.

    ``rho = min_x |H^(1/2) (M x - c)| / |H^(1/2) (c - c*)|``. An invertible edit gives 0 whatever H is.

    Args:
        H: `text_gram` of the maps that were edited, of full rank, or a function that gives it; it is needed
            only where the edit is singular.
        map: The edit.
        concepts: Shape ``(n, d)``.
        anchors: Shape ``(n, d)``; None compares with the concepts themselves (erasers without anchors).
        names: Of the concepts, to be shown.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If H is needed and missing, or not of full rank.
    """
    rows = wide_rows(concepts, "concepts", map.width)
    edit = map.to(rows.device, rows.dtype)
    other = None if anchors is None else wide_rows(anchors, "anchors", map.width).to(rows)
    if other is not None and len(other) != len(rows):
        raise ShapeError(f"{len(rows)} concepts and {len(other)} anchors")
    below = rows if other is None else rows - other
    # in an orthonormal basis of all the factors the edit is I outside, and a small matrix inside
    basis = _span(edit)
    core = torch.eye(basis.shape[1], dtype=rows.dtype, device=rows.device)
    core = core - (basis.T @ edit.left) @ (edit.right.T @ basis)
    wanted = rows - edit(rows)
    rho = rows.new_zeros(len(rows))
    inverse = _inverse(core)
    if inverse is None:
        u, sizes, vh = torch.linalg.svd(core)
        lost = sizes <= SINGULAR * sizes.max().clamp_min(1.0)
        inverse = (vh[~lost].T / sizes[~lost]) @ u[:, ~lost].T
        if bool(lost.any()):
            gram = H() if callable(H) else H
            if gram is None:
                raise ValueError("the edit is singular, so H is needed; give text_gram(weights)")
            rho, wanted = _out_of_reach(gram.to(rows), basis @ u[:, lost], wanted, below)
    inside = wanted @ basis
    step = wanted + (inside @ inverse.T - inside) @ basis.T
    size = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    distance = torch.linalg.vector_norm(step, dim=1) / size
    norm = torch.linalg.vector_norm(rows + step, dim=1) / size
    return Certificate(rho, distance, norm, anchors is not None, tuple(names))


def certificate_by_layer(
    layers: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    concepts: Tensor,
    anchors: Tensor | None = None,
    *,
    names: Sequence[str] = (),
) -> Certificate:
    """Return the certificate of an edit that differs by layer, where no one map M stands for all.

    ``rho^2 = min_x sum_l |W'_l x - W_l c|^2 / sum_l |W_l (c - c*)|^2``: one least-squares problem for all layers
    together, through its normal equations; the residual itself is then taken layer by layer, without cancellation.

    Args:
        layers: Gives the pairs (W_l, W'_l), each of shape ``(out, d)``; called twice.
        concepts: Shape ``(n, d)``.
        anchors: Shape ``(n, d)``; None compares with the concepts themselves.
        names: Of the concepts, to be shown.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If there are no layers.
    """
    rows = wide_rows(concepts, "concepts")
    other = None if anchors is None else wide_rows(anchors, "anchors", rows.shape[1]).to(rows)
    if other is not None and len(other) != len(rows):
        raise ShapeError(f"{len(rows)} concepts and {len(other)} anchors")
    below = rows if other is None else rows - other
    seen = rows.new_zeros(rows.shape[1], rows.shape[1])
    missing = torch.zeros_like(rows)  # sum_l W'_l^T (W_l - W'_l) c, what is wanted beyond x = c
    count = 0
    for before, after in layers():
        old, new = before.to(rows), after.to(rows)
        seen.addmm_(new.T, new)
        missing += (rows @ (old - new).T) @ new
        count += 1
    if not count:
        raise ValueError("there are no layers")
    step = missing @ torch.linalg.pinv(seen, hermitian=True)
    left, way = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for before, after in layers():
        old, new = before.to(rows), after.to(rows)
        left += ((rows + step) @ new.T - rows @ old.T).square().sum(1)
        way += (below @ old.T).square().sum(1)
    tiny = torch.finfo(rows.dtype).tiny
    size = torch.linalg.vector_norm(rows, dim=1).clamp_min(tiny)
    return Certificate(
        (left / way.clamp_min(tiny)).sqrt(),
        torch.linalg.vector_norm(step, dim=1) / size,
        torch.linalg.vector_norm(rows + step, dim=1) / size,
        anchors is not None,
        tuple(names),
    )


def _inverse(core: Tensor) -> Tensor | None:
    """Return the inverse if it is far from singular; cheaper than an SVD."""
    inverse, failed = torch.linalg.inv_ex(core)
    if bool(failed) or not bool(torch.isfinite(inverse).all()):
        return None
    size = float(inverse.norm()) * max(1.0, float(core.norm()))
    found: Tensor = inverse
    return found if size < 0.1 / SINGULAR else None


def _span(edit: LowRankAffine) -> Tensor:
    """Return an orthonormal basis of the columns of both factors, shape ``(d, at most 2k)``."""
    if 2 * edit.rank >= edit.width:
        return torch.eye(edit.width, dtype=edit.left.dtype, device=edit.left.device)
    tiny = torch.finfo(edit.left.dtype).tiny
    columns = torch.cat([edit.left, edit.right], 1)
    columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(tiny)
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _out_of_reach(
    H: Tensor, closed: Tensor, wanted: Tensor, below: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rho, and the part of what is wanted that the edit can express (nearest in H).

    Args:
        H: Shape ``(d, d)``.
        closed: Basis of the null space of ``M^T``, shape ``(d, m)``.
        wanted: Rows ``c - M c``, shape ``(n, d)``.
        below: Rows that rho is relative to, shape ``(n, d)``.
    """
    factor, failed = torch.linalg.cholesky_ex(H)
    pivots = factor.diagonal().square()
    if bool(failed) or float(pivots.min()) <= len(H) * torch.finfo(H.dtype).eps * float(
        pivots.max()
    ):
        raise ValueError(
            f"H does not have full rank {len(H)}: the maps do not see every direction of an embedding, so there is "
            "no certificate; give the weights of all edited maps"
        )
    seen = torch.cholesky_solve(closed, factor)
    small = torch.linalg.cholesky(closed.T @ seen)
    inside = wanted @ closed
    missed = torch.linalg.solve_triangular(small, inside.T, upper=False)
    scale = torch.linalg.vector_norm(below @ factor, dim=1)
    rho = torch.linalg.vector_norm(missed, dim=0) / scale.clamp_min(torch.finfo(H.dtype).tiny)
    return rho, wanted - torch.cholesky_solve(inside.T, small).T @ seen.T
