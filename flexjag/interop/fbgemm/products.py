"""FBGEMM's elementwise functions, products and softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag import ops
from flexjag.errors import ShapeError, explain_values
from flexjag.interop.fbgemm.common import Integer, check_tensor, read
from flexjag.interop.fbgemm.padding import (
    check_dense,
    jagged_to_padded_dense,
    to_innermost,
)
from flexjag.jagged import Jagged


def jagged_dense_elementwise_add(x_values: Tensor, x_offsets: Sequence[Tensor], y: Tensor) -> Tensor:
    """Sum of a packed and a padded tensor, padded: `x_values` are zero-padded or truncated to the shape of `y`.

    Args:
        x_values: ``[T, D]``.
        x_offsets: One tensor per jagged dimension.
        y: ``[S, N_1, …, D]``; other dtypes are promoted, and D may be 1, as in FBGEMM.

    Returns:
        ``[S, N_1, …, D]``. Differentiable in both, without the warning that FBGEMM's gives.

    Raises:
        LayoutError: If offsets are invalid.
        ShapeError: If shapes do not match.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.full((2, 2, 1), 10.0)
    >>> jagged_dense_elementwise_add(x, [torch.tensor([0, 1, 3])], y).squeeze(-1).tolist()
    [[11.0, 10.0], [12.0, 13.0]]
    """
    check_tensor(x_values, "x_values", 2)
    levels = check_dense(y, "y", x_offsets)
    if y.shape[0] != levels[0].shape[0] - 1:
        seen = {"y": tuple(y.shape), "segments": levels[0].shape[0] - 1}
        raise ShapeError(explain_values("y", "must have one row per segment", **seen))
    return jagged_to_padded_dense(x_values, levels, y.shape[1:-1]) + y


def jagged_dense_elementwise_add_jagged_output(
    x_values: Tensor, x_offsets: Sequence[Tensor], y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Sum of a packed and a padded tensor, packed: at positions beyond the sizes of `y`, `x_values` are unchanged.

    Args:
        x_values: ``[T, D]``.
        x_offsets: One tensor per jagged dimension; they must cover all rows.
        y: ``[S, N_1, …, D]``; other dtypes are promoted, and D may be 1, as in FBGEMM.

    Returns:
        ``[T, D]`` and `x_offsets`. Gradients: g, and g padded with zeros.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.full((2, 1, 1), 10.0)
    >>> jagged_dense_elementwise_add_jagged_output(x, [torch.tensor([0, 1, 3])], y)[0].squeeze(-1).tolist()
    [11.0, 12.0, 3.0]
    """
    rows, levels = _rows(x_values, x_offsets, y, "y")
    return x_values + rows, levels


