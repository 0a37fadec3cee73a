"""Softmax over the tokens of each segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.jagged import Jagged
from flexjag.ops.checks import check_jagged
from flexjag.ops.packed import cut, lengths_of
from flexjag.ops.register import define, refuse


def jagged_softmax(x: Jagged) -> Jagged:
    """Softmax over the tokens of each segment, every feature for itself.

    Args:
        x: ``[T, ...]`` floating point.

    Returns:
        ``[T, ...]`` with the offsets of `x`: y. Its gradient is y ⊙ (g − Σ_segment g y).

    Raises:
        LayoutError: If `x` is no Jagged, or its offsets are found to be none.
        ShapeError: If its values are not floating point.

    >>> x = Jagged.from_lengths(torch.tensor([7.0, 1.0, 1.0]), [1, 2])
    >>> jagged_softmax(x).values.tolist()
    [1.0, 0.5, 0.5]
    """
    check_jagged(x, "x", floating=True)
    return x.with_values(segment_softmax(x.values, x.offsets))


@define("segment_softmax")
def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Over dimension 0 of each segment of ``[T, ...]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    out = values.new_empty(values.shape)
    for x, y in zip(cut(values, lengths), cut(out, lengths), strict=True):
        torch.softmax(x, 0, out=y)
    return out


@segment_softmax.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@define("segment_softmax_backward")
def segment_softmax_backward(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """``y (g − Σ g y)`` per segment and feature."""
    lengths = lengths_of(offsets, out.shape[0])
    result = out.new_empty(out.shape)
    for g, y, dx in zip(*(cut(t, lengths) for t in (grad, out, result)), strict=True):
        torch.ops.aten._softmax_backward_data(g, y, 0, y.dtype, grad_input=dx)
    return result


@segment_softmax_backward.register_fake
def _(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    return out.new_empty(out.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, offsets = ctx.saved_tensors
    return segment_softmax_backward(grad, out, offsets), None


segment_softmax.register_autograd(_backward, setup_context=_setup)
segment_softmax_backward.register_autograd(refuse)
segment_softmax.register_kernel("flexjag.ops.triton_reduce")
segment_softmax_backward.register_kernel("flexjag.ops.triton_reduce")
