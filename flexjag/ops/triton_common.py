"""What the Triton kernels share: how a program finds its segment, and how it is launched.

No grid needs a device sync. A kernel that walks packed rows in tiles gets ``T // BLOCK + S`` programs, with T rows and
S segments: program ``offsets[s] // BLOCK + s`` has the first tile of segment s, so that no tile holds rows of two
segments and at most S programs have nothing to do.

Sums are kept in float32, in an order that only shapes decide, and every entry is written by one program: results are
bitwise the same every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the kernels compute with. All else is left to the plain kernels."""

NAMES = {**DTYPES, torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
"""What Triton calls the dtypes that pointers may have."""

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


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: The ``triton.jit`` function.
        grid: Programs per axis.
        arguments: By name; tensors and numbers.
        constants: The compile-time ones.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2


recorded: list[Launch] = []
"""Launches on meta tensors, which are noted here and not made: see :mod:`flexjag.ops.kernels`."""


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, unless the grid is empty.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs per axis.
        arguments: By name, a tensor first; those that may have any strides have two dimensions or more.
        constants: The compile-time ones, and ``num_warps`` and ``num_stages``.
    """
    if 0 in grid:
        return
    arguments = {k: v.contiguous() if isinstance(v, Tensor) and v.ndim == 1 else v for k, v in arguments.items()}
    device = next(iter(arguments.values())).device
    if device.type == "meta":
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        recorded.append(Launch(kernel, grid, arguments, constants, **options))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **{"num_stages": Launch.num_stages, **constants})


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


def ceil_div(n: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-n // by)


def power_of_2(n: int, low: int = 1, high: int = 2**30) -> int:
    """The next power of 2, within bounds."""
    return max(low, min(high, 1 << (max(n, 1) - 1).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: as the user chose for cuBLAS."""
    is_rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_rounded else "ieee"
