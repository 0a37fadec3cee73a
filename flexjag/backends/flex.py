"""Compiled ``flex_attention``: one fused kernel for any mask and score."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexjag.backends import flex_options
from flexjag.jagged import mark_varying
from flexjag.plan import Plan, mark_plan
from flexjag.upstream import fence, mend_cpu_flex_size_names

Pair = tuple[Tensor, Tensor | None]

mend_cpu_flex_size_names()  # at import, because Dynamo cannot trace it and a graph may be the first to come here


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Inside a graph that is being traced the kernel becomes part of it; otherwise it is compiled once per structure.

    Returns:
        ``[T_q, H, E]`` and, if wanted, the log-sum-exp ``[T_q, H]`` in float32.
    """
    if torch.compiler.is_compiling():
        return _attend(q, k, v, plan, scale, need_lse)
    mark_plan(plan)
    for x in (q, k, v):
        mark_varying(x, 0)
    return _compiled((_structure(plan, q, k, v), scale, need_lse))(q, k, v, plan, scale, need_lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need_lse: bool) -> Pair:
    on_cpu = not plan.layout.on_gpu
    keywords: dict[str, Any] = {
        "score_mod": plan.score_mod,
        "block_mask": plan.block_mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": None if on_cpu else flex_options.kernel_options(plan, q, v),
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
    """A compiled `_attend` of its own for each structure.

    Dynamo keeps its graphs by code object and gives up after a few, so structures must not share one: the ninth mask of
    a session would otherwise be an error.
    """
    name = f"attend_{abs(hash(structure)):x}"
    own = types.FunctionType(_attend.__code__.replace(co_name=name), _attend.__globals__, name)
    return torch.compile(own, fullgraph=True)


def _structure(plan: Plan, *tensors: Tensor) -> Hashable:
    """What decides the kernel: nodes, span counts, block size, and the tensors' heads, dims and dtypes."""
    spans = tuple((x.outer.count, x.exact) for x in plan.sandwiches)
    score = None if plan.score is None else plan.score.structure()
    shapes = tuple((x.shape[1:], x.dtype, x.device.type, x.requires_grad) for x in tensors)
    return plan.mask.structure(), score, spans, plan.block_size, plan.layout.is_self, shapes
