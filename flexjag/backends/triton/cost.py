"""The share of scores on FlexAttention's fixed grid that a mask needs, by which ``auto`` chooses between kernels."""

from __future__ import annotations

from flexjag.algebra import masks as m
from flexjag.algebra.facts import as_window, attended
from flexjag.algebra.normalizers import Softmax
from flexjag.backends.base import ASSUMED_DIMS, Case
from flexjag.backends.costs import Sizes

GRID = 128
"""Size of FlexAttention's tiles on CUDA."""

LEAST = 0.25
"""The share of needed scores from which ``auto`` prefers a fixed grid. By counts of scores, not yet by measurement."""


def wasteful(case: Case) -> str | None:
    """The reason why ``auto`` should leave a softmax to FlexAttention, or None."""
    dims = case.dims or ASSUMED_DIMS
    if not isinstance(case.normalizer, Softmax) or min(dims[2:]) < 16 or case.block_size % GRID:
        return None  # FlexAttention does not take it
    share = needed_share(case.mask, Sizes.of(case.layout, dims))
    if share < LEAST:
        return None
    return f"about {share:.0%} of the scores in tiles of {GRID} are needed, by the mean length, and {LEAST:.0%} will do"


def needed_share(mask: m.Mask, sizes: Sizes) -> float:
    """The expected share of scores that a mask allows, of those in its tiles on a fixed grid.

    It is estimated as if all segments had the same length, because that reads no offsets.

    Args:
        mask: The mask.
        sizes: Sizes of the batch.

    >>> round(needed_share(m.Causal(), Sizes(1024, 20_992, 20_992, 1.0)), 3)
    0.041
    >>> needed_share(m.Causal(), Sizes(8, 16_384, 16_384, 1.0)) > 0.8
    True
    """
    keys, needed = sizes.keys, attended(mask, sizes.keys)
    left, right, _ = as_window(mask) or (None, None, "start")
    reach = (keys if x is None else min(keys, x + 1.0) for x in (left, right))
    tiles = 1 + sum(_overhang(x) for x in reach)
    tiles = min(tiles, 3 + needed / GRID)  # those between the spans of a row are empty
    return min(1.0, needed / (tiles * GRID))


def _overhang(keys: float) -> float:
    """The expected number of tiles to one side of a query's own, whose keys on that side are up to so many."""
    if keys < 1:
        return 0.0
    return 1 - 1 / keys if keys < GRID else (keys / GRID + 1) / 2
