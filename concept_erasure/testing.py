"""The battery every representation eraser has to pass, for our methods and for plug-ins.

Erasers that change a model and have no map on vectors have one of their own, `ModelEraserBattery`.

A registry entry declares its guarantees; the battery runs the check of each declared guarantee and the
checks all erasers share. A plug-in tests itself in three lines::

    import pytest
    from concept_erasure.testing import EraserBattery

    BATTERY = EraserBattery.of("my-method")

    @pytest.mark.parametrize("check", BATTERY.checks())
    def test_battery(check, tmp_path):
        BATTERY.run(check, tmp_path)
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from concept_erasure._model_battery import Battery, CheckFailed, ModelEraserBattery
from concept_erasure.eraser import Eraser, RepresentationEraser
from concept_erasure.errors import EditError, ErasureWarning, NotFittedError, ShapeError
from concept_erasure.registry import Method, get

__all__ = ["CheckFailed", "EraserBattery", "ModelEraserBattery", "ToyModel", "make_data"]

Fit: TypeAlias = Callable[[Tensor, Tensor], RepresentationEraser]
Call: TypeAlias = Callable[..., Tensor]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DECLARED = (
    "guarded",
    "idempotent",
    "orthogonal",
    "mean-preserving",
    "least-damage",
    "quadratic",
    "task-preserving",
    "needs-labels",
)
SHARED = (
    "save-load",
    "dtype",
    "device",
    "shape",
    "fit-dtype",
    "not-mutated",
    "batch-order",
    "batch-split",
    "rotation",
    "scale",
    "deterministic",
    "bad-inputs",
    "constant-label",
)
IN_MODEL = ("attach", "attach-raises", "apply")


class ToyModel(nn.Module):
    """Two linear layers and a head, with a place ``block`` to put an eraser on.

    Args:
        width: Width of the hidden layers, >= 1.
        seed: Seed of the weights; the global generator is not touched.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder = nn.Linear(width, width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        self.double().eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's output ``(..., 3)`` and the untouched encoder's ``(..., width)``."""
        before: Tensor = self.encoder(x)
        after: Tensor = self.head(self.block(before))
        return after, before


def make_data(rows: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return correlated features ``(rows, width)`` float64 and class labels ``(rows,)`` int64.

    Every class occurs; the class means differ, and so do the class covariances.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.arange(rows) % classes
    z = z[torch.randperm(rows, generator=generator)]
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    spread = 1 + 0.5 * torch.rand(classes, 1, generator=generator, dtype=torch.float64)
    return x * spread[z] @ mix + means[z] + 3.0, z


@dataclass(frozen=True)
class EraserBattery(Battery):
    """The checks of one method.

    Args:
        method: Registry entry; ``guarantees`` says which declared checks run.
        fit: How to fit on ``x (n, d)`` float and ``z (n,)`` int64; default: the class's ``fit`` with the
            options of the registry entry.
        task: Gives task labels ``y (n,)`` float64 from ``x``, for methods whose ``fit`` takes ``(x, z, y)``.
            It must not depend on the rotation or scale of x, nor on the order of the rows.
        rows: Rows of the synthetic sample; at least 20 times ``width``.
        width: Number of features.
        classes: Number of classes; the rank bound is ``classes - 1``.
        seed: Seed of the sample.
        tolerance: Relative bound of the numerical checks, float64. Raise it for iterative methods.
        exempt: Names of shared checks that cannot hold for this method (say why where it is set).
    """

    method: Method
    fit: Fit | None = None
    task: Callable[[Tensor], Tensor] | None = None
    rows: int = 480
    width: int = 12
    classes: int = 3
    seed: int = 0
    tolerance: float = 1e-9
    exempt: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, name: str) -> EraserBattery:
        """Return the battery of a registered method; raises what `registry.get` raises."""
        return cls(get(name))

    @cached_property
    def eraser_class(self) -> type[Eraser]:
        """The class the registry entry points to."""
        module, _, attribute = self.method.target.partition(":")
        return cast("type[Eraser]", getattr(importlib.import_module(module), attribute))

    @property
    def takes_labels(self) -> bool:
        """Whether the fitted eraser needs ``z`` when it is applied (oracle methods)."""
        return "z" in inspect.signature(self.eraser_class.__call__).parameters

    def checks(self) -> tuple[str, ...]:
        """Return the names of the checks that apply, declared guarantees first."""
        declared = {name.replace("_", "-") for name in self.method.guarantees}
        chosen = [name for name in DECLARED if name in declared]
        if "guarded" in declared and not self.takes_labels:
            chosen.append("rank")
        chosen += SHARED
        if not issubclass(self.eraser_class, Eraser):
            chosen.remove("save-load")
        if issubclass(self.eraser_class, RepresentationEraser) and not self.takes_labels:
            chosen += IN_MODEL
        return tuple(name for name in chosen if name not in self.exempt)

    # ------------------------------------------------------------------ helpers

    def _data(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        return make_data(self.rows, self.width, self.classes, self.seed + seed)

    def _fit(self, x: Tensor, z: Tensor) -> RepresentationEraser:
        if self.fit is not None:
            return self.fit(x, z)
        fit = cast("Callable[..., RepresentationEraser]", self.eraser_class.fit)  # type: ignore[attr-defined]
        labels = [z]
        if (
            self.task is not None
        ):  # finite task labels also beside spoiled x, so that x is what is refused
            finite = torch.nan_to_num(x, 0, 0, 0) if isinstance(x, Tensor) else z.double()[:, None]
            labels.append(self.task(finite))
        return fit(x, *labels, **self.method.options)

    def _call(self, eraser: RepresentationEraser, x: Tensor, z: Tensor) -> Tensor:
        call = cast("Call", eraser)
        return call(x, z) if self.takes_labels else call(x)

    def _fitted(self) -> tuple[RepresentationEraser, Tensor, Tensor, Tensor]:
        x, z = self._data()
        eraser = self._fit(x, z)
        return eraser, x, z, self._call(eraser, x, z)

    def _close(self, what: str, got: Tensor, want: Tensor, scale: float | None = None) -> None:
        if got.shape != want.shape:
            raise CheckFailed(
                f"{self.method.name}: {what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
            )
        size = float(want.abs().max()) if scale is None else scale
        gap = float((got - want).abs().max()) if got.numel() else 0.0
        if not gap <= self.tolerance * size:
            raise CheckFailed(
                f"{self.method.name}: {what}: off by {gap:.3e}, "
                f"allowed {self.tolerance * size:.3e} (scale {size:.3e})"
            )

    def _matrix(self, eraser: RepresentationEraser) -> Tensor:
        """Linear part ``(d, d)`` in the row convention, found by applying the eraser."""
        eye = torch.eye(self.width, dtype=torch.float64)
        labels = torch.zeros(self.width, dtype=torch.int64)
        origin = self._call(eraser, torch.zeros_like(eye), labels)
        return self._call(eraser, eye, labels) - origin

    @contextmanager
    def _raises(
        self, kinds: type[Exception] | tuple[type[Exception], ...], what: str, *words: str
    ) -> Iterator[None]:
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        want = " or ".join(kind.__name__ for kind in wanted)
        try:
            yield
        except kinds as error:
            missing = [word for word in words if word not in str(error)]
            self._require(not missing, f"{what}: the message lacks {missing}: {error}")
        except Exception as error:
            got = f"raised {type(error).__name__} ({error})"
            raise CheckFailed(f"{self.method.name}: {what}: {got}, want {want}") from error
        else:
            raise CheckFailed(f"{self.method.name}: {what}: raised nothing, want {want}")

    # --------------------------------------------------------- declared guarantees

    def _check_guarded(self) -> None:
        """No linear predictor does better than a constant: all class means are equal."""
        _, x, z, out = self._fitted()
        means = torch.stack([out[z == j].mean(0) for j in range(self.classes)])
        before = torch.stack([x[z == j].mean(0) for j in range(self.classes)])
        gap = float((before - before.mean(0)).abs().max())
        self._close("class means after erasure", means, means.mean(0).expand_as(means), gap)

    def _check_idempotent(self) -> None:
        """Erasing twice is erasing once."""
        eraser, _, z, out = self._fitted()
        self._close("erasing twice", self._call(eraser, out, z), out)

    def _check_orthogonal(self) -> None:
        """The linear part is symmetric, and no vector grows."""
        matrix = self._matrix(self._fitted()[0])
        self._close("symmetry", matrix, matrix.T)
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        self._require(norm <= 1 + self.tolerance, f"norm of the projection is {norm}, allowed 1")

    def _check_mean_preserving(self) -> None:
        """The mean of the fit sample stays."""
        _, x, _, out = self._fitted()
        self._close("mean of the data", out.mean(0), x.mean(0))

    def _check_least_damage(self) -> None:
        """First-order optimality: every guarding map is a map of the output, so the edit is orthogonal to it."""
        _, x, _, out = self._fitted()
        edit = (out - x) - (out - x).mean(0)
        kept = out - out.mean(0)
        cross = edit.T @ kept / self.rows
        scale = float((edit.square().mean() * kept.square().mean()).sqrt())
        self._close("covariance of edit and output", cross, torch.zeros_like(cross), scale)

    def _check_quadratic(self) -> None:
        """All classes have one covariance."""
        _, _, z, out = self._fitted()
        covariances = torch.stack([torch.cov(out[z == j].T) for j in range(self.classes)])
        mean = covariances.mean(0).expand_as(covariances)
        self._close("class covariances after erasure", covariances, mean)

    def _check_task_preserving(self) -> None:
        """The covariance with the task labels stays."""
        _, x, _, out = self._fitted()
        if self.task is None:
            raise CheckFailed(f"{self.method.name}: give the battery a `task`")
        y = self.task(x)
        centred = (y - y.mean(0))[:, None]
        self._close("covariance with the task", out.T @ centred, x.T @ centred)

    def _check_needs_labels(self) -> None:
        """Applying without labels is refused."""
        eraser, x, _, _ = self._fitted()
        self._require(self.takes_labels, "declares needs_labels but its call takes none")
        with self._raises(TypeError, "applied without labels"):
            cast("Call", eraser)(x)

    def _check_rank(self) -> None:
        """No more than ``classes - 1`` dimensions are touched."""
        eye = torch.eye(self.width, dtype=torch.float64)
        values = torch.linalg.svdvals(eye - self._matrix(self._fitted()[0]))
        rank = int((values > 1e-6 * values.max().clamp_min(1.0)).sum())
        bound = self.classes - 1
        self._require(rank <= bound, f"the edit has rank {rank}, allowed {bound}")

    # --------------------------------------------------------------------- shared

    def _check_save_load(self, folder: Path) -> None:
        """Saved and loaded, it gives the same bits, by its class and by the base class."""
        eraser, x, z, out = self._fitted()
        eraser.save_pretrained(folder / "eraser")
        for loader in (self.eraser_class, Eraser):
            again = cast("RepresentationEraser", loader.from_pretrained(folder / "eraser"))
            self._require(type(again) is type(eraser), f"loaded as {type(again).__name__}")
            equal = torch.equal(self._call(again, x, z), out)
            self._require(equal, f"{loader.__name__}.from_pretrained gives other outputs")
            self._require(again.config == eraser.config, "the config changed on disk")
        names = {path.name for path in (folder / "eraser").iterdir()}
        want = {"eraser.safetensors", "eraser_config.json", "README.md"}
        self._require(want <= names, f"saved {sorted(names)}, want {sorted(want)}")

    def _check_dtype(self) -> None:
        """The output has the dtype of the input and is close to the float64 output."""
        eraser, x, z, out = self._fitted()
        for dtype in DTYPES:
            got = self._call(eraser, x.to(dtype), z)
            self._require(got.dtype == dtype, f"{dtype} in, {got.dtype} out")
            gap = float((got.double() - out).abs().max() / x.abs().max())
            bound = 64 * torch.finfo(dtype).eps
            self._require(gap <= bound, f"{dtype} output is off by {gap:.2e}, allowed {bound:.2e}")

    def _check_device(self) -> None:
        """The output is where the input is; an accelerator, if there is one, agrees with the CPU."""
        eraser, x, z, out = self._fitted()
        self._require(out.device == x.device, f"{x.device} in, {out.device} out")
        moved = eraser.to("cpu", torch.float64)
        self._require(moved is None or isinstance(moved, type(eraser)), "`to` lost the type")
        if torch.cuda.is_available():
            there = self._call(self._fit(x.cuda(), z.cuda()), x.cuda(), z.cuda())
            self._require(there.is_cuda, f"cuda in, {there.device} out")
            self._close("cuda against cpu", there.cpu(), out)

    def _check_shape(self) -> None:
        """Any leading shape is kept, also an empty one, and gives the rows' results."""
        eraser, x, z, out = self._fitted()
        half = self.rows // 2
        shapes: Sequence[tuple[int, ...]] = ((2, half), (2, 2, half // 2))
        for shape in shapes:
            count = torch.Size(shape).numel()
            got = self._call(eraser, x[:count].reshape(*shape, -1), z[:count].reshape(shape))
            self._close(f"leading shape {shape}", got, out[:count].reshape(*shape, -1))
        empty = self._call(eraser, x[:0], z[:0])
        self._require(empty.shape == (0, self.width), f"no rows in, {tuple(empty.shape)} out")
        if not self.takes_labels:
            self._close("one vector", self._call(eraser, x[0], z[0]), out[0])

    def _check_fit_dtype(self) -> None:
        """Every floating dtype can be fitted, and the fit is as good as the rounded data allow."""
        x, z = self._data()
        for dtype in DTYPES:
            low = x.to(dtype)
            want = self._call(self._fit(low.double(), z), low.double(), z)
            got = self._call(self._fit(low, z), low.double(), z)
            gap = float((got - want).abs().max() / x.abs().max())
            bound = 64 * torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
            self._require(gap <= bound, f"fit on {dtype} is off by {gap:.2e}, allowed {bound:.2e}")

    def _check_not_mutated(self) -> None:
        """Neither `fit` nor the call writes to its arguments."""
        x, z = self._data()
        x_before, z_before = x.clone(), z.clone()
        out = self._call(self._fit(x, z), x, z)
        self._require(torch.equal(x, x_before), "x was changed")
        self._require(torch.equal(z, z_before), "z was changed")
        out += 1
        self._require(torch.equal(x, x_before), "the output shares memory with x")

    def _check_batch_order(self) -> None:
        """The order of the rows of the fit sample does not matter."""
        _, x, z, out = self._fitted()
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1))
        self._close("another row order", self._call(self._fit(x[order], z[order]), x, z), out)

    def _check_batch_split(self) -> None:
        """Erasing in pieces is erasing at once."""
        eraser, x, z, out = self._fitted()
        cuts = [1, 7, self.rows - 8]
        parts = zip(x.split(cuts), z.split(cuts), strict=True)
        self._close("pieces", torch.cat([self._call(eraser, a, b) for a, b in parts]), out)

    def _check_rotation(self) -> None:
        """Rotating the features rotates the result."""
        _, x, z, out = self._fitted()
        generator = torch.Generator().manual_seed(2)
        square = torch.randn(self.width, self.width, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(square).Q.to(x.device)
        self._close("rotated", self._call(self._fit(x @ turn, z), x @ turn, z), out @ turn)

    def _check_scale(self) -> None:
        """Scaling the features scales the result."""
        _, x, z, out = self._fitted()
        for scale in (1e-6, 1e6):
            got = self._call(self._fit(x * scale, z), x * scale, z)
            self._close(f"scaled by {scale}", got, out * scale)

    def _check_deterministic(self) -> None:
        """Two fits give the same bits, whatever the global generator; it is left alone."""
        x, z = self._data()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(11)
            state = torch.get_rng_state()
            first = self._call(self._fit(x, z), x, z)
            self._require(torch.equal(state, torch.get_rng_state()), "the global RNG was used")
            torch.default_generator.manual_seed(12)
            second = self._call(self._fit(x, z), x, z)
        self._require(torch.equal(first, second), "two fits on the same data differ")

    def _check_bad_inputs(self) -> None:
        """Wrong arguments raise the documented class, and say what was got."""
        x, z = self._data()
        eraser = self._fit(x, z)
        rows, width = self.rows, self.width
        with self._raises(ShapeError, "z one row short", str(rows), str(rows - 1)):
            self._fit(x, z[:-1])
        with self._raises(ShapeError, "another width", str(width), str(width + 1)):
            self._call(eraser, torch.zeros(rows, width + 1, dtype=torch.float64), z)
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[3, 0] = value
            with self._raises(ValueError, f"{value} in x", "3"):
                self._fit(bad, z)
        for count in (0, 1):
            with self._raises((ValueError, NotFittedError), f"{count} rows", str(count)):
                self._fit(x[:count], z[:count])
        with self._raises(TypeError, "x is text"):
            self._fit(cast("Tensor", "text"), z)
        with self._raises(TypeError, "call on text"):
            self._call(eraser, cast("Tensor", "text"), z)

    def _check_constant_label(self) -> None:
        """A constant label warns and gives the identity."""
        x, z = self._data()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            eraser = self._fit(x, torch.zeros_like(z))
        kinds = [warning.category for warning in caught]
        self._require(ErasureWarning in kinds, f"constant label: no ErasureWarning, got {kinds}")
        self._close("constant label", self._call(eraser, x, torch.zeros_like(z)), x)

    # ------------------------------------------------------------------ in a model

    def _in_model(self) -> tuple[RepresentationEraser, ToyModel, Tensor]:
        """Return an eraser fitted at ``block`` of a toy model, the model, and its input."""
        model = ToyModel(self.width, self.seed)
        x, z = self._data()
        with torch.no_grad():
            eraser = self._fit(model.block(model.encoder(x)), z)
        return eraser, model, x

    def _check_attach(self) -> None:
        """`attach` erases at the site, touches nothing else, and `undo` restores every bit."""
        eraser, model, x = self._in_model()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            plain, before = model(x)
            want = model.head(eraser(model.block(before)))
            edit = eraser.attach(model, sites=["block"])
            edited, untouched = model(x)
            edit.undo()
            again, _ = model(x)
        self._close("attached", edited, want)
        self._require(torch.equal(untouched, before), "another site was touched")
        self._require(torch.equal(again, plain), "undo does not restore the outputs bit for bit")
        self._same_weights(model, weights)

    def _check_attach_raises(self) -> None:
        """Used as a context, it is undone on exit, also when the body raises."""
        eraser, model, x = self._in_model()
        with torch.no_grad():
            plain, _ = model(x)
            try:
                with eraser.attach(model, sites=["block"]):
                    edited, _ = model(x)
                    raise KeyError("body")
            except KeyError:
                pass
            again, _ = model(x)
        self._require(not torch.equal(edited, plain), "attach changed nothing")
        self._require(torch.equal(again, plain), "not undone when the body raises")
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        self._require(hooks == 0, f"{hooks} hooks are left in the model")

    def _check_apply(self) -> None:
        """`apply` equals `attach` where it folds; where it refuses, the model is as before."""
        eraser, model, x = self._in_model()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            with eraser.attach(model, sites=["block"]):
                want, _ = model(x)
            try:
                edit = eraser.apply(model, sites=["block"])
            except EditError as error:
                self._require("attach" in str(error), f"the refusal names no way out: {error}")
            else:
                got, _ = model(x)
                edit.undo()
                self._close("apply against attach", got, want)
        self._same_weights(model, weights)

    def _same_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        state = model.state_dict()
        self._require(state.keys() == weights.keys(), "parameters were added or lost")
        changed = [name for name, value in weights.items() if not torch.equal(state[name], value)]
        self._require(not changed, f"weights differ after undo: {changed}")
