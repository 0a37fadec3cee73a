"""Conversion between packed ``[T, ...]`` and padded ``[S, N, ...]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.ops.checks import check_index, check_jagged, check_total
from flexjag.ops.packed import cut, is_few, lengths_of, padded_index, unknown_size
from flexjag.ops.register import define


def jagged_to_padded_dense(x: Jagged, max_length: int | None = None, fill: float = 0.0) -> Tensor:
    """Pad or truncate every segment to the same length.

    Args:
        x: ``[T, ...]``, any dtype.
        max_length: N. Longer segments are truncated to their first N tokens. Default: the longest segment, which costs
            a device sync on a GPU. A compiled graph specializes on a Python number: another value may recompile.
        fill: Padding value.

    Returns:
        ``[S, N, ...]``. Gradients flow to the tokens kept; truncated tokens get 0.

    Raises:
        LayoutError: If `x` is not a Jagged, or its offsets are invalid (checked on a CPU).
        ShapeError: If `max_length` is negative.

    >>> x = Jagged.from_lengths(torch.arange(1.0, 6.0), [2, 0, 3])
    >>> jagged_to_padded_dense(x, 2, fill=-1.0).tolist()
    [[1.0, 2.0], [-1.0, -1.0], [3.0, 4.0]]
    """
    check_jagged(x, "x")
    if max_length is not None and max_length < 0:
        raise ShapeError(explain_values("max_length", "must not be negative", max_length=max_length))
    return pad(x.values, x.offsets, max_length, fill)


def dense_to_jagged(dense: Tensor, offsets: Tensor, *, total: int | None = None, allow_longer: bool = False) -> Jagged:
    """Remove the padding: segment s is the first ``offsets[s+1] - offsets[s]`` rows of ``dense[s]``.

    Args:
        dense: ``[S, N, ...]``, any dtype.
        offsets: Offsets ``[S+1]`` of the result.
        total: ``offsets[-1]``, if known: saves a device sync.
        allow_longer: Fill tokens at positions from N on with zeros, as FBGEMM does. If False, they are an error on a
            CPU, and zeros on a GPU, where offsets are not read.

    Raises:
        LayoutError: If the offsets are invalid, or a segment is longer than N (both checked on a CPU).
        ShapeError: If `dense` does not have one row per segment.

    >>> dense_to_jagged(torch.arange(6).view(2, 3), torch.tensor([0, 1, 3])).values.tolist()
    [0, 3, 4]
    """
    if not isinstance(dense, Tensor) or dense.ndim < 2:
        seen = {"shape": tuple(dense.shape)} if isinstance(dense, Tensor) else {"type": type(dense).__name__}
        raise ShapeError(explain_values("dense", "must be a tensor [S, N, ...]", **seen))
    check_index(offsets, "offsets", dense.device)
    check_total(total)
    if offsets.shape[0] != dense.shape[0] + 1:
        seen = {"offsets": tuple(offsets.shape), "dense": tuple(dense.shape)}
        raise ShapeError(explain_values("offsets", "must have one more entry than dense has rows", **seen))
    return Jagged(unpad(dense, offsets, total, allow_longer), offsets)


WITHOUT_INDEX_COPY = {
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}


@define("pad")
def pad(values: Tensor, offsets: Tensor, max_length: int | None, fill: float) -> Tensor:
    """Pad ``[T, ...]`` to ``[S, N, ...]``; N is the longest length if None."""
    lengths = lengths_of(offsets, values.shape[0])
    longest = max(lengths, default=0)
    size = longest if max_length is None else max_length
    out = values.new_full((len(lengths), size, *values.shape[1:]), fill)
    if longest > size or is_few(lengths, out.numel()) or values.dtype in WITHOUT_INDEX_COPY:
        rows = cut(values, lengths)
        kept = rows if longest <= size else [row[:size] for row in rows]
        torch._foreach_copy_(rows_of(out, lengths), kept)  # pyright: ignore[reportPrivateImportUsage]
    else:
        out.flatten(0, 1).index_copy_(0, padded_index(offsets, size, values.shape[0]), values)
    return out


@pad.register_fake
def _(values: Tensor, offsets: Tensor, max_length: int | None, fill: float) -> Tensor:
    size = unknown_size() if max_length is None else max_length
    return values.new_empty((offsets.shape[0] - 1, size, *values.shape[1:]))


def rows_of(dense: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views of the valid rows of ``[S, N, ...]``, one per segment."""
    size = dense.shape[1]
    parts = [part for n in (min(n, size) for n in lengths) for part in (n, size - n)]
    return cut(dense.flatten(0, 1), parts)[0::2]


@define("unpad")
def unpad(dense: Tensor, offsets: Tensor, total: int | None, allow_longer: bool) -> Tensor:
    """Unpad ``[S, N, ...]`` to ``[T, ...]``, with zeros at positions from N on."""
    lengths, size = lengths_of(offsets, total), dense.shape[1]
    longest = max(lengths, default=0)
    if longest > size and not allow_longer:
        seen = {"longest": longest, "dense": tuple(dense.shape)}
        raise LayoutError(explain_values("offsets", "no segment may be longer than the rows of dense", **seen))
    rows = rows_of(dense, lengths) if longest > size or is_few(lengths, dense.numel()) else ()
    if longest <= size:
        return (
            torch.cat(rows) if rows else dense.flatten(0, 1).index_select(0, padded_index(offsets, size, sum(lengths)))
        )
    missing = dense.new_zeros((longest - size, *dense.shape[2:]))
    return torch.cat(
        [part for row, n in zip(rows, lengths, strict=True) for part in (row, missing[: max(n - size, 0)])]
    )


@unpad.register_fake
def _(dense: Tensor, offsets: Tensor, total: int | None, allow_longer: bool) -> Tensor:
    return dense.new_empty((unknown_size() if total is None else total, *dense.shape[2:]))


def _setup_pad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.total = values.shape[0]


def _backward_pad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return unpad(grad, offsets, ctx.total, True), None, None, None


def _setup_unpad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, offsets, _, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.size = dense.shape[1]


def _backward_unpad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return pad(grad, offsets, ctx.size, 0.0), None, None, None


pad.register_autograd(_backward_pad, setup_context=_setup_pad)
unpad.register_autograd(_backward_unpad, setup_context=_setup_unpad)
pad.register_kernel("flexjag.ops.triton.move")
unpad.register_kernel("flexjag.ops.triton.move")
