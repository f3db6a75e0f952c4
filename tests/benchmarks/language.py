"""Benchmark of the language methods on SmolLM2-135M-Instruct: speed beside the authors' ELM, RMU's short pass, memory.

    python -m tests.benchmarks.language --out results.json [--original FOLDER] [--passes N] [--texts N]

FOLDER is a checkout of github.com/rohitgandikota/erasing-llm, see `language_original`; without it there is no
comparison. Seconds are CPU seconds of one thread. Both sides get the same float32 model, LoRA (rank 16 on blocks 4 to
7), and texts to forget, to retain and to continue fluently; a pass visits one of each. Ours has the paper's target,
terms and constants with the texts in batches of 8 (and, as a row of its own, one by one).

*Training only* is a step of the loop. The authors' step cannot be had without its frozen passes; what
`get_edit_vector` alone takes is measured too and a row subtracts it. *Amortised* is everything a run costs: the
authors build targets and, by default, a fluent continuation in every pass, we build each once. The run is the
published one for books: 5000 passes over 3000 texts. Its cost is made up of measured seconds per text, not run.

Memory is the peak of resident memory of a process of its own, less what it holds before the model is loaded; both
sides hold the weights, inference the logits of all positions. Training is measured as it is by default, when all
blocks above the first trained one keep everything, and with ``checkpointing`` what is cheap and all; with the holes
that the C library leaves, and without them (see `memory`). The goal is asked of all six.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.evals.models import load_smollm2
from concept_erasure.language import rmu
from concept_erasure.language._elm_fit import Prepared, _Builder
from concept_erasure.language.batches import Batch, Batches, collate, encode, pad_id
from concept_erasure.language.contrast import Source
from concept_erasure.language.elm import _PRESETS, ElmConfig
from concept_erasure.language.likelihood import vocabulary
from concept_erasure.language.loop import Checkpointing, Training, train
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora, trainable
from tests.benchmarks.language_original import Original

Row = dict[str, object]
LORA = Lora(rank=16, alpha=16.0, dropout=0.05, layers=(4, 5, 6, 7))
PAPER = ElmConfig(preset="paper", **_PRESETS["paper"])
PASSES, CORPUS = 5000, 3000  # the published run for books
LENGTH = 160  # most tokens of a text
MEMORY_BATCH, MEMORY_LENGTH = 8, 256
TRAININGS: dict[str, Checkpointing] = {
    "training": False,
    "cheaply checkpointed training": "cheap",
    "checkpointed training": True,
}
BATCH = 8


def goal(name: str, value: float, bound: float, *, at_least: bool) -> Row:
    """Return a row of the goals table."""
    met = value >= bound if at_least else value <= bound
    return {
        "goal": name,
        "value": value,
        "want": f"{'>=' if at_least else '<='} {bound:g}",
        "met": met,
    }


def seconds(function: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


@dataclass(frozen=True)
class Data:
    """The model and some texts, made of the facts that come with a concept: nothing is sampled or downloaded."""

    model: nn.Module
    tokenizer: Any
    concept: Concept
    forget: list[str]
    retain: list[str]

    @classmethod
    def load(cls, texts: int) -> Data:
        """Return that many texts of each kind, some 500 characters long."""
        model, tokenizer = load_smollm2()
        concept = Concept.load("harry_potter")
        both = [
            _passages([item.texts[item.answer] for item in concept.items(kind)], texts)
            for kind in ("concept", "near")
        ]
        return cls(model, tokenizer, concept, *both)


def _passages(sentences: Sequence[str], n: int, characters: int = 500) -> list[str]:
    made: list[str] = []
    k = 0
    while len(made) < n:
        text = ""
        while len(text) < characters:
            text += sentences[k % len(sentences)].strip() + " "
            k += 1
        made.append(text.strip())
    return made


# -- ELM --------------------------------------------------------------------------------------------


def our_elm(data: Data, steps: int) -> tuple[Row, list[tuple[str, str]]]:
    """Return our CPU seconds per text, and the fluent texts as prompts and continuations."""
    training = Training(
        steps=steps,
        learning_rate=5e-5,
        batch_size=BATCH,
        max_length=LENGTH,
        clip=None,
        progress=False,
    )
    config = replace(PAPER, fluency_texts=len(data.forget))
    build = _Builder(data.model, data.tokenizer, data.concept, config, training, None)
    n = len(data.forget)
    times: Row = {}
    start = time.process_time()
    forget = build.forget(data.forget, Source("persona"))
    times["target to forget"] = (time.process_time() - start) / n
    start = time.process_time()
    retain = build.retain(data.retain)
    times["target to retain"] = (time.process_time() - start) / n
    start = time.process_time()
    fluent = build.fluent(data.forget)
    times["fluent text"] = (time.process_time() - start) / n
    made = Prepared(config, forget, retain, fluent)
    for batch, name in ((BATCH, "training"), (1, "training, one by one")):
        some = replace(
            training,
            batch_size=batch,
            steps=max(1, steps * BATCH // batch // (1 if batch > 1 else 4)),
        )
        terms = made.terms(some, pad=pad_id(data.tokenizer), width=vocabulary(data.model))
        times[name] = training_seconds(data.model, terms, some) / (some.steps * batch)
    pairs = []
    for text in fluent:
        cut = int(text.supervised.nonzero()[0])
        prompt, more = (
            data.tokenizer.decode(part, skip_special_tokens=True)
            for part in (text.ids[:cut], text.ids[cut:])
        )
        pairs.append((prompt, more))
    return times, pairs


def training_seconds(model: nn.Module, terms: Sequence[Term], training: Training) -> float:
    """Return the CPU seconds of a training."""
    with trainable(model, LORA, seed=0) as parameterisation:
        train(model, parameterisation, terms, replace(training, steps=1))  # warm
        return seconds(lambda: train(model, parameterisation, terms, training))


def elm(data: Data, original: Original | None, passes: int) -> tuple[list[Row], Row]:
    """Return the goals on speed, and the times behind them."""
    ours, fluent = our_elm(data, max(1, len(data.forget) // BATCH))
    whole = (
        ours["training"]
        + (  # type: ignore[operator]
            CORPUS * (ours["target to forget"] + ours["target to retain"])
            + PAPER.fluency_texts * ours["fluent text"]  # type: ignore[operator]
        )
        / PASSES
    )
    ours["amortised"] = whole
    times: Row = {f"ours, {name}": value for name, value in ours.items()}
    if original is None:
        return [], times
    options: dict[str, Any] = {
        "rank": LORA.rank,
        "alpha": int(LORA.alpha),
        "layers": (4, 8),
    }
    given = original.passes(
        data.model,
        data.tokenizer,
        data.forget,
        data.retain,
        passes=passes,
        fluent=fluent,
        **options,
    )
    fresh, tokenizer = load_smollm2()
    default = original.passes(
        fresh,
        tokenizer,
        data.forget,
        data.retain,
        passes=max(2, passes // 2),
        fluent=None,
        **options,
    )
    theirs = statistics.median(given.seconds)
    target = statistics.median(given.target_seconds)
    made = statistics.mean(default.seconds)
    times |= {
        "theirs, a pass with continuations given": theirs,
        "theirs, of it the target to forget": target,
        "theirs, a pass": made,
    }
    step = float(ours["training"])  # type: ignore[arg-type]
    rows = [
        goal("texts per second, training only, ours over theirs", theirs / step, 2, at_least=True),
        goal(
            "texts per second, amortised, ours over theirs", made / float(whole), 5, at_least=True
        ),
    ]
    times["training only, theirs without its target, ratio"] = (theirs - target) / step
    times["training only, ours one by one, ratio"] = theirs / float(ours["training, one by one"])  # type: ignore[arg-type]
    times["amortised, theirs with continuations given, ratio"] = theirs / float(whole)
    return rows, times


# -- RMU --------------------------------------------------------------------------------------------


def whole_pass(model: nn.Module, batch: Batch, site: str) -> Tensor:
    """Return what `activations_at` does, from a pass through the whole model, logits and all."""
    kept: list[Tensor] = []
    block = model.get_submodule(f"model.layers.{site.rpartition('.')[2]}")
    handle = block.register_forward_hook(
        lambda *args: kept.append(args[2][0] if isinstance(args[2], tuple) else args[2])
    )
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return kept[0].flatten(0, 1)[batch.positions]


def truncation(data: Data, steps: int) -> tuple[Row, Row]:
    """Return the goal on RMU's pass, and the CPU seconds of a step of both."""
    training = Training(
        steps=steps, learning_rate=5e-5, batch_size=4, max_length=LENGTH, clip=None, progress=False
    )
    took: dict[str, float] = {}
    losses: dict[str, object] = {}
    for name, run in (("truncated", rmu.activations_at), ("whole", whole_pass)):
        with mock.patch.object(rmu, "activations_at", run), timed_training() as times:
            eraser = rmu.RmuEraser.fit(
                data.model,
                data.tokenizer,
                data.concept,
                forget_texts=data.forget[: 4 * steps],
                retain_texts=data.retain[: 4 * steps],
                training=training,
            )
        took[name] = times[0] / steps
        history: Any = eraser.report["history"]
        losses[name] = history[-1]["forget"]
    ratio = took["whole"] / took["truncated"]
    row = goal("RMU, seconds of a step, whole over truncated", ratio, 1.5, at_least=True)
    return row, {**took, "layer": 7, "last loss, both": list(losses.values())}


