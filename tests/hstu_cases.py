"""HSTU layers, small, and what to compare them with."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

import flexjag as fj
from flexjag.variants import HSTU, HSTUBias, HSTULayer

WIDTH, HEADS, DIM, VALUE_DIM = 12, 2, 6, 5
DISTANCE, BUCKETS = 9, 20
EPS = 1e-6
# Float64: sums of up to a thousand products, and a norm that divides by at least sqrt(EPS), a thousand times as much.
CLOSE = 1e3 * 1e3 * torch.finfo(torch.float64).eps


def make_layer(dtype: torch.dtype = torch.float64, **options: object) -> HSTULayer:
    """A layer with both biases, and no parameter at its neutral starting value."""
    bias = HSTUBias(HEADS, max_distance=DISTANCE, time_buckets=BUCKETS, dtype=dtype)
    layer = HSTULayer(WIDTH, HEADS, DIM, VALUE_DIM, bias=bias, dtype=dtype, **options)  # type: ignore[arg-type]
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def clock(sizes: list[int], seed: int = 6) -> fj.Jagged:
    """Whole seconds, ascending within a segment."""
    g = torch.Generator().manual_seed(seed)
    return fj.Jagged.from_lengths(torch.randint(0, 900, (sum(sizes),), generator=g).cumsum(0), sizes)


def make_stack(dtype: torch.dtype = torch.float64, shared: bool = False) -> HSTU:
    layers = [make_layer(dtype) for _ in range(2)]
    if shared:
        layers[1].bias = layers[0].bias
    return HSTU(layers)


def close(got: Tensor, wanted: Tensor) -> None:
    largest = max([1.0, *wanted.detach().abs().flatten().tolist()])
    torch.testing.assert_close(got, wanted, rtol=0, atol=CLOSE * largest)


class Padded(nn.Module):
    """The layer written out on padded tensors ``[S, N, ...]``, with the same parameters by the same names."""

    def __init__(self, layer: HSTULayer) -> None:
        super().__init__()
        self.layer = deepcopy(layer)

    def biases(self, times: Tensor, kv_times: Tensor) -> Tensor:
        bias, place = self.layer.bias, torch.arange(times.shape[1])
        assert bias is not None
        assert bias.position is not None
        assert bias.time is not None
        distance = (place[None] - place[:, None]).clamp(-DISTANCE, DISTANCE) + DISTANCE
        passed = (times[:, :, None] - kv_times[:, None]).clamp(min=1).double()
        bucket = (passed.log() / 0.301).floor().long().clamp(max=bias.time.shape[1] - 1)
        return bias.position[:, distance][None] + bias.time[:, bucket].transpose(0, 1)

    def forward(self, x: Tensor, allowed: Tensor, scale: Tensor | float, biases: Tensor | float) -> Tensor:
        own = self.layer
        normed = functional.layer_norm(x, [WIDTH], own.input_norm.weight, own.input_norm.bias, EPS)
        uvqk = functional.silu(functional.linear(normed, own.projection.weight, own.projection.bias))
        u, v, q, k = uvqk.split([HEADS * VALUE_DIM, HEADS * VALUE_DIM, HEADS * DIM, HEADS * DIM], -1)
        v, q, k = (t.unflatten(-1, (HEADS, -1)) for t in (v, q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(DIM) + biases
        weights = scores * torch.sigmoid(scores) * allowed[:, None] * scale
        o = torch.einsum("bhij,bjhe->bihe", weights, v.to(weights.dtype)).flatten(2).to(x.dtype)
        normed = functional.layer_norm(o, [HEADS * VALUE_DIM], own.attention_norm.weight, own.attention_norm.bias, EPS)
        return x + functional.linear(normed * u, own.output.weight, own.output.bias)


def allowed_pairs(
    sizes: Tensor, most: int, contextual: int, targets: Tensor, max_attn_len: int | None, min_full: int
) -> Tensor:
    """HSTU's mask ``[S, N, N]`` as its definition has it."""
    row = torch.arange(most)
    end = sizes - max(contextual - 1, 0) - targets
    place = (row - contextual + 1).clamp(min=0) if contextual else row
    place = torch.minimum(place[None], end[:, None])  # without targets, no place is past the end
    i, j, last = place[:, :, None], place[:, None], end[:, None, None]
    seen = (row[:, None] == row[None]) | (i > j)
    if max_attn_len is not None:
        seen = seen & ((i - j <= max_attn_len) | ((i >= last - min_full) & (min_full > 0)))
    seen = seen | ((i == 0) & (j < last) & (contextual > 0))
    inside = row[None] < sizes[:, None]
    return seen & inside[:, :, None] & inside[:, None]
