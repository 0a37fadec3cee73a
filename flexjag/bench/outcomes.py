"""Pytest plugin ``-p flexjag.bench.outcomes``: append each test's outcome to the file in ``FLEXJAG_TEST_OUTCOMES``.

Each test adds a line of JSON when it ends, so that an interrupted run keeps its outcomes so far.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAMED_BY = "FLEXJAG_TEST_OUTCOMES"


def pytest_configure(config: Any) -> None:
    """Register the recorder, except in xdist's workers: their reports are sent to the main process."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(os.environ[NAMED_BY])))


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
        ``counts`` by outcome, the full text of ``failures`` by test, counts of ``skips`` by reason, and the seconds of
        the ``slowest`` ten by test.
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
    slowest = sorted(lines, key=lambda x: -x.get("seconds", 0.0))[:10]
    return {
        "counts": counts,
        "failures": failures,
        "skips": skips,
        "slowest": {x["test"]: x.get("seconds", 0.0) for x in slowest},
    }
