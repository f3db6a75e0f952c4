"""Which questions: tasks of lm-eval by name, with their data from the hub, from local files or from this package.

A local task keeps everything lm-eval says of it (prompt, choices, few-shot rule, version); only the data come from
elsewhere. No question is copied anywhere.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from concept_erasure.errors import FormatError, missing_extra
from concept_erasure.evals.language._rows import (
    SUFFIXES,
    Rows,
    check_choices,
    find_splits,
    hash_of,
    read_many,
    read_rows,
)

__all__ = [
    "PACKAGED",
    "Leaf",
    "Task",
    "find_task",
    "known_task",
    "packaged_mmlu",
    "stratified",
]

PACKAGED = "mmlu_500"
"""Name of the task whose 500 questions come with the library."""

DATA = Path(__file__).parent / "data"
# Where lm-eval keeps the tasks that are asked for most: reading these folders takes 0.1 s, reading all takes 5.
FAMILIES = {
    "mmlu": "mmlu/default",
    "wmdp": "wmdp",
    "hellaswag": "hellaswag",
    "arc": "arc",
    "piqa": "piqa",
    "sciq": "sciq",
    "lambada": "lambada",
    "wikitext": "wikitext",
    "truthfulqa": "truthfulqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "boolq": "super_glue/boolq",
}
FOUR_CHOICES = ("cais/mmlu", "cais/wmdp")  # data sets of rows question, choices[4], answer


@dataclass(frozen=True)
class Leaf:
    """A task without subtasks.

    Attributes:
        name: As lm-eval calls it.
        task: lm-eval's object.
    """

    name: str
    task: Any

    @property
    def size(self) -> int:
        """Number of questions."""
        return len(self.task.eval_docs)


@dataclass(frozen=True)
class Task:
    """What was asked for by one name: one leaf or more.

    Attributes:
        name: As it was asked for.
        leaves: Its parts.
        source: ``"hub"``, ``"package"`` or ``"files"``.
        files: Names and sha256 of the local files.
    """

    name: str
    leaves: tuple[Leaf, ...]
    source: str
    files: Mapping[str, str]


def stratified(sizes: Mapping[str, int], limit: int, *, seed: int = 0) -> dict[str, list[int]]:
    """Choose questions so that every stratum has its share, up to rounding (largest remainders).

    The questions of a smaller limit are, in each stratum, the first of those of a larger one.

    Args:
        sizes: Stratum to number of questions.
        limit: How many to choose in all.
        seed: Of the order within each stratum.

    Returns:
        Stratum to chosen numbers, in ascending order; strata without any are left out.

    Raises:
        ValueError: If the limit is not positive.

    Example:
        >>> {name: len(chosen) for name, chosen in stratified({"a": 10, "b": 30}, 4).items()}
        {'a': 1, 'b': 3}
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    total = sum(sizes.values())
    limit = min(limit, total)
    shares = {name: limit * size / total for name, size in sizes.items()} if total else {}
    counts = {name: int(share) for name, share in shares.items()}
    missing = limit - sum(counts.values())
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[:missing]:
        counts[name] += 1
    chosen: dict[str, list[int]] = {}
    for name, count in counts.items():
        order = list(range(sizes[name]))
        random.Random(f"{seed}\0{name}").shuffle(order)  # noqa: S311 - not for secrets
        if count:
            chosen[name] = sorted(order[:count])
    return chosen


def packaged_mmlu(split: str = "test") -> Rows:
    """Return MMLU questions that come with the library (Hendrycks et al. 2021, MIT; see the note beside the data).

    Args:
        split: ``"test"``, 500 questions over all 57 subjects in proportion, or ``"dev"``, five examples a subject.

    Raises:
        ValueError: If it is neither.
    """
    names = {"test": "mmlu_500.jsonl", "dev": "mmlu_dev.jsonl"}
    if split not in names:
        raise ValueError(f"split must be 'test' or 'dev'; got {split!r}")
    return read_rows(DATA / names[split])


