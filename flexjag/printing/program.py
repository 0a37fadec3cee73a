"""Straight-line programs, and the symbols that stand for their numbers while they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Value = Any
"""A symbol, or a Python number."""

LITERAL = 64
"""Whole numbers from here on may be sizes, which change from batch to batch: they become arguments of a program."""

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What is known of torch, by the names of functions, methods and operators: see :mod:`flexjag.printing.torch_table`."""

NAMES: dict[Any, str] = {}
"""The functions of torch whose names are known."""


class Instruction:
    """One line of a program.

    Attributes:
        op: Its operation.
        args: Symbols and Python numbers; of a ``load`` the number of the capture, then each index and its stride; of a
            ``bucketize`` that number, then what is looked for, the number of boundaries and of its bits.
        result: The symbol that it defines.
    """

    def __init__(self, op: str, args: tuple[Value, ...], result: Symbol) -> None:
        self.op, self.args, self.result = op, args, result


class Program:
    """Instructions in order, each only once, and the tensors and whole numbers that they read.

    Args:
        is_checked: Whether indices that lie outside a tensor count from its end or, too far out, mean the last entry
            there; else they must not occur.

    Attributes:
        lines: The instructions.
        captures: The tensors, each only once.
        numbers: Sizes and strides.
    """

    def __init__(self, is_checked: bool = False) -> None:
        self.is_checked = is_checked
        self.lines: list[Instruction] = []
        self.captures: list[Tensor] = []
        self.numbers: list[int] = []
        self._known: dict[str, Symbol] = {}

    def symbol(self, name: str, dtype: torch.dtype) -> Symbol:
        """An argument of the program."""
        return Symbol(self, name, dtype)

    def number(self, value: int) -> Symbol:
        """A whole number that is an argument."""
        self.numbers.append(value)
        return Symbol(self, f"numbers[{len(self.numbers) - 1}]", torch.int32)

    def note(self, op: str, args: Sequence[Value], dtype: torch.dtype) -> Symbol:
        """The result of an operation; that of an earlier line if it is the same."""
        key = f"{op}({', '.join([x.name if isinstance(x, Symbol) else repr(x) for x in args])}) {dtype}"
        if key not in self._known:
            result = Symbol(self, f"x{len(self.lines)}", dtype)
            self.lines.append(Instruction(op, tuple(args), result))
            self._known[key] = result
        return self._known[key]

    def load(self, tensor: Tensor, index: Sequence[Value]) -> Symbol:
        """The entry of a tensor at an index for each of its dimensions."""
        places: list[Value] = []
        for dim, given in enumerate(index):
            i: Value = self.load(given, ()) if isinstance(given, Tensor) else given
            if isinstance(i, Symbol) and (i.dtype == torch.bool or i.dtype.is_floating_point):
                refuse(f"an index is {i.dtype}")
            if isinstance(i, int) and i < 0:
                i = self.number(tensor.shape[dim] + i)
            elif self.is_checked and isinstance(i, Symbol):
                i = _inside(i, self.number(tensor.shape[dim]))
            stride = tensor.stride(dim)
            places += [i, 1 if stride == 1 else self.number(stride)]
        return self.note("load", (self.capture(tensor), *places), tensor.dtype)

    def capture(self, tensor: Tensor) -> int:
        """The number of a tensor that is read."""
        for i, known in enumerate(self.captures):
            if known is tensor:
                return i
        self.captures.append(tensor)
        return len(self.captures) - 1


