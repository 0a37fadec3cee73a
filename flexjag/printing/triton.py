"""Programs as Triton functions of tiles that broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexjag.printing.language import FUNCTIONS, OPERATORS, Language, with_bounds
from flexjag.printing.program import Instruction, Symbol, refuse

DTYPES = {
    torch.bool: "int1",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
"""Triton's names of the dtypes."""


class Triton(Language):
    """Prints Triton functions, whose captures are pointers."""

    name = "Triton"
    header = """\
import triton.language as tl

from flexjag.kernels.math import bucketize, floor_divide, jit, sigmoid, tanh
"""
    words = with_bounds(
        {
            **OPERATORS,
            **{name: f"tl.{name}({{}})" for name in FUNCTIONS},
            "tanh": "tanh({})",
            "sigmoid": "sigmoid({})",
            "floordiv": "floor_divide({}, {})",
            "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
            "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
            "where": "tl.where({}, {}, {})",
            "to": "tl.cast({}, {dtype})",
            "full": "tl.full((), {}, {dtype})",
            "bucketize": "bucketize({1}, {0}, {2}, {3})",
        }
    )

    def dtype(self, dtype: torch.dtype) -> str:
        """Name of a dtype: ``tl.float32`` and so on."""
        if dtype not in DTYPES:
            refuse(f"it makes {dtype}, which {self.name} does not have")
        return f"tl.{DTYPES[dtype]}"

    def load(self, line: Instruction) -> str:
        """Expression of a load from the tensor's address plus each index times its stride, in 64 bits."""
        at = self.capture(line)
        for i, stride in zip(line.indices, line.strides, strict=True):
            x = self.value(i)
            at += f" + {x}" if isinstance(stride, int) else f" + tl.cast({x}, tl.int64) * {self.value(stride)}"
        return f"tl.load({at})"

    def function(
        self, name: str, parameters: Sequence[Symbol], lines: Sequence[str], returned: str, dtype: torch.dtype
    ) -> str:
        """Source of a function that kernels can call."""
        return f"@jit\n{super().function(name, parameters, lines, returned, dtype)}"

    def spread(self, x: str, like: str) -> str:
        """Expression of `x` broadcast to a tile, which kernels expect even where a row has one number."""
        return f"tl.broadcast_to({x}, {like}.shape)"
