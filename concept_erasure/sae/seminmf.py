"""A dictionary in minutes, from concept and neutral sentences alone: semi-nonnegative matrix factorisation.

    minimise ||X - Z D||_F^2   over codes Z >= 0 with at most k non-zeros a row, and rows of D of norm 1

X (N, d) holds activations at one site minus their mean over the neutral texts (Ding, Li and Jordan 2010, "Convex and
semi-nonnegative matrix factorizations", for the objective; Suslik et al. 2026, arXiv:2606.03695, use such a
factorisation where a model has no sparse autoencoder). Alternated here: codes by projected gradient steps, then the k
largest of each row; D by least squares. Ding et al. take multiplicative steps and have no k; without it (``k = rank``)
the error falls in every step here too.

A factorisation has no encoder. One is fitted afterwards: W and b by ridge regression of Z on X, a threshold per
latent at which it fires as often as in Z, a factor per latent by least squares where it fires, and D once more for
these codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure._storage import library_version
from concept_erasure.collect import Progress
from concept_erasure.errors import ErasureWarning
from concept_erasure.sae.activations import collect_activations
from concept_erasure.sae.disentangler import Disentangler, normalise
from concept_erasure.sae.measure import quality
from concept_erasure.sites import fingerprint, model_id

__all__ = ["codes", "factorise", "semi_nmf", "with_encoder"]

_CODE_STEPS = 10
_RIDGE = 1e-3  # of the mean eigenvalue of X^T X
_POOR = 0.9  # unexplained fraction above which the user is told


def codes(x: Tensor, D: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    """Return non-negative codes of x for a dictionary, at most k a row.

    Projected gradient ``Z <- max(0, Z - (Z D D^T - X D^T) / L)``, L the largest eigenvalue of ``D D^T``; then the k
    largest stay and are fitted again.

    Args:
        x: Shape ``(N, d)``.
        D: Shape ``(r, d)``, rows of norm 1.
        k: Codes a row; r or more for no limit.
        start: Codes to start from, shape ``(N, r)``; default 0.

    Returns:
        Shape ``(N, r)``.
    """
    gram, target = D @ D.T, x @ D.T
    step = 1 / torch.linalg.matrix_norm(gram, 2)
    z = torch.zeros_like(target) if start is None else start
    for _ in range(_CODE_STEPS):
        z = (z - step * (z @ gram - target)).clamp_min(0)
    if k >= len(D):
        return z
    top = z.topk(k, dim=1)
    support = torch.zeros_like(z).scatter(1, top.indices, 1.0)
    z = z * support
    for _ in range(_CODE_STEPS):
        z = (z - step * (z @ gram - target)).clamp_min(0) * support
    return z


def factorise(
    x: Tensor,
    *,
    rank: int,
    k: int | None = None,
    iterations: int = 50,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor, list[float]]:
    """Return codes, dictionary and errors of ``X ~ Z D``.

    Args:
        x: Shape ``(N, d)``, centred.
        rank: Rows r of D.
        k: Codes a row; None for no limit.
        iterations: Alternations.
        seed: Of the rows of x that D starts from, drawn in proportion to their squared norm.
        progress: Whether to show a bar.

    Returns:
        Z ``(N, r)``, D ``(r, d)`` with rows of norm 1, and ``||X - Z D||^2 / ||X||^2`` after each alternation.

    Raises:
        ValueError: If the rank or k is out of range, or x is zero.
    """
    if not 1 <= rank <= len(x):
        raise ValueError(f"rank must lie between 1 and the {len(x)} vectors; got {rank}")
    if k is not None and not 1 <= k <= rank:
        raise ValueError(f"k must lie between 1 and the rank {rank}; got {k}")
    limit = rank if k is None else k
    sizes = x.square().sum(1)
    total = float(sizes.sum())
    if not total > 0 or int((sizes > 0).sum()) < rank:
        raise ValueError(f"fewer than {rank} vectors differ from the mean; lower the rank")
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(sizes.cpu().double(), rank, generator=generator)
    D = nn.functional.normalize(x[first.to(x.device)], dim=1)
    z: Tensor | None = None
    errors: list[float] = []
    for _ in tqdm(range(iterations), desc="factorising", disable=_hidden(progress), leave=False):
        z = codes(x, D, limit, z)
        D, z = _dictionary(x, z, D)
        errors.append(float((x - z @ D).square().sum()) / total)
    if z is None:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    return z, D, errors


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _dictionary(x: Tensor, z: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares dictionary with rows of norm 1, and the codes in its units.

    A row without codes starts again from a vector that is explained worst.
    """
    used = z.amax(0) > 0
    made = D.clone()
    made[used] = _least_squares(z[:, used], x)
    sizes = made.norm(dim=1)
    used &= sizes > 0
    z = z * sizes.where(used, torch.zeros_like(sizes))
    made = made / sizes.where(used, torch.ones_like(sizes))[:, None]
    unused = int((~used).sum())
    if unused:
        worst = (x - z @ made).square().sum(1).topk(min(unused, len(x))).indices
        fresh = nn.functional.normalize(x[worst] - z[worst] @ made, dim=1)
        made[(~used).nonzero()[:, 0][: len(fresh)]] = fresh
    return made, z


def _least_squares(z: Tensor, x: Tensor) -> Tensor:
    gram = z.T @ z
    floor = torch.finfo(z.dtype).eps * len(gram) * gram.diagonal().amax()
    gram.diagonal().add_(floor)
    made: Tensor = torch.linalg.solve(gram, z.T @ x)
    return made


