"""Spans of a plan's tiles: they hold every allowed pair, and no key of a tile that has none."""

from __future__ import annotations

import pytest
import torch

import flexjag as fj
from flexjag.lowering.spans import MAX_SPANS
from flexjag.lowering.tiles import spans_of_tiles

BLOCK = 16
MASKS = {
    "window or prefix": fj.MaskMod(lambda b, h, q, kv: (q >= kv) & ((q - kv <= 20) | (kv < 4))),
    "stripes": fj.MaskMod(lambda b, h, q, kv: (kv // 16) % 2 == 0),  # more runs of tiles than spans
    "nothing": fj.MaskMod(lambda b, h, q, kv: q < 0),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [[300], [1, 0, 15, 16, 17, 200, 40], [5]], ids=str)
def test_they_cover_the_mask_and_follow_its_tiles(name: str, lengths: list[int]) -> None:
    q = fj.Jagged.from_lengths(torch.zeros(sum(lengths), 1, 16), lengths)
    plan = fj.plan(q, mask=MASKS[name], block_size=BLOCK)
    tokens, tiles = sum(lengths), plan.tiles.all_heads
    spans = spans_of_tiles(tiles, tokens, tokens, BLOCK)
    assert spans.count <= MAX_SPANS
    assert bool((spans.lo <= spans.hi).all())
    assert bool((spans.hi[:-1] <= spans.lo[1:]).all())
    at = torch.arange(tokens)
    covered = ((at >= spans.lo[..., None]) & (at < spans.hi[..., None])).any(0)
    assert not bool((plan.to_dense() & ~covered).any())
    side = -(-tokens // BLOCK)
    live = torch.zeros(side, side, dtype=torch.bool)
    live[tiles.row[tiles.live], tiles.col[tiles.live]] = True
    in_tiles = live.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:tokens, :tokens]
    runs = (live[:, 1:] & ~live[:, :-1]).sum(1) + live[:, 0]
    if int(runs.max()) <= MAX_SPANS:
        assert torch.equal(covered, in_tiles)
    else:
        assert not bool((in_tiles & ~covered).any())
