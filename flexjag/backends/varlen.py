"""``torch.nn.attention.varlen``: the flash-attention kernel for packed batches, when the mask is one it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.choice import Case, varlen_has_gqa, varlen_window
from flexjag.plan import Plan

Pair = tuple[Tensor, Tensor | None]


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``, float16 or bfloat16.

    The first call with a plan reads the longest lengths from the device, unless it was made with `max_length`.

    Returns:
        ``[T_q, H, E]`` and, if wanted, the log-sum-exp ``[T_q, H]`` in float32.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    layout = plan.layout
    window = varlen_window(Case(layout, plan.mask, plan.score, plan.normalizer))
    assert window is not None, "choice.refusal lets no other mask through"
    keywords: dict[str, Any] = {"scale": scale, "window_size": window}
    if varlen_has_gqa():
        keywords["enable_gqa"] = q.shape[1] != k.shape[1]
    if need_lse:
        keywords["return_aux"] = AuxRequest(lse=True)
    got: Any = varlen_attn(q, k, v, layout.q_offsets, layout.kv_offsets, *_longest(plan), **keywords)
    if not need_lse:
        return got, None
    out, lse = got
    lse = lse.transpose(0, 1) if lse.shape[0] == q.shape[1] else lse  # documented [T, H], returned [H, T]
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # its sign for a row without keys is +


def _longest(plan: Plan) -> tuple[int, int]:
    """The most queries and keys of a segment, or a bound on them."""
    if plan.max_length is not None:
        return plan.max_length, plan.max_length
    if "longest" not in plan.notes:
        layout = plan.layout
        each = [layout.q_offsets] if layout.is_self else [layout.q_offsets, layout.kv_offsets]
        found = torch.stack([o.diff().max() for o in each]).tolist()  # one wait for both
        plan.notes["longest"] = found[0], found[-1]
    return plan.notes["longest"]
