"""Attention by the plan's C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.normalizers import Pointwise, StickBreaking
from flexjag.backends.cpp.operator import attend
from flexjag.backends.cpp.source import printed
from flexjag.backends.normalized.pieces import own_key
from flexjag.backends.normalized.run import own_values, scaled
from flexjag.backends.printed import savable
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.spans import Spans, intersect
from flexjag.lowering.tiles import spans_of_tiles

WITHIN = "spans of tiles"
"""Key of the tiles' spans in a recipe's notes."""


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
    spans = [x for one in spans_of(recipe) for x in (one.lo, one.hi)]
    offsets = [layout.q_offsets, layout.kv_offsets]
    captures, offsets, spans = (savable(x) for x in (text.captures, offsets, spans))
    mask_of = None if recipe.head_of is None else savable([recipe.head_of])[0]
    out, rest = attend(
        q, k, v, captures, text.learned, text.numbers, text.source, offsets, spans, mask_of, scale, factor
    )
    rest = rest.t()
    if per_row is not None:
        out = scaled(out, per_row, acc)
    elif remainder:
        out = out + rest[..., None] * own_values(v, q.shape[1], layout)
    return out.to(dtype), rest


def spans_of(recipe: Recipe) -> list[Spans]:
    """The outer and inner spans of each distinct mask, without each row's own key if that is excluded.

    Where a predicate decides, the outer spans are cut to the plan's tiles.
    """
    within = None
    if not recipe.exact and recipe.made_tiles is not None and recipe.layout.may_look:
        if WITHIN not in recipe.notes:
            sizes = recipe.layout.num_q, recipe.layout.num_kv, recipe.block_size
            recipe.notes[WITHIN] = spans_of_tiles(recipe.tiles.all_heads, *sizes)
        within = recipe.notes[WITHIN]
    own, found = own_key(recipe), []
    for sandwich in recipe.sandwiches:
        outer = sandwich.outer
        if within is not None and not sandwich.exact:
            outer, _ = intersect(outer, within, widen=True)
        outer = _before(outer, own)
        found += [outer, outer if sandwich.exact else _before(sandwich.inner, own)]
    return found


def _before(spans: Spans, key: Tensor | None) -> Spans:
    """The spans up to each row's own key, which is their last one; all of them without a key."""
    return spans if key is None else Spans(spans.lo, torch.minimum(spans.hi, key))
