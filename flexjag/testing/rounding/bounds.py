"""Bounds on the rounding error of attention, by running error analysis alongside a dense float64 computation.

Each intermediate carries a bound on its error, in three units: `stored`, the machine epsilon of the dtype a backend
computes in, for every value it may store; `summed`, the epsilon of the accumulator (float32 for half precision), once
per term of a sum in any order; and `result`, the epsilon of the output dtype. The bounds are first order, so callers
double them. Nothing is fitted to a backend. (N. Higham, *Accuracy and Stability of
Numerical Algorithms*, chapters 3 and 4.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.normalizers import Normalizer, Softmax
from flexjag.backends.reference import Segment, dense_allowed, rescore
from flexjag.lowering.layout import Layout
from flexjag.testing.rounding.weights import Units, Values, weighed


@dataclass(frozen=True, eq=False)
class Bounds:
    """Elementwise first-order bounds on rounding errors, in float64.

    Attributes:
        out: Bound for the output, ``[T_q, H, E]``.
        lse: Bound for the log-sum-exp, ``[T_q, H]``; with stick-breaking, for the remainder.
        q: Bound for the gradient of q, ``[T_q, H, D]``.
        k: Bound for the gradient of k, ``[T_kv, G, D]``.
        v: Bound for the gradient of v, ``[T_kv, G, E]``.
        learned: Bound for the gradient of each learned tensor, one number for all of its entries.
    """

    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    learned: list[float]


@dataclass(frozen=True, eq=False)
class _Scores:
    """Modified scores ``[H, n, m]``, their derivatives, and the errors of both."""

    value: Tensor
    error: Tensor
    slope: Tensor  # derivative by the raw score
    slope_error: Tensor
    learned: list[tuple[Tensor, Tensor]]  # derivative by each learned tensor, summed over its entries, and its error


def segments_of(layout: Layout, heads: int) -> list[Segment]:
    """Coordinates of every segment, as arguments of the reference's interpretations."""
    q_ends, kv_ends = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    found, entries = [], 0
    for index in range(layout.num_segments):
        q_rows, kv_rows = (slice(e[index], e[index + 1]) for e in (q_ends, kv_ends))
        i = torch.arange(q_rows.stop - q_rows.start, device=layout.device)[:, None]
        j = torch.arange(kv_rows.stop - kv_rows.start, device=layout.device)[None]
        found.append(Segment(index, heads, i, j, q_rows, kv_rows, entries))
        entries += i.shape[0] * j.shape[1]
    return found


def _grad(y: Tensor, x: Tensor) -> Tensor:
    """Elementwise derivative of y by x, where y[i] depends on x[i] alone."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)[0]


def _finite(x: Tensor) -> Tensor:
    """Replace non-finite errors or derivatives by 0: those of scores of -inf, which are exact."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _by_tensor(y: Tensor, tensor: Tensor) -> Tensor:
    """Directional derivative of each y along all ones in `tensor`, by differentiating the (linear) backward."""
    weights = torch.ones_like(y, requires_grad=True)
    if not y.requires_grad:
        return torch.zeros_like(y)
    back = torch.autograd.grad(y, tensor, weights, create_graph=True, allow_unused=True)[0]
    if back is None or not back.requires_grad:
        return torch.zeros_like(y)
    return torch.autograd.grad(back, weights, torch.ones_like(back), create_graph=True)[0].to(y.dtype)


def _apply_part(part: s.Score, old: _Scores, seg: Segment, learned: Sequence[Tensor], unit: Units) -> _Scores:
    """Apply one score of the chain to the value, the derivatives and their error bounds."""
    x = old.value.detach().requires_grad_()
    y = rescore(part, x, seg)
    slope = _grad(y, x)
    bend = _grad(slope, x).detach().abs()
    direct = [_by_tensor(y, t) for t in learned]
    bends = [_grad(d, x).detach().abs() for d in direct]
    y, slope = y.detach(), slope.detach()
    slope, bend = _finite(slope), _finite(bend)
    error = slope.abs() * old.error + unit.stored * (_finite(x.detach()).abs() + _finite(y).abs())
    own_slope_error = bend * old.error + unit.stored * (1 + slope.abs())
    carried = []
    for (was, was_error), d, b in zip(old.learned, direct, bends, strict=True):
        d, b = _finite(d.detach()), _finite(b)
        spread = was_error * slope.abs() + was.abs() * own_slope_error + b * old.error + unit.stored * d.abs()
        carried.append((was * slope + d, spread))
    return _Scores(
        value=y,
        error=error,
        slope=old.slope * slope,
        slope_error=old.slope_error * slope.abs() + old.slope.abs() * own_slope_error,
        learned=carried,
    )


