"""Triton kernels for stick-breaking attention over a plan's tiles, forward and backward.

``log w_ij = s_ij - sum_{j <= k, k allowed} softplus(s_ik)``: a program takes some rows of a head and walks their tiles
from right to left, the nearest key first, and carries for each row the sum over the keys that it has passed.

With ``g_ij = w_ij (do_i · v_j)``, the backward is ``ds_ij = g_ij - sigmoid(s_ij) (dl_i + sum_{k <= j} g_ik)``, where
dl_i is the gradient of the log of row i's remainder. Its sums run from the left. So the row walk is done twice: by
:func:`sum_right`, which stores the sums carried into each step from its right, and back by :func:`of_queries`, which
stores those carried in from its left. With these notes :func:`of_keys` can take the tiles of a column in any order.
Nothing is added atomically, so results are bitwise the same every time.

Masked scores are replaced by a select, not multiplied by 0. In weighted sums of a matrix's rows, a row with a
non-finite entry counts as zeros, with weight NaN for the rows that may attend it: so in a tile that two segments share,
neither can affect the other. (:func:`find_spoiled` marks such rows.)
"""

from __future__ import annotations

import triton.language as tl

from flexjag.kernels.math import jit


@jit
def load_rows(base, row, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of D features; zeros for rows not `inside`."""
    d = tl.arange(0, BLOCK)
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0)


@jit
def store_rows(base, x, row, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows of D features that are `inside`; the reverse of `load_rows`."""
    d = tl.arange(0, BLOCK)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["T"])
