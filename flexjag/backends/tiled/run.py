"""Plain torch over the plan's tiles: any device, any dtype, any mask and score, forward and backward.

The algorithm is flash attention's with the tiles as the unit: gather the q, k and v blocks of each tile, multiply,
mask, and combine each row's tiles by their running maximum. Every gather is by tile, so nothing is T×T.

In a graph all tiles are computed at once and autograd differentiates them. In eager mode they are computed in chunks of
whole tile rows and the backward recomputes the scores, so memory beyond the inputs stays at a few chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.backends.blocks import (
    TiledCall,
    allowed_in,
    chunks,
    from_blocks,
    in_dtype,
    indices,
    matmul,
    matmul_heads,
    sum_groups,
    to_blocks,
)
from flexjag.backends.held import Held, differentiable_gradients
from flexjag.differentiation import needs_plain_operations
from flexjag.lowering.recipe import Recipe
from flexjag.upstream import holds_no_numbers

Pair = tuple[Tensor, Tensor]


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Returns:
        ``[T_q, H, E]`` in q's dtype and the log-sum-exp ``[T_q, H]``, float32 or float64. Half precision
        is computed in float32.
    """
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tiles = recipe.tiles.all_heads
    plain = holds_no_numbers(q) or needs_plain_operations()
    recipe = (recipe if plain else recipe.frozen()).learning_in(compute)
    p = TiledCall(
        tiles.row,
        tiles.col,
        recipe.block_size,
        recipe.layout.num_q,
        recipe.layout.num_kv,
        scale,
        recipe.mask_mod,
        in_dtype(recipe.score_mod),
    )
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    if plain:
        out, lse = all_at_once(q, k, v, p)
    else:
        held = Held.of(recipe, compute)
        out, lse = _Chunked.apply(p, held, *held.wide, q, k, v)  # type: ignore[misc]
    return out.to(dtype), lse


def all_at_once(q: Tensor, k: Tensor, v: Tensor, p: TiledCall) -> Pair:
    """Attention over all tiles at once, in plain operations that autograd and graph capture support."""
    # One spare row of blocks, so that no size can be 1: Dynamo would compile that case anew.
    qb, kb, vb = (to_blocks(x, n + 1, p.block) for x, n in ((q, p.rows), (k, p.cols), (v, p.cols)))
    b, h, q_index, kv_index = indices(p, p.row, p.col, q.shape[1])
    # A parameter read as table[h] is then expanded by the lookup, whose backward scatters. A broadcast would be undone
    # by a sum over all tiles, and Inductor's C++ guards on whether such a sum has more than 4096 terms.
    at = (b, h.expand(p.row.shape[0], -1, -1, -1), q_index, kv_index)
    s = matmul(qb[p.row], kb[p.col].transpose(2, 3)) * p.scale
    if p.score is not None:
        s = p.score(s, *at)
    s = s.masked_fill(~allowed_in(p, p.row, p.col, at), -torch.inf)
    with torch.no_grad():
        top = s.detach().amax(3)
        index = p.row[:, None, None].expand_as(top)
        top = qb.new_full(qb.shape[:3], -torch.inf).scatter_reduce(0, index, top, "amax")
        top = top.masked_fill(top == -torch.inf, 0.0)
    e = torch.exp(s - top[p.row][..., None])
    total = qb.new_zeros(qb.shape[:3]).index_add(0, p.row, e.sum(3))
    out = qb.new_zeros(*qb.shape[:3], v.shape[2]).index_add(0, p.row, matmul(e, vb[p.col]))
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    return from_blocks(out / total[..., None], p.num_q), from_blocks(lse, p.num_q)


