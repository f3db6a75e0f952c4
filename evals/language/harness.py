"""Public benchmarks on a live model: lm-eval's tasks, prompts and scoring; our intervals, our record, resumable.

`run` puts an edited model through tasks such as ``wmdp``, ``mmlu``, ``hellaswag`` or ``arc_easy``. Data come from the
hub, from local files, or, for ``mmlu_500``, with this library. What lm-eval decides (prompt, what is scored, few-shot
rule) is left to it; every report names its version and those of its tasks, because they change.

Accuracy near chance cannot fall: a model that does not know the answers shows no damage here, and a report says so.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from concept_erasure.errors import missing_extra
from concept_erasure.evals.language._identity import Identity, identify
from concept_erasure.evals.language._scores import Scores, report_of
from concept_erasure.evals.language._tasks import Task, find_task, stratified
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.report import Report

__all__ = ["Scores", "measure", "needs_bos", "run"]

FORMAT = 1  # of the cached files


def run(
    model: nn.Module,
    tokenizer: TokenizerLike,
    tasks: Sequence[str] = ("mmlu_500",),
    *,
    eraser: Any = None,  # noqa: ANN401 - anything with apply(model) -> Edit
    limit: int | None = None,
    data_dir: str | Path | None = None,
    local: Sequence[str] | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    add_bos_token: bool | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Report:
    """Evaluate a live model, edits and adapters in force included, on tasks of lm-eval.

    Args:
        model: A causal language model of transformers; bit-identical afterwards.
        tokenizer: Its tokenizer.
        tasks: Names as lm-eval has them, or ``"mmlu_500"``, which comes with the library.
        eraser: Measure the model as it is, then with this applied; the report has both and their difference.
        limit: At most so many questions a task, spread over its subtasks in proportion, the same for every model.
        data_dir: Folder with local files instead of the hub: ``mmlu/test.jsonl`` with all subjects (and
            ``mmlu/dev.jsonl`` for few-shot prompts), else ``TASK.jsonl``, ``TASK/SPLIT.jsonl`` or the hub's own
            ``.parquet`` files; rows as in the published data set.
        local: Tasks whose data are in ``data_dir``; default all.
        batch_size: Texts in one forward pass.
        num_fewshot: Examples in the prompt; default the task's own.
        add_bos_token: Begin prompts with the start token; default where the tokenizer does or the model needs it.
        seed: Which questions a limit chooses.
        cache_dir: Folder for finished tasks, by exact weights, edits, data and options; an interrupted run goes on
            where it was.

    Raises:
        ImportError: If lm-eval is absent.
        KeyError: If there is no such task.
        FileNotFoundError: If a local file is missing.
        FormatError: If a local file is not what the task needs.
        ConnectionError: If data must come from the hub and it cannot be reached.
        ValueError: If an option is out of range.
    """
    options: dict[str, Any] = {
        "limit": limit,
        "data_dir": data_dir,
        "local": local,
        "batch_size": batch_size,
        "num_fewshot": num_fewshot,
        "add_bos_token": add_bos_token,
        "seed": seed,
        "cache_dir": cache_dir,
    }
    bos = needs_bos(model, tokenizer) if add_bos_token is None else add_bos_token
    found = {"" if eraser is None else "no edit": measure(model, tokenizer, tasks, **options)}
    if eraser is not None:
        with eraser.apply(model):
            found["edited"] = measure(model, tokenizer, tasks, **options)
    meta = {
        "model": str(getattr(model, "name_or_path", type(model).__name__)),
        "weights": identify(model).weights[:16],
        "tokenizer adds a start token": bos,
        "limit": limit,
        "seed": seed,
        "local files": {
            k: v for scores in next(iter(found.values())) for k, v in scores.files.items()
        },
        "versions": {
            name: version(name) for name in ("lm_eval", "datasets", "transformers", "torch")
        },
    }
    return report_of(found, meta)


def measure(
    model: nn.Module,
    tokenizer: TokenizerLike,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    local: Sequence[str] | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    add_bos_token: bool | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> list[Scores]:
    """Return what a live model does on tasks, question by question; see `run` for the options and errors."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "evals")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be different names, at least one; got {names}")
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    bos = needs_bos(model, tokenizer) if add_bos_token is None else add_bos_token
    identity = identify(model)
    out: list[Scores] = []
    with _quiet(), _left_alone(model, tokenizer, identity):
        lm: Any = None
        loaded = [find_task(name, data_dir=data_dir, local=local) for name in names]
        for task in loaded:
            key = _key(task, identity, tokenizer, limit, num_fewshot, bos, seed)
            path = (
                None
                if cache_dir is None or key is None
                else Path(cache_dir) / f"{task.name}-{key}.json"
            )
            held = None if path is None else _read_cache(path)
            if held is None:
                lm = lm or _wrap(model, tokenizer, batch_size, bos)
                held = _evaluate(lm, task, limit, num_fewshot, seed)
                if path is not None:
                    _write_cache(path, held)
            out.append(held)
    return out


def needs_bos(model: nn.Module, tokenizer: TokenizerLike) -> bool:
    """Say whether prompts should begin with the start token: the tokenizer does so, or the model was trained so."""
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        return False
    ids = tokenizer.encode("a", add_special_tokens=True) if hasattr(tokenizer, "encode") else []
    if len(ids) and ids[0] == start:
        return True
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    return kind.startswith("gemma")


# -- one task ---------------------------------------------------------------------------------------


