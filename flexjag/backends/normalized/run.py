"""Attention by any normalizer but a softmax, in plain torch: over the plan's tiles, or over runs of queries.

In a graph all tiles are computed at once and autograd differentiates them. In eager mode they are computed in pieces
(all keys of some rows), and the backward recomputes a piece and differentiates it by autograd. So
memory beyond the inputs stays at a few pieces, and every gradient is summed in the order of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.backends import blocks
from flexjag.backends.base import FIRST_ORDER
from flexjag.backends.gathers import add_tiles, look_up, take_tiles
from flexjag.backends.held import Held, differentiable_gradients
from flexjag.backends.normalized import pointwise, stick_breaking
from flexjag.backends.normalized.pieces import Piece, Walk, walk_runs, walk_tiles
from flexjag.differentiation import first_order_only, needs_plain_operations
from flexjag.lowering import mods
from flexjag.lowering.layout import Layout
from flexjag.lowering.recipe import Recipe
from flexjag.upstream import holds_no_numbers

Pair = tuple[Tensor, Tensor]
Attend = Callable[..., tuple[Tensor, Tensor | None]]
Differentiate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Job:
    """One attention call.

    Attributes:
        walk: The division into pieces.
        attend: The normalizer's attention of a piece, from its scores.
        differentiate: Analytic gradient of `attend`; None to use autograd.
        score: The score on packed indices, or None.
        held: Tensors and functions of score and normalizer.
        whole: Makes the division into a single piece; None if there is none.
    """

    walk: Walk
    attend: Attend
    differentiate: Differentiate | None
    score: Callable[..., Tensor] | None
    held: Held
    whole: Callable[[], Walk] | None

    def score_of(self, piece: Piece, s: Tensor) -> Tensor:
        """The scores after the score function."""
        return s if self.score is None else self.score(s, *piece.at)

    def run(self, piece: Piece, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Differentiable attention of one piece."""
        rows = x.shape[0]
        s = blocks.matmul(x if piece.local is None else take_tiles(x, piece.local), y.transpose(2, 3))
        return self.attend(self.score_of(piece, s), piece.allowed, z, piece.local, rows)


