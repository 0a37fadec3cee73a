"""Triton functions that printed masks and scores call: torch's arithmetic where Triton's own differs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit
""":func:`triton.jit` without its type, by which kernels never return."""


@jit
def floor_divide(a, b):
    """Quotient of integers rounded down, as in Python."""
    quotient = a // b
    rest = a - quotient * b
    return quotient - ((rest != 0) & ((rest < 0) != (b < 0))).to(quotient.dtype)


@jit
def sigmoid(x):
    """Logistic function ``1 / (1 + exp(-x))``."""
    return 1 / (1 + tl.exp(-x))


@jit
def tanh(x):
    """Hyperbolic tangent, accurate to a few roundings; for small arguments by a series of odd powers."""
    size = tl.abs(x)
    square = tl.minimum(size, 0.35) * tl.minimum(size, 0.35)
    series = 62 / 2835 + square * (-1382 / 155925 + square * (21844 / 6081075))
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * series)))
    large = 1 - 2 / (1 + tl.exp(2 * size))
    return tl.where(size < 0.35, x * series, tl.where(x < 0, -large, tl.where(x > 0, large, x)))


@jit
def bucketize(x, boundaries, count, steps):
    """Number of the first `count` boundaries, ascending, that are at most x; `steps` is the bit length of `count`."""
    found = (x * 0).to(tl.int32)
    for step in range(steps):
        reach = found + (1 << (steps - 1 - step))
        entry = tl.load(boundaries + tl.minimum(reach, count) - 1)
        found = tl.where((reach <= count) & (entry <= x), reach, found)
    return found
