"""Attention by a pointwise normalizer with Triton: ``(f(scores) ⊙ mask) V`` over the plan's tiles, and its gradients.

A program has some rows of one head and goes through the tiles that the plan lists for them: first the PARTIAL ones,
where scores are masked, then the FULL ones, where they are not. Nothing is added by two programs, and every sum is in
the order of the lists, so results are bitwise the same every time.

A masked key gets weight 0, but 0 · NaN is NaN: a non-finite value of one segment could reach other segments in a tile
that they share. Programs whose sums are not finite flag their rows and are run again with CAREFUL (:func:`spread`).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from flexjag.kernels.math import jit, sigmoid, tanh

VARYING = [
    "num_q", "num_kv", "numbers", "partial_row", "partial_head", "full_row", "full_head", "count_head",
]  # fmt: skip
"""Arguments that vary from batch to batch, which Triton must not specialize on 1 or on divisibility by 16. Triton 3.7
still specializes on the entries of a tuple (`numbers`): at most three kernels per size that a mask or score reads."""


@jit
def silu(s):
    """S · sigmoid(s)."""
    return s * sigmoid(s)


@jit
def dsilu(dw, s):
    """The gradient of `silu`."""
    p = sigmoid(s)
    return dw * p * (1 + s * (1 - p))


@jit
def gelu(s):
    """S · Φ(s), Φ the normal distribution's."""
    return 0.5 * s * (1 + tl.erf(s * 0.7071067811865476))


@jit
def dgelu(dw, s):
    """The gradient of `gelu`."""
    return dw * (0.5 * (1 + tl.erf(s * 0.7071067811865476)) + s * tl.exp(-0.5 * s * s) * 0.3989422804014327)


@jit
def gelu_tanh(s):
    """The usual approximation of `gelu`."""
    return 0.5 * s * (1 + tanh(0.7978845608028654 * (s + 0.044715 * s * s * s)))


@jit
def dgelu_tanh(dw, s):
    """The gradient of `gelu_tanh`."""
    t = tanh(0.7978845608028654 * (s + 0.044715 * s * s * s))
    return dw * (0.5 * (1 + t) + 0.5 * s * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * s * s))


@jit
def identity(s):
    """S."""
    return s


@jit
def didentity(dw, s):
    """The gradient of `identity`."""
    return dw


@jit
def dsigmoid(dw, s):
    """The gradient of `sigmoid`."""
    p = sigmoid(s)
    return dw * p * (1 - p)


ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (silu, dsilu),
    "gelu": (gelu, dgelu),
    "gelu_tanh": (gelu_tanh, dgelu_tanh),
    "identity": (identity, didentity),
    "sigmoid": (sigmoid, dsigmoid),
}
"""Each normalizer's function and its gradient, by name."""


