"""Cost estimate of the backend ``tiled``."""

from __future__ import annotations

from flexjag.algebra import masks as m
from flexjag.algebra.facts import attended
from flexjag.algebra.normalizers import Softmax
from flexjag.backends.base import ASSUMED_DIMS, Case
from flexjag.backends.costs import Sizes, Work

TILE = 128


def cost(case: Case) -> Work:
    """Estimated work of a case."""
    way = "tiled" if isinstance(case.normalizer, Softmax) else "tiled, pointwise"
    return work(way, case.mask, Sizes.of(case.layout, case.dims or ASSUMED_DIMS))


def work(way: str, mask: m.Mask, sizes: Sizes) -> Work:
    """Estimated numbers of tile rows and of scores."""
    n, keys = sizes.queries, sizes.keys
    rows = max(1.0, sizes.num_q / TILE)
    # A row of tiles meets what its tokens reach in each of their segments.
    reached = min(keys, attended(mask, keys) + min(n, TILE))
    met = min(sizes.num_kv, max(1.0, TILE / max(n, 1.0)) * reached)
    met = max(met, min(keys, attended(mask, keys)), 1.0)
    return Work(way, rows, sizes.tokens, rows * met * TILE * sizes.scale)
