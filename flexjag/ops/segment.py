"""Reductions of each segment to one row, and the broadcast of one row per segment to its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.errors import ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import check_computable, segment_ids
from flexjag.ops.checks import check_jagged
from flexjag.ops.packed import cut, is_short, lengths_of, wide
from flexjag.ops.register import define

SEQUENTIAL = 1024
"""Longest segment that is summed sequentially, as the rounding error of that grows with the length."""


def segment_sum(x: Jagged) -> Tensor:
    """Sum over each segment's tokens.

    Args:
        x: ``[T, ...]``.

    Returns:
        ``[S, ...]`` of the same dtype, 0 for an empty segment.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).

    >>> segment_sum(Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 0, 2])).tolist()
    [1.0, 0.0, 5.0]
    """
    check_jagged(x, "x")
    check_computable("x", x.values)
    return add_up(x.values, x.offsets)


def segment_mean(x: Jagged) -> Tensor:
    """Mean over each segment's tokens.

    Args:
        x: ``[T, ...]`` floating point.

    Returns:
        ``[S, ...]``, 0 for an empty segment.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).
        ShapeError: If its values are not floating point.

    >>> segment_mean(Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 0, 2])).tolist()
    [1.0, 0.0, 2.5]
    """
    check_jagged(x, "x", floating=True)
    total = add_up(wide(x.values), x.offsets)  # in half precision a sum may overflow where its mean does not
    count = x.lengths.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
    return (total / count).to(x.dtype)


def segment_max(x: Jagged, fill: float = 0.0) -> Tensor:
    """Maximum over each segment's tokens, per feature.

    Args:
        x: ``[T, ...]``.
        fill: The result for an empty segment.

    Returns:
        ``[S, ...]``. The gradient is divided evenly among equal maxima. NaN is propagated, as in ``torch.amax``.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).

    >>> segment_max(Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 0, 2])).tolist()
    [1.0, 0.0, 3.0]
    """
    check_jagged(x, "x")
    check_computable("x", x.values)
    return extreme(x.values, x.offsets, True, fill)


def segment_min(x: Jagged, fill: float = 0.0) -> Tensor:
    """Minimum over each segment's tokens, per feature.

    Args:
        x: ``[T, ...]``.
        fill: The result for an empty segment.

    Returns:
        ``[S, ...]``. The gradient is divided evenly among equal minima. NaN is propagated, as in ``torch.amin``.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).

    >>> segment_min(Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 0, 2])).tolist()
    [1.0, 0.0, 2.0]
    """
    check_jagged(x, "x")
    check_computable("x", x.values)
    return extreme(x.values, x.offsets, False, fill)


def segment_broadcast(rows: Tensor, x: Jagged) -> Jagged:
    """Repeat one row per segment for each of its tokens: the transpose of :func:`segment_sum`.

    Args:
        rows: ``[S, ...]``, any dtype.
        x: ``[T, ...]``; only its layout matters.

    Returns:
        ``[T, ...]`` of the dtype of `rows`, with the offsets of `x`. The gradient of a row is the sum over its
        segment's tokens, 0 for an empty segment; in half precision it is summed in float32 and rounded once.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).
        ShapeError: If `rows` does not have one row per segment, or is on another device.

    >>> x = Jagged.from_lengths(torch.zeros(3), [1, 0, 2])
    >>> segment_broadcast(torch.tensor([7.0, 8.0, 9.0]), x).values.tolist()
    [7.0, 9.0, 9.0]
    """
    check_jagged(x, "x")
    if not isinstance(rows, Tensor):
        raise ShapeError(explain_values("rows", "must be a tensor", type=type(rows).__name__))
    if rows.ndim < 1 or rows.shape[0] != x.num_segments:
        seen: dict[str, object] = {"shape": tuple(rows.shape), "segments": x.num_segments}
        raise ShapeError(explain_values("rows", "must have one row per segment of x", **seen))
    if rows.device != x.device:
        seen = {"rows": str(rows.device), "x": str(x.device)}
        raise ShapeError(explain_values("rows", "must be on the device of x", **seen))
    return x.with_values(spread(rows, x.offsets, x.values.shape[0]))


@define("add_up")
def add_up(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each segment: ``[T, ...]`` to ``[S, ...]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    bags = values.dtype in (torch.float32, torch.bfloat16, torch.float16) and values.device.type == "cpu"
    if bags and values.numel() and max(lengths) <= SEQUENTIAL:  # vectorized, and one call for all segments
        token = torch.arange(values.shape[0], dtype=offsets.dtype, device=values.device)
        rows = values if values.ndim == 2 else values.reshape(values.shape[0], -1)
        found = torch.embedding_bag(rows, token, offsets, False, 0, False, None, True)[0]
        return found if values.ndim == 2 else found.view(len(lengths), *values.shape[1:]).clone()
    out = values.new_empty((len(lengths), *values.shape[1:]))
    for x, y in zip(cut(values, lengths), out.unbind(0), strict=True):
        torch.sum(x, 0, dtype=values.dtype, out=y)
    return out


@add_up.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))


@define("spread")
def spread(rows: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Broadcast ``[S, ...]`` to ``[T, ...]``: each token gets its segment's row."""
    lengths_of(offsets, total, "x.offsets")  # raises LayoutError
    return rows.index_select(0, segment_ids(offsets, total)) if total else rows.new_empty((0, *rows.shape[1:]))


