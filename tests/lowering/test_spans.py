"""Spans: small cases by hand, canonical form, and what happens past the cap on spans per row."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import EDGE_LENGTHS, jagged

import flexjag as fj
from flexjag import Causal, Chunked, Dense, Full, GlobalTokens, MaskMod, Prefix, Rows, SameGroup, Window
from flexjag.algebra.node import node
from flexjag.errors import MaskError, UnknownNodeError
from flexjag.lowering.layout import Layout, build_layout
from flexjag.lowering.spans import MAX_SPANS, Sandwich, Spans, sandwich

LENGTHS = [2, 0, 4]  # rows 0-1 see keys 0-1, rows 2-5 see keys 2-5


def layout_of(lengths: list[int], kv_lengths: list[int] | None = None) -> Layout:
    q = jagged(lengths)
    return build_layout(q, q if kv_lengths is None else jagged(kv_lengths))


def keys_of(spans: Spans) -> list[set[int]]:
    """The keys of each row, as sets."""
    lo, hi = spans.lo.tolist(), spans.hi.tolist()
    return [{j for k in range(spans.count) for j in range(lo[k][i], hi[k][i])} for i in range(spans.lo.shape[1])]


def rows(*ranges: tuple[int, int]) -> list[set[int]]:
    return [set(range(lo, hi)) for lo, hi in ranges]


HAND = [
    (Full(), rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))),
    (Causal(), rows((0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (2, 6))),
    (Window(1, 0), rows((0, 1), (0, 2), (2, 3), (2, 4), (3, 5), (4, 6))),
    (Window(0, 1), rows((0, 2), (1, 2), (2, 4), (3, 5), (4, 6), (5, 6))),
    (Window(None, None), rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))),
    (Window(2**31 - 1, 2**31 - 1), rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))),
    (Window(torch.tensor([0, 9, 2]), 0), rows((0, 1), (1, 2), (2, 3), (2, 4), (2, 5), (3, 6))),
    (Prefix(1), rows((0, 1), (0, 1), (2, 3), (2, 3), (2, 3), (2, 3))),
    (Prefix(2**31 - 1), rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))),
    (Prefix(torch.tensor([0, 1, 3])), rows((0, 0), (0, 0), (2, 5), (2, 5), (2, 5), (2, 5))),
    (Chunked(3), rows((0, 2), (0, 2), (2, 5), (2, 5), (2, 5), (5, 6))),
    (Chunked(torch.tensor([1, 1, 2])), rows((0, 1), (1, 2), (2, 4), (2, 4), (4, 6), (4, 6))),
    (GlobalTokens(1), rows((0, 2), (0, 1), (2, 6), (2, 3), (2, 3), (2, 3))),
    (~Causal(), rows((1, 2), (2, 2), (3, 6), (4, 6), (5, 6), (6, 6))),
    (~Full(), rows(*[(0, 0)] * 6)),
    (Causal() & ~Window(1, 0), rows((0, 0), (0, 0), (2, 2), (2, 2), (2, 3), (2, 4))),
    (~(Prefix(0) | Prefix(0)), rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))),
    (Rows(torch.tensor([0, 0, -5, 1, 3, 9]), torch.tensor([1, 0, 2, 9, 4, 12])),
     rows((0, 1), (0, 0), (2, 4), (3, 6), (5, 6), (6, 6))),
    (Window(1, 0) | Prefix(1), [{0}, {0, 1}, {2}, {2, 3}, {2, 3, 4}, {2, 4, 5}]),
    (~(Window(0, 0) | Prefix(0)), [{1}, {0}, {3, 4, 5}, {2, 4, 5}, {2, 3, 5}, {2, 3, 4}]),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "expected"), HAND, ids=[repr(x) for x, _ in HAND])
def test_by_hand(mask: fj.Mask, expected: list[set[int]]) -> None:
    got = sandwich(mask, layout_of(LENGTHS))
    assert got.exact
    assert keys_of(got.outer) == expected
    assert keys_of(got.inner) == expected


def test_alignment_in_cross_attention() -> None:
    """Two queries, four keys: `end` lines up the last query with the last key."""
    layout = layout_of([2, 3], [4, 1])
    assert keys_of(sandwich(Causal(), layout).outer) == rows((0, 1), (0, 2), (4, 5), (4, 5), (4, 5))
    assert keys_of(sandwich(Causal("end"), layout).outer) == rows((0, 3), (0, 4), (4, 4), (4, 4), (4, 5))
    assert keys_of(sandwich(Window(1, 0, "end"), layout).outer) == rows((1, 3), (2, 4), (4, 4), (4, 4), (4, 5))


def test_same_group() -> None:
    """A group without a gap is known; one with a gap is bounded by its first and last key."""
    got = sandwich(SameGroup(torch.tensor([7, 7, 1, 2, 1, 3])), layout_of(LENGTHS))
    assert keys_of(got.outer) == rows((0, 2), (0, 2), (2, 5), (3, 4), (2, 5), (5, 6))
    assert keys_of(got.inner) == rows((0, 2), (0, 2), (2, 2), (3, 4), (2, 2), (5, 6))
    assert not got.exact


def test_same_group_across_batches() -> None:
    ids, kv_ids = torch.tensor([5, 9, 5]), torch.tensor([5, 5, 4, 9, 5])
    got = sandwich(SameGroup(ids, kv_ids), layout_of([2, 1], [3, 2]))
    assert keys_of(got.outer) == rows((0, 2), (0, 0), (4, 5))


def test_opaque_masks_know_nothing_but_their_segment() -> None:
    for mask in (MaskMod(lambda b, h, q, kv: q == kv), Dense(torch.ones(20, dtype=torch.bool))):
        got = sandwich(mask, layout_of(LENGTHS))
        assert keys_of(got.outer) == rows((0, 2), (0, 2), (2, 6), (2, 6), (2, 6), (2, 6))
        assert keys_of(got.inner) == [set()] * 6
        assert got.rest is not None


def test_shared_matrix_bounds_its_size() -> None:
    got = sandwich(Dense(torch.ones(3, 2, dtype=torch.bool)), layout_of(LENGTHS))
    assert keys_of(got.outer) == rows((0, 2), (0, 2), (2, 4), (2, 4), (2, 4), (2, 2))


def test_not_swaps_the_bounds() -> None:
    got = sandwich(~(MaskMod(lambda b, h, q, kv: q == kv) & Prefix(1)), layout_of([3]))
    assert keys_of(got.outer) == rows((0, 3), (0, 3), (0, 3))
    assert keys_of(got.inner) == rows((1, 3), (1, 3), (1, 3))


def strided(spans: int, gap: int = 2) -> tuple[Rows, list[set[int]]]:
    """One segment of 64 tokens; every row allows `spans` single keys, `gap` apart."""
    lo = (torch.arange(spans) * gap)[:, None].expand(spans, 64)
    return Rows(lo, lo + 1), [set(range(0, spans * gap, gap))] * 64


def check_sound(got: Sandwich, expected: list[set[int]]) -> None:
    for inner, allowed, outer in zip(keys_of(got.inner), expected, keys_of(got.outer), strict=True):
        assert inner <= allowed <= outer


@pytest.mark.parametrize("spans", [1, MAX_SPANS, MAX_SPANS + 1, 3 * MAX_SPANS])
def test_cap_widens_outer_and_narrows_inner(spans: int) -> None:
    mask, expected = strided(spans)
    got = sandwich(mask, layout_of([64]))
    assert got.outer.count <= MAX_SPANS
    assert got.inner.count <= MAX_SPANS
    check_sound(got, expected)
    assert got.exact == (spans <= MAX_SPANS)
    if got.exact:
        assert keys_of(got.outer) == expected
    else:
        assert keys_of(got.inner)[0] == set(range(0, 2 * MAX_SPANS, 2))
        assert keys_of(got.outer)[0] == {*range(0, 2 * MAX_SPANS - 2, 2), *range(2 * MAX_SPANS - 2, 2 * spans - 1)}


@pytest.mark.parametrize("spans", [MAX_SPANS + 1, 3 * MAX_SPANS])
@pytest.mark.parametrize("wrap", ["plain", "not", "and", "or", "opaque"])
def test_mask_past_the_cap_is_still_right(spans: int, wrap: str) -> None:
    mask, _ = strided(spans)
    dense = torch.zeros(64, 64, dtype=torch.bool)
    dense[:, : 2 * spans : 2] = True
    i, j = torch.arange(64)[:, None], torch.arange(64)[None]
    whole, expected = {
        "plain": (mask, dense),
        "not": (~mask, ~dense),
        "and": (Causal() & mask, dense & (j <= i)),
        "or": (mask | Window(3, 1), dense | ((i - 3 <= j) & (j <= i + 1))),
        "opaque": (mask & ~MaskMod(lambda b, h, q, kv: (q + kv) % 3 == 0), dense & ((i + j) % 3 != 0)),
    }[wrap]
    plan = fj.plan(jagged([64]), mask=whole, block_size=16)
    assert torch.equal(plan.to_dense(), expected)
    check_sound(plan.sandwiches[0], [set(torch.nonzero(row)[:, 0].tolist()) for row in expected])


def test_touching_and_overlapping_intervals_merge() -> None:
    lo = torch.tensor([[4], [0], [2], [9]]).expand(4, 12)
    hi = torch.tensor([[6], [2], [5], [9]]).expand(4, 12)
    got = sandwich(Rows(lo, hi), layout_of([12]))
    used = got.outer.hi > got.outer.lo
    assert used.sum(0).tolist() == [1] * 12
    assert keys_of(got.outer) == rows(*[(0, 6)] * 12)


MASKS = {
    "window|prefix": Causal() & (Window(5, 0) | Prefix(2)),
    "not": ~(Window(3, 3) | Prefix(1)),
    "two_gaps": ~(Window(0, 0) | Prefix(0)) & ~Chunked(5),
    "and_of_unions": (Window(2, 0) | Prefix(1)) & (Chunked(4) | Prefix(3)),
    "empty_and": (Window(2, 0) | Prefix(1)) & (~Full() | ~Full()),
    "not_empty": ~((Window(2, 0) | Prefix(1)) & (~Full() | ~Full())),
    "globals": GlobalTokens(2) | Window(1, 1),
    "opaque": Causal() & ~(MaskMod(lambda b, h, q, kv: kv % 2 == 0) | Prefix(1)),
}


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_canonical(mask: fj.Mask, lengths: list[int]) -> None:
    layout = layout_of(lengths)
    got = sandwich(mask, layout)
    for spans in (got.inner, got.outer):
        assert spans.lo.dtype == spans.hi.dtype == torch.int32
        assert spans.lo.shape == spans.hi.shape == (spans.count, sum(lengths))
        assert (spans.lo <= spans.hi).all()
        assert (spans.hi[:-1] <= spans.lo[1:]).all()
        used = spans.lo < spans.hi
        assert (~used | ((spans.lo >= layout.kv_start) & (spans.hi <= layout.kv_end))).all()
        for row in zip(spans.lo.t().tolist(), spans.hi.t().tolist(), strict=True):
            real = [(lo, hi) for lo, hi in zip(*row, strict=True) if lo < hi]
            assert all(a[1] < b[0] for a, b in itertools.pairwise(real)), "spans that touch are one span"


ZEROS = torch.zeros(7, dtype=torch.int32)
MISFITS = [
    (Window(torch.tensor([1, 2]), 0), r"left: must have one entry per segment; got entries=2, segments=3"),
    (Prefix(torch.tensor([1] * 4)), r"n: must have one entry per segment; got entries=4, segments=3"),
    (Chunked(torch.ones(3, dtype=torch.int64, device="meta")), r"size: must be on the batch's device; got .*='cpu'"),
    (Rows(ZEROS[:5], ZEROS[:5]), r"lo: must have one entry.*entries=5, tokens=6"),
    (SameGroup(ZEROS), r"ids: must have one entry.*entries=7, tokens=6"),
    (SameGroup(ZEROS[:6], ZEROS[:5]), r"kv_ids: must have one entry.*entries=5, tokens=6"),
    (Dense(torch.ones(2, 2, dtype=torch.bool, device="meta")), r"values: must be on the batch's device.*device='meta'"),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "message"), MISFITS, ids=[repr(x) for x, _ in MISFITS])
def test_masks_that_do_not_fit_the_layout_raise(mask: fj.Mask, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        fj.plan(jagged(LENGTHS), mask=mask)


def test_unknown_node_says_what_to_register() -> None:
    @node
    class Odd(fj.Mask):
        """A user's node without cases."""

    with pytest.raises(UnknownNodeError, match=r"Odd: this node has no sandwich; got Odd\(\).*register\(Odd\)"):
        fj.plan(jagged(LENGTHS), mask=Causal() & Odd())
