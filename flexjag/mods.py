"""Nodes to FlexAttention's ``mask_mod`` and ``score_mod`` on packed indices.

Everything a mod reads is indexed by the query row alone, so that nothing is gathered by key in a kernel's inner
loop: a span test is ``(kv >= lo[q]) & (kv < hi[q])``, and because a key is only ever tested inside the row's own
segment, its local position is ``kv - kv_start[q]``. Only :class:`~flexjag.masks.SameGroup` reads by key.

The built-in mods broadcast: they work on FlexAttention's scalars and on index tensors alike. A user's function is
written for scalars, so on tensors it is vmapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flexjag import masks as m
from flexjag import scores as s
from flexjag.dispatch import Interpretation
from flexjag.errors import FlexjagError, MaskError, ScoreError, explain_values
from flexjag.layout import Layout, blocks
from flexjag.spans import DenseRows, InSpans, Sandwich

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RowTables:
    """The per-query-row tensors that mods read, padded to a tile multiple where kernels round up.

    Attributes:
        segment: ``[T']`` int32, the batch index `b` that user functions see.
        q_pos: ``[T']`` int32.
        kv_start: ``[T']`` int32.
        kv_last: ``[T']`` int32, local position of the segment's last key (at least 0).
        shift: ``[T']`` int32, ``kv_start + q_pos``: ``kv - shift[q]`` is the relative position.
    """

    segment: Tensor
    q_pos: Tensor
    kv_start: Tensor
    kv_last: Tensor
    shift: Tensor

    def padded(self, x: Tensor) -> Tensor:
        """Pad the last dimension of a per-row tensor like the tables here.

        On CUDA even by nothing: whether the padding is 0 would else be a property of the compiled graph.
        """
        rows = self.segment.shape[0]
        return x if x.device.type == "cpu" else _pad_rows(x, rows)


def row_tables(layout: Layout, block: int) -> RowTables:
    """The tables of a layout.

    On CUDA kernels round the query rows up to a tile, so everything per row is padded to one. FlexAttention's CPU
    kernels never read past T, so there nothing is padded and one size symbol serves all.
    """
    segment, q_pos = layout.q_segment, layout.q_pos
    if layout.has_spare:  # spare rows belong to no segment; what user functions are told must still be in range
        spare = segment >= layout.num_segments
        segment, q_pos = segment.masked_fill(spare, 0), q_pos.masked_fill(spare, 0)
    last = (layout.kv_length() - 1).clamp(min=0)
    columns = (segment, q_pos, layout.kv_start, last, layout.kv_start + q_pos)
    rows = layout.num_q if layout.device.type == "cpu" else blocks(layout.num_q, block) * block
    return RowTables(*(_pad_rows(x, rows) for x in columns))


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Pad the last dimension with zeros to this many rows."""
    return torch.nn.functional.pad(x, (0, rows - x.shape[-1]))


def _elementwise(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Apply a function of scalars to tensors that broadcast together: one vmap per dimension of the result."""
    ndim = max(a.ndim for a in args)
    if ndim == 0:  # FlexAttention's scalars
        return fn(*args)
    aligned = [a.reshape((1,) * (ndim - a.ndim) + tuple(a.shape)) for a in args]
    # A dimension of size 1 is mapped by nobody unless it is 1 everywhere.
    varies = [[a.shape[d] != 1 for a in aligned] for d in range(ndim)]
    for d in reversed(range(ndim)):
        if any(varies[d]):
            fn = torch.vmap(fn, in_dims=tuple(0 if v else None for v in varies[d]))
    squeezed = [a.squeeze([d for d in range(ndim) if not varies[d][i]]) for i, a in enumerate(aligned)]
    out = fn(*squeezed)
    return out.reshape([max(a.shape[d] for a in aligned) for d in range(ndim)])


def _local(t: RowTables, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Segment, query position and key position, clamped into the segment so that no lookup leaves it."""
    kv_pos = torch.minimum((kv - t.kv_start[q]).clamp(min=0), t.kv_last[q])
    return t.segment[q], t.q_pos[q], kv_pos


mask_case = Interpretation("mask_mod")
"""``mask_case(node, tables, layout) -> mask_mod``: one case per node that is not folded into spans."""


@mask_case.register(InSpans)
def _(mask: InSpans, t: RowTables, layout: Layout) -> MaskMod:
    lo, hi = t.padded(mask.lo), t.padded(mask.hi)
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
        return _elementwise(fn, segment, h, q_pos, kv_pos)

    return user_mask


@mask_case.register(m.SameGroup)
def _(mask: m.SameGroup, t: RowTables, layout: Layout) -> MaskMod:
    q_ids = t.padded(mask.ids)
    kv_ids = mask.ids if mask.kv_ids is None else mask.kv_ids
    if layout.device.type != "cpu":
        kv_ids = torch.nn.functional.pad(kv_ids, (0, -kv_ids.shape[0] % 128))

    def same_group(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q_ids[q] == kv_ids[kv]

    return same_group


@mask_case.register(DenseRows)
def _(mask: DenseRows, t: RowTables, layout: Layout) -> MaskMod:
    values, first = mask.values, t.padded(mask.first)

    def matrix(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        _, _, kv_pos = _local(t, q, kv)
        return values[(first[q] + kv_pos).clamp(max=values.shape[0] - 1)]

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
    return lambda b, h, q, kv: ~inner(b, h, q, kv)


def mask_mod(sandwiches: tuple[Sandwich, ...], head_of: Tensor | None, t: RowTables, layout: Layout) -> MaskMod:
    """The whole mask, in interval form where it is exact.

    Args:
        sandwiches: One, or one per distinct head mask.
        head_of: ``[H]`` which sandwich each query head uses; None if there is one.
        t: The tables to read.
        layout: The layout they were made from.
    """
    tests: list[MaskMod] = []
    for sandwich in sandwiches:
        inside = InSpans(sandwich.outer.lo, sandwich.outer.hi)
        tests.append(mask_case(inside if sandwich.rest is None else m.And(inside, sandwich.rest), t, layout))
    if head_of is None:
        return tests[0]

    def per_head(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        which = head_of[h]
        allowed = tests[0](b, h, q, kv) & (which == 0)
        for i, test in enumerate(tests[1:], 1):
            allowed = allowed | (test(b, h, q, kv) & (which == i))
        return allowed

    return per_head


score_case = Interpretation("score_mod")
"""``score_case(node, tables) -> score_mod``."""


@score_case.register(s.ScoreMod)
def _(score: s.ScoreMod, t: RowTables) -> ScoreMod:
    fn = score.fn

    def user_score(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        segment, q_pos, kv_pos = _local(t, q, kv)
        return _elementwise(fn, x, segment, h, q_pos, kv_pos)

    return user_score


@score_case.register(s.Alibi)
def _(score: s.Alibi, t: RowTables) -> ScoreMod:
    slopes = score.slopes
    # In the scores' dtype: a half-precision slope times a distance loses whole units.
    return lambda x, b, h, q, kv: x + slopes[h].to(x.dtype) * (kv - t.shift[q])


@score_case.register(s.SoftCap)
def _(score: s.SoftCap, t: RowTables) -> ScoreMod:
    cap = float(score.cap)
    return lambda x, b, h, q, kv: cap * torch.tanh(x / cap)


@score_case.register(s.RelativeBias)
def _(score: s.RelativeBias, t: RowTables) -> ScoreMod:
    bias, reach = score.table, score.max_distance
    return lambda x, b, h, q, kv: x + bias[h, (kv - t.shift[q]).clamp(-reach, reach) + reach]


@score_case.register(s.Then)
def _(score: s.Then, t: RowTables) -> ScoreMod:
    first, second = score_case(score.first, t), score_case(score.second, t)
    return lambda x, b, h, q, kv: second(first(x, b, h, q, kv), b, h, q, kv)


def score_mod(score: s.Score | None, t: RowTables) -> ScoreMod | None:
    """The whole score chain, or None."""
    return None if score is None else score_case(score, t)


class _Watch(TorchFunctionMode):
    """Sees every tensor that torch functions are given, and tells apart those they made themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}  # the values keep the ids from being reused

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, Tensor) and id(x) not in self.made:
                self.given[id(x)] = x
        out = func(*args, **(kwargs or {}))
        self.made.update({id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)})
        return out


class Substitute(TorchFunctionMode):
    """Torch functions that are given one of `old` get its counterpart in `new` instead."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        super().__init__()
        self.new = {id(x): y for x, y in zip(old, new, strict=True)}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = tree_map(lambda x: self.new.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


def depends_on_head(mask: m.Mask, device: torch.device) -> bool:
    """Whether a user's predicate in the mask looks at its `h`, found by calling it once and watching."""
    match mask:
        case m.And() | m.Or():
            return depends_on_head(mask.left, device) or depends_on_head(mask.right, device)
        case m.Not():
            return depends_on_head(mask.mask, device)
        case m.MaskMod():
            zero = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
            with _Watch() as watch:
                mask.fn(*zero)
            return id(zero[1]) in watch.given
        case _:
            return not type(mask).__module__.startswith("flexjag.")  # a user's node may look at it


def check_functions(mask: m.Mask, score: s.Score | None, device: torch.device) -> None:
    """Call every user's function once, as a backend will, to tell mistakes in it by its name.

    Raises:
        MaskError: If a mask's function fails or does not return one bool.
        ScoreError: If a score's function fails or does not return one float.
    """
    zero, one = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    found: list[tuple[type[FlexjagError], Callable[..., Tensor], tuple[Tensor, ...], str]] = []
    found += [(MaskError, fn, (zero,) * 4, "(b, h, q_pos, kv_pos) -> bool") for fn in _functions(mask)]
    for part in s.parts(score):
        if isinstance(part, s.ScoreMod):
            found.append((ScoreError, part.fn, (one, *(zero,) * 4), "(score, b, h, q_pos, kv_pos) -> float"))
    for error, fn, args, signature in found:
        name = getattr(fn, "__name__", type(fn).__name__)
        rule = f"{name} must be {signature} in tensor operations: & | ~ and torch.where, not and, or, not, if"
        try:
            out = torch.vmap(fn)(*args)
        except (RuntimeError, ValueError, TypeError, IndexError) as reason:
            raise error(explain_values("fn", rule, error=str(reason).split("\n")[0])) from reason
        if (out.dtype == torch.bool) != (error is MaskError) or out.shape != (1,):
            raise error(explain_values("fn", rule, dtype=out.dtype, shape=tuple(out.shape[1:])))


def _functions(mask: m.Mask) -> list[Callable[..., Tensor]]:
    match mask:
        case m.MaskMod():
            return [mask.fn]
        case m.And() | m.Or():
            return _functions(mask.left) + _functions(mask.right)
        case m.Not():
            return _functions(mask.mask)
        case m.PerHead():
            return [fn for one in mask.masks for fn in _functions(one)]
        case _:
            return []


def learned_tensors(score: s.Score | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The tensors of a score that need gradients, including those a user's function closes over.

    Each function is called once, on one score, and watched. Empty when gradients are off.
    """
    found: dict[int, Tensor] = {}
    if score is None or not torch.is_grad_enabled():
        return []
    for node in s.parts(score):
        if isinstance(node, s.ScoreMod):
            zero = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
            with _Watch() as watch:
                node.fn(torch.zeros((), dtype=dtype, device=device), *zero)
            found.update(watch.given)
    found.update({id(x): x for x in s.tensors(score)})
    return [x for x in found.values() if x.requires_grad]
