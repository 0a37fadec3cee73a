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


LAYERS: list[dict] = [
    {},
    {"silu": "u", "concat_u": True, "concat_x": True, "output_bias": False},  # as STULayer
    {"silu": "u", "concat_u": True, "concat_x": True, "group_norm": True},
    {"concat_ua": True},  # as the research model
    {"concat_x": True, "group_norm": True},
    {"silu": "u", "concat_u": True},
]
"""Options of layers."""


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
        uvqk = functional.linear(normed, own.projection.weight, own.projection.bias)
        u, v, q, k = uvqk.split([HEADS * VALUE_DIM, HEADS * VALUE_DIM, HEADS * DIM, HEADS * DIM], -1)
        u = functional.silu(u)
        if own.silu == "uvqk":
            v, q, k = (functional.silu(t) for t in (v, q, k))
        v, q, k = (t.unflatten(-1, (HEADS, -1)) for t in (v, q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(DIM) + biases
        weights = scores * torch.sigmoid(scores) * allowed[:, None] * scale
        o = torch.einsum("bhij,bjhe->bihe", weights, v.to(weights.dtype)).flatten(2).to(x.dtype)
        gain, shift = own.attention_norm.weight, own.attention_norm.bias
        if own.group_norm:
            normed = functional.layer_norm(o.unflatten(-1, (HEADS, VALUE_DIM)), [VALUE_DIM], eps=EPS)
            normed = (normed * gain[:, None] + shift[:, None]).flatten(-2)
        else:
            normed = functional.layer_norm(o, [HEADS * VALUE_DIM], gain, shift, EPS)
        if own.concat_ua:
            gated = torch.cat([u, normed, u * normed], -1)
        elif own.concat_u and own.concat_x:
            gated = torch.cat([u, o, u * normed], -1)
        elif own.concat_u or own.concat_x:
            gated = torch.cat([u if own.concat_u else o, u * normed], -1)
        else:
            gated = u * normed
        return x + functional.linear(gated, own.output.weight, own.output.bias)


def allowed_pairs(
    sizes: Tensor,
    most: int,
    contextual: int | Tensor,
    targets: Tensor,
    max_attn_len: int | None,
    min_full: int,
    causal: bool = True,
    target_group_size: int = 1,
) -> Tensor:
    """HSTU's mask ``[S, N, N]`` as its definition has it."""
    row = torch.arange(most)
    contextual = torch.as_tensor(contextual).expand(len(sizes))[:, None]
    skip = (contextual - 1).clamp(min=0)
    end = sizes[:, None] - skip - targets[:, None]
    place = torch.minimum((row - skip).clamp(min=0), end)  # without targets, no place is past the end
    i, j, last = place[:, :, None], place[:, None], end[:, None]
    distance = i - j if causal else (i - j).abs()
    seen = (row[:, None] == row[None]) | (distance > 0)
    if max_attn_len:
        seen = seen & ((distance <= max_attn_len) | ((i >= last - min_full) & (min_full > 0)))
    seen = seen | ((i == 0) & (j < last) & (contextual[:, None] > 0))
    nth = row[None] - (sizes - targets)[:, None]
    group = torch.where(nth >= 0, nth // target_group_size, -1 - row)  # what is no target is a group of its own
    before = row[:, None] >= row[None] if causal else torch.tensor(True)
    seen = seen | ((group[:, :, None] == group[:, None]) & before)
    inside = row[None] < sizes[:, None]
    return seen & inside[:, :, None] & inside[:, None]
