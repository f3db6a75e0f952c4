"""Draw the pictures and write the tables of the documentation from ``docs/results/*.json``.

    python -m tests.benchmarks.figures [--results docs/results]

Run it after a benchmark was measured again; ``docs/explanation/rlace_leace_inlp.md`` includes what it writes. A result
that is not there yet is said to be missing, and nothing else changes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks import vectors
from tests.benchmarks.rlace import UNSEEN, WEAK

Row = dict[str, Any]
METHODS = ("R-LACE", "SAL", "INLP", "original")  # columns of the games that start so are methods
PROBES = {UNSEEN: "rows not seen", "": "rows of the fit", WEAK: "rows of the fit, C=1"}
DRAWN = (UNSEEN, "")
COLORS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057")
MISSING = (
    "*Not measured in this version; {command} does, then `python -m tests.benchmarks.figures`.*\n"
)


def methods_of(rows: list[Row], suffix: str) -> list[str]:
    """Return the methods that a probe measured in every row."""
    found = [name for name in rows[0] if name.startswith(METHODS) and name.endswith(suffix)]
    return [
        name
        for name in found
        if (suffix or not name.endswith((UNSEEN, WEAK)))
        and all(isinstance(row.get(name), float) for row in rows)
    ]


def panels_of(games: list[Row], probes: tuple[str, ...]) -> list[tuple[str, list[Row], str]]:
    """Return title, rows and suffix of each panel."""
    panels = []
    for data in dict.fromkeys(row["data"] for row in games):
        rows = [row for row in games if row["data"] == data]
        panels += [
            (f"{data}, {PROBES[suffix]}", rows, suffix)
            for suffix in probes
            if methods_of(rows, suffix)
        ]
    return panels


def draw_games(games: list[Row], path: Path) -> None:
    """Draw the log-loss of a fresh probe against the rank: mean and range over seeds, a row of panels a data set."""
    panels = panels_of(games, DRAWN)
    high = -(-len(panels) // len(DRAWN))
    figure = Figure(figsize=(9, 0.6 + 3.4 * high), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(high, len(DRAWN), squeeze=False).flat)
    for axis, (title, rows, suffix) in zip(axes, panels, strict=True):
        draw_panel(axis, rows, suffix)
        axis.set_title(title, fontsize="medium")
    for axis in axes[-len(DRAWN) :]:
        axis.set_xlabel("directions removed")
    for axis in axes[:: len(DRAWN)]:
        axis.set_ylabel("log-loss of a fresh linear probe, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_panel(axis: Axes, rows: list[Row], suffix: str) -> None:
    """Draw the methods of one panel side by side at each rank, with the entropy."""
    ranks = sorted({row["k"] for row in rows})
    names = methods_of(rows, suffix)
    for i, (color, name) in enumerate(zip(COLORS, names, strict=False)):
        values = [[row[name] for row in rows if row["k"] == k] for k in ranks]
        middle = [mean(some) for some in values]
        spread = [
            [m - min(some) for m, some in zip(middle, values, strict=True)],
            [max(some) - m for m, some in zip(middle, values, strict=True)],
        ]
        places = [k + 0.08 * (i - (len(names) - 1) / 2) for k in ranks]
        label = name.removesuffix(suffix)
        axis.errorbar(places, middle, yerr=spread, color=color, marker="o", capsize=3, label=label)
    level = mean(row["entropy"] for row in rows)
    axis.axhline(level, color="grey", linestyle=":", label="entropy (nothing to read)")
    axis.set_xticks(ranks)


def games_table(games: list[Row]) -> str:
    """Return the numbers of the picture, a line a panel and rank."""
    parts = []
    for title, rows, suffix in panels_of(games, tuple(PROBES)):
        names = methods_of(rows, suffix)
        seeds = sorted({row["seed"] for row in rows})
        head = ["directions", *(name.removesuffix(suffix) for name in names), "entropy"]
        lines = [
            f"{title[0].upper()}{title[1:]}, mean of seeds {', '.join(map(str, seeds))}, nats:",
            "",
        ]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for k in sorted({row["k"] for row in rows}):
            mine = [row for row in rows if row["k"] == k]
            cells = [f"{mean(row[name] for row in mine):.3f}" for name in (*names, "entropy")]
            lines.append(f"| {k} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def seconds_table(games: list[Row]) -> str:
    """Return the CPU seconds of each method, a line a data set."""
    names = methods_of(games, "")
    lines = [
        "CPU seconds of a fit, mean over ranks and seeds (most):",
        "",
        "| data | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for data in dict.fromkeys(row["data"] for row in games):
        rows = [row for row in games if row["data"] == data]
        spent = [[row[f"seconds of {name}"] for row in rows] for name in names]
        cells = [f"{mean(some):.3g} ({max(some):.3g})" for some in spent]
        lines.append(f"| {data}, {rows[0]['n']} x {rows[0]['d']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times_table(times: dict[str, float]) -> str:
    """Return the CPU seconds of the closed form beside those of the original."""
    lines = ["| two classes, 20,000 x 768 | CPU s |", "|---|---|"]
    names = {
        "fit": "R-LACE, in closed form",
        "pass_of_moments": "a pass that adds up mean and covariance, as for LEACE",
        "pass_of_cross_moments": "the pass that R-LACE makes, without the covariance of x",
    }
    for name, spent in times.items():
        shown = f"{spent:,.0f}" if spent > 1000 else f"{spent:.3g}"
        lines.append(f"| {names.get(name, name)} | {shown} |")
    return "\n".join(lines)


def rlace(folder: Path) -> str:
    """Return the part on games below full rank."""
    source = folder / "rlace_benchmark.json"
    if not source.is_file():
        return MISSING.format(command="`python -m tests.benchmarks.rlace`")
    result = json.loads(source.read_text("utf-8"))
    games = result["games"]
    if not games:
        return MISSING.format(command="`python -m tests.benchmarks.rlace --vectors FILE`")
    draw_games(games, folder / "rlace_games.png")
    line = "![Log-loss of a fresh probe against directions removed](rlace_games.png)\n\n"
    goals = [row for row in result.get("goals", []) if isinstance(row.get("value"), float)]
    text = "\n".join(
        f"- {row['goal']}: {row['value']:.3g} (wanted {row.get('want', 'less')})" for row in goals
    )
    original = result.get("original")
    said = f"The original is its authors' code, {original}. " if original else ""
    parts = [line + games_table(games), said + seconds_table(games), text]
    return "\n\n".join([*parts, times_table(result["cpu_seconds"])]) + "\n"


def words(folder: Path) -> str:
    """Return the part on word vectors."""
    source = folder / "vectors_benchmark.json"
    if not source.is_file():
        return MISSING.format(command="`python -m tests.benchmarks.vectors --vectors FILE`")
    result = json.loads(source.read_text("utf-8"))
    vectors.plot(result, folder)
    parts = []
    for concept in vectors.CONCEPTS:
        rows = result["rows"]
        parts.append(
            f"**{concept}**, {result['words'][concept]} words:\n\n{vectors.table(rows, concept)}\n\n"
            f"![Leak against size of edit, {concept}](vectors_{concept}.png)\n\n"
            f"LEACE fitted on more or fewer of them, mean of the seeds (test words as before):\n\n"
            f"{vectors.shares_table(result['leace_by_rows'], concept)}\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Write pictures and tables beside the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    folder = parser.parse_args().results
    (folder / "rlace_tables.md").write_text(rlace(folder), "utf-8")
    (folder / "vectors_tables.md").write_text(words(folder), "utf-8")


if __name__ == "__main__":
    main()
