"""Copies of rows between packed and padded batches, and between segments, with Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flexjag.ops.select import joined_starts
from flexjag.ops.triton.common import (
    LIMIT,
    TILE,
    ceil_div,
    count_upto,
    has_kernel,
    is_countable,
    jit,
    launch,
    power_of_2,
    search,
)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype to copy rows as, by item size in bytes, so that the bits are preserved."""


@jit(do_not_specialize=["rows", "num_segments", "steps", "fill"])
def move_rows(
    source,
    factor,
    out,
    offsets,
    starts,
    rows,
    columns,
    size,
    num_segments,
    steps,
    fill,
    FORM: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy rows between two layouts: a program iterates over rows of one and computes their index in the other.

    FORM "pad" iterates over the rows of ``[S, size]`` and reads packed rows. The others iterate over packed rows:
    "unpad" reads ``[S, size]``, "spread" reads one row per segment, "take" reads and "place" writes the range of rows
    from ``starts[s]``. TIMES multiplies by the row of `factor` at the index read ("source") or iterated over ("row").
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = row < rows
    if FORM == "pad":
        segment = row // size
        position = row % size
    else:
        segment = count_upto(offsets, num_segments, steps, row, 0) - 1
        position = (row - tl.load(offsets + segment, mask=here, other=0)).to(tl.int32)
    if FORM == "spread":
        other = segment.to(tl.int64)
        there = here
    elif FORM == "unpad":
        other = segment.to(tl.int64) * size + position
        there = here & (position < size)
    else:
        start = tl.load(offsets + segment, mask=here, other=0).to(tl.int64)
        end = tl.load(offsets + segment + 1, mask=here, other=0).to(tl.int64)
        there = here & (position < end - start)
        if FORM == "pad":
            other = start + position
        else:
            other = tl.load(starts + segment, mask=here, other=0).to(tl.int64) + position
    inside = (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    at_other = other[:, None] * columns + column[None, :]
    if FORM == "place":
        tl.store(out + at_other, tl.load(source + at, mask=there[:, None] & inside), mask=there[:, None] & inside)
    else:
        nothing = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), fill, out.dtype.element_ty)
        value = tl.load(source + at_other, mask=there[:, None] & inside, other=0)
        if TIMES == "source":
            by = tl.load(factor + at_other, mask=there[:, None] & inside, other=0)
            value = (value.to(tl.float32) * by.to(tl.float32)).to(out.dtype.element_ty)
        elif TIMES == "row":
            by = tl.load(factor + at, mask=there[:, None] & inside, other=0)
            value = (value.to(tl.float32) * by.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + at, tl.where(there[:, None], value, nothing), mask=here[:, None] & inside)


