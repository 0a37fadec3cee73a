"""Patches for Triton's interpreter (bugs seen in 3.6 and 3.7). For workers with TRITON_INTERPRET=1; nothing is undone.

The interpreter computes with NumPy, which has no bfloat16: it keeps the bits in integers, multiplies them as integers
in ``tl.dot`` and truncates float32 instead of rounding it. It cannot call NVIDIA's libdevice. That of Triton 3.6
converts one-element arrays to numbers in a way that NumPy 2.4 no longer supports.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch


@cache
def mend_interpreter() -> None:
    """Patch the interpreter to compute bfloat16 as a GPU does, and to run with any NumPy.

    Products of bfloat16 values are exact in float32; results are rounded to nearest even.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    plain_dot, plain_convert = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp

    def is_half(dtype: Any) -> bool:
        return dtype.scalar == tl.bfloat16

    def wide(x: Any) -> Any:
        return TensorHandle(_to_float32(x.data), tl.float32) if is_half(x.dtype) else x

    def cast(self: Any, src: Any, to: Any) -> Any:
        if is_half(to) and not is_half(src.dtype):
            return TensorHandle(_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, wide(src), to) if is_half(src.dtype) and not is_half(to) else plain_cast(self, src, to)

    def convert(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        is_special = is_half(to) or is_half(src.dtype)
        return cast(self, src, to) if is_special else plain_convert(self, src, to, rounding)

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        made = plain_binary(self, wide(lhs), wide(rhs), op)
        if is_half(lhs.dtype) and made.data.dtype == np.float32:
            return TensorHandle(_to_bfloat16(made.data), tl.bfloat16)
        return made

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), *rest)

    for name, new in (("cast_impl", cast), ("binary_op", binary), ("create_dot", dot), ("create_fp_to_fp", convert)):
        setattr(InterpreterBuilder, name, new)

    plain_patch: Any = interpreter._patch_lang_tensor  # pyright: ignore[reportPrivateUsage]

    def patch(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.item()))

    interpreter._patch_lang_tensor = patch  # pyright: ignore[reportPrivateUsage]


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float().numpy()


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


class Libdevice:
    """NVIDIA's libdevice functions, computed by torch's functions of the same names."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch, name)

        def apply(*args: Any) -> Any:
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            found = function(*(torch.from_numpy(x.handle.data) for x in args))
            return tl.core.tensor(TensorHandle(found.numpy(), args[0].handle.dtype), args[0].type)

        return apply
