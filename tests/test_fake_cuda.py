"""Every method on a pretended accelerator: nothing lands on the wrong device, and the host seldom waits.

See `tests.fake_cuda` for what this can show and what it cannot; `make test-gpu` is the test on a real one.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.eraser import RepresentationEraser
from concept_erasure.linear.inlp import InlpEraser
from concept_erasure.probes import (
    CentroidProbe,
    KernelProbe,
    LinearProbe,
    MlpProbe,
    Probe,
    SvmProbe,
)
from concept_erasure.registry import METHODS
from concept_erasure.testing import EraserBattery, ToyModel, make_data
from tests.fake_cuda import OnCuda, fake_cuda, to_cuda, to_host
from tests.linear.variants import GAMES, VARIANTS
from tests.test_battery import BATTERIES

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a real one is here: make test-gpu"
)

LINEAR = sorted(
    name
    for name, battery in BATTERIES.items()
    if METHODS[name].family == "linear"
    and list(inspect.signature(battery.eraser_class.fit).parameters)[:2] == ["x", "z"]
)
ITERATIVE = {
    "inlp",
    "rlace",
}  # their solvers ask the host every few steps, and are slow when watched
FEW_FITS = ("dtype", "device", "shape", "batch-split", "save-load", "orthogonal", "mean-preserving")
FIT = 120  # trips of a fit in closed form, whatever the number of rows and dimensions
ERASE = 8  # of an eraser that is given labels; the others make none


class CudaBattery(EraserBattery):
    """The battery with its data and its toy model on the pretended accelerator."""

    def _data(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        x, z = super()._data(seed)
        return to_cuda(x), to_cuda(z)

    def _matrix(self, eraser: RepresentationEraser) -> Tensor:
        eye = to_cuda(torch.eye(self.width, dtype=torch.float64))
        labels = to_cuda(torch.zeros(self.width, dtype=torch.int64))
        origin = self._call(eraser, torch.zeros_like(eye), labels)
        return to_host(self._call(eraser, eye, labels) - origin)

    def _in_model(self) -> tuple[RepresentationEraser, ToyModel, Tensor]:
        model = ToyModel(self.width, self.seed)
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(to_cuda(value), requires_grad=False))
        x, z = self._data()
        with torch.no_grad():
            return self._fit(model.block(model.encoder(x)), z), model, x


def on_cuda(name: str) -> CudaBattery:
    battery = BATTERIES[name]
    options = {field: getattr(battery, field) for field in EraserBattery.__dataclass_fields__}
    if name == "inlp":
        options["fit"] = partial(InlpEraser.fit, n_classifiers=1)
    return CudaBattery(**options)


def marks(name: str, check: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if name in ITERATIVE and check not in FEW_FITS else ()


CASES = [
    pytest.param(name, check, id=f"{name}-{check}", marks=marks(name, check))
    for name in LINEAR
    for check in BATTERIES[name].checks()
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_battery(name: str, check: str, tmp_path: Path) -> None:
    with fake_cuda():
        on_cuda(name).run(check, tmp_path)


def trips(name: str, rows: int, width: int) -> tuple[int, int]:
    """Return how often the host waits in the fit, and when erasing."""
    x, z = (to_cuda(value) for value in make_data(rows, width, 3, 0))
    battery = on_cuda(name)
    with fake_cuda() as mode:
        eraser = battery._fit(x, z)
        fit = mode.trips.total()
        mode.trips.clear()
        out = battery._call(eraser, x, z)
        assert isinstance(out, OnCuda)
        return fit, mode.trips.total()


@pytest.mark.parametrize("name", [name for name in LINEAR if name not in ITERATIVE])
def test_trips_do_not_grow_with_the_data(name: str) -> None:
    small, erase = trips(name, 480, 12)
    assert trips(name, 1920, 12) == (small, erase)
    wide, _ = trips(name, 1920, 48)
    assert max(small, wide) <= FIT
    assert erase <= (ERASE if "needs_labels" in METHODS[name].guarantees else 0)


@pytest.mark.parametrize("name", [name for name in LINEAR if name in ITERATIVE])
def test_an_iterative_method_erases_without_a_trip(name: str) -> None:
    assert trips(name, 240, 6)[1] == 0


def test_results_are_those_of_the_cpu() -> None:
    x, z = make_data(480, 12, 3, 0)
    for name in ("leace", "quadratic"):
        want = BATTERIES[name]._call(BATTERIES[name]._fit(x, z), x, z)
        with fake_cuda():
            there = to_cuda(x), to_cuda(z)
            got = BATTERIES[name]._call(BATTERIES[name]._fit(*there), *there)
        assert torch.allclose(to_host(got), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in GAMES)]
)
def test_variants_are_those_of_the_cpu(name: str) -> None:
    erase = (VARIANTS | GAMES)[name]
    x, z = make_data(120, 6, 3, 0)
    want = erase(x, z)
    with fake_cuda() as mode:
        got = erase(to_cuda(x), to_cuda(z))
    assert isinstance(got, OnCuda)
    assert torch.equal(to_host(got), want)
    assert name in GAMES or mode.trips.total() <= 2 * FIT


@pytest.mark.parametrize(
    "probe",
    [
        CentroidProbe(),
        LinearProbe(C=1.0, tol=1e-3),
        SvmProbe(C=1.0, tol=1e-3),
        MlpProbe(max_epochs=3),
        KernelProbe(C=1.0, gamma=0.5, standardize="cap"),
    ],
    ids=lambda probe: type(probe).__name__,
)
def test_probes_are_those_of_the_cpu(probe: Probe) -> None:
    x, z = make_data(60, 4, 3, 0)
    want = probe.fit(x, z).decision(x)
    with fake_cuda():
        got = probe.fit(to_cuda(x), to_cuda(z)).decision(to_cuda(x))
    assert isinstance(got, OnCuda)
    assert torch.equal(to_host(got), want)


def test_what_it_catches() -> None:
    """The pretence is not vacuous."""
    x = to_cuda(torch.arange(6.0).reshape(2, 3))
    with fake_cuda() as mode:
        assert x.device == torch.device("cuda:0")
        assert torch.zeros(3, device=x.device).is_cuda
        assert (x * torch.tensor(2.0)).is_cuda  # a CPU number is allowed, as on a real one
        assert not mode.trips
        for expression in (lambda: x + torch.zeros(3), lambda: torch.cat([x, torch.ones(1, 3)])):
            with pytest.raises(RuntimeError, match="on the CPU are some of shape"):
                expression()
        total = sum(float(row.sum()) for row in x)  # one trip a row
        assert (total, mode.trips) == (15.0, {"item": 2})
        mode.trips.clear()
        assert bool(x.any())
        assert x.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        assert x[x > 2].sum().item() == 12
        assert x.cpu().device.type == "cpu"
        assert mode.trips == {"item": 3, "index by mask": 1, "copy to host": 1}