def known_task(name: str) -> bool:
    """Say whether lm-eval has a task of that name, or it is `PACKAGED`; nothing is loaded.

    Raises:
        ImportError: If lm-eval is absent.
    """
    try:
        return _manager("mmlu" if name == PACKAGED else name) is not None
    except KeyError:
        return False


def find_task(
    name: str, *, data_dir: str | Path | None = None, local: Sequence[str] | None = None
) -> Task:
    """Load a task of lm-eval.

    Args:
        name: As lm-eval calls it, or `PACKAGED`.
        data_dir: Folder with local files, see `run`; None means the hub.
        local: Tasks to take from ``data_dir``; default all.

    Raises:
        ImportError: If lm-eval is absent.
        KeyError: If there is no such task.
        FileNotFoundError: If a local file is missing.
        FormatError: If a local file is not what the task needs.
        ConnectionError: If the data must come from the hub and it cannot be reached.
    """
    if name == PACKAGED:
        splits = {"test": packaged_mmlu("test"), "dev": packaged_mmlu("dev")}
        files = {path.name: hash_of(path) for path in sorted(DATA.glob("mmlu_*.jsonl"))}
        leaves = tuple(_mmlu_leaves(splits))
        return Task(name, leaves, "package", files)
    if data_dir is None or (local is not None and name not in local):
        return Task(name, _hub_leaves(name), "hub", {})
    return _local_task(name, Path(data_dir))


def _local_task(name: str, folder: Path) -> Task:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} for data_dir")
    entries = _leaf_entries(name)
    files: dict[str, str] = {}
    whole = find_splits(folder, (name,)) if name == "mmlu" else {}
    if whole:
        splits = {split: read_many(paths, files) for split, paths in whole.items()}
        for split, rows in splits.items():
            check_choices(rows, f"{folder.name}, {split}", subject=True)
        return Task(name, tuple(_mmlu_leaves(splits)), "files", files)
    leaves = [
        _local_leaf(folder, leaf, config, () if len(entries) > 1 else (name,), files)
        for leaf, config in entries.items()
    ]
    return Task(name, tuple(leaves), "files", files)


def _local_leaf(
    folder: Path, leaf: str, config: Mapping[str, Any], also: Sequence[str], files: dict[str, str]
) -> Leaf:
    """Return a leaf with the rows of its files, which may have its name, its subset's, or ``also``."""
    if leaf.startswith("mmlu_") and (subject := _subject_rows(folder, leaf, files)):
        return _leaf(leaf, config, subject)
    found = find_splits(
        folder, dict.fromkeys((leaf, str(config.get("dataset_name") or leaf), *also))
    )
    splits = {split: read_many(paths, files) for split, paths in found.items()}
    wanted = str(config.get("test_split") or config.get("validation_split") or "test")
    if wanted not in splits and "" in splits:
        splits[wanted] = splits[""]
    if wanted not in splits:
        raise FileNotFoundError(
            f"no data for the task {leaf!r}: data_dir {folder} holds neither {leaf}{SUFFIXES[0]} nor "
            f"{leaf}/{wanted}{SUFFIXES[0]} ({', '.join(SUFFIXES)} are read)"
        )
    if config.get("dataset_path") in FOUR_CHOICES:
        for split, rows in splits.items():
            check_choices(rows, f"{leaf}, {split or wanted}")
    return _leaf(leaf, config, splits)


def _subject_rows(folder: Path, leaf: str, files: dict[str, str]) -> dict[str, Rows]:
    """Return one subject's rows of a folder that holds all of MMLU; nothing if there is no such folder."""
    subject = leaf.removeprefix("mmlu_")
    found = find_splits(folder, ("mmlu",))
    rows = {split: read_many(paths, files) for split, paths in found.items()}
    for split, own in rows.items():
        check_choices(own, f"mmlu, {split}", subject=True)
    rows = {split: [r for r in own if r["subject"] == subject] for split, own in rows.items()}
    return rows if rows.get("test") else {}