@jit(do_not_specialize=["rows", "num_ranges", "steps"])
def sum_ranges(
    pieces,
    out,
    starts,
    order,
    ends,
    offsets,
    rows,
    columns,
    num_ranges,
    steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum at each row all ranges that cover it. Ranges are sorted by start; `ends` is the running maximum of ends."""
    first = tl.program_id(0) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (column < columns)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    low = count_upto(ends, num_ranges, steps, first, 0)
    high = count_upto(starts, num_ranges, steps, tl.minimum(first + BLOCK_ROWS, rows) - 1, 0)
    for at in range(low, high):
        begin = tl.load(starts + at).to(tl.int32)
        which = tl.load(order + at)
        source = tl.load(offsets + which).to(tl.int64)
        length = tl.load(offsets + which + 1).to(tl.int64) - source
        position = row - begin
        there = ((position >= 0) & (position < length))[:, None] & inside
        total += tl.load(pieces + (source + position)[:, None] * columns + column[None, :], mask=there, other=0).to(
            tl.float32
        )
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside)


def _blocks(columns: int) -> dict[str, int]:
    wide = power_of_2(columns, high=256)
    return {"BLOCK_ROWS": min(TILE // wide, 256), "BLOCK_COLUMNS": wide}


def _grid(rows: int, columns: int, blocks: dict[str, int]) -> tuple[int, int]:
    return ceil_div(rows, blocks["BLOCK_ROWS"]), ceil_div(columns, blocks["BLOCK_COLUMNS"])


def _bits(value: float, dtype: torch.dtype) -> int:
    """Integer with the same bits as a number of this dtype."""
    return int(torch.full((1,), value, dtype=dtype).view(BITS[dtype.itemsize]))


def _move(
    source: Tensor,
    out: Tensor,
    offsets: Tensor,
    form: str,
    *,
    rows: int,
    size: int = 0,
    starts: Tensor | None = None,
    factor: Tensor | None = None,
    times: str = "",
    fill: float = 0.0,
) -> Tensor:
    columns = out.shape[2 if form == "pad" else 1 :].numel()
    bits = _bits(fill, out.dtype)
    source = source.contiguous()
    seen = (source, out) if times else (t.view(BITS[out.dtype.itemsize]) for t in (source, out))
    arguments: dict[str, Any] = dict(zip(("source", "out"), seen, strict=True))
    arguments["factor"] = arguments["source"] if factor is None else factor.contiguous()
    arguments |= {"offsets": offsets, "starts": offsets if starts is None else starts, "rows": rows, "fill": bits}
    blocks = _blocks(columns)
    launch(
        move_rows,
        _grid(rows, columns, blocks),
        {**arguments, "columns": columns, "size": size, **search(offsets)},
        FORM=form,
        TIMES=times,
        **blocks,
    )
    return out


def _can_move(rows: int, *tensors: Tensor) -> bool:
    return rows < LIMIT and all(t.dtype.itemsize in BITS and is_countable(t) for t in tensors)


def pad(values: Tensor, offsets: Tensor, max_length: int | None, fill: float) -> Tensor:
    """See :mod:`flexjag.ops.padding`. Without `max_length` the offsets are read, a sync."""
    num_segments = offsets.shape[0] - 1
    if max_length is None:
        max_length = int(offsets.diff().max()) if num_segments else 0
    if not _can_move(num_segments * max_length, values):
        return NotImplemented
    out = values.new_empty((num_segments, max_length, *values.shape[1:]))
    return _move(values, out, offsets, "pad", rows=num_segments * max_length, size=max_length, fill=fill)


def unpad(dense: Tensor, offsets: Tensor, total: int | None, allow_longer: bool) -> Tensor:
    """See :mod:`flexjag.ops.padding`. Positions beyond `dense` get zeros; longer segments are not reported."""
    total = int(offsets[-1]) if total is None else total
    size = dense.shape[1]
    if not _can_move(max(dense.shape[0] * size, total), dense):
        return NotImplemented
    out = dense.new_empty((total, *dense.shape[2:]))
    return _move(dense, out, offsets, "unpad", rows=total, size=size)


def multiply(values: Tensor, dense: Tensor, offsets: Tensor, allow_longer: bool) -> Tensor:
    """See :mod:`flexjag.ops.elementwise`; for segments longer than `dense` see :func:`unpad`."""
    if not has_kernel(values, dense) or dense.shape[0] * dense.shape[1] >= LIMIT:
        return NotImplemented
    out, rows = values.new_empty(values.shape), values.shape[0]
    return _move(dense, out, offsets, "unpad", rows=rows, size=dense.shape[1], factor=values, times="row")


def padded_product(left: Tensor, right: Tensor, offsets: Tensor, size: int) -> Tensor:
    """See :mod:`flexjag.ops.elementwise`."""
    num_segments = offsets.shape[0] - 1
    if not has_kernel(left, right) or num_segments * size >= LIMIT:
        return NotImplemented
    out = left.new_empty((num_segments, size, *left.shape[1:]))
    return _move(left, out, offsets, "pad", rows=num_segments * size, size=size, factor=right, times="source")


def spread(rows: Tensor, offsets: Tensor, total: int) -> Tensor:
    """See :mod:`flexjag.ops.segment`."""
    if not _can_move(total, rows):
        return NotImplemented
    return _move(rows, rows.new_empty((total, *rows.shape[1:])), offsets, "spread", rows=total)


def take(values: Tensor, starts: Tensor, offsets: Tensor, total: int | None) -> Tensor:
    """See :mod:`flexjag.ops.select`. `total` is not checked."""
    total = int(offsets[-1]) if total is None else total
    if not _can_move(total, values):
        return NotImplemented
    out = values.new_empty((total, *values.shape[1:]))
    return _move(values, out, offsets, "take", rows=total, starts=starts)


def interleave(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    """See :mod:`flexjag.ops.select`."""
    total = sum(v.shape[0] for v in values)
    if not _can_move(total, *values):
        return NotImplemented
    out = values[0].new_empty((total, *values[0].shape[1:]))
    for own, at, starts in zip(values, offsets, joined_starts(offsets), strict=True):
        _move(own, out, at, "place", rows=own.shape[0], starts=starts)
    return out


def put(pieces: Tensor, starts: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """See :mod:`flexjag.ops.select`. Ranges that start at the same row are summed in order."""
    if not has_kernel(pieces) or rows >= LIMIT:
        return NotImplemented
    num_ranges, columns = offsets.shape[0] - 1, pieces.shape[1:].numel()
    out = pieces.new_empty((rows, *pieces.shape[1:]))
    begins, order = torch.sort(starts[:num_ranges], stable=True)
    ends = begins + offsets.diff()[order]
    arguments = {
        "pieces": pieces.contiguous(),
        "out": out,
        "starts": begins,
        "order": order,
        "ends": torch.cummax(ends, 0).values if num_ranges else ends,
        "offsets": offsets,
        "rows": rows,
        "columns": columns,
        "num_ranges": num_ranges,
        "steps": num_ranges.bit_length(),
    }
    blocks = _blocks(columns)
    launch(sum_ranges, _grid(rows, columns, blocks), arguments, **blocks)
    return out
