"""Benchmark of R-LACE: the closed form, the game below full rank, and the original's code beside both.

    python -m tests.benchmarks.rlace --out results.json [--vectors word_vectors.npz] [--original FOLDER] [--steps N]

FOLDER holds the authors' ``rlace.py`` (github.com/shauli-ravfogel/rlace-icml); it is not shipped here. It is run with
its published settings for N outer iterations, stated in the result, on one change only: its scikit-learn loss name
``"log"``, which current versions refuse, is read as ``"log_loss"``. Seconds are CPU seconds of all threads. The time
of its published 50,000 steps is extrapolated from N and labelled so.

Games are compared by the log-loss of a fresh converged probe with scikit-learn's penalty (``C=1``, at one scale) on the
erased rows: higher is better erased, the entropy is the most. For word vectors a probe that chooses its penalty
(`LinearProbe`) is also trained and tested on rows no eraser saw; there the game's penalty is 0.01.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from concept_erasure.leakage import Folds
from concept_erasure.linalg import Moments
from concept_erasure.linear.games import top_directions
from concept_erasure.linear.rlace import RlaceEraser
from concept_erasure.probes import LinearProbe
from tests.benchmarks.linear_data import ROWS, features

Row = dict[str, object]
RANKS = (1, 2, 3, 4)
SEEDS = (0, 1, 2)
PUBLISHED_STEPS = 50_000
TIMED_STEPS = 50


def seconds(function: Callable[[], object], repeat: int = 3) -> float:
    """Return the least CPU time of some runs."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def goal(name: str, value: float, bound: float, *, at_least: bool) -> Row:
    """Return a row of the goals table."""
    met = value >= bound if at_least else value <= bound
    return {
        "goal": name,
        "value": value,
        "want": f"{'>=' if at_least else '<='} {bound:g}",
        "met": met,
    }


def six_classes(seed: int, rows: int = 3000, width: int = 64) -> tuple[Tensor, Tensor]:
    """Return six classes whose means and noise are of unequal size in each direction."""
    g = torch.Generator().manual_seed(seed)
    z = torch.arange(rows) % 6
    means = 0.35 * torch.randn(6, width, generator=g, dtype=torch.float64)
    spread = torch.logspace(0.3, -0.3, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=g, dtype=torch.float64) * spread + means[z], z


def word_vectors(path: Path) -> tuple[Tensor, Tensor]:
    """Return vectors ``(n, 300)`` of the words with a sentiment, and gender x sentiment as six classes."""
    with np.load(path, allow_pickle=False) as stored:
        gender, sentiment = stored["gender"].astype(int), stored["sentiment"].astype(int)
        keep = sentiment >= 0
        labels = ((gender + 1) * 2 + sentiment)[keep]
        vectors = stored["vectors"][keep].astype(np.float64)
    return torch.from_numpy(vectors), torch.from_numpy(labels)


def spectral(x: Tensor, z: Tensor, k: int) -> Tensor:
    """Return SAL's directions, shape ``(d, k)``."""
    hot = torch.nn.functional.one_hot(z, 6).double()
    return top_directions((x - x.mean(0)).T @ (hot - hot.mean(0)), k)


def inlp(x: Tensor, z: Tensor, k: int) -> Tensor:
    """Return k directions of INLP: the strongest of each round's probe, one a round, shape ``(d, k)``."""
    basis = x.new_zeros(x.shape[1], 0)
    for _ in range(k):
        erased = x - x @ basis @ basis.T
        new = top_directions(LinearProbe(C=1.0, standardize="global").fit(erased, z).coef.T, 1)
        basis = torch.linalg.qr(torch.cat([basis, new], 1))[0]
    return basis


