"""Data of the linear benchmark; imports torch only, so the reference's process can use it too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 20_000


def features(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return well-posed correlated ``x (rows, width)`` float64 and binary ``z (rows,)`` float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    x *= torch.linspace(0.5, 2.0, width, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return x, (x[:, : width // 4].sum(1) / width**0.5 + noise > 0).double()


@dataclass(frozen=True)
class Case:
    """One row of the exactness table: data with real-valued concept columns ``z (n, c)``."""

    name: str
    x: Tensor
    z: Tensor
    bound: float


def cases() -> list[Case]:
    """Return the exactness cases: offsets, rare class, label scales, low precision, d > n."""
    found = []
    base, z = features(2000, 64)
    binary = torch.stack([1 - z, z], 1)
    kinds = ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5))
    for dtype, bound in kinds:
        kind = str(dtype).removeprefix("torch.")
        # near 1e4 bfloat16 resolves 64, so the spread must be larger than that
        spread = 200 if dtype == torch.bfloat16 else 1
        for offset in (0.0, 1e2, 1e4):
            moved = (base * spread + offset).to(dtype)
            found.append(Case(f"{kind}, offset {offset:g}", moved, binary, bound))
    wide, few = features(100, 400)
    rare_x, _ = features(ROWS, 32)
    rare = torch.zeros(ROWS, 2, dtype=torch.float64)
    rare[:, 0] = 1
    rare[:20] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    rare_x[:20] += 0.5
    for dtype, bound in kinds[:2]:
        kind = str(dtype).removeprefix("torch.")
        found.append(Case(f"{kind}, class at 0.1 %", rare_x.to(dtype), rare, bound))
        for scale in (1e-6, 1e-3, 1e3, 1e6):
            target = (base[:, :3] ** 2 + base[:, 1:4]) * scale
            found.append(Case(f"{kind}, labels x {scale:g}", base.to(dtype), target, bound))
        found.append(
            Case(f"{kind}, d = 4 n", wide.to(dtype), torch.stack([1 - few, few], 1), bound)
        )
    return found


def residual(left: Tensor, right: Tensor, case: Case) -> float:
    """Return ``||P A|| / ||A||`` for ``P = I - left right``, shapes ``(d, k)`` and ``(k, d)``."""
    x, z = case.x.double(), case.z
    cross = (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)
    kept = cross - left.double() @ (right.double() @ cross)
    return float(torch.linalg.matrix_norm(kept) / torch.linalg.matrix_norm(cross))
