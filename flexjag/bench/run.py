"""Run suites one after the other and store the results in memory and, after every case, in a file."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexjag.bench.measuring.environment import describe
from flexjag.bench.measuring.schedule import Pace, jobs, passes, with_deadline
from flexjag.bench.suites.registry import PLAIN, BenchError, CaseResult, Options, Suite, Tell

SCHEMA = 1
INTERRUPTED = "interrupted"  # the cut of a suite that has not ended
BROKEN = "CUDA error"  # of kernels and launches, not of memory: each later call of the process fails as well
SILENCE = 10.0  # maximum seconds between lines of progress within a case


def measure(results: dict[str, Any], suites: Sequence[Suite], options: Options, path: Path | None, tell: Tell) -> None:
    """Run the suites and add their results to `results`.

    Args:
        results: The results that :func:`begin` returned, or those of an interrupted run, whose complete cases are kept;
            modified in place.
        suites: The suites to run, in order.
        options: Options of the run.
        path: File to write after every case, so that an interruption loses one at most; None for no file.
        tell: Progress callback.

    Raises:
        BenchError: If an error made the GPU unusable for this process.
        OSError: If the file cannot be written.
    """
    paces = {suite.name: Pace.of(options) for suite in suites}
    for part in passes(with_deadline(options)):
        for suite in suites:
            entry = _entry(results, suite)
            found = {case["name"]: CaseResult.read(case) for case in entry["cases"]}
            for job in jobs(suite, part, tell, found, paces[suite.name], entry.get("running")):
                entry["running"] = job.name
                write(results, path)
                found[job.name] = job.run()
                del entry["running"]
                entry["cases"] = [asdict(case) for case in found.values()]
                entry["figures"] = [asdict(f) | {"met": f.met} for f in suite.figures(options, list(found.values()))]
                write(results, path)
                _check_device(found[job.name])
            entry.pop("running", None)  # a case that is there no more
            late = sum(case.cut is not None for case in found.values())
            if options.part != PLAIN:
                entry["cut"] = f"{late} of {len(found)} cases had no time for all of it" if late else None
            write(results, path)


def _check_device(case: CaseResult) -> None:
    """Raise if an error has made the GPU unusable for this process, so that the next cases are not blamed for it.

    Raises:
        BenchError: If it has.
    """
    for reason in (str(case.cut), *(str(arm.reason) for arm in case.arms)):
        if BROKEN in reason:
            text = "after this error the process cannot use the GPU, but a new one may go on with --into"
            raise BenchError(f"{case.name}: {text}: {reason}")


def _entry(results: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """The suite's entry in the results; a new one if there is none."""
    entry = next((x for x in results["suites"] if x["name"] == suite.name), None)
    if entry is None:
        entry = {"name": suite.name, "about": suite.about, "cases": [], "figures": []}
        results["suites"].append(entry)
    entry["cut"] = INTERRUPTED
    return entry


def begin(options: Options) -> dict[str, Any]:
    """New results without suites: schema version, environment and seed."""
    return {
        "schema": SCHEMA,
        "quick": options.quick,
        "seed": options.seed,
        "environment": describe(options.device),
        "suites": [],
    }


def write(results: dict[str, Any], path: Path | None) -> None:
    """Write a results file atomically; without a path do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(path)


def forget_running(path: Path) -> None:
    """Let the case that ran when its process ended be tried again, by removing it from a results file, if there is one.

    Raises:
        BenchError: If the file is no results file.
        OSError: If it cannot be read or written.
    """
    if path.exists():
        results = read(path)
        for entry in results["suites"]:
            entry.pop("running", None)
        write(results, path)


def file_name(results: dict[str, Any]) -> str:
    """Name of a results file: the device and the time at which the run began.

    >>> file_name({"quick": True, "environment": {"device": "cpu", "date": "2026-11-21T08:00:00Z"}})
    'quick-cpu-20261121T080000.json'
    """
    environment = results["environment"]
    name = "cpu" if environment["device"] == "cpu" else environment["device_name"].lower()
    date = re.sub(r"[^0-9T]", "", environment["date"])
    return f"{'quick-' if results['quick'] else ''}{re.sub(r'[^a-z0-9]+', '-', name)}-{date}.json"


def read(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        BenchError: If the file is not JSON, or not of this schema.
        OSError: If it cannot be read.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as e:
        raise BenchError(f"{path}: is not JSON: {e}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise BenchError(f"{path}: must be results of flexjag bench, schema {SCHEMA}")
    return results


@contextmanager
def progress() -> Iterator[Tell]:
    """Progress on stderr: on a terminal a line that is redrawn, elsewhere a line per case and at least each 10 s."""
    began = time.monotonic()
    shown, last = "", began

    def line(text: str) -> None:
        nonlocal shown, last
        case, now = text.rpartition(": ")[0], time.monotonic()
        if not shown or case != shown or now - last >= SILENCE:
            print(f"{now - began:5.0f} s  {text}", file=sys.stderr, flush=True)
            shown, last = case, now

    try:
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield line
        return
    # Drawn between samples only: a thread that redraws would disturb the timings.
    columns = (TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text, refresh=True)
