"""Everything that needs a GPU, in one bounded run: ``python -m flexjag.bench gpu --out DIR``.

In stages, of which each can be run alone (``--stage``): a smoke test of every way to the device; the tests (``pytest -m
cuda``); ``plain``, the suites' cases that compile nothing; a check that nothing waits for the device, beside the
compilation of the later stages' kernels on all cores at once; the suites, first the arms that acceptance limits
compare; the tuning of kernel options; and the ``rest``, arms that no limit needs.

Where a machine is there for minutes only, two calls:

.. code-block:: sh

    python -m flexjag.bench gpu --out DIR --minutes 5 --stage smoke tests
    python -m flexjag.bench gpu --out DIR --minutes 7 --stage plain sync warm attention step paper normalizers tune rest

Tests that were not reached are run by a third: ``--stage tests --not-passed DIR/…json``; cases of the suites by the
second with ``--go-on DIR/…json``.

Each stage is a process of its own, so a crash of the device or a hang does not affect the others; suites whose process
dies go on in a new one behind the case that ended it. The results file has every case, test and check within seconds
after its end, however the run itself ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from flexjag.bench import outcomes, preflight, run, warm
from flexjag.bench.cli import Parser, add_options, make_options
from flexjag.bench.processes import ROOT, Clock, Ended, end_all, run_process
from flexjag.bench.suites.registry import ALL, NEEDED, PLAIN, BenchError, find, load

FIRST, AFTER = ("smoke", "tests", "plain", "sync", "warm"), ("tune",)  # before the suites in warm.SUITES, and after
LAST = ("rest",)
START = 10.0  # seconds until a process measures anything
GRACE = 10.0  # seconds after its budget when a process is ended
FEWEST = 45.0  # seconds of tuning
SILENT = 120.0  # seconds without a new case after which a process of suites is taken to hang
STARTS = 5  # of the process of some suites, at most
SHOWN = 1500  # characters of a fault that are printed; the log has it whole


def stages() -> list[str]:
    """All stages, in the order of their value."""
    return [*FIRST, *warm.SUITES, *AFTER, *(name for name in load() if name not in warm.SUITES), *LAST]


def main(argv: Sequence[str]) -> int:
    """Run the stages.

    Args:
        argv: The arguments after ``gpu``.

    Returns:
        0, or 1 if a check or test failed or did not end, an arm was wrong, or a step waited for the device.

    Raises:
        BenchError: If the arguments are wrong, there is no GPU, or something that a stage needs is missing.
        OSError: If the results cannot be written.
    """
    parser = Parser("flexjag bench gpu", description="The tests and suites that need a GPU, in at most nine minutes.")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the results and a log are put")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument("--stage", nargs="+", metavar="STAGE", help=f"default all, in order: {', '.join(stages())}")
    parser.add_argument(
        "--tests", type=Path, nargs="+", default=[ROOT / "tests"], metavar="PATH", help="default: beside the package"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="the tests whose names match, as of pytest")
    parser.add_argument(
        "--not-passed",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULTS.json",
        help="only tests that did not pass in these results, which must be of the same compute capability; whether a "
        "later commit could have broken them is not checked",
    )
    parser.add_argument(
        "--go-on",
        type=Path,
        metavar="RESULTS.json",
        help="keep the cases of the suites in these results of this device",
    )
    parser.add_argument("--processes", type=int, help="for the tests; default: three quarters of the cores")
    parser.add_argument("--anyway", action="store_true", help="run even if something that a stage needs is missing")
    add_options(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise BenchError(f"--minutes: must be over 0; got minutes={args.minutes}")
    asked = args.stage or stages()
    unknown = [name for name in asked if name not in stages()]
    if unknown:
        raise BenchError(f"--stage: must be one of {', '.join(stages())}; got stage={unknown[0]!r}")
    found = preflight.look(asked, args.device, args.tests)
    print(found, file=sys.stderr, flush=True)
    if found.needed and not args.anyway:
        raise BenchError(f"missing, and needed: {'; '.join(found.needed)} (--anyway runs what it can)")
    session = _Session(args, asked, found.absent)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        session.run()
    finally:
        signal.signal(signal.SIGTERM, before)
        end_all()
        run.write(session.results, session.path)
    print(f"wrote {session.path} and {session.log.name}", file=sys.stderr)
    return 1 if session.went_wrong else 0


def _terminated(number: int, frame: object) -> NoReturn:
    """End what was started; Python does not by itself when it is asked to end."""
    end_all()
    raise SystemExit(128 + number)


class _Session:
    """State of a run: results so far, their file, the log and the clock."""

    def __init__(self, args: argparse.Namespace, asked: Sequence[str], absent: list[str]) -> None:
        self.clock = Clock(60 * args.minutes, list(asked), time.monotonic())
        self.args, self.device, self.asked = args, args.device, asked
        self.results = run.begin(make_options(args))
        self.results |= {"minutes": args.minutes, "absent": absent, "runs": []}
        self.passed = outcomes.passed_in(args.not_passed, self.results["environment"])
        self.path = args.out / run.file_name(self.results)
        self.log = self.path.with_suffix(".log")
        run.write(self.results, self.path)
        self.log.write_text("")

    def run(self) -> None:
        """Run the stages that were asked for."""
        with self._folder("suites") as folder:
            self.measured = Path(folder) / "results.json"
            if self.args.go_on is not None:
                self._go_on(self.args.go_on)
            for names in _groups(self.asked):
                if names[0] in ("sync", "warm"):
                    self.prepare(names)
                elif names[0] in (PLAIN, "rest"):
                    suites = [x for x in self.asked if x in load()] or list(warm.SUITES)
                    self.suites(names, suites, PLAIN if names[0] == PLAIN else ALL)
                elif names[0] in load():
                    self.suites(names, names, NEEDED)
                else:
                    getattr(self, names[0])(names[0])

    def _go_on(self, file: Path) -> None:
        """Begin with the suites of an earlier run, whose commit and date are recorded.

        Raises:
            BenchError: If it was on another device, or with other versions.
            OSError: If the file cannot be read.
        """
        there, here = run.read(file), self.results["environment"]
        for key in ("device_name", "torch", "triton"):
            if there["environment"][key] != here[key]:
                raise BenchError(f"--go-on: {file} is of {there['environment'][key]}, and here is {here[key]}")
        self.results["went_on"] = {key: there["environment"][key] for key in ("date", "commit")}
        run.write(there, self.measured)
        run.forget_running(self.measured)
        self._merge()

    def smoke(self, name: str) -> None:
        """Run :mod:`flexjag.bench.smoke`."""
        with self._folder(name) as folder:
            out = Path(folder) / "smoke.json"

            def found() -> None:
                checks = json.loads(out.read_text())["checks"] if out.exists() else []
                self.results["smoke"] = {"checks": checks, "cut": "interrupted"}

            command = ["-m", "flexjag.bench.smoke", self.device, str(out)]
            ended = self._run(name, command, self.clock.share(name), watch=self._watch(out, found))
            found()
        smoke = self.results["smoke"]
        smoke["cut"] = ended.cut
        self._done(name, ended, [f"{x['name']}: {x['wrong']}" for x in smoke["checks"] if not x["passed"]])

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
        if preflight.installed("xdist"):
            count = self.args.processes or max(1, (os.cpu_count() or 1) * 3 // 4)
            command += ["-n", str(count), "--dist", "load", "--maxschedchunk", "1"]  # in order, so that slow ones end
        with self._folder(name) as place:
            written, before = Path(place) / "outcomes.jsonl", Path(place) / "passed.json"
            before.write_text(json.dumps(self.passed))

            def found() -> None:
                self.results["tests"] = outcomes.read(written) | {"cut": "interrupted"}

            told = {outcomes.NAMED_BY: str(written), outcomes.PASSED_IN: str(before)}
            watch = self._watch(written, found)
            ended = self._run(name, [*command, *map(str, files)], self.clock.share(name), told, watch)
            found()
        cut = None if ended.cut == "ended with exit status 5" else ended.cut  # there were none to run
        self.results["tests"] |= {"cut": cut, "seconds": ended.seconds, "left_out": sum(map(len, self.passed.values()))}
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

    def prepare(self, names: Sequence[str]) -> None:
        """Run :func:`flexjag.bench.sync.check` and, beside it, :mod:`flexjag.bench.warm` in several processes."""
        share = self.clock.share(*names)
        limit = max(1.0, min(share + GRACE, self.clock.left))
        print(f"{' and '.join(names)}: at most {limit:.0f} s", file=sys.stderr)
        parts = max(1, (os.cpu_count() or 1) * 7 // 8) if "warm" in names else 0
        waiting = [x for x in warm.STAGES if x in self.clock.waiting]
        began = time.monotonic()
        with self._folder("warm") as folder, ThreadPoolExecutor(parts + 1) as pool:
            command = [sys.executable, "-m", warm.__name__, folder, f"{max(1.0, share - START):.0f}"]
            command += [str(self.args.seed), *waiting]
            one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            compiling = [pool.submit(run_process, command, limit, one) for _ in range(parts)]
            if "sync" in names:
                ended = run_process([sys.executable, "-m", "flexjag.bench.sync", self.device], limit)
                try:
                    found = json.loads(ended.output.splitlines()[-1])
                except (IndexError, ValueError):
                    found = {"passed": None, "detail": ended.cut or "it printed no result", "steps": 0}
                self.results["sync"] = found
                self._done("sync", ended)
            each = [x.result() for x in compiling]
        if each:
            cut = next((x.cut for x in each if x.cut), None)
            self._done("warm", Ended("".join(x.output for x in each), time.monotonic() - began, cut))

    def tune(self, name: str) -> None:
        """Run :mod:`flexjag.bench.tuning.tune`; the winners are written to the results only."""
        share = self.clock.share(name)
        if share < FEWEST:
            cut = f"not begun: the {share:.0f} s that it had are too few"
            self.results["tune"] = {"tuned": None, "cut": cut}
            self._done(name, Ended("", 0.0, cut))
            return
        with self._folder(name) as folder:
            out = Path(folder) / "tuned.json"
            command = ["-m", "flexjag.bench", "tune", "--out", str(out), "--work", warm.TUNED["work"]]
            command += ["--dim", *map(str, warm.TUNED["dims"]), "--tokens", str(warm.TUNED["tokens"])]
            command += ["--first", str(warm.TUNED["first"]), "--masks", str(warm.TUNED["masks"])]
            command += ["--minutes", f"{max(1.0, share - START) / 60:.2f}", "--seed", str(self.args.seed)]

            def found() -> None:
                tuned = json.loads(out.read_text()) if out.exists() else None
                self.results["tune"] = {"tuned": tuned, "cut": "interrupted"}

            ended = self._run(name, command, share, watch=self._watch(out, found))
            found()
        self.results["tune"]["cut"] = ended.cut
        self._done(name, ended)

    def suites(self, names: Sequence[str], suites: Sequence[str], part: str) -> None:
        """Run stages `names`: a part of some suites, in a process; another takes over where one dies."""
        share = self.clock.share(*names)
        end, text = time.monotonic() + share, " ".join(names)
        command = ["-m", "flexjag.bench", *suites, "--into", str(self.measured), "--part", part]
        command += ["--device", self.device, "--seed", str(self.args.seed)]
        command += [f"--{flag.replace('_', '-')}" for flag in ("quick", "no_memory") if getattr(self.args, flag)]
        ended = None
        for _ in range(STARTS):
            left = end - time.monotonic()
            if ended is not None and (ended.late or ended.status == 0 or left < START):
                break
            budget = ["--budget", f"{max(1.0, left - START):.1f}"]
            ended = self._run(text, [*command, *budget], left, watch=self._watch(self.measured, self._merge, SILENT))
            self._merge()
            self._done(text, ended)
            if ended.late:  # which is not the fault of the case that ran: a later stage may try it again
                run.forget_running(self.measured)
                self._merge()
        assert ended is not None
        known = {x["name"] for x in self.results["suites"]}
        empty = [{"name": x, "about": find(x).about, "cases": [], "figures": []} for x in names if x in load()]
        self.results["suites"] += [x | {"cut": ended.cut} for x in empty if x["name"] not in known]
        for entry in self.results["suites"]:
            if part != PLAIN and entry["name"] in suites and entry["cut"] == run.INTERRUPTED:
                entry["cut"] = ended.cut or run.INTERRUPTED
        run.write(self.results, self.path)

    def _merge(self) -> None:
        """Take over what the process of the suites has written."""
        if self.measured.exists():
            written = {x["name"]: x for x in run.read(self.measured)["suites"]}
            others = [x for x in self.results["suites"] if x["name"] not in written]
            self.results["suites"] = [*written.values(), *others]

    def _folder(self, name: str) -> tempfile.TemporaryDirectory[str]:
        """A folder for what a stage writes while it runs, beside the results: it stays if this process is killed."""
        return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.args.out)

    def _watch(self, file: Path, take: Callable[[], None], silent: float | None = None) -> Callable[[], str | None]:
        """A function that calls `take` and writes the results each time that `file` has changed.

        With `silent`, it tells when that has not happened for so many seconds.
        """
        seen, since = None, time.monotonic()

        def look() -> str | None:
            nonlocal seen, since
            now = file.stat().st_mtime_ns if file.exists() else None
            if now != seen:
                seen, since = now, time.monotonic()
                with contextlib.suppress(ValueError):  # half a file: there will be another change
                    take()
                run.write(self.results, self.path)
            if silent is not None and time.monotonic() - since > silent:
                return f"ended after {silent:.0f} s in which nothing was written"
            return None

        return look

    def _run(
        self,
        name: str,
        arguments: list[str],
        share: float,
        more: Mapping[str, str] | None = None,
        watch: Callable[[], str | None] | None = None,
    ) -> Ended:
        limit = max(1.0, min(share + GRACE, self.clock.left))
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr)
        return run_process([sys.executable, *arguments], limit, more, watch)

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


def _groups(asked: Sequence[str]) -> Iterator[list[str]]:
    """Stages that run together: suites in a row, in one process, and the preparations."""
    group: list[str] = []
    kinds = dict.fromkeys(load(), "suites") | dict.fromkeys(("sync", "warm"), "preparations")
    for name in asked:
        if group and (kinds.get(name) is None or kinds.get(name) != kinds.get(group[0])):
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _test_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("test_*.py"), key=_importance)


def _importance(file: Path) -> tuple[bool, str]:
    """Sort key: files whose tests compute attention on the device come first."""
    return not file.name.startswith("test_cuda"), file.name
