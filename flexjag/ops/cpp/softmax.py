"""Softmax over the tokens of each segment: one call for all of them."""

from __future__ import annotations

import ctypes

from torch import Tensor

from flexjag.ops.cpp.common import find, threads

PER_SEGMENT, PER_NUMBER = 3e-6, 1e-9
"""Seconds of ATen's kernels."""

FEW = 2**12
"""Numbers below which a call takes so little that asking for a kernel would count."""


class _Softmax(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "offsets")),
        *((name, ctypes.c_int64) for name in ("segments", "rows", "columns", "threads")),
    )


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.softmax`."""
    return NotImplemented if values.numel() < FEW else _run("softmax", values, None, offsets)


def segment_softmax_backward(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.softmax`."""
    return NotImplemented if out.numel() < FEW else _run("softmax_backward", out, grad, offsets)


def _run(entry: str, x: Tensor, grad: Tensor | None, offsets: Tensor) -> Tensor:
    """Call a function of the unit; NotImplemented where it is not worth it, or the offsets are none."""
    segments, numbers = offsets.shape[0] - 1, x.numel()
    library = find("softmax", x.dtype, segments * PER_SEGMENT + numbers * PER_NUMBER)
    if library is None or (grad is not None and grad.dtype != x.dtype):
        return NotImplemented
    x, offsets, out = x.contiguous(), offsets.long().contiguous(), x.new_empty(x.shape)
    grad = None if grad is None else grad.contiguous()
    sizes = segments, x.shape[0], numbers // x.shape[0], threads(numbers)
    at = None if grad is None else grad.data_ptr()
    call = _Softmax(x.data_ptr(), at, out.data_ptr(), offsets.data_ptr(), *sizes)
    return NotImplemented if getattr(library, entry)(ctypes.byref(call)) else out
