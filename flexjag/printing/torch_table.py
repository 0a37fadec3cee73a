"""Torch's functions, methods and operators on symbols, with torch's rules for dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.printing.program import Symbol, Value, convert, program_of, refuse

POWERS = 8
"""Highest integer power that is written as a product."""


def _dtype(*args: Value) -> torch.dtype:
    """Result dtype of a sum of 0-d operands, by torch's type promotion."""
    found = None
    for x in args:
        if isinstance(x, Symbol):
            found = x.dtype if found is None else torch.promote_types(found, x.dtype)
    for x in args:
        if isinstance(x, (Symbol, bool)):
            continue
        if isinstance(x, float) and (found is None or not found.is_floating_point):
            found = torch.float32
        elif found is None or found == torch.bool:
            found = torch.int64
    return torch.bool if found is None else found


def _floating(*args: Value) -> torch.dtype:
    found = _dtype(*args)
    return found if found.is_floating_point else torch.float32


def _note(op: str, args: Sequence[Value], dtype: torch.dtype, result: torch.dtype | None = None) -> Symbol:
    """Note an operation on arguments converted to one dtype; half precision is computed in float32."""
    program = program_of(args)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    made = program.note(op, [convert(x, wide, program) for x in args], wide if result is None else result)
    return made if wide == dtype or result is not None else program.note("to", (made,), dtype)


_OF_BOOLS = {"add": "or", "mul": "and", "minimum": "and", "maximum": "or", "and": "and", "or": "or", "xor": "xor"}
"""Logical operations that torch's arithmetic on two bools is; sums of a GPU's single bits would carry over."""


def _binary(op: str) -> Callable[..., Symbol]:
    def combine(a: Value, b: Value) -> Symbol:
        dtype = _dtype(a, b)
        if dtype != torch.bool:
            return _note(op, (a, b), dtype)
        if op not in _OF_BOOLS:
            refuse(f"it calls {op} on bools")
        return _note(_OF_BOOLS[op], (a, b), dtype)

    return combine


def _compare(op: str) -> Callable[..., Symbol]:
    return lambda a, b: _note(op, (a, b), _dtype(a, b), torch.bool)


def _unary(op: str) -> Callable[..., Value]:
    return lambda x: _note(op, (x,), _floating(x))


def _logical(op: str) -> Callable[..., Symbol]:
    def combine(*args: Value) -> Symbol:
        return _note(op, [to_dtype(x, torch.bool) if isinstance(x, Symbol) else bool(x) for x in args], torch.bool)

    return combine


def where(condition: Value, a: Value, b: Value) -> Value:
    """``torch.where`` of three arguments."""
    program, dtype = program_of((condition, a, b)), _dtype(a, b)
    return program.note("where", (condition, convert(a, dtype, program), convert(b, dtype, program)), dtype)


def clamp(x: Symbol, min: Value | None = None, max: Value | None = None) -> Symbol:
    """``torch.clamp``, whose derivative at a bound is 1."""
    for op, bound in (("clamp_min", min), ("clamp_max", max)):
        x = x if bound is None else _note(op, (x, bound), _dtype(x, bound))
    return x


def _relu(x: Symbol) -> Symbol:
    return _note("relu", (x, 0.0), x.dtype) if x.dtype.is_floating_point else _maximum(x, 0)


def _detach(x: Symbol) -> Symbol:
    """``Tensor.detach``: the same number without a derivative."""
    return _note("detach", (x,), x.dtype) if x.dtype.is_floating_point else x


