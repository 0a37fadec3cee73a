"""Programs as C++ functions of vectors of queries, for kernels on CPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flexjag.printing.language import FUNCTIONS, OPERATORS, Language, with_bounds
from flexjag.printing.program import Instruction, Symbol, Value, refuse

STORED = {
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float",
    torch.float64: "double",
}
"""C++ types of the dtypes in memory."""

HALVES = (torch.float16, torch.bfloat16)
WHOLE = {"add": "add({}, {})", "sub": "sub({}, {})", "mul": "mul({}, {})", "neg": "neg({})"}
"""Templates of whole numbers' operations, which wrap around."""
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class Cpp(Language):
    """Prints C++ functions that call ``lanes.h`` and ``math.h`` of :mod:`flexjag.kernels.cpp`.

    A value is a scalar if all queries of a vector share it, else a vector with one lane for each query; the types
    follow by deduction. float32 is float and float64 is double; half precision is computed in float and rounded.

    A printed function takes h, a vector's rows, kv, and captures and numbers as pointers. It returns the scores'
    ``Lanes<float>`` or ``Lanes<double>``, or a mask's condition ``Lanes<int32_t>``.
    """

    name = "C++"
    header = """\
#include "kernels/cpp/lanes.h"
#include "kernels/cpp/math.h"
"""
    words = with_bounds(
        {
            **OPERATORS,
            **{name: f"{name}({{}})" for name in (*FUNCTIONS, "tanh", "sigmoid")},
            **{name: f"{name}({{}}, {{}})" for name in (*COMPARISONS, "minimum", "maximum")},
            "and": "both({}, {})",
            "or": "either({}, {})",
            "xor": "differ({}, {})",
            "not": "opposite({})",
            "rshift": "shifted_right({}, {})",
            "floordiv": "floor_divide({}, {})",
            "where": "where({}, {}, {})",
            "to": "cast<{dtype}>({})",
            "full": "{}",
            "bucketize": "bucketize<{stored}>({}, {}, {})",
        }
    )

    def dtype(self, dtype: torch.dtype) -> str:
        """C++ type that values of a dtype are computed in."""
        return self.stored(torch.float32 if dtype in HALVES else dtype)

    def stored(self, dtype: torch.dtype) -> str:
        """C++ type of a dtype in memory."""
        if dtype not in STORED:
            refuse(f"it makes {dtype}, which {self.name} does not have")
        return STORED[dtype]

    def word(self, line: Instruction) -> str:
        """Template of an instruction's expression, which for some depends on dtypes."""
        dtype, given = line.result.dtype, [x.dtype for x in line.args if isinstance(x, Symbol)]
        if line.op in WHOLE and not dtype.is_floating_point:
            return WHOLE[line.op]
        if line.op == "to" and given == [torch.bool]:
            return "where({}, {dtype}(1), {dtype}(0))"
        if line.op == "to" and dtype in HALVES:
            return f"rounded<{self.stored(dtype)}>({{}})"
        if line.op in COMPARISONS and given[0] == torch.bool:
            return f"{line.op}(where({{}}, 1, 0), where({{}}, 1, 0))"
        if line.op == "bucketize":
            return self.words[line.op].replace("{stored}", self.stored(given[0]))
        return self.words[line.op]

    def constant(self, x: float, dtype: torch.dtype) -> str:
        """Literal of a number in the type that its dtype is computed in."""
        if dtype == torch.bool:
            return "true" if x else "false"
        if not dtype.is_floating_point:
            return f"{self.dtype(dtype)}({int(x)})"
        nearest = float(torch.tensor(x, dtype=dtype, device="cpu"))
        literal = repr(nearest if dtype in HALVES else float(x))
        if nearest != nearest:
            literal = '__builtin_nan("")'
        elif abs(nearest) == math.inf:
            literal = f"{'-' if nearest < 0 else ''}__builtin_inf()"
        return f"{self.dtype(dtype)}({literal})"

    def value(self, x: Value, dtype: torch.dtype = torch.int64) -> str:
        """Name of a symbol, or literal of a number in a dtype."""
        if isinstance(x, Symbol) and x.name == "q":
            return "rows.index"
        if isinstance(x, Symbol) and x.name.startswith("numbers["):
            return f"int32_t({x.name})"
        return super().value(x, dtype)

    def place(self, line: Instruction) -> str:
        """The arguments ``index, stride, index, stride, ...`` of a lookup."""
        places = []
        for i, stride in zip(line.indices, line.strides, strict=True):
            is_row = isinstance(i, Symbol) and i.name == "q"  # a vector's rows are known to be a run
            places += ["rows" if is_row else self.value(i, torch.int64)]
            places += [stride.name if isinstance(stride, Symbol) else f"{stride}"]
        return ", ".join(places)

    def load(self, line: Instruction) -> str:
        """Expression of a lookup, which reads memory as its pattern allows: one entry, a run, or lane by lane."""
        given = [self.capture(line), self.place(line)]
        return f"load<{self.stored(line.result.dtype)}>({', '.join([x for x in given if x])})"

    def line(self, line: Instruction) -> str:
        """Statement that defines an instruction's result."""
        return f"  const auto {line.result.name} = {self.expression(line)};"

    def function(
        self, name: str, parameters: Sequence[Symbol], lines: Sequence[str], returned: str, dtype: torch.dtype
    ) -> str:
        """Source of an inline function of a vector of queries."""
        kind = "bool" if dtype == torch.bool else self.dtype(dtype)
        made = "Lanes<int32_t>" if dtype == torch.bool else f"Lanes<{kind}>"
        return self._function(f"{made} {name}", parameters, [*lines, f"  return spread<{kind}>({returned});"])

    def slopes(
        self,
        name: str,
        parameters: Sequence[Symbol],
        lines: Sequence[str],
        slopes: Sequence[tuple[Instruction, Value]],
        learned: Sequence[int],
    ) -> str:
        """Source of a function that adds gradients to ``double* const* totals``, in the order of `learned`.

        A gradient is `ds` times the score's derivative by an entry, in the dtype of the scores; its sum is double.
        """
        ds, added = self.value(parameters[0]), []
        for line, slope in slopes:
            factor = self.value(slope, parameters[0].dtype)
            if isinstance(slope, Symbol) and slope.dtype != parameters[0].dtype:
                factor = f"cast<{self.dtype(parameters[0].dtype)}>({factor})"
            total = f"totals[{list(learned).index(line.args[0])}]"
            is_one = not isinstance(slope, Symbol) and slope == 1.0
            given = [total, ds if is_one else f"by_chain({ds}, {factor})", self.place(line)]
            added.append(f"  add_at({', '.join([x for x in given if x])});")
        return self._function(f"void {name}", parameters, [*lines, *added], "double* const* totals")

    def _function(self, head: str, parameters: Sequence[Symbol], body: Sequence[str], *others: str) -> str:
        """Source of a function, which need not use all of its parameters."""
        taken = [self._declared(x) for x in parameters]
        taken += ["const void* const* captures", "const int64_t* numbers", *others]
        return "\n".join([f"INLINE {head}({', '.join(taken)}) {{", *body, "}", ""])

    def _declared(self, x: Symbol) -> str:
        """Declaration of a parameter: a head and a key are numbers, a score is a vector, q is its rows."""
        if x.name == "q":
            return "const Rows& rows"
        return f"Lanes<{self.dtype(x.dtype)}> {x.name}" if x.dtype.is_floating_point else f"int32_t {x.name}"
