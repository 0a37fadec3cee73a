"""Attention of the suite's kinds by its definition, with the gradients written out: what its arms are checked against.

The results are those of the ``reference`` backend, which the tests compare. There, PyTorch adds up the gradient of a
bias entry by entry, and on a GPU it adds those of one entry one after the other; here they are sums of diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag.algebra.scores import Alibi
from flexjag.bench.arms.kinds import MAX_DISTANCE, Kind
from flexjag.bench.measuring.padded import Tensors


def attend(kind: Kind, lengths: Sequence[int], inputs: Sequence[Tensor], grad: Tensor | None) -> Tensors:
    """Output and gradients, one segment at a time. Half precision is computed in float32.

    Args:
        kind: Mask and score.
        lengths: Segment lengths, T tokens in total.
        inputs: q, k, v ``[T, H, D]`` and, for a trained bias, its table ``[H, 2R + 1]``.
        grad: Gradient of the output ``[T, H, D]``; None for the output alone.

    Returns:
        The output, and with `grad` the gradients of `inputs`, in q's dtype; the bias's gradient in the table's.
    """
    dtype = inputs[0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    table = inputs[3].to(compute) if kind.score == "relative bias" else None
    given = [*inputs[:3], *([] if grad is None else [grad])]
    pieces = zip(*(x.to(compute).transpose(0, 1).split(list(lengths), 1) for x in given), strict=True)
    found = [_segment(kind, table, *piece) for piece in pieces]
    packed = [torch.cat(x, 1).transpose(0, 1).to(dtype) for x in zip(*(rows for rows, _ in found), strict=True)]
    if table is not None and grad is not None:
        packed.append(sum((slope for _, slope in found), torch.zeros_like(table)).to(inputs[3].dtype))
    return tuple(packed)


def _segment(
    kind: Kind, table: Tensor | None, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Output and gradients by q, k and v of one segment ``[H, n, D]``, and the gradient of the bias's table."""
    heads, n, dim = q.shape
    i = torch.arange(n, device=q.device)[:, None]
    j, scale = i.T, dim**-0.5
    weights = q @ k.transpose(1, 2) * scale
    if table is not None:
        weights += table[:, (j - i).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]
    elif kind.score == "alibi":
        weights += Alibi.from_heads(heads, str(q.device)).slopes.to(q.dtype)[:, None, None] * (j - i)
    weights = weights.masked_fill_(~kind.allowed(i, j), -torch.inf).softmax(2)
    out = weights @ v
    if grad is None:
        return [out], q.new_zeros(0)
    slopes = weights * (grad @ v.transpose(1, 2) - (grad * out).sum(2, keepdim=True))
    found = [out, slopes @ k * scale, slopes.transpose(1, 2) @ q * scale, weights.transpose(1, 2) @ grad]
    return found, q.new_zeros(0) if table is None else _by_distance(slopes)


def _by_distance(slopes: Tensor) -> Tensor:
    """Sums ``[H, 2R + 1]`` of a matrix ``[H, n, n]`` over its diagonals j - i; the outermost sum all beyond them."""
    found = slopes.new_zeros(slopes.shape[0], 2 * MAX_DISTANCE + 1)
    for d in range(1 - MAX_DISTANCE, MAX_DISTANCE):
        if abs(d) < slopes.shape[1]:
            found[:, d + MAX_DISTANCE] = slopes.diagonal(d, 1, 2).sum(1)
    found[:, 0], found[:, -1] = slopes.tril(-MAX_DISTANCE).sum((1, 2)), slopes.triu(MAX_DISTANCE).sum((1, 2))
    return found
