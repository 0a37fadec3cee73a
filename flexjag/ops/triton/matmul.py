"""Matrix products per segment with Triton, by one kernel for all choices of the jagged dimension.

C = A B per segment, with A ``M × K`` and B ``K × N``. The kernel reads jagged sizes from the offsets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flexjag.ops.matrices import matrix_offsets
from flexjag.ops.triton.common import (
    LIMIT,
    ceil_div,
    find_tile,
    has_kernel,
    jit,
    launch,
    num_tiles,
    power_of_2,
    precision,
    search,
    span_of,
)


@jit(do_not_specialize=["num_segments", "steps"])
def multiply_segments(
    left,
    right,
    out,
    rows,
    columns,
    starts,
    M,
    N,
    K,
    left_m,
    left_k,
    right_s,
    right_k,
    right_n,
    num_segments,
    steps,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute tiles of C = A B, accumulated over K.

    FORM "dense": A is packed along M, B has one matrix per segment. "gram": A and B are packed along K. "outer": A and
    B are packed along M and N, C is packed matrices. "packed": A is packed matrices, B is packed along K; "transposed":
    the same with Aᵀ. `rows` are the offsets of M (for "gram" of K), `columns` those of the other jagged dimension,
    `starts` those of the packed matrices.
    """
    if FORM == "gram":
        tiles = tl.cdiv(M, BLOCK_M)
        segment = (tl.program_id(0) // tiles).to(tl.int64)
        first = (tl.program_id(0) % tiles) * BLOCK_M
        begin, K = span_of(rows, segment)
        left += begin * left_k
        right += begin * right_k
        out += segment * M * N
    else:
        segment, first, begin, M = find_tile(rows, num_segments, steps, BLOCK_M)
        if FORM == "dense":
            left += begin * left_m
            right += segment * right_s
            out += begin * N
        elif FORM == "outer":
            other, N = span_of(columns, segment)
            left += begin * left_m
            right += other * right_n
            out += tl.load(starts + segment).to(tl.int64)
        else:
            other, K = span_of(columns, segment)
            left += tl.load(starts + segment).to(tl.int64)
            right += other * right_k
            out += begin * N
            left_m = K if FORM == "packed" else 1
            left_k = 1 if FORM == "packed" else M
    m = first + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if first < M:
        at_left = left + m.to(tl.int64)[:, None] * left_m
        for column in range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
            n = column + tl.arange(0, BLOCK_N)
            at_right = right + n.to(tl.int64)[None, :] * right_n
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for done in range(0, K, BLOCK_K):
                here = done + k
                a = tl.load(
                    at_left + here.to(tl.int64)[None, :] * left_k, mask=(m < M)[:, None] & (here < K)[None, :], other=0
                )
                b = tl.load(
                    at_right + here.to(tl.int64)[:, None] * right_k,
                    mask=(here < K)[:, None] & (n < N)[None, :],
                    other=0,
                )
                total = tl.dot(a, b, total, input_precision=PRECISION)
            place = out + m.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(place, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


COLUMN_PROGRAMS = 4
"""Programs per row of tiles if the number of columns is jagged."""


def _blocks(dtype: torch.dtype, n: int, k: int, form: str) -> dict[str, Any]:
    """Tiles of 64 x 64 x 64, less where a known size is smaller. IEEE float32 products use no tensor cores."""
    is_wide = dtype == torch.float32
    is_exact = is_wide and precision(dtype) == "ieee"
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64 if form == "outer" else power_of_2(n, 16, 64)}
    deepest = 16 if is_exact else 32 if is_wide else 64
    blocks["BLOCK_K"] = power_of_2(k, 16, deepest) if form in ("dense", "outer") else deepest
    is_heavy = is_exact or form == "outer" or (is_wide and form != "gram")  # these spill registers with 4 warps
    return {**blocks, "PRECISION": precision(dtype), "num_warps": 8 if is_heavy else 4, "num_stages": 3}


def _multiply(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    rows: Tensor,
    columns: Tensor,
    form: str,
    *,
    sizes: tuple[int, int, int],
    left_strides: tuple[int, int] = (0, 0),
    right_strides: tuple[int, int, int],
    walked: int,
    starts: Tensor | None = None,
) -> Tensor:
    """Launch the kernel over tiles of `walked` rows; sizes and strides that it reads from offsets are 0."""
    constants = _blocks(left.dtype, sizes[1], sizes[2], form)
    if form == "gram":
        tiles = (rows.shape[0] - 1) * ceil_div(sizes[0], constants["BLOCK_M"])
    else:
        tiles = num_tiles(rows, walked, constants["BLOCK_M"])
    across = COLUMN_PROGRAMS if form == "outer" else ceil_div(sizes[1], constants["BLOCK_N"])
    if not walked and form != "gram":
        return out
    arguments = {"left": left, "right": right, "out": out, "rows": rows, "columns": columns}
    arguments["starts"] = rows if starts is None else starts
    arguments |= dict(zip(("M", "N", "K"), sizes, strict=True))
    arguments |= dict(zip(("left_m", "left_k"), left_strides, strict=True))
    arguments |= dict(zip(("right_s", "right_k", "right_n"), right_strides, strict=True))
    launch(multiply_segments, (tiles, across), {**arguments, **search(rows)}, FORM=form, **constants)
    return out


def times_dense(values: Tensor, dense: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.bmm`."""
    if not has_kernel(values, dense):
        return NotImplemented
    (total, d), e = values.shape, dense.shape[2]
    return _multiply(
        values,
        dense,
        values.new_empty((total, e)),
        offsets,
        offsets,
        "dense",
        sizes=(0, e, d),
        left_strides=(values.stride(0), values.stride(1)),
        right_strides=(dense.stride(0), dense.stride(1), dense.stride(2)),
        walked=total,
    )


def gram(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """See :mod:`flexjag.ops.bmm`."""
    if not has_kernel(left, right):
        return NotImplemented
    d, e = left.shape[1], right.shape[1]
    return _multiply(
        left,
        right,
        left.new_empty((offsets.shape[0] - 1, d, e)),
        offsets,
        offsets,
        "gram",
        sizes=(d, e, 0),
        left_strides=(left.stride(1), left.stride(0)),
        right_strides=(0, right.stride(0), right.stride(1)),
        walked=left.shape[0],
    )


def outer(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, total: int | None) -> Tensor:
    """See :mod:`flexjag.ops.matrices`. `total` is not checked; without it the offsets are read, a sync."""
    if not has_kernel(left, right):
        return NotImplemented
    starts = matrix_offsets(rows, columns)
    return _multiply(
        left,
        right,
        left.new_empty((int(starts[-1]) if total is None else total,)),
        rows,
        columns,
        "outer",
        sizes=(0, 0, left.shape[1]),
        left_strides=(left.stride(0), left.stride(1)),
        right_strides=(0, right.stride(1), right.stride(0)),
        walked=left.shape[0],
        starts=starts,
    )


def times_packed(
    matrices: Tensor, values: Tensor, rows: Tensor, columns: Tensor, transpose: bool, total: int | None
) -> Tensor:
    """See :mod:`flexjag.ops.matrices`."""
    walked, summed, form = (columns, rows, "transposed") if transpose else (rows, columns, "packed")
    total = int(walked[-1]) if total is None else total
    if not has_kernel(matrices.new_empty(0), values) or total >= LIMIT:
        return NotImplemented
    return _multiply(
        matrices.contiguous(),
        values,
        values.new_empty((total, values.shape[1])),
        walked,
        summed,
        form,
        sizes=(0, values.shape[1], 0),
        right_strides=(0, values.stride(0), values.stride(1)),
        walked=total,
        starts=matrix_offsets(rows, columns),
    )
