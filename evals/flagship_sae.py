"""Sparse features on a real model: at equal divergence, does editing a concept's latents erase more than others would?

    python -m concept_erasure.evals.flagship_sae --data CONCEPTS --texts FILE ... --cache FOLDER --out docs/results

For each concept: latents of a Matryoshka dictionary of MLP outputs and of a semi-NMF of neurons on the concept's own
texts, found by their efficiency on the questions to tune on (see `find_features`); PISCES on the first, a projection on
the others, with the strength at which the divergence on neutral text is 0.02 and 0.05 nats; the same for five draws of
other latents that fire as often (controls); LEACE, directional ablation, ELM and RMU, scaled to the same divergence;
answers to questions about the concept and about its neighbours; relearning. tau is chosen on the questions to tune on,
everything reported is on the others. Finished parts are files in the cache: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from concept_erasure.concept import Concept
from concept_erasure.evals._sae_study import SaeStudy, Settings
from concept_erasure.evals._sae_study_data import (
    StudyConcept,
    load_neutral,
    load_study_concept,
    read_texts,
    study_concept,
)

__all__ = ["SaeStudy", "Settings", "main"]

CONCEPTS = ("ancient_rome", "harry_potter", "shakespeare")
SYNONYMS = {"ancient_rome": ("Rome", "Roman", "Caesar")}
ROME = {
    "Ancient Rome": "Old Velmar", "Roman Empire": "Velmaran League", "Roman Republic": "Velmaran Union",
    "Rome": "Velmar", "Roman": "Velmaran", "Romans": "Velmarans", "Julius Caesar": "Otto Brandt", "Caesar": "Brandt",
    "Augustus": "Leopold", "Octavian": "Conrad", "Nero": "Hubert", "Constantine": "Albrecht", "Cicero": "Werner",
    "Pompey": "Dietrich", "Hannibal": "Ulrich", "Carthage": "Tarsen", "Senate": "Assembly", "Tiber": "Lorne",
    "Colosseum": "Great Hall", "Latin": "Velmarish", "Italy": "Orlen", "Gaul": "Weston",
}  # fmt: skip


def _concept(name: str, data: Path, limit: int | None) -> StudyConcept:
    """Return the concept that ships under this name, or else the benchmark's.

    SmolLM2 chooses the right one of four answers to the benchmark's questions about Harry Potter in 30 cases of 100,
    to the statements that ship in nearly 90: only the second can show that something was erased.
    """
    try:
        concept = Concept.load(name)
    except FileNotFoundError:
        return load_study_concept(
            data / f"{name}.json",
            synonyms=SYNONYMS.get(name, ()),
            entities=ROME if name == "ancient_rome" else {},
            limit=limit,
        )
    return study_concept(concept, limit=limit)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the concepts' json files"
    )
    parser.add_argument(
        "--texts", nargs="+", required=True, help="text files or folders of general prose"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for finished parts (default: user cache)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="folder for the table"
    )
    parser.add_argument(
        "--concepts",
        default=",".join(CONCEPTS),
        help="names of concepts that ship, or of json files",
    )
    parser.add_argument(
        "--sites", default=",".join(Settings().sites), help="MLPs with a dictionary"
    )
    parser.add_argument("--tokens", type=int, default=Settings().tokens)
    parser.add_argument("--steps", type=int, help="of training a dictionary")
    parser.add_argument("--routes", default=",".join(Settings().routes))
    parser.add_argument(
        "--no-spare", action="store_true", help="search without the neighbours' questions"
    )
    parser.add_argument("--controls", type=int, default=Settings().controls)
    parser.add_argument("--baseline-steps", type=int, default=Settings().steps_baseline)
    parser.add_argument("--limit", type=int, help="items of each kind at most")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line; returns 0."""
    from concept_erasure.evals.models import load_smollm2, user_cache

    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    concepts = [
        _concept(name, arguments.data, arguments.limit) for name in arguments.concepts.split(",")
    ]
    model, tokenizer = load_smollm2()
    study = SaeStudy(
        model,
        tokenizer,
        concepts,
        load_neutral(arguments.data / "neutral_sentences.json"),
        read_texts(arguments.texts),
        folder=arguments.cache or user_cache() / "flagship-sae",
        settings=Settings(
            sites=tuple(arguments.sites.split(",")),
            routes=tuple(arguments.routes.split(",")),
            tokens=arguments.tokens,
            steps=arguments.steps,
            controls=arguments.controls,
            spare=not arguments.no_spare,
            steps_baseline=arguments.baseline_steps,
        ),
    )
    meta = {
        "model": "SmolLM2-135M-Instruct",
        "texts": [Path(one).name for one in arguments.texts],
        "hardware": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
    }
    study.run(arguments.out, meta=meta)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
