"""Rendering of results as tables on a terminal and as a Markdown page. Reads JSON results only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexjag.bench.measuring.measure import median, quartiles

PROGRAM = "python -m flexjag"
ARM_COLUMNS = ("arm", "median", "quartiles", "samples", "first call", "peak memory", "remarks")
WIDTH = 140  # of the tables, if the output is not a terminal
FIGURE_COLUMNS = ("figure", "value", "limit", "met")

Row = tuple[str, ...]


def duration(seconds: float) -> str:
    """A duration with three significant digits, in s, ms or µs.

    >>> duration(0.01234), duration(2.5), duration(0.00012345)
    ('12.3 ms', '2.50 s', '123 µs')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{_digits(seconds * scale)} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """A number of bytes with three significant digits, in MB or GB.

    >>> size(12_345_678), size(9_876_543_210)
    ('12.3 MB', '9.88 GB')
    """
    return f"{_digits(count / 1e9)} GB" if count >= 1e9 else f"{_digits(count / 1e6)} MB"


def _digits(x: float) -> str:
    """A number with three significant digits, or its whole integer part if that is longer, without an exponent."""
    return f"{x:.{max(0, 2 - len(str(int(x))) + 1)}f}"


def figure_rows(suite: dict[str, Any]) -> list[Row]:
    """A suite's figures as rows of :data:`FIGURE_COLUMNS`."""
    rows = []
    for f in suite["figures"]:
        value = "not measured" if f["value"] is None else _value(f["value"], f["unit"])
        met = {True: "yes", False: "no", None: ""}[f["met"]]
        limit = "" if f["limit"] is None else f["limit"] + (" s" if f["unit"] == "s" else "")
        rows.append((f["text"], value, limit, met))
    return rows


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return duration(value)
    number = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{number}{unit}" if unit == "x" else f"{number} {unit}"


def arm_rows(case: dict[str, Any]) -> list[Row]:
    """A case's arms as rows of :data:`ARM_COLUMNS`."""
    return [_arm_row(arm) for arm in case["arms"]]


def _arm_row(arm: dict[str, Any]) -> Row:
    remarks = [f"{k.replace('_', ' ')}: {_extra(v)}" for k, v in arm["extra"].items()]
    if arm["status"] != "ok":
        remarks.insert(0, f"{arm['status']}: {arm['reason']}")
    memory = "" if arm["memory_bytes"] is None else size(arm["memory_bytes"])
    first = "" if arm["first_seconds"] is None else duration(arm["first_seconds"])
    if not arm["seconds"]:
        return arm["name"], "", "", "", first, memory, "; ".join(remarks)
    spread = " to ".join(duration(x) for x in quartiles(arm["seconds"]))
    count = str(len(arm["seconds"]))
    return arm["name"], duration(median(arm["seconds"])), spread, count, first, memory, "; ".join(remarks)


def _extra(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{v} {k}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _facts(facts: dict[str, Any]) -> str:
    parts = []
    for key, value in facts.items():
        if value is not None:
            text = size(value) if key.endswith("_bytes") else _extra(value)
            parts.append(f"{key.removesuffix('_bytes').replace('_', ' ')} {text}")
    return ", ".join(parts)


def _used(columns: Row, rows: list[Row]) -> list[int]:
    """Indices of the columns that are not empty in all rows; the first is always kept."""
    return [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]


def print_results(results: dict[str, Any]) -> None:
    """Print one results file's tables; as Markdown where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(_one_run(results, {})))
        return

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)

    def show(title: str, columns: Row, rows: list[Row]) -> None:
        used = _used(columns, rows)
        table = Table(title=title, title_justify="left")
        for i in used:
            text = columns[i] in ("arm", "figure", "remarks")
            table.add_column(columns[i], justify="left" if text else "right", no_wrap=columns[i] != "remarks")
        for row in rows:
            table.add_row(*(row[i] for i in used))
        console.print(table)

    console.print(_facts(results["environment"]), highlight=False)
    if results["quick"]:
        console.print("A quick run: it shows that the suites work, not how fast anything is.")
    for suite in results["suites"]:
        if suite.get("cut"):
            console.print(f"{suite['name']}: cut short: {suite['cut']}", highlight=False)
        for case in suite["cases"]:
            facts = f"({_facts(case['facts'])}) {case.get('cut') or ''}"
            show(f"{suite['name']}: {case['name']} {facts}", ARM_COLUMNS, arm_rows(case))
        if suite["figures"]:
            show(f"{suite['name']}: figures", FIGURE_COLUMNS, figure_rows(suite))
    for line in _besides(results):
        console.print(line, highlight=False, markup=False)


PREAMBLE = f"""\
# Performance

This page and its pictures are made by `flexjag bench report docs/results/*.json` from the files that `flexjag bench`
writes. Do not edit it. `--write PAGE.md` puts them elsewhere, `--print` prints the tables.

How to measure (`flexjag` is `{PROGRAM}` where it is not installed):

```sh
flexjag bench --out docs/results                  # every suite, on the GPU if there is one, else on the CPU
flexjag bench attention train --out docs/results  # some of them; --quick to see that they work
flexjag bench gpu --out docs/results              # a machine with a GPU: its tests and all suites, in nine minutes
```

The last needs nothing installed but torch, triton, numpy, pytest and hypothesis. It measures first what acceptance
limits compare, writes its results after every case, and says what it had to leave out; the other arms are timed when
time is left, so not in turn with the first.

How it is measured: all arms of a case run in one process on the same inputs. Every arm is checked before it is timed;
one that is wrong is listed as wrong and has no time. Each round then takes a sample of every arm, in a shuffled order.
Times are medians of the samples. A sample is one call; on a GPU, a `triton.testing.do_bench` of 10 ms, in which no call
finds its inputs in the L2 cache. The first call is listed apart, because it also loads code and compiles. Peak memory
is what an arm takes above its inputs, with the plan or the padding mask that it makes once per batch: on a CPU the peak
resident memory of a fresh process that runs this arm alone, on CUDA the allocator's peak. A plan and a padding mask are
made before the clock starts, except where the arm's name or the suite says otherwise. The compile suite runs each batch
once, compiled and eager in turn, and checks the results at the end. In the suite train a sample is one optimizer step,
the mean of ten; the first call is all ten. Energy is what the device's own counter says (NVML's total energy of a GPU,
RAPL's of a CPU's packages) over at least ten seconds of repeated calls; where there is no counter there is no figure.
"""


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        run: Index of its results file, from 0.
        suite: Name of its suite in those results.
        link: Path of the image, relative to the page.
        text: Alternative text.
    """

    run: int
    suite: str
    link: str
    text: str


