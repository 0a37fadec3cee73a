"""Straight-line programs: numbers, and the operations that make them of other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Value = Any
"""A symbol, or a Python number."""

LITERAL = 64
"""Whole numbers from here on may be sizes, which change from batch to batch: they become arguments of a program."""

OPERATIONS = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a · b",
    "div": "a / b of floating-point numbers",
    "floordiv": "a / b of whole numbers, rounded down",
    "and": "a and b, of bools or bits",
    "or": "a or b, of bools or bits",
    "xor": "whether a and b differ, of bools or bits",
    "not": "not a, of a bool",
    "eq": "a = b, a bool",
    "ne": "a ≠ b, a bool",
    "lt": "a < b, a bool",
    "le": "a <= b, a bool",
    "gt": "a > b, a bool",
    "ge": "a >= b, a bool",
    "minimum": "the smaller one, NaN if either is",
    "maximum": "the larger one, NaN if either is",
    "clamp_min": "the larger one, NaN if either is; the slope at a tie is a's",
    "clamp_max": "the smaller one, NaN if either is; the slope at a tie is a's",
    "relu": "the larger one of x and the constant 0.0, NaN if x is; the slope at a tie is 0",
    "where": "a if the bool c else b, of c, a and b",
    "neg": "-x",
    "abs": "|x|",
    "exp": "e to the power x",
    "exp2": "2 to the power x",
    "log": "the natural logarithm",
    "log2": "the logarithm to base 2",
    "sqrt": "the square root",
    "rsqrt": "1 / the square root",
    "sin": "the sine",
    "cos": "the cosine",
    "erf": "the error function",
    "tanh": "the hyperbolic tangent",
    "sigmoid": "1 / (1 + exp(-x))",
    "floor": "x rounded down, of a floating-point number",
    "ceil": "x rounded up, of a floating-point number",
    "detach": "x, of which no derivative is taken",
    "to": "x in the result's dtype, which is not bool",
    "full": "a constant in the result's dtype",
    "load": "the entry of a tensor: of the capture's number, then each index and its stride",
    "bucketize": "how many boundaries are at most x: of the capture's number, x, how many there are, the bits of that",
}
"""Every operation of a program and what it makes, in float32 where that is not said by the dtypes of its arguments."""


class Instruction:
    """One line of a program.

    Attributes:
        op: Its operation, one of :data:`OPERATIONS`.
        args: Symbols and Python numbers.
        result: The symbol that it defines.
    """

    def __init__(self, op: str, args: tuple[Value, ...], result: Symbol) -> None:
        self.op, self.args, self.result = op, args, result

    @property
    def indices(self) -> tuple[Value, ...]:
        """Of a ``load``: the index of each of the tensor's dimensions."""
        return self.args[1::2]

    @property
    def strides(self) -> tuple[Value, ...]:
        """Of a ``load``: the stride of each of the tensor's dimensions, 1 or a symbol."""
        return self.args[2::2]


class Symbol:
    """A number that is known when the program runs.

    Args:
        program: The program that it belongs to.
        name: What it is called there.
        dtype: Its dtype.
    """

    def __init__(self, program: Program, name: str, dtype: torch.dtype) -> None:
        self.program, self.name, self.dtype = program, name, dtype


class Program:
    """Instructions in order, each only once, and the tensors and whole numbers that they read.

    Args:
        kind: The class of its symbols.
        is_checked: Whether indices that lie outside a tensor count from its end or, too far out, mean the last entry
            there; else they must not occur.

    Attributes:
        lines: The instructions.
        captures: The tensors, each only once.
        numbers: Sizes and strides.
    """

    def __init__(self, kind: type[Symbol], is_checked: bool) -> None:
        self.kind, self.is_checked = kind, is_checked
        self.lines: list[Instruction] = []
        self.captures: list[Tensor] = []
        self.numbers: list[int] = []
        self._known: dict[str, Symbol] = {}

    def symbol(self, name: str, dtype: torch.dtype) -> Any:
        """An argument of the program."""
        return self.kind(self, name, dtype)

    def number(self, value: int) -> Any:
        """A whole number that is an argument."""
        self.numbers.append(value)
        return self.kind(self, f"numbers[{len(self.numbers) - 1}]", torch.int32)

    def note(self, op: str, args: Sequence[Value], dtype: torch.dtype) -> Any:
        """The result of an operation; that of an earlier line if it is the same."""
        assert op in OPERATIONS, op
        key = f"{op}({', '.join([x.name if isinstance(x, Symbol) else repr(x) for x in args])}) {dtype}"
        if key not in self._known:
            result = self.kind(self, f"x{len(self.lines)}", dtype)
            self.lines.append(Instruction(op, tuple(args), result))
            self._known[key] = result
        return self._known[key]

    def capture(self, tensor: Tensor) -> int:
        """The number of a tensor that is read."""
        for i, known in enumerate(self.captures):
            if known is tensor:
                return i
        self.captures.append(tensor)
        return len(self.captures) - 1


def refuse(why: str) -> NoReturn:
    """Say that something cannot be made a program of, or not be printed."""
    raise NotImplementedError(why)


def program_of(args: Sequence[Any]) -> Program:
    """The program that the symbols among some arguments belong to."""
    for x in args:
        if isinstance(x, Symbol):
            return x.program
        if isinstance(x, (tuple, list)):
            for y in x:
                if isinstance(y, Symbol):
                    return y.program
    refuse("it calls a function of something else than numbers")


def convert(x: Value, dtype: torch.dtype, program: Program) -> Value:
    """`x` in a dtype; literals have any."""
    if not isinstance(x, Symbol):
        if isinstance(x, (bool, float)) or abs(x) < LITERAL or abs(x) >= 2**31:
            return x
        x = program.number(x)
    if x.dtype == dtype:
        return x
    return program.note("ne", (x, 0), dtype) if dtype == torch.bool else program.note("to", (x,), dtype)


def needed(program: Program, results: Sequence[Value]) -> list[Instruction]:
    """The lines that results depend on, in order."""
    wanted = {x.name for x in results if isinstance(x, Symbol)}
    lines: list[Instruction] = []
    for line in reversed(program.lines):
        if line.result.name in wanted:
            wanted |= {x.name for x in line.args if isinstance(x, Symbol)}
            lines.append(line)
    return lines[::-1]


def reads(lines: Sequence[Instruction], symbol: Symbol) -> bool:
    """Whether some line reads a symbol."""
    return any(isinstance(x, Symbol) and x.name == symbol.name for line in lines for x in line.args)


def looks_up_pairs(lines: Sequence[Instruction], first: str, second: str) -> bool:
    """Whether some lookup is at a place that depends on both of two arguments, so that a tile needs one per pair."""
    sources: dict[str, set[str]] = {first: {first}, second: {second}}
    for line in lines:
        on: set[str] = set()
        for x in line.args:
            on |= sources.get(x.name, set()) if isinstance(x, Symbol) else set()
        if len(on) == 2 and line.op in ("load", "bucketize"):
            return True
        sources[line.result.name] = on
    return False
