"""The trained edit of a language model: a small change of weights, applied, undone, saved, exported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from concept_erasure._storage import write
from concept_erasure.edit import (
    DensePatch,
    Edit,
    LowRankPatch,
    Patch,
    active_edits,
    base_fingerprint,
)
from concept_erasure.eraser import EraserConfig, WeightsEraser
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.language.loop import OptimizerName, Row, Training, processes, train
from concept_erasure.language.objective import Anchor, Term
from concept_erasure.language.parameters import (
    LEFT,
    RIGHT,
    Lora,
    Parameterisation,
    Raw,
    trainable,
)
from concept_erasure.patches import LoraPatch
from concept_erasure.sites import Space, model_id

__all__ = ["ApplyForm", "LanguageConfig", "LanguageEraser", "fit_eraser", "options_of", "thin"]

ApplyForm = Literal["weights", "hook"]
SITE = "weights"
HISTORY_ROWS = 200

E = TypeVar("E", bound="LanguageEraser")
Terms = Sequence[Term] | Callable[[Parameterisation], Sequence[Term]]


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(EraserConfig):
    """Options every trained method shares; methods add theirs.

    Attributes:
        concept: Name of what was erased.
        preset: Whose defaults were used.
        parameters: What was trained, a `Lora` or a `Raw` as plain values; see `options_of`.
        training: Options of the loop that change its result; see `Training.options`.
    """

    concept: str = ""
    preset: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def options_of(spec: Lora | Raw) -> dict[str, Any]:
    """Return a parameterisation as plain values, with its kind."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(spec).items()}
    return {"kind": type(spec).__name__.lower(), **values}


