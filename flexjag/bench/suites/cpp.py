"""Suite ``cpp``: the CPU kernels that flexjag prints in C++, against PyTorch's SDPA and the other backends."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from flexjag import caches
from flexjag.algebra.scores import Alibi, RelativeBias, Score
from flexjag.api.plan import Plan, plan
from flexjag.backends import choose
from flexjag.backends.cpp.library import unit
from flexjag.backends.cpp.source import printed
from flexjag.bench.arms.attention import LOOP, PADDED, SHARED
from flexjag.bench.arms.cpu import CPP, IN_PYTHON, PLANNED, SEGMENTS, CpuBatch
from flexjag.bench.arms.dropout import RATE, WITHOUT, DroppedBatch
from flexjag.bench.arms.kinds import KINDS, MAX_DISTANCE, useful_flops
from flexjag.bench.arms.product import PRODUCT, product, product_flops
from flexjag.bench.measuring.lengths import constant_lengths, lognormal_lengths, uniform_lengths
from flexjag.bench.measuring.measure import Results, describe_error, ratio
from flexjag.bench.suites.normalizers import BIASED, HSTU, STICK, AttentionJob, NormalizerSizes
from flexjag.bench.suites.normalizers import FULL_SIZES as NORMALIZER_SIZES
from flexjag.bench.suites.normalizers import QUICK_SIZES as QUICK_NORMALIZER_SIZES
from flexjag.bench.suites.registry import Arm, ArmResult, Case, CaseResult, Figure, Options, SelfTimedCase, Tell, suite
from flexjag.jagged import Jagged
from flexjag.kernels.cpp import build

MIXED, EQUAL, SHORT, LONG = "log-normal", "128 tokens each", "up to 64 tokens", "2,048 tokens each"
WINDOW, BIAS = "window | prefix + ALiBi", "causal + trained relative bias"
DIRECTIONS = ("forward", "forward + backward")
COMPILATION = "compilation"
DROPOUT = f"causal, dropout {RATE:g}"
NORMALIZERS = {HSTU: ">= 3", BIASED: ">= 3", STICK: ">= 2"}
"""Kinds of attention without a softmax, with the limit of time of segments / cpp."""

LOOPED = {MIXED: ">= 2.3", EQUAL: ">= 2.5", SHORT: ">= 3", LONG: ">= 1.4"}
"""Distributions of lengths, with the limit of time of the SDPA loop / cpp."""


@dataclass(frozen=True)
class CpuSizes:
    """Sizes of the suite's cases.

    Attributes:
        segments: Number of log-normal lengths.
        longest: Maximum of them.
        equal: Number of equal segments, and their length.
        short: Number of short segments, and their maximum length.
        long: Number of long segments, and their length.
        heads: Number of heads H.
        dim: Head dimensions D and E.
        gemm: Side of the matrices in the reference matrix product, which takes about as long as the attention beside
            it, so that other processes disturb both alike.
        compilations: Samples of the compile time.
    """

    segments: int
    longest: int
    equal: tuple[int, int]
    short: tuple[int, int]
    long: tuple[int, int]
    heads: int
    dim: int
    gemm: int
    compilations: int

    def lengths(self, name: str, seed: int) -> list[int]:
        """Segment lengths of the distribution of this name."""
        if name == MIXED:
            return lognormal_lengths(self.segments, self.longest, seed)
        if name == SHORT:
            return uniform_lengths(*self.short, seed)
        return constant_lengths(*(self.equal if name == EQUAL else self.long))


FULL_SIZES = CpuSizes(48, 1024, (48, 128), (128, 64), (2, 2048), 4, 64, 1024, 3)
QUICK_SIZES = CpuSizes(6, 96, (4, 16), (6, 8), (1, 128), 2, 16, 64, 1)


@dataclass(frozen=True)
class Point:
    """One case of attention with a softmax.

    Attributes:
        kind: Mask and score: a key of :data:`KINDS`.
        lengths: Name of the distribution of lengths.
        backward: Time forward and backward; False for the forward alone.
        arms: Names of the arms.
        dtype: Dtype of the inputs.
    """

    kind: str
    lengths: str
    backward: bool
    arms: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Name of the case."""
        half = ", bfloat16" if self.dtype == torch.bfloat16 else ""
        return f"{self.kind}, {DIRECTIONS[self.backward]}, {self.lengths}{half}"


POINTS = (
    *(Point("causal", MIXED, b, (LOOP, PADDED, SHARED, SEGMENTS, CPP, PLANNED, PRODUCT)) for b in (False, True)),
    *(Point("causal", n, b, (LOOP, SEGMENTS, CPP, PLANNED)) for n in (EQUAL, SHORT, LONG) for b in (False, True)),
    *(Point(WINDOW, MIXED, b, (SEGMENTS, CPP, PLANNED, IN_PYTHON)) for b in (False, True)),
    Point(BIAS, MIXED, True, (SEGMENTS, CPP, PLANNED, IN_PYTHON)),
    *(Point("causal", MIXED, b, (LOOP, SEGMENTS, CPP, PLANNED), torch.bfloat16) for b in (False, True)),
)


