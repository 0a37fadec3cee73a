"""Pictures of plans, of bounded cost whatever the plan's size. matplotlib is imported on first use."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexjag.api.explain import counted, explain, shortened
from flexjag.errors import PlanError, explain_values
from flexjag.extras import needs
from flexjag.lowering import mods
from flexjag.lowering.layout import blocks
from flexjag.lowering.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flexjag.lowering.tiles import TileTable

EXACT_LIMIT = 1024  # tokens up to which every score is drawn, not only every tile
SIDE = 256  # most squares to a side: a little under the axes' pixels, so that none of them is lost
MOST_VISITED, HELD = 2**21, 2**16  # tiles that are looked at before rows of them are left out; at once
MOST_LINES = 64  # tiles per side, or segments, that are outlined boldly
LONGEST_TITLE = 90
SHADE = 0.38
PARTIAL_COLOR, FULL_COLOR, SEGMENT_COLOR = "#f2b76b", "#5b93d6", "#c0392b"
EMPTY, PARTIAL, FULL, ALLOWED = range(4)  # what a square is; ALLOWED is a score in a PARTIAL tile


def draw_plan(plan: Recipe, head: int = 0) -> Figure:
    """Tiles (and, for small batches, single scores) of the packed score matrix, segments outlined.

    A matrix of more than 256 tiles to a side is drawn in squares of several tiles, and the title says so: a square is
    white if all its tiles are EMPTY and blue if all are FULL. Segments smaller than a square are then not outlined.

    Args:
        plan: The plan.
        head: Index of the head to draw, if the mask depends on the head.

    Returns:
        A matplotlib Figure that is not registered with pyplot: show it, or call ``savefig``.

    Raises:
        PlanError: If the plan has no such head.
        MissingExtraError: If matplotlib is not installed.
    """
    needs("pictures", "matplotlib")
    figure = _figure_type()(figsize=(6.4, 6.4))
    # Fixed margins: a layout that looks for them draws everything twice.
    draw(figure.add_axes((0.13, 0.15, 0.84, 0.73)), plan, head)
    return figure


@cache
def _figure_type() -> type[Figure]:
    from matplotlib.figure import Figure

    class PlanFigure(Figure):
        """A figure that Jupyter shows as a cell's value even when pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=80)
            return buffer.getvalue()

    return PlanFigure


def draw(axes: Axes, plan: Recipe, head: int = 0) -> None:
    """Draw the plan into existing axes; keys go right, queries go down.

    Raises:
        PlanError: If the plan has no such head.
    """
    from matplotlib.image import PcolorImage
    from matplotlib.patches import Patch

    layout, block = plan.layout, plan.block_size
    _check_head(plan, head)
    num_q, num_kv = max(1, layout.num_q), max(1, layout.num_kv)
    squares = _squares(plan, head)
    kinds, scale = squares.kinds, block
    mixed = squares.height > 1 or squares.width > 1
    legend = [
        Patch(color=PARTIAL_COLOR, label="partial or mixed tiles" if mixed else "partial tile"),
        Patch(color=FULL_COLOR, label="full tiles" if mixed else "full tile"),
    ]
    if max(num_q, num_kv) <= EXACT_LIMIT and layout.num_q and layout.num_kv:
        kinds, scale = _scores(plan, head, kinds), 1
        legend.append(Patch(color=_shaded(PARTIAL_COLOR), label="darker: allowed"))
    right, bottom = kinds.shape[1] * squares.width * scale, kinds.shape[0] * squares.height * scale
    # imshow would blend in floating point, at 80 MB for a million scores.
    x, y = (torch.linspace(0, end, n + 1).numpy() for end, n in ((right, kinds.shape[1]), (bottom, kinds.shape[0])))
    image = PcolorImage(axes, x, y, _palette()[kinds])
    image.set_in_layout(False)  # it fills the axes, and cannot be asked for its extent
    axes.add_image(image)
    if max(plan.grid) <= MOST_LINES:
        axes.hlines(range(block, num_q, block), 0, num_kv, colors="white", linewidth=0.6)
        axes.vlines(range(block, num_kv, block), 0, num_q, colors="white", linewidth=0.6)
    least = _outline(axes, plan)
    legend.append(Patch(fill=False, edgecolor=SEGMENT_COLOR, label="segment"))
    axes.set(xlim=(0, num_kv), ylim=(num_q, 0), xlabel="packed key", ylabel="packed query")
    axes.set_title("\n".join(_title(plan, head, squares, least)), fontsize=9)
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8, frameon=False)