@jit
def rows_of(x, row, count, step, SIZE: tl.constexpr, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """Load rows of a matrix of SIZE columns, zeros outside of it; INSIDE: all rows exist."""
    column = tl.arange(0, BLOCK)
    place = x + row.to(tl.int64)[:, None] * step + column[None, :]
    if INSIDE and BLOCK == SIZE:
        tile = tl.load(place)
    elif INSIDE:
        tile = tl.load(place, mask=(column < SIZE)[None, :], other=0)
    else:
        tile = tl.load(place, mask=(row < count)[:, None] & (column < SIZE)[None, :], other=0)
    return tile


@jit
def put_rows(x, tile, row, count, step, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows to a matrix of SIZE columns; the reverse of `rows_of`."""
    column = tl.arange(0, BLOCK)
    place = x + row.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(place, tile.to(x.dtype.element_ty), mask=(row < count)[:, None] & (column < SIZE)[None, :])


@jit
def spread(weights, allowed, x, total, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """``total + weights @ x``; if CAREFUL, non-finite rows of x reach only the sums of rows that may attend them."""
    if CAREFUL:
        is_finite = tl.abs(x.to(tl.float32)) < float("inf")
        spoiled = tl.min(is_finite.to(tl.int32), 1) == 0
        reached = tl.max((allowed & spoiled[None, :]).to(tl.int32), 1) != 0
        x = tl.where(is_finite, x, 0.0).to(x.dtype)
        total = tl.where(reached[:, None], float("nan"), total)
    return tl.dot(weights.to(x.dtype), x, total, input_precision=PRECISION)


@jit
def needs_run(spoiled, row, count, CAREFUL: tl.constexpr):
    """True if a program has to run: always, or, if CAREFUL, only if one of its rows had a sum that is not finite."""
    return tl.max(tl.load(spoiled + row, mask=row < count, other=0), 0) != 0 if CAREFUL else True


@jit
def is_spoiled(total):
    """Per row int32: 1 if an entry is not finite, else 0."""
    return tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1), 1)


@jit
def places(index, i, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Packed indices ``[BLOCK]`` of the i-th block of a list of tiles."""
    parts: tl.constexpr = TILE // BLOCK
    return tl.load(index + i // parts) * TILE + (i % parts) * BLOCK + tl.arange(0, BLOCK)


@jit
def allowed_in(row, col, h, i, j, num_q, num_kv, captures, numbers, MASK: tl.constexpr):
    """The mask of a block of queries and keys; False beyond num_q and num_kv."""
    return MASK(h, i, j, captures, numbers) & ((row < num_q)[:, None] & (col < num_kv)[None, :])


@jit
def attend(
    total, x, row, h, k, v, count, index, k_t, v_t, num_q, num_kv, captures, numbers, scale,
    F: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Accumulate the weighted sums of values over a list of tiles."""
    i = tl.minimum(row, num_q - 1)[:, None]
    for block in range(count * (TILE // BLOCK_N)):
        col = places(index, block, TILE, BLOCK_N)
        j = tl.minimum(col, num_kv - 1)[None, :]
        y = rows_of(k, col, num_kv, k_t, D, BLOCK_D, not MASKED)
        s = SCORE(tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale, h, i, j, captures, numbers)
        w = F(s)
        allowed = w == w
        if MASKED:
            allowed = allowed_in(row, col, h, i, j, num_q, num_kv, captures, numbers, MASK)
            w = tl.where(allowed, w, 0.0)
        z = rows_of(v, col, num_kv, v_t, E, BLOCK_E, not MASKED)
        total = spread(w, allowed, z, total, MASKED and CAREFUL, PRECISION)
    return total


@jit(do_not_specialize=VARYING)
def pointwise_forward(
    q, k, v, out, spoiled, partial_count, partial_index, full_count, full_index, captures, numbers, scale, factor,
    num_q, num_kv, count_head, partial_head, partial_row, full_head, full_row, q_t, q_h, k_t, k_h, v_t, v_h,
    out_t, out_h, F: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Forward kernel: the output of BLOCK_M rows of one head."""
    h = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    wide, tile = h.to(tl.int64), (first // TILE).to(tl.int64)
    spoiled += wide * num_q
    if needs_run(spoiled, row, num_q, CAREFUL):
        x = rows_of(q + wide * q_h, row, num_q, q_t, D, BLOCK_D, False)
        k += (wide // GROUP) * k_h
        v += (wide // GROUP) * v_h
        total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        total = attend(
            total, x, row, h, k, v, tl.load(partial_count + wide * count_head + tile),
            partial_index + wide * partial_head + tile * partial_row, k_t, v_t, num_q, num_kv, captures, numbers,
            scale, F, MASK, SCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_N, PRECISION, True, CAREFUL,
        )  # fmt: skip
        total = attend(
            total, x, row, h, k, v, tl.load(full_count + wide * count_head + tile),
            full_index + wide * full_head + tile * full_row, k_t, v_t, num_q, num_kv, captures, numbers, scale, F,
            MASK, SCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_N, PRECISION, False, False,
        )  # fmt: skip
        put_rows(out + wide * out_h, total * factor, row, num_q, out_t, E, BLOCK_E)
        if not CAREFUL:
            tl.store(spoiled + row, is_spoiled(total), mask=row < num_q)


@jit
def add_query_gradient(
    total, x, g, row, h, k, v, count, index, k_t, v_t, num_q, num_kv, captures, numbers, scale,
    DF: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Accumulate dQ of some queries over a list of tiles, before the factor `scale`."""
    i = tl.minimum(row, num_q - 1)[:, None]
    for block in range(count * (TILE // BLOCK_N)):
        col = places(index, block, TILE, BLOCK_N)
        j = tl.minimum(col, num_kv - 1)[None, :]
        y = rows_of(k, col, num_kv, k_t, D, BLOCK_D, not MASKED)
        z = rows_of(v, col, num_kv, v_t, E, BLOCK_E, not MASKED)
        raw = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        ds = DF(tl.dot(g, tl.trans(z), input_precision=PRECISION), SCORE(raw, h, i, j, captures, numbers))
        ds = DSCORE(ds, raw, h, i, j, captures, numbers)
        allowed = ds == ds
        if MASKED:
            allowed = allowed_in(row, col, h, i, j, num_q, num_kv, captures, numbers, MASK)
            ds = tl.where(allowed, ds, 0.0)
        total = spread(ds, allowed, y, total, MASKED and CAREFUL, PRECISION)
    return total


@jit(do_not_specialize=VARYING)
def pointwise_of_queries(
    q, k, v, grad, dq, spoiled, partial_count, partial_index, full_count, full_index, captures, numbers, scale,
    factor, num_q, num_kv, count_head, partial_head, partial_row, full_head, full_row, q_t, q_h, k_t, k_h,
    v_t, v_h, g_t, g_h, dq_t, dq_h, DF: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dQ of BLOCK_M queries of one head."""
    h = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    wide, tile = h.to(tl.int64), (first // TILE).to(tl.int64)
    spoiled += wide * num_q
    if needs_run(spoiled, row, num_q, CAREFUL):
        x = rows_of(q + wide * q_h, row, num_q, q_t, D, BLOCK_D, False)
        g = rows_of(grad + wide * g_h, row, num_q, g_t, E, BLOCK_E, False)
        k += (wide // GROUP) * k_h
        v += (wide // GROUP) * v_h
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = add_query_gradient(
            total, x, g, row, h, k, v, tl.load(partial_count + wide * count_head + tile),
            partial_index + wide * partial_head + tile * partial_row, k_t, v_t, num_q, num_kv, captures, numbers,
            scale, DF, MASK, SCORE, DSCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_N, PRECISION, True, CAREFUL,
        )  # fmt: skip
        total = add_query_gradient(
            total, x, g, row, h, k, v, tl.load(full_count + wide * count_head + tile),
            full_index + wide * full_head + tile * full_row, k_t, v_t, num_q, num_kv, captures, numbers, scale, DF,
            MASK, SCORE, DSCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_N, PRECISION, False, False,
        )  # fmt: skip
        put_rows(dq + wide * dq_h, total * (scale * factor), row, num_q, dq_t, D, BLOCK_D)
        if not CAREFUL:
            tl.store(spoiled + row, is_spoiled(total), mask=row < num_q)


@jit
def add_key_gradients(
    total_k, total_v, y, z, col, h, q, grad, count, index, q_t, g_t, num_q, num_kv, captures, numbers, scale,
    F: tl.constexpr, DF: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Accumulate dK, before the factor `scale`, and dV of some keys over a list of tiles."""
    j = tl.minimum(col, num_kv - 1)[:, None]
    for block in range(count * (TILE // BLOCK_M)):
        row = places(index, block, TILE, BLOCK_M)
        i = tl.minimum(row, num_q - 1)[None, :]
        x = rows_of(q, row, num_q, q_t, D, BLOCK_D, not MASKED)
        g = rows_of(grad, row, num_q, g_t, E, BLOCK_E, not MASKED)
        raw = tl.dot(y, tl.trans(x), input_precision=PRECISION) * scale
        s = SCORE(raw, h, i, j, captures, numbers)
        w = F(s)
        allowed = w == w
        if MASKED:
            allowed = MASK(h, i, j, captures, numbers) & ((col < num_kv)[:, None] & (row < num_q)[None, :])
            w = tl.where(allowed, w, 0.0)
        total_v = spread(w, allowed, g, total_v, MASKED and CAREFUL, PRECISION)
        ds = DF(tl.dot(z, tl.trans(g), input_precision=PRECISION), s)
        ds = DSCORE(ds, raw, h, i, j, captures, numbers)
        if MASKED:
            ds = tl.where(allowed, ds, 0.0)
        total_k = spread(ds, allowed, x, total_k, MASKED and CAREFUL, PRECISION)
    return total_k, total_v


@jit(do_not_specialize=VARYING)
def pointwise_of_keys(
    q, k, v, grad, dk, dv, spoiled, partial_count, partial_index, full_count, full_index, captures, numbers, scale,
    factor, num_q, num_kv, count_head, partial_head, partial_row, full_head, full_row, q_t, q_h, k_t, k_h,
    v_t, v_h, g_t, g_h, dk_t, dk_h, dv_t, dv_h, F: tl.constexpr, DF: tl.constexpr, MASK: tl.constexpr,
    SCORE: tl.constexpr, DSCORE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dK and dV of BLOCK_N keys of one group, summed over the group's heads in order."""
    group = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    broad, tile = group.to(tl.int64), (first // TILE).to(tl.int64)
    spoiled += broad * num_kv
    if needs_run(spoiled, col, num_kv, CAREFUL):
        y = rows_of(k + broad * k_h, col, num_kv, k_t, D, BLOCK_D, False)
        z = rows_of(v + broad * v_h, col, num_kv, v_t, E, BLOCK_E, False)
        total_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        total_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for member in range(GROUP):
            h = group * GROUP + member
            wide = h.to(tl.int64)
            x, g = q + wide * q_h, grad + wide * g_h
            total_k, total_v = add_key_gradients(
                total_k, total_v, y, z, col, h, x, g, tl.load(partial_count + wide * count_head + tile),
                partial_index + wide * partial_head + tile * partial_row, q_t, g_t, num_q, num_kv, captures, numbers,
                scale, F, DF, MASK, SCORE, DSCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_M, PRECISION, True, CAREFUL,
            )  # fmt: skip
            total_k, total_v = add_key_gradients(
                total_k, total_v, y, z, col, h, x, g, tl.load(full_count + wide * count_head + tile),
                full_index + wide * full_head + tile * full_row, q_t, g_t, num_q, num_kv, captures, numbers, scale, F,
                DF, MASK, SCORE, DSCORE, D, E, BLOCK_D, BLOCK_E, TILE, BLOCK_M, PRECISION, False, False,
            )  # fmt: skip
        put_rows(dk + broad * dk_h, total_k * (scale * factor), col, num_kv, dk_t, D, BLOCK_D)
        put_rows(dv + broad * dv_h, total_v * factor, col, num_kv, dv_t, E, BLOCK_E)
        if not CAREFUL:
            spoils = is_spoiled(total_k) + is_spoiled(total_v)
            tl.store(spoiled + col, spoils, mask=col < num_kv)