@contextmanager
def timed_training() -> Iterator[list[float]]:
    """Note the CPU seconds of each training that a fit starts."""
    from concept_erasure.language import eraser

    times: list[float] = []
    before = eraser.train

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return before(*args, **options)
        finally:
            times.append(time.process_time() - start)

    with mock.patch.object(eraser, "train", timed):
        yield times


# -- memory -----------------------------------------------------------------------------------------


def peak(what: str) -> float:
    """Return the megabytes that running the model, or training a LoRA on it, takes at its peak; in this process."""
    start = _resident("VmRSS")
    model, tokenizer = load_smollm2()
    _reset_peak()
    texts = [" ".join(["the quick brown fox jumps over the lazy dog"] * 60)] * MEMORY_BATCH
    made = encode(tokenizer, texts, max_length=MEMORY_LENGTH)
    batches = Batches(made, MEMORY_BATCH, seed=0, pad_id=pad_id(tokenizer))
    if what == "inference":
        batch = collate(made, range(MEMORY_BATCH), pad_id=0)
        with torch.inference_mode():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    else:
        from concept_erasure.language.likelihood import token_nll

        training = Training(
            steps=2,
            batch_size=MEMORY_BATCH,
            max_length=MEMORY_LENGTH,
            progress=False,
            checkpointing=TRAININGS[what],
        )
        term = Term("forget", -1.0, batches, lambda m, b: token_nll(m, b).sum())
        with trainable(model, Lora(layers=LORA.layers), seed=0) as parameterisation:
            train(model, parameterisation, [term], training)
    return _resident("VmHWM") - start


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory() -> tuple[list[Row], Row]:
    """Return the goals on memory, as training is by default and with checkpointing, and the megabytes behind them.

    Each is measured twice. As the C library comes, freed blocks stay with the process and are not always used again
    (glibc 2.36). With ``MALLOC_MMAP_THRESHOLD_`` at 1 MB every large tensor is a mapping of its own, given back when
    freed.
    """
    found: Row = {}
    for held, variables in (("", {}), (", without holes", {"MALLOC_MMAP_THRESHOLD_": "1000000"})):
        for what in ("inference", *TRAININGS):
            command = [sys.executable, "-m", "tests.benchmarks.language", "--peak", what]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **variables}
            ).stdout
            found[what + held] = float(output.split()[-1])
    rows = [
        goal(
            f"peak memory{held}, LoRA {what} over inference, {MEMORY_BATCH} x {MEMORY_LENGTH} tokens",
            float(found[what + held]) / float(found["inference" + held]),  # type: ignore[arg-type]
            2,
            at_least=False,
        )
        for held in ("", ", without holes")
        for what in TRAININGS
    ]
    return rows, found


