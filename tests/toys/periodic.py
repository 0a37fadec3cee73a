"""A score: ``s + c[h] * (j mod period)``, with c ``[H]`` trained."""

from torch import Tensor

from flexjag.extend import RowTables, Score, Segment, along, node, rescore, score_case


@node
class Periodic(Score):
    """Add a multiple of the key's place in its period."""

    additive = by_position = True  # adds what depends on positions alone: `segments` may share one bias

    c: Tensor = along("query head")
    period: int


@score_case.register(Periodic)
def _(score: Periodic, tables: RowTables):  # FlexAttention's signature, on packed indices
    def add(s, b, h, q, kv):
        j = kv - tables.kv_start[q]
        return s + tables.look_up(score.c, h).to(s.dtype) * (j % score.period)

    return add


@rescore.register(Periodic)
def _(score: Periodic, s: Tensor, segment: Segment):  # the oracle: s is [H, n, m], segment.j is [1, m]
    return s + score.c.to(s.dtype)[:, None, None] * (segment.j % score.period)
