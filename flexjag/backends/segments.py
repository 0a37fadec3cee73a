"""``scaled_dot_product_attention`` once per segment: no tile waste, one call's overhead per segment.

On CPU it calls ATen's flash kernel itself, forward and backward, straight into the packed outputs. That saves the
copies and the autograd nodes of a loop in user code, and gives the log-sum-exp that SDPA keeps to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexjag import masks as m
from flexjag import mods
from flexjag.choice import SDPA_WINDOWS
from flexjag.plan import Plan

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The segments of a plan on the host, and each one's mask and bias.

    Attributes:
        plan: The plan.
        scale: Factor on ``q·k``.
        q_lengths: Queries of each segment, the spare rows, and a 0.
        kv_lengths: Keys of each segment, a 0, and the spare rows.
        causal: SDPA's own causal flag does the mask; None if it takes a mask tensor.
    """

    plan: Plan
    scale: float
    q_lengths: list[int]
    kv_lengths: list[int]
    causal: bool | None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need_lse: bool) -> Pair:
    """Attention of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]``, ``v [T_kv, G, E]``.

    Returns:
        ``[T_q, H, E]`` and the log-sum-exp ``[T_q, H]``, the latter in at least float32.
    """
    layout = plan.layout
    # The spare rows of either side are a piece of their own, which meets nothing.
    n = [*layout.q_offsets.diff().tolist(), layout.num_q - int(layout.q_offsets[-1]), 0]
    m_ = [*layout.kv_offsets.diff().tolist(), 0, layout.num_kv - int(layout.kv_offsets[-1])]
    window = m.as_window(plan.mask)
    causal = window == (None, 0, "start") if plan.score is None and window in SDPA_WINDOWS else None
    pieces = Pieces(plan, scale, n, m_, causal)
    e = v.shape[2]
    wide = max(q.shape[2], e)  # the kernels want D == E; zeros change nothing
    q, k, v = (torch.nn.functional.pad(x, (0, wide - x.shape[2])) if x.shape[2] < wide else x for x in (q, k, v))
    if q.device.type == "cpu" and not mods.learned_tensors(plan.score, q.dtype, q.device):
        out, lse = _Flash.apply(pieces, q, k, v)  # type: ignore[misc]
    else:
        out, lse = _composite(pieces, q, k, v, need_lse)
    return out[..., :e], lse