def to_dtype(x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
    """``Tensor.to``, of which only the dtype matters."""
    if any(isinstance(a, str) and "Tensor" in a for a in args):
        refuse("it names a dtype by a string")
    dtypes = [getattr(a, "dtype", a) for a in (*args, *kwargs.values())]
    dtype = next((a for a in dtypes if isinstance(a, torch.dtype)), None)
    return x if dtype is None else convert(x, dtype, x.program)


def _fill(x: Symbol, value: Value, dtype: torch.dtype | None = None, **_: Any) -> Symbol:
    return x.program.note("full", (value,), x.dtype if dtype is None else dtype)


def _divide(a: Value, b: Value, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return _floor_divide(a, b)
    if rounding_mode is not None:
        refuse(f"it divides with rounding_mode={rounding_mode!r}")
    return _note("div", (a, b), _floating(a, b))


def _floor_divide(a: Value, b: Value) -> Value:
    dtype = _dtype(a, b)
    return _note("floordiv", (a, b), dtype) if not dtype.is_floating_point else _floor(_divide(a, b))


def _remainder(a: Value, b: Value) -> Symbol:
    return a - _floor_divide(a, b) * b


def _power(x: Value, exponent: Value) -> Symbol:
    if not isinstance(x, Symbol) or not isinstance(exponent, (int, float)):
        refuse("it takes a power that is not a plain number")
    if exponent == 0.5:
        return _unary("sqrt")(x)
    if exponent != int(exponent) or not 1 <= exponent <= POWERS:
        refuse(f"it takes the power {exponent}, and only 0.5 and 1 to {POWERS} are known here")
    result: Value = x
    for _ in range(int(exponent) - 1):
        result = result * x
    return result


def _abs(x: Symbol) -> Symbol:
    return _note("abs", (x,), x.dtype)


def _negative(x: Symbol) -> Symbol:
    if x.dtype == torch.bool:
        refuse("it calls neg on bools")
    return _note("neg", (x,), x.dtype)


def _not(x: Symbol) -> Symbol:
    if x.dtype != torch.bool:
        refuse("it inverts bits")
    return _note("not", (x,), torch.bool)


def _shift_right(x: Value, by: Value) -> Symbol:
    if not isinstance(x, Symbol) or x.dtype == torch.bool or x.dtype.is_floating_point:
        refuse("it shifts something else than a whole number")
    if isinstance(by, Symbol) or not 0 <= by < x.dtype.itemsize * 8:
        refuse(f"it shifts {x.dtype} by something else than a plain number of 0 to {x.dtype.itemsize * 8 - 1} bits")
    return _note("rshift", (x, by), x.dtype)


def sign(x: Value) -> Symbol:
    """``torch.sign``, which is 0 of NaN."""
    one = 1.0 if x.dtype.is_floating_point else 1
    return where(x > 0, one, where(x < 0, -one, one - one))


def _bucketize(x: Symbol, boundaries: Any, *, right: bool = False) -> Symbol:
    if not right or not isinstance(boundaries, Tensor) or boundaries.ndim != 1:
        refuse("it calls bucketize, of which only right=True with a 1-D tensor is known here")
    program, count = x.program, boundaries.shape[0]
    wanted = convert(x, boundaries.dtype, program)
    bits = program.number(count.bit_length())
    boundaries = boundaries if boundaries.is_contiguous() else boundaries.contiguous()  # read without strides
    return program.note("bucketize", (program.capture(boundaries), wanted, program.number(count), bits), torch.int32)


_minimum, _maximum, _floor = _binary("minimum"), _binary("maximum"), _unary("floor")
exp = _unary("exp")
"""``torch.exp``."""
sin = _unary("sin")
"""``torch.sin``."""
cos = _unary("cos")
"""``torch.cos``."""


def _silu(x: Value, inplace: bool = False) -> Symbol:
    return x * _unary("sigmoid")(x)


def _gelu(x: Value, approximate: str = "none") -> Symbol:
    """``torch.nn.functional.gelu``: x times the normal distribution's function, or a usual approximation of it."""
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + _unary("tanh")(inner))
    return 0.5 * x * (1.0 + _unary("erf")(x * math.sqrt(0.5)))


_TABLE: dict[str, Callable[..., Any]] = {
    **{name: _binary(name) for name in ("add", "sub", "mul", "and", "or", "xor")},
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _unary(name) for name in ("exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid")},
    **{name: _unary(name) for name in ("erf", "ceil")},
    **{f"logical_{name}": _logical(name) for name in ("and", "or", "xor", "not")},
    "exp": exp,
    "sin": sin,
    "cos": cos,
    "floor": _floor,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": where,
    "clamp": clamp,
    "div": _divide,
    "floordiv": _floor_divide,
    "mod": _remainder,
    "pow": _power,
    "abs": _abs,
    "neg": _negative,
    "invert": _not,
    "rshift": _shift_right,
    "sign": sign,
    "bucketize": _bucketize,
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "square": lambda x: x * x,
    "reciprocal": lambda x: _divide(1.0, x),
    "to": to_dtype,
    "zeros_like": lambda x, **kwargs: _fill(x, 0, **kwargs),
    "ones_like": lambda x, **kwargs: _fill(x, 1, **kwargs),
    "full_like": _fill,
    "detach": _detach,
    "clone": lambda x: x,
    "float": lambda x: to_dtype(x, torch.float32),
    "double": lambda x: to_dtype(x, torch.float64),
    "int": lambda x: to_dtype(x, torch.int32),
    "long": lambda x: to_dtype(x, torch.int64),
    "bool": lambda x: to_dtype(x, torch.bool),
}

_SAME = {
    "subtract": "sub",
    "multiply": "mul",
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "invert",
    "bitwise_right_shift": "rshift",
    "min": "minimum",
    "max": "maximum",
    "clip": "clamp",
    "absolute": "abs",
    "negative": "neg",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "type": "to",
}
_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")


def _swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(b, a)


def _functions() -> dict[str, Callable[..., Any]]:
    found = {**_TABLE, **{name: _TABLE[same] for name, same in _SAME.items()}}
    return {**found, **{f"r{name}": _swapped(found[name]) for name in _REFLECTED}}


FUNCTIONS = _functions()
"""Implementations on symbols, by the name of a function, method or operator."""

NAMES: dict[Any, str] = {
    function: name
    for name in FUNCTIONS
    for holder in (torch, torch.Tensor, torch.special, torch.nn.functional)
    for function in (getattr(holder, name, None), getattr(holder, f"__{name}__", None))
    if function is not None
}
"""Names in `FUNCTIONS` of torch's function objects."""
