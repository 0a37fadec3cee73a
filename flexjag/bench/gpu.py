"""Everything that needs a GPU, in one bounded run: ``python -m flexjag.bench gpu --out DIR``.

The tests (``pytest -m cuda``), a check that nothing waits for the device, and every suite, each in a process of its
own: one that crashes the device or hangs takes no other with it. The results are written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexjag.bench import run
from flexjag.bench.cli import Parser, add_options, make_options
from flexjag.bench.registry import BenchError, find, load

ROOT = Path(__file__).parents[2]
OPTIONAL = ("attn_gym", "rich", "matplotlib", "cloudpickle", "fbgemm_gpu", "psutil")
WEIGHTS = {"tests": 5.0, "sync": 1.0, "mask-build": 1.0, "attention": 6.0, "ops": 3.0, "normalizers": 3.0}
"""Shares of the time; 2 for what is not listed. What one does not use is left to those after it."""
START = 10.0  # seconds until a process measures anything
GRACE = 10.0  # seconds after its budget when a process is ended
OUTCOME = re.compile(r"^(?P<test>\S.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
REASON = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+)(?: - (?P<reason>.*))?$", re.M)


@dataclass
class Clock:
    """The time that is left, and how it is shared.

    Attributes:
        seconds: In all.
        waiting: What is still to be run, by name.
        start: When it began, by ``time.monotonic()``.
    """

    seconds: float
    waiting: list[str]
    start: float

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.start + self.seconds - time.monotonic()

    def share(self, name: str) -> float:
        """Seconds for `name`, which is no longer waiting afterwards."""
        weights = {other: WEIGHTS.get(other, 2.0) for other in self.waiting}
        self.waiting.remove(name)
        return max(0.0, self.left) * weights[name] / sum(weights.values())


@dataclass(frozen=True)
class Ended:
    """What came of a process.

    Attributes:
        output: What it printed, errors included.
        seconds: How long it ran.
        cut: Why it has no proper end, or None.
    """

    output: str
    seconds: float
    cut: str | None


def main(argv: Sequence[str]) -> int:
    """Run it all.

    Args:
        argv: The arguments behind ``gpu``.

    Returns:
        0, or 1 if a test failed or did not end, an arm was wrong, or a step waited for the device.

    Raises:
        BenchError: If the arguments are wrong or there is no GPU.
        OSError: If the results cannot be written.
    """
    parser = Parser("flexjag bench gpu", description="The tests and suites that need a GPU, in at most nine minutes.")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the results and a log are put")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument("--suites", nargs="*", metavar="SUITE", help=f"default all: {', '.join(load())}")
    parser.add_argument(
        "--tests", type=Path, default=ROOT / "tests", metavar="PATH", help="default: beside the package"
    )
    parser.add_argument("--no-tests", action="store_true", help="suites only")
    add_options(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise BenchError(f"--minutes: must be over 0; got minutes={args.minutes}")
    suites = [find(name).name for name in (load() if args.suites is None else args.suites)]
    session = _Session(args, suites)
    if not args.no_tests:
        session.tests(args.tests.resolve())
    session.sync()
    for name in suites:
        session.suite(name)
    print(f"wrote {session.path} and {session.log.name}", file=sys.stderr)
    return 1 if session.went_wrong else 0


class _Session:
    """One run: its results so far, its file, its log and its clock."""

    def __init__(self, args: argparse.Namespace, suites: list[str]) -> None:
        parts = [*([] if args.no_tests else ["tests"]), "sync", *suites]
        self.clock = Clock(60 * args.minutes, parts, time.monotonic())
        self.args, self.device = args, args.device
        self.results = run.begin(make_options(args))
        absent = [name for name in OPTIONAL if not _installed(name)]
        self.results |= {"minutes": args.minutes, "absent": absent, "runs": []}
        self.path = args.out / run.file_name(self.results)
        self.log = self.path.with_suffix(".log")
        run.write(self.results, self.path)
        self.log.write_text("")

    def tests(self, folder: Path) -> None:
        """``pytest -m cuda`` on the files that have such tests."""
        # Other files may import what is not installed here.
        places = [folder] if folder.is_file() else sorted(folder.rglob("test_*.py"))
        files = [p for p in places if re.search("CUDA_ONLY|mark.cuda", p.read_text())]
        if not files:
            self.clock.share("tests")
            self.results["tests"] = {"counts": {}, "failures": {}, "cut": "There are no tests here."}
            return
        command = ["-m", "pytest", "-m", "cuda", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        # Without the project's own arguments, which would collect doctests too.
        command += ["--continue-on-collection-errors", "-o", "addopts=", "--color=no", *map(str, files)]
        ended = self._run("tests", command, self.clock.share("tests"))
        self.results["tests"] = read_tests(ended.output) | {"cut": ended.cut, "seconds": ended.seconds}
        self._done("tests", ended)

    @property
    def went_wrong(self) -> bool:
        """Whether a test failed or did not end, an arm is wrong, or a step waited for the device."""
        tests = self.results.get("tests", {"failures": {}, "cut": None})
        arms = [arm for suite in self.results["suites"] for case in suite["cases"] for arm in case["arms"]]
        wrong = any(arm["status"] == "wrong" for arm in arms)
        return bool(tests["failures"] or tests["cut"]) or wrong or self.results["sync"]["passed"] is False

    def sync(self) -> None:
        """:func:`flexjag.bench.sync.check`."""
        ended = self._run("sync", ["-m", "flexjag.bench.sync", self.device], self.clock.share("sync"))
        try:
            found = json.loads(ended.output.splitlines()[-1])
        except (IndexError, ValueError):
            found = {"passed": None, "detail": ended.cut or "it printed no result", "steps": 0}
        self.results["sync"] = found
        self._done("sync", ended)

    def suite(self, name: str) -> None:
        """One suite; what it had written when it ended counts, however it ended."""
        share = self.clock.share(name)
        budget = max(1.0, share - START)
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "flexjag.bench", name, "--out", folder, "--device", self.device]
            command += ["--budget", f"{budget:.1f}", "--seed", str(self.args.seed)]
            command += [f"--{flag.replace('_', '-')}" for flag in ("quick", "no_memory") if getattr(self.args, flag)]
            ended = self._run(name, command, share)
            written = sorted(Path(folder).glob("*.json"))
            found = run.read(written[0])["suites"] if written else []
        entry = found[0] if found else {"name": name, "about": find(name).about, "cases": [], "figures": []}
        late = sum(bool(case["cut"]) for case in entry["cases"])
        cut = ended.cut or (f"{late} of {len(entry['cases'])} cases had no time for all of it" if late else None)
        self.results["suites"].append(entry | {"cut": cut, "budget_seconds": round(budget, 1)})
        self._done(name, ended)

    def _run(self, name: str, arguments: list[str], share: float) -> Ended:
        limit = max(1.0, min(share + GRACE, self.clock.left))
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr)
        return run_process([sys.executable, *arguments], limit)

    def _done(self, name: str, ended: Ended) -> None:
        self.results["runs"].append({"name": name, "seconds": round(ended.seconds, 1), "cut": ended.cut})
        run.write(self.results, self.path)
        with self.log.open("a") as log:
            log.write(f"== {name}: {ended.seconds:.1f} s{f', {ended.cut}' if ended.cut else ''}\n{ended.output}\n")


def run_process(command: list[str], limit: float) -> Ended:
    """Run a Python command in the package's own folder, for at most `limit` seconds."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:  # a file: what was printed is there whatever becomes of the process
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "300"},  # or pytest cuts its reasons
            start_new_session=True,  # so that its own processes end with it
        )
        cut = None
        try:
            status = process.wait(limit)
            if status not in (0, 1):  # 1 is what pytest says of failures, and Python of exceptions
                cut = f"ended with exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            cut = f"ended after the {limit:.0f} s that it had"
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(text, time.monotonic() - start, cut)


def read_tests(output: str) -> dict[str, Any]:
    r"""Counts and failures from what ``pytest -v -rfE`` printed, also if it was ended.

    >>> read_tests("a.py::b PASSED [ 50%]\na.py::c FAILED [100%]\nFAILED a.py::c - assert 0")
    {'counts': {'passed': 1, 'failed': 1}, 'failures': {'a.py::c': 'assert 0'}}
    """
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    for found in OUTCOME.finditer(output):
        outcome = found["outcome"].lower()
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in ("failed", "error"):
            failures[found["test"]] = "no reason was printed"
    for found in REASON.finditer(output):
        failures[found["test"]] = (found["reason"] or "see the log")[:300]
    return {"counts": counts, "failures": failures}


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a module that is blocked, or half of one
        return False
