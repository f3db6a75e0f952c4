"""CPU and accelerator give the same eraser, for every registered method; run by ``make test-gpu``.

Statistics are float64 on both, so the two differ by the order of sums only. An iterative method stops at a gradient
that is small, not zero; its bound is that of its solver. Where the accelerator has no float64 (MPS), they do not apply.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concept_erasure.eraser import Eraser
from concept_erasure.probes import PROBES
from concept_erasure.testing import make_data
from tests.linear.variants import GAMES, VARIANTS
from tests.test_battery import BATTERIES, CASES, _parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSED_FORM = 1e-9  # of the largest entry of x, float64
ITERATIVE = {"inlp": 1e-5, "rlace": 1e-4, "quadratic": 1e-7}  # the last: a barycentre iterates
VARIANT_BOUNDS = {"inlp": 1e-5} | dict.fromkeys(GAMES, 1e-3)  # a game ends at a flat top
SINGLE = 1e-4  # float32 data: rounding of the rows themselves, and sums of them
FITTED = sorted(name for name, one in BATTERIES.items() if _parameters(one)[:2] == ["x", "z"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FITTED)
def test_cpu_equals_gpu(name: str, dtype: torch.dtype) -> None:
    battery = BATTERIES[name]
    x, z = make_data(2000, 24, 3, 0)
    x = x.to(dtype)
    here = battery._call(battery._fit(x, z), x, z)
    eraser = battery._fit(x.cuda(), z.cuda())
    there = battery._call(eraser, x.cuda(), z.cuda())
    assert there.is_cuda
    assert there.dtype == dtype
    bound = ITERATIVE.get(name, CLOSED_FORM) if dtype == torch.float64 else SINGLE
    assert float((there.cpu() - here).abs().max()) <= bound * float(x.abs().max())


@pytest.mark.parametrize("name", FITTED)
def test_an_eraser_follows_its_input(name: str, tmp_path: Path) -> None:
    """Fitted here and used there, and back; loaded, it is on the CPU and serves both."""
    battery = BATTERIES[name]
    x, z = make_data(480, 12, 3, 0)
    eraser = battery._fit(x, z)
    want = battery._call(eraser, x, z)
    bound = CLOSED_FORM * float(x.abs().max())
    there = battery._call(eraser, x.cuda(), z.cuda())
    assert there.is_cuda
    assert float((there.cpu() - want).abs().max()) <= bound
    moved = battery._call(eraser.to("cuda"), x, z)
    assert moved.device.type == "cpu"
    assert float((moved - want).abs().max()) <= bound
    if isinstance(eraser, Eraser):
        eraser.to("cuda").save_pretrained(tmp_path / "eraser")
        again = Eraser.from_pretrained(tmp_path / "eraser")
        got = battery._call(again, x.cuda(), z.cuda())  # type: ignore[arg-type]
        assert float((got.cpu() - want).abs().max()) <= bound


@pytest.mark.parametrize("name", FITTED)
def test_the_host_may_hold_the_labels(name: str) -> None:
    battery = BATTERIES[name]
    x, z = make_data(480, 12, 3, 0)
    got = battery._call(battery._fit(x.cuda(), z), x.cuda(), z)
    want = battery._call(battery._fit(x.cuda(), z.cuda()), x.cuda(), z.cuda())
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", [*VARIANTS, *GAMES])
def test_variants(name: str) -> None:
    """The options that take other code: games below full rank, Rayleigh quotients, layers, balance, streaming."""
    erase = (VARIANTS | GAMES)[name]
    x, z = make_data(480, 12, 3, 0)
    here, there = erase(x, z), erase(x.cuda(), z.cuda())
    assert there.is_cuda
    bound = VARIANT_BOUNDS.get(name.partition(",")[0], CLOSED_FORM)
    assert float((there.cpu() - here).abs().max()) <= bound * float(x.abs().max())


@pytest.mark.parametrize("name", sorted(PROBES))
def test_probes(name: str) -> None:
    """The same seed gives the same probe, but for rounding; a network's steps multiply that."""
    x, z = make_data(480, 12, 3, 0)
    probe = PROBES[name](0)
    here = probe.fit(x[::2], z[::2]).predict_index(x[1::2])
    there = probe.fit(x[::2].cuda(), z[::2].cuda()).predict_index(x[1::2].cuda())
    assert there.is_cuda
    assert float((there.cpu() != here).double().mean()) <= (0.02 if name == "mlp" else 0)


@pytest.mark.parametrize(("battery", "check"), CASES)
def test_battery(battery: object, check: str, tmp_path: Path) -> None:
    """The whole battery; its device check fits on the accelerator where there is one."""
    battery.run(check, tmp_path)  # type: ignore[attr-defined]
