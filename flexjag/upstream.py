"""Mends for bugs of the PyTorch releases we support: one function per bug, deleted with the fix."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@cache
def mend_cpu_flex_size_names() -> None:
    """Inductor's CPU FlexAttention kernels do not compile for some sizes (seen in torch 2.11 and 2.13).

    The template stands for its split sizes by two unbacked symbols, ``ks1`` say, and textually replaces that name in
    the generated C++, also inside ``ks18``, the size of a captured tensor. Named ``ku1_size``, they are part of no
    other name. Nothing but the names of size arguments changes, for any kernel.
    """
    from torch._inductor.codegen.common import KernelArgs

    plain = KernelArgs.size

    def size(self: Any, name: Any) -> str:
        if name.name.startswith("u"):
            return self.sizevars.setdefault(name, f"k{name.name}_size")
        return plain(self, name)

    KernelArgs.size = size


def running_max(x: Tensor) -> Tensor:
    """``x.cummax(0).values``, whose shape function guards on a size that was read from data (seen in torch 2.13)."""
    if torch.compiler.is_compiling():
        return torch.stack(list(accumulate(x.unbind(0), torch.maximum)))
    return x.cummax(dim=0).values


def interpreter_needs_older_numpy() -> bool:
    """Triton 3.6's interpreter turns arrays of one element into numbers, which numpy 2.4 no longer does."""
    seen = (import_module(name).__version__ for name in ("triton", "numpy"))
    triton, numpy = (tuple(int(n) for n in version.split(".")[:2]) for version in seen)
    return triton < (3, 7) and numpy >= (2, 4)


@torch.library.custom_op("flexjag::fence", mutates_args=())
def _fence(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_fence.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def holds_no_numbers(x: Tensor) -> bool:
    """Whether only shapes are known of a tensor: a graph is being traced, or it is a meta or a fake tensor."""
    return torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor) or _is_proxied()


def _is_proxied() -> bool:
    """Whether ``make_fx`` is tracing, which gives real tensors real values but cannot read them."""
    mode = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return torch._C._get_dispatch_mode(mode) is not None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def is_watched() -> bool:
    """Whether a dispatch mode sees every operation, and may keep what it returns."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def fence(x: Tensor) -> Tensor:
    """In a traced graph a contiguous copy that Inductor cannot see through; else `x` itself. Without gradients.

    Inductor's CPU FlexAttention takes no view of a tensor of another rank, and no operation fused behind it. Its Triton
    one inlines a tensor that a mod reads and that the graph has not yet written, and fails if that one is padded
    (seen in torch 2.11 and 2.13).
    """
    return _fence(x) if torch.compiler.is_compiling() else x
