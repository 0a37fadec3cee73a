"""Plain torch over the plan's tiles: any device, any dtype, any mask and score, forward and backward.

The algorithm is flash attention's with the tiles as the unit: gather the q, k and v blocks of each tile, multiply,
mask, and combine each row's tiles by their running maximum. Every gather is by tile, so nothing is T×T.

Traced, all tiles go through at once and autograd differentiates the graph. In eager mode tiles go through in chunks of
whole tile rows and the backward recomputes the scores, so memory beyond the inputs stays at a few chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.backends.held import Held
from flexjag.differentiation import needs_plain_operations
from flexjag.layout import blocks
from flexjag.recipe import Recipe
from flexjag.upstream import holds_no_numbers, is_watched

CHUNK_SCORES = 2**20  # scores held at once on a CPU: about what a core's L2 cache holds
CHUNK_SCORES_GPU = 2**24  # 64 MB of float32: fills a GPU, where smaller operations only wait for launches; unmeasured

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call in block form.

    Attributes:
        row: ``[N]`` tile rows, ascending.
        col: ``[N]`` tile columns.
        block: Tile size B.
        num_q: T_q.
        num_kv: T_kv.
        scale: Factor on ``q·k``.
        allowed: The mask, on packed indices that broadcast.
        score: The score, likewise, or None.
    """

    row: Tensor
    col: Tensor
    block: int
    num_q: int
    num_kv: int
    scale: float
    allowed: Callable[..., Tensor]
    score: Callable[..., Tensor] | None

    @property
    def rows(self) -> int:
        """Number of tile rows."""
        return blocks(self.num_q, self.block)

    @property
    def cols(self) -> int:
        """Number of tile columns; one more block, all zeros, stands behind them for unused tiles."""
        return blocks(self.num_kv, self.block)


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
    p = Problem(
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


def in_dtype(score: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    """The score, kept in the dtype it is given: its tensors may be wider than the inputs."""
    return None if score is None else lambda s, *at: score(s, *at).to(s.dtype)


def to_blocks(x: Tensor, count: int, block: int) -> Tensor:
    """[T, H, D] to [count, H, B, D], padded with zeros."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * block - x.shape[0]))
    # From one dimension to two, and on: splitting one of several guards on N % count, which torch.export cannot prove.
    flat = x.flatten().view(count, block * x.shape[1] * x.shape[2])
    return flat.view(count, block, *x.shape[1:]).transpose(1, 2)


def from_blocks(x: Tensor, tokens: int) -> Tensor:
    """[count, H, B, D] to [T, H, D]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if torch.compiler.is_exporting():  # a slice guards on the tokens being no more than the rows
        return x.index_select(0, torch.arange(tokens, device=x.device))
    return x[:tokens]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[N, H, i, j] @ [N, G, j, k] to [N, H, i, k], each of the G shared by H / G heads. May be overwritten."""
    n, h, i, j = a.shape
    g = b.shape[1]
    return _owned_bmm(a.reshape(n * g, h // g * i, j), b.reshape(n * g, j, b.shape[3])).view(n, h, i, b.shape[3])


def _owned_bmm(a: Tensor, b: Tensor) -> Tensor:
    """A product that nobody else holds. A dispatch mode may: selective checkpointing keeps what it is told to save."""
    out = torch.bmm(a, b)
    return out.clone() if not holds_no_numbers(out) and is_watched() else out


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """[N, H, ...] to [N, G, ...], the sum over the heads that share a group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def indices(p: Problem, row: Tensor, col: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The b, h, q and kv of every score of these tiles, shaped to broadcast to [N, H, B, B]."""
    step = torch.arange(p.block, device=row.device)
    q = (row[:, None] * p.block + step).clamp(max=p.num_q - 1)[:, None, :, None]
    kv = (col[:, None] * p.block + step)[:, None, None, :]
    h = torch.arange(heads, device=row.device)[None, :, None, None]
    return h.new_zeros(()), h, q, kv.clamp(max=p.num_kv - 1)


def allowed_in(p: Problem, row: Tensor, col: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The mask of every score of these tiles, False outside the batch."""
    step = torch.arange(p.block, device=row.device)
    q, kv = row[:, None] * p.block + step, col[:, None] * p.block + step
    inside = (q < p.num_q)[:, None, :, None] & (kv < p.num_kv)[:, None, None, :]
    return p.allowed(*at) & inside


def all_at_once(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Pair:
    """Attention over all tiles together, in plain operations that autograd and graphs see through."""
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


def tiles_at_once(device: torch.device, heads: int, block: int) -> int:
    """Tiles of `heads` heads whose scores are held at once."""
    return max(1, (CHUNK_SCORES if device.type == "cpu" else CHUNK_SCORES_GPU) // (heads * block**2))


def chunks(p: Problem, heads: int) -> list[tuple[int, int]]:
    """Slices of the tile list, each of whole tile rows and of about as many scores as are held at once."""
    most = tiles_at_once(p.row.device, heads, p.block)
    counts = torch.bincount(p.row[p.col < p.cols], minlength=p.rows).tolist()
    out, start, size = [], 0, 0
    for n in counts:
        if size and size + n > most:
            out.append((start, start + size))
            start, size = start + size, 0
        size += n
    return [*out, (start, start + size)] if size else out


class _Chunked(torch.autograd.Function):
    """The eager path: chunks of tile rows, scores recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, p: Problem, held: Held, *tensors: Tensor) -> Pair:
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


def differentiable_gradients(
    attend: Callable[..., Sequence[Tensor | None]],
    held: Held,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for ``create_graph=True``.

    Args:
        attend: Of q, k and v in plain operations.
        held: What the score reads.
        tensors: What it learns, then q, k and v.
        grads: Of what `attend` returns.

    Returns:
        The gradients of `tensors`.
    """
    tensors = [x.view_as(x) for x in tensors]  # nodes of their own: one may have been computed from another
    with held.read_as(tensors[:-3]):
        outs = attend(*tensors[-3:])
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    wanted = [x for x in tensors if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(tensors)
    outs, grads = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors]


def _backward(
    p: Problem, held: Held, saved: Sequence[Tensor], grad_out: Tensor, grad_lse: Tensor
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


def matmul_heads(a: Tensor, b: Tensor) -> Tensor:
    """[N, H, i, j]ᵀ @ [N, H, i, k] to [N, H, j, k]. May be overwritten."""
    n, h, i, j = a.shape
    return _owned_bmm(a.reshape(n * h, i, j).transpose(1, 2), b.reshape(n * h, i, b.shape[3])).view(n, h, j, b.shape[3])
