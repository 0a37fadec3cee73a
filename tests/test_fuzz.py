"""Random calls in which learned tensors, dtypes, backends and edges meet: none may differ silently from float64.

What is right comes from the reference in float64, of float64 copies of everything and without spare rows. What is
allowed is an error analysis of the case (``flexjag.testing.rounding_bounds``) in the precision that a backend computes
in, and one rounding of each result to its dtype. A failing case prints the decorator that repeats it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import flexjag as fj
from flexjag import functions
from flexjag.backends import runs, segments
from flexjag.layout import build_layout
from flexjag.nodes import Axis, NodeKind, replaced, walk
from flexjag.normalizers import Normalizer
from flexjag.testing import Bounds, jagged_batches, lengths, masks, rounding_bounds

calls = importlib.import_module("flexjag.attention")  # the module: the package has the function by that name
F64, INF, NAN = torch.float64, torch.inf, torch.nan
BACKENDS = ("reference", "tiled", "plain", "segments", "auto")  # plain: tiled, with what it does in a graph
BUDGETS = {"dev": 80, "ci": 1_000, "nightly": 20_000}
CASES = BUDGETS.get(os.environ.get("HYPOTHESIS_PROFILE", "dev"), BUDGETS["dev"]) // len(BACKENDS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)
NORMALIZERS = ("softmax", "silu", "gelu", "tanh", "identity", "sigmoid", "stick")
ADDITIVE = ("alibi", "relative", "bucketed", "time")
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


# Drawing.


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
                return fj.Alibi, self.table(heads)
            case "relative":
                return fj.RelativeBias, self.table(heads, self.pick(1, 3, 7), lower=True)
            case "bucketed":
                bounds = self.boundaries()
                return lambda t: fj.BucketedBias(t, bounds), self.table(heads, len(bounds) + 1, lower=True)
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
    normalizer, dtype = draw(st.sampled_from(NORMALIZERS)), draw(st.sampled_from(DTYPES))
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


# Running.


@dataclass(frozen=True, eq=False)
class Result:
    """What a call returns, and the gradients of q, k, v and of all that is learned."""

    out: Tensor
    rest: Tensor
    grads: list[Tensor]


def _padded(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """With spare rows, or columns, that hold NaN, or a number far off."""
    shape = [*x.shape]
    shape[dim] = rows
    return torch.cat([x, x.new_full(shape, NAN if x.dtype.is_floating_point else 77)], dim)


def _with_spare(node: NodeKind, rows: tuple[int, int]) -> NodeKind:
    """A node with as many entries more per query and key token."""
    axes: tuple[Axis, Axis] = ("query token", "key token")
    for axis, count in zip(axes, rows, strict=True):
        node = replaced(node, lambda x, n=count: _padded(x, n, -1) if x.ndim else x, (axis,))
    return node


def _leaves(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with leaves of its own."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x.detach()).clone().requires_grad_(x.requires_grad)

    batches = [x.with_values(change(x.values).clone().requires_grad_()) for x in (case.q, case.k, case.v)]
    tables, bias, factor = [leaf(x) for x in case.tables], leaf(case.bias), leaf(case.factor)
    return replace(case, q=batches[0], k=batches[1], v=batches[2], tables=tables, bias=bias, factor=factor)


def run(case: Case, backend: str, tangents: tuple[Tensor, Tensor]) -> Result:
    """Forward and backward of leaves; `tangents` flow back."""
    inputs, learned = [x.values for x in (case.q, case.k, case.v)], case.learned
    q, k, v, mask, score, normalizer = case.q, case.k, case.v, case.mask, case.score(), case.weights()
    rows = None
    if case.spare is not None:
        counts = case.spare[0], case.spare[1], case.spare[1]
        q, k, v = (fj.Jagged(_padded(x.values, n), x.offsets) for x, n in zip((q, k, v), counts, strict=True))
        rows = q.values.shape[0]
        mask, normalizer = _with_spare(mask, case.spare), _with_spare(normalizer, case.spare)
        score = None if score is None else _with_spare(score, case.spare)
        tangents = tuple(_padded(x, case.spare[0]) for x in tangents)
    longest = max([0, *q.lengths.tolist(), *k.lengths.tolist()]) if case.bounded else None
    plan = fj.plan(
        q, k, mask=mask, score=score, normalizer=normalizer, block_size=case.block_size, max_tokens=rows,
        max_length=longest,
    )  # fmt: skip
    has_rest = {"softmax": "return_lse", "stick": "return_remainder"}.get(case.normalizer)
    returns = {has_rest: True} if has_rest else {}
    with forward_ad.dual_level() if backend == "plain" else nullcontext():
        name = "tiled" if backend == "plain" else backend
        found = fj.attention(q, k, v, plan=plan, scale=case.scale, backend=name, **returns)
    outs = [x.values for x in found] if isinstance(found, tuple) else [found.values]
    made = [(x, g.to(x.dtype)) for x, g in zip(outs, tangents, strict=False) if x.requires_grad]
    ends, flows = zip(*made, strict=True)
    grads = list(torch.autograd.grad(ends, [*inputs, *learned], flows, allow_unused=True, materialize_grads=True))
    if rows is not None:
        end = rows - case.spare[0]
        assert not outs[0][end:].any()
        assert (outs[-1][end:] == {"softmax": -INF, "stick": 1.0}.get(case.normalizer, 0.0)).all()
        outs = [x[:end] for x in outs]
    return Result(outs[0].detach(), outs[1].detach() if has_rest else outs[0].new_zeros(0), grads)


# Comparing.


def _compute(case: Case, backend: str) -> torch.dtype:
    """The precision of intermediates: SDPA's kernels store some in the inputs' own."""
    dtype = case.q.values.dtype
    own = backend in ("segments", "auto") and case.normalizer == "softmax"
    return dtype if own else torch.promote_types(dtype, torch.float32)


def bounds_of(
    wide: Case, compute: torch.dtype, tangents: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Bounds, list[Any]]:
    """How far rounding may move outputs and gradients, and what is learned; `wide` is the case in float64."""
    q, k, v = (x.values.detach() for x in (wide.q, wide.k, wide.v))
    score, normalizer, bias = wide.score(), wide.weights(), wide.bias
    if bias is not None:  # which adds to the score before the sigmoid
        add = fj.ScoreMod(lambda s, b, h, i, j: s + bias[h])
        score, normalizer = add if score is None else score >> add, replace(normalizer, bias=0.0)
    in_score = [x for x in wide.learned if x is not wide.factor]
    bounds = rounding_bounds(
        q, k, v, build_layout(wide.q, wide.k), wide.mask, score,
        scale=q.shape[2] ** -0.5 if wide.scale is None else wide.scale,
        grad_out=tangents[0], grad_lse=tangents[1], dtype=compute, learned=in_score, normalizer=normalizer,
    )  # fmt: skip
    learned: list[Any] = list(bounds.learned)
    if wide.factor is not None and wide.factor.requires_grad:
        # Its gradient is the sum of the output times what flows back, over the factor, whatever is summed first.
        terms = (tangents[0].double().abs() * (bounds.out + torch.finfo(compute).eps * out.abs())).sum((1, 2))
        terms = terms / wide.factor.detach().abs()
        each = out.shape[1] * out.shape[2]
        learned.append(terms * (1 + each) if wide.factor.ndim else terms.sum() * (1 + out.shape[0] * each))
    return bounds, learned


def _fault(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype, bound: Any) -> list[str]:
    """What is wrong with a result, if anything."""
    if got.shape != exact.shape or got.dtype != dtype:
        return [f"{name} is {got.dtype} {list(got.shape)} instead of {dtype} {list(exact.shape)}"]
    if not exact.numel():
        return []
    kind = torch.finfo(dtype)
    allowed = 2 * (bound + kind.eps / 2 * exact.abs()) + kind.smallest_normal * kind.eps
    rounded = exact.to(dtype).double()  # may overflow
    same = (got.double() == rounded) & rounded.isinf()
    error = torch.where(same, 0.0, (got.double() - exact).abs())
    allowed = torch.where(rounded.isinf(), 0.0, allowed)
    wrong = ~(error <= allowed)
    if not wrong.any():
        return []
    at = tuple(wrong.nonzero()[0].tolist())
    off = f"{got[at]:.9g} instead of {exact[at]:.9g}, allowed {allowed[at]:.3g}"
    return [f"{name}{list(at)} is {off} ({int(wrong.sum())} of {wrong.numel()} off)"]


def check(case: Case, backend: str) -> None:
    """Assert that a backend's results are those of float64 but for rounding."""
    dtype, g = case.q.values.dtype, torch.Generator().manual_seed(0)
    acc = torch.promote_types(dtype, torch.float32)
    rows, heads, _ = case.q.values.shape
    shapes = (rows, heads, case.v.values.shape[2]), (rows, heads)
    tangents = tuple((torch.randn(s, generator=g) / 8).to(t) for s, t in zip(shapes, (dtype, acc), strict=True))
    wide = replace(_leaves(case, lambda x: x.double()), spare=None, bounded=False)
    exact = run(wide, "reference", tangents)
    got = run(_leaves(case, lambda x: x), backend, tangents)
    bounds, learned = bounds_of(wide, _compute(case, backend), tangents, exact.out)
    faults = _fault("out", got.out, exact.out, dtype, bounds.out) + _fault(
        "rest", got.rest, exact.rest, got.rest.dtype, bounds.lse
    )
    limits = [bounds.q, bounds.k, bounds.v, *learned]
    names = ["q", "k", "v", *(f"learned[{i}]" for i in range(len(learned)))]
    dtypes = [dtype] * 3 + [x.dtype for x in case.learned]
    for name, *rest in zip(names, got.grads, exact.grads, dtypes, limits, strict=True):
        faults += _fault(f"grad of {name}", *rest)
    assert not faults, f"{backend}: {'; '.join(faults)}"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=CASES)
