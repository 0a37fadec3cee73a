"""Forward-mode derivatives of a program, as further lines of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexjag.printing.program import Instruction, Program, Symbol, Value, convert
from flexjag.printing.torch_table import cos, exp, sign, sin, where


def _halved(wins: Value, ties: Value) -> Symbol:
    """Derivative of a maximum or minimum by one argument: 1 where it wins, 1/2 in a tie, else 0."""
    return where(ties, 0.5, where(wins, 1.0, 0.0))


_SLOPES: dict[str, Callable[..., tuple[Value | None, ...]]] = {
    "add": lambda y, a, b: (1.0, 1.0),
    "sub": lambda y, a, b: (1.0, -1.0),
    "mul": lambda y, a, b: (b, a),
    "div": lambda y, a, b: (1.0 / b, -1.0 * y / b),
    "minimum": lambda y, a, b: (_halved(y < b, a == b), _halved(y < a, a == b)),
    "maximum": lambda y, a, b: (_halved(y > b, a == b), _halved(y > a, a == b)),
    "clamp_min": lambda y, x, bound: (where(x >= bound, 1.0, 0.0), where(x < bound, 1.0, 0.0)),
    "clamp_max": lambda y, x, bound: (where(x <= bound, 1.0, 0.0), where(x > bound, 1.0, 0.0)),
    "relu": lambda y, x, zero: (where(x > 0, 1.0, 0.0), None),
    "neg": lambda y, x: (-1.0,),
    "abs": lambda y, x: (sign(x),),
    "exp": lambda y, x: (y,),
    "exp2": lambda y, x: (y * math.log(2),),
    "log": lambda y, x: (1.0 / x,),
    "log2": lambda y, x: (1 / math.log(2) / x,),
    "sqrt": lambda y, x: (0.5 / y,),
    "rsqrt": lambda y, x: (-0.5 * y / x,),
    "tanh": lambda y, x: (1.0 - y * y,),
    "sigmoid": lambda y, x: (y * (1.0 - y),),
    "sin": lambda y, x: (cos(x),),
    "cos": lambda y, x: (-1.0 * sin(x),),
    "erf": lambda y, x: (exp(-1.0 * x * x) * (2 / math.sqrt(math.pi)),),
}
"""Derivatives of an operation's result y by each of its arguments. An operation that is not listed has 0."""


def times(a: Value, b: Value) -> Value:
    """The product ``a * b``, without a line for a factor of 1."""
    if isinstance(a, float) and a == 1.0:
        return b
    return a if isinstance(b, float) and b == 1.0 else a * b


def _chosen(program: Program, line: Instruction, given: Sequence[Value | None]) -> Symbol:
    """Derivative of a ``where``, in its dtype also where both choices are plain numbers."""
    dtype = line.result.dtype
    a, b = (0.0 if x is None else convert(x, dtype, program) for x in given[1:])
    if not isinstance(a, Symbol) and not isinstance(b, Symbol):  # of two numbers, torch.where is float32
        a = program.note("full", (a,), dtype)
    return where(line.args[0], a, b)


def derivative(program: Program, result: Symbol, by: Symbol) -> Value:
    """Derivative of a result by an argument, a symbol or a number; its lines are added to the program."""
    slopes: dict[str, Value] = {by.name: 1.0}
    for line in list(program.lines):
        y = line.result
        given = [slopes.get(x.name) if isinstance(x, Symbol) else None for x in line.args]
        if all(x is None for x in given) or not y.dtype.is_floating_point:
            continue
        if line.op == "where":
            slopes[y.name] = _chosen(program, line, given)
        elif line.op == "to":
            slopes[y.name] = given[0]
        elif line.op in _SLOPES:
            total: Value = None
            for inner, outer in zip(given, _SLOPES[line.op](y, *line.args), strict=True):
                if inner is not None:
                    part = times(inner, convert(outer, y.dtype, program))
                    total = part if total is None else total + part
            slopes[y.name] = total
    return slopes.get(result.name, 0.0)
