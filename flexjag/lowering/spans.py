"""Abstract interpretation of masks: the spans of allowed packed keys of each query row.

Every mask lowers to a *sandwich* ``inner ⊆ mask ⊆ outer`` of span sets. Interval masks are exact. No tensor
here is larger than ``[K, T]`` with a small static K.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.node import along, is_integer, node, saturated
from flexjag.algebra.tokens import Keys, Queries
from flexjag.algebra.tree import rebuilt
from flexjag.errors import MaskError, explain_values
from flexjag.lowering.layout import INT32_MAX, Layout
from flexjag.lowering.pairs import first_pairs
from flexjag.offsets import same_size
from flexjag.upstream import running_max

MAX_SPANS = 8


@dataclass(frozen=True, eq=False)
class Spans:
    """K disjoint half-open intervals of packed keys for each query row.

    Canonical: ``lo[k] <= hi[k] <= lo[k+1]``; an interval with ``lo == hi`` is empty; two that are not
    empty never touch.

    Attributes:
        lo: ``[K, T_q]`` int32, first packed key of each interval.
        hi: ``[K, T_q]`` int32, one past the last.
    """

    lo: Tensor
    hi: Tensor

    @property
    def count(self) -> int:
        """K, static."""
        return self.lo.shape[0]


@dataclass(frozen=True, eq=False)
class Sandwich:
    """``mask == outer & rest`` and ``inner ⊆ mask``.

    Attributes:
        inner: Keys that are certainly allowed.
        outer: Keys that may be allowed; always inside the row's own segment.
        rest: The predicate still to be evaluated inside `outer`; None if ``inner == outer``.
    """

    inner: Spans
    outer: Spans
    rest: m.Mask | None = field(default=None)

    @property
    def exact(self) -> bool:
        """True if inner and outer spans are equal, so that nothing is left to evaluate."""
        return self.rest is None


@node
class InSpans(m.Mask):
    """A mask of spans ``[K, T_q]`` in packed key indices, in place of the subtree that was lowered to them."""

    printable = True
    reads_pairs = False

    lo: Tensor = along("query token")
    hi: Tensor = along("query token")

    def __post_init__(self) -> None:
        """Nothing: lowering makes it, and marks it only with a plan that is kept."""


@node
class DenseRows(m.Mask):
    """A :class:`~flexjag.algebra.masks.Dense` as a flat bool tensor; a row's packed key `kv` is at ``base + kv``."""

    printable = True

    values: Tensor = along("pair")
    base: Tensor = along("query token")

    def __post_init__(self) -> None:
        """Nothing: lowering makes it, and marks it only with a plan that is kept."""


def _clip(spans: Spans, lo: Tensor, hi: Tensor) -> Spans:
    new_lo = spans.lo.clamp(min=lo, max=hi)
    return Spans(new_lo, spans.hi.clamp(min=new_lo, max=hi))


def _canonical(lo: Tensor, hi: Tensor, *, widen: bool) -> tuple[Spans, bool]:
    """Sort, merge and compress K arbitrary intervals per row to at most MAX_SPANS canonical ones.

    Returns the spans, and True if there were more than MAX_SPANS: `widen` then joins the surplus into the last span
    (for an outer bound) and otherwise drops it (for an inner bound).
    """
    count = lo.shape[0]
    lo, order = torch.where(hi > lo, lo, INT32_MAX).sort(dim=0)
    hi = torch.where(lo < INT32_MAX, hi.gather(0, order), 0)
    reach = running_max(hi)
    # Integers throughout: Inductor's C++ mistypes a boolean that is concatenated or sliced into.
    starts = torch.cat([torch.ones_like(lo[:1]), (lo[1:] > reach[:-1]).to(lo.dtype)])
    group = starts.cumsum(dim=0) - 1
    merged_lo = torch.full_like(lo, INT32_MAX).scatter_reduce(0, group, lo, "amin")
    merged_hi = torch.zeros_like(hi).scatter_reduce(0, group, hi, "amax")
    cut = count > MAX_SPANS
    if cut:
        if widen:
            merged_hi[MAX_SPANS - 1] = merged_hi[MAX_SPANS - 1 :].amax(dim=0)
        merged_lo, merged_hi = merged_lo[:MAX_SPANS], merged_hi[:MAX_SPANS]
    end = merged_hi.amax(dim=0, keepdim=True)  # where unused slots go, to stay sorted
    used = merged_lo < INT32_MAX
    return Spans(torch.where(used, merged_lo, end), torch.where(used, merged_hi, end)), cut


