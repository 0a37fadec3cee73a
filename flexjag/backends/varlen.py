"""``torch.nn.attention.varlen``: the flash-attention kernel for packed batches, for masks that it supports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra.dropping import Dropped
from flexjag.algebra.facts import as_window
from flexjag.algebra.normalizers import Softmax
from flexjag.algebra.tree import walk
from flexjag.backends.base import HALF, Backend, Case, Pair, Promises
from flexjag.lowering.layout import Layout
from flexjag.lowering.recipe import Recipe


def window_size(mask: m.Mask, layout: Layout) -> tuple[int, int] | None:
    """The mask as ``varlen_attn``'s ``window_size`` (bottom-right, -1 unlimited), or None if it is not one."""
    window = as_window(mask)
    if window is None:
        return None
    left, right, align = window
    if (left, right) != (None, None) and align == "start" and not layout.is_self:
        return None
    return (-1 if left is None else left, -1 if right is None else right)


def has_gqa() -> bool:
    """True if this torch's ``varlen_attn`` has the argument ``enable_gqa`` (2.11 does not)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def refuse(case: Case) -> str | None:
    """The reason why ``varlen_attn`` cannot run a case; None if it can."""
    if not case.on_cuda:
        return "torch.nn.attention.varlen runs on CUDA only"
    if case.score is not None:
        dropped = any(isinstance(x, Dropped) for x in walk(case.score))
        return f"varlen_attn takes no score function{', as which dropout is computed' * dropped}"
    if window_size(case.mask, case.layout) is None:
        return f"varlen_attn knows causal masks and windows aligned to the segments' ends, not {case.mask!r}"
    if case.dtype is not None and case.dtype not in HALF:
        return f"varlen_attn takes float16 and bfloat16, not {case.dtype}"
    if case.scale <= 0:
        return f"the flash kernel masks before it scales, so it needs scale > 0; got {case.scale}"
    if case.layout.has_spare:
        return "varlen_attn leaves the spare rows of a fixed-capacity plan unwritten"
    if case.dims is not None:
        heads, groups, d, e = case.dims
        if d != e or d > 256 or d % 8:
            return f"varlen_attn needs D == E, a multiple of 8, at most 256; got D={d}, E={e}"
        if heads != groups and not has_gqa():
            return "this torch's varlen_attn has no grouped-query attention"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``, float16 or bfloat16.

    The first call with a plan reads the longest lengths from the device, unless it was made with `max_length`.

    Returns:
        ``[T_q, H, E]`` and, if wanted, the log-sum-exp ``[T_q, H]`` in float32.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    layout = recipe.layout
    window = window_size(recipe.mask, layout)
    assert window is not None, "the rule lets no other mask through"
    keywords: dict[str, Any] = {"scale": scale, "window_size": window}
    if has_gqa():
        keywords["enable_gqa"] = q.shape[1] != k.shape[1]
    if need_lse:
        keywords["return_aux"] = AuxRequest(lse=True)
    got: Any = varlen_attn(q, k, v, layout.q_offsets, layout.kv_offsets, *_longest(recipe), **keywords)
    if not need_lse:
        return got, None
    out, lse = got
    lse = lse.transpose(0, 1) if lse.shape[0] == q.shape[1] else lse  # documented [T, H], returned [H, T]
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # its sign for a row without keys is +


def _longest(recipe: Recipe) -> tuple[int, int]:
    """The largest query and key length of a segment, or `max_length` for both."""
    if recipe.max_length is not None:
        return recipe.max_length, recipe.max_length
    if "longest" not in recipe.notes:
        layout = recipe.layout
        each = [layout.q_offsets] if layout.is_self else [layout.q_offsets, layout.kv_offsets]
        found = torch.stack([o.diff().max() for o in each]).tolist()  # one wait for both
        recipe.notes["longest"] = found[0], found[-1]
    return recipe.notes["longest"]


VARLEN = Backend(
    name="varlen",
    title="`torch.nn.attention.varlen`, CUDA, half precision",
    takes="causal, windows",
    run=run,
    refuse=refuse,
    promises=Promises(
        normalizers=(Softmax,),
        lse_gradient=False,
        deterministic="nowhere",
        untraceable="it needs the longest length on the host, which would compile a graph per batch",
    ),
)
