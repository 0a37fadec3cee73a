"""The C++ functions of a plan: its mask where spans do not say it all, its score, and the normalizer's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.algebra.tree import tensors_along
from flexjag.backends.normalized import pointwise
from flexjag.backends.printed import Printed, once, rest_mod
from flexjag.lowering import mods
from flexjag.lowering.recipe import Recipe
from flexjag.printing import Cpp, emit_gradient, emit_mask, emit_score, emit_slopes, read, trace
from flexjag.printing.emit import Traced
from flexjag.printing.program import needed, reads


def printed(recipe: Recipe, dtype: torch.dtype) -> Printed:
    """The source of a plan's functions of scores in a dtype, and what they read."""
    plain = recipe.score is None and not isinstance(recipe.normalizer, nz.Pointwise) and recipe.exact
    if plain and not torch.compiler.is_compiling():
        return _plain(_kind(recipe.normalizer), dtype)

    def write(is_checked: bool) -> Printed:
        traced = trace(rest_mod(recipe), _weight_mod(recipe), is_checked, dtype)
        unshared = () if is_checked else tuple([i for i in traced.learned if _is_unshared(traced.captures[i], recipe)])
        return Printed(
            _text(traced, _kind(recipe.normalizer)),
            traced.captures,
            traced.numbers,
            traced.learned,
            unshared,
            reads_head(traced),
        )

    return once(recipe, f"cpp, {dtype}", write)


@cache
def _plain(kind: str, dtype: torch.dtype) -> Printed:
    """The source where spans say all and scores stay as they are: the same for all plans."""
    traced = trace(None, None, False, dtype)
    return Printed(_text(traced, kind), traced.captures, traced.numbers, traced.learned)


def _text(traced: Traced, kind: str) -> str:
    language = Cpp()
    parts = [
        f"constexpr Normalizer NORMALIZER = Normalizer::{kind};\n",
        emit_mask(traced, language, "mask"),
        emit_score(traced, language, "score"),
        emit_gradient(traced, language, "dscore"),
        emit_slopes(traced, language, "slopes"),
    ]
    return "\n\n".join(parts)


def _is_unshared(capture: Tensor, recipe: Recipe) -> bool:
    """True if no two segments or heads read the same entry of a capture: one for each pair and head of the batch."""
    held = [x for x in tensors_along(recipe.kernel_score) if x.tensor is capture]
    return bool(held) and all(x.axis == "pair" and x.of_batch and x.heads is not None for x in held)


def reads_head(traced: Traced) -> bool:
    """True if a program's mask reads the head."""
    return reads(needed(traced.program, [traced.allowed]), traced.at[0])


def _kind(normalizer: nz.Normalizer) -> str:
    """Name of a normalizer's kind in ``kernels/call.h``."""
    kinds = {nz.Softmax: "softmax", nz.Pointwise: "pointwise", nz.StickBreaking: "stick_breaking"}
    return next(name for kind, name in kinds.items() if isinstance(normalizer, kind))


def _weight_mod(recipe: Recipe) -> Callable[..., Any] | None:
    """The score on packed indices; for a pointwise normalizer its function of the score, which is the weight."""
    score = mods.score_mod(recipe.kernel_score, replace(recipe.tables, look_up=read))
    normalizer = recipe.normalizer
    if not isinstance(normalizer, nz.Pointwise):
        return score
    biased, function = pointwise.weighed(normalizer, score, recipe.layout, read), pointwise.activation(normalizer).fn
    return lambda s, b, h, q, kv: function(s if biased is None else biased(s, b, h, q, kv))
