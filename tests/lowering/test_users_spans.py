"""Spans of users' nodes: cut to the segment and made canonical, or an error that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import jagged, make_qkv

import flexjag as fj
from flexjag.errors import MaskError, UnknownNodeError
from flexjag.extend import Layout, Mask, Sandwich, Segment, Spans, dense, mask_case, node, sandwich
from flexjag.testing import assert_compiles, assert_matches_reference, assert_no_leak, assert_sandwich

LENGTHS = [5, 0, 40, 1, 23]


@node
class Given(Mask):
    """A user's node: spans and their dense form by functions."""

    spans: Callable[[Layout], Sandwich]
    allowed: Callable[[Segment], torch.Tensor]


@sandwich.register(Given)
def _(mask, layout):  # type: ignore[no-untyped-def]
    return mask.spans(layout)


@dense.register(Given)
def _(mask, segment):  # type: ignore[no-untyped-def]
    return mask.allowed(segment).expand(segment.n, segment.m)


def exactly(lo: torch.Tensor, hi: torch.Tensor) -> Sandwich:
    spans = Spans(lo, hi)
    return Sandwich(spans, spans)


def behind(layout: Layout) -> Sandwich:
    """Five keys back, into the segment before."""
    row = layout.kv_start + layout.q_pos
    return exactly((row - 5)[None], (row + 1)[None])


def within_outer(layout: Layout) -> Sandwich:
    row = layout.kv_start + layout.q_pos
    return Sandwich(Spans(row[None], row[None] + 2), Spans((row - 9)[None], (row + 9)[None]), fj.Window(5, 1))


def every_other(layout: Layout) -> Sandwich:
    """More spans than are kept, some behind the segment, unsorted and one twice."""
    at = torch.tensor([22, 0, 2, 4, 6, 8, 8, 10, 12, 14, 16, 18, 20])[:, None]
    lo = layout.kv_start + at
    return exactly(lo, lo + 1)


def many_and_a_rest(layout: Layout) -> Sandwich:
    nothing = Spans(layout.kv_start[None], layout.kv_start[None])
    return Sandwich(nothing, every_other(layout).outer, ~(fj.Causal() & fj.MaskMod(lambda b, h, q, kv: kv < 3)))


def overlapping(layout: Layout) -> Sandwich:
    lo = torch.stack([layout.kv_start + 4, layout.kv_start])
    return exactly(lo, lo + 6)


def crossed(layout: Layout) -> Sandwich:
    return exactly((layout.kv_start + 10)[None].long(), (layout.kv_end - 10)[None].long())


GIVEN = {
    "into another segment": Given(behind, lambda s: (s.i - s.j >= 0) & (s.i - s.j <= 5)),
    "with a rest": Given(within_outer, lambda s: (s.i - s.j >= -1) & (s.i - s.j <= 5)),
    "with many in a rest": Given(many_and_a_rest, lambda s: (s.j % 2 == 0) & (s.j < 24) & ~((s.j <= s.i) & (s.j < 3))),
    "many": Given(every_other, lambda s: (s.j % 2 == 0) & (s.j < 24)),
    "overlapping": Given(overlapping, lambda s: s.j < 10),
    "crossed, 64 bits": Given(crossed, lambda s: (s.j >= 10) & (s.j < s.m - 10)),
}


@pytest.mark.parametrize("mask", GIVEN.values(), ids=GIVEN)
def test_they_are_cut_to_the_segment_and_made_canonical(mask: Mask) -> None:
    for one in (mask, ~mask, mask & fj.Causal(), mask | fj.Prefix(2)):
        found = assert_sandwich(one, jagged(LENGTHS)).sandwiches[0].outer
        assert found.lo.dtype == found.hi.dtype == torch.int32
        for backend in ("tiled", "segments"):
            assert_matches_reference(*make_qkv(LENGTHS), mask=one, backend=backend)
            assert_no_leak(backend, *make_qkv(LENGTHS), mask=one)


@node
class Five(Mask):
    """Five keys back, into the segment before; the last two only if the query's position is even."""


@sandwich.register(Five)
def _(mask, layout):  # type: ignore[no-untyped-def]
    row = layout.kv_start + layout.q_pos
    even = fj.MaskMod(lambda b, h, i, j: (i % 2 == 0) | (i - j > 1))
    return Sandwich(Spans((row - 5)[None], (row - 1)[None]), Spans((row - 5)[None], (row + 1)[None]), even)


def test_in_a_graph() -> None:
    batches = [make_qkv(n, dtype=torch.float64) for n in (LENGTHS, [30, 4, 0, 17])]
    wanted = [fj.attention(*x, mask=Five()).values for x in batches]

    def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> torch.Tensor:
        return fj.attention(q, k, v, mask=Five()).values

    assert_compiles(
        attend,
        batches,
        backend="aot_eager",
        backward=False,
        after_each=lambda index, out: torch.testing.assert_close(out, wanted[index]),
    )


def no_rest(layout: Layout) -> Sandwich:
    start, end = layout.kv_start[None], layout.kv_end[None]
    return Sandwich(Spans(start, start), Spans(start, end))


WRONG = {
    r"inner: spans must be two integer tensors \[K, T_q\]; write lo\[None\].*lo=\(9,\)": lambda x: exactly(
        x.kv_start, x.kv_end
    ),
    r"inner: spans must be two integer tensors.*float32": lambda x: exactly(
        x.kv_start[None].float(), x.kv_end[None].float()
    ),
    r"inner: spans must have an entry per query row; got .*lo=\(1, 2\), hi=\(1, 2\), rows=9": lambda x: exactly(
        x.q_offsets[None], x.q_offsets[None]
    ),
    "sandwich: inner and outer that differ need a rest": no_rest,
    "sandwich: a case must return a Sandwich; got .*type='Spans'": lambda x: Spans(x.kv_start[None], x.kv_end[None]),
}


@pytest.mark.parametrize(("message", "spans"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_with_them_is_said(message: str, spans: Callable[[Layout], Sandwich]) -> None:
    with pytest.raises(MaskError, match=message):
        fj.plan(jagged([9]), mask=fj.Causal() & Given(spans, lambda s: s.j < 0))


def test_a_missing_case_is_named_as_it_is_imported() -> None:
    with pytest.raises(UnknownNodeError, match=r"no mask_mod.*@mask_case\.register\(Given\) of flexjag\.extend"):
        mask_case(GIVEN["many"], None, None)
