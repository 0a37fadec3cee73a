"""Layout: the coordinates of packed tokens, by hand and by table."""

from __future__ import annotations

import pytest
import torch
from cases import EDGE_LENGTHS, jagged

import flexjag as fj
from flexjag.errors import LayoutError, PlanError
from flexjag.lowering.layout import build_layout


def test_self_by_hand() -> None:
    x = jagged([2, 0, 3])
    layout = build_layout(x, x)
    assert layout.is_self
    assert not layout.has_spare
    assert (layout.num_q, layout.num_kv, layout.num_segments) == (5, 5, 3)
    assert layout.q_segment.tolist() == [0, 0, 2, 2, 2]
    assert layout.q_pos.tolist() == [0, 1, 0, 1, 2]
    assert layout.kv_start.tolist() == [0, 0, 2, 2, 2]
    assert layout.kv_end.tolist() == [2, 2, 5, 5, 5]
    assert layout.kv_segment is layout.q_segment
    assert layout.kv_offsets is layout.q_offsets


def test_cross_by_hand() -> None:
    layout = build_layout(jagged([2, 1, 0]), jagged([1, 0, 4]))
    assert not layout.is_self
    assert layout.kv_start.tolist() == [0, 0, 1]
    assert layout.kv_end.tolist() == [1, 1, 1]
    assert layout.kv_segment.tolist() == [0, 2, 2, 2, 2]
    assert layout.q_length().tolist() == [2, 2, 1]
    assert layout.kv_length().tolist() == [1, 1, 0]


def test_spare_rows_belong_to_no_segment() -> None:
    x = fj.Jagged(torch.zeros(6), torch.tensor([0, 1, 4]))
    layout = build_layout(x, x, max_tokens=6)
    assert layout.has_spare
    assert layout.q_segment.tolist() == [0, 1, 1, 1, 2, 2]
    assert (layout.kv_start[4:] == layout.kv_end[4:]).all()
    assert layout.per_row(torch.tensor([7, 8])).tolist() == [7, 8, 8, 8, 0, 0]
    assert layout.q_length().tolist() == [1, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
def test_table(lengths: list[int]) -> None:
    x = jagged(lengths)
    layout = build_layout(x, x)
    assert layout.q_segment.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]
    assert layout.q_pos.tolist() == [i for n in lengths for i in range(n)]
    assert layout.kv_length().tolist() == [n for n in lengths for _ in range(n)]


def test_everything_is_int32() -> None:
    x = jagged([3])
    layout = build_layout(x, x)
    names = ("q_offsets", "kv_offsets", "q_segment", "kv_segment", "q_pos", "kv_start", "kv_end")
    assert {name: getattr(layout, name).dtype for name in names} == dict.fromkeys(names, torch.int32)


def test_bounds() -> None:
    x = jagged([3, 2])
    with pytest.raises(PlanError, match=r"max_tokens: must equal the rows of q.values; got max_tokens=9, rows=5"):
        build_layout(x, x, max_tokens=9)
    with pytest.raises(PlanError, match=r"max_length: must bound every segment of q; got max_length=2, longest=3"):
        build_layout(x, x, max_length=2, validate=True)
    build_layout(x, x, max_length=3, validate=True)


def test_spare_rows_must_lie_behind_the_batch() -> None:
    x = fj.Jagged(torch.zeros(3), torch.tensor([0, 5]))
    with pytest.raises(LayoutError, match=r"q.offsets: must not pass max_tokens; got last=5, rows=3"):
        build_layout(x, x, max_tokens=3, validate=True)
