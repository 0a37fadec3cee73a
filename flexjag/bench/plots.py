"""Plots of results: time, memory and speed-up against the parameter that a suite's cases vary. Reads JSON results only.

The parameter is a number in the case's name: in "documents, 8,192 tokens" the tokens. Cases whose names differ in that
number alone form a series; a series of three or more is plotted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexjag.bench.measuring.measure import median
from flexjag.extras import needs

NUMBER = r"\d(?:[\d,]*\d)?(?:\.\d+)?"
AXES = {
    "tokens": ("tokens", "packed tokens"),
    "length": ("length", "length N"),
    "sparsity": ("fill", "share of the padded batch that is filled"),
    "fill": ("fill", "share of the padded batch that is filled"),
}
"""By the word beside the number: the key of the case's facts that is the abscissa, and the axis label."""
FEWEST = 3  # points of a series that is plotted
OURS = "flexjag"
SIZE = (9.6, 3.4)  # inches, for three panels

Case = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Cases that differ in one number.

    Attributes:
        axis: Key of :data:`AXES`.
        title: The name that the cases share, without the number.
        cases: The cases in JSON form, in ascending order of the number.
    """

    axis: str
    title: str
    cases: list[Case]

    @property
    def x(self) -> list[float]:
        """Abscissas of the points, one per case."""
        return [float(case["facts"][AXES[self.axis][0]]) for case in self.cases]


def find_series(suite: dict[str, Any]) -> list[Series]:
    """The series of a suite: for each axis the longest, and of several the last, which has the largest cases.

    >>> facts = [{"tokens": n} for n in (3000, 10, 200)]
    >>> cases = [{"name": f"short, {f['tokens']:,} tokens", "facts": f, "arms": []} for f in facts]
    >>> [(s.title, s.x) for s in find_series({"cases": cases})]
    [('short', [10.0, 200.0, 3000.0])]
    """
    found = []
    for axis, (fact, _) in AXES.items():
        groups: dict[str, list[Case]] = {}
        for case in suite["cases"]:
            rest, count = re.subn(rf",? *(?:{axis} {NUMBER}|{NUMBER} {axis})\b", "", case["name"])
            if count == 1 and fact in case["facts"]:
                groups.setdefault(rest.strip(" ,"), []).append(case)
        usable = [(title, cases) for title, cases in groups.items() if len(cases) >= FEWEST]
        if usable:
            longest = max(len(cases) for _, cases in usable)
            title, cases = [x for x in usable if len(x[1]) == longest][-1]
            found.append(Series(axis, title, sorted(cases, key=lambda case: float(case["facts"][fact]))))
    return found


def draw(results: Sequence[dict[str, Any]], folder: Path) -> Iterator[tuple[int, str, Path, str]]:
    """Draw every series of some results files into `folder`, as SVG.

    Yields:
        Index of the results, the suite's name, the file and its alternative text, after each file is written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    names: set[str] = set()
    for i, one in enumerate(results):
        for suite in one["suites"]:
            for series in find_series(suite):
                name = f"{_device(one)}-{suite['name']}-{series.axis}"
                name = name if name not in names else f"{name}-{i + 1}"
                names.add(name)
                path = folder / f"{name}.svg"
                folder.mkdir(parents=True, exist_ok=True)
                draw_series(series, path)
                text = f"{suite['name']}, {series.title}: time, peak memory and speed-up by {AXES[series.axis][1]}"
                yield i, suite["name"], path, text


def _device(results: dict[str, Any]) -> str:
    environment = results["environment"]
    name = "cpu" if environment["device"] == "cpu" else environment["device_name"].lower()
    return ("quick-" if results["quick"] else "") + re.sub(r"[^a-z0-9]+", "-", name)


def draw_series(series: Series, path: Path) -> None:
    """Plot time, memory and speed-up of one series, in three panels.

    Args:
        series: The series.
        path: The file to write; its suffix is the format.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    needs("pictures", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(arm["name"] for case in series.cases for arm in case["arms"] if arm["seconds"]))
    ours = next((name for name in names if name.startswith(OURS)), None)

    def seconds(case: Case, name: str) -> float | None:
        arm = next((x for x in case["arms"] if x["name"] == name), None)
        return median(arm["seconds"]) if arm is not None and arm["seconds"] else None

    def megabytes(case: Case, name: str) -> float | None:
        arm = next((x for x in case["arms"] if x["name"] == name), None)
        found = None if arm is None else arm["memory_bytes"]
        return found / 1e6 if found else None  # a logarithmic scale has no zero

    def speedup(case: Case, name: str) -> float | None:
        us, them = None if ours is None else seconds(case, ours), seconds(case, name)
        return them / us if us and them is not None and name != ours else None

    panels = (("time, ms", lambda *x: None if (s := seconds(*x)) is None else 1e3 * s), ("peak memory, MB", megabytes))
    # Fixed ids and no date: the same results give the same file.
    with rc_context(
        {"svg.hashsalt": "flexjag", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots(1, 3, sharex=True)
        for ax, (label, value) in zip(axes, (*panels, (f"time / time of {ours}", speedup)), strict=True):
            _panel(ax, series, names, label, value)
        axes[2].axhline(1.0, color="black", linewidth=0.8)
        figure.suptitle(series.title)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(
    ax: Any, series: Series, names: Sequence[str], label: str, value: Callable[[Case, str], float | None]
) -> None:
    """Draw a panel: one line per arm, in the same colour in every panel. Missing measurements are left out."""
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = False
    for i, name in enumerate(names):
        found = [(x, value(case, name)) for x, case in zip(series.x, series.cases, strict=True)]
        points = [(x, y) for x, y in found if y is not None]
        drawn |= bool(points)
        ax.plot([x for x, _ in points], [y for _, y in points], f"C{i}o-", markersize=3, label=name)
    if not drawn:
        ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda y, _: short(y))
        ax.yaxis.set_minor_locator(NullLocator())
    if AXES[series.axis][0] != "fill":
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(series.x, [short(x) for x in series.x])
    ax.set_xlabel(AXES[series.axis][1])
    ax.set_ylabel(label)


def short(x: float) -> str:
    """A number with three significant digits and a unit prefix, for a tick label.

    >>> short(128), short(8192), short(8_388_608), short(0.05)
    ('128', '8.19k', '8.39M', '0.05')
    """
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if abs(x) >= scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}"
