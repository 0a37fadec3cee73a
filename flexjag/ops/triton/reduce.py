"""Softmax and reductions along the tokens of segments, and along either side of packed matrices, with Triton."""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl
from torch import Tensor

from flexjag.ops.matrices import matrix_offsets
from flexjag.ops.triton.common import TILE, ceil_div, has_kernel, jit, launch, power_of_2, span_of


@jit
def lines_of(starts, kept, reduced, columns, FORM: tl.constexpr):
    """Start, number, length and two strides of the lines to reduce in this program's segment.

    FORM "tokens": one line per column of ``[T, columns]``, along the tokens. "rows" and "columns": the rows or the
    columns of a packed matrix.
    """
    segment = tl.program_id(0).to(tl.int64)
    start, length = span_of(reduced, segment)
    if FORM == "tokens":
        start *= columns
        count = columns
    else:
        start = tl.load(starts + segment).to(tl.int64)
        _, count = span_of(kept, segment)
    stride = length if FORM == "rows" else 1
    step = 1 if FORM == "rows" else count
    return start, count, length, stride, step


@jit
def softmax_lines(
    values,
    out,
    starts,
    kept,
    reduced,
    columns,
    FORM: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Softmax along every line. The first loop finds maximum and sum, the second reads again, mostly from L2."""
    start, count, length, stride, step = lines_of(starts, kept, reduced, columns, FORM)
    within = tl.arange(0, BLOCK_LENGTH)
    for first in range(tl.program_id(1) * BLOCK_LINES, count, tl.num_programs(1) * BLOCK_LINES):
        line = first + tl.arange(0, BLOCK_LINES)
        base = start + line.to(tl.int64)[None, :] * stride
        largest = tl.full((BLOCK_LINES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_LINES,), tl.float32)
        for begin in range(0, length, BLOCK_LENGTH):
            at = (begin + within).to(tl.int64)[:, None]
            mask = (at < length) & (line < count)[None, :]
            x = tl.load(values + base + at * step, mask=mask, other=float("-inf")).to(tl.float32)
            top = tl.maximum(largest, tl.max(x, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
            largest = top
        for begin in range(0, length, BLOCK_LENGTH):
            at = (begin + within).to(tl.int64)[:, None]
            mask = (at < length) & (line < count)[None, :]
            x = tl.load(values + base + at * step, mask=mask, other=0).to(tl.float32)
            y = tl.exp(x - largest[None, :]) / total[None, :]
            tl.store(out + base + at * step, y.to(out.dtype.element_ty), mask=mask)


@jit
def softmax_lines_backward(
    grad,
    out,
    result,
    starts,
    kept,
    reduced,
    columns,
    FORM: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Gradient of a softmax along every line: y (g - sum of g y)."""
    start, count, length, stride, step = lines_of(starts, kept, reduced, columns, FORM)
    within = tl.arange(0, BLOCK_LENGTH)
    for first in range(tl.program_id(1) * BLOCK_LINES, count, tl.num_programs(1) * BLOCK_LINES):
        line = first + tl.arange(0, BLOCK_LINES)
        base = start + line.to(tl.int64)[None, :] * stride
        total = tl.zeros((BLOCK_LENGTH, BLOCK_LINES), tl.float32)
        for begin in range(0, length, BLOCK_LENGTH):
            at = (begin + within).to(tl.int64)[:, None]
            mask = (at < length) & (line < count)[None, :]
            g = tl.load(grad + base + at * step, mask=mask, other=0).to(tl.float32)
            total += g * tl.load(out + base + at * step, mask=mask, other=0).to(tl.float32)
        inner = tl.sum(total, 0)[None, :]
        for begin in range(0, length, BLOCK_LENGTH):
            at = (begin + within).to(tl.int64)[:, None]
            mask = (at < length) & (line < count)[None, :]
            g = tl.load(grad + base + at * step, mask=mask, other=0).to(tl.float32)
            y = tl.load(out + base + at * step, mask=mask, other=0).to(tl.float32)
            tl.store(result + base + at * step, (y * (g - inner)).to(result.dtype.element_ty), mask=mask)


@jit
def reduce_segments(
    values,
    out,
    offsets,
    columns,
    fill,
    KIND: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Reduce the tokens of each segment by KIND "sum", "max" or "min"; `fill` for an empty one. NaN is propagated."""
    segment = tl.program_id(0).to(tl.int64)
    start, length = span_of(offsets, segment)
    column = tl.program_id(1) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    inside = column < columns
    within = tl.arange(0, BLOCK_LENGTH)
    neutral = 0.0 if KIND == "sum" else float("-inf") if KIND == "max" else float("inf")
    best = tl.full((BLOCK_LENGTH, BLOCK_LINES), neutral, tl.float32)
    strange = tl.zeros((BLOCK_LENGTH, BLOCK_LINES), tl.int32)
    for begin in range(0, length, BLOCK_LENGTH):
        row = begin + within
        mask = (row < length)[:, None] & inside[None, :]
        at = (start + row)[:, None] * columns + column[None, :]
        x = tl.load(values + at, mask=mask, other=neutral).to(tl.float32)
        if KIND == "sum":
            best += x
        else:
            strange |= (x != x).to(tl.int32)
            best = tl.maximum(best, x) if KIND == "max" else tl.minimum(best, x)
    if KIND == "sum":
        found = tl.sum(best, 0)
    else:
        found = tl.max(best, 0) if KIND == "max" else tl.min(best, 0)
        found = tl.where(tl.max(strange, 0) > 0, float("nan"), found)
    found = tl.where(length > 0, found, fill)
    tl.store(out + segment * columns + column, found.to(out.dtype.element_ty), mask=inside)


@jit
def share_extreme(
    grad,
    values,
    out,
    result,
    offsets,
    columns,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Gradient of a maximum or minimum: that of each segment's row, divided among the tokens equal to it."""
    segment = tl.program_id(0).to(tl.int64)
    start, length = span_of(offsets, segment)
    column = tl.program_id(1) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    inside = column < columns
    within = tl.arange(0, BLOCK_LENGTH)
    y = tl.load(out + segment * columns + column, mask=inside, other=0).to(tl.float32)[None, :]
    g = tl.load(grad + segment * columns + column, mask=inside, other=0).to(tl.float32)
    hits = tl.zeros((BLOCK_LENGTH, BLOCK_LINES), tl.float32)
    for begin in range(0, length, BLOCK_LENGTH):
        row = begin + within
        mask = (row < length)[:, None] & inside[None, :]
        x = tl.load(values + (start + row)[:, None] * columns + column[None, :], mask=mask, other=0).to(tl.float32)
        hits += (((x == y) | ((x != x) & (y != y))) & mask).to(tl.float32)
    share = (g / tl.maximum(tl.sum(hits, 0), 1.0))[None, :]
    for begin in range(0, length, BLOCK_LENGTH):
        row = begin + within
        mask = (row < length)[:, None] & inside[None, :]
        at = (start + row)[:, None] * columns + column[None, :]
        x = tl.load(values + at, mask=mask, other=0).to(tl.float32)
        is_hit = (x == y) | ((x != x) & (y != y))
        tl.store(result + at, tl.where(is_hit, share, 0.0).to(result.dtype.element_ty), mask=mask)


def _blocks(columns: int) -> dict[str, int]:
    wide = power_of_2(columns, high=32)
    return {"BLOCK_LINES": wide, "BLOCK_LENGTH": min(TILE // wide, 1024)}


MATRIX_BLOCKS = {"rows": {"BLOCK_LINES": 16, "BLOCK_LENGTH": 128}, "columns": {"BLOCK_LINES": 32, "BLOCK_LENGTH": 64}}


def _over_tokens(kernel: Any, tensors: dict[str, Tensor], offsets: Tensor) -> None:
    """Launch a softmax kernel over the tokens of each segment of ``[T, ...]``."""
    columns = next(iter(tensors.values())).shape[1:].numel()
    blocks = _blocks(columns)
    arguments = {**tensors, "starts": offsets, "kept": offsets, "reduced": offsets, "columns": columns}
    launch(kernel, (offsets.shape[0] - 1, ceil_div(columns, blocks["BLOCK_LINES"])), arguments, FORM="tokens", **blocks)


def _over_matrices(kernel: Any, tensors: dict[str, Tensor], rows: Tensor, columns: Tensor, dim: int) -> None:
    """Launch a softmax kernel along dimension `dim` of packed matrices.

    The largest matrix is not known without a sync, so the programs per matrix are chosen for the mean size.
    """
    num_segments = rows.shape[0] - 1
    kept, reduced, form = (rows, columns, "rows") if dim == 1 else (columns, rows, "columns")
    blocks = MATRIX_BLOCKS[form]
    side = math.isqrt(next(iter(tensors.values())).shape[0] // max(num_segments, 1))
    sharing = power_of_2(ceil_div(side, blocks["BLOCK_LINES"]), high=64)
    arguments = {**tensors, "starts": matrix_offsets(rows, columns), "kept": kept, "reduced": reduced, "columns": 1}
    launch(kernel, (num_segments, sharing), arguments, FORM=form, **blocks)


def _over_segments(kernel: Any, tensors: dict[str, Tensor], offsets: Tensor, **more: Any) -> None:
    """Launch a reduction kernel over the tokens of each segment; the last tensor has the columns."""
    columns = next(reversed(tensors.values())).shape[1:].numel()
    blocks = _blocks(columns)
    grid = offsets.shape[0] - 1, ceil_div(columns, blocks["BLOCK_LINES"])
    constants = {name: more.pop(name) for name in list(more) if name.isupper()}
    launch(kernel, grid, {**tensors, "offsets": offsets, "columns": columns, **more}, **constants, **blocks)


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.softmax`."""
    if not has_kernel(values):
        return NotImplemented
    out = values.new_empty(values.shape)
    _over_tokens(softmax_lines, {"values": values.contiguous(), "out": out}, offsets)
    return out


def segment_softmax_backward(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.softmax`."""
    if not has_kernel(grad, out):
        return NotImplemented
    result = out.new_empty(out.shape)
    tensors = {"grad": grad.contiguous(), "out": out.contiguous(), "result": result}
    _over_tokens(softmax_lines_backward, tensors, offsets)
    return result


def matrix_softmax(matrices: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """See :mod:`flexjag.ops.matrices`."""
    if not has_kernel(matrices):
        return NotImplemented
    out = matrices.new_empty(matrices.shape)
    _over_matrices(softmax_lines, {"values": matrices.contiguous(), "out": out}, rows, columns, dim)
    return out


def matrix_softmax_backward(grad: Tensor, out: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """See :mod:`flexjag.ops.matrices`."""
    if not has_kernel(grad, out):
        return NotImplemented
    result = out.new_empty(out.shape)
    tensors = {"grad": grad.contiguous(), "out": out.contiguous(), "result": result}
    _over_matrices(softmax_lines_backward, tensors, rows, columns, dim)
    return result


def add_up(values: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.segment`."""
    if not has_kernel(values):
        return NotImplemented
    out = values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))
    _over_segments(reduce_segments, {"values": values.contiguous(), "out": out}, offsets, fill=0.0, KIND="sum")
    return out


def extreme(values: Tensor, offsets: Tensor, largest: bool, fill: float) -> Tensor:
    """See :mod:`flexjag.ops.segment`."""
    if not has_kernel(values):
        return NotImplemented
    out = values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))
    tensors = {"values": values.contiguous(), "out": out}
    _over_segments(reduce_segments, tensors, offsets, fill=float(fill), KIND="max" if largest else "min")
    return out


def extreme_backward(grad: Tensor, values: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.segment`."""
    if not has_kernel(grad, values, out):
        return NotImplemented
    result = values.new_empty(values.shape)
    tensors = {"grad": grad.contiguous(), "values": values.contiguous(), "out": out.contiguous(), "result": result}
    _over_segments(share_extreme, tensors, offsets)
    return result
