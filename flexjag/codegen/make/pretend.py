"""Patches that make PyTorch, Inductor and Triton report an absent GPU. For the worker only: nothing here is undone.

Inductor queries the device's properties and specializes the kernels it writes for them. Here the answers come from the
table of targets instead of a driver. No kernel is launched on the device, so none is needed.
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from flexjag.codegen.targets import Target


def pretend(target: Target) -> None:
    """Patch this process so that all queries about the current device are answered as on `target`."""
    properties = target.properties()
    _pretend_cuda(target.capability, properties)
    _pretend_interface(target, properties)
    _pretend_triton(target)


def _answer(value: Any) -> Any:
    return lambda *_args, **_kwargs: value


def _replace(module: str, name: str, value: Any) -> None:
    """Replace a module's function by one that returns `value` for any arguments."""
    setattr(importlib.import_module(module), name, _answer(value))


def _pretend_cuda(capability: tuple[int, int], properties: Any) -> None:
    """Patch the functions of ``torch.cuda``."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, value in answers.items():
        mock.patch.object(torch.cuda, name, _answer(value)).start()
    mock.patch("torch.cuda.random._lazy_init", _answer(None)).start()
    mock.patch.object(torch.version, "cuda", "13.0").start()
    mock.patch.object(torch.accelerator, "is_available", _answer(False)).start()  # else Dynamo queries its stream


def _pretend_interface(target: Target, properties: Any) -> None:
    """Patch the device interface of Dynamo and Inductor, and the places that bypass it."""
    interface = importlib.import_module("torch._dynamo.device_interface")
    cuda = interface.CudaInterface
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_compute_capability": target.arch,
        "get_raw_stream": 0,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    for name, value in answers.items():
        setattr(cuda, name, staticmethod(_answer(value)))
    cuda.Worker.get_device_properties = staticmethod(_answer(properties))
    cuda.Worker.current_device = staticmethod(_answer(0))
    for device in ("cuda", "cuda:0"):
        interface.register_interface_for_device(device, cuda)
    _replace("torch._inductor.scheduler", "has_triton", True)
    for name in ("joint_graph", "post_grad"):  # which run on the device
        _replace(f"torch._inductor.fx_passes.{name}", "lazy_init", None)
    fake_tensor.init_gpu_context = _answer(None)
    fake_tensor.FakeTensor.copy_ = _copy_  # pyright: ignore[reportAttributeAccessIssue]


def _copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``copy_`` of fake tensors: a shape check. PyTorch's own needs a guard for a device that its build may lack."""
    if torch.broadcast_shapes(self.shape, src.shape) != self.shape:
        raise RuntimeError(f"cannot broadcast {list(src.shape)} to {list(self.shape)}")
    return self


def _pretend_triton(target: Target) -> None:
    """Install an active Triton driver that reports `target`."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target.arch, target.lanes)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    _replace("torch._inductor.runtime.triton_helpers", "set_driver_to_gpu", None)
