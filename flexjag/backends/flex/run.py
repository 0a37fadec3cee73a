"""Compiled ``flex_attention``: one fused kernel for any mask and score."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexjag.backends.flex import options as flex_options
from flexjag.errors import BackendError
from flexjag.lowering.outline import mark_sizes
from flexjag.lowering.recipe import Recipe
from flexjag.offsets import mark_varying
from flexjag.upstream import (
    ROWS,
    fence,
    mend_cpu_flex_rows,
    mend_cpu_flex_size_names,
    mend_flex_negative_indices,
    mend_flex_short_queries,
)

Pair = tuple[Tensor, Tensor | None]
_numbers = itertools.count()

# At import, because Dynamo cannot trace them and a graph may be the first to come here.
mend_cpu_flex_size_names()
mend_cpu_flex_rows()
mend_flex_negative_indices()
mend_flex_short_queries()


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Inside a graph that is being traced the kernel becomes part of it; otherwise it is compiled once per structure.

    Returns:
        ``[T_q, H, E]`` and, if wanted, the log-sum-exp ``[T_q, H]`` in float32.

    Raises:
        BackendError: If the CPU kernel would not compute the user's functions as written.
    """
    if torch.compiler.is_compiling():
        return _attend(q, k, v, recipe, scale, need_lse)
    _mark(q, k, v, recipe)
    compiled = _compiled((_structure(recipe, q, k, v), scale, need_lse))
    try:
        return compiled(q, k, v, recipe, scale, need_lse)
    except RuntimeError as reason:
        if ROWS in str(reason):  # seen in the graph only
            raise BackendError(f"backend: 'flex' cannot run this plan: {ROWS}, as a function in it does") from reason
        raise


def with_options(options: Mapping[str, Any]) -> Callable[..., Pair]:
    """A compiled function like :func:`run` in which `options` override the built-in ones, to measure them.

    Args:
        options: FlexAttention's kernel options; ignored on a CPU.
    """
    compiled = _compile(f"attend_with_options_{next(_numbers)}")

    def attend(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_lse: bool) -> Pair:
        _mark(q, k, v, recipe)
        return compiled(q, k, v, recipe, scale, need_lse, options)

    return attend


def _mark(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> None:
    """Mark the sizes that vary from batch to batch as dynamic."""
    mark_sizes(recipe)
    for x in (q, k, v):
        mark_varying(x, 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    scale: float,
    need_lse: bool,
    options: Mapping[str, Any] | None = None,
) -> Pair:
    on_cpu = not recipe.layout.on_gpu
    if on_cpu:
        chosen = None
    elif options is None:
        chosen = flex_options.kernel_options(recipe, q, v, need_lse)
    else:
        chosen = {**flex_options.built_in(recipe, q, v), **options}
    keywords: dict[str, Any] = {
        "score_mod": recipe.score_mod,
        "block_mask": recipe.block_mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": chosen,
    }
    x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
    if on_cpu:
        x, y, z = (fence(t) for t in (x, y, z))
    lse = None
    if need_lse:
        out, aux = flex_attention(x, y, z, return_aux=AuxRequest(lse=True), **keywords)
        assert aux.lse is not None
        lse = aux.lse[0].transpose(0, 1)
    else:
        out = flex_attention(x, y, z, **keywords)
    if on_cpu:
        out = fence(out)
    return out[0].transpose(0, 1), lse


@cache
def _compiled(structure: Hashable) -> Callable[..., Pair]:
    """A separately compiled `_attend` for each structure.

    Dynamo keeps its graphs by code object and gives up after a few, so structures must not share one: the ninth mask of
    a session would otherwise be an error.
    """
    return _compile(f"attend_{abs(hash(structure)):x}")


def _compile(name: str) -> Callable[..., Pair]:
    """Compile a copy of `_attend` under a new name."""
    code = _attend.__code__.replace(co_name=name)
    own = types.FunctionType(code, _attend.__globals__, name, _attend.__defaults__)
    return torch.compile(own, fullgraph=True)


def _structure(recipe: Recipe, *tensors: Tensor) -> Hashable:
    """The key of a compiled kernel: nodes, span counts, block size, and the tensors' heads, dims and dtypes."""
    spans = tuple((x.outer.count, x.exact) for x in recipe.sandwiches)
    score = None if recipe.score is None else recipe.score.structure()
    shapes = tuple((x.shape[1:], x.dtype, x.device.type, x.requires_grad) for x in tensors)
    return recipe.mask.structure(), score, spans, recipe.block_size, recipe.layout.is_self, shapes
