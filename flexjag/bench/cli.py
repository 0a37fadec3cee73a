"""The command line: ``python -m flexjag.bench [SUITE…]`` and ``python -m flexjag.bench report FILE… --write PAGE``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from flexjag.bench.registry import BenchError, Options, find, load

SCHEMA = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites, or write a page from their results.

    Args:
        argv: The arguments; default those of the process.

    Returns:
        The exit status: 0, or 2 after a one-line message about what was asked for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _report(argv[1:]) if argv[:1] == ["report"] else _run(argv)
    except (BenchError, OSError) as e:
        print(f"flexjag bench: {e}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = _Parser("flexjag bench", description="Measure what flexjag claims, beside what it replaces.")
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"default all: {', '.join(load())}; or: report FILE…"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the results there, as one JSON file")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of as tables")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process per arm")
    parser.add_argument("--seed", type=int, default=0, help="what lengths and values are drawn from; default 0")
    args = parser.parse_args(argv)
    suites = [find(name) for name in args.suites or load()]
    options = _options(args)
    results = _measure(suites, options, args.out)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        from flexjag.bench.report import print_results

        print_results(results)
    return 0


def _options(args: argparse.Namespace) -> Options:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: no CUDA device is available here; got device='cuda'")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(args.quick, device, memory=not args.no_memory, seed=args.seed)
    return replace(options, rounds=2) if args.quick else options


def _measure(suites: list[Any], options: Options, out: Path | None) -> dict[str, Any]:
    """Run the suites one after the other; the file is written after each, so that an interruption loses one at most."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from flexjag.bench.environment import describe
    from flexjag.bench.measure import run_suite

    results = {"schema": SCHEMA, "quick": options.quick, "environment": describe(options.device), "suites": []}
    path = None if out is None else out / _file_name(results)
    console = Console(stderr=True)
    # Drawn between samples only: a thread that redraws would take its time from what is measured.
    columns = (TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        for suite in suites:
            cases = run_suite(suite, options, lambda text: progress.update(task, description=text, refresh=True))
            figures = [asdict(f) | {"met": f.met} for f in suite.figures(options, cases)]
            entry = {"name": suite.name, "about": suite.about, "cases": [asdict(c) for c in cases], "figures": figures}
            results["suites"].append(entry)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    if path is not None:
        console.print(f"wrote {path}")
    return results


def _file_name(results: dict[str, Any]) -> str:
    environment = results["environment"]
    name = "cpu" if environment["device"] == "cpu" else environment["device_name"].lower()
    date = re.sub(r"[^0-9T]", "", environment["date"])
    return f"{'quick-' if results['quick'] else ''}{re.sub(r'[^a-z0-9]+', '-', name)}-{date}.json"


def _report(argv: list[str]) -> int:
    parser = _Parser("flexjag bench report", description="Tables or a page from results files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE.md", help="write a Markdown page instead of printing tables"
    )
    args = parser.parse_args(argv)
    from flexjag.bench.report import print_results, to_markdown

    results = [read_results(path) for path in args.files]
    if args.write is None:
        for one in results:
            print_results(one)
    else:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(to_markdown(results))
    return 0


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        BenchError: If it is not one.
        OSError: If it cannot be read.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as e:
        raise BenchError(f"{path}: is not JSON: {e}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise BenchError(f"{path}: must be results of flexjag bench, schema {SCHEMA}")
    return results
