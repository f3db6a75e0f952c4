"""The methods' solves, one layer at a time, by least squares in float64; nothing is shared with the library."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    erase: Tensor,
    preserve: Tensor,
    keep: Tensor,
    lam: float,
    held: Tensor | None = None,
) -> Tensor:
    """Return W' of one layer: weighted rows stacked, and ``W' k = W k`` for rows k of ``held`` by elimination."""
    d = weight.shape[1]
    x = torch.cat(
        [
            source * erase.sqrt()[:, None],
            preserve * keep.sqrt()[:, None],
            lam**0.5 * torch.eye(d, dtype=weight.dtype),
        ]
    )
    moved = (target - source) * erase.sqrt()[:, None] @ weight.T
    y = torch.cat([moved, x.new_zeros(len(x) - len(source), len(weight))])
    free = null_space(held, d)
    return weight + (free @ torch.linalg.lstsq(x @ free, y, driver="gelsd").solution).T


def null_space(held: Tensor | None, width: int) -> Tensor:
    """Return an orthonormal basis (d, r) of what is orthogonal to all rows of ``held``."""
    if held is None or not len(held):
        return torch.eye(width, dtype=torch.float64)
    _, sizes, vh = torch.linalg.svd(held, full_matrices=True)
    return vh[int((sizes > 1e-10 * sizes[0]).sum()) :].T


def least_change(
    weight: Tensor, source: Tensor, target: Tensor, metric: Tensor, held: Tensor
) -> Tensor:
    """Return W' with W'c = Wc* and W'k = Wk exactly and the least ``tr dW G dW^T``, from the bordered system."""
    d = weight.shape[1]
    basis = torch.linalg.svd(held.T, full_matrices=False)
    basis = basis[0][:, basis[1] > 1e-10 * basis[1][0]]
    border = torch.cat([basis, source.T], 1)
    n = border.shape[1]
    system = torch.cat(
        [
            torch.cat([metric, border], 1),
            torch.cat([border.T, border.new_zeros(n, n)], 1),
        ]
    )
    wanted = torch.cat(
        [
            border.new_zeros(d, len(weight)),
            border.new_zeros(basis.shape[1], len(weight)),
            (target - source) @ weight.T,
        ]
    )
    return weight + torch.linalg.solve(system, wanted)[:d].T


def context(source: list[int], anchor: list[int], width: int) -> tuple[list[int], list[int]]:
    """Return MACE's positions from real ids (end included): common beginning, common end, pads of the longer."""
    head = 0
    while head < min(len(source), len(anchor)) and source[head] == anchor[head]:
        head += 1
    tail = 0
    while tail < min(len(source), len(anchor)) - head and source[-1 - tail] == anchor[-1 - tail]:
        tail += 1
    pads = width - max(len(source), len(anchor))
    return tuple(
        [*range(head), *range(len(ids) - tail, len(ids) + pads)] for ids in (source, anchor)
    )  # type: ignore[return-value]
