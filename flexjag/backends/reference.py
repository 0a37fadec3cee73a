"""The oracle: dense attention, one segment at a time, in the inputs' own precision.

It imports nothing of the middle end (spans, tiles, mods), so that it can disagree with it. Clarity over speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import normalizers as nz
from flexjag.algebra import scores as s
from flexjag.algebra import user_functions as functions
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.dropping import FACTORS, STEP, Dropped
from flexjag.algebra.facts import diagonal_align
from flexjag.algebra.node import is_integer, saturated
from flexjag.algebra.scalars import blamed
from flexjag.algebra.tokens import Keys, Queries
from flexjag.backends.base import ALL, Asked, Backend, Promises
from flexjag.errors import MaskError, ScoreError


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment's coordinates.

    Attributes:
        index: The segment's number, 0 to S - 1.
        heads: H.
        i: ``[n, 1]`` local query positions.
        j: ``[1, m]`` local key positions.
        q_rows: The segment's packed query tokens.
        kv_rows: The segment's packed key tokens.
        matrices_before: Entries of packed dense masks that belong to earlier segments.
    """

    index: int
    heads: int
    i: Tensor
    j: Tensor
    q_rows: slice
    kv_rows: slice
    matrices_before: int

    @property
    def n(self) -> int:
        """Number of queries."""
        return self.i.shape[0]

    @property
    def m(self) -> int:
        """Number of keys."""
        return self.j.shape[1]


dense = Interpretation("dense mask", m.Mask, decorator="dense")
"""``dense(mask, segment)``: the mask as a bool tensor that broadcasts to ``[H, n, m]``."""


def _at(bound: m.Bound, seg: Segment) -> int:
    value: int = bound.tolist()[seg.index] if isinstance(bound, Tensor) else bound
    return max(-(2**32), min(value, 2**32))  # more than any position, and what arithmetic on positions can hold


def _lined_up(align: str, seg: Segment) -> Tensor:
    return seg.i + (seg.m - seg.n if align == "end" else 0)


@dense.register(m.Full)
def _(mask: m.Full, seg: Segment) -> Tensor:
    return torch.ones(seg.n, seg.m, dtype=torch.bool, device=seg.i.device)


@dense.register(m.Causal)
def _(mask: m.Causal, seg: Segment) -> Tensor:
    return seg.j <= _lined_up(mask.align, seg)


@dense.register(m.Window)
def _(mask: m.Window, seg: Segment) -> Tensor:
    at, allowed = _lined_up(mask.align, seg), dense(m.Full(), seg)
    if mask.left is not None:
        allowed = allowed & (at - _at(mask.left, seg) <= seg.j)
    if mask.right is not None:
        allowed = allowed & (seg.j <= at + _at(mask.right, seg))
    return allowed


@dense.register(m.Prefix)
def _(mask: m.Prefix, seg: Segment) -> Tensor:
    return (seg.j < _at(mask.n, seg)).expand(seg.n, seg.m)


@dense.register(m.Chunked)
def _(mask: m.Chunked, seg: Segment) -> Tensor:
    size = _at(mask.size, seg)
    return _lined_up(mask.align, seg) // size == seg.j // size


@dense.register(m.GlobalTokens)
def _(mask: m.GlobalTokens, seg: Segment) -> Tensor:
    n = _at(mask.n, seg)
    return (seg.i < n) | (seg.j < n)


@dense.register(m.Rows)
def _(mask: m.Rows, seg: Segment) -> Tensor:
    lo, hi = (saturated(x).reshape(-1, x.shape[-1])[:, seg.q_rows, None] for x in (mask.lo, mask.hi))
    return ((lo <= seg.j) & (seg.j < hi)).any(0)


@dense.register(m.SameGroup)
def _(mask: m.SameGroup, seg: Segment) -> Tensor:
    kv_ids = mask.ids if mask.kv_ids is None else mask.kv_ids
    return mask.ids[seg.q_rows, None] == kv_ids[None, seg.kv_rows]


@dense.register(m.Dense)
def _(mask: m.Dense, seg: Segment) -> Tensor:
    if mask.values.ndim == 1:
        start = seg.matrices_before
        return mask.values[start : start + seg.n * seg.m].view(seg.n, seg.m)
    allowed = torch.zeros(seg.n, seg.m, dtype=torch.bool, device=seg.i.device)
    part = mask.values[: seg.n, : seg.m]
    allowed[: part.shape[0], : part.shape[1]] = part
    return allowed