def intersect(a: Spans, b: Spans, *, widen: bool) -> tuple[Spans, bool]:
    """The common keys, at most MAX_SPANS spans, and True if there were more; `widen` as for :func:`_canonical`."""
    if a.count == 1 or b.count == 1:
        one, many = (a, b) if a.count == 1 else (b, a)
        return _clip(many, one.lo[0], one.hi[0]), False
    lo = torch.maximum(a.lo[:, None], b.lo[None]).flatten(0, 1)
    hi = torch.minimum(a.hi[:, None], b.hi[None]).flatten(0, 1)
    spans, _ = _canonical(lo, hi, widen=widen)
    most = a.count + b.count - 1  # how many of the pairs can be non-empty at once
    if most < spans.count:
        spans = Spans(spans.lo[:most], spans.hi[:most])
    return spans, most > MAX_SPANS


def _unite(a: Spans, b: Spans, *, widen: bool) -> tuple[Spans, bool]:
    return _canonical(torch.cat([a.lo, b.lo]), torch.cat([a.hi, b.hi]), widen=widen)


def _complement(a: Spans, layout: Layout, *, widen: bool) -> tuple[Spans, bool]:
    a = _clip(a, layout.kv_start, layout.kv_end)  # a row whose spans are all empty may hold them at 0
    lo = torch.cat([layout.kv_start[None], a.hi])
    hi = torch.cat([a.lo, layout.kv_end[None]])
    return _canonical(lo, hi, widen=widen)  # an empty span of `a` in mid-segment leaves two that touch


def rest_of(s: Sandwich) -> m.Mask:
    """The sandwich's mask as a node: its spans if they are exact, else ``outer & rest``."""
    outer = InSpans(s.outer.lo, s.outer.hi)
    return outer if s.rest is None else m.And(outer, s.rest)


sandwich = Interpretation("sandwich", m.Mask, decorator="sandwich")
"""``sandwich(mask, layout) -> Sandwich``, in O(K·T). The mask must not contain a PerHead (see `masks.at_head`)."""


def _exact(layout: Layout, lo: Tensor, hi: Tensor) -> Sandwich:
    """Exact single interval of *packed* keys, clipped to the segment, unless it begins or ends with it."""
    if lo is not layout.kv_start:
        lo = lo.to(torch.int32).clamp(min=layout.kv_start, max=layout.kv_end)
    if hi is not layout.kv_end:
        hi = hi.to(torch.int32).clamp(min=lo, max=layout.kv_end)
    spans = Spans(lo[None], hi[None])
    return Sandwich(spans, spans)


def _bound(value: m.Bound, layout: Layout) -> Tensor | int:
    if isinstance(value, int):
        return max(-INT32_MAX, min(value, INT32_MAX))
    return layout.per_row(saturated(value).clamp(-INT32_MAX, INT32_MAX).to(torch.int32))


def diagonal(layout: Layout, align: m.Align) -> Tensor:
    """Packed index ``[T_q]`` of the key on the diagonal of each query row."""
    at = layout.kv_start + layout.q_pos
    if align == "end" and not layout.is_self:
        at = at + (layout.kv_length() - layout.q_length())
    return at


@sandwich.register(m.Full)
def _(mask: m.Full, layout: Layout) -> Sandwich:
    return _exact(layout, layout.kv_start, layout.kv_end)


