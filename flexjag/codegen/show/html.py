"""HTML report of a target's kernels, for Jupyter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from flexjag.codegen.report import headline

if TYPE_CHECKING:
    from flexjag.codegen.read.loops import Loop
    from flexjag.codegen.report import Kernel, Listing

MOST_CODE = 200_000
"""Maximum number of characters shown of each kind of a kernel's code."""

TITLES = {"triton": "Triton", "ttgir": "TTGIR", "ptx": "PTX", "sass": "SASS", "amdgcn": "AMD GCN"}
HINTS = {
    "registers": "per thread",
    "spilled": "per thread, to local memory, because registers ran out",
    "shared": "shared memory per block",
    "warps": "per block",
    "stages": "of the software pipeline",
    "occupancy": "theoretical: resident warps over the most that fit on a processor",
    "instructions": "machine instructions in all",
    "in loops": "machine instructions in the bodies of the main loops",
    "KV gathers": "loads in the main loops that are indexed by the key's position, besides K and V",
}
ALERT = "background:#c0392b;color:#fff;font-weight:bold"  # white on red, in light and dark themes
BAR = "display:inline-block;height:0.7em;background:currentColor;opacity:0.5"


def to_html(listing: Listing) -> str:
    """Render a listing as one HTML fragment without scripts or external resources, for light and dark themes.

    Args:
        listing: The kernels.

    >>> from flexjag.codegen.report import Listing
    >>> from flexjag.codegen.targets import get_target
    >>> to_html(Listing(get_target("sm_90"), (), {"mask": "Causal()"}, {"torch": "2.13"}, {}))[:71]
    '<div><p><b>sm_90</b> (NVIDIA H200), not run: mask=<code>Causal()</code>'
    """
    return "".join(["<div>", *_parts(listing), "</div>"])


def _parts(listing: Listing) -> Iterable[str]:
    about = ", ".join(f"{escape(k)}={_code(v)}" for k, v in listing.about.items() if v is not None)
    made_by = ", ".join(f"{escape(k)} {escape(v)}" for k, v in listing.versions.items())
    target = f"<b>{escape(listing.target.name)}</b> ({escape(listing.target.device)})"
    yield f"<p>{target}, not run: {about}<br/><small>{made_by}</small></p>"
    if listing.kernels:
        yield _summary(listing.shown)
    else:
        yield "<p>Nothing was assembled, so there is nothing to measure.</p>"
    for kernel in listing.shown:
        yield from _kernel(kernel)
    glue = len(listing.kernels) - len(listing.shown)
    if glue:
        yield f"<p>and {glue} small kernels around them, in <code>.kernels</code></p>"


def _code(value: object) -> str:
    return f"<code>{escape(str(value))}</code>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table of cells, which are already HTML."""
    head = "".join(titles)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str, style: str = "") -> str:
    return f"<td style='text-align:right;{style}'>{text}</td>"


def _left(text: str) -> str:
    return f"<td style='text-align:left'>{text}</td>"


def _title(text: str, side: str = "right") -> str:
    hint = f" title='{escape(HINTS[text])}'" if text in HINTS else ""
    return f"<th scope='col' style='text-align:{side}'{hint}>{escape(text)}</th>"


def _summary(kernels: Sequence[Kernel]) -> str:
    """Table of the same facts as the printed report, with spills in red."""
    rows = []
    for kernel in kernels:
        row = headline(kernel)
        spills = {"spilled"} if kernel.spilled_bytes else set()
        cells = [_cell(escape(text), ALERT if name in spills else "") for name, text in row.items() if name != "kernel"]
        rows.append([_left(f"<b>{escape(row['kernel'])}</b>"), *cells])
    titles = [t for t in headline(kernels[0]) if t != "kernel"] if kernels else []
    return _table([_title("kernel", "left"), *map(_title, titles)], rows)


def _kernel(kernel: Kernel) -> Iterable[str]:
    """Main loops and code of one kernel."""
    yield f"<p><b>{escape(kernel.phase)}</b>: {_code(kernel.name)}"
    if kernel.num_configs > 1:
        yield f", the first of {kernel.num_configs} configurations that the launcher would time"
    yield "</p>"
    if kernel.loops:
        titles = [_title(t, "left") for t in ("main loop", "instructions", "loads of global memory")]
        yield _table(titles, [[_left(cell) for cell in _loop(loop)] for loop in kernel.loops])
    for kind, text in kernel.code.items():
        yield _listing(TITLES[kind], text)


def _loop(loop: Loop) -> tuple[str, str, str]:
    """Cells of a main loop: its range, its instructions as bars, and its loads of global memory."""
    tiles = {True: "<br/>PARTIAL tiles", False: "<br/>FULL tiles", None: ""}[loop.masked]
    loads = "".join(f"<div>{x.count} &times; {escape(x.kind)}: {_code(x.source)}</div>" for x in loop.loads)
    return f"over {escape(loop.over)}{tiles}", _bars(loop), loads or "none"


def _bars(loop: Loop) -> str:
    if loop.instructions is None:
        return "not told apart in the machine code"
    most = max(loop.mix.values(), default=1)
    rows = []
    for kind, count in sorted(loop.mix.items(), key=lambda x: -x[1]):
        if count:
            bar = f"<span style='{BAR};width:{6 * count / most:.2f}em'></span>"
            rows.append(f"<div>{bar} {count:,} {escape(kind)}</div>")
    return f"<b>{loop.instructions:,}</b>{''.join(rows)}"


def _listing(title: str, text: str) -> str:
    """Collapsible code. Long code is truncated, with a note that ``.save(directory)`` writes all of it."""
    shown = text if len(text) <= MOST_CODE else text[: text.rfind("\n", 0, MOST_CODE) + 1 or MOST_CODE]
    size, rest = f"{len(text):,} characters", ""
    if len(shown) < len(text):
        size = f"the first {len(shown):,} of {size}"
        rest = f"<p>{len(text) - len(shown):,} characters are not shown; <code>.save(directory)</code> writes all.</p>"
    style = "max-height:30em;overflow:auto;white-space:pre"
    return f"<details><summary>{title} ({size})</summary><pre style='{style}'>{escape(shown)}</pre>{rest}</details>"