class Symbol:
    """A number to be known later: what a mask's or score's function is called on."""

    ndim = 0

    def __init__(self, program: Program, name: str, dtype: torch.dtype) -> None:
        self.program, self.name, self.dtype = program, name, dtype

    @property
    def shape(self) -> torch.Size:
        """No dimensions."""
        return torch.Size(())

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__getitem__:
            tensor, index = args
            return look_up(program_of((index,)), tensor, index if isinstance(index, tuple) else (index,))
        if function not in NAMES:
            refuse(f"it calls {getattr(function, '__name__', function)}, which is not known here")
        return apply(NAMES[function], args, kwargs or {})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in FUNCTIONS:
            raise AttributeError(f"{name} of a number is not known here")
        return lambda *args, **kwargs: apply(name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        refuse("it decides by a value: use torch.where, & and | instead of if, and, or")

    def __hash__(self) -> int:
        return hash(self.name)


class Rows:
    """A tensor of which not all dimensions have been indexed yet."""

    def __init__(self, program: Program, tensor: Tensor, index: tuple[Value, ...]) -> None:
        self.program, self.tensor, self.index = program, tensor, index

    def __getitem__(self, index: Value | tuple[Value, ...]) -> Symbol | Rows:
        return look_up(self.program, self.tensor, (*self.index, *(index if isinstance(index, tuple) else (index,))))


def _inside(i: Value, size: Value) -> Symbol:
    """An index that counts from the end if it is negative, and then at most the last."""
    return FUNCTIONS["clamp"](FUNCTIONS["where"](i < 0, i + size, i), 0, size - 1)


def refuse(why: str) -> NoReturn:
    """Say that something cannot be made a program of."""
    raise NotImplementedError(why)


def look_up(program: Program, tensor: Tensor, index: tuple[Value, ...]) -> Symbol | Rows:
    """``tensor[index]``."""
    for x in index:
        if isinstance(x, bool) or not (isinstance(x, (Symbol, int)) or (isinstance(x, Tensor) and x.ndim == 0)):
            refuse("it looks up a tensor by something else than whole numbers")
    if len(index) > tensor.ndim:
        refuse("it looks up a tensor by more indices than it has dimensions")
    return program.load(tensor, index) if len(index) == tensor.ndim else Rows(program, tensor, index)


def read(tensor: Tensor, *index: Value) -> Any:
    """``tensor[index]``, as :attr:`flexjag.mods.RowTables.look_up` wants it."""
    return look_up(program_of(index), tensor, index)


def program_of(args: Sequence[Any]) -> Program:
    """The program that the symbols among some arguments belong to."""
    for x in args:
        if isinstance(x, (Symbol, Rows)):
            return x.program
        if isinstance(x, (tuple, list)):
            for y in x:
                if isinstance(y, Symbol):
                    return y.program
    refuse("it calls a function of something else than numbers")


def apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function, method or operator of this name makes of symbols."""
    program = program_of(args)
    given = [_argument(x, program, name) for x in args]
    return FUNCTIONS[name](*given, **{key: _argument(x, program, name) for key, x in kwargs.items()})


def _argument(x: Any, program: Program, name: str) -> Any:
    """An argument of a function of torch: a symbol, a Python number, or what only says how."""
    if isinstance(x, Tensor) and x.ndim == 0:
        return look_up(program, x, ())
    if isinstance(x, Rows) or (isinstance(x, Tensor) and name != "bucketize"):
        refuse("it computes with a whole row of a tensor: index all of its dimensions")
    if not isinstance(x, (Symbol, Tensor)) and hasattr(x, "dtype") and hasattr(x, "item"):
        return x.item()  # a scalar of numpy, which prints as code of its own
    return x


def convert(x: Value, dtype: torch.dtype, program: Program) -> Value:
    """`x` in a dtype; literals have any."""
    if not isinstance(x, Symbol):
        if isinstance(x, (bool, float)) or abs(x) < LITERAL or abs(x) >= 2**31:
            return x
        x = program.number(x)
    return x if x.dtype == dtype else program.note("to", (x,), dtype)


def as_symbol(x: Any, program: Program) -> Symbol:
    """What a function returned, as a symbol of its program."""
    if isinstance(x, Tensor):
        x = look_up(program, x, ())
    if not isinstance(x, Symbol):
        refuse("it does not return one number")
    return x


def needed(program: Program, results: Sequence[Value]) -> list[Instruction]:
    """The lines that results depend on, in order."""
    wanted = {x.name for x in results if isinstance(x, Symbol)}
    lines: list[Instruction] = []
    for line in reversed(program.lines):
        if line.result.name in wanted:
            wanted |= {x.name for x in line.args if isinstance(x, Symbol)}
            lines.append(line)
    return lines[::-1]


def looks_up_pairs(lines: Sequence[Instruction], first: str, second: str) -> bool:
    """Whether some lookup is at a place that depends on both of two arguments, so that a tile needs one per pair."""
    depends: dict[str, set[str]] = {first: {first}, second: {second}}
    for line in lines:
        on: set[str] = set()
        for x in line.args:
            on |= depends.get(x.name, set()) if isinstance(x, Symbol) else set()
        if len(on) == 2 and line.op in ("load", "bucketize"):
            return True
        depends[line.result.name] = on
    return False
