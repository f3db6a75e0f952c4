"""The demo's second half: gender erased from sentence embeddings, retrieval kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from concept_erasure.collect import Representations, collect
from concept_erasure.evals._demo import (
    PROBES,
    Bars,
    Data,
    Sizes,
    familiar_data,
    probe_rows,
    read_data,
)
from concept_erasure.evals.language import TokenizerLike
from concept_erasure.evals.plots import concept_plane, plot_planes
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, Split, profession_sentences
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval, Report
from concept_erasure.sites import find_sites, model_id

__all__ = ["neighbour_correlation", "profession_retrieval", "sentence_report"]

NEIGHBOURS = 5
DIRECTIONS = 23  # of the eraser that removes more: half of the templates of the fit


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


def _retrieval(
    queries: Tensor,
    keys: Tensor,
    neutral: Tensor,
    wanted: Tensor,
    erasers: Mapping[str, LeaceEraser],
) -> list[dict[str, Cell]]:
    """Return what retrieval does before erasure and after each eraser."""
    found, order, kept = "right profession found", "neutral rank correlation", "nearest five kept"
    before = profession_retrieval(queries, keys, wanted)
    rows: list[dict[str, Cell]] = [{"vectors": "before", found: before, order: 1.0, kept: 1.0}]
    for name, eraser in erasers.items():
        correlation, share = neighbour_correlation(neutral, eraser(neutral))
        right = profession_retrieval(eraser(queries), eraser(keys), wanted)
        rows.append({"vectors": name, found: right, order: correlation, kept: share})
    return rows


def _wanted(data: Data, keys: list[str]) -> Tensor:
    """Return the index of the sentence about each text's profession, shape ``[n]``."""
    return torch.tensor(
        [next(i for i, key in enumerate(keys) if f" {x.profession} " in key) for x in data.items]
    )


def _fit(x: Representations, data: Data, folder: Path) -> dict[str, LeaceEraser]:
    """Fit the least-damage eraser and one that removes more, and save both."""
    few, columns = replace(x, z=data.concept), data.detailed_concept
    many, rank = replace(x, z=columns), min(DIRECTIONS, columns.shape[1])
    erasers = {
        "LEACE": LeaceEraser.fit(few),
        f"orthogonal, {rank} directions": LeaceEraser.fit(many, method="orth", rank=rank),
    }
    for name, eraser in zip(("leace", "orthogonal"), erasers.values(), strict=True):
        eraser.save_pretrained(folder / "erasers" / "sentences" / name)
    return erasers


def sentence_report(
    model: nn.Module, tokenizer: TokenizerLike, folder: Path, sizes: Sizes, bars: Bars
) -> Report:
    """Erase gender from mean-pooled embeddings and report what changed.

    Args:
        model: A sentence encoder whose embedding is the mean of the last layer over tokens.
        tokenizer: Its tokenizer.
        folder: Where erasers and picture go.
        sizes: Numbers of texts, seed.
        bars: Shows progress.

    Returns:
        The report.
    """
    start = time.perf_counter()
    data, familiar = read_data(sizes), familiar_data(sizes)
    site = [name for name in find_sites(model) if name.startswith("residual.")][-1]
    keys = profession_sentences(("test",))
    parts: dict[str, list[str]] = {split: part.texts for split, part in data.items()}
    parts |= {"familiar": familiar.texts, "keys": keys, "neutral": list(NEUTRAL_SENTENCES)}
    x = _embed(model, tokenizer, parts, site, sizes.batch_size, bars)
    erasers = _fit(x["fit"], data["fit"], folder)
    tables = _read_tables(
        {name: item.x for name, item in x.items()}, data, familiar, erasers, sizes
    )
    wanted = _wanted(data["test"], keys)
    kept = _retrieval(x["test"].x, x["keys"].x, x["neutral"].x, wanted, erasers)
    plot_planes(
        x["test"].x,
        erasers["LEACE"](x["test"].x),
        data["test"].gender,
        folder / "sentences_plane.png",
        names=("feminine", "masculine"),
        title="Sentence embeddings of unseen texts, LEACE",
        plane=concept_plane(x["probe"].x, data["probe"].gender),
    )
    return Report(
        f"{model_id(model)}: mean-pooled sentence embeddings",
        meta={
            "model": model_id(model),
            "site": site,
            "directions erased": [eraser.proj_left.shape[1] for eraser in erasers.values()],
            "width": x["fit"].x.shape[1],
            "seconds": round(time.perf_counter() - start, 1),
        },
        notes=(
            "Erasers are fitted on gender within each kind of cue (LEACE) or within each template "
            "(orthogonal: more is removed, at a higher cost; cut to its strongest directions, it is not "
            "guarded exactly). The second was added after seeing what the first leaves in these texts.",
        ),
        sections=(*tables, Report(f"What retrieval keeps ({len(keys)} professions)", kept)),
        images={"Embeddings before and after": "sentences_plane.png"},
    )


def _embed(
    model: nn.Module,
    tokenizer: TokenizerLike,
    parts: Mapping[str, list[str]],
    site: str,
    batch_size: int,
    bars: Bars,
) -> dict[str, Representations]:
    """Return mean-pooled embeddings of every list of texts."""
    found: dict[str, Representations] = {}
    with bars.bar("embedding", sum(map(len, parts.values()))) as tick:
        for name, texts in parts.items():
            found[name] = collect(
                model,
                tokenizer,
                texts,
                sites=site,
                tokens="mean",
                batch_size=batch_size,
                progress=False,
            )
            tick(len(texts))
    return found


def _read_tables(
    x: Mapping[str, Tensor],
    data: Mapping[Split, Data],
    familiar: Data,
    erasers: Mapping[str, LeaceEraser],
    sizes: Sizes,
) -> list[Report]:
    """Return what probes read, from the texts of the fit to texts of another kind."""
    maps: dict[str, Callable[[Tensor], Tensor]] = {"before": lambda vectors: vectors, **erasers}
    half = sizes.n_probe

    def table(
        first: Tensor, second: Tensor, train: Tensor, test: Tensor, probes: Sequence[str] = PROBES
    ) -> list[dict[str, Cell]]:
        versions = {name: (erase(first), erase(second)) for name, erase in maps.items()}
        return probe_rows(versions, train, test, sizes.seed, probes=probes)

    gender, own = familiar.gender, data["fit"].gender
    return [
        Report(
            "Unseen templates and professions: what freshly trained probes read",
            table(x["probe"], x["test"], data["probe"].gender, data["test"].gender),
        ),
        Report(
            "Unseen texts made from the templates of the fit",
            table(x["familiar"][:half], x["familiar"][half:], gender[:half], gender[half:]),
        ),
        Report(
            "The texts of the fit themselves (the guarantee covers linear probes)",
            table(x["fit"], x["fit"], own, own, ("linear",)),
        ),
    ]
