"""Attention by a pointwise normalizer, with our own Triton kernels.

The plan's mask and score are printed (:mod:`flexjag.backends.triton.modules`), and the source is an argument of the
operators: they need no Python functions, and a traced graph holds the whole computation.

The kernels compute the gradients of q, k and v. Those of learned tensors of a score or the normalizer's bias are summed
in plain torch over chunks of recomputed tiles: deterministic, on any device, but slower than the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.backends import blocks
from flexjag.backends.gathers import add_at
from flexjag.backends.normalized import pointwise
from flexjag.backends.normalized.run import scaled
from flexjag.backends.printed import Printed, once
from flexjag.backends.triton.modules import emit, load
from flexjag.lowering import mods
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.tiles import TileTable
from flexjag.printing import read

NORMALIZERS: dict[str, nz.Pointwise] = {
    "silu": nz.SiLU(),
    "gelu": nz.GELU(),
    "gelu_tanh": nz.GELU(approximate="tanh"),
    "identity": nz.Identity(),
    "sigmoid": nz.Sigmoid(0.0),
}
"""The normalizers with kernels, by the kernels' names for their functions."""


def name_of(normalizer: nz.Normalizer) -> str:
    """The kernels' name for a pointwise normalizer's function."""
    if isinstance(normalizer, nz.GELU):
        return "gelu" if normalizer.approximate == "none" else "gelu_tanh"
    return {nz.SiLU: "silu", nz.Identity: "identity", nz.Sigmoid: "sigmoid"}[type(normalizer)]


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and an unspecified tensor.
    """
    text = printed(recipe)
    tables, transposed = tables_of(recipe)
    tiles = [recipe.tiles.all_heads.row, recipe.tiles.all_heads.col]
    normalizer, name = recipe.normalizer, name_of(recipe.normalizer)
    assert isinstance(normalizer, nz.Pointwise)
    is_wide = isinstance(normalizer.scale, Tensor)
    factor = 1.0 if isinstance(normalizer.scale, Tensor) else float(normalizer.scale)
    out = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, tables, transposed, tiles, name,
        scale, factor, recipe.block_size, is_wide,
    )  # fmt: skip
    return (scaled(out, normalizer.scale, torch.float32).to(q.dtype) if is_wide else out), out


def printed(recipe: Recipe) -> Printed:
    """The source of the plan's mask and score, the normalizer's bias included."""

    def write(is_checked: bool) -> Printed:
        score = mods.score_mod(recipe.kernel_score, replace(recipe.tables, look_up=read))
        if isinstance(recipe.normalizer, nz.Pointwise):
            score = pointwise.weighed(recipe.normalizer, score, recipe.layout, read)
        return emit(recipe.mask_mod, score, is_checked)

    return once(recipe, "triton", write)


def tables_of(recipe: Recipe) -> tuple[list[Tensor], list[Tensor]]:
    """Counts and indices of the PARTIAL tiles, then of the FULL ones: of each row, and of each column."""
    of_rows, of_columns = (recipe.tiles.kv_partial, recipe.tiles.kv_full), (recipe.tiles.q_partial, recipe.tiles.q_full)
    return [x for t in of_rows for x in _table(t)], [x for t in of_columns for x in _table(t)]


def _table(table: TileTable) -> list[Tensor]:
    """The counts ``[heads, rows]`` and the tiles ``[heads, rows, width]`` of a table, without its overlaps."""
    heads, rows, _ = table.index.shape[1:]
    stride, width = table.index.stride(1), table.index.stride(2)
    return [table.count[0], table.index.as_strided((heads, rows, width), (stride, width, 1))]


@torch.library.custom_op("flexjag::pointwise", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    tables: list[Tensor],
    transposed: list[Tensor],
    tiles: list[Tensor],
    name: str,
    scale: float,
    factor: float,
    block: int,
    is_wide: bool,
) -> Tensor:
    """Attention by a pointwise normalizer, without its scales per row.

    Args:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        captures: Tensors that the printed functions read.
        learned: Indices of the captures that need gradients.
        numbers: Integers that they read.
        source: The printed functions.
        tables: Counts and indices of the PARTIAL tiles of each row, then of the FULL ones.
        transposed: The same tables by column.
        tiles: Rows and columns of the tiles of all heads' union.
        name: Name of the normalizer's function, as in `NORMALIZERS`.
        scale: Factor on ``q·k``.
        factor: Factor on the output.
        block: Tile size, in tokens.
        is_wide: Return the output in float32.

    Returns:
        ``[T_q, H, E]``.
    """
    from flexjag.backends.triton.pointwise_launch import pointwise_out

    out = _empty_out(q, v, is_wide)
    rest = {"name": name, "scale": scale, "factor": factor, "tile": block}
    return pointwise_out(q, k, v, out, captures, numbers, source, tables, **rest)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return _empty_out(q, v, rest[-1])


def _empty_out(q: Tensor, v: Tensor, is_wide: bool) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32 if is_wide else q.dtype)


@torch.library.custom_op("flexjag::pointwise_backward", mutates_args=())
def differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    numbers: list[int],
    source: str,
    tables: list[Tensor],
    transposed: list[Tensor],
    name: str,
    scale: float,
    factor: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of :func:`attend`."""
    from flexjag.backends.triton.pointwise_launch import pointwise_gradients

    rest = {"name": name, "scale": scale, "factor": factor, "tile": block}
    return pointwise_gradients(grad, q, k, v, captures, numbers, source, tables=tables, transposed=transposed, **rest)


