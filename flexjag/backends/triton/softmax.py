"""Softmax attention with our own Triton kernels, as custom operators that a graph can hold.

The kernels compute the gradients of q, k and v. Those of a score's learned tensors are summed in plain torch over
chunks of recomputed tiles: deterministic, but slower than the kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from flexjag.backends.base import FIRST_ORDER
from flexjag.backends.printed import Printed, once, rest_mod, savable
from flexjag.backends.triton.modules import emit
from flexjag.backends.triton.softmax_tables import key_items, query_items, spans_of
from flexjag.errors import DifferentiationError
from flexjag.lowering import mods
from flexjag.lowering.outline import with_tiles
from flexjag.lowering.recipe import Recipe
from flexjag.printing import read


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and the log-sum-exp ``[T_q, H]`` in float32. Spare rows are not written.
    """
    from flexjag.backends.triton.softmax_launch import heights_of, packed_heads

    recipe = recipe.learning_in(torch.float32)
    text, width = printed(recipe), max(q.shape[2], v.shape[2])
    pack = packed_heads(q.shape[1] // k.shape[1], recipe.head_of is not None)
    items = query_items(recipe, heights_of("forward", q.dtype, width, pack))
    keys = key_items(recipe, heights_of("keys", q.dtype, width, pack))
    if text.learned and recipe.made_tiles is None:
        recipe = with_tiles(recipe)
    tiles = [recipe.tiles.all_heads.row, recipe.tiles.all_heads.col] if text.learned else []
    mask_of = None if recipe.head_of is None else savable([recipe.head_of])[0]
    return attend(
        q, k, v, savable(text.captures), text.learned, text.numbers, text.source, spans_of(recipe), mask_of, items,
        keys, savable(tiles), recipe.block_size, scale,
    )  # fmt: skip


def printed(recipe: Recipe) -> Printed:
    """The source of the part of the plan's mask that its spans leave open, and of its score."""

    def write(is_checked: bool) -> Printed:
        score = mods.score_mod(recipe.kernel_score, replace(recipe.tables, look_up=read))
        return emit(rest_mod(recipe), score, is_checked)

    return once(recipe, "triton", write)


@torch.library.custom_op("flexjag::softmax_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    spans: Tensor,
    mask_of: Tensor | None,
    items: list[Tensor],
    keys: list[Tensor],
    tiles: list[Tensor],
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by a plan's printed functions and its spans.

    Args:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        captures: Tensors that the printed functions read.
        learned: Indices of the captures that need gradients.
        numbers: Integers that they read.
        source: The printed functions.
        spans: ``[masks, kinds, K, T_q]`` int32, of :func:`~flexjag.backends.triton.softmax_tables.spans_of`.
        mask_of: ``[H]`` int32, the mask of each head; None for the first.
        items: Items of queries, of each height.
        keys: Items of keys, of each height.
        tiles: Rows and columns of the plan's tiles, for learned captures; else empty.
        block: Size of those tiles, in tokens.
        scale: Factor on ``q·k``.

    Returns:
        ``[T_q, H, E]``, and the log-sum-exp ``[T_q, H]`` in float32.
    """
    from flexjag.backends.triton.softmax_launch import Call, run_forward

    return run_forward(Call(q, k, v, captures, numbers, source, spans, mask_of, scale), items, *_empty(q, v))


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("flexjag::softmax_attention_backward", mutates_args=())
def differentiate(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int],
    numbers: list[int],
    source: str,
    spans: Tensor,
    mask_of: Tensor | None,
    items: list[Tensor],
    keys: list[Tensor],
    tiles: list[Tensor],
    block: int,
    scale: float,
) -> list[Tensor]:
    """The gradients of q, k, v and the `learned` captures of :func:`attend`."""
    from flexjag.backends.triton.softmax_launch import Call, run_backward
    from flexjag.backends.triton.softmax_learned import learned_gradients

    call = Call(q, k, v, captures, numbers, source, spans, mask_of, scale)
    *grads, delta = run_backward(call, grad, grad_lse, out, lse, items, keys)
    found = learned_gradients(call, learned, grad, lse, delta, tiles, block) if learned else []
    return [*grads, *found]


@differentiate.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> list[Tensor]:
    captures, learned = rest[:2]
    like = (q, k, v, *(captures[i] for i in learned))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise DifferentiationError(FIRST_ORDER.format("triton"))


differentiate.register_autograd(_refuse)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, learned, numbers, source, spans, mask_of, items, keys, tiles, block, scale = inputs
    ctx.save_for_backward(q, k, v, *output, spans, mask_of, *captures, *items, *keys, *tiles)
    ctx.sizes = [7, len(captures), len(items), len(keys), len(tiles)]
    ctx.learned, ctx.numbers, ctx.source, ctx.rest = learned, numbers, source, (block, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    ends = list(itertools.accumulate(ctx.sizes, initial=0))
    saved = ctx.saved_tensors  # once: checkpointing gives them away
    (q, k, v, out, lse, spans, mask_of), captures, items, keys, tiles = (
        list(saved[a:b]) for a, b in itertools.pairwise(ends)
    )
    by_capture: list[Tensor | None] = [None] * len(captures)
    dq = dk = dv = None
    if grad is not None or grad_lse is not None:
        grad = torch.zeros_like(out) if grad is None else grad.to(q.dtype)
        dq, dk, dv, *found = differentiate(
            grad, grad_lse, out, lse, q, k, v, captures, ctx.learned, ctx.numbers, ctx.source, spans, mask_of, items,
            keys, tiles, *ctx.rest,
        )  # fmt: skip
        for i, x in zip(ctx.learned, found, strict=True):
            by_capture[i] = x
    none = None if ctx.learned else []  # an empty list of numbers is taken for one of tensors
    nothing = [None] * len(items), [None] * len(keys), [None] * len(tiles)
    return dq, dk, dv, by_capture or [], none, None, None, None, None, *nothing, None, None


attend.register_autograd(_backward, setup_context=_remember)
