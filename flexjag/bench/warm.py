"""Compile what stages will need, in all cores at once: ``python -m flexjag.bench.warm STAGE PART PARTS SECONDS SEED``.

A suite runs in one process, because nothing may run beside what is timed; the compilers' caches on disk let it find
its kernels there. What fails here fails again where it is reported.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flexjag.backends import flex
from flexjag.bench.attention_arms import SLOW
from flexjag.bench.registry import Options, Trial, find
from flexjag.bench.tune_candidates import WORKS, Sizes, backward_candidates, forward_candidates, subjects

STAGES = ("attention", "normalizers", "tune")
"""Those whose kernels take the compilers long."""


def jobs(stage: str, options: Options) -> Iterator[Callable[[], Any]]:
    """What compiles something, each to be called once."""
    if stage != "tune":
        for case in find(stage).cases(options):
            if not isinstance(case, Trial):
                for arm in case.arms():
                    if arm.absent is None and (arm.name.startswith("flexjag") or arm.name in SLOW):
                        yield lambda arm=arm: arm.make()()
        return
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    sizes = Sizes(8, 8, 64, torch.bfloat16, 4096, options.seed)
    for work in WORKS:
        for subject in subjects(work, sizes) if work == "spans" else ():
            for backward, make in ((False, forward_candidates), (True, backward_candidates)):
                arms = subject.arms(flex.with_options, {"built in": {}, **make(sizes, capability, shared)}, backward)
                yield from (arm.make for arm in arms)


def main(stage: str, part: int, parts: int, seconds: float, seed: int) -> None:
    """Call every `parts`-th job, from the `part`-th on, until the time is up."""
    end = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(quick=device == "cpu", device=device, memory=False, seed=seed, budget=seconds)
    for i, job in enumerate(jobs(stage, options)):
        if i % parts != part:
            continue
        if time.monotonic() > end:
            print(f"{stage}: no time for job {i} and those behind it")
            return
        started = time.monotonic()
        try:
            made = job()
            if callable(made):
                made()
        except Exception as e:  # reported where it is measured
            print(f"{stage}: job {i}: {type(e).__name__}: {e}")
        print(f"{stage}: job {i}: {time.monotonic() - started:.1f} s", flush=True)
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
