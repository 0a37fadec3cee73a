"""Calls of a compiled unit: its arguments as the structures of ``kernels/call.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError
from flexjag.kernels.cpp.build import load
from flexjag.kernels.cpp.openmp import threads
from flexjag.kernels.cpp.units import heading

MOST_SPANS = 16
"""Spans of a query row, at most; as in ``kernels/call.h``."""

UNBOUNDED = 2**31 - 1
"""Bound of a window that leaves all keys on its side; as in ``kernels/call.h``."""

STATUS = {1: "offsets must rise from at least 0 to at most the number of rows"}


class _Rows(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class SpanRows(ctypes.Structure):
    """Keys that queries may attend: spans per query, or a window. It is the structure of ``kernels/call.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lo", "hi")),
        *((name, ctypes.c_int64) for name in ("count", "left", "right", "from_end")),
    )

    @classmethod
    def of(cls, lo: Tensor, hi: Tensor) -> SpanRows:
        """Spans ``[K, T_q]``, which the caller keeps."""
        return cls(lo=lo.data_ptr(), hi=hi.data_ptr(), count=lo.shape[0])


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "grad_lse", "q_offsets", "kv_offsets")),
        ("outer", ctypes.POINTER(SpanRows)),
        ("inner", ctypes.POINTER(SpanRows)),
        *((name, ctypes.c_void_p) for name in ("mask_of", "captures", "numbers", "totals", "total_sizes")),
        *((x, ctypes.c_int64) for x in ("segments", "num_q", "num_kv", "heads", "groups", "num_learned", "threads")),
        ("scale", ctypes.c_double),
        ("factor", ctypes.c_double),
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """What a call computes on, besides its inputs and results.

    Attributes:
        source: The printed functions.
        captures: Tensors that they read.
        learned: Indices of the captures that need gradients.
        numbers: Integers that they read.
        offsets: ``[S+1]`` int32, of queries and of keys.
        spans: Per distinct mask: starts and ends of the outer spans, then of the inner ones, each ``[K, T_q]`` int32.
        window: In place of `spans`, for a mask of all heads that is a sliding window: the number of keys on the left
            and on the right of the diagonal (:data:`UNBOUNDED`: all), and 1 if the diagonal ends at the last key.
        mask_of: ``[H]`` int32, the mask of each head; None for the first.
        scale: Factor on ``q·k``.
        factor: Factor on the output, without a softmax.
        unshared: Those of the `learned` ones of which no two segments or heads read the same entry.
    """

    source: str
    captures: Sequence[Tensor]
    learned: Sequence[int]
    numbers: Sequence[int]
    offsets: Sequence[Tensor]
    spans: Sequence[Tensor]
    window: Sequence[int]
    mask_of: Tensor | None
    scale: float
    factor: float
    unshared: Sequence[int]


@lru_cache(maxsize=1024)
def unit(source: str, dtype: torch.dtype, dim: int, value_dim: int) -> str:
    """The translation unit of printed functions for a dtype and the sizes D and E."""
    sizes = f"constexpr int D = {dim}, E = {value_dim};\n"
    call = f'#include "backends/cpp/kernels/call.h"\n\nnamespace flexjag {{\n{source}}}\n'
    return f'{heading(dtype, sizes)}{call}\n#include "backends/cpp/kernels/entry.h"\n'


def run(entry: str, problem: Problem, num_heads: tuple[int, int], tensors: dict[str, Tensor | None]) -> list[Tensor]:
    """Call ``attend`` or ``differentiate`` of a unit.

    Args:
        entry: Name of the function.
        problem: The call's other arguments.
        num_heads: H and G.
        tensors: ``[T, heads, columns]`` by name, as in ``kernels/call.h``, and ``lse``, ``grad_lse`` ``[H, T_q]``.

    Returns:
        The gradients of the learned captures, in float64; none for ``attend``.

    Raises:
        LayoutError: If the offsets are none.
    """
    q, k, v = (tensors[x] for x in ("q", "k", "v"))
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    library = load(unit(problem.source, q.dtype, q.shape[2], v.shape[2]))
    # Everything that the kernel reads is kept by a name here until it returns.
    captures = list(problem.captures)
    spans = [x.contiguous() for x in problem.spans]
    assert all(x.shape[0] <= MOST_SPANS for x in spans), "lowering makes fewer spans"  # the kernels have room for these
    offsets = [x.contiguous() for x in problem.offsets]
    learned = list(problem.learned) if entry == "differentiate" else []
    totals = [captures[i].new_zeros(captures[i].numel(), dtype=torch.float64) for i in learned]
    shared = [0 if i in problem.unshared else captures[i].numel() for i in learned]
    if problem.window:
        left, right, from_end = problem.window
        sides = [(SpanRows * 1)(SpanRows(count=1, left=left, right=right, from_end=from_end))] * 2
    else:
        sides = [_spans(spans[i::4], spans[i + 1 :: 4]) for i in (0, 2)]
    arrays = (
        (ctypes.c_void_p * max(1, len(captures)))(*[x.data_ptr() for x in captures]),
        (ctypes.c_int64 * max(1, len(problem.numbers)))(*problem.numbers),
        (ctypes.c_void_p * max(1, len(totals)))(*[x.data_ptr() for x in totals]),
        (ctypes.c_int64 * max(1, len(totals)))(*shared),
    )
    call = _Call(
        **{name: _rows(x) for name, x in tensors.items() if x is not None and "lse" not in name},
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None and "lse" in name},
        q_offsets=offsets[0].data_ptr(),
        kv_offsets=offsets[1].data_ptr(),
        outer=sides[0],
        inner=sides[1],
        mask_of=None if problem.mask_of is None else problem.mask_of.data_ptr(),
        **{name: ctypes.addressof(x) for name, x in zip(_ARRAYS, arrays, strict=True)},
        segments=offsets[0].shape[0] - 1,
        num_q=q.shape[0],
        num_kv=k.shape[0],
        heads=num_heads[0],
        groups=num_heads[1],
        num_learned=len(totals),
        threads=threads(),
        scale=problem.scale,
        factor=problem.factor,
    )
    status = getattr(library, entry)(ctypes.byref(call))
    if status:
        raise LayoutError(f"offsets: {STATUS[status]}")
    return [x.view(captures[i].shape) for x, i in zip(totals, learned, strict=True)]


_ARRAYS = ("captures", "numbers", "totals", "total_sizes")


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _spans(lo: Sequence[Tensor], hi: Sequence[Tensor]) -> Any:
    return (SpanRows * len(lo))(*[SpanRows.of(a, b) for a, b in zip(lo, hi, strict=True)])
