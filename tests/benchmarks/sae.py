"""How long a search for features takes at the size of Gemma 3 270M: 16,384 latents in 18 layers, 262,144 tokens.

    python -m tests.benchmarks.sae [--out docs/results/sae_search.json] [--latents 16384] [--layers 18]

Weights, dictionaries and texts are random: only the sizes matter for time and memory. Parts are timed one by one: the
moments of the unembedding; scoring all latents on the concept's tokens; exact lists for the shortlist; reading 8,192
tokens of each of two kinds of text; gradients through 64 texts of each; and editing 24 latents alone. For comparison
the lists of all latents (what the shortlist saves) are timed on 64 latents and extrapolated, as is said in the result.
Memory is what is resident beyond the model and the dictionaries, sampled ten times a second (Linux only).

CPU seconds are those of all threads; on two cores the time on the wall is at least half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from concept_erasure.concept import Concept
from concept_erasure.language.batches import encode  # noqa: F401 imported before memory is measured
from concept_erasure.sae._features import Feature
from concept_erasure.sae._search_run import Run, Search
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.lens import Unembedding, exact_lists, screen, token_lists, written
from concept_erasure.sae.search import Filters
from tests.models import TinyTokenizer

T = TypeVar("T")
VOCABULARY, WIDTH, HIDDEN = 262_144, 640, 2048
PLUS, MINUS = tuple(range(1000, 1020)), tuple(range(2000, 2040))
CONCEPT = Concept(name="Aaa1000", neighbours=("Aaa2000",))


class Numbers(TinyTokenizer):
    """Words ``Aaa17`` for the id 17."""

    vocab_size = VOCABULARY

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return ids."""
        if isinstance(tokens, str):
            return int(tokens.removeprefix("Aaa"))
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        """Return words."""
        return " ".join(f"Aaa{i}" for i in torch.as_tensor(ids).reshape(-1).tolist())


class Resident:
    """The most memory that was resident since it began, in MiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.1)


def build(layers: int, latents: int) -> tuple[Any, dict[str, Disentangler]]:
    """Return a model of Gemma 3 270M's shapes and a dictionary for every MLP, all random."""
    config: Any = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=512, max_position_embeddings=2048, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Gemma3ForCausalLM(config).eval()
    made = {}
    for layer in range(layers):
        rows = torch.nn.functional.normalize(torch.randn(latents, WIDTH), dim=1)
        # a Gaussian activation then fires about 60 latents, as in the published dictionaries
        theta = torch.full((latents,), 0.15)
        made[f"mlp.{layer}"] = Disentangler(
            rows.T.contiguous(), torch.zeros(latents), rows, torch.zeros(WIDTH), theta, f"mlp.{layer}"
        )  # fmt: skip
    return model, made


def texts(said: tuple[int, ...], seed: int) -> list[str]:
    """Return 160 texts of 60 words, one in ten of which is among some tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (160, 60), generator=random)
    some = torch.tensor(said)[torch.randint(len(said), ids.shape, generator=random)]
    ids = torch.where(torch.rand(ids.shape, generator=random) < 0.1, some, ids)
    return [" ".join(f"Aaa{i}" for i in row) for row in ids.tolist()]


def main() -> None:
    """Time the parts, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=18)
    given = parser.parse_args()
    model, known = build(given.layers, given.latents)
    held, watch = Resident.now(), Resident()
    rows: dict[str, dict[str, float]] = {}

    def timed(name: str, job: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        made = job()
        rows[name] = {
            "cpu_seconds": time.process_time() - cpu,
            "seconds": time.perf_counter() - wall,
        }
        print(name, {k: round(v, 1) for k, v in rows[name].items()}, flush=True)
        return made

    run = Run(
        model, Numbers(add_bos=False), known, {"concept": texts(PLUS, 1), "near": texts(MINUS, 2), "neutral": []},
        ("lens", "contrast", "attribution"), 20, 2, Search(), 16, 0, False, PLUS, MINUS,
    )  # fmt: skip
    head = timed("moments of the unembedding", lambda: Unembedding.of(model))
    screens = timed(
        "all latents on the tokens",
        lambda: {s: screen(head, model, d, PLUS, MINUS) for s, d in known.items()},
    )
    short = {
        site: torch.cat(
            [end.topk(Search().shortlist).indices for end in (one.up, one.down)]
        ).unique()
        for site, one in screens.items()
    }
    timed(
        "exact lists of the shortlist",
        lambda: [token_lists(head, model, known[s], latents, 50) for s, latents in short.items()],
    )
    lens = sum(one["cpu_seconds"] for one in rows.values())
    some = written(model, known["mlp.0"], torch.arange(64))
    timed("exact lists of 64 latents", lambda: exact_lists(head.weight, some, 50))
    whole = rows["exact lists of 64 latents"]["cpu_seconds"] / 64 * given.latents * given.layers
    timed("reading texts", run._read)
    found: dict[str, dict[str, torch.Tensor]] = {site: {} for site in known}
    timed("gradients", lambda: run._attribution(found))
    alone = timed("originals, to edit alone", lambda: run._alone(Filters()))
    picked = [Feature(site, i, 1) for i in range(2) for site in known][: Search().limit]
    timed(f"editing {len(picked)} alone", lambda: [alone(one) for one in picked])
    total = {
        key: sum(row[key] for name, row in rows.items() if name != "exact lists of 64 latents")
        for key in ("cpu_seconds", "seconds")
    }
    result = {
        "latents": given.latents, "layers": given.layers, "vocabulary": VOCABULARY, "width": WIDTH,
        "threads": torch.get_num_threads(), "parts": rows, "lens_cpu_seconds": lens, **total,
        "all_lists_cpu_seconds_extrapolated": whole, "resident_mib": held,
        "extra_mib": watch.peak - held, "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "parts"}, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
