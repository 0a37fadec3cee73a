"""Segment lookup and launch helpers shared by the Triton kernels.

No grid size needs a device sync. A kernel over tiles of packed rows has ``T // BLOCK + S`` programs for T rows and
S segments: program ``offsets[s] // BLOCK + s`` has the first tile of segment s, so that no tile holds rows of two
segments and at most S programs are idle.

Sums are accumulated in float32, in an order fixed by the shapes, and every entry is written by one program: results
are bitwise reproducible.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flexjag.kernels.launch import DTYPES, ceil_div, launch, power_of_2, precision

__all__ = [
    "LIMIT",
    "TILE",
    "ceil_div",
    "count_upto",
    "find_tile",
    "has_kernel",
    "is_countable",
    "jit",
    "launch",
    "num_tiles",
    "power_of_2",
    "precision",
    "search",
    "span_of",
]

LIMIT = 2**31 - 2**16
"""Largest number of rows addressed by 32-bit indices, with a margin for the last tile."""

jit: Any = triton.jit
""":func:`triton.jit`, untyped, because its annotation says that kernels never return."""

TILE = 4096
"""Elements of a tile in kernels that only copy or reduce."""


@jit
def count_upto(ascending, size, steps, key, BLOCK: tl.constexpr):
    """Number of the first `size` entries that are <= key, by binary search. If BLOCK, of ``entry // BLOCK + index``."""
    low = key * 0
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        entry = tl.load(ascending + middle, mask=middle < size, other=0).to(tl.int32)
        if BLOCK:
            entry = entry // BLOCK + middle
        right = (entry <= key) & (low < high)
        low = tl.where(right, middle + 1, low)
        high = tl.where(right, high, middle)
    return low


@jit
def find_tile(offsets, num_segments, steps, BLOCK: tl.constexpr):
    """Segment of this program's tile, first position of the tile in it, start and length of the segment."""
    tile = tl.program_id(0)
    segment = count_upto(offsets, num_segments, steps, tile, BLOCK) - 1
    start = tl.load(offsets + segment).to(tl.int64)
    length = (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)
    first = (tile - (start // BLOCK).to(tl.int32) - segment) * BLOCK
    return segment.to(tl.int64), first, start, length


@jit
def span_of(offsets, segment):
    """Start and length of a segment."""
    start = tl.load(offsets + segment).to(tl.int64)
    return start, (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)


def search(offsets: Tensor) -> dict[str, Any]:
    """Kernel arguments for the binary search in offsets: their number and the steps."""
    num_segments = offsets.shape[0] - 1
    return {"num_segments": num_segments, "steps": num_segments.bit_length()}


def num_tiles(offsets: Tensor, total: int, block: int) -> int:
    """Number of programs for `total` packed rows in tiles of `block`."""
    return total // block + offsets.shape[0] - 1


def has_kernel(*tensors: Tensor) -> bool:
    """Whether all tensors have one dtype that the kernels support, and sizes that fit in 32 bits."""
    return len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES and all(map(is_countable, tensors))


def is_countable(tensor: Tensor) -> bool:
    """Whether all sizes of a tensor fit in 32 bits."""
    return all(n < LIMIT for n in tensor.shape)
