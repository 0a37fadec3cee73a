"""FBGEMM's selections of tokens and segments, and the transpose of one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag import ops
from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.interop.fbgemm.common import (
    Integer,
    check_equal,
    check_index,
    check_lengths,
    check_range,
    check_tensor,
    integer,
    kept,
    read,
    size_of,
)
from flexjag.interop.fbgemm_lengths import asynchronous_complete_cumsum
from flexjag.jagged import Jagged
from flexjag.ops.checks import can_look
from flexjag.ops.packed import offsets_of, unknown_size
from flexjag.ops.register import define
from flexjag.ops.select import put, take


def jagged_index_select(
    values: Tensor, lengths: Tensor, indices: Tensor, num_dense_output_rows: Integer | None = None
) -> list[Tensor]:
    """Select segments by index, in the given order; an index may repeat.

    FBGEMM refuses empty `indices`; here the result is empty.

    Args:
        values: ``[T, D]``, any dtype. Rows behind the last segment are ignored.
        lengths: ``[S]``, int32 or int64.
        indices: ``[K]``, int32 or int64, 0 to S - 1.
        num_dense_output_rows: Number of rows of the result, which saves a device sync. If it is too small, the
            result is truncated, as in FBGEMM; if too large, it is an error, where FBGEMM crashes the process. In a
            compiled graph and on a GPU it must be right.

    Returns:
        The selected rows and their lengths, in the dtype of `lengths`, in a list.

    Raises:
        LayoutError: If lengths are negative, sum to more than T, an index is out of range, or
            `num_dense_output_rows` is wrong.
        ShapeError: If shapes do not match.

    >>> jagged_index_select(torch.tensor([[1], [2], [3]]), torch.tensor([1, 2]), torch.tensor([1, 0, 1]))
    [tensor([[2], [3], [1], [2], [3]]), tensor([2, 1, 2])]
    """
    check_tensor(values, "values", 2)
    check_tensor(lengths, "lengths", 1)
    check_index(indices, "indices", values)
    total = None if num_dense_output_rows is None else integer(num_dense_output_rows, "num_dense_output_rows")
    return [_select(values, lengths, indices, total), lengths.index_select(0, indices)]


def keyed_jagged_index_select_dim1(
    values: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    indices: Tensor,
    batch_size: Integer,
    weights: Tensor | None = None,
    selected_lengths_sum: Integer | None = None,
) -> list[Tensor]:
    """Select the same segments of each of K stacked jagged features.

    FBGEMM implements it for CUDA only, and refuses empty `indices`; here the result is empty.

    Args:
        values: ``[T]``, the values of all keys concatenated, any dtype.
        lengths: ``[K·S]``, int32 or int64.
        offsets: Offsets ``[K·S+1]`` of `lengths`.
        indices: ``[M]``, int32 or int64, 0 to S - 1.
        batch_size: S.
        weights: ``[T]``, selected like the values. In FBGEMM they get no gradient.
        selected_lengths_sum: The number of values of the result, as for :func:`jagged_index_select`.

    Returns:
        The values, their lengths ``[K·M]`` in the dtype of `lengths`, and the weights if given, in a list.

    Raises:
        LayoutError: If offsets or indices are invalid, or do not match the lengths or the values.
        ShapeError: If shapes do not match.

    >>> lengths, offsets = torch.tensor([1, 2, 0, 1]), torch.tensor([0, 1, 3, 3, 4])
    >>> keyed_jagged_index_select_dim1(torch.arange(4), lengths, offsets, torch.tensor([1]), 2)
    [tensor([1, 2, 3]), tensor([2, 1])]
    """
    check_tensor(values, "values", 1)
    for tensor, name in ((lengths, "lengths"), (offsets, "offsets"), (indices, "indices")):
        check_index(tensor, name, values)
    if weights is not None:
        check_tensor(weights, "weights", 1)
        if weights.shape != values.shape:
            seen: dict[str, object] = {"weights": tuple(weights.shape), "values": tuple(values.shape)}
            raise ShapeError(explain_values("weights", "must have as many entries as values", **seen))
    size = size_of(batch_size, "batch_size")
    keys = lengths.shape[0] // max(size, 1)
    if lengths.shape[0] != keys * size:
        seen = {"batch_size": size, "lengths": tuple(lengths.shape)}
        raise ShapeError(explain_values("lengths", "must have batch_size entries per key", **seen))
    check_equal(offsets, "offsets", asynchronous_complete_cumsum(lengths), "must be the offsets of lengths")
    check_range(indices, "indices", size)
    chosen = (torch.arange(keys, device=indices.device)[:, None] * size + indices).flatten()
    total = None if selected_lengths_sum is None else integer(selected_lengths_sum, "selected_lengths_sum")
    out = [_select(values, lengths, chosen, total), lengths.index_select(0, chosen)]
    return out if weights is None else [*out, _select(weights, lengths, chosen, total)]


def _select(values: Tensor, lengths: Tensor, indices: Tensor, total: int | None) -> Tensor:
    """Rows of the segments with the given indices, truncated to `total`."""
    offsets = asynchronous_complete_cumsum(lengths)
    known = total
    if can_look(lengths, indices):
        read(values, offsets, mask=False)
        check_range(indices, "indices", lengths.shape[0])
        count = int(lengths.index_select(0, indices).sum())
        known = None if total is not None and 0 <= total < count else total
    rows = ops.jagged_index_select(Jagged(values, offsets), indices, total=known).values
    return rows if total is None else rows[:total]


def jagged_index_add_2d_forward(
    values: Tensor,
    indices: Tensor,
    input_offsets: Tensor,
    output_offsets: Tensor,
    num_dense_input_rows: Integer,
    num_output_rows: Integer,
) -> Tensor:
    """Transpose of :func:`jagged_index_select`: add segments to those of a zero result by index, in the given order.

    FBGEMM's gradient of :func:`jagged_index_select`. Differentiable, which FBGEMM's is not.

    Args:
        values: ``[U, D]``, the rows of K segments.
        indices: ``[K]``, int32 or int64: the segment of the result that each segment is added to.
        input_offsets: *Ends* of the segments of `values`, ``lengths.cumsum(0)``: ``[K]`` int64.
        output_offsets: *Ends* of the segments of the result, ``[S]`` int64.
        num_dense_input_rows: U.
        num_output_rows: The number of rows of the result.

    Returns:
        ``[num_output_rows, D]``.

    Raises:
        LayoutError: If offsets or indices are invalid or do not match the numbers of rows, or a segment is longer than
            that of the result: FBGEMM then adds to the next one, or writes out of bounds.
        ShapeError: If shapes do not match, or a number of rows is not a non-negative integer.

    >>> values, ends = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 3])
    >>> jagged_index_add_2d_forward(values, torch.tensor([1, 0, 1]), ends, torch.tensor([1, 2]), 3, 2).tolist()
    [[2.0], [4.0]]
    """
    check_tensor(values, "values", 2)
    for tensor, name in (
        (indices, "indices"),
        (input_offsets, "input_offsets"),
        (output_offsets, "output_offsets"),
    ):
        check_index(tensor, name, values)
    rows = size_of(num_output_rows, "num_output_rows")
    if size_of(num_dense_input_rows, "num_dense_input_rows") != values.shape[0]:
        seen: dict[str, object] = {"num_dense_input_rows": num_dense_input_rows, "values": tuple(values.shape)}
        raise ShapeError(explain_values("num_dense_input_rows", "must be the number of rows of values", **seen))
    if indices.shape != input_offsets.shape:
        seen = {"indices": tuple(indices.shape), "input_offsets": tuple(input_offsets.shape)}
        raise LayoutError(explain_values("input_offsets", "must have as many entries as indices", **seen))
    pieces, whole = (torch.nn.functional.pad(ends, (1, 0)) for ends in (input_offsets, output_offsets))
    check_range(indices, "indices", output_offsets.shape[0])
    if can_look(values, indices):
        Jagged(values, pieces).validate()
        read(values.new_empty(rows), whole, mask=False)
        longer = (pieces.diff() > whole.diff().index_select(0, indices)).nonzero()
        if longer.numel():
            at = int(longer[0])
            seen = {"segment": at, "index": int(indices[at])}
            raise LayoutError(explain_values("input_offsets", "must not be longer than output_offsets say", **seen))
    return put(values, whole.index_select(0, indices), pieces, rows)


def jagged_slice(x_values: Tensor, x_lengths: Tensor, start: Tensor, slice_length: Integer) -> tuple[Tensor, Tensor]:
    """Slice every segment from its own start, to at most `slice_length` tokens.

    For a negative `slice_length`, an error here, FBGEMM returns uninitialized memory.

    Args:
        x_values: ``[T]``, any dtype. Values behind the last segment are ignored.
        x_lengths: ``[S]``, int64, and int32 here.
        start: First position to keep ``[S]``, from 0 to the segment's length.
        slice_length: Maximal number of tokens per segment.

    Returns:
        The values, differentiable, and their lengths.

    Raises:
        LayoutError: If lengths or starts are invalid, or do not match each other or the values.
        ShapeError: If `slice_length` is not a non-negative integer, or `x_values` is not 1-D.

    >>> jagged_slice(torch.arange(5), torch.tensor([2, 3]), torch.tensor([1, 0]), 2)
    (tensor([1, 2, 3]), tensor([1, 2]))
    """
    check_tensor(x_values, "x_values", 1)
    size = size_of(slice_length, "slice_length")
    check_lengths(x_lengths, "x_lengths", x_values)
    check_lengths(start, "start", x_values)
    if start.shape != x_lengths.shape:
        seen: dict[str, object] = {"start": tuple(start.shape), "x_lengths": tuple(x_lengths.shape)}
        raise LayoutError(explain_values("start", "must have as many entries as x_lengths", **seen))
    if can_look(x_lengths, start):
        behind = (start > x_lengths).nonzero()
        if behind.numel():
            at = int(behind[0])
            seen = {f"start[{at}]": int(start[at]), f"x_lengths[{at}]": int(x_lengths[at])}
            raise LayoutError(explain_values("start", "must not be larger than the length", **seen))
    lengths = (x_lengths - start).clamp(max=size)
    return _slice(x_values, x_lengths, start, lengths), lengths


def jagged_1d_to_truncated_values(values: Tensor, lengths: Tensor, max_truncated_length: Integer) -> Tensor:
    """Truncate every segment to its first `max_truncated_length` tokens.

    Differentiable, which FBGEMM's is not.

    Args:
        values: ``[T]``, any dtype. Values behind the last segment are ignored.
        lengths: ``[S]``, int32 or int64.
        max_truncated_length: Maximal number of tokens per segment.

    Returns:
        ``[Σ min(n_s, max_truncated_length)]``.

    Raises:
        LayoutError: If lengths are not 1-D integers, are negative, or sum to more than T.
        ShapeError: If `max_truncated_length` is not a non-negative integer, or `values` is not 1-D.

    >>> jagged_1d_to_truncated_values(torch.arange(5), torch.tensor([2, 3]), 1).tolist()
    [0, 2]
    """
    check_tensor(values, "values", 1)
    size = size_of(max_truncated_length, "max_truncated_length")
    check_lengths(lengths, "lengths", values)
    return _slice(values, lengths, torch.zeros_like(lengths), lengths.clamp(max=size))


def _slice(values: Tensor, lengths: Tensor, start: Tensor, sizes: Tensor) -> Tensor:
    """Slice `sizes` tokens of each segment from `start` on."""
    offsets = asynchronous_complete_cumsum(lengths)
    if can_look(offsets):
        read(values, offsets, mask=False)
    return take(values, offsets + torch.nn.functional.pad(start, (0, 1)), offsets_of(sizes), None)


def masked_select_jagged_1d(
    values: Tensor, lengths: Tensor, mask: Tensor, check_length: bool | None = False
) -> tuple[Tensor, Tensor]:
    """Select the tokens where `mask` is True.

    Differentiable, which FBGEMM's is not.

    Args:
        values: ``[T]``, any dtype. Values behind the last segment are ignored.
        lengths: ``[S]``, int32 or int64.
        mask: ``[T]`` bool.
        check_length: Ignored: a mask of another size is always an error. FBGEMM checks it only if this is set, and
            otherwise reads out of bounds or returns uninitialized memory.

    Returns:
        The values, and their lengths in the dtype of `lengths`.

    Raises:
        LayoutError: If lengths are not 1-D integers, are negative, or sum to more than T.
        ShapeError: If `mask` is not boolean or has another size.

    >>> masked_select_jagged_1d(torch.arange(3), torch.tensor([1, 2]), torch.tensor([True, False, True]))
    (tensor([0, 2]), tensor([1, 1]))
    """
    check_tensor(values, "values", 1)
    check_tensor(mask, "mask", 1)
    check_lengths(lengths, "lengths", values)
    if mask.dtype != torch.bool or mask.shape != values.shape:
        seen: dict[str, object] = {"mask": tuple(mask.shape), "dtype": mask.dtype, "values": tuple(values.shape)}
        raise ShapeError(explain_values("mask", "must be boolean with as many entries as values", **seen))
    offsets = asynchronous_complete_cumsum(lengths)
    if can_look(offsets):
        read(values, offsets, mask=False)
    hits = mask & kept(offsets, values.shape[0], None)
    before = asynchronous_complete_cumsum(hits.long())
    return values.index_select(0, true_at(hits)), before.index_select(0, offsets).diff().to(lengths.dtype)


@define("true_at")
def true_at(mask: Tensor) -> Tensor:
    """Indices of the True entries of a 1-D mask, int64."""
    return mask.nonzero().flatten()


@true_at.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((unknown_size(),), dtype=torch.int64)