@sandwich.register(m.Causal)
def _(mask: m.Causal, layout: Layout) -> Sandwich:
    return _exact(layout, layout.kv_start, diagonal(layout, mask.align) + 1)


@sandwich.register(m.Window)
def _(mask: m.Window, layout: Layout) -> Sandwich:
    at = diagonal(layout, mask.align).long()  # long: a window may be as wide as int32 itself
    lo = layout.kv_start if mask.left is None else at - _bound(mask.left, layout)
    hi = layout.kv_end if mask.right is None else at + _bound(mask.right, layout) + 1
    lo, hi = (x if x.dtype == torch.int32 else x.clamp(-1, INT32_MAX) for x in (lo, hi))
    return _exact(layout, lo, hi)


@sandwich.register(m.Prefix)
def _(mask: m.Prefix, layout: Layout) -> Sandwich:
    hi = layout.kv_start.long() + _bound(mask.n, layout)
    return _exact(layout, layout.kv_start, hi.clamp(max=INT32_MAX))


@sandwich.register(m.Chunked)
def _(mask: m.Chunked, layout: Layout) -> Sandwich:
    size = _bound(mask.size, layout)
    if isinstance(size, Tensor):
        size = size.clamp(min=1).long()  # spare rows hold 0
    at = (diagonal(layout, mask.align) - layout.kv_start).long()
    first = torch.div(at, size, rounding_mode="floor") * size + layout.kv_start
    return _exact(layout, first.clamp(max=INT32_MAX), (first + size).clamp(max=INT32_MAX))


@sandwich.register(m.GlobalTokens)
def _(mask: m.GlobalTokens, layout: Layout) -> Sandwich:
    n = _bound(mask.n, layout)
    hi = torch.where(layout.q_pos < n, layout.kv_end.long(), layout.kv_start.long() + n)
    return _exact(layout, layout.kv_start, hi.clamp(max=INT32_MAX))


@sandwich.register(m.Rows)
def _(mask: m.Rows, layout: Layout) -> Sandwich:
    lo, hi = (x if x.ndim == 2 else x[None] for x in (mask.lo, mask.hi))
    low, high = layout.kv_start.long(), layout.kv_end.long()
    lo, hi = (
        (saturated(x).clamp(-INT32_MAX, INT32_MAX) + low).clamp(min=low, max=high).to(torch.int32) for x in (lo, hi)
    )
    outer, cut = _canonical(lo, hi, widen=True)
    outer = _clip(outer, layout.kv_start, layout.kv_end)
    if not cut:
        return Sandwich(outer, outer)
    inner, _ = _canonical(lo, hi, widen=False)
    return Sandwich(_clip(inner, layout.kv_start, layout.kv_end), outer, InSpans(lo, torch.maximum(lo, hi)))


def _nothing(layout: Layout) -> Spans:
    return Spans(layout.kv_start[None], layout.kv_start[None])


@sandwich.register(m.MaskMod)
def _(mask: m.MaskMod, layout: Layout) -> Sandwich:
    return Sandwich(_nothing(layout), Spans(layout.kv_start[None], layout.kv_end[None]), mask)


@sandwich.register(m.Dense)
def _(mask: m.Dense, layout: Layout) -> Sandwich:
    values, hi = mask.values, layout.kv_end
    if values.ndim == 2:
        rows, cols = values.shape
        hi = torch.minimum(hi, layout.kv_start + torch.where(layout.q_pos < rows, cols, 0))
        first = layout.q_pos.clamp(max=max(rows - 1, 0)).long() * cols
        first = first.int() if rows * cols <= INT32_MAX else first
    else:
        first = first_pairs(layout, values.shape[0], MaskError)
    packed = torch.cat([values.flatten(), values.new_zeros(1)])  # never empty, so that every lookup can be clamped
    outer = Spans(layout.kv_start[None], hi[None].to(torch.int32))
    return Sandwich(_nothing(layout), outer, DenseRows(packed, first - layout.kv_start))