def _scores(
    x: Tensor, y: Tensor, seg: Segment, score: s.Score | None, scale: float, learned: Sequence[Tensor], unit: Units
) -> _Scores:
    raw = x @ y.transpose(1, 2) * scale
    size = x.abs() @ y.abs().transpose(1, 2) * abs(scale)
    zero, one = torch.zeros_like(raw), torch.ones_like(raw)
    error = (x.shape[2] * unit.summed + unit.stored) * size
    state = _Scores(raw, error, one, zero, [(zero, zero) for _ in learned])
    with torch.enable_grad():
        for part in s.parts(score):
            state = _apply_part(part, state, seg, learned, unit)
    return state


def rounding_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: m.Mask,
    score: s.Score | None,
    *,
    scale: float,
    grad_out: Tensor,
    grad_lse: Tensor,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    learned: Sequence[Tensor] = (),
    normalizer: Normalizer | None = None,
) -> Bounds:
    """Compute bounds on the rounding errors of attention and of its gradients.

    A score is differentiated by a learned tensor along all ones, so its derivatives by the tensor's entries should have
    one sign (as in a lookup or a product).

    Args:
        q: ``[T_q, H, D]``, any dtype.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        layout: Layout of the batch.
        mask: The mask.
        score: The score, or None.
        scale: Factor on ``q·k``.
        grad_out: Gradient of the output, ``[T_q, H, E]``.
        grad_lse: Gradient of the log-sum-exp (ignored where that is -inf) or of the remainder, ``[T_q, H]``.
        dtype: Dtype of inputs and results.
        compute: Dtype of intermediates, for instance float32 in a backend for half precision. Default: `dtype`.
        learned: The tensors in `score` whose gradients are bounded.
        normalizer: Default :class:`~flexjag.algebra.normalizers.Softmax`.

    Returns:
        The bounds, 0 where nothing is rounded.
    """
    q, k, v, grad_out, grad_lse = (t.detach().double() for t in (q, k, v, grad_out, grad_lse))
    unit = Units.of(dtype, compute or dtype)
    normalizer = Softmax() if normalizer is None else normalizer
    heads, repeats = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = grad_out.new_zeros(grad_out.shape), grad_lse.new_zeros(grad_lse.shape)
    q_bound, k_bound, v_bound = (torch.zeros_like(t) for t in (q, k, v))
    learned_bound = [0.0 for _ in learned]
    for seg in segments_of(layout, heads):
        if seg.n == 0 or seg.m == 0:
            continue
        x, g = (t[seg.q_rows].transpose(0, 1) for t in (q, grad_out))
        y, z = (t[seg.kv_rows].transpose(0, 1).repeat_interleave(repeats, 0) for t in (k, v))
        state = _scores(x, y, seg, score, scale, learned, unit)
        allowed = dense_allowed(mask, normalizer, seg, layout.is_self) & (state.value != -torch.inf)
        g_rest = grad_lse[seg.q_rows].t()[..., None]
        values = Values(_finite(state.value), state.error, allowed, z, g, g_rest, seg)
        one = _segment_bounds(x, y, values, state, normalizer, scale, unit)
        out[seg.q_rows], lse[seg.q_rows] = one.out.transpose(0, 1), one.lse.expand(heads, seg.n, 1)[..., 0].t()
        q_bound[seg.q_rows] = one.q.transpose(0, 1)
        k_bound[seg.kv_rows] = one.k.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
        v_bound[seg.kv_rows] = one.v.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
        learned_bound = [a + b for a, b in zip(learned_bound, one.learned, strict=True)]
    # Partial sums of a learned gradient may be stored once per segment.
    learned_bound = [b * max(1, layout.num_segments) for b in learned_bound]
    return Bounds(out, lse, q_bound, k_bound, v_bound, learned_bound)


def _segment_bounds(
    x: Tensor, y: Tensor, values: Values, state: _Scores, normalizer: Normalizer, scale: float, unit: Units
) -> Bounds:
    """The bounds of one segment, every tensor ``[H, n or m, ...]``."""
    n, width, stored = x.shape[1], y.shape[1], unit.stored
    keys, queries = width * unit.summed, n * x.shape[0] * unit.summed
    w = weighed(normalizer, values, unit)
    ds, ds_error = w.ds, w.ds_error
    raw = ds * state.slope
    raw_error = ds_error * (state.slope.abs() + state.slope_error) + ds.abs() * state.slope_error + stored * raw.abs()

    scale = abs(scale)
    size = raw.abs()
    tokens = n * x.shape[0] * width * unit.summed + stored + unit.result
    learned = [float((ds_error * (j.abs() + e) + ds.abs() * (e + tokens * j.abs())).sum()) for j, e in state.learned]
    v_error = w.weights_error + (queries + stored + unit.result) * w.weights.abs()
    return Bounds(
        out=w.out_error + unit.result * w.out.abs(),
        lse=w.rest_error,
        q=scale * (raw_error + (keys + stored + unit.result) * size) @ y.abs(),
        k=scale * (raw_error + (queries + stored + unit.result) * size).transpose(1, 2) @ x.abs(),
        v=v_error.transpose(1, 2) @ values.g.abs() + w.v_error,
        learned=learned,
    )
