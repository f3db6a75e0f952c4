"""The demo's second half: gender erased from sentence embeddings, retrieval kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from concept_erasure.collect import Representations, collect
from concept_erasure.evals._demo import Bars, Data, Sizes, probe_interval, probe_rows, read_data
from concept_erasure.evals.language import TokenizerLike
from concept_erasure.evals.plots import concept_plane, plot_planes
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, Split, profession_sentences
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval, Report
from concept_erasure.sites import find_sites, model_id

__all__ = ["neighbour_correlation", "profession_retrieval", "sentence_report"]

NEIGHBOURS = 5


def neighbour_correlation(before: Tensor, after: Tensor) -> tuple[Interval, float]:
    """Return how far the similarities of sentences keep their order, and their neighbours.

    Args:
        before: Embeddings, shape ``[n, d]``, n at least 3.
        after: The same after erasure.

    Returns:
        Mean Spearman correlation, over sentences, of the cosine similarities to all others, with
        its interval; and the share of the nearest five (or fewer) that stay among them.
    """
    n = len(before)
    others = ~torch.eye(n, dtype=torch.bool)
    tables = []
    for x in (before, after):
        unit = normalize(x.double(), dim=1)
        tables.append((unit @ unit.T).cpu()[others].reshape(n, n - 1))
    # similarities are real numbers without ties, so ranks are plain positions
    ranks = [table.argsort(1).argsort(1).double() for table in tables]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    scale = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    correlation = ((centred[0] * centred[1]).sum(1) / scale).tolist()
    count = min(NEIGHBOURS, n - 1)
    nearest = [table.topk(count, dim=1).indices for table in tables]
    kept = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(2).double().mean()
    return Interval.of_mean(correlation), float(kept)


def profession_retrieval(queries: Tensor, keys: Tensor, wanted: Tensor) -> Interval:
    """Return how often the nearest key by cosine is the right one, with its 95 % interval.

    Args:
        queries: Shape ``[n, d]``.
        keys: Shape ``[m, d]``.
        wanted: Index of the right key of each query, shape ``[n]``.
    """
    found = (normalize(queries.double(), dim=1) @ normalize(keys.double(), dim=1).T).argmax(1)
    correct = int((found == wanted.to(found.device)).sum())
    low, high = wilson_interval(correct, len(wanted))
    return Interval(correct / len(wanted), low, high)


def _topics(
    vectors: Mapping[Split, Tensor], keys: Tensor, neutral: Tensor, data: Data, eraser: LeaceEraser
) -> list[dict[str, Cell]]:
    """Return what retrieval does before and after."""
    names = profession_sentences(("test",))
    wanted = torch.tensor(
        [next(i for i, t in enumerate(names) if f" {x.profession} " in t) for x in data.items]
    )
    queries = vectors["test"]
    order, kept = neighbour_correlation(neutral, eraser(neutral))
    jobs, jobs_kept = neighbour_correlation(keys, eraser(keys))
    return [
        {
            "measure": f"right profession found among {len(keys)}",
            "before": profession_retrieval(queries, keys, wanted),
            "after": profession_retrieval(eraser(queries), eraser(keys), wanted),
        },
        {"measure": "neutral sentences: rank correlation", "before": 1.0, "after": order},
        {"measure": "neutral sentences: nearest five kept", "before": 1.0, "after": kept},
        {"measure": "profession sentences: rank correlation", "before": 1.0, "after": jobs},
        {"measure": "profession sentences: nearest five kept", "before": 1.0, "after": jobs_kept},
    ]


def sentence_report(
    model: nn.Module, tokenizer: TokenizerLike, folder: Path, sizes: Sizes, bars: Bars
) -> Report:
    """Erase gender from mean-pooled embeddings and report what changed.

    Args:
        model: A sentence encoder whose embedding is the mean of the last layer over tokens.
        tokenizer: Its tokenizer.
        folder: Where eraser and picture go.
        sizes: Numbers of texts, seed.
        bars: Shows progress.

    Returns:
        The report.
    """
    start = time.perf_counter()
    data = read_data(sizes)
    site = [name for name in find_sites(model) if name.startswith("residual.")][-1]
    keys, neutral = profession_sentences(("test",)), list(NEUTRAL_SENTENCES)
    total = sum(len(part.items) for part in data.values()) + len(keys) + len(neutral)
    with bars.bar("embedding", total) as tick:

        def embed(texts: list[str]) -> Representations:
            found = collect(
                model, tokenizer, texts, sites=site, tokens="mean", batch_size=sizes.batch_size
            )
            tick(len(texts))
            return found

        fit = embed(data["fit"].texts)
        before: dict[Split, Tensor] = {s: embed(data[s].texts).x for s in ("probe", "test")}
        key_vectors, neutral_vectors = embed(keys).x, embed(neutral).x
    eraser = LeaceEraser.fit(Representations(fit.x, data["fit"].concept, fit.space))
    eraser.save_pretrained(folder / "erasers" / "sentences")
    after: dict[Split, Tensor] = {split: eraser(x) for split, x in before.items()}
    own = (eraser(fit.x).float(), data["fit"].gender)
    plot_planes(
        before["test"],
        after["test"],
        data["test"].gender,
        folder / "sentences_plane.png",
        names=("feminine", "masculine"),
        title="Sentence embeddings of unseen texts",
        plane=concept_plane(before["probe"], data["probe"].gender),
    )
    read = probe_rows(before, after, data, sizes.seed)
    read.append(
        {
            "probe": "linear, trained and read on the texts of the fit (the guarantee)",
            "after": probe_interval(own, own, "linear", sizes.seed),
        }
    )
    kept = _topics(before, key_vectors, neutral_vectors, data["test"], eraser)
    return Report(
        f"{model_id(model)}: mean-pooled sentence embeddings",
        meta={
            "model": model_id(model),
            "site": site,
            "directions erased": eraser.proj_left.shape[1],
            "width": fit.x.shape[1],
            "seconds": round(time.perf_counter() - start, 1),
        },
        sections=(
            Report("What freshly trained probes read in unseen texts", read),
            Report("What retrieval keeps", kept),
        ),
        images={"Embeddings before and after": "sentences_plane.png"},
    )
