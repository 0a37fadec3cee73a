"""One-token steps of several sequences: flexjag's KVCache, and the caches that users make of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexjag.algebra.masks import Causal
from flexjag.api.attention import attention
from flexjag.api.cache import KVCache
from flexjag.api.plan import plan
from flexjag.bench.measuring.padded import Expected, Tensors
from flexjag.bench.suites.registry import Arm
from flexjag.jagged import Jagged

OURS = "flexjag KVCache"
CONCATENATED, PREALLOCATED = "padded, torch.cat + SDPA", "padded, preallocated + SDPA"
LISTED, LISTED_PREALLOCATED = "list, torch.cat + SDPA loop", "list, preallocated + SDPA loop"


@dataclass(frozen=True)
class DecodeSizes:
    """Sizes of a batch that is decoded.

    Attributes:
        lengths: Lengths of the S prompts.
        steps: Number of steps, each of one token for every sequence.
        layers: Number of layers.
        heads: Number of query heads H.
        groups: Number of key/value heads G.
        dim: Head dimensions D and E.
    """

    lengths: Sequence[int]
    steps: int
    layers: int
    heads: int
    groups: int
    dim: int


class DecodeBatch:
    """Prompts' keys and values, the steps' queries, keys and values, and arms that attend step by step.

    What an arm returns are the outputs of the last step in all layers. Each call begins behind the prompts again.

    Args:
        sizes: Sizes of the batch.
        dtype: Dtype of all tensors.
        device: Device of all tensors.
        seed: Random seed of their values.
    """

    def __init__(self, sizes: DecodeSizes, dtype: torch.dtype, device: str, seed: int) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        segments, prompts = len(sizes.lengths), sum(sizes.lengths)
        kv = (sizes.groups, sizes.dim)
        self.prompts = [(draw(prompts, *kv), draw(prompts, *kv)) for _ in range(sizes.layers)]
        steps = (sizes.layers, sizes.steps, segments)
        self.q, self.k, self.v = draw(*steps, sizes.heads, sizes.dim), draw(*steps, *kv), draw(*steps, *kv)

    def arms(self) -> list[Arm]:
        """All arms."""
        made: dict[str, Callable[[], Callable[[], Tensors]]] = {
            OURS: self._ours,
            CONCATENATED: self._concatenated,
            PREALLOCATED: self._preallocated,
            LISTED: partial(self._listed, False),
            LISTED_PREALLOCATED: partial(self._listed, True),
        }
        tokens = len(self.sizes.lengths)
        return [
            Arm(name, torch.no_grad()(make), self._expected.check, steps=self.sizes.steps, tokens=tokens)
            for name, make in made.items()
        ]

    @cached_property
    def _expected(self) -> Expected:
        names = [f"output of layer {i}" for i in range(self.sizes.layers)]
        return Expected(self._exact, self.dtype, names, terms=max(self.sizes.lengths) + self.sizes.steps)

    def _exact(self, dtype: torch.dtype) -> Tensors:
        """The last step's outputs by their definition, one sequence after the other."""
        found = []
        for i, (keys, values) in enumerate(self.prompts):
            pieces = zip(keys.split(list(self.sizes.lengths)), values.split(list(self.sizes.lengths)), strict=True)
            rows = []
            for s, (k, v) in enumerate(pieces):
                k, v = (torch.cat(x).to(dtype) for x in ((k, self.k[i, :, s]), (v, self.v[i, :, s])))
                k, v = (x.repeat_interleave(self.sizes.heads // self.sizes.groups, 1) for x in (k, v))
                scores = torch.einsum("hd,nhd->hn", self.q[i, -1, s].to(dtype), k) * self.sizes.dim**-0.5
                rows.append(torch.einsum("hn,nhe->he", scores.softmax(1), v))
            found.append(torch.stack(rows))
        return tuple(found)

    def _new(self, t: int) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Layer, queries ``[S, H, D]``, keys and values ``[S, G, D]`` of a step's tokens."""
        return [(i, self.q[i, t], self.k[i, t], self.v[i, t]) for i in range(self.sizes.layers)]

    def _ours(self) -> Callable[[], Tensors]:
        sizes = self.sizes
        segments = len(sizes.lengths)
        prompts = Jagged.from_lengths(self.prompts[0][0], sizes.lengths)
        cache = KVCache(sizes.layers, sizes.groups, sizes.dim, segments=segments, dtype=self.dtype, device=self.device)
        cache.extend(prompts)
        for i, (k, v) in enumerate(self.prompts):
            cache.append(i, prompts.with_values(k), prompts.with_values(v))
        one = Jagged.from_lengths(self.q[0, 0], [1] * segments)
        mask = Causal("end")

        @torch.no_grad()
        def call() -> Tensors:
            found: list[Tensor] = []
            for t in range(sizes.steps):
                made = plan(one, cache.extend(one), mask=mask)
                found = []
                for i, q, k, v in self._new(t):
                    keys, values = cache.append(i, one.with_values(k), one.with_values(v))
                    found.append(attention(one.with_values(q), keys, values, plan=made).values)
            cache.rewind(sizes.steps)
            return tuple(found)

        return call

    def _padded(self, left: bool, room: int) -> tuple[list[list[Tensor]], Tensor]:
        """Prompts ``[S, G, N, D]`` of each layer's keys and values, and which columns hold tokens ``[S, N]``."""
        lengths = torch.tensor(self.sizes.lengths, device=self.device)
        longest = max(self.sizes.lengths)
        column = torch.arange(longest + room, device=self.device)
        real = column >= longest - lengths[:, None] if left else column < lengths[:, None]

        def pad(x: Tensor) -> Tensor:
            dense = x.new_zeros(len(lengths), longest + room, *x.shape[1:])
            dense[real] = x
            return dense.transpose(1, 2).contiguous()

        return [[pad(x) for x in layer] for layer in self.prompts], real

    def _concatenated(self) -> Callable[[], Tensors]:
        """Left padding, so that all sequences end in one column, which each step adds."""
        prompts, real = self._padded(left=True, room=0)
        more = real.new_ones(len(real), 1)

        @torch.no_grad()
        def call() -> Tensors:
            cache, allowed, found = [[*layer] for layer in prompts], real, list[Tensor]()
            for t in range(self.sizes.steps):
                allowed, found = torch.cat([allowed, more], 1), []
                for i, q, *new in self._new(t):
                    cache[i] = [torch.cat([x, y[:, :, None]], 2) for x, y in zip(cache[i], new, strict=True)]
                    found.append(_attend(q, cache[i], allowed[:, None, None]))
            return tuple(found)

        return call

    def _preallocated(self) -> Callable[[], Tensors]:
        """Right padding, with room for all steps; a step reads up to the longest sequence."""
        cache, real = self._padded(left=False, room=self.sizes.steps)
        lengths, longest = real.sum(1), max(self.sizes.lengths)
        rows, column = torch.arange(len(lengths), device=self.device), torch.arange(real.shape[1], device=self.device)

        @torch.no_grad()
        def call() -> Tensors:
            found: list[Tensor] = []
            for t in range(self.sizes.steps):
                end, at, found = longest + t + 1, lengths + t, []
                allowed = (column[:end] <= at[:, None])[:, None, None]
                for i, q, *new in self._new(t):
                    for x, y in zip(cache[i], new, strict=True):
                        x[rows, :, at] = y
                    found.append(_attend(q, [x[:, :, :end] for x in cache[i]], allowed))
            return tuple(found)

        return call

    def _listed(self, preallocated: bool) -> Callable[[], Tensors]:
        """Tensors ``[1, G, n, D]`` of each sequence, which grow by ``torch.cat`` or have room for all steps."""
        lengths, room = list(self.sizes.lengths), self.sizes.steps if preallocated else 0

        def split(x: Tensor) -> list[Tensor]:
            pieces = [y.transpose(0, 1) for y in x.split(lengths)]
            return [torch.cat([y, y.new_zeros(y.shape[0], room, y.shape[2])], 1)[None] for y in pieces]

        prompts = [[split(x) for x in layer] for layer in self.prompts]

        @torch.no_grad()
        def call() -> Tensors:
            cache, found = [[[*x] for x in layer] for layer in prompts], list[Tensor]()
            for t in range(self.sizes.steps):
                found = []
                for i, q, *new in self._new(t):
                    for x, y in zip(cache[i], new, strict=True):
                        for s, row in enumerate(y.split(1)):
                            if preallocated:
                                x[s][:, :, lengths[s] + t] = row
                            else:
                                x[s] = torch.cat([x[s], row[:, :, None]], 2)
                    ends = [n + t + 1 for n in lengths]
                    each = [[x[s][:, :, :end] for x in cache[i]] for s, end in enumerate(ends)]
                    found.append(torch.cat([_attend(one, kv) for one, kv in zip(q.split(1), each, strict=True)]))
            return tuple(found)

        return call


def _attend(q: Tensor, kv: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Attention of one query ``[B, H, D]`` of each sequence to keys and values ``[B, G, N, D]``."""
    return scaled_dot_product_attention(q[:, :, None], kv[0], kv[1], attn_mask=mask, enable_gqa=True)[:, :, 0]
