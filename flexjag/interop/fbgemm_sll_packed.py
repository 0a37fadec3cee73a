"""FBGEMM's ``sll_*`` functions on packed square matrices: ``n_s × n_s`` per segment, ``[Σ n_s²]``."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag import ops
from flexjag.interop.fbgemm_common import Integer, check_equal, check_tensor, read, size_of
from flexjag.interop.fbgemm_lengths import asynchronous_complete_cumsum
from flexjag.jagged import Jagged, check_offsets, segment_ids
from flexjag.ops.checks import can_look
from flexjag.ops.segment import spread


def sll_jagged_jagged_bmm_jagged_out(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor,
    x_offsets: Tensor,
    y_lengths: Tensor,
    y_offsets: Tensor,
    z_lengths: Tensor,
    z_offsets: Tensor,
    max_seq_len: Integer,
    allow_tf32: bool = True,
) -> Tensor:
    """``P_s = x_s y_sᵀ``: every token of x times every token of y in the same segment.

    `max_seq_len` does not cut the result, as on FBGEMM's CPU; its CUDA kernel leaves zeros behind it. The gradients are
    those of this result. FBGEMM's CPU cuts them, and has them for equal lengths only.

    Args:
        x: ``[T_x, D]`` floating point.
        y: ``[T_y, D]`` of the same dtype.
        x_lengths: ``[S]``, those of `x_offsets`.
        x_offsets: ``[S+1]``; they must cover all rows.
        y_lengths: ``[S]``, those of `y_offsets`.
        y_offsets: ``[S+1]``; they must cover all rows.
        z_lengths: ``[S]``, the products of the two.
        z_offsets: ``[S+1]`` of `z_lengths`.
        max_seq_len: See above.
        allow_tf32: Changes nothing; ``torch.backends.cuda.matmul`` decides.

    Returns:
        ``[Σ n_s m_s]``.

    Raises:
        LayoutError: If offsets are none, or lengths and offsets do not fit each other.
        ShapeError: If shapes do not fit.

    >>> x, n, offsets = torch.tensor([[2.0], [3.0]]), torch.tensor([2]), torch.tensor([0, 2])
    >>> square = (n * n, torch.tensor([0, 4]))
    >>> sll_jagged_jagged_bmm_jagged_out(x, x, n, offsets, n, offsets, *square, 2).tolist()
    [4.0, 6.0, 6.0, 9.0]
    """
    check_tensor(x, "x", 2)
    check_tensor(y, "y", 2)
    _check_lengths(x_lengths, x_offsets, "x_lengths", "x_offsets")
    _check_lengths(y_lengths, y_offsets, "y_lengths", "y_offsets")
    _check_lengths(z_lengths, z_offsets, "z_lengths", "z_offsets")
    out = ops.jagged_jagged_bmm_jagged_out(Jagged(x, x_offsets), Jagged(y, y_offsets))
    check_equal(z_offsets, "z_offsets", out.offsets, "must be the offsets of the products of the lengths")
    return out.values


def sll_array_jagged_bmm_jagged_out(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor,
    x_offsets: Tensor,
    y_lengths: Tensor,
    y_offsets: Tensor,
    z_lengths: Tensor,
    z_offsets: Tensor,
    max_seq_len: Integer,
    allow_tf32: bool = True,
) -> Tensor:
    """``out_s = P_s y_s`` of packed square matrices, over the first `max_seq_len` rows and columns of each.

    The other rows are 0. The gradients are those of this result; FBGEMM's CPU gives matrix entries that do not count a
    gradient.

    Args:
        x: ``[Σ n_s²]`` floating point, the matrices P.
        y: ``[T, D]`` of the same dtype.
        x_lengths: ``[S]``, n_s².
        x_offsets: ``[S+1]`` of `x_lengths`.
        y_lengths: ``[S]``, n_s.
        y_offsets: ``[S+1]`` of `y_lengths`; they must cover all rows.
        z_lengths: As `y_lengths`.
        z_offsets: As `y_offsets`.
        max_seq_len: See above.
        allow_tf32: Changes nothing; ``torch.backends.cuda.matmul`` decides.

    Returns:
        ``[T, D]``.

    Raises:
        LayoutError: If offsets are none, or lengths and offsets do not fit each other.
        ShapeError: If shapes do not fit.

    >>> p, y, n, offsets = torch.ones(4), torch.tensor([[2.0], [3.0]]), torch.tensor([2]), torch.tensor([0, 2])
    >>> square = (n * n, torch.tensor([0, 4]))
    >>> sll_array_jagged_bmm_jagged_out(p, y, *square, n, offsets, n, offsets, 2).tolist()
    [[5.0], [5.0]]
    """
    check_tensor(x, "x", 1)
    check_tensor(y, "y", 2)
    _check_lengths(x_lengths, x_offsets, "x_lengths", "x_offsets")
    _check_lengths(y_lengths, y_offsets, "y_lengths", "y_offsets")
    _check_lengths(z_lengths, z_offsets, "z_lengths", "z_offsets")
    check_equal(z_offsets, "z_offsets", y_offsets, "must be y_offsets")
    _check_exact(y, y_offsets, "y_offsets")
    rows = read(y, y_offsets, max_seq_len)
    out = ops.array_jagged_bmm(Jagged(x, x_offsets), Jagged(rows.only(y), y_offsets))
    return rows.only(out.values)


def sll_jagged2_softmax(
    x: Tensor, offsets: Tensor, offsets_total: Tensor, max_seq_len: Integer, transpose: bool
) -> Tensor:
    """Softmax of packed square matrices: every row sums to 1, or with `transpose` every column.

    `max_seq_len` changes nothing, as on FBGEMM's CPU; its CUDA kernel leaves zeros behind it.

    Args:
        x: ``[Σ n_s²]`` floating point.
        offsets: ``[S+1]`` of the n_s.
        offsets_total: ``[S+1]`` of the n_s².
        max_seq_len: See above.
        transpose: See above.

    Returns:
        ``[Σ n_s²]``.

    Raises:
        LayoutError: If offsets are none, or do not fit each other.
        ShapeError: If shapes do not fit.

    >>> sll_jagged2_softmax(torch.zeros(5), torch.tensor([0, 1, 3]), torch.tensor([0, 1, 5]), 2, False).tolist()
    [1.0, 0.5, 0.5, 0.5, 0.5]
    """
    check_tensor(x, "x", 1)
    return ops.jagged2_softmax(Jagged(x, offsets_total), offsets, dim=0 if transpose else 1).values


def sll_jagged2_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: Integer, padding_value: float = 0.0
) -> Tensor:
    """Pad packed square matrices to the same size.

    Larger ones are cut to their first rows and columns, as by FBGEMM's CUDA kernel; its CPU refuses them.

    Args:
        values: ``[Σ n_s²]``, any dtype.
        offsets: ``[S+1]`` of the n_s²; they must cover all entries.
        max_length: N.
        padding_value: What stands behind a matrix's rows and columns.

    Returns:
        ``[S, N, N]``.

    Raises:
        LayoutError: If the offsets are none, do not cover all entries, or a length is no square.
        ShapeError: If shapes do not fit, or N is negative.

    >>> sll_jagged2_to_padded_dense(torch.arange(5), torch.tensor([0, 1, 5]), 2, -1).tolist()
    [[[0, -1], [-1, -1]], [[1, 2], [3, 4]]]
    """
    check_tensor(values, "values", 1)
    size = size_of(max_length, "max_length")
    squares = Jagged(values, offsets).lengths
    lengths = squares.double().sqrt().long()
    _check_exact(values, offsets, "offsets")
    check_equal(squares, "lengths of offsets", lengths * lengths, "must be squares")
    segment, row, column = _entries(values, offsets, lengths)
    spare = lengths.shape[0] * size * size  # one entry past the end takes what is cut off
    inside = (row < size) & (column < size) & (segment < lengths.shape[0])
    index = torch.where(inside, (segment * size + row) * size + column, spare)
    out = values.new_full((spare + 1,), padding_value).index_copy(0, index, values)
    return out[:spare].view(lengths.shape[0], size, size)


def sll_jagged_dense_elementwise_mul_jagged_out(
    x: Tensor, y: Tensor, x_seq_lengths: Tensor, x_offsets: Tensor, max_seq_len: Integer
) -> Tensor:
    """Every packed square matrix times the first rows and columns of one dense matrix, entry by entry.

    `y` gets no gradient, as in FBGEMM. `max_seq_len` changes nothing, as on FBGEMM's CPU; entries that `y` does not
    have give 0, as in its CUDA kernel with a `y` of that size, where its CPU raises.

    Args:
        x: ``[Σ n_s²]``.
        y: ``[N, M]``; another dtype, such as the boolean one of a mask, is promoted.
        x_seq_lengths: ``[S]``, n_s.
        x_offsets: ``[S+1]`` of the n_s²; they must cover all entries.
        max_seq_len: See above.

    Returns:
        ``[Σ n_s²]``.

    Raises:
        LayoutError: If the offsets are none, do not cover all entries, or do not fit the lengths.
        ShapeError: If shapes do not fit.

    >>> mask, n, offsets = torch.ones(2, 2).triu(), torch.tensor([1, 2]), torch.tensor([0, 1, 5])
    >>> sll_jagged_dense_elementwise_mul_jagged_out(torch.arange(5.0), mask, n, offsets, 2).tolist()
    [0.0, 1.0, 2.0, 0.0, 4.0]
    """
    check_tensor(x, "x", 1)
    check_tensor(y, "y", 2)
    _check_lengths(x_seq_lengths * x_seq_lengths, x_offsets, "squares of x_seq_lengths", "x_offsets")
    _check_exact(x, x_offsets, "x_offsets")
    _, row, column = _entries(x, x_offsets, x_seq_lengths)
    factors = torch.nn.functional.pad(y.detach(), (0, 1, 0, 1))  # a row and a column of zeros for what it does not have
    row, column = row.clamp(max=y.shape[0]), column.clamp(max=y.shape[1])
    return x * factors.flatten().index_select(0, row * (y.shape[1] + 1) + column)


def sll_jagged_self_substraction_jagged_out(
    a: Tensor, offsets_a: Tensor, offsets_b: Tensor, max_seq_len: Integer
) -> Tensor:
    """The differences of each segment's tokens: ``out[s, i, j] = a[s, i] − a[s, j + 1]``, i and j from 0 to n_s − 2.

    Differentiable, without the warning that FBGEMM's gives. `max_seq_len` changes nothing, as on FBGEMM's CPU; its CUDA
    kernel leaves memory behind it that it never wrote.

    Args:
        a: ``[T]``.
        offsets_a: ``[S+1]``; they must cover all rows.
        offsets_b: ``[S+1]`` of the result: ``(n_s − 1)²`` entries for n_s ≥ 1, none for an empty segment.
        max_seq_len: See above.

    Returns:
        ``[Σ (n_s − 1)²]``.

    Raises:
        LayoutError: If offsets are none, or do not fit each other. FBGEMM leaves gaps between segments unwritten.
        ShapeError: If shapes do not fit.

    >>> offsets_a, offsets_b = torch.tensor([0, 1, 4]), torch.tensor([0, 0, 4])
    >>> sll_jagged_self_substraction_jagged_out(torch.tensor([9, 1, 2, 4]), offsets_a, offsets_b, 3).tolist()
    [-1, -3, 0, -2]
    """
    check_tensor(a, "a", 1)
    x = Jagged(a, offsets_a)
    _check_exact(a, offsets_a, "offsets_a")
    fewer = (x.lengths - 1).clamp(min=0)
    wanted = asynchronous_complete_cumsum(fewer.long() * fewer.long())
    check_equal(offsets_b, "offsets_b", wanted, "must be the offsets of (n - 1)²")
    left, _ = ops.jagged_split(x, [fewer])
    _, right = ops.jagged_split(x, [1])
    times = ops.jagged_index_select(right, left.segment_ids)  # all of a segment's right sides, once per left side
    return spread(left.values, times.offsets, times.values.shape[0]) - times.values


def _entries(values: Tensor, offsets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix, row and column of each entry of ``[Σ n_s²]``."""
    segment = segment_ids(offsets, values.shape[0])
    known = segment.clamp(0, lengths.shape[0])
    place = torch.arange(values.shape[0], device=values.device) - offsets[known]
    size = torch.nn.functional.pad(lengths, (0, 1))[known].clamp(min=1)
    return segment, place // size, place % size


def _check_lengths(lengths: Tensor, offsets: Tensor, name: str, offsets_name: str) -> None:
    check_tensor(offsets, offsets_name, 1)
    check_tensor(lengths, name, 1)
    check_equal(lengths, name, offsets[1:] - offsets[:-1], f"must be the lengths of {offsets_name}")


def _check_exact(values: Tensor, offsets: Tensor, name: str) -> None:
    """Check the contents of offsets where they can be looked at (on a CPU)."""
    if can_look(offsets):
        check_offsets(offsets, values.shape[0], name)
