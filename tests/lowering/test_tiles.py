"""Tiles: by hand, against create_block_mask, in memory and without host reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EDGE_LENGTHS, jagged
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import flexjag as fj
from flexjag import Causal, Chunked, Full, GlobalTokens, MaskMod, PerHead, Prefix, SameGroup, Window
from flexjag.lowering.tiles import REFINE_CHUNK, TileList, TileTable, blocks


def kinds(tiles: TileList, rows: int, cols: int) -> list[str]:
    """The grid as text: one string per tile row, `.` EMPTY, `p` PARTIAL, `F` FULL."""
    grid = [["."] * cols for _ in range(rows)]
    for row, col, full, live in zip(*(x.tolist() for x in (tiles.row, tiles.col, tiles.full, tiles.live)), strict=True):
        if live:
            assert grid[row][col] == ".", "a tile listed twice"
            grid[row][col] = "F" if full else "p"
    return ["".join(row) for row in grid]


def plan_kinds(plan: fj.Plan) -> list[str]:
    return kinds(plan.tiles.all_heads, *plan.grid)


HAND = [
    ([48], Full(), ["FFF", "FFF", "FFF"]),
    ([48], Causal(), ["p..", "Fp.", "FFp"]),
    ([48], ~Causal(), ["pFF", ".pF", "..p"]),
    ([48], Window(16, 0), ["p..", "pp.", ".pp"]),
    ([48], Chunked(16), ["F..", ".F.", "..F"]),
    ([48], Chunked(32), ["FF.", "FF.", "..F"]),
    ([48], Prefix(16), ["F..", "F..", "F.."]),
    ([48], Prefix(17), ["Fp.", "Fp.", "Fp."]),
    ([48], GlobalTokens(16), ["FFF", "F..", "F.."]),
    ([48], Causal() & (Window(0, 0) | Prefix(16)), ["p..", "Fp.", "F.p"]),
    ([48], ~Full(), ["...", "...", "..."]),
    ([16, 32], Full(), ["F..", ".FF", ".FF"]),
    ([8, 8, 32], Full(), ["p..", ".FF", ".FF"]),
    ([24, 24], Full(), ["Fp.", "ppp", ".pF"]),
    ([40], Full(), ["FFp", "FFp", "ppp"]),
    ([5], Full(), ["p"]),
    ([0, 16, 0], Full(), ["F"]),
]


@pytest.mark.parametrize(("lengths", "mask", "expected"), HAND, ids=[f"{n}-{x!r}" for n, x, _ in HAND])
def test_by_hand(lengths: list[int], mask: fj.Mask, expected: list[str]) -> None:
    assert plan_kinds(fj.plan(jagged(lengths), mask=mask, block_size=16)) == expected


def test_two_spans_that_meet_inside_a_tile_cover_it() -> None:
    """Different rows are covered by different spans of the sandwich: the tile is FULL all the same."""
    half = torch.arange(16) < 8
    lo = torch.where(half, 0, 3)[None].expand(1, 16)
    assert plan_kinds(fj.plan(jagged([16]), mask=fj.Rows(lo, torch.full((1, 16), 16)) | Prefix(3), block_size=16)) == [
        "F"
    ]


def dense_kinds(bm: BlockMask, rows: int, cols: int, head: int = 0) -> tuple[list[str], list[str]]:
    """A BlockMask's grid by its key side and by its query side."""

    def grid(partial: tuple[Any, Any], full: tuple[Any, Any], n: int, m: int) -> list[list[str]]:
        out = [["."] * m for _ in range(n)]
        for mark, (count, index) in (("p", partial), ("F", full)):
            for i in range(n if count is not None else 0):
                for j in index[0, head, i, : int(count[0, head, i])].tolist():
                    assert out[i][j] == ".", "a tile listed twice"
                    out[i][j] = mark
        return out

    kv = grid((bm.kv_num_blocks, bm.kv_indices), (bm.full_kv_num_blocks, bm.full_kv_indices), rows, cols)
    q = grid((bm.q_num_blocks, bm.q_indices), (bm.full_q_num_blocks, bm.full_q_indices), cols, rows)
    return ["".join(row) for row in kv], ["".join(column) for column in zip(*q, strict=True)]


