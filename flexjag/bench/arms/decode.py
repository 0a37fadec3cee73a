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
    """Prompts' keys and values, the steps' queries, keys and values, and the arms that attend step by step.

    What an arm returns are the outputs of the last step, those of all layers. Each call begins behind the prompts again.

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

    def _run(self, step: Callable[[int, Tensor, Tensor, Tensor], Tensor], t: int) -> Tensors:
        layers = range(self.sizes.layers)
        return tuple([step(i, self.q[i, t], self.k[i, t], self.v[i, t]) for i in layers])

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

        def call() -> Tensors:
            out: Tensors = ()
            for t in range(sizes.steps):
                made = plan(one, cache.extend(one), mask=mask)

                def step(i: int, q: Tensor, k: Tensor, v: Tensor, made=made) -> Tensor:  # type: ignore[no-untyped-def]
                    keys, values = cache.append(i, one.with_values(k), one.with_values(v))
                    return attention(one.with_values(q), keys, values, plan=made).values

                out = self._run(step, t)
            cache.rewind(sizes.steps)
            return out

        return torch.no_grad()(call)

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

        def call() -> Tensors:
            cache, allowed, out = [[*layer] for layer in prompts], real, ()
            for t in range(self.sizes.steps):
                allowed = torch.cat([allowed, more], 1)
                mask = allowed[:, None, None]

                def step(i: int, q: Tensor, k: Tensor, v: Tensor, mask=mask, cache=cache) -> Tensor:  # type: ignore[no-untyped-def]
                    cache[i] = [torch.cat([x, y[:, :, None]], 2) for x, y in zip(cache[i], (k, v), strict=True)]
                    return _attend(q[:, :, None], *cache[i], mask)[:, :, 0]

                out = self._run(step, t)
            return out

        return torch.no_grad()(call)

    def _preallocated(self) -> Callable[[], Tensors]:
        """Right padding, with room for all steps; a step reads up to the longest sequence."""
        cache, real = self._padded(left=False, room=self.sizes.steps)
        lengths, longest = real.sum(1), max(self.sizes.lengths)
        rows, column = torch.arange(len(lengths), device=self.device), torch.arange(real.shape[1], device=self.device)

        def call() -> Tensors:
            out: Tensors = ()
            for t in range(self.sizes.steps):
                end, at = longest + t + 1, lengths + t
                mask = (column[:end] <= at[:, None])[:, None, None]

                def step(i: int, q: Tensor, k: Tensor, v: Tensor, mask=mask, end=end, at=at) -> Tensor:  # type: ignore[no-untyped-def]
                    for x, y in zip(cache[i], (k, v), strict=True):
                        x[rows, :, at] = y
                    return _attend(q[:, :, None], *(x[:, :, :end] for x in cache[i]), mask)[:, :, 0]

                out = self._run(step, t)
            return out

        return torch.no_grad()(call)

    def _listed(self, preallocated: bool) -> Callable[[], Tensors]:
        """Tensors ``[G, n, D]`` of each sequence, which grow by ``torch.cat`` or have room for all steps."""
        lengths, room = list(self.sizes.lengths), self.sizes.steps if preallocated else 0

        def split(x: Tensor) -> list[Tensor]:
            pieces = [y.transpose(0, 1) for y in x.split(lengths)]
            return [torch.cat([y, y.new_zeros(y.shape[0], room, y.shape[2])], 1) for y in pieces]

        prompts = [[split(x) for x in layer] for layer in self.prompts]

        def call() -> Tensors:
            cache, out = [[[*x] for x in layer] for layer in prompts], ()
            for t in range(self.sizes.steps):

                def one(i: int, s: int, q: Tensor, *new: Tensor, t: int = t, cache=cache) -> Tensor:  # type: ignore[no-untyped-def]
                    end, parts = lengths[s] + t + 1, []
                    for x, y in zip(cache[i], new, strict=True):
                        if preallocated:
                            x[s][:, end - 1] = y
                        else:
                            x[s] = torch.cat([x[s], y[:, None]], 1)
                        parts.append(x[s][None, :, :end])
                    return _attend(q[None, :, None], *parts)[0, :, 0]

                def step(i: int, *new: Tensor, one=one) -> Tensor:  # type: ignore[no-untyped-def]
                    return torch.stack([one(i, s, *(x[s] for x in new)) for s in range(len(lengths))])

                out = self._run(step, t)
            return out

        return torch.no_grad()(call)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
