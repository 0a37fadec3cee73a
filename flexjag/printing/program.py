"""Straight-line programs: instructions that compute numbers from other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flexjag.offsets import is_fixed

Value = Any
"""A symbol, or a Python number."""

LITERAL = 64
"""Bound from which integers become arguments of a program: they may be sizes, which change from batch to batch."""

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
    "rshift": "a shifted right by a literal number of bits, of whole numbers; signed ones repeat their sign",
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
"""Every operation of a program with its result, in float32 unless the arguments' dtypes determine another."""


class Instruction:
    """One line of a program.

    Attributes:
        op: Operation, a key of :data:`OPERATIONS`.
        args: Arguments: symbols and Python numbers.
        result: Symbol that it defines.
    """

    def __init__(self, op: str, args: tuple[Value, ...], result: Symbol) -> None:
        self.op, self.args, self.result = op, args, result

    @property
    def indices(self) -> tuple[Value, ...]:
        """Index into each of the tensor's dimensions, of a ``load``."""
        return self.args[1::2]

    @property
    def strides(self) -> tuple[Value, ...]:
        """Stride of each of the tensor's dimensions, 1 or a symbol, of a ``load``."""
        return self.args[2::2]


class Symbol:
    """A number whose value is known only when the program runs.

    Args:
        program: Program that it belongs to.
        name: Name in the program.
        dtype: Dtype.

    Attributes:
        is_place: True if it is the place of a token, which is in range wherever it is an index.
    """

    is_place = False

    def __init__(self, program: Program, name: str, dtype: torch.dtype) -> None:
        self.program, self.name, self.dtype = program, name, dtype


class Program:
    """Ordered instructions without duplicates, and the tensors and integers that they read.

    Args:
        kind: Class of its symbols.
        is_checked: If true, negative indices count from a tensor's end, and indices out of range are clamped; else
            both must not occur.

    Attributes:
        lines: Instructions.
        captures: Tensors that are read, without duplicates.
        numbers: Integer arguments: sizes, strides and large literals.
    """

    def __init__(self, kind: type[Symbol], is_checked: bool) -> None:
        self.kind, self.is_checked = kind, is_checked
        self.lines: list[Instruction] = []
        self.captures: list[Tensor] = []
        self.numbers: list[int] = []
        self._known: dict[str, Symbol] = {}
        self._dense: list[tuple[Tensor, Tensor]] = []

    def symbol(self, name: str, dtype: torch.dtype) -> Any:
        """Create a symbol for an argument of the program."""
        return self.kind(self, name, dtype)

    def number(self, value: int) -> Any:
        """Add an integer argument with this value, and return its int32 symbol."""
        self.numbers.append(value)
        return self.kind(self, f"numbers[{len(self.numbers) - 1}]", torch.int32)

    def note(self, op: str, args: Sequence[Value], dtype: torch.dtype) -> Any:
        """Add an instruction, unless an equal one exists, and return its result."""
        assert op in OPERATIONS, op
        key = f"{op}({', '.join([x.name if isinstance(x, Symbol) else repr(x) for x in args])}) {dtype}"
        if key not in self._known:
            result = self.kind(self, f"x{len(self.lines)}", dtype)
            self.lines.append(Instruction(op, tuple(args), result))
            self._known[key] = result
        return self._known[key]

    def dense(self, tensor: Tensor) -> Tensor:
        """The tensor; if it needs a gradient, which kernels sum at an entry's place in memory, a contiguous one."""
        if not tensor.requires_grad or tensor.is_contiguous():
            return tensor
        for known, copy in self._dense:
            if known is tensor:
                return copy
        self._dense.append((tensor, tensor.contiguous()))
        return self._dense[-1][1]

    def capture(self, tensor: Tensor) -> int:
        """Add a tensor to the captures, unless it is there, and return its index."""
        for i, known in enumerate(self.captures):
            if known is tensor:
                return i
        self.captures.append(tensor)
        return len(self.captures) - 1


def refuse(why: str) -> NoReturn:
    """Raise the error for functions that cannot be traced or printed.

    Raises:
        NotImplementedError: Always, with `why` as its message.
    """
    raise NotImplementedError(why)


def program_of(args: Sequence[Any]) -> Program:
    """Program of the symbols among some arguments."""
    for x in args:
        if isinstance(x, Symbol):
            return x.program
        if isinstance(x, (tuple, list)):
            for y in x:
                if isinstance(y, Symbol):
                    return y.program
    refuse("it calls a function of something else than numbers")


def convert(x: Value, dtype: torch.dtype, program: Program) -> Value:
    """Convert `x` to a dtype; literals stay as they are, integers that may be sizes become arguments."""
    if not isinstance(x, Symbol):
        if isinstance(x, (bool, float)) or (is_fixed(x) and (abs(x) < LITERAL or abs(x) >= 2**31)):
            return x
        x = program.number(x)
    if x.dtype == dtype:
        return x
    return program.note("ne", (x, 0), dtype) if dtype == torch.bool else program.note("to", (x,), dtype)


def needed(program: Program, results: Sequence[Value]) -> list[Instruction]:
    """Instructions that results depend on, in order."""
    wanted = {x.name for x in results if isinstance(x, Symbol)}
    lines: list[Instruction] = []
    for line in reversed(program.lines):
        if line.result.name in wanted:
            wanted |= {x.name for x in line.args if isinstance(x, Symbol)}
            lines.append(line)
    return lines[::-1]


def reads(lines: Sequence[Instruction], symbol: Symbol) -> bool:
    """True if an instruction has the symbol as an argument."""
    return any(isinstance(x, Symbol) and x.name == symbol.name for line in lines for x in line.args)


def looks_up_pairs(lines: Sequence[Instruction], first: str, second: str) -> bool:
    """True if a lookup's index depends on both `first` and `second`, so that a tile needs a lookup per pair."""
    sources: dict[str, set[str]] = {first: {first}, second: {second}}
    for line in lines:
        on: set[str] = set()
        for x in line.args:
            on |= sources.get(x.name, set()) if isinstance(x, Symbol) else set()
        if len(on) == 2 and line.op in ("load", "bucketize"):
            return True
        sources[line.result.name] = on
    return False