@given(data=st.data())
def test_no_silent_difference_from_float64(data: st.DataObject, backend: str) -> None:
    check(data.draw(cases(backend)), backend)


# What the cases reach, and what they notice.

FIRST = settings(settings.get_profile("find"), phases=[Phase.generate])
HARD: dict[str, Callable[[Case], Any]] = {
    "a half-precision table in a float64 call": lambda c: (
        c.q.values.dtype == F64 and any(x.dtype == torch.bfloat16 for x in c.learned)
    ),
    "a whole table of -inf": lambda c: any(bool((x == -INF).all()) for x in c.tables if x.numel()),
    "spare rows and a factor per token": lambda c: c.spare and c.spare[0] and c.factor is not None and c.factor.ndim,
    "a learned bias of a sigmoid": lambda c: c.bias is not None and c.bias.requires_grad,
    "a user's score and queries without keys": lambda c: (
        isinstance(c.score(), fj.ScoreMod) and bool(((c.q.lengths > 0) & (c.k.lengths == 0)).any())
    ),
    "a bound past int64": lambda c: any(bound == 2**70 for bound in _bounds(c.mask) if isinstance(bound, int)),
    "a bound per segment at its type's end": lambda c: any(
        x.numel() and x.tolist()[0] == torch.iinfo(x.dtype).max for x in _bounds(c.mask) if isinstance(x, Tensor)
    ),
    "grouped heads and stick-breaking": lambda c: c.normalizer == "stick" and c.q.values.shape[1] > c.k.values.shape[1],
}


