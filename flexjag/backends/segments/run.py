"""``scaled_dot_product_attention`` per segment, or per run of a segment's queries and the keys they can reach.

On CPU it calls ATen's flash kernel directly, forward and backward, into the packed outputs. That saves the copies and
the autograd nodes of a loop in user code, and returns the log-sum-exp, which SDPA does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.facts import as_window
from flexjag.algebra.tree import held_tensors
from flexjag.backends.base import FIRST_ORDER
from flexjag.backends.held import Held
from flexjag.backends.segments import runs
from flexjag.backends.segments import whole as whole_segments
from flexjag.backends.segments.batches import Range
from flexjag.backends.segments.cost import SDPA_WINDOWS
from flexjag.backends.segments.runs import SdpaCalls, Shared, bias_of, runs_of_queries
from flexjag.backends.segments.whole import FLASH, list_calls, with_lse_gradient
from flexjag.differentiation import first_order_only
from flexjag.lowering.recipe import Recipe

Pair = tuple[Tensor, Tensor]
LOG2_E = math.log2(math.e)


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Returns:
        ``[T_q, H, E]`` and the log-sum-exp ``[T_q, H]``, the latter in at least float32; maybe None if not needed.
    """
    window = as_window(recipe.mask)
    # The kernel masks before it scales: with a scale of 0 or less, -inf turns into NaN or +inf.
    own = recipe.score is None and window in SDPA_WINDOWS and scale > 0
    causal = window == (None, 0, "start") if own else None
    e = v.shape[2]
    wide = max(q.shape[2], e, 1)  # the kernels want D == E > 0; zeros change nothing
    q, k, v = (torch.nn.functional.pad(x, (0, wide - x.shape[2])) if x.shape[2] < wide else x for x in (q, k, v))
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))  # the kernel reads no other stride
    on_cpu, acc = q.device.type == "cpu", torch.float64 if q.dtype == torch.float64 else torch.float32
    recipe = recipe.learning_in(acc)
    if causal is not None and on_cpu:
        out, lse = whole_segments.attend(_calls(recipe, q.shape[1] * wide, causal, scale), q, k, v, need_lse)
        return out if e == wide else out[..., :e], lse
    if causal is not None:
        calls = runs.whole_segments(recipe, scale, causal)
    else:
        recipe = recipe.frozen()
        calls = runs_of_queries(recipe, scale, q.shape[1], acc, may_share=on_cpu)
    held = [] if recipe.score is None else held_tensors(recipe.score)
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in held)
    if on_cpu and (calls.shared is not None or not learned):
        bias = calls.shared.bias if calls.shared is not None and learned else None
        out, lse = _Flash.apply(calls, bias, q, k, v)  # type: ignore[misc]
    else:
        out, lse = _composite(calls, q, k, v, need_lse)
    return out[..., :e], lse


def _calls(recipe: Recipe, width: int, causal: bool, scale: float) -> whole_segments.Calls:
    """The kernel's calls for a plan, computed once for all layers that share it."""
    key = "calls", width, causal, scale
    if key not in recipe.notes:
        recipe.notes[key] = list_calls(recipe.layout, width, causal, scale)
    return recipe.notes[key]


def _cut(x: Tensor, ranges: list[Range], shape: tuple[int, int], in_order: bool) -> tuple[Tensor, ...]:
    """Split [T, H, ...] into one view per range, [*shape, n, ...]; `shape` is (1, H), or (G, H / G) to share keys."""
    heads = x.shape[1]
    x = x.transpose(0, 1)
    x = x.unflatten(0, (shape[0], -1)) if heads == shape[0] * shape[1] else x[:, None].expand(*shape, *x.shape[1:])
    return x.split([b - a for a, b in ranges], 2) if in_order else tuple(x[:, :, a:b] for a, b in ranges)