def _mmlu_leaves(splits: Mapping[str, Rows]) -> Iterator[Leaf]:
    """Yield one leaf a subject that has questions."""
    entries = _leaf_entries("mmlu")
    questions = splits.get("test") or splits.get("") or []
    subjects = sorted({str(row["subject"]) for row in questions})
    for subject in subjects:
        leaf = f"mmlu_{subject}"
        if leaf not in entries:
            known = ", ".join(sorted(name.removeprefix("mmlu_") for name in entries))
            raise FormatError(f"MMLU has no subject {subject!r}; its subjects are {known}")
        own = {
            "test": [row for row in questions if row["subject"] == subject],
            "dev": [row for row in splits.get("dev", []) if row["subject"] == subject],
        }
        yield _leaf(leaf, entries[leaf], own)


def _leaf(name: str, config: Mapping[str, Any], splits: Mapping[str, Rows]) -> Leaf:
    """Return lm-eval's task with other data."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    held = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items() if rows}
    made = {key: value for key, value in config.items() if key not in ("tag", "group")}
    # splits that are not there must not be asked for
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if made.get(key) is not None and made[key] not in held:
            made[key] = None
    made |= {
        "task": name,
        "dataset_name": None,
        "dataset_kwargs": None,
        "custom_dataset": lambda **_: held,
    }
    return Leaf(name, ConfigurableTask(config=made))


def _hub_leaves(name: str) -> tuple[Leaf, ...]:
    """Load a task whose data come from the hub (or are in its cache)."""
    manager = _manager(name)
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:
        if not _is_offline(error):
            raise
        raise ConnectionError(
            f"the data of the task {name!r} come from the hub, which cannot be reached "
            f"({type(error).__name__}); go online once, or give the folder with its files as data_dir"
            + (f", or use the task {PACKAGED!r}, which comes with the library" * (name == "mmlu"))
        ) from None
    return tuple(Leaf(leaf, task) for leaf, task in tasks.items())


def _is_offline(error: BaseException) -> bool:
    """Say whether an error, or what caused it, is that the hub was not reached."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        words = ("Offline", "Connect", "Timeout", "HTTP", "LocalEntryNotFound")
        if any(word in type(seen).__name__ for word in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@lru_cache(maxsize=8)
def _task_manager(folder: str | None) -> Any:  # noqa: ANN401 - lm-eval's class
    tasks = importlib.import_module("lm_eval.tasks")
    if folder is None:
        return tasks.TaskManager()
    root = Path(str(tasks.__file__)).parent / folder
    return tasks.TaskManager(include_path=str(root), include_defaults=False)


def _manager(name: str) -> Any:  # noqa: ANN401 - lm-eval's class
    """Return a manager that knows a task.

    Raises:
        ImportError: If lm-eval is absent or too old.
        KeyError: If there is no such task.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError:
        raise missing_extra("lm-eval", "evals") from None
    if not hasattr(importlib.import_module("lm_eval.tasks").TaskManager, "load"):
        raise ImportError(
            "this needs lm-eval 0.4.13 or newer; install it with: pip install 'deconcept[evals]'"
        )
    family = next((folder for key, folder in FAMILIES.items() if name.startswith(key)), None)
    for folder in dict.fromkeys((family, None)):
        manager = _task_manager(folder)
        if name in manager.task_index:
            return manager
    raise KeyError(
        f"lm-eval has no task {name!r}; some of those it has: {', '.join(_near(name, manager.task_index))}"
    )


def _near(name: str, known: Sequence[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(known), n=5, cutoff=0.3) or sorted(FAMILIES)


def _leaf_entries(name: str) -> dict[str, dict[str, Any]]:
    """Return the parts of a task with their full configuration; nothing is loaded."""
    manager = _manager(name)
    load_yaml: Callable[..., dict[str, Any]]
    load_yaml = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    found: dict[str, dict[str, Any]] = {}

    def visit(one: str) -> None:
        entry = manager.task_index[one]
        if entry.tags and entry.yaml_path is None:
            for leaf in sorted(entry.tags):
                visit(leaf)
            return
        config = load_yaml(entry.yaml_path, resolve_func=True)
        members = config.get("task")
        if isinstance(members, list):
            for member in members:
                visit(
                    member if isinstance(member, str) else member.get("task", member.get("group"))
                )
        else:
            found[one] = config

    visit(name)
    return found