class CpuJob(AttentionJob):
    """Attention with another normalizer than a softmax, by the backends ``segments`` and ``cpp``."""

    def arms(self) -> list[Arm]:
        """Arms: both backends, and ``cpp`` with planning included in the time."""
        absent = choose.refusal("cpp", self.plan().case(grad=self.backward, dtype=self.dtype))
        arms = [
            self._arm(SEGMENTS, partial(self.flexjag, "segments", ready=True)),
            self._arm(CPP, partial(self.flexjag, "cpp", ready=True)),
            self._arm(PLANNED, partial(self.flexjag, "cpp", ready=False), memory=False),
        ]
        return [arm if arm.name == SEGMENTS else replace(arm, absent=absent) for arm in arms]


def _attention(point: Point, lengths: Sequence[int], sizes: CpuSizes, options: Options) -> list[Arm]:
    batch = CpuBatch(
        point.kind, lengths, sizes.heads, sizes.dim, point.dtype, point.backward, options.device, options.seed
    )
    arms = batch.chosen(*(name for name in point.arms if name != PRODUCT))
    if PRODUCT in point.arms:
        arms.append(product(sizes.gemm, point.dtype, options.device, options.seed))
    return arms if point.backward else [replace(arm, memory=False) for arm in arms]


def _attention_case(point: Point, sizes: CpuSizes, options: Options) -> Case:
    lengths, few = sizes.lengths(point.lengths, options.seed), QUICK_SIZES.lengths(point.lengths, options.seed)
    facts: dict[str, Any] = {"segments": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    facts |= {"heads": sizes.heads, "dim": sizes.dim, "dtype": str(point.dtype).removeprefix("torch.")}
    facts |= {"flops": useful_flops(point.kind, lengths, sizes.heads, sizes.dim, point.backward)}
    facts |= {"product": sizes.gemm, "seed": options.seed}
    # The small batch has the same D: the kernels are compiled for it.
    full, small = (partial(_attention, point, x, sizes, options) for x in (lengths, few))
    return Case(point.name, facts, full, small)


def _dropout_case(backward: bool, sizes: CpuSizes, options: Options) -> Case:
    lengths, few = sizes.lengths(MIXED, options.seed), QUICK_SIZES.lengths(MIXED, options.seed)
    facts = {"segments": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "rate": RATE}
    facts |= {"heads": sizes.heads, "dim": sizes.dim, "dtype": "float32", "seed": options.seed}

    def arms(lengths: Sequence[int]) -> list[Arm]:
        given = sizes.heads, sizes.dim, torch.float32, backward, options.device, options.seed
        return DroppedBatch("causal", lengths, *given).dropped()

    return Case(f"{DROPOUT}, {DIRECTIONS[backward]}, {MIXED}", facts, partial(arms, lengths), partial(arms, few))


def _normalizer_case(kind: str, sizes: NormalizerSizes, options: Options) -> Case:
    facts = {"segments": sizes.segments, "tokens": sum(sizes.lengths(options.seed)), "longest": sizes.longest}
    facts |= {"heads": sizes.heads, "dim": sizes.dim, "dtype": "float32", "seed": options.seed}

    def arms(sizes: NormalizerSizes) -> list[Arm]:
        return CpuJob(kind, sizes, True, options).arms()

    few = replace(QUICK_NORMALIZER_SIZES, heads=sizes.heads, dim=sizes.dim)
    return Case(f"{kind}, {DIRECTIONS[1]}", facts, partial(arms, sizes), partial(arms, few))


def _compilation(sizes: CpuSizes, options: Options) -> SelfTimedCase:
    found = build.refusal()
    facts = {"dim": sizes.dim, "samples": sizes.compilations}
    facts |= {"compiler": build.describe()["version"] if found is None else None}
    return SelfTimedCase(COMPILATION, facts, partial(_compile, sizes))


def _compile(sizes: CpuSizes, tell: Tell) -> list[ArmResult]:
    """Seconds in which the kernels of some plans are compiled and loaded, each time into an empty folder."""
    x = Jagged.from_lengths(torch.zeros(3, sizes.heads, sizes.dim), [3])
    scores: dict[str, Score | None] = {
        "causal": None,
        WINDOW: Alibi.from_heads(sizes.heads),
        BIAS: RelativeBias(torch.zeros(sizes.heads, 2 * MAX_DISTANCE + 1, requires_grad=True)),
    }
    results = []
    for kind, score in scores.items():
        tell(kind)
        results.append(_compiled(kind, plan(x, mask=KINDS[kind].mask, score=score), sizes))
    return results


def _compiled(name: str, made: Plan, sizes: CpuSizes) -> ArmResult:
    found = build.refusal()
    if found is not None:
        return ArmResult(name, "skipped", found)
    text = unit(printed(made, torch.float32).source, torch.float32, sizes.dim, sizes.dim)
    seconds, before = [], os.times()
    for i in range(sizes.compilations):
        with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {caches.FOLDER: empty}):
            began = time.perf_counter()
            try:
                build.load(f"{text}// {empty}, {i}\n")  # a text that was not loaded before
            except Exception as e:
                return ArmResult(name, "failed", describe_error(e))
            seconds.append(time.perf_counter() - began)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return ArmResult(name, "ok", seconds=seconds, extra={"cpu_seconds_of_the_compiler": spent / len(seconds)})


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    if options.device != "cpu":
        return []
    found, facts = Results(cases), {case.name: case.facts for case in cases}
    figures = [f for point in POINTS for f in _of(point, found, facts.get(point.name, {}))]
    for backward, limit, factor in ((False, ">= 3.5", "<= 3"), (True, ">= 2", "<= 4")):
        case = f"{DROPOUT}, {DIRECTIONS[backward]}, {MIXED}"
        seconds = {arm: found.seconds(case, arm) for arm in (LOOP, CPP, WITHOUT)}
        for one, other, most in ((LOOP, CPP, limit), (CPP, WITHOUT, factor)):
            figures.append(Figure(f"{case}: time of {one} / {other}", ratio(seconds[one], seconds[other]), "x", most))
    for kind, limit in NORMALIZERS.items():
        figures += _beside_segments(f"{kind}, {DIRECTIONS[1]}", found, limit)
    for kind in ("causal", WINDOW, BIAS):
        figures.append(Figure(f"{COMPILATION}: {kind}", found.seconds(COMPILATION, kind), "s"))
    return [replace(f, limit=None) for f in figures] if options.quick else figures