@differentiate.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@torch.library.custom_op("flexjag::pointwise_learned", mutates_args=())
def differentiate_learned(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    tiles: list[Tensor],
    name: str,
    scale: float,
    factor: float,
    block: int,
) -> list[Tensor]:
    """The gradients of the `learned` captures of :func:`attend`, in plain torch."""
    functions, act = load(source), pointwise.activation(NORMALIZERS[name])
    assert act.backward is not None

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return functions.plain_mask(h, i, j, captures, numbers)

    p = blocks.TiledCall(tiles[0], tiles[1], block, q.shape[0], k.shape[0], scale, allowed, None)
    heads = q.shape[1]
    totals = [torch.zeros(captures[i].numel(), dtype=torch.float32, device=q.device) for i in learned]
    with torch.autocast(q.device.type, enabled=False):
        x, g, y, z = (
            blocks.to_blocks(t.float(), n, block)
            for t, n in ((q, p.rows), (grad, p.rows), (k, p.cols + 1), (v, p.cols + 1))
        )
        step = blocks.tiles_at_once(q.device, heads, block)
        for row, col in zip(tiles[0].split(step), tiles[1].split(step), strict=True):
            at = blocks.indices(p, row, col, heads)
            raw = blocks.matmul(x[row] * scale, y[col].transpose(2, 3))
            s = functions.plain_score(raw, *at[1:], captures, numbers)
            banned = ~blocks.allowed_in(p, row, col, at)
            dw = blocks.matmul(g[row], z[col].transpose(2, 3))
            ds = act.backward(dw, s, act.fn(s)).masked_fill_(banned, 0.0)
            for i, index, slope in functions.plain_slopes(raw, *at[1:], captures, numbers):
                add_up(totals[learned.index(i)], index, (ds * slope).masked_fill_(banned, 0.0))
    return [t.mul_(factor).view(captures[i].shape).to(captures[i].dtype) for t, i in zip(totals, learned, strict=True)]


@differentiate_learned.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], learned: list[int], *rest: Any):  # type: ignore[no-untyped-def]
    return [torch.empty_like(captures[i], memory_format=torch.contiguous_format) for i in learned]


def add_up(total: Tensor, index: Tensor, x: Tensor) -> None:
    """Add ``[N, H, B, B]`` at flat indices that broadcast to it, in order."""
    index = index.reshape([1] * (x.ndim - index.ndim) + list(index.shape))
    shared = [d for d in range(x.ndim) if index.shape[d] == 1]
    add_at(total, index.flatten(), (x.sum(shared) if shared else x).flatten().to(total.dtype))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, captures, learned, numbers, source, tables, transposed, tiles, *rest = inputs
    ctx.save_for_backward(q, k, v, *captures, *tables, *transposed, *tiles)
    ctx.sizes = [len(x) for x in (captures, tables, transposed, tiles)]
    ctx.learned, ctx.numbers, ctx.source, ctx.rest = learned, numbers, source, rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, *others = ctx.saved_tensors
    captures, tables, transposed, tiles = _split(others, ctx.sizes)
    name, scale, factor, block, _ = ctx.rest
    if q.dtype == torch.float16:  # a small factor keeps products in its range
        grad, factor = grad * factor, 1.0
    grad = grad.to(q.dtype)
    same = (captures, ctx.numbers, ctx.source)
    dq, dk, dv = differentiate(grad, q, k, v, *same, tables, transposed, name, scale, factor, block)
    by_capture: list[Tensor | None] = [None] * len(captures)
    if ctx.learned:
        found = differentiate_learned(
            grad, q, k, v, captures, ctx.learned, ctx.numbers, ctx.source, tiles, name, scale, factor, block
        )
        for i, x in zip(ctx.learned, found, strict=True):
            by_capture[i] = x
    nothing = ([None] * len(tables), [None] * len(transposed), [None] * len(tiles))
    none = None if ctx.learned else []  # an empty list of numbers is taken for one of tensors
    return (dq, dk, dv, by_capture, none, None, None, *nothing, None, None, None, None, None)


def _split(x: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(x[a:b]) for a, b in itertools.pairwise(ends)]


attend.register_autograd(_backward, setup_context=_remember)
