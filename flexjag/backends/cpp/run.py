"""Attention by the plan's C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.normalizers import Pointwise
from flexjag.backends.cpp.operator import attend
from flexjag.backends.cpp.source import printed
from flexjag.backends.normalized.run import scaled
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.spans import Spans, intersect
from flexjag.lowering.tiles import spans_of_tiles

SPANS = "spans within tiles"
"""Key of the spans in a recipe's notes."""


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and the log-sum-exp ``[T_q, H]`` of a softmax in at least float32.
    """
    normalizer, dtype = recipe.normalizer, q.dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    recipe = recipe.learning_in(acc)
    factor, per_row = 1.0, None
    if isinstance(normalizer, Pointwise):
        per_row = normalizer.scale if isinstance(normalizer.scale, Tensor) else None
        factor = factor if isinstance(normalizer.scale, Tensor) else float(normalizer.scale)
    if per_row is not None:  # what it multiplies is not rounded before
        q, k, v = q.to(acc), k.to(acc), v.to(acc)
    text, layout = printed(recipe, acc), recipe.layout
    spans = [x for one in spans_of(recipe) for x in (one.lo, one.hi)]
    offsets = [layout.q_offsets, layout.kv_offsets]
    out, rest = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, offsets, spans, recipe.head_of, scale, factor
    )
    return (out if per_row is None else scaled(out, per_row, acc).to(dtype)), rest.t()


def spans_of(recipe: Recipe) -> list[Spans]:
    """The outer and inner spans of each distinct mask, cut to the plan's tiles where a predicate decides."""
    if recipe.exact or recipe.made_tiles is None or not recipe.layout.may_look:
        return [x for s in recipe.sandwiches for x in (s.outer, s.inner)]
    if SPANS not in recipe.notes:
        layout = recipe.layout
        within = spans_of_tiles(recipe.tiles.all_heads, layout.num_q, layout.num_kv, recipe.block_size)
        recipe.notes[SPANS] = [
            x
            for s in recipe.sandwiches
            for x in ((s.outer if s.exact else intersect(s.outer, within, widen=True)[0]), s.inner)
        ]
    return recipe.notes[SPANS]
