"""Several methods on one concept in one language model: fit, evaluate, attack; one row a method, finished rows kept.

Every row is a file of its own in a folder, keyed by the model's weights, the concept, the method, its options and the
protocol; a study that was interrupted, or is given one more method, does only what is missing. Fits keep their
checkpoints there too and go on from them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from torch import nn

from concept_erasure import registry
from concept_erasure._fit_options import fit_options
from concept_erasure._storage import library_version
from concept_erasure.concept import Concept
from concept_erasure.eraser import Eraser
from concept_erasure.errors import ConceptErasureError
from concept_erasure.evals.language._identity import identify
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.probes import wilson_interval
from concept_erasure.report import Cell, Interval, Report

__all__ = ["BASELINE", "PARTS", "Protocol", "Row", "Study", "Trial", "code_hash"]

FORMAT = 1  # of the row files
BASELINE = "no edit"
PARTS = "Development and test facts"  # title of the section that `Row.part` reads
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method with options.

    Attributes:
        method: Name in the registry.
        options: Of its fit, among them those of the loop (``steps``) and of the update (``lora.rank``).
        seed: Of the training.
        name: In tables; default the method's name, with the seed if it is not 0.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str = ""

    @property
    def label(self) -> str:
        """What the row is called."""
        return self.name or (f"{self.method}, seed {self.seed}" if self.seed else self.method)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every row is put through; see `evals.language.evaluate`.

    Attributes:
        suite: Readings, attacks and tasks of lm-eval.
        budgets: Suite to its own options.
        limit: Items of each kind at most.
        seed: Of everything the evaluation draws.
        batch_size: Prompts a forward pass.
    """

    suite: tuple[str, ...] = ("concept", "specificity", "relearn")
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one trial.

    Attributes:
        trial: The trial.
        status: ``"measured"``, or why it was not.
        report: Of the evaluation; None if it was not measured.
        fit: What the fit reported.
        seconds: Of fit and evaluation, when they were run.
        code: Hash of the code of methods and evaluations that made it.
        cached: Whether it was read from a file.
    """

    trial: Trial
    status: str = "measured"
    report: Report | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    code: str = ""
    cached: bool = False

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.report is not None

    def summary(self, model: str = "edited") -> Mapping[str, Cell]:
        """Return the line of the evaluation's main table for a model: ``no edit``, ``instruction`` or ``edited``."""
        rows = () if self.report is None else self.report.rows
        return next((row for row in rows if row.get("model") == model), {})

    def part(self, half: str, model: str = "edited") -> Mapping[str, Cell]:
        """Return accuracies and log-probability as in `summary`, on one half of the facts.

        Args:
            half: ``development``, which options may be chosen on, or ``test``.
            model: As in `summary`.
        """
        found: dict[str, Cell] = {}
        for row in self.section(PARTS):
            if (row["half"], row["model"]) != (half, model):
                continue
            about = row["set"] == "concept"
            found["concept, cloze" if about else str(row["set"])] = row["accuracy"]
            if about:
                found["log-probability of the answer"] = row["log-probability"]
        return found

    def section(self, title: str) -> Sequence[Mapping[str, Cell]]:
        """Return the rows of the section whose title begins so; none if there is none."""
        sections = () if self.report is None else self.report.sections
        return next((one.rows for one in sections if one.title.startswith(title)), ())

    def kept(self, model: str = "edited") -> Interval | None:
        """Return the cloze accuracy on near and far items together."""
        right = count = 0
        for kind in ("near", "far"):
            found = [
                row
                for row in self.section("What has to stay")
                if str(row["set"]).startswith(f"{kind}: ")
                and (row["format"], row["model"]) == ("cloze", model)
            ]
            if found:  # the whole kind is the row with the most items
                whole = max(found, key=lambda row: int(cast("int", row["items"])))
                items = int(cast("int", whole["items"]))
                right += round(cast("Interval", whole["accuracy"]).value * items)
                count += items
        if not count:
            return None
        low, high = wilson_interval(right, count)
        return Interval(right / count, min(low, right / count), max(high, right / count))

    @property
    def curves(self) -> Mapping[str, tuple[Sequence[int], Sequence[float]]]:
        """Relearning curves by name: steps and accuracies."""
        held = {} if self.report is None else self.report.meta.get("curves", {})
        return {k: (v["steps"], v["accuracy"]) for k, v in cast("dict[str, Any]", held).items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for json."""
        report = None if self.report is None else self.report.to_dict()
        return {**asdict(replace(self, report=None)), "report": report}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Return the row written by `to_dict`."""
        report = None if values["report"] is None else Report.from_dict(values["report"])
        held = {**values, "trial": Trial(**values["trial"]), "report": report}
        return cls(**held)


class Study:
    """Methods on one concept in one model.

    Args:
        model: A causal language model without edits; bit-identical after every row.
        tokenizer: Its tokenizer.
        concept: What is erased.
        folder: For erasers, checkpoints, texts and readings, and for finished rows if `rows` is None.
        rows: For finished rows, to keep them where results are kept.
        protocol: What each row is put through.
        reference: Another model and its tokenizer, to judge generated texts.
        data_dir: Folder with local files for lm-eval's tasks.
        progress: Whether fits and evaluations show bars.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerLike,
        concept: Concept,
        *,
        folder: str | Path,
        rows: str | Path | None = None,
        protocol: Protocol | None = None,
        reference: tuple[nn.Module, TokenizerLike] | None = None,
        data_dir: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.concept = model, tokenizer, concept
        self.folder, self.protocol = Path(folder), protocol or Protocol()
        self.rows = self.folder / "rows" if rows is None else Path(rows)
        self.reference, self.data_dir, self.progress = reference, data_dir, progress

    @cached_property
    def _model(self) -> list[str]:
        # the last part of a path: rows made on another machine count
        name = Path(str(getattr(self.tokenizer, "name_or_path", ""))).name
        return [identify(self.model).weights, name, _hash(self.concept.to_dict())]

    def run(
        self, trials: Iterable[Trial], *, extra: Mapping[str, Sequence[str]] | None = None
    ) -> list[Row]:
        """Return one row a trial; one that refuses the data is listed with its reason, and the study goes on.

        Args:
            trials: What to fit; seeds are part of them.
            extra: Label of a trial to more suites for it alone.
        """
        rows = []
        for trial in trials:
            more = tuple((extra or {}).get(trial.label, ()))
            protocol = replace(self.protocol, suite=(*self.protocol.suite, *more))
            rows.append(self.row(trial, protocol))
        return rows

    def row(self, trial: Trial, protocol: Protocol | None = None) -> Row:
        """Return a trial's row, from its file or made now.

        Raises:
            KeyError: If the method is unknown.
            ValueError: If it is of another family, or has no such option.
        """
        protocol = protocol or self.protocol
        kind, options = self._options(trial)
        path = self.rows / f"{trial.method}-{self._key(trial, protocol)}.json"
        held = _read(path)
        if held is not None:
            logger.info("%s: finished before (%s)", trial.label, path.name)
            return replace(held, trial=trial, cached=True)
        try:
            row = self._make(trial, protocol, kind, options)
        except (ConceptErasureError, ValueError) as error:
            logger.warning("%s: failed: %s", trial.label, error)
            return Row(
                trial=trial, status=f"failed: {' '.join(str(error).split())}", code=code_hash()
            )
        _write(path, row)
        return row

    def _options(self, trial: Trial) -> tuple[type[Any], dict[str, Any]]:
        entry = registry.get(trial.method)
        if entry.family != "language":
            raise ValueError(
                f"{trial.method!r} is of the family {entry.family!r}; a study of a concept takes methods for language "
                "models"
            )
        kind: type[Any] = entry.load()
        named = {**trial.options, "training.seed": trial.seed, "training.progress": self.progress}
        named["training.checkpoint"] = str(self.folder / "checkpoints" / self._fit_key(trial))
        if "cache_dir" in _parameters(kind):
            named["cache_dir"] = str(self.folder / "texts")
        return kind, {**entry.options, **fit_options(trial.method, kind, named)}

    def _fit_key(self, trial: Trial) -> str:
        # the method's code is part of it: with other defaults the same options are another fit
        code = method_code(registry.get(trial.method).load().__module__)
        what = [trial.method, dict(trial.options), trial.seed, code]
        return _hash([FORMAT, library_version(), *self._model, *what])

    def _key(self, trial: Trial, protocol: Protocol) -> str:
        judge = None if self.reference is None else identify(self.reference[0]).weights
        return _hash([self._fit_key(trial), asdict(protocol), judge, str(self.data_dir or "")])

    def _make(
        self, trial: Trial, protocol: Protocol, kind: type[Any], options: Mapping[str, Any]
    ) -> Row:
        from concept_erasure.evals.language.evaluate import evaluate

        start = time.perf_counter()
        eraser = self._eraser(trial, kind, options)
        fitted = time.perf_counter()
        logger.info("%s: fitted in %.0f s", trial.label, fitted - start)
        report = evaluate(
            self.model,
            self.tokenizer,
            self.concept,
            eraser=eraser,
            suite=protocol.suite,
            budgets=protocol.budgets,
            reference=self.reference,
            seed=protocol.seed,
            batch_size=protocol.batch_size,
            limit=protocol.limit,
            cache_dir=self.folder / "readings",
            data_dir=self.data_dir,
            progress=None if self.progress else False,
        )
        done = time.perf_counter()
        logger.info("%s: evaluated in %.0f s", trial.label, done - fitted)
        fit = {name: value for name, value in eraser.report.items() if name != "history"}
        took = float(cast("Any", fit.get("seconds", fitted - start)))
        seconds = {"fit": took, "evaluation": done - fitted}
        return Row(trial=trial, report=report, fit=fit, seconds=seconds, code=code_hash())

    def eraser(self, trial: Trial) -> Any:  # noqa: ANN401 - an eraser of whatever method
        """Return a trial's fitted eraser, from its folder if it was fitted before."""
        return self._eraser(trial, *self._options(trial))

    def _eraser(self, trial: Trial, kind: type[Any], options: Mapping[str, Any]) -> Any:  # noqa: ANN401
        folder = self.folder / "erasers" / f"{trial.method}-{self._fit_key(trial)}"
        if folder.is_dir():
            return Eraser.from_pretrained(folder)
        eraser = kind.fit(self.model, self.tokenizer, self.concept, **options)
        eraser.save_pretrained(folder)
        shutil.rmtree(self.folder / "checkpoints" / self._fit_key(trial), ignore_errors=True)
        return eraser


def _parameters(kind: type[Any]) -> Mapping[str, object]:
    import inspect

    return inspect.signature(kind.fit).parameters


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a short hash of the code of methods and evaluations, to tell rows of different states apart."""
    package = Path(__file__).resolve().parent
    root = Path(str(registry.__file__)).resolve().parent
    digest = hashlib.sha256()
    for folder in (root / "language", package / "language"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=64)
def method_code(module: str) -> str:
    """Return a short hash of a method's module and of all that it imports from the same package.

    Comments, docstrings and layout do not count.

    Args:
        module: Full name, such as ``concept_erasure.language.npo``.
    """
    found: dict[str, str] = {}
    package, waiting = module.rpartition(".")[0], [module]
    while waiting:
        name = waiting.pop()
        spec = None if name in found else importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = _meaning(Path(spec.origin))
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
                waiting.append(str(node.module))
    return _hash(found)


def _meaning(path: Path) -> str:
    """Return a module's code without comments and docstrings, laid out in one way."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.copy_location(ast.Pass(), body[0])
    return ast.unparse(tree)


def _read(path: Path) -> Row | None:
    try:
        return Row.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is not a finished row (%s): made again", path.name, error)
        return None


def _write(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(row.to_dict(), default=str), encoding="utf-8")
    partial.replace(path)
