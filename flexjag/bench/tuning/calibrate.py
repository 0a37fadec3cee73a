"""``python -m flexjag.bench calibrate``: fit a cost model to the CPU backends and report the regret of its choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from flexjag.algebra.masks import Causal, Mask, Prefix, Window
from flexjag.algebra.normalizers import Normalizer, SiLU, Softmax, StickBreaking
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.backends import costs
from flexjag.backends.costs import Line, Sizes, Work
from flexjag.backends.cpp import cost as cpp_cost
from flexjag.backends.segments import cost as segments_cost
from flexjag.backends.tiled import cost as tiled_cost
from flexjag.bench.measuring.environment import describe
from flexjag.bench.measuring.measure import median, run_case
from flexjag.bench.suites.registry import Arm, Case, Options, Tell
from flexjag.jagged import Jagged

HEADS, DIM = 4, 64
TOKENS = (500, 4096)  # in a batch: two, to tell what is per attention from what is per token
LENGTHS = (4, 15, 60, 250, 1000, 4000)  # not aligned with tiles, but for 4
KINDS: tuple[tuple[str, Mask, Normalizer], ...] = (
    ("whole", Causal(), Softmax()),
    ("shared bias", Window(128, 0), Softmax()),
    ("shared bias", Window(128, 0) | Prefix(4), Softmax()),
    ("runs", Window(128, 0), Softmax()),
    ("runs", Window(128, 0) | Prefix(4), Softmax()),
    ("pointwise", Causal(), SiLU()),
    ("pointwise", Window(128, 0), SiLU()),
    ("stick-breaking", Causal(), StickBreaking()),
)
ESTIMATES = {"segments": segments_cost.work, "tiled": tiled_cost.work, "cpp": cpp_cost.work}
"""Estimated work of a way, by backend."""


@dataclass(frozen=True)
class Point:
    """One measurement: a backend's work on one case and its median time in seconds."""

    work: Work
    grad: bool
    kind: str
    tokens: int
    length: int
    seconds: float

    @property
    def line(self) -> str:
        """Name of the cost line that this point belongs to: way and direction."""
        return f"{self.work.way}, {'training' if self.grad else 'forward'}"


def ways(kind: str) -> dict[str, str]:
    """Way of computing (the cost line's name) of each backend that has one for a kind of call.

    Stick-breaking has one in ``cpp``; elsewhere the line of pointwise normalizers stands for it.
    """
    if kind == "stick-breaking":
        return {"cpp": "cpp, stick-breaking"}
    if kind == "pointwise":
        return {backend: f"{backend}, pointwise" for backend in ESTIMATES}
    return {"segments": f"segments, {kind}", "tiled": "tiled", "cpp": "cpp, softmax"}


def measure(tell: Tell, rounds: int = 5) -> list[Point]:
    """Time the backends over :data:`KINDS`, :data:`TOKENS` and :data:`LENGTHS`, forward and with gradients.

    A backend that refuses a kind here, such as ``cpp`` without a compiler, has no points.
    """
    points = []
    options = Options(rounds=rounds, memory=False, seconds_per_arm=2.0)
    for (kind, mask, normalizer), most, length, grad in product(KINDS, TOKENS, LENGTHS, (False, True)):
        if length > most:
            continue
        segments = round(most / length)
        tokens = segments * length
        arms = [
            Arm(backend, _call(backend, kind, mask, normalizer, length, segments, grad), lambda got: None)
            for backend in ways(kind)
        ]
        name = f"{mask!r}, {segments} segments of {length}"
        case = Case(name, {}, lambda arms=arms: arms, lambda arms=arms: arms)
        for result in run_case("calibrate", case, options, tell):
            if result.seconds:
                way = ways(kind)[result.name]
                sizes = Sizes(segments, tokens, tokens, HEADS * 2 * DIM / costs.DIMS)
                work = ESTIMATES[result.name](way, mask, sizes)
                points.append(Point(work, grad, f"{mask!r}, {kind}", most, length, median(result.seconds)))
    return points


