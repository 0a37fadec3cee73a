"""FBGEMM's ``sll_*`` functions on packed square matrices: ``n_s × n_s`` per segment, ``[Σ n_s²]``."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag import ops
from flexjag.interop.fbgemm.common import Integer, check_equal, check_tensor, read, size_of
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
    """Dot products of all pairs of tokens of x and y in the same segment: ``P_s = x_s y_sᵀ``.

    `max_seq_len` is ignored, as on FBGEMM's CPU; its CUDA kernel leaves zeros beyond it. The gradients are those of
    this result; FBGEMM's CPU truncates them, and has them for equal lengths only.

    Args:
        x: ``[T_x, D]`` floating point.
        y: ``[T_y, D]`` of the same dtype.
        x_lengths: Lengths ``[S]`` of `x_offsets`.
        x_offsets: ``[S+1]``; they must cover all rows.
        y_lengths: Lengths ``[S]`` of `y_offsets`.
        y_offsets: ``[S+1]``; they must cover all rows.
        z_lengths: Products of `x_lengths` and `y_lengths` ``[S]``.
        z_offsets: Offsets ``[S+1]`` of `z_lengths`.
        max_seq_len: Ignored.
        allow_tf32: Ignored; ``torch.backends.cuda.matmul`` decides.

    Returns:
        ``[Σ n_s m_s]``.

    Raises:
        LayoutError: If offsets are invalid, or lengths and offsets do not match.
        ShapeError: If shapes do not match.

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
    """Product of each packed square matrix, truncated to `max_seq_len` rows and columns, and its segment: ``P_s y_s``.

    The other rows are 0. The gradients are those of this result; FBGEMM's CPU gives truncated matrix entries a
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
        max_seq_len: Maximal number of rows and columns.
        allow_tf32: Ignored; ``torch.backends.cuda.matmul`` decides.

    Returns:
        ``[T, D]``.

    Raises:
        LayoutError: If offsets are invalid, or lengths and offsets do not match.
        ShapeError: If shapes do not match.

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
    """Softmax over each row, or with `transpose` over each column, of packed square matrices.

    `max_seq_len` is ignored, as on FBGEMM's CPU; its CUDA kernel leaves zeros beyond it.

    Args:
        x: ``[Σ n_s²]`` floating point.
        offsets: ``[S+1]`` of the n_s.
        offsets_total: ``[S+1]`` of the n_s².
        max_seq_len: Ignored.
        transpose: Whether to normalize columns instead of rows.

    Returns:
        ``[Σ n_s²]``.

    Raises:
        LayoutError: If offsets are invalid, or do not match.
        ShapeError: If shapes do not match.

    >>> sll_jagged2_softmax(torch.zeros(5), torch.tensor([0, 1, 3]), torch.tensor([0, 1, 5]), 2, False).tolist()
    [1.0, 0.5, 0.5, 0.5, 0.5]
    """
    check_tensor(x, "x", 1)
    return ops.jagged2_softmax(Jagged(x, offsets_total), offsets, dim=0 if transpose else 1).values


def sll_jagged2_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: Integer, padding_value: float = 0.0
) -> Tensor:
    """Pad or truncate packed square matrices to the same size.

    Larger matrices keep their first rows and columns, as in FBGEMM's CUDA kernel; its CPU refuses them.

    Args:
        values: ``[Σ n_s²]``, any dtype.
        offsets: ``[S+1]`` of the n_s²; they must cover all entries.
        max_length: N.
        padding_value: Value of padded entries.

    Returns:
        ``[S, N, N]``.

    Raises:
        LayoutError: If the offsets are invalid, do not cover all entries, or a length is not a square number.
        ShapeError: If shapes do not match, or N is negative.

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
    spare = lengths.shape[0] * size * size  # one extra entry past the end receives the truncated ones
    inside = (row < size) & (column < size) & (segment < lengths.shape[0])
    index = torch.where(inside, (segment * size + row) * size + column, spare)
    out = values.new_full((spare + 1,), padding_value).index_copy(0, index, values)
    return out[:spare].view(lengths.shape[0], size, size)


def sll_jagged_dense_elementwise_mul_jagged_out(
    x: Tensor, y: Tensor, x_seq_lengths: Tensor, x_offsets: Tensor, max_seq_len: Integer
) -> Tensor:
    """Elementwise product of each packed square matrix and the leading rows and columns of one dense matrix.

    `y` gets no gradient, as in FBGEMM. `max_seq_len` is ignored, as on FBGEMM's CPU; entries beyond
    `y` give 0, as in its CUDA kernel with `max_seq_len` equal to the size of `y`; its CPU raises.

    Args:
        x: ``[Σ n_s²]``.
        y: ``[N, M]``; other dtypes, such as bool of a mask, are promoted.
        x_seq_lengths: ``[S]``, n_s.
        x_offsets: ``[S+1]`` of the n_s²; they must cover all entries.
        max_seq_len: Ignored.

    Returns:
        ``[Σ n_s²]``.

    Raises:
        LayoutError: If the offsets are invalid, do not cover all entries, or do not match the lengths.
        ShapeError: If shapes do not match.

    >>> mask, n, offsets = torch.ones(2, 2).triu(), torch.tensor([1, 2]), torch.tensor([0, 1, 5])
    >>> sll_jagged_dense_elementwise_mul_jagged_out(torch.arange(5.0), mask, n, offsets, 2).tolist()
    [0.0, 1.0, 2.0, 0.0, 4.0]
    """
    check_tensor(x, "x", 1)
    check_tensor(y, "y", 2)
    _check_lengths(x_seq_lengths * x_seq_lengths, x_offsets, "squares of x_seq_lengths", "x_offsets")
    _check_exact(x, x_offsets, "x_offsets")
    _, row, column = _entries(x, x_offsets, x_seq_lengths)
    factors = torch.nn.functional.pad(y.detach(), (0, 1, 0, 1))  # a row and a column of zeros for entries beyond `y`
    row, column = row.clamp(max=y.shape[0]), column.clamp(max=y.shape[1])
    return x * factors.flatten().index_select(0, row * (y.shape[1] + 1) + column)


def sll_jagged_self_substraction_jagged_out(
    a: Tensor, offsets_a: Tensor, offsets_b: Tensor, max_seq_len: Integer
) -> Tensor:
    """Differences of each segment's tokens: ``out[s, i, j] = a[s, i] − a[s, j + 1]``, i and j from 0 to n_s − 2.

    Differentiable without the warning that FBGEMM gives. `max_seq_len` is ignored, as on FBGEMM's CPU; its CUDA
    kernel leaves entries beyond it uninitialized.

    Args:
        a: ``[T]``.
        offsets_a: ``[S+1]``; they must cover all rows.
        offsets_b: ``[S+1]`` of the result: ``(n_s − 1)²`` entries for n_s ≥ 1, none for an empty segment.
        max_seq_len: Ignored.

    Returns:
        ``[Σ (n_s − 1)²]``.

    Raises:
        LayoutError: If offsets are invalid, or do not match. FBGEMM leaves gaps between segments unwritten.
        ShapeError: If shapes do not match.

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
    times = ops.jagged_index_select(right, left.segment_ids)  # repeats a segment's right operands once per left operand
    return spread(left.values, times.offsets, times.values.shape[0]) - times.values


def _entries(values: Tensor, offsets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of matrix, row and column of each entry of ``[Σ n_s²]``."""
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
    """Check the contents of offsets, on a CPU."""
    if can_look(offsets):
        check_offsets(offsets, values.shape[0], name)
