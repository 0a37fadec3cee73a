"""Suite ``ops``: the ragged ops against padding and against FBGEMM."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from flexjag.bench.arms.ragged import FBGEMM, FLEXJAG, OPS, PADDED, PLAIN, RaggedBatch, RaggedSizes
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Expected
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.kernels.cpp import build
from flexjag.ops.cpp.common import prepare

FULL_SIZES = RaggedSizes(segments=256, longest=512, features=64, queries=8)
QUICK_SIZES = RaggedSizes(segments=6, longest=24, features=16, queries=3)
GRID = [(s, n) for s in (0.1, 0.5, 0.95) for n in (128, 512, 2048, 8192)]
"""Sparsity and N of target attention on a GPU, after Jagged Flash Attention (arXiv 2409.15373)."""

GRID_SEGMENTS = 512
ATTENTION = "jagged_dense_attention"
COMPILED = ("jagged_softmax", ATTENTION)
"""Ops with kernels in C++."""
DIRECTIONS = ("forward", "forward + backward")

Tensors = tuple[Tensor, ...]


class Job:
    """One op on one batch, and its arms.

    Args:
        name: Name of the op in :data:`flexjag.bench.arms.ragged.OPS`.
        sizes: Sizes of the batch.
        backward: Time forward and backward; False for the forward alone.
        options: Device and seed.
    """

    def __init__(self, name: str, sizes: RaggedSizes, backward: bool, options: Options) -> None:
        self.name, self.op, self.backward, self.device = name, OPS[name], backward, options.device
        self.batch = RaggedBatch(sizes, options.device, options.seed)
        self.leaves = [x.requires_grad_(backward) for x in self.batch.operands(self.op)]
        self.memory = options.device == "cuda" or name == ATTENTION

    def arms(self) -> list[Arm]:
        """Arms: flexjag, padding, the op's further implementations, and FBGEMM if it has the op."""
        arms = [self._arm(FLEXJAG, self.op.flexjag), self._arm(PADDED, self.op.padded, self._padded_bytes())]
        arms += [self._arm(name, call, self._padded_bytes()) for name, call in self.op.more.items()]
        if self.device == "cpu" and self.name in COMPILED and build.refusal() is None:
            prepare(torch.float32)
            arms.append(self._arm(PLAIN, self.op.flexjag))
        if self.op.fbgemm is not None:
            assert self.op.name_there is not None
            there, absent = find_fbgemm(self.op.name_there, self.device)
            arms.append(self._arm(FBGEMM, partial(self.op.fbgemm, there), absent=absent))
        return arms

    def _padded_bytes(self) -> int:
        """Estimated bytes that padding takes, including the float64 results it is checked against."""
        sizes = self.batch.sizes
        has_matrices = "p" in self.op.operands or self.op is OPS["jagged_jagged_bmm_jagged_out"]
        width = sizes.longest if has_matrices else max(sizes.features, sizes.queries)
        return 4 * 12 * sizes.segments * sizes.longest * width

    def _arm(self, name: str, run: Callable[..., Any], needs: int = 0, absent: str | None = None) -> Arm:
        def make() -> Callable[[], Tensors]:
            directions = self.directions
            if name == PLAIN:
                return lambda: self._plain(run, directions)
            return lambda: self._results(run, self.leaves, directions)

        return Arm(name, make, lambda got: self._expected.check(got), needs, absent, self.memory)

    def _plain(self, run: Callable[..., Any], directions: Tensors) -> Tensors:
        """The results without kernels in C++."""
        before = os.environ.get(build.SWITCH)
        os.environ[build.SWITCH] = "0"
        try:
            return self._results(run, self.leaves, directions)
        finally:
            del os.environ[build.SWITCH]
            os.environ.update({} if before is None else {build.SWITCH: before})

    def _results(self, run: Callable[..., Any], leaves: list[Tensor], directions: Tensors) -> Tensors:
        """Run an implementation: its outputs and, with `backward`, the gradients of `leaves`."""
        if not self.backward:
            with torch.no_grad():
                return _tuple(run(self.batch, *leaves))
        out = _tuple(run(self.batch, *leaves))
        return (*(x.detach() for x in out), *torch.autograd.grad(out, leaves, directions))

    @cached_property
    def directions(self) -> Tensors:
        """Random gradients of the outputs; empty without `backward`."""
        if not self.backward:
            return ()
        with torch.no_grad():
            out = _tuple(self.op.flexjag(self.batch, *self.leaves))
        generator = torch.Generator(self.device).manual_seed(self.batch.seed + 1)
        return tuple(torch.randn(x.shape, generator=generator, device=x.device) for x in out)

    @cached_property
    def _expected(self) -> Expected:
        """Expected results, by padding in float64 and in float32, so that three independent implementations agree."""

        def compute(dtype: torch.dtype) -> Tensors:
            leaves = [x.detach().to(dtype).requires_grad_(self.backward) for x in self.leaves]
            return self._results(self.op.padded, leaves, tuple(x.to(dtype) for x in self.directions))

        gradients = self.op.operands if self.backward else ()
        with torch.no_grad():
            outputs = len(_tuple(self.op.padded(self.batch, *self.leaves)))
        # An output sums over a segment's tokens in any order; the gradient of a gain or shift over all tokens.
        terms = [self.batch.longest] * outputs
        terms += [self.batch.tokens if name in ("gain", "shift") else self.batch.longest for name in gradients]
        names = ["output"] * outputs + [f"gradient of {name}" for name in gradients]
        return Expected(compute, torch.float32, names, terms)


