"""How the plain-torch kernels see packed rows: as one view per segment, or as one index for all rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flexjag.jagged import check_offsets

SHORT = 32
"""With fewer rows per segment, one index for all rows is faster than a call per segment (measured at 64 features)."""

FEW = 8
"""Up to so many segments, views and a call for each take less than the 12 µs that an index for all rows takes."""

SMALL = 2**14
"""With fewer numbers, new tensors that are joined take less than views of the result that are written to."""


def offsets_of(lengths: Tensor) -> Tensor:
    """``[S+1]`` offsets of ``[S]`` lengths, in their dtype."""
    return torch.constant_pad_nd(lengths.cumsum(0, dtype=lengths.dtype), (1, 0))


def lengths_of(offsets: Tensor, total: int | None, name: str = "offsets") -> list[int]:
    """The lengths of all segments on the host: a sync on a GPU, a few microseconds on a CPU.

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
    """Half precision (or less) as float32, in which sums are kept to be rounded once; any other dtype as it is."""
    return values.float() if values.is_floating_point() and values.itemsize < 4 else values


def cut(values: Tensor, lengths: list[int], dim: int = 0) -> tuple[Tensor, ...]:
    """The segments of packed values, one view each, which autograd does not know as such: for kernels only."""
    return values.unsafe_split_with_sizes(lengths, dim) if lengths else ()


def each(
    fn: Callable[..., Tensor],
    arguments: Iterable[Sequence[Tensor]],
    like: Tensor,
    shape: tuple[int, ...],
    pieces: Callable[[Tensor], Iterable[Tensor]],
) -> Tensor:
    """A result whose pieces ``fn(*given)`` makes one by one, all of them in the order of memory.

    Args:
        fn: Makes a piece, some rows of the result, and writes it to `out` if that is given. For a result of one
            dimension it may make a matrix, which is flattened.
        arguments: What `fn` gets, for each piece.
        like: Has the dtype and device of the result.
        shape: Of the result.
        pieces: Cuts it.

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
    """In a fake kernel: a size that only the data tells. Such a size needs no guard, so no recompilation.

    ``ctx.new_dynamic_size()`` would refuse unless the user set ``capture_dynamic_output_shape_ops``, whose purpose is
    to keep *unexpected* data-dependent sizes out of graphs.
    """
    from torch._library.fake_impl import allocate_size

    return allocate_size(torch.library.get_ctx()._shape_env, at_least, None)


def is_few(lengths: list[int], numbers: int) -> bool:
    """Whether a call per segment costs less than one index for all rows, for a result of so many numbers."""
    return 0 < len(lengths) <= FEW and numbers < SMALL


def is_short(lengths: list[int], device: torch.device) -> bool:
    """Whether to move all rows at once. Only on a CPU, where adding at repeated indices is deterministic."""
    return sum(lengths) < SHORT * len(lengths) and device.type == "cpu"


def row_index(starts: Tensor, offsets: Tensor, total: int) -> Tensor:
    """``[total]`` int64: rows counted from ``starts[k]`` on for as long as segment k of `offsets`.

    >>> row_index(torch.tensor([5, 0]), torch.tensor([0, 2, 5]), 5).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = starts[: offsets.shape[0] - 1].long() - offsets[:-1]
    return torch.repeat_interleave(shift, offsets.diff(), output_size=total).add_(
        torch.arange(total, device=offsets.device)
    )


def padded_index(offsets: Tensor, size: int, total: int) -> Tensor:
    """``[total]``: where each packed row stands among the flattened rows of ``[S, size, ...]``."""
    return row_index(torch.arange(offsets.shape[0] - 1, device=offsets.device) * size, offsets, total)