class _Chunked(torch.autograd.Function):
    """The eager path: chunks of tile rows, scores recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, p: TiledCall, held: Held, *tensors: Tensor) -> Pair:
        q, k, v = tensors[len(held.wide) :]
        qb, kb, vb = (to_blocks(x, n, p.block) for x, n in ((q, p.rows), (k, p.cols + 1), (v, p.cols + 1)))
        out = qb.new_zeros(*qb.shape[:3], v.shape[2])
        lse = qb.new_full(qb.shape[:3], -torch.inf)
        for start, end in chunks(p, q.shape[1]):
            row, col = p.row[start:end], p.col[start:end]
            r0, r1 = int(row[0]), int(row[-1]) + 1
            local = row - r0
            at = indices(p, row, col, q.shape[1])
            s = matmul(qb[row] * p.scale, kb[col].transpose(2, 3))
            if p.score is not None:
                s = p.score(s, *at)
            s = s.masked_fill_(~allowed_in(p, row, col, at), -torch.inf)
            top = s.amax(3)
            best = lse[r0:r1].scatter_reduce(0, local[:, None, None].expand_as(top), top, "amax")
            best.masked_fill_(best == -torch.inf, 0.0)
            e = s.sub_(best[local][..., None]).exp_()
            total = torch.zeros_like(best).index_add_(0, local, e.sum(3))
            empty = total == 0
            total.masked_fill_(empty, 1.0)
            out[r0:r1].index_add_(0, local, matmul(e, vb[col])).div_(total[..., None])
            lse[r0:r1] = (best + total.log()).masked_fill_(empty, -torch.inf)
        out, lse = from_blocks(out, p.num_q).contiguous(), from_blocks(lse, p.num_q).contiguous()
        ctx.problem, ctx.held = p, held
        ctx.save_for_backward(*tensors, out, lse, *held.fixed)
        return out, lse

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes the forward at each reading
        ctx.held.check()
        with torch.autocast(grads[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                attend = partial(all_at_once, p=ctx.problem)
                return None, None, *differentiable_gradients(attend, ctx.held, saved[: len(ctx.held.wide) + 3], grads)
            return _backward(ctx.problem, ctx.held, saved, *grads)


def _backward(
    p: TiledCall, held: Held, saved: Sequence[Tensor], grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    # Leaves of their own: one learned tensor may have been computed from another.
    learned = [x.detach().requires_grad_() for x in saved[: len(held.wide)]]
    q, k, v, out, lse = saved[len(learned) : len(learned) + 5]
    heads, groups = q.shape[1], k.shape[1]
    qb, kb, vb = (to_blocks(x, n, p.block) for x, n in ((q, p.rows), (k, p.cols + 1), (v, p.cols + 1)))
    no_key = lse == -torch.inf  # what flows back into those rows may be NaN, as 0 · -inf
    grad_out = grad_out.masked_fill(no_key[..., None], 0.0)
    grad_lse = grad_lse.masked_fill(no_key, 0.0)
    gb = to_blocks(grad_out, p.rows, p.block)
    # d lse adds to every score's gradient in proportion to its weight, as the -delta term does.
    delta = to_blocks(((grad_out * out).sum(2) - grad_lse)[..., None], p.rows, p.block)
    lse = lse.masked_fill(no_key, 0.0)
    lb = to_blocks(lse[..., None], p.rows, p.block)
    dq, dk, dv = torch.zeros_like(qb), torch.zeros_like(kb), torch.zeros_like(vb)
    dlearned = [torch.zeros_like(x) for x in learned]
    for start, end in chunks(p, heads):
        row, col = p.row[start:end], p.col[start:end]
        at = indices(p, row, col, heads)
        qt, kt, gt = qb[row], kb[col], gb[row]
        s = matmul(qt * p.scale, kt.transpose(2, 3))
        modified = s
        if p.score is not None:
            with torch.enable_grad(), held.read_as(learned):
                s = s.requires_grad_()
                modified = p.score(s, *at)
        e = torch.exp(modified.detach() - lb[row])
        e = e.masked_fill_(~allowed_in(p, row, col, at), 0.0)
        dv.index_add_(0, col, sum_groups(matmul_heads(e, gt), groups))
        ds = matmul(gt, vb[col].transpose(2, 3)).sub_(delta[row]).mul_(e)
        if p.score is not None and not modified.requires_grad:
            continue  # a score that ignores q·k and learns nothing
        if p.score is not None:
            ds, *more = torch.autograd.grad(modified, (s, *learned), ds, allow_unused=True)
            for total, part in zip(dlearned, more, strict=True):
                if part is not None:
                    total += part
        if ds is None:
            continue  # a score that ignores q·k
        ds = ds * p.scale
        dq.index_add_(0, row, matmul(ds, kt))
        dk.index_add_(0, col, sum_groups(matmul_heads(ds, qt), groups))
    blocks_of = ((dq, p.num_q), (dk, p.num_kv), (dv, p.num_kv))
    return (None, None, *dlearned, *(from_blocks(x, n) for x, n in blocks_of))
