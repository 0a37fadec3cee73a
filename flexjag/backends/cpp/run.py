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
    offsets = [layout.q_offsets, layout.kv_offsets]
    out, rest = attend(
        q, k, v, text.captures, text.learned, text.numbers, text.source, offsets, _spans(recipe), recipe.head_of, scale,
        factor,
    )  # fmt: skip
    rest = rest.t()
    if per_row is not None:
        out = scaled(out, per_row, acc)
    elif remainder:
        out = out + rest[..., None] * own_values(v, q.shape[1], layout)
    return out.to(dtype), rest


def _spans(recipe: Recipe) -> list[Tensor]:
    """Per distinct mask starts and ends of outer and of inner spans, without each row's own key if that is excluded."""
    own = own_key(recipe)
    spans = []
    for sandwich in recipe.sandwiches:
        hi = sandwich.outer.hi, sandwich.inner.hi
        if own is not None:  # the mask allows no later key
            last = torch.minimum(hi[0], own)
            hi = last, last if hi[1] is hi[0] else torch.minimum(hi[1], own)
        spans += [sandwich.outer.lo, hi[0], sandwich.inner.lo, hi[1]]
    return spans
