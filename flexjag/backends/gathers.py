"""Gathers whose gradients are sums in a fixed order, in eager mode and in a traced graph, on any number of threads.

The backward of plain indexing adds with atomics: on CPU in eager mode from two threads on, and in Inductor's code. Each
operator here has its transpose for a backward, and the transposes add in the order of the index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.differentiation import needs_plain_operations


def add_at(out: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Add each x[n] to out[index[n]], in place and in the order of n."""
    if x.device.type == "cpu":
        return out.index_add_(0, index, x) if x.ndim > 1 else out.scatter_add_(0, index, x)
    return out.index_put_((index,), x, accumulate=True)  # which sorts; index_add_ and scatter_add_ are atomic there


def take_tiles(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along the first dimension; its backward is :func:`add_tiles`."""
    return x.index_select(0, index) if needs_plain_operations() else _take_tiles(x, index)


def add_tiles(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum the ``x[n]`` by their index, to ``[count, ...]``; its backward is :func:`take_tiles`."""
    if needs_plain_operations():
        return x.new_zeros(count, *x.shape[1:]).index_add(0, index, x)
    return _add_tiles(x, index, count)


@torch.library.custom_op("flexjag::take_tiles", mutates_args=())
def _take_tiles(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


@torch.library.custom_op("flexjag::add_tiles", mutates_args=())
def _add_tiles(x: Tensor, index: Tensor, count: int) -> Tensor:
    return add_at(x.new_zeros(count, *x.shape[1:]), index, x)


@torch.library.custom_op("flexjag::look_up", mutates_args=())
def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


@torch.library.custom_op("flexjag::sum_looked_up", mutates_args=())
def _sum_looked_up(x: Tensor, index: Tensor, size: int) -> Tensor:
    return add_at(x.new_zeros(size), index.flatten(), x.flatten())


def look_up(table: Tensor, *index: Tensor) -> Tensor:
    """``table[index]`` with a deterministic gradient, for :attr:`flexjag.lowering.mods.RowTables.look_up`.

    >>> look_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([1, 0]))
    tensor([2., 3.])
    """
    if needs_plain_operations():
        return table[index]
    at = index[0].long()
    for size, more in zip(table.shape[1:], index[1:], strict=True):
        at = at * size + more
    return _look_up(table.flatten(), at)


@_take_tiles.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


@_add_tiles.register_fake
def _(x: Tensor, index: Tensor, count: int) -> Tensor:
    return x.new_empty(count, *x.shape[1:])


@_look_up.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(index.shape)


@_sum_looked_up.register_fake
def _(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_empty(size)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.count = inputs[0].shape[0]


_take_tiles.register_autograd(
    lambda ctx, grad: (_add_tiles(grad, ctx.saved_tensors[0], ctx.count), None), setup_context=_remember
)
_add_tiles.register_autograd(
    lambda ctx, grad: (_take_tiles(grad, ctx.saved_tensors[0]), None, None), setup_context=_remember
)
_look_up.register_autograd(
    lambda ctx, grad: (_sum_looked_up(grad, ctx.saved_tensors[0], ctx.count), None), setup_context=_remember
)
_sum_looked_up.register_autograd(
    lambda ctx, grad: (_look_up(grad, ctx.saved_tensors[0]), None, None), setup_context=_remember
)