def _wrap(model: nn.Module, tokenizer: TokenizerLike, batch_size: int, bos: bool) -> Any:  # noqa: ANN401
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        device=str(next(model.parameters()).device),
        add_bos_token=bos,
    )


def _evaluate(lm: Any, task: Task, limit: int | None, shots: int | None, seed: int) -> Scores:  # noqa: ANN401
    import lm_eval
    from lm_eval.tasks import TaskManager

    sizes = {leaf.name: leaf.size for leaf in task.leaves}
    chosen = None if limit is None else stratified(sizes, limit, seed=seed)
    leaves = [leaf for leaf in task.leaves if chosen is None or leaf.name in chosen]
    for leaf in leaves:
        config = leaf.task.config  # a task that says 0 itself, such as wmdp, never gets examples
        held = (config.fewshot_split, config.training_split, config.validation_split)
        if shots and config.num_fewshot != 0 and not any(held):
            raise ValueError(
                f"{leaf.name!r} has no examples for num_fewshot={shots}; give its dev or training split as a file too"
            )
    out = lm_eval.simple_evaluate(
        model=lm,
        tasks=[leaf.task for leaf in leaves],
        task_manager=TaskManager(include_defaults=False),
        samples=chosen,
        num_fewshot=shots,
        bootstrap_iters=0,
        log_samples=True,
    )
    values: dict[str, dict[str, list[float]]] = {}
    plain: dict[str, float] = {}
    chance: dict[str, float] = {}
    for leaf in leaves:
        samples = out["samples"][leaf.name]
        for metric, own in _per_question(samples).items():
            values.setdefault(metric, {})[leaf.name] = own
        if leaf.task.OUTPUT_TYPE == "multiple_choice":
            choices = [len(leaf.task.doc_to_choice(sample["doc"])) for sample in samples]
            chance[leaf.name] = sum(1 / n for n in choices) / len(choices)
        for name, value in out["results"][leaf.name].items():
            metric = name.removesuffix(",none")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if "," in name and number and "stderr" not in name and metric not in values:
                plain[metric if len(leaves) == 1 else f"{leaf.name} {metric}"] = float(value)
    return Scores(
        task=task.name,
        values=values,
        chance=chance,
        plain=plain,
        versions={leaf.name: out["versions"].get(leaf.name, "?") for leaf in leaves},
        shots={leaf.name: int(out["n-shot"].get(leaf.name, 0)) for leaf in leaves},
        source=task.source,
        files=task.files,
    )


def _per_question(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the metrics that are one number a question, questions in order."""
    found: dict[str, list[float]] = {}
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in sorted(samples, key=lambda one: int(one["doc_id"])):
        for metric in sample["metrics"]:
            name = f"{metric} ({sample['filter']})" if several else metric
            value = sample[metric]
            if isinstance(value, bool | int | float | np.number):
                found.setdefault(name, []).append(float(value))
    counts = {name: len(own) for name, own in found.items()}
    questions = len({int(sample["doc_id"]) for sample in samples})
    return {name: own for name, own in found.items() if counts[name] == questions}


# -- nothing else changes ---------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval and datasets report errors only, for the time of a run."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    loggers += [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith("lm_eval.")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _left_alone(model: nn.Module, tokenizer: TokenizerLike, identity: Identity) -> Iterator[None]:
    """Put back what lm-eval sets: random states, mode, padding; refuse if it touched the weights.

    Raises:
        RuntimeError: If the weights changed. lm-eval ties weights anew, which would undo an edit of a tied head.
    """
    modes = [(module, module.training) for module in model.modules()]
    names = ("pad_token", "padding_side", "add_bos_token")
    held = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - what lm-eval seeds
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        for module, mode in modes:
            module.training = mode
        for name, value in held.items():
            if getattr(tokenizer, name) != value:
                setattr(tokenizer, name, value)
    if identify(model).weights != identity.weights:
        raise RuntimeError(
            "the weights changed while lm-eval ran (it ties weights anew): these numbers are of another model. "
            "Set model.config.tie_word_embeddings to what the edit left"
        )


# -- cache ------------------------------------------------------------------------------------------


def _key(
    task: Task,
    identity: Identity,
    tokenizer: TokenizerLike,
    limit: int | None,
    shots: int | None,
    bos: bool,
    seed: int,
) -> str | None:
    """Return the key of a result; None if the model cannot be told apart from others."""
    from hashlib import sha256

    if identity.unknown:
        return None
    leaves = {leaf.name: [leaf.size, str(leaf.task.VERSION)] for leaf in task.leaves}
    probe = "The quick brown fox's 12 jumps, über alles.\nAnswer: A"
    parts = {
        "format": FORMAT,
        "model": asdict(identity),
        "tokenizer": [
            type(tokenizer).__name__,
            list(map(int, cast("Any", tokenizer).encode(probe))),
        ],
        "task": [task.name, task.source, dict(task.files), leaves],
        "options": [limit, shots, bos, seed],
        "lm_eval": version("lm_eval"),
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _read_cache(path: Path) -> Scores | None:
    """Return a finished task, or None if there is none; a broken file counts as none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return replace(Scores(**held), cached=True)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logging.getLogger(__name__).warning(
            "%s is not a finished task (%s): measured again", path.name, error
        )
        return None


def _write_cache(path: Path, scores: Scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(replace(scores, cached=False))), encoding="utf-8")
    partial.replace(path)