def to_markdown(results: Sequence[dict[str, Any]], pictures: Sequence[Picture] = ()) -> str:
    """The page ``docs/performance.md`` from results files, in the order given.

    Args:
        results: The contents of the results files.
        pictures: Pictures to be placed above the tables of their suites.
    """
    lines = [PREAMBLE]
    for i, one in enumerate(results):
        shown: dict[str, list[Picture]] = {}
        for picture in pictures:
            if picture.run == i:
                shown.setdefault(picture.suite, []).append(picture)
        lines += _one_run(one, shown)
    return "\n".join(lines).rstrip() + "\n"


def _one_run(results: dict[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> list[str]:
    environment = results["environment"]
    lines = [f"## {environment['device_name'] or environment['cpu']}, {environment['date'][:10]}", ""]
    if results["quick"]:
        lines += ["**A quick run: it shows that the suites work, not how fast anything is.**", ""]
    lines += [_facts(environment) + ".", ""]
    for line in _besides(results):
        lines += [line, ""]
    for suite in results["suites"]:
        lines += [f"### {suite['name']}", "", suite["about"], ""]
        if suite.get("cut"):
            lines += [f"**Cut short**: {suite['cut']}", ""]
        if suite["figures"]:
            lines += _markdown_table(FIGURE_COLUMNS, figure_rows(suite))
        for picture in pictures.get(suite["name"], ()):
            lines += [f"![{picture.text.replace('|', '&#124;')}]({picture.link})", ""]
        for case in suite["cases"]:
            facts = _facts(case["facts"])
            parts = [f"**{case['name']}**", f"({facts})" if facts else None, case.get("cut")]
            lines += [" ".join(filter(None, parts)), ""]
            if case["arms"]:
                lines += _markdown_table(ARM_COLUMNS, arm_rows(case))
    return lines


def _besides(results: dict[str, Any]) -> list[str]:
    """Lines on the other parts of a run of ``gpu``: smoke checks, synchronization with the device, tests."""
    lines = []
    smoke = results.get("smoke")
    if smoke is not None:
        passed = [x["name"] for x in smoke["checks"] if x["passed"]]
        lines.append(f"Ways to the device that work: {', '.join(passed) or 'none'}.")
        lines += [f"- {x['name']}: {_last_line(x['wrong'])}" for x in smoke["checks"] if not x["passed"]]
    sync = results.get("sync")
    if sync is not None:
        told = {True: "passed", False: "failed", None: "not done"}[sync["passed"]]
        lines.append(f"Planning and attention without waiting for the device: {told}. {sync['detail']}")
    tests = results.get("tests")
    if tests is not None:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in tests["counts"].items()) or "none"
        cut = f" {tests['cut']}" if tests["cut"] else ""
        before = f" {tests['left_out']} that had passed before were left out." if tests.get("left_out") else ""
        lines.append(f"Tests that need a GPU: {counts}.{before}{cut}")
        alike: dict[str, list[str]] = {}
        for name, reason in tests["failures"].items():
            alike.setdefault(_last_line(reason), []).append(name)
        for reason, names in alike.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"- `{names[0]}`{more}: {reason}")
    return lines


def _last_line(text: str) -> str:
    r"""The last line of a traceback, which names the error, without pytest's prefix.

    >>> _last_line("a.py:3: in test\n    assert x == 2\nE   assert 1 == 2\n")
    'assert 1 == 2'
    """
    return text.strip().splitlines()[-1].removeprefix("E ").strip() if text.strip() else ""


def _markdown_table(columns: Row, rows: list[Row]) -> list[str]:
    used = _used(columns, rows)

    def line(cells: Row) -> str:
        return "| " + " | ".join(cells[i].replace("|", "\\|") for i in used) + " |"

    return [line(columns), "|" + "---|" * len(used), *(line(row) for row in rows), ""]
