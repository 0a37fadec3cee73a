"""A mask whose rows are no intervals: the key's colour, one per token, is the query's or one more."""

import torch
from torch import Tensor

from flexjag.extend import Layout, Mask, RowTables, Sandwich, Segment, Spans, along, dense, mask_case, node, sandwich


@node
class NextColour(Mask):
    """Keys of the query's colour or the next one."""

    colours: Tensor = along("query token")  # [T] integers; kernels get them padded
    kv_colours: Tensor | None = along("key token", default=None, in_place_of_none="colours")


@sandwich.register(NextColour)
def _(mask: NextColour, layout: Layout):
    start, end = layout.kv_start[None], layout.kv_end[None]  # [1, T_q]: no key is certain, all of the segment may be
    return Sandwich(inner=Spans(start, start), outer=Spans(start, end), rest=mask)


@mask_case.register(NextColour)
def _(mask: NextColour, tables: RowTables, layout: Layout):
    of_keys = mask.colours if mask.kv_colours is None else mask.kv_colours

    def allowed(b, h, q, kv):
        step = of_keys[kv] - mask.colours[q]
        return torch.logical_or(step == 0, step == 1)

    return allowed


@dense.register(NextColour)
def _(mask: NextColour, segment: Segment):
    of_keys = mask.colours if mask.kv_colours is None else mask.kv_colours
    step = of_keys[None, segment.kv_rows] - mask.colours[segment.q_rows, None]
    return (step == 0) | (step == 1)
