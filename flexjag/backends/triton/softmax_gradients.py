"""The backward kernels of softmax attention with Triton: items of queries give dQ, items of keys give dK and dV.

An item of keys is a run of up to ROWS keys of one segment. Its program looks at the spans of all queries of the segment
to find those that may attend a key of the item, and goes through them as the forward goes through keys. Nothing is
added by two programs, and sums are in a fixed order, so gradients are bitwise the same every time.
"""

from __future__ import annotations

import triton.language as tl

from flexjag.backends.triton.softmax_kernels import (
    LOG2_E,
    VARYING,
    add_weighted,
    allowed_in,
    along_keys,
    along_rows,
    keys_of,
    load_keys,
    load_rows,
    mask_at,
    offsets_of,
    products,
    scores_of,
    span_of,
    steps_in,
    store_rows,
    unflipped,
    zeros_of_rows,
)
from flexjag.kernels.math import jit

LOOK = tl.constexpr(128)  # spans of so many queries are looked at together


@jit
def score_gradient(
    w, dw, delta, raw, h, i, j, num_q, num_kv, captures, numbers, DSCORE: tl.constexpr, SCORED: tl.constexpr
):  # fmt: skip
    """The gradient by ``q·k`` times the scale: of the weights `w` with gradients `dw`."""
    ds = w * (dw - delta)
    if SCORED:
        i, j = tl.minimum(i, num_q - 1), tl.minimum(j, num_kv - 1)
        ds = DSCORE(ds, raw, h, i, j, captures, numbers)
    return ds


