"""Search space of the autotuner: candidate kernel options, and the masks and scores on which they are timed.

The candidates are few, because each takes seconds to compile. They were chosen by the machine code that
:func:`flexjag.compile_for` makes (bfloat16, a causal window or prefix, dynamic sizes), not by time on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra.masks import Causal, Dense, Mask, Prefix, SameGroup, Window
from flexjag.algebra.scores import Alibi, RelativeBias, Score
from flexjag.api.attention import attention
from flexjag.api.plan import Plan, plan
from flexjag.backends.flex import tuning
from flexjag.bench.measuring.lengths import document_lengths
from flexjag.bench.measuring.measure import RESULTS
from flexjag.bench.measuring.padded import Expected, Tensors
from flexjag.bench.suites.registry import Arm
from flexjag.jagged import Jagged

STEPS = 10  # per sample, so that the launch of each overlaps with the previous one
MAX_DISTANCE = 128  # of the relative bias

FORWARD = (
    (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3),
    (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 4, 3), (128, 128, 8, 3),
)  # fmt: skip
"""Candidates for the forward: block sizes along queries and keys, warps, pipeline stages.

For sm_90 none of them spills at D = 64. At D = 128 the 64 x 128 block, 128 x 32 with 4 warps and 128 x 128 with 3
stages store 32 to 96 bytes per thread. Left out were 128 x 64 and 128 x 128 with 4 warps (0.3 to 3.9 kB). TMA saves 25
to 41 registers where they are not used up, for 1 KiB of shared memory. For sm_80 at D = 64, 64 x 128 stores 12 bytes.
"""

BACKWARD = (
    (32, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 3),
    (64, 64, 4, 3), (32, 64, 8, 3),
)  # fmt: skip
"""Candidates for the backward: short and long side of both loops' blocks, warps, pipeline stages.

