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

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks import vectors

Row = dict[str, Any]
METHODS = ("R-LACE", "SAL", "INLP", "original")  # columns of the games that start so are methods
UNSEEN = ", unseen rows"
COLORS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057")
MISSING = (
    "*Not measured in this version; {command} does, then `python -m tests.benchmarks.figures`.*\n"
)


def methods_of(rows: list[Row], suffix: str) -> list[str]:
    """Return the methods that every row measured, on the rows of the fit (no suffix) or unseen ones."""
    found = [name for name in rows[0] if name.startswith(METHODS) and name.endswith(suffix)]
    return [
        name
        for name in found
        if (suffix or not name.endswith(UNSEEN))
        and all(isinstance(row.get(name), float) for row in rows)
    ]


def panels_of(games: list[Row]) -> list[tuple[str, list[Row], str]]:
    """Return title, rows and suffix of each picture's panel."""
    panels = []
    for data in dict.fromkeys(row["data"] for row in games):
        rows = [row for row in games if row["data"] == data]
        panels += [
            (f"{data}, {'rows not seen' if suffix else 'rows of the fit'}", rows, suffix)
            for suffix in ("", UNSEEN)
            if methods_of(rows, suffix)
        ]
    return panels


def draw_games(games: list[Row], path: Path) -> None:
    """Draw the log-loss of a fresh probe against the rank: mean and range over seeds."""
    panels = panels_of(games)
    figure = Figure(figsize=(1 + 3.6 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, rows, suffix) in zip(axes, panels, strict=True):
        ranks = sorted({row["k"] for row in rows})
        for color, name in zip(COLORS, methods_of(rows, suffix), strict=False):
            values = [[row[name] for row in rows if row["k"] == k] for k in ranks]
            middle = [mean(some) for some in values]
            spread = [
                [m - min(some) for m, some in zip(middle, values, strict=True)],
                [max(some) - m for m, some in zip(middle, values, strict=True)],
            ]
            label = name.removesuffix(suffix)
            axis.errorbar(
                ranks, middle, yerr=spread, color=color, marker="o", capsize=3, label=label
            )
        axis.axhline(mean(row["entropy"] for row in rows), color="grey", linestyle=":")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("directions removed")
        axis.set_xticks(ranks)
    axes[0].set_ylabel("log-loss of a fresh linear probe, nats")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def games_table(games: list[Row]) -> str:
    """Return the numbers of the picture, a line a panel and rank."""
    parts = []
    for title, rows, suffix in panels_of(games):
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
    said = f"The original is its authors' code, {original}.\n\n" if original else ""
    return f"{line}{games_table(games)}\n\n{said}{text}\n"


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