@jit
def add_query_gradient(
    dq, x, g, h, i, base, delta, lo, hi, at, stop, k, v, k_t, v_t, num_q, num_kv, captures, numbers, scale,
    MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, SCORED: tl.constexpr, KINDS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, KEYS: tl.constexpr,
    FLIPPED: tl.constexpr, PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Add one step of keys to dQ, before the factor `scale`."""
    key = along_keys(at + tl.arange(0, KEYS), FLIPPED)
    y = load_keys(k, at, stop, k_t, KEYS, D, BLOCK_D, CHECKED)
    z = load_keys(v, at, stop, v_t, KEYS, E, BLOCK_E, CHECKED)
    s, raw = scores_of(
        products(x, y, FLIPPED, PRECISION), h, i, key, num_q, num_kv, captures, numbers, scale, SCORE, SCORED
    )  # fmt: skip
    w, dw = tl.exp2(s - base), products(g, z, FLIPPED, PRECISION)
    ds = score_gradient(w, dw, delta, raw, h, i, key, num_q, num_kv, captures, numbers, DSCORE, SCORED)
    if CHECKED:
        ds = tl.where(allowed_in(lo, hi, h, i, key, num_q, num_kv, captures, numbers, MASK, KINDS), ds, 0.0)
    return add_weighted(dq, ds, y, FLIPPED, PRECISION)


@jit(do_not_specialize=VARYING)
def softmax_of_queries(
    q, k, v, out, grad, lse, grad_lse, delta, dq, spans, mask_of, items, captures, numbers, scale, num_items, num_q,
    num_kv, heads, q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, g_t, g_h, dq_t, dq_h, MASK: tl.constexpr,
    SCORE: tl.constexpr, DSCORE: tl.constexpr, SCORED: tl.constexpr, MASKS: tl.constexpr, SPANS: tl.constexpr,
    KINDS: tl.constexpr, WITH_LSE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr, FLIPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dQ of an item's rows, and `delta`, what each row's gradients of weights are compared with."""
    item = tl.program_id(0)
    first = tl.load(items + item)
    end = tl.load(items + num_items + item)
    if first < end:
        head = tl.program_id(1) * PACK
        row = tl.arange(0, ROWS)
        i = first + row // PACK
        h = head + row % PACK
        inside = i < end
        group = (head // GROUP).to(tl.int64)
        k += group * k_h
        v += group * v_h
        spans = mask_at(spans, mask_of, head, num_q, SPANS, KINDS, MASKS)
        x = load_rows(q, offsets_of(i, h, q_t, q_h), inside, D, BLOCK_D, True)
        g = load_rows(grad, offsets_of(i, h, g_t, g_h), inside, E, BLOCK_E, True)
        o = load_rows(out, offsets_of(i, h, out_t, out_h), inside, E, BLOCK_E, True)
        place = i.to(tl.int64) * heads + h
        compared = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        if WITH_LSE:
            compared -= tl.load(grad_lse + place, mask=inside, other=0.0)
        tl.store(delta + place, compared, mask=inside)
        base = tl.load(lse + place, mask=inside, other=0.0)
        base = tl.where(base == float("-inf"), 0.0, base) * LOG2_E
        query, of_mods = along_rows(i, FLIPPED), head
        if PACK > 1:
            of_mods = along_rows(h, FLIPPED)
        base, compared = along_rows(base, FLIPPED), along_rows(compared, FLIPPED)
        dx = zeros_of_rows(ROWS, BLOCK_D, FLIPPED)
        for span in range(SPANS):
            lo, hi, start, stop, sure_start, sure_stop = keys_of(spans, span, i, inside, num_q, SPANS, KINDS)
            before, after, begin, past, many = steps_in(start, stop, sure_start, sure_stop, STEP, WIDE)
            lo, hi = along_rows(lo, FLIPPED), along_rows(hi, FLIPPED)
            for turn in range(before + after):
                at = tl.where(turn < before, start + turn * STEP, past + (turn - before) * STEP)
                dx = add_query_gradient(
                    dx, x, g, of_mods, query, base, compared, lo, hi, at, stop, k, v, k_t, v_t,
                    num_q, num_kv, captures, numbers, scale, MASK, SCORE, DSCORE, SCORED, KINDS, D, E, BLOCK_D,
                    BLOCK_E, STEP, FLIPPED, PRECISION, True,
                )  # fmt: skip
            for turn in range(many):
                dx = add_query_gradient(
                    dx, x, g, of_mods, query, base, compared, lo, hi, begin + turn * WIDE, stop,
                    k, v, k_t, v_t, num_q, num_kv, captures, numbers, scale, MASK, SCORE, DSCORE, SCORED, KINDS, D, E,
                    BLOCK_D, BLOCK_E, WIDE, FLIPPED, PRECISION, False,
                )  # fmt: skip
        dx = unflipped(dx, FLIPPED) * scale
        store_rows(dq, dx, offsets_of(i, h, dq_t, dq_h), inside, D, BLOCK_D)


@jit
def queries_of(
    spans, span, first, stop, q_first, q_end, num_q, SPANS: tl.constexpr, KINDS: tl.constexpr
):  # fmt: skip
    """The queries of a segment that may attend a key of ``[first, stop)``, and a run of those that attend all of them.

    Returns:
        Start and end of the queries that may attend one, and of the run; the run is empty if the queries that attend
        all of the keys are no run.
    """
    some_start, some_end, all_start, all_end, count = q_end, q_first, q_end, q_first, q_first * 0
    for at in range(q_first, q_end, LOOK):
        i = at + tl.arange(0, LOOK)
        lo, hi, sure_lo, sure_hi = span_of(spans, span, i, i < q_end, num_q, SPANS, KINDS)
        some = (lo < stop) & (hi > first) & (hi > lo)
        every = (sure_lo <= first) & (sure_hi >= stop)
        some_start = tl.minimum(some_start, tl.min(tl.where(some, i, q_end), 0))
        some_end = tl.maximum(some_end, tl.max(tl.where(some, i + 1, q_first), 0))
        all_start = tl.minimum(all_start, tl.min(tl.where(every, i, q_end), 0))
        all_end = tl.maximum(all_end, tl.max(tl.where(every, i + 1, q_first), 0))
        count += tl.sum(every.to(tl.int32), 0)
    all_end = tl.where(count == all_end - all_start, all_end, all_start)
    return tl.minimum(some_start, some_end), some_end, all_start, all_end


@jit
def add_key_gradients(
    dk, dv, y, z, j, head, at, until, q, grad, lse, delta, spans, span, q_t, q_h, g_t, g_h, heads, num_q, num_kv,
    captures, numbers, scale, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, SCORED: tl.constexpr,
    SPANS: tl.constexpr, KINDS: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Add one step of queries, each with PACK heads, to dK, before the factor `scale`, and dV."""
    row = tl.arange(0, ROWS)
    i = at + row // PACK
    h = head + row % PACK
    inside = i < until
    far, near = at.to(tl.int64), row // PACK  # what is added to the address of the first row is the same in every step
    x = load_rows(q + far * q_t, offsets_of(near, h, q_t, q_h), inside, D, BLOCK_D, CHECKED)
    g = load_rows(grad + far * g_t, offsets_of(near, h, g_t, g_h), inside, E, BLOCK_E, CHECKED)
    place = far * heads + (near * heads + h)
    base = tl.load(lse + place, mask=inside, other=0.0)
    base = tl.where(base == float("-inf"), 0.0, base) * LOG2_E
    compared = tl.load(delta + place, mask=inside, other=0.0)
    query, key, of_mods = i[None, :], j[:, None], head
    if PACK > 1:
        of_mods = h[None, :]
    s, raw = scores_of(
        products(x, y, True, PRECISION), of_mods, query, key, num_q, num_kv, captures, numbers, scale, SCORE, SCORED
    )  # fmt: skip
    w, dw = tl.exp2(s - base[None, :]), products(g, z, True, PRECISION)
    ds = score_gradient(
        w, dw, compared[None, :], raw, of_mods, query, key, num_q, num_kv, captures, numbers, DSCORE, SCORED
    )  # fmt: skip
    if CHECKED:
        lo, hi, _, _ = span_of(spans, span, i, inside, num_q, SPANS, KINDS)
        allowed = allowed_in(
            lo[None, :], hi[None, :], of_mods, query, key, num_q, num_kv, captures, numbers, MASK, KINDS
        )  # fmt: skip
        w = tl.where(allowed, w, 0.0)
        ds = tl.where(allowed, ds, 0.0)
    dv = tl.dot(w.to(g.dtype), g, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)
    return dk, dv


@jit(do_not_specialize=VARYING)
def softmax_of_keys(
    q, k, v, grad, lse, delta, dk, dv, spans, mask_of, items, captures, numbers, scale, num_items, num_q, num_kv, heads,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, dk_t, dk_h, dv_t, dv_h, MASK: tl.constexpr, SCORE: tl.constexpr,
    DSCORE: tl.constexpr, SCORED: tl.constexpr, MASKS: tl.constexpr, SPANS: tl.constexpr, KINDS: tl.constexpr,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dK and dV of an item's keys, summed over the heads of their group in order."""
    item = tl.program_id(0)
    first = tl.load(items + item)
    end = tl.load(items + num_items + item)
    if first < end:
        q_first = tl.load(items + 2 * num_items + item)
        q_end = tl.load(items + 3 * num_items + item)
        group = tl.program_id(1)
        j = first + tl.arange(0, ROWS)
        stop = tl.minimum(first + ROWS, end)
        wide, broad = j.to(tl.int64), group.to(tl.int64)
        y = load_rows(k + broad * k_h, wide * k_t, j < stop, D, BLOCK_D, True)
        z = load_rows(v + broad * v_h, wide * v_t, j < stop, E, BLOCK_E, True)
        dy = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dz = tl.zeros((ROWS, BLOCK_E), tl.float32)
        for turn_of_heads in range(GROUP // PACK):
            head = group * GROUP + turn_of_heads * PACK
            own = mask_at(spans, mask_of, head, num_q, SPANS, KINDS, MASKS)
            for span in range(SPANS):
                some_start, some_end, all_start, all_end = queries_of(
                    own, span, first, stop, q_first, q_end, num_q, SPANS, KINDS
                )  # fmt: skip
                before, after, begin, past, many = steps_in(
                    some_start, some_end, all_start, all_end, STEP // PACK, WIDE // PACK
                )  # fmt: skip
                for turn in range(before + after):
                    skipped = tl.where(turn < before, some_start, past - before * (STEP // PACK))
                    dy, dz = add_key_gradients(
                        dy, dz, y, z, j, head, skipped + turn * (STEP // PACK), some_end, q, grad, lse, delta, own,
                        span, q_t, q_h, g_t, g_h, heads, num_q, num_kv, captures, numbers, scale, MASK, SCORE, DSCORE,
                        SCORED, SPANS, KINDS, PACK, D, E, BLOCK_D, BLOCK_E, STEP, PRECISION, True,
                    )  # fmt: skip
                for turn in range(many):
                    dy, dz = add_key_gradients(
                        dy, dz, y, z, j, head, begin + turn * (WIDE // PACK), some_end, q, grad, lse, delta, own, span,
                        q_t, q_h, g_t, g_h, heads, num_q, num_kv, captures, numbers, scale, MASK, SCORE, DSCORE,
                        SCORED, SPANS, KINDS, PACK, D, E, BLOCK_D, BLOCK_E, WIDE, PRECISION, False,
                    )  # fmt: skip
        store_rows(dk + broad * dk_h, dy * scale, wide * dk_t, j < stop, D, BLOCK_D)
        store_rows(dv + broad * dv_h, dz, wide * dv_t, j < stop, E, BLOCK_E)