def _grouped(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """View [1, H or 1, ...] as a tensor that broadcasts to [*shape, ...]."""
    return x if shape[0] == 1 or x.shape[1] == 1 else x[0].unflatten(0, shape)


class _Flash(torch.autograd.Function):
    """ATen's CPU flash kernel per run of queries, with the mask and the score as a bias.

    `bias` is the shared bias if it requires a gradient, which ATen's backward does not compute; else None.
    """

    @staticmethod
    def forward(ctx: Any, calls: SdpaCalls, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        heads, groups = q.shape[1], k.shape[1]
        shape = (1, heads) if heads == groups else (groups, heads // groups)
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = torch.empty_like(q), q.new_empty((heads, q.shape[0]), dtype=acc)
        queries = [_cut(t, calls.q_ranges, shape, True) for t in (q, out, lse.t())]
        keys = [_cut(t, calls.kv_ranges, shape, False) for t in (k, v)]
        for index, (x, o, log_sum, y, z) in enumerate(zip(*queries, *keys, strict=True)):
            if x.shape[2] == 0 or y.shape[2] == 0:
                o.zero_()
                log_sum.fill_(-torch.inf)
                continue
            own, no_key = bias_of(calls, index, heads, acc)
            assert own is not None
            part, log = FLASH(x, y, z, 0.0, False, attn_mask=_grouped(own, shape), scale=calls.scale)
            o.copy_(part)
            log_sum.copy_(log.view(log_sum.shape))
            if no_key is not None:
                o.masked_fill_(_grouped(no_key, shape)[..., None], 0.0)
                log_sum.masked_fill_(_grouped(no_key, shape), -torch.inf)
        ctx.calls, ctx.shape = calls, shape
        if bias is not None and calls.shared is not None:  # held by the graph only, which lets go of it
            ctx.calls, ctx.keyless = replace(calls, shared=None), calls.shared.keyless
        ctx.set_materialize_grads(False)
        lse = lse.t()
        # What the backward evaluates again.
        again = calls.shared is None and any(ctx.needs_input_grad)
        ctx.held = Held.of(calls.recipe, acc) if again else Held([], [], [], [])
        ctx.save_for_backward(q, k, v, out, lse, bias, *ctx.held.fixed)
        return out, lse

    @staticmethod
    @first_order_only(FIRST_ORDER.format("segments"))
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: Sequence[Tensor], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        calls, shape = ctx.calls, ctx.shape
        ctx.held.check()
        q, k, v, out, lse, bias = saved[:6]
        if bias is not None:
            calls = replace(calls, shared=Shared(bias, ctx.keyless))
        heads, groups, dim = q.shape[1], k.shape[1], q.shape[2]
        acc = lse.dtype
        no_keys = lse == -torch.inf  # what flows back into those rows may be NaN, as 0 · -inf
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        if bool(no_keys.any()):
            grad_out = grad_out.masked_fill(no_keys[..., None], 0.0)
        if grad_lse is not None:
            q, k, v, out, grad_out = with_lse_gradient(q, k, v, out, grad_out, grad_lse.masked_fill(no_keys, 0.0))
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        queries = [_cut(t, calls.q_ranges, shape, True) for t in (q, grad_out, out, grads[0], lse)]
        keys = [_cut(t, calls.kv_ranges, shape, False) for t in (k, v)]
        key_grads = [_cut(t, calls.kv_ranges, (1, groups), False) for t in grads[1:]]
        for index, (x, g, o, dx, log_sum, y, z, dy, dz) in enumerate(zip(*queries, *keys, *key_grads, strict=True)):
            if x.shape[2] == 0 or y.shape[2] == 0:
                dx.zero_()
                continue
            own, no_key = bias_of(calls, index, heads, acc)
            assert own is not None
            if no_key is not None:
                g = g.masked_fill(_grouped(no_key, shape)[..., None], 0.0)
                # At +inf their weights are 0; at 0 a steep bias would overflow.
                log_sum = log_sum.masked_fill(_grouped(no_key, shape), torch.inf)
            own = _grouped(own, shape)
            if grad_bias is None:
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    g, x, y, z, o, log_sum.contiguous(), 0.0, False, attn_mask=own, scale=calls.scale
                )
            else:
                *parts, ds = _differentiate(g, x, y, z, o, log_sum, own, calls.scale)
                i, j = calls.runs.places[index]
                target = grad_bias[..., i : i + x.shape[2], j : j + y.shape[2]]
                ds = ds.reshape(1, heads, *ds.shape[2:])
                target.add_(ds if target.shape[1] == heads else ds.sum(1, keepdim=True))
            dx.copy_(parts[0])
            for target, part in ((dy, parts[1]), (dz, parts[2])):
                target.add_(part if heads == groups else part.sum(1)[None])
        return None, grad_bias, *(g[..., :dim] for g in grads)


def _differentiate(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the scores, ``[..., n, m]``, from the log-sum-exp, all in its precision."""
    with torch.autocast("cpu", enabled=False):
        g, q, k, v, out = (t.to(lse.dtype) for t in (g, q, k, v, out))
        p = torch.matmul(q, k.transpose(-1, -2)).mul_(scale).add_(bias).sub_(lse[..., None])
        p = p.mul_(LOG2_E).exp2_()  # exp is many times slower where it underflows
        delta = (g * out).sum(-1, keepdim=True)
        ds = torch.matmul(g, v.transpose(-1, -2)).sub_(delta).mul_(p)
        dq, dk = torch.matmul(ds, k).mul_(scale), torch.matmul(ds.transpose(-1, -2), q).mul_(scale)
        return dq, dk, torch.matmul(p.transpose(-1, -2), g), ds


def _composite(calls: SdpaCalls, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> Pair:
    """SDPA by its public function: any device, and gradients of a learned bias that segments do not share."""
    dtype, heads, repeats = q.dtype, q.shape[1], q.shape[1] // k.shape[1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if calls.causal is None:  # SDPA wants the bias in q's dtype, and half precision is too coarse for one
        q, k, v = q.to(acc), k.to(acc), v.to(acc)
    outs, lses = [], []
    link = sum(t.flatten()[:0].sum() for t in (q, k, v))  # 0, and keeps a result without keys differentiable
    queries = q.split([b - a for a, b in calls.q_ranges])
    keys = [[t[a:b] for a, b in calls.kv_ranges] for t in (k, v)]
    for index, (x, y, z) in enumerate(zip(queries, *keys, strict=True)):
        if x.shape[0] == 0 or y.shape[0] == 0:
            outs.append(q.new_zeros(x.shape) + link)
            lses.append(q.new_full(x.shape[:2], -torch.inf, dtype=acc) + link)
            continue
        bias, no_key = bias_of(calls, index, heads, acc)
        x = x.transpose(0, 1)[None]
        y, z = (t.transpose(0, 1)[None].repeat_interleave(repeats, 1) for t in (y, z))
        causal = bool(calls.causal)
        o = torch.nn.functional.scaled_dot_product_attention(
            x, y, z, attn_mask=bias, is_causal=causal, scale=calls.scale
        )
        outs.append((o if no_key is None else o.masked_fill(no_key[..., None], 0.0))[0].transpose(0, 1))
        if need_lse:
            scores = (x @ y.transpose(2, 3)).to(acc) * calls.scale
            if causal:
                later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            one = (scores if bias is None else scores + bias).logsumexp(3)
            lses.append((one if no_key is None else one.masked_fill(no_key, -torch.inf))[0].transpose(0, 1))
    link = q[:0].sum() + k[:0].sum() + v[:0].sum()  # 0, and differentiable even if no piece has a key
    lse = torch.cat(lses) + link if need_lse else q.new_full(q.shape[:2], -torch.inf, dtype=acc)
    return (torch.cat(outs) + link).to(dtype), lse