LENGTHS = {
    **EDGE_LENGTHS,
    "tile_32_minus_1": [31],
    "tile_32_plus_1": [33],
    "two_tiles_and_one": [65],
    "uneven": [100, 3, 1, 0, 50],
    "segments_on_tiles": [32, 64, 16],
}
PREDICATES = {
    "full": (Full(), lambda i, j: i == i),
    "causal": (Causal(), lambda i, j: j <= i),
    "window": (Window(20, 3), lambda i, j: (i - 20 <= j) & (j <= i + 3)),
    "sinks": (Causal() & (Window(9, 0) | Prefix(2)), lambda i, j: (j <= i) & ((i - 9 <= j) | (j < 2))),
    "chunked": (Chunked(16), lambda i, j: i // 16 == j // 16),
    "globals": (GlobalTokens(17), lambda i, j: (i < 17) | (j < 17)),
    "nothing": (~Full(), lambda i, j: i != i),
    "opaque": (MaskMod(lambda b, h, q, kv: (q // 16 + kv // 16) % 2 == 0), lambda i, j: (i // 16 + j // 16) % 2 == 0),
}


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(
    "lengths", [v for v in LENGTHS.values() if sum(v)], ids=[k for k, v in LENGTHS.items() if sum(v)]
)
@pytest.mark.parametrize("name", PREDICATES)
def test_classification_is_create_block_masks(name: str, lengths: list[int], block: int) -> None:
    mask, allowed = PREDICATES[name]
    segment = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)])
    pos = torch.tensor([i for n in lengths for i in range(n)])

    def packed(b, h, q, kv):  # type: ignore[no-untyped-def]
        return (segment[q] == segment[kv]) & allowed(pos[q], pos[kv])

    total = sum(lengths)
    theirs = create_block_mask(packed, 1, 1, total, total, device="cpu", BLOCK_SIZE=block)
    plan = fj.plan(jagged(lengths), mask=mask, block_size=block)
    expected = dense_kinds(theirs, *plan.grid)[0]
    assert plan_kinds(plan) == expected
    assert dense_kinds(plan.block_mask, *plan.grid) == (expected, expected)


def test_cross_attention_classification() -> None:
    """More keys than queries and the reverse, with segments that are empty on one side."""
    lengths, kv_lengths = [20, 0, 33], [50, 7, 16]
    q_seg, kv_seg = (torch.tensor([s for s, n in enumerate(x) for _ in range(n)]) for x in (lengths, kv_lengths))
    q_pos, kv_pos = (torch.tensor([i for n in x for i in range(n)]) for x in (lengths, kv_lengths))
    shift = torch.tensor(kv_lengths) - torch.tensor(lengths)

    def packed(b, h, q, kv):  # type: ignore[no-untyped-def]
        return (q_seg[q] == kv_seg[kv]) & (kv_pos[kv] <= q_pos[q] + shift[q_seg[q]])

    theirs = create_block_mask(packed, 1, 1, sum(lengths), sum(kv_lengths), device="cpu", BLOCK_SIZE=16)
    plan = fj.plan(jagged(lengths), jagged(kv_lengths), mask=Causal("end"), block_size=16)
    expected = dense_kinds(theirs, *plan.grid)[0]
    assert dense_kinds(plan.block_mask, *plan.grid) == (expected, expected)


def test_per_head_tables() -> None:
    plan = fj.plan(jagged([40]), mask=PerHead([Causal(), Full(), Causal()]), block_size=16)
    assert dense_kinds(plan.block_mask, *plan.grid, head=0)[0] == ["p..", "Fp.", "ppp"]
    assert dense_kinds(plan.block_mask, *plan.grid, head=1)[0] == ["FFp", "FFp", "ppp"]
    assert dense_kinds(plan.block_mask, *plan.grid, head=2) == dense_kinds(plan.block_mask, *plan.grid, head=0)
    assert [row.replace("F", "p") for row in plan_kinds(plan)] == ["ppp"] * 3


def test_tables_are_stored_sparsely() -> None:
    """8192 tiles a side would be 268 MB per table; the storage holds the widest row's width only."""
    plan = fj.plan(jagged([256] * 512, dtype=torch.float32), block_size=16)
    for table in (plan.tiles.kv_partial, plan.tiles.kv_full, plan.tiles.q_partial, plan.tiles.q_full):
        assert isinstance(table, TileTable)
        assert table.index.shape == (1, 1, 8192, 8192)
        assert table.index.untyped_storage().nbytes() < 4 * 8192 * 32


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made under it has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


TOKENS = 20_000
INTERVALS = [Full(), Causal(), Causal() & (Window(64, 0) | Prefix(4)), ~(Window(8, 8) | Prefix(1)), GlobalTokens(4)]


@pytest.mark.parametrize("mask", INTERVALS, ids=repr)
@pytest.mark.parametrize("lengths", [[400] * 50, [TOKENS]], ids=["50 segments", "1 segment"])
def test_planning_makes_nothing_quadratic(mask: fj.Mask, lengths: list[int]) -> None:
    x = jagged(lengths, dtype=torch.float32)
    with LargestTensor() as seen:
        plan = fj.plan(x, mask=mask)
        plan.block_mask  # noqa: B018
    tiles = blocks(TOKENS, 128) ** 2
    assert TOKENS <= seen.numel <= 64 * TOKENS + 8 * tiles
    assert seen.numel < TOKENS**2 / 4


@pytest.mark.parametrize(
    "mask",
    [Causal() & MaskMod(lambda b, h, q, kv: (q - kv) % 7 == 0), SameGroup(torch.arange(TOKENS) // 40 % 3)],
    ids=["mask_mod", "same_group"],
)
def test_refining_makes_nothing_quadratic(mask: fj.Mask) -> None:
    x = jagged([2000] * 10, dtype=torch.float32)
    with LargestTensor() as seen:
        fj.plan(x, mask=mask, refine_tiles=True)
    assert seen.numel <= max(REFINE_CHUNK, 64 * TOKENS)
    assert seen.numel < TOKENS**2 / 4


CAUSAL_MOD = MaskMod(lambda b, h, q, kv: kv <= q)


@pytest.mark.parametrize("lengths", [[48], [100, 3, 1, 0, 50], [15, 17, 128]], ids=str)
@pytest.mark.parametrize("block", [16, 32])
def test_refined_predicate_equals_the_interval_node(lengths: list[int], block: int) -> None:
    x = jagged(lengths)
    exact = plan_kinds(fj.plan(x, mask=Causal(), block_size=block))
    assert plan_kinds(fj.plan(x, mask=CAUSAL_MOD, block_size=block)) == exact
    loose = plan_kinds(fj.plan(x, mask=CAUSAL_MOD, block_size=block, refine_tiles=False))
    assert "F" not in "".join(loose)
    assert loose == [row.replace("F", "p") for row in plan_kinds(fj.plan(x, mask=Full(), block_size=block))]


def test_predicate_that_looks_at_heads_is_not_refined() -> None:
    """One tile list serves all heads, so a mask that differs between them stays PARTIAL everywhere."""
    by_head = MaskMod(lambda b, h, q, kv: (kv <= q) & (h == 0))
    plan = fj.plan(jagged([48]), mask=by_head, block_size=16, refine_tiles=True)
    assert plan_kinds(plan) == ["ppp"] * 3
    assert torch.equal(plan.to_dense(heads=2)[0], torch.ones(48, 48).tril().bool())
    assert not plan.to_dense(heads=2)[1].any()


def test_refining_may_empty_the_list() -> None:
    plan = fj.plan(jagged([40]), mask=MaskMod(lambda b, h, q, kv: q < 0), block_size=16)
    assert plan_kinds(plan) == ["...", "...", "..."]
    assert plan.num_tiles == plan.num_full == 0


class NoHostReads(TorchDispatchMode):
    """Fails on operators whose result must come to the host, and on lists of Python numbers sent to the device."""

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def capacity_batch(lengths: list[int], tokens: int, *shape: int) -> fj.Jagged:
    """A batch in a buffer of fixed size, NaN behind the last offset."""
    x = jagged(lengths, *shape)
    values = torch.full((tokens, *shape), torch.nan, dtype=torch.float64)
    values[: sum(lengths)] = x.values
    return fj.Jagged(values, x.offsets)


CAPACITY_MASKS = {
    "full": Full(),
    "causal": Causal(),
    "sinks": Causal() & (Window(5, 0) | Prefix(2)),
    "not": ~Window(2, 2),
    "tensor_bound": Window(torch.tensor([3, 0, 9, 1]), 0),
    "mask_mod": Causal() & MaskMod(lambda b, h, q, kv: (q - kv) % 2 == 0),
    "per_head": PerHead([Causal(), Full()]),
}


@pytest.mark.parametrize("mask", CAPACITY_MASKS.values(), ids=CAPACITY_MASKS.keys())
def test_fixed_capacity_reads_nothing_on_the_host(mask: fj.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    x = capacity_batch([30, 0, 17, 1], 64, 2, 16)

    def fail(self: torch.Tensor) -> None:
        raise AssertionError("tolist() waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", fail)
    with NoHostReads():
        fj.plan(x, mask=mask, max_tokens=64, max_length=32, block_size=16)


def test_the_guard_against_host_reads_can_fail() -> None:
    jagged_on_device = jagged([30, 17], 2, 16)
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoHostReads():
        fj.plan(jagged_on_device, refine_tiles=False)


@pytest.mark.parametrize("mask", CAPACITY_MASKS.values(), ids=CAPACITY_MASKS.keys())
@pytest.mark.parametrize("lengths", [[30, 0, 17, 1], [0, 0, 0, 0], [32, 32, 0, 0], [1, 2, 3, 4]], ids=str)
def test_fixed_capacity_gives_the_same_tiles(mask: fj.Mask, lengths: list[int]) -> None:
    fixed = fj.plan(capacity_batch(lengths, 64), mask=mask, max_tokens=64, max_length=32, block_size=16)
    free = fj.plan(capacity_batch(lengths, 64), mask=mask, max_tokens=64, block_size=16, refine_tiles=False)
    assert plan_kinds(fixed) == plan_kinds(free)
    for head in range(2 if isinstance(mask, PerHead) else 1):
        assert dense_kinds(fixed.block_mask, 4, 4, head) == dense_kinds(free.block_mask, 4, 4, head)


def test_fixed_capacity_does_not_depend_on_the_batch() -> None:
    shapes = set()
    for lengths in ([30, 0, 17, 1], [0, 0, 0, 0], [32, 32, 0, 0]):
        plan = fj.plan(capacity_batch(lengths, 64), mask=Causal(), max_tokens=64, max_length=32, block_size=16)
        bm = plan.block_mask
        shapes.add((plan.tiles.all_heads.row.shape, bm.kv_indices.shape, bm.kv_indices.stride(), bm.q_indices.stride()))
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [([64], 1), ([80] + [1] * 240, 1), ([1] * 100 + [120] + [1] * 100, 20)],
    ids=["all tiles", "one row too wide", "one segment too long"],
)
def test_batch_that_breaks_its_bound_fails_an_assertion(lengths: list[int], max_length: int) -> None:
    with pytest.raises(RuntimeError, match="max_length"):
        fj.plan(jagged(lengths), max_tokens=sum(lengths), max_length=max_length, block_size=16)
