"""How the plain-torch kernels see packed rows: as one view per segment, or as one index for all rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from flexjag.jagged import check_offsets

SHORT = 32
"""With fewer rows per segment, one index for all rows is faster than a call per segment (measured at 64 features)."""


def offsets_of(lengths: Tensor) -> Tensor:
    """``[S+1]`` offsets of ``[S]`` lengths, in their dtype."""
    return torch.nn.functional.pad(lengths.cumsum(0).to(lengths.dtype), (1, 0))


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


def cut(values: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """The segments of packed values, one view each."""
    return iter(values.split(lengths)) if lengths else iter(())


def unknown_size(at_least: int = 0) -> int:
    """In a fake kernel: a size that only the data tells. Such a size needs no guard, so no recompilation.

    ``ctx.new_dynamic_size()`` would refuse unless the user set ``capture_dynamic_output_shape_ops``, whose purpose is
    to keep *unexpected* data-dependent sizes out of graphs.
    """
    from torch._library.fake_impl import allocate_size

    return allocate_size(torch.library.get_ctx()._shape_env, at_least, None)


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
