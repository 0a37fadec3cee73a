"""Everything that needs a GPU, in one bounded run: ``python -m flexjag.bench gpu --out DIR``.

In stages: a smoke test of every way to the device, the tests (``pytest -m cuda``), a check that nothing waits for the
device, compilation of the kernels of later stages on all cores at once, every suite, and the tuning of kernel options.
Each is a process of its own: a crash of the device or a hang does not affect the others. The results are written after
each stage, and each can be run alone (``--stage``).
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flexjag.bench import outcomes, run, warm
from flexjag.bench.cli import Parser, add_options, make_options
from flexjag.bench.suites.registry import BenchError, find, load

ROOT = Path(__file__).parents[2]
OPTIONAL = ("attn_gym", "rich", "matplotlib", "cloudpickle", "fbgemm_gpu", "pynvml")
FIRST, LAST = ("smoke", "tests", "sync", "warm"), ("tune",)  # before the suites, and behind them
WEIGHTS = {
    "smoke": 2.0, "tests": 8.0, "sync": 1.0, "warm": 4.0, "mask-build": 1.0, "attention": 6.0, "ops": 3.0,
    "normalizers": 3.0, "paper": 3.0, "step": 1.0, "tune": 6.0,
}  # fmt: skip
"""Weights by which stages share the time; default 2. Time that a stage does not use goes to those after it."""
START = 10.0  # seconds until a process measures anything
GRACE = 10.0  # seconds after its budget when a process is ended
SHOWN = 1500  # characters of a fault that are printed; the log has it whole


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

    def share(self, name: str) -> float:
        """Remove stage `name` from those waiting, and return its share of the remaining seconds."""
        weights = {other: WEIGHTS.get(other, 2.0) for other in self.waiting}
        self.waiting.remove(name)
        return max(0.0, self.left) * weights[name] / sum(weights.values())


@dataclass(frozen=True)
class Ended:
    """Result of a process that has ended.

    Attributes:
        output: Its standard output and standard error.
        seconds: Its duration in seconds.
        cut: Description of an abnormal end (exit status or timeout), or None.
    """

    output: str
    seconds: float
    cut: str | None


def main(argv: Sequence[str]) -> int:
    """Run the stages.

    Args:
        argv: The arguments after ``gpu``.

    Returns:
        0, or 1 if a check or test failed or did not end, an arm was wrong, or a step waited for the device.

    Raises:
        BenchError: If the arguments are wrong or there is no GPU.
        OSError: If the results cannot be written.
    """
    parser = Parser("flexjag bench gpu", description="The tests and suites that need a GPU, in at most nine minutes.")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the results and a log are put")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    stages = [*FIRST, *load(), *LAST]
    parser.add_argument("--stage", nargs="+", metavar="STAGE", help=f"default all, in this order: {', '.join(stages)}")
    parser.add_argument(
        "--tests", type=Path, nargs="+", default=[ROOT / "tests"], metavar="PATH", help="default: beside the package"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="the tests whose names match, as of pytest")
    parser.add_argument("--processes", type=int, help="for the tests; default: three quarters of the cores")
    add_options(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise BenchError(f"--minutes: must be over 0; got minutes={args.minutes}")
    asked = stages if args.stage is None else args.stage
    unknown = [name for name in asked if name not in stages]
    if unknown:
        raise BenchError(f"--stage: must be one of {', '.join(stages)}; got stage={unknown[0]!r}")
    session = _Session(args, asked)
    for name in asked:
        getattr(session, name if name in (*FIRST, *LAST) else "suite")(name)
    print(f"wrote {session.path} and {session.log.name}", file=sys.stderr)
    return 1 if session.went_wrong else 0


class _Session:
    """State of a run: results so far, their file, the log and the clock."""

    def __init__(self, args: argparse.Namespace, stages: Sequence[str]) -> None:
        self.clock = Clock(60 * args.minutes, list(stages), time.monotonic())
        self.args, self.device = args, args.device
        self.results = run.begin(make_options(args))
        absent = [name for name in OPTIONAL if not _installed(name)]
        self.results |= {"minutes": args.minutes, "absent": absent, "runs": []}
        self.path = args.out / run.file_name(self.results)
        self.log = self.path.with_suffix(".log")
        run.write(self.results, self.path)
        self.log.write_text("")

    def smoke(self, name: str) -> None:
        """Run :mod:`flexjag.bench.smoke`."""
        with self._folder(name) as folder:
            out = Path(folder) / "smoke.json"
            ended = self._run(name, ["-m", "flexjag.bench.smoke", self.device, str(out)], self.clock.share(name))
            checks = json.loads(out.read_text())["checks"] if out.exists() else []
        self.results["smoke"] = {"checks": checks, "cut": ended.cut}
        self._done(name, ended, [f"{x['name']}: {x['wrong']}" for x in checks if not x["passed"]])

    def tests(self, name: str) -> None:
        """Run ``pytest -m cuda`` on the files with such tests, in several processes if xdist is installed."""
        # Other files may import what is not installed here.
        places = [x for given in self.args.tests for x in _test_files(given.resolve())]
        files = [p for p in places if re.search("CUDA_ONLY|mark.cuda", p.read_text())]
        if not files:
            self.clock.share(name)
            self.results["tests"] = {"counts": {}, "failures": {}, "cut": "There are no tests here."}
            return
        command = ["-m", "pytest", "-m", "cuda", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", outcomes.__name__]
        # Without the project's own arguments, which would collect doctests too; a warning of somebody else's is none
        # of these tests' business.
        command += ["--continue-on-collection-errors", "-o", "addopts=", "-W", "default", "--color=no"]
        command += ["-k", self.args.k] if self.args.k else []
        if _installed("xdist"):
            count = self.args.processes or max(1, (os.cpu_count() or 1) * 3 // 4)
            command += ["-n", str(count), "--dist", "load", "--maxschedchunk", "1"]  # in order, so that slow ones end
        with self._folder(name) as place:
            written = Path(place) / "outcomes.jsonl"
            ended = self._run(
                name, [*command, *map(str, files)], self.clock.share(name), {outcomes.NAMED_BY: str(written)}
            )
            self.results["tests"] = outcomes.read(written) | {"cut": ended.cut, "seconds": ended.seconds}
        self._done(name, ended, [f"{x}: {why}" for x, why in self.results["tests"]["failures"].items()])

    @property
    def went_wrong(self) -> bool:
        """True if a check or a test failed or did not end, an arm is wrong, or a step waited for the device."""
        tests = self.results.get("tests", {"failures": {}, "cut": None})
        smoke = self.results.get("smoke", {"checks": [], "cut": None})
        arms = [arm for suite in self.results["suites"] for case in suite["cases"] for arm in case["arms"]]
        wrong = any(arm["status"] == "wrong" for arm in arms) or not all(x["passed"] for x in smoke["checks"])
        waited = self.results.get("sync", {"passed": None})["passed"] is False
        return bool(tests["failures"] or tests["cut"] or smoke["cut"]) or wrong or waited

    def sync(self, name: str) -> None:
        """Run :func:`flexjag.bench.sync.check`."""
        ended = self._run(name, ["-m", "flexjag.bench.sync", self.device], self.clock.share(name))
        try:
            found = json.loads(ended.output.splitlines()[-1])
        except (IndexError, ValueError):
            found = {"passed": None, "detail": ended.cut or "it printed no result", "steps": 0}
        self.results["sync"] = found
        self._done(name, ended)

    def warm(self, name: str) -> None:
        """Run :mod:`flexjag.bench.warm` for the stages still waiting, in several processes."""
        share = self.clock.share(name)
        stages = [x for x in warm.STAGES if x in self.clock.waiting]
        parts = max(1, (os.cpu_count() or 1) * 7 // 8)
        seconds = f"{max(1.0, share - START):.0f}"

        def one(part: int) -> Ended:
            command = [sys.executable, "-m", warm.__name__, str(part), str(parts), seconds, str(self.args.seed)]
            return run_process([*command, *stages], share + GRACE, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})

        print(f"{name}: at most {share + GRACE:.0f} s", file=sys.stderr)
        began = time.monotonic()
        with ThreadPoolExecutor(parts) as pool:
            ended = list(pool.map(one, range(parts)))
        cut = next((x.cut for x in ended if x.cut), None)
        self._done(name, Ended("".join(x.output for x in ended), time.monotonic() - began, cut))

    def tune(self, name: str) -> None:
        """Run :mod:`flexjag.bench.tuning.tune`; the winners are written to the results only."""
        share = self.clock.share(name)
        with self._folder(name) as folder:
            out = Path(folder) / "tuned.json"
            command = ["-m", "flexjag.bench", "tune", "--out", str(out), "--work", warm.TUNED["work"]]
            command += ["--dim", *map(str, warm.TUNED["dims"])]
            command += ["--first", str(warm.TUNED["first"]), "--masks", str(warm.TUNED["masks"])]
            command += ["--minutes", f"{max(1.0, share - START) / 60:.2f}", "--seed", str(self.args.seed)]
            ended = self._run(name, command, share)
            found = json.loads(out.read_text()) if out.exists() else None
        self.results["tune"] = {"tuned": found, "cut": ended.cut}
        self._done(name, ended)

    def suite(self, name: str) -> None:
        """Run one suite; results that it had written count however it ended."""
        share = self.clock.share(name)
        budget = max(1.0, share - START)
        with self._folder(name) as folder:
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

    def _folder(self, name: str) -> tempfile.TemporaryDirectory[str]:
        """A folder for what a stage writes while it runs, beside the results: it stays if this process is killed."""
        return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.args.out)

    def _run(self, name: str, arguments: list[str], share: float, more: Mapping[str, str] | None = None) -> Ended:
        limit = max(1.0, min(share + GRACE, self.clock.left))
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr)
        return run_process([sys.executable, *arguments], limit, more)

    def _done(self, name: str, ended: Ended, faults: Sequence[str] = ()) -> None:
        """Write a stage's output and full faults to the log, and print the faults, shortened."""
        self.results["runs"].append({"name": name, "seconds": round(ended.seconds, 1), "cut": ended.cut})
        run.write(self.results, self.path)
        title = f"== {name}: {ended.seconds:.1f} s{f', {ended.cut}' if ended.cut else ''}"
        with self.log.open("a") as log:
            log.write("\n".join([title, ended.output, *faults, ""]))
        print(
            title, *(f"{fault[:200]} … {fault[-SHOWN:]}" if len(fault) > SHOWN else fault for fault in faults), sep="\n"
        )


def run_process(command: list[str], limit: float, more: Mapping[str, str] | None = None) -> Ended:
    """Run a Python command in the package's own folder, for at most `limit` seconds; `more` extends its environment."""
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


def _test_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("test_*.py"), key=_importance)


def _importance(file: Path) -> tuple[bool, str]:
    """Sort key: files whose tests compute attention on the device come first."""
    return not file.name.startswith("test_cuda"), file.name


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a module that is blocked, or half of one
        return False
