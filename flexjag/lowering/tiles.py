"""Lowering of spans to tiles, and of tiles to a BlockMask. O(K·T log T + tiles) time and memory; nothing is T×T.

A tile is one ``block × block`` part of the packed score matrix. No outer span touches an EMPTY tile; the inner
spans cover a FULL one on every row; the rest are PARTIAL. Tiles that extend beyond the matrix are never FULL,
as in ``create_block_mask``: their padding rows and columns are masked out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexjag.differentiation import is_forward_mode
from flexjag.errors import PlanError, assert_on_device, explain_values
from flexjag.lowering.layout import blocks
from flexjag.lowering.spans import Spans
from flexjag.upstream import holds_no_numbers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

UNUSED, PARTIAL, FULL = 0, 1, 2
NEEDED = "is needed where only shapes are known: on {} tensors; flexjag.plan takes it"
REFINE_CHUNK = 2**22  # predicate evaluations held at once


@dataclass(frozen=True, eq=False)
class TileList:
    """The non-empty tiles of one mask, sorted by row, then column.

    Attributes:
        row: ``[N]`` int64, tile row. Unused entries (at least two follow a list of fewer, so that no size
            is 0 or 1) hold the last row.
        col: ``[N]`` int64, tile column. Unused entries hold `num_cols`, one past the end.
        full: ``[N]`` bool, True for FULL tiles.
        live: ``[N]`` bool, False for unused entries.
    """

    row: Tensor
    col: Tensor
    full: Tensor
    live: Tensor


@dataclass(frozen=True, eq=False)
class TileTable:
    """The tile columns of each tile row, in BlockMask's form.

    Attributes:
        count: ``[1, heads, rows]`` int32, number of tiles in the row.
        index: ``[1, heads, rows, cols]`` int32, their columns. Entries past `count` are meaningless. Only the widest
            row's width is stored: rows overlap in memory (`as_strided`), so that 8192 × 8192 tiles do not take 268 MB.

    A grid of one tile has two rows and columns here, the second ones empty: Dynamo would compile size 1 anew.
    """

    count: Tensor
    index: Tensor


def row_count(tokens: int, block: int, traced: bool) -> int:
    """Rows of tiles to make room for, 2 or more: PyTorch specializes on sizes of 1.

    In a traced graph there is one to spare, instead of a maximum. A graph that comes from Inductor's cache brings its
    guards as text, in which Python's ``max`` and ``min`` compare sizes, and each comparison is a guard more.
    """
    count = blocks(tokens, block)
    return count + 1 if traced else max(2, count)


def _by_row(x: Tensor, rows: int, block: int) -> Tensor:
    """[K, T] to [rows, K * block], padded with 0."""
    x = torch.nn.functional.pad(x, (0, rows * block - x.shape[1]))
    return x.view(x.shape[0], rows, block).transpose(0, 1).reshape(rows, -1)


def list_tiles(outer: Spans, inner: Spans, num_kv: int, block: int, capacity: int | None = None) -> TileList:
    """List the tiles that `outer` touches, and mark those that `inner` covers as full.

    Args:
        outer: Spans that bound the mask from above, ``[K, T_q]``.
        inner: Spans that bound it from below.
        num_kv: T_kv.
        block: Tile size.
        capacity: The length of the list if it is to be fixed: then there is no host sync. Otherwise the
            number of tiles is read from the device (in a traced graph it becomes a symbol).
    """
    args = (outer.lo, outer.hi, inner.lo, inner.hi, num_kv, block)
    if capacity is not None:
        packed = _list_tiles(*args, capacity)
    elif outer.lo.device.type == "meta":
        raise PlanError(explain_values("max_length", NEEDED.format("meta")))
    elif torch.compiler.is_compiling() and is_forward_mode():
        rule = "forward-mode AD inside a graph needs it, or a plan made outside with refine_tiles=True"
        raise PlanError(explain_values("max_length", rule, max_length=None))
    elif holds_no_numbers(outer.lo):
        packed = torch.ops.flexjag.list_tiles(*args)
    else:
        packed = _list_tiles(*args, None)
    return _unpack(packed)


def _unpack(packed: Tensor) -> TileList:
    """[3, N] rows, columns and kinds to a TileList."""
    row, col, kind = packed.unbind()
    return TileList(row, col, kind == FULL, kind != UNUSED)


def _list_tiles(
    outer_lo: Tensor,
    outer_hi: Tensor,
    inner_lo: Tensor,
    inner_hi: Tensor,
    num_kv: int,
    block: int,
    capacity: int | None,
) -> Tensor:
    rows = row_count(outer_lo.shape[1], block, holds_no_numbers(outer_lo))
    last_row, cols = blocks(outer_lo.shape[1], block) - 1, blocks(num_kv, block)
    lo, hi = _by_row(outer_lo, rows, block), _by_row(outer_hi, rows, block)
    first, order = torch.where(hi > lo, lo // block, cols).sort(dim=1)
    last = torch.where(hi > lo, (hi + block - 1) // block, 0).gather(1, order)
    reach = last.cummax(dim=1).values
    # Interval k adds the columns that no earlier interval of its row reached: disjoint and in order.
    first[:, 1:] = torch.maximum(first[:, 1:], reach[:, :-1])
    counts = (reach - first).clamp(min=0).flatten().long()
    ends = counts.cumsum(0)
    used = int(ends[-1]) if capacity is None else capacity
    size = max(2, used) if capacity is None else capacity
    slot = torch.arange(size, device=lo.device)
    source = torch.searchsorted(ends, slot, right=True)
    live = source < counts.shape[0]
    source = source.clamp(max=counts.shape[0] - 1)
    row = torch.where(live, source // lo.shape[1], last_row)
    col = torch.where(live, first.flatten()[source] + slot - (ends - counts)[source], cols)
    if capacity is not None:
        assert_on_device(ends[-1] <= capacity, "max_length: its bound holds fewer tiles than this batch needs")
    full = _is_full(row, col, inner_lo, inner_hi, rows, cols, block)
    return torch.stack([row, col, torch.where(live, torch.where(full, FULL, PARTIAL), UNUSED)])


def _is_full(row: Tensor, col: Tensor, lo: Tensor, hi: Tensor, rows: int, cols: int, block: int) -> Tensor:
    """Bool ``[N]``: all `block` rows have an inner span that covers the tile. Counts starts up to it minus ends."""
    lo, hi = _by_row(lo, rows, block), _by_row(hi, rows, block)
    first, last = (lo + block - 1) // block, hi // block
    covers = last > first
    base = torch.arange(rows, device=lo.device)[:, None] * (cols + 2)
    starts = (torch.where(covers, first, cols + 1) + base).sort(dim=1).values.flatten()
    ends = (torch.where(covers, last, cols + 1) + base).sort(dim=1).values.flatten()
    key = row * (cols + 2) + col
    covering = torch.searchsorted(starts, key, right=True) - torch.searchsorted(ends, key, right=True)
    return (covering == block) & (col < cols)


@torch.library.custom_op("flexjag::list_tiles", mutates_args=())
def _list_tiles_op(
    outer_lo: Tensor, outer_hi: Tensor, inner_lo: Tensor, inner_hi: Tensor, num_kv: int, block: int
) -> Tensor:
    return _list_tiles(outer_lo, outer_hi, inner_lo, inner_hi, num_kv, block, None)


@_list_tiles_op.register_fake
def _(outer_lo: Tensor, outer_hi: Tensor, inner_lo: Tensor, inner_hi: Tensor, num_kv: int, block: int) -> Tensor:
    # ctx.new_dynamic_size() would refuse unless the user set torch._dynamo.config.capture_dynamic_output_shape_ops,
    # whose purpose is to keep *unexpected* data-dependent shapes out of graphs. This one is expected.
    from torch._library.fake_impl import allocate_size

    shape_env = torch.library.get_ctx()._shape_env
    if shape_env is None:
        raise PlanError(explain_values("max_length", NEEDED.format("fake")))
    return outer_lo.new_empty((3, allocate_size(shape_env, 2, None)), dtype=torch.int64)


def refine(
    tiles: TileList, allowed: Callable[[Tensor, Tensor], Tensor], num_q: int, num_kv: int, block: int
) -> TileList:
    """Classify PARTIAL tiles exactly by evaluating the mask on those tiles alone, in chunks.

    Args:
        tiles: The classification by spans alone.
        allowed: The mask on packed indices ``[n, block, 1]`` and ``[n, 1, block]``.
        num_q: T_q.
        num_kv: T_kv.
        block: Tile size.
    """
    some, every = tiles.live.clone(), tiles.full.clone()
    unsure = torch.nonzero(tiles.live & ~tiles.full)[:, 0]
    if not unsure.shape[0]:
        return tiles
    step = torch.arange(block, device=tiles.row.device)
    for part in unsure.split(max(1, REFINE_CHUNK // block**2)):
        q = (tiles.row[part, None] * block + step)[:, :, None]
        kv = (tiles.col[part, None] * block + step)[:, None, :]
        inside = (q < num_q) & (kv < num_kv)
        ok = allowed(q.clamp(max=num_q - 1), kv.clamp(max=num_kv - 1)) & inside
        some[part], every[part] = ok.flatten(1).any(1), ok.flatten(1).all(1)
    found = torch.stack([tiles.row[some], tiles.col[some], every[some].long() + PARTIAL])
    unused = torch.tensor([blocks(num_q, block) - 1, blocks(num_kv, block), UNUSED], device=found.device)
    found = torch.cat([found, unused[:, None].expand(3, max(0, 2 - found.shape[1]))], 1)
    return _unpack(found)


@dataclass(frozen=True, eq=False)
class _Counted:
    """The FULL (or the PARTIAL) tiles counted per row: the first step of a table."""

    lists: list[TileList]
    major: list[Tensor]
    keep: list[Tensor]
    counts: list[Tensor]


def _count(lists: list[TileList], rows: int, full: bool) -> _Counted:
    major = [t.row.clamp(max=rows - 1) for t in lists]  # unused entries may point past the end
    keep = [(t.full == full) & t.live for t in lists]
    counts = [k.new_zeros(rows, dtype=torch.int64).index_add(0, a, k.long()) for a, k in zip(major, keep, strict=True)]
    return _Counted(lists, major, keep, counts)


def _table(counted: _Counted, rows: int, cols: int, width: int) -> TileTable:
    """Scatter the tiles into rows of `width` columns, viewed as rows of `cols`."""
    heads, stride = len(counted.lists), rows * width + cols
    slots = [
        torch.where(k, h * stride + a * width + k.long().cumsum(0) - 1 - (c.cumsum(0) - c)[a], heads * stride)
        for h, (a, k, c) in enumerate(zip(counted.major, counted.keep, counted.counts, strict=True))
    ]
    buffer = torch.zeros(heads * stride + 1, dtype=torch.int32, device=slots[0].device)
    buffer = buffer.scatter(0, torch.cat(slots), torch.cat([t.col for t in counted.lists]).to(torch.int32))
    # Dynamo guards on how strides and sizes compare. A size-1 dimension may have any stride: 2 settles at once that
    # this is not a channels-last tensor, and being constant it equals no other stride by accident.
    index = buffer.as_strided((1, heads, rows, cols), (2, stride if heads > 1 else 2, width, 1))
    count = torch.stack(counted.counts).to(torch.int32)[None]
    return TileTable(count, index)


@dataclass(frozen=True, eq=False)
class Tiles:
    """All tiles of a plan.

    Attributes:
        all_heads: The tiles of the union of all heads' masks.
        kv_partial: PARTIAL key tiles of each query tile, which kernels mask.
        kv_full: FULL key tiles of each query tile, which they do not.
        q_partial: The transpose of `kv_partial`, for the backward.
        q_full: The transpose of `kv_full`.
    """

    all_heads: TileList
    kv_partial: TileTable
    kv_full: TileTable
    q_partial: TileTable
    q_full: TileTable


def build_tables(
    lists: list[TileList], num_q: int, num_kv: int, block: int, width: int | None
) -> tuple[TileTable, TileTable, TileTable, TileTable]:
    """The four tables of a BlockMask from one tile list per mask head, without a dense grid.

    Args:
        lists: One list per mask head (one for all heads if the mask does not depend on the head).
        num_q: T_q.
        num_kv: T_kv.
        block: Tile size.
        width: The most tiles that a row or a column may have, if fixed. Otherwise they are counted, at the
            price of a host sync; in a traced graph every column is stored.
    """
    traced = holds_no_numbers(lists[0].row)
    rows, cols = (row_count(n, block, traced) for n in (num_q, num_kv))
    transposed = [TileList(t.col, t.row, t.full, t.live) for t in lists]
    order = [t.row.argsort(stable=True) for t in transposed]
    transposed = [TileList(t.row[o], t.col[o], t.full[o], t.live[o]) for t, o in zip(transposed, order, strict=True)]
    kv = [_count(lists, rows, full) for full in (False, True)]
    q = [_count(transposed, cols, full) for full in (False, True)]
    # One width for all four tables, and never a table's own number of columns: Dynamo guards on which strides are
    # equal and on whether rows are contiguous, and would compile anew when that changes (and does for the one traced
    # number of columns that equals a width fixed beforehand).
    if traced:
        widths = (cols + 1, rows + 1) if width is None else (width, width)
    else:
        if width is None:
            width = max(3, int(torch.stack([c.max() for x in (*kv, *q) for c in x.counts]).max()))
        while width in (rows, cols):
            width += 1
        widths = width, width
    kv_tables = [_table(x, rows, cols, widths[0]) for x in kv]
    q_tables = [_table(x, cols, rows, widths[1]) for x in q]
    return kv_tables[0], kv_tables[1], q_tables[0], q_tables[1]


def block_mask(tiles: Tiles, mask_mod: Callable[..., Tensor], num_q: int, num_kv: int, block: int) -> BlockMask:
    """Wrap the tables as FlexAttention's BlockMask, with `mask_mod` on packed indices."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask(
        seq_lengths=(num_q, num_kv),
        kv_num_blocks=tiles.kv_partial.count,
        kv_indices=tiles.kv_partial.index,
        full_kv_num_blocks=tiles.kv_full.count,
        full_kv_indices=tiles.kv_full.index,
        q_num_blocks=tiles.q_partial.count,
        q_indices=tiles.q_partial.index,
        full_q_num_blocks=tiles.q_full.count,
        full_q_indices=tiles.q_full.index,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
    )
