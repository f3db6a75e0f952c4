"""The demo's first half: gender erased from the residual stream of a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from concept_erasure.collect import collect, fit_streaming
from concept_erasure.evals._demo import Bars, Data, Sizes, probe_interval, probe_rows, read_data
from concept_erasure.evals.language import TokenizerLike, continuation_gap, perplexity
from concept_erasure.evals.plots import concept_plane, plot_accuracy, plot_planes
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, Split, cued_prompts, open_prompts
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval, Report
from concept_erasure.sites import find_sites, model_id

__all__ = ["behaviour", "fit_in_order", "language_report", "residual_sites"]

Tick = Callable[[int], object]
GENDERS = ("feminine", "masculine")


def residual_sites(model: nn.Module, layers: Sequence[int]) -> list[str]:
    """Return the names of the residual sites of layers, in order; negative ones count from the end.

    Raises:
        ValueError: If the model has no such layer.
    """
    names = [name for name in find_sites(model) if name.startswith("residual.")]
    try:
        chosen = {names[layer] for layer in layers}
    except IndexError as error:
        raise ValueError(
            f"layers must lie in 0 ... {len(names) - 1} (or count from the end), got {layers}"
        ) from error
    return [name for name in names if name in chosen]


def fit_in_order(
    model: nn.Module,
    tokenizer: TokenizerLike,
    data: Data,
    sites: Sequence[str],
    *,
    stack: ExitStack,
    batch_size: int,
    bars: Bars,
) -> tuple[dict[str, LeaceEraser], dict[str, Tensor]]:
    """Fit and attach one LEACE eraser a site, each on what the erasers before it leave.

    Fitted this way every site is guarded with all erasers in place; erasers fitted on the untouched
    model would not fit what later layers see once earlier ones are erased.

    The labels belong to last tokens, but the erasers act on all tokens, the first of which are very large.
    All tokens are therefore background rows of the fit: the guarantee is the same, and the edit is the
    smallest on all of them. Without it one eraser at layer 26 raised perplexity from 90 to 412.

    Args:
        model: The language model; the erasers stay attached until ``stack`` closes.
        tokenizer: Its tokenizer.
        data: The texts of the fit.
        sites: Names of the sites, in the order of the forward pass.
        stack: Takes the edits.
        batch_size: Texts a forward pass.
        bars: Shows progress.

    Returns:
        Erasers and the erased activations of the fit's texts, by site.
    """
    names = [GENDERS[g] for g in data.gender.tolist()]
    erasers: dict[str, LeaceEraser] = {}
    with bars.bar("fitting erasers", len(data.items) * (len(sites) + 1)) as tick:
        for site in sites:
            fitters = fit_streaming(
                model, tokenizer, data.texts, names, sites=site, fitter=_fitter, background=True,
                batch_size=batch_size, progress=_counted(tick),
            )  # fmt: skip
            erasers[site] = fitters[site].eraser
            stack.enter_context(erasers[site].attach(model))
        erased = _collect(model, tokenizer, data, sites, batch_size, tick)
    return erasers, erased


def _fitter(width: int) -> LeaceFitter:
    return LeaceFitter(width, 2, classes=GENDERS)


def _counted(tick: Tick) -> Callable[[int, int], None]:
    """Return a progress function that passes on how many texts were done since the last call."""
    done = 0

    def progress(count: int, total: int) -> None:
        nonlocal done
        tick(count - done)
        done = count

    return progress


def behaviour(
    model: nn.Module, tokenizer: TokenizerLike, *, batch_size: int = 16
) -> dict[str, Cell]:
    """Return what the model says about gender, and how well it still writes.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        batch_size: Texts a forward pass.

    Returns:
        Numbers by name.
    """
    pairs = cued_prompts()
    words = [word for pair in pairs for word in pair]
    opened = continuation_gap(model, tokenizer, open_prompts(), batch_size=batch_size)
    cued = continuation_gap(model, tokenizer, words, batch_size=batch_size)
    feminine, masculine = cued.gaps[0::2], cued.gaps[1::2]
    moved = (masculine - feminine).tolist()
    right = int((masculine > 0).sum() + (feminine < 0).sum())
    middle = cued.gaps.median()
    ranked = int((masculine > middle).sum() + (feminine < middle).sum())
    return {
        "gap |log p(he) - log p(she)|, gender open (nats)": Interval.of_mean(
            opened.gaps.abs().tolist()
        ),
        "spread of the gap over professions (nats)": opened.spread,
        "gap moved by stated gender, signed (nats)": Interval.of_mean(moved),
        "pronoun agrees with stated gender": _share(right, len(words)),
        "the same, with a constant preference taken out": _share(ranked, len(words)),
        "p(he) + p(she)": float(torch.cat([opened.mass, cued.mass]).mean()),
        "perplexity of neutral sentences": perplexity(
            model, tokenizer, NEUTRAL_SENTENCES, batch_size=batch_size
        ),
    }


def _share(count: int, n: int) -> Interval:
    low, high = wilson_interval(count, n)
    return Interval(count / n, low, high)


def _collect(
    model: nn.Module,
    tokenizer: TokenizerLike,
    data: Data,
    sites: Sequence[str],
    size: int,
    tick: Tick,
) -> dict[str, Tensor]:
    found = collect(
        model, tokenizer, data.texts, sites=list(sites), batch_size=size, progress=_counted(tick)
    )
    return {site: item.x for site, item in found.items()}


def language_report(
    model: nn.Module, tokenizer: TokenizerLike, folder: Path, sizes: Sizes, bars: Bars
) -> Report:
    """Erase gender from a language model and report what changed; the model is left as it was.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        folder: Where erasers and pictures go.
        sizes: Numbers of texts, layers, seed.
        bars: Shows progress.

    Returns:
        The report.
    """
    start = time.perf_counter()
    sites, data = residual_sites(model, sizes.layers), read_data(sizes)
    size = sizes.batch_size
    said_before = behaviour(model, tokenizer)
    others: tuple[Split, ...] = ("probe", "test")
    with bars.bar("reading before", sum(len(data[s].items) for s in others)) as tick:
        before = {s: _collect(model, tokenizer, data[s], sites, size, tick) for s in others}
    with ExitStack() as stack:
        erasers, erased = fit_in_order(
            model, tokenizer, data["fit"], sites, stack=stack, batch_size=size, bars=bars
        )
        with bars.bar("reading after", sum(len(data[s].items) for s in others)) as tick:
            after = {s: _collect(model, tokenizer, data[s], sites, size, tick) for s in others}
        said_after = behaviour(model, tokenizer)
    undone = perplexity(model, tokenizer, NEUTRAL_SENTENCES)
    for site, eraser in erasers.items():
        eraser.save_pretrained(folder / "erasers" / "language" / site)
    read = _probe_table(before, after, data, sites, sizes.seed)
    guarantee = _guarantee(erased, data["fit"], sizes.seed)
    said = [
        {"measure": key, "before": value, "after": said_after[key]}
        for key, value in said_before.items()
    ]
    said.append({"measure": "perplexity after undo", "before": None, "after": undone})
    return Report(
        f"{model_id(model)}: {len(sites)} layers of the residual stream",
        meta={
            "model": model_id(model),
            "sites": sites,
            "erasers": [
                f"{e.report['rank']} direction(s), {getattr(e.config, 'method', e.method)}"
                for e in erasers.values()
            ],
            "seconds": round(time.perf_counter() - start, 1),
        },
        sections=(
            Report("What freshly trained probes read at the last token of unseen texts", read),
            Report("The guarantee, on the texts of the fit", guarantee),
            Report("What the model says", said),
        ),
        images=_pictures(before, after, data, sites, read, folder),
        notes=(
            "Probes are trained on one set of unseen texts and read on another; neither shares "
            "templates or professions with the texts of the fit.",
            "The guarantee covers linear probes on the data of the fit. What is left above one "
            "half on unseen texts is what the erasers did not learn from the fit; nonlinear "
            "probes are not covered at all.",
            "The erasers act on every token of every text, also of the neutral sentences.",
            "Layers were chosen after seeing numbers like these for seed 0, so they are a little "
            "flattering; one constant of the MLP probe's input units was, too. Before layer 25 of "
            "SmolLM2 a probe of the last token hardly beats chance.",
        ),
    )


_Read = Mapping[Split, Mapping[str, Tensor]]


def _probe_table(
    before: _Read, after: _Read, data: Mapping[Split, Data], sites: Sequence[str], seed: int
) -> list[dict[str, Cell]]:
    """Return one row for every site and probe."""
    rows: list[dict[str, Cell]] = []
    for site in sites:
        versions = {
            name: (read["probe"][site], read["test"][site])
            for name, read in (("before", before), ("after", after))
        }
        found = probe_rows(versions, data["probe"].gender, data["test"].gender, seed)
        rows += [{"site": site, **row} for row in found]
    return rows


def _guarantee(erased: Mapping[str, Tensor], data: Data, seed: int) -> list[dict[str, Cell]]:
    """Return what a linear probe makes of the very texts the erasers were fitted on."""
    rows: list[dict[str, Cell]] = []
    for site, x in erased.items():
        own = (x.float(), data.gender)
        means = [x[data.gender == g].double().mean(0) for g in (0, 1)]
        spread = x.double().std(0).norm()
        rows.append(
            {
                "site": site,
                "linear probe, trained and read on them": probe_interval(own, own, "linear", seed),
                "distance of class means / spread": float((means[0] - means[1]).norm() / spread),
            }
        )
    return rows


def _pictures(
    before: _Read,
    after: _Read,
    data: Mapping[Split, Data],
    sites: Sequence[str],
    rows: Sequence[Mapping[str, Cell]],
    folder: Path,
) -> dict[str, str]:
    """Draw the last site before and after, and probe accuracy by site."""
    last = sites[-1]
    plot_planes(
        before["test"][last],
        after["test"][last],
        data["test"].gender,
        folder / "language_plane.png",
        names=GENDERS,
        title=f"{last}, last token of unseen texts",
        plane=concept_plane(before["probe"][last], data["probe"].gender),
    )
    series: dict[str, list[Interval]] = {}
    for row in rows:
        for side in ("before", "after"):
            cell = row[side]
            if isinstance(cell, Interval) and row["probe"] in ("linear", "mlp"):
                series.setdefault(f"{row['probe']}, {side}", []).append(cell)
    plot_accuracy(series, sites, folder / "language_accuracy.png", title="Gender, unseen texts")
    return {
        "The last site before and after": "language_plane.png",
        "Probe accuracy by layer": "language_accuracy.png",
    }
