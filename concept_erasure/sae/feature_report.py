"""A report on features to be read before agreeing to an edit: what each writes, where it fires, what it does.

Nothing is computed here; everything is what the search has measured (`concept_erasure.sae.search`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from concept_erasure.errors import missing_extra
from concept_erasure.report import Cell, Report
from concept_erasure.sae._features import Feature, FeatureTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe", "plot_table", "table_report", "write_report"]

KINDS = {"concept": "the concept", "near": "its neighbours", "neutral": "neutral text"}
EFFECTS = {
    "effect": "the concept's tokens",
    "effect_near": "the neighbours' tokens",
    "kl": "divergence on neutral text",
}
_COLORS = ("#d1495b", "#00798c", "#8d99ae")
_TOKENS = 20  # of a list that are shown
_DRAWN = 40  # features that fit into a picture
_MEANING = (
    "Writes: +1 if the feature writes the concept, -1 if it writes against it.",
    "Votes: how many scores put it among the best. Lens: share of the concept's tokens in its list of the vocabulary. "
    "Attribution: nats it adds to those tokens where texts say them, to first order.",
    "Fires on: share of the tokens of each kind of text.",
    "Edited alone: change in nats of the mean log-probability of the concept's and of its neighbours' tokens, and the "
    "divergence from the original on neutral text, when only this feature is edited.",
    "Texts, lists and effects come from the data the search was given: they are no test. Measure the edit on other "
    "items.",
)


def describe(feature: Feature) -> str:
    """Return everything known about a feature as Markdown, without a heading: for a person, or for a judge that reads.

    Args:
        feature: A feature of a table that `find_features` made.
    """
    scores, evidence = feature.scores, feature.evidence
    lines = []
    for name, title in (("top_tokens", "Writes most"), ("bottom_tokens", "Writes least")):
        if name in evidence:
            tokens = [str(one) for one in cast("Sequence[object]", evidence[name])][:_TOKENS]
            lines.append(f"{title}: {' '.join(_code(one) for one in tokens)}")
    if "voters" in evidence:
        lines.append(f"Votes: {', '.join(map(str, cast('Sequence[object]', evidence['voters'])))}")
    rates = [f"{scores[f'rate_{k}']:.2%} of {t}" for k, t in KINDS.items() if f"rate_{k}" in scores]
    if rates:
        lines.append(f"Fires on {', '.join(rates)}")
    effects = [f"{title} {scores[name]:+.3g}" for name, title in EFFECTS.items() if name in scores]
    if effects:
        lines.append(f"Edited alone (nats): {', '.join(effects)}")
    examples = cast("Mapping[str, Mapping[str, object]]", evidence.get("examples", {}))
    for kind, title in KINDS.items():
        if kind in examples:
            text = str(examples[kind]["text"]).replace("`", "'")
            lines.append(f"Fires most on {title} ({examples[kind]['code']:.3g}): `{text}`")
    if "dropped" in evidence:
        lines.append(f"Dropped: {evidence['dropped']}")
    return "\n".join(f"- {line}" for line in lines)


def _code(token: str) -> str:
    return "`" + repr(token)[1:-1].replace("`", "'").replace("|", "\\|") + "`"


def _row(one: Feature) -> dict[str, Cell]:
    scores = one.scores
    row: dict[str, Cell] = {"feature": one.name, "writes": one.direction}
    if one.level is not None:
        row["level"] = one.level
    if isinstance(votes := one.evidence.get("votes"), int):
        row["votes"] = votes
    for name in ("lens", "attribution"):
        if name in scores:
            row[name] = scores[name]
    row |= {f"fires on {t}": scores[f"rate_{k}"] for k, t in KINDS.items() if f"rate_{k}" in scores}
    titles = {"effect": "alone: concept", "effect_near": "alone: neighbours", "kl": "alone: KL"}
    return row | {title: scores[name] for name, title in titles.items() if name in scores}


def table_report(table: FeatureTable, images: Mapping[str, str] | None = None) -> Report:
    """Return a report with one row and one section a feature, and the candidates that were dropped.

    Args:
        table: The features.
        images: Caption to path of pictures, relative to the report's folder.
    """
    notes = list(_MEANING)
    if not len(table):
        notes.insert(0, "No feature passed: there is nothing to edit. See the candidates below.")
    sections = [
        Report(one.name, notes=[line[2:] for line in describe(one).split("\n")]) for one in table
    ]
    if table.dropped:
        rows: list[dict[str, Cell]] = [
            {**_row(one), "dropped": str(one.evidence.get("dropped", ""))} for one in table.dropped
        ]
        sections.append(Report("Candidates that were dropped", rows))
    return Report(
        f"Features of {table.concept or 'a concept'}",
        [_row(one) for one in table],
        dict(table.meta),
        notes,
        sections,
        images or {},
    )


def write_report(table: FeatureTable, folder: str | Path) -> Path:
    """Write the table, its report (json and Markdown) and its picture into a folder, and return the folder.

    Args:
        table: The features.
        folder: Made if it is not there. It holds what `FeatureTable.load` reads, ``report.md`` and ``features.png``.

    Raises:
        ImportError: If matplotlib is not installed and there is something to draw.
    """
    folder = table.save(folder)
    images = {}
    if len(table):
        images["Where the features fire, and what editing each alone does"] = "features.png"
        plot_table(table, folder / "features.png")
    table_report(table, images).save(folder)
    return folder


def plot_table(table: FeatureTable, path: str | Path) -> Path:
    """Draw where each feature fires and what editing it alone does.

    Args:
        table: The features, at least one; the first 40 are drawn.
        path: File to write; its ending says the format.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the table is empty.
    """
    if not len(table):
        raise ValueError(
            "the table holds no features, so there is nothing to draw; to_report() says why"
        )
    shown = table.features[:_DRAWN]
    figure = _figure(10.0, 1.4 + 0.32 * len(shown))
    names = [one.name for one in reversed(shown)]
    panels = [("fires on (share of tokens)", {f"rate_{k}": t for k, t in KINDS.items()})]
    if any("effect" in one.scores for one in shown):
        panels.append(("edited alone: change in nats", EFFECTS))
    for number, (title, bars) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        _bars(axes, list(reversed(shown)), bars)
        axes.set_yticks(range(len(names)), names if number == 1 else [""] * len(names))
        axes.set_xlabel(title)
        above = (0.5, 1.0 + 0.9 / len(names))
        axes.legend(loc="upper center", bbox_to_anchor=above, ncols=3, fontsize=7, frameon=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def _bars(axes: Axes, shown: Sequence[Feature], bars: Mapping[str, str]) -> None:
    """Draw a group of bars for every feature, one a score; scores that no feature has are left out."""
    present = [name for name in bars if any(name in one.scores for one in shown)]
    height = 0.8 / max(1, len(present))
    for i, name in enumerate(present):
        at = [row + 0.4 - height * (i + 0.5) for row in range(len(shown))]
        values = [one.scores.get(name, 0.0) for one in shown]
        axes.barh(at, values, height=height, color=_COLORS[i % len(_COLORS)], label=bars[name])
    axes.axvline(0, color="#444444", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


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
