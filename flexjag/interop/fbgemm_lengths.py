"""FBGEMM's functions of lengths and offsets alone: sums, ranges, masks and permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.errors import LayoutError, explain_values
from flexjag.interop.fbgemm_common import check_index, check_lengths, check_range, check_tensor, size_of
from flexjag.jagged import check_offsets, segment_ids
from flexjag.ops.checks import can_look
from flexjag.ops.packed import offsets_of, unknown_size
from flexjag.ops.register import define


def asynchronous_complete_cumsum(t_in: Tensor) -> Tensor:
    """Offsets of lengths: ``[S]`` to ``[S+1]``, or ``[K, S]`` to ``[K, S+1]``, in their dtype.

    Raises:
        ShapeError: If `t_in` is no tensor of one or two dimensions.

    >>> asynchronous_complete_cumsum(torch.tensor([1, 0, 2])).tolist()
    [0, 1, 1, 3]
    """
    check_tensor(t_in, "t_in", 1, 2)
    return torch.nn.functional.pad(t_in.cumsum(-1, dtype=t_in.dtype), (1, 0))


def asynchronous_batched_complete_cumsum(values: Tensor) -> Tensor:
    """:func:`asynchronous_complete_cumsum` of ``[K, S]``.

    Raises:
        ShapeError: If `values` is no tensor of two dimensions.

    >>> asynchronous_batched_complete_cumsum(torch.tensor([[1, 2], [3, 0]])).tolist()
    [[0, 1, 3], [0, 3, 3]]
    """
    check_tensor(values, "values", 2)
    return asynchronous_complete_cumsum(values)


def asynchronous_inclusive_cumsum(t_in: Tensor) -> Tensor:
    """Sums up to each entry, that one included, in its dtype; several dimensions count as one.

    Raises:
        ShapeError: If `t_in` is no tensor.

    >>> asynchronous_inclusive_cumsum(torch.tensor([1, 0, 2])).tolist()
    [1, 1, 3]
    """
    check_tensor(t_in, "t_in")
    return t_in.flatten().cumsum(0, dtype=t_in.dtype).view(t_in.shape)


def asynchronous_exclusive_cumsum(t_in: Tensor) -> Tensor:
    """Sums of the entries before each one, in their dtype; several dimensions count as one.

    Raises:
        ShapeError: If `t_in` is no tensor.

    >>> asynchronous_exclusive_cumsum(torch.tensor([1, 0, 2])).tolist()
    [0, 1, 1]
    """
    check_tensor(t_in, "t_in")
    shifted = torch.nn.functional.pad(t_in.flatten(), (1, 0))[:-1]
    return shifted.cumsum(0, dtype=t_in.dtype).view(t_in.shape)


def offsets_range(offsets: Tensor, range_size: int) -> Tensor:
    """``[range_size]``: the position of each token in its segment, in the dtype of `offsets`.

    FBGEMM writes outside its result where offsets decrease or are larger than `range_size`, and leaves out tokens in
    front of the first offset; all of these are errors where the contents can be looked at (on a CPU).

    Args:
        offsets: ``[S]`` or ``[S+1]``, int32 or int64: where segments begin; the last one ends at `range_size`.
        range_size: The number of tokens.

    Raises:
        LayoutError: If the offsets are none, or do not fit `range_size`.
        ShapeError: If `range_size` is no integer or negative.

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
    """``[Σ n_s]``: 0 to n_s - 1 for each segment, in the dtype of `lengths`.

    Args:
        lengths: ``[S]``, int32 or int64.

    Raises:
        LayoutError: If lengths are none or negative.

    >>> repeat_arange(torch.tensor([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    check_lengths(lengths, "lengths")
    return positions(lengths)


@define("repeat_arange")
def positions(lengths: Tensor) -> Tensor:
    """The positions of all tokens in their segments."""
    total = int(lengths.sum())
    starts = offsets_of(lengths)[:-1]
    return torch.arange(total, device=lengths.device, dtype=lengths.dtype) - torch.repeat_interleave(
        starts, lengths, output_size=total
    )


@positions.register_fake
def _(lengths: Tensor) -> Tensor:
    return lengths.new_empty((unknown_size(),))


def get_source_mask(num_sources: Tensor, num_targets: Tensor, output_size: int) -> Tensor:
    """``[Σ (n_s + m_s)]`` bool: in each segment n_s times True, then m_s times False.

    FBGEMM writes outside its result where `output_size` is smaller than that, and returns memory that it never wrote
    where it is larger. Here that is an error where lengths can be looked at (on a CPU); elsewhere the result is cut, or
    followed by False.

    Args:
        num_sources: ``[S]``, n_s, int32 or int64.
        num_targets: ``[S]``, m_s.
        output_size: The sum of both.

    Raises:
        LayoutError: If lengths are none, negative, of two sizes, or do not sum to `output_size`.
        ShapeError: If `output_size` is no integer or negative.

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
    """A permutation of segments as one of their tokens: token i of segment s of the result is i of ``permute[s]``.

    Args:
        permute: ``[S]``, int32 or int64, from 0 to S - 1. FBGEMM refuses S = 0; here the result is empty.
        input_offset: ``[S+1]``, where segments begin before.
        output_offset: ``[S+1]``, and after. Where a length is not that of the segment it comes from, the numbers just
            go on, as in FBGEMM.
        output_size: The last of `output_offset`.

    Returns:
        ``[output_size]``: the old index of each token, in the dtype of `input_offset`.

    Raises:
        LayoutError: If offsets or indices are none, of two sizes, or do not end at `output_size`. FBGEMM reads or
            writes other memory.
        ShapeError: If `output_size` is no integer or negative.

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
