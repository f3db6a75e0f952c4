"""The largest direction a network or kernel probe may see: what ``standardize="cap"`` should cap at.

    python -m tests.benchmarks.units --out units.json --vectors word_vectors.npz [--kept FILE] [--seeds 3]

Representations of texts that occur nowhere else in this project (other templates than the demo's; gender and sentiment;
last token at two layers of SmolLM2, means of MiniLM), and word vectors. LEACE is fitted on 30 % of the rows, probes are
trained on 50 % and tested on the rest, before and after erasing. ``auto`` takes the units with the lowest loss on the
held-out part of its training rows, as the probe does. ``--kept`` keeps the representations for the next time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from concept_erasure.collect import collect
from concept_erasure.evals.models import load_minilm, load_smollm2
from concept_erasure.linear.leace import LeaceEraser
from concept_erasure.probes import KernelProbe, MlpProbe
from concept_erasure.probes._ridge import InputUnits, input_unit, principal
from concept_erasure.probes.kernel import _features
from concept_erasure.probes.mlp import _forward, split_classes

Scored = tuple[float, float, float]  # held-out loss, accuracy and log-loss on the test rows
CAPS = (5.0, 10.0, 20.0, 50.0, 200.0)
TEXTS = 2000
FIT, TRAIN = 0.3, 0.8  # where the rows of the eraser and those of the probe end
PLACES = (
    "castle harbour market theatre village station museum garden hotel church airport bakery bridge"
)
EVENTS = (
    "wedding concert lecture funeral auction parade ceremony trial match dinner reunion election"
)
WORDS = {  # concept: words of class 0, of class 1
    "gender": (
        "queen waitress actress grandma stepmother niece bride princess widow nun heroine hostess",
        "king waiter actor grandpa stepfather nephew groom prince widower monk hero host",
    ),
    "sentiment": (
        "dreadful awful clumsy tedious horrible miserable shabby ugly pointless boring unpleasant broken",
        "delightful brilliant charming superb excellent wonderful splendid lovely graceful inspiring "
        "pleasant flawless",
    ),
}
PRONOUNS = (("she", "her", "hers"), ("he", "him", "his"))
TEMPLATES = {
    "gender": (
        "Nobody at the {p} had expected that {w}", "Before the {e} started, the {w} sat down",
        "Everyone praised the {w} after the {e}", "A letter from the {w} arrived at the {p}",
        "The {e} was over when {s} left the {p}", "During the {e} people kept looking at {o}",
        "It was raining at the {p} and {s} had no umbrella", "Someone at the {p} had waved at {o}",
        "The keys in the {p} were {h}", "The seat near the {p} was {h}, not ours",
        "Nobody but {o} remembered the {e}", "In the end {s} missed the {e}",
    ),
    "sentiment": (
        "The {e} at the {p} was {w}", "We found the {p} rather {w}", "What a {w} {e} that was",
        "After the {e} she called the {p} {w}", "His report of the {e} sounded {w} to us",
        "The new {p} looks {w} from here", "I had never seen such a {w} {p}",
        "They agreed that the {e} had been {w} overall", "A {w} evening: first the {p}, then the {e}",
        "Critics called the {e} {w} and left the {p}",
    ),
}  # fmt: skip
ENDINGS = ("", " that day", " again", " as usual", ", they said")


def texts(concept: str, seed: int = 7) -> list[tuple[str, int]]:
    """Return different texts and their class, in random order."""
    draw = random.Random(f"{concept} {seed}")  # noqa: S311
    found: dict[str, int] = {}
    while len(found) < TEXTS:
        label = draw.randrange(2)
        subject, object_, own = PRONOUNS[label]
        text = draw.choice(TEMPLATES[concept]).format(
            p=draw.choice(PLACES.split()), e=draw.choice(EVENTS.split()),
            w=draw.choice(WORDS[concept][label].split()), s=subject, o=object_, h=own,
        )  # fmt: skip
        found[text + draw.choice(ENDINGS)] = label
    return list(found.items())


def representations() -> dict[str, Tensor]:
    """Return vectors and labels by name: model, layer, concept."""
    out: dict[str, Tensor] = {}
    for model_name, load, layers, tokens in (
        ("SmolLM2", load_smollm2, (14, 29), "last"),
        ("MiniLM", load_minilm, (5,), "mean"),
    ):
        model, tokenizer = load()
        for concept in WORDS:
            rows = texts(concept)
            sites = [f"residual.{layer}" for layer in layers]
            found = collect(
                model,
                tokenizer,
                [text for text, _ in rows],
                sites=sites,
                tokens=tokens,
                batch_size=50,
            )  # type: ignore[call-overload]
            for layer, site in zip(layers, sites, strict=True):
                name = f"{model_name} {layer}, {concept}"
                out[name] = found[site].x.float().contiguous()
                out[name + "|z"] = torch.tensor([label for _, label in rows])
    return out


def words(path: Path) -> dict[str, Tensor]:
    """Return the vectors and labels of words."""
    out: dict[str, Tensor] = {}
    with np.load(path, allow_pickle=False) as stored:
        for concept in WORDS:
            keep = stored[concept] >= 0
            out[f"words, {concept}"] = torch.from_numpy(stored["vectors"][keep]).float()
            out[f"words, {concept}|z"] = torch.from_numpy(stored[concept][keep]).long()
    return out


def network(
    x: Tensor, z: Tensor, test: Tensor, seed: int
) -> tuple[Tensor, Callable[[InputUnits], tuple[float, Tensor]]]:
    """Return the rows whose directions count, and a fit that gives held-out loss and test scores."""
    probe = MlpProbe(seed=seed)
    parts = split_classes(z, probe.held_out, torch.Generator().manual_seed(seed))

    def fit(unit: InputUnits) -> tuple[float, Tensor]:
        run = probe._fit_units(unit, x, z, parts, torch.Generator().manual_seed(seed + 100))[1]
        return run.loss, _forward(unit.apply(test).float(), run.weights).detach()

    return x[parts[0]], fit


def kernel(
    x: Tensor, z: Tensor, test: Tensor, seed: int
) -> tuple[Tensor, Callable[[InputUnits], tuple[float, Tensor]]]:
    """Return the same for a kernel probe, which also chooses width and penalty."""
    probe = KernelProbe(seed=seed)
    train, held = split_classes(z, probe.held_out, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def fit(unit: InputUnits) -> tuple[float, Tensor]:
        tried = [
            (probe._loss(f.features[held], z[held], *probe._weights(f.features[train], z[train], 2, c)), i, f, c)
            for i, f in enumerate(probe._frames(x, unit)) for c in (1.0, 10.0, 100.0, 1000.0)
        ]  # fmt: skip
        loss, _, frame, penalty = min(tried, key=lambda row: row[0])
        weight, intercept = probe._weights(frame.features, z, 2, penalty)
        features = _features(probe._kind(len(x)), frame.landmarks, frame.gamma)(unit.apply(test))
        features = features if frame.whitening is None else features @ frame.whitening
        return loss, features @ weight + intercept

    return x, fit


def scores(
    kind: str, x: Tensor, z: Tensor, train: Tensor, test: Tensor, seed: int
) -> dict[str, Scored]:
    """Return the scores of a probe in each of the units."""
    rows, fit = (network if kind == "mlp" else kernel)(x[train], z[train], x[test], seed)
    axes = principal(rows)
    units = [("feature", CAPS[0]), *(("cap", cap) for cap in CAPS)]
    if len(rows) >= 2 * axes.rows.shape[1]:
        units.append(("whiten", CAPS[0]))
    out: dict[str, Scored] = {}
    for unit, cap in units:
        loss, found = fit(input_unit(rows, axes, unit, cap))  # type: ignore[arg-type]
        right = float((found.argmax(1) == z[test]).double().mean())
        name = f"cap {cap:g}" if unit == "cap" else unit
        out[name] = (loss, right, float(cross_entropy(found, z[test])))
    for cap in CAPS:
        offered = [name for name in ("feature", f"cap {cap:g}", "whiten") if name in out]
        out[f"auto {cap:g}"] = out[min(offered, key=lambda name: out[name][0])]
    return out


def measure(data: dict[str, Tensor], name: str, seed: int) -> list[dict[str, object]]:
    """Return one row a probe, before and after erasing."""
    x, z = data[name].double(), data[name + "|z"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, train, test = order.tensor_split([int(FIT * len(x)), int(TRAIN * len(x))])
    eraser = LeaceEraser.fit(x[fit], z[fit])
    return [
        {
            "data": name, "seed": seed, "when": when, "probe": kind, "rows": len(train),
            "scores": scores(kind, rows, z, train, test, seed),
        }
        for when, rows in (("before", x), ("after", eraser(x)))
        for kind in ("mlp", "kernel")
    ]  # fmt: skip


def table(rows: Sequence[dict[str, object]]) -> str:
    """Return accuracy and log-loss on the test rows by cap, means over seeds and concepts."""
    lines = [
        "| probe | data | " + " | ".join(f"cap {cap:g}" for cap in CAPS) + " |",
        "|---|---|" + "---|" * len(CAPS),
    ]
    for kind in ("mlp", "kernel"):
        mine = [row for row in rows if row["probe"] == kind]
        keys = dict.fromkeys((str(r["data"]).partition(",")[0], r["when"]) for r in mine)
        for data, when in [*keys, ("", "")]:
            some = [
                r["scores"]
                for r in mine
                if str(r["data"]).startswith(data) and when in ("", r["when"])
            ]
            cells = [
                " ".join(f"{mean(s[f'auto {cap:g}'][i] for s in some):.3f}" for i in (1, 2))  # type: ignore[index]
                for cap in CAPS
            ]
            name = f"{data}, {when} erasing" if data else "mean"
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="json file to write")
    parser.add_argument("--vectors", type=Path, help="npz with vectors, gender and sentiment")
    parser.add_argument("--kept", type=Path, help="safetensors file of the representations")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kept is not None and options.kept.is_file():
        data = load_file(options.kept)
    else:
        data = representations()
        if options.kept is not None:
            save_file(data, options.kept)
    data = data if options.vectors is None else data | words(options.vectors)
    rows: list[dict[str, object]] = []
    for name in [name for name in data if not name.endswith("|z")]:
        for seed in range(options.seeds):
            rows += measure(data, name, seed)
            sys.stderr.write(f"{name}, seed {seed}: done\n")
    print(table(rows))
    result = {"rows": rows, "caps": CAPS, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
