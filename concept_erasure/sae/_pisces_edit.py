"""The equations of PISCES: which value vectors carry a latent, and how they change. Pure functions on tensors.

A value vector ``v_i`` (column i of an MLP's down projection) writes ``g * v_i`` into the space of a dictionary that
sits behind a norm of gain g, and ``v_i`` itself where there is no norm (g = 1). With e_f the encoder column and d_f
the decoder row of latent f:

    c_if = (g * v_i) . e_f                                   what the vector carries of the latent
    S_f  = { i : |c_if| > tau max_j |c_jf| }                 the vectors that are edited
    target_if = -s_f sigma_i mu M                            what is written in its place
    g * dv_i  = sum_f (target_if - now_if) d_f               the edit

(Gur-Arieh et al. 2025, arXiv:2505.22586, and its code, for g = 1.) s_f is +1 if the latent writes the concept and -1
if it writes against it, sigma_i the usual sign of neuron i on the concept, M the largest ``|c|`` of the layer or of
the latent, ``now`` the code z_f(g * v_i) or c_if itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from concept_erasure.errors import EditError, ShapeError
from concept_erasure.linalg import statistics_dtype
from concept_erasure.sae.disentangler import Disentangler

__all__ = ["Change", "Coefficient", "Layer", "Scale", "change", "depth_factor", "read_layer"]

Scale = Literal["layer", "latent"]
Coefficient = Literal["code", "linear"]
EARLY = 9 / 25  # relative depth below which the published schedule weakens the edit: layer 9 of 26
_KEPT = 0.1  # least length a write direction may have after protected latents are left alone


@dataclass(frozen=True, eq=False)
class Layer:
    """What an MLP says about some latents, before tau and mu are chosen. m vectors, k latents, width d.

    Attributes:
        site: Name of the site, such as ``"mlp.9"``.
        down: Path of the down projection.
        latents: Their numbers, shape ``(k,)``.
        signs: s, shape ``(k,)``.
        linear: c, shape ``(m, k)``.
        codes: z, shape ``(m, k)``.
        neurons: sigma, shape ``(m,)``; 0 leaves a vector alone.
        writes: What a unit of each latent adds to a vector, shape ``(k, d)``.
        gram: What that adds to each latent's c, shape ``(k, k)``: row f what latent f writes.
        reach: Share of the wanted change along d_f that ``writes`` brings, shape ``(k,)``; 1 but for the ridge and
            protected latents.
        depth: Factor of mu.
    """

    site: str
    down: str
    latents: Tensor
    signs: Tensor
    linear: Tensor
    codes: Tensor
    neurons: Tensor
    writes: Tensor
    gram: Tensor
    reach: Tensor
    depth: float = 1.0

    def to(self, device: torch.device | str) -> Layer:
        """Return it on a device."""
        names = ("latents", "signs", "linear", "codes", "neurons", "writes", "gram", "reach")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False)
class Change:
    """An edit of one layer: ``dv_i = coefficients[i] @ writes`` for the vectors with numbers ``columns``.

    Attributes:
        columns: Shape ``(c,)``, int64.
        coefficients: Shape ``(c, k)``, 0 where a vector is not selected for a latent.
        targets: What the coefficient becomes where it is selected, shape ``(c, k)``.
        selected: Shape ``(c, k)``, bool.
    """

    columns: Tensor
    coefficients: Tensor
    targets: Tensor
    selected: Tensor


def depth_factor(depth: float) -> float:
    """Return the factor of mu at a relative depth in [0, 1]: from 0.1 rising to 1 at 9/25, and 1 beyond.

    The published schedule is ``0.1 + 0.9 l / 9`` for layers l < 10 of 26.
    """
    return min(1.0, 0.1 + 0.9 * depth / EARLY)


def gains(gain: Tensor | None, ridge: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and ``g / (g^2 + lambda)`` with ``lambda = ridge median(g^2)``, shape ``(d,)``; ones without a norm.

    The second is the ridge solution of ``g * dv = d``: single gains are close to 0, or negative.
    """
    width = like.shape[-1]
    if gain is None:
        ones = torch.ones(width, dtype=like.dtype, device=like.device)
        return ones, ones
    g = gain.to(like)
    if g.shape != (width,):
        raise ShapeError(f"the gain must have shape ({width},); got {tuple(g.shape)}")
    floor = ridge * g.square().median()
    return g, g / (g.square() + floor)


