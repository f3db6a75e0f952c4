"""The papers' solves, one layer at a time, written from their equations with explicit inverses in float64.

Nothing here is shared with the library: columns are vectors as in the papers, and every layer inverts its own matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uce(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    erase: Tensor,
    preserve: Tensor,
    keep: Tensor,
    lam: float,
) -> Tensor:
    """Return W' of one layer. Rows of source (n, d), preserve (m, d) are vectors; erase (n,), keep (m,) weights."""
    return uce_outputs(weight, source, target @ weight.T, erase, preserve, keep, lam)


def uce_outputs(
    weight: Tensor,
    source: Tensor,
    outputs: Tensor,
    erase: Tensor,
    preserve: Tensor,
    keep: Tensor,
    lam: float,
) -> Tensor:
    """Return W' for wanted outputs v, (n, out): (lam W + w v c^T + g W p p^T)(lam I + w c c^T + g p p^T)^-1, summed."""
    wanted = lam * weight
    system = lam * torch.eye(weight.shape[1], dtype=weight.dtype)
    for c, v, w in zip(source, outputs, erase, strict=True):
        wanted = wanted + w * torch.outer(v, c)
        system = system + w * torch.outer(c, c)
    for p, g in zip(preserve, keep, strict=True):
        wanted = wanted + g * torch.outer(weight @ p, p)
        system = system + g * torch.outer(p, p)
    return wanted @ torch.linalg.inv(system)


def constrained(
    weight: Tensor, source: Tensor, target: Tensor, gram: Tensor, lam: float, kept: Tensor
) -> Tensor:
    """Return W' of unit weights with W'k = Wk for all rows k of kept, from the bordered (KKT) system."""
    d = weight.shape[1]
    basis = torch.linalg.svd(kept.T, full_matrices=False)
    basis = basis[0][:, basis[1] > 1e-10 * basis[1][0]]
    system = lam * torch.eye(d, dtype=weight.dtype) + gram + source.T @ source
    border = torch.zeros(basis.shape[1], basis.shape[1], dtype=weight.dtype)
    bordered = torch.cat([torch.cat([system, basis], 1), torch.cat([basis.T, border], 1)])
    right = lam * weight + weight @ gram + (target @ weight.T).T @ source
    both = torch.cat([right, weight @ basis], 1)
    return torch.linalg.solve(bordered, both.T).T[:, :d]


def tensor_outputs(weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the first release's targets for the tokens of one concept, (n, out)."""
    old = source @ weight.T
    new = target @ weight.T
    unit = old / old.norm()
    return new - (unit * new).sum() * unit


def adversarial(
    weights: list[Tensor], edited: list[Tensor], concepts: Tensor, reg: float
) -> Tensor:
    """Return RECE's embeddings: (r I + sum W'^T W')^-1 (sum W'^T W) c for each row c."""
    d = weights[0].shape[1]
    system = reg * torch.eye(d, dtype=concepts.dtype)
    mixed = torch.zeros(d, d, dtype=concepts.dtype)
    for weight, now in zip(weights, edited, strict=True):
        system = system + now.T @ now
        mixed = mixed + now.T @ weight
    return (torch.linalg.inv(system) @ mixed @ concepts.T).T


def rece(
    weights: list[Tensor],
    edited: list[Tensor],
    concepts: Tensor,
    anchor: Tensor,
    preserve: Tensor,
    keep: Tensor,
    lam: float,
    reg: float,
    rounds: int,
) -> list[Tensor]:
    """Return the weights after some rounds; rows of concepts and anchor correspond."""
    for _ in range(rounds):
        found = adversarial(weights, edited, concepts, reg)
        ones = torch.ones(len(found), dtype=found.dtype)
        edited = [uce(w, found, anchor, ones, preserve, keep, lam) for w in edited]
    return edited


def speed_projector(rows: Tensor, tau: float) -> Tensor:
    """Return P, the projector on eigenvectors of the mean Gram whose eigenvalue is below tau."""
    u, s, _ = torch.linalg.svd(rows.T @ rows / len(rows))
    return u[:, s < tau] @ u[:, s < tau].T


def speed_filter(
    weight: Tensor, source: Tensor, target: Tensor, concepts: int, rows: Tensor
) -> Tensor:
    """Return which rows have more than the mean of |W (U - T)(I + T)^-1 p|."""
    probe = _probe(weight, source, target, concepts)
    size = (rows @ probe.T).norm(dim=1)
    return size > size.mean()


def _probe(weight: Tensor, source: Tensor, target: Tensor, concepts: int) -> Tensor:
    t = source.T @ source / concepts
    u = target.T @ source / concepts
    return weight @ (u - t) @ torch.linalg.inv(torch.eye(len(t), dtype=t.dtype) + t)


def speed_retained(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    concepts: int,
    rows: Tensor,
    noise: Tensor | None,
    *,
    filtering: bool,
) -> Tensor:
    """Return what one layer retains: rows above the mean influence, and neighbours p + P_min e above theirs."""
    if filtering:
        chosen = speed_filter(weight, source, target, concepts, rows)
        rows, noise = rows[chosen], None if noise is None else noise[chosen]
    if noise is None:
        return rows
    last = torch.linalg.svd(weight, full_matrices=False)[2][-1:]
    near = (rows[:, None] + noise @ (last.T @ last)).reshape(-1, rows.shape[1])
    near = near[speed_filter(weight, source, target, concepts, near)]
    return torch.cat([rows, near])


def speed(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    concepts: int,
    projector: Tensor,
    kept: Tensor,
    scale: float,
    ridge: float,
) -> Tensor:
    """Return W' by the published expression with Lagrange multipliers; rows of kept are the invariants."""
    d = weight.shape[1]
    eye = torch.eye(d, dtype=weight.dtype)
    t = source.T @ source / concepts
    u = target.T @ source / concepts
    m = torch.linalg.inv(t @ projector + scale * eye)
    k = kept.T
    inner = k.T @ projector @ m @ k + ridge * torch.eye(k.shape[1], dtype=weight.dtype)
    held = eye - m @ k @ torch.linalg.inv(inner) @ k.T @ projector
    return weight + weight @ (u - t) @ projector @ held @ m