def jagged_dense_dense_elementwise_add_jagged_output(
    x_values: Tensor, x_offsets: Sequence[Tensor], y_0: Tensor, y_1: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Sum of a packed and two padded tensors, packed.

    The padded tensors may differ in their sizes N, for which FBGEMM's backward raises.

    Args:
        x_values: ``[T, D]``.
        x_offsets: One tensor per jagged dimension; they must cover all rows.
        y_0: ``[S, N_1, …, D]``.
        y_1: Like `y_0`. Positions beyond the sizes of either count as 0 in it.

    Returns:
        ``[T, D]`` and `x_offsets`. Gradients: g, and g padded with zeros for both.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.full((2, 1, 1), 10.0)
    >>> jagged_dense_dense_elementwise_add_jagged_output(x, [torch.tensor([0, 1, 3])], y, y)[0].squeeze(-1).tolist()
    [21.0, 22.0, 3.0]
    """
    first, levels = _rows(x_values, x_offsets, y_0, "y_0")
    second, _ = _rows(x_values, x_offsets, y_1, "y_1")
    return x_values + first + second, levels


def jagged_dense_elementwise_mul(
    x_values: Tensor, x_offsets: Sequence[Tensor], y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Product of a packed and a padded tensor, packed: 0 at positions beyond the sizes of `y`.

    There even NaN and infinity give 0, where FBGEMM returns NaN.

    Args:
        x_values: ``[T, D]``.
        x_offsets: One tensor per jagged dimension; they must cover all rows.
        y: ``[S, N_1, …, D]``; other dtypes are promoted, and D may be 1, as in FBGEMM.

    Returns:
        ``[T, D]`` and `x_offsets`.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.full((2, 1, 1), 10.0)
    >>> jagged_dense_elementwise_mul(x, [torch.tensor([0, 1, 3])], y)[0].squeeze(-1).tolist()
    [10.0, 20.0, 0.0]
    """
    check_tensor(x_values, "x_values", 2)
    levels = check_dense(y, "y", x_offsets)
    if x_values.dtype != y.dtype or x_values.shape[1] != y.shape[-1] or not y.is_floating_point():
        rows, levels = _rows(x_values, levels, y, "y")
        return x_values * rows, levels
    x = Jagged(x_values, levels[-1])
    return ops.jagged_dense_elementwise_mul(x, to_innermost(y, levels), allow_longer=True).values, levels


def _rows(x_values: Tensor, x_offsets: Sequence[Tensor], y: Tensor, name: str) -> tuple[Tensor, list[Tensor]]:
    """The rows of `y` at the positions of `x_values`."""
    check_tensor(x_values, "x_values", 2)
    levels = check_dense(y, name, x_offsets)
    if 1 not in (y.shape[-1], x_values.shape[1]) and y.shape[-1] != x_values.shape[1]:
        seen = {name: tuple(y.shape), "x_values": tuple(x_values.shape)}
        raise ShapeError(explain_values(name, "must have the features D of x_values", **seen))
    dense = to_innermost(y, levels)
    return ops.dense_to_jagged(dense, levels[-1], total=x_values.shape[0], allow_longer=True).values, levels


def batched_dense_vec_jagged_2d_mul(v: Tensor, a_values: Tensor, a_offsets: Tensor) -> Tensor:
    """Weighted sum of a segment's tokens per head: ``out[s·H + h, d] = Σ_i v[s·H + h, i] · a[s, i, h·D + d]``.

    If H does not divide the number of features, FBGEMM ignores the last ones; here that is an error.

    Args:
        v: ``[S·H, N]`` floating point weights; tokens from N on are ignored.
        a_values: ``[T, H·D]`` of the same dtype.
        a_offsets: ``[S+1]``.

    Returns:
        ``[S·H, D]``. For S = 0, H is 1.

    Raises:
        LayoutError: If the offsets are invalid or do not start at 0.
        ShapeError: If shapes or dtypes do not match.

    >>> v, a = torch.tensor([[1.0, 2.0], [1.0, 3.0]]), torch.tensor([[1.0, 10.0], [1.0, 10.0]])
    >>> batched_dense_vec_jagged_2d_mul(v, a, torch.tensor([0, 2])).tolist()
    [[3.0], [40.0]]
    """
    check_tensor(v, "v", 2)
    check_tensor(a_values, "a_values", 2)
    rows = read(a_values, a_offsets, v.shape[1])
    segments = a_offsets.shape[0] - 1
    heads = v.shape[0] // segments if segments else 1
    seen = {"v": tuple(v.shape), "a_values": tuple(a_values.shape), "segments": segments}
    if v.shape[0] != segments * heads or not heads or a_values.shape[1] % heads:
        raise ShapeError(explain_values("v", "must be [S·H, N] for values [T, H·D]", **seen))
    if v.dtype != a_values.dtype or not v.is_floating_point():
        seen = {"v": v.dtype, "a_values": a_values.dtype}
        raise ShapeError(explain_values("v", "must be floating point and have the dtype of a_values", **seen))
    dim, width = a_values.shape[1] // heads, v.shape[1]
    dense = rows.widen(v.view(segments, heads, width).transpose(1, 2))
    weights = ops.dense_to_jagged(dense, rows.x.offsets, total=a_values.shape[0], allow_longer=True).values
    products = weights.unsqueeze(2) * rows.only(a_values).unflatten(1, (heads, dim))
    return rows.narrow(ops.segment_sum(rows.x.with_values(products))).reshape(segments * heads, dim)


def jagged_softmax(values: Tensor, x_offsets: Tensor, max_L: Integer) -> tuple[Tensor, Tensor]:
    """Softmax over the first `max_L` tokens of each segment, per feature.

    The other rows are 0 and get no gradient. FBGEMM leaves these rows and their gradients uninitialized.

    Args:
        values: ``[T, D]`` floating point.
        x_offsets: ``[S+1]``.
        max_L: Maximal length.

    Returns:
        ``[T, D]`` and `x_offsets`.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> jagged_softmax(torch.ones(3, 1), torch.tensor([0, 3]), 2)[0].squeeze(-1).tolist()
    [0.5, 0.5, 0.0]
    """
    check_tensor(values, "values", 2)
    rows = read(values, x_offsets, max_L)
    x = rows.x.with_values(rows.only(values, -torch.inf)) if values.is_floating_point() else rows.x
    return rows.only(ops.jagged_softmax(x).values), x_offsets


def jagged_jagged_bmm(x_values: Tensor, y_values: Tensor, x_offsets: Tensor, max_L: Integer) -> Tensor:
    """Sum of outer products over the first `max_L` tokens of each segment: ``out_s = x_sᵀ y_s``.

    Args:
        x_values: ``[T, D]`` floating point.
        y_values: ``[T, E]`` of the same dtype; with fewer rows FBGEMM reads out of bounds.
        x_offsets: ``[S+1]``.
        max_L: Maximal length; later tokens are ignored and get no gradient.

    Returns:
        ``[S, D, E]``, 0 for an empty segment.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> jagged_jagged_bmm(x, x, torch.tensor([0, 1, 3]), 5).flatten().tolist()
    [1.0, 13.0]
    """
    check_tensor(x_values, "x_values", 2)
    check_tensor(y_values, "y_values", 2)
    if x_values.shape[0] != y_values.shape[0]:
        seen = {"x_values": tuple(x_values.shape), "y_values": tuple(y_values.shape)}
        raise ShapeError(explain_values("y_values", "must have the rows of x_values", **seen))
    rows = read(x_values, x_offsets, max_L)
    x, y = (rows.x.with_values(rows.only(t)) for t in (x_values, y_values))
    return rows.narrow(ops.jagged_jagged_bmm(x, y))


def jagged_dense_bmm(x_values: Tensor, x_offsets: Tensor, y: Tensor, max_L: Integer) -> tuple[Tensor, Tensor]:
    """Product of each segment's first `max_L` rows with its own dense matrix: ``out_s = x_s y_s``; other rows are 0.

    Args:
        x_values: ``[T, D]`` floating point.
        x_offsets: ``[S+1]``.
        y: ``[S, D, E]`` of the same dtype; with fewer matrices FBGEMM reads out of bounds, and with more features
            it ignores the last ones.
        max_L: Maximal length; later tokens are ignored and get no gradient.

    Returns:
        ``[T, E]`` and `x_offsets`.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> x, y = torch.ones(3, 1), torch.tensor([[[2.0]], [[5.0]]])
    >>> jagged_dense_bmm(x, torch.tensor([0, 1, 3]), y, 1)[0].squeeze(-1).tolist()
    [2.0, 5.0, 0.0]
    """
    check_tensor(x_values, "x_values", 2)
    check_tensor(y, "y", 3)
    rows = read(x_values, x_offsets, max_L)
    return ops.jagged_dense_bmm(rows.x.with_values(rows.only(x_values)), rows.widen(y)).values, x_offsets
