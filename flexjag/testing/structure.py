"""Assertions about a plan's structure: its spans bound the mask, its tiles classify it."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.tokens import Queries
from flexjag.api.plan import Plan
from flexjag.api.plan import plan as make_plan
from flexjag.backends.reference import dense
from flexjag.jagged import Jagged
from flexjag.lowering.layout import build_layout
from flexjag.lowering.spans import MAX_SPANS, Spans
from flexjag.testing.rounding.bounds import segments_of

EMPTY, PARTIAL, FULL = 0, 1, 2


def dense_mask(mask: m.Mask, q: Jagged, k: Jagged, heads: int) -> Tensor:
    """Dense mask of the reference, bool ``[H, T_q, T_kv]``, including the isolation of segments."""
    layout = build_layout(q, k)
    allowed = torch.zeros(heads, layout.num_q, layout.num_kv, dtype=torch.bool, device=layout.device)
    for seg in segments_of(layout, heads):
        if seg.n and seg.m:
            allowed[:, seg.q_rows, seg.kv_rows] = dense(mask, seg)
    return allowed


_spans_needed = Interpretation("bound on its spans", m.Mask, otherwise=lambda mask: None)
"""``_spans_needed(mask) -> int | None``: maximum spans per row; None if the mask is not made of intervals."""


@_spans_needed.register(m.Full, m.Causal, m.Window, m.Prefix, m.Chunked, m.GlobalTokens, Queries)
def _(mask: m.Mask) -> int | None:
    return 1


@_spans_needed.register(m.Rows)
def _(mask: m.Rows) -> int | None:
    return mask.lo.shape[0] if mask.lo.ndim == 2 else 1


@_spans_needed.register(m.Not)
def _(mask: m.Not) -> int | None:
    inside = span_bound(mask.mask)
    return None if inside is None else inside + 1


@_spans_needed.register(m.And, m.Or)
def _(mask: m.And | m.Or) -> int | None:
    a, b = span_bound(mask.left), span_bound(mask.right)
    return None if a is None or b is None else a + b - isinstance(mask, m.And)


def span_bound(mask: m.Mask) -> int | None:
    """Maximum spans per row of this mask; None if it is not made of intervals or may need over MAX_SPANS."""
    bound = _spans_needed(mask)
    return bound if bound is None or bound <= MAX_SPANS else None


def _spans_dense(spans: Spans, num_kv: int) -> Tensor:
    kv = torch.arange(num_kv, device=spans.lo.device)
    return ((spans.lo[..., None] <= kv) & (kv < spans.hi[..., None])).any(0)


def _check_canonical(name: str, spans: Spans) -> None:
    lo, hi = spans.lo, spans.hi
    if spans.count > MAX_SPANS or not bool((lo <= hi).all()) or not bool((hi[:-1] <= lo[1:]).all()):
        raise AssertionError(f"{name}: {spans.count} spans per row, unsorted or more than {MAX_SPANS}")


def assert_sandwich(
    mask: m.Mask, q: Jagged, k: Jagged | None = None, *, heads: int | None = None, block_size: int = 16
) -> Plan:
    """Assert ``inner spans ⊆ mask ⊆ outer spans`` on every head, and that the plan's mask equals the mask.

    A mask made only of interval nodes must equal its spans.

    Args:
        mask: The mask.
        q: The query batch.
        k: The key batch. Default: q.
        heads: Number of heads H. Default: q's, if its values are ``[T, H, D]``, else 1.
        block_size: Tile size of the plan.

    Returns:
        The plan, for further checks.

    Raises:
        AssertionError: If a bound is violated, naming the mask, the head and the first wrong pair of tokens.

    >>> assert_sandwich(m.Causal() & ~m.Window(2, 0), Jagged.from_lengths(torch.zeros(9), [4, 5])).exact
    True
    """
    k = q if k is None else k
    if heads is None:
        heads = m.num_mask_heads(mask) or (q.values.shape[1] if q.values.ndim == 3 else 1)
    plan = make_plan(q, k, mask=mask, block_size=block_size)
    truth = dense_mask(mask, q, k, heads)
    for head in range(heads):
        which = 0 if plan.head_of is None else int(plan.head_of[head])
        found = plan.sandwiches[which]
        _check_canonical("inner", found.inner)
        _check_canonical("outer", found.outer)
        inner, outer = (_spans_dense(x, plan.layout.num_kv) for x in (found.inner, found.outer))
        _check_subset("inner", inner, "the mask", truth[head], mask, head)
        _check_subset("the mask", truth[head], "outer", outer, mask, head)
        if span_bound(m.at_head(mask, head)) is not None and not found.exact:
            raise AssertionError(f"the spans of {mask!r} are not exact on head {head}, but it is made of intervals")
        if found.exact:
            _check_subset("outer", outer, "inner", inner, mask, head)
    planned = plan.to_dense(heads)
    for head in range(heads):
        _check_subset("plan.to_dense()", planned[head], "the mask", truth[head], mask, head)
        _check_subset("the mask", truth[head], "plan.to_dense()", planned[head], mask, head)
    return plan


def _check_subset(small_name: str, small: Tensor, big_name: str, big: Tensor, mask: m.Mask, head: int) -> None:
    wrong = torch.nonzero(small & ~big)
    if wrong.shape[0]:
        q, kv = wrong[0].tolist()
        raise AssertionError(
            f"{small_name} allows key {kv} for query {q} (packed) and {big_name} does not, on head {head}, "
            f"and {wrong.shape[0] - 1} more; mask={mask!r}"
        )


def _grid(count: Tensor, index: Tensor) -> Tensor:
    """A BlockMask table ``[H, rows]`` and ``[H, rows, cols]`` as a boolean grid ``[H, rows, cols]``."""
    heads, rows, cols = index.shape
    used = torch.arange(cols, device=index.device) < count[..., None]
    grid = torch.zeros(heads, rows, cols + 1, dtype=torch.bool, device=index.device)
    column = torch.where(used, index.long(), cols)  # what is not used goes into a spare column
    return grid.scatter(2, column, True)[..., :cols]


def tile_kinds(block_mask: object, rows: int, cols: int) -> Tensor:
    """Kind (EMPTY, PARTIAL or FULL) of every tile of a FlexAttention BlockMask, ``[H, rows, cols]``.

    Raises:
        AssertionError: If its tables contradict each other, or name a tile outside the grid.
    """
    kinds = []
    for side, swap in (("kv", False), ("q", True)):
        names = (f"{side}_num_blocks", f"{side}_indices", f"full_{side}_num_blocks", f"full_{side}_indices")
        tables = [getattr(block_mask, name)[0] for name in names]
        partial, full = (_grid(*tables[i : i + 2]) for i in (0, 2))
        if bool((partial & full).any()):
            raise AssertionError(f"the {side} tables call a tile both PARTIAL and FULL")
        both = partial * PARTIAL + full * FULL
        kinds.append(both.transpose(1, 2) if swap else both)
    if not torch.equal(*kinds):
        raise AssertionError("the kv tables and the q tables disagree")
    inside = kinds[0][:, :rows, :cols]
    if int(inside.count_nonzero()) != int(kinds[0].count_nonzero()):
        raise AssertionError(f"the tables name a tile outside the {rows} x {cols} grid")
    return inside


def assert_tiles(
    mask: m.Mask, q: Jagged, k: Jagged | None = None, *, heads: int | None = None, block_size: int = 16
) -> Plan:
    """Assert that a plan's tiles are those that ``create_block_mask`` finds in the dense mask.

    For masks made of interval nodes they must be equal, on both sides of the BlockMask. Tiles of other masks may be
    unproven, so there no EMPTY tile may hold an allowed pair, and no FULL tile may lack one.

    Args:
        mask: The mask.
        q: The query batch.
        k: The key batch. Default: q.
        heads: Number of heads H. Default: as in :func:`assert_sandwich`.
        block_size: Tile size.

    Returns:
        The plan.

    Raises:
        AssertionError: If a tile is wrong, naming the mask and the first such tile.

    >>> assert_tiles(m.Causal(), Jagged.from_lengths(torch.zeros(40), [9, 31])).num_tiles
    6
    """
    from torch.nn.attention.flex_attention import create_block_mask

    k = q if k is None else k
    if heads is None:
        heads = m.num_mask_heads(mask) or (q.values.shape[1] if q.values.ndim == 3 else 1)
    plan = make_plan(q, k, mask=mask, block_size=block_size)
    num_q, num_kv = plan.layout.num_q, plan.layout.num_kv
    if not num_q or not num_kv:
        if plan.num_tiles:
            raise AssertionError(f"there are no tokens, but {plan.num_tiles} tiles; mask={mask!r}")
        return plan
    truth = dense_mask(mask, q, k, heads)
    made = create_block_mask(
        lambda b, h, i, j: truth[h, i, j], None, heads, num_q, num_kv, device=truth.device, BLOCK_SIZE=block_size
    )
    wanted = tile_kinds(made, *plan.grid)
    found = tile_kinds(plan.block_mask, *plan.grid).expand_as(wanted)
    exact = all(span_bound(m.at_head(mask, h)) is not None for h in range(heads))
    wrong = found != wanted if exact else (found != wanted) & (found != PARTIAL)
    if bool(wrong.any()):
        head, row, col = torch.nonzero(wrong)[0].tolist()
        names = ("EMPTY", "PARTIAL", "FULL")
        raise AssertionError(
            f"tile ({row}, {col}) of head {head} is {names[int(found[head, row, col])]} instead of "
            f"{names[int(wanted[head, row, col])]}, and {int(wrong.sum()) - 1} more are wrong; mask={mask!r}"
        )
    return plan
