"""Attention by the plan's C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.normalizers import Pointwise
from flexjag.backends.cpp.operator import attend
from flexjag.backends.cpp.source import printed
from flexjag.backends.normalized.run import scaled
from flexjag.lowering.recipe import Recipe


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
    spans = [x for s in recipe.sandwiches for x in (s.outer.lo, s.outer.hi, s.inner.lo, s.inner.hi)]
    offsets = [layout.q_offsets, layout.kv_offsets]
    out, rest = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, offsets, spans, recipe.head_of, scale, factor
    )
    return (out if per_row is None else scaled(out, per_row, acc).to(dtype)), rest.t()
