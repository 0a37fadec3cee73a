"""Peak resident memory of one arm, measured in a separate process: ``python -m flexjag.bench.measuring.peak``.

The same arm first runs on small inputs, to load code. Then the real inputs are made, the baseline is read, and the arm
runs once from `make` to its result.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexjag.bench.suites.registry import Arm, Case, Options, find

M_MMAP_THRESHOLD = -3  # of malloc.h


def main(argv: list[str]) -> int:
    """Print the peak memory of an arm as JSON. Arguments: SUITE CASE ARM THREADS OPTIONS, the options as JSON."""
    give_back_freed_memory()
    suite, name, arm, threads, asked = argv
    torch.set_num_threads(int(threads))
    options = Options(**json.loads(asked))
    case = next(c for c in find(suite).cases(options) if c.name == name)
    assert isinstance(case, Case)
    _named(case.small(), arm).make()()
    gc.collect()
    chosen = _named(case.arms(), arm)
    gc.collect()
    print(json.dumps(measure_peak(lambda: chosen.make()())))
    return 0


def _named(arms: Sequence[Arm], name: str) -> Arm:
    return next(x for x in arms if x.name == name)


def give_back_freed_memory() -> None:
    """Make glibc return every block of 128 KiB and more to the system once it is freed.

    By default the threshold (M_MMAP_THRESHOLD) below which it keeps freed memory grows with the blocks it has seen
    freed. An arm would then reuse memory of what ran before it, and resident memory would not grow at all.
    """
    _ask_glibc("mallopt", M_MMAP_THRESHOLD, 128 * 1024)


def _ask_glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library, if it has it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def measure_peak(call: Callable[[], object]) -> dict[str, Any]:
    """Run `call` once and measure the peak rise of resident memory (RSS).

    Linux resets its high-water mark on request. Elsewhere the mark itself is the baseline, and memory that `call` uses
    below an earlier peak is not counted. Memory freed before, which `call` would use again, is first returned to the
    system.

    Returns:
        The rise in ``bytes``, and the ``method`` of measurement.
    """
    gc.collect()
    _ask_glibc("malloc_trim", 0)
    before, method = _mark(), "growth of the peak RSS (a lower bound)"
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before, method = _status("VmRSS"), "peak RSS above the RSS before"
    result = call()
    rise = _mark() - before
    del result
    return {"bytes": max(0, rise), "method": method}


def _mark() -> int:
    """High-water mark of resident memory since its last reset, in bytes."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
