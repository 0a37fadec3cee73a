"""Padded reference implementations of attention with weights other than softmax: the baseline of the benchmarks.

Shapes are ``q, k, v [S, H, N, D]`` and ``allowed [1, 1, N, N]``. Padding is not masked: it is zero and on the right, so
under a causal mask no key of a real query is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.bench.measuring.padded import Padding
from flexjag.variants import HSTULayer


@dataclass(frozen=True, eq=False)
class Dense:
    """Padded attention over one batch, with the masks and indices that depend on its lengths alone.

    Attributes:
        padding: Index between the packed and the padded layout.
        lengths: Segment lengths ``[S]``.
        scale: Factor of the scores ``q·k``.
    """

    padding: Padding
    lengths: Tensor
    scale: float

    @cached_property
    def step(self) -> Tensor:
        """Relative positions i - j of query i and key j, ``[N, N]``."""
        place = torch.arange(self.padding.longest, device=self.lengths.device)
        return place[:, None] - place

    @cached_property
    def causal(self) -> Tensor:
        """Causal mask j <= i, bool ``[N, N]``."""
        return self.step >= 0

    @cached_property
    def earlier(self) -> Tensor:
        """Strictly causal mask j < i, bool ``[N, N]``."""
        return self.step > 0

    @cached_property
    def distance(self) -> Tensor:
        """Columns ``[N, N]`` in a table ``[H, 2N - 1]`` of biases by relative position j - i, from -N + 1 on."""
        return self.padding.longest - 1 - self.step

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled scores ``scale·q·k``, ``[S, H, N, N]``."""
        return q @ k.transpose(2, 3) * self.scale

    def silu(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        """HSTU attention (generative-recommenders): weights ``silu(q·k + bias) / N``, bias by relative position."""
        scores = self.scores(q, k)
        if table is not None:
            scores = scores + table[:, self.distance]
        return (functional.silu(scores) / self.padding.longest * self.causal) @ v

    def sigmoid(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sigmoid attention: weights ``sigmoid(q·k - log n)``, n the segment length.

        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431.
        """
        bias = self.lengths.clamp(min=1).log()[:, None, None, None].to(q.dtype)
        return (torch.sigmoid(self.scores(q, k) - bias) * self.causal) @ v

    def stick_breaking(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stick-breaking attention (arXiv 2410.17980): ``σ(z_ij) Π (1 - σ(z_il))``, the product over keys j < l < i."""
        scores = self.scores(q, k)
        scores = scores if scores.dtype == torch.float64 else scores.float()  # sums of logarithms need it
        left = functional.logsigmoid(-scores).masked_fill(~self.earlier, 0.0)
        nearer = left.flip(3).cumsum(3).flip(3) - left
        weights = torch.exp(functional.logsigmoid(scores) + nearer) * self.earlier
        return weights.to(v.dtype) @ v

    def layer(self, own: HSTULayer, x: Tensor, times: Tensor) -> Tensor:
        """HSTU layer on ``[S, N, width]`` with the parameters of `own`, queried at the times of the next tokens."""
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
        """Time of each token's successor ``[S, N]``; for the last token of a segment its own."""
        place = torch.arange(self.padding.longest, device=times.device) + 1
        return times.gather(1, torch.minimum(place, (self.lengths[:, None] - 1).clamp(min=0)))