# -- all of it --------------------------------------------------------------------------------------


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
    parser.add_argument("--out", type=Path, help="json file to write")
    parser.add_argument("--original", type=Path, help="checkout of the authors' code")
    parser.add_argument("--passes", type=int, default=6, help="passes of the authors' loop")
    parser.add_argument("--texts", type=int, default=16, help="texts of each kind, a multiple of 8")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak))
        return 0
    if options.out is None or options.texts < BATCH or options.texts % BATCH:
        parser.error(f"give --out, and --texts as a multiple of {BATCH}")
    original = None if options.original is None else Original(options.original)
    data = Data.load(options.texts)
    short, rmu_times = truncation(data, steps=max(1, options.texts // 8))
    room, megabytes = memory()
    speed, elm_times = elm(data, original, options.passes)
    goals = [*speed, short, *room]
    print(table(goals), json.dumps(elm_times), json.dumps(rmu_times), sep="\n\n")
    met = all(bool(row["met"]) for row in goals)
    result = {
        "met": met,
        "goals": goals,
        "elm_cpu_seconds_per_text": elm_times,
        "rmu_cpu_seconds_per_step": rmu_times,
        "megabytes": megabytes,
        "model": "SmolLM2-135M-Instruct, float32",
        "original": None if original is None else original.commit,
        "texts": options.texts,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": options.threads,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