def fresh_loss(v: Tensor, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the log-loss on the second rows of a probe trained on the first, both erased by ``v``."""
    mean = train[0].mean(0)
    first, second = ((x - mean) - ((x - mean) @ v) @ v.T for x in (train[0], test[0]))
    probe = LinearProbe(C=1.0, standardize="global") if train is test else LinearProbe()
    return probe.fit(first, train[1]).log_loss(second, test[1])


def load_original(folder: Path) -> types.ModuleType:
    """Import the authors' module with its loss name mended, and nothing else."""
    text = (folder / "rlace.py").read_text(encoding="utf-8")
    mended = re.sub(r"""(["']loss["']\s*:\s*|loss\s*=\s*)(["'])log\2""", r"\1\2log_loss\2", text)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "original_rlace.py"
        path.write_text(mended, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("original_rlace", path)
        if spec is None or spec.loader is None:
            raise SystemExit(f"{folder} holds no rlace.py that can be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules["original_rlace"] = module
        spec.loader.exec_module(module)
    return module


def run_original(
    module: types.ModuleType, x: Tensor, z: Tensor, k: int, steps: int, seed: int
) -> Tensor:
    """Return the directions the authors' code removes after some steps, shape ``(d, k)``."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 the only generator their code uses
    rows, labels = x.float().numpy(), z.numpy()
    settings = {"lr": 0.005, "weight_decay": 1e-5, "momentum": 0.0}
    found = module.solve_adv_game(
        rows,
        labels,
        rows,
        labels,
        rank=k,
        device="cpu",
        out_iters=steps,
        optimizer_class=torch.optim.SGD,
        optimizer_params_P=settings,
        optimizer_params_predictor=settings,
        epsilon=0.002,
        batch_size=128,
        evalaute_every=min(1000, steps),
    )
    p = torch.as_tensor(np.asarray(found["P"])).double()
    return torch.linalg.eigh((p + p.T) / 2)[1][:, :k]  # P's null space


def closed_form(original: types.ModuleType | None) -> tuple[list[Row], Row]:
    """Return the goals of the closed form at 20,000 x 768, and the times behind them."""
    x, labels = features(ROWS, 768)
    z = labels.long()
    statistics = seconds(lambda: Moments(768, 2).update(x, z))
    dealt = seconds(lambda: Folds(768, 2).update(x, z))
    fit = seconds(lambda: RlaceEraser.fit(x, z))
    clean = RlaceEraser.fit(x, z)(x)
    share = float(labels.mean())
    entropy = float(torch.special.entr(torch.tensor([share, 1 - share], dtype=torch.float64)).sum())
    leak = abs(LinearProbe().fit(clean, z).log_loss(clean, z) - entropy)
    times: Row = {
        "fit": fit,
        "pass_of_moments": statistics,
        "pass_of_cross_moments": dealt,
    }
    rows = [
        goal(
            f"closed form beyond the pass that it makes, {ROWS} x 768, s",
            fit - dealt,
            0.2,
            at_least=False,
        ),
        goal("distance of the fresh probe's log-loss from the entropy", leak, 1e-6, at_least=False),
    ]
    if original is not None:
        took = seconds(lambda: run_original(original, x, z, 1, TIMED_STEPS, 0), 1)
        times[f"original_{TIMED_STEPS}_steps"] = took
        times["original_50000_steps_extrapolated"] = took / TIMED_STEPS * PUBLISHED_STEPS
    return rows, times


def play(
    name: str,
    x: Tensor,
    z: Tensor,
    seed: int,
    original: types.ModuleType | None,
    steps: int,
    test: tuple[Tensor, Tensor] | None = None,
) -> list[Row]:
    """Return one row a rank: log-loss of a fresh probe by method, and the CPU seconds of ours."""
    rows: list[Row] = []
    rows_seen = x, z
    penalty = 1e-3 if test is None else 1e-2
    for k in RANKS:
        start = time.process_time()
        eraser = RlaceEraser.fit(x, z, k=k, seed=seed, penalty=penalty)
        took = time.process_time() - start
        found = {"R-LACE": eraser.proj_left, "SAL": spectral(x, z, k), "INLP": inlp(x, z, k)}
        if original is not None:
            found[f"original, {steps} steps"] = run_original(original, x, z, k, steps, seed)
        losses = {key: fresh_loss(v, rows_seen, rows_seen) for key, v in found.items()}
        row: Row = {"data": name, "seed": seed, "k": k, **losses, "seconds": took}
        row |= {"value": eraser.report["value"], "entropy": eraser.report["entropy"]}
        if test is not None:
            half = (test[0][::2], test[1][::2]), (test[0][1::2], test[1][1::2])
            row |= {f"{key}, unseen rows": fresh_loss(v, *half) for key, v in found.items()}
        row["met"] = all(losses["R-LACE"] >= value - 1e-4 for value in losses.values()) and (
            x.shape[1] > 64 or took <= 5
        )
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Return rows as a markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    """Run everything, print the tables, write the json; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="json file to write")
    parser.add_argument("--vectors", type=Path, help="npz with vectors, gender and sentiment")
    parser.add_argument("--original", type=Path, help="folder with the authors' rlace.py")
    parser.add_argument("--steps", type=int, default=2000, help="outer iterations of the original")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = load_original(options.original) if options.original else None
    goals, times = closed_form(original)
    games: list[Row] = []
    for seed in range(options.seeds):
        x, z = six_classes(seed)
        games += play("six classes", x, z, seed, original, options.steps)
        if options.vectors is not None and options.vectors.is_file():
            x, z = word_vectors(options.vectors)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            fit, rest = order[: 3 * len(x) // 5], order[3 * len(x) // 5 :]
            test = x[rest], z[rest]
            games += play("word vectors", x[fit], z[fit], seed, original, options.steps, test)
    print(table(goals), table(games), json.dumps(times), sep="\n\n")
    met = all(bool(row["met"]) for row in [*goals, *games])
    result = {
        "met": met,
        "goals": goals,
        "games": games,
        "cpu_seconds": times,
        "original": None if original is None else f"{options.steps} steps",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": options.threads,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
