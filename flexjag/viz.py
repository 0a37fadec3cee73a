"""Pictures of plans. matplotlib is imported on first use."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from flexjag.explain import explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flexjag.plan import Plan

EXACT_LIMIT = 1024  # tokens up to which every score is drawn, not only every tile
PARTIAL_COLOR, FULL_COLOR, ALLOWED_COLOR, SEGMENT_COLOR = "#f2b76b", "#3b6fb0", "#1d3557", "#c0392b"


def draw_plan(plan: Plan, head: int = 0) -> Figure:
    """Tiles (and, for small batches, single scores) of the packed score matrix, segments outlined.

    Args:
        plan: The plan.
        head: Which head, if the mask depends on it.

    Returns:
        A matplotlib Figure that is not registered with pyplot: show it, or call ``savefig``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.subplots()
    draw(axes, plan, head)
    return figure


def draw(axes: Axes, plan: Plan, head: int = 0) -> None:
    """Draw the plan into existing axes; keys go right, queries go down."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    layout, block = plan.layout, plan.block_size
    num_q, num_kv = max(1, layout.num_q), max(1, layout.num_kv)
    rows, cols = plan.grid
    mask = plan.block_mask
    grid = [[0.0] * cols for _ in range(rows)]
    which = head if plan.head_of is not None else 0
    for kind, counts, indices in (
        (1.0, mask.kv_num_blocks, mask.kv_indices),
        (2.0, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None
        assert indices is not None
        for r, n in enumerate(counts[0, which, :rows].tolist()):
            for c in indices[0, which, r, :n].tolist():
                grid[r][c] = kind
    colors = ListedColormap(["white", PARTIAL_COLOR, FULL_COLOR])
    extent = (0, cols * block, rows * block, 0)
    axes.imshow(grid, cmap=colors, vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
    legend = [Patch(color=PARTIAL_COLOR, label="partial tile"), Patch(color=FULL_COLOR, label="full tile")]
    if max(num_q, num_kv) <= EXACT_LIMIT and layout.num_q and layout.num_kv:
        dense = plan.to_dense()
        dense = dense[head] if dense.ndim == 3 else dense
        shade = ListedColormap([(0, 0, 0, 0), ALLOWED_COLOR])
        axes.imshow(
            dense.cpu().numpy(),
            cmap=shade,
            vmin=0,
            vmax=1,
            extent=(0, num_kv, num_q, 0),
            interpolation="nearest",
            aspect="auto",
            alpha=0.55,
        )
        legend.append(Patch(color=ALLOWED_COLOR, alpha=0.55, label="allowed"))
    q, kv = layout.q_offsets.tolist(), layout.kv_offsets.tolist()
    width = 1.2 if len(q) <= 64 else 0.4
    for q0, q1, k0, k1 in zip(q, q[1:], kv, kv[1:], strict=False):
        axes.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, fill=False, edgecolor=SEGMENT_COLOR, linewidth=width))
    legend.append(Patch(fill=False, edgecolor=SEGMENT_COLOR, label="segment"))
    axes.set(xlim=(0, num_kv), ylim=(num_q, 0), xlabel="packed key", ylabel="packed query")
    axes.set_title(f"{plan.mask!r}\n{plan.num_tiles} of {rows * cols} tiles, {plan.num_full} full", fontsize=9)
    axes.legend(handles=legend, loc="upper right", fontsize=8)


def to_html(plan: Plan) -> str:
    """The explanation and the picture, for Jupyter."""
    buffer = io.BytesIO()
    draw_plan(plan).savefig(buffer, format="png", dpi=80)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<pre>{html.escape(explain(plan))}</pre><img alt='tiles of the plan' src='data:image/png;base64,{picture}'/>"
    )
