"""Attention whose weights are no softmax, written out on padded tensors: what flexjag is measured against.

``q, k, v [S, H, N, D]`` and ``allowed [1, 1, N, N]``. Zeros of padding may attend and be attended where they weigh
nothing: under a causal mask a real query has no padding among its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.bench.padded import Padding
from flexjag.variants import HSTULayer


@dataclass(frozen=True, eq=False)
class Dense:
    """A padded batch's layout, and what its attention needs of it once.

    Attributes:
        padding: Where tokens stand.
        lengths: ``[S]``.
        scale: Of ``q·k``.
    """

    padding: Padding
    lengths: Tensor
    scale: float

    @cached_property
    def step(self) -> Tensor:
        """``[N, N]``: how many positions the key is behind the query."""
        place = torch.arange(self.padding.longest, device=self.lengths.device)
        return place[:, None] - place

    @cached_property
    def causal(self) -> Tensor:
        """Boolean ``[N, N]``."""
        return self.step >= 0

    @cached_property
    def earlier(self) -> Tensor:
        """Boolean ``[N, N]``, without the diagonal."""
        return self.step > 0

    @cached_property
    def distance(self) -> Tensor:
        """``[N, N]``: the column of a table ``[H, 2N - 1]`` of biases by relative position, -N + 1 first."""
        return self.padding.longest - 1 - self.step

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[S, H, N, N]``."""
        return q @ k.transpose(2, 3) * self.scale

    def silu(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        """HSTU's: ``silu(q·k + table[i - j]) / N`` (generative-recommenders)."""
        scores = self.scores(q, k)
        if table is not None:
            scores = scores + table[:, self.distance]
        return (functional.silu(scores) / self.padding.longest * self.causal) @ v

    def sigmoid(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``sigmoid(q·k - log n)``, n the segment's length (Theory of Sigmoid Self-Attention, arXiv 2409.04431)."""
        bias = self.lengths.clamp(min=1).log()[:, None, None, None].to(q.dtype)
        return (torch.sigmoid(self.scores(q, k) - bias) * self.causal) @ v

    def stick_breaking(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each key takes its share of what those between it and the query left (arXiv 2410.17980)."""
        scores = self.scores(q, k)
        scores = scores if scores.dtype == torch.float64 else scores.float()  # as sums of logarithms need it
        left = functional.logsigmoid(-scores).masked_fill(~self.earlier, 0.0)
        nearer = left.flip(3).cumsum(3).flip(3) - left
        weights = torch.exp(functional.logsigmoid(scores) + nearer) * self.earlier
        return weights.to(v.dtype) @ v

    def layer(self, own: HSTULayer, x: Tensor, times: Tensor) -> Tensor:
        """An HSTU layer with the parameters of ours, on ``[S, N, width]``, asked when a token's successor happened."""
        assert own.bias is not None
        assert own.bias.position is not None
        assert own.bias.time is not None
        norm, gate_norm, heads = own.input_norm, own.attention_norm, own.heads
        assert isinstance(gate_norm, torch.nn.LayerNorm)
        normed = functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        uvqk = functional.silu(functional.linear(normed, own.projection.weight, own.projection.bias))
        values, keys = heads * own.value_dim, heads * own.dim
        u, *rest = uvqk.split([values, values, keys, keys], 2)
        v, q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in rest)
        passed = (self._next(times)[:, :, None] - times[:, None]).clamp(min=1)
        bucket = (passed.double().log() / own.bias.bucket_width).floor().long().clamp(max=own.bias.time.shape[1] - 1)
        bias = own.bias.position[0, self.distance] + own.bias.time[0, bucket]
        scores = self.scores(q, k) + bias[:, None]
        out = (functional.silu(scores) / self.padding.longest * self.causal) @ v
        out = out.transpose(1, 2).flatten(2)
        gated = functional.layer_norm(out, gate_norm.normalized_shape, gate_norm.weight, gate_norm.bias, gate_norm.eps)
        return x + functional.linear(gated * u, own.output.weight, own.output.bias)

    def _next(self, times: Tensor) -> Tensor:
        """``[S, N]``: the next token's time, and the last token's own."""
        place = torch.arange(self.padding.longest, device=times.device) + 1
        return times.gather(1, torch.minimum(place, (self.lengths[:, None] - 1).clamp(min=0)))