def _comparable(ids: Tensor) -> Tensor:
    """Cast ids to int32 or int64, preserving equality; uint64 is reinterpreted bitwise."""
    if ids.dtype in (torch.int32, torch.int64):
        return ids
    return ids.view(torch.int64) if ids.dtype == torch.uint64 else ids.to(torch.int64)


@sandwich.register(m.SameGroup)
def _(mask: m.SameGroup, layout: Layout) -> Sandwich:
    """Outer: first to last key of the group. Inner: the same where the group has no gap."""
    ids, kv_ids = _comparable(mask.ids), _comparable(mask.ids if mask.kv_ids is None else mask.kv_ids)
    if ids is not mask.ids or (mask.kv_ids is not None and kv_ids is not mask.kv_ids):
        mask = m.SameGroup(ids, None if mask.kv_ids is None else kv_ids)
    by_id = torch.argsort(kv_ids, stable=True)
    order = by_id[torch.argsort(layout.kv_segment[by_id], stable=True)]  # by segment, then id, then index
    # Ids are replaced by their rank so that (segment, rank) fits one sortable number.
    values = kv_ids[by_id]
    span = layout.num_kv + 2
    rank = torch.searchsorted(values, kv_ids[order].contiguous())
    key = layout.kv_segment[order].long() * span + rank
    q_rank = torch.searchsorted(values, ids.contiguous())
    here = values[q_rank.clamp(max=max(layout.num_kv - 1, 0))] == ids if layout.num_kv else q_rank > 0
    q_key = layout.q_segment.long() * span + torch.where(here, q_rank, layout.num_kv + 1)
    first = torch.searchsorted(key, q_key)
    last = torch.searchsorted(key, q_key, right=True)
    packed = torch.cat([order, order.new_zeros(1)])
    found = last > first
    lo = torch.where(found, packed[first], layout.kv_start.long())
    hi = torch.where(found, packed[(last - 1).clamp(min=0)] + 1, layout.kv_start.long())
    whole = hi - lo == last - first
    outer = _clip(Spans(lo[None].to(torch.int32), hi[None].to(torch.int32)), layout.kv_start, layout.kv_end)
    inner = Spans(outer.lo, torch.where(whole, outer.hi, outer.lo))
    return Sandwich(inner, outer, mask)


@sandwich.register(Queries)
def _(mask: Queries, layout: Layout) -> Sandwich:
    return _exact(layout, layout.kv_start, torch.where(mask.marked, layout.kv_end, layout.kv_start))


@sandwich.register(Keys)
def _(mask: Keys, layout: Layout) -> Sandwich:
    """Outer: first to last marked key of the segment. Inner: the same where no key in between is unmarked."""
    upto = mask.marked.cumsum(0)
    before = torch.cat([upto.new_zeros(1), upto])
    start, end = before[layout.kv_start.long()], before[layout.kv_end.long()]
    lo, hi = torch.searchsorted(upto, start + 1), torch.searchsorted(upto, end) + 1  # the marks of those numbers
    found = end > start
    outer = _exact(layout, torch.where(found, lo, layout.kv_start), torch.where(found, hi, layout.kv_start)).outer
    inner = Spans(outer.lo, torch.where(hi - lo == end - start, outer.hi, outer.lo))
    return Sandwich(inner, outer, mask)


@sandwich.register(m.And)
def _(mask: m.And, layout: Layout) -> Sandwich:
    a, b = sandwich(mask.left, layout), sandwich(mask.right, layout)
    outer, cut = intersect(a.outer, b.outer, widen=True)
    if a.exact and b.exact and not cut:
        return Sandwich(outer, outer)
    inner, _ = intersect(a.inner, b.inner, widen=False)
    if cut:
        return Sandwich(inner, outer, m.And(rest_of(a), rest_of(b)))
    rests = [x.rest for x in (a, b) if x.rest is not None]
    return Sandwich(inner, outer, rests[0] if len(rests) == 1 else m.And(*rests))


