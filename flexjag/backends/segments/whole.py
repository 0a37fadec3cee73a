"""ATen's CPU flash kernel over whole segments, for the masks that the kernel itself has: full or causal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.backends.base import FIRST_ORDER
from flexjag.backends.segments.batches import Cut, Packed, Range, SegmentBatch, list_batches
from flexjag.differentiation import first_order_only
from flexjag.lowering.layout import Layout

FLASH = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
"""``torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`` by an entry with 2.5 µs less overhead."""


@dataclass(frozen=True, eq=False)
class Calls:
    """The kernel's calls for all segments.

    Attributes:
        batches: The segments of each call.
        q_cut: The split of the packed queries at the calls' ranges.
        kv_cut: The split of the packed keys at the calls' ranges.
        unmet_q: Ranges of packed queries without a key.
        unmet_kv: Ranges of packed keys without a query.
        causal: True for a causal mask, False for a full one.
        scale: Factor on ``q·k``.
    """

    batches: list[SegmentBatch]
    q_cut: Cut
    kv_cut: Cut
    unmet_q: list[Range]
    unmet_kv: list[Range]
    causal: bool
    scale: float


def list_calls(layout: Layout, width: int, causal: bool, scale: float) -> Calls:
    """Group a layout's segments into calls, for queries of `width` numbers. Reads the offsets on the host."""
    q = layout.q_offsets.tolist()
    kv = q if layout.is_self else layout.kv_offsets.tolist()
    batches, unmet_q, unmet_kv = list_batches(q, kv, width, pad_keys=layout.is_self or not causal)
    q_cut = Cut([b.q for b in batches if isinstance(b.q, tuple)], layout.num_q)
    kv_cut = Cut([b.kv for b in batches if isinstance(b.kv, tuple)], layout.num_kv)
    unmet_q.append((q[-1], layout.num_q))  # the spare rows
    unmet_kv.append((kv[-1], layout.num_kv))
    unmet_q, unmet_kv = ([at for at in ranges if at[0] < at[1]] for ranges in (unmet_q, unmet_kv))
    return Calls(batches, q_cut, kv_cut, unmet_q, unmet_kv, causal, scale)


def _groups(q: Tensor, k: Tensor) -> int | None:
    """G, the number of groups of heads; None if heads share no keys, so that nothing needs a copy."""
    return None if q.shape[1] == k.shape[1] else k.shape[1]


def with_lse_gradient(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Extend the inputs of the kernel's backward so that it also propagates the gradient of the log-sum-exp.

    The kernel subtracts ``delta = sum(grad_out * out)`` from each score's gradient; d lse has to be added. One more
    feature, 0 in q, k and v, 1 in grad_out and -grad_lse in out, includes it in delta.
    """
    q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
    out = torch.cat([out, -grad_lse.to(out.dtype)[..., None]], 2)
    return q, k, v, out, torch.nn.functional.pad(grad_out, (0, 1), value=1.0)


def attend(calls: Calls, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The output ``[T_q, H, D]`` and log-sum-exp ``[T_q, H]`` of packed ``q [T_q, H, D]``, k and v ``[T_kv, G, D]``.

    The log-sum-exp may be None if it is not needed.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Whole.apply(calls, q, k, v)  # type: ignore[misc]
    return _run(calls, need_lse, q, k, v)


def _run(calls: Calls, need_lse: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    groups = _groups(q, k)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=acc).t()
    for start, end in calls.unmet_q:
        out[start:end] = 0.0
        lse[start:end] = -torch.inf
    packed_q, packed_out, packed_lse = (Packed(t, calls.q_cut) for t in (q, out, lse))
    packed_k, packed_v = (Packed(t, calls.kv_cut) for t in (k, v))
    for batch in calls.batches:
        x = batch.take(packed_q, True, groups)
        y, z = batch.take(packed_k, False, groups), batch.take(packed_v, False, groups)
        bias = None if calls.causal else batch.bias(y.dtype, groups)
        part, log = FLASH(x, *_shared(y, z, x), 0.0, calls.causal, attn_mask=bias, scale=calls.scale)
        batch.put(packed_out, part, True)
        if need_lse:
            batch.put(packed_lse, log, True)
    return out, lse if need_lse else None


class _Whole(torch.autograd.Function):
    """:func:`attend` with gradients."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _run(calls, True, q, k, v)
        assert lse is not None
        ctx.calls = calls
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @first_order_only(FIRST_ORDER.format("segments"))
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: Sequence[Tensor], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        calls: Calls = ctx.calls
        q, k, v, out, lse = saved
        groups, dim = _groups(q, k), q.shape[2]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        if grad_lse is not None:
            # What flows back into rows without keys may be NaN, as 0 · -inf; they are in no call but for this.
            q, k, v, out, grad_out = with_lse_gradient(q, k, v, out, grad_out, grad_lse)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for target, unmet in zip(grads, (calls.unmet_q, calls.unmet_kv, calls.unmet_kv), strict=True):
            for start, end in unmet:
                target[start:end] = 0.0
        packed_q, packed_out, packed_lse, packed_grad, packed_dq = (
            Packed(t, calls.q_cut) for t in (q, out, lse, grad_out, grads[0])
        )
        packed_k, packed_v, packed_dk, packed_dv = (Packed(t, calls.kv_cut) for t in (k, v, *grads[1:]))
        targets = packed_dq, packed_dk, packed_dv
        for batch in calls.batches:
            x, o, log = (batch.take(t, True, groups) for t in (packed_q, packed_out, packed_lse))
            y, z = (batch.take(t, False, groups) for t in (packed_k, packed_v))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                batch.take_gradient(packed_grad, groups),
                x,
                *_shared(y, z, x),
                o,
                log.contiguous(),
                0.0,
                calls.causal,
                attn_mask=None if calls.causal else batch.bias(y.dtype, groups),
                scale=calls.scale,
            )
            for target, part, is_query in zip(targets, parts, (True, False, False), strict=True):
                batch.put(target, part if is_query or groups is None else part.sum(1, keepdim=True), is_query)
        return None, *(g[..., :dim] for g in grads)


def _shared(y: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Expand keys and values to the queries' number of heads, without a copy."""
    heads = x.shape[1]
    return (y, z) if y.shape[1] == heads else (y.expand(-1, heads, -1, -1), z.expand(-1, heads, -1, -1))