@dataclass(frozen=True, repr=False, eq=False)
class LanguageEraser(WeightsEraser):
    """A change of weights of one language model.

    Attributes:
        weights: By name. Of a low-rank update ``W + left right^T`` the factors ``<module>.lora_left`` (out, r) and
            ``<module>.lora_right`` (in, r), or the new value of a parameter under its own name.
    """

    method: ClassVar[str] = "language"
    config_type: ClassVar[type[EraserConfig]] = LanguageConfig

    def card(self) -> str:
        """Return the erasure card; of the history it has the first row and the last."""
        rows = self.report.get("history")
        if not isinstance(rows, list | tuple) or len(rows) < 3:
            return super().card()
        brief = {**self.report, "history": [rows[0], rows[-1]]}
        return super(LanguageEraser, replace(self, report=brief)).card()

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules with a low-rank update."""
        return tuple(n.removesuffix(LEFT) for n in self.weights if n.endswith(LEFT))

    @property
    def raw(self) -> tuple[str, ...]:
        """Names of the parameters with a new value."""
        return tuple(n for n in self.weights if not n.endswith((LEFT, RIGHT)))

    def scaled(self, strength: float) -> Self:
        """Return a copy whose low-rank updates are multiplied: 0 changes nothing, below 0 amplifies.

        Raises:
            EditError: If it holds new values of parameters: between them and the old ones only the model can say.
        """
        if self.raw:
            raise EditError(
                f"{self.raw[0]!r} is kept as a new value, not as a change: it cannot be scaled; fit with a Lora"
            )
        grown = {n: v * strength if n.endswith(LEFT) else v for n, v in self.weights.items()}
        return replace(self, weights=grown)

    def apply(self, model: nn.Module, *, form: ApplyForm = "weights") -> Edit:
        """Change the model in place and return the way back.

        Args:
            model: The model it was fitted in, with its head or without.
            form: ``"weights"`` adds to the weights. ``"hook"`` adds to what the modules give and touches no weight, so
                that nothing is rounded away in half precision; for low-rank updates only.

        Raises:
            SpaceError: If it was fitted in another model.
            EditError: If a weight cannot be changed, or this eraser is in force already.
            ShapeError: If a weight has another shape.
        """
        if form not in get_args(ApplyForm):
            raise ValueError(f"form must be 'weights' or 'hook'; got {form!r}")
        if form == "hook" and self.raw:
            raise EditError(f"{self.raw[0]!r} has a new value and no form as a hook; use 'weights'")
        self._check_model(model)
        return Edit(
            model, self._patches(model, form), label=f"{self._title} ({form})", key=self._identity
        )

    def _patches(self, model: nn.Module, form: ApplyForm) -> list[Patch]:
        patches: list[Patch] = []
        for stored in self.modules:
            left, right = self.weights[stored + LEFT], self.weights[stored + RIGHT]
            path = _local(model, stored)
            module = model.get_submodule(path)
            if form == "hook":
                patches.append(LoraPatch(path, _factors(path, left, right)))
            elif isinstance(module, nn.Linear):
                patches.append(LowRankPatch(f"{path}.weight", left, right))
            else:  # a Conv1D, which stores its weight as (in, out)
                patches.append(LowRankPatch(f"{path}.weight", right, left))
        for stored in self.raw:
            path, _, leaf = stored.rpartition(".")
            local = _local(model, path)
            patches.append(DensePatch(f"{local}.{leaf}" if local else leaf, self.weights[stored]))
        return patches

    def to_peft(self, folder: str | Path) -> Path:
        """Write the low-rank updates as an adapter that ``PeftModel.from_pretrained(model, folder)`` loads.

        Nothing is lost: the scale is folded into B, and ``lora_alpha = r`` makes peft's own scale 1.

        Returns:
            The folder.

        Raises:
            EditError: If it holds new values of parameters, which are no adapter.
        """
        if self.raw:
            raise EditError(
                f"{self.raw[0]!r} is a new value of a parameter, not an adapter; apply() it and save the model"
            )
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        ranks = {module: self.weights[module + LEFT].shape[1] for module in self.modules}
        rank = max(ranks.values())
        tensors: dict[str, Tensor] = {}
        for module in self.modules:
            stem = f"base_model.model.{module}"
            left, right = self.weights[module + LEFT], self.weights[module + RIGHT]
            tensors[f"{stem}.lora_A.weight"] = right.detach().cpu().T.contiguous()
            tensors[f"{stem}.lora_B.weight"] = left.detach().cpu().contiguous().clone()
        other = {module: r for module, r in ranks.items() if r != rank}
        options = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None if self.space is None else self.space.model,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": other,
            "alpha_pattern": other,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": list(self.modules),
            "inference_mode": True,
        }
        text = json.dumps(options, indent=2, sort_keys=True) + "\n"
        write(path / "adapter_model.safetensors", lambda p: save_file(tensors, p))
        write(path / "adapter_config.json", lambda p: p.write_text(text, encoding="utf-8"))
        return path

    def _check(self) -> None:
        if not self.weights:
            raise ShapeError("there are no weights")
        for name in self.weights:
            if not name.endswith((LEFT, RIGHT)):
                continue
            stem = name.removesuffix(LEFT).removesuffix(RIGHT)
            left, right = (self.weights.get(stem + part) for part in (LEFT, RIGHT))
            if left is None or right is None:
                raise ShapeError(f"{stem!r} has one factor; it needs {LEFT[1:]} and {RIGHT[1:]}")
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
                raise ShapeError(
                    f"the factors of {stem!r} must be (out, r) and (in, r); got {tuple(left.shape)} "
                    f"and {tuple(right.shape)}"
                )

    def __repr__(self) -> str:
        what = [f"{len(self.modules)} low-rank updates"] if self.modules else []
        what += [f"{len(self.raw)} parameters"] if self.raw else []
        where = "bare tensors" if self.space is None else self.space.model
        return f"{type(self).__name__}({', '.join(what)}; fitted on {where})"


def fit_eraser(
    cls: type[E],
    model: nn.Module,
    *,
    config: LanguageConfig,
    spec: Lora | Raw,
    terms: Terms,
    training: Training,
    anchor: Anchor | None = None,
    optimizer: OptimizerName = "adamw",
    stop: Callable[[int, Row], bool] | None = None,
    report: Mapping[str, object] | None = None,
) -> E:
    """Train and return the eraser: how every fit ends. The model is left as it was, bit by bit.

    Args:
        cls: Class of the eraser.
        model: A language model without edits in force.
        config: Options of the method; what was trained, and how, is filled in here.
        spec: What to train.
        terms: Terms of the loss, or a function of the parameterisation that makes them (for terms that look at
            its `reference`).
        training: Options of the loop.
        anchor: Pull towards the start.
        optimizer: See `train`.
        stop: See `train`.
        report: What the method measured. ``history``, ``seconds``, ``tokens`` and ``distance`` are added.

    Raises:
        EditError: If an edit is in force on the model.
    """
    if edits := active_edits(model):
        raise EditError(
            f"{edits[-1].label} is in force: what is trained under it would not be an edit of the model itself; "
            "undo() or commit() it first"
        )
    config = replace(config, parameters=options_of(spec), training=training.options())
    mark, start = base_fingerprint(model), time.perf_counter()
    with trainable(model, spec, seed=training.seed) as parameterisation:
        made = list(terms(parameterisation) if callable(terms) else terms)
        history = train(
            model,
            parameterisation,
            made,
            training,
            anchor=anchor,
            optimizer=optimizer,
            stop=stop,
            options={"method": cls.method, **asdict(config)},
        )
        weights = parameterisation.weights()
        distance = float(parameterisation.squared_distance().detach().sqrt())
    steps = int(history[-1]["step"]) + 1 if history else 0
    space = Space(model_id(model), mark, SITE, "all", _width(model))
    measured = {
        **(report or {}),
        "history": thin(history),
        "seconds": round(time.perf_counter() - start, 3),
        "steps": steps,
        "tokens": _tokens_seen(made, training, steps),
        "distance": distance,
    }
    return cls(weights, config=config, space=space, report=measured)


def _tokens_seen(terms: Sequence[Term], training: Training, steps: int) -> int:
    """Return how many supervised tokens entered the losses."""
    batches = range(steps * training.accumulate * processes()[1])
    return sum(t.batches.count_at(k) for t in terms if t.weight != 0 for k in batches)


def thin(rows: Sequence[Row], limit: int = HISTORY_ROWS) -> list[Row]:
    """Return at most that many rows, evenly chosen, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(k * (len(rows) - 1) / (limit - 1))] for k in range(limit)]


def _width(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    return int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or 1)


def _factors(
    path: str, left: Tensor, right: Tensor
) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    def moved(model: nn.Module) -> tuple[Tensor, Tensor]:
        device = cast("Tensor", model.get_submodule(path).weight).device
        return left.to(device, torch.float32), right.to(device, torch.float32)

    return moved


def _local(model: nn.Module, path: str) -> str:
    """Return what a module of the model at fit time is called here: with a head more or less in front.

    Raises:
        EditError: If it is not here.
    """
    names = [name for name, _ in model.named_modules()]
    if path in names:
        return path
    longer = [name for name in names if name.endswith(f".{path}")]
    shorter = [name for name in names if name and path.endswith(f".{name}")]
    found = min(longer, key=len, default="") or max(shorter, key=len, default="")
    if not found:
        raise EditError(f"the model has no module {path!r}")
    return found
