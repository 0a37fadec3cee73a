"""Differentiable conversion between packed ``[T, ...]`` and padded ``[S, N, ...]``, in plain torch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.offsets import can_look, check_tensor, lengths_tensor, offsets_of, segment_ids

BITS = {
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), torch.int8),
    torch.float8_e8m0fnu: torch.int8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}
"""Dtypes that ``index_copy`` does not support, mapped to an integer dtype of the same size."""


def pad(values: Tensor, offsets: Tensor, size: int | None, fill: float) -> Tensor:
    """Pad ``[T, ...]`` with `fill` to ``[S, size, ...]``; longer segments are truncated.

    Args:
        values: ``[T, ...]``.
        offsets: ``[S+1]``.
        size: Default: the longest segment, which costs a device sync.
        fill: The padding value.

    Raises:
        ShapeError: If the size is negative.
    """
    segments, total = offsets.shape[0] - 1, values.shape[0]
    if size is None:
        size = int(offsets.diff().max()) if segments else 0
    if size < 0:
        raise ShapeError(explain_values("max_length", "must not be negative", max_length=size))
    segment = segment_ids(offsets, total)
    pos = torch.arange(total, device=values.device) - offsets[segment]
    spare = segments * size  # one extra row past the end receives the truncated rows
    index = torch.where((pos < size) & (segment < segments), segment * size + pos, spare)
    flat = values.new_full((spare + 1, *values.shape[1:]), fill)
    bits = BITS.get(values.dtype)
    if bits is None:
        flat = flat.index_copy(0, index, values)
    else:
        flat = flat.view(bits).index_copy(0, index, values.view(bits)).view(values.dtype)
    return flat[:spare].reshape(segments, size, *values.shape[1:])


def unpad(dense: Tensor, lengths: Tensor | Sequence[int], total: int | None) -> tuple[Tensor, Tensor]:
    """Unpad ``[S, N, ...]`` to ``[T, ...]``, the first ``lengths[s]`` rows of each; also return the offsets ``[S+1]``.

    Raises:
        LayoutError: If there are not S lengths, or one exceeds N (checked on a CPU).
        ShapeError: If `dense` is not a tensor.
    """
    check_tensor(ShapeError, "dense", dense)
    n = lengths_tensor(lengths, dense.device)
    if dense.ndim < 2 or n.shape[0] != dense.shape[0]:
        seen = {"lengths": tuple(n.shape), "dense": tuple(dense.shape)}
        raise LayoutError(explain_values("lengths", "must have one entry per row of dense", **seen))
    if can_look(n) and bool((n > dense.shape[1]).any()):
        seen = {"longest": int(n.max()), "padded": dense.shape[1]}
        raise LayoutError(explain_values("lengths", "must not exceed the padded length", **seen))
    offsets = offsets_of(n)
    total = int(offsets[-1]) if total is None else total
    segment = segment_ids(offsets, total)
    index = segment * dense.shape[1] + torch.arange(total, device=dense.device) - offsets[segment]
    return dense.flatten(0, 1).index_select(0, index), offsets