def _call(
    backend: str, kind: str, mask: Mask, normalizer: Normalizer, length: int, segments: int, grad: bool
) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(length * segments, HEADS, DIM, generator=generator).requires_grad_(grad) for _ in range(3)
        ]
        q, k, v = (Jagged.from_lengths(x, [length] * segments) for x in leaves)
        k, v = q.with_values(k.values), q.with_values(v.values)
        own = Window(torch.full((segments,), length), None)  # allows every key, but keeps segments from sharing a bias
        made = plan(q, mask=mask & own if kind == "runs" else mask, normalizer=normalizer)
        weights = torch.ones_like(leaves[0])

        def call() -> Any:
            out = attention(q, k, v, plan=made, backend=backend)
            assert isinstance(out, Jagged)
            return torch.autograd.grad(out.values, leaves, weights) if grad else out

        return call

    return make


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Line:
    """Fit ``seconds = a + b·calls + c·tokens + d·scores``, all ≥ 0, by least squares of the relative error.

    The best of the fits of each subset of the terms, among those without a negative coefficient: with four terms that
    is all there is to nonnegative least squares.

    >>> counts = [(1, 4, 10), (2, 4, 10), (1, 4, 30), (1, 8, 10), (3, 8, 20)]
    >>> works = [Work("w", *x) for x in counts]
    >>> [round(x, 6) for x in fit(works, [2 + 3 * x + 0.5 * y + 0.25 * z for x, y, z in counts])]
    [2.0, 3.0, 0.5, 0.25]
    """
    y = torch.tensor(seconds, dtype=torch.float64)
    x = torch.tensor([(1.0, w.calls, w.tokens, w.scores) for w in works], dtype=torch.float64) / y[:, None]
    ones = torch.ones_like(y)
    found = []
    for some in (columns for n in range(1, 5) for columns in combinations(range(4), n)):
        solution = torch.linalg.lstsq(x[:, some], ones[:, None]).solution[:, 0].clamp(min=0)
        error = float(((x[:, some] @ solution - 1) ** 2).sum())
        terms = dict(zip(some, solution.tolist(), strict=True))
        found.append((error, Line(*(terms.get(i, 0.0) for i in range(4)))))
    return min(found)[1]


def regret(points: Sequence[Point], lines: dict[str, Line]) -> list[dict[str, Any]]:
    """For each case the way with the least predicted time, and its measured time over the fastest way's."""
    cases: dict[tuple[str, int, int, bool], list[Point]] = {}
    for point in points:
        cases.setdefault((point.kind, point.tokens, point.length, point.grad), []).append(point)
    found = []
    for (kind, tokens, length, grad), here in cases.items():
        chosen = min(here, key=lambda p: lines[p.line].seconds(p.work))
        best = min(p.seconds for p in here)
        measured = {p.work.way: p.seconds for p in here}
        expected = {p.work.way: lines[p.line].seconds(p.work) for p in here}
        fact = {"kind": kind, "tokens": tokens, "length": length, "grad": grad, "chosen": chosen.work.way}
        found.append(fact | {"measured": measured, "expected": expected, "regret": chosen.seconds / best})
    return found


def calibrate(path: Path, tell: Tell) -> dict[str, Any]:
    """Measure, fit, and write the record to `path` as JSON."""
    environment = describe("cpu")
    points = measure(tell)
    lines = {}
    for name in sorted({p.line for p in points}):
        mine = [p for p in points if p.line == name]
        lines[name] = fit([p.work for p in mine], [p.seconds for p in mine])
    result = {
        "environment": environment,
        "lines": {name: line._asdict() for name, line in lines.items()},
        "cases": regret(points, lines),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    costs.record.cache_clear()
    return result


def summary(result: dict[str, Any]) -> str:
    """The record as text: the cost lines, then the regret of their choices.

    >>> case = {"regret": 1.25, "kind": "Causal(), whole", "tokens": 500, "length": 64, "grad": True}
    >>> print(summary({"lines": {"tiled": Line(1e-4, 2e-5, 4e-8, 3e-9)._asdict()}, "cases": [case]}))
    tiled: 100.0 µs + 20.0 µs per call + 40.0 ns per token + 3.000 ns per score
    chosen: 1.23x the fastest at the 90th percentile, 1.25x at worst (Causal(), whole, 500 in 64s, training)
    """
    out = []
    for name, line in result["lines"].items():
        fixed, call, token, score = (x * unit for x, unit in zip(Line(**line), (1e6, 1e6, 1e9, 1e9), strict=True))
        terms = f"{fixed:.1f} µs + {call:.1f} µs per call + {token:.1f} ns per token + {score:.3f} ns per score"
        out.append(f"{name}: {terms}")
    worst = max(result["cases"], key=lambda c: c["regret"])
    regrets = torch.tensor([1.0, *(c["regret"] for c in result["cases"])])
    direction = "training" if worst["grad"] else "forward"
    what = f"{worst['kind']}, {worst['tokens']} in {worst['length']}s, {direction}"
    tenth = float(regrets.quantile(0.9))
    out.append(f"chosen: {tenth:.2f}x the fastest at the 90th percentile, {worst['regret']:.2f}x at worst ({what})")
    return "\n".join(out)
