"""FBGEMM's conversions between packed and padded tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag import ops
from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.interop.fbgemm.common import (
    Integer,
    Integers,
    check_lengths,
    check_list,
    check_tensor,
    integers,
    only,
    read,
    size_of,
)
from flexjag.interop.fbgemm_lengths import asynchronous_complete_cumsum
from flexjag.jagged import Jagged
from flexjag.ops.checks import can_look


def jagged_to_padded_dense(
    values: Tensor, offsets: Sequence[Tensor], max_lengths: Integers, padding_value: float = 0.0
) -> Tensor:
    """Pad packed values in every jagged dimension.

    Args:
        values: ``[T, D]`` or ``[T]``, any dtype.
        offsets: One tensor per jagged dimension, outermost first: ``offsets[0]`` is ``[S+1]``, and ``offsets[i + 1]``
            is ``[offsets[i][-1] + 1]``.
        max_lengths: N_1, N_2, …. Longer segments are truncated; an outer one loses whole inner segments.
        padding_value: Value of padded entries; truncated to an integer for integer dtypes, as in FBGEMM.

    Returns:
        ``[S, N_1, N_2, …, D]``. Gradients flow to the rows kept; truncated rows get 0.

    Raises:
        LayoutError: If offsets are invalid, or do not nest.
        ShapeError: If shapes do not match, or an entry of `max_lengths` is negative.

    >>> rows, offsets = torch.arange(1, 6)[:, None], [torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3, 5])]
    >>> jagged_to_padded_dense(rows, offsets, [2, 2]).squeeze(-1).tolist()
    [[[1, 0], [2, 3]], [[4, 5], [0, 0]]]
    """
    check_tensor(values, "values", 1, 2)
    check_list(offsets, "offsets", "tensors, one per jagged dimension")
    sizes = integers(max_lengths, "max_lengths", len(offsets))
    *outer, innermost = zip(offsets, sizes, strict=True)
    rows = read(values, innermost[0], mask=False)
    out = rows.narrow(ops.jagged_to_padded_dense(rows.x, innermost[1], float(padding_value)))
    for level, size in reversed(outer):
        out = ops.jagged_to_padded_dense(Jagged(out, level), size, float(padding_value))
    return out


def jagged_2d_to_dense(values: Tensor, offsets: Tensor, max_sequence_length: Integer) -> Tensor:
    """:func:`jagged_to_padded_dense` of one jagged dimension, padded with 0: ``[T, D]`` to ``[S, N, D]``.

    As in FBGEMM, values ``[T]`` give ``[S, N]``.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> jagged_2d_to_dense(torch.ones(3, 1), torch.tensor([0, 1, 3]), 2).squeeze(-1).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    return jagged_to_padded_dense(values, [offsets], [max_sequence_length])


def jagged_1d_to_dense(values: Tensor, offsets: Tensor, max_sequence_length: Integer, padding_value: int) -> Tensor:
    """:func:`jagged_to_padded_dense` of values ``[T]``: ``[S, N]``.

    FBGEMM refuses N = 0; here the result has no columns, as in :func:`jagged_2d_to_dense`.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> jagged_1d_to_dense(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]), 2, -1).tolist()
    [[5, -1], [6, 7]]
    """
    check_tensor(values, "values", 1)
    return jagged_to_padded_dense(values, [offsets], [max_sequence_length], padding_value)


def stacked_jagged_1d_to_dense(
    values: Tensor,
    lengths: Tensor,
    offset_per_key: Integers,
    max_lengths_per_key: Integers,
    padding_value: int,
) -> list[Tensor]:
    """Pad each of K stacked jagged features separately.

    Differentiable. FBGEMM's CPU backward writes out of bounds, which gives wrong numbers or a crash. FBGEMM also does
    not compare `lengths` with `offset_per_key`, nor the sizes of the lists: if they disagree, it reads the next key's
    rows or out of bounds.

    Args:
        values: ``[T]``, the values of all keys concatenated.
        lengths: ``[K, S]``.
        offset_per_key: K + 1 offsets of the keys in `values`.
        max_lengths_per_key: The K padded lengths N_k.
        padding_value: Value of padded entries.

    Returns:
        K tensors ``[S, N_k]``.

    Raises:
        LayoutError: If a key's lengths sum to more than it has values, or the lists have other sizes.
        ShapeError: If shapes do not match.

    >>> lengths = torch.tensor([[1, 0], [1, 2]])
    >>> [x.tolist() for x in stacked_jagged_1d_to_dense(torch.arange(4), lengths, [0, 1, 4], [1, 2], 9)]
    [[[0], [9]], [[1, 9], [2, 3]]]
    """
    check_tensor(values, "values", 1)
    return _stacked(values, lengths, offset_per_key, max_lengths_per_key, padding_value)


