"""Stand-in for MPS: a device that computes on the CPU, and refuses what MPS refuses.

    python tests/mps_stand_in.py '[["fit", "--config=…"], ["generate", "--device=stand_in"]]'

It runs the commands in one process, and prints a JSON list: the exit code, output and messages of each. Lightning's
accelerator ``mps`` is this device, and our code counts it as a device without float64.

Like MPS, the device

- raises on every float64 tensor, and on computations with tensors of the host and of the device;
- has a separate generator of random numbers, from which dropout draws. It starts with another state in each process.

It cannot show that MPS has all operations, nor how they round, nor how fast they are.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from lightning.pytorch.accelerators import MPSAccelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from gpt_lightning.model import precision

NAME = "stand_in"
GENERATOR = torch.Generator()
aten = torch.ops.aten
# operations that accept tensors of both devices
_MIXED = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default)


class DeviceTensor(torch.Tensor):
    """Tensor of the device; ``inner`` is the CPU tensor with its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("the stand-in for MPS has no float64")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0), requires_grad=inner.requires_grad,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A checkpoint holds a CPU tensor. With MPS it holds one of MPS, which is loaded on the CPU."""
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Operations():
            return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Mode that computes the device's operations on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # in inference mode torch has not yet divided an operation into smaller ones
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = {id(t.inner): t for t in tensors if isinstance(t, DeviceTensor)}
        on_host = {id(t) for t in tensors if not isinstance(t, DeviceTensor)}
        on_device = bool(inputs)
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = torch.device("cpu") if on_device else kwargs["device"]
        elif on_device and func not in _MIXED and any(t.ndim for t in tensors if id(t) in on_host):
            raise RuntimeError(f"{func}: tensors of the host and of the device")
        args, kwargs = tree_map_only(DeviceTensor, lambda t: t.inner, (args, kwargs))
        result = _on_cpu(func, args, kwargs) if inputs else func(*args, **kwargs)

        def wrap(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in on_host and on_device:
                raise RuntimeError(f"{func}: would write into a tensor of the host")
            if id(tensor) in inputs:  # an operation in place
                return inputs[id(tensor)]
            return DeviceTensor(tensor) if on_device else tensor

        return tree_map_only(torch.Tensor, wrap, result)


def _on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """The result on the CPU. Random numbers come from the device's generator, or from one that is given."""
    if func is aten.native_dropout.default and args[2] is not False:
        mask = torch.empty_like(args[0]).bernoulli_(1 - args[1], generator=GENERATOR)
        return args[0] * mask.div(1 - args[1]), mask.bool()
    if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
        kwargs["generator"] = GENERATOR
    return func(*args, **kwargs)


class Values(TorchFunctionMode):
    """Mode for ``torch.tensor`` and ``tolist``, which do not reach the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            del kwargs["device"]
            return func(*args, **kwargs).to(NAME)
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """``torch.Generator``, also for the device."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


def install() -> None:
    """Register the device in this process, for its rest."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.get_device_module(NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    Operations().__enter__()
    Values().__enter__()
    GENERATOR.seed()
    torch.Generator = Generator  # type: ignore[misc]
    torch.backends.mps.is_available = lambda: True  # type: ignore[assignment]
    torch.mps._get_default_mps_generator = lambda: GENERATOR
    torch._C._has_mps = True
    MPSAccelerator.is_available = staticmethod(lambda: True)  # type: ignore[method-assign]
    MPSAccelerator.setup_device = lambda self, device: None  # type: ignore[method-assign]
    MPSAccelerator.parse_devices = staticmethod(lambda devices: [0])  # type: ignore[assignment,method-assign]
    MPSAccelerator.get_parallel_devices = staticmethod(lambda devices: [torch.device(NAME, 0)])  # type: ignore[method-assign]
    precision.WITHOUT_FLOAT64 = (NAME,)


install()  # in the processes of `report sizes` too, which import this file

if __name__ == "__main__":
    from gpt_lightning.cli.main import main

    results = []
    for arguments in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
        results.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(results))