def _tuple(out: Any) -> Tensors:
    return (out,) if isinstance(out, Tensor) else tuple(out)


@cache
def find_fbgemm(name: str, device: str) -> tuple[Any, str | None]:
    """FBGEMM's operators and None, or the reason for which operator `name` cannot run on `device`."""
    try:
        importlib.import_module("fbgemm_gpu")
        importlib.import_module("fbgemm_gpu.sll")
    except (ImportError, OSError) as e:
        return None, f"fbgemm_gpu cannot be imported: {e}"
    there = torch.ops.fbgemm
    if not hasattr(there, name):
        return there, f"this FBGEMM has no {name}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", device.upper())
    if not any(has(f"fbgemm::{name}", key) for key in keys):
        return there, f"this FBGEMM has no {name} for {device}"
    return there, None


def _grid_name(sparsity: float, longest: int) -> str:
    return f"{ATTENTION}, s = {sparsity}, N = {longest}"


PER_TOKEN = ("jagged_layer_norm", "jagged_rms_norm")  # independent of segments: padding is never used for these


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    promised = not options.quick and options.device == "cpu"
    figures, gains = [], []
    for name in OPS:
        worst, whole = [], True
        for case in cases:
            if case.name not in [f"{name}, {direction}" for direction in DIRECTIONS]:
                continue
            others = [found.seconds(case.name, arm.name) for arm in case.arms if arm.name != FLEXJAG]
            ours, measured = found.seconds(case.name, FLEXJAG), [x for x in others if x is not None]
            worst.append(ratio(ours, min(measured, default=None)))
            if name not in PER_TOKEN:
                gains.append(ratio(found.seconds(case.name, PADDED), ours))
            whole &= len(measured) == len(others)
        known = [x for x in worst if x is not None]
        value = max(known) if known and len(known) == len(DIRECTIONS) else None
        text = f"{name}: time of {FLEXJAG} / the fastest of the others, the worse direction"
        figures.append(Figure(text, value, "x", "<= 1.2" if promised and whole else None))
    logs = [math.log(x) for x in gains if x is not None]
    mean = math.exp(sum(logs) / len(logs)) if logs and len(logs) == len(gains) else None
    text = f"time of {PADDED} / {FLEXJAG}, geometric mean of all ops but the norms per token, both directions"
    found_figures = [*figures, *_compiled_figures(found, cases), *_grid_figures(found, cases)]
    return [Figure(text, mean, "x", ">= 2" if promised else None), *found_figures]


def _compiled_figures(found: Results, cases: list[CaseResult]) -> list[Figure]:
    """What kernels in C++ gain."""
    names = [case.name for case in cases if any(arm.name == PLAIN for arm in case.arms)]
    times = [(name, ratio(found.seconds(name, PLAIN), found.seconds(name, FLEXJAG))) for name in names]
    return [Figure(f"{name}: time of {PLAIN} / {FLEXJAG}", value, "x") for name, value in times]


def _grid_figures(found: Results, cases: list[CaseResult]) -> list[Figure]:
    """Key figures of target attention over the grid: time and memory of padding relative to flexjag."""
    figures = []
    for case in (c for sparsity, n in GRID for c in cases if c.name.startswith(f"{_grid_name(sparsity, n)},")):
        time = ratio(found.seconds(case.name, PADDED), found.seconds(case.name, FLEXJAG))
        memory = ratio(found.memory(case.name, PADDED), found.memory(case.name, FLEXJAG))
        figures.append(Figure(f"{case.name}: time of {PADDED} / {FLEXJAG}", time, "x"))
        figures.append(Figure(f"{case.name}: memory of {PADDED} / {FLEXJAG}", memory, "x"))
    return figures


@suite(
    "ops", "256 segments of Meta's lengths under 512 (s = 0.5), 64 features, float32; results packed again.", _figures
)
def cases(options: Options) -> list[Case]:
    """Every op, forward and with backward; on a GPU also target attention over a grid of sizes."""
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    wanted = [(name, name, sizes) for name in OPS]
    if options.device == "cuda" and not options.quick:
        grid = [(s, n, RaggedSizes(GRID_SEGMENTS, n, sizes.features, sizes.queries, s)) for s, n in GRID]
        wanted += [(_grid_name(s, n), ATTENTION, grown) for s, n, grown in grid]
    return [
        _case(f"{text}, {direction}", name, size, direction != DIRECTIONS[0], options)
        for text, name, size in wanted
        for direction in DIRECTIONS
    ]


def _case(text: str, name: str, sizes: RaggedSizes, backward: bool, options: Options) -> Case:
    batch = RaggedBatch(sizes, "cpu", options.seed)
    facts = {"segments": sizes.segments, "tokens": batch.tokens, "longest": sizes.longest, "sparsity": sizes.sparsity}
    facts |= {"fill": batch.tokens / (sizes.segments * sizes.longest), "dim": sizes.features, "dtype": "float32"}
    facts |= {"queries": sizes.queries} if "query" in OPS[name].operands else {}
    full, small = (partial(_arms, name, x, backward, options) for x in (sizes, QUICK_SIZES))
    return Case(text, facts | {"seed": options.seed}, full, small)


def _arms(name: str, sizes: RaggedSizes, backward: bool, options: Options) -> list[Arm]:
    return Job(name, sizes, backward, options).arms()
