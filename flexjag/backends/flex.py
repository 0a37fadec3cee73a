"""Compiled ``flex_attention``: one fused kernel for any mask and score."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexjag.plan import Plan

Pair = tuple[Tensor, Tensor | None]


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Inside a graph that is being traced the kernel becomes part of it; otherwise it is compiled once per structure.

    Returns:
        ``[T_q, H, E]`` and, if wanted, the log-sum-exp ``[T_q, H]`` in float32.
    """
    call = _attend if torch.compiler.is_compiling() else _compiled((_structure(plan, q, k, v), need_lse))
    options: dict[str, Any] = {}
    if plan.layout.device.type != "cpu" and plan.rows_have_keys:
        options["ROWS_GUARANTEED_SAFE"] = True
    x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, lse = call(x, y, z, plan.score_mod, plan.block_mask, scale, q.shape[1] != k.shape[1], need_lse, options)
    if torch.compiler.is_compiling() and plan.layout.device.type == "cpu":
        out = torch.ops.flexjag.fence(out)
    return out[0].transpose(0, 1), None if lse is None else lse[0].transpose(0, 1)


@torch.library.custom_op("flexjag::fence", mutates_args=())
def fence(x: Tensor) -> Tensor:
    """A copy that Inductor cannot fuse: its CPU FlexAttention kernel refuses any operation fused behind it."""
    return x.clone()


@fence.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    need_lse: bool,
    options: dict[str, Any],
) -> Pair:
    keywords: dict[str, Any] = {
        "score_mod": score_mod,
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "kernel_options": options or None,
    }
    if not need_lse:
        return flex_attention(q, k, v, **keywords), None
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **keywords)
    return out, aux.lse


@cache
def _compiled(structure: Hashable) -> Callable[..., Pair]:
    """A compiled `_attend` of its own for each structure.

    Dynamo keeps its graphs by code object and gives up after a few, so structures must not share one: the ninth mask of
    a session would otherwise be an error.
    """
    name = f"attend_{abs(hash(structure)):x}"
    own = types.FunctionType(_attend.__code__.replace(co_name=name), _attend.__globals__, name)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _structure(plan: Plan, *tensors: Tensor) -> Hashable:
    """What decides the kernel: nodes, span counts, block size, and the tensors' heads, dims and dtypes."""
    spans = tuple((x.outer.count, x.exact) for x in plan.sandwiches)
    score = None if plan.score is None else plan.score.structure()
    shapes = tuple((x.shape[1:], x.dtype, x.device.type, x.requires_grad) for x in tensors)
    return plan.mask.structure(), score, spans, plan.block_size, plan.layout.is_self, shapes
