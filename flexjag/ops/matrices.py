"""Packed matrices: one ``n_s × m_s`` matrix per segment, flattened row by row and packed to ``[Σ n_s m_s]``.

The offsets `rows` have the lengths n_s (numbers of rows), the offsets `columns` the lengths m_s (numbers of columns).
Attention scores have this form. Each product is a gradient of the others, so all are differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.ops.checks import can_look, check_index, check_jagged, check_like, check_total
from flexjag.ops.packed import cut, each, lengths_of, offsets_of, unknown_size
from flexjag.ops.register import define
from flexjag.ops.softmax import curve_of_softmax, softmax_gradient


def jagged_jagged_bmm_jagged_out(x: Jagged, y: Jagged, *, total: int | None = None) -> Jagged:
    """Dot products of all pairs of tokens of x and y in the same segment: ``P_s = x_s y_sᵀ``.

    Args:
        x: ``[T_x, D]`` floating point.
        y: ``[T_y, D]`` of the same dtype and number of segments; its lengths may differ.
        total: ``Σ n_s m_s``, if known: saves a device sync.

    Returns:
        ``[Σ n_s m_s]``, matrices of n_s rows (tokens of x) and m_s columns (tokens of y).

    Raises:
        LayoutError: If an operand is not a Jagged, or the numbers of segments differ.
        ShapeError: If ranks, sizes, dtypes or devices of the operands do not match.

    >>> x = Jagged.from_lengths(torch.tensor([[1.0], [2.0], [3.0]]), [1, 2])
    >>> jagged_jagged_bmm_jagged_out(x, x).to_list()
    [tensor([1.]), tensor([4., 6., 6., 9.])]
    """
    check_jagged(x, "x", 2, floating=True)
    check_jagged(y, "y", 2, floating=True)
    check_like(y.values, "y", x)
    _check_segments(y.offsets, "y", x, "x")
    check_total(total)
    if x.values.shape[1] != y.values.shape[1]:
        seen = {"x": tuple(x.values.shape), "y": tuple(y.values.shape)}
        raise ShapeError(explain_values("y", "must have the features D of x", **seen))
    values = outer(x.values, y.values, x.offsets, y.offsets, total)
    return Jagged(values, matrix_offsets(x.offsets, y.offsets))


def array_jagged_bmm(matrices: Jagged, y: Jagged, rows: Tensor | None = None) -> Jagged:
    """Product of each packed matrix with its segment's tokens: ``out_s = P_s y_s``.

    Args:
        matrices: ``[Σ n_s m_s]`` floating point, as of :func:`jagged_jagged_bmm_jagged_out`.
        y: ``[T_y, D]`` of the same dtype, m_s tokens per segment.
        rows: ``[S+1]``, the offsets of the rows and of the result. Default: those of `y`, for square matrices.

    Returns:
        ``[T_rows, D]`` with the offsets `rows`.

    Raises:
        LayoutError: If an operand is not a Jagged, or a matrix does not have n_s m_s entries.
        ShapeError: If ranks, sizes, dtypes or devices of the operands do not match.

    >>> y = Jagged.from_lengths(torch.tensor([[1.0], [2.0], [3.0]]), [1, 2])
    >>> array_jagged_bmm(jagged_jagged_bmm_jagged_out(y, y), y).values.tolist()
    [[1.0], [26.0], [39.0]]
    """
    check_jagged(matrices, "matrices", 1, floating=True)
    check_jagged(y, "y", 2, floating=True)
    check_like(y.values, "y", matrices, "matrices")
    rows = _check_matrices(matrices, rows, "rows", y.offsets, "y")
    total = y.values.shape[0] if rows is y.offsets else None
    return Jagged(times_packed(matrices.values, y.values, rows, y.offsets, False, total), rows)


def jagged2_softmax(matrices: Jagged, rows: Tensor, columns: Tensor | None = None, *, dim: int = 1) -> Jagged:
    """Softmax over the columns or the rows of each packed matrix.

    Args:
        matrices: ``[Σ n_s m_s]`` floating point.
        rows: ``[S+1]``, the offsets whose lengths are n_s.
        columns: ``[S+1]``, the offsets whose lengths are m_s. Default: `rows`, for square matrices.
        dim: 1 to normalize each row, 0 to normalize each column.

    Returns:
        ``[Σ n_s m_s]`` with the offsets of `matrices`.

    Raises:
        LayoutError: If `matrices` is not a Jagged, or one of its matrices does not have n_s m_s entries.
        ShapeError: If its values are not floating point, or `dim` is neither 0 nor 1.

    >>> p = Jagged.from_lengths(torch.zeros(5), [1, 4])
    >>> jagged2_softmax(p, torch.tensor([0, 1, 3])).values.tolist()
    [1.0, 0.5, 0.5, 0.5, 0.5]
    """
    check_jagged(matrices, "matrices", 1, floating=True)
    if dim not in (0, 1):
        raise ShapeError(explain_values("dim", "must be 0 or 1", dim=dim))
    columns = _check_matrices(matrices, columns, "columns", rows, "rows")
    return matrices.with_values(matrix_softmax(matrices.values, rows, columns, dim))


def matrix_offsets(rows: Tensor, columns: Tensor) -> Tensor:
    """Offsets ``[S+1]`` of the packed matrices, int64: products of int32 lengths may overflow int32."""
    return offsets_of((rows[1:] - rows[:-1]).long() * (columns[1:] - columns[:-1]).long())


def _check_segments(offsets: Tensor, name: str, other: Jagged, other_name: str) -> None:
    if offsets.shape != other.offsets.shape:
        seen = {name: offsets.shape[0] - 1, other_name: other.num_segments}
        raise LayoutError(explain_values(name, f"must have as many segments as {other_name}", **seen))


def _check_matrices(matrices: Jagged, given: Tensor | None, name: str, default: Tensor, default_name: str) -> Tensor:
    """Check the sizes of the matrices against both offsets, and return `given` or its default."""
    given = default if given is None else given
    for side, side_name in ((default, default_name), (given, name)):
        check_index(side, side_name, matrices.device)
        _check_segments(side, side_name, matrices, "matrices")
    if can_look(matrices.offsets, given):
        wanted = matrix_offsets(given, default)
        differs = (wanted != matrices.offsets).nonzero()
        if differs.numel():
            at = int(differs[0])
            seen = {f"offsets[{at}]": int(matrices.offsets[at]), "expected": int(wanted[at])}
            rule = f"must have as many entries as rows times columns, by {name} and {default_name}"
            raise LayoutError(explain_values("matrices", rule, **seen))
    return given


def _cut(values: Tensor, rows: list[int], columns: list[int]) -> Iterator[Tensor]:
    """Views ``[n_s, m_s]`` of the packed matrices."""
    sizes = [n * m for n, m in zip(rows, columns, strict=True)]
    return (p.view(n, m) for p, n, m in zip(cut(values, sizes), rows, columns, strict=True))


@define("outer")
def outer(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, total: int | None) -> Tensor:
    """Product per segment of ``[T_x, D]`` and transposed ``[T_y, D]``: ``[Σ n m]``."""
    n, m = lengths_of(rows, left.shape[0], "x.offsets"), lengths_of(columns, right.shape[0], "y.offsets")
    count = sum(a * b for a, b in zip(n, m, strict=True))
    if total is not None and total != count:
        raise LayoutError(explain_values("total", "must be the number of matrix entries", total=total, entries=count))
    segments = zip(cut(left, n), cut(right.t(), m, 1), strict=True)
    return each(torch.mm, segments, left, (count,), lambda out: _cut(out, n, m))


@outer.register_fake
def _(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, total: int | None) -> Tensor:
    return left.new_empty((unknown_size() if total is None else total,))


@define("times_packed")
def times_packed(
    matrices: Tensor, values: Tensor, rows: Tensor, columns: Tensor, transpose: bool, total: int | None
) -> Tensor:
    """Product P y of packed ``[Σ n m]`` and ``[T_y, D]``, or if `transpose` Pᵀ y with y ``[T_x, D]``."""
    n, m = lengths_of(rows, None, "rows"), lengths_of(columns, None, "columns")
    inner, outer_ = (n, m) if transpose else (m, n)
    factors = (p.t() if transpose else p for p in _cut(matrices, n, m))
    segments = zip(factors, cut(values, inner), strict=True)
    return each(torch.mm, segments, values, (sum(outer_), values.shape[1]), lambda out: cut(out, outer_))


@times_packed.register_fake
def _(matrices: Tensor, values: Tensor, rows: Tensor, columns: Tensor, transpose: bool, total: int | None) -> Tensor:
    return values.new_empty((unknown_size() if total is None else total, values.shape[1]))


@define("matrix_softmax")
def matrix_softmax(matrices: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Softmax along dimension `dim` of every packed ``[n, m]`` matrix."""
    n, m = lengths_of(rows, None, "rows"), lengths_of(columns, None, "columns")
    softmax = partial(torch.softmax, dim=dim)
    return each(softmax, zip(_cut(matrices, n, m)), matrices, matrices.shape, lambda out: _cut(out, n, m))


