"""Programs as functions of torch tensors that broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexjag.printing.language import FUNCTIONS, OPERATORS, Language, with_bounds
from flexjag.printing.program import Instruction, Symbol


class Torch(Language):
    """Prints functions of torch tensors, one of them named `q`, that call :mod:`flexjag.printing.runtime`."""

    name = "torch"
    header = """\
import torch

from flexjag.printing.runtime import cast, flat_index, look_up, maximum, minimum
"""
    words = with_bounds(
        {
            **OPERATORS,
            **{name: f"torch.{name}({{}})" for name in (*FUNCTIONS, "tanh", "sigmoid")},
            "floordiv": "{} // {}",
            "minimum": "minimum({}, {})",
            "maximum": "maximum({}, {})",
            "where": "torch.where({}, {}, {})",
            "to": "cast({}, {dtype})",
            "full": "torch.full_like(q, {}, dtype={dtype})",
            "bucketize": "torch.bucketize({1}, {0}, right=True)",
        }
    )

    def dtype(self, dtype: torch.dtype) -> str:
        """Name of a dtype: ``torch.float32`` and so on."""
        return f"{dtype}"

    def function(
        self, name: str, parameters: Sequence[Symbol], lines: Sequence[str], returned: str, dtype: torch.dtype
    ) -> str:
        """Source of a function, whose whole-numbered parameters are of the width that their programs compute in."""
        whole = [x for x in parameters if not x.dtype.is_floating_point]
        casts = [f"    {x.name} = cast({x.name}, {self.dtype(x.dtype)})" for x in whole]
        return super().function(name, parameters, [*casts, *lines], returned, dtype)

    def load(self, line: Instruction) -> str:
        """Expression of a gather; a 0-d tensor is the entry itself."""
        indices = [self.value(i) for i in line.indices]
        return f"look_up({', '.join([self.capture(line), *indices])})" if indices else self.capture(line)

    def spread(self, x: str, like: str) -> str:
        """Expression of a view of `x` expanded to the shape of `like`."""
        return f"{x}.expand({like}.shape)"

    def place(self, line: Instruction) -> str:
        """Expression of the flat index into a contiguous tensor."""
        return f"flat_index({', '.join([self.capture(line), *[self.value(i) for i in line.indices]])})"
