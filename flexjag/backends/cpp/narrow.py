"""Spans of a mask that a predicate decides, found by its printed function: once per plan, for all heads and layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from flexjag.backends.cpp.library import SpanRows
from flexjag.backends.printed import Printed
from flexjag.kernels.cpp.openmp import threads
from flexjag.lowering.spans import MAX_SPANS, Spans


class _Narrowing(ctypes.Structure):
    """``Narrowing`` of ``kernels/narrow.h``."""

    _fields_ = (
        ("outer", SpanRows),
        *((name, ctypes.c_void_p) for name in ("captures", "numbers", "head", "lo", "hi", "inner_hi")),
        *((name, ctypes.c_int64) for name in ("num_q", "num_kv", "heads", "threads", "most", "joined")),
    )


Sides = tuple[Spans, Spans]
"""Outer and inner spans."""


def narrowed(library: Any, printed: Printed, bounds: Spans, num_kv: int, heads: Sequence[int]) -> list[Sides]:
    """Evaluate a plan's mask inside of bounds, on as many threads as attention takes.

    Args:
        library: The loaded unit of the printed functions.
        printed: The functions, and what they read.
        bounds: Spans ``[K, T_q]`` that hold all keys.
        num_kv: T_kv.
        heads: Heads to evaluate it for.

    Returns:
        For each of the heads, the outer and the inner spans: at most :data:`~flexjag.lowering.spans.MAX_SPANS` of each
        query, which hold all of its keys and none out of bounds, and those of them that hold no others. They are one
        object for heads whose mask is its spans. Where there would be more spans, those in one bound with the least
        gaps between them are joined.
    """
    assert bounds.count <= MAX_SPANS, "lowering makes fewer spans"  # the kernel has room for these
    num_q = bounds.lo.shape[1]
    outer_lo, outer_hi = bounds.lo.contiguous(), bounds.hi.contiguous()
    lo, hi, inner_hi = outer_lo.new_empty(3, len(heads), MAX_SPANS, num_q).unbind()
    captures = (ctypes.c_void_p * max(1, len(printed.captures)))(*[x.data_ptr() for x in printed.captures])
    numbers = (ctypes.c_int64 * max(1, len(printed.numbers)))(*printed.numbers)
    head = (ctypes.c_int32 * len(heads))(*heads)
    call = _Narrowing(
        outer=SpanRows.of(outer_lo, outer_hi),
        captures=ctypes.addressof(captures),
        numbers=ctypes.addressof(numbers),
        head=ctypes.addressof(head),
        **{name: x.data_ptr() for name, x in (("lo", lo), ("hi", hi), ("inner_hi", inner_hi))},
        num_q=num_q,
        num_kv=num_kv,
        heads=len(heads),
        threads=threads(),
    )
    library.narrow(ctypes.byref(call))
    most = max(1, call.most)

    found = []
    for a, b, c in zip(lo, hi, inner_hi, strict=True):
        outer = Spans(a[:most].clone(), b[:most].clone())
        found.append((outer, Spans(outer.lo, c[:most].clone()) if call.joined else outer))
    return found