def _of(point: Point, found: Results, facts: dict[str, Any]) -> list[Figure]:
    """The figures of one case of attention with a softmax."""
    case, half = point.name, point.dtype == torch.bfloat16

    def times(a: str, b: str, limit: str | None = None) -> Figure:
        return Figure(f"{case}: time of {a} / {b}", ratio(found.seconds(case, a), found.seconds(case, b)), "x", limit)

    figures = []
    if LOOP in point.arms:
        figures.append(times(LOOP, PLANNED, ">= 1.8" if half else LOOPED[point.lengths]))
    figures += [times(arm, PLANNED, ">= 12") for arm in (PADDED, SHARED) if arm in point.arms]
    if PRODUCT in point.arms:
        rates = {arm: ratio(facts.get("flops"), found.seconds(case, arm)) for arm in (CPP, PLANNED)}
        best = ratio(product_flops(facts.get("product", 0)), found.seconds(case, PRODUCT))
        for arm, rate in rates.items():
            limit = ">= 0.8" if arm == CPP else None
            figures.append(Figure(f"{case}: useful FLOP rate of {arm} / {PRODUCT}", ratio(rate, best), "x", limit))
        figures.append(Figure(f"{case}: rate of {PRODUCT}", None if best is None else best / 1e9, "GFLOP/s"))
    figures += _beside_segments(case, found, {WINDOW: ">= 3.5", BIAS: ">= 3"}.get(point.kind), point.backward)
    if IN_PYTHON in point.arms:
        figures.append(times(IN_PYTHON, CPP, "<= 1.3"))
    return figures


def _beside_segments(case: str, found: Results, limit: str | None, memory: bool = True) -> list[Figure]:
    time_ratio = ratio(found.seconds(case, SEGMENTS), found.seconds(case, CPP))
    figures = [Figure(f"{case}: time of {SEGMENTS} / {CPP}", time_ratio, "x", limit)]
    if memory:
        value = ratio(found.memory(case, CPP), found.memory(case, SEGMENTS))
        figures.append(Figure(f"{case}: memory of {CPP} / {SEGMENTS}", value, "x", "<= 1"))
    return figures


@suite(
    "cpp",
    "The CPU kernels that flexjag prints in C++ and compiles on first use, against SDPA and the other backends, in "
    "float32 but where it says bfloat16. Both backends have their plan ready, but where it says that planning is "
    "included.",
    _figures,
)
def cases(options: Options) -> list[Case | SelfTimedCase]:
    """Distributions of lengths, masks and scores, dropout, normalizers, half precision, compile time. None on a GPU."""
    if options.device != "cpu":
        return []
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    out: list[Case | SelfTimedCase] = [_attention_case(point, sizes, options) for point in POINTS]
    out += [_dropout_case(backward, sizes, options) for backward in (False, True)]
    for kind in NORMALIZERS:
        wanted = QUICK_NORMALIZER_SIZES if options.quick else NORMALIZER_SIZES[kind]
        out.append(_normalizer_case(kind, wanted, options))
    return [*out, _compilation(sizes, options)]
