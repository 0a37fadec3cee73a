"""Measurement of time and memory of a case's arms, after a check of their results."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexjag.bench.measuring.environment import free_memory
from flexjag.bench.suites.registry import Arm, ArmResult, Case, CaseResult, Options, Tell

HALF = (torch.float16, torch.bfloat16)
RESULTS = ("output", "dq", "dk", "dv")
FREE_SHARE = 0.6
LEAST_SAMPLES = 3
SLOW_FIRST_CALL = 2.0  # seconds; on a CPU, such an arm's check was warm-up enough
WARM_UP_MS, SAMPLE_MS = 1, 10  # of calls before a sample on a GPU, and in it
SLOW_CALL = 0.1  # seconds; do_bench makes eight calls at least
KERNELS = 8  # that are listed of an arm, those that take longest
LATER = "no acceptance limit needs it; there was no time left"
LATE = "the time was used up before it"


@dataclass(eq=False)
class _Live:
    """An arm that passed its check and is being timed."""

    arm: Arm
    call: Callable[[], Any]
    first_seconds: float
    compiled: dict[str, int]
    sample: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0  # seconds that its samples took, with all that is not timed in them

    def done(self, options: Options) -> bool:
        enough = min(LEAST_SAMPLES, options.rounds)
        slow = self.spent > options.seconds_per_arm or options.over
        return len(self.seconds) >= options.rounds or (slow and len(self.seconds) >= enough)


def run_case(
    suite: str, case: Case, options: Options, tell: Tell, names: Collection[str] | None = None
) -> list[ArmResult]:
    """Check arms; of those whose results are right, measure the time, interleaved, and the memory.

    Each round times every arm once, in an order that is shuffled from a fixed seed, so that a slow minute of the
    machine or the cache of a neighbour falls on all arms alike.

    Args:
        suite: Name of the suite.
        case: The case.
        options: Options of the run.
        tell: Called with a description of each measurement as it begins.
        names: Names of the arms to be measured; the others are skipped. None: all arms.
    """
    results: dict[str, ArmResult] = {}
    live: list[_Live] = []
    arms = list(case.arms())
    for arm in arms:
        if names is not None and arm.name not in names:
            results[arm.name] = ArmResult(arm.name, "skipped", LATER if arm.absent is None else arm.absent)
    # Ours first where time may run out: without them a case says nothing.
    for arm in sorted(arms, key=lambda arm: options.deadline is not None and not arm.name.startswith("flexjag")):
        if arm.name in results:
            continue
        if options.over:
            results[arm.name] = ArmResult(arm.name, "skipped", LATE)
            continue
        tell(f"{suite}: {case.name}: checking {arm.name}")
        outcome = _admit(arm, options)
        if isinstance(outcome, _Live):
            live.append(outcome)
        else:
            results[arm.name] = outcome
    order = random.Random(0)
    while running := [x for x in live if not x.done(options)]:
        order.shuffle(running)
        gc.collect()
        for x in running:
            tell(f"{suite}: {case.name}: timing {x.arm.name}, sample {len(x.seconds) + 1}")
            began = time.perf_counter()
            try:
                x.seconds.append(x.sample() / x.arm.steps)
            except Exception as e:  # such as memory that somebody else took meanwhile
                results[x.arm.name] = ArmResult(x.arm.name, "failed", describe_error(e))
                live.remove(x)
            x.spent += time.perf_counter() - began
    for x in live:
        extra: dict[str, Any] = {"tokens_per_second": x.arm.tokens / median(x.seconds)} if x.arm.tokens else {}
        if x.compiled:
            extra["compiled"] = x.compiled
        if options.device == "cuda":
            tell(f"{suite}: {case.name}: kernels of {x.arm.name}")
            extra |= _kernels(x.call, x.arm.steps)
        results[x.arm.name] = ArmResult(x.arm.name, "ok", seconds=x.seconds, first_seconds=x.first_seconds, extra=extra)
    live.clear()
    if options.memory:
        for arm in arms:
            late = options.over and options.device == "cpu"  # where it takes a process
            if results[arm.name].status == "ok" and arm.memory and not late:
                tell(f"{suite}: {case.name}: memory of {arm.name}")
                results[arm.name] = _with_memory(results[arm.name], suite, case, arm, options)
    return [results[arm.name] for arm in arms]


def _admit(arm: Arm, options: Options) -> _Live | ArmResult:
    """Run an arm once and check it. Returns it ready for timing, or its result if it is skipped, failed or wrong."""
    if arm.absent is not None:
        return ArmResult(arm.name, "skipped", arm.absent)
    free = free_memory(options.device)
    if free is not None and arm.needs > FREE_SHARE * free:
        why = f"needs about {arm.needs / 1e9:.1f} GB, over {FREE_SHARE:.0%} of the {free / 1e9:.1f} GB that are free"
        return ArmResult(arm.name, "skipped", why)
    try:
        call, before = arm.make(), _compilations()
        seconds, result = _timed(call, options.device)
        compiled = {name: n - before[name] for name, n in _compilations().items() if n > before[name]}
        wrong = arm.check(result)
        if wrong is not None:
            return ArmResult(arm.name, "wrong", wrong)
        del result
        sample = _on_host(call, options.device)
        if options.device == "cuda":  # there the first call compiled
            call()
            sample = sample if sample() > SLOW_CALL else _on_gpu(call)
        elif seconds < SLOW_FIRST_CALL:
            call()
    except Exception as e:  # other people's code: whatever it throws is its result
        return ArmResult(arm.name, "failed", describe_error(e))
    return _Live(arm, call, seconds, compiled, sample)


def _compilations() -> dict[str, int]:
    """Graphs that this process has had compiled by Inductor, and those that it has loaded from the disk cache."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported for this: it takes seconds
    counted = {} if dynamo is None else dynamo.counters["inductor"]
    return {"graphs": counted.get("fxgraph_cache_miss", 0), "from the cache": counted.get("fxgraph_cache_hit", 0)}