def _check_head(plan: Recipe, head: object) -> None:
    known = plan.sample[0] if plan.heads is None and plan.sample is not None else plan.heads
    if not isinstance(head, int) or isinstance(head, bool) or head < 0 or (known is not None and head >= known):
        rule = (
            "must be a head of the plan, counted from 0" if known is None else f"must be a head from 0 to {known - 1}"
        )
        raise PlanError(explain_values("head", rule, head=head))


def _sees_head(plan: Recipe) -> bool:
    return plan.head_of is not None or (plan.place() is not None and mods.reads_head(plan.mask_mod, plan.tables))


def _title(plan: Recipe, head: int, squares: _Squares, least: tuple[float, float] | None) -> list[str]:
    rows, cols = plan.grid
    which = f", head {head}" if _sees_head(plan) else ""
    lines = [
        shortened(repr(plan.mask), LONGEST_TITLE) + which,
        f"{squares.num_tiles} of {counted(rows * cols, 'tile')}, {squares.num_full} full",
    ]
    notes: list[str] = []
    if squares.height > 1 or squares.width > 1:
        notes.append(f"down-sampled: a square is {squares.height} x {squares.width} tiles")
        if squares.step > 1:
            notes.append(f"1 in {squares.step} rows of tiles seen")
    if least is not None:
        notes.append(f"segments under {least[0]:.0f} x {least[1]:.0f} not outlined")
    return [*lines, "; ".join(notes)] if notes else lines


@dataclass(frozen=True, eq=False)
class _Squares:
    """A head's tiles by squares of ``height x width`` tiles.

    Attributes:
        kinds: ``[rows, cols]`` uint8, EMPTY or FULL where all tiles of a square are, else PARTIAL.
        height: Tile rows of a square.
        width: Tile columns of a square.
        step: Distance between the tile rows of a square that were counted, at most `height`.
        num_tiles: Non-empty tiles of this head.
        num_full: FULL tiles of this head.
    """

    kinds: np.ndarray[Any, Any]
    height: int
    width: int
    step: int
    num_tiles: int
    num_full: int


