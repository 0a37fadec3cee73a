"""Attention by any normalizer, with our own Triton kernels."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from flexjag.algebra.normalizers import Softmax, StickBreaking
from flexjag.backends.triton import pointwise, softmax, stick_breaking
from flexjag.lowering.outline import with_tiles
from flexjag.lowering.recipe import Recipe


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``; T_q and T_kv not 0.

    Returns:
        ``[T_q, H, E]`` in q's dtype, and ``[T_q, H]`` in float32: the log-sum-exp of a softmax, the remainder of
        stick-breaking, unspecified values else.
    """
    kind = kind_of(recipe)
    if recipe.made_tiles is None and kind is not softmax:  # which needs none, unless a score learns
        recipe = with_tiles(recipe)
    return kind.run(q, k, v, recipe, scale, need_rest)


def kind_of(recipe: Recipe) -> ModuleType:
    """The module with the kernels for a recipe's normalizer."""
    if isinstance(recipe.normalizer, Softmax):
        return softmax
    return stick_breaking if isinstance(recipe.normalizer, StickBreaking) else pointwise
