"""Segment-wise products of jagged and dense matrices, one BLAS call per segment.

D and E are feature sizes. Each product is the gradient of the other, so both are differentiable to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.errors import ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import check_same_layout
from flexjag.ops.checks import check_jagged, check_like, check_rows
from flexjag.ops.packed import cut, each, lengths_of
from flexjag.ops.register import define


def jagged_dense_bmm(x: Jagged, y: Tensor) -> Jagged:
    """Product of each segment's rows with its own dense matrix: ``out_s = x_s y_s``.

    Args:
        x: ``[T, D]`` floating point.
        y: ``[S, D, E]`` of the same dtype.

    Returns:
        ``[T, E]`` with the offsets of `x`. Gradients: dx = dout yᵀ, dy = xᵀ dout per segment.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).
        ShapeError: If ranks, sizes, dtypes or devices of the operands do not match.

    >>> x = Jagged.from_lengths(torch.ones(3, 2), [1, 2])
    >>> jagged_dense_bmm(x, torch.arange(4.0).view(2, 2, 1)).values.tolist()
    [[1.0], [5.0], [5.0]]
    """
    check_jagged(x, "x", 2, floating=True)
    check_rows(y, "y", x, 3)
    if y.shape[1] != x.values.shape[1]:
        seen = {"x": tuple(x.values.shape), "y": tuple(y.shape)}
        raise ShapeError(explain_values("y", "must be [S, D, E] with the features D of x", **seen))
    return x.with_values(times_dense(x.values, y, x.offsets))


def jagged_jagged_bmm(x: Jagged, y: Jagged) -> Tensor:
    """Sum over each segment's tokens of the outer products of x and y: ``out_s = x_sᵀ y_s``.

    Args:
        x: ``[T, D]`` floating point.
        y: ``[T, E]`` with the same offsets and dtype.

    Returns:
        ``[S, D, E]``, 0 for an empty segment. Gradients: dx = y doutᵀ, dy = x dout per segment.

    Raises:
        LayoutError: If an operand is not a Jagged, or their offsets differ.
        ShapeError: If ranks, sizes, dtypes or devices of the operands do not match.

    >>> x = Jagged.from_lengths(torch.tensor([[1.0], [2.0], [3.0]]), [1, 2])
    >>> jagged_jagged_bmm(x, x).tolist()
    [[[1.0]], [[13.0]]]
    """
    check_jagged(x, "x", 2, floating=True)
    check_jagged(y, "y", 2, floating=True)
    check_like(y.values, "y", x)
    check_same_layout(x, y, "y", "must have the offsets of x")
    return gram(x.values, y.values, x.offsets)


@define("times_dense")
def times_dense(values: Tensor, dense: Tensor, offsets: Tensor) -> Tensor:
    """Product per segment of ``[T, D]`` and ``[S, D, E]``: ``[T, E]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    segments = zip(cut(values, lengths), dense.unbind(0), strict=True)
    return each(torch.mm, segments, values, (values.shape[0], dense.shape[2]), lambda out: cut(out, lengths))


@times_dense.register_fake
def _(values: Tensor, dense: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], dense.shape[2]))


@define("gram")
def gram(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Product per segment of transposed ``[T, D]`` and ``[T, E]``: ``[S, D, E]``."""
    lengths = lengths_of(offsets, left.shape[0], "x.offsets")
    out = left.new_empty((len(lengths), left.shape[1], right.shape[1]))
    for x, y, z in zip(cut(left.t(), lengths, 1), cut(right, lengths), out.unbind(0), strict=True):
        torch.mm(x, y, out=z)
    return out


@gram.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty((offsets.shape[0] - 1, left.shape[1], right.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_times_dense(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, dense, offsets = ctx.saved_tensors
    of_values = times_dense(grad, dense.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    of_dense = gram(values, grad, offsets) if ctx.needs_input_grad[1] else None
    return of_values, of_dense, None


def _backward_gram(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, offsets = ctx.saved_tensors
    of_left = times_dense(right, grad.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    of_right = times_dense(left, grad, offsets) if ctx.needs_input_grad[1] else None
    return of_left, of_right, None


times_dense.register_autograd(_backward_times_dense, setup_context=_save)
gram.register_autograd(_backward_gram, setup_context=_save)
times_dense.register_kernel("flexjag.ops.triton.matmul")
gram.register_kernel("flexjag.ops.triton.matmul")
