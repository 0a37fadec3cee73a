"""Attention by the plan's C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.facts import as_window
from flexjag.algebra.normalizers import Pointwise, StickBreaking
from flexjag.backends.cpp.library import UNBOUNDED, unit
from flexjag.backends.cpp.narrow import Sides, narrowed
from flexjag.backends.cpp.operator import attend, compute, problem_of
from flexjag.backends.cpp.source import printed
from flexjag.backends.normalized.pieces import excludes_own_key, own_key
from flexjag.backends.normalized.run import own_values, scaled
from flexjag.backends.printed import Printed, savable
from flexjag.kernels.cpp.build import load
from flexjag.lowering.recipe import Recipe
from flexjag.lowering.spans import Spans
from flexjag.upstream import holds_no_numbers, is_unobserved

NARROWED = "spans by the predicate"
"""Key of the spans of a mask that a predicate decides in a recipe's notes, with the number of heads evaluated."""


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
    window = _window(recipe)
    found, mask_of = ([], None) if window else _spans(recipe, text, q, v)
    spans = [x for one in found for x in (one.lo, one.hi)]
    offsets = [layout.q_offsets, layout.kv_offsets]
    captures = text.captures or offsets[:1]  # AOTInductor passes None for an empty list; nothing reads these
    captures, offsets, spans = (savable(x) for x in (captures, offsets, spans or offsets[:1]))
    mask_of = None if mask_of is None else savable([mask_of])[0]
    given = (
        captures, text.learned, text.numbers, text.source, offsets, spans, window, mask_of, scale, factor,
        list(text.unshared),
    )  # fmt: skip
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *captures))
    if not learns and is_unobserved(q, k, v, *captures):  # an operator itself takes time
        out, rest = compute(q, k, v, problem_of(*given))
    else:
        out, rest = attend(q, k, v, *given)
    rest = rest.t()
    if per_row is not None:
        out = scaled(out, per_row, acc)
    elif remainder:
        out = out + rest[..., None] * own_values(v, q.shape[1], layout)
    return out.to(dtype), rest


def _window(recipe: Recipe) -> list[int]:
    """The mask as a window of the kernels, see :class:`Problem`, which need no spans then; empty if it is none."""
    window = as_window(recipe.mask)
    if window is None:
        return []
    left, right, align = window
    if excludes_own_key(recipe.normalizer):
        right = -1  # of masks without later keys, which is what stick-breaking takes
    return [UNBOUNDED if x is None else min(x, UNBOUNDED) for x in (left, right)] + [int(align == "end")]


def _spans(recipe: Recipe, text: Printed, q: Tensor, v: Tensor) -> tuple[list[Spans], Tensor | None]:
    """The outer and inner spans of each distinct mask, without each row's own key if that is excluded.

    Where a predicate decides, the spans are found by evaluating it, once for a plan. In a traced graph, where values
    are unknown, the kernels evaluate it instead.

    Returns:
        The spans, and the mask of each head ``[H]``; None if one serves all heads.
    """
    mask_of, given = recipe.head_of, [(x.outer, x.outer if x.exact else x.inner) for x in recipe.sandwiches]
    if not recipe.exact and not holds_no_numbers(recipe.layout.q_offsets):
        key = NARROWED, q.shape[1] if text.masks_heads else 1
        if key not in recipe.notes:
            library = load(unit(text.source, q.dtype, q.shape[2], v.shape[2]))
            recipe.notes[key] = _narrowed(recipe, text, library, key[1])
        given, mask_of = recipe.notes[key]
    own, spans = own_key(recipe), []
    for outer, inner in given:
        cut = _before(outer, own)
        spans += [cut, cut if inner is outer else _before(inner, own)]
    return spans, mask_of


def _narrowed(recipe: Recipe, text: Printed, library: Any, heads: int) -> tuple[list[Sides], Tensor | None]:
    """The outer and inner spans of each distinct mask by its predicate, and the mask of each head."""
    found, mask_of = [], [0] * heads
    which = [0] * heads if recipe.head_of is None else recipe.head_of.tolist()
    for i, one in enumerate(recipe.sandwiches):
        mine, first = [h for h in range(heads) if which[h] == i], len(found)
        if one.exact:
            found.append((one.outer, one.outer))
        else:
            found += narrowed(library, text, one.outer, recipe.layout.num_kv, mine)
        for n, h in enumerate(mine):
            mask_of[h] = first if one.exact else first + n
    return found, None if heads == 1 else torch.tensor(mask_of, dtype=torch.int32, device=recipe.layout.device)


def _before(spans: Spans, key: Tensor | None) -> Spans:
    """The spans up to each row's own key, which is their last one; all of them without a key."""
    return spans if key is None else Spans(spans.lo, torch.minimum(spans.hi, key))
