"""The authors' ELM, run from a folder the user gives; none of it is shipped here.

The folder is a checkout of github.com/rohitgandikota/erasing-llm. Its ``train_elm`` runs as it is, with our model,
tokenizer and texts handed to it where it would load its own, and without the experiment tracker it asks for. What is
timed is one pass of its loop: an update of its progress bar to the next, so that neither loading nor its last
evaluation count. The run is ended from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DATASET = 2  # the number under which its script keeps texts like ours
SETTINGS: dict[str, Any] = {  # its defaults, but for what `Original.passes` is given
    "device": "cpu",
    "dtype": torch.float32,
    "train_method": "mlp-attn",
    "action": "erase",
    "eta": 1000,
    "topk": 50,
    "temperature": 1.2,
    "use_erase_soft_loss": "True",
    "use_retain_soft_loss": "False",
    "lr": 5e-5,
    "loss": "cross",
    "verbose": "False",
    "dataset_idx": str(DATASET),
    "max_len": 700,
    "min_len": 50,
    "erase_loss_scale": 1,
    "retain_loss_scale": 1,
    "consistence_loss_scale": 1,
    "grad_accumulation_steps": 4,
    "wandb_log": 0,
    "save_every": None,
    "experiment_name": "benchmark",
    "model_id": "the model of this benchmark",
}


class _EnoughError(Exception):
    """Ends the authors' loop."""


class _Bar:
    """Stands for the progress bar: notes the CPU time of each update."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []

    def __call__(self, *_: object, **__: object) -> _Bar:
        return self

    def __enter__(self) -> _Bar:
        self.times.append(time.process_time())
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_description(self, *_: object) -> None:
        pass

    def update(self, *_: object) -> None:
        self.times.append(time.process_time())
        if len(self.times) > self.steps:
            raise _EnoughError


class _Timed:
    """A function that notes the CPU time of each call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *args: object, **options: object) -> object:
        start = time.process_time()
        try:
            return self.function(*args, **options)
        finally:
            self.seconds.append(time.process_time() - start)


@dataclass(frozen=True)
class Times:
    """CPU seconds of each pass, and what making its target took of it."""

    seconds: list[float]
    target_seconds: list[float]


@dataclass(frozen=True)
class Original:
    """A checkout of the authors' code.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "trainscripts" / "erase.py").is_file():
            raise FileNotFoundError(
                f"{self.folder} has no trainscripts/erase.py; give a checkout of rohitgandikota/erasing-llm"
            )

    @property
    def commit(self) -> str:
        """Hash of the training script, for want of a commit that a copied folder would not have."""
        text = (self.folder / "trainscripts" / "erase.py").read_bytes()
        return f"trainscripts/erase.py, sha256 {hashlib.sha256(text).hexdigest()[:16]}"

    def passes(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        forget: Sequence[str],
        retain: Sequence[str],
        *,
        passes: int,
        rank: int,
        alpha: int,
        layers: tuple[int, int],
        fluent: Sequence[tuple[str, str]] | None,
    ) -> Times:
        """Return the CPU seconds of each pass of the authors' loop: one text of each kind.

        Args:
            model: Trained in place.
            tokenizer: Its tokenizer; some of its settings are overwritten.
            forget: Texts to forget.
            retain: Texts to retain.
            passes: How many.
            rank: Of the LoRA.
            alpha: Of the LoRA.
            layers: First block with a LoRA, and the first after them without.
            fluent: Prompts with what follows, as its other script writes them before training; None makes them during
                training, as its default does.
        """
        with self._imported() as module, tempfile.TemporaryDirectory() as work:
            path = None
            if fluent is not None:
                rows = [{"prompt": prompt, "consistence_prompt": more} for prompt, more in fluent]
                path = f"{work}/continuations.json"
                Path(path).write_text(json.dumps({str(DATASET): rows}), encoding="utf-8")
            bar = _Bar(passes)
            module.tqdm = bar
            target = _Timed(module.get_edit_vector)
            module.get_edit_vector = target
            module.AutoModelForCausalLM = _giving(model)
            module.AutoTokenizer = _giving(tokenizer)
            texts = {"text": list(forget), "document": list(retain)}
            module.datasets = types.SimpleNamespace(load_dataset=lambda *_, **__: texts)
            options = {
                **SETTINGS,
                "lora_rank": rank,
                "lora_alpha": alpha,
                "layers_to_train": f"{layers[0]},{layers[1]}",
                "num_samples": passes,
                "save_path": work,
                "pregenerated_consistency_path": path,
            }
            with contextlib.suppress(_EnoughError), contextlib.redirect_stdout(None):
                module.train_elm(argparse.Namespace(**options))
        took = [after - before for before, after in itertools.pairwise(bar.times)]
        return Times(took, target.seconds)

    @contextlib.contextmanager
    def _imported(self) -> Iterator[Any]:
        """Give the authors' training script as a module; paths and working folder are put back."""
        before, here, known = list(sys.path), os.getcwd(), set(sys.modules)
        tracker = sys.modules.get("wandb")
        sys.modules["wandb"] = types.ModuleType("wandb")
        scripts = self.folder.resolve() / "trainscripts"
        sys.path[:0] = [str(scripts), str(scripts.parent)]
        os.chdir(scripts)  # it reads its keywords by a relative path
        try:
            yield importlib.import_module("erase")
        finally:
            os.chdir(here)
            sys.path[:] = before
            for name in ("erase", "utils", "utils.lora", "utils.metrics"):
                if name not in known:
                    sys.modules.pop(name, None)
            sys.modules.pop("wandb")
            if tracker is not None:
                sys.modules["wandb"] = tracker


def _giving(value: object) -> types.SimpleNamespace:
    """Return what gives this value when asked to load something."""
    return types.SimpleNamespace(from_pretrained=lambda *_, **__: value)