def with_encoder(x: Tensor, z: Tensor, D: Tensor, mean: Tensor) -> Disentangler:
    """Return a dictionary that encodes by itself, fitted to codes.

    Args:
        x: Vectors ``(N, d)``, centred.
        z: Their codes ``(N, r)``.
        D: Dictionary ``(r, d)``.
        mean: What was subtracted from the vectors, shape ``(d,)``.
    """
    middle, centre = z.mean(0), x.mean(0)
    apart = x - centre
    gram = apart.T @ apart
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    W = torch.linalg.solve(gram, apart.T @ (z - middle))
    b = middle - centre @ W
    h = x @ W + b
    theta = _matching_threshold(h, (z > 0).sum(0))
    fired = h * (h > theta)
    factor = (fired * z).sum(0) / fired.square().sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    factor = factor.where(factor > 0, torch.ones_like(factor))
    W, b, theta, fired = W * factor, b * factor, theta * factor, fired * factor
    used = fired.amax(0) > 0
    rows = D.clone()
    rows[used] = _least_squares(fired[:, used], x)
    W, b, rows, theta = normalise(W, b, rows, theta)
    return Disentangler(W, b, rows, mean, theta)


def _matching_threshold(h: Tensor, counts: Tensor) -> Tensor:
    """Return the threshold of each column of h, at least 0, above which that many of its values lie."""
    ordered = h.sort(dim=0, descending=True).values
    last = len(h) - 1
    above = ordered.gather(0, (counts - 1).clamp(0, last)[None])[0]
    below = ordered.gather(0, counts.clamp(0, last)[None])[0]
    theta = ((above + below) / 2).where(counts > 0, ordered[0])
    return theta.clamp_min(0)


@torch.no_grad()
def semi_nmf(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    concept_texts: Sequence[str],
    neutral_texts: Sequence[str],
    *,
    site: str,
    rank: int = 128,
    k: int | None = None,
    tokens: int = 20_000,
    iterations: int = 50,
    max_length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Disentangler:
    """Fit a dictionary to what a model does at one site on concept and neutral texts; no sparse autoencoder is needed.

    It describes these texts and little else: use it to find and edit the concept, not to explain the model.

    Args:
        model: A Hugging Face model; not changed.
        tokenizer: Its tokenizer.
        concept_texts: Texts about the concept; a hundred sentences are a good start.
        neutral_texts: Texts about other things, some of them close to the concept.
        site: Name of one site, such as ``"mlp.9"``.
        rank: Number of latents. Higher explains more, and splits the concept finer.
        k: Latents a vector at most; default an eighth of the rank, at least 1.
        tokens: Vectors of each kind, at most.
        iterations: Alternations.
        max_length: Tokens the model reads together.
        batch_size: Windows of a forward pass.
        seed: Of everything random.
        progress: Whether to show bars; default on a terminal.

    Returns:
        The dictionary, latents that fire more on the concept first. Its `report` holds ``"concept_rate"`` and
        ``"neutral_rate"``, the share of either kind of vectors that each latent fires on, and the quality on held-out
        vectors.

    Raises:
        SiteNotFoundError: If the site does not exist.
        ValueError: If there are too few vectors for the rank.
    """
    sides: list[tuple[Tensor, Tensor]] = []
    for texts in (concept_texts, neutral_texts):
        held = collect_activations(
            model, tokenizer, texts, sites=[site], tokens=tokens, max_length=max_length, batch_size=batch_size,
            dtype=torch.float32, seed=seed, progress=progress,
        )  # fmt: skip
        name = held.sites[0]
        sides.append((next(held.batches(name, len(held), seed=seed)), held.held_out(name)))
    device = next(model.parameters()).device
    (concept, concept_unseen), (neutral, neutral_unseen) = sides
    concept, neutral = concept.to(device), neutral.to(device)
    mean = neutral.mean(0)
    x = torch.cat((concept, neutral)) - mean
    limit = max(1, rank // 8) if k is None else k
    bar = progress if isinstance(progress, bool) else None
    z, D, errors = factorise(x, rank=rank, k=limit, iterations=iterations, seed=seed, progress=bar)
    dis = with_encoder(x, z, D, mean)
    rates = [dis.firing(part).rate for part in (concept, neutral)]
    order = (rates[0] - rates[1]).argsort(descending=True)
    unseen = torch.cat((concept_unseen, neutral_unseen)).to(device)
    found = quality(dis, unseen)
    if found.fvu > _POOR:
        warnings.warn(
            f"the dictionary leaves {found.fvu:.0%} of the variance at {site!r} unexplained; raise rank or k, give "
            "more texts, or take another site",
            ErasureWarning,
            stacklevel=2,
        )
    report = {
        "method": "semi-nmf", "library_version": library_version(), "fingerprint": fingerprint(model),
        "rank": rank, "k": limit, "iterations": iterations, "seed": seed, "vectors": [len(concept), len(neutral)],
        "factorisation_error": errors[-1], "concept_rate": rates[0][order].tolist(),
        "neutral_rate": rates[1][order].tolist(), "quality": found.to_dict(),
    }  # fmt: skip
    return replace(
        dis, W_enc=dis.W_enc[:, order].contiguous(), b_enc=dis.b_enc[order], W_dec=dis.W_dec[order],
        threshold=dis.threshold[order], site=site, model=model_id(model), report=report,
    )  # fmt: skip