def _squares(plan: Recipe, head: int) -> _Squares:
    rows, cols = plan.grid
    which = head if plan.head_of is not None else 0
    tables = [plan.tiles.kv_partial, plan.tiles.kv_full]
    counts = [table.count[0, which, :rows].cpu() for table in tables]
    totals = [int(count.sum()) for count in counts]
    step = blocks(sum(totals), MOST_VISITED)
    height, width = max(step, blocks(rows, SIDE)), blocks(cols, SIDE)
    shape = (blocks(rows, height), blocks(cols, width))
    row = torch.arange(rows)
    seen = row[row % height % step == 0]  # the first row of every square, at least
    some, full = (
        _count(table, count, which, seen, (height, width), shape) for table, count in zip(tables, counts, strict=True)
    )
    tall = torch.bincount(seen // height, minlength=shape[0])
    wide = torch.bincount(torch.arange(cols) // width, minlength=shape[1])
    kinds = torch.where(some + full > 0, PARTIAL, EMPTY)
    kinds[(full > 0) & (full == tall[:, None] * wide)] = FULL
    return _Squares(kinds.to(torch.uint8).numpy(), height, width, step, sum(totals), totals[1])


def _count(
    table: TileTable, count: Tensor, which: int, seen: Tensor, size: tuple[int, int], shape: tuple[int, int]
) -> Tensor:
    """Number of the table's tiles in each square, counted in the tile rows `seen`: int64 ``[rows, cols]``."""
    found = torch.zeros(shape[0] * shape[1], dtype=torch.int64)
    counts = count[seen]
    for part in seen.split(torch.bincount(counts.cumsum(0) // HELD).tolist()):
        row = part.repeat_interleave(count[part])
        slot = torch.arange(row.shape[0]) - (count[part].cumsum(0) - count[part]).repeat_interleave(count[part])
        col = table.index[0, which][row.to(table.index.device), slot.to(table.index.device)].cpu()
        found += torch.bincount(row // size[0] * shape[1] + col // size[1], minlength=found.shape[0])
    return found.view(shape)


def _scores(plan: Recipe, head: int, kinds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Kind of each score's tile, uint8 ``[T_q, T_kv]``; ALLOWED for the allowed scores of PARTIAL tiles."""
    layout, block = plan.layout, plan.block_size
    which = 0 if plan.head_of is None else int(plan.head_of[head])
    mod = mods.mask_mod(plan.kernel_masks[which : which + 1], None, plan.tables, layout)
    number = torch.full((), head, device=layout.device)
    kv = torch.arange(layout.num_kv, device=layout.device)[None]
    exact = kinds.repeat(block, 0).repeat(block, 1)[: layout.num_q, : layout.num_kv]
    for q in torch.arange(layout.num_q, device=layout.device)[:, None].split(block):  # bounds what functions may hold
        part = exact[int(q[0]) : int(q[0]) + q.shape[0]]
        allowed = mod(torch.zeros_like(number), number, q, kv).expand(part.shape).cpu().numpy()
        part[allowed & (part == PARTIAL)] = ALLOWED
    return exact


def _shaded(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 - SHADE) * part for part in to_rgb(color))
    return red, green, blue


@cache
def _palette() -> np.ndarray[Any, Any]:
    """The colours of EMPTY, PARTIAL, FULL and ALLOWED, uint8 ``[4, 4]``."""
    import numpy as np
    from matplotlib.colors import to_rgba_array

    colors = to_rgba_array(["white", PARTIAL_COLOR, FULL_COLOR, _shaded(PARTIAL_COLOR)])
    return (255 * colors).round().astype(np.uint8)


def _outline(axes: Axes, plan: Recipe) -> tuple[float, float] | None:
    """Outline the segments; if there are many, only those as large as a square. Returns a square's sides, or None."""
    from matplotlib.collections import PolyCollection

    layout = plan.layout
    q, kv = layout.q_offsets.cpu(), layout.kv_offsets.cpu()
    chosen, least = torch.arange(layout.num_segments), None
    if layout.num_segments > SIDE:
        least = (layout.num_q / SIDE, layout.num_kv / SIDE)
        chosen = torch.nonzero((q.diff() >= least[0]) | (kv.diff() >= least[1]))[:, 0]
    q0, q1, k0, k1 = q[chosen], q[chosen + 1], kv[chosen], kv[chosen + 1]
    corners = torch.stack([torch.stack([k0, k1, k1, k0], 1), torch.stack([q0, q0, q1, q1], 1)], 2)
    width = 1.2 if chosen.shape[0] <= MOST_LINES else 0.4
    axes.add_collection(
        PolyCollection(corners.numpy(), facecolors="none", edgecolors=SEGMENT_COLOR, linewidths=width, snap=True),  # type: ignore[arg-type]
        autolim=False,
    )
    return least if least is not None and chosen.shape[0] < layout.num_segments else None


def to_html(plan: Recipe) -> str:
    """The explanation and the picture as an HTML fragment, for Jupyter."""
    figure: Any = draw_plan(plan)
    picture = base64.b64encode(figure._repr_png_()).decode()
    return (
        f"<pre>{html.escape(explain(plan))}</pre><img alt='tiles of the plan' src='data:image/png;base64,{picture}'/>"
    )
