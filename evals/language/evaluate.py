"""Evaluate the erasure of a concept from a language model: is it gone, what else went, and what brings it back.

Every table has the model without edit and, as a baseline, the instruction "you know nothing about ..."; if asking
politely is as good, the report says so. What was not tried is listed by name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from concept_erasure.concept import Concept
from concept_erasure.evals.language._robustness import ATTACKS
from concept_erasure.evals.language._run import Evaluation
from concept_erasure.evals.language._suites import READINGS, Options, Store
from concept_erasure.evals.language._write_up import with_plots, write_up
from concept_erasure.evals.language.items import ignorance
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.neutral import Applicable
from concept_erasure.report import Report

__all__ = ["DEFAULT_SUITE", "SUITES", "evaluate"]

DEFAULT_SUITE = ("concept", "specificity")
SUITES = (*READINGS, *ATTACKS)
"""What `evaluate` measures itself; any other name is taken for a task of lm-eval, such as ``mmlu_500``."""


def _check(suite: Sequence[str], concept: Concept, options: Options, edited: bool) -> None:
    if isinstance(suite, str) or not suite or len(set(suite)) < len(suite):
        raise ValueError(
            f"suite must be different names, at least one of {', '.join(SUITES)} or tasks of lm-eval; got {suite!r}"
        )
    if not concept.facts and set(suite) & set(SUITES):
        raise ValueError(
            f"the concept {concept.name!r} has no facts to ask about; add facts to its file"
        )
    if options.limit is not None and options.limit < 2:
        raise ValueError(f"limit must be at least 2, got {options.limit}")
    attacks = [name for name in suite if name in ATTACKS]
    if attacks and not edited:
        raise ValueError(
            f"{', '.join(attacks)} attack an edited model; pass eraser=, or apply one before evaluating"
        )


def evaluate(  # noqa: PLR0913 options are spelled out
    model: nn.Module,
    tokenizer: TokenizerLike,
    concept: Concept,
    *,
    eraser: Applicable | None = None,
    suite: Sequence[str] = DEFAULT_SUITE,
    reference: tuple[nn.Module, TokenizerLike] | None = None,
    instruction: bool | str = True,
    forget_texts: Sequence[str] = (),
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool | None = False,
) -> Report:
    """Measure innocence, seamlessness, specificity and robustness, next to the baselines.

    Without ``eraser``, edits in force are what is measured, and they are lifted for the row "no edit"; without
    either, only the baselines are.

    Args:
        model: A causal language model; bit-identical afterwards.
        tokenizer: Its tokenizer.
        concept: With facts, near neighbours and far controls.
        eraser: Applied for the row "edited".
        suite: Any of `SUITES`, and tasks of lm-eval such as ``mmlu_500`` or ``wmdp``.
        reference: Another model and its tokenizer, to judge generated texts; needed for a reverse perplexity.
        instruction: Whether to measure the instruction "you know nothing about ...", or one of your own.
        forget_texts: Texts of the concept for relearning and ablation that no item's answer can be taken from;
            default: the concept's own, or statements of half of its facts, and the other half is asked.
        budgets: Suite to options of its own, such as ``{"relearn": {"steps": 50}, "fluency": {"prompts": 40}}``.
        seed: Of the choices' order and everything drawn.
        batch_size: Prompts a forward pass.
        limit: Items of each kind and format at most.
        cache_dir: Folder for finished readings; an interrupted evaluation goes on where it was.
        data_dir: Folder with local files for lm-eval's tasks.
        out: Folder for ``report.json``, ``report.md`` and plots.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        The report; ``meta["tried"]`` has the budgets, ``meta["not tried"]`` the rest.

    Raises:
        ValueError: If a suite is unknown or impossible, or the concept has no facts.
    """
    begun = time.perf_counter()
    options = Options(
        seed=seed, batch_size=batch_size, limit=limit, reference=reference, budgets=budgets or {}
    )
    told = instruction if isinstance(instruction, str) else ignorance(concept.name)
    run = Evaluation(
        model, tokenizer, concept, eraser, options, told if instruction else None,
        Store(None if cache_dir is None else Path(cache_dir)), forget_texts,
    )  # fmt: skip
    _check(suite, concept, options, run.edited)
    own = [name for name in suite if name in READINGS]
    attacks = [name for name in suite if name in ATTACKS]
    tasks = [name for name in suite if name not in SUITES]
    if attacks and "concept" not in own:
        own.insert(0, "concept")
    total = len(run.rows) * len(own) + len(attacks) + bool(tasks)
    with tqdm(total=total, disable=None if progress is None else not progress, leave=False) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        run.read(own, step)
        if "specificity" in own:
            run.compare()
        if attacks:
            run.attack(attacks, step)
        benchmarks = _benchmarks(run, tasks, data_dir, cache_dir) if tasks else None
    report = write_up(run, benchmarks, time.perf_counter() - begun)
    if out is not None:
        report = with_plots(run, report, Path(out))
        report.save(out)
    return report


def _benchmarks(
    run: Evaluation,
    tasks: Sequence[str],
    data_dir: str | Path | None,
    cache_dir: str | Path | None,
) -> Report:
    from concept_erasure.evals.language.harness import run as harness  # noqa: PLC0415 an extra

    begun = time.perf_counter()
    found = harness(
        run.model, run.tokenizer, tuple(tasks), eraser=run.eraser, limit=run.options.limit,
        data_dir=data_dir, batch_size=run.options.batch_size, seed=run.options.seed, cache_dir=cache_dir,
        **run.options.budget("harness"),
    )  # fmt: skip
    run.spent("harness", begun)
    return found
