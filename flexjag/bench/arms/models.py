"""Models for the suite ``train``: the same modules and weights run packed or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from flexjag.algebra.masks import Causal
from flexjag.algebra.normalizers import SiLU
from flexjag.api.attention import attention
from flexjag.api.plan import Plan, plan
from flexjag.jagged import Jagged
from flexjag.variants.hstu.layer import HSTU, HSTULayer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of queries, keys and values ``[..., H, D]``, for packed or for padded tokens."""


class Block(nn.Module):
    """A pre-norm decoder layer: attention and an MLP of four times the width, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6) for _ in range(2)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Layer output ``[..., width]`` for inputs ``[..., width]``."""
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in parts)
        x = x + self.output(attend(q, k, v).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """Decoder-only language model over bytes, with learned position embeddings.

    Args:
        layers: Number of layers.
        width: Features per token.
        heads: Number of heads H, a divisor of the width.
        longest: Maximum number of positions.
    """

    def __init__(self, layers: int, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits ``[..., 256]`` of tokens ``[...]`` at given positions ``[...]``."""
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, attend)
        return self.head(self.norm(x))

    def packed(self, tokens: Jagged, backend: str = "auto") -> Tensor:
        """Logits ``[T, 256]`` with flexjag's attention; planned in the call, once for all layers."""
        made = plan(tokens, mask=Causal())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x, y, z = (tokens.with_values(t) for t in (q, k, v))
            out = attention(x, y, z, plan=made, backend=backend)
            assert isinstance(out, Jagged)
            return out.values

        return self(tokens.values, tokens.positions, attend)

    def looped(self, tokens: Jagged, lengths: Sequence[int]) -> Tensor:
        """Logits ``[T, 256]`` with one SDPA call per segment and layer."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pieces = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
            return torch.cat([causal_sdpa(*(x[None] for x in piece))[0] for piece in pieces])

        return self(tokens.values, tokens.positions, attend)

    def padded(self, tokens: Tensor) -> Tensor:
        """Logits ``[S, N, 256]`` of tokens ``[S, N]``, padded on the right, so that ``is_causal`` hides the padding."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self(tokens, positions, causal_sdpa)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of ``[S, N, H, D]`` tensors by PyTorch's SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Recommender(nn.Module):
    """Sequential recommender: item embedding, HSTU layers, and logits of the next item by the tied embedding.

    Args:
        items: Number of items.
        layers: Number of layers.
        width: Features per token.
        heads: Number of heads H, a divisor of the width.
        longest: Maximum number of positions, by which HSTU divides its weights.
    """

    def __init__(self, items: int, layers: int, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.positions = nn.Embedding(longest, width)
        nn.init.normal_(self.items.weight, std=width**-0.5)
        self.stack = HSTU(HSTULayer(width, heads, width // heads) for _ in range(layers))
        self.scale = 1 / longest

    def packed(self, items: Jagged) -> Tensor:
        """Logits ``[T, items]`` with flexjag's attention."""
        made: Plan = plan(items, mask=Causal(), normalizer=SiLU(self.scale))
        x = items.with_values(self.items(items.values) + self.positions(items.positions))
        return functional.linear(self.stack(x, made).values, self.items.weight)

    def padded(self, items: Tensor) -> Tensor:
        """Logits ``[S, N, items]`` of items ``[S, N]``, padded on the right, by the equations of the HSTU paper."""
        size = items.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=items.device).tril()
        x = self.items(items) + self.positions(torch.arange(size, device=items.device))
        for layer in self.stack.layers:
            assert isinstance(layer, HSTULayer)
            x = self._layer(layer, x, causal)
        return functional.linear(x, self.items.weight)

    def _layer(self, layer: HSTULayer, x: Tensor, causal: Tensor) -> Tensor:
        values, keys = layer.heads * layer.value_dim, layer.heads * layer.dim
        parts = functional.silu(layer.projection(layer.input_norm(x))).split([values, values, keys, keys], -1)
        u, (v, q, k) = parts[0], (t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in parts[1:])
        weights = functional.silu(q @ k.transpose(2, 3) * layer.dim**-0.5) * self.scale
        out = (weights.masked_fill(~causal, 0.0) @ v).transpose(1, 2).flatten(2)
        return x + layer.output(layer.attention_norm(out) * u)