def _bounds(mask: fj.Mask) -> list[int | Tensor]:
    return [node.n for node in walk(mask) if isinstance(node, fj.Prefix)]


@pytest.mark.parametrize("name", HARD)
def test_hard_cases_are_drawn(name: str) -> None:
    find(cases("tiled").map(lambda case: bool(HARD[name](case))), bool, settings=FIRST)


def _without_care_for_spare_rows(name: str, q: Tensor, k: Tensor, v: Tensor, plan: fj.Plan, *rest: Any) -> Any:
    return calls._runner(name, plan.normalizer)(q, k, v, plan, *rest)


def _all_ruled_out(*args: Any) -> tuple[Tensor | None, Tensor | None]:
    bias, no_key = runs.bias_of(*args)
    return (bias, no_key) if bias is None or no_key is None else (bias.masked_fill(no_key[..., None], -INF), no_key)


def _blurred(*args: Any) -> tuple[Tensor, Tensor | None]:
    out, rest = _EXECUTE(*args)
    return (out * (1 + 2**-14), rest) if out.dtype == torch.float32 else (out, rest)


_EXECUTE = calls._execute


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "tables learn in their own precision": ("tiled", functions, "widened", lambda x, dtype: x),
    "spare rows take part": ("tiled", calls, "_execute", _without_care_for_spare_rows),
    "rows of scores of -inf are left to SDPA": ("segments", segments, "bias_of", _all_ruled_out),
    "outputs lose a few bits": ("auto", calls, "_execute", _blurred),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str) -> None:
    backend, module, function, fault = FAULTS[name]

    def differs(case: Case) -> bool:
        with mock.patch.object(module, function, fault):
            try:
                check(case, backend)
            except AssertionError:
                return True
        return False

    find(cases(backend).map(differs), bool, settings=FIRST)
