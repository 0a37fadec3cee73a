"""Bounds on the rounding errors of each normalizer's weights and of their backward, for one segment.

Every tensor is ``[H, n or m, ...]``, float64. Units and conventions as in :mod:`flexjag.testing.rounding.bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.algebra import normalizers as nz
from flexjag.algebra.dispatch import Interpretation
from flexjag.backends.reference import Segment, weigh

FEW = 2.0  # at most 4 roundings between two values named here, and one epsilon is two roundings
MOST_LOG = 30.0  # cap on errors of an exponent; a factor of e**30 bounds nothing anyway


@dataclass(frozen=True, eq=False)
class Units:
    """Relative rounding errors of a stored intermediate, a term of a sum and a result, and the underflow threshold."""

    stored: float
    summed: float
    result: float
    tiny: float

    @staticmethod
    def of(dtype: torch.dtype, compute: torch.dtype) -> Units:
        """Units for results in `dtype` and intermediates in `compute`."""
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        stored, summed, result = (torch.finfo(d).eps for d in (compute, accumulator, dtype))
        return Units(FEW * stored, summed, result, torch.finfo(dtype).tiny)


@dataclass(frozen=True, eq=False)
class Values:
    """Inputs of a normalizer's error analysis.

    Attributes:
        score: Modified scores ``[H, n, m]``.
        error: Bound on the error of `score`.
        allowed: Boolean mask of allowed pairs.
        v: Values ``[H, m, E]``.
        g: Gradient of the output, ``[H, n, E]``.
        g_rest: Gradient of the log-sum-exp or the remainder, ``[H, n, 1]``.
        seg: Coordinates of the segment.
    """

    score: Tensor
    error: Tensor
    allowed: Tensor
    v: Tensor
    g: Tensor
    g_rest: Tensor
    seg: Segment


@dataclass(frozen=True, eq=False)
class Weighed:
    """Weights, and the gradient of the modified scores, with first-order bounds on their errors.

    Attributes:
        weights: Weights ``[H, n, m]``.
        weights_error: Bound on the error of `weights`.
        out: Weighted sum of the values, ``[H, n, E]``.
        out_error: Bound on the error of `out`, without the rounding of the result.
        rest_error: Bound on the error of the log-sum-exp or the remainder, ``[H, n, 1]``.
        ds: Gradient of the modified scores, ``[H, n, m]``.
        ds_error: Bound on the error of `ds`.
        v_error: Bound on errors of the gradient of v besides those of ``weightsᵀ g``; broadcasts to ``[H, m, E]``.
    """

    weights: Tensor
    weights_error: Tensor
    out: Tensor
    out_error: Tensor
    rest_error: Tensor
    ds: Tensor
    ds_error: Tensor
    v_error: Tensor


weighed = Interpretation("rounding bounds", nz.Normalizer)
"""``weighed(normalizer, values, unit) -> Weighed``."""


@weighed.register(nz.Softmax)
def _(normalizer: nz.Softmax, x: Values, unit: Units) -> Weighed:
    z, g, stored, allowed = x.v, x.g, unit.stored, x.allowed
    keys = z.shape[1] * unit.summed
    has_key = allowed.any(2, keepdim=True)
    lse = x.score.masked_fill(~allowed, -torch.inf).logsumexp(2, keepdim=True).masked_fill(~has_key, 0.0)
    value, error = x.score.masked_fill(~allowed, 0.0), x.error.masked_fill(~allowed, 0.0)
    p = torch.exp(value - lse).masked_fill(~allowed, 0.0)
    top = (value.abs() * allowed).amax(2, keepdim=True)
    lse_error = (p * error).sum(2, keepdim=True) + (
        keys + stored + (stored + unit.result) * (top + lse.abs())
    ) * has_key
    log_error = error + lse_error + keys + stored * (1 + value.abs() + lse.abs())
    p_error = (p * torch.expm1(log_error.clamp(max=MOST_LOG)) + unit.tiny) * allowed
    out = p @ z
    out_error = (p_error + (keys + stored) * p) @ z.abs() + stored * out.abs()

    by_p, size = g @ z.transpose(1, 2), g.abs() @ z.abs().transpose(1, 2)
    delta = (g * out).sum(2, keepdim=True)
    dims = z.shape[2] * unit.summed + stored
    delta_error = (g.abs() * (out_error + (dims + unit.result) * out.abs())).sum(2, keepdim=True)
    delta_error = delta_error + (keys + dims) * (p * size).sum(2, keepdim=True)
    through = by_p - delta + x.g_rest
    through_error = dims * size + delta_error + stored * (size + delta.abs() + x.g_rest.abs())
    ds = p * through
    ds_error = p_error * through.abs() + (p + p_error) * through_error
    return Weighed(p, p_error, out, out_error, lse_error, ds, ds_error, out.new_zeros(()))


@weighed.register(nz.Pointwise)
def _(normalizer: nz.Pointwise, x: Values, unit: Units) -> Weighed:
    """Propagate the scores' errors by the function's first two derivatives, taken by autograd.

    The function and its derivative may be evaluated by products and sums of magnitude ``1 + |s|``, times the scale:
    their own rounding errors are relative to that.
    """
    stored = unit.stored
    keys, dims = x.v.shape[1] * unit.summed, x.v.shape[2] * unit.summed + stored
    with torch.enable_grad():
        s = x.score.masked_fill(~x.allowed, 0.0).detach().requires_grad_()
        w = weigh(normalizer, s, x.allowed, x.seg)[0]
        slope = torch.autograd.grad(w.sum(), s, create_graph=True)[0]
        bend = torch.zeros_like(s)
        if slope.requires_grad:
            bend = torch.autograd.grad(slope.sum(), s, allow_unused=True, materialize_grads=True)[0].abs()
    s, w, slope = s.detach(), w.detach(), slope.detach()
    bias = normalizer.bias if isinstance(normalizer, nz.Sigmoid) else 0.0
    bias = torch.tensor(x.seg.m).log() if bias is None else torch.as_tensor(bias).detach().abs().double()
    size = 1 + s.abs() + (bias[:, None, None] if bias.ndim else bias)
    factor = torch.as_tensor(normalizer.scale).detach().abs().double()
    factor = factor[x.seg.q_rows, None] if factor.ndim else factor
    error = (x.error + stored * size) * x.allowed
    w_error = (slope.abs() * error + bend * error**2 / 2 + stored * (w.abs() + factor * size) + unit.tiny) * x.allowed
    out = w @ x.v
    out_error = (w_error + (keys + stored) * w.abs()) @ x.v.abs() + stored * out.abs()

    by_w, by_w_size = x.g @ x.v.transpose(1, 2), x.g.abs() @ x.v.abs().transpose(1, 2)
    slope_error = (bend * error + stored * factor * size) * x.allowed
    ds = slope * by_w
    ds_error = slope_error * by_w.abs() + (slope.abs() + slope_error) * dims * by_w_size + stored * ds.abs()
    none = out.new_zeros(())
    return Weighed(w, w_error, out, out_error, none, ds, ds_error, none)


def _suffix(x: Tensor) -> Tensor:
    return x.flip(2).cumsum(2).flip(2)


@weighed.register(nz.StickBreaking)
def _(normalizer: nz.StickBreaking, x: Values, unit: Units) -> Weighed:
    """Propagate errors through ``log w = s - S``, S the suffix sums of softplus, and its backward by prefix sums."""
    stored, allowed, v, g = unit.stored, x.allowed, x.v, x.g
    keys, dims = v.shape[1] * unit.summed, v.shape[2] * unit.summed + stored
    s, e = x.score.masked_fill(~allowed, 0.0), x.error.masked_fill(~allowed, 0.0)
    share = torch.sigmoid(s) * allowed
    taken = functional.softplus(s, threshold=100.0) * allowed
    since = _suffix(taken)
    since_error = _suffix(share * e + stored * taken) + (keys + stored) * since
    a = torch.exp(s - since) * allowed
    a_log_error = e + since_error + stored * (1 + s.abs() + since)
    a_error = (a * torch.expm1(a_log_error.clamp(max=MOST_LOG)) + unit.tiny) * allowed
    total, total_error = since[..., :1], since_error[..., :1]
    rest = torch.exp(-total)
    rest_error = rest * torch.expm1((total_error + stored * (1 + total)).clamp(max=MOST_LOG)) + unit.tiny
    out = a @ v
    out_error = (a_error + (keys + stored) * a) @ v.abs() + stored * out.abs()
    own, own_size, v_error = x.g_rest, x.g_rest.abs(), out.new_zeros(())
    if normalizer.remainder:
        out_error = out_error + rest_error * v.abs() + stored * (out.abs() + rest * v.abs())
        out = out + rest * v
        own = own + (g * v).sum(2, keepdim=True)
        own_size = own_size + (g * v).abs().sum(2, keepdim=True)
        v_error = (rest_error + (stored + unit.result) * rest) * g.abs()

    by_a, size = g @ v.transpose(1, 2), g.abs() @ v.abs().transpose(1, 2)
    flow, left = a * by_a, rest * own
    flow_error = a_error * by_a.abs() + (a + a_error) * dims * size + stored * flow.abs()
    left_error = rest_error * own.abs() + (rest + rest_error) * dims * own_size + stored * left.abs()
    before, before_size = flow.cumsum(2) + left, flow.abs().cumsum(2) + left.abs()
    before_error = flow_error.cumsum(2) + left_error + (keys + stored) * before_size
    share_error = share * (1 - share) * e + stored * share
    ds = flow - share * before
    ds_error = flow_error + share_error * before.abs() + (share + share_error) * before_error
    ds_error = (ds_error + stored * (flow.abs() + share * before_size)) * allowed
    return Weighed(a, a_error, out, out_error, rest_error, ds * allowed, ds_error, v_error)
