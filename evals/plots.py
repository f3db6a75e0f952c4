"""Pictures of an erasure: a plane before and after, and what probes read layer by layer.

Written straight to files by matplotlib's Agg backend; no window, no global state.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError, missing_extra
from concept_erasure.report import Interval

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    from concept_erasure.probes import ProbeResult

__all__ = [
    "concept_plane",
    "plot_accuracy",
    "plot_layers",
    "plot_planes",
    "plot_points",
    "plot_tradeoff",
]

_COLORS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057")
_MARKERS = ("o", "s", "^", "D")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure that is not known to pyplot."""
    try:
        backend = importlib.import_module("matplotlib.backends.backend_agg")
        figure = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise missing_extra("matplotlib", "plots") from error
    made: Figure = figure.Figure(figsize=(width, height), layout="constrained")
    backend.FigureCanvasAgg(made)
    return made


def concept_plane(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plane in which two classes lie furthest apart, to look at vectors in.

    The first axis is the difference of the class means, whitened with a little ridge (Fisher's
    direction); the second is the direction of largest variance orthogonal to it.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Labels 0 and 1, shape ``[n]``; both must occur.

    Returns:
        ``(origin, axes)`` of shapes ``[d]`` and ``[d, 2]``, orthonormal, float64.

    Raises:
        ShapeError: If the lengths differ.
        ValueError: If a class is empty.
    """
    if x.ndim != 2 or z.shape != x.shape[:1]:
        raise ShapeError(f"x must be [n, d] and z [n], got {tuple(x.shape)} and {tuple(z.shape)}")
    x = x.double()
    one = z.to(x.device).bool()
    if not (one.any() and (~one).any()):
        raise ValueError("z must hold both classes 0 and 1; one of them is absent")
    origin = x.mean(0)
    centred = x - origin
    covariance = centred.T @ centred / len(x)
    ridge = 1e-2 * covariance.diagonal().mean()
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    difference = x[one].mean(0) - x[~one].mean(0)
    first = torch.linalg.solve(covariance + ridge * eye, difference)
    first = first / first.norm().clamp_min(torch.finfo(x.dtype).tiny)
    rest = centred - (centred @ first)[:, None] * first
    second = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    return origin, torch.stack([first, second], dim=1)


def plot_planes(
    before: Tensor,
    after: Tensor,
    z: Tensor,
    path: str | Path,
    *,
    names: Sequence[str] = ("0", "1"),
    title: str = "",
    plane: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """Draw vectors before and after in the same plane.

    Args:
        before: Vectors, shape ``[n, d]``.
        after: The same vectors after erasure, shape ``[n, d]``.
        z: Labels 0 and 1, shape ``[n]``.
        path: Where the picture goes; the ending says the format.
        names: What the two labels mean.
        title: Heading.
        plane: Origin and axes as :func:`concept_plane` gives them; default: that of ``before``.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ShapeError: If the shapes differ.
    """
    if before.shape != after.shape:
        raise ShapeError(
            f"before and after must have one shape, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    origin, axes = plane if plane is not None else concept_plane(before, z)
    figure = _figure(9.0, 4.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, vectors, label in zip(panels, (before, after), ("before", "after"), strict=True):
        flat = ((vectors.double() - origin) @ axes).cpu()
        for value, name in enumerate(names):
            rows = flat[z.cpu() == value].numpy()
            panel.scatter(rows[:, 0], rows[:, 1], s=9, alpha=0.6, color=_COLORS[value], label=name)
        panel.set_title(label)
        panel.set_xlabel("direction that separated the classes before")
    panels[0].set_ylabel("largest other variance")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    return _write(figure, path)


def plot_accuracy(
    series: Mapping[str, Sequence[Interval]],
    ticks: Sequence[str],
    path: str | Path,
    *,
    chance: float = 0.5,
    title: str = "",
) -> Path:
    """Draw probe accuracy with its intervals, site by site.

    Names that end in "after" are drawn dashed, in the colour of the series before them.

    Args:
        series: Name to one interval a site.
        ticks: Names of the sites.
        path: Where the picture goes; the ending says the format.
        chance: Accuracy of the constant probe, a grey line.
        title: Heading.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ShapeError: If a series is not as long as ``ticks``.
    """
    for name, values in series.items():
        if len(values) != len(ticks):
            raise ShapeError(f"series {name!r} has {len(values)} values for {len(ticks)} sites")
    figure = _figure(7.5, 4.2)
    panel = figure.subplots()
    places = list(range(len(ticks)))
    kinds = list(dict.fromkeys(name.split(",")[0] for name in series))
    for name, values in series.items():
        mean = [item.value for item in values]
        color = _COLORS[kinds.index(name.split(",")[0]) % len(_COLORS)]
        style = "--" if name.endswith("after") else "-"
        panel.plot(places, mean, style, marker="o", color=color, label=name)
        panel.fill_between(
            places, [v.low for v in values], [v.high for v in values], color=color, alpha=0.12
        )
    panel.axhline(chance, color="grey", linewidth=1, linestyle=":", label="constant probe")
    panel.set_xticks(places, ticks)
    panel.set_ylim(min(0.35, chance - 0.1), 1.02)
    panel.set_ylabel("accuracy on unseen texts")
    panel.set_title(title)
    panel.legend(frameon=False, fontsize="small")
    return _write(figure, path)


def plot_layers(
    results: Mapping[str, ProbeResult],
    path: str | Path,
    *,
    after: Mapping[str, ProbeResult] | None = None,
    name: str = "probe",
    title: str = "",
) -> Path:
    """Draw what `concept_erasure.probes.probe_layers` returns, site by site.

    Args:
        results: Site to result.
        path: Where the picture goes; the ending says the format.
        after: The same sites after an erasure, drawn dashed.
        name: What to call the probe.
        title: Heading.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there are no results, or ``after`` has other sites.
    """
    if not results:
        raise ValueError("there are no results to draw; probe at least one site")
    if after is not None and list(after) != list(results):
        raise ValueError(
            f"after must have the sites of the results in their order, got {list(after)} and "
            f"{list(results)}"
        )
    if after is None:
        series = {name: _intervals(results)}
    else:
        series = {f"{name}, before": _intervals(results), f"{name}, after": _intervals(after)}
    chance = max(result.majority for result in results.values())
    return plot_accuracy(series, list(results), path, chance=chance, title=title)


def _intervals(results: Mapping[str, ProbeResult]) -> list[Interval]:
    return [Interval(result.accuracy, result.low, result.high) for result in results.values()]


def plot_tradeoff(
    leaks: Mapping[str, Mapping[str, Interval]],
    edits: Mapping[str, float],
    path: str | Path,
    *,
    chance: float = 0.0,
    title: str = "",
    leak_label: str = "leak",
) -> Path:
    """Draw leak against size of edit: a panel a probe, a point with its interval a method.

    Methods that are one map on these data, equal in every number to three digits, share a point.

    Args:
        leaks: Probe to method to leak.
        edits: Method to size of edit, for every method in ``leaks``.
        path: Where the picture goes; the ending says the format.
        chance: Leak of a probe that reads nothing, a grey line.
        title: Heading.
        leak_label: What the leak is measured in.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there is nothing to draw, or a method has no size of edit.
    """
    methods = list(dict.fromkeys(name for rows in leaks.values() for name in rows))
    if not methods:
        raise ValueError("there is nothing to draw; measure at least one method")
    if lacking := [name for name in methods if name not in edits]:
        raise ValueError(f"no size of edit for {', '.join(lacking)}; give one for every method")
    points = _points(methods, leaks, edits)
    figure = _figure(3.0 + 3.3 * len(leaks), 4.2)
    panels = figure.subplots(1, len(leaks), sharex=True, squeeze=False, sharey=True)[0]
    for panel, (probe, rows) in zip(panels, leaks.items(), strict=True):
        panel.axhline(chance, color="grey", linewidth=1, linestyle=":")
        for place, (method, label) in enumerate(points.items()):
            if method not in rows:
                continue
            leak = rows[method]
            panel.errorbar(
                [edits[method]],
                [leak.value],
                yerr=[[max(0.0, leak.value - leak.low)], [max(0.0, leak.high - leak.value)]],
                fmt=_MARKERS[place // len(_COLORS) % len(_MARKERS)],
                color=_COLORS[place % len(_COLORS)],
                capsize=3,
                label=label,
            )
        panel.set_title(probe)
        panel.set_xlabel("size of edit, share of the variance")
    panels[0].set_ylabel(leak_label)
    found: dict[str, Artist] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside right upper",
        frameon=False,
        fontsize="small",
    )
    figure.suptitle(title)
    return _write(figure, path)


def _points(
    methods: Sequence[str],
    leaks: Mapping[str, Mapping[str, Interval]],
    edits: Mapping[str, float],
) -> dict[str, str]:
    """Return the first method of each point of a trade-off, and the names of all that lie there."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        values = [rows[method].value if method in rows else float("nan") for rows in leaks.values()]
        found.setdefault(tuple(f"{v:.2e}" for v in [edits[method], *values]), []).append(method)
    return {names[0]: textwrap.fill(", ".join(names), 24) for names in found.values()}


def plot_points(
    panels: Mapping[str, Mapping[str, tuple[float | Interval, float | Interval]]],
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    guide: float | None = None,
) -> Path:
    """Draw one point a method in each panel, with intervals where there are any.

    Args:
        panels: Title of the panel to method to its place ``(x, y)``.
        path: Where the picture goes; the ending says the format.
        x_label: What x is.
        y_label: What y is.
        title: Heading.
        guide: Height of a grey line, such as chance.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there is nothing to draw.
    """
    methods = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    if not methods:
        raise ValueError("there is nothing to draw; measure at least one method")
    figure = _figure(1.4 + 3.6 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False, sharey=True)[0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        if guide is not None:
            axis.axhline(guide, color="grey", linewidth=1, linestyle=":")
        for method, (x, y) in rows.items():
            place = methods.index(method)
            axis.errorbar(
                [_middle(x)],
                [_middle(y)],
                xerr=_reach(x),
                yerr=_reach(y),
                fmt=_MARKERS[place // len(_COLORS) % len(_MARKERS)],
                color=_COLORS[place % len(_COLORS)],
                capsize=3,
                label=method,
            )
        axis.set_title(name)
    axes[0].set_ylabel(y_label)
    figure.supxlabel(x_label, fontsize="medium")
    held = [axis.get_legend_handles_labels() for axis in axes]
    drawn = {name: one for ones, names in held for one, name in zip(ones, names, strict=True)}
    # beside the panels: twenty names would hide what they stand for
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize="small"
    )
    figure.suptitle(title)
    return _write(figure, path)


def _middle(value: float | Interval) -> float:
    return value.value if isinstance(value, Interval) else value


def _reach(value: float | Interval) -> list[list[float]] | None:
    if not isinstance(value, Interval):
        return None
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]


def _write(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)
    return path
