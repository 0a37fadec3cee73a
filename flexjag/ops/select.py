"""Selection, concatenation and splitting of segments, as copies of ranges of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import as_int, check_ends, index_tensor
from flexjag.ops.checks import can_look, check_index, check_jagged, check_like, check_total
from flexjag.ops.packed import FEW, cut, is_few, is_short, lengths_of, offsets_of, row_index, unknown_size, wide
from flexjag.ops.register import define
from flexjag.padding import BITS


def jagged_index_select(x: Jagged, indices: Tensor, *, total: int | None = None) -> Jagged:
    """Select segments by index, in the given order; an index may repeat.

    Args:
        x: ``[T, ...]``, any dtype.
        indices: ``[K]`` int32 or int64, from 0 to S - 1 (checked on a CPU).
        total: The number of tokens of the result, if known: saves a device sync.

    Returns:
        K segments. The gradients of a repeated segment are summed in the order of `indices`.

    Raises:
        LayoutError: If `x` is not a Jagged, `indices` are not 1-D integers or out of range, or `total` is wrong.

    >>> x = Jagged.from_list([torch.tensor([1, 2]), torch.tensor([3])])
    >>> jagged_index_select(x, torch.tensor([1, 0, 1])).to_list()
    [tensor([3]), tensor([1, 2]), tensor([3])]
    """
    check_jagged(x, "x")
    indices = index_tensor(indices)
    check_index(indices, "indices", x.device)
    check_total(total)
    check_ends(x.offsets, x.values.shape[0], "x.offsets", spare=True)
    if can_look(indices) and indices.shape[0]:
        found = indices.tolist() if indices.shape[0] <= FEW else [int(v) for v in indices.aminmax()]
        low, high = min(found), max(found)
        if low < 0 or high >= x.num_segments:
            seen = {"smallest": low, "largest": high, "segments": x.num_segments}
            raise LayoutError(explain_values("indices", "must be from 0 to S - 1", **seen))
    # Index all S+1 offsets: a slice of size S would specialize the graph on S = 1.
    starts = x.offsets.index_select(0, indices)
    offsets = offsets_of(x.offsets.index_select(0, indices + 1) - starts)
    return Jagged(take(x.values, starts, offsets, total), offsets)


def jagged_concat(batches: Sequence[Jagged]) -> Jagged:
    """Concatenate the s-th segments of all batches: ``out_s = cat([x_s for x in batches])``.

    Args:
        batches: At least one, each ``[T_i, ...]``, with the same number of segments, feature shape and dtype.

    Returns:
        ``[Σ T_i, ...]``.

    Raises:
        LayoutError: If `batches` is empty, an entry is not a Jagged, or the numbers of segments differ.
        ShapeError: If feature shapes, dtypes or devices differ.

    >>> a = Jagged.from_lengths(torch.tensor([1, 2, 3]), [2, 1])
    >>> b = Jagged.from_lengths(torch.tensor([8, 9]), [0, 2])
    >>> jagged_concat([a, b]).to_list()
    [tensor([1, 2]), tensor([3, 8, 9])]
    """
    batches = list(batches)
    if not batches:
        raise LayoutError(explain_values("batches", "must hold at least one batch", batches=batches))
    for i, x in enumerate(batches):
        name, first = f"batches[{i}]", batches[0]
        check_jagged(x, name)
        check_like(x.values, name, first, "batches[0]")
        if x.offsets.shape != first.offsets.shape:
            seen = {name: x.num_segments, "first": first.num_segments}
            raise LayoutError(explain_values(name, "must have as many segments as batches[0]", **seen))
        if x.values.shape[1:] != first.values.shape[1:]:
            seen = {name: tuple(x.values.shape), "first": tuple(first.values.shape)}
            raise ShapeError(explain_values(name, "must have the feature shape of batches[0]", **seen))
    offsets = batches[0].offsets
    for x in batches[1:]:
        offsets = offsets + x.offsets
    return Jagged(interleave([x.values for x in batches], [x.offsets for x in batches]), offsets)


def jagged_split(
    x: Jagged, lengths: Sequence[Tensor | int], *, totals: Sequence[int] | None = None
) -> tuple[Jagged, ...]:
    """Split every segment into consecutive parts, the inverse of :func:`jagged_concat`.

    Args:
        x: ``[T, ...]``, any dtype.
        lengths: The length of each part but the last, which is the remainder: a tensor ``[S]``, or one number for all
            segments, truncated for segments that are shorter.
        totals: The number of tokens of each part but the last, if known: saves device syncs.

    Returns:
        ``len(lengths) + 1`` batches of S segments.

    Raises:
        LayoutError: If `x` is not a Jagged, or a length is not an integer or, checked on a CPU, is negative or exceeds
            the remainder of a segment.

    >>> x = Jagged.from_lengths(torch.arange(5), [2, 3])
    >>> [piece.to_list() for piece in jagged_split(x, [torch.tensor([0, 2])])]
    [[tensor([], dtype=torch.int64), tensor([2, 3])], [tensor([0, 1]), tensor([4])]]
    """
    check_jagged(x, "x")
    check_ends(x.offsets, x.values.shape[0], "x.offsets")
    if totals is not None and len(totals) != len(lengths):
        seen = {"totals": len(totals), "lengths": len(lengths)}
        raise LayoutError(explain_values("totals", "must have one entry per entry of lengths", **seen))
    starts, left, rest = x.offsets, x.lengths, x.values.shape[0]
    pieces = []
    for i, given in enumerate(lengths):
        size = _piece(x, f"lengths[{i}]", given, left)
        total = None if totals is None else totals[i]
        check_total(total, f"totals[{i}]")
        offsets = offsets_of(size)
        pieces.append(Jagged(take(x.values, starts, offsets, total), offsets))
        starts = starts + torch.constant_pad_nd(size, (0, 1))
        left, rest = left - size, rest - pieces[-1].values.shape[0]
    offsets = offsets_of(left)
    return *pieces, Jagged(take(x.values, starts, offsets, rest), offsets)


def _piece(x: Jagged, name: str, given: Tensor | int, left: Tensor) -> Tensor:
    """Lengths ``[S]`` of one part, at most the remaining lengths `left`."""
    given = index_tensor(as_int(given))
    if isinstance(given, int):
        if given < 0:
            raise LayoutError(explain_values(name, "must not be negative", **{name: given}))
        return left.clamp(max=given)
    check_index(given, name, x.device)
    if given.shape != left.shape:
        seen = {name: tuple(given.shape), "segments": x.num_segments}
        raise LayoutError(explain_values(name, "must have one entry per segment", **seen))
    size = given.to(left.dtype)
    if can_look(size, left):
        wrong = ((size < 0) | (size > left)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            seen = {f"{name}[{at}]": int(size[at]), "left": int(left[at])}
            raise LayoutError(explain_values(name, "must be from 0 to what is left of the segment", **seen))
    return size.clamp(min=0).minimum(left)


@define("take")
def take(values: Tensor, starts: Tensor, offsets: Tensor, total: int | None) -> Tensor:
    """Gather ranges of rows: range k starts at ``starts[k]`` and has the length of segment k of `offsets`.

    `starts` may have an unused last entry.
    """
    lengths = lengths_of(offsets, None)
    count = sum(lengths)
    if total is not None and total != count:
        seen = {"total": total, "tokens": count}
        raise LayoutError(explain_values("total", "must be the number of tokens of the result", **seen))
    if is_few(lengths, values.numel()):
        return torch.cat([values[a : a + n] for a, n in zip(starts.tolist(), lengths, strict=False)])
    return values.index_select(0, row_index(starts, offsets, count))


@take.register_fake
def _(values: Tensor, starts: Tensor, offsets: Tensor, total: int | None) -> Tensor:
    return values.new_empty((unknown_size() if total is None else total, *values.shape[1:]))


@define("put")
def put(pieces: Tensor, starts: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Transpose of :func:`take`: add the ranges, in order, to a zero tensor of `rows` rows."""
    lengths, terms = lengths_of(offsets, pieces.shape[0]), wide(pieces)
    out = terms.new_zeros((rows, *pieces.shape[1:]))
    if is_short(lengths, pieces.device) and not is_few(lengths, pieces.numel()):
        out.index_add_(0, row_index(starts, offsets, pieces.shape[0]), terms)
    else:
        for a, piece in zip(starts.tolist(), cut(terms, lengths), strict=False):
            out[a : a + piece.shape[0]].add_(piece)
    return out.to(pieces.dtype)


