"""The command line: ``python -m flexjag.bench [SUITE…]``, ``… report FILE…`` and ``… gpu --out DIR``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from flexjag.bench.suites.registry import ALL, NEEDED, PLAIN, BenchError, Options, Tell, find, load
from flexjag.errors import MissingExtraError

PAGE = Path("docs/performance.md")
PICTURES = Path("images/performance")  # beside the page
HASTE = 1.5  # seconds per arm where there is a budget


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a BenchError."""

    def error(self, message: str) -> NoReturn:
        """Raise the BenchError that `main` prints in one line.

        Raises:
            BenchError: Always, with `message`.
        """
        raise BenchError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites, or write a page from their results.

    Args:
        argv: The arguments. Default: those of the process.

    Returns:
        The exit status: 0, 1 if a test of ``gpu`` failed, or 2 after a one-line message about invalid arguments.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command: Callable[[list[str]], int] = {"report": _report, "gpu": _gpu, "calibrate": _calibrate, "tune": _tune}.get(
        argv[0] if argv else "", _run
    )
    try:
        return command(argv if command is _run else argv[1:])
    except (BenchError, OSError) as e:
        print(f"flexjag bench: {e}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    from flexjag.bench import run

    parser = Parser("flexjag bench", description="Measure what flexjag claims, beside what it replaces.")
    suites = f"default all: {', '.join(load())}; or: report FILE…, gpu --out DIR, tune, calibrate"
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=suites)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the results there, as one JSON file")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of as tables")
    add_options(parser)
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="for all of them: what acceptance limits need comes first, and what does not fit is left out",
    )
    parser.add_argument(
        "--arm-seconds",
        type=float,
        metavar="SECONDS",
        help="after which an arm with three samples has no more; default 4, with a budget 1.5; at most 31 are taken",
    )
    parser.add_argument(
        "--part",
        choices=(ALL, NEEDED, PLAIN),
        default=ALL,
        help="only what limits need, or of that what never compiles",
    )
    parser.add_argument("--into", type=Path, metavar="RESULTS.json", help="go on with a run: what it has is kept")
    args = parser.parse_args(argv)
    chosen = [find(name) for name in args.suites or load()]
    options = make_options(args)
    results = run.begin(options) if args.into is None or not args.into.exists() else run.read(args.into)
    path = args.into or (None if args.out is None else args.out / run.file_name(results))
    with run.progress() as tell:
        run.measure(results, chosen, options, path, tell if args.into is None else _while_wanted(tell))
    if path is not None:
        print(f"wrote {path}", file=sys.stderr)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        from flexjag.bench.report import print_results

        print_results(results)
    return 0


def _while_wanted(tell: Tell) -> Tell:
    """A progress callback that ends this process once the one that started it has ended: nobody reads the results."""
    parent = os.getppid()

    def checked(text: str) -> None:
        if os.getppid() != parent:
            raise SystemExit("flexjag bench: the process that started this one has ended")
        tell(text)

    return checked


def _calibrate(argv: list[str]) -> int:
    from flexjag.backends import costs
    from flexjag.bench import run
    from flexjag.bench.tuning import calibrate

    text = "Measure the CPU backends and fit the lines by which auto chooses between them. Takes about three minutes."
    parser = Parser("flexjag bench calibrate", description=text)
    parser.add_argument(
        "--out", type=Path, default=costs.PATH, metavar="FILE", help="where to write; default: where auto reads"
    )
    args = parser.parse_args(argv)
    with run.progress() as tell:
        result = calibrate.calibrate(args.out, tell)
    print(calibrate.summary(result))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`make_options` reads."""
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: on a CPU, a process per arm")
    parser.add_argument("--seed", type=int, default=0, help="what lengths and values are drawn from; default 0")


def make_options(args: argparse.Namespace) -> Options:
    """Convert parsed arguments to the options of a run.

    Raises:
        BenchError: If the device is not available or not supported here, or a time is not positive.
    """
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: no CUDA device is available here; got device='cuda'")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and find_spec("triton") is None:
        raise BenchError("--device: timing on a GPU needs Triton, which is not installed; got device='cuda'")
    budget = getattr(args, "budget", None)
    if budget is not None and not budget > 0:
        raise BenchError(f"--budget: must be over 0 seconds; got budget={budget}")
    part = getattr(args, "part", ALL)
    if part != ALL and budget is None:
        raise BenchError(f"--part: needs a --budget; got part={part!r}")
    options = Options(args.quick, device, memory=not args.no_memory, seed=args.seed, budget=budget, part=part)
    patience = getattr(args, "arm_seconds", None)
    if patience is not None and not patience > 0:
        raise BenchError(f"--arm-seconds: must be over 0; got arm_seconds={patience}")
    if patience is not None or budget is not None:
        options = replace(options, seconds_per_arm=HASTE if patience is None else patience)
    return replace(options, rounds=2) if args.quick else options


def _gpu(argv: list[str]) -> int:
    from flexjag.bench.gpu import main as run_all

    return run_all(argv)


def _tune(argv: list[str]) -> int:
    from flexjag.bench.tuning.tune import main as tune

    return tune(argv)


def _report(argv: list[str]) -> int:
    parser = Parser("flexjag bench report", description="A page with pictures, or tables, from results files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json", help="or folders of them")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--write",
        type=Path,
        metavar="PAGE.md",
        default=PAGE,
        help=f"the Markdown page; default {PAGE}. Pictures go to {PICTURES} beside it",
    )
    where.add_argument("--print", action="store_true", help="print tables instead, and write nothing")
    args = parser.parse_args(argv)
    from flexjag.bench import plots, report, run

    files = [file for path in args.files for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    results = [run.read(path) for path in files]
    if args.print:
        for one in results:
            report.print_results(one)
        return 0
    pictures = []
    try:
        drawn = list(plots.draw(results, args.write.parent / PICTURES))
        pictures = [report.Picture(i, suite, str(PICTURES / path.name), text) for i, suite, path, text in drawn]
    except MissingExtraError as absent:
        print(f"flexjag bench: the page has no pictures: {absent}", file=sys.stderr)
    args.write.parent.mkdir(parents=True, exist_ok=True)
    args.write.write_text(report.to_markdown(results, pictures))
    return 0
