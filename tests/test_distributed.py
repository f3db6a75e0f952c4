"""Two gloo processes, each with its rows, give the fit of one process with all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from concept_erasure.linalg import Moments
from concept_erasure.linear.leace import LeaceFitter
from tests.linear.samples import one_hot, sample

WORLD = 2
CUT = 170  # the ranks hold different numbers of rows
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    x, z = sample(500, 8, 3)
    order = torch.argsort(z)  # the ranks even see different classes
    return x[order] + 1e4, one_hot(z[order], 3)


def _seen(part: slice) -> LeaceFitter:
    """Return a fitter with labelled, background and held-out rows, each row in the fold of its text."""
    x, z = _data()
    groups = torch.arange(len(x)) // 5
    fitter = LeaceFitter(8, 3).update(x[part], z[part], groups=groups[part])
    fitter.update_background(1e4 + 1.5 * (x[part] - 1e4))
    return fitter.hold_out(x[part], z[part], groups=groups[part])


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        x, z = _data()
        part = slice(0, CUT) if rank == 0 else slice(CUT, None)
        moments = Moments(8, 3).update(x[part], z[part]).all_reduce()
        fitter = _seen(part).all_reduce()
        gap = fitter.eraser.report["held_out_gap"]
        empty = Moments(8, 3)
        if rank == 1:
            empty.update(x, z)
        empty.all_reduce()
        save_file(
            {
                "gap": torch.tensor([gap], dtype=torch.float64),
                "n": torch.tensor([moments.n], dtype=torch.float64),
                "mean_x": moments.mean_x.contiguous(),
                "sigma_xx": moments.sigma_xx.contiguous(),
                "sigma_xz": moments.sigma_xz.contiguous(),
                "sigma_zz": moments.sigma_zz.contiguous(),
                "erased": fitter.eraser(x).contiguous(),
                "empty": empty.sigma_xz.contiguous(),
            },
            f"{folder}/{rank}.safetensors",
        )
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(_work, args=(str(tmp_path),), nprocs=WORLD, join=True)
    x, z = _data()
    moments = Moments(8, 3).update(x, z)
    eraser = _seen(slice(None)).eraser
    erased = eraser(x)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"the ranks disagree on {name}"
    assert first["n"].item() == 500
    for name in ("mean_x", "sigma_xx", "sigma_xz", "sigma_zz"):
        assert torch.allclose(first[name], getattr(moments, name), rtol=0, atol=1e-9), name
    assert torch.allclose(first["empty"], moments.sigma_xz, rtol=0, atol=1e-9)
    assert first["gap"].item() == pytest.approx(eraser.report["held_out_gap"], rel=1e-6)
    # x is near 1e4, where float64 resolves 2e-12
    assert torch.allclose(first["erased"], erased, rtol=0, atol=1e-8)
