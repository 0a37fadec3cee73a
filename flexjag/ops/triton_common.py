"""What the Triton kernels share: how a program finds its segment, and how it is launched.

No grid needs a device sync. A kernel that walks packed rows in tiles gets ``T // BLOCK + S`` programs, with T rows and
S segments: program ``offsets[s] // BLOCK + s`` has the first tile of segment s, so that no tile holds rows of two
segments and at most S programs have nothing to do.

Sums are kept in float32, in an order that only shapes decide, and every entry is written by one program: results are
bitwise the same every time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flexjag.launching import DTYPES, ceil_div, launch, power_of_2, precision

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
"""Rows that can be counted in 32 bits, with some to spare for a last tile."""

jit: Any = triton.jit
"""As :func:`triton.jit`, whose type says that kernels never return."""

TILE = 4096
"""Entries of a tile that is only moved or reduced."""


@jit
def count_upto(ascending, size, steps, key, BLOCK: tl.constexpr):
    """How many of the first `size` entries are <= key, each ``entry // BLOCK + index`` if BLOCK is not 0."""
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
    """The segment of this program's tile, the tile's first position in it, and the segment's start and length."""
    tile = tl.program_id(0)
    segment = count_upto(offsets, num_segments, steps, tile, BLOCK) - 1
    start = tl.load(offsets + segment).to(tl.int64)
    length = (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)
    first = (tile - (start // BLOCK).to(tl.int32) - segment) * BLOCK
    return segment.to(tl.int64), first, start, length


@jit
def span_of(offsets, segment):
    """A segment's start and length."""
    start = tl.load(offsets + segment).to(tl.int64)
    return start, (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)


def search(offsets: Tensor) -> dict[str, Any]:
    """The arguments with which a kernel searches offsets."""
    num_segments = offsets.shape[0] - 1
    return {"num_segments": num_segments, "steps": num_segments.bit_length()}


def num_tiles(offsets: Tensor, total: int, block: int) -> int:
    """The programs that walk `total` packed rows in tiles of `block`."""
    return total // block + offsets.shape[0] - 1


def has_kernel(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that the kernels compute with, and rows can be counted in 32 bits."""
    return len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES and all(map(is_countable, tensors))


def is_countable(tensor: Tensor) -> bool:
    """Whether its sizes can be counted in 32 bits."""
    return all(n < LIMIT for n in tensor.shape)
