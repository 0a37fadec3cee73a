"""Target attention with Triton: tiles of queries per segment, a loop over tiles of keys."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flexjag.ops.triton.common import (
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

WIDEST = 256
"""Largest D and E of the kernels; with more the plain kernel runs."""


@jit
def load_tile(place, row, rows, columns, BLOCK: tl.constexpr):
    """Load rows of a matrix of `columns` columns that begins at `place`; zeros outside."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(place + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0)


@jit
def store_tile(place, tile, row, rows, columns, BLOCK: tl.constexpr):
    """Store rows of a matrix of `columns` columns that begins at `place`."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = place + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, tile.to(place.dtype.element_ty), mask=mask)


@jit
def scores_of(
    keys, queries, bias, segment, key, query, length, M, size, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores ``[keys, queries]``: scale q·k + bias, -inf behind the segment's end."""
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    if HAS_BIAS:
        mask = (key < tl.minimum(length, size))[:, None] & (query < M)[None, :]
        at = bias + (segment * size + key)[:, None] * M + query[None, :]
        scores += tl.load(at, mask=mask, other=0).to(tl.float32)
    return tl.where((key < length)[:, None], scores, float("-inf"))


@jit
def target_forward(
    queries,
    keys,
    values,
    bias,
    out,
    lse,
    offsets,
    M,
    D,
    E,
    size,
    scale,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries."""
    tiles = tl.cdiv(M, BLOCK_M)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    query = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, length = span_of(offsets, segment)
    q = load_tile(queries + segment * M * D, query, M, D, BLOCK_D)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for begin in range(0, length, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        k = load_tile(keys + start * D, key, length, D, BLOCK_D)
        scores = scores_of(k, q, bias, segment, key, query, length, M, size, scale, HAS_BIAS, PRECISION)
        top = tl.maximum(largest, tl.max(scores, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        share = tl.exp(scores - shift[None, :])
        fade = tl.exp(largest - shift)
        weight = weight * fade + tl.sum(share, 0)
        v = load_tile(values + start * E, key, length, E, BLOCK_E)
        total = tl.dot(tl.trans(share.to(v.dtype)), v, total * fade[:, None], input_precision=PRECISION)
        largest = top
    total = total / tl.where(length > 0, weight, 1.0)[:, None]
    store_tile(out + segment * M * E, total, query, M, E, BLOCK_E)
    tl.store(lse + segment * M + query, largest + tl.log(weight), mask=query < M)


@jit
def target_of_queries(
    grad,
    queries,
    keys,
    values,
    bias,
    out,
    lse,
    result,
    inner,
    offsets,
    M,
    D,
    E,
    size,
    scale,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of a tile of queries, and Σ grad ⊙ out per query, which :func:`target_of_keys` reads."""
    tiles = tl.cdiv(M, BLOCK_M)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    query = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, length = span_of(offsets, segment)
    q = load_tile(queries + segment * M * D, query, M, D, BLOCK_D)
    g = load_tile(grad + segment * M * E, query, M, E, BLOCK_E)
    o = load_tile(out + segment * M * E, query, M, E, BLOCK_E)
    dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(inner + segment * M + query, dot, mask=query < M)
    log = tl.load(lse + segment * M + query, mask=query < M, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, length, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        k = load_tile(keys + start * D, key, length, D, BLOCK_D)
        scores = scores_of(k, q, bias, segment, key, query, length, M, size, scale, HAS_BIAS, PRECISION)
        v = load_tile(values + start * E, key, length, E, BLOCK_E)
        change = tl.dot(v, tl.trans(g), input_precision=PRECISION) - dot[None, :]
        change = tl.exp(scores - log[None, :]) * change
        total = tl.dot(tl.trans(change.to(k.dtype)), k, total, input_precision=PRECISION)
    store_tile(result + segment * M * D, total * scale, query, M, D, BLOCK_D)


@jit(do_not_specialize=["num_segments", "steps"])
def target_of_keys(
    grad,
    queries,
    keys,
    values,
    bias,
    lse,
    inner,
    of_keys,
    of_values,
    of_bias,
    offsets,
    M,
    D,
    E,
    size,
    scale,
    num_segments,
    steps,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of a tile of keys, of their values, and of their rows of the bias."""
    segment, first, start, length = find_tile(offsets, num_segments, steps, BLOCK_N)
    key = first + tl.arange(0, BLOCK_N)
    if first < length:
        k = load_tile(keys + start * D, key, length, D, BLOCK_D)
        v = load_tile(values + start * E, key, length, E, BLOCK_E)
        total_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        total_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for begin in range(0, M, BLOCK_M):
            query = begin + tl.arange(0, BLOCK_M)
            q = load_tile(queries + segment * M * D, query, M, D, BLOCK_D)
            scores = scores_of(k, q, bias, segment, key, query, length, M, size, scale, HAS_BIAS, PRECISION)
            log = tl.load(lse + segment * M + query, mask=query < M, other=0)
            weights = tl.exp(scores - log[None, :])  # 1 behind the last query, multiplied by g = 0
            g = load_tile(grad + segment * M * E, query, M, E, BLOCK_E)
            total_v = tl.dot(weights.to(g.dtype), g, total_v, input_precision=PRECISION)
            dot = tl.load(inner + segment * M + query, mask=query < M, other=0)
            change = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - dot[None, :])
            if HAS_BIAS:
                mask = (key < tl.minimum(length, size))[:, None] & (query < M)[None, :]
                at = of_bias + (segment * size + key)[:, None] * M + query[None, :]
                tl.store(at, change.to(of_bias.dtype.element_ty), mask=mask)
            total_k = tl.dot(change.to(q.dtype), q, total_k, input_precision=PRECISION)
        store_tile(of_keys + start * D, total_k * scale, key, length, D, BLOCK_D)
        store_tile(of_values + start * E, total_v, key, length, E, BLOCK_E)


def _constants(query: Tensor, value: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """Tile sizes. IEEE float32 products use registers: small tiles, many warps and no pipeline, or they spill."""
    constants = {"BLOCK_D": power_of_2(query.shape[2], 16), "BLOCK_E": power_of_2(value.shape[1], 16)}
    constants |= {"HAS_BIAS": bias is not None, "PRECISION": precision(query.dtype)}
    is_wide = query.dtype == torch.float32
    if is_wide and constants["PRECISION"] == "ieee":
        return {**constants, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    rows = power_of_2(query.shape[1], 16, 16 if is_wide else 32)
    return {**constants, "BLOCK_M": rows, "BLOCK_N": 32, "num_warps": 4}


def _sizes(query: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> dict[str, Any]:
    sizes = {"M": query.shape[1], "D": query.shape[2], "E": value.shape[1]}
    return {**sizes, "size": 0 if bias is None else bias.shape[1], "scale": scale}


def _can_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    return has_kernel(query, key, value, *([] if bias is None else [bias])) and (
        max(query.shape[2], value.shape[1]) <= WIDEST
    )


def target(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :mod:`flexjag.ops.target`. The bias is 0 at positions from N on; longer segments are not reported."""
    if not _can_attend(query, key, value, bias):
        return NotImplemented
    num_segments, m = query.shape[:2]
    tensors = {"queries": query.contiguous(), "keys": key.contiguous(), "values": value.contiguous()}
    tensors["bias"] = tensors["queries"] if bias is None else bias.contiguous()
    tensors["out"] = query.new_empty((num_segments, m, value.shape[1]))
    tensors["lse"] = query.new_empty((num_segments, m), dtype=torch.float32)
    constants = _constants(query, value, bias)
    grid = (num_segments * ceil_div(m, constants["BLOCK_M"]),)
    launch(target_forward, grid, {**tensors, "offsets": offsets, **_sizes(query, value, bias, scale)}, **constants)
    return tensors["out"], tensors["lse"]


def target_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`flexjag.ops.target`."""
    if not _can_attend(query, key, value, bias):
        return NotImplemented
    num_segments, m = query.shape[:2]
    of_query, of_key, of_value = (t.new_empty(t.shape) for t in (query, key, value))
    of_bias = query.new_zeros((0,) if bias is None else bias.shape)
    inner = torch.empty_like(lse)
    tensors = {"grad": grad.contiguous(), "queries": query.contiguous(), "keys": key.contiguous()}
    tensors["values"] = value.contiguous()
    tensors["bias"] = tensors["queries"] if bias is None else bias.contiguous()
    sizes, constants = _sizes(query, value, bias, scale), _constants(query, value, bias)
    first = {**tensors, "out": out.contiguous(), "lse": lse, "result": of_query, "inner": inner, "offsets": offsets}
    grid = (num_segments * ceil_div(m, constants["BLOCK_M"]),)
    launch(target_of_queries, grid, {**first, **sizes}, **constants)
    second = {**tensors, "lse": lse, "inner": inner, "of_keys": of_key, "of_values": of_value, "of_bias": of_bias}
    grid = (num_tiles(offsets, key.shape[0], constants["BLOCK_N"]) if key.shape[0] else 0,)
    launch(target_of_keys, grid, {**second, "offsets": offsets, **sizes, **search(offsets)}, **constants)
    return of_query, of_key, of_value, of_bias
