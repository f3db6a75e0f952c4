"""A pretended accelerator: tensors that say they are on ``cuda:0`` and are computed on the CPU.

Inside `FakeCuda` every operation is watched. Tensors of the two devices may not be mixed, as on a real one, and every
trip of values to the host is counted by name: ``.item()``, ``float(t)``, ``bool(t)`` and ``.tolist()``, copies to the
CPU, and operations whose result has a size that depends on values, for which the host has to wait. `torch`'s own
``FakeTensorMode`` holds no values, so it stops at the first of them; this one goes on.

What it cannot show: kernels that an accelerator lacks, its rounding, and its speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {aten._to_copy.default, aten.copy_.default}
# these take indices from the CPU too
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
WAITED_FOR = {  # the host needs the result, or its size
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
}


class OnCuda(Tensor):
    """A tensor that says it is on ``cuda:0``; ``held`` holds its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCuda:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # what C++ sees: a CPU-only torch would look for a driver on cuda
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"OnCuda({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            _MODES[-1].trips["item"] += 1
            return func(*tree_map(to_host, args), **(kwargs or {}))
        if func is Tensor.new_tensor:  # reads the device in C++
            options = {"dtype": args[0].dtype, "device": CUDA, **(kwargs or {})}
            return torch.tensor(args[1], **options)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, _MODES[-1].trips)


def to_cuda(x: Tensor) -> OnCuda:
    """Return the tensor as if on ``cuda:0``; later changes of ``x`` are not seen."""
    return OnCuda(x.detach().clone())


def to_host(x: Tensor) -> Tensor:
    """Return the values, without counting a trip."""
    return x.held if isinstance(x, OnCuda) else x


class FakeCuda(TorchDispatchMode):
    """While entered, ``device="cuda"`` works, and trips to the host are counted in ``trips``."""

    def __init__(self) -> None:
        super().__init__()
        self.trips: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.trips)


_MODES = [FakeCuda()]  # the last one counts; the first is for tensors used outside


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Enter `FakeCuda`, also where torch was built without CUDA."""
    lifted = torch._C._only_lift_cpu_tensors()
    with mock.patch.object(torch.cuda, "_lazy_init", return_value=None), FakeCuda() as mode:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks the mode
        _MODES.append(mode)
        try:
            yield mode
        finally:
            _MODES.pop()
            torch._C._set_only_lift_cpu_tensors(lifted)


def _run(func: Any, args: Any, kwargs: dict[str, Any], trips: Counter[str]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = any(isinstance(value, OnCuda) for value in tensors)
    device = kwargs.get("device")
    target = None if device is None else torch.device(device)
    asked = target is not None and target.type in ("cuda", "meta")
    if not there and not asked:
        return func(*args, **kwargs)
    _check_devices(func, tensors, there)
    _count(func, args, target, there, trips)
    if asked:
        kwargs = {**kwargs, "device": CPU}
    inner_args, inner_kwargs = tree_map(to_host, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if target == CPU or (func is aten.copy_.default and not isinstance(args[0], OnCuda)):
        return args[0] if func is aten.copy_.default else out
    out = tree_map(lambda value: OnCuda(value) if isinstance(value, Tensor) else value, out)
    if not there:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check_devices(func: Any, tensors: list[Tensor], there: bool) -> None:
    """Raise as CUDA does when devices are mixed; a CPU tensor of no dimension is a number."""
    if not there or func in COPIES or func in INDEXED:
        return
    here = [value for value in tensors if not isinstance(value, OnCuda) and value.ndim > 0]
    if here:
        shapes = [tuple(value.shape) for value in here]
        raise RuntimeError(
            f"{func}: expected all tensors on cuda:0; on the CPU are some of shape {shapes}"
        )


def _count(
    func: Any, args: Any, target: torch.device | None, there: bool, trips: Counter[str]
) -> None:
    if not there:
        return
    if func in INDEXED:
        self, indices = args[0], [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            trips["index by mask"] += 1
        if not isinstance(self, OnCuda):
            raise RuntimeError(f"{func}: a CPU tensor indexed by one on cuda:0")
        if any(not isinstance(index, OnCuda) for index in indices):
            trips["index from host"] += 1
    elif func is aten._local_scalar_dense.default:
        trips["item"] += 1
    elif func in WAITED_FOR:
        trips[str(func.overloadpacket.__name__)] += 1
    elif target == CPU or (func is aten.copy_.default and not isinstance(args[0], OnCuda)):
        trips["copy to host"] += 1
