"""TOFU in small: forget two of twenty fictional authors, and compare with the model that never saw them.

A small model is taught all authors, its twin all but two. Both go on from one model that knows what both are to know,
with as many epochs, so that they differ by what the twin never saw and by little else. Every method then erases the two
from the first. What unlearning should reach is not a low number but the twin's: its log-probability and accuracy on
answers it cannot know, and its distributions everywhere else.

Run it with ``python -m concept_erasure.evals.tofu_small --data FOLDER --out FILE``, FOLDER holding TOFU's
``forget10.json`` and ``world_facts.json`` (Maini et al. 2024, arXiv:2401.06121; MIT). About 20 minutes on one core for
the default model, hours for SmolLM2. What is finished is kept beside FILE, so that an interrupted run goes on; delete
it after changing a method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from concept_erasure import registry
from concept_erasure._storage import library_version, write
from concept_erasure.concept import Concept
from concept_erasure.eraser import ModelEraser
from concept_erasure.errors import ConceptErasureError
from concept_erasure.evals._tofu_model import ModelSize, Teaching, load_base, teach
from concept_erasure.evals._tofu_read import Scores, StudyData, read_data, read_model, score
from concept_erasure.language.loop import Training
from concept_erasure.report import Cell, Interval, Report
from concept_erasure.sites import fingerprint

__all__ = ["TofuConfig", "main", "run"]

TEACHING = {
    "tiny": Teaching(),
    "smollm2": Teaching(shared=0, epochs=8, learning_rate=1e-4),
}
MINUTES = {"tiny": "about 20 minutes", "smollm2": "four to six hours"}
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TofuConfig:
    """Options of the study.

    Attributes:
        model: ``tiny``, trained from nothing, or ``smollm2``.
        forget: Authors to forget; drawn by the seed.
        read: Retained authors that are read.
        methods: Names in the registry; empty is all of the language family.
        steps: Of each fit.
        rates: Factors of a method's own learning rate. 1 is the row "default"; of all the one nearest to the twin is
            shown too.
        size: Of the tiny model.
        teaching: How the authors are taught; None is the model's default.
        batch_size: Texts in a forward pass of the readings.
        seed: Of everything.
    """

    model: str = "tiny"
    forget: int = 2
    read: int = 6
    methods: tuple[str, ...] = ()
    steps: int = 100
    rates: tuple[float, ...] = (1.0, 3.0, 10.0)
    size: ModelSize = field(default_factory=lambda: ModelSize(width=128))
    teaching: Teaching | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in TEACHING:
            raise ValueError(f"model must be one of {', '.join(TEACHING)}; got {self.model!r}")
        for name in ("forget", "read", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates must be positive factors; got {self.rates}")


NOTES = (
    "never knew: the twin, taught all but the forgotten authors. A gap is a model less the twin, question by question: "
    "0 is the aim for every set; below 0 on forgotten authors gives them away as much as above.",
    "log-prob: per token of the true answer. Accuracy: the true answer is the likeliest of four, where the wrong ones "
    "answer the likest questions about other authors of the same fate under the same name.",
    "KL: of the twin to the model, per token of true answers.",
    "default: the method's own learning rate. nearest: of all rates the one with the smallest sum of KL on forgotten "
    "and retained authors. That choice looks at the twin, which nobody has outside a study: read it as the best that "
    "the method could do here.",
    "Not tried: relearning, other wordings of the questions, attacks. Nothing here says that information is gone.",
)


class Fits(Protocol):
    """A method: its class, as far as the study needs it."""

    def fit(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        concept: Concept,
        *,
        forget_texts: Sequence[str],
        retain_texts: Sequence[str],
        training: Training,
    ) -> ModelEraser:
        """Return the eraser."""
        ...


Found = dict[str, Any]


@dataclass
class _Study:
    """One run: its texts, its models, and the folder that keeps what is finished."""

    data: StudyData
    config: TofuConfig
    store: Path | None
    say: Say
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    known: dict[str, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.config.teaching
        self.teaching = given or replace(TEACHING[self.config.model], seed=self.config.seed)
        retain, how, config = self.data.retain_texts, self.teaching, self.config
        every = self.data.forget_texts + retain
        self.model, self.tokenizer = load_base(config.model, config.size, every, seed=config.seed)
        rate = how.learning_rate
        if how.shared:
            self._teach("shared", self.model, retain, how.shared, rate)
            rate /= 2
        self.twin = deepcopy(self.model)
        self._teach("taught", self.model, every, how.epochs, rate)
        self._teach("twin", self.twin, retain, how.epochs, rate)
        asked = [[one.prompt, one.answers] for part in self.data.asked.values() for one in part]
        self.key = {
            "models": [fingerprint(self.model), fingerprint(self.twin)],
            "asked": asked,
            "version": library_version(),
        }

    def _teach(
        self, name: str, model: nn.Module, texts: Sequence[str], epochs: int, rate: float
    ) -> None:
        """Teach a model some texts, or read what was kept of it."""
        began = time.perf_counter()
        self.losses[name] = teach(
            model,
            self.tokenizer,
            texts,
            self.teaching,
            epochs=epochs,
            learning_rate=rate,
            store=None if self.store is None else self.store / f"{name}.safetensors",
            note=self._note(name),
        )
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def _note(self, name: str) -> Callable[[int, int, Tensor], None]:
        began = time.perf_counter()

        def note(step: int, steps: int, loss: Tensor) -> None:
            if step in (20, steps) or step % max(1, steps // 5) == 0:
                left = (time.perf_counter() - began) / step * (steps - step) / 60
                self.say(
                    f"{name}: step {step} of {steps}, loss {float(loss):.2f}, {left:.1f} min left"
                )

        return note

    def kept(self, name: str, options: Mapping[str, object], make: Callable[[], Found]) -> Found:
        """Return a finished result of these options, or make and keep it."""
        if self.store is None:
            return make()
        key = json.dumps([name, options, self.key], sort_keys=True)
        path = self.store / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            try:
                return cast("Found", json.loads(path.read_text(encoding="utf-8")))
            except ValueError:
                path.unlink()  # damaged: it is made again
        found = make()
        text = json.dumps(found, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return found

    def read(self, model: nn.Module) -> Found:
        """Return what a model says, as it is now, as plain values."""
        size, asked = self.config.batch_size, self.data.asked
        if not self.known:
            self.known = {
                name: score(self.twin, self.tokenizer, part, batch_size=size)
                for name, part in asked.items()
            }
        found = read_model(
            model, self.twin, self.tokenizer, asked, batch_size=size, known=self.known
        )
        return {name: asdict(reading) for name, reading in found.items()}

    def erase(self, kind: Fits, factor: float, options: Mapping[str, object]) -> Found:
        """Fit a method, read the edited model, and undo; a method that refuses says why."""
        make = getattr(kind, "default_training", Training)
        own: Training = make()
        training = replace(
            own,
            steps=self.config.steps,
            learning_rate=factor * own.learning_rate,
            max_length=self.teaching.max_length,
            seed=self.config.seed,
            progress=False,
        )
        began = time.perf_counter()
        fit: Any = partial(cast("Any", kind).fit, **options)
        try:
            eraser: ModelEraser = fit(
                self.model,
                self.tokenizer,
                self.data.concept,
                forget_texts=self.data.forget_texts,
                retain_texts=self.data.retain_texts,
                training=training,
            )
        except (ConceptErasureError, ValueError, FloatingPointError) as error:
            return {"status": f"refused: {error}", "rate": training.learning_rate}
        seconds = round(time.perf_counter() - began, 1)
        with eraser.apply(self.model):
            found = self.read(self.model)
        return {"status": "measured", "rate": training.learning_rate, "seconds": seconds, **found}

    def meta(self) -> dict[str, object]:
        """Return how the numbers came about."""
        data, config = self.data, self.config
        return {
            "model": config.model,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "authors": len(data.forget) + len(data.retain),
            "forgotten": [author.name for author in data.forget],
            "questions": {name: len(asked) for name, asked in data.asked.items()},
            "loss after teaching": self.losses,
            "teaching": asdict(self.teaching),
            "steps": config.steps,
            "rates": list(config.rates),
            "seed": config.seed,
            "seconds": self.seconds,
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "versions": {"deconcept": library_version(), "torch": str(torch.__version__)},
        }


def run(
    data: StudyData,
    config: TofuConfig,
    *,
    store: Path | None = None,
    say: Say | None = None,
    methods: Mapping[str, Fits] | None = None,
) -> Report:
    """Run the study.

    Args:
        data: See `read_data`.
        config: Options.
        store: Folder for what is finished; None keeps nothing.
        say: Called with lines about the progress.
        methods: Classes by name, in place of those of the registry.
    """
    say = say or (lambda _: None)
    chosen = (
        _registered(config.methods) if methods is None else {n: (k, {}) for n, k in methods.items()}
    )
    began = time.perf_counter()
    study = _Study(data, config, store, say)
    rows = [
        _row("never knew", study.kept("never_knew", {}, lambda: study.read(study.twin))),
        _row("taught", study.kept("taught", {}, lambda: study.read(study.model))),
    ]
    for name, (kind, options) in chosen.items():
        tried = []
        for factor in config.rates:
            key = {
                "factor": factor,
                "steps": config.steps,
                "seed": config.seed,
                "options": dict(options),
            }
            found = study.kept(name, key, partial(study.erase, kind, factor, options))
            say(f"{name} at {factor:g} times its rate: {found['status']}")
            tried.append((factor, found))
        rows += _method_rows(name, tried)
    study.seconds["this run"] = round(time.perf_counter() - began, 1)
    title = "TOFU in small: erased models against the one that never knew"
    return Report(title, rows, study.meta(), NOTES)


def _registered(names: Sequence[str]) -> dict[str, tuple[Fits, Mapping[str, object]]]:
    """Return classes and options of registered methods, all of the language family by default."""
    entries = [registry.get(name) for name in names or registry.names()]
    chosen = [entry for entry in entries if names or entry.family == "language"]
    return {e.name: (cast("Fits", e.load()), _options(e.options)) for e in chosen}


def _options(texts: Mapping[str, str]) -> dict[str, object]:
    """Return the options of a registry entry, those that are numbers as numbers."""
    made: dict[str, object] = {}
    for key, text in texts.items():
        try:
            made[key] = float(text)
        except ValueError:
            made[key] = text
    return made


def _method_rows(name: str, tried: Sequence[tuple[float, dict[str, Any]]]) -> list[dict[str, Cell]]:
    """Return the row of the method's own rate and that of the rate nearest to the twin."""
    own = next((found for factor, found in tried if factor == 1.0), tried[0][1])
    rows = [_row(f"{name}, default", own)]
    measured = [found for _, found in tried if found["status"] == "measured"]
    if len(measured) > 1:
        rows.append(_row(f"{name}, nearest", min(measured, key=_distance)))
    return rows


