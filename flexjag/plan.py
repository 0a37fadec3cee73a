"""plan(): layout, mask, score and normalizer in, one immutable and reusable recipe out."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from flexjag import choice, functions, mods
from flexjag import masks as m
from flexjag import scores as s
from flexjag.algebra import tree
from flexjag.errors import MaskError, PlanError, assert_on_device
from flexjag.jagged import Jagged, mark_varying
from flexjag.layout import Layout, blocks, build_layout
from flexjag.normalizers import Normalizer, Softmax
from flexjag.recipe import Notes, Plan, check_arguments, check_fit, check_score, of_this_batch, place_in
from flexjag.spans import Sandwich, Spans, sandwich
from flexjag.tiles import TileList, Tiles, build_tables, list_tiles, refine
from flexjag.upstream import holds_no_numbers

__all__ = ["Plan", "plan"]

REFINE_LIMIT = 2**26  # predicate evaluations that refining may cost when nobody asked for it


def _head_masks(mask: m.Mask) -> tuple[list[m.Mask], list[int] | None]:
    """The distinct masks of the heads, and which one each head uses."""
    heads = m.num_mask_heads(mask)
    if heads is None:
        return [mask], None
    distinct: list[m.Mask] = []
    head_of: list[int] = []
    for h in range(heads):
        one = m.at_head(mask, h)
        known = [i for i, seen in enumerate(distinct) if seen == one]  # Dynamo cannot trace distinct.index(one)
        head_of.append(known[0] if known else len(distinct))
        if not known:
            distinct.append(one)
    return distinct, head_of


def _capacity(layout: Layout, block: int, max_length: int | None) -> tuple[int, int] | None:
    """Most tiles in a row or column, and most in all, for segments of at most `max_length`; None without a bound.

    In self-attention a tile row meets one stretch of keys: its own tokens and at most a segment to either side.
    In cross-attention it may meet many segments, each in a stretch of its own, so only the grid bounds it.
    """
    if max_length is None:
        return None
    rows, cols = blocks(layout.num_q, block), blocks(layout.num_kv, block)
    width = (2 * max_length + block - 1) // block + 2 if layout.is_self else max(rows, cols)
    return width, max(2, rows * min(width, cols))


def plan(
    q: Jagged,
    k: Jagged | None = None,
    *,
    mask: m.Mask | None = None,
    score: s.Score | None = None,
    normalizer: Normalizer | None = None,
    block_size: int = 128,
    max_tokens: int | None = None,
    max_length: int | None = None,
    refine_tiles: bool | None = None,
    validate: bool = False,
) -> Plan:
    """Compile a layout, a mask and a score into a recipe that every layer of a model can reuse.

    Time and memory are O(K·T log T + tiles): nothing of size T×T is made. Works inside ``torch.compile``.

    Args:
        q: The query batch. Only its layout is used, so ``[T]`` token ids do as well as ``[T, H, D]``.
        k: The key/value batch, if its offsets differ from q's (cross- and target attention).
        mask: Default :class:`~flexjag.masks.Full`. Isolation between segments is always on.
            A plan holds the mask as it was made: tensors in it and in its functions' closures are copied, and if one
            that a function reads elsewhere is written to later, using the plan is an error.
        score: Default none. Its tables are kept, not copied: a plan made once sees a parameter's later values. What it
            holds per token or segment is copied, as the mask is.
        normalizer: Default :class:`~flexjag.normalizers.Softmax`.
        block_size: Tile size, a power of two of at least 16; 128 is what GPU kernels like.
        max_tokens: The fixed number of rows of ``q.values``, of which the first ``offsets[-1]`` are used;
            the others get zeros.
        max_length: A bound on every segment's length. With it the plan has fixed capacity and planning never
            waits for the device, so it fits in a CUDA graph. A batch that breaks it is an error; on a GPU, in a
            traced graph and with `max_tokens` an assertion, which a later call reports.
        refine_tiles: Evaluate an opaque mask on its PARTIAL tiles to prove more of them EMPTY or FULL.
            Default: if it takes at most 2**26 evaluations, and never in a traced graph or with `max_length`.
        validate: Check the contents of the offsets and the bounds (one device sync; in a traced graph an assertion).
            Outside of graphs, those on a CPU are always checked, but with `max_tokens`.

    Returns:
        The plan. Pass it to :func:`flexjag.attention` with any q, k, v of the same layout.

    Raises:
        LayoutError: If q and k do not fit together, or, under `validate`, offsets are not offsets.
        MaskError: If the mask does not fit the layout.
        PlanError: If a bound does not hold or `block_size` is no power of two.

    >>> x = Jagged.from_lengths(torch.zeros(1000, 2, 16), [400, 0, 600])
    >>> p = plan(x, mask=m.Causal() & m.Window(256, 0))
    >>> p.num_tiles, p.num_full, p.grid
    (20, 4, (8, 8))
    """
    return with_tiles(
        outline(q, k, mask, score, normalizer, block_size, max_tokens, max_length, validate), refine_tiles
    )


def outline(
    q: Jagged,
    k: Jagged | None,
    mask: m.Mask | None,
    score: s.Score | None,
    normalizer: Normalizer | None,
    block_size: int = 128,
    max_tokens: int | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Plan:
    """The part of :func:`plan` that is linear in the tokens: everything but the tiles."""
    mask = m.Full() if mask is None else mask
    normalizer = Softmax() if normalizer is None else normalizer
    check_arguments(mask, score, normalizer, block_size, max_length)
    layout = build_layout(q, q if k is None else k, max_tokens=max_tokens, max_length=max_length, validate=validate)
    choice.check_normalizer(layout, mask, normalizer, lse=False, remainder=False)
    check_fit(MaskError, mask, layout)
    check_fit(PlanError, normalizer, layout)
    tables = mods.row_tables(layout, block_size)
    check_score(score, layout, tables)
    score = of_this_batch(score)
    reading = functions.Reading([], [])
    if not torch.compiler.is_compiling():
        mask = functions.frozen(mask, torch.clone)
        if any(isinstance(x, m.MaskMod) for x in tree.walk(mask)):
            place = place_in(layout, tables)
            functions.check_functions(mask, place)
            reading = functions.Reading.of(mask, lambda: place)
    head_masks, head_of = _head_masks(mask)
    heads = None
    if head_of is not None:  # filled on the device: uploading a list would wait for it
        heads = torch.stack([torch.full((), i, dtype=torch.int32, device=layout.device) for i in head_of])
    sample = None
    if q.values.ndim == 3 and q.values.dtype.is_floating_point:
        grad = q.values.requires_grad and torch.is_grad_enabled()
        sample = (q.values.shape[1], q.values.shape[2], q.values.dtype, grad)
    sandwiches = tuple(sandwich(one, layout) for one in head_masks)
    return Plan(
        layout=layout,
        mask=mask,
        score=score,
        normalizer=normalizer,
        block_size=block_size,
        sandwiches=sandwiches,
        head_of=heads,
        tables=tables,
        kernel_masks=tuple(mods.kernel_mask(x, tables) for x in sandwiches),
        kernel_score=None if score is None else mods.rounded(score, tables),
        made_tiles=None,
        max_length=max_length,
        reading=reading,
        notes=Notes(),
        own_notes=Notes(),
        sample=sample,
    )


def with_tiles(plan: Plan, refine_tiles: bool | None = None) -> Plan:
    """An outlined plan with its tiles; `refine_tiles` as in :func:`plan`."""
    layout, block, sandwiches, max_length = plan.layout, plan.block_size, plan.sandwiches, plan.max_length
    if max_length is not None:
        for offsets in (layout.q_offsets, layout.kv_offsets):
            assert_on_device((offsets.diff() <= max_length).all(), "max_length: must bound every segment's length")
    capacity = _capacity(layout, block, max_length)
    width, size = (None, None) if capacity is None else capacity
    lists = [list_tiles(x.outer, x.inner, layout.num_kv, block, size) for x in sandwiches]
    if capacity is None and not holds_no_numbers(layout.q_offsets):
        tables = plan.tables
        lists = [_refined(t, x, tables, layout, block, refine_tiles) for t, x in zip(lists, sandwiches, strict=True)]
    union, by_head = lists[0], lists
    if plan.head_of is not None:
        by_head = [lists[i] for i in _head_masks(plan.mask)[1] or ()]
    if len(lists) > 1:
        lo, hi = (torch.cat([getattr(x.outer, end) for x in sandwiches]) for end in ("lo", "hi"))
        nothing = Spans(layout.kv_start[None], layout.kv_start[None])
        union = list_tiles(Spans(lo, hi), nothing, layout.num_kv, block, size)
    tables = build_tables(by_head, layout.num_q, layout.num_kv, block, width)
    made = replace(plan, made_tiles=Tiles(union, *tables))
    mark_plan(made)
    return made


def mark_plan(plan: Plan) -> None:
    """Tell TorchDynamo, if it is in use, which sizes of the plan's tensors change from batch to batch."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return
    _mark(plan.layout, 0)
    _mark(plan.tables, 0)
    _mark(plan.tiles.all_heads, 0)
    for table in (plan.tiles.kv_partial, plan.tiles.kv_full, plan.tiles.q_partial, plan.tiles.q_full):
        mark_varying(table.count, 2)
        mark_varying(table.index, 2, 3)
    for x in plan.sandwiches:
        _mark(x.outer, 1)
        _mark(x.inner, 1)
    for x in (plan.mask, *plan.kernel_masks, plan.score, plan.kernel_score):
        tree.mark(x)


def _mark(holder: object, dim: int) -> None:
    for value in vars(holder).values():
        if isinstance(value, Tensor):
            mark_varying(value, dim)


def _refined(
    tiles: TileList, x: Sandwich, tables: mods.RowTables, layout: Layout, block: int, wanted: bool | None
) -> TileList:
    if x.exact or wanted is False or not layout.num_q or not layout.num_kv:
        return tiles
    if wanted is None and tiles.row.shape[0] * block**2 > REFINE_LIMIT:
        return tiles
    place = place_in(layout, tables)
    if x.rest is None or place is None or functions.depends_on_head(x.rest, place):
        return tiles  # one list of tiles has to do for all heads
    test = mods.mask_mod((mods.kernel_mask(x, tables),), None, tables, layout)
    zero = torch.zeros((), dtype=torch.int32, device=layout.device)
    return refine(tiles, lambda q, kv: test(zero, zero, q, kv), layout.num_q, layout.num_kv, block)