@matrix_softmax.register_fake
def _(matrices: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    return matrices.new_empty(matrices.shape)


@define("matrix_softmax_backward")
def matrix_softmax_backward(grad: Tensor, out: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Gradient of :func:`matrix_softmax`: ``y (g − Σ g y)`` along dimension `dim` of every matrix."""
    n, m = lengths_of(rows, None), lengths_of(columns, None)
    segments = zip(_cut(grad.contiguous(), n, m), _cut(out, n, m), strict=True)
    return each(partial(softmax_gradient, dim=dim), segments, out, out.shape, lambda result: _cut(result, n, m))


@matrix_softmax_backward.register_fake
def _(grad: Tensor, out: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    return out.new_empty(out.shape)


def _setup_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, rows, columns = ctx.saved_tensors
    grad = grad.contiguous()
    need = ctx.needs_input_grad
    of_left = times_packed(grad, right, rows, columns, False, left.shape[0]) if need[0] else None
    of_right = times_packed(grad, left, rows, columns, True, right.shape[0]) if need[1] else None
    return of_left, of_right, None, None, None


def _setup_times_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.transpose = inputs[4]


def _backward_times_packed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    matrices, values, rows, columns = ctx.saved_tensors
    of_matrices = of_values = None
    if ctx.needs_input_grad[0]:
        left, right = (values, grad) if ctx.transpose else (grad, values)
        of_matrices = outer(left, right, rows, columns, matrices.shape[0])
    if ctx.needs_input_grad[1]:
        of_values = times_packed(matrices, grad, rows, columns, not ctx.transpose, values.shape[0])
    return of_matrices, of_values, None, None, None, None


def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, columns, dim = inputs
    ctx.save_for_backward(output, rows, columns)
    ctx.dim = dim


def _backward_softmax(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, rows, columns = ctx.saved_tensors
    return matrix_softmax_backward(grad, out, rows, columns, ctx.dim), None, None, None


def _setup_softmax_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.dim = inputs[4]


def _backward_softmax_twice(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    grad, out, rows, columns = ctx.saved_tensors
    found = curve_of_softmax(lambda g, y: matrix_softmax_backward(g, y, rows, columns, ctx.dim), grad, out, above)
    return *found, None, None, None


outer.register_autograd(_backward_outer, setup_context=_setup_outer)
times_packed.register_autograd(_backward_times_packed, setup_context=_setup_times_packed)
matrix_softmax.register_autograd(_backward_softmax, setup_context=_setup_softmax)
matrix_softmax_backward.register_autograd(_backward_softmax_twice, setup_context=_setup_softmax_twice)
matrix_softmax.register_kernel("flexjag.ops.triton.reduce")
matrix_softmax_backward.register_kernel("flexjag.ops.triton.reduce")
outer.register_kernel("flexjag.ops.triton.matmul")
times_packed.register_kernel("flexjag.ops.triton.matmul")
