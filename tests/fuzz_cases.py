"""Cases for the fuzz of :mod:`test_fuzz`: what a call is made of, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import Normalizer, StickBreaking
from flexjag.backends.choose import BACKENDS
from flexjag.testing import jagged_batches, lengths, masks

F64, INF, NAN = torch.float64, torch.inf, torch.nan
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)
NORMALIZERS = ("softmax", "silu", "gelu", "tanh", "identity", "sigmoid", "stick")
KERNELS = {name: x.promises.normalizers for name, x in BACKENDS.items()}
ADDITIVE = ("alibi", "relative", "bucketed", "t5", "time", "pairs")
OTHERS = ("cap", "temperature", "per key", "per query", "per pair", "ruled out", "replaced")
Make = Callable[[Tensor], fj.Score]


@dataclass(frozen=True, eq=False)
class Case:
    """One call: everything in the dtype it is given in, without spare rows.

    Attributes:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        mask: Fits the batch.
        scores: A function from its table to the node, for each score of the chain.
        tables: Of each score; learned where they need gradients.
        normalizer: Which.
        bias: Of a Sigmoid, ``[H]`` or None.
        factor: Of a pointwise normalizer, 0-d, ``[T_q]`` or None.
        scale: Factor on ``q·k``.
        spare: Rows of q, and of k and v, that belong to no segment and hold NaN.
        block_size: Tile size.
        bounded: Whether the plan is told the longest segment.
        flags: Of StickBreaking: attend_current and remainder.
    """

    q: fj.Jagged
    k: fj.Jagged
    v: fj.Jagged
    mask: fj.Mask
    scores: list[Make]
    tables: list[Tensor]
    normalizer: str
    bias: Tensor | None
    factor: Tensor | None
    scale: float | None
    spare: tuple[int, int] | None
    block_size: int
    bounded: bool
    flags: tuple[bool, bool]

    @property
    def held(self) -> list[Tensor]:
        """All that may be learned, the factor last."""
        return [*self.tables, *(x for x in (self.bias, self.factor) if x is not None)]

    @property
    def learned(self) -> list[Tensor]:
        return [x for x in self.held if x.requires_grad]

    def score(self) -> fj.Score | None:
        chain: fj.Score | None = None
        for make, table in zip(self.scores, self.tables, strict=True):
            chain = make(table) if chain is None else chain >> make(table)
        return chain

    def weights(self) -> Normalizer:
        factor: Any = 0.5 if self.factor is None else self.factor
        match self.normalizer:
            case "softmax":
                return fj.Softmax()
            case "silu":
                return fj.SiLU(factor)
            case "gelu" | "tanh":
                return fj.GELU(factor, "tanh" if self.normalizer == "tanh" else "none")
            case "identity":
                return fj.Identity(factor)
            case "sigmoid":
                return fj.Sigmoid(self.bias, factor)
            case _:
                return fj.StickBreaking(*self.flags)

    def __repr__(self) -> str:
        q, k, v = self.q, self.k, self.v
        return (
            f"Case(q_lengths={q.lengths.tolist()}, kv_lengths={k.lengths.tolist()}, self={q.offsets is k.offsets}, "
            f"q={list(q.values.shape)}, v={list(v.values.shape)}, {q.values.dtype}, {self.mask!r}, {self.score()!r}, "
            f"{self.weights()!r}, learned={[(list(x.shape), x.dtype) for x in self.learned]}, scale={self.scale}, "
            f"spare={self.spare}, block_size={self.block_size}, bounded={self.bounded})"
        )


@dataclass(frozen=True)
class _Drawer:
    """Draws the parts of a case for a batch."""

    draw: st.DrawFn
    g: torch.Generator
    q: fj.Jagged
    k: fj.Jagged

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def table(self, *shape: int, lower: bool = False, positive: bool = False) -> Tensor:
        """Numbers of any dtype, learned more often than not, some of them -inf if `lower`."""
        x = torch.rand(shape, generator=self.g, dtype=F64) + (0.25 if positive else -0.5)
        if lower and self.pick(False, False, True):
            x = x.masked_fill(torch.rand(shape, generator=self.g) < self.pick(0.2, 0.9), -INF)
        return x.to(self.pick(*DTYPES)).requires_grad_(self.pick(True, True, True, False))

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """Of any integer type, sometimes with its largest number among them."""
        dtype = self.pick(*INTEGERS)
        x = torch.randint(low if dtype.is_signed else 0, high, (count,), generator=self.g)
        if count and self.pick(False, False, True):
            x[0] = torch.iinfo(dtype).max
        return x.to(dtype)

    def boundaries(self) -> Tensor:
        count = self.pick(0, 1, 4)
        x = torch.randint(-9, 9, (count,), generator=self.g).sort().values
        if count and self.pick(False, False, True):
            x[-1] = 2**63 - 1
        return x.to(self.pick(torch.int64, torch.float32))

    def score(self, kind: str) -> tuple[Make, Tensor]:
        heads = self.q.values.shape[1]
        match kind:
            case "alibi":
                symmetric, align = self.pick(False, True), self.pick("start", "end")
                return lambda t: fj.Alibi(t, symmetric, align), self.table(heads)
            case "relative":
                align = self.pick("start", "end")
                return lambda t: fj.RelativeBias(t, align), self.table(heads, self.pick(1, 3, 7), lower=True)
            case "bucketed":
                bounds, align = self.boundaries(), self.pick("start", "end")
                return lambda t: fj.BucketedBias(t, bounds, align), self.table(heads, len(bounds) + 1, lower=True)
            case "pairs":
                sizes = [int((self.q.lengths * self.k.lengths).sum())]
                if self.pick(True, False):
                    sizes = [max(x.lengths.tolist(), default=0) for x in (self.q, self.k)]
                return fj.DenseBias, self.table(self.pick(1, heads), *sizes, lower=True)
            case "t5":
                both, most, align = self.pick(False, True), self.pick(5, 11), self.pick("start", "end")
                return lambda t: fj.T5Bias(t, both, most, align), self.table(heads, 8, lower=True)
            case "time":
                bounds, own = self.boundaries(), self.q.offsets is self.k.offsets and self.pick(True, False)
                times = self.integers(-5, 20, self.q.values.shape[0])
                kv_times = None if own else self.integers(-5, 20, self.k.values.shape[0])
                make: Make = lambda t: fj.TimeBias(t, times, bounds, kv_times)  # noqa: E731
                return make, self.table(heads, len(bounds) + 1, lower=True)
            case "cap":
                cap = self.pick(1, 30.0)
                return lambda t: fj.SoftCap(cap), torch.zeros(())
            case _:
                return self.function(kind)

    def function(self, kind: str) -> tuple[Make, Tensor]:
        """A user's function. Lookups by position have an entry for each that exists, and none more."""
        heads, starts, kv_starts, widths = self.q.values.shape[1], self.q.offsets, self.k.offsets, self.k.lengths
        pairs = self.q.lengths * widths
        before = pairs.cumsum(0) - pairs
        made: dict[str, tuple[Callable[[Tensor], Callable[..., Tensor]], Sequence[int]]] = {
            "temperature": (lambda t: lambda s, b, h, i, j: s * t[h], [heads]),
            "per key": (lambda t: lambda s, b, h, i, j: s + t[kv_starts[b] + j], self.k.values.shape[:1]),
            "per query": (lambda t: lambda s, b, h, i, j: s + t[starts[b] + i, h], self.q.values.shape[:2]),
            "per pair": (lambda t: lambda s, b, h, i, j: s + t[before[b] + i * widths[b] + j], [int(pairs.sum())]),
            "ruled out": (lambda t: lambda s, b, h, i, j: torch.where((i + j + b) % 3 == 0, -INF, s + t[h]), [heads]),
            "replaced": (lambda t: lambda s, b, h, i, j: t[h].to(s.dtype) * ((i + j) % 5), [heads]),
        }
        function, shape = made[kind]
        return lambda t: fj.ScoreMod(function(t)), self.table(*shape, positive=kind == "temperature")

    def mask(self, stick: bool) -> fj.Mask:
        """Of the whole node set, sometimes cut by a lookup per key; without later keys for stick-breaking."""
        kv_lengths = None if self.q.offsets is self.k.offsets else self.k.lengths.tolist()
        mask = self.draw(masks(self.q.lengths.tolist(), kv_lengths, heads=self.q.values.shape[1], depth=2))
        if self.pick(False, False, True):
            keep, starts = torch.rand(self.k.values.shape[0], generator=self.g) < 0.7, self.k.offsets
            mask = mask & fj.MaskMod(lambda b, h, i, j: keep[starts[b] + j])
        if stick:
            mask = fj.Causal() & mask
            assume(self.q.offsets is self.k.offsets or "align='end'" not in repr(mask))  # both ways is refused
        return mask


