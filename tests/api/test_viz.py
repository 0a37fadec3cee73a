"""Pictures of plans: true for small ones, bounded and honest for large ones."""

from __future__ import annotations

import base64
import io
import re
import tracemalloc

import pytest
import torch
from cases import EDGE_LENGTHS, jagged
from matplotlib.colors import to_rgba
from matplotlib.image import imread

import flexjag as fj
from flexjag import Causal, Full, MaskMod, PerHead, Prefix, Window
from flexjag.api import picture as viz
from flexjag.errors import PlanError

MASKS = [
    Full(),
    Causal() & (Window(20, 0) | Prefix(2)),
    MaskMod(lambda b, h, q, kv: (q + kv) % 3 == 0),
]


def picture(plan: fj.Plan, head: int = 0):  # type: ignore[no-untyped-def]
    """The axes, and the picture's colours ``[rows, cols, 4]``, 0 to 255."""
    axes = plan.show(head).axes[0]
    return axes, torch.from_numpy(axes.images[0].get_array().copy())


def tile_kinds(dense: torch.Tensor, block: int) -> torch.Tensor:
    """0, 1, 2 for tiles without, with some and with all pairs allowed, from a dense mask; ragged ones are never 2."""
    rows, cols = (-(-n // block) for n in dense.shape)
    wide = torch.nn.functional.pad(dense, (0, cols * block - dense.shape[1], 0, rows * block - dense.shape[0]))
    parts = wide.view(rows, block, cols, block)
    return parts.any(3).any(1).long() + parts.all(3).all(1).long()


@pytest.mark.parametrize("mask", MASKS, ids=["full", "spans", "function"])
@pytest.mark.parametrize("lengths", [x for x in EDGE_LENGTHS.values() if sum(x)], ids=str)
def test_small_pictures_show_every_score(lengths: list[int], mask: fj.Mask) -> None:
    plan = fj.plan(jagged(lengths), mask=mask, block_size=16)
    dense, colors = plan.to_dense(), torch.from_numpy(viz._palette())
    kinds = tile_kinds(dense, 16).repeat_interleave(16, 0).repeat_interleave(16, 1)[: sum(lengths), : sum(lengths)]
    wanted = torch.where(dense & (kinds == viz.PARTIAL), viz.ALLOWED, kinds)
    axes, seen = picture(plan)
    assert torch.equal(seen, colors[wanted])
    assert len(axes.collections[-1].get_paths()) == len(lengths)


def test_the_legend_has_the_colours_of_the_picture() -> None:
    """FULL tiles have one colour, however small the picture."""
    axes, seen = picture(fj.plan(jagged([48, 20]), mask=Causal(), block_size=16))
    used = {tuple(x) for x in seen.flatten(0, 1).tolist()}
    shown = {h.get_label(): to_rgba(h.get_facecolor()) for h in axes.get_legend().legend_handles}
    legend = {tuple(round(255 * part) for part in color) for label, color in shown.items() if label != "segment"}
    assert used == legend | {(255, 255, 255, 255)}
    assert to_rgba(viz.FULL_COLOR) == shown["full tile"]


def test_nothing_to_draw() -> None:
    for lengths in ([], [0, 0]):
        axes, seen = picture(fj.plan(jagged(lengths)))
        assert (seen == 255).all()
        assert "0 of 1 tile, 0 full" in axes.get_title()


def squares_by_hand(plan: fj.Plan, height: int, width: int, step: int) -> torch.Tensor:
    """EMPTY, PARTIAL or FULL for each square, from the list of all tiles."""
    rows, cols = plan.grid
    tiles = plan.tiles.all_heads
    kinds = torch.zeros(rows, cols, dtype=torch.long)
    kinds[tiles.row[tiles.live], tiles.col[tiles.live]] = tiles.full[tiles.live].long() + 1
    found = torch.zeros(-(-rows // height), -(-cols // width), dtype=torch.long)
    for r in range(found.shape[0]):
        seen = [x for x in range(r * height, min(rows, (r + 1) * height)) if x % height % step == 0]
        for c, part in enumerate(kinds[seen].split(width, 1)):
            found[r, c] = viz.FULL if (part == 2).all() else int((part > 0).any())
    return found


LARGE = [
    ([10] * 3000, None, Causal(), 2**21, 1),
    ([6000, 9000, 15000], None, Causal() | Prefix(700), 2**21, 1),
    ([6000, 9000, 15000], None, Causal() | Prefix(700), 2**18, 5),
    ([25000], None, Full(), 2**18, 10),  # squares higher than 256 of them would be
    ([300, 5], [20000, 9000], Window(8000, 3000, "end"), 2**21, 1),
]


@pytest.mark.parametrize(
    ("lengths", "kv_lengths", "mask", "most", "step"), LARGE, ids=[str(i) for i in range(len(LARGE))]
)
def test_large_pictures_are_down_sampled_and_say_so(monkeypatch, lengths, kv_lengths, mask, most, step) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(viz, "MOST_VISITED", most)
    k = None if kv_lengths is None else jagged(kv_lengths)
    plan = fj.plan(jagged(lengths), k, mask=mask, block_size=16)
    axes, seen = picture(plan)
    rows, cols = plan.grid
    height, width = max(step, -(-rows // viz.SIDE)), -(-cols // viz.SIDE)
    assert torch.equal(seen, torch.from_numpy(viz._palette())[squares_by_hand(plan, height, width, step)])
    assert max(seen.shape[:2]) <= viz.SIDE
    title = axes.get_title()
    assert f"{plan.num_tiles} of {rows * cols} tiles, {plan.num_full} full" in title
    assert f"a square is {height} x {width} tiles" in title
    assert ("rows of tiles seen" in title) == (step > 1)
    assert ("not outlined" in title) == (len(lengths) > viz.SIDE)


def test_only_segments_that_can_be_seen_are_outlined() -> None:
    plan = fj.plan(jagged([2] * 300 + [1000] + [2] * 300 + [5]), mask=Causal(), block_size=16)
    axes, _ = picture(plan)
    (path,) = axes.collections[-1].get_paths()
    assert path.vertices.min(0).tolist() == [600, 600]
    assert path.vertices.max(0).tolist() == [1600, 1600]
    assert "segments under 9 x 9 not outlined" in axes.get_title()


@pytest.mark.parametrize("lengths", [[10] * 30_000, [60_000], [1] * 2**18], ids=["short", "long", "tiny"])
def test_a_display_is_small_whatever_the_plan(lengths: list[int]) -> None:
    """Python's and numpy's memory is counted here; of torch's the picture holds tens of thousands of numbers."""
    plan = fj.plan(fj.Jagged.from_lengths(torch.zeros(sum(lengths)), lengths), mask=Causal(), block_size=32)
    plan._repr_html_()  # imports matplotlib and its fonts
    tracemalloc.start()
    try:
        html = plan._repr_html_()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert len(html) < 200e3
    png = base64.b64decode(re.search(r"base64,([^']*)'", html)[1])  # type: ignore[index]
    assert imread(io.BytesIO(png)).shape == (512, 512, 4)


def test_a_display_of_noise_and_of_a_long_mask_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = fj.Dense(torch.rand(1024, 1024, generator=generator) < 0.5)
    mask = PerHead([noise & Window(i, 0) for i in range(32)])
    html = fj.plan(jagged([1024], 32, 1), mask=mask)._repr_html_()
    assert len(html) < 200e3
    assert "…" in html


def test_a_mask_of_a_head_is_drawn_and_named() -> None:
    by_head = fj.plan(jagged([40], 2, 16), mask=PerHead([Causal(), Full()]), block_size=16)
    function = fj.plan(jagged([40], 2, 16), mask=MaskMod(lambda b, h, q, kv: q >= kv * (1 - h)), block_size=16)
    for plan in (by_head, function):
        allowed = []
        for head in range(2):
            axes, seen = picture(plan, head)
            assert f"head {head}" in axes.get_title()
            white = viz._palette()[[viz.EMPTY, viz.PARTIAL]]
            allowed.append(~(seen[:, :, None] == torch.from_numpy(white)).all(3).any(2))
        assert torch.equal(torch.stack(allowed), plan.to_dense(heads=2))
    assert "head" not in picture(fj.plan(jagged([40], 2, 16), mask=Causal()))[0].get_title()


@pytest.mark.parametrize("head", [-1, 2, 7, 0.0, True, None])
def test_a_head_that_is_none(head: object) -> None:
    for mask in (Causal(), PerHead([Causal(), Full()])):
        plan = fj.plan(jagged([40], 2, 16), mask=mask)
        with pytest.raises(PlanError, match=rf"head: must be a head from 0 to 1; got head={head}"):
            plan.show(head)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="head: must be a head of the plan, counted from 0; got head=-3"):
        fj.plan(jagged([40])).show(-3)


def test_an_svg_of_a_picture(tmp_path) -> None:  # type: ignore[no-untyped-def]
    fj.plan(jagged([40]), mask=Causal()).show().savefig(tmp_path / "mask.svg")
    assert "<image" in (tmp_path / "mask.svg").read_text()


@pytest.mark.parametrize("layout", ["constrained", "tight", None])
def test_pictures_in_figures_of_ones_own(layout: str | None) -> None:
    """As notebooks save them: with a layout, and cut to what was drawn."""
    from matplotlib.figure import Figure

    figure = Figure(layout=layout, dpi=40)
    for axes, mask in zip(figure.subplots(1, 2), MASKS[:2], strict=True):
        viz.draw(axes, fj.plan(jagged([40, 20]), mask=mask, block_size=16))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    file.seek(0)
    pixels = torch.from_numpy(imread(file))
    assert (pixels == torch.tensor(to_rgba(viz.FULL_COLOR))).all(2).any()