@dense.register(Keys)
def _(mask: Keys, seg: Segment) -> Tensor:
    return mask.marked[None, seg.kv_rows].expand(seg.n, seg.m)


@dense.register(Queries)
def _(mask: Queries, seg: Segment) -> Tensor:
    return mask.marked[seg.q_rows, None].expand(seg.n, seg.m)


@dense.register(m.MaskMod)
def _(mask: m.MaskMod, seg: Segment) -> Tensor:
    h = torch.arange(seg.heads, device=seg.i.device)
    b = torch.tensor(seg.index, device=seg.i.device)
    with blamed(mask.fn, MaskError, b, h, seg.i, seg.j):
        return _over_heads_and_positions(mask.fn, 0)(b, h, seg.i[:, 0], seg.j[0])


@dense.register(m.PerHead)
def _(mask: m.PerHead, seg: Segment) -> Tensor:
    shape = (seg.heads, seg.n, seg.m)
    return torch.stack([dense(one, seg).expand(shape)[h] for h, one in enumerate(mask.masks)])


@dense.register(m.And)
def _(mask: m.And, seg: Segment) -> Tensor:
    return dense(mask.left, seg) & dense(mask.right, seg)


@dense.register(m.Or)
def _(mask: m.Or, seg: Segment) -> Tensor:
    return dense(mask.left, seg) | dense(mask.right, seg)


@dense.register(m.Not)
def _(mask: m.Not, seg: Segment) -> Tensor:
    return ~dense(mask.mask, seg)


def _over_heads_and_positions(fn, scores: int):  # type: ignore[no-untyped-def]
    """Vectorize a function of scalars over [H], [n] and [m] (and [H, n, m] scores) by `vmap`, as FlexAttention does."""
    for axis in (3, 2, 1):  # kv, q, h, innermost first
        fn = torch.vmap(fn, in_dims=(0,) * scores + tuple(0 if d == axis else None for d in range(4)))
    return fn


rescore = Interpretation("dense score", s.Score, decorator="rescore")
"""``rescore(score, scores [H, n, m], segment) -> scores``."""


@rescore.register(s.ScoreMod)
def _(score: s.ScoreMod, x: Tensor, seg: Segment) -> Tensor:
    h = torch.arange(seg.heads, device=x.device)
    b = torch.tensor(seg.index, device=x.device)
    with blamed(score.fn, ScoreError, b, h, seg.i, seg.j):
        return _over_heads_and_positions(score.fn, 1)(x, b, h, seg.i[:, 0], seg.j[0])


@rescore.register(s.Alibi)
def _(score: s.Alibi, x: Tensor, seg: Segment) -> Tensor:
    distance = seg.j - _lined_up(score.align, seg)
    return x + score.slopes.to(x.dtype)[:, None, None] * (-distance.abs() if score.symmetric else distance)


@rescore.register(s.SoftCap)
def _(score: s.SoftCap, x: Tensor, seg: Segment) -> Tensor:
    return score.cap * torch.tanh(x / score.cap)


@rescore.register(s.RelativeBias)
def _(score: s.RelativeBias, x: Tensor, seg: Segment) -> Tensor:
    reach = score.table.shape[1] // 2
    distance = seg.j - _lined_up(score.align, seg)
    return x + score.table.to(x.dtype)[:, distance.clamp(-reach, reach) + reach]


@rescore.register(s.BucketedBias)
def _(score: s.BucketedBias, x: Tensor, seg: Segment) -> Tensor:
    distance = seg.j - _lined_up(score.align, seg)
    bucket = (score.boundaries <= distance[..., None]).sum(2)
    return x + score.table.to(x.dtype)[:, bucket]


@rescore.register(s.T5Bias)
def _(score: s.T5Bias, x: Tensor, seg: Segment) -> Tensor:
    distance, count = seg.j - _lined_up(score.align, seg), score.table.shape[1]
    later = (distance > 0) & score.bidirectional
    count = count // 2 if score.bidirectional else count
    steps = distance.abs().where(later | (distance < 0), 0)
    single = count // 2  # so many distances have a bucket of their own
    share = torch.log(steps.clamp(min=1).float() / single) / math.log(score.max_distance / single)
    shared = (single + (share * (count - single)).long()).clamp(max=count - 1)
    return x + score.table.to(x.dtype)[:, torch.where(steps < single, steps, shared) + later * count]