def describe_error(error: BaseException) -> str:
    """An exception in one line: its type and the start of its message, at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of one call by the host's clock, including the device's work, and the call's return value."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _on_host(call: Callable[[], Any], device: str) -> Callable[[], float]:
    return lambda: _timed(call, device)[0]


def _on_gpu(call: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that measures one sample, the seconds of a call on a GPU.

    A sample is the median of about 10 ms of calls, each between two events of the device.

    It is one short ``triton.testing.do_bench``, which overwrites the L2 cache before every call. So no call finds its
    inputs there because the call before it was the same one: it reads them from memory, as an attention does in a
    model, where other layers ran in between. Inputs smaller than the cache (50 MB on an H100) would otherwise look
    faster than they are in use. Within a call nothing is flushed: a backward finds what its own forward left.

    The flush itself is not timed, but takes about 0.1 ms, in which the host already launches the call's first kernels.
    Between the events the device still waits for a host that is slower than its kernels, but by that much less than in
    a loop of bare calls: a call of few, short kernels is timed as one whose launches something else hides.
    :func:`_kernels` measures the kernels alone.
    """
    from triton.testing import do_bench

    def sample() -> float:
        milliseconds: Any = do_bench(call, warmup=WARM_UP_MS, rep=SAMPLE_MS, return_mode="median")
        return milliseconds / 1e3

    return sample


