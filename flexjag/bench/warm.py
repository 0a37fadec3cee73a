"""Fill the compilers' disk caches in parallel: ``python -m flexjag.bench.warm PART PARTS SECONDS SEED STAGE…``.

A suite runs in one process, because nothing may run beside what is timed. With the caches filled it need not compile
its kernels there. Errors are only printed here: they occur again in the suite, which reports them.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from flexjag.backends.flex import run as flex
from flexjag.bench.arms.attention import SLOW
from flexjag.bench.suites.registry import Arm, Case, Options, find
from flexjag.bench.tuning.candidates import TuningSizes, backward_candidates, forward_candidates, subjects

STAGES = ("attention", "normalizers", "tune")
"""Stages with long compile times."""
TUNED: dict[str, Any] = {"work": "spans", "dims": (128, 64), "first": 3, "masks": 1}
"""Arguments of the tuning stage: few candidates on one mask, since each is compiled."""


def jobs(stage: str, options: Options) -> Iterator[Callable[[], Any]]:
    """The compilations of a stage, as functions to be called once each. They make their inputs, which are large."""
    if stage != "tune":
        yield from (partial(_run, case) for case in find(stage).cases(options) if isinstance(case, Case))
        return
    if options.device == "cpu":  # nothing to tune on a CPU
        return
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for dim in TUNED["dims"]:
        sizes = TuningSizes(8, 8, dim, torch.bfloat16, 4096, options.seed)
        for subject in subjects(TUNED["work"], sizes, TUNED["masks"]):
            for backward, make in ((False, forward_candidates), (True, backward_candidates)):
                candidates = {"built in": {}, **make(sizes, capability, shared, TUNED["first"])}
                arms = subject.arms(flex.with_options, candidates, backward)
                yield from (partial(_call, arm) for arm in arms)


def _run(case: Case) -> None:
    """Run the arms of a case with long compile times: flexjag's, and others that use FlexAttention."""
    for arm in case.arms():
        if arm.absent is None and (arm.name.startswith("flexjag") or arm.name in SLOW):
            try:
                _call(arm)
            except Exception as e:  # reported by the suite
                print(f"{case.name}: {arm.name}: {type(e).__name__}: {e}")


def _call(arm: Arm) -> None:
    arm.make()()


def main(part: int, parts: int, seconds: float, seed: int, stages: Sequence[str]) -> None:
    """Run every `parts`-th compilation of all stages, starting with the `part`-th, for at most `seconds`."""
    end = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(quick=device == "cpu", device=device, memory=False, seed=seed, budget=seconds)
    each = ((stage, job) for stage in stages for job in jobs(stage, options))
    for i, (stage, job) in enumerate(each):
        if i % parts != part:
            continue
        if time.monotonic() > end:
            print(f"no time for job {i}, of {stage}, and those behind it")
            return
        started = time.monotonic()
        try:
            job()
        except Exception as e:  # reported by the suite
            print(f"{stage}: job {i}: {type(e).__name__}: {e}")
        print(f"{stage}: job {i}: {time.monotonic() - started:.1f} s", flush=True)
        gc.collect()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