@rescore.register(s.TimeBias)
def _(score: s.TimeBias, x: Tensor, seg: Segment) -> Tensor:
    kv_times = score.times if score.kv_times is None else score.kv_times
    times, kv_times = (saturated(x) if is_integer(x) else x for x in (score.times, kv_times))  # no difference wraps
    passed = times[seg.q_rows, None] - kv_times[seg.kv_rows]
    bucket = (score.boundaries <= passed.to(score.boundaries.dtype)[..., None]).sum(2)
    return x + score.table.to(x.dtype)[:, bucket]


@rescore.register(s.DenseBias)
def _(score: s.DenseBias, x: Tensor, seg: Segment) -> Tensor:
    if score.values.ndim == 3:
        return x + score.values[:, : seg.n, : seg.m].to(x.dtype)
    start = seg.matrices_before
    return x + score.values[:, start : start + seg.n * seg.m].unflatten(1, (seg.n, seg.m)).to(x.dtype)


@rescore.register(Dropped)
def _(score: Dropped, x: Tensor, seg: Segment) -> Tensor:
    def mix(bits: Tensor) -> Tensor:  # 32 bits as numbers of 64
        for shift, factor in zip((16, 15), FACTORS, strict=True):
            bits = (bits ^ (bits >> shift)) * factor % 2**32
        return bits ^ (bits >> 15)

    heads = torch.arange(seg.heads, device=x.device)[:, None, None]
    number = seg.index if score.ids is None else int(saturated(score.ids)[seg.index])
    seed, row = int(score.seed), torch.zeros((), dtype=torch.int64, device=x.device)
    for word in (seed, seed >> 32, number, number >> 32, heads, seg.i):
        row = mix(((row ^ (word % 2**32)) + STEP) % 2**32)
    drawn = mix((row + seg.j * STEP) % 2**32)
    return x.masked_fill(drawn - 2**32 * (drawn >= 2**31) < score.below, -torch.inf)


@rescore.register(s.Then)
def _(score: s.Then, x: Tensor, seg: Segment) -> Tensor:
    return rescore(score.second, rescore(score.first, x, seg), seg)


weigh = Interpretation("dense weights", nz.Normalizer)
"""``weigh(normalizer, scores [H, n, m], allowed [H, n, m], segment) -> (weights [H, n, m], rest [H, n])``.

The rest is the log-sum-exp of a softmax, the remainder of stick-breaking, and zeros otherwise.
"""