def _distance(found: Mapping[str, Any]) -> float:
    return float(found["forget"]["kl"]) + float(found["retain"]["kl"])


def _row(name: str, found: Mapping[str, Any]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"model": name}
    status = found.get("status", "measured")
    if status != "measured":
        return {**row, "note": str(status)}
    if "rate" in found:
        row |= {"rate": float(found["rate"]), "seconds": float(found["seconds"])}
    for key in ("forget", "retain", "world"):
        one = found[key]
        row |= {
            f"{key}: log-prob": Interval(**one["log_prob"]),
            f"{key}: gap": Interval(**one["gap"]),
            f"{key}: accuracy": Interval(**one["accuracy"]),
            f"{key}: accuracy gap": float(one["accuracy_gap"]),
            f"{key}: KL": float(one["kl"]),
        }
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m concept_erasure.evals.tofu_small",
        description="Forget two of TOFU's fictional authors and compare with the model that never saw them.",
    )
    parser.add_argument(
        "--data", required=True, help="folder with forget10.json and world_facts.json"
    )
    parser.add_argument(
        "--out", required=True, help="report to write, such as tofu.json; beside it a .md"
    )
    parser.add_argument("--model", default="tiny", choices=sorted(TEACHING))
    parser.add_argument(
        "--methods", nargs="*", default=[], help="default: all of the language family"
    )
    parser.add_argument("--steps", type=int, default=100, help="of each fit")
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 3.0, 10.0])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = TofuConfig(
        model=given.model,
        methods=tuple(given.methods),
        steps=given.steps,
        rates=tuple(given.rates),
        seed=given.seed,
    )
    out = Path(given.out)
    store = out.with_name(f"{out.stem}.parts")
    _say(
        f"{MINUTES[config.model]} on one core; what is finished is kept in {store.name} and not done again"
    )
    data = read_data(given.data, forget=config.forget, read=config.read, seed=config.seed)
    report = run(data, config, store=store, say=_say)
    report.save(out.parent, name=out.stem)
    _say(report.to_table())
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
