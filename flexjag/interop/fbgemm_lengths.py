"""FBGEMM's functions of lengths and offsets: cumulative sums, ranges, masks and permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.errors import LayoutError, explain_values
from flexjag.interop.fbgemm.common import check_index, check_lengths, check_range, check_tensor, size_of
from flexjag.jagged import check_offsets, segment_ids
from flexjag.ops.checks import can_look
from flexjag.ops.packed import offsets_of, unknown_size
from flexjag.ops.register import define


def asynchronous_complete_cumsum(t_in: Tensor) -> Tensor:
    """Cumulative sum with a leading 0, dtype kept: lengths ``[S]`` or ``[K, S]`` to offsets ``[S+1]`` or ``[K, S+1]``.

    Raises:
        ShapeError: If `t_in` is not a tensor of one or two dimensions.

    >>> asynchronous_complete_cumsum(torch.tensor([1, 0, 2])).tolist()
    [0, 1, 1, 3]
    """
    check_tensor(t_in, "t_in", 1, 2)
    return torch.nn.functional.pad(t_in.cumsum(-1, dtype=t_in.dtype), (1, 0))


def asynchronous_batched_complete_cumsum(values: Tensor) -> Tensor:
    """:func:`asynchronous_complete_cumsum` of ``[K, S]``.

    Raises:
        ShapeError: If `values` is not a tensor of two dimensions.

    >>> asynchronous_batched_complete_cumsum(torch.tensor([[1, 2], [3, 0]])).tolist()
    [[0, 1, 3], [0, 3, 3]]
    """
    check_tensor(values, "values", 2)
    return asynchronous_complete_cumsum(values)


def asynchronous_inclusive_cumsum(t_in: Tensor) -> Tensor:
    """Inclusive cumulative sum of the flattened tensor, in its dtype and shape.

    Raises:
        ShapeError: If `t_in` is not a tensor.

    >>> asynchronous_inclusive_cumsum(torch.tensor([1, 0, 2])).tolist()
    [1, 1, 3]
    """
    check_tensor(t_in, "t_in")
    return t_in.flatten().cumsum(0, dtype=t_in.dtype).view(t_in.shape)


def asynchronous_exclusive_cumsum(t_in: Tensor) -> Tensor:
    """Exclusive cumulative sum of the flattened tensor, in its dtype and shape.

    Raises:
        ShapeError: If `t_in` is not a tensor.

    >>> asynchronous_exclusive_cumsum(torch.tensor([1, 0, 2])).tolist()
    [0, 1, 1]
    """
    check_tensor(t_in, "t_in")
    shifted = torch.nn.functional.pad(t_in.flatten(), (1, 0))[:-1]
    return shifted.cumsum(0, dtype=t_in.dtype).view(t_in.shape)


def offsets_range(offsets: Tensor, range_size: int) -> Tensor:
    """Position of each token in its segment ``[range_size]``, in the dtype of `offsets`.

    FBGEMM writes out of bounds if offsets decrease or exceed `range_size`, and skips tokens in front of the first
    offset; all of these are errors here (checked on a CPU).

    Args:
        offsets: Starts of the segments ``[S]`` or ``[S+1]``, int32 or int64; the last segment ends at `range_size`.
        range_size: The number of tokens.

    Raises:
        LayoutError: If the offsets are invalid, or exceed `range_size`.
        ShapeError: If `range_size` is not a non-negative integer.

    >>> offsets_range(torch.tensor([0, 2, 2]), 5).tolist()
    [0, 1, 0, 1, 2]
    """
    size = size_of(range_size, "range_size")
    check_index(offsets, "offsets")
    if can_look(offsets):
        check_offsets(torch.cat([offsets, offsets.new_full((1,), size)]), size)
    token = torch.arange(size, device=offsets.device, dtype=offsets.dtype)
    if offsets.shape[0] == 0:
        return token
    return token - offsets.index_select(0, segment_ids(offsets, size).clamp(min=0))


def repeat_arange(lengths: Tensor) -> Tensor:
    """Concatenated ranges 0 to n_s - 1 of all segments ``[Σ n_s]``, in the dtype of `lengths`.

    Args:
        lengths: ``[S]``, int32 or int64.

    Raises:
        LayoutError: If lengths are not 1-D integers or are negative.

    >>> repeat_arange(torch.tensor([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    check_lengths(lengths, "lengths")
    return positions(lengths)


@define("repeat_arange")
def positions(lengths: Tensor) -> Tensor:
    """Position of each token in its segment ``[Σ n_s]``."""
    total = int(lengths.sum())
    starts = offsets_of(lengths)[:-1]
    return torch.arange(total, device=lengths.device, dtype=lengths.dtype) - torch.repeat_interleave(
        starts, lengths, output_size=total
    )


@positions.register_fake
def _(lengths: Tensor) -> Tensor:
    return lengths.new_empty((unknown_size(),))


def get_source_mask(num_sources: Tensor, num_targets: Tensor, output_size: int) -> Tensor:
    """Boolean mask ``[Σ (n_s + m_s)]``: in each segment n_s times True, then m_s times False.

    If `output_size` is smaller, FBGEMM writes out of bounds; if it is larger, it returns uninitialized memory. Here
    both are errors on a CPU; on a GPU and in a compiled graph the result is truncated, or followed by False.

    Args:
        num_sources: The n_s, ``[S]`` int32 or int64.
        num_targets: The m_s, ``[S]`` int32 or int64.
        output_size: The sum of all n_s and m_s.

    Raises:
        LayoutError: If lengths are not 1-D integers, are negative, differ in size, or do not sum to `output_size`.
        ShapeError: If `output_size` is not a non-negative integer.

    >>> get_source_mask(torch.tensor([1, 2]), torch.tensor([2, 0]), 5).tolist()
    [True, False, False, True, True]
    """
    size = size_of(output_size, "output_size")
    check_lengths(num_sources, "num_sources")
    check_lengths(num_targets, "num_targets")
    if num_sources.shape != num_targets.shape:
        seen = {"num_sources": tuple(num_sources.shape), "num_targets": tuple(num_targets.shape)}
        raise LayoutError(explain_values("num_sources", "must have as many entries as num_targets", **seen))
    offsets = offsets_of(torch.stack([num_sources, num_targets], 1).flatten())
    if can_look(offsets) and int(offsets[-1]) != size:
        raise LayoutError(
            explain_values("output_size", "must be the sum of all lengths", output_size=size, sum=int(offsets[-1]))
        )
    run = segment_ids(offsets, size)
    return (run % 2 == 0) & (run < offsets.shape[0] - 1)


def expand_into_jagged_permute(
    permute: Tensor, input_offset: Tensor, output_offset: Tensor, output_size: int
) -> Tensor:
    """Expand a permutation of segments to token indices: segment s of the result is segment ``permute[s]``.

    Args:
        permute: ``[S]``, int32 or int64, from 0 to S - 1. FBGEMM refuses S = 0; here the result is empty.
        input_offset: Offsets ``[S+1]`` before the permutation.
        output_offset: Offsets ``[S+1]`` after it. If a length differs from that of its source segment, indices
            continue past or stop before the source's end, as in FBGEMM.
        output_size: The last of `output_offset`.

    Returns:
        Index of each token before the permutation ``[output_size]``, in the dtype of `input_offset`.

    Raises:
        LayoutError: If offsets or indices are invalid, differ in size, or do not end at `output_size`. FBGEMM reads or
            writes out of bounds.
        ShapeError: If `output_size` is not a non-negative integer.

    >>> offsets, permuted = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 5, 5])
    >>> expand_into_jagged_permute(torch.tensor([2, 0, 1]), offsets, permuted, 5).tolist()
    [2, 3, 4, 0, 1]
    """
    size = size_of(output_size, "output_size")
    for tensor, name in ((permute, "permute"), (input_offset, "input_offset"), (output_offset, "output_offset")):
        check_index(tensor, name, permute)
        if tensor is not permute and tensor.shape[0] != permute.shape[0] + 1:
            seen: dict[str, object] = {name: tuple(tensor.shape), "permute": tuple(permute.shape)}
            raise LayoutError(explain_values(name, "must have one more entry than permute", **seen))
    check_range(permute, "permute", permute.shape[0])
    if can_look(output_offset):
        check_offsets(output_offset, size, "output_offset")
    starts = input_offset.index_select(0, permute)
    token = torch.arange(size, device=permute.device)
    if permute.shape[0] == 0:
        return token.to(input_offset.dtype)
    segment = segment_ids(output_offset, size).clamp(0, permute.shape[0] - 1)
    shift = starts - output_offset[:-1]
    return (token + shift.index_select(0, segment)).to(input_offset.dtype)
