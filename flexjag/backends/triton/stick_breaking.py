"""Stick-breaking attention with our own Triton kernels, as custom operators that a graph can hold.

The kernels compute the gradients of q, k and v. Those of a score's learned tensors are summed in plain torch over
chunks of recomputed tiles: deterministic, but slower than the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.backends.normalized.pieces import own_key, tested
from flexjag.backends.normalized.run import own_values
from flexjag.backends.printed import Printed, once
from flexjag.backends.triton.modules import emit
from flexjag.lowering import mods
from flexjag.lowering.recipe import Recipe
from flexjag.printing import read


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and the remainder ``[T_q, H]`` in float32.
    """
    normalizer = recipe.normalizer
    assert isinstance(normalizer, nz.StickBreaking)
    text = printed(recipe)
    out, left = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, tiles_of(recipe), scale, recipe.block_size,
        recipe.layout.is_self, normalizer.remainder,
    )  # fmt: skip
    left = torch.exp(left)
    if normalizer.remainder:
        out = (out + left[..., None] * own_values(v.float(), q.shape[1], recipe.layout)).to(q.dtype)
    return out, left


def printed(recipe: Recipe) -> Printed:
    """The source of the plan's mask, without each query's own key if the normalizer excludes it, and of its score."""

    def write(is_checked: bool) -> Printed:
        score = mods.score_mod(recipe.kernel_score, replace(recipe.tables, look_up=read))
        return emit(tested(recipe, own_key(recipe)), score, is_checked)

    return once(recipe, "triton", write)


def tiles_of(recipe: Recipe) -> list[Tensor]:
    """The tiles of the union of all heads' masks: row, column, full and live, each ``[N]``."""
    tiles = recipe.tiles.all_heads
    # In self-attention a tile with a key that some query lines up with has later keys, so it is not FULL anyway.
    assert isinstance(recipe.normalizer, nz.StickBreaking)
    is_masked = not recipe.normalizer.attend_current and not recipe.layout.is_self
    return [tiles.row, tiles.col, torch.zeros_like(tiles.full) if is_masked else tiles.full, tiles.live]


@torch.library.custom_op("flexjag::stick_breaking", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    tiles: list[Tensor],
    scale: float,
    block: int,
    is_self: bool,
    is_wide: bool,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention without adding the remainder.

    Args:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        captures: Tensors that the printed functions read.
        learned: Indices of the captures that need gradients.
        numbers: Integers that they read.
        source: The printed functions.
        tiles: As :func:`tiles_of` lists them.
        scale: Factor on ``q·k``.
        block: Tile size.
        is_self: No row has a key of a larger packed index, as in self-attention.
        is_wide: Return the output in float32.

    Returns:
        ``[T_q, H, E]``, and the log of the remainder, ``[T_q, H]`` float32.
    """
    from flexjag.backends.triton.stick_breaking_launch import Call, run_forward

    return run_forward(Call(q, k, v, captures, numbers, source, tiles, scale, block, is_self), *_empty(q, v, is_wide))


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v, rest[-1])


def _empty(q: Tensor, v: Tensor, is_wide: bool) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32 if is_wide else q.dtype)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("flexjag::stick_breaking_backward", mutates_args=())
def differentiate(
    grad: Tensor,
    grad_left: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    tiles: list[Tensor],
    scale: float,
    block: int,
    is_self: bool,
) -> list[Tensor]:
    """The gradients of q, k and v of :func:`attend`, and of the captures that need them."""
    from flexjag.backends.triton.stick_breaking_launch import Call, run_backward

    call = Call(q, k, v, captures, numbers, source, tiles, scale, block, is_self)
    return run_backward(call, grad, grad_left, learned)


@differentiate.register_fake
def _(
    grad: Tensor,
    grad_left: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    *rest: Any,
) -> list[Tensor]:
    like = (q, k, v, *(captures[i] for i in learned))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, learned, numbers, source, tiles, scale, block, is_self, _ = inputs
    ctx.save_for_backward(q, k, v, *captures, *tiles)
    ctx.learned, ctx.numbers, ctx.source, ctx.rest = learned, numbers, source, (scale, block, is_self)


def _backward(ctx: Any, grad: Tensor, grad_left: Tensor) -> tuple[Any, ...]:
    q, k, v, *captures = ctx.saved_tensors
    captures, tiles = captures[:-4], captures[-4:]
    dq, dk, dv, *found = differentiate(
        grad, grad_left, q, k, v, captures, ctx.learned, ctx.numbers, ctx.source, tiles, *ctx.rest
    )
    by_capture: list[Tensor | None] = [None] * len(captures)
    for i, x in zip(ctx.learned, found, strict=True):
        by_capture[i] = x
    none = None if ctx.learned else []  # an empty list of numbers is taken for one of tensors
    return (dq, dk, dv, by_capture, none, None, None, [None] * len(tiles), None, None, None, None)


attend.register_autograd(_backward, setup_context=_remember)
