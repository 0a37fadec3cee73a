"""Lowering of nodes to FlexAttention's ``mask_mod`` and ``score_mod`` on packed indices.

Everything a mod reads is indexed by the query row alone, so that nothing is gathered by key in a kernel's inner
loop: a span test is ``(kv >= lo[q]) & (kv < hi[q])``, and because a key is only ever tested inside the row's own
segment, its local position is ``kv - kv_start[q]``. Only :class:`~flexjag.algebra.masks.SameGroup` reads by key.

The built-in mods broadcast: they work on FlexAttention's scalars and on index tensors alike. A user's function is
written for scalars, so on tensors it is vmapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scalars
from flexjag.algebra import scores as s
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.dropping import STEP
from flexjag.algebra.node import Align, NodeKind
from flexjag.algebra.tokens import Keys
from flexjag.algebra.tree import filled, replaced
from flexjag.algebra.user_functions import RecordedCall
from flexjag.errors import MaskError, ScoreError
from flexjag.lowering.dropping import DroppedRows, mixed
from flexjag.lowering.layout import Layout, blocks
from flexjag.lowering.pairs import BiasRows, by_row
from flexjag.lowering.spans import DenseRows, InSpans, Sandwich, diagonal
from flexjag.upstream import fence

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _look_up(table: Tensor, *index: Tensor) -> Tensor:
    return table[index]


@dataclass(frozen=True, eq=False)
class RowTables:
    """The per-query-row tensors that mods read, padded to a tile multiple where kernels round up.

    Attributes:
        segment: ``[T']`` int32, the batch index `b` that user functions see; a row without keys has another row's.
        q_pos: ``[T']`` int32, local query position; a row without keys has another row's.
        kv_start: ``[T']`` int32, first packed key of the segment.
        kv_last: ``[T']`` int32, local position of the segment's last key (at least 0).
        shift: ``[T']`` int32, ``kv_start + q_pos``: ``kv - shift[q]`` is the relative position.
        shift_end: ``[T']`` int32, the same for queries lined up with the last keys, ``kv_start + q_pos + m - n``.
        rounded: True if T' is T rounded up to a tile, False if T' is T.
        look_up: ``look_up(table, *index)``, by which built-in scores read a table that may need gradients. A backend
            whose gradients must not depend on the order of threads replaces it.
    """

    segment: Tensor
    q_pos: Tensor
    kv_start: Tensor
    kv_last: Tensor
    shift: Tensor
    shift_end: Tensor
    rounded: bool
    look_up: Callable[..., Tensor] = _look_up

    def shift_of(self, align: Align) -> Tensor:
        """`shift` or `shift_end`, as a node's `align` says."""
        return self.shift if align == "start" else self.shift_end

    def padded(self, x: Tensor) -> Tensor:
        """Pad the last dimension of a per-row tensor like the tables here.

        It pads even by 0 rows if `rounded`: a padding of 0 would otherwise be a property of the compiled graph.
        """
        return _pad_rows(x, self.segment.shape[0]) if self.rounded else x

    def padded_keys(self, x: Tensor) -> Tensor:
        """Pad a per-key tensor ``[T_kv]`` to a multiple of 128, if `rounded`."""
        return _pad_rows(x, -(-x.shape[0] // 128) * 128) if self.rounded else x


def row_tables(layout: Layout, block: int) -> RowTables:
    """Build the tables of a layout.

    Rows without keys, spare ones included, get the segment and position of a row that has keys: users' functions must
    only see indices that exist.

    A GPU's kernels round the query rows up to a tile, so everything per row is padded to one. FlexAttention's CPU
    kernels never read past T, so there nothing is padded and one size symbol serves all.
    """
    keys = layout.kv_length()
    # A row of a plan without spare rows is a key of its own segment, if queries and keys share their offsets.
    all_exist = layout.may_look and (layout.is_self or bool((keys > 0).all()))
    rows = blocks(layout.num_q, block) * block if layout.on_gpu else layout.num_q
    if all_exist:
        return RowTables(layout.q_segment, layout.q_pos, layout.kv_start, keys - 1, *_shifts(layout), rounded=False)
    zero = layout.q_pos.new_zeros(1)
    most, some = torch.cat([keys, zero]).max(0, keepdim=True)

    def existing(x: Tensor) -> Tensor:
        known = torch.where(most > 0, torch.cat([x, zero]).index_select(0, some), 0)
        x = torch.where(keys > 0, x, known)
        return fence(torch.cat([x, known.expand(rows - layout.num_q)])) if layout.on_gpu else x

    others = layout.kv_start, (keys - 1).clamp(min=0), *_shifts(layout)
    if layout.on_gpu:
        others = (_pad_rows(x, rows) for x in others)
    return RowTables(existing(layout.q_segment), existing(layout.q_pos), *others, rounded=layout.on_gpu)


def _shifts(layout: Layout) -> tuple[Tensor, Tensor]:
    at = diagonal(layout, "start")
    return at, at if layout.is_self else diagonal(layout, "end")


def one_row() -> RowTables:
    """Tables of one row on the meta device, for tracing a mod without a batch."""
    zero = torch.zeros(1, dtype=torch.int32, device="meta")
    return RowTables(*[zero] * 6, rounded=False)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Pad the last dimension with zeros to `rows`."""
    return fence(torch.nn.functional.pad(x, (0, rows - x.shape[-1])))


def rounded(one: NodeKind, t: RowTables) -> NodeKind:
    """Pad a node's per-token tensors to a multiple of the tile, for kernels that round rows up. Once per plan."""
    if not t.rounded:
        return one
    return replaced(replaced(filled(one), t.padded, ("query token",)), t.padded_keys, ("key token",))


def kernel_mask(sandwich: Sandwich, t: RowTables) -> m.Mask:
    """The mask that a kernel evaluates for one sandwich: ``outer & rest``, padded like the tables."""
    inside = InSpans(sandwich.outer.lo, sandwich.outer.hi)
    return rounded(inside if sandwich.rest is None else m.And(inside, sandwich.rest), t)


def kernel_score(score: s.Score | None, t: RowTables, layout: Layout) -> s.Score | None:
    """The score that kernels evaluate: with packed matrices by row, padded like the tables.

    Raises:
        ScoreError: If a matrix does not fit the layout's segments.
    """
    return None if score is None else rounded(by_row(score, layout), t)


def _local(t: RowTables, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Segment, query position and key position, clamped into the segment so that no lookup leaves it."""
    kv_pos = torch.minimum(kv - t.kv_start[q], t.kv_last[q]).clamp(min=0)  # last, so that a compiler sees the bound
    return t.segment[q], t.q_pos[q], kv_pos


mask_case = Interpretation("mask_mod", m.Mask, decorator="mask_case")
"""``mask_case(node, tables, layout) -> mask_mod``: one case per node that is not folded into spans."""


@mask_case.register(InSpans)
def _(mask: InSpans, t: RowTables, layout: Layout) -> MaskMod:
    lo, hi = mask.lo, mask.hi
    bounds = [(lo[k], hi[k]) for k in range(lo.shape[0])]

    def in_spans(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        inside = (kv >= bounds[0][0][q]) & (kv < bounds[0][1][q])
        for low, high in bounds[1:]:
            inside = inside | ((kv >= low[q]) & (kv < high[q]))
        return inside

    return in_spans


@mask_case.register(m.MaskMod)
def _(mask: m.MaskMod, t: RowTables, layout: Layout) -> MaskMod:
    fn = mask.fn

    def user_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        segment, q_pos, kv_pos = _local(t, q, kv)
        return scalars.apply(fn, MaskError, segment, h, q_pos, kv_pos)

    return user_mask


@mask_case.register(m.SameGroup)
def _(mask: m.SameGroup, t: RowTables, layout: Layout) -> MaskMod:
    q_ids = mask.ids
    kv_ids = mask.ids if mask.kv_ids is None else mask.kv_ids

    def same_group(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q_ids[q] == kv_ids[kv]

    return same_group


@mask_case.register(Keys)
def _(mask: Keys, t: RowTables, layout: Layout) -> MaskMod:
    return lambda b, h, q, kv: mask.marked[kv]


@mask_case.register(DenseRows)
def _(mask: DenseRows, t: RowTables, layout: Layout) -> MaskMod:
    values, base = mask.values, mask.base

    def matrix(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        at = (base[q] + kv).clamp(max=values.shape[0] - 1)  # outside the row's spans any entry will do
        return values[at.clamp(min=0)]

    return matrix


@mask_case.register(m.And)
def _(mask: m.And, t: RowTables, layout: Layout) -> MaskMod:
    left, right = mask_case(mask.left, t, layout), mask_case(mask.right, t, layout)
    return lambda b, h, q, kv: left(b, h, q, kv) & right(b, h, q, kv)


@mask_case.register(m.Or)
def _(mask: m.Or, t: RowTables, layout: Layout) -> MaskMod:
    left, right = mask_case(mask.left, t, layout), mask_case(mask.right, t, layout)
    return lambda b, h, q, kv: left(b, h, q, kv) | right(b, h, q, kv)


@mask_case.register(m.Not)
def _(mask: m.Not, t: RowTables, layout: Layout) -> MaskMod:
    inner = mask_case(mask.mask, t, layout)
    return lambda b, h, q, kv: torch.logical_not(inner(b, h, q, kv))  # Dynamo cannot trace ~ of a symbol


def mask_mod(masks: tuple[m.Mask, ...], head_of: Tensor | None, t: RowTables, layout: Layout) -> MaskMod:
    """The mask as FlexAttention's ``mask_mod`` on packed indices, in interval form where it is exact.

    Args:
        masks: One :func:`kernel_mask`, or one per distinct head mask.
        head_of: ``[H]`` int32, index into `masks` for each query head; None if there is one mask.
        t: The tables to read.
        layout: The layout they were made from.
    """
    tests = [mask_case(mask, t, layout) for mask in masks]
    if head_of is None:
        return tests[0]

    def per_head(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        which = head_of[h]
        allowed = tests[0](b, h, q, kv) & (which == 0)
        for i, test in enumerate(tests[1:], 1):
            allowed = allowed | (test(b, h, q, kv) & (which == i))
        return allowed

    return per_head


def reads_head(mod: MaskMod, t: RowTables) -> bool:
    """True if a mod reads its head. Found by calling it once, under a recorder, on the first row and key."""
    b, h, q, kv = (t.q_pos.new_zeros(()) for _ in range(4))
    return id(h) in RecordedCall.of(mod, None, (b, h, q, kv)).used


score_case = Interpretation("score_mod", s.Score, decorator="score_case")
"""``score_case(node, tables) -> score_mod``."""


@score_case.register(s.ScoreMod)
def _(score: s.ScoreMod, t: RowTables) -> ScoreMod:
    fn = score.fn

    def user_score(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        segment, q_pos, kv_pos = _local(t, q, kv)
        return scalars.apply(fn, ScoreError, x, segment, h, q_pos, kv_pos)

    return user_score


@score_case.register(s.Alibi)
def _(score: s.Alibi, t: RowTables) -> ScoreMod:
    slopes, look_up, shift = score.slopes, t.look_up, t.shift_of(score.align)
    # In the scores' dtype: a half-precision slope times a distance loses whole units.
    if score.symmetric:
        return lambda x, b, h, q, kv: x - look_up(slopes, h).to(x.dtype) * (kv - shift[q]).abs()
    return lambda x, b, h, q, kv: x + look_up(slopes, h).to(x.dtype) * (kv - shift[q])


@score_case.register(s.SoftCap)
def _(score: s.SoftCap, t: RowTables) -> ScoreMod:
    cap = float(score.cap)
    return lambda x, b, h, q, kv: cap * torch.tanh(x / cap)


@score_case.register(s.RelativeBias)
def _(score: s.RelativeBias, t: RowTables) -> ScoreMod:
    bias, reach, look_up, shift = score.table, score.max_distance, t.look_up, t.shift_of(score.align)
    return lambda x, b, h, q, kv: x + look_up(bias, h, (kv - shift[q]).clamp(-reach, reach) + reach)


@score_case.register(s.T5Bias)
def _(score: s.T5Bias, t: RowTables) -> ScoreMod:
    table, buckets, look_up, shift = score.table, score.buckets, t.look_up, t.shift_of(score.align)
    reach = score.max_distance
    return lambda x, b, h, q, kv: x + look_up(table, h, buckets[(kv - shift[q]).clamp(-reach, reach) + reach])


def _bucket(x: Tensor, boundaries: Tensor) -> Tensor:
    """Bucket index of x: the number of boundaries <= x."""
    x, most = x.to(boundaries.dtype), boundaries.shape[0]
    if x.ndim or not isinstance(x, Tensor):  # tensors that broadcast, or symbols
        return torch.bucketize(x, boundaries, right=True)
    found = torch.zeros_like(x, dtype=torch.int32)  # FlexAttention's scalars, and it cannot lower a bucketize
    for step in (1 << bit for bit in reversed(range(most.bit_length()))):
        reach = found + step
        below = (reach <= most) & (boundaries[reach.clamp(max=most) - 1] <= x)
        found = torch.where(below, reach, found)
    return found


@score_case.register(s.BucketedBias)
def _(score: s.BucketedBias, t: RowTables) -> ScoreMod:
    table, boundaries, look_up, shift = score.table, score.boundaries, t.look_up, t.shift_of(score.align)
    return lambda x, b, h, q, kv: x + look_up(table, h, _bucket(kv - shift[q], boundaries))


@score_case.register(s.TimeBias)
def _(score: s.TimeBias, t: RowTables) -> ScoreMod:
    table, boundaries, look_up = score.table, score.boundaries, t.look_up
    times, kv_times = score.times, score.times if score.kv_times is None else score.kv_times
    return lambda x, b, h, q, kv: x + look_up(table, h, _bucket(times[q] - kv_times[kv], boundaries))


@score_case.register(s.DenseBias)
def _(score: s.DenseBias, t: RowTables) -> ScoreMod:
    values, look_up, is_shared = score.values, t.look_up, score.values.shape[0] == 1

    def shared_matrix(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        _, q_pos, kv_pos = _local(t, q, kv)
        return x + look_up(values, b if is_shared else h, q_pos, kv_pos)  # the b of a packed batch is 0

    return shared_matrix


@score_case.register(BiasRows)
def _(score: BiasRows, t: RowTables) -> ScoreMod:
    values, first, look_up, is_shared = score.values, score.first, t.look_up, score.values.shape[0] == 1

    def packed_matrices(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return x + look_up(values, b if is_shared else h, first[q] + _local(t, q, kv)[2])

    return packed_matrices


@score_case.register(DroppedRows)
def _(score: DroppedRows, t: RowTables) -> ScoreMod:
    rows, below, look_up = score.rows, score.below, t.look_up

    def dropped(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        drawn = mixed(look_up(rows, h, q) + kv.to(torch.int32) * STEP)
        return torch.where(drawn < below, -torch.inf, x)

    return dropped


@score_case.register(s.Then)
def _(score: s.Then, t: RowTables) -> ScoreMod:
    first, second = score_case(score.first, t), score_case(score.second, t)
    return lambda x, b, h, q, kv: second(first(x, b, h, q, kv), b, h, q, kv)


def score_mod(score: s.Score | None, t: RowTables) -> ScoreMod | None:
    """The score as FlexAttention's ``score_mod`` on packed indices; None without a score."""
    return None if score is None else score_case(score, t)
