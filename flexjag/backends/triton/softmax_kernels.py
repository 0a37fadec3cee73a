"""Softmax attention with Triton: tiles of queries that begin where their segment begins, and the forward kernel.

An item is a run of query tokens of one segment. A program has ROWS rows of one item: PACK query heads that share a key
head, for each token. Tensor cores have tiles of at least 16 rows and 8 columns; with 8 rows a tile is FLIPPED: its
scores are ``[keys, rows]``. A row's spans say which keys it may attend; for each span index a program goes from
the first to the last key that any of its rows may attend, in steps that begin at the first one. Steps of keys that all
rows attend are not tested, and have WIDE keys; the others have STEP keys, and every score of theirs is tested.

A pair of a row and a key is visited once for each span index whose range holds the key, and is allowed in one of them:
a row's spans are disjoint. No program reads a token of another segment, so NaN and inf stay where they are, and a
segment's result does not depend on the others, to the last bit.
"""

from __future__ import annotations

import triton.language as tl

from flexjag.kernels.math import jit

VARYING = ["num_items", "num_q", "num_kv", "numbers"]
"""Arguments that vary from batch to batch, which Triton must not specialize on 1 or on divisibility by 16."""

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(2**31 - 1)


@jit
def load_rows(x, offset, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Load rows of SIZE features that begin at 64-bit offsets; zeros for rows not `inside`, if CHECKED."""
    column = tl.arange(0, BLOCK)
    place = x + offset[:, None] + column[None, :]
    if CHECKED:
        rows = tl.load(place, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
    elif BLOCK == SIZE:
        rows = tl.load(place)
    else:
        rows = tl.load(place, mask=(column < SIZE)[None, :], other=0.0)
    return rows


@jit
def load_keys(x, at, stop, step, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Load the rows of KEYS tokens from `at` on; zeros from `stop` on, if CHECKED."""
    key = tl.arange(0, KEYS)  # what is added to the address of the first one is the same in every step
    return load_rows(x + at.to(tl.int64) * step, key.to(tl.int64) * step, key < stop - at, SIZE, BLOCK, CHECKED)


@jit
def store_rows(x, rows, offset, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rows that are `inside`; the reverse of `load_rows`."""
    column = tl.arange(0, BLOCK)
    place = x + offset[:, None] + column[None, :]
    tl.store(place, rows.to(x.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])


@jit
def offsets_of(i, h, step, head_step):
    """Offsets of rows of tokens `i` and heads `h`, in 64 bits."""
    return i.to(tl.int64) * step + h.to(tl.int64) * head_step


@jit
def along_rows(x, FLIPPED: tl.constexpr):
    """Numbers of rows as a column of ``[rows, keys]`` or, if FLIPPED, a row of ``[keys, rows]``."""
    return x[None, :] if FLIPPED else x[:, None]


@jit
def along_keys(x, FLIPPED: tl.constexpr):
    """Numbers of keys as a row of ``[rows, keys]`` or, if FLIPPED, a column of ``[keys, rows]``."""
    return x[:, None] if FLIPPED else x[None, :]


@jit
def products(x, y, FLIPPED: tl.constexpr, PRECISION: tl.constexpr):
    """``x yᵀ`` of rows `x` and keys `y`, ``[rows, keys]``; its transpose if FLIPPED."""
    return tl.dot(y if FLIPPED else x, tl.trans(x if FLIPPED else y), input_precision=PRECISION)


@jit
def add_weighted(total, w, z, FLIPPED: tl.constexpr, PRECISION: tl.constexpr):
    """``total + w z`` of weights ``[rows, keys]``, ``[rows, features]``; transposed all but `z` if FLIPPED."""
    if FLIPPED:
        total = tl.dot(tl.trans(z), w.to(z.dtype), total, input_precision=PRECISION)
    else:
        total = tl.dot(w.to(z.dtype), z, total, input_precision=PRECISION)
    return total


@jit
def zeros_of_rows(ROWS: tl.constexpr, BLOCK: tl.constexpr, FLIPPED: tl.constexpr):
    """A sum to begin with for :func:`add_weighted`."""
    return tl.zeros((BLOCK, ROWS), tl.float32) if FLIPPED else tl.zeros((ROWS, BLOCK), tl.float32)


@jit
def unflipped(total, FLIPPED: tl.constexpr):
    """A sum of :func:`add_weighted` as ``[rows, features]``."""
    return tl.trans(total) if FLIPPED else total


@jit
def mask_at(spans, mask_of, head, num_q, SPANS: tl.constexpr, KINDS: tl.constexpr, MASKS: tl.constexpr):
    """Where the spans of a head's mask begin."""
    if MASKS:
        spans += tl.load(mask_of + head).to(tl.int64) * (KINDS * SPANS) * num_q
    return spans


@jit
def span_of(spans, span, i, inside, num_q, SPANS: tl.constexpr, KINDS: tl.constexpr):
    """The outer and the inner bounds of rows: ``lo``, ``hi``, and those between which every key is allowed."""
    at = spans + num_q.to(tl.int64) * span + i
    size = num_q.to(tl.int64) * SPANS
    lo = tl.load(at, mask=inside, other=0)
    hi = tl.load(at + size, mask=inside, other=0)
    sure_lo, sure_hi = lo, hi
    if KINDS == 4:
        sure_lo = tl.maximum(lo, tl.load(at + 2 * size, mask=inside, other=0))
        sure_hi = tl.minimum(hi, tl.load(at + 3 * size, mask=inside, other=0))
    return lo, hi, sure_lo, sure_hi


@jit
def keys_of(spans, span, i, inside, num_q, SPANS: tl.constexpr, KINDS: tl.constexpr):
    """The bounds of rows, those of the keys that any of them may attend, and of those that all of them attend."""
    lo, hi, sure_lo, sure_hi = span_of(spans, span, i, inside, num_q, SPANS, KINDS)
    stop = tl.max(tl.where(hi > lo, hi, 0), 0)
    start = tl.minimum(tl.min(tl.where(hi > lo, lo, LARGEST), 0), stop)
    return lo, hi, start, stop, tl.max(sure_lo, 0), tl.min(tl.where(inside, sure_hi, LARGEST), 0)


@jit
def steps_in(start, stop, sure_start, sure_stop, STEP: tl.constexpr, WIDE: tl.constexpr):
    """The steps over ``[start, stop)``, of which ``[sure_start, sure_stop)`` needs no tests.

    Returns:
        The numbers of tested steps before and after the others, where the others start and end, and their number.
    """
    sure_start = tl.minimum(tl.maximum(sure_start, start), stop)
    before = (sure_start - start + STEP - 1) // STEP
    begin = start + before * STEP
    many = tl.maximum(tl.minimum(sure_stop, stop) - begin, 0) // WIDE
    end = begin + many * WIDE
    after = tl.maximum(stop - end + STEP - 1, 0) // STEP
    return before, after, begin, end, many


@jit
def scores_of(
    product, h, i, j, num_q, num_kv, captures, numbers, scale, SCORE: tl.constexpr, SCORED: tl.constexpr
):  # fmt: skip
    """The score to base 2 of ``q·k``, and ``q·k`` times `scale` if there is a score function."""
    raw = product
    if SCORED:
        raw = product * scale
        i, j = tl.minimum(i, num_q - 1), tl.minimum(j, num_kv - 1)
        s = SCORE(raw, h, i, j, captures, numbers) * LOG2_E
    else:
        s = product * (scale * LOG2_E)
    return s, raw


@jit
def allowed_in(
    lo, hi, h, i, j, num_q, num_kv, captures, numbers, MASK: tl.constexpr, KINDS: tl.constexpr
):  # fmt: skip
    """The mask of some rows and keys, in the rows' spans."""
    allowed = (j >= lo) & (j < hi)
    if KINDS == 4:
        allowed = allowed & MASK(h, tl.minimum(i, num_q - 1), tl.minimum(j, num_kv - 1), captures, numbers)
    return allowed


@jit
def attend(
    top, total, out, x, h, i, lo, hi, at, stop, k, v, k_t, v_t, num_q, num_kv, captures, numbers, scale,
    MASK: tl.constexpr, SCORE: tl.constexpr, SCORED: tl.constexpr, KINDS: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, KEYS: tl.constexpr, FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the running maximum, sum of weights and weighted sum of values."""
    key = along_keys(at + tl.arange(0, KEYS), FLIPPED)
    y = load_keys(k, at, stop, k_t, KEYS, D, BLOCK_D, CHECKED)
    s, _ = scores_of(
        products(x, y, FLIPPED, PRECISION), h, i, key, num_q, num_kv, captures, numbers, scale, SCORE, SCORED
    )  # fmt: skip
    if CHECKED:
        allowed = allowed_in(lo, hi, h, i, key, num_q, num_kv, captures, numbers, MASK, KINDS)
        s = tl.where(allowed, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 0 if FLIPPED else 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    w = tl.exp2(s - along_rows(base, FLIPPED))
    kept = tl.exp2(top - base)
    z = load_keys(v, at, stop, v_t, KEYS, E, BLOCK_E, CHECKED)
    out = add_weighted(out * along_rows(kept, FLIPPED), w, z, FLIPPED, PRECISION)
    return new, total * kept + tl.sum(w, 0 if FLIPPED else 1), out


@jit(do_not_specialize=VARYING)
def softmax_forward(
    q, k, v, out, lse, spans, mask_of, items, captures, numbers, scale, num_items, num_q, num_kv, heads,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, MASK: tl.constexpr, SCORE: tl.constexpr, SCORED: tl.constexpr,
    MASKS: tl.constexpr, SPANS: tl.constexpr, KINDS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr, FLIPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward kernel: the output and the log-sum-exp of an item's rows."""
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
        query, of_mods = along_rows(i, FLIPPED), head
        if PACK > 1:
            of_mods = along_rows(h, FLIPPED)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        value = zeros_of_rows(ROWS, BLOCK_E, FLIPPED)
        for span in range(SPANS):
            lo, hi, start, stop, sure_start, sure_stop = keys_of(spans, span, i, inside, num_q, SPANS, KINDS)
            before, after, begin, past, many = steps_in(start, stop, sure_start, sure_stop, STEP, WIDE)
            lo, hi = along_rows(lo, FLIPPED), along_rows(hi, FLIPPED)
            for turn in range(before + after):
                at = tl.where(turn < before, start + turn * STEP, past + (turn - before) * STEP)
                top, total, value = attend(
                    top, total, value, x, of_mods, query, lo, hi, at, stop, k, v, k_t, v_t,
                    num_q, num_kv, captures, numbers, scale, MASK, SCORE, SCORED, KINDS, D, E, BLOCK_D, BLOCK_E,
                    STEP, FLIPPED, PRECISION, True,
                )  # fmt: skip
            for turn in range(many):
                top, total, value = attend(
                    top, total, value, x, of_mods, query, lo, hi, begin + turn * WIDE, stop,
                    k, v, k_t, v_t, num_q, num_kv, captures, numbers, scale, MASK, SCORE, SCORED, KINDS, D, E,
                    BLOCK_D, BLOCK_E, WIDE, FLIPPED, PRECISION, False,
                )  # fmt: skip
        some = tl.where(total == 0.0, 1.0, total)
        value = unflipped(value / along_rows(some, FLIPPED), FLIPPED)
        store_rows(out, value, offsets_of(i, h, out_t, out_h), inside, E, BLOCK_E)
        log = tl.where(total == 0.0, float("-inf"), top * LOG_2 + tl.log(some))
        tl.store(lse + i.to(tl.int64) * heads + h, log, mask=inside)
