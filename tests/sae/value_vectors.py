"""Value vectors with planted latents, and dictionaries that know them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concept_erasure.sae.disentangler import Disentangler, normalise

WIDTH, VECTORS, LATENTS = 64, 256, 12


@dataclass(frozen=True)
class Chosen:
    """A latent with a direction."""

    site: str
    index: int
    direction: int = 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int = 0, *, site: str = "mlp.1", width: int = WIDTH) -> Disentangler:
    """Return a dictionary with ``e_f = d_f`` orthonormal, no biases, and thresholds of 0.5."""
    rows = torch.linalg.qr(noise(width, LATENTS, seed=seed)).Q.T.contiguous()
    zero = torch.zeros(LATENTS, dtype=rows.dtype)
    return Disentangler(
        rows.T.contiguous(), zero, rows, rows.new_zeros(width), zero + 0.5, site=site
    )


def oblique(seed: int = 0, *, cosine: float = 0.85, width: int = WIDTH) -> Disentangler:
    """Return a dictionary whose latents have pairwise cosines below 0.9, and another encoder."""
    common = noise(width, seed=seed + 1)
    rows = torch.linalg.qr(noise(width, LATENTS, seed=seed)).Q.T
    rows = rows + (cosine / (1 - cosine)) ** 0.5 * common / common.norm()
    columns = (rows + 0.1 * noise(LATENTS, width, seed=seed + 2)).T
    zero = torch.zeros(LATENTS, dtype=rows.dtype)
    W_enc, b_enc, W_dec, theta = normalise(columns, zero, rows, zero + 0.1)
    dis = Disentangler(W_enc, b_enc, W_dec, rows.new_zeros(width), theta, site="mlp.1")
    angles = dis.W_dec @ dis.W_dec.T - torch.eye(LATENTS, dtype=rows.dtype)
    assert float(angles.abs().max()) < 0.9
    return dis


def planted(dis: Disentangler, latents: tuple[int, ...] = (2, 5), seed: int = 3) -> Tensor:
    """Return 256 value vectors: ten carry each latent with 3 to 4, of either sign; small noise everywhere."""
    values = 0.02 * noise(VECTORS, dis.d, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for place, latent in enumerate(latents):
        signs = torch.tensor([1.0, -1.0], dtype=values.dtype).repeat(5)
        size = 3 + torch.rand(10, generator=generator, dtype=values.dtype)
        values[planted_rows(place)] += (signs * size)[:, None] * dis.W_dec[latent]
    return values


def planted_rows(place: int) -> Tensor:
    """Return the numbers of the vectors that carry the latent planted at that place."""
    return torch.arange(20 + 40 * place, 30 + 40 * place)


def with_gain(dis: Disentangler, gain: Tensor) -> Disentangler:
    """Return the dictionary as one behind a norm."""
    return replace(dis, post_norm_gain=gain.to(dis.dtype), after_post_norm=True)
