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
from flexjag.bench.measuring.measure import iterate
from flexjag.bench.suites.registry import BenchError, Options, Suite, Tell

SCHEMA = 1
SILENCE = 10.0  # maximum seconds between lines of progress within a case


def measure(results: dict[str, Any], suites: Sequence[Suite], options: Options, path: Path | None, tell: Tell) -> None:
    """Run the suites and add their results to `results`.

    Args:
        results: The results that :func:`begin` returned, modified in place.
        suites: The suites to run, in order.
        options: Options of the run.
        path: File to write after every case, so that an interruption loses one at most; None for no file.
        tell: Progress callback.

    Raises:
        OSError: If the file cannot be written.
    """
    for suite in suites:
        cases = []
        entry = {"name": suite.name, "about": suite.about, "cases": [], "figures": [], "cut": "interrupted"}
        results["suites"].append(entry)
        for case in iterate(suite, options, tell):
            cases.append(case)
            entry["cases"].append(asdict(case))
            entry["figures"] = [asdict(f) | {"met": f.met} for f in suite.figures(options, cases)]
            write(results, path)
        entry["cut"] = None
        write(results, path)


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
