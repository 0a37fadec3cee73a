"""Fill the compilers' disk caches in parallel: ``python -m flexjag.bench.warm FOLDER SECONDS SEED STAGE…``.

A suite runs in one process, because nothing may run beside what is timed. With the caches filled it need not compile
its kernels there: the shapes, dtypes and options here are those of the suites. Errors are only printed here: they occur
again in the suite, which reports them.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexjag.backends.flex import run as flex
from flexjag.bench.arms.attention import FLEX, SLOW
from flexjag.bench.suites.registry import Arm, Case, Options, find
from flexjag.bench.suites.step import STEP
from flexjag.bench.tuning.candidates import TuningSizes, backward_candidates, forward_candidates, subjects

SUITES = ("attention", "step", "paper", "normalizers")
"""Suites with long compile times."""
STAGES = (*SUITES, "tune", "rest")
TUNED: dict[str, Any] = {"work": "spans", "dims": (128, 64), "first": 3, "masks": 1, "tokens": 32768}
"""Arguments of the tuning stage: few candidates on one mask, since each is compiled."""
SIZES = r"(N = |length |sparsity )[\d.,]+|[\d,]+ tokens"
"""Sizes in names of cases that do not change the kernels."""


def jobs(stages: Sequence[str], options: Options) -> Iterator[Callable[[], Any]]:
    """The compilations of some stages, as functions to be called once each. They make their inputs, which are large."""
    suites = [name for name in SUITES if name in stages]
    yield from (partial(_run, case, case.needed) for name in suites for case in _distinct(name, options))
    if "tune" in stages and options.device == "cuda":
        yield from _candidates(options)
    if "rest" in stages:
        rest = _distinct("attention", options, every=True) if "attention" in suites else []
        yield from (partial(_run, case, (FLEX, *SLOW)) for case in rest)


def _distinct(suite: str, options: Options, every: bool = False) -> list[Case]:
    """The cases that compile kernels (or `every` case), the first of each series of sizes."""
    found: dict[str, Case] = {}
    for case in find(suite).cases(options):
        if isinstance(case, Case) and (every or case.compiles):
            found.setdefault(re.sub(SIZES, "", case.name), case)
    return list(found.values())


def _run(case: Case, names: Sequence[str]) -> None:
    """Run those arms of a case (all, without `names`) that are flexjag's, or others that use FlexAttention."""
    for arm in case.arms():
        compiles = arm.name.startswith("flexjag") or arm.name in (STEP, *SLOW)
        if arm.absent is None and compiles and (not names or arm.name in names):
            try:
                _call(arm)
            except Exception as e:  # reported by the suite
                print(f"{case.name}: {arm.name}: {type(e).__name__}: {e}")


def _candidates(options: Options) -> Iterator[Callable[[], Any]]:
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for dim in TUNED["dims"]:
        sizes = TuningSizes(8, 8, dim, torch.bfloat16, TUNED["tokens"], options.seed)
        for subject in subjects(TUNED["work"], sizes, TUNED["masks"]):
            for backward, make in ((False, forward_candidates), (True, backward_candidates)):
                candidates = {"built in": {}, **make(sizes, capability, shared, TUNED["first"])}
                arms = subject.arms(flex.with_options, candidates, backward)
                yield from (partial(_call, arm) for arm in arms)


def _call(arm: Arm) -> None:
    arm.make()()


def main(folder: Path, seconds: float, seed: int, stages: Sequence[str]) -> None:
    """Run compilations that no other process has begun, for at most `seconds`.

    Args:
        folder: Existing folder that all processes of a run share; a file in it says that a compilation was begun.
        seconds: Time after which none is begun.
        seed: Random seed of lengths and values.
        stages: Those of :data:`STAGES` to compile for.
    """
    end = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(quick=device == "cpu", device=device, memory=False, seed=seed, budget=seconds)
    for i, job in enumerate(jobs(stages, options)):
        if time.monotonic() > end:
            print(f"no time for job {i} and those behind it")
            return
        try:
            os.close(os.open(folder / str(i), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        started = time.monotonic()
        try:
            job()
        except Exception as e:  # reported by the suite
            print(f"job {i}: {type(e).__name__}: {e}")
        print(f"job {i}: {time.monotonic() - started:.1f} s", flush=True)
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