@put.register_fake
def _(pieces: Tensor, starts: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return pieces.new_empty((rows, *pieces.shape[1:]))


@define("interleave")
def interleave(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    """Concatenate the s-th segments of all batches."""
    pairs = list(zip(values, offsets, strict=True))
    lengths = [lengths_of(o, v.shape[0], f"batches[{i}].offsets") for i, (v, o) in enumerate(pairs)]
    rows, everything = sum(v.shape[0] for v in values), [n for own in lengths for n in own]
    if everything and (
        not is_short(everything, values[0].device) or is_few(lengths[0], rows) or values[0].dtype in BITS
    ):
        parts = [cut(v, own) for v, own in zip(values, lengths, strict=True)]
        return torch.cat([piece for segment in zip(*parts, strict=True) for piece in segment])
    out = values[0].new_empty((rows, *values[0].shape[1:]))
    for (v, o), starts in zip(pairs, joined_starts(offsets), strict=True):
        out.index_copy_(0, row_index(starts, o, v.shape[0]), v)
    return out


@interleave.register_fake
def _(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    return values[0].new_empty((sum(v.shape[0] for v in values), *values[0].shape[1:]))


def joined_starts(offsets: Sequence[Tensor]) -> list[Tensor]:
    """Starts of each batch's segments in the concatenated rows, one tensor per batch, with an unused last entry."""
    starts = [sum(offsets[1:], offsets[0])]
    for own in offsets[:-1]:
        starts.append(starts[-1] + torch.constant_pad_nd(own.diff(), (0, 1)))
    return starts


def _setup_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, starts, offsets, _ = inputs
    ctx.save_for_backward(starts, offsets)
    ctx.rows = values.shape[0]


def _backward_take(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    starts, offsets = ctx.saved_tensors
    return put(grad, starts, offsets, ctx.rows), None, None, None


def _setup_put(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pieces, starts, offsets, _ = inputs
    ctx.save_for_backward(starts, offsets)
    ctx.total = pieces.shape[0]


def _backward_put(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    starts, offsets = ctx.saved_tensors
    return take(grad, starts, offsets, ctx.total), None, None, None


def _setup_interleave(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets = inputs
    ctx.save_for_backward(*offsets)
    ctx.totals = [v.shape[0] for v in values]


def _backward_interleave(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[None]]:
    offsets = ctx.saved_tensors
    found = [take(grad, *at) for at in zip(joined_starts(offsets), offsets, ctx.totals, strict=True)]
    return found, [None] * len(found)


take.register_autograd(_backward_take, setup_context=_setup_take)
put.register_autograd(_backward_put, setup_context=_setup_put)
interleave.register_autograd(_backward_interleave, setup_context=_setup_interleave)
take.register_kernel("flexjag.ops.triton.move")
put.register_kernel("flexjag.ops.triton.move")
interleave.register_kernel("flexjag.ops.triton.move")
