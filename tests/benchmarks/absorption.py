"""Why levels help: a flat dictionary's general latents go silent where a special one fires; Matryoshka's do not.

    python -m tests.benchmarks.absorption [--out docs/results] [--seeds 5]

Vectors are sparse sums of 32 orthonormal directions in 64 dimensions: 4 parents with 7 children each. A parent fires
alone or with one child; a child never fires without its parent ("Tiger Woods" is always "golf" as well). Writing
parent and child with one latent saves a latent, so a flat dictionary learns "parent, but not this child", even when it
may use as many latents as there are directions at work. For each parent the latent whose decoder row is nearest is
taken, from the first level where there is one; the numbers are its cosine and the share of tokens with a child on
which it fires. Ablating that latent misses the other tokens. The Matryoshka dictionary is trained twice: dead latents
learn the error of their own level (our default), or that of the whole dictionary (sae-lens' default).

Writes `absorption.json` and `absorption.png`; about five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.measure import quality
from concept_erasure.sae.train import TrainConfig, train_vectors

D, PARENTS, CHILDREN = 64, 4, 7
DIRECTIONS = PARENTS * (1 + CHILDREN)
LATENTS, FIRST = 40, 6
RATE, WITH_CHILD = 0.25, 0.6
K = PARENTS * RATE * (1 + WITH_CHILD)  # directions at work in a vector, on average
FLAT, MATRYOSHKA, WHOLE = "flat BatchTopK", "Matryoshka", "Matryoshka, error of the whole"
KINDS = {FLAT: (LATENTS,), MATRYOSHKA: (FIRST, LATENTS), WHOLE: (FIRST, LATENTS)}
COLORS = ("#d1495b", "#00798c", "#edae49")


def toy(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors, which parents and children fire, and the directions.

    Args:
        count: Number of vectors N.
        seed: Of the vectors; the directions are the same for all.

    Returns:
        ``(N, 64)``; booleans ``(N, 4, 8)``, the parent first; ``(4, 8, 64)``.
    """
    fixed = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, D, generator=fixed))[0][:DIRECTIONS]
    random = torch.Generator().manual_seed(seed)
    parent = torch.rand(count, PARENTS, generator=random) < RATE
    chosen = torch.randint(CHILDREN, (count, PARENTS), generator=random)
    any_child = parent & (torch.rand(count, PARENTS, generator=random) < WITH_CHILD)
    child = any_child[..., None] & (chosen[..., None] == torch.arange(CHILDREN))
    fires = torch.cat((parent[..., None], child), -1)
    size = 0.8 + 0.4 * torch.rand(count, PARENTS, 1 + CHILDREN, generator=random)
    x = (fires * size).flatten(1) @ directions
    return x, fires, directions.view(PARENTS, 1 + CHILDREN, D)


def parents_found(
    dis: Disentangler, x: Tensor, fires: Tensor, directions: Tensor
) -> dict[str, Any]:
    """Return, by parent, the best cosine in the first level and how often that latent fires with a child."""
    cosines, latents = (directions[:, 0] @ dis.level(0).W_dec.T).max(1)
    active = dis.encode(x)[:, latents] > 0
    with_child, alone = fires[..., 1:].any(-1), fires[..., 0] & ~fires[..., 1:].any(-1)
    share = lambda where: ((active & where).sum(0) / where.sum(0)).tolist()  # noqa: E731
    return {
        "cosine": cosines.tolist(),
        "fires_with_child": share(with_child),
        "fires_alone": share(alone),
        "fires_without_parent": share(~fires[..., 0]),
    }


def run(
    seed: int,
    *,
    kind: str,
    vectors: int = 50_000,
    steps: int = 1000,
    batch: int = 512,
    rate: float = 1e-3,
) -> dict[str, Any]:
    """Train one dictionary and return what it found."""
    x, _, directions = toy(vectors, seed + 1)
    began = time.perf_counter()
    config = TrainConfig(
        widths=KINDS[kind],
        k=K,
        tokens=batch * steps,
        batch_size=batch,
        learning_rate=rate,
        seed=seed,
        level_aux=kind == MATRYOSHKA,
    )
    dis = train_vectors(x, config, progress=False)
    unseen, fires, _ = toy(10_000, seed + 1001)
    found = parents_found(dis, unseen, fires, directions)
    seconds = time.perf_counter() - began
    return {
        "kind": kind,
        "seed": seed,
        **found,
        **quality(dis, unseen).to_dict(),
        "seconds": seconds,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how often each parent's latent fires when a child does, and its cosine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    titles = {
        "fires_with_child": "parent's latent fires when a child does",
        "cosine": "cosine of the latent with the parent",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for at, (kind, color) in enumerate(zip(KINDS, COLORS, strict=True)):
            values = sorted(v for row in rows if row["kind"] == kind for v in row[name])
            spread = torch.linspace(-0.25, 0.25, len(values)).tolist()
            axis.scatter([at + s for s in spread], values, s=14, color=color)
            axis.hlines(mean(values), at - 0.3, at + 0.3, color=color)
        axis.set_xticks(
            range(len(KINDS)), [kind.replace(", ", ",\n") for kind in KINDS], fontsize="small"
        )
        axis.set_ylim(0, 1.05)
        axis.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    """Run all seeds, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = [run(seed, kind=kind) for seed in range(options.seeds) for kind in KINDS]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        words = ", ".join(
            f"{name} {mean(v for row in mine for v in row[name]):.3f}"
            for name in ("cosine", "fires_with_child", "fires_alone", "fires_without_parent")
        )
        print(f"{kind}: {words}, fvu {mean(row['fvu'] for row in mine):.3f}")
    result = {
        "rows": rows,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "absorption.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(rows, options.out / "absorption.png")


if __name__ == "__main__":
    main()
