"""The sections of ``docs/kernels.md`` on our own Triton kernels: registers, spills and shared memory on four GPUs.

Run ``python -m flexjag.codegen docs/kernels.md --own ops``. It takes some minutes and keeps the rest of the page.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flexjag.codegen import cache
from flexjag.codegen.jobs import phase_of_case
from flexjag.codegen.read.measure import Usage
from flexjag.codegen.targets import TARGETS, Target
from flexjag.codegen.worker import Worker
from flexjag.errors import CodegenError

DIMS = (64, 128)
PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Listing:
    """One section of the page.

    Attributes:
        heading: The section's heading.
        module: The module whose ``list_kernels`` lists the section's kernels.
        dtypes: Dtypes that the kernels are compiled for.
        targets: Names of the GPUs that they are launched on.
    """

    heading: str
    module: str
    dtypes: tuple[torch.dtype, ...]
    targets: tuple[str, ...] = tuple(TARGETS)


LISTINGS = {
    "ops": Listing("ragged operations", "flexjag.codegen.own.ops", (torch.float32, torch.bfloat16)),
    "normalizers": Listing("backend `triton`", "flexjag.codegen.own.attention", (torch.bfloat16,)),
    "softmax": Listing(
        "backend `triton`, softmax",
        "flexjag.codegen.own.softmax",
        (torch.bfloat16,),
        tuple(name for name, target in TARGETS.items() if target.vendor == "nvidia"),
    ),
}
"""Sections by their name on the command line and in the page's markers."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a kernel with the constants of one launch.

    Attributes:
        phase: The op that launches it and its example, D and the dtype (:func:`flexjag.codegen.jobs.phase_of_case`).
        name: Kernel name.
        settings: Block sizes and enabled switches, such as ``M 64, N 32, CAREFUL``.
        warps: Warps per program.
    """

    phase: str
    name: str
    settings: str
    warps: int


def rows(listing: Listing) -> Iterator[Row]:
    """The lines of one section's table: each distinct code once, in the order in which the worker compiles them."""
    seen = set()
    for d in DIMS:
        for dtype in listing.dtypes:
            for case in importlib.import_module(listing.module).list_kernels(d, dtype):
                if case.key not in seen:
                    seen.add(case.key)
                    phase = phase_of_case(case.op, d, dtype)
                    yield Row(phase, case.name, _settings(case.constants), case.options["num_warps"])


def _settings(constants: Mapping[Any, Any]) -> str:
    """Block sizes and enabled switches among a kernel's constants, as text.

    >>> _settings({"GROUP": 4, "BLOCK_M": 64, "BLOCK_N": 32, "CAREFUL": True, "SELF": False, (3, 1): 1})
    'M 64, N 32, CAREFUL'
    """
    named = {name: value for name, value in constants.items() if isinstance(name, str)}
    sizes = {name.removeprefix("BLOCK_"): x for name, x in named.items() if name.startswith("BLOCK_")}
    sizes |= {name.lower(): named[name] for name in ("ROWS", "STEP", "WIDE") if name in named}
    blocks = [f"{name} {size}" for name, size in sizes.items()]
    return ", ".join([*blocks, *(name for name, value in named.items() if value is True)])


def cell(usage: Usage, target: Target) -> str:
    """Table cell of one kernel on one GPU: registers, spilled bytes and KiB of shared memory."""
    spilled = f"**{usage.spilled_bytes}**" if usage.spilled_bytes else "0"
    too_much = " **too much**" if usage.shared_bytes > target.shared_per_block else ""
    return f"{usage.registers} / {spilled} / {usage.shared_bytes / 1024:.1f}{too_much}"


def build_section(name: str, progress: Callable[[str], None], workers: int = 2) -> str:
    """Assemble every kernel of a section for every target and return the section's text, markers included."""
    columns, listing = [], LISTINGS[name]
    targets = [TARGETS[one] for one in listing.targets]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(partial(_assemble, listing), targets)
        for target, usages in zip(targets, found, strict=True):
            progress(f"{target.name}, {name}: {len(usages)} kernels")
            columns.append([cell(usage, target) for usage in usages])
    return render_section(name, list(rows(LISTINGS[name])), columns)


def _assemble(listing: Listing, target: Target) -> list[Usage]:
    with Worker() as worker:
        return worker.call("assemble_ops", target, DIMS, listing.dtypes, None, listing.module, timeout=PATIENCE_S)


def render_section(name: str, table: list[Row], columns: list[list[str]]) -> str:
    """The text of a section, from its table's lines and the cells of each target's column."""
    (begin, end), targets = markers(name), LISTINGS[name].targets
    introduction = _INTRODUCTION.format(name=name, heading=LISTINGS[name].heading, **cache.versions())
    lines = [begin, introduction, "| op, D, dtype | kernel | blocks | warps | " + " | ".join(targets) + " |"]
    lines.append("|---|---|---|--:|" + "--:|" * len(targets))
    for row, *cells in zip(table, *columns, strict=True):
        head = [row.phase, f"`{row.name}`", row.settings, str(row.warps)]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join([*lines, end])


def markers(name: str) -> tuple[str, str]:
    """The comments that delimit a section in the page: before it and behind it."""
    return f"<!-- our own kernels, {name}: begin -->", f"<!-- our own kernels, {name}: end -->"


def read_section(page: str, name: str) -> list[tuple[Row, list[str]]]:
    """Parse a section's table into its lines, each with one cell per target.

    Raises:
        CodegenError: If the page has no such section.
    """
    begin, end = markers(name)
    section = page.partition(begin)[2].partition(end)[0]
    if not section:
        raise CodegenError(f"page: has no section between {begin!r} and {end!r}")
    found = []
    for line in section.splitlines():
        phase, *more = (part.strip() for part in line.strip("|").split(" | "))
        if len(more) == 3 + len(LISTINGS[name].targets) and more[0].startswith("`"):
            found.append((Row(phase, more[0].strip("`"), more[1], int(more[2])), more[3:]))
    return found


def put_section(page: str, name: str, section: str) -> str:
    """The page with its section of this name replaced, or with the section appended if it has none."""
    begin, end = markers(name)
    before, found, rest = page.partition(begin)
    if not found:
        return f"{page.rstrip()}\n\n{section}\n"
    return before + section + rest.partition(end)[2]


_INTRODUCTION = """\
## Our own Triton kernels: {heading}

Each kernel as it is launched, assembled for GPUs that were not there. Written by
`python -m flexjag.codegen docs/kernels.md --own {name}` with torch {torch}, triton {triton}, flexjag {flexjag}.
Each code stands here once: one that does not depend on D or the dtype is listed for the first. Cells: registers per
thread / bytes per thread spilled to local memory / KiB of shared memory per block.
"""
