"""Test utilities for user-defined masks, scores and models: the ones that flexjag's own tests use.

The hypothesis strategies live in :mod:`flexjag.testing.strategies` and need hypothesis (the extra ``testing``);
the assertions need torch alone.
"""

from flexjag.extras import needs
from flexjag.testing.compiles import Graphs, assert_compiles
from flexjag.testing.kernels import assert_kernels_match
from flexjag.testing.leak import assert_no_leak
from flexjag.testing.oracle import assert_matches_reference
from flexjag.testing.rounding.bounds import Bounds, rounding_bounds
from flexjag.testing.structure import assert_sandwich, assert_tiles, dense_mask, span_bound

__all__ = [
    "Bounds",
    "Graphs",
    "Problem",
    "assert_compiles",
    "assert_kernels_match",
    "assert_matches_reference",
    "assert_no_leak",
    "assert_sandwich",
    "assert_tiles",
    "dense_mask",
    "jagged_batches",
    "lengths",
    "masks",
    "problems",
    "rounding_bounds",
    "scores",
    "span_bound",
]

_STRATEGIES = ("Problem", "jagged_batches", "lengths", "masks", "problems", "scores")


def __getattr__(name: str) -> object:
    """Import the strategies on first use, so that the assertions do not need hypothesis."""
    if name in _STRATEGIES:
        needs("testing", "hypothesis")
        from flexjag.testing import strategies

        return getattr(strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