def stacked_jagged_2d_to_dense(
    values: Tensor,
    lengths: Tensor,
    offset_per_key: Integers,
    max_lengths_per_key: Integers,
    padding_value: int = 0,
) -> list[Tensor]:
    """:func:`stacked_jagged_1d_to_dense` of values ``[T, D]``: K tensors ``[S, N_k, D]``.

    Raises:
        LayoutError: If a key's lengths sum to more than it has values, or the lists have other sizes.
        ShapeError: If shapes do not match.

    >>> values, lengths = torch.arange(4.0)[:, None], torch.tensor([[1, 0], [1, 2]])
    >>> [x.shape for x in stacked_jagged_2d_to_dense(values, lengths, [0, 1, 4], [1, 2])]
    [torch.Size([2, 1, 1]), torch.Size([2, 2, 1])]
    """
    check_tensor(values, "values", 2)
    return _stacked(values, lengths, offset_per_key, max_lengths_per_key, padding_value)


def _stacked(
    values: Tensor, lengths: Tensor, offset_per_key: Integers, max_lengths_per_key: Integers, padding_value: int
) -> list[Tensor]:
    check_tensor(lengths, "lengths", 2)
    sizes = integers(max_lengths_per_key, "max_lengths_per_key", lengths.shape[0])
    starts = integers(offset_per_key, "offset_per_key", len(sizes) + 1)
    out = []
    for key, ((start, stop), size) in enumerate(zip(itertools.pairwise(starts), sizes, strict=True)):
        if not 0 <= start <= stop:
            seen = {"key": key, "start": start, "end": stop}
            raise LayoutError(explain_values("offset_per_key", "must not be negative or decrease", **seen))
        offsets = asynchronous_complete_cumsum(lengths[key])
        out.append(jagged_to_padded_dense(values[start:stop], [offsets], [size], padding_value))
    return out


