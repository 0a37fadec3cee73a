"""Processes of a long run, and its clock. They are ended with all that they started, and what they printed is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVERY = 1.0  # seconds between looks at a process

WEIGHTS = {
    "smoke": 2.0, "tests": 8.0, "plain": 4.0, "sync": 1.0, "warm": 4.0, "attention": 5.0, "step": 1.0, "paper": 2.0,
    "normalizers": 4.0, "tune": 4.0, "mask-build": 1.0, "ops": 3.0, "rest": 0.5,
}  # fmt: skip
"""Weights by which stages share the time; default 2. Time that a stage does not use goes to those after it."""

_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """Result of a process that has ended.

    Attributes:
        output: Its standard output and standard error.
        seconds: Its duration in seconds.
        cut: Description of an abnormal end (exit status or timeout), or None.
        status: Its exit status; None if it was ended.
        late: Whether it was ended because its time was used up.
    """

    output: str
    seconds: float
    cut: str | None
    status: int | None = None
    late: bool = False


@dataclass
class Clock:
    """Remaining time of a run, and its distribution among stages.

    Attributes:
        seconds: Total duration in seconds.
        waiting: Names of the stages that have not run.
        start: Start of the run, by ``time.monotonic()``.
    """

    seconds: float
    waiting: list[str]
    start: float

    @property
    def left(self) -> float:
        """Remaining seconds; negative after the end."""
        return self.start + self.seconds - time.monotonic()

    def share(self, *names: str) -> float:
        """Remove stages from those waiting, and return their common share of the remaining seconds."""
        weights = {other: WEIGHTS.get(other, 2.0) for other in self.waiting}
        for name in names:
            self.waiting.remove(name)
        return max(0.0, self.left) * sum(weights[name] for name in names) / sum(weights.values())


def run_process(
    command: list[str],
    limit: float,
    more: Mapping[str, str] | None = None,
    watch: Callable[[], str | None] | None = None,
) -> Ended:
    """Run a Python command in the package's own folder, for at most `limit` seconds.

    Args:
        command: The command.
        limit: Seconds after which it is ended.
        more: Additions to its environment.
        watch: Function that is called about every second while the process runs, and after its end. It returns why the
            process is to be ended, or None.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:  # a file: what was printed is there whatever becomes of the process
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "300", **(more or {})},  # or pytest cuts its reasons
            start_new_session=True,  # so that its own processes end with it
        )
        with _lock:
            _running.add(process)
        cut, late, status = None, False, None
        try:
            while cut is None:
                left = start + limit - time.monotonic()
                try:
                    status = process.wait(max(0.0, min(EVERY, left)))
                    if status not in (0, 1):  # 1 is what pytest says of failures, and Python of exceptions
                        cut = f"ended with exit status {status}"
                    break
                except subprocess.TimeoutExpired:
                    late = time.monotonic() >= start + limit
                    cut = f"ended after the {limit:.0f} s that it had" if late else watch and watch()
        finally:
            _end(process)
        if watch is not None:
            watch()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(text, time.monotonic() - start, cut, status, late)


def end_all() -> None:
    """End every process that :func:`run_process` has started and not yet ended."""
    with _lock:
        left = list(_running)
    for process in left:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with _lock:
        _running.discard(process)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
