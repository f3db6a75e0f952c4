"""The demo's first half: gender erased from the residual stream of a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import Representations, collect, select
from concept_erasure.evals._demo import Bars, Data, Sizes, probe_interval, probe_rows, read_data
from concept_erasure.evals.language import continuation_gap, perplexity
from concept_erasure.evals.plots import concept_plane, plot_accuracy, plot_planes
from concept_erasure.evals.texts import NEUTRAL_SENTENCES, Split, cued_prompts, open_prompts
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval, Report
from concept_erasure.sites import Space, find_sites, fingerprint, hook, model_id, resolve

__all__ = ["behaviour", "fit_in_order", "language_report", "residual_sites"]

Tick = Callable[[int], object]
_NAMES = ("feminine", "masculine")


class _Reached(Exception):  # noqa: N818 it is a signal, not an error
    """The forward pass has reached the site that is read; the rest of it is not needed."""


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


def _read_one(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], site: str, size: int, tick: Tick
) -> Tensor:
    """Return the last token's activation at one site, shape ``[n, d]``, stopping each pass there."""
    place = resolve(model, site)[0]
    device = next(model.parameters()).device
    found: list[Tensor] = []
    for start in range(0, len(texts), size):
        part = list(texts[start : start + size])
        batch = tokenizer(part, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)

        def keep(x: Tensor, mask: Tensor = mask) -> None:
            found.append(select(x, mask, "last").clone())
            raise _Reached

        handle = hook(model, place, keep)
        try:
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        tick(len(part))
    return torch.cat(found)


def fit_in_order(  # noqa: PLR0913 the pieces of a fit, spelled out
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    first: Tensor,
    sites: Sequence[str],
    *,
    stack: ExitStack,
    batch_size: int,
    bars: Bars,
) -> tuple[dict[str, LeaceEraser], dict[str, Tensor]]:
    """Fit and attach one eraser a site, each on what the erasers before it leave.

    Fitted this way every site is guarded with all erasers in place; erasers fitted on the untouched
    model would not fit what later layers see once earlier ones are erased.

    Args:
        model: The language model; the erasers stay attached until ``stack`` closes.
        tokenizer: Its tokenizer.
        data: The texts of the fit.
        first: Activations of the untouched model at the first site, shape ``[n, d]``.
        sites: Names of the sites, in the order of the forward pass.
        stack: Takes the edits.
        batch_size: Texts a forward pass.
        bars: Shows progress.

    Returns:
        Erasers and the erased activations of the fit's texts, by site.
    """
    name, mark, concept = model_id(model), fingerprint(model), data.concept
    erasers: dict[str, LeaceEraser] = {}
    erased: dict[str, Tensor] = {}
    with bars.bar("fitting erasers", len(data.items) * (len(sites) - 1)) as tick:
        for site in sites:
            x = first
            if erasers:
                x = _read_one(model, tokenizer, data.texts, site, batch_size, tick)
            space = Space(name, mark, site, "last", x.shape[1])
            eraser = LeaceEraser.fit(Representations(x.clone(), concept, space))
            stack.enter_context(eraser.attach(model))
            erasers[site], erased[site] = eraser, eraser(x)
    return erasers, erased


def behaviour(
    model: nn.Module, tokenizer: Any, *, batch_size: int = 16
) -> tuple[dict[str, Cell], list[str]]:
    """Return what the model says about gender, and how well it still writes.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        batch_size: Texts a forward pass.

    Returns:
        Numbers by name, and the names of the words compared.
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
    shift = torch.tensor(moved)
    numbers: dict[str, Cell] = {
        "gap |log p(he) - log p(she)|, gender open (nats)": Interval.of_mean(
            opened.gaps.abs().tolist()
        ),
        "spread of the gap over professions (nats)": opened.spread,
        "gap moved by stated gender, signed (nats)": Interval.of_mean(moved),
        "gap moved by stated gender, size (nats)": Interval.of_mean(shift.abs().tolist()),
        "pronoun agrees with stated gender": _share(right, len(words)),
        "the same, with a constant preference taken out": _share(ranked, len(words)),
        "p(he) + p(she)": float(torch.cat([opened.mass, cued.mass]).mean()),
        "perplexity of neutral sentences": perplexity(
            model, tokenizer, NEUTRAL_SENTENCES, batch_size=batch_size
        ),
    }
    return numbers, list(numbers)


def _share(count: int, n: int) -> Interval:
    low, high = wilson_interval(count, n)
    return Interval(count / n, low, high)


def _collect(
    model: nn.Module, tokenizer: Any, data: Data, sites: Sequence[str], size: int, tick: Tick
) -> dict[str, Tensor]:
    done = 0

    def progress(count: int, total: int) -> None:
        nonlocal done
        tick(count - done)
        done = count

    found = collect(
        model, tokenizer, data.texts, sites=list(sites), batch_size=size, progress=progress
    )
    return {site: item.x for site, item in found.items()}