For sm_90 none of them spills at D = 64. At D = 128 the 64 x 128 blocks store 128 or 208 bytes per thread, 64 x 64 with
4 warps 400 or 484. For sm_80 at D = 64, those with a short side of 64 store 36 to 248 bytes. Left out were 32 x 128
with 4 warps (0.1 and 2.5 kB for sm_90) and 128 x 128 (0.7 and 2.8 kB).
"""

WITH_TMA = 3
"""Number of leading candidates that are also tried with TMA, from Hopper on."""

Attend = Callable[[Mapping[str, Any]], Callable[..., tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class TuningSizes:
    """Sizes of the tuning batch.

    Attributes:
        heads: Query heads H.
        kv_heads: Key/value heads G.
        dim: Head dimensions D and E.
        dtype: Dtype of q, k and v.
        tokens: Number of tokens T, in documents of long-tailed lengths.
        seed: Random seed of lengths and values.
        device: Device of the batch.
    """

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    tokens: int
    seed: int = 0
    device: str = "cuda"


class Subject:
    """A mask and a score on one batch, on which candidates are timed.

    Args:
        name: Name in the file.
        sizes: Sizes of the batch.
        mask: Function of lengths and device that returns the mask; the first token of a segment may have no key.
        score: Function of a learned tensor that returns the score.
        learned: Shape of that tensor; None without a score.
    """

    def __init__(
        self,
        name: str,
        sizes: TuningSizes,
        mask: Callable[[Sequence[int], str], Mask],
        score: Callable[[Tensor], Score] | None = None,
        learned: tuple[int, ...] | None = None,
    ) -> None:
        self.name, self.sizes, self.score = name, sizes, score
        self.lengths = document_lengths(sizes.tokens, sizes.seed)
        self.mask = mask(self.lengths, sizes.device)
        generator = torch.Generator(sizes.device).manual_seed(sizes.seed)
        draw = partial(torch.randn, generator=generator, device=sizes.device)
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
        *self.leaves, self.grad = (draw(sizes.tokens, h, sizes.dim).to(sizes.dtype) for h in heads)
        if learned is not None:
            self.leaves.append(draw(learned))
        for x in self.leaves:
            x.requires_grad_()

    @cached_property
    def plan(self) -> Plan:
        """The plan of the batch with this mask and score."""
        return plan(self._jagged(self.leaves[0]), mask=self.mask, score=self._score(self.leaves))

    def arms(self, attend: Attend, candidates: Mapping[str, tuning.Options], backward: bool) -> list[Arm]:
        """One arm per candidate, checked against float64. A sample times a forward or, with `backward`, both."""
        count = len(self.leaves) + 1 if backward else 1
        names, terms = (*RESULTS, "dscore"), [self.sizes.dim] * len(RESULTS) + [sum(n * n for n in self.lengths)]
        expected = Expected(lambda dtype: self._exact(dtype, backward), self.sizes.dtype, names[:count], terms[:count])

        def arm(name: str, options: tuning.Options) -> Arm:
            def make() -> Callable[[], Tensors]:
                run = attend(options)
                return self._backward(run) if backward else self._forward(run)

            return Arm(name, make, expected.check, memory=False, steps=STEPS, tokens=self.sizes.tokens)

        return [arm(name, options) for name, options in candidates.items()]

    def _forward(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[[], Tensors]:
        @torch.no_grad()
        def call() -> Tensors:
            for _ in range(STEPS - 1):
                self._out(run)
            return (self._out(run),)

        return call

    def _backward(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[[], Tensors]:
        def step() -> Tensors:
            out = self._out(run)
            return (out.detach(), *torch.autograd.grad(out, self.leaves, self.grad))

        def call() -> Tensors:
            for _ in range(STEPS - 1):
                step()
            return step()

        return call

    def _out(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
        return run(*self.leaves[:3], self.plan, self.sizes.dim**-0.5, False)[0]

    def _exact(self, dtype: torch.dtype, backward: bool) -> Tensors:
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        q, k, v = (self._jagged(x) for x in leaves[:3])
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v, mask=self.mask, score=self._score(leaves), backend="reference")
            assert isinstance(out, Jagged)
            grads = torch.autograd.grad(out.values, leaves, self.grad.to(dtype)) if backward else ()
        return (out.values.detach(), *grads)

    def _jagged(self, x: Tensor) -> Jagged:
        return Jagged.from_lengths(x, self.lengths)

    def _score(self, leaves: Sequence[Tensor]) -> Score | None:
        return None if self.score is None else self.score(leaves[3])


def _causal(lengths: Sequence[int], device: str) -> Mask:
    return Causal()


def _window_or_prefix(lengths: Sequence[int], device: str) -> Mask:
    return Causal() & (Window(256, 0) | Prefix(4)) & ~Prefix(1)  # without a key for a segment's first token


def _groups(lengths: Sequence[int], device: str) -> Mask:
    return Causal() & SameGroup(torch.arange(sum(lengths), device=device) // 50 % 7)


def _dense(lengths: Sequence[int], device: str) -> Mask:
    generator = torch.Generator().manual_seed(0)
    return Dense((torch.rand(sum(n * n for n in lengths), generator=generator) < 0.5).to(device))


def subjects(work: str, sizes: TuningSizes, first: int | None = None) -> list[Subject]:
    """The subjects that represent a kind of work (a key of `WORKS`), or the first few of them."""
    if work == "predicate":
        return [Subject("groups", sizes, _groups), Subject("dense", sizes, _dense)][:first]
    scores: dict[str, tuple[Any, Any]] = {
        "spans": (None, None),
        "formula": (Alibi, (sizes.heads,)),
        "lookup": (RelativeBias, (sizes.heads, 2 * MAX_DISTANCE + 1)),
    }
    masks = {"causal": _causal, "window or prefix": _window_or_prefix}
    return [Subject(name, sizes, mask, *scores[work]) for name, mask in list(masks.items())[:first]]


WORKS: dict[str, tuple[tuning.ScoreKind, bool]] = {
    "spans": ("none", True),
    "formula": ("formula", True),
    "lookup": ("lookup", True),
    "predicate": ("none", False),
}
"""Kinds of work that are tuned separately: the kind of score, and whether the mask consists of spans alone."""


def forward_candidates(
    sizes: TuningSizes, capability: str, shared: int, first: int | None = None
) -> dict[str, tuning.Options]:
    """Candidate options of the forward by name, without those that exceed `shared` bytes of shared memory per block.

    With `first`, only those of the first so many block shapes.
    """
    item = sizes.dtype.itemsize

    def need(n: int, stages: int) -> int:  # lower bound: prefetched K and V; Q may stay in registers
        return 2 * (stages - 1) * n * sizes.dim * item

    found: dict[str, tuning.Options] = {}
    for i, (m, n, warps, stages) in enumerate(FORWARD[:first]):
        if need(n, stages) > shared:
            continue
        for tma in (False, True)[: 1 + _has_tma(capability, i)]:
            blocks = {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages}
            name = f"{m}x{n}, {warps} warps, {stages} stages" + (", TMA" if tma else "")
            found[name] = {"BACKEND": "TRITON", **blocks, "fwd_USE_TMA": tma}
    return found


def backward_candidates(
    sizes: TuningSizes, capability: str, shared: int, first: int | None = None
) -> dict[str, tuning.Options]:
    """Candidate options of the backward by name, without those that exceed `shared` bytes of shared memory per block.

    With `first`, only those of the first so many block shapes.
    """
    item = sizes.dtype.itemsize

    def need(short: int, stages: int) -> int:  # lower bound: prefetched Q and dO, or K and V
        return 2 * (stages - 1) * short * sizes.dim * item

    found: dict[str, tuning.Options] = {}
    for i, (short, long, warps, stages) in enumerate(BACKWARD[:first]):
        if need(short, stages) > shared:
            continue
        for tma in (False, True)[: 1 + _has_tma(capability, i)]:
            blocks = {"bwd_BLOCK_M1": short, "bwd_BLOCK_N1": long, "bwd_BLOCK_M2": long, "bwd_BLOCK_N2": short}
            launch = {"bwd_num_warps": warps, "bwd_num_stages": stages}
            name = f"{short}x{long}, {long}x{short}, {warps} warps, {stages} stages" + (", TMA" if tma else "")
            found[name] = {"BACKEND": "TRITON", **blocks, **launch, "bwd_USE_TMA": tma}
    return found


def _has_tma(capability: str, index: int) -> bool:
    return int(capability.split(".")[0]) >= 9 and index < WITH_TMA and torch.version.hip is None