@st.composite
def cases(draw: st.DrawFn, backend: str) -> Case:
    """Cases that a backend can run."""
    kinds = tuple(x for x in NORMALIZERS if x != "stick" or backend not in KERNELS or StickBreaking in KERNELS[backend])
    normalizer, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(DTYPES))
    q, k, v = draw(jagged_batches(q_lengths=draw(lengths(max_total=40)), max_total=40))
    q, k, v = (x.with_values(x.values.to(dtype)) for x in (q, k, v))
    d = _Drawer(draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))), q, k)
    kinds = ADDITIVE if backend == "segments" and normalizer == "softmax" else ADDITIVE + OTHERS
    names = [d.pick(*kinds) for _ in range(d.pick(1, 0, 2, 3))]
    # First, as the derivative of s * t by t is s: of a score of -inf that is no number.
    chain = [d.score(name) for name in sorted(names, key=lambda name: name != "temperature")]
    pointwise, is_self = normalizer not in ("softmax", "stick"), q.offsets is k.offsets
    rows = d.pick(None, 0, 1, 20)
    # Graphs and plans of fixed capacity look at no lengths: functions are told of a first position even if none exists.
    assume((backend != "plain" and rows is None) or bool((q.lengths * k.lengths).any()))
    return Case(
        q,
        k,
        v,
        d.mask(normalizer == "stick"),
        [make for make, _ in chain],
        [table for _, table in chain],
        normalizer,
        d.table(q.values.shape[1]) if normalizer == "sigmoid" and d.pick(True, False) else None,
        d.table(*d.pick([], [q.values.shape[0]])) if pointwise and d.pick(True, False) else None,
        d.pick(None, 0.5, 0.0, -0.3),
        None if rows is None else (rows, rows if is_self else d.pick(0, 3)),
        d.pick(16, 32),
        d.pick(False, False, True),
        (d.pick(False, True), is_self and d.pick(False, True)),
    )
