"""Cost model of a call on a CPU: a line per way to compute it, fitted to measurements and recorded in ``costs.json``.

An attention's time is modelled as ``fixed + per_call · calls + per_token · tokens + per_score · scores``. The counts
are estimated from the number of segments and tokens, as if all segments had the same length: that reads no offsets.
``python -m flexjag.bench calibrate`` measures and fits the lines; the record says where, and how well they chose there.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from flexjag.lowering.layout import Layout

PATH = Path(__file__).with_name("costs.json")
DIMS = 128  # D + E of the measurements, to which a score's time is in proportion


class Work(NamedTuple):
    """The estimated work of a call.

    Attributes:
        way: Name of the way to compute it, which selects a line of the record.
        calls: Number of segments, runs of queries, or rows of tiles.
        tokens: Number of queries of all heads, scaled to D + E = 128.
        scores: Number of computed scores, of all heads, scaled to D + E = 128.
    """

    way: str
    calls: float
    tokens: float
    scores: float


class Line(NamedTuple):
    """A fitted line: seconds per attention, and per call, token and score in it."""

    fixed: float
    per_call: float
    per_token: float
    per_score: float

    def seconds(self, work: Work) -> float:
        """Expected seconds of `work`."""
        counts = (1.0, work.calls, work.tokens, work.scores)
        return sum(each * count for each, count in zip(self, counts, strict=True))


class Sizes(NamedTuple):
    """The sizes of a batch that the cost model reads.

    Attributes:
        segments: S, at least 1.
        num_q: T_q.
        num_kv: T_kv.
        scale: ``H · (D + E) / 128``, the heads and their dimensions as those of the measurements.
    """

    segments: int
    num_q: int
    num_kv: int
    scale: float

    @staticmethod
    def of(layout: Layout, dims: tuple[int, int, int, int]) -> Sizes:
        """The sizes of a layout and of `dims` ``(H, G, D, E)``."""
        heads, _, d, e = dims
        return Sizes(max(1, layout.num_segments), layout.num_q, layout.num_kv, heads * (d + e) / DIMS)

    @property
    def tokens(self) -> float:
        """The number of queries of all heads, scaled to D + E = 128."""
        return self.num_q * self.scale

    @property
    def queries(self) -> float:
        """The mean number n of a segment's queries."""
        return self.num_q / self.segments

    @property
    def keys(self) -> float:
        """The mean number m of a segment's keys."""
        return self.num_kv / self.segments


@cache
def record() -> dict[str, Line]:
    """The lines of ``costs.json``, by way and ``"forward"`` or ``"training"``."""
    lines = json.loads(PATH.read_text())["lines"]
    return {name: Line(**x) for name, x in lines.items()}


def seconds(work: Work, grad: bool) -> float:
    """Expected seconds of `work`: forward, or forward and backward if `grad`."""
    return record()[f"{work.way}, {'training' if grad else 'forward'}"].seconds(work)