@sandwich.register(m.Or)
def _(mask: m.Or, layout: Layout) -> Sandwich:
    a, b = sandwich(mask.left, layout), sandwich(mask.right, layout)
    outer, cut = _unite(a.outer, b.outer, widen=True)
    if a.exact and b.exact and not cut:
        return Sandwich(outer, outer)
    inner, _ = _unite(a.inner, b.inner, widen=False)
    return Sandwich(inner, outer, m.Or(rest_of(a), rest_of(b)))


@sandwich.register(m.Not)
def _(mask: m.Not, layout: Layout) -> Sandwich:
    a = sandwich(mask.mask, layout)
    outer, cut = _complement(a.inner, layout, widen=True)
    if a.exact and not cut:
        return Sandwich(outer, outer)
    inner, _ = _complement(a.outer, layout, widen=False)
    return Sandwich(inner, outer, m.Not(rest_of(a)))


def _checked(s: object, mask: m.Mask, layout: Layout) -> Sandwich:
    """What a user's case returns, made canonical and cut to the row's own segment: nobody can forget that.

    Raises:
        MaskError: If it is no sandwich, its spans are no integers ``[K, T_q]``, or it has neither one span set for both
            bounds nor a rest.
    """
    if not isinstance(s, Sandwich):
        raise MaskError(explain_values("sandwich", "a case must return a Sandwich", mask=mask, type=type(s).__name__))
    for name, x in (("inner", s.inner), ("outer", s.outer)):
        shapes = {"lo": tuple(x.lo.shape), "hi": tuple(x.hi.shape), "rows": layout.num_q}
        if x.lo.ndim != 2 or x.hi.shape != x.lo.shape or not is_integer(x.lo) or not is_integer(x.hi):
            rule = "spans must be two integer tensors [K, T_q]; write lo[None], hi[None] for one span per row"
            raise MaskError(explain_values(name, rule, mask=mask, **shapes, dtype=x.lo.dtype))
        if not same_size(x.lo.shape[1], layout.num_q):
            raise MaskError(explain_values(name, "spans must have an entry per query row", mask=mask, **shapes))
    if s.rest is None and s.inner is not s.outer:
        rule = "inner and outer that differ need a rest; if they are equal, pass the same Spans for both"
        raise MaskError(explain_values("sandwich", rule, mask=mask))
    if s.rest is not None:
        s = Sandwich(s.inner, s.outer, _lowered(s.rest, type(mask), layout))
    outer, cut = _inside(s.outer, layout, widen=True)
    if s.rest is None and not cut:
        return Sandwich(outer, outer)
    inner, _ = _inside(s.inner, layout, widen=False)
    return Sandwich(inner, outer, rest_of(s) if cut else s.rest)  # `outer` was widened, so the rest has to tell more


def _lowered(rest: m.Mask, own: type, layout: Layout) -> m.Mask:
    """A user's rest with all nodes in it lowered but those of the class that it is the rest of, as kernels need it."""
    if isinstance(rest, (m.And, m.Or, m.Not)):
        return rebuilt(rest, lambda one: _lowered(one, own, layout))
    return rest if type(rest) is own or not sandwich.knows(rest) else rest_of(sandwich(rest, layout))


def _inside(spans: Spans, layout: Layout, *, widen: bool) -> tuple[Spans, bool]:
    """Canonical spans inside the rows' segments, of spans of any integers; True if there were too many."""
    spans = _clip(spans, layout.kv_start, layout.kv_end)
    lo, hi = spans.lo.to(torch.int32), spans.hi.to(torch.int32)
    return _canonical(lo, hi, widen=widen) if lo.shape[0] > 1 else (Spans(lo, hi), False)


sandwich.checked = _checked
