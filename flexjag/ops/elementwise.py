"""Elementwise sums and products of a jagged and a padded operand, without padding the jagged one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.ops.checks import check_jagged, check_rows
from flexjag.ops.packed import cut, is_few, is_short, lengths_of, padded_index
from flexjag.ops.padding import pad, rows_of, unpad
from flexjag.ops.register import define


def jagged_dense_elementwise_add(x: Jagged, dense: Tensor, *, allow_longer: bool = False) -> Jagged:
    """Sum of a jagged and a padded batch at each token: ``out[s, i] = x[s, i] + dense[s, i]``.

    Args:
        x: ``[T, ...]`` floating point.
        dense: ``[S, N, ...]`` of the same dtype, with the trailing dimensions of `x`.
        allow_longer: Treat `dense` as 0 at positions from N on. If False, a segment longer than N is an error on a CPU;
            on a GPU, where offsets are not read, it is treated as with True.

    Returns:
        ``[T, ...]`` with the offsets of `x`. Gradients: g for `x`, and g padded with zeros for `dense`.

    Raises:
        LayoutError: If `x` is not a Jagged, or a segment is longer than N.
        ShapeError: If shapes, dtypes or devices of the operands do not match.

    >>> x = Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 2])
    >>> jagged_dense_elementwise_add(x, torch.tensor([[10.0, 20.0], [30.0, 40.0]])).values.tolist()
    [11.0, 32.0, 43.0]
    """
    _check(x, dense)
    rows = unpad(dense, x.offsets, x.values.shape[0], allow_longer)
    return x.with_values(rows.add_(x.values))  # nothing else holds `rows`


def jagged_dense_elementwise_mul(x: Jagged, dense: Tensor, *, allow_longer: bool = False) -> Jagged:
    """Product of a jagged and a padded batch at each token: ``out[s, i] = x[s, i] · dense[s, i]``.

    Args:
        x: ``[T, ...]`` floating point.
        dense: ``[S, N, ...]`` of the same dtype, with the trailing dimensions of `x`.
        allow_longer: As for :func:`jagged_dense_elementwise_add`: the products at positions from N on are 0.

    Returns:
        ``[T, ...]`` with the offsets of `x`.

    Raises:
        LayoutError: If `x` is not a Jagged, or a segment is longer than N.
        ShapeError: If shapes, dtypes or devices of the operands do not match.

    >>> x = Jagged.from_lengths(torch.tensor([1.0, 2.0, 3.0]), [1, 2])
    >>> jagged_dense_elementwise_mul(x, torch.tensor([[10.0, 20.0], [30.0, 40.0]])).values.tolist()
    [10.0, 60.0, 120.0]
    """
    _check(x, dense)
    return x.with_values(multiply(x.values, dense, x.offsets, allow_longer))


def _check(x: Jagged, dense: Tensor) -> None:
    check_jagged(x, "x", floating=True)
    check_rows(dense, "dense", x, x.values.ndim + 1)
    if dense.shape[2:] != x.values.shape[1:]:
        seen = {"dense": tuple(dense.shape), "x": tuple(x.values.shape)}
        raise ShapeError(explain_values("dense", "must be [S, N, ...] with the trailing dimensions of x", **seen))


@define("multiply")
def multiply(values: Tensor, dense: Tensor, offsets: Tensor, allow_longer: bool) -> Tensor:
    """Elementwise product of packed ``[T, ...]`` and padded ``[S, N, ...]``: ``[T, ...]``, in one pass."""
    lengths, size = lengths_of(offsets, values.shape[0], "x.offsets"), dense.shape[1]
    longest = max(lengths, default=0)
    if longest > size and not allow_longer:
        seen = {"longest": longest, "dense": tuple(dense.shape)}
        raise LayoutError(explain_values("x", "no segment may be longer than the rows of dense", **seen))
    if is_few(lengths, dense.numel()) and longest <= size:
        return torch.cat(rows_of(dense, lengths)).mul_(values)
    if is_short(lengths, values.device) and longest <= size:
        return dense.flatten(0, 1).index_select(0, padded_index(offsets, size, values.shape[0])).mul_(values)
    out = values.new_empty(values.shape)
    for row, token, result in zip(dense.unbind(0), cut(values, lengths), cut(out, lengths), strict=True):
        n = token.shape[0]
        if n > size:
            result[size:].zero_()
            token, result, n = token[:size], result[:size], size
        torch.mul(token, row[:n], out=result)
    return out


@multiply.register_fake
def _(values: Tensor, dense: Tensor, offsets: Tensor, allow_longer: bool) -> Tensor:
    return values.new_empty(values.shape)


@define("padded_product")
def padded_product(left: Tensor, right: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Elementwise product of two packed ``[T, ...]``, zero-padded or truncated to ``[S, N, ...]`` in the same pass."""
    lengths = lengths_of(offsets, left.shape[0])
    if is_few(lengths, left.numel()) or is_short(lengths, left.device):
        return pad(left * right, offsets, size, 0.0)
    out = left.new_empty((len(lengths), size, *left.shape[1:]))
    for x, y, row in zip(cut(left, lengths), cut(right, lengths), out.unbind(0), strict=True):
        n = min(x.shape[0], size)
        torch.mul(x[:n], y[:n], out=row[:n])
        row[n:].zero_()
    return out


@padded_product.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor, size: int) -> Tensor:
    return left.new_empty((offsets.shape[0] - 1, size, *left.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_multiply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, dense, offsets = ctx.saved_tensors
    of_values = multiply(grad, dense, offsets, True) if ctx.needs_input_grad[0] else None
    of_dense = padded_product(grad, values, offsets, dense.shape[1]) if ctx.needs_input_grad[1] else None
    return of_values, of_dense, None, None


def _backward_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, offsets = ctx.saved_tensors
    of_left = multiply(right, grad, offsets, True) if ctx.needs_input_grad[0] else None
    of_right = multiply(left, grad, offsets, True) if ctx.needs_input_grad[1] else None
    return of_left, of_right, None, None


multiply.register_autograd(_backward_multiply, setup_context=_save)
padded_product.register_autograd(_backward_product, setup_context=_save)
multiply.register_kernel("flexjag.ops.triton.move")
padded_product.register_kernel("flexjag.ops.triton.move")