def dense_to_jagged(
    dense: Tensor, x_offsets: Sequence[Tensor], total_L: Integer | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Remove the padding of every jagged dimension.

    Positions beyond the sizes of `dense` give zeros. The first offset must be 0; for a larger one FBGEMM returns rows
    of 0 in front.

    Args:
        dense: ``[S, N_1, …, D]``, any dtype.
        x_offsets: One tensor per jagged dimension, as for :func:`jagged_to_padded_dense`.
        total_L: Number of rows of the result. Default: the last of the innermost offsets, a device sync on a GPU.
            If it is larger, rows of zeros follow, as in FBGEMM. If it is smaller, FBGEMM writes out of bounds; here
            that is an error on a CPU, and on a GPU and in a compiled graph the rows are truncated.

    Returns:
        The values ``[T, D]`` and `x_offsets`. The gradient is padded with zeros.

    Raises:
        LayoutError: If offsets are invalid, do not nest, or end after `total_L`.
        ShapeError: If the rank of `dense` is not ``len(x_offsets) + 2``, or its first size is not S.

    >>> dense_to_jagged(torch.arange(6).view(2, 3, 1), [torch.tensor([0, 1, 3])])
    (tensor([[0], [3], [4]]), [tensor([0, 1, 3])])
    """
    levels = check_dense(dense, "dense", x_offsets)
    dense = to_innermost(dense, levels)
    offsets = levels[-1]
    if total_L is None:
        return ops.dense_to_jagged(dense, offsets, allow_longer=True).values, levels
    total_L = size_of(total_L, "total_L")
    if dense.shape[0] == 0:
        values = ops.dense_to_jagged(dense, offsets, total=0).values
        return torch.nn.functional.pad(values, (0, 0, 0, total_L)), levels
    if can_look(offsets):
        values = ops.dense_to_jagged(dense, offsets, allow_longer=True).values
        if values.shape[0] > total_L:
            seen = {"total_L": total_L, "last": values.shape[0]}
            raise LayoutError(explain_values("total_L", "must not be smaller than the last offset", **seen))
        return torch.nn.functional.pad(values, (0, 0, 0, total_L - values.shape[0])), levels
    # Extend the last segment to `total_L` rows, so that the size of the result is known without a sync.
    last = torch.arange(offsets.shape[0], device=offsets.device) == offsets.shape[0] - 1
    ends = torch.where(last, total_L, offsets.clamp(max=total_L))
    values = ops.dense_to_jagged(dense, ends, total=total_L, allow_longer=True).values
    return only(torch.arange(total_L, device=offsets.device) < offsets[-1], values), levels


def pack_segments(t_in: Tensor, lengths: Tensor, max_length: Integer) -> Tensor:
    """Pad segments with 0; the first result of :func:`pack_segments_v2`.

    Raises:
        LayoutError: If lengths are not 1-D integers, are negative, or sum to more than T.
        ShapeError: If shapes do not match, or `max_length` is not a non-negative integer.

    >>> pack_segments(torch.arange(1, 4), torch.tensor([1, 2]), 2).tolist()
    [[1, 0], [2, 3]]
    """
    return pack_segments_v2(t_in, lengths, max_length)[0]


def pack_segments_v2(
    t_in: Tensor, lengths: Tensor, max_length: Integer, pad_minf: bool = False, return_presence_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Pad segments of rows of any shape, optionally with a mask of the valid rows.

    For truncated segments, FBGEMM's CPU gradients go to the wrong rows.

    Args:
        t_in: ``[T, ...]``, any dtype. Rows behind the last segment are ignored.
        lengths: ``[S]``, int32 or int64.
        max_length: N; longer segments are truncated. FBGEMM refuses N = 0; here the result has no columns.
        pad_minf: Whether to pad with -inf instead of 0; floating point only.
        return_presence_mask: Whether to return the mask.

    Returns:
        ``[S, N, ...]``, and the boolean mask ``[S, N]`` of valid rows or None.

    Raises:
        LayoutError: If lengths are not 1-D integers, are negative, or sum to more than T, for which FBGEMM
            reads out of bounds.
        ShapeError: If shapes or dtypes do not match, or `max_length` is not a non-negative integer.

    >>> pack_segments_v2(torch.arange(1, 4), torch.tensor([1, 2]), 2, return_presence_mask=True)
    (tensor([[1, 0], [2, 3]]), tensor([[ True, False], [ True,  True]]))
    """
    check_tensor(t_in, "t_in")
    size = size_of(max_length, "max_length")
    if t_in.ndim == 0 or (pad_minf and not t_in.is_floating_point()):
        seen: dict[str, object] = {"shape": tuple(t_in.shape), "dtype": t_in.dtype, "pad_minf": pad_minf}
        raise ShapeError(explain_values("t_in", "must have rows, of floating point for pad_minf", **seen))
    check_lengths(lengths, "lengths", t_in)
    rows = read(t_in, asynchronous_complete_cumsum(lengths), mask=False)
    packed = rows.narrow(ops.jagged_to_padded_dense(rows.x, size, -torch.inf if pad_minf else 0.0))
    if not return_presence_mask:
        return packed, None
    return packed, torch.arange(size, device=lengths.device) < lengths[:, None]


def check_dense(dense: Tensor, name: str, offsets: Sequence[Tensor]) -> list[Tensor]:
    """Check a padded argument against its list of offsets, and return the list.

    Raises:
        LayoutError: If the offsets are not a non-empty sequence.
        ShapeError: If the rank of `dense` does not match the number of offsets.
    """
    check_list(offsets, "x_offsets", "tensors, one per jagged dimension")
    check_tensor(dense, name, len(offsets) + 2)
    return list(offsets)


def to_innermost(dense: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Remove the padding of all jagged dimensions but the innermost: one row per innermost segment."""
    for level, inner in itertools.pairwise(levels):
        dense = ops.dense_to_jagged(dense, level, total=inner.shape[0] - 1, allow_longer=True).values
    return dense
