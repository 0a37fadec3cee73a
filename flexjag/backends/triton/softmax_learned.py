"""Gradients of a score's learned tensors in softmax attention: plain torch over chunks of recomputed tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag.backends import blocks
from flexjag.backends.triton.pointwise import add_up
from flexjag.backends.triton.softmax_launch import Call


def learned_gradients(
    call: Call, learned: Sequence[int], grad: Tensor, lse: Tensor, delta: Tensor, tiles: Sequence[Tensor], block: int
) -> list[Tensor]:
    """The gradients of captures that need them, in their dtypes.

    Args:
        call: The call.
        learned: Indices of the captures.
        grad: Gradient of the output.
        lse: ``[T_q, H]`` float32.
        delta: ``[T_q, H]`` float32, each row's sum of weights times their gradients.
        tiles: Rows and columns of the plan's tiles, each ``[N]``.
        block: Size of the tiles.
    """
    functions, heads = call.functions, call.q.shape[1]
    row, col = tiles
    is_exact = call.spans.shape[1] == 2

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = _in_spans(call, h, i, j)
        return inside if is_exact else inside & functions.plain_mask(h, i, j, call.captures, call.numbers)

    p = blocks.TiledCall(row, col, block, call.q.shape[0], call.k.shape[0], call.scale, allowed, None)
    totals = [torch.zeros(call.captures[i].numel(), dtype=torch.float32, device=row.device) for i in learned]
    with torch.autocast(row.device.type, enabled=False):
        x, g, y, z = (
            blocks.to_blocks(t.float(), n, block)
            for t, n in ((call.q, p.rows), (grad, p.rows), (call.k, p.cols + 1), (call.v, p.cols + 1))
        )
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of a row whose scores are all -inf, as these weigh 0
        base, compared = (blocks.to_blocks(t[..., None], p.rows, block) for t in (lse, delta))
        step = blocks.tiles_at_once(row.device, heads, block)
        for r, c in zip(row.split(step), col.split(step), strict=True):
            at = blocks.indices(p, r, c, heads)
            banned = ~blocks.allowed_in(p, r, c, at)
            raw = blocks.matmul(x[r] * call.scale, y[c].transpose(2, 3))
            s = functions.plain_score(raw, *at[1:], call.captures, call.numbers)
            w = torch.exp(s - base[r]).masked_fill_(banned, 0.0)
            ds = w * (blocks.matmul(g[r], z[c].transpose(2, 3)) - compared[r])
            for i, index, slope in functions.plain_slopes(raw, *at[1:], call.captures, call.numbers):
                add_up(totals[learned.index(i)], index, (ds * slope).masked_fill_(banned, 0.0))
    return [t.view(call.captures[i].shape).to(call.captures[i].dtype) for t, i in zip(totals, learned, strict=True)]


def _in_spans(call: Call, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Whether keys are in the outer spans of rows; the indices broadcast."""
    mask = torch.zeros_like(h) if call.mask_of is None else call.mask_of[h]
    inside = torch.zeros((), dtype=torch.bool, device=j.device)
    for span in range(call.spans.shape[2]):
        inside = inside | ((j >= call.spans[mask, 0, span, i]) & (j < call.spans[mask, 1, span, i]))
    return inside
