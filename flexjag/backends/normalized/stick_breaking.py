"""Stick-breaking attention over tiles or runs: ``log w_ij = s_ij - sum_{j <= k < i} softplus(s_ik)``.

The sum over later keys is a suffix sum inside each tile, plus the totals of the row's later tiles.
(Stick-breaking Attention, arXiv 2410.17980; the order of the sums is this file's own.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.backends.blocks import matmul
from flexjag.backends.gathers import add_tiles
from flexjag.differentiation import needs_plain_operations

EXACT = 40.0  # softplus(s) is s from here on, to float64's precision


def carry_over(totals: Tensor, row: Tensor, from_right: bool) -> Tensor:
    """Exclusive sum of tiles' totals along each tile row, from the right or from the left: the nearest tile last.

    Added tile by tile and never across rows, so that rows cannot disturb each other by a rounding.

    Args:
        totals: ``[N, ...]``, of tiles that are sorted by row, then column.
        row: ``[N]``, ascending.
        from_right: Sum the tiles to the right of each tile; else those to the left.

    Returns:
        ``[N, ...]``. The backward is the same sum from the other side.
    """
    if not needs_plain_operations():
        return _carry_over(totals, row, from_right)
    tile = torch.arange(row.shape[0], device=row.device)
    beside = (tile[:, None] < tile) if from_right else (tile[:, None] > tile)
    beside = (beside & (row[:, None] == row)).to(totals.dtype)
    return torch.tensordot(beside, totals, 1)


@torch.library.custom_op("flexjag::carry_over", mutates_args=())
def _carry_over(totals: Tensor, row: Tensor, from_right: bool) -> Tensor:
    out = torch.zeros_like(totals)
    if not row.shape[0]:
        return out
    tile = torch.arange(row.shape[0], device=row.device)
    if from_right:
        distance, step = torch.searchsorted(row, row, right=True) - 1 - tile, 1
    else:
        distance, step = tile - torch.searchsorted(row, row), -1
    by_distance = distance.argsort(stable=True).split(torch.bincount(distance).tolist())
    for here in by_distance[1:]:
        out[here] = out[here + step] + totals[here + step]
    return out


@_carry_over.register_fake
def _(totals: Tensor, row: Tensor, from_right: bool) -> Tensor:
    return torch.empty_like(totals)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.from_right = inputs[2]


_carry_over.register_autograd(
    lambda ctx, grad: (_carry_over(grad, ctx.saved_tensors[0], not ctx.from_right), None, None), setup_context=_remember
)


def attend(s: Tensor, allowed: Tensor | None, z: Tensor, local: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Attention of a list of tiles: the weighted sums of values, and the log of each row's remainder.

    Args:
        s: Scores ``[N, H, B, C]``.
        allowed: The mask, which broadcasts; None if all keys are allowed.
        z: Values ``[N, G, C, E]``.
        local: ``[N]`` ascending, row block of each tile, below `rows`; None if there is one tile and one row block.
        rows: Number of row blocks.

    Returns:
        The output ``[rows, H, B, E]`` and the log-remainder ``[rows, H, B, 1]``.
    """
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)
    taken = functional.softplus(s, threshold=EXACT)  # -log(1 - b)
    since = taken.flip(3).cumsum(3).flip(3)
    total = taken.sum(3, keepdim=True)
    if local is None:
        return matmul(torch.exp(s - since), z), -total
    since = since + carry_over(total, local, True)
    return add_tiles(matmul(torch.exp(s - since), z), local, rows), -add_tiles(total, local, rows)
