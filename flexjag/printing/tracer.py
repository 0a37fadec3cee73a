"""Tracing symbols: stand-ins for 0-d tensors that record the operations of a user's function on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.offsets import fixed
from flexjag.printing.program import Program, Symbol, Value, program_of, refuse
from flexjag.printing.torch_table import FUNCTIONS, NAMES, clamp, where


def new_program(is_checked: bool = False) -> Program:
    """Create an empty program with tracing symbols, on which functions of torch tensors can be called.

    Args:
        is_checked: If true, negative indices count from a tensor's end, and indices out of range are clamped; else
            both must not occur.

    >>> program = new_program()
    >>> x = program.symbol("x", torch.float32)
    >>> y = torch.exp(-x) * 2
    >>> [(line.result.name, line.op) for line in program.lines]
    [('x0', 'neg'), ('x1', 'exp'), ('x2', 'mul')]
    """
    return Program(Tracer, is_checked)


def _operator(name: str, is_swapped: bool = False) -> Callable[..., Any]:
    def method(self: Tracer, *others: Any) -> Any:
        return apply(name, (*others, self) if is_swapped else (self, *others), {})

    return method


class Tracer(Symbol):
    """A symbol with the operators and methods of a tensor that `torch_table` implements."""

    ndim = 0

    __add__, __radd__ = _operator("add"), _operator("add", True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", True)
    __truediv__, __rtruediv__ = _operator("truediv"), _operator("truediv", True)
    __floordiv__, __rfloordiv__ = _operator("floordiv"), _operator("floordiv", True)
    __mod__, __rmod__ = _operator("mod"), _operator("mod", True)
    __pow__, __rpow__ = _operator("pow"), _operator("pow", True)
    __and__, __rand__ = _operator("and"), _operator("and", True)
    __or__, __ror__ = _operator("or"), _operator("or", True)
    __xor__, __rxor__ = _operator("xor"), _operator("xor", True)
    __rshift__ = _operator("rshift")
    __eq__, __ne__ = _operator("eq"), _operator("ne")
    __lt__, __le__ = _operator("lt"), _operator("le")
    __gt__, __ge__ = _operator("gt"), _operator("ge")
    __neg__, __abs__, __invert__ = _operator("neg"), _operator("abs"), _operator("invert")

    @property
    def shape(self) -> torch.Size:
        """``torch.Size([])``."""
        return torch.Size(())

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__getitem__ or function is operator.getitem:  # the latter in strict exports
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
    """A partially indexed tensor: fewer indices so far than dimensions."""

    def __init__(self, program: Program, tensor: Tensor, index: tuple[Value, ...]) -> None:
        self.program, self.tensor, self.index = program, tensor, index

    def __getitem__(self, index: Value | tuple[Value, ...]) -> Any:
        return look_up(self.program, self.tensor, (*self.index, *(index if isinstance(index, tuple) else (index,))))


def apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a torch function, method or operator, given by name, to symbols."""
    program = program_of(args)
    given = [_argument(x, program, name) for x in args]
    return FUNCTIONS[name](*given, **{key: _argument(x, program, name) for key, x in kwargs.items()})


def _argument(x: Any, program: Program, name: str) -> Any:
    """Convert an argument of a torch function: tensors and numpy scalars to symbols and numbers, the rest unchanged."""
    if isinstance(x, Tensor) and x.ndim == 0:
        return look_up(program, x, ())
    if isinstance(x, Rows) or (isinstance(x, Tensor) and name != "bucketize"):
        refuse("it computes with a whole row of a tensor: index all of its dimensions")
    if type(x) is float:
        return fixed(x)  # printed as a literal
    if not isinstance(x, (Symbol, Tensor, int)) and hasattr(x, "dtype") and hasattr(x, "item"):
        return x.item()  # a scalar of numpy, which prints as code of its own
    return x


def read(tensor: Tensor, *index: Value) -> Any:
    """``tensor[index]``, with the signature of :attr:`flexjag.lowering.mods.RowTables.look_up`."""
    return look_up(program_of(index), tensor, index)


def look_up(program: Program, tensor: Tensor, index: tuple[Value, ...]) -> Any:
    """``tensor[index]``: a symbol, or rows if there are fewer indices than dimensions."""
    for x in index:
        if isinstance(x, bool) or not (isinstance(x, (Symbol, int)) or (isinstance(x, Tensor) and x.ndim == 0)):
            refuse("it looks up a tensor by something else than whole numbers")
    if len(index) > tensor.ndim:
        refuse("it looks up a tensor by more indices than it has dimensions")
    return _load(program, tensor, index) if len(index) == tensor.ndim else Rows(program, tensor, index)


def _load(program: Program, tensor: Tensor, index: Sequence[Value]) -> Symbol:
    tensor = program.dense(tensor)
    places: list[Value] = []
    # One stride of 1 is printed. Others are of sizes of 1, and the source must be the same for all sizes.
    adjacent = max([-1, *[dim for dim in range(tensor.ndim) if tensor.stride(dim) == 1]])
    for dim, given in enumerate(index):
        i: Value = _load(program, given, ()) if isinstance(given, Tensor) else given
        if isinstance(i, Symbol) and (i.dtype == torch.bool or i.dtype.is_floating_point):
            refuse(f"an index is {i.dtype}")
        if isinstance(i, int) and i < 0:
            i = program.number(tensor.shape[dim] + i)
        elif program.is_checked and isinstance(i, Symbol) and not i.is_place:
            i = _inside(i, program.number(tensor.shape[dim]))
        places += [i, 1 if dim == adjacent else program.number(tensor.stride(dim))]
    return program.note("load", (program.capture(tensor), *places), tensor.dtype)


def _inside(i: Value, size: Value) -> Symbol:
    """An index in range: plus `size` if it is negative, then clamped to 0 ... ``size - 1``."""
    return clamp(where(i < 0, i + size, i), 0, size - 1)


def as_symbol(x: Any, program: Program) -> Symbol:
    """Convert the result of a user's function to a symbol of its program."""
    if isinstance(x, Tensor):
        x = look_up(program, x, ())
    if not isinstance(x, Symbol):
        refuse("it does not return one number")
    return x
