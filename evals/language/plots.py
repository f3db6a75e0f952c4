"""Pictures of an erasure from a language model: what is lost against what is kept, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_erasure.evals.plots import _COLORS, _MARKERS, _figure, _write
from concept_erasure.report import Interval

__all__ = ["plot_kept", "plot_probes", "plot_relearning"]


def plot_kept(
    points: Mapping[str, tuple[Interval, Interval]],
    path: str | Path,
    *,
    chance: float = 0.25,
    title: str = "",
    kept_label: str = "accuracy on what has to stay",
) -> Path:
    """Draw concept accuracy against kept accuracy, a point with both intervals a model; the aim is right and low.

    Args:
        points: Name to ``(kept, concept)``.
        path: Where the picture goes; the ending says the format.
        chance: Concept accuracy of guessing, a grey line.
        title: Heading.
        kept_label: What the horizontal axis measures.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there are no points.
    """
    if not points:
        raise ValueError("there is nothing to draw; measure at least one model")
    figure = _figure(6.4, 4.6)
    panel = figure.subplots()
    panel.axhline(chance, color="grey", linewidth=1, linestyle=":", label="guessing")
    for number, (name, (kept, concept)) in enumerate(points.items()):
        panel.errorbar(
            [kept.value], [concept.value], xerr=_bars(kept), yerr=_bars(concept),
            fmt=_MARKERS[number // len(_COLORS) % len(_MARKERS)], color=_COLORS[number % len(_COLORS)],
            capsize=3, elinewidth=1, label=name,
        )  # fmt: skip
    panel.set_xlabel(kept_label)
    panel.set_ylabel("accuracy on the concept")
    panel.set_title(title)
    panel.legend(frameon=False, fontsize="small")
    return _write(figure, path)


def _bars(value: Interval) -> list[list[float]]:
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]


def plot_relearning(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    path: str | Path,
    *,
    base: float | None = None,
    chance: float = 0.25,
    title: str = "",
) -> Path:
    """Draw accuracy on the concept while the edited model is trained again.

    Args:
        curves: Name to ``(steps, accuracy)``.
        path: Where the picture goes; the ending says the format.
        base: Accuracy before the edit, a dashed line.
        chance: Of guessing, a dotted line.
        title: Heading.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there are no curves, or one has not one accuracy a step.
    """
    if not curves:
        raise ValueError("there is nothing to draw; run relearning at least once")
    for name, (steps, accuracy) in curves.items():
        if len(steps) != len(accuracy):
            raise ValueError(f"curve {name!r} has {len(accuracy)} values for {len(steps)} steps")
    figure = _figure(7.0, 4.2)
    panel = figure.subplots()
    panel.axhline(chance, color="grey", linewidth=1, linestyle=":", label="guessing")
    if base is not None:
        panel.axhline(base, color="grey", linewidth=1, linestyle="--", label="before the edit")
    for number, (name, (steps, accuracy)) in enumerate(curves.items()):
        panel.plot(
            list(steps), list(accuracy), color=_COLORS[number % len(_COLORS)],
            marker=_MARKERS[number // len(_COLORS) % len(_MARKERS)], markersize=4, label=name,
        )  # fmt: skip
    panel.set_xlabel("steps of training")
    panel.set_ylabel("accuracy on the concept")
    panel.set_title(title)
    panel.legend(frameon=False, fontsize="small")
    return _write(figure, path)


def plot_probes(
    layers: Mapping[str, Sequence[Interval]],
    path: str | Path,
    *,
    chance: float = 0.5,
    title: str = "",
) -> Path:
    """Draw the accuracy of a probe at every layer, a line with its band a model.

    Args:
        layers: Name to one interval a layer.
        path: Where the picture goes; the ending says the format.
        chance: Accuracy of the constant probe.
        title: Heading.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there are no lines.
    """
    if not layers:
        raise ValueError("there is nothing to draw; probe at least one model")
    figure = _figure(7.0, 4.2)
    panel = figure.subplots()
    for number, (name, values) in enumerate(layers.items()):
        color, places = _COLORS[number % len(_COLORS)], list(range(len(values)))
        panel.plot(
            places, [v.value for v in values], marker="o", markersize=3, color=color, label=name
        )
        panel.fill_between(
            places, [v.low for v in values], [v.high for v in values], color=color, alpha=0.12
        )
    panel.axhline(chance, color="grey", linewidth=1, linestyle=":", label="constant probe")
    panel.set_xlabel("layer")
    panel.set_ylabel("accuracy, cross-validated")
    panel.set_title(title)
    panel.legend(frameon=False, fontsize="small")
    return _write(figure, path)
