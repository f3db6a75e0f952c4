"""Erase gender from a real language model and from sentence embeddings, and show what changed.

Two small models from the package index are used, no hub: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.
Erasers are fitted on one set of texts; every number comes from texts, templates and professions
that no eraser saw. Run it with ``python -m concept_erasure.evals.demo --out demo-out``.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from concept_erasure.evals._language_demo import language_report
from concept_erasure.evals._sentence_demo import sentence_report
from concept_erasure.evals.language import TokenizerLike
from concept_erasure.evals.models import load_minilm, load_smollm2
from concept_erasure.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DemoConfig", "Part", "main", "run"]

Part = Literal["language", "sentences"]
PARTS: tuple[Part, ...] = ("language", "sentences")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo.

    Attributes:
        n_fit: Texts the erasers are fitted on; raising it makes them hold better on unseen texts.
        n_probe: Texts the probes are trained on.
        n_test: Texts the probes are read on; raising it narrows the intervals.
        layers: Layers of the language model whose output is erased; negative ones count from the
            end. More of them leave the model less chance to rebuild the concept.
        batch_size: Texts in one forward pass.
        seed: Of the texts and probes.
    """

    n_fit: int = 1000
    n_probe: int = 600
    n_test: int = 500
    layers: tuple[int, ...] = (25, 27, -1)
    batch_size: int = 32
    seed: int = 0


class Progress:
    """A bar over the steps of a part, and a line for each of them."""

    def __init__(self, show: bool | None) -> None:
        self.disable = None if show is None else not show

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], object]]:
        """Yield a function to call with the number of texts done since the last call."""
        with tqdm(total=total, desc=name, unit="text", disable=self.disable, leave=False) as bar:
            yield bar.update


def run(
    out: str | Path = "demo-out",
    *,
    config: DemoConfig | None = None,
    parts: Sequence[Part] = PARTS,
    language_model: tuple[nn.Module, TokenizerLike] | None = None,
    sentence_model: tuple[nn.Module, TokenizerLike] | None = None,
    progress: bool | None = None,
) -> Report:
    """Run the demo, print its tables and write erasers, report and pictures.

    Args:
        out: Folder to write, made if needed.
        config: Sizes; the default takes about three minutes on two idle cores.
        parts: ``"language"``, ``"sentences"`` or both.
        language_model: Model and tokenizer to use instead of SmolLM2.
        sentence_model: Model and tokenizer to use instead of MiniLM.
        progress: Show bars; ``None`` shows them on a terminal.

    Returns:
        The report that was written.

    Raises:
        ValueError: If a part is unknown.
        ImportError: If a model's package is absent; the message holds the install line.
    """
    config = config or DemoConfig()
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {list(parts)}")
    folder, shown, start = Path(out), Progress(progress), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    if "language" in parts:
        _say("Language model: loading ...")
        model, tokenizer = language_model or load_smollm2()
        sections.append(language_report(model, tokenizer, folder, config, shown))
        _say(sections[-1].to_markdown(level=2))
    if "sentences" in parts:
        _say("Sentence embeddings: loading ...")
        model, tokenizer = sentence_model or load_minilm()
        sections.append(sentence_report(model, tokenizer, folder, config, shown))
        _say(sections[-1].to_markdown(level=2))
    meta = {**asdict(config), **_machine(), "seconds": round(time.perf_counter() - start, 1)}
    report = Report(
        "Gender erased: before and after",
        meta=meta,
        notes=(
            "Gender here is what pronouns, kinship words and nouns say about the person described.",
            "Not tried: relearning, rewording attacks, other languages, non-binary forms, names.",
        ),
        sections=sections,
    )
    paths = report.save(folder)
    pictures = sorted(folder.glob("*.png"))
    erasers = sorted(path.parent for path in folder.glob("erasers/**/eraser_config.json"))
    _say("Written:\n" + "\n".join(f"  {path}" for path in (*paths, *pictures, *erasers)))
    _say(f"Done in {meta['seconds']} s.")
    return report


def _machine() -> dict[str, object]:
    """Return what the numbers depend on besides the code."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line.

    Args:
        argv: Arguments; default those of the process.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(description="Erase gender from two small real models.")
    parser.add_argument("--out", default="demo-out", help="folder to write")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--seed", type=int, default=0, help="of texts and probes")
    options = parser.parse_args(argv)
    run(options.out, config=DemoConfig(seed=options.seed), parts=options.part or PARTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
