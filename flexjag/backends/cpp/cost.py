"""Cost estimate of the backend ``cpp``."""

from __future__ import annotations

from flexjag.algebra import masks as m
from flexjag.algebra.facts import attended
from flexjag.algebra.normalizers import Pointwise, Softmax
from flexjag.backends.base import ASSUMED_DIMS, Case
from flexjag.backends.costs import Sizes, Work

VECTOR = 16  # queries that are computed together, whatever keys each of them attends


def cost(case: Case) -> Work:
    """Estimated work of a case."""
    kinds = {Softmax: "softmax", Pointwise: "pointwise"}
    way = next((name for kind, name in kinds.items() if isinstance(case.normalizer, kind)), "stick-breaking")
    return work(f"cpp, {way}", case.mask, Sizes.of(case.layout, case.dims or ASSUMED_DIMS))


def work(way: str, mask: m.Mask, sizes: Sizes) -> Work:
    """Estimated numbers of segments and of scores."""
    keys = min(sizes.keys, attended(mask, sizes.keys) + VECTOR / 2)
    rows = max(1.0, VECTOR / max(sizes.queries, 1.0))  # computed per query: more than one where a segment has few
    return Work(way, sizes.segments, sizes.tokens, sizes.tokens * rows * keys)
