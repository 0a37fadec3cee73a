"""Access to packed rows for the plain-torch kernels: a view per segment, or one row index for the whole batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flexjag.jagged import check_offsets

SHORT = 32
"""Mean rows per segment below which one index for all rows beats a call per segment (measured at 64 features)."""

FEW = 8
"""Segments up to which a view and a call for each take less than the 12 µs of an index for all rows."""

SMALL = 2**14
"""Elements of a result below which concatenating new tensors is faster than writing to views of it."""


def offsets_of(lengths: Tensor) -> Tensor:
    """Offsets ``[S+1]`` of lengths ``[S]``, in their dtype."""
    return torch.constant_pad_nd(lengths.cumsum(0, dtype=lengths.dtype), (1, 0))


def lengths_of(offsets: Tensor, total: int | None, name: str = "offsets") -> list[int]:
    """Return the segment lengths as a list: a sync on a GPU, a few microseconds on a CPU.

    Args:
        offsets: ``[S+1]``.
        total: The number of packed tokens; None if unknown.
        name: The argument's name, for the message.

    Raises:
        LayoutError: If the offsets do not start at 0, decrease, or do not end at `total`.

    >>> lengths_of(torch.tensor([0, 2, 2, 5]), 5)
    [2, 0, 3]
    """
    ends = offsets.tolist()
    lengths = [hi - lo for lo, hi in itertools.pairwise(ends)]
    total = ends[-1] if total is None else total
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        check_offsets(offsets, total, name)
    return lengths


def wide(values: Tensor) -> Tensor:
    """Convert half precision (or less) to float32, so that sums are rounded once; keep other dtypes."""
    return values.float() if values.is_floating_point() and values.itemsize < 4 else values


def cut(values: Tensor, lengths: list[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Split packed values into one view per segment. Autograd does not track the views: for kernels only."""
    return values.unsafe_split_with_sizes(lengths, dim) if lengths else ()


def each(
    fn: Callable[..., Tensor],
    arguments: Iterable[Sequence[Tensor]],
    like: Tensor,
    shape: tuple[int, ...],
    pieces: Callable[[Tensor], Iterable[Tensor]],
) -> Tensor:
    """Assemble a result from one call of `fn` per segment, in the order of memory.

    Args:
        fn: Returns one segment's rows of the result, or writes them to `out` if that is given. For a result of rank 1
            it may return a matrix, which is flattened.
        arguments: Positional arguments of each call.
        like: Tensor with the dtype and device of the result.
        shape: Shape of the result.
        pieces: Splits a tensor of this shape into the views that the calls write to.

    >>> x = torch.arange(6.0).view(3, 2)
    >>> each(torch.square, zip(cut(x, [1, 2])), x, (3, 2), lambda out: cut(out, [1, 2])).tolist()
    [[0.0, 1.0], [4.0, 9.0], [16.0, 25.0]]
    """
    if math.prod(shape) < SMALL:
        parts = [fn(*given) for given in arguments]
        if parts:
            return torch.cat([p.reshape(-1) for p in parts] if len(shape) == 1 else parts)
    out = like.new_empty(shape)
    for given, result in zip(arguments, pieces(out), strict=True):
        fn(*given, out=result)
    return out


def unknown_size(at_least: int = 0) -> int:
    """Unbacked symbolic size of a fake kernel's data-dependent output. Without guards it causes no recompilation.

    ``ctx.new_dynamic_size()`` would refuse unless the user set ``capture_dynamic_output_shape_ops``, whose purpose is
    to keep *unexpected* data-dependent sizes out of graphs.
    """
    from torch._library.fake_impl import allocate_size

    return allocate_size(torch.library.get_ctx()._shape_env, at_least, None)


def is_few(lengths: list[int], numbers: int) -> bool:
    """Whether a call per segment is faster than one index for all rows, for a result of `numbers` elements."""
    return 0 < len(lengths) <= FEW and numbers < SMALL


def is_short(lengths: list[int], device: torch.device) -> bool:
    """Whether to move all rows by one index. CPU only, where addition at repeated indices is deterministic."""
    return sum(lengths) < SHORT * len(lengths) and device.type == "cpu"


def row_index(starts: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Row indices ``[total]`` int64 of concatenated ranges: range k starts at ``starts[k]`` and has segment k's length.

    >>> row_index(torch.tensor([5, 0]), torch.tensor([0, 2, 5]), 5).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = starts[: offsets.shape[0] - 1].long() - offsets[:-1]
    return torch.repeat_interleave(shift, offsets.diff(), output_size=total).add_(
        torch.arange(total, device=offsets.device)
    )


def padded_index(offsets: Tensor, size: int, total: int) -> Tensor:
    """Index ``[total]`` of each packed row in the flattened rows of a padded ``[S, size, ...]``."""
    return row_index(torch.arange(offsets.shape[0] - 1, device=offsets.device) * size, offsets, total)
