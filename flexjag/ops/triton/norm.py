"""Normalization with statistics per segment, with Triton."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from flexjag.ops.triton.common import TILE, has_kernel, jit, launch, span_of


@jit
def standardize_segments(values, out, factors, offsets, columns, eps, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """Center each segment and scale it by 1 / sqrt(mean square + eps), in three passes, two of which read from L2."""
    segment = tl.program_id(0).to(tl.int64)
    start, length = span_of(offsets, segment)
    size = length.to(tl.int64) * columns
    values += start * columns
    out += start * columns
    within = tl.arange(0, BLOCK)
    count = tl.maximum(size, 1).to(tl.float32)
    mean = 0.0
    if CENTER:
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, size, BLOCK):
            total += tl.load(values + begin + within, mask=begin + within < size, other=0).to(tl.float32)
        mean = tl.sum(total, 0) / count
    square = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        mask = begin + within < size
        x = tl.load(values + begin + within, mask=mask, other=0).to(tl.float32)
        x = tl.where(mask, x - mean, 0.0)
        square += x * x
    factor = 1.0 / tl.sqrt(tl.sum(square, 0) / count + eps)
    for begin in range(0, size, BLOCK):
        mask = begin + within < size
        x = tl.load(values + begin + within, mask=mask, other=0).to(tl.float32)
        tl.store(out + begin + within, ((x - mean) * factor).to(out.dtype.element_ty), mask=mask)
    factor = tl.where(size > 0, factor, 0.0)
    tl.store(factors + segment, factor.to(factors.dtype.element_ty))


@jit
def standardize_segments_backward(
    grad, out, result, factors, offsets, columns, CENTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient factor (g - y mean(g y) - mean(g)) per segment, the last term only if CENTER."""
    segment = tl.program_id(0).to(tl.int64)
    start, length = span_of(offsets, segment)
    size = length.to(tl.int64) * columns
    grad += start * columns
    out += start * columns
    result += start * columns
    within = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        mask = begin + within < size
        g = tl.load(grad + begin + within, mask=mask, other=0).to(tl.float32)
        product += g * tl.load(out + begin + within, mask=mask, other=0).to(tl.float32)
        total += g
    count = tl.maximum(size, 1).to(tl.float32)
    product_mean = tl.sum(product, 0) / count
    mean = tl.sum(total, 0) / count if CENTER else 0.0
    factor = tl.load(factors + segment).to(tl.float32)
    for begin in range(0, size, BLOCK):
        mask = begin + within < size
        g = tl.load(grad + begin + within, mask=mask, other=0).to(tl.float32)
        y = tl.load(out + begin + within, mask=mask, other=0).to(tl.float32)
        dx = factor * (g - y * product_mean - mean)
        tl.store(result + begin + within, dx.to(result.dtype.element_ty), mask=mask)


def standardize(values: Tensor, offsets: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """See :mod:`flexjag.ops.norm`."""
    if not has_kernel(values):
        return NotImplemented
    num_segments = offsets.shape[0] - 1
    out, factors = values.new_empty(values.shape), values.new_empty((num_segments,))
    arguments = {"values": values.contiguous(), "out": out, "factors": factors, "offsets": offsets}
    arguments |= {"columns": values.shape[1:].numel(), "eps": eps}
    launch(standardize_segments, (num_segments,), arguments, CENTER=center, BLOCK=TILE, num_warps=8)
    return out, factors


def standardize_backward(grad: Tensor, out: Tensor, factors: Tensor, offsets: Tensor, center: bool) -> Tensor:
    """See :mod:`flexjag.ops.norm`."""
    if not has_kernel(grad, out, factors):
        return NotImplemented
    result = out.new_empty(out.shape)
    arguments = {"grad": grad.contiguous(), "out": out.contiguous(), "result": result, "factors": factors.contiguous()}
    arguments |= {"offsets": offsets, "columns": out.shape[1:].numel()}
    launch(standardize_segments_backward, (offsets.shape[0] - 1,), arguments, CENTER=center, BLOCK=TILE, num_warps=8)
    return result