def _kernels(call: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Time of the device's kernels during one step of a call, measured by PyTorch's profiler.

    Returns:
        ``kernel_seconds`` of all kernels and copies together, their number, and the longest by name; or the reason why
        they could not be measured.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
            call()
            torch.cuda.synchronize()
        found = [x for x in recorded.key_averages() if x.self_device_time_total > 0]
    except Exception as e:  # the profiler is not what is measured
        return {"kernels_failed": describe_error(e)}
    found.sort(key=lambda x: -x.self_device_time_total)
    return {
        "kernel_seconds": sum(x.self_device_time_total for x in found) / 1e6 / steps,
        "kernel_launches": sum(x.count for x in found) / steps,
        "kernels": [
            {"name": x.key[:120], "count": x.count / steps, "seconds": x.self_device_time_total / 1e6 / steps}
            for x in found[:KERNELS]
        ],
    }


def _with_memory(result: ArmResult, suite: str, case: Case, arm: Arm, options: Options) -> ArmResult:
    try:
        if options.device == "cuda":
            peak, method = _cuda_peak(arm), "CUDA allocator peak"
        else:
            found = peak_in_subprocess(suite, case.name, arm.name, options)
            peak, method = found["bytes"], found["method"]
    except RuntimeError as e:  # also CUDA's for no memory
        return replace(result, extra={**result.extra, "memory_failed": describe_error(e)})
    return replace(result, memory_bytes=peak, memory_method=method)


def _cuda_peak(arm: Arm) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.make()()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_in_subprocess(suite: str, case: str, arm: str, options: Options) -> dict[str, Any]:
    """Peak resident memory of one arm above its inputs, in a fresh Python process.

    Raises:
        RuntimeError: If the process fails.
    """
    asked = json.dumps(asdict(options))
    command = [
        sys.executable,
        "-m",
        "flexjag.bench.measuring.peak",
        suite,
        case,
        arm,
        str(torch.get_num_threads()),
        asked,
    ]
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"exit status {done.returncode}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def disagreement(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    rounded: Sequence[Tensor],
    names: Sequence[str] = RESULTS,
    terms: int = 1,
) -> str | None:
    """Description of the first mismatch between `got` and the reference, or None.

    The tolerance is derived, not chosen: the largest error against the float64 result may be twice that of a plain
    computation in the same precision and a rounding of the largest value. Where a value sums many terms in an order
    that is free, that rounding grows with the root of their number, as independent roundings do.

    Args:
        got: An arm's output and gradients.
        exact: The same tensors in float64.
        rounded: The same tensors from a plain computation in `got`'s precision.
        names: Names of the tensors.
        terms: Number of terms that a value sums in free order, such as a bias's gradient over all tokens.
    """
    if len(got) != len(exact):
        return f"{len(got)} results instead of {len(exact)}"
    for name, x, want, plain in zip(names, got, exact, rounded, strict=False):
        if x.shape != want.shape:
            return f"{name} has shape {tuple(x.shape)} instead of {tuple(want.shape)}"
        error = _largest(x.double() - want)
        free = 1 if x.dtype in HALF else terms  # half precision is summed in float32
        rounding = math.sqrt(free) * torch.finfo(x.dtype).eps * _largest(want)
        allowed = 2 * (_largest(plain.double() - want) + rounding)
        if not error <= allowed:  # also when it is NaN
            return f"{name} is off by {error:.2e}, more than the {allowed:.2e} that rounding explains"
    return None


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def median(seconds: Sequence[float]) -> float:
    """Median of the samples."""
    return statistics.median(seconds)


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile: the spread between them holds half of the samples.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 4.0)
    """
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


class Results:
    """Look up a suite's results by case and arm, for its figures."""

    def __init__(self, cases: Sequence[CaseResult]) -> None:
        self._arms = {(case.name, arm.name): arm for case in cases for arm in case.arms}

    def seconds(self, case: str, arm: str) -> float | None:
        """Median seconds of an arm, or None if it has no samples."""
        found = self._arms.get((case, arm))
        return median(found.seconds) if found is not None and found.seconds else None

    def memory(self, case: str, arm: str) -> float | None:
        """An arm's peak memory in bytes, or None if it was not measured."""
        found = self._arms.get((case, arm))
        return None if found is None or found.memory_bytes is None else float(found.memory_bytes)

    def kernel_seconds(self, case: str, arm: str) -> float | None:
        """Seconds of an arm's kernels on a GPU, without the host's part, or None if not measured."""
        return self.extra(case, arm, "kernel_seconds")

    def extra(self, case: str, arm: str, key: str) -> Any:
        """Another value that the arm recorded, or None."""
        found = self._arms.get((case, arm))
        return None if found is None else found.extra.get(key)


def ratio(a: float | None, b: float | None) -> float | None:
    """The quotient a / b, or None if one is missing or b is 0.

    >>> ratio(3.0, 2.0), ratio(None, 2.0)
    (1.5, None)
    """
    return None if a is None or not b else a / b
