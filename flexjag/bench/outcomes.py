"""Pytest plugin ``-p flexjag.bench.outcomes``: append each test's outcome to the file in ``FLEXJAG_TEST_OUTCOMES``.

Each test adds a line of JSON when it ends, so that an interrupted run keeps its outcomes so far. If
``FLEXJAG_TESTS_PASSED`` names a file, the tests in it are left out: it holds names by file, as :func:`read` returns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMED_BY = "FLEXJAG_TEST_OUTCOMES"
PASSED_IN = "FLEXJAG_TESTS_PASSED"


def pytest_configure(config: Any) -> None:
    """Register the recorder, except in xdist's workers: their reports are sent to the main process."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(os.environ[NAMED_BY])))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests that have passed before."""
    place = os.environ.get(PASSED_IN)
    if place:
        passed = {f"{file}::{name}" for file, names in json.loads(Path(place).read_text()).items() for name in names}
        config.hook.pytest_deselected(items=[x for x in items if x.nodeid in passed])
        items[:] = [x for x in items if x.nodeid not in passed]


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a test's call, and a setup or teardown that failed or skipped."""
        failed = report.outcome == "failed"
        if report.when != "call" and not failed and report.outcome != "skipped":
            return
        reason = None
        if failed:
            reason = report.longreprtext
        elif report.outcome == "skipped":
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        outcome = "error" if failed and report.when != "call" else report.outcome
        self._write(report.nodeid, outcome, round(report.duration, 2), reason)

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that could not be collected."""
        if report.failed:
            self._write(report.nodeid, "error", 0.0, report.longreprtext)

    def _write(self, test: str, outcome: str, seconds: float, reason: str | None) -> None:
        line = {"test": test, "outcome": outcome, "seconds": seconds, "reason": reason}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Summarize a file of outcomes.

    Args:
        path: The file; it may be missing, or end in the middle of a line.

    Returns:
        ``counts`` by outcome, the names of those ``passed`` by file, the full text of ``failures`` by test, counts of
        ``skips`` by reason, and the seconds of the ``slowest`` ten by test.
    """
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut off while it was written
            continue
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    failures = {x["test"]: x["reason"] for x in lines if x["outcome"] in ("failed", "error")}
    skips: dict[str, int] = {}
    for line in lines:
        if line["outcome"] == "skipped":
            skips[line["reason"]] = skips.get(line["reason"], 0) + 1
    passed: dict[str, list[str]] = {}
    for line in lines:
        if line["outcome"] == "passed":
            file, _, name = line["test"].partition("::")
            passed.setdefault(file, []).append(name)
    slowest = sorted(lines, key=lambda x: -x.get("seconds", 0.0))[:10]
    return {
        "counts": counts,
        "passed": passed,
        "failures": failures,
        "skips": skips,
        "slowest": {x["test"]: x.get("seconds", 0.0) for x in slowest},
    }


def passed_in(files: Sequence[Path], here: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names by file of the tests that passed in some results.

    Args:
        files: Results files.
        here: Environment of the present run (:func:`flexjag.bench.measuring.environment.describe`).

    Raises:
        BenchError: If results are of another kind of device, or do not tell which tests passed.
        OSError: If a file cannot be read.
    """
    from flexjag.bench.run import read as read_results  # not where pytest loads this file
    from flexjag.bench.suites.registry import BenchError

    found: dict[str, list[str]] = {}
    for file in files:
        results = read_results(file)
        there = results["environment"]
        if there.get("capability") != here.get("capability"):
            raise BenchError(
                f"--not-passed: {file} is of a {there['device_name'] or 'CPU'}, not of this kind of device"
            )
        if "passed" not in results.get("tests", {}):
            raise BenchError(f"--not-passed: {file} does not tell which tests passed")
        for name, tests in results["tests"]["passed"].items():
            found.setdefault(name, []).extend(tests)
    return found
