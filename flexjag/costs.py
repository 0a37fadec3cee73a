"""What a call takes on a CPU: a line per way to compute it, fitted to measurements and recorded in ``costs.json``.

A call's time is taken to be ``per_call · calls + per_score · scores``. Both counts are estimated from the number of
segments and tokens, as if all segments were alike, because that needs nothing from the offsets. ``python -m
flexjag.bench calibrate`` measures and fits the lines; the record says where, and how well they chose there.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from flexjag import masks as m
from flexjag.algebra.facts import as_window, attended, extent

PATH = Path(__file__).with_name("costs.json")
ROWS = {
    "segments, runs": 256,
    "segments, shared bias": 256,
    "segments, pointwise": 128,
}  # queries of a call, as the backends cut them
TILE = 128
DIMS = 128  # D + E of the measurements, to which a score's time is in proportion


class Work(NamedTuple):
    """How much there is to do.

    Attributes:
        way: Which line of the record applies.
        calls: Segments, runs of queries, or rows of tiles.
        scores: Scores that are computed, for all heads, scaled to D + E = 128.
    """

    way: str
    calls: float
    scores: float


class Line(NamedTuple):
    """Seconds per call and per score."""

    per_call: float
    per_score: float

    def seconds(self, work: Work) -> float:
        """What `work` takes."""
        return self.per_call * work.calls + self.per_score * work.scores


def lengths(segments: int, num_q: int, num_kv: int) -> tuple[int, float, float]:
    """S, and the mean numbers n of queries and m of keys of a segment."""
    segments = max(1, segments)
    return segments, num_q / segments, num_kv / segments


def work_of_segments(way: str, mask: m.Mask, segments: int, num_q: int, num_kv: int, per_score: float) -> Work:
    """Calls and scores of the backend ``segments``.

    Args:
        way: ``"segments, whole"``, ``"segments, runs"``, ``"segments, shared bias"`` or ``"segments, pointwise"``.
        mask: The mask.
        segments: S.
        num_q: T_q.
        num_kv: T_kv.
        per_score: ``H · (D + E) / 128``.
    """
    segments, n, keys = lengths(segments, num_q, num_kv)
    if way == "segments, whole":
        reach = keys if as_window(mask) == (None, None, "start") else keys / 2
        return Work(way, segments, num_q * reach * per_score)
    rows = min(n, ROWS[way])
    calls = segments * max(1.0, -(-n // ROWS[way]))
    return Work(way, calls, num_q * min(keys, extent(mask, keys) + rows) * per_score)


def work_of_tiles(way: str, mask: m.Mask, segments: int, num_q: int, num_kv: int, per_score: float) -> Work:
    """Rows of tiles and scores of the backend ``tiled``; arguments as :func:`work_of_segments`."""
    segments, n, keys = lengths(segments, num_q, num_kv)
    rows = max(1.0, num_q / TILE)
    # A row of tiles meets the keys of its own tokens' segments, or of one segment what its tokens reach.
    met = min(num_kv, max(1.0, TILE / max(n, 1.0)) * keys, attended(mask, keys) + TILE)
    met = max(met, min(keys, attended(mask, keys)), 1.0)
    return Work(way, rows, rows * met * TILE * per_score)


@cache
def record() -> dict[str, Line]:
    """The lines of ``costs.json``, by way and ``"forward"`` or ``"training"``."""
    lines = json.loads(PATH.read_text())["lines"]
    return {name: Line(x["per_call"], x["per_score"]) for name, x in lines.items()}


def seconds(work: Work, grad: bool) -> float:
    """What `work` is expected to take, forward or forward and backward."""
    return record()[f"{work.way}, {'training' if grad else 'forward'}"].seconds(work)