def read_layer(
    dis: Disentangler,
    values: Tensor,
    latents: Tensor,
    signs: Tensor,
    *,
    site: str,
    down: str,
    neurons: Tensor | None = None,
    protect: Tensor | None = None,
    post_norm: bool = True,
    ridge: float = 1e-3,
    depth: float = 1.0,
) -> Layer:
    """Read value vectors through a dictionary; only the columns of the latents asked for are used.

    Args:
        dis: The dictionary, with its post-norm gain if it sits behind a norm.
        values: Value vectors, shape ``(m, d)``.
        latents: Which latents, shape ``(k,)``.
        signs: +1 or -1 for each, shape ``(k,)``.
        site: Name of the site.
        down: Path of the down projection.
        neurons: sigma, shape ``(m,)``; default ones.
        protect: Latents whose c no edit may change, shape ``(p,)``.
        post_norm: Whether the gain is used; False is the published rule.
        ridge: lambda in units of ``median(g^2)``. Higher makes smaller edits that reach less.
        depth: Factor of mu.

    Raises:
        ShapeError: If widths differ, or there are more or fewer signs than vectors.
        EditError: If protected latents leave nothing of a write direction.
    """
    if values.ndim != 2 or values.shape[1] != dis.d:
        raise ShapeError(
            f"value vectors must have shape (m, {dis.d}); got {tuple(values.shape)} at {site!r}"
        )
    dtype = statistics_dtype(values.device)
    v = values.detach().to(dtype)
    g, back = gains(dis.post_norm_gain if post_norm else None, ridge, v)
    seen = v * g
    chosen = latents.to(dis.device)
    encoder = dis.W_enc[:, chosen].to(v)
    decoder = dis.W_dec[chosen].to(v)
    if protect is not None and len(protect):
        guarded = dis.W_enc[:, protect.to(dis.device)].to(v) * (g * back)[:, None]
        left, sizes, _ = torch.linalg.svd(guarded, full_matrices=False)
        least = torch.finfo(dtype).eps * max(guarded.shape) * sizes.max()
        basis = left[:, sizes > least]  # two that read the same take one direction, not two
        whole = decoder.norm(dim=1)
        decoder = decoder - (decoder @ basis) @ basis.T
        share = decoder.norm(dim=1) / whole
        if bool((share < _KEPT).any()):
            lost = latents[share.argmin().to(latents.device)]
            raise EditError(
                f"latent {int(lost)} at {site!r} writes almost only what protected latents read; protect fewer"
            )
    writes = decoder * back
    effect = writes * g
    original = dis.W_dec[chosen].to(v)
    count = torch.ones(len(v), dtype=dtype, device=v.device)
    if neurons is not None and neurons.shape != count.shape:
        raise ShapeError(
            f"signs must have shape ({len(v)},), one a value vector of {site!r}; got {tuple(neurons.shape)}"
        )
    return Layer(
        site=site,
        down=down,
        latents=latents,
        signs=signs.to(v),
        linear=seen @ encoder,
        codes=dis.encode(seen, chosen.to(seen.device)).to(dtype),
        neurons=count if neurons is None else neurons.to(v),
        writes=writes,
        gram=effect @ encoder,
        reach=(effect * original).sum(1),
        depth=depth,
    )


def select(linear: Tensor, neurons: Tensor, tau: float) -> Tensor:
    """Return ``|c_if| > tau max_j |c_jf|``, without vectors of sign 0, shape ``(m, k)`` bool."""
    size = linear.abs()
    return (size > tau * size.amax(0)) & (neurons != 0)[:, None]


def change(
    layer: Layer,
    *,
    tau: float,
    mu: float,
    scale: Scale = "layer",
    coefficient: Coefficient = "code",
    exact: bool = False,
) -> Change:
    """Return the edit of a layer in closed form.

    Args:
        layer: What `read_layer` gave.
        tau: Share of the largest coefficient above which a vector is edited, in [0, 1).
        mu: Size of the opposing coefficient in units of M; 0 takes away what is there.
        scale: M of the layer, or of each latent.
        coefficient: What counts as there: the thresholded code (the paper), or c itself.
        exact: Solve ``sum_h delta_ih gram_hf = target_if - now_if`` over the latents selected for a vector, so that
            all its c change by just that, whatever the angles between latents; else ``delta = target - now``.
    """
    picked = select(layer.linear, layer.neurons, tau)
    columns = picked.any(1).nonzero()[:, 0]
    picked = picked[columns]
    largest = layer.linear.abs().amax(0)
    unit = largest.max().expand_as(largest) if scale == "layer" else largest
    targets = (-mu * layer.depth * layer.signs * unit) * layer.neurons[columns, None].sign()
    now = (layer.codes if coefficient == "code" else layer.linear)[columns]
    wanted = (targets - now) * picked
    if exact:
        wanted = _solved(layer.gram, wanted, picked)
    return Change(columns, wanted, targets * picked, picked)


def _solved(gram: Tensor, wanted: Tensor, picked: Tensor) -> Tensor:
    """Solve for each vector the system of its own latents, all at once: the identity stands for the others."""
    both = picked[:, :, None] & picked[:, None, :]
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # row f: sum_h delta_h gram[h, f], so the matrix is the transpose
    systems = torch.where(both, gram.T, eye)
    made: Tensor
    made, info = torch.linalg.solve_ex(systems, wanted[:, :, None])
    if bool((info != 0).any()) or not bool(torch.isfinite(made).all()):
        raise EditError("latents of one layer write the same direction; edit fewer, or exact=False")
    return made[:, :, 0] * picked


def value_weight(module: nn.Module) -> Tensor:
    """Return the value vectors of a down projection, shape ``(m, d)``."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().T if isinstance(module, nn.Linear) else weight.detach()