def run_tiled(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> Pair:
    """The backend ``tiled`` for any normalizer but a softmax.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and ``[T_q, H]`` in float32 or float64: the remainder of stick-breaking,
        unspecified values otherwise. Half precision is computed in float32.
    """
    plain = holds_no_numbers(q) or needs_plain_operations()
    return _run(q, k, v, recipe, scale, walk_tiles, partial(walk_tiles, whole=True), plain)


def run_segments(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool
) -> tuple[Tensor, Tensor]:
    """The backend ``segments`` for any normalizer but a softmax; as :func:`run_tiled`."""
    return _run(q, k, v, recipe, scale, partial(walk_runs, heads=q.shape[1]), None, False)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    scale: float,
    walk: Callable[[Recipe], Walk],
    whole: Callable[[Recipe], Walk] | None,
    plain: bool,
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    recipe = (recipe if plain else recipe.frozen()).learning_in(compute)
    normalizer = recipe.normalizer
    q, k, v = q.to(compute) * scale, k.to(compute), v.to(compute)
    if plain:
        assert whole is not None
        out, left = _all_at_once(
            q, k, v, _Job(whole(recipe), *_weigh(recipe), _score(recipe), Held([], [], [], []), None)
        )
    else:
        held = Held.of(recipe, compute)
        job = _Job(
            walk(recipe), *_weigh(recipe), _score(recipe), held, None if whole is None else partial(whole, recipe)
        )
        out, left = _PieceByPiece.apply(job, *held.wide, q, k, v)  # type: ignore[misc]
    if isinstance(normalizer, nz.StickBreaking):
        left = torch.exp(left)
        if normalizer.remainder:
            out = out + left * own_values(v, q.shape[1], recipe.layout)
    elif isinstance(normalizer, nz.Pointwise):
        out = scaled(out, normalizer.scale, compute)
    left = left if isinstance(normalizer, nz.Pointwise) else left[..., 0]
    return out.to(dtype), left


def scaled(out: Tensor, scale: float | Tensor, compute: torch.dtype) -> Tensor:
    """Multiply the output ``[T_q, H, E]`` by the normalizer's scale, a number or ``[T_q]``."""
    if not isinstance(scale, Tensor):
        return out if scale == 1 else out * float(scale)
    return out * (scale.to(compute)[:, None, None] if scale.ndim else scale.to(compute))


def own_values(v: Tensor, heads: int, layout: Layout) -> Tensor:
    """Each query token's own value ``[T, H, E]``, 0 in spare rows."""
    v = v.repeat_interleave(heads // v.shape[1], 1)
    return v.masked_fill((layout.q_segment >= layout.num_segments)[:, None, None], 0.0) if layout.has_spare else v


def _weigh(recipe: Recipe) -> tuple[Attend, Differentiate | None]:
    """The normalizer's attention of a piece and its analytic gradient, or None."""
    if isinstance(recipe.normalizer, nz.Pointwise):
        act = pointwise.activation(recipe.normalizer)
        own = recipe.score is None  # a user's function may return what it keeps
        return partial(pointwise.attend, act, own), partial(pointwise.differentiate, act, own)
    return stick_breaking.attend, None


def _score(recipe: Recipe) -> Callable[..., Tensor] | None:
    score = blocks.in_dtype(mods.score_mod(recipe.kernel_score, replace(recipe.tables, look_up=look_up)))
    if isinstance(recipe.normalizer, nz.Pointwise):
        return pointwise.weighed(recipe.normalizer, score, recipe.layout)
    return score


def _all_at_once(q: Tensor, k: Tensor, v: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """Attention in one piece, in plain operations that autograd and graph capture support."""
    walk = job.walk
    x, y, z = (walk.open(t, is_query) for t, is_query in ((q, True), (k, False), (v, False)))
    (piece,) = walk.pieces(q.shape[1])
    assert isinstance(piece.keys, Tensor), "only tiles go through all at once"
    out, left = job.run(piece, x, take_tiles(y, piece.keys), take_tiles(z, piece.keys))
    out = walk.close(out, q.shape[0])
    return out, out if left is None else walk.close(left, q.shape[0])


class _PieceByPiece(torch.autograd.Function):
    """The eager path: piece by piece, recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        walk, (q, k, v) = job.walk, tensors[-3:]
        x, y, z = (walk.open(t, is_query) for t, is_query in ((q, True), (k, False), (v, False)))
        out, left = (walk.open(q.new_zeros(*q.shape[:2], n), True) for n in (v.shape[2], 1))
        for piece in walk.pieces(q.shape[1]):
            one, rest = job.run(piece, walk.rows(x, piece), walk.keys(y, piece), walk.keys(z, piece))
            walk.rows(out, piece).copy_(one)
            if rest is not None:
                walk.rows(left, piece).copy_(rest)
        ctx.job = job
        ctx.save_for_backward(*tensors, *job.held.fixed)
        ctx.set_materialize_grads(False)
        return walk.close(out, q.shape[0]).contiguous(), walk.close(left, q.shape[0]).contiguous()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        job.held.check()
        if job.whole is None or not torch.is_grad_enabled():
            return tuple(_backward(ctx, *grads))
        tensors = ctx.saved_tensors[: len(job.held.wide) + 3]
        with torch.autocast(tensors[-1].device.type, enabled=False):
            attend = partial(_all_at_once, job=replace(job, walk=job.whole()))
            return None, *differentiable_gradients(attend, job.held, tensors, grads)


@first_order_only(FIRST_ORDER.format("segments"))
def _backward(
    ctx: Any, saved: Sequence[Tensor], grad_out: Tensor | None, grad_left: Tensor | None
) -> tuple[Tensor | None, ...]:
    with torch.autocast(saved[0].device.type, enabled=False):
        return None, *_gradients(ctx.job, saved, grad_out, grad_left)


def _gradients(
    job: _Job, saved: Sequence[Tensor], grad_out: Tensor | None, grad_left: Tensor | None
) -> list[Tensor | None]:
    walk = job.walk
    # Leaves of their own: one learned tensor may have been computed from another.
    learned = [x.detach().requires_grad_() for x in saved[: len(job.held.wide)]]
    inputs = saved[len(learned) : len(learned) + 3]
    x, y, z = (walk.open(t, is_query) for t, is_query in zip(inputs, (True, False, False), strict=True))
    grads = [torch.zeros_like(t) for t in (x, y, z)]
    dlearned = [torch.zeros_like(t) for t in learned]
    g_out, g_left = (None if g is None else walk.open(g, True) for g in (grad_out, grad_left))
    for piece in walk.pieces(inputs[0].shape[1]):
        tensors = walk.rows(x, piece), walk.keys(y, piece), walk.keys(z, piece)
        flowing = [None if g is None else walk.rows(g, piece) for g in (g_out, g_left)]
        parts = (_by_hand if job.differentiate else _by_autograd)(job, piece, tensors, flowing, learned)
        for index, part in enumerate(parts):
            if part is None:
                continue
            if index == 0:
                walk.rows(grads[0], piece).copy_(part)
            elif index < 3:
                walk.add_keys(grads[index], piece, part)
            else:
                dlearned[index - 3] += part
    packed = (walk.close(g, t.shape[0]) for g, t in zip(grads, inputs, strict=True))
    return [*dlearned, *packed]


def _by_autograd(
    job: _Job,
    piece: Piece,
    tensors: Sequence[Tensor],
    flowing: Sequence[Tensor | None],
    learned: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """The gradients of a piece's queries, keys and values, and of the learned tensors; None for zeros."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad(), job.held.read_as(learned):
        outs = job.run(piece, *leaves)
    pairs = [(o, g) for o, g in zip(outs, flowing, strict=True) if o is not None and g is not None and o.requires_grad]
    if not pairs:
        return ()
    return torch.autograd.grad([o for o, _ in pairs], [*leaves, *learned], [g for _, g in pairs], allow_unused=True)


def _by_hand(
    job: _Job,
    piece: Piece,
    tensors: Sequence[Tensor],
    flowing: Sequence[Tensor | None],
    learned: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """The gradients of :func:`_by_autograd` for a pointwise normalizer, where only the score needs autograd."""
    assert job.differentiate is not None
    x, y, z = tensors
    rows, grad = x.shape[0], flowing[0]
    if grad is None:
        return ()
    if piece.local is not None:
        x, grad = x.index_select(0, piece.local), grad.index_select(0, piece.local)
    raw = s = blocks.matmul(x, y.transpose(2, 3))
    if job.score is not None:
        with torch.enable_grad(), job.held.read_as(learned):
            s = job.score_of(piece, raw.requires_grad_())
    ds, dz = job.differentiate(s.detach(), piece.allowed, z, grad)
    more: Sequence[Tensor | None] = [None] * len(learned)
    if s.requires_grad:
        ds, *more = torch.autograd.grad(s, [raw, *learned], ds, allow_unused=True)
    elif job.score is not None:
        ds = None
    if ds is None:
        return None, None, dz, *more  # a score that ignores q·k
    dx = blocks.matmul(ds, y)
    dx = dx if piece.local is None else add_tiles(dx, piece.local, rows)
    return dx, blocks.sum_groups(blocks.matmul_heads(ds, x), y.shape[1]), dz, *more
