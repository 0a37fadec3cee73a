"""Attention by the plan's C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.normalizers import Pointwise, StickBreaking
from flexjag.backends.cpp.operator import attend
from flexjag.backends.cpp.source import printed
from flexjag.backends.normalized.pieces import own_key
from flexjag.backends.normalized.run import own_values, scaled
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.spans import Spans, intersect
from flexjag.lowering.tiles import spans_of_tiles

SPANS = "spans within tiles"
"""Key of the spans in a recipe's notes."""


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and ``[T_q, H]`` in at least float32: the log-sum-exp of a softmax, the remainder
        of stick-breaking, unspecified values otherwise.
    """
    normalizer, dtype = recipe.normalizer, q.dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    recipe = recipe.learning_in(acc)
    factor, per_row = 1.0, None
    if isinstance(normalizer, Pointwise):
        per_row = normalizer.scale if isinstance(normalizer.scale, Tensor) else None
        factor = factor if isinstance(normalizer.scale, Tensor) else float(normalizer.scale)
    remainder = isinstance(normalizer, StickBreaking) and normalizer.remainder
    if per_row is not None or remainder:  # what is changed afterwards is not rounded before
        q, k, v = q.to(acc), k.to(acc), v.to(acc)
    text, layout = printed(recipe, acc), recipe.layout
    offsets, spans = [layout.q_offsets, layout.kv_offsets], _without_own(spans_of(recipe), own_key(recipe))
    out, rest = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, offsets, spans, recipe.head_of, scale, factor
    )
    rest = rest.t()
    if per_row is not None:
        out = scaled(out, per_row, acc)
    elif remainder:
        out = out + rest[..., None] * own_values(v, q.shape[1], layout)
    return out.to(dtype), rest


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


def _without_own(spans: list[Spans], own: Tensor | None) -> list[Tensor]:
    """Starts and ends of spans; they end before each row's `own` key, if any, as no key of a row is later."""
    ends = {id(x.hi): x.hi if own is None else torch.minimum(x.hi, own) for x in spans}
    return [t for x in spans for t in (x.lo, ends[id(x.hi)])]
