"""Which pairs dropout rules out: a hash of each query row and head, once for a call, and one step more for each key."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra import scores as s
from flexjag.algebra.dropping import FACTORS, STEP, Dropped
from flexjag.algebra.node import along, node, saturated
from flexjag.lowering.layout import Layout
from flexjag.lowering.pairs import by_row


@node
class DroppedRows(s.Score):
    """:class:`~flexjag.algebra.dropping.Dropped` by row: ``mix(rows[h, q] + kv * STEP) < below`` drops a packed key."""

    additive = printable = True
    reads_pairs = False

    rows: Tensor = along("query token", per_head=True)
    below: Tensor = along(None)


@by_row.register(Dropped)
def _(score: Dropped, layout: Layout) -> s.Score:
    segment = layout.q_segment
    if score.ids is not None:  # spare rows are of a segment behind the last
        ids = saturated(score.ids)
        segment = torch.cat([ids, ids.new_zeros(1)])[segment.clamp(max=layout.num_segments)]
    heads = torch.arange(score.heads, dtype=torch.int32, device=layout.device)[:, None]
    rows = torch.zeros((), dtype=torch.int32, device=layout.device)
    for word in (*_halves(score.seed), *_halves(segment), heads, layout.q_pos):
        rows = mixed((rows ^ word) + STEP)
    return DroppedRows(rows - layout.kv_start * STEP, score.below)  # so that kernels count keys from the batch's start


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of integers, as int32."""
    x = x.long()
    return (x & 0xFFFFFFFF).to(torch.int32), (x >> 32).to(torch.int32)


def mixed(x: Tensor) -> Tensor:
    """The hash of int32 numbers, or symbols of them, which all of its bits depend on."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FACTORS[0]  # shifts of int32 repeat the sign, which is cut off
    x = (x ^ ((x >> 15) & 0x1FFFF)) * FACTORS[1]
    return x ^ ((x >> 15) & 0x1FFFF)
