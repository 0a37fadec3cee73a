"""Softmax over the tokens of each segment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.jagged import Jagged
from flexjag.ops.checks import check_jagged
from flexjag.ops.packed import cut, each, lengths_of
from flexjag.ops.register import define


def jagged_softmax(x: Jagged) -> Jagged:
    """Softmax over the tokens of each segment, per feature.

    Args:
        x: ``[T, ...]`` floating point.

    Returns:
        y ``[T, ...]`` with the offsets of `x`. The gradient is y ⊙ (g − Σ_segment g y).

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).
        ShapeError: If its values are not floating point.

    >>> x = Jagged.from_lengths(torch.tensor([7.0, 1.0, 1.0]), [1, 2])
    >>> jagged_softmax(x).values.tolist()
    [1.0, 0.5, 0.5]
    """
    check_jagged(x, "x", floating=True)
    return x.with_values(segment_softmax(x.values, x.offsets))


@define("segment_softmax")
def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Softmax along dimension 0 of each segment of ``[T, ...]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    softmax = partial(torch.softmax, dim=0)
    return each(softmax, zip(cut(values, lengths)), values, values.shape, lambda out: cut(out, lengths))


@segment_softmax.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@define("segment_softmax_backward")
def segment_softmax_backward(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of :func:`segment_softmax`: ``y (g − Σ g y)`` per segment and feature."""
    lengths = lengths_of(offsets, out.shape[0])
    segments = zip(cut(grad, lengths), cut(out, lengths), strict=True)
    return each(partial(softmax_gradient, dim=0), segments, out, out.shape, lambda result: cut(result, lengths))


def softmax_gradient(grad: Tensor, y: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """Gradient of a softmax along one dimension, ``y (g − Σ g y)``, by PyTorch's kernel."""
    return torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
        grad, y, dim, y.dtype, grad_input=out
    )


@segment_softmax_backward.register_fake
def _(grad: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    return out.new_empty(out.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, offsets = ctx.saved_tensors
    return segment_softmax_backward(grad, out, offsets), None


def curve_of_softmax(backward: Callable[[Tensor, Tensor], Tensor], grad: Tensor, out: Tensor, above: Tensor) -> Any:
    """Second-order gradients: those of ``backward(grad, out) = out (grad − Σ grad out)`` for `grad` and `out`."""

    def sums(x: Tensor) -> Tensor:
        return x - backward(x, torch.ones_like(x))

    return backward(above, out), above * (grad - sums(grad * out)) - grad * sums(above * out)


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_twice(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    grad, out, offsets = ctx.saved_tensors
    return *curve_of_softmax(lambda g, y: segment_softmax_backward(g, y, offsets), grad, out, above), None


segment_softmax.register_autograd(_backward, setup_context=_setup)
segment_softmax_backward.register_autograd(_backward_twice, setup_context=_setup_twice)
segment_softmax.register_kernel("flexjag.ops.triton.reduce")
segment_softmax_backward.register_kernel("flexjag.ops.triton.reduce")
segment_softmax.register_kernel("flexjag.ops.cpp.softmax", "CPU")
segment_softmax_backward.register_kernel("flexjag.ops.cpp.softmax", "CPU")