def _bias(pieces: Pieces, index: int, heads: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The additive bias ``[1, H or 1, n, m]``, -inf where masked, and ``[1, H or 1, n]`` which rows have no key.

    A row without keys attends everything for the kernel's sake; the caller zeroes it.
    """
    if pieces.causal is not None:
        return None, None
    plan, device = pieces.plan, pieces.plan.layout.device
    q0, k0 = sum(pieces.q_lengths[:index]), sum(pieces.kv_lengths[:index])
    q = torch.arange(q0, q0 + pieces.q_lengths[index], device=device)[None, :, None]
    kv = torch.arange(k0, k0 + pieces.kv_lengths[index], device=device)[None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    allowed = plan.mask_mod(h.new_zeros(()), h, q, kv).expand(-1, q.shape[1], kv.shape[2])
    no_key = ~allowed.any(2)
    bias = torch.zeros_like(allowed, dtype=dtype)
    if plan.score_mod is not None:
        bias = plan.score_mod(bias[:1, :1, :1].expand(1, *bias.shape[1:]), h.new_zeros(()), h, q, kv).to(dtype)
    return bias.masked_fill(~(allowed | no_key[..., None]), -torch.inf)[None], no_key[None]


def _split(x: Tensor, lengths: list[int], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """[T, H, ...] as one view per segment, [*shape, n, ...]; `shape` is (1, H), or (G, H / G) to share keys."""
    heads = x.shape[1]
    x = x.transpose(0, 1)
    x = x.unflatten(0, (shape[0], -1)) if heads == shape[0] * shape[1] else x[:, None].expand(*shape, *x.shape[1:])
    return x.split(lengths, 2)


def _grouped(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """[1, H or 1, ...] as [*shape, ...], or something that broadcasts to it."""
    return x if shape[0] == 1 or x.shape[1] == 1 else x[0].unflatten(0, shape)


class _Flash(torch.autograd.Function):
    """ATen's CPU flash kernel per segment, forward and backward."""

    @staticmethod
    def forward(ctx: Any, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        heads, groups = q.shape[1], k.shape[1]
        shape = (1, heads) if heads == groups else (groups, heads // groups)
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = torch.zeros_like(q), q.new_full((heads, q.shape[0]), -torch.inf, dtype=acc)
        n, m = pieces.q_lengths, pieces.kv_lengths
        views = zip(
            _split(q, n, shape),
            _split(k, m, shape),
            _split(v, m, shape),
            _split(out, n, shape),
            lse.view(*shape, -1).split(n, 2),
            strict=True,
        )
        for index, (x, y, z, o, log_sum) in enumerate(views):
            if x.shape[2] == 0 or y.shape[2] == 0:
                continue
            bias, no_key = _bias(pieces, index, heads, q.dtype)
            part, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                x,
                y,
                z,
                0.0,
                bool(pieces.causal),
                attn_mask=None if bias is None else _grouped(bias, shape),
                scale=pieces.scale,
            )
            o.copy_(part)
            log_sum.copy_(log.view(log_sum.shape))
            if no_key is not None:
                o.masked_fill_(_grouped(no_key, shape)[..., None], 0.0)
                log_sum.masked_fill_(_grouped(no_key, shape), -torch.inf)
        ctx.pieces, ctx.shape = pieces, shape
        ctx.set_materialize_grads(False)
        lse = lse.t()
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        pieces, shape = ctx.pieces, ctx.shape
        grad_out, grad_lse = grad_outputs
        q, k, v, out, lse = ctx.saved_tensors
        heads, groups, dim = q.shape[1], k.shape[1], q.shape[2]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # The kernel subtracts delta = sum(grad_out * out) from each score's gradient; d lse has to be added.
            # One more feature, 0 in q, k, v, 1 in grad_out and -grad_lse in out, makes delta do both.
            q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
            out = torch.cat([out, -grad_lse.to(out.dtype)[..., None]], 2)
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        n, m = pieces.q_lengths, pieces.kv_lengths
        queries = [_split(t, n, shape) for t in (q, grad_out, out, grads[0], lse)]
        keys = [_split(t, m, shape) for t in (k, v)]
        key_grads = [_split(t, m, (1, groups)) for t in grads[1:]]
        for index, (x, g, o, dx, log_sum, y, z, dy, dz) in enumerate(zip(*queries, *keys, *key_grads, strict=True)):
            if x.shape[2] == 0 or y.shape[2] == 0:
                continue
            bias, no_key = _bias(pieces, index, heads, q.dtype)
            if no_key is not None:
                g = g.masked_fill(_grouped(no_key, shape)[..., None], 0.0)
                log_sum = log_sum.masked_fill(_grouped(no_key, shape), 0.0)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g,
                x,
                y,
                z,
                o,
                log_sum.contiguous(),
                0.0,
                bool(pieces.causal),
                attn_mask=None if bias is None else _grouped(bias, shape),
                scale=pieces.scale,
            )
            dx.copy_(parts[0])
            for target, part in ((dy, parts[1]), (dz, parts[2])):
                target.copy_(part if heads == groups else part.sum(1)[None])
        return None, *(g[..., :dim] for g in grads)


def _composite(pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> Pair:
    """SDPA by its public door: any device, and gradients for a learned bias."""
    heads, repeats = q.shape[1], q.shape[1] // k.shape[1]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, m = pieces.q_lengths, pieces.kv_lengths
    outs, lses = [], []
    for index, (x, y, z) in enumerate(zip(q.split(n), k.split(m), v.split(m), strict=True)):
        if x.shape[0] == 0 or y.shape[0] == 0:
            outs.append(q.new_zeros(x.shape))
            lses.append(q.new_full(x.shape[:2], -torch.inf, dtype=acc))
            continue
        bias, no_key = _bias(pieces, index, heads, q.dtype)
        x = x.transpose(0, 1)[None]
        y, z = (t.transpose(0, 1)[None].repeat_interleave(repeats, 1) for t in (y, z))
        causal = bool(pieces.causal)
        o = torch.nn.functional.scaled_dot_product_attention(
            x, y, z, attn_mask=bias, is_causal=causal, scale=pieces.scale
        )
        outs.append((o if no_key is None else o.masked_fill(no_key[..., None], 0.0))[0].transpose(0, 1))
        if need_lse:
            scores = (x @ y.transpose(2, 3)).to(acc) * pieces.scale
            if causal:
                later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            one = (scores if bias is None else scores + bias).logsumexp(3)
            lses.append((one if no_key is None else one.masked_fill(no_key, -torch.inf))[0].transpose(0, 1))
    lse = torch.cat(lses) if need_lse else q.new_full(q.shape[:2], -torch.inf, dtype=acc)
    return torch.cat(outs), lse