@weigh.register(nz.Softmax)
def _(normalizer: nz.Softmax, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    has_key = allowed.any(2)
    x = x.masked_fill(~allowed & has_key[..., None], -torch.inf)
    return torch.softmax(x, 2), torch.logsumexp(x, 2).masked_fill(~has_key, -torch.inf)


def _pointwise(normalizer: nz.Pointwise, weights: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    factor = normalizer.scale
    if isinstance(factor, Tensor):
        factor = factor.to(weights.dtype)
        factor = factor[seg.q_rows, None] if factor.ndim else factor
    return (weights * factor).masked_fill(~allowed, 0.0), weights.new_zeros(weights.shape[:2])


@weigh.register(nz.SiLU)
def _(normalizer: nz.SiLU, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    return _pointwise(normalizer, x * torch.sigmoid(x), allowed, seg)


@weigh.register(nz.GELU)
def _(normalizer: nz.GELU, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    if normalizer.approximate == "tanh":
        cdf = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        cdf = 0.5 * torch.erfc(-x / math.sqrt(2))
    return _pointwise(normalizer, x * cdf, allowed, seg)


@weigh.register(nz.Identity)
def _(normalizer: nz.Identity, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    return _pointwise(normalizer, x, allowed, seg)


@weigh.register(nz.Sigmoid)
def _(normalizer: nz.Sigmoid, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    bias = -math.log(seg.m) if normalizer.bias is None else normalizer.bias
    bias = bias.to(x.dtype)[:, None, None] if isinstance(bias, Tensor) else bias
    return _pointwise(normalizer, torch.sigmoid(x + bias), allowed, seg)


@weigh.register(nz.StickBreaking)
def _(normalizer: nz.StickBreaking, x: Tensor, allowed: Tensor, seg: Segment) -> tuple[Tensor, Tensor]:
    log_kept = torch.nn.functional.logsigmoid(-x).masked_fill(~allowed, 0.0)
    later = torch.ones(seg.m, seg.m, dtype=x.dtype, device=x.device).tril(-1)  # [k, j]: k comes after j
    log_weights = torch.nn.functional.logsigmoid(x) + log_kept @ later
    return torch.exp(log_weights).masked_fill(~allowed, 0.0), torch.exp(log_kept.sum(2))


def dense_allowed(mask: m.Mask, normalizer: nz.Normalizer, seg: Segment, is_self: bool) -> Tensor:
    """The mask ``[H, n, m]``, without each query's own (aligned) key if the normalizer excludes it."""
    if isinstance(normalizer, nz.StickBreaking) and not normalizer.attend_current:
        mask = m.And(mask, m.Not(m.Window(0, 0, diagonal_align(mask, is_self))))
    return dense(mask, seg).expand(seg.heads, seg.n, seg.m)


def run(q: Tensor, k: Tensor, v: Tensor, asked: Asked, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Dense attention of ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``, segment by segment.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and ``[T_q, H]`` in float32 or float64: the log-sum-exp of a softmax, the
        remainder of stick-breaking, unspecified values otherwise. Half precision is computed in float32.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    asked = asked.learning_in(compute)
    with functions.learning_once(asked.score, compute, asked.place):
        return _attend(q, k, v, asked, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, asked: Asked, scale: float) -> tuple[Tensor, Tensor]:
    layout, mask, score, normalizer = asked.layout, asked.mask, asked.score, asked.normalizer
    dtype, heads, repeats = q.dtype, q.shape[1], q.shape[1] // k.shape[1]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    no_key = 1.0 if isinstance(normalizer, nz.StickBreaking) else -torch.inf
    q_ends, kv_ends = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    outs, lses, entries = [], [], 0
    for index in range(layout.num_segments):
        q_rows, kv_rows = (slice(e[index], e[index + 1]) for e in (q_ends, kv_ends))
        n, width = q_rows.stop - q_rows.start, kv_rows.stop - kv_rows.start
        i = torch.arange(n, device=q.device)[:, None]
        j = torch.arange(width, device=q.device)[None]
        seg = Segment(index, heads, i, j, q_rows, kv_rows, entries)
        entries += n * width
        if n == 0 or width == 0:
            outs.append(q.new_zeros(n, heads, v.shape[2]))
            lses.append(q.new_full((n, heads), no_key))
            continue
        x, y, z = (t.transpose(0, 1) for t in (q[q_rows], k[kv_rows], v[kv_rows]))
        y, z = y.repeat_interleave(repeats, 0), z.repeat_interleave(repeats, 0)
        scores = x @ y.transpose(1, 2) * scale
        if score is not None:
            scores = rescore(score, scores, seg).to(q.dtype)  # its tensors may be wider than q
        ruled_out = scores == -torch.inf
        allowed = dense_allowed(mask, normalizer, seg, layout.is_self) & ~ruled_out
        scores = scores.masked_fill(ruled_out, 0.0)
        weights, rest = weigh(normalizer, scores, allowed, seg)
        out = (weights @ z).masked_fill(~allowed.any(2)[..., None], 0.0)
        if isinstance(normalizer, nz.StickBreaking) and normalizer.remainder:
            out = out + rest[..., None] * z
        outs.append(out.transpose(0, 1))
        lses.append(rest.transpose(0, 1))
    spare = q.shape[0] - q_ends[-1]
    outs.append(q.new_zeros(spare, heads, v.shape[2]))
    lses.append(q.new_full((spare, heads), no_key))
    link = q[:0].sum() + k[:0].sum() + v[:0].sum()  # 0, and differentiable even if no query meets a key
    return (torch.cat(outs) + link).to(dtype), torch.cat(lses) + link


REFERENCE = Backend(
    name="reference",
    title="dense, per segment: the oracle",
    takes="all",
    run=run,
    promises=Promises(
        second_order=True,
        untraceable="it loops over segments on the host, which cannot be traced",
        contains_nan=True,
        unmixed=True,
        wide=ALL,
    ),
)