@spread.register_fake
def _(rows: Tensor, offsets: Tensor, total: int) -> Tensor:
    return rows.new_empty((total, *rows.shape[1:]))


@define("extreme")
def extreme(values: Tensor, offsets: Tensor, largest: bool, fill: float) -> Tensor:
    """Maximum or minimum over each segment: ``[T, ...]`` to ``[S, ...]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    if is_short(lengths, values.device) and values.is_floating_point():
        found = torch.segment_reduce(values.contiguous(), "max" if largest else "min", offsets=offsets, unsafe=True)
        if lengths and min(lengths):
            return found
        empty = (offsets.diff() == 0).view(-1, *[1] * (found.ndim - 1))
        return torch.where(empty, torch.full_like(found, fill), found)
    out = values.new_empty((len(lengths), *values.shape[1:]))
    reduce = torch.amax if largest else torch.amin
    for x, y in zip(cut(values, lengths), out.unbind(0), strict=True):
        if x.shape[0]:
            reduce(x, 0, out=y)
        else:
            y.fill_(fill)
    return out


@extreme.register_fake
def _(values: Tensor, offsets: Tensor, largest: bool, fill: float) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))


@define("extreme_backward")
def extreme_backward(grad: Tensor, values: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of :func:`extreme`: that of each segment's row, divided among the tokens equal to it."""
    lengths = lengths_of(offsets, values.shape[0])
    if is_short(lengths, values.device):
        rows = spread(out, offsets, values.shape[0])
        hit = (values == rows) | (values.isnan() & rows.isnan())
        share = (grad / add_up(hit.float(), offsets)).to(values.dtype)  # bfloat16 counts exactly up to 256
        return spread(share, offsets, values.shape[0]) * hit
    result = values.new_empty(values.shape)
    parts = cut(values, lengths), cut(result, lengths), grad.unbind(0), out.unbind(0)
    for x, dx, g, y in zip(*parts, strict=True):
        hit = (x == y) | x.isnan() if bool(y.isnan().any()) else x == y
        torch.mul(hit, g / hit.sum(0), out=dx)
    return result


@extreme_backward.register_fake
def _(grad: Tensor, values: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _setup_add_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.total = values.shape[0]


def _backward_add_up(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return spread(grad, offsets, ctx.total), None


def _setup_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return add_up(grad, offsets), None, None


def _setup_extreme(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output, inputs[1])


def _backward_extreme(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, out, offsets = ctx.saved_tensors
    return extreme_backward(grad, values, out, offsets), None, None, None


def _setup_extreme_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_extreme_backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, out, offsets = ctx.saved_tensors
    shares = extreme_backward(torch.ones_like(grad), values, out, offsets)
    return add_up(above * shares, offsets), None, None, None


add_up.register_autograd(_backward_add_up, setup_context=_setup_add_up)
spread.register_autograd(_backward_spread, setup_context=_setup_spread)
extreme.register_autograd(_backward_extreme, setup_context=_setup_extreme)
extreme_backward.register_autograd(_backward_extreme_backward, setup_context=_setup_extreme_backward)
add_up.register_kernel("flexjag.ops.triton.reduce")
extreme.register_kernel("flexjag.ops.triton.reduce")
extreme_backward.register_kernel("flexjag.ops.triton.reduce")
spread.register_kernel("flexjag.ops.triton.move")