def find_spoiled(x, spoiled, T, x_t, x_h, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store NaN for each row of a head with a non-finite entry, 0 for the others."""
    h = tl.program_id(1)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = load_rows(x + h.to(tl.int64) * x_h, t, x_t, t < T, D, BLOCK_D)
    bad = tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0.0, 1.0), 1)
    tl.store(spoiled + h.to(tl.int64) * T + t, tl.where(bad > 0, float("nan"), 0.0), mask=t < T)


@jit
def softplus(s):
    """``log(1 + exp(s))`` to 2 units in the last place, small results included, where `tl.log` is not: a polynomial."""
    u = tl.exp(-tl.abs(s))
    p = u * 0.005232624243944883 - 0.029504956677556038
    p = p * u + 0.07822549343109131
    p = p * u - 0.1366320699453354
    p = p * u + 0.1910598874092102
    p = p * u - 0.2484297752380371
    p = p * u + 0.3331909477710724
    p = p * u - 0.4999949336051941
    p = p * u + 0.9999999403953552
    return tl.maximum(s, 0.0) + p * u


@jit
def sigmoid(s):
    """``1 / (1 + exp(-s))``, from the same exponential as `softplus`."""
    u = tl.exp(-tl.abs(s))
    return tl.where(s >= 0, 1.0, u) / (1.0 + u)


@jit
def is_allowed(h, q, kv, T_Q, T_KV, is_full, captures, numbers, MASK: tl.constexpr):
    """The mask of query and key indices that broadcast; False beyond T_Q and T_KV."""
    ok = (q < T_Q) & (kv < T_KV)
    if is_full == 0:
        ok = ok & MASK(h, tl.minimum(q, T_Q - 1), tl.minimum(kv, T_KV - 1), captures, numbers)
    return ok


@jit
def modified(s, h, q, kv, T_Q, T_KV, captures, numbers, SCORE: tl.constexpr):
    """The scores after the score function."""
    return SCORE(s, h, tl.minimum(q, T_Q - 1), tl.minimum(kv, T_KV - 1), captures, numbers)


@jit
def row_walk(entries, begin, first, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SELF):
    """A row block's tile range `start` to `end`, and the number of steps of BLOCK_N keys to skip at its right end.

    In self-attention the keys of these steps are all later than the rows.
    """
    start = tl.load(begin + first // BLOCK)
    end = tl.load(begin + first // BLOCK + 1)
    last = tl.load(entries + end - 1, mask=end > start, other=0) // 2
    behind = tl.maximum((last + 1) * BLOCK - (first + BLOCK_M), 0) // BLOCK_N
    return start, end, tl.where(SELF, tl.minimum(behind, BLOCK // BLOCK_N), 0)


@jit(do_not_specialize=["numbers", "T_Q", "T_KV"])
def stick_breaking(
    q, k, v, spoiled, out, left, entries, begin, captures, numbers, scale, T_Q, T_KV,
    q_t, q_h, k_t, k_h, v_t, v_h, GROUP: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, SELF: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward kernel: the output and the log-remainder of BLOCK_M rows of a head."""
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # rows with many keys come last: start with them
    h, heads = tl.program_id(1), tl.num_programs(1)
    g = (h // GROUP).to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    x = load_rows(q + h.to(tl.int64) * q_h, m, q_t, m < T_Q, D, BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    carry = tl.zeros((BLOCK_M,), tl.float32)
    start, end, skip = row_walk(entries, begin, first, BLOCK, BLOCK_M, BLOCK_N, SELF)
    for step in range(skip, (end - start) * STEPS):
        entry = tl.load(entries + end - 1 - step // STEPS)
        n0 = entry // 2 * BLOCK + (STEPS - 1 - step % STEPS) * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        y = load_rows(k + g * k_h, n, k_t, n < T_KV, D, BLOCK_D)
        bad = tl.load(spoiled + g * T_KV + n, mask=n < T_KV, other=0)
        z = load_rows(v + g * v_h, n, v_t, (n < T_KV) & (bad == 0), E, BLOCK_E)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        s = modified(s, h, m[:, None], n[None, :], T_Q, T_KV, captures, numbers, SCORE)
        ok = is_allowed(h, m[:, None], n[None, :], T_Q, T_KV, entry % 2, captures, numbers, MASK)
        since = tl.cumsum(tl.where(ok, softplus(s), 0.0), 1, reverse=True) + carry[:, None]
        w = tl.where(ok, tl.exp(s - since + bad[None, :]), 0.0)
        carry = tl.sum(tl.where((n == n0)[None, :], since, 0.0), 1)  # of the first key: fewer registers than a new sum
        total = tl.dot(w.to(z.dtype), z, total, input_precision=PRECISION)
    store_rows(out + h * E, total, m, heads * E, m < T_Q, E, BLOCK_E)
    tl.store(left + m.to(tl.int64) * heads + h, -carry, mask=m < T_Q)


@jit(do_not_specialize=["numbers", "T_Q", "T_KV", "TILES", "head"])
def sum_right(
    q, k, right, entries, begin, captures, numbers, scale, T_Q, T_KV, TILES, head, q_t, q_h, k_t, k_h,
    GROUP: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, SELF: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward kernel: store, for each step of a row walk, the sums of softplus over the keys to its right."""
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = head + tl.program_id(1)
    m = first + tl.arange(0, BLOCK_M)
    k += (h // GROUP).to(tl.int64) * k_h
    right += tl.program_id(1).to(tl.int64) * TILES * (STEPS * BLOCK)
    x = load_rows(q + h.to(tl.int64) * q_h, m, q_t, m < T_Q, D, BLOCK_D)
    carry = tl.zeros((BLOCK_M,), tl.float32)
    start, end, skip = row_walk(entries, begin, first, BLOCK, BLOCK_M, BLOCK_N, SELF)
    for step in range(skip, (end - start) * STEPS):
        tile, part = end - 1 - step // STEPS, STEPS - 1 - step % STEPS
        entry = tl.load(entries + tile)
        n = entry // 2 * BLOCK + part * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(right + (tile.to(tl.int64) * STEPS + part) * BLOCK + m % BLOCK, carry)
        y = load_rows(k, n, k_t, n < T_KV, D, BLOCK_D)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        s = modified(s, h, m[:, None], n[None, :], T_Q, T_KV, captures, numbers, SCORE)
        ok = is_allowed(h, m[:, None], n[None, :], T_Q, T_KV, entry % 2, captures, numbers, MASK)
        carry += tl.sum(tl.where(ok, softplus(s), 0.0), 1)


@jit(do_not_specialize=["numbers", "T_Q", "T_KV", "TILES", "head"])
def of_queries(
    q, k, v, spoiled, grad, grad_left, dq, right, left, entries, begin, captures, numbers, scale, T_Q, T_KV, TILES,
    head, heads, q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, GROUP: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr,
    DSCORE: tl.constexpr, SELF: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dQ of BLOCK_M rows; stores the gradients carried into each step from the scores to its left."""
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = head + tl.program_id(1)
    group = (h // GROUP).to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    notes = tl.program_id(1).to(tl.int64) * TILES * (STEPS * BLOCK)
    x = load_rows(q + h.to(tl.int64) * q_h, m, q_t, m < T_Q, D, BLOCK_D)
    do = load_rows(grad + h.to(tl.int64) * g_h, m, g_t, m < T_Q, E, BLOCK_E)
    carry = tl.load(grad_left + m.to(tl.int64) * heads + h, mask=m < T_Q, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, end, skip = row_walk(entries, begin, first, BLOCK, BLOCK_M, BLOCK_N, SELF)
    for step in range((end - start) * STEPS - skip):
        tile = start + step // STEPS
        part = step - (tile - start) * STEPS
        entry = tl.load(entries + tile)
        n = entry // 2 * BLOCK + part * BLOCK_N + tl.arange(0, BLOCK_N)
        note = notes + (tile.to(tl.int64) * STEPS + part) * BLOCK + m % BLOCK
        bad = tl.load(spoiled + group * T_KV + n, mask=n < T_KV, other=0)
        y = load_rows(k + group * k_h, n, k_t, (n < T_KV) & (bad == 0), D, BLOCK_D)
        z = load_rows(v + group * v_h, n, v_t, n < T_KV, E, BLOCK_E)
        raw = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale + bad[None, :]
        s = modified(raw, h, m[:, None], n[None, :], T_Q, T_KV, captures, numbers, SCORE)
        ok = is_allowed(h, m[:, None], n[None, :], T_Q, T_KV, entry % 2, captures, numbers, MASK)
        since = tl.cumsum(tl.where(ok, softplus(s), 0.0), 1, reverse=True) + tl.load(right + note)[:, None]
        flow = tl.exp(s - since) * tl.dot(do, tl.trans(z), input_precision=PRECISION)
        flow = tl.where(ok, flow, 0.0)
        tl.store(left + note, carry)
        ds = flow - sigmoid(s) * (tl.cumsum(flow, 1) + carry[:, None])
        carry += tl.sum(flow, 1)
        ds = DSCORE(ds, raw, h, tl.minimum(m, T_Q - 1)[:, None], tl.minimum(n, T_KV - 1)[None, :], captures, numbers)
        ds = tl.where(ok, ds, 0.0)
        total = tl.dot(ds.to(y.dtype), y, total, input_precision=PRECISION)
    store_rows(dq + h * D, total * scale, m, heads * D, m < T_Q, D, BLOCK_D)


@jit(do_not_specialize=["numbers", "T_Q", "T_KV", "TILES", "head"])
def of_keys(
    q, k, v, spoiled_q, spoiled_g, grad, dk, dv, right, left, entries, begin, tiles, captures, numbers, scale, T_Q,
    T_KV, TILES, head, groups, q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, GROUP: tl.constexpr, MASK: tl.constexpr,
    SCORE: tl.constexpr, DSCORE: tl.constexpr, SELF: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward kernel: dK and dV of BLOCK_N keys, summed over all rows of all heads that read them, in order."""
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    first = tl.program_id(0) * BLOCK_N
    group = (head // GROUP + tl.program_id(1)).to(tl.int64)
    n = first + tl.arange(0, BLOCK_N)
    part = first % BLOCK // BLOCK_N
    y = load_rows(k + group * k_h, n, k_t, n < T_KV, D, BLOCK_D)
    z = load_rows(v + group * v_h, n, v_t, n < T_KV, E, BLOCK_E)
    dy = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dz = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    start = tl.load(begin + first // BLOCK)
    end = tl.load(begin + first // BLOCK + 1)
    upper = tl.load(entries + start, mask=end > start, other=0) // 2
    earlier = tl.maximum(first - upper * BLOCK, 0) // BLOCK_M  # steps whose rows are earlier than all keys
    skip = tl.where(SELF, tl.minimum(earlier, PARTS), 0)
    steps = tl.maximum((end - start) * PARTS - skip, 0)
    for turn in range(steps * GROUP):
        step = skip + turn % steps
        member = tl.program_id(1) * GROUP + turn // steps
        h = head + member
        entry = tl.load(entries + start + step // PARTS)
        tile = tl.load(tiles + start + step // PARTS)
        m = entry // 2 * BLOCK + step % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
        note = (member.to(tl.int64) * TILES + tile) * (STEPS * BLOCK) + part * BLOCK + m % BLOCK
        bad = tl.load(spoiled_q + h.to(tl.int64) * T_Q + m, mask=m < T_Q, other=0)
        bad_do = tl.load(spoiled_g + h.to(tl.int64) * T_Q + m, mask=m < T_Q, other=0)
        x = load_rows(q + h.to(tl.int64) * q_h, m, q_t, (m < T_Q) & (bad == 0), D, BLOCK_D)
        do = load_rows(grad + h.to(tl.int64) * g_h, m, g_t, (m < T_Q) & (bad_do == 0), E, BLOCK_E)
        raw = tl.dot(y, tl.trans(x), input_precision=PRECISION) * scale + bad[None, :]
        s = modified(raw, h, m[None, :], n[:, None], T_Q, T_KV, captures, numbers, SCORE)
        ok = is_allowed(h, m[None, :], n[:, None], T_Q, T_KV, entry % 2, captures, numbers, MASK)
        since = tl.cumsum(tl.where(ok, softplus(s), 0.0), 0, reverse=True) + tl.load(right + note)[None, :]
        w = tl.where(ok, tl.exp(s - since + bad_do[None, :]), 0.0)
        dz = tl.dot(w.to(do.dtype), do, dz, input_precision=PRECISION)
        flow = tl.where(ok, w * tl.dot(z, tl.trans(do), input_precision=PRECISION), 0.0)
        ds = flow - sigmoid(s) * (tl.cumsum(flow, 0) + tl.load(left + note)[None, :])
        ds = DSCORE(ds, raw, h, tl.minimum(m, T_Q - 1)[None, :], tl.minimum(n, T_KV - 1)[:, None], captures, numbers)
        ds = tl.where(ok, ds, 0.0)
        dy = tl.dot(ds.to(x.dtype), x, dy, input_precision=PRECISION)
    store_rows(dk + group * D, dy * scale, n, groups * D, n < T_KV, D, BLOCK_D)
    store_rows(dv + group * E, dz, n, groups * E, n < T_KV, E, BLOCK_E)
