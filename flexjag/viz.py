"""Pictures of plans. matplotlib is imported on first use."""

from __future__ import annotations

import base64
import html
import io
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from flexjag.explain import explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flexjag.plan import Plan

EXACT_LIMIT = 1024  # tokens up to which every score is drawn, not only every tile
MOST_LINES = 64  # tiles per side, or segments, that are outlined boldly
SHADE = 0.38
PARTIAL_COLOR, FULL_COLOR, SEGMENT_COLOR = "#f2b76b", "#5b93d6", "#c0392b"


def draw_plan(plan: Plan, head: int = 0) -> Figure:
    """Tiles (and, for small batches, single scores) of the packed score matrix, segments outlined.

    Args:
        plan: The plan.
        head: Which head, if the mask depends on it.

    Returns:
        A matplotlib Figure that is not registered with pyplot: show it, or call ``savefig``.
    """
    figure = _figure_type()(figsize=(6.4, 6.4), layout="constrained")
    draw(figure.subplots(), plan, head)
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


def draw(axes: Axes, plan: Plan, head: int = 0) -> None:
    """Draw the plan into existing axes; keys go right, queries go down."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    layout, block = plan.layout, plan.block_size
    num_q, num_kv = max(1, layout.num_q), max(1, layout.num_kv)
    rows, cols = plan.grid
    look: dict[str, Any] = {"interpolation": "nearest", "aspect": "auto"}
    colors = ListedColormap(["white", PARTIAL_COLOR, FULL_COLOR])
    kinds = _kinds(plan, head)
    axes.imshow(kinds, cmap=colors, vmin=0, vmax=2, extent=(0, cols * block, rows * block, 0), **look)
    legend = [Patch(color=PARTIAL_COLOR, label="partial tile"), Patch(color=FULL_COLOR, label="full tile")]
    if max(rows, cols) <= MOST_LINES:
        axes.hlines([r * block for r in range(1, rows)], 0, num_kv, colors="white", linewidth=0.6)
        axes.vlines([c * block for c in range(1, cols)], 0, num_q, colors="white", linewidth=0.6)
    if max(num_q, num_kv) <= EXACT_LIMIT and layout.num_q and layout.num_kv:
        dense = plan.to_dense()
        allowed = (dense[head] if dense.ndim == 3 else dense).cpu().numpy()
        shade = ListedColormap([(0, 0, 0, 0), (0, 0, 0, SHADE)])
        axes.imshow(allowed, cmap=shade, vmin=0, vmax=1, extent=(0, num_kv, num_q, 0), **look)
        legend.append(Patch(color=(0, 0, 0, SHADE), label="darker: allowed"))
    q, kv = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    width = 1.2 if len(q) <= MOST_LINES else 0.4
    for (q0, q1), (k0, k1) in zip(pairwise(q), pairwise(kv), strict=True):
        axes.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, fill=False, edgecolor=SEGMENT_COLOR, linewidth=width))
    legend.append(Patch(fill=False, edgecolor=SEGMENT_COLOR, label="segment"))
    axes.set(xlim=(0, num_kv), ylim=(num_q, 0), xlabel="packed key", ylabel="packed query")
    axes.set_title(f"{plan.mask!r}\n{(kinds > 0).sum()} of {rows * cols} tiles, {(kinds == 2).sum()} full", fontsize=9)
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8, frameon=False)


def _kinds(plan: Plan, head: int) -> Any:
    """A numpy array ``[rows, cols]``: 0 for EMPTY, 1 for PARTIAL, 2 for FULL tiles."""
    import numpy as np

    rows, cols = plan.grid
    which = head if plan.head_of is not None else 0
    kinds = np.zeros((rows, cols), dtype=np.uint8)
    for kind, table in ((1, plan.tiles.kv_partial), (2, plan.tiles.kv_full)):
        count = table.count[0, which, :rows].cpu()
        row = torch.repeat_interleave(torch.arange(rows), count)
        nth = torch.arange(row.shape[0]) - (count.cumsum(0) - count)[row]
        col = table.index[0, which].cpu()[row, nth]
        kinds[row.numpy(), col.numpy()] = kind
    return kinds


def to_html(plan: Plan) -> str:
    """The explanation and the picture, for Jupyter."""
    figure: Any = draw_plan(plan)
    picture = base64.b64encode(figure._repr_png_()).decode()
    return (
        f"<pre>{html.escape(explain(plan))}</pre><img alt='tiles of the plan' src='data:image/png;base64,{picture}'/>"
    )
